"""What stands in for parts of the stdlib where its own code runs over ours: in subprocess and in multiprocessing. POSIX only.

A namespace in the place of a module that the code calls, and a selector whose waits let other greenlets run. Of the selector: what
is ready is the kernel's to say, each time; the hub is only slept in, and in the hub itself the wait is poll(2)'s. Knows `_parking`
and gevent's Timeout.
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
    """A namespace to take the place of *module* in one of its users: *ours*, and the rest as it is there at the time."""
    namespace = types.ModuleType(module.__name__, module.__doc__)
    vars(namespace).update(ours, __getattr__=lambda name: getattr(module, name))
    return namespace


def in_time(seconds: float | None, wait: Callable[..., object], *args: object) -> None:
    """``wait(*args)``, which is left early, without a word, when so much time has gone by."""
    if seconds is None:
        wait(*args)
        return
    with Timeout(min(max(seconds, MIN_TIMEOUT_S), MAX_TIMEOUT_S), False):  # type: ignore[arg-type]
        wait(*args)


class CooperativeSelector(selectors.PollSelector):
    """:class:`selectors.PollSelector`. Whoever waits for a descriptor that :func:`coopos.close` closes is told that it is ready."""

    _selector_cls = get_original("select", "poll")

    def select(self, timeout: float | None = None) -> Any:
        """What is ready. Without waiting, and with nothing ready, the others have their turn: who asks may ask again and again."""
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
