"""How a Connection of multiprocessing reads, writes and connects under :func:`coopos.patch`. POSIX only.

`_multiprocessing` puts these functions in place; its rules hold here. The messages are the stdlib's, byte for byte. What was read
or written of a message that an exception cut short is kept on the Connection, and the next call goes on from there.

A Connection's descriptor is in blocking mode, as other processes expect it, and stays so: the waits are `_core`'s.
"""

from __future__ import annotations

import functools
import io
import os
import socket
import struct
from select import PIPE_BUF
from typing import TYPE_CHECKING, Any

from gevent.exceptions import BlockingSwitchOutError

from coopos import _core
from coopos._originals import get_original

if TYPE_CHECKING:
    from collections.abc import Callable

# A message is its length in 4 bytes, or -1 and the length in 8, and then the bytes:
# https://github.com/python/cpython/blob/v3.13.0/Lib/multiprocessing/connection.py#L406-L436
_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!iQ")
#: Up to here a copy is cheaper than a second system call.
MAX_JOINED = 16_384


def _read_part(fd: int, parts: list[bytes], index: int, size: int) -> bytes:
    """Read what is missing of one part of a message. If an exception comes out, *parts* has what was read; at the end of the file
    it is empty.
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


def receive_bytes(connection: Any, maxsize: int | None = None) -> io.BytesIO | None:
    """``Connection._recv_bytes``. If an exception is thrown in, the next call goes on with what was read of the message."""
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
    """Go on after *ex* came out of a write that had sent *done* bytes of the first of *parts*.

    In the hub, send the rest plainly. Elsewhere raise *ex*. If a part of the message was sent, keep the rest for the next call:
    otherwise the reader would take the next message for it.
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


def send_bytes(connection: Any, buf: Any) -> None:
    """``Connection._send_bytes``. If an exception is thrown in after a part was sent, the next call sends the rest first."""
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


def message_at_once(connection: Any, buf: bytes) -> bytes | None:
    """The bytes of a message that fits into a pipe as one. None: it doesn't, or the next send has to end another one first."""
    if connection._handle is None or "_coopos_rest" in connection.__dict__ or len(buf) > PIPE_BUF:
        return None
    return _SHORT.pack(len(buf)) + buf


def close_connection(connection: Any, close: Callable[[int], None] = _core.close) -> None:
    """``Connection._close``, which wakes whoever waits for the descriptor.

    It may be called while the interpreter ends, when this module's names are gone: so *close* is a default.
    """
    close(connection._handle)


def in_blocking_mode(make: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that makes a Connection, or a pair, of gevent's sockets: put them into blocking mode for other processes."""

    @functools.wraps(make)
    def make_blocking(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        for connection in made if isinstance(made, tuple) else (made,):
            os.set_blocking(connection.fileno(), True)
        return made

    return make_blocking


def in_hub_plainly(make_client: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``SocketClient``: in the hub, which can't wait, it connects with a plain socket."""

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
    """A Connection's socket, to send and receive descriptors with. A socket of gevent's would change its mode for everybody."""

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


def from_fd(fd: int, family: int, kind: int) -> _DuplicatedSocket:
    return _DuplicatedSocket(family, kind, fileno=os.dup(fd))
