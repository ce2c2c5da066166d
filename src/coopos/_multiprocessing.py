"""What :func:`coopos.patch` puts into :mod:`multiprocessing`, so that it waits as a greenlet does. POSIX only.

The modules stay the stdlib's. What they wait with is replaced: a Connection's reads and writes, `connection.wait`, the semaphore
under every lock, what a parent writes to a child that it starts. A module that calls `os` for it is given a namespace of that name,
which has a few functions of ours over the real one. Rules:

1. Other processes see the descriptors they see without gevent, in blocking mode; no flag is changed to wait for one.
2. A child that is forked here goes on with the greenlet that forked it alone: the feeders and handlers of the parent's queues and
   pools are greenlets.
3. Locks and locals that the modules have made when they were imported are a thread's if `gevent.monkey` came later: they are made
   anew.

The module knows the inside of multiprocessing, from Python 3.10 to 3.15; nothing else of coopos does.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import signal
import socket
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

from gevent.monkey import get_original, is_module_patched

from coopos import _core, _fork, _parking, _semaphores, io as coopos_io
from coopos._standins import CooperativeSelector, over

if TYPE_CHECKING:
    from collections.abc import Callable

_multiprocessing: Any = importlib.import_module("_multiprocessing")  # the stubs don't know it


# ---- connections -------------------------------------------------------------------------------------------------------------


def _read_part(fd: int, parts: list[bytes], index: int, size: int) -> bytes:
    """Read what is missing of one part of a message; what was read stays in *parts*, whatever happens."""
    begun = parts[index]
    if len(begun) < size:
        try:
            parts[index] = begun + _core.read_exactly(fd, size - len(begun))
        except EOFError as ex:
            if begun or ex.partial:  # type: ignore[attr-defined]
                raise OSError("got end of file during message") from None
            raise EOFError from None
        except BaseException as ex:
            parts[index] = begun + getattr(ex, "partial", b"")
            raise
    return parts[index]


def _receive_bytes(connection: Any, maxsize: int | None = None) -> io.BytesIO | None:
    """``Connection._recv_bytes``. Killed or timed out in the middle of a message, it leaves the beginning for the next call."""
    fd = connection._handle
    parts = vars(connection).pop("_coopos_begun", None) or [b"", b"", b""]
    try:
        size = int.from_bytes(_read_part(fd, parts, 0, 4), "big", signed=True)
        if size == -1:
            size = int.from_bytes(_read_part(fd, parts, 1, 8), "big")
        if maxsize is not None and size > maxsize:
            return None
        message = io.BytesIO(_read_part(fd, parts, 2, size))
        message.seek(0, io.SEEK_END)
        return message
    except (EOFError, OSError):
        raise
    except BaseException:
        if any(parts):
            connection._coopos_begun = parts
        raise


def _send(connection: Any, data: Any) -> None:
    """``Connection._send``."""
    _core.write_all(connection._handle, data)


def _close(connection: Any, close: Callable[[int], None] = _parking.close) -> None:
    """``Connection._close``: who waits for the descriptor is told. Called late, when a module's names may be gone."""
    close(connection._handle)


def _in_blocking_mode(make: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes Connections, a pair or one, of gevent's sockets: they stay the kernel's for other processes."""

    @functools.wraps(make)
    def make_blocking(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        for connection in made if isinstance(made, tuple) else (made,):
            os.set_blocking(connection.fileno(), True)
        return made

    return make_blocking


class _DuplicatedSocket(get_original("socket", "socket")):  # type: ignore[misc]
    """A Connection's socket, to send and receive descriptors with: gevent's would leave it in non-blocking mode for everybody."""

    def sendmsg(self, *args: Any) -> int:
        _parking.wait_until_ready(self.fileno(), _parking.WRITE, "sendmsg")
        return super().sendmsg(*args)  # type: ignore[no-any-return]

    def recvmsg(self, *args: Any) -> Any:
        _parking.wait_until_ready(self.fileno(), _parking.READ, "recvmsg")
        return super().recvmsg(*args)

    def recv(self, *args: Any) -> bytes:
        _parking.wait_until_ready(self.fileno(), _parking.READ, "recv")
        return super().recv(*args)  # type: ignore[no-any-return]


def _from_fd(fd: int, family: int, kind: int) -> _DuplicatedSocket:
    return _DuplicatedSocket(family, kind, fileno=os.dup(fd))


# ---- locks -------------------------------------------------------------------------------------------------------------------


class SemLock(_semaphores.Semaphore):
    """``_multiprocessing.SemLock``, which owns and waits greenlet by greenlet."""

    __slots__ = ()

    _plain = _multiprocessing.SemLock
    SEM_VALUE_MAX = _plain.SEM_VALUE_MAX

    def __new__(cls, *args: Any, **kwargs: Any) -> SemLock:
        return super().__new__(cls, cls._plain(*args, **kwargs))  # type: ignore[no-any-return]

    @classmethod
    def _rebuild(cls, *state: Any) -> SemLock:
        return super().__new__(cls, cls._plain._rebuild(*state))  # type: ignore[no-any-return]


# ---- processes ---------------------------------------------------------------------------------------------------------------


def _forking_by(fork: Callable[..., int]) -> Callable[[], int]:
    """os.fork for a child that is a Process: where it fails in the child, that must not go on with the parent's program."""

    def fork_process() -> int:
        parent = os.getpid()
        try:
            return fork(keep_greenlets=False)
        except BaseException:
            if os.getpid() == parent:
                raise
            traceback.print_exc()
            os._exit(1)

    return fork_process


class _ServerSocket(socket.socket):
    """What the fork server is given to listen at."""

    def listen(self, *args: Any) -> None:
        super().listen(*args)
        os.set_blocking(self.fileno(), True)


def _open(fd: int, mode: str, closefd: bool = True) -> Any:
    return coopos_io.fdopen(fd, mode, closefd=closefd)


class _ByName:
    """A class that a manager's server makes objects of: in a fresh interpreter, the one that has the name there."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        make, (name,) = self.__reduce__()
        return make(name)(*args, **kwargs)

    def __reduce__(self) -> Any:
        import pkgutil

        return pkgutil.resolve_name, (self.name,)


# ---- what there is to replace ------------------------------------------------------------------------------------------------


def _in_connection(connection: Any) -> list[tuple[Any, str, Any]]:
    return [
        (connection.Connection, "_recv_bytes", _receive_bytes),
        (connection.Connection, "_send", _send),
        (connection.Connection, "_close", _close),
        (connection, "Pipe", _in_blocking_mode(connection.Pipe)),
        (connection, "SocketClient", _in_blocking_mode(connection.SocketClient)),
        (connection.SocketListener, "accept", _in_blocking_mode(connection.SocketListener.accept)),
        (connection, "_WaitSelector", CooperativeSelector),
    ]


def _in_forkserver(forkserver: Any) -> list[tuple[Any, str, Any]]:
    return [
        # The server collects its children itself, with waitpid(-1).
        (forkserver, "os", over(os, fork=_forking_by(_fork.fork_gevent), read=_core.read, write=_core.write)),
        (forkserver, "socket", over(socket, socket=_ServerSocket)),
        # Its wake-up descriptor is told of a SIGCHLD that has a handler of the interpreter's; gevent's signal() sets none.
        (forkserver, "signal", over(signal, signal=get_original("signal", "signal"))),
    ]


def _in_resource_sharer(sharer: Any) -> list[tuple[Any, str, Any]]:
    """Its thread blocks all signals. Where that is a greenlet they would be its whole thread's, and every child's."""
    if not is_module_patched("threading"):
        return []
    return [(sharer, "signal", over(signal, pthread_sigmask=lambda _how, _signals: set()))]


def _in_util(util: Any) -> list[tuple[Any, str, Any]]:
    """Each greenlet has its own connection to a manager."""
    if issubclass(util.ForkAwareLocal, threading.local):
        return []
    methods = {name: value for name, value in vars(util.ForkAwareLocal).items() if name in ("__init__", "__reduce__")}
    return [(util, "ForkAwareLocal", type("ForkAwareLocal", (threading.local,), {**methods, "__module__": util.__name__}))]


def _dropping_the_connection(call_method: Callable[..., Any]) -> Callable[..., Any]:
    """``BaseProxy._callmethod``. The answer to a call that was killed or timed out comes on a connection that nobody uses."""

    @functools.wraps(call_method)
    def call(proxy: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call_method(proxy, *args, **kwargs)
        except Exception:
            raise
        except BaseException:
            if hasattr(proxy._tls, "connection"):
                proxy._tls.connection.close()
                del proxy._tls.connection
            raise

    return call


def _in_managers(managers: Any) -> list[tuple[Any, str, Any]]:
    """Of the registry nothing is to be taken back: a name means what the classes that were there mean."""
    registry = managers.SyncManager._registry
    for typeid in ("Event", "Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition", "Barrier", "Queue", "JoinableQueue"):
        name = "queue:Queue" if "Queue" in typeid else f"threading:{typeid}"
        registry[typeid] = (_ByName(name), *registry[typeid][1:])
    return [(managers.BaseProxy, "_callmethod", _dropping_the_connection(managers.BaseProxy._callmethod))]


#: {module: what there is to replace in it}
_WANTED: dict[str, Callable[[Any], list[tuple[Any, str, Any]]]] = {
    "_multiprocessing": lambda module: [(module, "SemLock", SemLock)],
    "multiprocessing.connection": _in_connection,
    "multiprocessing.forkserver": _in_forkserver,
    "multiprocessing.managers": _in_managers,
    "multiprocessing.popen_fork": lambda module: [(module, "os", over(os, fork=_forking_by(_fork.fork)))],
    "multiprocessing.popen_forkserver": lambda module: [(module, "open", _open)],
    "multiprocessing.popen_spawn_posix": lambda module: [(module, "open", _open)],
    "multiprocessing.reduction": lambda module: [(module, "socket", over(socket, fromfd=_from_fd))],
    "multiprocessing.resource_sharer": _in_resource_sharer,
    "multiprocessing.util": _in_util,
}


class Finder:
    """On sys.meta_path, for who imports multiprocessing after the patch: most programs never do, and patch() doesn't for them.

    *adopt* is called, once for each module, with the replacements in it: (owner, name, the stdlib's, ours).
    """

    def __init__(self, adopt: Callable[[list[tuple[Any, str, Any, Any]]], None]) -> None:
        self._adopt = adopt
        self._is_adopted: set[str] = set()

    def install(self) -> None:
        """Adopt the modules that are here, and look out for the others."""
        for name in _WANTED:
            if name in sys.modules:
                self.adopt(sys.modules[name])
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Look out no longer."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def adopt(self, module: Any) -> None:
        """Tell what there is to replace in *module*."""
        name = module.__name__
        if name not in self._is_adopted:
            self._is_adopted.add(name)
            self._adopt([(owner, name, getattr(owner, name, None), ours) for owner, name, ours in _WANTED[name](module)])

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """What the other finders say of a module; if it is one of ours, with a loader that has it adopted at its end."""
        if name not in _WANTED:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_adopt(module: Any) -> None:
                run(module)
                if module.__name__ == name:  # an archive's loader serves all modules in it
                    self.adopt(module)

            spec.loader.exec_module = run_and_adopt  # type: ignore[method-assign]
        return spec


def renew_locks() -> None:
    """Make the locks and locals anew that were made before ``gevent.monkey`` came: a greenlet that waits would stop its thread."""
    of_threads = {
        type(get_original("_thread", "allocate_lock")()): threading.Lock,
        get_original("_thread", "RLock"): threading.RLock,
        get_original("_thread", "_local"): threading.local,
    }
    for module, path, name in (
        ("context", "", "_tls"),
        ("forkserver", "_forkserver", "_lock"),
        ("heap", "BufferWrapper._heap", "_lock"),
        ("managers", "BaseProxy._mutex", "_lock"),
        ("resource_sharer", "_resource_sharer", "_lock"),
        ("resource_tracker", "_resource_tracker", "_lock"),
    ):
        owner: Any = sys.modules.get(f"multiprocessing.{module}")
        for step in path.split(".") if path else ():
            owner = getattr(owner, step, None)
        make = of_threads.get(type(getattr(owner, name, None)))
        if make is not None:
            setattr(owner, name, make())
            if hasattr(owner, "acquire"):  # it has its lock's methods for its own
                owner.acquire, owner.release = owner._lock.acquire, owner._lock.release
