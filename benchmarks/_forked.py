"""What the benchmarks of children have in common: many held at a gate, and rows alike.

A child blocks in a plain read of one pipe, the gate, and ends at its end-of-file. It
uses plain os calls alone and closes only its own copy of the gate's write end, so
that the parent's is the last: closing that lets all go at once, and they also go if
the parent dies.

Each row has its own interpreter, and all have the same modules in memory and a hub:
what fork has to copy, and an exit to take down, is of one size, and no row pays for
another's imports. coopos and gevent do nothing about children before they are called.
"""

from __future__ import annotations

import importlib
import os
import resource
import select
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from benchmarks._model import GEVENT, OURS, Unavailable
from benchmarks._system import need_fds

PIDFD = "pidfd + epoll"
ASYNCIO = "asyncio"

Fork = Callable[[], int]


def load_alike() -> None:
    """Bring this interpreter to the size it has in every row."""
    for name in (OURS, GEVENT, "asyncio.unix_events"):
        importlib.import_module(name)
    from gevent import get_hub

    get_hub()


def need_children(count: int) -> None:
    need_fds(count)
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise Unavailable(f"needs {count} processes, the hard limit is {hard}")


def need_pidfds() -> None:
    if not hasattr(os, "pidfd_open") or not hasattr(select, "epoll"):
        raise Unavailable("this platform has no pidfd_open and epoll")


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


def fork_without(fds: range) -> int:
    """os.fork; the child closes `fds` in one call.

    For loops whose siblings' pidfds it would inherit. Children that hold those make the
    parent's waitpid several times dearer.
    """
    pid = os.fork()
    if pid == 0:
        os.closerange(fds.start, fds.stop)
    return pid


def asyncio_watcher(loop: Any) -> Any:
    """What tells asyncio.create_subprocess_exec of a child's end, to be used without it.

    Its add_child_handler(pid, callback) calls callback(pid, returncode) in the loop.
    """
    from asyncio import unix_events

    need_pidfds()
    kind: Any = getattr(unix_events, "_PidfdChildWatcher", None) or getattr(unix_events, "PidfdChildWatcher")  # noqa: B009
    watcher = kind()
    if hasattr(watcher, "attach_loop"):  # Python before 3.12 needs it
        watcher.attach_loop(loop)
    return watcher


def run_asyncio(main: Coroutine[Any, Any, Any]) -> Any:
    import asyncio

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()
