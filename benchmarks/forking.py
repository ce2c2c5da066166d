"""Forks of a program that has greenlets, or much memory: fork_greenlets, fork_large."""

from __future__ import annotations

import importlib
import mmap
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

from benchmarks._forked import closing_gate, load_alike, need_children
from benchmarks._model import GEVENT, OS, OURS, Benchmark, Sample, Sampler, Target, register

WITHOUT = f"{OURS}, keep_greenlets=False"
SPAWN = f"{OURS}.posix_spawn"
FORKS = 200
PROGRAM = "/bin/true"
MB = 1 << 20


def time_forks(fork: Callable[[], int], wait: Callable[[int, int], object], count: int) -> Sample:
    """Medians over `count` forks one after the other, of children that end at once."""
    calls, wholes = [], []
    for _ in range(count):
        start = perf_counter()
        pid = fork()
        if pid == 0:
            os._exit(0)
        calls.append(perf_counter() - start)
        wait(pid, 0)
        wholes.append(perf_counter() - start)
    return {"call": statistics.median(calls), "whole": statistics.median(wholes)}


def forks_of(implementation: str) -> tuple[Callable[[], int], Callable[[int, int], object]]:
    library: Any = importlib.import_module(OURS if implementation == WITHOUT else implementation)
    fork = partial(library.fork, keep_greenlets=False) if implementation == WITHOUT else library.fork
    return fork, library.waitpid


@contextmanager
def fork_greenlets(implementation: str, count: int, quick: bool) -> Iterator[Sampler]:
    """As many greenlets are parked as there are live children, of the same function as is measured."""
    load_alike()
    need_children(count + 1)
    import gevent.event

    fork, wait = forks_of(implementation)
    never = gevent.event.Event()
    with closing_gate() as gate:
        for _ in range(count):
            gate.fork(fork)
        gate.wait_until_held()
        parked = [gevent.spawn(never.wait) for _ in range(count)]
        gevent.sleep(0.1)
        yield lambda: time_forks(fork, wait, FORKS // 5 if quick else FORKS)
        gevent.killall(parked)


def spawn(library: Any) -> int:
    pid: int = library.posix_spawn(PROGRAM, [PROGRAM], {})
    return pid


@contextmanager
def fork_large(implementation: str, size_mb: int, quick: bool) -> Iterator[Sampler]:
    """Half of the memory is bytes, and half is objects that the garbage collector knows."""
    load_alike()
    memory = mmap.mmap(-1, size_mb * MB // 2)
    for offset in range(0, len(memory), mmap.PAGESIZE):
        memory[offset] = 1
    objects = [[number] for number in range(size_mb * MB // 2 // 96)]  # a list of one takes about 96 bytes, its number 32 more
    if implementation == SPAWN:
        library: Any = importlib.import_module(OURS)
        fork, wait = partial(spawn, library), library.waitpid
    else:
        fork, wait = forks_of(implementation)
    yield lambda: time_forks(fork, wait, 3 if quick else 10)
    del objects


register(
    Benchmark(
        name="fork_greenlets",
        summary="a fork among parked greenlets and as many live children, with and without the greenlets in the child",
        case_label="{} greenlets and children",
        cases=(0, 100, 4000),
        quick_cases=(0, 100),
        metrics={"call": "the call of fork", "whole": "fork, _exit in the child, waitpid"},
        implementations={name: partial(fork_greenlets, name) for name in (OURS, WITHOUT, GEVENT, OS)},
        targets=(Target("whole", GEVENT, at_most=1.1),),
        repeat=5,
    )
)

register(
    Benchmark(
        name="fork_large",
        summary="how long a hub stands still that starts a process from a large program",
        case_label="{} MB resident",
        cases=(100, 2000),
        quick_cases=(100,),
        metrics={"call": "the call: nothing else runs", "whole": "until the child was waited for"},
        implementations={name: partial(fork_large, name) for name in (OURS, WITHOUT, SPAWN, GEVENT, OS)},
        targets=(Target("call", GEVENT, at_most=1.1),),
        repeat=1,
    )
)
