"""Where a microsecond goes: wait_parts.

The system calls are made through ctypes, and what a call that does nothing takes there is taken off. Each sample is the least of
several short runs: whatever else the machine does only adds to it. The sum of the parts that a wait of coopos has (a read that
finds nothing, an epoll_ctl, a look into the set, a switch, a read of the byte) is spent below coopos, the rest of its row in it.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import select
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import repeat
from time import perf_counter
from typing import Any

from benchmarks._model import GEVENT, OURS, Benchmark, Sampler, Unavailable, register
from benchmarks.parking import make_pipe, time_ring

CALLS = 1_000
RUNS = 20
LAPS = 20
READERS = 100
EVENT = "=IQ" if platform.machine() == "x86_64" else "@IQ"  # struct epoll_event is packed there alone
EPOLL_CTL_MOD = 3

Call = Callable[[], object]


class Things(ExitStack):
    """What a call needs: descriptors and buffers that live as long as this context."""

    def __init__(self) -> None:
        super().__init__()
        self.libc: Any = ctypes.CDLL(None)

    def pipe(self) -> tuple[int, int]:
        fds = make_pipe()
        for fd in fds:
            self.callback(os.close, fd)
        return fds

    def epoll(self, fd: int, events: int) -> int:
        epoll = self.enter_context(select.epoll())
        epoll.register(fd, events)
        return epoll.fileno()

    def buffer(self, data: bytes) -> Any:
        buffer = ctypes.create_string_buffer(data, len(data))
        self.callback(id, buffer)
        return buffer


def nothing(things: Things) -> Call:
    return partial(things.libc.abs, 1)


def write(things: Things) -> Call:
    return partial(things.libc.write, things.pipe()[1], b"x", ctypes.c_size_t(1))


def read_of(things: Things, receiver: int) -> Call:
    """As coopos reads: https://man7.org/linux/man-pages/man2/preadv2.2.html"""
    vector = things.buffer(struct.pack("@PN", ctypes.addressof(things.buffer(b"x")), 1))
    return partial(things.libc.preadv2, receiver, vector, 1, ctypes.c_long(-1), os.RWF_NOWAIT)


def empty_read(things: Things) -> Call:
    return read_of(things, things.pipe()[0])


def full_read(things: Things) -> Call:
    receiver, sender = things.pipe()
    os.write(sender, bytes(CALLS + 1))
    return read_of(things, receiver)


def arm(things: Things) -> Call:
    receiver, _ = things.pipe()
    events = select.EPOLLIN | select.EPOLLONESHOT
    event = things.buffer(struct.pack(EVENT, events, receiver))
    return partial(things.libc.epoll_ctl, things.epoll(receiver, events), EPOLL_CTL_MOD, receiver, event)


def look(things: Things) -> Call:
    """It has one event each time, since the descriptor is not armed for one only."""
    receiver, sender = things.pipe()
    os.write(sender, b"x")
    return partial(things.libc.epoll_wait, things.epoll(receiver, select.EPOLLIN), things.buffer(bytes(16 * 256)), 256, 0)


def time_calls(prepare: Callable[[Things], Call]) -> float:
    with Things() as things:
        call = prepare(things)
        call()
        start = perf_counter()
        for _ in repeat(None, CALLS):
            call()
        return (perf_counter() - start) / CALLS


def least(measure: Callable[[], float], quick: bool) -> float:
    return min(measure() for _ in range(RUNS // 5 if quick else RUNS))


@contextmanager
def system_call(prepare: Callable[[Things], Call], case: int, quick: bool) -> Iterator[Sampler]:
    if not (hasattr(ctypes.CDLL(None), "preadv2") and hasattr(os, "RWF_NOWAIT") and hasattr(select, "epoll")):
        raise Unavailable("no preadv2 and epoll here")
    yield lambda: {"each": least(partial(time_calls, prepare), quick) - least(partial(time_calls, nothing), quick)}


@contextmanager
def switch(case: int, quick: bool) -> Iterator[Sampler]:
    """Half of a way there and back, between greenlets that are in Python."""
    from greenlet import getcurrent, greenlet

    main = getcurrent()

    def come_back() -> None:
        while True:
            main.switch()

    other = greenlet(come_back)
    yield lambda: {"each": least(lambda: time_calls(lambda _: other.switch), quick) / 2}


@contextmanager
def whole(implementation: str, case: int, quick: bool) -> Iterator[Sampler]:
    """A place of the ring: a write, and a wait."""
    library = importlib.import_module(implementation)
    yield lambda: {"each": least(lambda: time_ring(library.nb_read, library.nb_write, READERS, LAPS), quick) / (LAPS * READERS)}


register(
    Benchmark(
        name="wait_parts",
        summary="where a microsecond goes: what lies under one wait for a byte that another greenlet writes",
        case_label=f"{READERS} parked readers",
        cases=(READERS,),
        metrics={"each": "one of each"},
        implementations={
            GEVENT: partial(whole, GEVENT),
            OURS: partial(whole, OURS),
            "write of a byte": partial(system_call, write),
            "read that finds nothing": partial(system_call, empty_read),
            "epoll_ctl": partial(system_call, arm),
            "epoll_wait of one event": partial(system_call, look),
            "switch of greenlets": switch,
            "read of the byte": partial(system_call, full_read),
        },
        is_shared=True,
        turns=3,
        repeat=5,
    )
)
