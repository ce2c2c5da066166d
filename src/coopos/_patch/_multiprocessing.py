"""What :func:`coopos.patch` replaces in :mod:`multiprocessing`, so that it waits as a greenlet does. POSIX only.

The modules stay the stdlib's. What they wait with is replaced: a Connection's reads and writes (`_connections`), the semaphore
under every lock, queues and the start of processes (`_processes`), proxies (`_managers`). A module that calls `os` for it is given
a namespace of that name, with a few functions of ours over the real one. Rules:

1. Other processes see the descriptors that they see without gevent, in blocking mode; no flag is changed to wait for one.
2. A child that is forked here keeps only the greenlet that forked it: the feeders and handlers of the parent's queues and pools are
   greenlets.
3. Locks and locals that the modules made when they were imported are a thread's if `gevent.monkey` came later: they are made anew.
4. An exception of any class that is thrown into a greenlet comes out of its call, OSError and EOFError too. No part of a message
   is lost.
5. The hub can't switch. A wait in the hub, of a signal handler for instance, is made plainly, as without gevent.

This module and those three know the inside of multiprocessing, from Python 3.10 to 3.15; nothing else of coopos does. Every private
name that they replace or use stands in _WANTED, and is looked for before anything of that module is replaced.
"""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from coopos import _core, _fork
from coopos._originals import get_original, is_module_patched
from coopos._patch import _connections, _managers, _processes
from coopos._stdlib import CooperativeSelector, over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

importlib.import_module("_multiprocessing")  # ImportError: a system without the kernel's semaphores

_Replacements = list[tuple[Any, str, Any]]


def _in_connection(connection: Any) -> _Replacements:
    return [
        (connection.Connection, "_recv_bytes", _connections.receive_bytes),
        (connection.Connection, "_send_bytes", _connections.send_bytes),
        (connection.Connection, "_close", _connections.close_connection),
        (connection, "Pipe", _connections.in_blocking_mode(connection.Pipe)),
        (connection, "SocketClient", _connections.in_blocking_mode(_connections.in_hub_plainly(connection.SocketClient))),
        (connection.SocketListener, "accept", _connections.in_blocking_mode(connection.SocketListener.accept)),
        (connection, "_WaitSelector", CooperativeSelector),
    ]


def _in_forkserver(forkserver: Any) -> _Replacements:
    moves = {name: getattr(_core, name) for name in ("read", "readinto", "write")}
    return [
        # The server collects its children itself, with waitpid(-1).
        (forkserver, "os", over(os, fork=_processes.forking_by(_fork.fork_gevent), **moves)),
        (forkserver, "socket", over(socket, socket=_processes.ServerSocket)),
        # Its wake-up descriptor is told of a SIGCHLD that has a handler of the interpreter's; gevent's signal() sets none.
        (forkserver, "signal", over(signal, signal=get_original("signal", "signal"))),
    ]


def _in_queues(queues: Any) -> _Replacements:
    return [
        (queues, "threading", over(threading, Condition=_processes.NotEmpty)),
        (queues.Queue, "put", _processes.put),
        (queues.JoinableQueue, "put", _processes.put),
    ]


def _in_reduction(reduction: Any) -> _Replacements:
    """Sockets are pickled by their class. If multiprocessing was imported first, as in a spawned child, it doesn't know gevent's.

    unpatch() doesn't take back what is registered here.
    """
    for kind in (socket.socket, get_original("socket", "socket")):
        reduction.ForkingPickler.register(kind, reduction._reduce_socket)
    return [(reduction, "socket", over(socket, fromfd=_connections.from_fd))]


def _in_resource_tracker(module: Any) -> _Replacements:
    """Replace nothing now. At the end of the program give the tracker a thread's lock: its ``__del__`` takes that after gevent's
    modules were emptied (https://github.com/python/cpython/blob/v3.13.5/Lib/multiprocessing/resource_tracker.py).
    """
    atexit.register(setattr, module._resource_tracker, "_lock", get_original("_thread", "RLock")())
    return []


def _in_resource_sharer(sharer: Any) -> _Replacements:
    """Its thread blocks all signals. As a greenlet it would block them for its whole thread and for every child."""
    if not is_module_patched("threading"):
        return []
    return [(sharer, "signal", over(signal, pthread_sigmask=lambda _how, _signals: set()))]


def _in_util(util: Any) -> _Replacements:
    """Each greenlet has its own connection to a manager."""
    return [(util, "ForkAwareLocal", _managers.ForkAwareLocal)]


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
    """unpatch() doesn't take back what is registered here: a name stands for the same class as before."""
    for typeid, (name, proxy) in _MADE_BY_NAME.items():
        managers.SyncManager.register(typeid, _managers.ByName(name), getattr(managers, proxy), create_method=False)
    return [
        (managers.BaseManager, "_finalize_manager", _managers.in_another_greenlet(managers.BaseManager._finalize_manager)),
        (managers.BaseProxy, "_decref", _managers.in_its_own_greenlet(managers.BaseProxy._decref)),
        (managers.BaseProxy, "_connect", _managers.asking(managers.BaseProxy._connect)),
        (managers.BaseProxy, "_callmethod", _managers.dropping_the_connection(managers.BaseProxy._callmethod)),
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
        lambda module: [(module, "SemLock", _processes.make_semlock(module.SemLock))],
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
        (
            "os",
            "Popen.__init__(self, process_obj): _launch",
            "Popen._launch(self, process_obj): os, fork",
            "Popen.poll(self, flag): returncode, os, waitpid, pid",
            "Popen.wait(self, timeout): returncode, sentinel, poll",
            "Popen.terminate(self): _send_signal, SIGTERM",
            "Popen.kill(self)",
        ),
        lambda module: [
            (module, "os", over(os, fork=_processes.forking_by(_fork.fork))),
            (module.Popen, "__init__", _processes.noting_workers(module.Popen.__init__)),
            (module.Popen, "poll", _processes.poll),
            (module.Popen, "wait", _processes.killing_late_workers(module.Popen.wait)),
            (module.Popen, "terminate", _processes.terminate),
        ],
    ),
    "multiprocessing.pool": _Wanted(
        (
            "Pool._help_stuff_finish(inqueue, task_handler, size): _rlock, acquire, is_alive, _reader, poll",
            "Pool._handle_results(outqueue, get, cache): _state, TERMINATE, _reader, poll",
            "Pool._terminate_pool: _help_stuff_finish, TERMINATE, terminate, join",
        ),
        lambda module: [
            (module.Pool, "_help_stuff_finish", _processes.dismissing_workers(module.Pool._help_stuff_finish)),
            (module.Pool, "_handle_results", _processes.reading_on(module.Pool._handle_results, module.TERMINATE)),
        ],
    ),
    "multiprocessing.popen_forkserver": _Wanted(
        ("Popen._launch(self, process_obj): open", "Popen.poll(self, flag): returncode, wait, sentinel, read_signed"),
        lambda module: [(module, "open", _processes.open_file), (module.Popen, "poll", _processes.poll_fork_server)],
    ),
    "multiprocessing.popen_spawn_posix": _Wanted(
        ("Popen._launch(self, process_obj): open",),
        lambda module: [(module, "open", _processes.open_file)],
    ),
    "multiprocessing.queues": _Wanted(
        (
            "Queue.put(self, obj, block, timeout): _closed, _sem, Full, _notempty, _thread, _start_thread, _buffer",
            "JoinableQueue.put(self, obj, block, timeout): _closed, _sem, Full, _notempty, _cond, _buffer, _unfinished_tasks",
            "Queue._reset(self, after_fork): threading, Condition, Lock, _notempty, _buffer, _thread",
            "Queue.__init__: _writer, _wlock",
            "_ForkingPickler",
        ),
        _in_queues,
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
        lambda module: [
            (module.Condition, "wait", _processes.wait_for_condition),
            (module.Condition, "notify", _processes.notify_condition),
        ],
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
    """Make anew a lock or local that was made before ``gevent.monkey`` came: a greenlet that waits for it would stop its thread."""
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
        if hasattr(owner, "acquire"):  # the lock's own methods, kept as its own
            owner.acquire, owner.release = owner._lock.acquire, owner._lock.release


class Finder:
    """A finder on sys.meta_path that patches modules of multiprocessing when a program imports them.

    Most programs never do, and so patch() doesn't import them either.

    *adopt* is called, once for each module, with the replacements in it: (owner, name, the stdlib's, ours).
    """

    def __init__(self, adopt: Callable[[list[tuple[Any, str, Any, Any]]], None]) -> None:
        self._adopt = adopt
        self._adopted: set[str] = set()

    def install(self) -> None:
        """Adopt the modules that are imported already, and look out for the others.

        NotImplementedError: some of them are not as we know them. The others are adopted all the same.
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
        """Hand on what there is to replace in *module*. NotImplementedError: it is not as we know it, and nothing is replaced."""
        name = module.__name__
        if name in _WANTED and name not in self._adopted:
            _require(module, _WANTED[name].names)
            self._adopted.add(name)
            self._adopt([(owner, name, getattr(owner, name, None), ours) for owner, name, ours in _WANTED[name].makes(module)])

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """What the other finders say of a module. If it is in _WANTED, its loader has it adopted once it has run."""
        if name not in _WANTED:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_adopt(module: Any) -> None:
                run(module)
                if module.__name__ == name:  # the loader of an archive runs all modules in it
                    self.adopt(module)

            spec.loader.exec_module = run_and_adopt  # type: ignore[method-assign]
        return spec
