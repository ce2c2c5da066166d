"""Calls of os that may wait for a disk, a lock or another process: files, locks, counters, randomness, users and groups.

A call is made at once if the kernel can say that it would not block. If not, the hub waits for the descriptor where readiness means
anything. Only the rest goes to `_core`'s worker threads, or to the hub's threadpool if it runs Python or a directory service.

All Python modules make an OSError by os_error(), and note how much was written by note_written(). Only this one refuses to wait in
the hub. Functions of os are called as `posix.x`, the builtin module, because others replace names in os. On Windows there is no
core: tp_read and tp_write go to the threadpool, and the rest of this module isn't used.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import stat
import sys
from typing import TYPE_CHECKING, Any

from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import _get_hub as get_hub_if_exists  # type: ignore[attr-defined]
from greenlet import getcurrent

from coopos._originals import get_original

try:
    import fcntl
    import posix
    from fcntl import flock as fcntl_flock, lockf as fcntl_lockf

    from coopos import _core
except ImportError:
    if hasattr(os, "fork"):
        raise  # a POSIX system without the core is a broken installation
    _core = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import FileDescriptorLike, StrOrBytesPath
    from typing_extensions import Buffer

_read = get_original("os", "read")
_write = get_original("os", "write")


def os_error(code: int, call: str, fd: int) -> OSError:
    """The exception for an errno, which names the call and the descriptor, as those of `_core` do."""
    return OSError(code, f"{os.strerror(code)}: {call}({fd})")


def note_written(ex: BaseException, count: int) -> None:
    """Have an exception say that *count* bytes were written before it came out."""
    if count:
        with contextlib.suppress(Exception):  # some classes refuse attributes
            ex.characters_written = count  # type: ignore[attr-defined]


def _refuse_in_hub() -> None:
    """Called before a thread is asked: in the hub nobody could take the answer."""
    if getcurrent() is get_hub_if_exists():
        raise BlockingSwitchOutError("Impossible to call blocking function in the event loop callback")


def _in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in the hub's threadpool; in a thread that has no hub, here.

    If its greenlet is killed or timed out before the call has begun, the call isn't made: by the time a thread is free its
    descriptor's number may be another file's.
    """
    _refuse_in_hub()
    hub = get_hub_if_exists()
    if hub is None:
        return function(*args)
    wanted = [True]

    def call() -> tuple[Any, BaseException | None]:
        if not wanted:
            return None, None
        try:
            return function(*args), None
        except BaseException as ex:
            return None, ex  # the pool would print what is raised in its thread

    try:
        result, error = hub.threadpool.apply(call)
    finally:
        wanted.clear()
    if error is not None:
        raise error
    return result


def tp_read(fd: int, n: int) -> bytes:
    """Read up to *n* bytes from any descriptor, letting other greenlets run while it would block.

    Like :func:`os.read`. The descriptor's flags don't matter and are not touched. Data that is there already, the page cache
    included, is read at once without a thread. What can be waited for (pipes, sockets, FIFOs, terminals) is waited for on the hub.
    The rest is read by a thread. On Windows the hub's threadpool reads everything, and what a killed or timed-out call reads later
    is lost.

    Args:
        fd: int, an open descriptor.
        n: int, bytes, 0 or more.

    Returns:
        bytes: 0 to *n* bytes long; ``b""`` at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading; EINVAL if *n* is negative; otherwise as read(2).

    Keeps :ref:`what every function promises <promises>`.

    Source: preadv2(2), RWF_NOWAIT; ``gevent.os.tp_read``.

    .. versionadded:: 0.1.0
    """
    if _core is not None:
        return _core.read(fd, n)
    result: bytes = _in_thread(_read, fd, n)
    return result


def tp_write(fd: int, buf: Buffer) -> int:
    """Write a buffer to any descriptor, letting other greenlets run while it would block.

    Like :func:`os.write`. The descriptor's flags don't matter and are not touched. What fits into a pipe or socket is written at
    once, and the hub waits for room; other files are written by a thread. As write(2) does, it writes all of *buf* to a
    descriptor in blocking mode.

    Args:
        fd: int, an open descriptor.
        buf: bytes-like, contiguous. It stays locked until the call is over.

    Returns:
        int: how many bytes were written, 0 to ``len(buf)``.

    Raises:
        OSError: EBADF if *fd* is not open for writing; EPIPE if nobody can read; otherwise as write(2).
        TypeError, BufferError: *buf* is not bytes-like, or not contiguous.

    Keeps :ref:`what every function promises <promises>`.

    Source: pwritev2(2), RWF_NOWAIT; ``gevent.os.tp_write``.

    .. versionadded:: 0.1.0
    """
    if _core is not None:
        return _core.write(fd, buf)
    result: int = _in_thread(_write, fd, buf)
    return result


def read_pty(fd: int, n: int) -> bytes:
    """Read from the master of a pseudo-terminal, with an end-of-file as a pipe has it.

    Like :func:`read`. But when no process has the other side open any more, and all that was written there has been read, the
    kernel says EIO. Here that is the end of the file.

    Args:
        fd: int, the master's descriptor, as :func:`forkpty` returns it.
        n: int, bytes, 0 or more.

    Returns:
        bytes: 1..n long; ``b""`` at the end.

    Raises:
        OSError: as :func:`read`, but for EIO.

    Keeps :ref:`what every function promises <promises>`.

    Source: pty(7), read(2).

    .. versionadded:: 0.1.0
    """
    data: bytes = _core.outright(read_to_hangup, b"", _core.read, fd, n)
    return data


def read_to_hangup(end: Any, read: Callable[..., Any], *args: Any) -> Any:
    """``read(*args)`` from a terminal's master. If no process has the other side open, *end*, or what readall() has read so far."""
    try:
        return read(*args)
    except OSError as ex:
        if ex.errno != errno.EIO:
            raise
        return getattr(ex, "partial", end)


# ---- files -------------------------------------------------------------------------------------------------------------------


def _number(fd: FileDescriptorLike) -> int:
    """The descriptor of an object that has one. What isn't a number is left for os to refuse."""
    return fd.fileno() if hasattr(fd, "fileno") else fd


def fsync(fd: FileDescriptorLike) -> None:
    """Have a file's data and metadata written to the disk, letting other greenlets run until they are there.

    Like :func:`os.fsync`, in a thread.

    Args:
        fd: int, or an object with a ``fileno()`` method.

    Raises:
        OSError: EBADF if *fd* is not open, EINVAL if it can't be synchronised, otherwise as fsync(2).
        TypeError, ValueError: *fd* is of another type, or negative.

    Keeps :ref:`what every function promises <promises>`. Always switches greenlets.

    Source: fsync(2).

    .. versionadded:: 0.1.0
    """
    _core.on_file("fsync", fd)


def fdatasync(fd: FileDescriptorLike) -> None:
    """Have a file's data written to the disk, letting other greenlets run until it is there.

    Like :func:`os.fdatasync`, in a thread.

    Args:
        fd: int, or an object with a ``fileno()`` method.

    Raises:
        OSError: EBADF if *fd* is not open, EINVAL if it can't be synchronised, otherwise as fdatasync(2).
        TypeError, ValueError: *fd* is of another type, or negative.

    Keeps :ref:`what every function promises <promises>`. Always switches greenlets.

    Source: fdatasync(2).

    .. versionadded:: 0.1.0
    """
    _core.on_file("fdatasync", fd)


def sync() -> None:
    """Have everything written to the disks, letting other greenlets run until it is there.

    Like :func:`os.sync`, in a thread.

    Raises:
        BlockingSwitchOutError: called in the event loop itself. Otherwise nothing.

    Keeps :ref:`what every function promises <promises>`. Always switches greenlets.

    Source: sync(2).

    .. versionadded:: 0.1.0
    """
    _core.sync()


def posix_fallocate(fd: int, offset: int, length: int, /) -> None:
    """Reserve room on the disk for a part of a file, letting other greenlets run until there is.

    Like :func:`os.posix_fallocate`, in a thread.

    Args:
        fd: int, an open regular file.
        offset: int, bytes, 0 or more: where the part begins.
        length: int, bytes, more than 0.

    Raises:
        OSError: EBADF if *fd* is not open for writing; ENOSPC; EINVAL, EFBIG, ESPIPE, ENODEV as posix_fallocate(3).
        TypeError, OverflowError: an argument is not an int, or too large.

    Keeps :ref:`what every function promises <promises>`. Always switches greenlets.

    Source: posix_fallocate(3).

    .. versionadded:: 0.1.0
    """
    _core.on_file("posix_fallocate", operator.index(fd), length, offset)


def _path(path: StrOrBytesPath) -> bytes:
    """As the kernel takes it."""
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("embedded null byte")
    return name


def truncate(path: StrOrBytesPath | int, length: int) -> None:
    """Set the length of a file, letting other greenlets run until it is done.

    Like :func:`os.truncate`, in a thread: it takes time to free the room of a large file, and it waits for a process that has a
    lease on the file.

    Args:
        path: str, bytes, path-like, or int, a descriptor open for writing.
        length: int, bytes, 0 or more. A file that was shorter is filled up with zeros.

    Raises:
        OSError: as truncate(2), ftruncate(2).
        TypeError, ValueError, OverflowError: an argument is of another type, or has a null in it, or is too large.

    Keeps :ref:`what every function promises <promises>`. Always switches greenlets.

    Source: truncate(2).

    .. versionadded:: 0.1.0
    """
    if isinstance(path, bool):
        return posix.truncate(path, length)  # which warns
    if isinstance(path, int):
        return ftruncate(path, length)
    _refuse_in_hub()
    sys.audit("os.truncate", path, length)
    _core.truncate(_path(path), length, os.fspath(path))
    return None


def ftruncate(fd: int, length: int, /) -> None:
    """Set the length of an open file, letting other greenlets run until it is done.

    Like :func:`os.ftruncate`, in a thread.

    Args:
        fd: int, open for writing.
        length: int, bytes, 0 or more.

    Raises:
        OSError: EBADF if *fd* is not open; EINVAL if not for writing, or *length* is negative; otherwise as ftruncate(2).
        TypeError, OverflowError: an argument is not an int, or too large.

    Keeps :ref:`what every function promises <promises>`. Always switches greenlets.

    Source: ftruncate(2).

    .. versionadded:: 0.1.0
    """
    number = operator.index(fd)
    sys.audit("os.truncate", number, length)
    _core.on_file("ftruncate", number, length)


def _may_wait_to_open(path: StrOrBytesPath, flags: int, dir_fd: int | None) -> bool:
    """Whether open(2) may wait: for the other end of a FIFO, or the carrier of a terminal line."""
    status = posix.stat(path, dir_fd=dir_fd)
    mode = status.st_mode
    return (stat.S_ISCHR(mode) and not _core.never_waits(status.st_rdev)) or (stat.S_ISFIFO(mode) and not flags & os.O_RDWR)


def open(path: StrOrBytesPath, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    """Open a file, letting other greenlets run while it waits for the other end of a FIFO, or for a terminal line's carrier.

    Like :func:`os.open`. A file that is neither a FIFO nor a character device is opened at once. So is any file under O_NONBLOCK or
    O_PATH, and a FIFO under O_RDWR. The rest is opened by a thread, also a file that another process has a lease on, and a FIFO
    that takes the place of a file in that moment.

    Args:
        path: str, bytes or path-like.
        flags: int, O_RDONLY, O_WRONLY or O_RDWR, and others of :mod:`os`.
        mode: int, the permissions of a file that it makes, less the umask.
        dir_fd: int, the directory that a relative *path* is relative to; None for the working directory.

    Returns:
        int: a descriptor that no program started from here inherits.

    Raises:
        OSError: as open(2).
        RuntimeError: it would have to wait, and no thread can be started, as :meth:`threading.Thread.start` says it.
        TypeError, ValueError, OverflowError: an argument is of another type, has a null in it, or is too large.

    Keeps :ref:`what every function promises <promises>`. Switches greenlets only for a FIFO or character device, or while another
    process has a lease.

    Source: open(2), openat(2), fifo(7).

    .. versionadded:: 0.1.0
    """
    if flags & (os.O_NONBLOCK | getattr(os, "O_PATH", 0)) or isinstance(path, int):
        return posix.open(path, flags, mode, dir_fd=dir_fd)
    try:
        may_wait = _may_wait_to_open(path, flags, dir_fd)
    except (OSError, TypeError, ValueError):
        may_wait = False
    try:
        name, bits = _path(path), operator.index(mode)
    except (TypeError, ValueError):
        return posix.open(path, flags, mode, dir_fd=dir_fd)  # which says what is wrong
    if may_wait:
        _refuse_in_hub()
    sys.audit("open", path, None, flags | os.O_CLOEXEC)
    if not may_wait:
        fd = _core.open_at_once(name, flags | os.O_CLOEXEC, bits, dir_fd, os.fspath(path))
        if fd >= 0:
            return fd
        _refuse_in_hub()
    return _core.wait_open(name, flags | os.O_CLOEXEC, bits, dir_fd, os.fspath(path))


def _gets_lock(lock: Callable[..., None], number: int, *args: int) -> bool:
    """Whether a lock, tried for without waiting, was free, and is ours now. If not, the caller has to wait for it."""
    try:
        lock(number, *args)
    except OSError as ex:
        if ex.errno not in (errno.EAGAIN, errno.EACCES, errno.EINTR):
            raise
    else:
        return True
    _refuse_in_hub()
    return False


def lockf(fd: FileDescriptorLike, command: int, length: int, /) -> None:
    """Take, test or release a lock on a part of a file, letting other greenlets run while another process has it.

    Like :func:`os.lockf`. Only F_LOCK waits, and only if F_TLOCK finds the lock taken: then in a thread. Where no thread can be
    started it asks again and again, and finds no deadlock. As always the process owns the lock, not the greenlet, and closing any
    descriptor of the file releases it.

    Args:
        fd: int, or an object with a ``fileno()`` method: open for writing. The part begins at its position.
        command: int, os.F_LOCK, F_TLOCK, F_ULOCK or F_TEST.
        length: int, bytes; 0 for all that follows, negative for what stands before.

    Raises:
        OSError: EBADF if *fd* is not open for writing, or :func:`close` closes it during the wait; EDEADLK if the other process
            waits for one of ours; otherwise as lockf(3).
        BlockingIOError, PermissionError: EAGAIN or EACCES, another process has the lock (F_TLOCK and F_TEST).
        TypeError, ValueError, OverflowError: an argument is of another type, negative, or too large.

    Keeps :ref:`what every function promises <promises>`.

    Source: lockf(3), fcntl(2).

    .. versionadded:: 0.1.0
    """
    number = _number(fd)
    command = operator.index(command)
    if command != os.F_LOCK:
        posix.lockf(number, command, length)
        if command != os.F_TEST:
            _core.note_lock(number, fcntl.F_UNLCK if command == os.F_ULOCK else fcntl.F_WRLCK, operator.index(length))
    elif _gets_lock(posix.lockf, number, os.F_TLOCK, length):
        _core.note_lock(number, fcntl.F_WRLCK, operator.index(length))
    else:
        _core.wait_lock(number, operator.index(length))


def flock(fd: FileDescriptorLike, operation: int, /) -> None:
    """Take or release a lock on an open file, letting other greenlets run while somebody else has it.

    Like :func:`fcntl.flock`. It waits only if the lock is taken and *operation* has no LOCK_NB: then in a thread. Where no thread
    can be started it asks again and again. The open file owns the lock, and every duplicate of the descriptor shares it.

    Args:
        fd: int, or an object with a ``fileno()`` method.
        operation: int, fcntl.LOCK_SH, LOCK_EX or LOCK_UN; with ``| LOCK_NB`` it doesn't wait.

    Returns:
        None

    Raises:
        OSError: EBADF if *fd* is not open, or :func:`close` closes it during the wait; EINVAL, another *operation*.
        BlockingIOError: EWOULDBLOCK, somebody has the lock (LOCK_NB).
        TypeError, ValueError, OverflowError: an argument is of another type, negative, or too large.

    Keeps :ref:`what every function promises <promises>`.

    Source: flock(2).

    .. versionadded:: 0.1.0
    """
    number = _number(fd)
    operation = operator.index(operation)
    if operation & (fcntl.LOCK_NB | fcntl.LOCK_UN):
        fcntl_flock(number, operation)
        _core.note_flock(number, not operation & fcntl.LOCK_UN)
    elif _gets_lock(fcntl_flock, number, operation | fcntl.LOCK_NB):
        _core.note_flock(number, True)
    else:
        _core.wait_flock(number, operation)


def lock_range(fd: FileDescriptorLike, cmd: int, len: int = 0, start: int = 0, whence: int = 0, /) -> None:
    """What patch() puts in the place of fcntl.lockf: it lets other greenlets run while another process has the lock."""
    number = _number(fd)
    cmd = operator.index(cmd)
    kind = fcntl.F_UNLCK if cmd == fcntl.LOCK_UN else fcntl.F_RDLCK if cmd & fcntl.LOCK_SH else fcntl.F_WRLCK
    if cmd == fcntl.LOCK_UN or cmd & fcntl.LOCK_NB:
        fcntl_lockf(number, cmd, len, start, whence)
        _core.note_lock(number, kind, len, start, whence)
    elif _gets_lock(fcntl_lockf, number, cmd | fcntl.LOCK_NB, len, start, whence):
        _core.note_lock(number, kind, len, start, whence)
    else:
        _core.wait_lock(number, len, start, whence, kind)


lock_range.__name__ = "lockf"


# ---- counters ----------------------------------------------------------------------------------------------------------------


def eventfd_read(fd: FileDescriptorLike) -> int:
    """Read an eventfd's counter, letting other greenlets run while it is 0.

    Like :func:`os.eventfd_read`, but waits too where that raises BlockingIOError.

    Args:
        fd: int, or an object with a ``fileno()`` method.

    Returns:
        int: the counter, which is 0 now; with EFD_SEMAPHORE 1, by which it is less now.

    Raises:
        OSError: EBADF if *fd* is not open, or :func:`close` closes it during the wait; EINVAL if it is no eventfd.
        TypeError, ValueError: *fd* is of another type, or negative.

    Keeps :ref:`what every function promises <promises>`.

    Source: eventfd(2).

    .. versionadded:: 0.1.0
    """
    number = _number(fd)
    if not isinstance(number, int) or number < 0:
        return posix.eventfd_read(number)  # which says what is wrong
    data = tp_read(number, 8)
    if len(data) != 8:
        raise os_error(errno.EINVAL, "eventfd_read", number)
    return int.from_bytes(data, sys.byteorder)


def eventfd_write(fd: FileDescriptorLike, value: int) -> None:
    """Add to an eventfd's counter, letting other greenlets run while the sum would be too large for it.

    Like :func:`os.eventfd_write`, but waits too where that raises BlockingIOError.

    Args:
        fd: int, or an object with a ``fileno()`` method.
        value: int, 0 to 2**64 - 2.

    Raises:
        OSError: EBADF if *fd* is not open; EINVAL if *value* is 2**64 - 1.
        TypeError, ValueError, OverflowError: an argument is of another type, negative, or too large.

    Keeps :ref:`what every function promises <promises>`.

    Source: eventfd(2).

    .. versionadded:: 0.1.0
    """
    number = _number(fd)
    if not isinstance(number, int) or number < 0 or not isinstance(value, int) or not 0 <= value < 1 << 64:
        return posix.eventfd_write(number, value)  # which says what is wrong
    tp_write(number, value.to_bytes(8, sys.byteorder))
    return None


# ---- randomness --------------------------------------------------------------------------------------------------------------


def getrandom(size: int, flags: int = 0) -> bytes:
    """Get random bytes, letting other greenlets run until the machine has gathered what it needs for them.

    Like :func:`os.getrandom`. There is something to wait for only just after the machine has started; then a thread does.

    Args:
        size: int, bytes, 0 or more.
        flags: int, os.GRND_NONBLOCK and os.GRND_RANDOM.

    Returns:
        bytes: as many as asked for; fewer if *size* is over 256 and a signal came, or under GRND_RANDOM.

    Raises:
        BlockingIOError: EAGAIN, under GRND_NONBLOCK only.
        OSError: EINVAL, unknown flags, or *size* is negative.
        TypeError, OverflowError: an argument is not an int, or too large.

    Keeps :ref:`what every function promises <promises>`.

    Source: getrandom(2).

    .. versionadded:: 0.1.0
    """
    try:
        return posix.getrandom(size, flags | os.GRND_NONBLOCK)
    except BlockingIOError:
        if flags & os.GRND_NONBLOCK:
            raise
    return _core.random(size, flags)


def urandom(size: int, /) -> bytes:
    """Get random bytes fit for cryptography, letting other greenlets run until the machine has gathered what it needs for them.

    Like :func:`os.urandom`. There is something to wait for only just after the machine has started; then a thread does.

    Args:
        size: int, bytes, 0 or more.

    Returns:
        bytes: *size* bytes.

    Raises:
        ValueError: *size* is negative.
        TypeError, OverflowError: *size* is not an int, or too large.
        NotImplementedError: the system has no source of randomness.

    Keeps :ref:`what every function promises <promises>`.

    Source: getrandom(2), random(4).

    .. versionadded:: 0.1.0
    """
    if hasattr(posix, "getrandom"):
        try:
            posix.getrandom(1, os.GRND_NONBLOCK)
        except BlockingIOError:
            _core.random(1, 0)  # from now on it doesn't wait
        except OSError:
            pass  # an old kernel, or a sandbox: os.urandom has other means, which don't wait
    return posix.urandom(size)


# ---- users and groups --------------------------------------------------------------------------------------------------------


def getlogin() -> str:
    """Get the name of the user who is logged in at the process's terminal, letting other greenlets run while it is looked up.

    Like :func:`os.getlogin`, in the hub's threadpool: the user database may be one on the network.

    Returns:
        str: the name.

    Raises:
        OSError: ENXIO, ENOTTY, ENOENT and others of getlogin(3): there is no terminal, or nobody is logged in there.

    Keeps :ref:`what every function promises <promises>`. Always switches greenlets.

    Source: getlogin(3), nsswitch.conf(5).

    .. versionadded:: 0.1.0
    """
    result: str = _in_thread(posix.getlogin)
    return result


def getgrouplist(user: str, group: int, /) -> list[int]:
    """Get the groups that a user belongs to, letting other greenlets run while they are looked up.

    Like :func:`os.getgrouplist`, in the hub's threadpool: the group database may be one on the network.

    Args:
        user: str, the user's name.
        group: int, a group that is in the list in any case, usually the one of the password database.

    Returns:
        list of int: the groups' ids.

    Raises:
        TypeError, ValueError, OverflowError: an argument is of another type, has a null in it, or is too large.
        OSError: as getgrouplist(3).

    Keeps :ref:`what every function promises <promises>`. Always switches greenlets.

    Source: getgrouplist(3), nsswitch.conf(5).

    .. versionadded:: 0.1.0
    """
    result: list[int] = _in_thread(posix.getgrouplist, user, group)
    return result


def initgroups(username: str, gid: int, /) -> None:
    """Give the process the groups that a user belongs to, letting other greenlets run while they are looked up.

    Like :func:`os.initgroups`, in the hub's threadpool: the group database may be one on the network.

    Args:
        username: str, the user's name.
        gid: int, a group to have besides.

    Raises:
        OSError: EPERM if the process may not; ENOMEM.
        TypeError, ValueError, OverflowError: an argument is of another type, has a null in it, or is too large.

    Keeps :ref:`what every function promises <promises>`. Always switches greenlets.

    Source: initgroups(3), nsswitch.conf(5).

    .. versionadded:: 0.1.0
    """
    _in_thread(posix.initgroups, username, gid)
