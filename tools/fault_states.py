"""What the scenarios of faults.py use: their registry, the states that they begin in, and the other side of a call.

What a scenario does for the other side of coopos' call goes through surely(), which tries again, so that the fault can't break the
scenario itself.
"""

import contextlib
import errno
import os
import select
import signal
import socket
import sys
import tempfile
import time
import tty

import gevent

#: How long what a scenario has started may take to end by itself.
END_S = 5

SCENARIOS = {}
SETTINGS = {}


def scenario(function=None, **settings):
    """Register a scenario; *settings* go into the environment before coopos is imported."""

    def register(function):
        SCENARIOS[function.__name__] = function
        SETTINGS[function.__name__] = settings
        return function

    return register if function is None else register(function)


class Coopos:
    """The package. Each case's process imports it (run_case() in fault_server.py), and none before."""

    def __getattr__(self, name):
        return getattr(sys.modules["coopos"], name)


coopos = Coopos()


# ---- both sides of a call ----------------------------------------------------------------------------------------------------

helpers = []
forks = []      # children whose status the body may not have got
drains = []     # helpers that needn't come to their ends


def surely(function, *args):
    """function(*args), again if it fails: for the other side of a call."""
    for _ in range(40):
        try:
            return function(*args)
        except (OSError, RuntimeError, MemoryError):
            gevent.sleep(0)
    return None


def beside(function, *args):
    """Do ``function(*args)`` surely in another greenlet, once this one gives way."""
    helpers.append(gevent.spawn(surely, function, *args))
    return helpers[-1]


def helped(call, function, *args):
    """A body: ``call()``, and function(*args) beside it."""

    def body():
        beside(function, *args)
        return call()

    return body


def close(fd, target):
    """Close *fd* if it still is what it was: its number may have been used again."""
    with contextlib.suppress(OSError):
        if os.readlink(f"/proc/self/fd/{fd}") == target:
            os.close(fd)


def kept(stack, *fds):
    for fd in fds:
        stack.callback(close, fd, os.readlink(f"/proc/self/fd/{fd}"))
    return fds


def make_pipe(stack, blocking=True):
    fds = kept(stack, *os.pipe())
    for fd in fds:
        os.set_blocking(fd, blocking)
    return fds


def make_socket(stack):
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(True)
        stack.callback(end.close)
    return ends[0].fileno(), ends[1].fileno()


def make_terminal(stack, raw=True):
    """(master, slave) of a pseudoterminal in blocking mode."""
    master, slave = kept(stack, *os.openpty())
    if raw:
        tty.setraw(slave)
    return master, slave


def make_directory(stack):
    return stack.enter_context(tempfile.TemporaryDirectory())


def make_path(stack, data=b""):
    path = os.path.join(make_directory(stack), "file")
    with open(path, "wb") as file:
        file.write(data)
    return path


def make_file(stack, data=b"", flags=os.O_RDWR):
    [fd] = kept(stack, os.open(make_path(stack, data), flags))
    return fd


def make_fifo(stack):
    path = os.path.join(make_directory(stack), "fifo")
    os.mkfifo(path)
    return path


def clog(fd):
    os.set_blocking(fd, False)
    size = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            size += os.write(fd, bytes(4096))
    os.set_blocking(fd, True)
    return size


def draining(fd, size):
    """Have another greenlet drain *fd* of *size* bytes, if so many come."""
    drains.append(gevent.spawn(drain, fd, size))


def drain(fd, size):
    while size:
        piece = None
        with contextlib.suppress(OSError):
            if select.select([fd], [], [], 0)[0]:
                piece = os.read(fd, min(size, 65536))
        if piece is None:
            gevent.sleep(0.001)
        elif not piece:
            return
        else:
            size -= len(piece)


def make_sleeper(stack, how_long=60):
    """A child that lives until it is killed."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            time.sleep(how_long)
        os._exit(1)

    def end():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    stack.callback(end)
    return pid


def make_lock_holder(stack, path, lock):
    """A process that has lock(fd) of the file *path*, and gives it up when the descriptor returned is closed."""
    reader, writer = kept(stack, *os.pipe())
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.close(writer)
            lock(os.open(path, os.O_RDWR))
            os.write(tell, b"x")
            os.read(reader, 1)
        os._exit(0)
    os.read(told, 1)
    os.close(told)
    os.close(tell)
    stack.callback(os.waitpid, pid, 0)
    kept(stack, writer)
    return writer


def exits(status):
    """In a forked child: end it."""
    os._exit(status)


def forked(fork=None, status=7):
    try:
        pid = (fork or coopos.fork)()
    except BaseException as ex:
        forks.append(getattr(ex, "pid", 0))     # a child that can't be watched
        raise
    if pid == 0:
        exits(status)
    forks.append(pid)
    return pid


def killed(greenlet):
    greenlet.kill()
    return greenlet.dead


def parked(function, *args):
    """A greenlet in ``function(*args)``, which has run until it waits. What it raises but a kill is raised in the body."""
    helpers.append(gevent.spawn(function, *args))
    gevent.sleep(0)
    gevent.sleep(0.002)
    return helpers[-1]


def until_closed(function, *args):
    """function(*args), and True if a close ends it, which is right."""
    try:
        return function(*args)
    except OSError as ex:
        if ex.errno != errno.EBADF:
            raise
        return True
