"""Runs the stdlib's own code over ours, in subprocess and in multiprocessing. POSIX only.

over() makes a namespace in the place of a module that the code calls; CooperativeSelector is a selector whose waits let other
greenlets run. The selector asks the kernel each time what is ready: its wait on the hub is only a sleep. In the hub itself it waits
in poll(2). Nothing here knows which modules use it.
"""

from __future__ import annotations

import selectors
import types
from typing import TYPE_CHECKING, Any

from gevent import Timeout
from gevent.monkey import get_original

from coopos import _core

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds: what libuv's timer can measure, and what a loop's timer can hold.
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 0.001, 1e9
#: Seconds: what poll(2) can be told, in milliseconds.
MAX_POLL_S = 2e6


def over(module: types.ModuleType, **ours: Any) -> types.ModuleType:
    """A namespace to take the place of *module* in one of its users: *ours*, and what else *module* has at the time."""
    namespace = types.ModuleType(module.__name__, module.__doc__)
    vars(namespace).update(ours, __getattr__=lambda name: getattr(module, name))
    return namespace


def in_time(seconds: float | None, wait: Callable[..., object], *args: object) -> None:
    """``wait(*args)``, which ends early, without an exception, when the time is up."""
    if seconds is None:
        wait(*args)
        return
    with Timeout(min(max(seconds, MIN_TIMEOUT_S), MAX_TIMEOUT_S), False):  # type: ignore[arg-type]
        wait(*args)


class CooperativeSelector(selectors.PollSelector):
    """:class:`selectors.PollSelector`. A descriptor that :func:`coopos.close` closes during the wait is reported as ready."""

    _selector_cls = get_original("select", "poll")

    def select(self, timeout: float | None = None) -> Any:
        """What is ready. If nothing is, other greenlets run even with a *timeout* of 0: the caller may ask in a loop."""
        if not _core.can_give_way():
            return super().select(timeout if timeout is None else min(timeout, MAX_POLL_S))
        ready = super().select(0)
        if ready:
            return ready
        if timeout is not None and timeout <= 0:
            _core.yield_turn()
            return ready
        wanted = [
            (key.fd, events)
            for key in self.get_map().values()
            for events in (_core.READ, _core.WRITE)
            if key.events & events
        ]
        closed: list[int] = []
        in_time(timeout, _core.wait_for_any, wanted, "select", closed)
        if closed:
            return [(key, key.events) for key in self.get_map().values() if key.fd in closed]
        return super().select(0)
