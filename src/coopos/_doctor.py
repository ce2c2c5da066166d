"""``python -m coopos doctor``: which mechanism serves what on this machine, each proved on a real one.

A check makes the thing, has coopos wait for it while another greenlet runs, and compares what came out; it returns the name of the
mechanism that did it. A check that hangs is ended by a timeout, and has failed. Where there is no compiled core only the threadpool
is checked. Asks the modules that do the work, and doesn't know the façade.
"""

from __future__ import annotations

import errno
import os
import platform
import socket
import sys
import tempfile
from typing import TYPE_CHECKING

import gevent
from gevent.hub import get_hub

from coopos import _files, _patch

HAS_CORE = hasattr(os, "fork")
if HAS_CORE:
    from coopos import _core, _fork, _programs

if TYPE_CHECKING:
    from collections.abc import Callable

CHECK_TIMEOUT_S = 10.0
MESSAGE = b"coopos"


def _expect(got: object, wanted: object) -> None:
    if got != wanted:
        raise AssertionError(f"got {got!r}, expected {wanted!r}")


def _waits(read: Callable[[], bytes], write: Callable[[], object]) -> None:
    """*read* must wait, let *write* happen meanwhile, and bring what was written."""
    reader = gevent.spawn(read)
    gevent.sleep(0)
    if reader.ready():
        raise AssertionError(f"read did not wait: {reader.value!r}, {reader.exception!r}")
    write()
    _expect(reader.get(), MESSAGE)


def _close(fd: int) -> None:
    """Without a core nobody waits for a descriptor, and os.close is enough."""
    (_core.close if HAS_CORE else os.close)(fd)


def _nonblocking(read_fd: int, write_fd: int) -> str:
    """nb_read and nb_write on the two ends of something; closes them."""
    try:
        _core.make_nonblocking(read_fd)
        _core.make_nonblocking(write_fd)
        _waits(lambda: _core.nb_read(read_fd, 100), lambda: _core.nb_write(write_fd, MESSAGE))
    finally:
        _close(read_fd)
        _close(write_fd)
    return "read(2), write(2), and the hub while they would block"


def _counts() -> list[int]:
    return [_core.count_calls(), _core.count_guarded_calls(), _core.count_dontwait_calls()]


def _mechanism(call: Callable[[], object], wanted: object) -> str:
    """What serves a call that has nothing to wait for: which kinds of files know RWF_NOWAIT differs from kernel to kernel."""
    before = _counts()
    _expect(call(), wanted)
    for name, count, now in zip(("a worker thread", "poll(2), and a guard", "MSG_DONTWAIT"), before, _counts(), strict=True):
        if now > count:
            return name
    return "RWF_NOWAIT"


def _any_mode(read_fd: int, write_fd: int = -1) -> str:
    """What serves read on a descriptor that has data, whatever its mode, and write on its other end."""
    if not HAS_CORE:
        _expect(_files.tp_read(read_fd, 100), MESSAGE)
        return "the threadpool"
    reads = _mechanism(lambda: _core.read(read_fd, len(MESSAGE)), MESSAGE)
    writes = reads if write_fd < 0 else _mechanism(lambda: _core.write(write_fd, MESSAGE), len(MESSAGE))
    return reads if reads == writes else f"{reads} for reads, {writes} for writes"


def check_pipe() -> str:
    return _nonblocking(*os.pipe())


def check_socket() -> str:
    ours, theirs = socket.socketpair()
    return _nonblocking(ours.detach(), theirs.detach())


def check_pty() -> str:
    import termios

    master, slave = os.openpty()
    attributes = termios.tcgetattr(slave)
    attributes[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    return _nonblocking(slave, master)


def _blocking(read_fd: int, write_fd: int) -> str:
    """tp_read and tp_write on the two ends of something; closes them."""
    try:
        _waits(lambda: _files.tp_read(read_fd, 100), lambda: _files.tp_write(write_fd, MESSAGE))
        _files.tp_write(write_fd, MESSAGE)
        return _any_mode(read_fd, write_fd)
    finally:
        _close(read_fd)
        _close(write_fd)


def check_blocking_pipe() -> str:
    return _blocking(*os.pipe())


def check_blocking_socket() -> str:
    ours, theirs = socket.socketpair()
    return _blocking(ours.detach(), theirs.detach())


def check_fifo() -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "fifo")
        os.mkfifo(path)
        fd = os.open(path, os.O_RDWR)
        try:
            _waits(lambda: _files.tp_read(fd, 100), lambda: os.write(fd, MESSAGE))
            os.write(fd, MESSAGE)
            return _any_mode(fd)
        finally:
            _core.close(fd)


def check_file() -> str:
    with tempfile.TemporaryFile() as file:
        file.write(MESSAGE)
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        return _any_mode(file.fileno(), file.fileno())


def check_close() -> str:
    read_fd, write_fd = os.pipe()
    _core.make_nonblocking(read_fd)
    outcome: list[int | None] = []

    def read() -> None:
        try:
            _core.nb_read(read_fd, 1)
        except OSError as ex:
            outcome.append(ex.errno)

    reader = gevent.spawn(read)
    gevent.sleep(0)
    _core.close(read_fd)
    try:
        again = os.dup(write_fd)
        os.close(again)
        _expect(again, read_fd)  # the number is free at once
        reader.join()
        _expect(outcome, [errno.EBADF])
    finally:
        _core.close(write_fd)
    return "close(2) at once, EBADF for whoever waits"


def check_child() -> str:
    ended: list[_core.Child] = []
    pid = _fork.fork_and_watch(ended.append)
    if pid == 0:
        os._exit(7)
    _expect(_core.waitpid(pid, 0), (pid, 7 << 8))
    while not ended:
        gevent.sleep(0)
    return f"{ended[0].mechanism}, and no SIGCHLD handler"


def check_any_child() -> str:
    pid = _fork.fork()
    if pid == 0:
        os._exit(7)
    _expect(_core.waitpid(-1, 0), (pid, 7 << 8))
    return "waitid(2) in a thread that only looks"


def check_any_process() -> str:
    pid = _fork.fork_gevent()
    if pid == 0:
        os._exit(7)
    _core.wait_exit(pid)
    _expect(_core.waitpid(pid, os.WNOHANG), (pid, 7 << 8))
    return "a pidfd; its status is left to its parent"


def check_program() -> str:
    pid = _programs.posix_spawn(sys.executable, [sys.executable, "-c", "raise SystemExit(7)"], dict(os.environ))
    _expect(_core.waitpid(pid, 0), (pid, 7 << 8))
    return "posix_spawn(3), watched"


CHECKS: list[tuple[str, Callable[[], str]]] = [("blocking pipe", check_blocking_pipe), ("regular file", check_file)]
if HAS_CORE:
    CHECKS = [
        ("pipe", check_pipe),
        ("socket", check_socket),
        ("pty", check_pty),
        *CHECKS,
        ("blocking socket", check_blocking_socket),
        ("FIFO", check_fifo),
        ("close", check_close),
        ("child", check_child),
        ("any child", check_any_child),
        ("program", check_program),
    ]
    if hasattr(os, "pidfd_open"):
        CHECKS.append(("any process", check_any_process))


def print_patched() -> None:
    """Which names of this process coopos has replaced; the others, by the reason."""
    names: dict[str, list[str]] = {}
    for name, state in _patch.patched().items():
        names.setdefault(state, []).append(name)
    print(f"replaced by coopos in this process: {len(names.pop('coopos', ()))} names")
    for state, left in names.items():
        print(f"not replaced, since {state}: {len(left) if len(left) > 9 else ', '.join(left)}")


def main() -> int:
    """Run every check and print a line for each; 0 if all are well, else 1."""
    version = sys.modules["coopos"].__version__  # not imported: the façade knows the doctor, and not the other way about
    print(f"coopos {version} with gevent {gevent.__version__} on {type(get_hub().loop).__module__}")
    print(f"Python {platform.python_version()} on {platform.platform()}")
    print_patched()
    failed = 0
    for name, check in CHECKS:
        try:
            with gevent.Timeout(CHECK_TIMEOUT_S, AssertionError("hung")):
                print(f"{name:15} ok      {check()}")
        except Exception as ex:
            failed += 1
            print(f"{name:15} FAILED  {type(ex).__name__}: {ex}")
    if HAS_CORE:
        refusals = _core.count_refusals().items()
        counts = ", ".join(f"{errno.errorcode.get(code, code)} {count} times" for code, count in refusals)
        print(f"pidfds refused in this process: {counts or 'none'}")
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} are well")
    return 1 if failed else 0
