"""Much through one pipe: lines, stream_1gib.

Here the cost is what stands between the bytes and who wants them: a buffer, a copy, a frame of Python. Each row has its
own interpreter, since each brings a loop or a thread of its own.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice, repeat
from time import perf_counter
from typing import IO, Any

from benchmarks._model import GEVENT, OS, OURS, Benchmark, Sample, Sampler, Target, register

GEVENT_FILE = "gevent"
LINES_B = {20: 32 << 20, 1_000: 256 << 20}  # {bytes of a line: bytes of all}: some tenths of a second
BUFFER_B = 65_536
MIB = 1 << 20

# Another process: to fill the pipe takes nothing from who empties it, if there is a second processor. It is killed in the end.
FILLER = """
import os, sys
length = int(sys.argv[1])
chunk = (b"x" * (length - 1) + b"\\n") * (65536 // length)
while True:
    os.write(1, chunk)
"""

Run = Callable[[Callable[[], Any]], Any]
Move = Callable[[memoryview], int]


# ---- lines -------------------------------------------------------------------------------------------------------------


@contextmanager
def lines(module: str, name: str, run: Run, buffering: int, length: int, quick: bool) -> Iterator[Sampler]:
    """`buffering`: -1, what the library chooses by itself; or bytes."""
    open_file: Callable[..., IO[bytes]] = getattr(importlib.import_module(module), name)
    count = LINES_B[length] // length // (8 if quick else 1)
    with filled_pipe(length) as receiver, open_file(receiver, "rb", buffering=buffering) as file:
        yield lambda: run(partial(time_lines, file, length, count))


@contextmanager
def filled_pipe(length: int) -> Iterator[int]:
    """The end to read from; it is the caller's to close."""
    receiver, sender = os.pipe()
    filler = subprocess.Popen([sys.executable, "-S", "-c", FILLER, str(length)], stdout=sender, stderr=subprocess.DEVNULL)
    os.close(sender)
    try:
        yield receiver
    finally:
        filler.kill()
        filler.wait()


def time_lines(file: IO[bytes], length: int, count: int) -> Sample:
    sample = {}
    for name, take in {"iteration": iterate, "readline": call_readline}.items():
        take(file, count // 8)  # by then the other process fills the pipe
        start = perf_counter()
        take(file, count)
        sample[name] = (perf_counter() - start) / count
    if len(file.readline()) != length:
        raise RuntimeError("lines were lost or torn")
    return sample


def iterate(file: IO[bytes], count: int) -> None:
    for _ in islice(file, count):
        pass


def call_readline(file: IO[bytes], count: int) -> None:
    readline = file.readline
    for _ in repeat(None, count):
        readline()


def run_in_greenlet(function: Callable[[], Any]) -> Any:
    import gevent

    return gevent.spawn(function).get()


def run_in_thread(function: Callable[[], Any]) -> Any:
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


# ---- stream_1gib -------------------------------------------------------------------------------------------------------


@contextmanager
def stream(make_ends: Callable[[], tuple[Move, Move]], start: Callable[..., None], mib: int, quick: bool) -> Iterator[Sampler]:
    """`make_ends` gives what reads into a buffer and what writes one; `start` runs two functions at once, to their end."""
    total = mib * MIB
    receive, send = make_ends()

    def read_all() -> None:
        buffer = memoryview(bytearray(BUFFER_B))
        left = total
        while left:
            nread = receive(buffer)
            if not nread:
                raise EOFError(f"{left} bytes are missing")
            left -= nread

    def write_all() -> None:
        data = memoryview(bytes(BUFFER_B))
        for _ in range(total // BUFFER_B):
            rest = data
            while rest:
                rest = rest[send(rest) :]

    def sample() -> Sample:
        begun = perf_counter()
        start(read_all, write_all)
        return {"buffer": (perf_counter() - begun) / (total // BUFFER_B)}

    yield sample


def ends_of_coopos(is_blocking: bool) -> tuple[Move, Move]:
    import coopos

    receiver, sender = make_pipe(is_blocking)
    return partial(coopos.readinto, receiver), partial(coopos.write, sender)


def ends_of_files(is_blocking: bool) -> tuple[Move, Move]:
    from coopos import FileIO

    receiver, sender = make_pipe(is_blocking)
    source, sink = FileIO(receiver, "rb"), FileIO(sender, "wb")
    return lambda buffer: source.readinto(buffer), lambda data: sink.write(data)


def ends_of_gevent() -> tuple[Move, Move]:
    """It has nothing that reads into a buffer."""
    from gevent.os import nb_read, nb_write

    receiver, sender = make_pipe(is_blocking=False)
    return lambda buffer: len(nb_read(receiver, len(buffer))), partial(nb_write, sender)


def ends_of_os() -> tuple[Move, Move]:
    receiver, sender = make_pipe(is_blocking=True)
    return lambda buffer: len(os.read(receiver, len(buffer))), partial(os.write, sender)


def make_pipe(is_blocking: bool) -> tuple[int, int]:
    receiver, sender = os.pipe()
    for fd in (receiver, sender):
        os.set_blocking(fd, is_blocking)
    return receiver, sender


def run_greenlets(*functions: Callable[[], None]) -> None:
    import gevent

    gevent.joinall([gevent.spawn(function) for function in functions], raise_error=True)


def run_threads(*functions: Callable[[], None]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


LINE_FILES: dict[str, tuple[str, str, Run]] = {
    OURS: ("coopos", "fdopen", run_in_greenlet),
    GEVENT_FILE: ("gevent.fileobject", "FileObject", run_in_greenlet),
    OS: ("os", "fdopen", run_in_thread),
}

register(
    Benchmark(
        name="lines",
        summary="lines from a pipe that another process fills; gevent is FileObject, os is os.fdopen in a thread",
        case_label="lines of {} bytes",
        cases=tuple(LINES_B),
        metrics={
            "iteration": "one line, by iteration",
            "readline": "one line, by readline()",
        },
        implementations={
            row + suffix: partial(lines, *opens, buffering)
            for suffix, buffering in {"": -1, ", 64 KiB": BUFFER_B}.items()
            for row, opens in LINE_FILES.items()
        },
        targets=tuple(
            Target(metric, GEVENT_FILE, at_least=2, words=">= 2 x gevent.fileobject.FileObject")
            for metric in ("iteration", "readline")
        ),
        gevent=GEVENT_FILE,
        repeat=7,
    )
)

register(
    Benchmark(
        name="stream_1gib",
        summary="all the bytes through one pipe, 64 KiB at a time; gevent.os and os read to bytes, os in two threads",
        case_label="{} MiB",
        cases=(1_024,),
        quick_cases=(128,),
        metrics={"buffer": "64 KiB, written and read"},
        implementations={
            OURS: partial(stream, partial(ends_of_coopos, False), run_greenlets),
            "coopos, blocking": partial(stream, partial(ends_of_coopos, True), run_greenlets),
            "coopos.FileIO": partial(stream, partial(ends_of_files, False), run_greenlets),
            "FileIO, blocking": partial(stream, partial(ends_of_files, True), run_greenlets),
            GEVENT: partial(stream, ends_of_gevent, run_greenlets),
            OS: partial(stream, ends_of_os, run_threads),
        },
        repeat=5,
    )
)
