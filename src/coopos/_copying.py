"""sendfile, splice and copy_file_range: bytes that go from one descriptor to another inside the kernel. POSIX only.

The kernel has no form of these calls that is sure not to wait. So a call is made in the greenlet's own thread only where nothing
can hold it up: between pipes under SPLICE_F_NONBLOCK, on descriptors in non-blocking mode, of a file whose pages have been read.
Otherwise the hub waits until the descriptors are ready, and a worker makes the call. Two forms of sendfile are made of pread and
write: to a descriptor in blocking mode, where sendfile(2) would wait until all was sent, and that of macOS and the BSDs, which has
headers.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import fcntl
import itertools
import os
import posix
import stat
import sys
from typing import TYPE_CHECKING, Any

from coopos import _core
from coopos._core import READ, WRITE, InFlight, wait_until_ready, yield_turn
from coopos._files import note_written, os_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from typing_extensions import Buffer

#: Bytes. What sendfile moves at a time: no more than the kernel reads ahead, and than a socket takes.
CHUNK = 128 * 1024


def _is_file(fd: int) -> bool:
    """Whether a read or write waits for a disk, so that readiness means nothing."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _is_pipe(fd: int) -> bool:
    return stat.S_ISFIFO(os.fstat(fd).st_mode)


def _may_wait(fd: int, offset: int | None = None) -> bool:
    """Whether splice(2) and sendfile(2) wait for such a descriptor until it is ready. Of others they fail at once, or never wait:
    a socket that listens, an epoll, a pidfd, a device, one without a position if there is an offset.
    """
    mode = os.fstat(fd).st_mode
    if offset is not None:
        return False
    if stat.S_ISSOCK(mode):
        sock = _socket.socket(fileno=fd)
        try:
            return not sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN)
        finally:
            sock.detach()
    return stat.S_ISFIFO(mode) or os.isatty(fd)


def _is_plausible(out_fd: Any, in_fd: Any, count: Any, *offsets: Any) -> bool:
    """Whether the arguments are of the right kind. If not, the caller asks os, which says what is wrong before anything waits."""
    numbers = [count, *(offset for offset in offsets if offset is not None)]
    return (
        all(isinstance(number, int) and 0 <= number < 1 << 62 for number in numbers)
        and all(isinstance(fd, int) and 0 <= fd < 1 << 31 for fd in (out_fd, in_fd))
        and _is_open(out_fd, os.O_WRONLY)
        and _is_open(in_fd, os.O_RDONLY)
    )


def _is_open(fd: int, way: int) -> bool:
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except (OSError, TypeError):
        return False
    return flags & os.O_ACCMODE in (way, os.O_RDWR) and not flags & getattr(os, "O_PATH", 0)


def _appends(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND)


def _chunks(call: InFlight, in_fd: int, start: int, count: int) -> Iterator[bytes]:
    while count > 0:
        call.check()
        data = _core.pread_of_sendfile(in_fd, min(count, CHUNK), start)
        if not data:
            break
        call.check()
        yield data
        start += len(data)
        count -= len(data)


def _send_by_hand(call: InFlight, out_fd: int, in_fd: int, pieces: Iterable[Any], start: int | None) -> int:
    """Write *pieces* one after the other, up to the first that doesn't go out whole. Then move *in_fd* on from *start*."""
    sent = 0
    told: list[int] = []
    try:
        for data in pieces:
            written = _core.write_telling(out_fd, data, told, False, "sendfile")
            sent += written
            if written < len(data):
                break
    except BaseException as ex:
        sent += sum(told)
        note_written(ex, sent)
        raise
    finally:
        if start is not None and sent and not call.is_closed(in_fd):
            os.lseek(in_fd, start + sent, os.SEEK_SET)
    return sent


def sendfile_with_headers(
    out_fd: int,
    in_fd: int,
    offset: int,
    count: int,
    headers: Sequence[Buffer] = (),
    trailers: Sequence[Buffer] = (),
    flags: int = 0,
) -> int:
    """Send a part of a file to a socket, letting other greenlets run while that takes no more.

    Like :func:`os.sendfile`, made of pread and write. What isn't in the page cache is read by a thread.

    Args:
        out_fd: int, a stream socket.
        in_fd: int, open for reading: a regular file.
        offset: int, bytes from the start of *in_fd*.
        count: int, bytes, 0 or more; 0 for all.
        headers, trailers: sequences of bytes-like objects, sent before and after.
        flags: int, ``os.SF_*``. They tell a thread of the kernel what to do, and are not needed here.

    Returns:
        int: how many bytes were sent, those of the headers and trailers included.

    Raises:
        OSError: as sendfile(2).
        TypeError, OverflowError: an argument is of another type, or too large.

    Keeps :ref:`what every function promises <promises>`.

    Source: sendfile(2).

    .. versionadded:: 0.1.0
    """
    if not (
        _is_plausible(out_fd, in_fd, count, offset)
        and stat.S_ISREG(os.fstat(in_fd).st_mode)
        and stat.S_ISSOCK(os.fstat(out_fd).st_mode)
    ):
        # Which says what is wrong.
        return posix.sendfile(out_fd, in_fd, offset, count, headers, trailers, flags)  # type: ignore[call-arg]
    before, after = ([memoryview(data).cast("B") for data in parts] for parts in (headers, trailers))
    with InFlight("sendfile", in_fd, out_fd) as call:
        pieces = itertools.chain(before, _chunks(call, in_fd, offset, count or sys.maxsize), after)
        return _send_by_hand(call, out_fd, in_fd, pieces, None)


_sendfile = getattr(posix, "sendfile", None)
# Linux's takes a file and nothing else; elsewhere it can put headers before it.
_TAKES_HEADERS = "headers" in (getattr(_sendfile, "__text_signature__", None) or "")

if _sendfile and not _TAKES_HEADERS:

    def sendfile(out_fd: int, in_fd: int, offset: int | None, count: int) -> int:
        """Send a part of a file to another descriptor, letting other greenlets run while that takes no more.

        Like :func:`os.sendfile`. To a descriptor in blocking mode all *count* bytes are sent, if the file has them; also of a file
        in /proc and others that sendfile(2) refuses. What isn't in the page cache is read by a thread.

        Args:
            out_fd: int, open for writing: a socket, a pipe, a file.
            in_fd: int, open for reading: a regular file.
            offset: int, bytes from the start of *in_fd*, whose own offset then stays where it is; or None, to begin at that one.
            count: int, bytes, 0 or more.

        Returns:
            int: how many bytes were sent; 0 at the end of *in_fd*.

        Raises:
            OSError: EBADF if a descriptor is not open for this; EINVAL if *in_fd* can't be read in this way; otherwise as
                sendfile(2).
            TypeError, OverflowError: an argument is of another type, or too large.

        Keeps :ref:`what every function promises <promises>`.

        Source: sendfile(2).

        .. versionadded:: 0.1.0
        """
        if not _is_plausible(out_fd, in_fd, count, offset) or not count or _appends(out_fd):
            return posix.sendfile(out_fd, in_fd, offset, count)
        if not _is_file(in_fd) and (offset is not None or not _is_pipe(out_fd)):
            return posix.sendfile(out_fd, in_fd, offset, count)  # which says what is wrong
        with InFlight("sendfile", in_fd, out_fd) as call:
            if not _is_file(in_fd):
                return _send_through_pipe(call, out_fd, in_fd, count)
            while True:
                call.check()
                start = os.lseek(in_fd, 0, os.SEEK_CUR) if offset is None else offset
                if os.get_blocking(out_fd) or _is_file(out_fd):
                    moved = start if offset is None else None
                    return _send_by_hand(call, out_fd, in_fd, _chunks(call, in_fd, start, count), moved)
                chunk = min(count, CHUNK)
                # Read both ends of the chunk: then the kernel has read ahead what lies in between.
                _core.pread_of_sendfile(in_fd, 1, start)
                call.check()
                _core.pread_of_sendfile(in_fd, 1, start + chunk - 1)
                call.check()
                if os.get_blocking(out_fd):
                    continue
                try:
                    return posix.sendfile(out_fd, in_fd, offset, chunk)
                except BlockingIOError:
                    wait_until_ready(out_fd, WRITE, "sendfile")

    def _send_through_pipe(call: InFlight, out_fd: int, in_fd: int, count: int) -> int:
        while True:
            if _may_wait(in_fd):
                wait_until_ready(in_fd, READ, "sendfile")
                call.check()
            wait_until_ready(out_fd, WRITE, "sendfile")
            call.check()
            if os.get_blocking(in_fd) or os.get_blocking(out_fd):
                return _core.transfer("sendfile", in_fd, None, out_fd, None, count, waits_for_peer=True)
            with contextlib.suppress(BlockingIOError):
                return posix.sendfile(out_fd, in_fd, None, count)
            yield_turn()
            call.check()

elif _sendfile:
    sendfile = sendfile_with_headers  # type: ignore[assignment]


if hasattr(posix, "splice"):

    def splice(src: int, dst: int, count: int, offset_src: int | None = None, offset_dst: int | None = None, flags: int = 0) -> int:
        """Move bytes from a pipe or to a pipe, letting other greenlets run while there are none, or no room.

        Like :func:`os.splice`.

        Args:
            src: int, open for reading; it or *dst* is a pipe.
            dst: int, open for writing.
            count: int, bytes, 0 or more.
            offset_src, offset_dst: int, bytes from the start of a file, whose own offset then stays where it is; or None.
            flags: int, ``os.SPLICE_F_*``. With ``SPLICE_F_NONBLOCK`` it doesn't wait and raises BlockingIOError.

        Returns:
            int: how many bytes were moved; 0 at the end of *src*.

        Raises:
            OSError: EBADF if a descriptor is not open for this; EINVAL if neither is a pipe; ESPIPE for the offset of one that has
                none; otherwise as splice(2).
            TypeError, ValueError, OverflowError: an argument is of another type, negative, or too large.

        Keeps :ref:`what every function promises <promises>`. Killed or timed out while a worker moves bytes, the worker goes on.

        Source: splice(2).

        .. versionadded:: 0.1.0
        """
        if not (_is_plausible(dst, src, count, offset_src, offset_dst) and isinstance(flags, int) and count):
            return posix.splice(src, dst, count, offset_src, offset_dst, flags)  # which says what is wrong
        args = (offset_src, offset_dst, flags | os.SPLICE_F_NONBLOCK)
        ends = [(fd, _is_pipe(fd), _is_file(fd)) for fd in (src, dst)]
        if not any(is_pipe for _, is_pipe, _ in ends) or (flags & os.SPLICE_F_NONBLOCK and not _core.can_give_way()):
            return posix.splice(src, dst, count, *args)
        waits_for_peer = not any(is_file for _, _, is_file in ends)
        sides = ((src, offset_src, READ), (dst, offset_dst, WRITE))
        waiting = [(fd, events) for fd, offset, events in sides if _may_wait(fd, offset)]
        with InFlight("splice", src, dst) as call:
            _core.be_fair(src, "splice")
            call.check()
            while True:
                is_sure = all(is_pipe or (not is_file and not os.get_blocking(fd)) for fd, is_pipe, is_file in ends)
                if flags & os.SPLICE_F_NONBLOCK and is_sure:
                    return posix.splice(src, dst, count, *args)
                if not is_sure:
                    for fd, events in waiting:
                        if not _is_pipe(fd):
                            # The kernel's flag is about the pipe alone: a socket in blocking mode would wait all the same.
                            if flags & os.SPLICE_F_NONBLOCK and not _core.is_ready(fd, events, "splice"):
                                raise os_error(errno.EAGAIN, "splice", fd)
                            wait_until_ready(fd, events, "splice")
                            call.check()
                    moved = _core.transfer("splice", src, offset_src, dst, offset_dst, count, args[2], waits_for_peer, errno.EAGAIN)
                    if moved >= 0:
                        return moved
                    if flags & os.SPLICE_F_NONBLOCK:
                        raise os_error(errno.EAGAIN, "splice", src)
                else:
                    with contextlib.suppress(BlockingIOError):
                        return posix.splice(src, dst, count, *args)
                call.check()
                for fd, events in waiting:
                    wait_until_ready(fd, events, "splice")
                    call.check()
                yield_turn()
                call.check()


if hasattr(posix, "copy_file_range"):

    def copy_file_range(src: int, dst: int, count: int, offset_src: int | None = None, offset_dst: int | None = None) -> int:
        """Copy a part of a file to another, letting other greenlets run meanwhile.

        Like :func:`os.copy_file_range`, in a thread.

        Args:
            src: int, open for reading.
            dst: int, open for writing.
            count: int, bytes, 0 or more.
            offset_src, offset_dst: int, bytes from the start, and the descriptor's own offset stays where it is; or None, to begin
                at that one.

        Returns:
            int: how many bytes were copied; 0 at the end of *src*.

        Raises:
            OSError: as copy_file_range(2).
            TypeError, ValueError, OverflowError: an argument is of another type, negative, or too large.

        Keeps :ref:`what every function promises <promises>`. Always switches greenlets.

        Source: copy_file_range(2).

        .. versionadded:: 0.1.0
        """
        if not _is_plausible(dst, src, count, offset_src, offset_dst):
            return posix.copy_file_range(src, dst, count, offset_src, offset_dst)  # which says what is wrong
        return _core.transfer("copy_file_range", src, offset_src, dst, offset_dst, count)
