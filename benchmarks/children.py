"""Many children alive at once, all let go together: children, children_any.

Nothing but the forks themselves is timed before all children have reached the gate
(see `_forked`): thousands that are still starting would keep every CPU busy.

Both count the CPU time of the parent (user + system, all its threads), not the wall
time: the children's own ends would drown it.
"""

from __future__ import annotations

import importlib
import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import process_time
from typing import TYPE_CHECKING, Any

from benchmarks._forked import (
    ASYNCIO,
    PIDFD,
    Fork,
    Gate,
    asyncio_watcher,
    closing_gate,
    fork_without,
    load_alike,
    need_children,
    need_pidfds,
    run_asyncio,
)
from benchmarks._model import GEVENT, OS, OURS, Benchmark, Growth, Sample, Sampler, Target, register
from benchmarks._system import SPARE_FDS

if TYPE_CHECKING:
    from asyncio import Future

    Ended = Future[tuple[int, int]]

LEAST_CHILDREN = 400  # fewer are forked and waited for several times over
COUNTS = (10, 100, 1000, 4000)
QUICK_COUNTS = (10, 100, 1000)

# WATCHED by the library that forks, or forked behind its back.
WATCHED, PLAIN = "watched", "plain"


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


Way = Callable[[Gate, int, Phases], None]


def check(waited: list[tuple[int, int]], gate: Gate) -> None:
    """Each child exactly once, in whatever order."""
    if sorted(waited) != sorted((pid, 0) for pid in gate.pids):
        raise RuntimeError("a child was waited for wrongly")


# ---- each child by its own waiter


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
    waited = [waiter.get() for waiter in waiters]  # one after the other: joinall is dear
    phases.end("wait")
    check(waited, gate)


def wait_with_asyncio(gate: Gate, count: int, phases: Phases) -> None:
    """Tell asyncio's child watcher of each child, then park one task on a future for each."""
    import asyncio

    def tell(pid: int, returncode: int, ended: Ended) -> None:
        ended.set_result((pid, returncode))

    async def wait(ended: Ended) -> tuple[int, int]:
        return await ended

    async def all_phases() -> list[tuple[int, int]]:
        loop = asyncio.get_running_loop()
        watcher = asyncio_watcher(loop)
        ends: list[Ended] = []
        # The loop's own descriptors and the pidfds: no others were opened since the gate.
        inherited = range(gate.arrival_sender + 1, gate.arrival_sender + SPARE_FDS + count)
        for _ in range(count):
            pid = gate.fork(partial(fork_without, inherited))
            ends.append(loop.create_future())
            watcher.add_child_handler(pid, tell, ends[-1])
        phases.end("fork")
        gate.wait_until_held()
        phases.start()
        waiters = [loop.create_task(wait(ended)) for ended in ends]
        await asyncio.sleep(0)  # all of them are parked now
        phases.end("park")
        gate.open()
        waited = [await waiter for waiter in waiters]
        phases.end("wait")
        return waited

    check(run_asyncio(all_phases()), gate)


def wait_with_pidfds(gate: Gate, count: int, phases: Phases) -> None:
    """The least an event loop can do: a pidfd each, one epoll for all."""
    waited = []
    epoll = select.epoll()
    first = epoll.fileno()
    pid_of: dict[int, int] = {}
    for _ in range(count):
        pid = gate.fork(lambda: fork_without(range(first, max(pid_of, default=first) + 1)))
        pidfd = os.pidfd_open(pid)
        pid_of[pidfd] = pid
        epoll.register(pidfd, select.EPOLLIN)
    phases.end("fork")
    gate.wait_until_held()
    phases.start()
    gate.open()
    while pid_of:
        for pidfd, _ in epoll.poll():
            waited.append(os.waitpid(pid_of.pop(pidfd), os.WNOHANG))
            epoll.unregister(pidfd)
            os.close(pidfd)
    phases.end("wait")
    epoll.close()
    check(waited, gate)


def wait_plainly(gate: Gate, count: int, phases: Phases) -> None:
    for _ in range(count):
        gate.fork(os.fork)
    phases.end("fork")
    gate.wait_until_held()
    phases.start()
    gate.open()
    waited = [os.waitpid(pid, 0) for pid in gate.pids]
    phases.end("wait")
    check(waited, gate)


def way_of(implementation: str) -> Way:
    if implementation == OS:
        return wait_plainly
    if implementation == PIDFD:
        need_pidfds()
        return wait_with_pidfds
    if implementation == ASYNCIO:
        need_pidfds()
        return wait_with_asyncio
    return partial(wait_with_greenlets, importlib.import_module(implementation))


def run_rounds(way: Way, count: int) -> Sample:
    """CPU seconds per child, by phase; over several rounds where children are few."""

    def one_round() -> dict[str, float]:
        with closing_gate() as gate:
            phases = Phases()
            way(gate, count, phases)
        return phases.seconds

    rounds = max(1, LEAST_CHILDREN // count)
    if rounds > 1:
        one_round()  # a warm-up, where it is cheap
    taken = [one_round() for _ in range(rounds)]
    return {name: sum(t[name] for t in taken) / (rounds * count) for name in taken[0]}


@contextmanager
def children(implementation: str, count: int, quick: bool) -> Iterator[Sampler]:
    load_alike()
    need_children(count)
    yield partial(run_rounds, way_of(implementation), count)


# ---- all children by one waiter


def reap_in_greenlet(library: Any, fork: Fork, gate: Gate, count: int, phases: Phases) -> None:
    """Fork the children by `fork`, and reap them in a greenlet that is parked before they go."""
    import gevent

    for _ in range(count):
        gate.fork(fork)
    gate.wait_until_held()
    reaper = gevent.spawn(lambda: [library.waitpid(-1, 0) for _ in range(count)])
    gevent.sleep(0)  # it is parked now
    phases.start()
    gate.open()
    reaper.join()
    phases.end("wait")
    check(reaper.get(), gate)


def reap_plainly(gate: Gate, count: int, phases: Phases) -> None:
    for _ in range(count):
        gate.fork(os.fork)
    gate.wait_until_held()
    phases.start()
    gate.open()
    waited = [os.waitpid(-1, 0) for _ in range(count)]
    phases.end("wait")
    check(waited, gate)


@contextmanager
def children_any(implementation: str, count: int, quick: bool) -> Iterator[Sampler]:
    """A metric for each way to fork; where there is but one way, both measure the same thing."""
    load_alike()
    need_children(count)
    ways: dict[str, Way]
    if implementation == OS:
        ways = dict.fromkeys((WATCHED, PLAIN), reap_plainly)
    elif implementation == PIDFD:
        ways = dict.fromkeys((WATCHED, PLAIN), way_of(PIDFD))
    else:
        library: Any = importlib.import_module(implementation)
        ways = {PLAIN: partial(reap_in_greenlet, library, os.fork)}
        if implementation == OURS:
            ways[WATCHED] = partial(reap_in_greenlet, library, library.fork_and_watch)
    yield lambda: {name: run_rounds(way, count)["wait"] for name, way in ways.items()}


def describe_any() -> str:
    return f"{GEVENT}.waitpid(-1, 0) tells twice of most children of {GEVENT}'s own fork: no row there"


register(
    Benchmark(
        name="children",
        summary="CPU time of the parent per child, each with a greenlet in waitpid",
        case_label="{} children",
        cases=COUNTS,
        quick_cases=QUICK_COUNTS,
        metrics={
            "fork": "one child forked and watched",
            "park": "one greenlet started and parked in waitpid",
            "wait": "one child waited for, all having been released at once",
        },
        implementations={name: partial(children, name) for name in (OURS, GEVENT, ASYNCIO, PIDFD, OS)},
        targets=(
            Target("wait", PIDFD, at_most=1.5),
            Target("wait", GEVENT, at_least=8, cases=(4000,)),
        ),
        growth=Growth("wait", first=1000, last=4000, at_most=1.3),
        repeat=5,
    )
)

register(
    Benchmark(
        name="children_any",
        summary="CPU time of the parent per child, all reaped by one loop of waitpid(-1, 0)",
        case_label="{} children",
        cases=COUNTS,
        quick_cases=QUICK_COUNTS,
        metrics={
            WATCHED: "one child of the library's fork, all having been released at once",
            PLAIN: "one child of os.fork, all having been released at once",
        },
        implementations={name: partial(children_any, name) for name in (OURS, GEVENT, PIDFD, OS)},
        targets=tuple(Target(metric, PIDFD, at_most=1.5) for metric in (WATCHED, PLAIN)),
        growth=Growth(WATCHED, first=1000, last=4000, at_most=1.3),
        repeat=5,
        note=describe_any,
    )
)
