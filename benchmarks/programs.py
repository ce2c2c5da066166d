"""Programs: popen_wait, spawn_pause, many_programs, busy_users, check_output.

The stdlib's row is its own subprocess in a plain program; asyncio's its create_subprocess_exec. gevent's forks in Python. The row
`fork` is os.fork, and a child that executes the program at once.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import gevent

import coopos
from benchmarks._forked import ASYNCIO, load_alike, run_asyncio
from benchmarks._model import OS, OURS, Benchmark, Sampler, Target, register
from benchmarks._system import MB, need_fds, reside

PROGRAM = "/bin/true"
FORK = "fork"
OURS_POPEN, GEVENTS_POPEN = f"{OURS}.subprocess", "gevent.subprocess"
MODULES = {OURS_POPEN: OURS_POPEN, GEVENTS_POPEN: GEVENTS_POPEN, OS: "subprocess"}
ROUNDS = 40


def module_of(name: str) -> Any:
    load_alike()
    importlib.import_module(OURS_POPEN)
    importlib.import_module(GEVENTS_POPEN)
    return importlib.import_module(MODULES[name])


# ---- one after the other -----------------------------------------------------------------------------------------------------


def time_rounds(function: Callable[[], object], rounds: int) -> float:
    function()
    start = time.perf_counter()
    for _ in range(rounds):
        function()
    return (time.perf_counter() - start) / rounds


@contextmanager
def popen_wait(name: str, size_mb: int, quick: bool) -> Iterator[Sampler]:
    module = module_of(name)
    memory = reside(size_mb)
    rounds = 5 if quick else ROUNDS
    yield lambda: {"each": time_rounds(lambda: module.Popen([PROGRAM]).wait(), rounds)}
    del memory


@contextmanager
def popen_wait_asyncio(size_mb: int, quick: bool) -> Iterator[Sampler]:
    load_alike()
    memory = reside(size_mb)
    rounds = 5 if quick else ROUNDS

    async def run() -> float:
        start = time.perf_counter()
        for _ in range(rounds):
            await (await asyncio.create_subprocess_exec(PROGRAM)).wait()
        return (time.perf_counter() - start) / rounds

    yield lambda: {"each": run_asyncio(run())}
    del memory


# ---- the hub's pauses --------------------------------------------------------------------------------------------------------


def fork_and_exec() -> None:
    pid = os.fork()
    if pid == 0:
        try:
            os.execv(PROGRAM, [PROGRAM])
        finally:
            os._exit(127)
    coopos.waitpid(pid, 0)


@contextmanager
def spawn_pause(name: str, size_mb: int, quick: bool) -> Iterator[Sampler]:
    """A greenlet that gives way all the time sees how long it was kept waiting."""
    import gevent

    module = module_of(OURS_POPEN if name == FORK else name)
    memory = reside(size_mb)
    spawns = 20 if quick else 200
    run = fork_and_exec if name == FORK else lambda: module.Popen([PROGRAM]).wait()

    def sample() -> dict[str, float]:
        pauses: list[float] = []

        def watch() -> None:
            last = time.perf_counter()
            while True:
                gevent.sleep(0)
                now = time.perf_counter()
                pauses.append(now - last)
                last = now

        watcher = gevent.spawn(watch)
        gevent.sleep(0.01)
        pauses.clear()
        for _ in range(spawns):
            run()
        watcher.kill()
        pauses.sort()
        return {"longest": pauses[-1], "of_one": pauses[-spawns // 2]}

    yield sample
    del memory


# ---- many at once, much output -----------------------------------------------------------------------------------------------


@contextmanager
def many_programs(name: str, count: int, quick: bool) -> Iterator[Sampler]:
    """All are alive at once: each ends when its input does."""
    need_fds(4 * count)
    module = module_of(name)

    def sample() -> dict[str, float]:
        start = time.perf_counter()
        processes = [module.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(count)]
        started = time.perf_counter()
        for process in processes:
            process.stdin.close()
        for process in processes:
            process.wait()
        ended = time.perf_counter()
        return {"start": (started - start) / count, "end": (ended - started) / count}

    yield sample


@contextmanager
def busy_users(name: str, users: int, quick: bool) -> Iterator[Sampler]:
    """Greenlets, the stdlib's threads, that run one program after the other."""
    module = module_of(name)
    each = 2 if quick else 20

    def run_some() -> None:
        for _ in range(each):
            module.run(["true"])

    def sample() -> dict[str, float]:
        start = time.perf_counter()
        if name == OS:
            threads = [threading.Thread(target=run_some) for _ in range(users)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            gevent.joinall([gevent.spawn(run_some) for _ in range(users)], raise_error=True)
        return {"each": (time.perf_counter() - start) / (users * each)}

    yield sample


@contextmanager
def check_output(name: str, size_mb: int, quick: bool) -> Iterator[Sampler]:
    module = module_of(name)
    command = ["head", "-c", str(size_mb * MB), "/dev/zero"]

    def sample() -> dict[str, float]:
        start = time.perf_counter()
        one = len(module.check_output(command))
        between = time.perf_counter()
        both = module.run(command, capture_output=True)
        end = time.perf_counter()
        if (one, len(both.stdout)) != (size_mb * MB, size_mb * MB):
            raise AssertionError("not all the output came")
        return {"one": (between - start) / size_mb, "both": (end - between) / size_mb}

    yield sample


ROWS = (OURS_POPEN, GEVENTS_POPEN, OS)

register(
    Benchmark(
        name="popen_wait",
        summary="a Popen that is waited for, one after the other",
        case_label="{} MB more resident",
        cases=(0, 2000),
        metrics={"each": "one program"},
        implementations={**{name: partial(popen_wait, name) for name in ROWS}, ASYNCIO: popen_wait_asyncio},
        gevent=GEVENTS_POPEN,
        targets=(
            Target("each", OS, of=OURS_POPEN, at_most=1.15),
            Target("each", GEVENTS_POPEN, of=OURS_POPEN, at_least=4, cases=(0,)),
            Target("each", GEVENTS_POPEN, of=OURS_POPEN, at_least=50, cases=(2000,)),
        ),
        repeat=7,
    )
)

register(
    Benchmark(
        name="spawn_pause",
        summary="how long a hub stands still while another greenlet runs programs, one after the other",
        case_label="{} MB more resident",
        cases=(0, 250, 1000, 2000),
        metrics={"longest": "the longest pause", "of_one": "the pause of one start, median"},
        implementations={name: partial(spawn_pause, name) for name in (*ROWS[:2], FORK)},
        gevent=GEVENTS_POPEN,
        repeat=3,
    )
)

register(
    Benchmark(
        name="many_programs",
        summary="programs that all run at once",
        case_label="{} programs",
        cases=(500,),
        metrics={"start": "one start", "end": "one end, from the first close of a pipe to the last wait"},
        implementations={name: partial(many_programs, name) for name in ROWS},
        gevent=GEVENTS_POPEN,
        repeat=3,
    )
)

register(
    Benchmark(
        name="busy_users",
        summary="greenlets that each run one program after the other; os is the stdlib's run() in threads",
        case_label="{} of them",
        cases=(50,),
        metrics={"each": "one program"},
        implementations={name: partial(busy_users, name) for name in ROWS},
        gevent=GEVENTS_POPEN,
        targets=(Target("each", OS, of=OURS_POPEN, at_most=1.0),),
        repeat=5,
    )
)

register(
    Benchmark(
        name="check_output",
        summary="what a program writes, as one object",
        case_label="{} MB",
        cases=(100,),
        metrics={"one": "a MB by check_output", "both": "a MB by run(capture_output=True), which reads two pipes"},
        implementations={name: partial(check_output, name) for name in ROWS},
        gevent=GEVENTS_POPEN,
        repeat=7,
    )
)
