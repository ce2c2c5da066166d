"""Files that can be waited for, and what to do with them."""

import contextlib
import io
import os
import pty
import socket
import tty

import coopos

from .support import active_watchers, closing, parked, result_of

BOTH = [io.FileIO, coopos.FileIO]


def pipe():
    return os.pipe()


def socket_pair():
    one, other = socket.socketpair()
    return one.detach(), other.detach()


def pty_pair():
    master, terminal = pty.openpty()
    tty.setraw(terminal)
    return terminal, master


@contextlib.contextmanager
def make_fifo(directory):
    path = directory / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with closing(reader, os.open(path, os.O_WRONLY)) as ends:
        os.set_blocking(reader, True)
        yield ends


@contextlib.contextmanager
def files(reader, writer):
    """The same as files, which are closed at the end, and close nothing."""
    with coopos.FileIO(reader, "r", closefd=False) as read, coopos.FileIO(writer, "w", closefd=False) as write:
        yield read, write


@contextlib.contextmanager
def pipe_files(blocking=False):
    """(reader, writer), files of a pipe that are its owners."""
    reader, writer = os.pipe()
    os.set_blocking(reader, blocking)
    os.set_blocking(writer, blocking)
    with coopos.FileIO(reader, "r") as read, coopos.FileIO(writer, "w") as write:
        yield read, write


def have_waited(file, write):
    """Let *file* wait once in this hub, and be woken."""
    write(b"1")
    assert file.read(100) == b"1"  # less than was asked for: the next one waits
    greenlet = parked(file.read, 100)
    write(b"22")
    assert result_of(greenlet) == b"22"


def io_watchers():
    return [watcher for watcher in active_watchers() if hasattr(watcher, "fd")]


FILES = {"pipe": pipe, "socket": socket_pair, "pty": pty_pair, "null": lambda: (os.open(os.devnull, os.O_RDWR), os.dup(1))}

#: Has both kinds of lock on a file until its input ends.
HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.flock(f, 2); fcntl.lockf(f, 2); print(flush=True); sys.stdin.read()"
