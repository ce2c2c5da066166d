"""Calls that have to wait for another greenlet: pingpong, fileio_pingpong, readers.

Here the cost is the parking: finding that nothing is there, registering with the
loop, switching, being woken. Each row has its own interpreter, since each brings a
loop of its own. The peers do the same job by the means their own users would choose.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks._model import GEVENT, OURS, Benchmark, Sample, Sampler, Target, register
from benchmarks._system import need_fds

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

ROUND_TRIPS = 10_000
WARM_UP = 500
ROOM_B = 4_096  # what a reader who doesn't know how long messages are asks for
READER_WAKES = 20_000
WARM_UP_LAPS = 10
BYTE = b"x"

Read = Callable[[int, int], bytes]
Write = Callable[[int, bytes], int]


def make_pipe() -> tuple[int, int]:
    receiver, sender = os.pipe()
    os.set_blocking(receiver, False)
    os.set_blocking(sender, False)
    return receiver, sender


def close_all(pipes: list[tuple[int, int]]) -> None:
    for fds in pipes:
        for fd in fds:
            os.close(fd)


def round_trips(quick: bool) -> int:
    return ROUND_TRIPS // 5 if quick else ROUND_TRIPS


# The rows of a pingpong take first how many bytes they ask for: `room`.


@contextmanager
def pingpong_greenlets(implementation: str, room: int, size: int, quick: bool) -> Iterator[Sampler]:
    library = importlib.import_module(implementation)
    read, write = library.nb_read, library.nb_write
    trips = round_trips(quick)
    data = BYTE * size
    echo_in, ping_out = make_pipe()
    ping_in, echo_out = make_pipe()

    def echo() -> None:
        for _ in range(WARM_UP + trips):
            write(echo_out, read(echo_in, room))

    def ping() -> float:
        start = 0.0
        for trip in range(WARM_UP + trips):
            if trip == WARM_UP:
                start = perf_counter()
            write(ping_out, data)
            read(ping_in, room)
        return (perf_counter() - start) / trips

    yield lambda: {"trip": run_pingpong(ping, echo)}


def run_pingpong(ping: Callable[[], float], echo: Callable[[], None]) -> float:
    import gevent

    greenlets: list[gevent.Greenlet[[], Any]] = [gevent.spawn(ping), gevent.spawn(echo)]
    gevent.joinall(greenlets, raise_error=True)
    elapsed: float = greenlets[0].get()
    return elapsed


@contextmanager
def pingpong_files(is_blocking: bool, room: int, size: int, quick: bool) -> Iterator[Sampler]:
    """The methods are looked up beforehand, as the functions are in the other rows."""
    from coopos import FileIO

    trips = round_trips(quick)
    data = BYTE * size
    fds = [fd for _ in range(2) for fd in (os.pipe() if is_blocking else make_pipe())]
    echo_in, ping_out, ping_in, echo_out = (FileIO(fd, mode) for fd, mode in zip(fds, ("rb", "wb") * 2, strict=True))
    ping_read, ping_write = ping_in.read, ping_out.write
    echo_read, echo_write = echo_in.read, echo_out.write

    def echo() -> None:
        for _ in range(WARM_UP + trips):
            echo_write(echo_read(room))

    def ping() -> float:
        start = 0.0
        for trip in range(WARM_UP + trips):
            if trip == WARM_UP:
                start = perf_counter()
            ping_write(data)
            ping_read(room)
        return (perf_counter() - start) / trips

    yield lambda: {"trip": run_pingpong(ping, echo)}


@contextmanager
def pingpong_threads(room: int, size: int, quick: bool) -> Iterator[Sampler]:
    trips = round_trips(quick)
    data = BYTE * size
    echo_in, ping_out = os.pipe()
    ping_in, echo_out = os.pipe()

    def echo() -> None:
        for _ in range(WARM_UP + trips):
            os.write(echo_out, os.read(echo_in, room))

    def sample() -> Sample:
        thread = threading.Thread(target=echo)
        thread.start()
        start = 0.0
        for trip in range(WARM_UP + trips):
            if trip == WARM_UP:
                start = perf_counter()
            os.write(ping_out, data)
            os.read(ping_in, room)
        elapsed = perf_counter() - start
        thread.join()
        return {"trip": elapsed / trips}

    yield sample


# One way from one coroutine to the other: how to receive, how to send.
Receive = Callable[[], Awaitable[bytes]]
Send = Callable[[bytes], Awaitable[None]]


async def ping_coroutine(send: Send, receive: Receive, data: bytes, trips: int) -> float:
    start = 0.0
    for trip in range(WARM_UP + trips):
        if trip == WARM_UP:
            start = perf_counter()
        await send(data)
        await receive()
    return (perf_counter() - start) / trips


async def echo_coroutine(send: Send, receive: Receive, trips: int) -> None:
    for _ in range(WARM_UP + trips):
        await send(await receive())


@contextmanager
def pingpong_asyncio(loop_module: str, kind: str, room: int, size: int, quick: bool) -> Iterator[Sampler]:
    import asyncio

    module = importlib.import_module(loop_module)
    make_way = {"add_reader": add_reader_way, "streams": stream_way}[kind]
    trips = round_trips(quick)

    async def both() -> float:
        ping_to_echo = await make_way(room)
        echo_to_ping = await make_way(room)
        echo = asyncio.ensure_future(echo_coroutine(echo_to_ping[1], ping_to_echo[0], trips))
        elapsed = await ping_coroutine(ping_to_echo[1], echo_to_ping[0], BYTE * size, trips)
        await echo
        return elapsed

    def sample() -> Sample:
        loop: AbstractEventLoop = module.new_event_loop()
        return {"trip": loop.run_until_complete(both())}

    yield sample


async def add_reader_way(room: int) -> tuple[Receive, Send]:
    """Plain reads and writes, and add_reader when there is nothing to read."""
    import asyncio

    loop = asyncio.get_running_loop()
    receiver, sender = make_pipe()

    async def receive() -> bytes:
        while True:
            try:
                return os.read(receiver, room)
            except BlockingIOError:
                woken = loop.create_future()
                loop.add_reader(receiver, woken.set_result, None)
                try:
                    await woken
                finally:
                    loop.remove_reader(receiver)

    async def send(data: bytes) -> None:
        os.write(sender, data)

    return receive, send


async def stream_way(room: int) -> tuple[Receive, Send]:
    """A StreamReader on one end, a pipe transport on the other."""
    import asyncio

    loop = asyncio.get_running_loop()
    receiver, sender = make_pipe()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(receiver, "rb", 0))
    transport, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(sender, "wb", 0))

    async def receive() -> bytes:
        return await reader.read(room)

    async def send(data: bytes) -> None:
        transport.write(data)

    return receive, send


@contextmanager
def pingpong_trio(room: int, size: int, quick: bool) -> Iterator[Sampler]:
    import trio

    trips = round_trips(quick)

    def trio_way() -> tuple[Receive, Send]:
        receiver, sender = map(trio.lowlevel.FdStream, os.pipe())
        return partial(receiver.receive_some, room), sender.send_all

    async def both() -> float:
        ping_to_echo, echo_to_ping = trio_way(), trio_way()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo_coroutine, echo_to_ping[1], ping_to_echo[0], trips)
            return await ping_coroutine(ping_to_echo[1], echo_to_ping[0], BYTE * size, trips)

    yield lambda: {"trip": trio.run(both)}


@contextmanager
def readers(implementation: str, count: int, quick: bool) -> Iterator[Sampler]:
    need_fds(4 * count + 4)
    library = importlib.import_module(implementation)
    read, write = library.nb_read, library.nb_write
    laps = (READER_WAKES // 5 if quick else READER_WAKES) // count

    def sample() -> Sample:
        return {
            "burst": time_burst(read, write, count, laps) / (laps * count),
            "ring": time_ring(read, write, count, laps) / (laps * count),
        }

    yield sample


def time_burst(read: Read, write: Write, count: int, laps: int) -> float:
    """A writer writes to every pipe, then waits until every reader has read."""
    import gevent

    pipes = [make_pipe() for _ in range(count)]
    writer_in, last_out = make_pipe()
    awaited = count

    def reader(receiver: int) -> None:
        nonlocal awaited
        while True:
            read(receiver, 1)
            awaited -= 1
            if not awaited:
                awaited = count
                write(last_out, BYTE)

    def writer() -> float:
        start = 0.0
        for lap in range(WARM_UP_LAPS + laps):
            if lap == WARM_UP_LAPS:
                start = perf_counter()
            for _, sender in pipes:
                write(sender, BYTE)
            read(writer_in, 1)
        return perf_counter() - start

    parked = [gevent.spawn(reader, receiver) for receiver, _ in pipes]
    elapsed: float = gevent.spawn(writer).get()
    gevent.killall(parked)
    close_all([*pipes, (writer_in, last_out)])
    return elapsed


def time_ring(read: Read, write: Write, count: int, laps: int) -> float:
    """One byte goes round: whoever gets it wakes the next, all others are parked."""
    import gevent

    pipes = [make_pipe() for _ in range(count)]

    def member(receiver: int, next_sender: int) -> None:
        while True:
            read(receiver, 1)
            write(next_sender, BYTE)

    def first(receiver: int, next_sender: int) -> float:
        start = 0.0
        for lap in range(WARM_UP_LAPS + laps):
            if lap == WARM_UP_LAPS:
                start = perf_counter()
            write(next_sender, BYTE)
            read(receiver, 1)
        return perf_counter() - start

    places = [(receiver, pipes[(number + 1) % count][1]) for number, (receiver, _) in enumerate(pipes)]
    parked = [gevent.spawn(member, *place) for place in places[1:]]
    elapsed: float = gevent.spawn(first, *places[0]).get()
    gevent.killall(parked)
    close_all(pipes)
    return elapsed


# Those that stand in both.
PEERS: dict[str, Callable[..., AbstractContextManager[Sampler]]] = {
    "asyncio streams": partial(pingpong_asyncio, "asyncio", "streams"),
    "uvloop streams": partial(pingpong_asyncio, "uvloop", "streams"),
    "trio FdStream": pingpong_trio,
    "threads": pingpong_threads,
}

register(
    Benchmark(
        name="pingpong",
        summary="two tasks pass a byte there and back through two pipes",
        case_label="{} byte(s)",
        cases=(1,),
        metrics={"trip": "one round trip, two waits"},
        implementations={
            OURS: partial(pingpong_greenlets, OURS, 1),
            GEVENT: partial(pingpong_greenlets, GEVENT, 1),
            "asyncio add_reader": partial(pingpong_asyncio, "asyncio", "add_reader", 1),
            "uvloop add_reader": partial(pingpong_asyncio, "uvloop", "add_reader", 1),
            **{name: partial(row, 1) for name, row in PEERS.items()},
        },
        targets=(Target("trip", GEVENT, at_least=1.5),),
        repeat=9,
    )
)

register(
    Benchmark(
        name="fileio_pingpong",
        summary=f"the same with files: read({ROOM_B}) and write of coopos.FileIO, without a buffer, on pipes in non-blocking mode",
        case_label="{} byte(s)",
        cases=(1, 64),
        metrics={"trip": "one round trip, two waits"},
        implementations={
            OURS: partial(pingpong_files, False, ROOM_B),
            "coopos, blocking": partial(pingpong_files, True, ROOM_B),
            "coopos.nb_read": partial(pingpong_greenlets, OURS, ROOM_B),
            GEVENT: partial(pingpong_greenlets, GEVENT, ROOM_B),
            **{name: partial(row, ROOM_B) for name, row in PEERS.items()},
        },
        targets=(
            Target("trip", GEVENT, at_least=1.9),
            Target("trip", "uvloop streams", at_most=1, words="no slower than uvloop streams"),
        ),
        repeat=9,
    )
)

register(
    Benchmark(
        name="readers",
        summary="greenlets parked on a pipe each, woken over and over",
        case_label="{} readers",
        cases=(10, 100, 1000, 4900),
        quick_cases=(100,),
        metrics={
            "burst": "one wait, all woken by a writer, lap after lap",
            "ring": "one wait, each woken by the one before it",
        },
        implementations={name: partial(readers, name) for name in (OURS, GEVENT)},
        targets=(Target("burst", GEVENT, at_least=1.6),),
        repeat=9,
    )
)
