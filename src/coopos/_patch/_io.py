"""What ``coopos.patch(io=True)`` replaces besides: the rest of :mod:`os`, open(), the standard streams and input(). POSIX only.

A program that knows nothing of greenlets sees no difference but that others run meanwhile. So what stands here keeps the rules of
what it replaces, where coopos' own functions have rules of their own:

* In the hub, and wherever no other greenlet could run, it makes the plain call. A signal handler may write to a pipe.
* A descriptor in non-blocking mode raises BlockingIOError, or its file returns None.
* A buffer is one greenlet's after the other's, as it is one thread's after the other's: print() may be called by all.

Nothing is replaced here. Places are made as in `_os`. The module `posix` stays plain: the import system uses it, and coopos.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import io
import os
import posix
import select
import sys
import termios
from typing import TYPE_CHECKING, Any

from gevent.lock import Semaphore

from coopos import _core, io as coopos_io
from coopos._core import READ, can_give_way, is_waiting_file

if TYPE_CHECKING:
    from collections.abc import Callable

#: The functions of os that coopos has in a form of its own and that are left alone all the same: why.
LEFT_ALONE = {"fdopen": "it calls io.open", "register_at_fork": "every child has a hub that works before its hooks run"}
#: A function's first parameters, if they are descriptors whose non-blocking mode counts.
_DESCRIPTORS = {
    "eventfd_read": ("fd",),
    "eventfd_write": ("fd",),
    "sendfile": ("out_fd",),
    "splice": ("src", "dst"),
}


# ---- os ----------------------------------------------------------------------------------------------------------------------


def _may_wait(fd: Any) -> bool:
    try:
        return os.get_blocking(fd if isinstance(fd, int) else fd.fileno())
    except Exception:
        return False  # the plain function says what is wrong


def _like_os(name: str, ours: Callable[..., Any]) -> Any:
    """What stands for the function *name* of os."""
    plain = getattr(posix, name)
    if hasattr(_core, f"os_{name}"):
        return _core.like_os(getattr(_core, f"os_{name}"), plain)
    descriptors = _DESCRIPTORS.get(name, ())

    def function(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(descriptors, args, strict=False)), **kwargs}
        is_plain = not can_give_way() or not all(_may_wait(given[fd]) for fd in descriptors if fd in given)
        return (plain if is_plain else ours)(*args, **kwargs)

    function.__name__, function.__doc__ = name, plain.__doc__
    signature = (plain.__text_signature__ or "(*args, **kwargs)").replace("$module, /, ", "").replace("$module, ", "")
    return _core.as_builtin(function, signature, "os")


# ---- files -------------------------------------------------------------------------------------------------------------------


class FileIO(coopos_io.WholeFileIO):
    """A file that the program has made by open(), or a standard stream."""

    __slots__ = ()
    _as_os = True


def _one_by_one(kind: Any, name: str) -> Any:
    plain = getattr(kind, name)

    def method(self: Any, *args: Any) -> Any:
        owned = getattr(self.raw, "_owned", None)
        return plain(self, *args) if owned is None else owned.in_turn(plain, self, *args)

    method.__name__ = name
    return method


_ONE_BY_ONE = ("read", "read1", "readinto", "readinto1", "readline", "peek", "write", "seek", "truncate", "close", "flush")


def _shared(kind: Any) -> Any:
    """Decorate a class of buffers that many greenlets use: each waits until the one that is inside has left."""
    for name in _ONE_BY_ONE:
        if hasattr(kind, name):
            setattr(kind, name, _one_by_one(kind, name))
    kind.frames_of_close = 1
    return kind


@_shared
class BufferedReader(io.BufferedReader):
    __slots__ = ()


@_shared
class BufferedRandom(io.BufferedRandom):
    __slots__ = ()


@_shared
class BufferedWriter(io.BufferedWriter):
    __slots__ = ()


_KINDS = coopos_io.Kinds("open", FileIO, BufferedReader, BufferedWriter, BufferedRandom)
_plain_open = io.open


class _Found(BaseException):
    """Carries a descriptor out of io.open: an opener has opened a file that may wait."""


def _open(
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Callable[[Any, int], int] | None = None,
) -> Any:
    """open() of a file that may wait. Its arguments may still be wrong, and the *opener* may open another one."""
    if opener is not None and not isinstance(file, int):
        theirs = opener

        def ask(path: Any, flags: int) -> int:
            fd = theirs(path, flags)
            if isinstance(fd, int) and is_waiting_file(fd):
                raise _Found(fd)
            return fd

        try:
            return _plain_open(file, mode, buffering, encoding, errors, newline, closefd, ask)
        except _Found as ex:
            [number] = ex.args
        opener = lambda path, flags: number  # noqa: E731
    else:

        def opener(path: Any, flags: int) -> int:
            try:
                return os_open(path, flags, 0o666)
            except OSError as ex:
                ex.filename = path
                raise

    if not isinstance(file, int):
        file = os.fspath(file)
    return coopos_io.open_file(_KINDS, file, mode, buffering, encoding, errors, newline, closefd, opener)


_open.__qualname__ = "open"  # for the errors of its arguments

# Made when the places are: it is coopos.open, or the plain one where no other greenlet could run.
os_open: Callable[..., int] = posix.open


# ---- the standard streams ----------------------------------------------------------------------------------------------------


class _Input(FileIO):
    """Standard input, with the bytes that the stream before it had read already."""

    __slots__ = ("ahead", "was_read")
    ahead: bytes
    was_read: bool

    def _take(self, n: int) -> bytes:
        data, self.ahead = self.ahead[:n], self.ahead[n:]
        return data

    def readinto(self, buffer: Any, /) -> Any:
        self.was_read = True
        if not self.ahead:
            return super().readinto(buffer)
        with memoryview(buffer).cast("B") as octets:
            data = self._take(len(octets))
            octets[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1, /) -> Any:
        if size is None or size < 0:
            return self.readall()
        self.was_read = True
        return self._take(size) if self.ahead else super().read(size)

    def readall(self) -> Any:
        self.was_read = True
        ahead = self._take(len(self.ahead))
        rest = super().readall()
        return ahead + rest if ahead and rest else ahead or rest


def _take_read_ahead(stream: Any, raw: Any) -> bytes:
    """What the buffers of *stream* have read and nobody has taken. They don't tell without reading on: so for now, /dev/null."""
    fd, name = raw.fileno(), raw.name
    null = posix.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        raw.__init__(null, "r", closefd=False)
        try:
            text = stream.read()
            return text.encode(stream.encoding, stream.errors)  # type: ignore[no-any-return]
        except UnicodeDecodeError as ex:
            return ex.object
        finally:
            raw.__init__(fd, "r", closefd=False)
            raw.name = name
    finally:
        posix.close(null)


STREAMS = ("stdin", "stdout", "stderr")
# (the stream before, ours), all that were ever made. print() of CPython before 3.14 doesn't hold the stream that it waits in: if
# unpatch() freed it the process would crash. https://github.com/python/cpython/blob/3.13/Python/bltinmodule.c (builtin_print_impl)
_made: list[tuple[Any, Any]] = []


def _is_open(stream: Any) -> bool:
    """Whether *stream* has a buffer, which detach() takes from it, and nobody has closed it."""
    return stream.buffer is not None and not stream.closed


def _flush(stream: Any) -> None:
    """At the end, while the hub still works: a greenlet may be in print(). Of ``sys.stdout`` the interpreter reports the errors."""
    try:
        if _is_open(stream):
            stream.flush()
    except Exception:
        if stream not in (sys.stdout, sys.stderr):
            raise


def _settings_of(stream: Any) -> tuple[Any, ...]:
    return stream.encoding, stream.errors, stream.line_buffering, stream.write_through


def _wrap_stream(stream: Any, fd: int) -> Any:
    """A stream as *stream*, which the interpreter has made over *fd*. None if it is another one, or never makes anybody wait."""
    buffer: Any = getattr(stream, "buffer", None)
    raw: Any = getattr(buffer, "raw", buffer)
    if type(stream) is not io.TextIOWrapper or type(raw) is not io.FileIO or stream.closed or raw.closefd:
        return None
    if stream.fileno() != fd or not is_waiting_file(fd):
        return None
    if raw.readable():
        ahead = _take_read_ahead(stream, raw)
    else:
        stream.flush()
        for theirs, ours in _made:
            if theirs is stream and _is_open(ours) and _settings_of(ours) == _settings_of(stream):
                return ours
    file: Any = (_Input if raw.readable() else FileIO)(fd, raw.mode.replace("b", ""), False)
    file.name = raw.name
    if raw.readable():
        file.ahead, file.was_read = ahead, False
    if buffer is not raw:
        kind = BufferedReader if raw.readable() else BufferedWriter
        file = kind(file, coopos_io.buffer_size(file, file.isatty()))
    # The interpreter translates no ends of lines on POSIX: create_stdio() in
    # https://github.com/python/cpython/blob/main/Python/pylifecycle.c
    made = io.TextIOWrapper(file, stream.encoding, stream.errors, "\n", stream.line_buffering, write_through=stream.write_through)
    made.mode = stream.mode  # type: ignore[misc]
    _made.append((stream, made))
    if not raw.readable():
        atexit.register(_flush, made)
    return made


def streams() -> list[tuple[Any, str, Any, Any]]:
    """Places for the standard streams, as they are now."""
    pairs = [(name, getattr(sys, name, None), fd) for fd, name in enumerate(STREAMS)]
    made = [(name, stream, _wrap_stream(stream, fd)) for name, stream, fd in pairs]
    return [(sys, name, stream, ours) for name, stream, ours in made if ours is not None]


def flush_streams() -> None:
    """Write what ours hold, before others take their places."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(getattr(stream, "buffer", None), (BufferedWriter, FileIO)) and _is_open(stream):
            stream.flush()


def is_ours(stream: Any) -> bool:
    """Whether *stream* was made here."""
    return any(stream is ours for _, ours in _made)


def _is_in_use(stream: Any) -> bool:
    """Whether *stream*, which was made here, is a standard input that may hold bytes nobody has taken."""
    raw = getattr(stream.buffer, "raw", stream.buffer)
    return isinstance(raw, _Input) and (raw.was_read or bool(raw.ahead))


def made_streams() -> list[tuple[Any, str, Any, Any]]:
    """Places for all streams that were ever made here and can be taken back, wherever the program has put them since."""
    return [(sys, name, theirs, ours) for theirs, ours in _made if not _is_in_use(ours) for name in STREAMS]


# ---- input() -----------------------------------------------------------------------------------------------------------------

_plain_input = builtins.input
_turn = Semaphore()
# Whether a greenlet that the parent has left behind was in input(). PyOS_Readline() takes that for a call that is under way.
_is_left_inside = False


def _begin_anew() -> None:
    """In a child without the parent's greenlets, one of which may have been in input()."""
    global _turn, _is_left_inside
    _is_left_inside |= _turn.locked()
    _turn = Semaphore()


def _read_plainly(prompt: object) -> str:
    """input() without the editing of lines."""
    sys.stdout.write(str(prompt))
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError("EOF when reading a line")
    return line.removesuffix("\n")


_core.call_when_left(_begin_anew)


def _input(prompt: object = "", /) -> str:
    """The builtin input(), whose wait for the terminal is a wait on the hub.

    If something is thrown into the greenlet meanwhile, the code in C below it must return before it can come out. It returns when
    it reads the end of a file: so for that moment descriptor 0 is /dev/null. Both descriptors for that are had before the wait.
    """
    if _is_left_inside:
        return _read_plainly(prompt)
    if not can_give_way():
        return _plain_input(prompt)
    thrown: list[BaseException] = []
    spare: list[int] = []  # another descriptor of the terminal, and one of /dev/null

    def wait() -> None:
        if thrown or not spare:
            return
        try:
            _core.wait_until_ready(0, READ, "input")
        except BaseException as ex:
            thrown.append(ex)
            posix.dup2(spare[1], 0)

    with _turn:
        modes = None
        with contextlib.suppress(termios.error):
            modes = termios.tcgetattr(0)
        try:
            if modes is not None:
                spare.append(posix.dup(0))
                spare.append(posix.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            line = _core.read_line(_plain_input, prompt, wait)
        except EOFError:
            if not thrown:
                raise
        finally:
            if thrown and modes is not None:
                posix.dup2(spare[0], 0)
                termios.tcsetattr(0, termios.TCSADRAIN, modes)
            for fd in spare:
                posix.close(fd)
        if thrown:
            raise thrown[0]
        return line


# ---- places ------------------------------------------------------------------------------------------------------------------


def places(ours: dict[str, Any]) -> list[tuple[Any, str, Any, Any]]:
    """(owner, name, what the name holds now, ours) of everything but the streams. *ours*: {name: function} of the façade."""
    global os_open
    functions = {name: _like_os(name, function) for name, function in ours.items() if name not in LEFT_ALONE}
    os_open = functions["open"]
    epolls = []
    if hasattr(select, "EPOLLIN"):
        from coopos._patch import _epoll

        epolls = _epoll.places()
    opens = _core.make_open(_plain_open, _open)
    return [
        *((os, name, getattr(os, name), function) for name, function in functions.items()),
        (io, "open", _plain_open, opens),
        (builtins, "open", _plain_open, opens),
        (builtins, "input", _plain_input, _core.as_builtin(_input, "(prompt='', /)", "builtins")),
        *epolls,
    ]
