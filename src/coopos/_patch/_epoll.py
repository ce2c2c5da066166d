"""``select.epoll`` and ``selectors.EpollSelector``, which gevent.monkey removes and ``coopos.patch(io=True)`` gives back.

An epoll is a descriptor that poll(2) calls ready as soon as one of its members is. So a greenlet waits for it on the hub, and then
asks without waiting. Everything else is the interpreter's own class. Linux only.

There is none for kqueue(2): it could be made likewise, but has not been run on a system that has one.
"""

from __future__ import annotations

import select
import selectors
from time import monotonic
from typing import TYPE_CHECKING, Any

from gevent.monkey import get_original

from coopos import _core
from coopos._stdlib import in_time

if TYPE_CHECKING:
    from types import TracebackType

_plain_epoll: Any = get_original("select", "epoll")


class epoll:  # noqa: N801 (select's name)
    __slots__ = ("_epoll",)
    _epoll: Any

    def __new__(cls, sizehint: int = -1, flags: int = 0) -> epoll:
        return cls._over(_plain_epoll(sizehint, flags))

    @classmethod
    def _over(cls, plain: Any) -> epoll:
        made = super().__new__(cls)
        made._epoll = plain
        return made

    @classmethod
    def fromfd(cls, fd: int, /) -> epoll:
        return cls._over(_plain_epoll.fromfd(fd))

    @property
    def closed(self) -> bool:
        return self._epoll.closed  # type: ignore[no-any-return]

    def fileno(self) -> int:
        return self._epoll.fileno()  # type: ignore[no-any-return]

    def register(self, fd: Any, eventmask: int = select.EPOLLIN | select.EPOLLPRI | select.EPOLLOUT) -> None:
        self._epoll.register(fd, eventmask)

    def modify(self, fd: Any, eventmask: int) -> None:
        self._epoll.modify(fd, eventmask)

    def unregister(self, fd: Any) -> None:
        self._epoll.unregister(fd)

    def poll(self, timeout: Any = None, maxevents: int = -1) -> list[tuple[int, int]]:
        if not _core.can_give_way() or not (timeout is None or (isinstance(timeout, (int, float)) and timeout <= _MAX_S)):
            return self._epoll.poll(timeout, maxevents)  # type: ignore[no-any-return]  # or it says what is wrong
        deadline = None if timeout is None or timeout < 0 else monotonic() + timeout
        _core.yield_turn()  # a loop whose members are always ready would stop all others
        while True:
            ready: list[tuple[int, int]] = self._epoll.poll(0, maxevents)
            left = None if deadline is None else deadline - monotonic()
            if ready or (left is not None and left <= 0):
                return ready
            # Another greenlet or process that polls it may come first.
            in_time(left, _core.wait_until_ready, self._epoll.fileno(), _core.READ, "epoll_wait")

    def close(self) -> None:
        if not self._epoll.closed:
            _core.fail_waiters(self._epoll.fileno())
        self._epoll.close()

    def __enter__(self) -> epoll:
        self._epoll.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()


epoll.__module__, epoll.__doc__ = "select", _plain_epoll.__doc__
for _name in ("closed", "fileno", "fromfd", "modify", "poll", "register", "unregister", "close"):
    _member = vars(epoll)[_name]
    getattr(_member, "__func__", _member).__doc__ = getattr(_plain_epoll, _name).__doc__

#: The longest time that epoll_wait(2) takes, in s.
_MAX_S = (2**31 - 1) / 1000


class EpollSelector(get_original("selectors", "EpollSelector")):  # type: ignore[misc]
    _selector_cls = epoll


EpollSelector.__module__, EpollSelector.__doc__ = "selectors", EpollSelector.__base__.__doc__


def places() -> list[tuple[Any, str, Any, Any]]:
    """As those of `_io`. What the names hold now: nothing."""
    return [(select, "epoll", None, epoll), (selectors, "EpollSelector", None, EpollSelector)]
