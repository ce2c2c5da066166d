"""One child at a time, forked and waited for: fork_live, exit_latency."""

from __future__ import annotations

import importlib
import mmap
import os
import select
import signal
import statistics
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic, perf_counter, process_time, sleep
from typing import Any

from benchmarks._forked import (
    ASYNCIO,
    PIDFD,
    asyncio_watcher,
    closing_gate,
    load_alike,
    need_children,
    need_pidfds,
    run_asyncio,
)
from benchmarks._model import GEVENT, OS, OURS, Benchmark, Sample, Sampler, Target, register

FORKS = 200
FORK_METRICS = {
    "fork": "the call of fork",
    "fork_cpu": "the call of fork, CPU time",
    "whole": "fork, _exit in the child, waitpid",
}
LIFE_S = 0.003  # the waiter is parked by then
WARM_UP = 10
PROGRAM = ("/bin/sleep", "60")
PID, TIME = struct.Struct("i"), struct.Struct("d")


@contextmanager
def fork_live(implementation: str, live: int, quick: bool) -> Iterator[Sampler]:
    """The living were forked by the same function as is measured."""
    load_alike()
    need_children(live + 1)
    library: Any = importlib.import_module(implementation)
    with closing_gate() as gate:
        for _ in range(live):
            gate.fork(library.fork)
        gate.wait_until_held()
        yield lambda: time_forks(library.fork, library.waitpid, FORKS // 5 if quick else FORKS)


def time_forks(fork: Callable[[], int], wait: Callable[[int, int], object], count: int) -> Sample:
    """Medians over `count` forks one after the other, of children that end at once, as the parent sees them."""
    calls, cpu_calls, wholes = [], [], []
    for _ in range(count):
        cpu_start = process_time()
        start = perf_counter()
        pid = fork()
        if pid == 0:
            os._exit(0)
        calls.append(perf_counter() - start)
        cpu_calls.append(process_time() - cpu_start)
        wait(pid, 0)
        wholes.append(perf_counter() - start)
    return {
        "fork": statistics.median(calls),
        "fork_cpu": statistics.median(cpu_calls),
        "whole": statistics.median(wholes),
    }


class Killer:
    """A process that ends children a moment after it was told to, when their waiter is parked, and leaves the time it did so.

    One clock counts for all processes. The killer is nobody's child to wait for: its parent has ended.
    """

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, TIME.size)
        self.orders, self.sender = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                if os.fork() == 0:
                    self.obey()
            finally:
                os._exit(0)
        os.close(self.orders)
        os.waitpid(pid, 0)

    def obey(self) -> None:
        """In the killer: until the parent is gone."""
        os.close(self.sender)
        while order := os.read(self.orders, PID.size):
            (pid,) = PID.unpack(order)
            sleep(LIFE_S)
            TIME.pack_into(self.memory, 0, monotonic())
            os.kill(pid, signal.SIGKILL)

    def order(self, pid: int) -> int:
        os.write(self.sender, PID.pack(pid))
        return pid

    def since_kill(self) -> float:
        now = monotonic()
        (then,) = TIME.unpack_from(self.memory)
        return now - float(then)

    def close(self) -> None:
        os.close(self.sender)


def spawn_parked() -> int:
    """A child that is small, and so is soon gone: the end of a forked interpreter takes longer than what is looked for."""
    return os.posix_spawn(PROGRAM[0], PROGRAM, {})


def time_ends(killer: Killer, watch: Callable[[], int], wait: Callable[[int], object], count: int) -> Sample:
    latencies = []
    for _ in range(WARM_UP + count):
        pid = killer.order(watch())
        wait(pid)
        latencies.append(killer.since_kill())
    return summarize(latencies)


async def time_ends_asyncio(killer: Killer, count: int) -> Sample:
    import asyncio

    loop = asyncio.get_running_loop()
    watcher = asyncio_watcher(loop)

    def tell(pid: int, returncode: int, ended: asyncio.Future[int]) -> None:
        ended.set_result(returncode)

    latencies = []
    for _ in range(WARM_UP + count):
        ended: asyncio.Future[int] = loop.create_future()
        watcher.add_child_handler(killer.order(spawn_parked()), tell, ended)
        await ended
        latencies.append(killer.since_kill())
    return summarize(latencies)


def time_ends_pidfd(killer: Killer, count: int) -> Sample:
    latencies = []
    with select.epoll() as epoll:
        for _ in range(WARM_UP + count):
            pid = killer.order(spawn_parked())
            pidfd = os.pidfd_open(pid)
            epoll.register(pidfd, select.EPOLLIN)
            epoll.poll()
            os.waitpid(pid, os.WNOHANG)
            latencies.append(killer.since_kill())
            epoll.unregister(pidfd)
            os.close(pidfd)
    return summarize(latencies)


def summarize(latencies: list[float]) -> Sample:
    measured = latencies[WARM_UP:]
    return {"median": statistics.median(measured), "p99": statistics.quantiles(measured, n=100)[98]}


@contextmanager
def exit_latency(implementation: str, count: int, quick: bool) -> Iterator[Sampler]:
    """The waiter is the main greenlet or task; there is no other, and the loop is idle.

    What the kernel does between the kill and the zombie is in every row: `os`, a blocking waitpid, has little else.
    """
    killer = Killer()  # before there is a hub or anything else to inherit
    load_alike()
    if implementation in (PIDFD, ASYNCIO):
        need_pidfds()
    if implementation == PIDFD:
        yield partial(time_ends_pidfd, killer, count)
    elif implementation == ASYNCIO:
        yield lambda: run_asyncio(time_ends_asyncio(killer, count))
    else:
        library: Any = importlib.import_module(implementation)
        watch = spawn_parked if implementation == OS else partial(library.fork_and_watch, fork=spawn_parked)
        yield partial(time_ends, killer, watch, lambda pid: library.waitpid(pid, 0), count)
    killer.close()


register(
    Benchmark(
        name="fork_live",
        summary="a fork among many live children, as the parent sees it",
        case_label="{} live child(ren)",
        cases=(1, 4000),
        quick_cases=(1, 1000),
        metrics=FORK_METRICS,
        implementations={name: partial(fork_live, name) for name in (OURS, GEVENT, OS)},
        targets=(Target("fork", OS, at_most=1.3, cases=(4000,)),),
        repeat=5,
    )
)

register(
    Benchmark(
        name="exit_latency",
        summary="from a parked child's SIGKILL until its waiter runs, in an idle loop",
        case_label="{} children, one at a time",
        cases=(1000,),
        quick_cases=(200,),
        metrics={"median": "one child's end, median", "p99": "one child's end, 99th percentile"},
        implementations={name: partial(exit_latency, name) for name in (OURS, GEVENT, ASYNCIO, PIDFD, OS)},
        targets=tuple(Target(metric, GEVENT, at_most=1.05) for metric in ("median", "p99")),
        repeat=5,
    )
)
