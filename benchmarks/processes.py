"""multiprocessing under gevent and coopos.patch(), against itself in a plain interpreter: multiprocessing.

The processes are forked, and are what their parent is: greenlets on both sides, or threads on both sides. gevent alone has no row:
without coopos a Pool hangs there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

from benchmarks._model import OS, OURS, Benchmark, Sample, Sampler, register

TASKS, ROUND_TRIPS, MESSAGES, TURNS = 1_000, 2_000, 2_000, 20_000
WORKERS = 2


@contextmanager
def patched(quick: bool) -> Iterator[Sampler]:
    from gevent import monkey

    monkey.patch_all()
    import coopos

    coopos.patch()
    with plain(quick) as sampler:
        yield sampler


@contextmanager
def plain(quick: bool) -> Iterator[Sampler]:
    """In an interpreter of its own."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    yield partial(time_all, context, 10 if quick else 1)


def time_all(context: Any, less: int) -> Sample:
    return {
        "pool": time_pool(context, TASKS // less),
        "queue": time_echo(context, echo_queue, context.Queue(), context.Queue(), ROUND_TRIPS // less),
        "pipe": time_echo(context, echo_pipe, *context.Pipe(), MESSAGES // less),
        "lock": time_lock(context.Lock(), TURNS // less),
        "contended": time_contended(context, context.Lock(), ROUND_TRIPS // less),
    }


def time_pool(context: Any, tasks: int) -> float:
    with context.Pool(WORKERS) as pool:
        pool.map(abs, range(WORKERS))
        start = perf_counter()
        pool.map(abs, range(tasks), chunksize=1)
        return (perf_counter() - start) / tasks


def echo_queue(there: Any, back: Any) -> None:
    while (message := there.get()) is not None:
        back.put(message)


def echo_pipe(_here: Any, there: Any) -> None:
    while (message := there.recv()) is not None:
        there.send(message)


def time_echo(context: Any, echo: Callable[..., None], one: Any, other: Any, count: int) -> float:
    process = context.Process(target=echo, args=(one, other))
    process.start()
    send, receive = (one.put, other.get) if hasattr(one, "put") else (one.send, one.recv)
    send(0)
    receive()
    start = perf_counter()
    for number in range(count):
        send(number)
        receive()
    elapsed = perf_counter() - start
    send(None)
    process.join()
    return elapsed / count


def time_lock(lock: Any, count: int) -> float:
    start = perf_counter()
    for _ in range(count):
        lock.acquire()
        lock.release()
    return (perf_counter() - start) / count


def take_turns(lock: Any, count: int) -> None:
    for _ in range(count):
        with lock:
            pass


def time_contended(context: Any, lock: Any, count: int) -> float:
    processes = [context.Process(target=take_turns, args=(lock, count)) for _ in range(WORKERS)]
    with lock:
        for process in processes:
            process.start()
        start = perf_counter()
    for process in processes:
        process.join()
    return (perf_counter() - start) / (count * WORKERS)


register(
    Benchmark(
        name="multiprocessing",
        summary="processes that are forked, with gevent and coopos.patch() on both sides, or neither",
        case_label="{} workers",
        cases=(WORKERS,),
        metrics={
            "pool": "a task of Pool.map, chunks of one",
            "queue": "an object there and back through two Queues",
            "pipe": "an object there and back through a Pipe",
            "lock": "Lock.acquire and release, nobody else wants it",
            "contended": "the same, two processes wanting nothing else",
        },
        implementations={OURS: lambda _case, quick: patched(quick), OS: lambda _case, quick: plain(quick)},
        repeat=5,
    )
)
