"""The stdlib's subprocess for programs of greenlets: its own code, over cooperative reads, writes and waits. POSIX only.

The code is the stdlib's: a second copy of its module is made, in which `os`, `io` and the selector are ours. So each version of
Python has its own Popen, with its vfork and posix_spawn, its arguments, errors and order of things, and what waits in it lets other
greenlets run. Ours is what the copy's Popen does about its child: a record of `_children` waits for it, by a pidfd. The exceptions
and CompletedProcess are the stdlib's own, and a Popen of ours is an instance of its Popen.

What reads this module's `subprocess`, by the name of `_original`, is the stdlib's. Knows `_children`, `_wait`, `_core`, `_parking`,
`_selector` and the files of `io`; of gevent AsyncResult.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import inspect
import io as _io
import os
import signal
import subprocess as _original
import termios
import types
import warnings
import weakref
from array import array
from typing import TYPE_CHECKING, Any, AnyStr

from gevent.event import AsyncResult
from gevent.hub import linkproxy, sleep
from gevent.monkey import get_original

from coopos import _children, _core, _parking
from coopos._selector import CooperativeSelector, in_time
from coopos._wait import waitpid
from coopos.io import FileIO, fdopen

if TYPE_CHECKING:
    from collections.abc import Callable
    from subprocess import (
        DEVNULL as DEVNULL,
        PIPE as PIPE,
        STDOUT as STDOUT,
        CalledProcessError as CalledProcessError,
        CompletedProcess as CompletedProcess,
        SubprocessError as SubprocessError,
        TimeoutExpired as TimeoutExpired,
        call as call,
        check_call as check_call,
        check_output as check_output,
        getoutput as getoutput,
        getstatusoutput as getstatusoutput,
        list2cmdline as list2cmdline,
        run as run,
    )

_plain_read, _get_ident = get_original("os", "read"), get_original("_thread", "get_ident")

#: What programs, and their tests, set in the stdlib's module.
_SWITCHES = ("_USE_POSIX_SPAWN", "_USE_VFORK", "_fork_exec")


def _overlay(module: types.ModuleType, **ours: object) -> types.SimpleNamespace:
    """A module in which some names are others."""
    return types.SimpleNamespace(**{**vars(module), **ours})


#: The threads that are in the middle of starting a program: nothing switches then.
_starting: set[int] = set()


def _read(fd: int, n: int) -> bytes:
    """os.read. What a vforked child says of its start is there at once, but for the moment in which the kernel has let the parent
    go on and not closed the child's end yet: no moment for a greenlet to be killed in.
    """
    return _plain_read(fd, n) if _get_ident() in _starting else _core.read(fd, n)


def _spawn_unwatched(*args: Any, **kwargs: Any) -> int:
    """posix_spawn(3): who learns the pid watches the child."""
    pid: int = get_original("os", "posix_spawn")(*args, **kwargs)
    return pid


def _copy_stdlib() -> Any:
    """A second module :mod:`subprocess`."""
    spec: Any = importlib.util.find_spec("subprocess")
    copy: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    # What others catch and compare is one for all.
    for name in ("SubprocessError", "CalledProcessError", "TimeoutExpired"):
        setattr(copy, name, getattr(_original, name))
    copy.CompletedProcess = get_original("subprocess", "CompletedProcess")
    copy.os = _overlay(
        os, read=_read, write=_core.write, close=_parking.close, waitpid=waitpid, posix_spawn=_spawn_unwatched
    )
    copy.io = _overlay(_io, open=fdopen)
    copy._PopenSelector = CooperativeSelector
    return copy


_stdlib: Any = _copy_stdlib()
#: What the stdlib's module has, public or not, whatever gevent.monkey has made of it.
NAMES = frozenset(vars(_stdlib))
#: The stdlib's Popen, cooperative already but for its child.
PlainPopen: Any = _stdlib.Popen


# ---- terminals ---------------------------------------------------------------------------------------------------------------


class _Terminal(FileIO):
    """The master of a pseudo-terminal, with an end-of-file as a pipe has it: where the kernel says EIO, nobody has the other side
    open any more.
    """

    __slots__ = ()

    def read(self, size: int | None = -1, /) -> bytes:
        try:
            return super().read(size)
        except OSError as ex:
            if ex.errno != errno.EIO:
                raise
            return getattr(ex, "partial", b"")

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any, /) -> int:
        try:
            return super().readinto(buffer)
        except OSError as ex:
            if ex.errno != errno.EIO:
                raise
            return 0


def _open_terminal(winsize: tuple[int, int] | None) -> tuple[int, int]:
    """(master, slave) of a new pseudo-terminal."""
    size = b""
    if winsize is not None:
        rows, columns = winsize
        size = array("H", [rows, columns, 0, 0]).tobytes()
    master, slave = os.openpty()
    try:
        if size:
            fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
    except BaseException:
        _parking.close(master)
        _parking.close(slave)
        raise
    return master, slave


def _use_terminal(slave: int, arguments: dict[str, Any]) -> None:
    """Have a child of Popen(**arguments) use a terminal, for those of its standard streams that *arguments* says nothing of."""
    number = slave
    for fd, name in reversed(list(enumerate(("stdin", "stdout", "stderr")))):
        if arguments.get(name) is None:
            arguments[name] = slave
            number = fd
    prepare = arguments.get("preexec_fn")

    def take_terminal() -> None:
        fcntl.ioctl(number, termios.TIOCSCTTY, 0)
        if prepare is not None:
            prepare()

    arguments |= {"preexec_fn": take_terminal, "start_new_session": True}


# ---- Popen -------------------------------------------------------------------------------------------------------------------


class _Ended:
    """Called in the hub, when the child of a Popen has ended. Doesn't keep the Popen."""

    def __init__(self, popen: Popen[Any]) -> None:
        self._popen = weakref.ref(popen)

    def __call__(self, child: _children.Child) -> None:
        popen = self._popen()
        if popen is None or popen._child is None:
            child.claim_status()  # nobody is there to ask
        else:
            popen._tell_end()


if TYPE_CHECKING:

    class _Base(_original.Popen[AnyStr]):
        text_mode: bool
        encoding: str | None
        errors: str | None
        _input: Any
        _input_offset: int

        def _get_handles(self, *streams: Any) -> tuple[int, ...]: ...
        def _execute_child(self, *args: Any) -> None: ...
        def _handle_exitstatus(self, status: int) -> None: ...
        def _communicate(self, *args: Any) -> Any: ...

else:

    class _Base(PlainPopen, get_original("subprocess", "Popen")):
        """The copy's, and for isinstance() the stdlib's."""


class Popen(_Base[AnyStr]):
    """Start a program in a new process, and deal with it while other greenlets run.

    Used exactly as :class:`subprocess.Popen`, of which it is a kind: its code starts the program and talks to it. ``wait``,
    ``communicate``, the ``with`` block and the files ``stdin``, ``stdout`` and ``stderr`` (see :func:`coopos.fdopen`) let other
    greenlets run where they have to wait. It may be waited for by any number of greenlets, in any threads, and by
    :func:`gevent.wait`. ``returncode`` is set as soon as the hub has seen the end. The status is the child's own, also where
    somebody else has collected it, if the kernel tells (from Linux 6.15 on). :func:`coopos.waitpid` can have it until ``wait`` or
    ``poll`` has.

    The parent stands still for a vfork, however large it is. A fork as expensive as any is made for *preexec_fn* and *pty*, and,
    by the stdlib, for *user*, *group* and *extra_groups*.

    Args:
        args: str, bytes, path-like, or a sequence of them, the program and its arguments; and all others of
            :class:`subprocess.Popen`, by the same names.
        pty: bool, whether the child gets a pseudo-terminal of its own: the controlling terminal of a new session, and those of its
            standard streams that no argument says anything of. Its other side is the attribute ``pty``, an unbuffered file, of text
            where the others would be. Its end comes when no process has the terminal open any more. To close it hangs up, and the
            ``with`` block does. ``communicate`` doesn't touch it.
        winsize: (rows, columns), the size of the terminal's window, each 0..65535. With it *pty* needn't be given.

    Raises:
        OSError: as execve(2), fork(2), pipe(2) and chdir(2); of openpty(3).
        TypeError, ValueError, OverflowError, SubprocessError: as :class:`subprocess.Popen`; *winsize* is no such pair.
        ChildProcessError: ECHILD, from ``wait`` and ``poll``: somebody else has collected the child, and the kernel doesn't tell
            its status.

    Switches greenlets only where said, and, with *preexec_fn* and *pty*, until the child has done what they say: a greenlet that is
    killed or timed out then leaves no child. One that is in ``wait`` leaves the child running, and watched. Works in any thread's
    hub and in a forked child, which has no children of its parent's.

    Source: vfork(2), posix_spawn(3), pidfd_open(2), pidfd_send_signal(2); ``gevent.subprocess.Popen``.

    .. versionadded:: 0.1.0
    """

    #: The other side of the child's terminal, or None.
    pty: Any = None
    #: AsyncResult of the return code.
    result: AsyncResult[int]
    _master: int | None = None  # until there is a file of it
    _child: _children.Child | None = None
    _pid: int | None = None
    _links: list[tuple[Any, Any]]
    # Whether posix_spawn(3) may be used, which hands on os.environ where execv(3) does the environment that C code sees.
    _may_posix_spawn = True

    if not TYPE_CHECKING:

        def __init__(self, *args, pty=False, winsize=None, **kwargs):
            self._links = []
            if not pty and winsize is None:
                super().__init__(*args, **kwargs)
                return
            arguments = _plain_signature.bind(*args, **kwargs).arguments
            self._master, slave = _open_terminal(winsize)
            try:
                _use_terminal(slave, arguments)
                super().__init__(**arguments)
            except BaseException:
                if self.pty is None:
                    _parking.close(self._master)
                else:
                    self.pty.close()
                raise
            finally:
                _parking.close(slave)

        @property
        def pid(self):
            """int, the child's."""
            return self._pid

        @pid.setter
        def pid(self, pid):
            # The stdlib's code says it when there is the child, before anything else can happen.
            self._pid = pid
            if pid is not None:
                self.result = AsyncResult()
                self._child = self._watch(pid)

        def __del__(self, _warn=warnings.warn):
            child = self._child
            if child is None:
                return
            # Nothing is to be kept for the child's sake: it is collected when it ends, and the status was for us.
            seems_to_run = not child.rpid
            child.look()
            child.claim_status()
            if seems_to_run:
                _warn(f"subprocess {self.pid} is still running", ResourceWarning, source=self)

    def _watch(self, pid: int) -> _children.Child | None:
        return _children.watch_new(pid, _Ended(self), None, True)

    def _get_handles(self, *streams: Any) -> tuple[int, ...]:
        handles: tuple[int, ...] = super()._get_handles(*streams)
        for fd in handles[0], handles[3], handles[5]:
            # A file or socket of gevent's is in non-blocking mode, which few programs expect of their standard streams. What is no
            # descriptor the child says.
            with contextlib.suppress(OSError):
                if fd >= 0 and not os.get_blocking(fd):
                    os.set_blocking(fd, True)
        return handles

    def _execute_child(self, *args: Any) -> None:
        if self._master is not None:
            self.pty = _Terminal(self._master, "r+")
            if self.text_mode:
                # Without a buffer in between: what is written is to be seen at once.
                self.pty = _io.TextIOWrapper(self.pty, self.encoding, self.errors, write_through=True)
        for name in _SWITCHES:
            value = getattr(_original, name, None)
            if value is not None:
                setattr(_stdlib, name, value)
        _stdlib._USE_POSIX_SPAWN &= self._may_posix_spawn
        ident = _get_ident()
        if args[2] is None:  # preexec_fn, whose Python code takes its time
            _starting.add(ident)
        try:
            super()._execute_child(*args)
        except BaseException:
            child, self._child = self._child, None
            if child is not None:
                child.send_signal(signal.SIGKILL)  # nobody will ever have it
            raise
        finally:
            _starting.discard(ident)

    # ---- its end

    def _tell_end(self) -> None:
        """If the child has ended, say so to all."""
        child = self._child
        if self.returncode is not None or child is None or not child.rpid:
            return
        try:
            status = child.rstatus
        except ChildProcessError as ex:
            self.result.set_exception(ex)
        else:
            self._handle_exitstatus(status)
            self.result.set(self.returncode)

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:
        child = self._child
        if child is None:
            return self.returncode
        if self.returncode is None:
            child.look()
            self._tell_end()
            if self.returncode is None:
                if child.rpid:
                    child.rstatus  # noqa: B018 (it is lost, and says so)
                return None
        child.claim_status()
        return self.returncode

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            _parking.yield_turn()  # a program may be quicker than we are: who runs one after the other would let nobody else run
        if self._internal_poll() is None and self._child is not None:
            if timeout is None or timeout > 0:
                in_time(timeout, self._child.join)
            if self._internal_poll() is None:
                raise _original.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def wait(self, timeout: float | None = None, _raise_exc: bool = True) -> int:
        """Wait until the child has ended, letting other greenlets run.

        Args:
            timeout: None, or seconds.

        Returns:
            int: ``returncode``, the exit status, or minus the signal that ended it.

        Raises:
            TimeoutExpired: it has not ended in *timeout* seconds.
            ChildProcessError: ECHILD, the status is lost.
        """
        try:
            return super().wait(timeout)
        except _original.TimeoutExpired:
            if _raise_exc:
                raise
            return self.returncode  # gevent's Popen doesn't raise for its own module's functions

    def rawlink(self, callback: Callable[[Popen[AnyStr]], object]) -> None:
        """Have ``callback(popen)`` called in the hub when the child has ended; at once, if it has."""
        link = linkproxy(callback, self)
        self._links.append((callback, link))
        self.result.rawlink(link)

    def unlink(self, callback: Callable[[Popen[AnyStr]], object]) -> None:
        """Undo :meth:`rawlink`."""
        for index, (linked, link) in enumerate(self._links):
            if linked == callback:
                del self._links[index]
                self.result.unlink(link)
                return

    # ---- what is done to it

    def send_signal(self, sig: int) -> None:
        """Send a signal to the child, never to another process that has got its pid. Nothing, if it has ended."""
        if self.poll() is None and self._child is not None:
            self._child.send_signal(sig)

    def _communicate(self, data: Any, *args: Any) -> Any:
        if data is None and self._input and self._input_offset < len(self._input) and self.stdin and not self.stdin.closed:
            data = self._input  # the rest of what a call that timed out was given
        return super()._communicate(data, *args)

    def __exit__(self, exc_type: Any, value: Any, traceback: Any) -> None:
        # Another greenlet may wait for what is to be closed. It is told so, as by close().
        files: list[Any] = [self.stdout, self.stderr, self.pty]
        for file in files:
            if file is not None:
                try:
                    file.close()
                except RuntimeError:
                    # It is in the stdlib's buffer, which it leaves with EBADF.
                    getattr(file, "buffer", file).raw.close()
                    sleep(0)
        super().__exit__(exc_type, value, traceback)


_plain_signature = inspect.signature(PlainPopen)
_own_parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in
                   (("pty", False), ("winsize", None))]
Popen.__signature__ = _plain_signature.replace(  # type: ignore[attr-defined]
    parameters=[*_plain_signature.parameters.values(), *_own_parameters]
)
_stdlib.Popen = Popen

__all__ = [*_original.__all__]
for _name in [*__all__, "list2cmdline"]:
    globals().setdefault(_name, getattr(_stdlib, _name))
del _name
