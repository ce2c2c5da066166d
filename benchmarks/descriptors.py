"""Calls on one descriptor that never wait: ready, tp_read, cached_files, close.

`ready` and `close` look for a few per cent, so their rows share an interpreter and
take many short turns in it. `tp_read` and `cached_files` don't share: gevent's row
starts threads, and the kernel does more work on the descriptors of a process that has
some.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import RawIOBase
from itertools import repeat
from time import perf_counter
from typing import Any

from benchmarks._model import GEVENT, OS, OURS, Benchmark, Sampler, Target, register
from benchmarks._system import disk_directory, need_fds

READY_CALLS = 2_000
PIPE_ROOM_B = 16_384  # a pipe holds this much on every platform
CHUNK_B = 4_096
CHUNKS = 256
CLOSED_PIPES = 64

Read = Callable[[int, int], bytes]
Write = Callable[[int, bytes], int]


@contextmanager
def ready(implementation: str, size: int, quick: bool) -> Iterator[Sampler]:
    if implementation == OS:
        read, write = os.read, os.write
    else:
        library = importlib.import_module(implementation)
        read, write = library.nb_read, library.nb_write
    calls = READY_CALLS // 4 if quick else READY_CALLS
    receiver, sender = os.pipe()
    os.set_blocking(receiver, False)
    os.set_blocking(sender, False)
    data = b"x" * size
    yield lambda: {
        "pair": time_pairs(read, write, receiver, sender, data, calls),
        "read": time_reads(read, receiver, sender, data, calls),
        "write": time_writes(write, receiver, sender, data, calls),
    }
    os.close(receiver)
    os.close(sender)


def time_pairs(read: Read, write: Write, receiver: int, sender: int, data: bytes, calls: int) -> float:
    size = len(data)
    start = perf_counter()
    for _ in repeat(None, calls):
        write(sender, data)
        read(receiver, size)
    return (perf_counter() - start) / calls


def time_reads(read: Read, receiver: int, sender: int, data: bytes, calls: int) -> float:
    """Of reads from a pipe filled beforehand, so that only they are timed."""
    size = len(data)
    batch = min(calls, PIPE_ROOM_B // size)
    filling = data * batch
    elapsed = 0.0
    for _ in range(calls // batch):
        os.write(sender, filling)
        start = perf_counter()
        for _ in repeat(None, batch):
            read(receiver, size)
        elapsed += perf_counter() - start
    return elapsed / (calls // batch * batch)


def time_writes(write: Write, receiver: int, sender: int, data: bytes, calls: int) -> float:
    """Of writes to a pipe emptied afterwards, so that only they are timed."""
    batch = min(calls, PIPE_ROOM_B // len(data))
    elapsed = 0.0
    for _ in range(calls // batch):
        start = perf_counter()
        for _ in repeat(None, batch):
            write(sender, data)
        elapsed += perf_counter() - start
        os.read(receiver, PIPE_ROOM_B)
    return elapsed / (calls // batch * batch)


@contextmanager
def tp_read(implementation: str, size: int, quick: bool) -> Iterator[Sampler]:
    with cached_file(size) as fd:
        if implementation == OS:
            read_all: Callable[[], None] = partial(pread_all, os.pread, fd, size)
        else:
            library = importlib.import_module(implementation)
            read_all = partial(read_all_by, library.tp_read, fd, size)
        yield lambda: time_cached(read_all, fd, quick)


@contextmanager
def cached_files(module: str, name: str, size: int, quick: bool) -> Iterator[Sampler]:
    read = getattr(importlib.import_module(module), name)
    with cached_file(size) as fd:
        if name == "FileIO":
            read_all: Callable[[], None] = partial(read_file, read(fd, "rb", closefd=False), size)
        else:
            read_all = partial(pread_all if name == "pread" else read_all_by, read, fd, size)
        yield lambda: time_cached(read_all, fd, quick)


@contextmanager
def cached_file(size: int) -> Iterator[int]:
    with tempfile.TemporaryFile(dir=disk_directory()[0], buffering=0) as file:
        file.write(b"x" * size * CHUNKS)
        yield file.fileno()


def time_cached(read_all: Callable[[], None], fd: int, quick: bool) -> dict[str, float]:
    rounds = 1 if quick else 4
    os.lseek(fd, 0, os.SEEK_SET)
    read_all()  # warms the cache, and starts the pool's thread
    elapsed = 0.0
    for _ in range(rounds):
        os.lseek(fd, 0, os.SEEK_SET)
        start = perf_counter()
        read_all()
        elapsed += perf_counter() - start
    return {"read": elapsed / (rounds * CHUNKS)}


def read_all_by(read: Read, fd: int, size: int) -> None:
    for _ in repeat(None, CHUNKS):
        read(fd, size)


def pread_all(pread: Callable[[int, int, int], bytes], fd: int, size: int) -> None:
    for offset in range(0, CHUNKS * size, size):
        pread(fd, size, offset)


def read_file(file: RawIOBase, size: int) -> None:
    read = file.read
    for _ in repeat(None, CHUNKS):
        read(size)


def describe_disk() -> str:
    path, kind = disk_directory()
    return f"the file is in {path}, on {kind}"


@contextmanager
def close(implementation: str, pipes: int, quick: bool) -> Iterator[Sampler]:
    """The hub exists in every row, as it does in a program that closes much.

    gevent.os puts the close off until its loop comes round. That turn of the loop is
    part of closing, so it is counted; the more pipes, the more closes share one.
    """
    from gevent import get_hub

    library: Any = importlib.import_module(implementation)
    close_fd = library.close
    hub = get_hub()
    need_fds(2 * pipes)
    is_deferred = False

    def run_loop() -> None:
        with hub.loop.idle() as watcher:
            hub.wait(watcher)

    def close_pipes() -> float:
        fds = [fd for _ in range(pipes) for fd in os.pipe()]
        start = perf_counter()
        for fd in fds:
            close_fd(fd)
        if is_deferred:
            run_loop()
        elapsed = perf_counter() - start
        if any(map(is_open, fds)):
            raise RuntimeError(f"{implementation}.close left descriptors open")
        return elapsed

    def sample() -> dict[str, float]:
        batches = CLOSED_PIPES // pipes
        elapsed = sum(close_pipes() for _ in range(batches))
        return {"close": elapsed / (batches * 2 * pipes)}

    probe = os.pipe()
    for fd in probe:
        close_fd(fd)
    is_deferred = is_open(probe[0])
    run_loop()
    yield sample


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


register(
    Benchmark(
        name="ready",
        summary="nb_write and nb_read on an O_NONBLOCK pipe that never makes them wait",
        case_label="{} byte(s)",
        cases=(1, 64),
        metrics={
            "pair": "one write and one read",
            "read": "one read",
            "write": "one write",
        },
        implementations={name: partial(ready, name) for name in (OURS, GEVENT, OS)},
        targets=(Target("pair", OS, at_most=1.02),),
        is_shared=True,
        turns=50,
        repeat=10,
    )
)

register(
    Benchmark(
        name="tp_read",
        summary="tp_read of a regular file in the page cache; os is os.pread",
        case_label="{} bytes",
        cases=(CHUNK_B,),
        metrics={"read": "one read"},
        implementations={name: partial(tp_read, name) for name in (OURS, GEVENT, OS)},
        targets=(Target("read", GEVENT, at_least=25),),
        note=describe_disk,
        repeat=7,
    )
)

CACHED_READS = {f"{OURS}.{name}": (OURS, name) for name in ("tp_read", "read", "pread", "FileIO")}

register(
    Benchmark(
        name="cached_files",
        summary="what reads a regular file in the page cache; gevent has tp_read alone",
        case_label="{} bytes",
        cases=(512, CHUNK_B, 65_536),
        quick_cases=(CHUNK_B,),
        metrics={"read": "one read"},
        implementations={
            **{row: partial(cached_files, *read) for row, read in CACHED_READS.items()},
            GEVENT: partial(cached_files, GEVENT, "tp_read"),
            OS: partial(cached_files, OS, "pread"),
            "os.read": partial(cached_files, OS, "read"),
        },
        targets=tuple(
            Target("read", GEVENT, at_least=25, of=row, words=">= 25 x gevent's tp_read", cases=(CHUNK_B,)) for row in CACHED_READS
        ),
        note=describe_disk,
        repeat=7,
    )
)

register(
    Benchmark(
        name="close",
        summary="close of a pipe end nobody watches, until it really is closed",
        case_label="{} pipe(s) at once",
        cases=(1, CLOSED_PIPES),
        metrics={"close": "one close"},
        implementations={name: partial(close, name) for name in (OURS, GEVENT, OS)},
        targets=(Target("close", OS, at_most=1.5),),
        is_shared=True,
        turns=50,
        repeat=10,
    )
)
