"""Runs the stdlib's own code over ours, for subprocess and multiprocessing. POSIX only.

over() makes a namespace in the place of a module that the code calls. CooperativeSelector is a selector whose waits let other
greenlets run: it asks the kernel each time what is ready, and its wait on the hub is only a sleep; in the hub itself it waits in
poll(2). copy_subprocess() makes a second copy of the stdlib's module subprocess, over our reads, writes, files and selector.

The copy's Popen works, but for its child, which is the business of `coopos.subprocess`. What the two need of the stdlib's private
names is checked when the copy is made, so that a version of Python that we don't know is refused at the import.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import inspect
import io
import os
import selectors
import subprocess
import sys
import types
from typing import TYPE_CHECKING, Any

from gevent import Timeout

from coopos import _core
from coopos._files import os_error
from coopos._originals import get_original
from coopos.io import WholeFileIO, fdopen

if TYPE_CHECKING:
    from collections.abc import Callable

_plain_read, _get_ident = get_original("os", "read"), get_original("_thread", "get_ident")

#: Seconds: what libuv's timer can measure, and what a loop's timer can hold.
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 0.001, 1e9
#: Seconds: what poll(2) can be told, in milliseconds.
MAX_POLL_S = 2e6
#: Bytes: what a pipe holds, see pipe(7).
PIPE_SIZE = 65536


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


# ---- the copy of subprocess --------------------------------------------------------------------------------------------------

#: The private names that join our code to the stdlib's, and the parameters that ours reads or passes, by name. Methods that we
#: replace must have these and no others. https://github.com/python/cpython/blob/main/Lib/subprocess.py
_REPLACED = {
    "Popen._communicate": ("self", "input", "endtime", "orig_timeout"),
    "Popen._translate_newlines": ("self", "data", "encoding", "errors"),
    "Popen._wait": ("self", "timeout"),
}
_USED = {
    "_PopenSelector": (),
    "_USE_POSIX_SPAWN": (),
    "Popen._execute_child": ("preexec_fn", "p2cread", "c2pwrite", "errwrite"),
    "Popen._internal_poll": ("_deadstate",),
    "Popen._handle_exitstatus": ("sts",),
    "Popen._save_input": ("input",),
}
#: Attributes of the stdlib's Popen. In a version that has others we don't know where it keeps its input.
_ATTRIBUTES = {"_input", "_input_offset", "_communication_started", "_fileobj2output"}

#: The threads that are in the middle of starting a program. `coopos.subprocess` says which; no greenlet may switch there.
starting: set[int] = set()


def _read(fd: int, n: int) -> bytes:
    """os.read, plain while a program is started, and in the hub, which can't give way.

    What a vforked child says of its start is there at once, or in the next moment: vfork(2) lets the parent go on before it closes
    the child's end. No greenlet may be killed in that moment.
    """
    n = max(n, PIPE_SIZE)  # communicate() asks for half of it, and takes more as well
    return _plain_read(fd, n) if _get_ident() in starting or not _core.can_give_way() else _core.read(fd, n)


def _spawn_unwatched(*args: Any, **kwargs: Any) -> int:
    """posix_spawn(3). The Popen watches the child when it is told the pid."""
    pid: int = get_original("os", "posix_spawn")(*args, **kwargs)
    return pid


class _Selector(CooperativeSelector):
    """A selector of files. It raises EBADF for a closed one: its number may be another file's by now, which the stdlib would read.

    An exception that is thrown in while it waits comes out at the end of the ``with`` block. From Python 3.15 on the stdlib keeps
    in a local variable how much input is written, and notes it for the next communicate() only when its loop has ended.
    https://github.com/python/cpython/blob/v3.15.0/Lib/subprocess.py
    """

    _thrown: BaseException | None = None

    def _check_open(self) -> None:
        for key in self.get_map().values():
            if key.fileobj.closed is True:
                raise os_error(errno.EBADF, "select", key.fd)

    def select(self, timeout: float | None = None) -> Any:
        try:
            self._check_open()
            ready = super().select(timeout)
            self._check_open()
            return ready
        except BaseException as ex:
            self._thrown = ex
            return []

    def get_map(self) -> Any:
        return super().get_map() if self._thrown is None else {}

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        thrown, self._thrown = self._thrown, None
        if thrown is not None:
            try:
                raise thrown
            finally:
                del thrown  # its traceback holds this frame, and so the Popen


def _check_stdlib(module: Any) -> None:
    """NotImplementedError if our code and that of *module* don't fit together."""
    missing = []
    for name, parameters in {**_REPLACED, **_USED}.items():
        found = functools.reduce(lambda owner, part: getattr(owner, part, None), name.split("."), module)
        if found is None:
            missing.append(name)
        elif parameters:
            has = tuple(inspect.signature(found).parameters)
            missing += [f"the parameter {other!r} of {name}" for other in parameters if other not in has]
            if name in _REPLACED:
                missing += [f"{name} without a parameter {other!r}" for other in has if other not in parameters]
    methods = [value for value in vars(module.Popen).values() if inspect.isfunction(value)] if hasattr(module, "Popen") else []
    missing += [f"Popen.{name}" for name in sorted(_ATTRIBUTES - {name for one in methods for name in one.__code__.co_names})]
    if missing:
        raise NotImplementedError(
            f"coopos.subprocess doesn't fit the subprocess of Python {sys.version.split()[0]}: that hasn't {', '.join(missing)}"
        )


#: Whether the pipes of a Popen are in non-blocking mode, as those of gevent's. patch() sets it, and patch(io=True) clears it.
has_nonblocking_pipes = False


class _NonblockingPipe(WholeFileIO):
    __slots__ = ()
    _in_any_mode = True


def _open_pipe(fd: int, mode: str, buffering: int) -> Any:
    """What the copy has for io.open. An unbuffered pipe writes all of the input in one write()."""
    if has_nonblocking_pipes:
        os.set_blocking(fd, False)
        if buffering == 0:
            return _NonblockingPipe(fd, mode)
    return WholeFileIO(fd, mode) if buffering == 0 else fdopen(fd, mode, buffering)


def copy_subprocess() -> Any:
    """A second copy of the stdlib's module :mod:`subprocess`."""
    spec: Any = importlib.util.find_spec("subprocess")
    copy: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    _check_stdlib(copy)
    # Programs catch these and compare them: there must be one of each.
    for name in ("SubprocessError", "CalledProcessError", "TimeoutExpired"):
        setattr(copy, name, getattr(subprocess, name))
    copy.CompletedProcess = get_original("subprocess", "CompletedProcess")
    ours = {"read": _read, "write": _core.write, "close": _core.close, "waitpid": _core.waitpid, "posix_spawn": _spawn_unwatched}
    copy.os = over(os, **ours, fsencode=os.fsencode)  # called for each variable of an environment
    copy.io = over(io, open=_open_pipe)
    copy._PopenSelector = _Selector
    return copy
