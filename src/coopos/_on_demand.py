"""Reports on demand: COOPOS_REPORT has a signal print one to standard error, or has a socket answer ``doctor --pid``.

The socket lies in a directory of the user's own, under the name PID.sock. An OS thread answers there, with blocking calls of the
stdlib's own socket. So it also answers while the hub stands in a callback, as long as other threads get the GIL. Two rules:

1. Who has a name in that directory answers: a socket gets its name once it listens, and what the dead have left is removed.
2. The number of the listening socket may be another file's by now: programs that become daemons close all descriptors.

Nothing of this exists until COOPOS_REPORT asks for it.
"""

from __future__ import annotations

import _socket
import atexit
import contextlib
import faulthandler
import functools
import os
import posix
import select
import signal
import stat
import struct
import traceback
import warnings
from typing import TYPE_CHECKING, Any

from gevent._hub_local import get_hub_if_exists
from gevent.hub import get_hub

from coopos import _core, _report
from coopos._originals import get_original

if TYPE_CHECKING:
    from types import FrameType

#: How long one side waits for the other.
TIMEOUT_S = 5.0
#: How long a question may take to come, while others wait with theirs.
REQUEST_S = 0.5
#: How long until the thread tries again if no descriptor is left.
PAUSE_S = 1.0
#: How late a signal's report may be, while the hub sleeps.
TICK_S = 0.3
STDERR = 2

_socket_class = get_original("socket", "socket")
_start_new_thread = get_original("_thread", "start_new_thread")
_sleep = get_original("time", "sleep")
_poll = get_original("select", "poll")


def start(words: str) -> None:
    """Do what COOPOS_REPORT says: names of signals and "socket", with commas in between."""
    for word in words.split(","):
        if word == "socket":
            _open_door()
        else:
            _answer_signal(getattr(signal, word))


def _warn(message: str) -> None:
    warnings.warn(f"COOPOS_REPORT: {message}", RuntimeWarning, stacklevel=2)


# ---- a signal -----------------------------------------------------------------------------------------------------------------


def _answer_signal(signum: int) -> None:
    """First faulthandler's answer, at once: it needs no GIL. Then ours, when the main thread next runs Python code.

    faulthandler prints the stack of the thread that gets the signal. Linux chooses the main thread if it can (complete_signal in
    https://github.com/torvalds/linux/blob/master/kernel/signal.c). The stacks of other threads change while it would read them:
    that has crashed CPython 3.10, 3.12 and 3.13: https://docs.python.org/3/library/faulthandler.html#faulthandler.register
    """
    previous: Any = signal.SIG_DFL
    is_at_work = False

    def print_report(number: int, frame: FrameType | None) -> None:
        nonlocal is_at_work
        if not is_at_work:  # a report that a signal interrupts goes on, and is the answer to both
            is_at_work = True
            try:
                _write(STDERR, _answer(as_json=False))
            except RecursionError:
                pass  # the program is so deep in calls that there is no room for ours
            finally:
                is_at_work = False
        if callable(previous):
            previous(number, frame)

    is_in_main_thread = True
    try:
        previous = signal.signal(signum, print_report)
    except ValueError:
        is_in_main_thread = False
        _warn("coopos was imported outside the main thread, so the signal prints one stack and nothing else")
    register = functools.partial(faulthandler.register, signum, file=STDERR, all_threads=False)
    if not is_in_main_thread:
        register()
        return
    _core.register_both(signum, register)
    if _ticker is None:
        get_hub()  # the main thread's
        _tick()
        os.register_at_fork(after_in_child=_tick)


def _answer(as_json: bool) -> bytes:
    try:
        text = _report.report(as_json)
    except RecursionError:
        raise
    except Exception:
        text = f"coopos: the report has failed\n{traceback.format_exc()}"
    return text.encode(errors="backslashreplace")


_ticker: Any = None


def _tick() -> None:
    """Have the hub of this thread wake now and then. A signal that comes just before it falls asleep doesn't wake it, and Python's
    handler would run at the next event, whenever that is. gevent's libuv loop has such a timer of its own:
    https://github.com/gevent/gevent/blob/master/src/gevent/libuv/loop.py (_signal_idle)
    """
    global _ticker
    hub = get_hub_if_exists()
    if hub is None or hasattr(hub.loop, "_signal_idle"):
        return
    if _ticker is None or _ticker.loop is not hub.loop or not _ticker.active:
        _ticker = hub.loop.timer(TICK_S, TICK_S, ref=False)
        _ticker.start(bool)


def _write(fd: int, data: bytes) -> None:
    """write(2), and not the cooperative one: a signal handler can't let others run. If nobody reads, the rest is left out."""
    with contextlib.suppress(OSError):
        while data:
            try:
                data = data[posix.write(fd, data) :]
            except BlockingIOError:
                ready = _poll()
                ready.register(fd, select.POLLOUT)
                if not ready.poll(TIMEOUT_S * 1000):
                    return


# ---- where the sockets are ----------------------------------------------------------------------------------------------------


def _directories(uid: int) -> list[str]:
    """Where a process of user *uid* may have its socket."""
    found = [f"/run/user/{uid}/coopos", f"/tmp/coopos-{uid}"]
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return found if not os.path.isabs(runtime) else [f"{runtime.rstrip('/')}/coopos", *found]


def _make_directory() -> str:
    """The directory for this user's sockets: in XDG_RUNTIME_DIR if that is there and this user's, else in /tmp.

    Others can write to /tmp, so what is there must be a directory, no link, this user's and closed to others.
    """
    uid = os.geteuid()
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    path = f"/tmp/coopos-{uid}"
    with contextlib.suppress(OSError):
        if os.path.isabs(runtime) and os.stat(runtime).st_uid == uid and len(os.fsencode(runtime)) < 70:  # of the 107 of a name
            path = f"{runtime.rstrip('/')}/coopos"
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)  # whatever the umask takes away
    there = os.lstat(path)
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != uid or there.st_mode & 0o077:
        raise PermissionError(f"{path} is no directory that belongs to user {uid} alone")
    return path


def _is_answered(path: str) -> bool:
    """Whether a process listens there. A full queue of connections also says so."""
    with _socket_class(_socket.AF_UNIX, _socket.SOCK_STREAM) as client:
        client.settimeout(0)
        try:
            client.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _sweep(directory: str) -> None:
    """Remove the sockets of processes that have died. One whose pid isn't known here may live in a container with the same /tmp."""
    for name in os.listdir(directory):
        pid, _, kind = name.partition(".")
        path = os.path.join(directory, name)
        is_socket = kind in ("sock", "sock.early") and pid.isascii() and pid.isdecimal()
        if is_socket and not _is_running(int(pid)) and not _is_answered(path):
            with contextlib.suppress(OSError):
                os.unlink(path)


# ---- the side that answers ----------------------------------------------------------------------------------------------------


class Door:
    """The socket of this process, and the thread that answers there."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        directory = _make_directory()
        _sweep(directory)
        self.path = os.path.join(directory, f"{self.pid}.sock")
        self.listen()

    def listen(self) -> None:
        if _is_answered(self.path):
            raise FileExistsError(f"another process listens at {self.path}")
        early = f"{self.path}.early"
        listener = _socket_class(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(early)
            listener.settimeout(None)
            listener.bind(early)
            os.chmod(early, 0o600)
            listener.listen()
            os.rename(early, self.path)
        except BaseException:
            listener.close()
            raise
        self.listener = listener
        self.identity = os.fstat(listener.fileno())

    def has_listener(self) -> bool:
        """Whether the number is still the listening socket's."""
        try:
            return os.path.samestat(os.fstat(self.listener.fileno()), self.identity)
        except OSError:
            return False

    def leave_listener(self) -> None:
        if self.has_listener():
            self.listener.close()
        else:
            self.listener.detach()

    def serve(self) -> None:
        """In the thread, to the end of the process."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            try:
                if not self.has_listener():
                    self.leave_listener()
                    self.listen()
                with self.listener.accept()[0] as connection:
                    self.answer(connection)
            except OSError:
                _sleep(PAUSE_S)

    def answer(self, connection: Any) -> None:
        connection.settimeout(REQUEST_S)
        if not _may_ask(connection):
            return
        with contextlib.suppress(OSError):  # whoever asked is gone
            request = connection.recv(16)
            if not request:
                return  # _is_answered() asks no more than that
            connection.settimeout(TIMEOUT_S)
            connection.sendall(_answer(as_json=request == b"json\n"))

    def remove(self) -> None:
        """At exit. A forked child that inherits this function has a socket of its own."""
        if self.pid == os.getpid():
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def _credentials(connection: Any) -> tuple[int, int] | None:
    """(pid, user) of the other end, or None where the system doesn't tell."""
    if not hasattr(_socket, "SO_PEERCRED"):
        return None
    pid, uid, _gid = struct.unpack("3i", connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid


def _may_ask(connection: Any) -> bool:
    """This user and root may. Where the system doesn't tell who asks, the directory's mode has decided."""
    credentials = _credentials(connection)
    return credentials is None or credentials[1] in (os.geteuid(), 0)


_door: Door | None = None


def _open_door() -> None:
    """Without a socket the program goes on: somebody else may have made a file of that name in /tmp."""
    global _door
    is_first = _door is None
    if _door is not None and _door.pid == os.getpid():
        return  # the parent of this child was to open one itself when it forked
    try:
        _door = Door()
        _start_new_thread(_door.serve, ())
    except (OSError, RuntimeError) as ex:
        _warn(f"there is no socket for reports: {ex}")
    if is_first:
        atexit.register(_remove)
        os.register_at_fork(after_in_child=_open_door_in_child)


def _remove() -> None:
    if _door is not None:
        _door.remove()


def _open_door_in_child() -> None:
    """A forked child has the parent's listening socket, but no thread that answers there. It gets its own when its hub first runs:
    most children execute a program or end before that, and a second thread would be in the way of some.
    """
    if _door is None:
        return
    _door.leave_listener()
    hub = get_hub_if_exists()
    if hub is None:  # as in a server's master, whose workers make their hubs later
        _open_door()
    else:
        hub.loop.run_callback(_open_door)


# ---- the side that asks -------------------------------------------------------------------------------------------------------


class NoAnswerError(Exception):
    """Its message says why there is no report."""


def _user_of(pid: int) -> int:
    """The effective user of a process; this one where /proc doesn't tell."""
    for line in _report.text_of(f"/proc/{pid}/status").splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[2])
    return os.geteuid()


def _connect(client: Any, pid: int) -> None:
    """Connect to the socket of process *pid*, and to nobody else's."""
    if not _is_running(pid):
        raise NoAnswerError(f"there is no process {pid}")
    if _report.has_ended(pid):
        raise NoAnswerError(f"process {pid} has ended, and its parent has not waited for it yet")
    uid = _user_of(pid)
    # A program that has changed its user has its socket where the first one may write.
    found = [f"{path}/{pid}.sock" for user in dict.fromkeys((uid, os.geteuid(), 0)) for path in _directories(user)]
    refusal = None
    for path in dict.fromkeys(found):
        try:
            client.connect(path)
        except PermissionError as ex:
            refusal = ex
        except TimeoutError:
            raise NoAnswerError(_late(pid)) from None
        except OSError:
            continue
        else:
            credentials = _credentials(client)
            if credentials is not None and credentials[0] != pid:
                raise NoAnswerError(f"process {credentials[0]} listens at {path}, and not process {pid}")
            return
    if refusal is not None and uid != os.geteuid():
        raise NoAnswerError(f"process {pid} belongs to user {uid}: only that user and root may ask it") from None
    reasons = "it has not imported coopos (of gunicorn, ask a worker), or had no COOPOS_REPORT=socket when it did"
    raise NoAnswerError(f"process {pid} has no socket for reports: {reasons}") from None


def _late(pid: int) -> str:
    why = "it is stopped, or a C call of it holds the GIL (try py-spy dump)"
    return f"process {pid} doesn't answer within {TIMEOUT_S:.0f} s: {why}"


def ask(pid: int, as_json: bool) -> str:
    """The report of process *pid*. Raises NoAnswerError."""
    pieces = []
    with _socket_class(_socket.AF_UNIX, _socket.SOCK_STREAM) as client:
        client.settimeout(TIMEOUT_S)
        _connect(client, pid)
        try:
            client.sendall(b"json\n" if as_json else b"text\n")
            while piece := client.recv(65536):
                pieces.append(piece)
        except TimeoutError:
            raise NoAnswerError(_late(pid)) from None
        except OSError:
            pieces.clear()
    if not pieces:
        raise NoAnswerError(f"process {pid} has ended, or refuses to answer user {os.geteuid()}")
    return b"".join(pieces).decode(errors="backslashreplace")
