"""The stdlib's subprocess for programs of greenlets: its own code, over cooperative reads, writes and waits. POSIX only.

The code is the stdlib's: `_stdlib` makes a second copy of its module, in which `os`, `io` and the selector are ours. So each
version of Python has its own Popen, with its vfork and posix_spawn, its arguments, errors and order of things, and its waits let
other greenlets run. Only the wait for the child is our own code: a Child of `_core` waits for it, by a pidfd. The exceptions and
CompletedProcess are the stdlib's own, and a Popen of ours is an instance of the stdlib's Popen.

In this module `_original` is the stdlib's module, which other code of the program uses, and `_copy` is our copy of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import inspect
import io as _io
import os
import signal
import subprocess as _original
import termios
import warnings
import weakref
from array import array
from time import monotonic
from typing import TYPE_CHECKING, Any, AnyStr

from gevent.event import AsyncResult
from greenlet import getcurrent

from coopos import _core
from coopos._files import read_to_hangup
from coopos._originals import get_original
from coopos._stdlib import MAX_POLL_S, MAX_TIMEOUT_S, copy_subprocess, in_time, starting
from coopos.io import FileIO, WholeFileIO

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
    from typing import IO, Literal, TypedDict, overload

    from _typeshed import StrOrBytesPath
    from typing_extensions import Unpack

_plain_waitpid, _plain_sleep = get_original("os", "waitpid"), get_original("time", "sleep")
_get_ident = get_original("_thread", "get_ident")

#: What programs, and their tests, set in the stdlib's module. The first is in every version, the others not in all.
_SWITCHES = ("_USE_POSIX_SPAWN", "_USE_VFORK", "_fork_exec")

_copy: Any = copy_subprocess()
#: What the stdlib's module has, public or not, whatever gevent.monkey has made of it.
NAMES = frozenset(vars(_copy))
#: The stdlib's Popen, cooperative already but for its child.
PlainPopen: Any = _copy.Popen


# ---- terminals ---------------------------------------------------------------------------------------------------------------


class _Terminal(WholeFileIO):
    """The master of a pseudo-terminal, with an end-of-file as a pipe has it."""

    __slots__ = ()

    def read(self, size: int | None = -1, /) -> bytes:
        data: bytes = _core.outright(read_to_hangup, b"", super().read, size)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any, /) -> int:
        nread: int = _core.outright(read_to_hangup, 0, super().readinto, buffer)
        return nread


class _TextTerminal(_io.TextIOWrapper):
    """The same for text. Another wrapper writes, without a buffer, so that the child sees what is written at once.

    One wrapper for both could lose input: writing resets its decoder, which may be in the middle of a character.
    """

    def __init__(self, raw: _Terminal, encoding: str | None, errors: str | None) -> None:
        super().__init__(raw, encoding, errors)
        self._writer = _io.TextIOWrapper(raw, encoding, errors, write_through=True)

    def write(self, text: str, /) -> int:
        return self._writer.write(text)


def _raise_above_streams(fd: int) -> int:
    """*fd*, or a duplicate above 2 in its place: the child's standard streams, which are other files, have the numbers 0 to 2."""
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        _core.close(fd)


def _packed_size(winsize: tuple[int, int]) -> bytes:
    """The struct winsize that TIOCSWINSZ takes."""
    return array("H", [*_core.window_size(winsize), 0, 0]).tobytes()


def _open_terminal(winsize: tuple[int, int] | None) -> tuple[int, int]:
    """(master, slave) of a new pseudo-terminal."""
    size = b"" if winsize is None else _packed_size(winsize)
    master, slave = os.openpty()
    try:
        slave = _raise_above_streams(slave)
        if size:
            fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
    except BaseException:
        _core.close(master)
        _core.close(slave)
        raise
    return master, slave


def _use_terminal(slave: int, arguments: dict[str, Any]) -> None:
    """Have a child of Popen(**arguments) use a terminal for those of its standard streams that *arguments* doesn't name."""
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


# The running children of Popens that were garbage-collected. Other threads and the garbage collector add to it at any time.
_dropped: set[_core.Child] = set()


def _sweep() -> None:
    """Collect the dropped children that have ended."""
    for child in _dropped.copy():
        if child.collect_for_nobody():
            _dropped.discard(child)


class _Ended:
    """Called in the hub, when the child of a Popen has ended. Doesn't keep the Popen."""

    def __init__(self, popen: Popen[Any]) -> None:
        self._popen = weakref.ref(popen)

    def __call__(self, child: _core.Child) -> None:
        popen = self._popen()
        if popen is None or popen._child is None:
            child.claim_status()  # nobody is there to ask
        else:
            popen._tell_end()


def _evict(file: Any) -> None:
    """Make a greenlet of this thread that waits in *file* leave it, with EBADF."""
    buffer = getattr(file, "buffer", file)
    raw = getattr(buffer, "raw", buffer)
    if not raw.closed and _core.awaited(raw.fileno()):
        raw.close()
        _core.yield_turn()


def _is_ours(file: Any) -> bool:
    """Whether *file* is as it was made, and nobody reads it."""
    raw = _raw_of(file)
    return isinstance(raw, FileIO) and not raw.closed and not _core.awaited(raw.fileno())


def _raw_of(file: Any) -> Any:
    buffer = getattr(file, "buffer", file)
    return getattr(buffer, "raw", buffer)


def _collect_read_ahead(file: Any) -> _core.Collected:
    """The bytes that the buffer of the binary *file* has read and nobody has taken. Nothing is read or waited for."""
    collected = _core.Collected()
    raw = _raw_of(file)
    if raw is file or not _is_ours(file):
        return collected
    # The buffer doesn't tell what it holds without reading on. So the file below it says for now that there is nothing.
    raw.__dict__["readinto"] = _read_nothing
    try:
        ahead = file.read1(len(file.peek()))
        if ahead:
            collected.append(ahead)
    finally:
        del raw.readinto
    return collected


def _read_nothing(_buffer: object) -> None:
    return None


def _decode_rest(file: Any, data: bytes) -> str:
    """The rest of the text *file*, by its own decoder, which knows what came before. *data* is what was not read yet."""
    raw = _raw_of(file)
    vars(raw).update(readall=lambda: data, read=lambda *_: data)
    try:
        return file.read()  # type: ignore[no-any-return]
    finally:
        del raw.readall, raw.read


class _Link:
    """A callback that :meth:`Popen.rawlink` was given, as its hub calls it."""

    def __init__(self, popen: Popen[Any], callback: Callable[[Any], object]) -> None:
        self.popen, self.callback = popen, callback

    def __call__(self, child: _core.Child) -> None:
        if self in self.popen._links:
            self.popen._links.remove(self)
            self.popen._tell_end()
            self.callback(self.popen)


if TYPE_CHECKING:
    Command = StrOrBytesPath | Sequence[StrOrBytesPath]

    class Options(TypedDict, total=False):
        """The arguments of Popen, but for those that decide whether its files are of text. Some need a newer Python than others."""

        executable: StrOrBytesPath | None
        stdin: int | IO[Any] | None
        stdout: int | IO[Any] | None
        stderr: int | IO[Any] | None
        preexec_fn: Callable[[], object] | None
        close_fds: bool
        shell: bool
        cwd: StrOrBytesPath | None
        env: Mapping[str, StrOrBytesPath] | Mapping[bytes, StrOrBytesPath] | None
        startupinfo: Any
        creationflags: int
        restore_signals: bool
        start_new_session: bool
        pass_fds: Collection[int]
        user: str | int | None
        group: str | int | None
        extra_groups: Iterable[str | int] | None
        umask: int
        pipesize: int
        process_group: int | None
        pty: bool
        winsize: tuple[int, int] | None
        threadpool: Any

    class _Base(_original.Popen[AnyStr]):
        text_mode: bool
        encoding: str | None
        errors: str | None
        _input: Any
        _communication_started: bool
        _fileobj2output: dict[Any, _core.Collected]
        _input_offset: int

        def _execute_child(self, *args: Any) -> None: ...
        def _handle_exitstatus(self, status: int) -> None: ...
        def _communicate(self, *args: Any) -> Any: ...
        def _save_input(self, input: Any) -> None: ...

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

    The program is started by vfork(2), whose cost doesn't grow with the parent's memory. With *preexec_fn* and *pty*, and with the
    stdlib's *user*, *group* and *extra_groups*, it is started by fork(2), whose cost does.

    Args:
        args: str, bytes, path-like, or a sequence of them, the program and its arguments; and all others of
            :class:`subprocess.Popen`, by the same names.
        pty: bool, whether the child gets a pseudo-terminal of its own: the controlling terminal of a new session, and those of its
            standard streams that no argument says anything of. Its other side is the attribute ``pty``, an unbuffered file, of text
            where the others would be. Its end comes when no process has the terminal open any more. To close it hangs up, and the
            ``with`` block does. ``communicate`` doesn't touch it. :meth:`resize` changes the size of its window.
        winsize: (rows, columns), the size of the terminal's window, each 0..65535. With it *pty* needn't be given.
        threadpool: not asked; there because gevent's Popen has it.

    Raises:
        OSError: as execve(2), fork(2), pipe(2) and chdir(2); of openpty(3).
        TypeError, ValueError, OverflowError, SubprocessError: as :class:`subprocess.Popen`; *winsize* is no such pair.
        ChildProcessError: ECHILD, from ``wait`` and ``poll``: somebody else has collected the child, and the kernel doesn't tell
            its status.

    Keeps :ref:`what every function promises <promises>`. Starting a program switches greenlets only with *preexec_fn* and *pty*,
    until the child has done what they ask for. Killed or timed out then, it leaves no child. Killed in ``wait``, it leaves the
    child running, and watched. In a forked child the parent's Popens have no child to wait for.

    Source: vfork(2), posix_spawn(3), pidfd_open(2), pidfd_send_signal(2); ``gevent.subprocess.Popen``.

    .. versionadded:: 0.1.0
    """

    #: The other side of the child's terminal, or None.
    pty: Any = None
    _master: int | None = None  # until there is a file of it
    _child: _core.Child | None = None
    _pid: int | None = None
    _links: list[_Link]
    _reopened: list[int]
    _pipes: tuple[Any, ...] = ()  # those that it was made with: a program may put others in their place
    _result: AsyncResult[int] | None = None
    # Whether posix_spawn(3) may be used, which hands on os.environ where execv(3) does the environment that C code sees.
    _may_posix_spawn = True

    if TYPE_CHECKING:

        @overload
        def __init__(
            self: Popen[str],
            args: Command,
            bufsize: int = -1,
            *,
            text: Literal[True],
            encoding: str | None = None,
            errors: str | None = None,
            universal_newlines: bool | None = None,
            **kwargs: Unpack[Options],
        ) -> None: ...
        @overload
        def __init__(
            self: Popen[str],
            args: Command,
            bufsize: int = -1,
            *,
            encoding: str,
            errors: str | None = None,
            text: bool | None = None,
            universal_newlines: bool | None = None,
            **kwargs: Unpack[Options],
        ) -> None: ...
        @overload
        def __init__(
            self: Popen[str],
            args: Command,
            bufsize: int = -1,
            *,
            errors: str,
            encoding: str | None = None,
            text: bool | None = None,
            universal_newlines: bool | None = None,
            **kwargs: Unpack[Options],
        ) -> None: ...
        @overload
        def __init__(
            self: Popen[str],
            args: Command,
            bufsize: int = -1,
            *,
            universal_newlines: Literal[True],
            encoding: str | None = None,
            errors: str | None = None,
            text: bool | None = None,
            **kwargs: Unpack[Options],
        ) -> None: ...
        @overload
        def __init__(
            self: Popen[bytes],
            args: Command,
            bufsize: int = -1,
            *,
            encoding: None = None,
            errors: None = None,
            text: Literal[False] | None = None,
            universal_newlines: Literal[False] | None = None,
            **kwargs: Unpack[Options],
        ) -> None: ...
        @overload
        def __init__(
            self: Popen[Any],
            args: Command,
            bufsize: int = -1,
            *,
            encoding: str | None = None,
            errors: str | None = None,
            text: bool | None = None,
            universal_newlines: bool | None = None,
            **kwargs: Unpack[Options],
        ) -> None: ...
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    else:

        def __init__(self, *args, pty=False, winsize=None, threadpool=None, **kwargs):
            self._links, self._reopened = [], []
            _sweep()
            try:
                if pty or winsize is not None:
                    self._start_with_terminal(winsize, _plain_signature.bind(*args, **kwargs).arguments)
                else:
                    super().__init__(*args, **kwargs)
            finally:
                for fd in self._reopened:
                    _core.close(fd)

        def _start_with_terminal(self, winsize, arguments):
            self._master, slave = _open_terminal(winsize)
            try:
                _use_terminal(slave, arguments)
                super().__init__(**arguments)
            except BaseException:
                if self.pty is None:
                    _core.close(self._master)
                else:
                    self.pty.close()
                raise
            finally:
                _core.close(slave)

        @property
        def pid(self):
            """int, the child's."""
            return self._pid

        @pid.setter
        def pid(self, pid):
            # The stdlib's code sets it as soon as the child is there, before anything else can happen.
            self._pid = pid
            if pid is not None and pid > 0:  # in other people's tests the start is a mock, which has made no child
                try:
                    self._child = self._watch(pid)
                except BaseException:
                    # There is neither a pidfd nor a thread to be had. It shall be as if fork(2) had failed.
                    os.kill(pid, signal.SIGKILL)
                    _plain_waitpid(pid, 0)
                    raise

        def __del__(self, _warn=warnings.warn):
            child = self._child
            if child is None:
                return
            # Nobody can ask for the status any more. If the child still runs, the hub collects it when it ends, or the next Popen
            # does, if the hub's thread is gone.
            seems_to_run = not child.rpid
            if not child.collect_for_nobody():
                _dropped.add(child)
            if seems_to_run:
                _warn(f"subprocess {self.pid} is still running", ResourceWarning, source=self)

    def __repr__(self) -> str:
        """As the stdlib's. If the child still runs, what its record says comes after that."""
        text = super().__repr__()
        return text if self.returncode is not None or self._child is None else f"{text[:-1]} child: {self._child!r}>"

    def _watch(self, pid: int) -> _core.Child | None:
        return _core.watch_new(pid, _Ended(self), None, True, needs_hub=False)

    def _execute_child(self, *args: Any) -> None:
        self._pipes = tuple(file for file in (self.stdin, self.stdout, self.stderr) if file is not None)
        given = [self, *args]
        for index in _child_ends:
            given[index] = _core.in_blocking_mode(given[index], self._reopened)
        if self._master is not None:
            self.pty = _Terminal(self._master, "r+")
            if self.text_mode:
                self.pty = _TextTerminal(self.pty, self.encoding, self.errors)
        for name in _SWITCHES:
            value = getattr(_original, name, None)
            if value is not None:
                setattr(_copy, name, value)
        _copy._USE_POSIX_SPAWN &= self._may_posix_spawn
        ident = _get_ident()
        if given[_prepare] is None:  # whose Python code takes its time
            starting.add(ident)
        try:
            PlainPopen._execute_child(*given)
        except BaseException:
            child, self._child = self._child, None
            if child is not None:
                child.send_signal(signal.SIGKILL)  # nobody will ever have it
            raise
        finally:
            starting.discard(ident)

    # ---- its end

    def _tell_end(self) -> None:
        """If the child has ended, set the returncode."""
        child = self._child
        if self.returncode is not None or child is None or not child.rpid:
            return
        try:
            status = child.rstatus
        except ChildProcessError:
            # The status is lost, and poll() says so. But a program that ignores SIGCHLD has asked for that: as in the stdlib, 0.
            if child.is_ours and signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
                self.returncode = 0
        else:
            self._handle_exitstatus(status)

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
            may_park = timeout is None or timeout > 0
            if self._internal_poll() is not None or not may_park:
                # Else a greenlet that runs one quick program after another, or looks again and again, would stop all others.
                _core.yield_turn()
            elif self._child is not None:
                if timeout is None or _core.can_give_way():
                    in_time(timeout, self._child.join)
                elif timeout < MAX_POLL_S:
                    self._look_in_time(timeout)
                else:
                    self._child.join()  # communicate() without a timeout; Timeout would make a hub
        if self._internal_poll() is None and self._child is not None:
            raise _original.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def _look_in_time(self, timeout: float) -> None:
        """Wait where there is no hub to give way to, as the stdlib does before 3.15: look, and sleep, longer and longer."""
        deadline = monotonic() + timeout
        delay = 0.0005
        while self._internal_poll() is None and (remaining := deadline - monotonic()) > 0:
            delay = min(delay * 2, remaining, 0.05)
            _plain_sleep(delay)

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
        if timeout is None and self.returncode is not None:
            return self._internal_poll()  # type: ignore[return-value]
        return _core.outright(self._wait_or_not, timeout, _raise_exc)

    def _wait_or_not(self, timeout: float | None, raises: bool) -> int:
        try:
            return super().wait(timeout)
        except _original.TimeoutExpired:
            if raises:
                raise
            return self.returncode  # gevent's Popen doesn't raise for its own module's functions

    def rawlink(self, callback: Callable[[Popen[AnyStr]], object]) -> None:
        """Have ``callback(popen)`` called in this thread's hub when the child has ended; soon, if it has."""
        if self._child is not None:
            link = _Link(self, callback)
            self._links.append(link)
            self._child.link(link, True)

    def unlink(self, callback: Callable[[Popen[AnyStr]], object]) -> None:
        """Undo :meth:`rawlink`."""
        for link in self._links:
            if link.callback == callback:
                self._links.remove(link)
                if self._child is not None:
                    self._child.unlink(link)
                return

    @property
    def result(self) -> AsyncResult[int]:
        """AsyncResult of the return code, as gevent's has it."""
        if self._result is None:
            self._result = AsyncResult()
            self.rawlink(self._tell_result)
        return self._result

    def _tell_result(self, popen: Popen[AnyStr]) -> None:
        result: Any = self._result
        child: Any = self._child
        try:
            if self.returncode is None:
                child.rstatus  # noqa: B018
            result.set(self.returncode)
        except ChildProcessError as ex:
            result.set_exception(ex)

    # ---- what is done to it

    def resize(self, rows: int, columns: int) -> None:
        """Give the window of the child's terminal another size. The terminal's foreground processes get SIGWINCH if it is another.

        Args:
            rows: int, 0..65535.
            columns: int, 0..65535.

        Raises:
            ValueError: the child was started without a terminal, or ``pty`` is closed.
            TypeError, OverflowError: *rows* or *columns* is no such int.
            OSError: as of ioctl_tty(2).

        Doesn't switch greenlets.

        Source: TIOCSWINSZ of ioctl_tty(2).
        """
        if self.pty is None:
            raise ValueError("the child has no terminal: Popen was called without pty=True and winsize")
        fcntl.ioctl(self.pty.fileno(), termios.TIOCSWINSZ, _packed_size((rows, columns)))

    def send_signal(self, sig: int) -> None:
        """Send a signal to the child, never to another process that has got its pid. Nothing, if it has ended."""
        with contextlib.suppress(ChildProcessError):  # it has ended, and the status is lost
            if self.poll() is None and self._child is not None:
                self._child.send_signal(sig)

    def communicate(self, input: Any = None, timeout: float | None = None) -> Any:
        """Write *input* to the child's ``stdin``, read ``stdout`` and ``stderr`` to their ends, and wait for the child.

        A call that was timed out or killed, by an exception of whatever class, has lost nothing: the next one goes on with it.

        Args:
            input: bytes, or str for text. None in a call that goes on: the rest of what the first one was given is written.
            timeout: None, or seconds.

        Returns:
            (output, errors): bytes or str, or None of what is no pipe.

        Raises:
            TimeoutExpired: it has not ended in *timeout* seconds.
            ValueError: there is *input* in a call that goes on, as of :meth:`subprocess.Popen.communicate`.
            ChildProcessError: ECHILD, the status is lost.
        """
        files = (self.stdin if input else None, self.stdout, self.stderr)
        if timeout is None and self._pipes and any(file in self._pipes and not file.closed for file in files if file is not None):
            # With a timeout the stdlib notes how much was written and read. Its short cut for a single pipe notes nothing.
            timeout = MAX_TIMEOUT_S
        return _core.outright(super().communicate, input, timeout)

    def _communicate(self, input: Any, endtime: Any, orig_timeout: Any) -> Any:
        # The stdlib does this in its first call only. Here it is done so that a call cut short anywhere in it can be continued.
        if not self._communication_started:
            self._texts: dict[Any, str | UnicodeError] = {}
            files = [file for file in (self.stdout, self.stderr) if file]
            self._fileobj2output = {}
            for file in files:
                self._fileobj2output[file] = _core.Collected() if self.text_mode else _collect_read_ahead(file)
            self._save_input(input)
            self._communication_started = True
        if self.stdin and self.stdin.closed is not True:  # a mock neither says so nor denies it
            with contextlib.suppress(BrokenPipeError):
                self.stdin.flush()
            if self._input and self._input_offset < len(self._input):
                input = self._input  # or the rest of what a call that timed out was given
            else:
                with contextlib.suppress(BrokenPipeError):
                    self.stdin.close()
        outputs = self.stdout, self.stderr
        texts = [file for file in outputs if file and self.text_mode and _is_ours(file)]
        for file in texts:
            vars(file)["close"] = functools.partial(self._close_text, file, getcurrent())
        try:
            found = super()._communicate(input, endtime, orig_timeout)
        finally:
            for file in texts:
                vars(file).pop("close", None)
        return tuple(self._text_of(file, data) if self.text_mode else data for file, data in zip(outputs, found, strict=True))

    def _close_text(self, file: Any, reader: object) -> None:
        """The close() of a text file at its end: its decoder is asked before. Others than *reader* close it in the middle."""
        try:
            if getcurrent() is reader:
                self._texts[file] = _decode_rest(file, b"".join(self._fileobj2output[file]))
        except UnicodeError as ex:
            self._texts[file] = ex  # raised once the child has ended
        finally:
            type(file).close(file)

    def _translate_newlines(self, data: Any, encoding: str, errors: str) -> Any:
        """Called by the stdlib's _communicate(). The text is made in ours."""
        return data

    def _text_of(self, file: Any, data: Any) -> Any:
        text = self._texts.get(file, data)
        if isinstance(text, UnicodeError):
            raise text
        if not isinstance(text, bytes):
            return text
        return super()._translate_newlines(text, file.encoding, file.errors)  # type: ignore[misc]

    def __exit__(self, exc_type: Any, value: Any, traceback: Any) -> None:
        _core.outright(self._close_and_wait, exc_type, value, traceback)

    def _close_and_wait(self, *exc_info: Any) -> None:
        # Another greenlet may wait for what is to be closed. It is told so, and the child may go on.
        for file in self.stdin, self.stdout, self.stderr:
            if file is not None:
                _evict(file)
        if self.stdin is not None and not self.stdin.closed:
            # close() raises an error of flush() again, and the stdlib then waits for the child. What is thrown in here comes out.
            with contextlib.suppress(OSError, ValueError):
                self.stdin.flush()
        if self.pty is not None:
            self.pty.close()
        super().__exit__(*exc_info)


_plain_signature = inspect.signature(PlainPopen)
# Where these are among the arguments of _execute_child(). Popen.__init__() passes them all by position.
_execute_parameters = list(inspect.signature(PlainPopen._execute_child).parameters)
_child_ends = [_execute_parameters.index(name) for name in ("p2cread", "c2pwrite", "errwrite")]
_prepare = _execute_parameters.index("preexec_fn")
_own_parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in
                   (("pty", False), ("winsize", None), ("threadpool", None))]
Popen.__signature__ = _plain_signature.replace(  # type: ignore[attr-defined]
    parameters=[*_plain_signature.parameters.values(), *_own_parameters]
)
_copy.Popen = Popen

__all__ = [*_original.__all__]
for _name in [*__all__, "list2cmdline"]:
    globals().setdefault(_name, getattr(_copy, _name))
del _name
