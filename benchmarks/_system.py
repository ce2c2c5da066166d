"""The machine: what it is, what to write into a report, and the limits to raise."""

from __future__ import annotations

import importlib.metadata
import mmap
import os
import platform
import resource
import sys
import tempfile
from pathlib import Path

from benchmarks._model import Unavailable

PACKAGES = ("coopos", "gevent", "greenlet", "uvloop", "trio")
SPARE_FDS = 64
MB = 1 << 20
MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs", "devtmpfs"}


def describe() -> dict[str, object]:
    """What the figures depend on, for the head of a report."""
    import gevent

    loop = gevent.config.loop
    return {
        "platform": platform.platform(),
        "kernel": os.uname().release,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "gevent_loop": f"{loop.__module__}.{loop.__qualname__}",
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def reside(size_mb: int) -> bytearray:
    """So much memory, all of it touched, and private: pages that are shared anyway fork has not to copy the tables of."""
    memory = bytearray(size_mb * MB)
    for offset in range(0, len(memory), mmap.PAGESIZE):
        memory[offset] = 1
    return memory


def need_fds(count: int) -> None:
    """Raise the soft limit on open files so that `count` more fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_FDS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise Unavailable(f"needs {wanted} open files, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def disk_directory() -> tuple[str, str]:
    """A directory for a temporary file, on a disk if there is one, and its fs type.

    Files on tmpfs refuse RWF_NOWAIT, so a benchmark of cached reads there would
    measure another path.
    """
    candidates = [tempfile.gettempdir(), "/var/tmp", str(Path.home()), os.getcwd()]
    usable = [path for path in candidates if os.access(path, os.W_OK)]
    for path in usable:
        if (kind := file_system(path)) not in MEMORY_FILE_SYSTEMS:
            return path, kind
    return usable[0], file_system(usable[0])


def file_system(path: str) -> str:
    """The type of the file system that `path` is on, "unknown" without /proc."""
    if not sys.platform.startswith("linux"):
        return "unknown"
    best, kind = "", "unknown"
    real = os.path.realpath(path)
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        for line in mounts:
            _, mount, fs_type, *_ = line.split(" ")
            is_above = real == mount or real.startswith(mount.rstrip("/") + "/")
            if is_above and len(mount) >= len(best):
                best, kind = mount, fs_type
    return kind
