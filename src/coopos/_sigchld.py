"""SIGCHLD where libev has it: nobody's child is collected, and handlers that a program gave to gevent hear of watched children.

libev's default loop has a callback of its own for SIGCHLD. It collects every child of the process before the loop's other watchers
of that signal are told: `childcb` in https://github.com/enki/libev/blob/master/ev.c. So libev must never get the signal. gevent
takes it back from the first default loop, but not from later ones, made after ``hub.destroy(destroy_loop=True)``:
https://github.com/gevent/gevent/blob/26.9.0/src/gevent/libev/libev.h, ``gevent_ev_default_loop()``. `begin` sees to these, too. And
it notes what is given to ``gevent.signal_handler(SIGCHLD, ...)``; `tell` calls it in libev's place. On libuv nothing
of this is needed: there the kernel's signal tells them.
"""

from __future__ import annotations

import functools
import signal
import weakref
from typing import TYPE_CHECKING, Any

import gevent
from gevent.hub import Hub, _get_hub as get_hub_if_exists, signal as SignalHandler  # type: ignore[attr-defined]  # noqa: N812

from coopos import _core

if TYPE_CHECKING:
    from collections.abc import Callable

#: The handlers of SIGCHLD that are not cancelled. The loop keeps them alive.
_handlers: weakref.WeakSet[Any] = weakref.WeakSet()


def _noting(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def note(handler: Any, signalnum: int, *args: Any, **kwargs: Any) -> None:
        init(handler, signalnum, *args, **kwargs)
        if signalnum == signal.SIGCHLD and type(handler.hub.loop).__module__ == "gevent.libev.corecext":
            _handlers.add(handler)

    return note


def _keeping_sigchld(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def make_hub(*args: Any, **kwargs: Any) -> None:
        _core.keeping_sigchld(init, *args, **kwargs)

    return make_hub


def begin() -> None:
    """From now on a new hub leaves SIGCHLD as it is, and new handlers are told of children."""
    Hub.__init__ = _keeping_sigchld(Hub.__init__)  # type: ignore[method-assign]
    _core.call_when_left(_handlers.clear)
    SignalHandler.__init__ = _noting(SignalHandler.__init__)  # type: ignore[method-assign]


def tell() -> None:
    """In a hub, when watched children have ended: call each handler in a greenlet of its own hub, as gevent does."""
    for handler in list(_handlers):
        hub = handler.hub
        if hub is None:  # cancelled
            _handlers.discard(handler)
        elif hub is get_hub_if_exists():
            gevent.spawn(handler.handle)
        elif hub.loop is not None:
            hub.loop.run_callback_threadsafe(gevent.spawn, handler.handle)
