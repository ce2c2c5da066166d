"""Managers of multiprocessing and their proxies under :func:`coopos.patch`. POSIX only.

`_multiprocessing` puts these functions in place; its rules hold here. Each greenlet has its own connection to a manager's server.
Calls and answers take turns on it. So if a greenlet was killed before its answer came, its connection is dropped.
"""

from __future__ import annotations

import functools
import inspect
import threading
from typing import TYPE_CHECKING, Any

from gevent import get_hub, spawn

from coopos import _core

if TYPE_CHECKING:
    from collections.abc import Callable

class ByName:
    """A class that a manager's server makes objects of, pickled by its name: a fresh interpreter takes the class it has there."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        make, (name,) = self.__reduce__()
        return make(name)(*args, **kwargs)

    def __reduce__(self) -> Any:
        import pkgutil

        return pkgutil.resolve_name, (self.name,)


def in_another_greenlet(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that would swallow an exception thrown into it: it runs in a greenlet of its own, and its caller waits.

    If the caller is killed the function still goes on to its end.
    """

    @functools.wraps(function)
    def wait(*args: Any, **kwargs: Any) -> Any:
        return spawn(function, *args, **kwargs).get() if _core.can_give_way() else function(*args, **kwargs)

    return wait


class ForkAwareLocal:
    """``util.ForkAwareLocal``, with values of its own for each greenlet. A forked child begins with none, in its hub too."""

    def __init__(self) -> None:
        from multiprocessing.util import register_after_fork

        self._renew()
        register_after_fork(self, type(self)._renew)

    def _renew(self) -> None:
        object.__setattr__(self, "_local", threading.local())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._local, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._local, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._local, name)

    def __reduce__(self) -> Any:
        return type(self), ()


ForkAwareLocal.__module__ = "multiprocessing.util"  # it is pickled by name


class _Asking:
    """A proxy's connection that notes whether the answer to a call is still to come."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._of_bytes = connection.send_bytes.__self__  # the serializer "xmlrpclib" wraps it
        self._is_owed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def is_out_of_step(self) -> bool:
        """Whether the next answer would be that of an earlier call."""
        return self._is_owed or hasattr(self._of_bytes, "_coopos_rest")

    def send(self, call: Any) -> None:
        self._connection.send(call)
        self._is_owed = True

    def recv(self) -> Any:
        answer = self._connection.recv()
        self._is_owed = False
        return answer


def asking(connect: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap ``BaseProxy._connect``, so that the connection is an _Asking."""

    @functools.wraps(connect)
    def connect_asking(proxy: Any) -> None:
        connect(proxy)
        proxy._tls.connection = _Asking(proxy._tls.connection)

    return connect_asking


def dropping_the_connection(call_method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``BaseProxy._callmethod``: after a call that was killed or timed out the next one makes a new connection."""

    @functools.wraps(call_method)
    def call(proxy: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call_method(proxy, *args, **kwargs)
        except BaseException:
            connection = getattr(proxy._tls, "connection", None)
            if isinstance(connection, _Asking) and connection.is_out_of_step():
                del proxy._tls.connection
                connection.close()
            raise

    return call


def in_its_own_greenlet(tell_manager: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``BaseProxy._decref``: it tells the manager in a greenlet of its own.

    It runs in a weakref's callback, where Python swallows exceptions that are thrown in. So the greenlet that drops a proxy doesn't
    wait. The end of the program waits.
    """

    parameters = inspect.signature(tell_manager)

    @functools.wraps(tell_manager)
    def decref(*values: Any) -> None:
        from multiprocessing import util

        args = parameters.bind(*values).arguments
        tls, idset = args["tls"], args["idset"]
        idset.discard(args.get("serial", args["token"].id))
        # The connection belongs to the greenlet that is here. The new greenlet makes its own.
        if not idset and hasattr(tls, "connection"):
            tls.connection.close()
            del tls.connection
        args.update(tls=None, idset=set())
        if not _core.can_give_way():
            tell_manager(**args)
            return
        greenlet = spawn(tell_manager, **args)
        if util.is_exiting() or not get_hub().loop.default:  # another thread may end any moment, and its greenlets with it
            greenlet.join()
            return
        at_exit = util.Finalize(None, greenlet.join, exitpriority=10)
        greenlet.rawlink(lambda _: at_exit.cancel())

    return decref
