"""Many children alive at once: children, fork_live.

A child blocks in a plain read of one pipe, the gate, and ends at its end-of-file. It
uses plain os calls alone and closes only its own copy of the gate's write end, so
that the parent's is the last: closing that lets all go at once, and they also go if
the parent dies. Nothing but the forks themselves is timed before all children have
reached the gate: thousands that are still starting would keep every CPU busy.

Each row has its own interpreter. All have gevent imported and a hub, so that what
fork has to copy is of one size.

`children` counts the CPU time of the parent (user + system), not the wall time: the
children's own ends would drown it.
"""

from __future__ import annotations

import importlib
import os
import resource
import select
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from time import perf_counter, process_time
from typing import Any

from benchmarks._model import (
    GEVENT,
    OS,
    OURS,
    Benchmark,
    Growth,
    Sample,
    Sampler,
    Target,
    Unavailable,
    register,
)
from benchmarks._system import need_fds

PIDFD = "pidfd + epoll"
LEAST_CHILDREN = 400  # fewer are forked and waited for several times over
FORKS = 200

Fork = Callable[[], int]


class Gate:
    """The pipe that holds children back, and the children that it holds."""

    def __init__(self) -> None:
        self.receiver, self.sender = os.pipe()
        self.arrivals, self.arrival_sender = os.pipe()
        self.pids: list[int] = []

    def fork(self, fork: Fork) -> int:
        pid = fork()
        if pid == 0:
            try:
                os.close(self.sender)
                os.write(self.arrival_sender, b"x")
                os.read(self.receiver, 1)
            finally:
                os._exit(0)
        self.pids.append(pid)
        return pid

    def wait_until_held(self) -> None:
        """Return once every child is at the gate, so that none competes for a CPU."""
        awaited = len(self.pids)
        while awaited:
            awaited -= len(os.read(self.arrivals, awaited))

    def open(self) -> None:
        os.close(self.sender)
        self.sender = -1

    def close(self) -> None:
        """Let everyone go and collect who is left; no loop runs meanwhile."""
        if self.sender != -1:
            self.open()
        for fd in (self.receiver, self.arrivals, self.arrival_sender):
            os.close(fd)
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


@contextmanager
def closing_gate() -> Iterator[Gate]:
    gate = Gate()
    try:
        yield gate
    finally:
        gate.close()


def need_children(count: int) -> None:
    need_fds(count)
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise Unavailable(f"needs {count} processes, the hard limit is {hard}")


class Phases:
    """CPU seconds of this process, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        self.mark = process_time()

    def end(self, name: str) -> None:
        now = process_time()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.mark
        self.start()


def wait_with_greenlets(library: Any, gate: Gate, count: int, phases: Phases) -> None:
    """fork_and_watch each child, then park one greenlet in waitpid for each."""
    import gevent

    for _ in range(count):
        gate.fork(library.fork_and_watch)
    phases.end("fork")
    gate.wait_until_held()
    phases.start()
    waiters = [gevent.spawn(library.waitpid, pid, 0) for pid in gate.pids]
    gevent.sleep(0)  # all of them are parked now: they were spawned before this
    phases.end("park")
    gate.open()
    gevent.joinall(waiters, raise_error=True)
    phases.end("wait")
    if [waiter.value for waiter in waiters] != [(pid, 0) for pid in gate.pids]:
        raise RuntimeError("a child was waited for wrongly")


def wait_with_pidfds(gate: Gate, count: int, phases: Phases) -> None:
    """The least an event loop can do: a pidfd each, one epoll for all.

    A child closes what it inherited of them in one call. Children that hold pidfds of
    their siblings make the parent's waitpid several times dearer.
    """
    epoll = select.epoll()
    first = epoll.fileno()
    pid_of: dict[int, int] = {}

    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            os.closerange(first, max(pid_of, default=first) + 1)
        return pid

    for _ in range(count):
        pid = gate.fork(fork)
        pidfd = os.pidfd_open(pid)
        pid_of[pidfd] = pid
        epoll.register(pidfd, select.EPOLLIN)
    phases.end("fork")
    gate.wait_until_held()
    phases.start()
    gate.open()
    while pid_of:
        for pidfd, _ in epoll.poll():
            os.waitpid(pid_of.pop(pidfd), os.WNOHANG)
            epoll.unregister(pidfd)
            os.close(pidfd)
    phases.end("wait")
    epoll.close()


def wait_plainly(gate: Gate, count: int, phases: Phases) -> None:
    for _ in range(count):
        gate.fork(os.fork)
    phases.end("fork")
    gate.wait_until_held()
    phases.start()
    gate.open()
    for pid in gate.pids:
        os.waitpid(pid, 0)
    phases.end("wait")


@contextmanager
def children(implementation: str, count: int, quick: bool) -> Iterator[Sampler]:
    from gevent import get_hub

    get_hub()
    need_children(count)
    way: Callable[[Gate, int, Phases], None]
    if implementation == OS:
        way = wait_plainly
    elif implementation == PIDFD:
        if not hasattr(os, "pidfd_open") or not hasattr(select, "epoll"):
            raise Unavailable("this platform has no pidfd_open and epoll")
        way = wait_with_pidfds
    else:
        way = partial(wait_with_greenlets, importlib.import_module(implementation))

    def one_round() -> dict[str, float]:
        with closing_gate() as gate:
            phases = Phases()
            way(gate, count, phases)
        return phases.seconds

    def sample() -> Sample:
        rounds = max(1, LEAST_CHILDREN // count)
        if rounds > 1:
            one_round()  # a warm-up, where it is cheap
        taken = [one_round() for _ in range(rounds)]
        return {name: sum(t[name] for t in taken) / (rounds * count) for name in taken[0]}

    yield sample


@contextmanager
def fork_live(implementation: str, live: int, quick: bool) -> Iterator[Sampler]:
    """The living were forked by the same function as is measured."""
    from gevent import get_hub

    get_hub()
    need_children(live + 1)
    library: Any = importlib.import_module(implementation)
    with closing_gate() as gate:
        for _ in range(live):
            gate.fork(library.fork)
        gate.wait_until_held()
        yield lambda: time_forks(library, FORKS // 5 if quick else FORKS)


def time_forks(library: Any, count: int) -> Sample:
    """Medians over `count` forks one after the other, as the parent sees them."""
    calls, cpu_calls, wholes = [], [], []
    for _ in range(count):
        cpu_start = process_time()
        start = perf_counter()
        pid = library.fork()
        if pid == 0:
            os._exit(0)
        calls.append(perf_counter() - start)
        cpu_calls.append(process_time() - cpu_start)
        library.waitpid(pid, 0)
        wholes.append(perf_counter() - start)
    return {
        "fork": statistics.median(calls),
        "fork_cpu": statistics.median(cpu_calls),
        "whole": statistics.median(wholes),
    }


register(
    Benchmark(
        name="children",
        summary="CPU time of the parent per child, each with a greenlet in waitpid",
        case_label="{} children",
        cases=(10, 100, 1000, 4000),
        quick_cases=(10, 100, 1000),
        metrics={
            "fork": "one child forked and watched",
            "park": "one greenlet started and parked in waitpid",
            "wait": "one child waited for, all having been released at once",
        },
        implementations={name: partial(children, name) for name in (OURS, GEVENT, PIDFD, OS)},
        targets=(Target("wait", GEVENT, at_least=8, cases=(4000,)),),
        growth=Growth("wait", first=1000, last=4000, at_most=1.3),
        repeat=5,
    )
)

register(
    Benchmark(
        name="fork_live",
        summary="a fork among many live children, as the parent sees it",
        case_label="{} live child(ren)",
        cases=(1, 4000),
        quick_cases=(1, 1000),
        metrics={
            "fork": "the call of fork",
            "fork_cpu": "the call of fork, CPU time",
            "whole": "fork, _exit in the child, waitpid",
        },
        implementations={name: partial(fork_live, name) for name in (OURS, GEVENT, OS)},
        targets=(Target("fork", OS, at_most=1.3, cases=(4000,)),),
        repeat=5,
    )
)
