"""Forks of a program that has greenlets, or much memory: fork_greenlets, fork_large."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from benchmarks._forked import closing_gate, load_alike, need_children
from benchmarks._model import GEVENT, OS, OURS, Benchmark, Sampler, Target, register
from benchmarks._system import MB, reside
from benchmarks.one_child import FORK_METRICS, FORKS, time_forks

WITHOUT = f"{OURS}, keep_greenlets=False"
SPAWN = f"{OURS}.posix_spawn"
PROGRAM = "/bin/true"


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
    memory = reside(size_mb // 2)
    objects = [[number] for number in range(size_mb * MB // 2 // 96)]  # a list of one takes about 96 bytes, its number 32 more
    if implementation == SPAWN:
        library: Any = importlib.import_module(OURS)
        fork, wait = partial(spawn, library), library.waitpid
    else:
        fork, wait = forks_of(implementation)
    yield lambda: time_forks(fork, wait, 3 if quick else 10)
    del objects, memory


register(
    Benchmark(
        name="fork_greenlets",
        summary="a fork among parked greenlets and as many live children, with and without the greenlets in the child",
        case_label="{} greenlets and children",
        cases=(0, 100, 4000),
        quick_cases=(0, 100),
        metrics=FORK_METRICS,
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
        metrics={**FORK_METRICS, "fork": "the call: nothing else runs", "whole": "until the child was waited for"},
        implementations={name: partial(fork_large, name) for name in (OURS, WITHOUT, SPAWN, GEVENT, OS)},
        targets=(Target("fork", GEVENT, at_most=1.1),),
        repeat=1,
    )
)
