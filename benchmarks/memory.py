"""What a greenlet costs while it waits: parked_memory.

A greenlet that is parked keeps its part of the C stack, and whatever the call that it is in holds on to: a buffer for what is to
come is best made when it has come. A fresh interpreter looks at its resident memory before and after.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks._model import GEVENT, OURS, Benchmark, Sampler, Target, Unavailable, register
from benchmarks._system import need_fds

if TYPE_CHECKING:
    from gevent import Greenlet

READ_B = 65_536
STATM = "/proc/self/statm"

Spawn = Callable[[int], "Greenlet[..., bytes]"]


@contextmanager
def parked_memory(make_spawn: Callable[[], Spawn], count: int, quick: bool) -> Iterator[Sampler]:
    if not os.path.exists(STATM):
        raise Unavailable(f"this platform has no {STATM}")
    need_fds(2 * (count + 1))
    spawn = make_spawn()
    yield lambda: {"reader": used_by_readers(spawn, count) / count}


def used_by_readers(spawn: Spawn, count: int) -> int:
    import gevent

    pipes = [os.pipe() for _ in range(count + 1)]
    for fd in (fd for fds in pipes for fd in fds):
        os.set_blocking(fd, False)
    receivers, senders = zip(*pipes, strict=True)
    greenlets = [spawn(receivers[0])]  # for it comes the hub, and all that is imported only now
    gevent.sleep(0)
    before = resident_bytes()
    greenlets += map(spawn, receivers[1:])
    gevent.sleep(0)  # whoever was spawned before has run until it waits
    used = resident_bytes() - before
    for sender in senders:
        os.write(sender, b"x")
    if any(greenlet.get() != b"x" for greenlet in greenlets):
        raise RuntimeError("not everybody has read what was written to him")
    return used


def resident_bytes() -> int:
    gc.collect()
    with open(STATM, encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def spawn_function(module: str, name: str) -> Spawn:
    import gevent

    read = getattr(importlib.import_module(module), name)
    return lambda fd: gevent.spawn(read, fd, READ_B)


def spawn_file(module: str, name: str, *arguments: Any) -> Spawn:
    """The file itself is part of what a reader takes."""
    import gevent

    open_file = getattr(importlib.import_module(module), name)
    files: list[Any] = []

    def spawn(fd: int) -> Greenlet[..., bytes]:
        files.append(open_file(fd, *arguments))
        return gevent.spawn(files[-1].read, READ_B)

    return spawn


NB_READ, READ, FILE = "coopos.nb_read", "coopos.read", "coopos.FileIO"

register(
    Benchmark(
        name="parked_memory",
        summary=f"memory of a greenlet that waits in read({READ_B}) on a pipe, in bytes",
        case_label="{} readers",
        cases=(5_000,),
        quick_cases=(2_000,),
        metrics={"reader": "resident bytes for each"},
        implementations={
            NB_READ: partial(parked_memory, partial(spawn_function, OURS, "nb_read")),
            READ: partial(parked_memory, partial(spawn_function, OURS, "read")),
            FILE: partial(parked_memory, partial(spawn_file, OURS, "FileIO", "rb")),
            GEVENT: partial(parked_memory, partial(spawn_function, GEVENT, "nb_read")),
            "gevent FileObject": partial(parked_memory, partial(spawn_file, "gevent.fileobject", "FileObject", "rb", 0)),
        },
        targets=tuple(
            Target("reader", GEVENT, at_most=1, of=name, words="no more than gevent's") for name in (NB_READ, READ, FILE)
        ),
        unit="B",
    )
)
