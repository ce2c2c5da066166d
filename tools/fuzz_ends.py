"""What fuzz.py's programs have: descriptors of every kind, each with a twin of the same kind, and a second thread with a hub."""

import fcntl
import os
import socket
import tempfile
import threading
from concurrent.futures import Future

import gevent
import gevent.event
from gevent.hub import get_hub

#: How long a call that has nothing to wait for may take.
LIMIT_S = 20
#: Twins have numbers from here on, so that those below are used again by coopos's side alone.
TWINS = 400


# ---- descriptors -------------------------------------------------------------------------------------------------------------


class End:
    """A descriptor and its twin. *file*: what it shares with other Ends, a file or the two ends of a stream."""

    def __init__(self, kind, ours, theirs, file, open_file=None):
        self.kind, self.ours, self.theirs, self.file = kind, ours, theirs, file
        self.open_file = open_file or object()     # what its copies share
        self.is_regular = kind in REGULAR

    @property
    def is_blocking(self):
        return os.get_blocking(self.ours)


REGULAR = ("file", "appended", "read-only", "memory")
ALWAYS_READY = (*REGULAR, "null", "zero", "directory")


def open_unnamed(flags=0):
    return os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | flags)


def make_pipes(size=None):
    fds = os.pipe()
    if size:
        fcntl.fcntl(fds[1], fcntl.F_SETPIPE_SZ, size)
    return fds


def make_fifo():
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "fifo")
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(path, os.O_WRONLY)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    return reader, writer


def make_sockets(kind=socket.SOCK_STREAM):
    ends = socket.socketpair(socket.AF_UNIX, kind)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 9000)
    return tuple(end.detach() for end in ends)


def make_file(flags=0):
    fd = open_unnamed(flags)
    os.pwrite(fd, bytes(range(256)) * 20, 0)
    return (fd,)


def make_read_only():
    [fd] = make_file()
    try:
        return (os.open(f"/proc/self/fd/{fd}", os.O_RDONLY),)
    finally:
        os.close(fd)


def make_memory():
    fd = os.memfd_create("fuzz")
    os.write(fd, bytes(range(100)) * 100)
    os.lseek(fd, 0, os.SEEK_SET)
    return (fd,)


MAKERS = {
    "pipe": lambda: make_pipes(4096),
    "large pipe": make_pipes,
    "FIFO": make_fifo,
    "socket": make_sockets,
    "datagram": lambda: make_sockets(socket.SOCK_DGRAM),
    "file": make_file,
    "appended": lambda: make_file(os.O_APPEND),
    "read-only": make_read_only,
    "memory": make_memory,
    "eventfd": lambda: (os.eventfd(0),),
    "null": lambda: (os.open("/dev/null", os.O_RDWR),),
    "zero": lambda: (os.open("/dev/zero", os.O_RDWR),),
    "directory": lambda: (os.open("/", os.O_RDONLY),),
}
#: By a byte: those that greenlets wait for have most.
KINDS = ["pipe", "pipe", "large pipe", "FIFO", "socket", "socket", "datagram", "eventfd", *MAKERS]


def moved_up(fd):
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, TWINS)
    finally:
        os.close(fd)


def make_ends(kind, is_blocking):
    ours = MAKERS[kind]()
    theirs = tuple(map(moved_up, MAKERS[kind]()))
    for fd in ours:
        os.set_blocking(fd, is_blocking)
    for fd in theirs:
        os.set_blocking(fd, False)
    file = object()
    return [End(kind, *pair, file) for pair in zip(ours, theirs, strict=True)]


# ---- threads -----------------------------------------------------------------------------------------------------------------


def run_until_idle():
    gevent.get_hub().loop.update_now()
    gevent.idle()
    gevent.idle()


class Here:
    """This thread's greenlets."""

    @staticmethod
    def call(function, *args):
        return function(*args)


class There:
    """Another thread, with a hub of its own."""

    def __init__(self):
        started = Future()
        self.thread = threading.Thread(target=self.run, args=(started,), daemon=True)
        self.thread.start()
        started.result(LIMIT_S)

    def run(self, started):
        hub = get_hub()
        self.posted = []
        self.news = hub.loop.async_()  # its send() is all of a loop that other threads may use
        self.news.start(self.run_posted)
        self.over = gevent.event.Event()
        started.set_result(None)
        self.over.wait()
        self.is_posted.wait(LIMIT_S)   # a loop must not be destroyed while it is being posted to
        self.news.stop()
        self.news.close()
        hub.destroy(destroy_loop=True)

    def run_posted(self):
        while self.posted:
            self.posted.pop(0)()

    def post(self, call):
        self.posted.append(call)
        self.news.send()

    def call(self, function, *args):
        future = Future()
        self.post(lambda: gevent.spawn(lambda: future.set_result(function(*args))))
        return future.result(LIMIT_S)

    def end(self):
        self.is_posted = threading.Event()
        self.post(self.over.set)
        self.is_posted.set()
        self.thread.join(LIMIT_S)


# ---- what is in them ---------------------------------------------------------------------------------------------------------


def content_of(fd):
    return os.pread(fd, 1 << 22, 0)


def rest_of(end, fd):
    if end.is_regular:
        return content_of(fd), os.lseek(fd, 0, os.SEEK_CUR)
    if end.kind in ALWAYS_READY:
        return None
    os.set_blocking(fd, False)
    try:
        return os.read(fd, 1 << 20)
    except OSError as ex:
        return ex.errno
