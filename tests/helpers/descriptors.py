"""Descriptors of every kind, the calls that move bytes over them, and what it takes to see how a call waits.

A call is named as in `os`; CALLS that read or write are brought to one form, ``read(fd, n)`` → bytes and ``write(fd, data)`` → int,
so that a test can be run for all of them.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import itertools
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import tty
from collections.abc import Callable

import pytest

import coopos
from coopos import _core

from .support import DEADLINE_S, TookTooLong, closing, until

#: Whether coopos asks the kernel per call: it does not where it was told so. Files know the flag since Linux 4.14, pipes since 6.3.
USES_NOWAIT = hasattr(os, "RWF_NOWAIT") and os.environ.get("COOPOS_NOWAIT") != "0"
needs_nowait_in_use = pytest.mark.skipif(not USES_NOWAIT, reason="no RWF_NOWAIT here, or COOPOS_NOWAIT=0")
#: preadv2(2) and pwritev2(2), where the offset -1 means the current position, and a pipe has one.
HAS_PREADV2 = hasattr(os, "RWF_NOWAIT")


def by_name(name, module=os):
    """A pytest.param for a function that not every platform or Python has."""
    return pytest.param(name, marks=pytest.mark.skipif(not hasattr(module, name), reason=f"no os.{name} here"))


# ---- calls in one form -------------------------------------------------------------------------------------------------------


def _into_two(readv, fd, n):
    buffers = [bytearray(min(n, 64)), bytearray(max(n - 64, 0))]
    nread = readv(fd, buffers)
    return b"".join(buffers)[:nread]


def readinto_by_os(fd, buffer):
    """os.readinto, which came with Python 3.14; it reads nothing by read(2), where readv(2) would not ask the file at all."""
    return os.readv(fd, [buffer]) if len(buffer) else len(os.read(fd, 0))


def _into_one(readinto, fd, n):
    buffer = bytearray(n)
    nread = readinto(fd, buffer)
    return bytes(buffer[:nread])


def _from_two(writev, fd, data):
    middle = len(data) // 2
    return writev(fd, [data[:middle], data[middle:]])


def _written_all(fd, data):
    assert coopos.write_all(fd, data) is None
    return len(data)


#: {name: (the call of coopos, that of os)} in the form read(fd, n) → bytes.
READS = {
    "read": (lambda fd, n: coopos.read(fd, n), os.read),
    "readv": (
        lambda fd, n: _into_two(coopos.readv, fd, n),
        lambda fd, n: _into_two(os.readv, fd, n),
    ),
    "readinto": (
        lambda fd, n: _into_one(coopos.readinto, fd, n),
        lambda fd, n: _into_one(readinto_by_os, fd, n),
    ),
}
#: The same in the form write(fd, data) → int.
WRITES = {
    "write": (lambda fd, data: coopos.write(fd, data), os.write),
    "writev": (
        lambda fd, data: _from_two(coopos.writev, fd, data),
        lambda fd, data: _from_two(os.writev, fd, data),
    ),
    "write_all": (_written_all, os.write),
}
if HAS_PREADV2:
    READS["preadv"] = (
        lambda fd, n: _into_two(lambda *args: coopos.preadv(*args, -1), fd, n),
        lambda fd, n: _into_two(lambda *args: os.preadv(*args, -1), fd, n),
    )
    WRITES["pwritev"] = (
        lambda fd, data: _from_two(lambda *args: coopos.pwritev(*args, -1), fd, data),
        lambda fd, data: _from_two(lambda *args: os.pwritev(*args, -1), fd, data),
    )

each_mode = pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])


# ---- kinds of descriptors ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Ends:
    """What comes out of *reader* once *feed* is called; for a kind that can be written, *writer* is where it goes in."""

    reader: int
    writer: int
    feed: Callable[..., bytes]  # makes the reader ready; what is to be read then, as far as it is known

    def set_blocking(self, blocking):
        for fd in {self.reader, self.writer}:
            os.set_blocking(fd, blocking)


def _stream(stack, reader, writer):
    stack.enter_context(closing(reader, writer))

    def feed(data=b"abc"):
        assert os.write(writer, data) == len(data)
        return data

    return Ends(reader, writer, feed)


def make_pipe_ends(stack, _path):
    return _stream(stack, *os.pipe())


def make_fifo_ends(stack, path):
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY)
    os.set_blocking(reader, True)
    return _stream(stack, reader, writer)


def make_master_ends(stack, _path):
    master, slave = os.openpty()
    tty.setraw(slave)
    return _stream(stack, master, slave)


def make_slave_ends(stack, _path):
    master, slave = os.openpty()
    tty.setraw(slave)
    return _stream(stack, slave, master)


def make_socket_ends(stack, _path):
    return _stream(stack, *(end.detach() for end in socket.socketpair()))


def make_datagram_ends(stack, _path):
    return _stream(stack, *(end.detach() for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)))


def make_tcp_ends(stack, _path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        reader = socket.create_connection(server.getsockname()).detach()
        connection, _address = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _stream(stack, reader, connection.detach())


def make_eventfd_ends(stack, _path):
    [fd] = stack.enter_context(closing(os.eventfd(0)))

    def feed(data=None):
        data = (3).to_bytes(8, sys.byteorder) if data is None else data
        os.write(fd, data)
        return data

    return Ends(fd, fd, feed)


libc = ctypes.CDLL(None, use_errno=True)
CLOCK_MONOTONIC = 1
IN_CREATE = 0x100


def make_timerfd_ends(stack, _path):
    [fd] = stack.enter_context(closing(libc.timerfd_create(CLOCK_MONOTONIC, 0)))

    def feed():
        """It expires at once, and never again."""
        assert libc.timerfd_settime(fd, 0, struct.pack("@qqqq", 0, 0, 0, 1), None) == 0
        return (1).to_bytes(8, sys.byteorder)

    return Ends(fd, fd, feed)


def make_inotify_ends(stack, path):
    [fd] = stack.enter_context(closing(libc.inotify_init()))
    os.mkdir(path)
    watch = libc.inotify_add_watch(fd, os.fsencode(path), IN_CREATE)
    assert watch > 0
    numbers = itertools.count()

    def feed():
        name = f"{next(numbers)}"
        with open(os.path.join(path, name), "x"):
            return struct.pack("=iIII16s", watch, IN_CREATE, 0, 16, name.encode())

    return Ends(fd, fd, feed)


def until_readable(fd):
    """Stand still until *fd* is ready. No greenlet runs."""
    assert select.select([fd], [], [], DEADLINE_S)[0]


@dataclasses.dataclass
class Kind:
    make: Callable
    is_available: bool = True
    reason: str = ""


KINDS = {
    "pipe": Kind(make_pipe_ends),
    "FIFO": Kind(make_fifo_ends),
    "pty master": Kind(make_master_ends),
    "pty slave": Kind(make_slave_ends),
    "socketpair": Kind(make_socket_ends),
    "TCP": Kind(make_tcp_ends),
    "datagrams": Kind(make_datagram_ends),
    "eventfd": Kind(make_eventfd_ends, hasattr(os, "eventfd"), "no eventfd here"),
    "timerfd": Kind(make_timerfd_ends, hasattr(libc, "timerfd_create"), "no timerfd here"),
    "inotify": Kind(make_inotify_ends, hasattr(libc, "inotify_init"), "no inotify here"),
}
#: Bytes in order, without boundaries, and an end.
STREAMS = ["pipe", "FIFO", "pty master", "pty slave", "socketpair", "TCP"]
#: Those a writer fills until it has to wait: the kernel moves what fills the others on by itself.
FILLABLE = ["pipe", "FIFO", "socketpair"]


def each_of(kinds, name="kind"):
    return pytest.mark.parametrize(
        name,
        [pytest.param(kind, marks=pytest.mark.skipif(not KINDS[kind].is_available, reason=KINDS[kind].reason)) for kind in kinds],
    )


each_kind = each_of(KINDS)
each_stream = each_of(STREAMS)

_numbers = itertools.count()


@contextlib.contextmanager
def make_ends(kind, tmp_path, blocking=True):
    """The Ends of one kind, both in blocking mode unless told otherwise; closed at the end if still open."""
    with contextlib.ExitStack() as stack:
        ends = KINDS[kind].make(stack, os.fspath(tmp_path / f"{kind.replace(' ', '-')}{next(_numbers)}"))
        ends.set_blocking(blocking)
        yield ends


@contextlib.contextmanager
def make_file(content=b"", directory=None, flags=os.O_RDWR):
    """A descriptor of a regular file with that content, at its beginning."""
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        file.write(content)
        file.flush()
        with closing(os.open(file.name, flags)) as (fd,):
            yield fd


def content_of(fd):
    """All that is in a regular file; its position stays."""
    return os.pread(fd, os.fstat(fd).st_size + 1, 0)


# ---- what another process sees -----------------------------------------------------------------------------------------------


class Observer:
    """A child that shares descriptors, and says which flags it sees; a context manager."""

    SOURCE = """if True:
        import fcntl, sys
        for line in sys.stdin:
            print(*(fcntl.fcntl(int(fd), fcntl.F_GETFL) for fd in line.split()), flush=True)
    """

    def __init__(self, *fds):
        self._fds = fds

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", self.SOURCE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=self._fds,
            text=True,
        )
        return self

    def __exit__(self, *exc_info):
        self._process.communicate(timeout=DEADLINE_S)

    def flags(self):
        """F_GETFL of each descriptor, as that process sees it. This thread stands still meanwhile."""
        print(*self._fds, file=self._process.stdin, flush=True)
        return [int(word) for word in self._process.stdout.readline().split()]


@contextlib.contextmanager
def rival_reader(fd):
    """A child process that reads *fd* byte by byte with read(2), in whatever mode it is; a function that says what it has got."""
    reports, report = os.pipe()
    source = "import os\nwhile True: os.write(1, os.read(0, 1))"
    with closing(reports):
        with closing(report):
            process = subprocess.Popen([sys.executable, "-I", "-S", "-c", source], stdin=fd, stdout=report)
        os.set_blocking(reports, False)
        got = bytearray()

        def received():
            with contextlib.suppress(BlockingIOError):
                while data := os.read(reports, 4096):
                    got.extend(data)
            return bytes(got)

        try:
            yield received
        finally:
            process.kill()
            process.wait(DEADLINE_S)


def flags_of(*fds):
    return [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in fds]


# ---- workers -----------------------------------------------------------------------------------------------------------------


class HeldPool:
    """The workers while none begins with anything that a disk is waited for; a context manager."""

    def __enter__(self):
        self._calls = _core.count_calls()
        self._limit = _core.set_limit(0)
        return self

    def __exit__(self, *exc_info):
        self.open()

    def open(self):
        """Let them go on."""
        _core.set_limit(self._limit)

    def until_held(self, greenlet):
        """Let the hub run until a call is queued; False if *greenlet* is over without one."""
        until(lambda: _core.count_calls() > self._calls or greenlet.ready())
        return not greenlet.ready()


class StandingWorkers:
    """The workers while they stand still just before the system call, which they have begun; a context manager."""

    def __enter__(self):
        assert _core.count_begun() == 0
        _core.hold(True)
        return self

    def __exit__(self, *exc_info):
        self.go_on()

    def go_on(self):
        _core.hold(False)

    def until_begun(self, greenlet, count=1):
        """Let the hub run until so many calls have begun; False if *greenlet* is over without."""
        until(lambda: _core.count_begun() >= count or greenlet.ready())
        return not greenlet.ready()


def until_workers_are_done():
    """Without a turn of the hub: the greenlets that wait for them don't know yet."""
    deadline = time.monotonic() + DEADLINE_S
    while _core.count_begun():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def let_threads_end():
    """Let the workers do all that they were given."""
    until(lambda: not _core.count_begun())


@contextlib.contextmanager
def frozen_hub_is_an_error():
    """Raise TookTooLong in whatever the main thread does DEADLINE_S from now, a system call in a frozen hub included."""

    def on_alarm(_signum, _frame):
        raise TookTooLong(f"the main thread stood still, or worked, for {DEADLINE_S} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- regular files and the page cache ----------------------------------------------------------------------------------------


def is_cached(fd):
    """Whether any page of a regular file is in the page cache: mincore(2)."""
    size = os.fstat(fd).st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with mmap.mmap(fd, size, access=mmap.ACCESS_COPY) as mapped:
        view = (ctypes.c_char * size).from_buffer(mapped)
        rc = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), pages)
        del view
    assert rc == 0
    return any(page & 1 for page in pages)


def drop_from_cache(fd):
    """Have the kernel forget the pages of a regular file; skip the test where it doesn't."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("no posix_fadvise here")
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if is_cached(fd):
        pytest.skip("this file system keeps its files in memory")


def tells_whether_cached(fd):
    """Whether the file system answers RWF_NOWAIT for this file, which is cached."""
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except (AttributeError, OSError):
        return False
    return True
