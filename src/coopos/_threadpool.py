"""The calls that only a thread can make cooperative: here because every platform has them.

A thread is the last step. Where the kernel can say that a read or write would not block, it is made at once; where readiness means
anything, the hub waits for it, and no thread is held. Knows `_core` (where there is one) and the hub's threadpool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import get_hub
from gevent.monkey import get_original
from greenlet import getcurrent

try:
    from coopos import _core
except ImportError:
    if hasattr(__import__("os"), "fork"):
        raise  # a POSIX system without the core is a broken installation
    _core = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

_read = get_original("os", "read")
_write = get_original("os", "write")


def _in_thread(function: Callable[..., Any], *args: Any) -> Any:
    hub = get_hub()
    if getcurrent() is hub:
        # Before the thread is asked: what it would read then would be nobody's.
        raise BlockingSwitchOutError("Impossible to call blocking function in the event loop callback")
    return hub.threadpool.apply(function, args)


def tp_read(fd: int, n: int) -> bytes:
    """Read up to *n* bytes from any descriptor, letting other greenlets run while it would block.

    Like :func:`os.read`. The descriptor's flags don't matter and are not touched. Data that is there already, the page cache
    included, is read at once without a thread. What can be waited for (pipes, sockets, FIFOs, terminals) is waited for on the hub.
    The rest, and blocking FIFOs and terminals once they are ready, is read in the hub's threadpool.

    Args:
        fd: int, an open descriptor.
        n: int, bytes, 0 or more.

    Returns:
        bytes: 0 to *n* bytes long; ``b""`` at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading; EINVAL if *n* is negative; otherwise as read(2).

    Switches greenlets only if it has to wait. Killed or timed out, it has taken no byte: what a thread reads for it all the same
    goes to the next reader (not on Windows). Works in any thread's hub and in a forked child.

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
    once, and the hub waits for room; other files are written in the hub's threadpool. As write(2) does, it writes all of *buf* to a
    descriptor in blocking mode.

    Args:
        fd: int, an open descriptor.
        buf: bytes-like, contiguous. It stays locked until the call is over.

    Returns:
        int: how many bytes were written, 0 to ``len(buf)``.

    Raises:
        OSError: EBADF if *fd* is not open for writing; EPIPE if nobody can read; otherwise as write(2).
        TypeError, BufferError: *buf* is not bytes-like, or not contiguous.

    Switches greenlets only if it has to wait. Killed or timed out before anything was written, it has written nothing; after a part
    was, the exception has an attribute ``characters_written``. A write that is in the threadpool goes on there. Works in any
    thread's hub and in a forked child.

    Source: pwritev2(2), RWF_NOWAIT; ``gevent.os.tp_write``.

    .. versionadded:: 0.1.0
    """
    if _core is not None:
        return _core.write(fd, buf)
    result: int = _in_thread(_write, fd, buf)
    return result
