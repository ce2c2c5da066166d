"""Files that let other greenlets run: FileIO, and fdopen, which puts it under the stdlib's buffers. POSIX only.

io.FileIO's own code does whatever doesn't wait, down to the words of its errors. The core's Owned waits, and closes the descriptor;
the base class is told that it must not close it. The methods that move bytes are compiled, without a frame of Python in between.
`_files` opens paths. Nothing here knows gevent.
"""

from __future__ import annotations

import io
import operator
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from coopos import _core, _files
from coopos._core import Moving, Owned, use_slot, warn_unclosed
from coopos._files import note_written

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import FileDescriptorOrPath, ReadableBuffer

#: Bytes that a buffer reads ahead from a pipe, FIFO or socket: half of what a pipe holds. (The stdlib before 3.14 has 4096.) If it
#: read all that a pipe holds, reader and writer would take turns: it finds the pipe full and leaves it empty.
STREAM_BUFFER = 32 * 1024

_FLAGS = {
    "r": os.O_RDONLY,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
}


def _flags_of(mode: str) -> int:
    """The flags of open(2) for a mode; ValueError for what io.FileIO refuses as a mode."""
    if set(mode) - set("rwxab+"):
        raise ValueError(f"invalid mode: {mode}")
    kinds = mode.replace("b", "").replace("+", "")
    if len(kinds) != 1 or mode.count("+") > 1:
        raise ValueError("Must have exactly one of create/read/write/append mode and at most one plus")
    flags = _FLAGS[kinds] | os.O_CLOEXEC
    return flags & ~os.O_WRONLY | os.O_RDWR if "+" in mode else flags


def _is_number(file: object) -> bool:
    return hasattr(type(file), "__index__")


def _open(file: Any, mode: str, closefd: bool, opener: Callable[[Any, int], int] | None) -> int:
    """A new descriptor for the path *file*. What io.FileIO refuses before it calls the opener is refused before that here too."""
    if b"\0" in os.fsencode(file):
        raise ValueError("embedded null byte")
    flags = _flags_of(mode)
    sys.audit("open", file, mode, flags)
    if not closefd:
        raise ValueError("Cannot use closefd=False with file name")
    if opener is None:
        try:
            return _files.open(file, flags, 0o666)
        except OSError as ex:
            if ex.filename is not None:
                ex.filename = file  # as it was given: os has made a str of a path-like object
            raise
    fd = opener(file, flags)
    if not isinstance(fd, int):
        raise TypeError("expected integer from opener")
    if fd.bit_length() > 31:
        raise OverflowError("Python int too large to convert to C int")
    if fd < 0:
        raise ValueError(f"opener returned {fd}")
    os.set_inheritable(fd, False)
    return fd


class FileIO(Moving, io.FileIO):
    """Open a file without a buffer, whose reads and writes let other greenlets run.

    Used exactly as :class:`io.FileIO`, of which it is a kind, on every kind of file. The descriptor's flags don't matter and are
    not touched; in non-blocking mode too a read or write waits, and never returns None. ``write`` makes one move and returns how
    many bytes that took, also in blocking mode; a buffer over the file writes the rest. ``close()`` wakes the greenlets that wait
    for the file, in any thread's hub, with ``OSError(EBADF)``.

    As long as the file is open its descriptor is its own: don't put another file in its place with dup2, nor take it out of
    non-blocking mode. A watcher for it stays with the first hub that waited to read; others' waits take somewhat longer.

    Args:
        file: str, bytes or path-like, a path; or int, an open descriptor.
        mode: ``"r"``, ``"w"``, ``"x"`` or ``"a"``, with ``"+"`` to read and write. ``"b"`` changes nothing.
        closefd: bool, whether ``close()`` closes the descriptor; True with a path. False: it only lets go of it, and who waits to
            write, or second to read, is told when the descriptor is ready.
        opener: None, or what opens the path: called with it and the flags of open(2), returns a descriptor.

    Raises:
        OSError: as open(2); EBADF if *file* is no open descriptor; IsADirectoryError, EISDIR.
        TypeError, ValueError: *file* or *mode* is none; *closefd* is false with a path.

    Its methods raise what those of :class:`io.FileIO` raise.

    Keeps :ref:`what every function promises <promises>`. Opening switches greenlets only for a FIFO or character device. Killed or
    timed out in ``readall``, the exception has what was read as its attribute ``partial``. A write that a worker has begun is
    undone: the file's offset goes back. If the file is open for appending that can't be done, and the exception has an attribute
    ``characters_written``.

    Source: open(2), preadv2(2), RWF_NOWAIT; ``gevent.fileobject``.

    .. versionadded:: 0.1.0
    """

    __slots__ = ("_closes", "_owned")
    #: Whether non-blocking mode counts, as for io.FileIO.
    _as_os = False
    if TYPE_CHECKING:
        _blksize: int  # of the base class
        _finalizing: bool
        _closes: bool
        _owned: Owned

    def __init__(
        self,
        file: FileDescriptorOrPath,
        mode: str = "r",
        closefd: bool = True,
        opener: Callable[[Any, int], int] | None = None,
    ) -> None:
        if not isinstance(mode, str):
            raise TypeError(f"FileIO() argument 'mode' must be str, not {type(mode).__name__}")
        closes = bool(closefd)
        if hasattr(self, "_owned"):
            super().close()
            self._let_go()
        is_path = not _is_number(file)
        number: Any = _open(file, mode, closefd, opener) if is_path else file
        try:
            super().__init__(number, mode, False)
            if is_path:
                self.name = file
            self._closes = closes
            self._owned = Owned(operator.index(number), super().readable(), super().writable(), self._as_os)
        except BaseException as ex:
            super().close()  # or it would go on with a number that may be another file's
            if is_path:
                _core.close(number)
                if isinstance(ex, OSError):
                    ex.filename = file
            raise

    @property
    def closefd(self) -> bool:
        return getattr(self, "_closes", True)

    def close(self) -> None:
        """Let go of the descriptor, and close it, unless *closefd* was false. Whoever waits gets ``OSError(EBADF)``."""
        if self._finalizing and self.closefd and not self.closed:
            warn_unclosed(self)
        try:
            super().close()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if hasattr(self, "_owned"):
            self._owned.close(self._closes)

    def _dealloc_warn(self, source: object) -> None:
        """Called by the buffer *source* over it, which closes it because it is garbage-collected."""
        if self.closefd and not self.closed:
            # The warning is for the code that lost the file: over this frame, and those of the buffer's close().
            warn_unclosed(source, 2 + getattr(source, "frames_of_close", 0))

    def __repr__(self) -> str:
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        if self.closed:
            return f"<{kind} [closed]>"
        what = f"name={self.name!r}" if hasattr(self, "name") else f"fd={self.fileno()}"
        return f"<{kind} {what} mode={self.mode!r} closefd={self.closefd}>"


use_slot(FileIO, FileIO.__dict__["_owned"])


class WholeFileIO(FileIO):
    """A file whose ``write`` writes all of its data, in blocking mode: for callers that don't look how much was written."""

    __slots__ = ()
    #: Whether it does so in non-blocking mode too.
    _in_any_mode = False

    def write(self, data: ReadableBuffer, /) -> int:
        written = 0
        with memoryview(data) as view, view.cast("B") as octets:
            try:
                while written < len(octets) or not written:
                    with octets[written:] as rest:
                        count = super().write(rest)
                    if count is None:  # in non-blocking mode
                        return written or count
                    written += count
                    if not len(octets) or not (self._in_any_mode or os.get_blocking(self.fileno())):
                        break
            except BaseException as ex:
                if hasattr(self, "_owned"):
                    written += self._owned.late
                note_written(ex, written)
                raise
        return written


# ---- under the stdlib's buffers ----------------------------------------------------------------------------------------------


class _Lock:
    """A buffer whose close() and flush() wait for the greenlet that is inside it, as they wait for a thread.

    The lock of io's buffers waits for other threads. Another greenlet of the same thread it takes for a reentrant call.
    https://github.com/python/cpython/blob/main/Modules/_io/bufferedio.c (_enter_buffered_busy)
    """

    __slots__ = ()
    frames_of_close = 2
    if TYPE_CHECKING:
        raw: Any

    def close(self) -> None:
        self._when_free(super().close)  # type: ignore[misc]

    def flush(self) -> None:
        self._when_free(super().flush)  # type: ignore[misc]

    def _when_free(self, method: Callable[..., Any], *args: Any) -> Any:
        """Call *method* until no other greenlet is inside. RuntimeError: the caller itself is inside."""
        while True:
            try:
                return method(*args)
            except RuntimeError as ex:
                error = ex
            if not str(error).startswith("reentrant call") or not self.raw._owned.wait_for_others():
                raise error


class BufferedReader(_Lock, io.BufferedReader):
    __slots__ = ()


class BufferedWriter(_Lock, io.BufferedWriter):
    __slots__ = ()


class BufferedRandom(_Lock, io.BufferedRandom):
    __slots__ = ()


def _check_open_arguments(call: str, mode: str, **texts: object) -> None:
    """Refuse what io.open refuses before it makes anything."""
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{call}() argument {name!r} must be str or None, not {type(text).__name__}")
        if text is not None and "\0" in text:
            raise ValueError("embedded null character")
    if set(mode) - set("rwxabt+") or len(set(mode)) < len(mode):
        raise ValueError(f"invalid mode: {mode!r}")
    if "t" in mode and "b" in mode:
        raise ValueError("can't have text and binary mode at once")
    if sum(kind in mode for kind in "rwxa") > 1:
        raise ValueError("must have exactly one of create/read/write/append mode")
    if "b" in mode:
        for name, text in texts.items():
            if text is not None:
                raise ValueError(f"binary mode doesn't take {'a' if name == 'newline' else 'an'} {name} argument")


def buffer_size(raw: FileIO, is_terminal: bool) -> int:
    """The size of a buffer if the caller gives none."""
    size = raw._blksize
    if raw.readable() and not raw.writable() and not is_terminal and not raw.seekable():
        return max(size, STREAM_BUFFER)
    return max(min(size, 8 << 20), io.DEFAULT_BUFFER_SIZE) if sys.version_info >= (3, 14) else size  # as the stdlib


def fdopen(
    fd: int,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Callable[[Any, int], int] | None = None,
) -> Any:
    """Make a file of a descriptor, which lets other greenlets run where it has to wait.

    Like :func:`os.fdopen`: the same classes of :mod:`io`, over a :class:`coopos.FileIO`, with the same buffers, but for one: what
    reads a pipe, a FIFO or a socket has 32 KiB where nothing else is asked for. As with any of them one greenlet at a time can be
    in a buffered file: another gets RuntimeError, for a reentrant call, and a thread stands still. But ``close()`` and ``flush()``
    wait, as in threads, until the greenlet that reads or writes is done. To have it leave at once, with EBADF, close the file's
    ``buffer.raw`` (``raw``, in binary mode).

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        mode, buffering, encoding, errors, newline: as of the builtin :func:`open`.
        closefd: bool, whether ``close()`` closes the descriptor.
        opener: not asked, since there is nothing to open.

    Returns:
        A TextIOWrapper, or in binary mode a BufferedReader, BufferedWriter or BufferedRandom, or, unbuffered, a FileIO.

    Raises:
        OSError: EBADF if *fd* is not open; IsADirectoryError, EISDIR.
        TypeError, ValueError, OverflowError, LookupError: as :func:`os.fdopen`. Like it, it has closed the descriptor if what it
            refused was a name of an encoding or a newline, text without a buffer, or *fd* for both reading and writing that can't
            seek; and has left it open otherwise.

    Keeps :ref:`what every function promises <promises>`. Doesn't switch greenlets; reading, writing and flushing the file do, where
    they have to wait. A read that is killed or timed out loses what the stdlib's buffer had read for it; without a buffer it loses
    nothing.

    Source: fdopen(3), preadv2(2), RWF_NOWAIT; ``gevent.fileobject.FileObject``.

    .. versionadded:: 0.1.0
    """
    if not isinstance(fd, int):
        raise TypeError(f"invalid fd type ({type(fd)}, expected integer)")
    return open_file(_FDOPEN, fd, mode, buffering, encoding, errors, newline, closefd, opener)


class Kinds(NamedTuple):
    """What open_file() makes a file of, and the function that errors name."""

    call: str
    raw: type[FileIO]
    reader: type[io.BufferedReader]
    writer: type[io.BufferedWriter]
    both: type[io.BufferedRandom]


_FDOPEN = Kinds("fdopen", FileIO, BufferedReader, BufferedWriter, BufferedRandom)


def open_file(
    kinds: Kinds,
    file: Any,
    mode: str,
    buffering: int,
    encoding: str | None,
    errors: str | None,
    newline: str | None,
    closefd: bool,
    opener: Callable[[Any, int], int] | None,
) -> Any:
    """What io.open does, of other kinds. Warnings are for the caller's caller."""
    if not isinstance(mode, str):
        raise TypeError(f"{kinds.call}() argument 'mode' must be str, not {type(mode).__name__}")
    is_binary = "b" in mode
    if not is_binary:
        encoding = io.text_encoding(encoding, 3)
    size = operator.index(buffering)
    if size.bit_length() > 31:
        raise OverflowError("Python int too large to convert to C int")
    _check_open_arguments(kinds.call, mode, encoding=encoding, errors=errors, newline=newline)
    if is_binary and size == 1:
        warnings.warn(
            "line buffering (buffering=1) isn't supported in binary mode, the default buffer size will be used",
            RuntimeWarning,
            stacklevel=3,
        )
    raw = kinds.raw(file, mode.replace("t", ""), closefd, opener)
    made: Any = raw
    try:
        is_default = size < 0 or size == 1
        is_terminal = is_default and raw.isatty()
        is_by_lines = size == 1 or is_terminal
        if is_default:
            size = buffer_size(raw, is_terminal)
        if size == 0:
            if is_binary:
                return raw
            raise ValueError("can't have unbuffered text I/O")
        buffered: Any = kinds.both if "+" in mode else kinds.reader if "r" in mode else kinds.writer
        made = buffered(raw, size)
        if not is_binary:
            made = io.TextIOWrapper(made, encoding, errors, newline, is_by_lines)
            made.mode = mode
    except BaseException:
        made.close()
        raise
    return made
