"""Calls that only a thread can make, or may have to: write_file, file_reads, cold_preads, fifo_open, lock_queue.

gevent.os has tp_write alone; for the others its row is the hub's threadpool with the plain call.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from time import perf_counter, process_time
from typing import Any

from benchmarks._model import GEVENT, OS, OURS, Benchmark, Sample, Sampler, Target, register
from benchmarks._system import disk_directory

PAGE_B = 4_096
WRITES = 2_000
PAGES = 65_536  # of the file that is read cold: 256 MB
READS = 1_024
WAITERS = 50


def describe_disk() -> str:
    path, kind = disk_directory()
    return f"the file is in {path}, on {kind}"


def in_threadpool(function: Callable[..., Any]) -> Callable[..., Any]:
    from gevent import get_hub

    pool = get_hub().threadpool
    return lambda *args: pool.apply(function, args)


@contextmanager
def write_file(implementation: str, size: int, quick: bool) -> Iterator[Sampler]:
    """The file stays in the page cache: what is timed is the way there, not the disk."""
    write = os.write if implementation == OS else importlib.import_module(implementation).tp_write
    count = WRITES // 10 if quick else WRITES
    data = b"x" * size
    with tempfile.TemporaryFile(dir=disk_directory()[0], buffering=0) as file:
        fd = file.fileno()

        def sample() -> Sample:
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
            cpu, start = process_time(), perf_counter()
            for _ in range(count):
                write(fd, data)
            return {"write": (perf_counter() - start) / count, "cpu": (process_time() - cpu) / count}

        yield sample


@contextmanager
def file_reads(implementation: str, size: int, quick: bool) -> Iterator[Sampler]:
    """One read after the other, in both ways by the same call. The kernel is told not to read ahead."""
    read = os.read if implementation == OS else importlib.import_module(implementation).tp_read
    count = 16 if quick else 128
    with tempfile.TemporaryFile(dir=disk_directory()[0], buffering=0) as file:
        fd = file.fileno()
        file.write(bytes(size * count))
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

        def time_reads() -> float:
            os.lseek(fd, 0, os.SEEK_SET)
            start = perf_counter()
            for _ in range(count):
                if len(read(fd, size)) != size:
                    raise RuntimeError("short read")
            return (perf_counter() - start) / count

        def sample() -> Sample:
            time_reads()
            cached = time_reads()
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return {"cached": cached, "cold": time_reads()}

        yield sample


@contextmanager
def cold_preads(implementation: str, greenlets: int, quick: bool) -> Iterator[Sampler]:
    """Single pages all over a file that is not in the page cache."""
    from gevent.pool import Pool

    count = READS // 8 if quick else READS
    random = Random(1)
    with tempfile.TemporaryFile(dir=disk_directory()[0], buffering=0) as file:
        fd = file.fileno()
        for _ in range(PAGES // 256):
            file.write(b"x" * PAGE_B * 256)
        os.fsync(fd)
        if implementation == OURS:
            pread = importlib.import_module(OURS).pread
        else:
            pread = os.pread if implementation == OS else in_threadpool(os.pread)

        def read(page: int) -> None:
            if len(pread(fd, PAGE_B, page * PAGE_B)) != PAGE_B:
                raise RuntimeError("short read")

        def sample() -> Sample:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            pages = random.sample(range(PAGES), count)
            cpu, start = process_time(), perf_counter()
            if implementation == OS:
                for page in pages:
                    read(page)
            else:
                for _ in Pool(greenlets).imap_unordered(read, pages):
                    pass
            return {"read": (perf_counter() - start) / count, "cpu": (process_time() - cpu) / count}

        yield sample


def run_waiters(take: Callable[[], None], wait: Callable[[int], None], let_go: Callable[[int], None], count: int) -> Sample:
    """*count* greenlets wait all at once, and are let go one after the other; often enough for a hundred of them."""
    import gevent

    def run() -> None:
        waiters = [gevent.spawn(wait, number) for number in range(count)]
        gevent.sleep(0)
        for number in range(count):
            let_go(number)
        for waiter in waiters:
            waiter.get()

    take()
    run()  # starts the threads
    rounds = max(100 // count, 1)
    elapsed = cpu_elapsed = 0.0
    for _ in range(rounds):
        take()
        cpu, start = process_time(), perf_counter()
        run()
        elapsed += perf_counter() - start
        cpu_elapsed += process_time() - cpu
    return {"wait": elapsed / (rounds * count), "cpu": cpu_elapsed / (rounds * count)}


@contextmanager
def fifo_open(implementation: str, waiters: int, quick: bool) -> Iterator[Sampler]:
    """The other end is opened by the main greenlet, once somebody waits for it."""
    from gevent import sleep

    open_fifo = importlib.import_module(OURS).open if implementation == OURS else in_threadpool(os.open)
    with tempfile.TemporaryDirectory() as directory:
        paths = [os.path.join(directory, str(number)) for number in range(waiters)]
        for path in paths:
            os.mkfifo(path)

        def wait(number: int) -> None:
            os.close(open_fifo(paths[number], os.O_RDONLY))

        def let_go(number: int) -> None:
            while True:
                try:
                    return os.close(os.open(paths[number], os.O_WRONLY | os.O_NONBLOCK))
                except OSError:  # ENXIO: nobody is there yet
                    sleep(0)

        yield lambda: run_waiters(lambda: None, wait, let_go, waiters)


@contextmanager
def lock_queue(implementation: str, waiters: int, quick: bool) -> Iterator[Sampler]:
    """Another open file has all the locks, and gives back one after the other."""
    flock = importlib.import_module(OURS).flock if implementation == OURS else in_threadpool(fcntl.flock)
    with tempfile.TemporaryDirectory() as directory:
        paths = [os.path.join(directory, str(number)) for number in range(waiters)]
        holders = [os.open(path, os.O_CREAT | os.O_RDWR) for path in paths]
        takers = [os.open(path, os.O_RDWR) for path in paths]

        def wait(number: int) -> None:
            flock(takers[number], fcntl.LOCK_EX)
            fcntl.flock(takers[number], fcntl.LOCK_UN)

        def take() -> None:
            for fd in holders:
                fcntl.flock(fd, fcntl.LOCK_EX)

        def let_go(number: int) -> None:
            fcntl.flock(holders[number], fcntl.LOCK_UN)

        yield lambda: run_waiters(take, wait, let_go, waiters)
        for fd in holders + takers:
            os.close(fd)


register(
    Benchmark(
        name="write_file",
        summary="tp_write to a file on a disk, up to the page cache",
        case_label="{} bytes",
        cases=(PAGE_B,),
        metrics={"write": "one write", "cpu": "one write, CPU time of all threads"},
        implementations={name: partial(write_file, name) for name in (OURS, GEVENT, OS)},
        targets=(Target("write", GEVENT, at_least=2),),
        note=describe_disk,
    )
)

register(
    Benchmark(
        name="file_reads",
        summary="tp_read of a file, one after the other; os is os.read",
        case_label="{} bytes",
        cases=(512, PAGE_B, 65_536, 1 << 20),
        metrics={"cached": "one read, in the page cache", "cold": "one read, not in the page cache"},
        implementations={name: partial(file_reads, name) for name in (OURS, GEVENT, OS)},
        note=describe_disk,
    )
)

register(
    Benchmark(
        name="cold_preads",
        summary="4 KiB preads of a file that is not in the page cache; gevent is its threadpool, os one after the other",
        case_label="{} at once",
        cases=(64,),
        metrics={"read": "one read", "cpu": "one read, CPU time of all threads"},
        implementations={name: partial(cold_preads, name) for name in (OURS, GEVENT, OS)},
        note=describe_disk,
    )
)

register(
    Benchmark(
        name="fifo_open",
        summary="greenlets that wait for the other ends of FIFOs; gevent is its threadpool",
        case_label="{} at once",
        cases=(1, WAITERS),
        metrics={"wait": "one open", "cpu": "one open, CPU time of all threads"},
        implementations={name: partial(fifo_open, name) for name in (OURS, GEVENT)},
    )
)

register(
    Benchmark(
        name="lock_queue",
        summary="greenlets that wait in flock; gevent is its threadpool",
        case_label="{} at once",
        cases=(1, WAITERS),
        metrics={"wait": "one lock", "cpu": "one lock, CPU time of all threads"},
        implementations={name: partial(lock_queue, name) for name in (OURS, GEVENT)},
    )
)
