"""What :func:`coopos.patch` puts into :mod:`multiprocessing`, so that it waits as a greenlet does. POSIX only.

The modules stay the stdlib's. What they wait with is replaced: a Connection's reads and writes, `connection.wait`, the semaphore
under every lock, what a parent writes to a child that it starts. A module that calls `os` for it is given a namespace of that name,
which has a few functions of ours over the real one. Rules:

1. Other processes see the descriptors they see without gevent, in blocking mode; no flag is changed to wait for one.
2. A child that is forked here goes on with the greenlet that forked it alone: the feeders and handlers of the parent's queues and
   pools are greenlets.
3. Locks and locals that the modules have made when they were imported are a thread's if `gevent.monkey` came later: they are made
   anew.
4. Whatever class is thrown into a greenlet that waits comes out, OSError and EOFError included. No part of a message is lost.
5. The hub can't switch. A wait in it, of a signal handler for instance, is made plainly, as without gevent.

The module knows the inside of multiprocessing, from Python 3.10 to 3.15; nothing else of coopos does. Every private name that it
replaces or uses stands in _WANTED, and is looked for before anything of that module is replaced.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import inspect
import io
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from contextlib import nullcontext
from errno import ECHILD
from queue import Full
from typing import TYPE_CHECKING, Any, NamedTuple

from gevent import get_hub, spawn
from gevent.exceptions import BlockingSwitchOutError
from gevent.monkey import get_original, is_module_patched

from coopos import _core, _fork, io as coopos_io
from coopos._standins import CooperativeSelector, over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

importlib.import_module("_multiprocessing")  # ImportError: a system without the kernel's semaphores


# ---- connections -------------------------------------------------------------------------------------------------------------


# A message is its length in 4 bytes, or -1 and the length in 8, and then the bytes:
# https://github.com/python/cpython/blob/v3.13.0/Lib/multiprocessing/connection.py#L406-L436
_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!iQ")
#: Up to here a copy is cheaper than a second system call.
MAX_JOINED = 16_384


def _read_part(fd: int, parts: list[bytes], index: int, size: int) -> bytes:
    """Read what is missing of one part of a message. What was read stays in *parts*, whatever comes out; at the end of the file
    nothing does.
    """
    while len(parts[index]) < size:
        told: list[bytes] = []
        try:
            parts[index] += _core.read_telling(fd, size - len(parts[index]), told)
        except BaseException as ex:
            parts[index] += b"".join(told)
            data = b""
            if isinstance(ex, BlockingSwitchOutError):
                data = os.read(fd, size - len(parts[index]))
            elif not hasattr(ex, "is_at_end"):
                raise
            if not data:
                has_begun = bool(parts[index])
                parts.clear()
                raise (OSError("got end of file during message") if has_begun else EOFError()) from None
            parts[index] += data
    return parts[index]


def _receive_bytes(connection: Any, maxsize: int | None = None) -> io.BytesIO | None:
    """``Connection._recv_bytes``. If anything is thrown in, what was read of the message stays for the next call."""
    fd = connection._handle
    parts = connection.__dict__.pop("_coopos_begun", None) or [b"", b"", b""]
    try:
        size = int.from_bytes(_read_part(fd, parts, 0, 4), "big", signed=True)
        if size == -1:
            size = int.from_bytes(_read_part(fd, parts, 1, 8), "big")
        if maxsize is not None and size > maxsize:
            return None
        message = io.BytesIO(_read_part(fd, parts, 2, size))
        message.seek(0, io.SEEK_END)
        return message
    except BaseException:
        if any(parts):
            connection._coopos_begun = parts
        raise


def _send_on(connection: Any, parts: list[Any], has_begun: bool, ex: BaseException, done: int) -> None:
    """*done* bytes of the first of *parts* were sent when *ex* came out. In the hub, send the rest plainly. Otherwise raise it, and
    if the message *has_begun* keep the rest: the reader would take what follows for it.
    """
    try:
        while True:
            has_begun = has_begun or done > 0
            parts[0] = memoryview(parts[0])[done:]
            if not parts[0]:
                del parts[0]
            if not isinstance(ex, BlockingSwitchOutError):
                raise ex
            if not parts:
                return
            done = os.write(connection._handle, parts[0])
    except BaseException:
        if has_begun and parts:
            connection._coopos_rest = b"".join(parts)
        parts.clear()
        raise


def _send_parts(connection: Any, parts: list[Any], has_begun: bool = False) -> None:
    while parts:
        told: list[int] = []
        try:
            _core.write_telling(connection._handle, parts[0], told)
        except BaseException as ex:
            _send_on(connection, parts, has_begun, ex, sum(told))
        else:
            del parts[0]
            has_begun = True


def _send_bytes(connection: Any, buf: Any) -> None:
    """``Connection._send_bytes``. If anything is thrown in after a part was sent, the next call sends the rest first."""
    size = len(buf)
    try:
        if "_coopos_rest" in connection.__dict__:
            _send_parts(connection, [connection.__dict__.pop("_coopos_rest")], has_begun=True)
        if size <= MAX_JOINED:
            _send_parts(connection, [_SHORT.pack(size) + buf])
        else:
            _send_parts(connection, [_SHORT.pack(size) if size <= 0x7FFFFFFF else _LONG.pack(-1, size), buf])
    except BaseException:
        if isinstance(buf, memoryview):
            buf.release()  # in a traceback it would outlive its BytesIO, which complains
        raise


def _close(connection: Any, close: Callable[[int], None] = _core.close) -> None:
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


def _in_hub_plainly(make_client: Callable[..., Any]) -> Callable[..., Any]:
    """``SocketClient``, which in the hub connects as without gevent."""

    @functools.wraps(make_client)
    def connect(address: Any) -> Any:
        if _core.can_give_way():
            return make_client(address)
        from multiprocessing import connection

        family = connection.address_type(address)  # type: ignore[attr-defined]
        with get_original("socket", "socket")(getattr(socket, family)) as plain:
            plain.connect(address)
            return connection.Connection(plain.detach())

    return connect


class _DuplicatedSocket(get_original("socket", "socket")):  # type: ignore[misc]
    """A Connection's socket, to send and receive descriptors with: gevent's would leave it in non-blocking mode for everybody."""

    def _wait(self, events: int, call: str) -> None:
        if _core.can_give_way():
            _core.wait_until_ready(self.fileno(), events, call)

    def sendmsg(self, *args: Any) -> int:
        self._wait(_core.WRITE, "sendmsg")
        return super().sendmsg(*args)  # type: ignore[no-any-return]

    def recvmsg(self, *args: Any) -> Any:
        self._wait(_core.READ, "recvmsg")
        return super().recvmsg(*args)

    def recv(self, *args: Any) -> bytes:
        self._wait(_core.READ, "recv")
        return super().recv(*args)  # type: ignore[no-any-return]


def _from_fd(fd: int, family: int, kind: int) -> _DuplicatedSocket:
    return _DuplicatedSocket(family, kind, fileno=os.dup(fd))


# ---- locks -------------------------------------------------------------------------------------------------------------------


def _make_semlock(plain: Any) -> type:
    class SemLock(_core.Semaphore):
        """``_multiprocessing.SemLock``, which owns and waits greenlet by greenlet."""

        __slots__ = ()

        SEM_VALUE_MAX = plain.SEM_VALUE_MAX

        def __new__(cls, *args: Any, **kwargs: Any) -> SemLock:
            return super().__new__(cls, plain(*args, **kwargs))  # type: ignore[no-any-return]

        @classmethod
        def _rebuild(cls, *state: Any) -> SemLock:
            return super().__new__(cls, plain._rebuild(*state))  # type: ignore[no-any-return]

    return SemLock


def _wait_for_condition(condition: Any, timeout: float | None = None) -> bool:
    """``Condition.wait``: the stdlib's, which has its lock again before anything that is thrown in comes out."""
    lock = condition._lock
    assert lock._semlock._is_mine(), "must acquire() condition before using wait()"
    condition._sleeping_count.release()
    count = lock._semlock._count()
    for _ in range(count):
        lock.release()
    thrown = None
    is_notified = False
    try:
        is_notified = condition._wait_semaphore.acquire(True, timeout)
    except BaseException as ex:
        thrown = ex
    condition._woken_count.release()
    try:
        if isinstance(lock._semlock, _core.Semaphore):
            lock._semlock.take_back(count, thrown)
        else:  # made before the patch: it waits as a thread, and nothing is thrown in
            for _ in range(count):
                lock.acquire()
    finally:
        thrown = None
    return is_notified


def _notify_condition(condition: Any, n: int = 1) -> None:
    """``Condition.notify``: the stdlib's, but it can be left. Who has not woken by then sleeps on, and is counted as asleep."""
    sleeping, woken, gate = condition._sleeping_count, condition._woken_count, condition._wait_semaphore
    assert condition._lock._semlock._is_mine(), "lock is not owned"
    assert not gate.acquire(False), "notify: Should not have been able to acquire _wait_semaphore"
    while woken.acquire(False):
        res = sleeping.acquire(False)
        assert res, "notify: Bug in sleeping_count.acquire- res should not be False"
    notified = 0
    while notified < n and sleeping.acquire(False):
        gate.release()
        notified += 1
    if notified:
        try:
            while notified:
                woken.acquire()
                notified -= 1
        finally:
            while gate.acquire(False):
                pass
            for _ in range(notified):
                sleeping.release()


# ---- queues ------------------------------------------------------------------------------------------------------------------


def _put(queue: Any, obj: Any, block: bool = True, timeout: float | None = None) -> None:
    """``Queue.put`` and ``JoinableQueue.put``: the stdlib's, but what is not put takes no place."""
    if queue._closed:
        raise ValueError(f"Queue {queue!r} is closed")
    if not queue._sem.acquire(block, timeout):
        raise Full
    is_joinable = hasattr(queue, "_unfinished_tasks")
    try:
        with queue._notempty, queue._cond if is_joinable else nullcontext():
            if queue._thread is None:
                queue._start_thread()
            queue._buffer.append(obj)
            if is_joinable:
                queue._unfinished_tasks.release()
            queue._notempty.notify()
    except BaseException:
        queue._sem.release()
        raise


# ---- processes ---------------------------------------------------------------------------------------------------------------


def _poll(popen: Any, flag: int = os.WNOHANG) -> int | None:
    """``popen_fork.Popen.poll``, where only the kernel's ECHILD says that there is no such child."""
    if popen.returncode is None:
        try:
            pid, status = os.waitpid(popen.pid, flag)
        except ChildProcessError as ex:
            if ex.errno != ECHILD:
                raise
        else:
            if pid == popen.pid:
                popen.returncode = os.waitstatus_to_exitcode(status)
    return popen.returncode


def _poll_fork_server(popen: Any, flag: int = os.WNOHANG) -> int | None:
    """``popen_forkserver.Popen.poll``. The server tells the exit status once: to the first of several who wait."""
    from multiprocessing.connection import wait
    from multiprocessing.forkserver import SIGNED_STRUCT

    if popen.returncode is None:
        has_ended = wait([popen.sentinel], 0 if flag == os.WNOHANG else None)
        if has_ended and popen.returncode is None:
            try:
                (popen.returncode,) = SIGNED_STRUCT.unpack(os.read(popen.sentinel, SIGNED_STRUCT.size))
            except (OSError, struct.error):  # the server was killed
                popen.returncode = 255
    return popen.returncode


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


def _in_another_greenlet(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that would swallow what is thrown in. Its caller only waits for it; it goes on to its end in any case."""

    @functools.wraps(function)
    def wait(*args: Any, **kwargs: Any) -> Any:
        return spawn(function, *args, **kwargs).get() if _core.can_give_way() else function(*args, **kwargs)

    return wait


class ForkAwareLocal:
    """``util.ForkAwareLocal``, each greenlet's own. A forked child has nothing of it, nor has its hub, which was the parent's."""

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
    """A proxy's connection, which knows whether the answer to a call is still to come."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._of_bytes = connection.send_bytes.__self__  # the serializer "xmlrpclib" wraps it
        self._is_owed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def is_out_of_step(self) -> bool:
        """Whether the next answer would not be the next call's."""
        return self._is_owed or hasattr(self._of_bytes, "_coopos_rest")

    def send(self, call: Any) -> None:
        self._connection.send(call)
        self._is_owed = True

    def recv(self) -> Any:
        answer = self._connection.recv()
        self._is_owed = False
        return answer


def _asking(connect: Callable[[Any], None]) -> Callable[[Any], None]:
    """``BaseProxy._connect``."""

    @functools.wraps(connect)
    def connect_asking(proxy: Any) -> None:
        connect(proxy)
        proxy._tls.connection = _Asking(proxy._tls.connection)

    return connect_asking


def _dropping_the_connection(call_method: Callable[..., Any]) -> Callable[..., Any]:
    """``BaseProxy._callmethod``. The answer to a call that was killed or timed out comes on a connection that nobody uses."""

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


def _in_a_greenlet_nobody_knows(tell_manager: Callable[..., Any]) -> Callable[..., Any]:
    """``BaseProxy._decref``, which runs in a weakref's callback, where Python swallows what is thrown in. So a greenlet that drops
    a proxy doesn't wait. The program's end does.
    """

    parameters = inspect.signature(tell_manager)

    @functools.wraps(tell_manager)
    def decref(*values: Any) -> None:
        from multiprocessing import util

        args = parameters.bind(*values).arguments
        tls, idset = args["tls"], args["idset"]
        idset.discard(args.get("serial", args["token"].id))
        # The connection is of the greenlet that is here; the other one is given none.
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


# ---- what there is to replace ------------------------------------------------------------------------------------------------

_Replacements = list[tuple[Any, str, Any]]


def _in_connection(connection: Any) -> _Replacements:
    return [
        (connection.Connection, "_recv_bytes", _receive_bytes),
        (connection.Connection, "_send_bytes", _send_bytes),
        (connection.Connection, "_close", _close),
        (connection, "Pipe", _in_blocking_mode(connection.Pipe)),
        (connection, "SocketClient", _in_blocking_mode(_in_hub_plainly(connection.SocketClient))),
        (connection.SocketListener, "accept", _in_blocking_mode(connection.SocketListener.accept)),
        (connection, "_WaitSelector", CooperativeSelector),
    ]


def _in_forkserver(forkserver: Any) -> _Replacements:
    moves = {name: getattr(_core, name) for name in ("read", "readinto", "write")}
    return [
        # The server collects its children itself, with waitpid(-1).
        (forkserver, "os", over(os, fork=_forking_by(_fork.fork_gevent), **moves)),
        (forkserver, "socket", over(socket, socket=_ServerSocket)),
        # Its wake-up descriptor is told of a SIGCHLD that has a handler of the interpreter's; gevent's signal() sets none.
        (forkserver, "signal", over(signal, signal=get_original("signal", "signal"))),
    ]


def _in_reduction(reduction: Any) -> _Replacements:
    """A socket is sent by its class: gevent's is not the one that was there if multiprocessing came first, as it does in a child
    that is spawned. Of the registry nothing is to be taken back.
    """
    for kind in (socket.socket, get_original("socket", "socket")):
        reduction.ForkingPickler.register(kind, reduction._reduce_socket)
    return [(reduction, "socket", over(socket, fromfd=_from_fd))]


def _in_resource_tracker(module: Any) -> _Replacements:
    """Nothing is replaced yet. At the program's end the tracker gets a thread's lock: its ``__del__``, which comes after gevent's
    modules were emptied, takes it (https://github.com/python/cpython/blob/v3.13.5/Lib/multiprocessing/resource_tracker.py).
    """
    atexit.register(setattr, module._resource_tracker, "_lock", get_original("_thread", "RLock")())
    return []


def _in_resource_sharer(sharer: Any) -> _Replacements:
    """Its thread blocks all signals. Where that is a greenlet they would be its whole thread's, and every child's."""
    if not is_module_patched("threading"):
        return []
    return [(sharer, "signal", over(signal, pthread_sigmask=lambda _how, _signals: set()))]


def _in_util(util: Any) -> _Replacements:
    """Each greenlet has its own connection to a manager."""
    return [(util, "ForkAwareLocal", ForkAwareLocal)]


#: {what a manager makes: (the class, the proxy's class)}, as the stdlib registers them:
#: https://github.com/python/cpython/blob/v3.13.0/Lib/multiprocessing/managers.py#L1222-L1243
_MADE_BY_NAME = {
    "Queue": ("queue:Queue", "AutoProxy"),
    "JoinableQueue": ("queue:Queue", "AutoProxy"),
    "Event": ("threading:Event", "EventProxy"),
    "Lock": ("threading:Lock", "AcquirerProxy"),
    "RLock": ("threading:RLock", "AcquirerProxy"),
    "Semaphore": ("threading:Semaphore", "AcquirerProxy"),
    "BoundedSemaphore": ("threading:BoundedSemaphore", "AcquirerProxy"),
    "Condition": ("threading:Condition", "ConditionProxy"),
    "Barrier": ("threading:Barrier", "BarrierProxy"),
}


def _in_managers(managers: Any) -> _Replacements:
    """Of the registry nothing is to be taken back: a name means what the classes that were there mean."""
    for typeid, (name, proxy) in _MADE_BY_NAME.items():
        managers.SyncManager.register(typeid, _ByName(name), getattr(managers, proxy), create_method=False)
    return [
        (managers.BaseManager, "_finalize_manager", _in_another_greenlet(managers.BaseManager._finalize_manager)),
        (managers.BaseProxy, "_decref", _in_a_greenlet_nobody_knows(managers.BaseProxy._decref)),
        (managers.BaseProxy, "_connect", _asking(managers.BaseProxy._connect)),
        (managers.BaseProxy, "_callmethod", _dropping_the_connection(managers.BaseProxy._callmethod)),
    ]


class _Wanted(NamedTuple):
    """What is replaced in a module, and what that relies on.

    *names*: each as ``Class.method(parameters)``, or without them what is no function; behind ``: ``, what its code names.
    *makes*: what makes the replacements, each (owner, name, ours).
    """

    names: tuple[str, ...]
    makes: Callable[[Any], _Replacements]


_WANTED = {
    "_multiprocessing": _Wanted(
        (
            *(f"SemLock.{name}" for name in ("SEM_VALUE_MAX", "_rebuild", "handle", "kind", "maxvalue", "name", "acquire")),
            *(f"SemLock.{name}" for name in ("_get_value", "_is_zero", "_after_fork")),
        ),
        lambda module: [(module, "SemLock", _make_semlock(module.SemLock))],
    ),
    "multiprocessing.connection": _Wanted(
        (
            "Connection._recv_bytes(self, maxsize)",
            "Connection._send_bytes(self, buf)",
            "Connection._close(self, _close): _handle",
            "Connection.send_bytes(self, buf, offset, size): _send_bytes",
            "Connection.recv_bytes(self, maxlength): _recv_bytes",
            "Pipe(duplex)",
            "SocketClient(address): address_type, Connection",
            "SocketListener.accept(self)",
            "wait(object_list, timeout): _WaitSelector",
        ),
        _in_connection,
    ),
    "multiprocessing.forkserver": _Wanted(
        (
            "os",
            "socket",
            "signal",
            "ForkServer.ensure_running(self): socket, listen",
            "main: signal, set_wakeup_fd, os, fork, waitpid, read, write_signed",
            "read_signed(fd): SIGNED_STRUCT, os",
            "write_signed(fd, n): SIGNED_STRUCT, os, write",
        ),
        _in_forkserver,
    ),
    "multiprocessing.managers": _Wanted(
        (
            "SyncManager.register(cls, typeid, callable, proxytype, exposed, method_to_typeid, create_method)",
            *sorted({proxy for _, proxy in _MADE_BY_NAME.values()}),
            "BaseManager.start: type, _finalize_manager",
            "BaseManager._finalize_manager",
            "BaseProxy._incref(self): Finalize, _decref, _tls",
            "BaseProxy._decref: token, tls, idset, discard, dispatch, connection",
            "BaseProxy._connect(self): _tls, connection",
            "BaseProxy._callmethod(self, methodname, args, kwds): _tls, connection, _connect, send, recv",
        ),
        _in_managers,
    ),
    "multiprocessing.popen_fork": _Wanted(
        ("os", "Popen._launch(self, process_obj): os, fork", "Popen.poll(self, flag): returncode, os, waitpid, pid"),
        lambda module: [(module, "os", over(os, fork=_forking_by(_fork.fork))), (module.Popen, "poll", _poll)],
    ),
    "multiprocessing.popen_forkserver": _Wanted(
        ("Popen._launch(self, process_obj): open", "Popen.poll(self, flag): returncode, wait, sentinel, read_signed"),
        lambda module: [(module, "open", _open), (module.Popen, "poll", _poll_fork_server)],
    ),
    "multiprocessing.popen_spawn_posix": _Wanted(
        ("Popen._launch(self, process_obj): open",),
        lambda module: [(module, "open", _open)],
    ),
    "multiprocessing.queues": _Wanted(
        (
            "Queue.put(self, obj, block, timeout): _closed, _sem, Full, _notempty, _thread, _start_thread, _buffer",
            "JoinableQueue.put(self, obj, block, timeout): _closed, _sem, Full, _notempty, _cond, _buffer, _unfinished_tasks",
        ),
        lambda module: [(module.Queue, "put", _put), (module.JoinableQueue, "put", _put)],
    ),
    "multiprocessing.reduction": _Wanted(
        (
            "ForkingPickler.register(cls, type, reduce)",
            "_reduce_socket(s): DupFd",
            "_rebuild_socket(df, family, type, proto): socket",
            "send_handle(conn, handle, destination_pid): socket, fromfd",
            "recv_handle(conn): socket, fromfd",
        ),
        _in_reduction,
    ),
    "multiprocessing.resource_sharer": _Wanted(
        ("signal", "_ResourceSharer._serve(self): signal, pthread_sigmask"),
        _in_resource_sharer,
    ),
    "multiprocessing.resource_tracker": _Wanted(("_resource_tracker._lock",), _in_resource_tracker),
    "multiprocessing.synchronize": _Wanted(
        (
            "Condition.__setstate__(self, state): _lock, _sleeping_count, _woken_count, _wait_semaphore",
            "Condition.wait(self, timeout): _lock, _semlock, _sleeping_count, _woken_count, _wait_semaphore",
            "Condition.notify(self, n): _lock, _semlock, _sleeping_count, _woken_count, _wait_semaphore",
        ),
        lambda module: [(module.Condition, "wait", _wait_for_condition), (module.Condition, "notify", _notify_condition)],
    ),
    "multiprocessing.util": _Wanted(
        (
            "Finalize.cancel(self)",
            "is_exiting()",
            "ForkAwareLocal.__init__(self): register_after_fork",
            "ForkAwareLocal.__reduce__(self)",
        ),
        _in_util,
    ),
}

#: {module: (the object, its lock or local)}, made when the module is imported
_RENEWED = {
    "multiprocessing.context": ("", "_tls"),
    "multiprocessing.forkserver": ("_forkserver", "_lock"),
    "multiprocessing.heap": ("BufferWrapper._heap", "_lock"),
    "multiprocessing.managers": ("BaseProxy._mutex", "_lock"),
    "multiprocessing.resource_sharer": ("_resource_sharer", "_lock"),
    "multiprocessing.resource_tracker": ("_resource_tracker", "_lock"),
}

_MISSING = object()


def _find(module: Any, path: str) -> Any:
    for step in path.split(".") if path else ():
        module = getattr(module, step, _MISSING)
    return module


def _names_of(code: Any) -> set[str]:
    """The names of globals and attributes in a function's code, and in the functions inside it."""
    inner = (_names_of(const) for const in code.co_consts if hasattr(const, "co_names"))
    return {*code.co_names, *code.co_varnames, *code.co_freevars}.union(*inner)


def _has(module: Any, wanted: str) -> bool:
    path, _, uses = wanted.partition(": ")
    path, has_parameters, parameters = path.partition("(")
    found = _find(module, path)
    if found is _MISSING:
        return False
    if not (has_parameters or uses):
        return True
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    code = getattr(found, "__code__", None)
    if code is None:
        return False
    names = list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    if has_parameters and ", ".join(names) + ")" != parameters:
        return False
    return not uses or set(uses.split(", ")) <= _names_of(code)


def _require(module: Any, wanted: Iterable[str]) -> None:
    missing = [one for one in wanted if not _has(module, one)]
    if missing:
        raise NotImplementedError(
            f"coopos can't patch {module.__name__} of Python {sys.version.split()[0]}, which doesn't have: {'; '.join(missing)}"
        )


def _renew_lock(module: Any) -> None:
    """Make a lock or local anew that was made before ``gevent.monkey`` came: a greenlet that waits would stop its thread."""
    if module.__name__ not in _RENEWED:
        return
    path, name = _RENEWED[module.__name__]
    _require(module, [f"{path}.{name}".lstrip(".")])
    owner = _find(module, path)
    make = {
        type(get_original("_thread", "allocate_lock")()): threading.Lock,
        get_original("_thread", "RLock"): threading.RLock,
        get_original("_thread", "_local"): threading.local,
    }.get(type(getattr(owner, name)))
    if make is not None:
        setattr(owner, name, make())
        if hasattr(owner, "acquire"):  # it has its lock's methods for its own
            owner.acquire, owner.release = owner._lock.acquire, owner._lock.release


class Finder:
    """On sys.meta_path, for who imports multiprocessing after the patch: most programs never do, and patch() doesn't for them.

    *adopt* is called, once for each module, with the replacements in it: (owner, name, the stdlib's, ours).
    """

    def __init__(self, adopt: Callable[[list[tuple[Any, str, Any, Any]]], None]) -> None:
        self._adopt = adopt
        self._is_adopted: set[str] = set()

    def install(self) -> None:
        """Adopt the modules that are here, and look out for the others.

        NotImplementedError: some of them are not as they have to be. The others are adopted all the same.
        """
        unknown = []
        for name in {**_WANTED, **_RENEWED}:
            if name in sys.modules:
                try:
                    _renew_lock(sys.modules[name])
                    self.adopt(sys.modules[name])
                except NotImplementedError as ex:
                    unknown.append(str(ex))
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        if unknown:
            raise NotImplementedError("\n".join(unknown))

    def remove(self) -> None:
        """Look out no longer."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def adopt(self, module: Any) -> None:
        """Tell what there is to replace in *module*. NotImplementedError: it is not as it has to be, and nothing is."""
        name = module.__name__
        if name in _WANTED and name not in self._is_adopted:
            _require(module, _WANTED[name].names)
            self._is_adopted.add(name)
            self._adopt([(owner, name, getattr(owner, name, None), ours) for owner, name, ours in _WANTED[name].makes(module)])

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
