"""Programs that close all their descriptors, as daemons do, and go on with their greenlets."""

import importlib.util
import os
import sys

import gevent.os
import pytest

from ..helpers.support import run_script

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which descriptors the loop works with")

PROGRAM = """
import sys
from gevent import monkey
monkey.patch_all()
import errno, os, signal, subprocess, threading, time
import gevent, gevent.event, gevent.socket
import coopos
coopos.patch(io={io})
path = {path!r}


def one_by_one(low, high):
    for fd in range(low, high):
        try:
            os.close(fd)
        except OSError as ex:
            assert ex.errno == errno.EBADF


def pass_a_byte(read, write, send, receive):
    gevent.spawn_later(0.01, write, send, b"x")
    assert read(receive, 1) == b"x"


def use_all():
    '''Everything of gevent's and coopos' that has descriptors of its own.'''
    reader, writer = os.pipe()
    pass_a_byte(coopos.read, os.write, writer, reader)
    ours, theirs = gevent.socket.socketpair()
    pass_a_byte(gevent.socket.socket.recv, gevent.socket.socket.send, ours, theirs)
    assert gevent.get_hub().threadpool.apply(pow, (2, 3)) == 8
    assert subprocess.call(["sh", "-c", "exit 7"]) == 7
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    coopos.fsync(fd)
    os.close(fd)
    heard = gevent.event.Event()
    handler = gevent.signal_handler(signal.SIGUSR1, heard.set)
    gevent.spawn_later(0.01, os.kill, os.getpid(), signal.SIGUSR1)
    assert heard.wait(10)
    handler.cancel()
    in_child(gevent.sleep, 0.01)
    for fd in reader, writer:
        os.close(fd)
    for sock in ours, theirs:
        sock.close()


def in_child(function, *args):
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError as ex:
        assert ex.errno == errno.EBADF
        return False
    return True


def targets():
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            found += [os.readlink(f"/proc/self/fd/{{fd}}")] if fd > 2 else []
        except OSError:
            pass
    return found
"""


def run(script, path, io=True):
    run_script(PROGRAM.format(io=io, path=str(path)) + script)


CLOSING = ["os.closerange(3, 65536)", "os.closerange(3, 200); os.closerange(200, 1024)"]
# With libuv close() doesn't recognize all; an older gevent leaves os.close alone, and patch() with it.
if not os.environ.get("GEVENT_LOOP", "").startswith("libuv") and "close" in gevent.os.__implements__:
    CLOSING.append("one_by_one(3, 1024)")


@pytest.mark.parametrize("io", [False, True])
@pytest.mark.parametrize("closing", CLOSING)
def test_all_descriptors_are_closed(closing, io, tmp_path):
    """Before anything was used and after, here and in a child: the hub goes on, and the program's files are closed."""
    run(
        f"""
def close_all():
    file, (reader, writer) = open(os.devnull), os.pipe()
    ours, theirs = gevent.socket.socketpair()
    {closing}
    files = [target for target in targets() if not target.startswith("anon_inode:")]
    # libuv has two pipes.
    assert all(file.startswith("pipe:") for file in files), files
    assert len(files) == (4 if hasattr(gevent.get_hub().loop, "_io_watchers") else 0), files
    assert not any(map(is_open, [file.fileno(), reader, writer, ours.fileno(), theirs.fileno()]))
    closed.append((file, ours, theirs))
    use_all()


closed = []
gevent.get_hub()
in_child(close_all)
in_child(in_child, close_all)
close_all()
close_all()
use_all()
in_child(close_all)
close_all()
os._exit(0)
        """,
        tmp_path / "file",
        io,
    )


def test_waits_go_on_when_all_descriptors_are_closed(tmp_path):
    """Who waits for a program, a timer or a worker is woken; who waits for a file that was closed gets EBADF."""
    run(
        """
def error_of_read(fd):
    try:
        return coopos.read(fd, 1)
    except OSError as ex:
        return ex.errno


os.mkfifo(path)
reader, writer = os.pipe()
process = subprocess.Popen(["cat", path], stdout=subprocess.DEVNULL)
waiters = [gevent.spawn(process.wait), gevent.spawn(gevent.sleep, 0.1)]
failed = gevent.spawn(error_of_read, reader)
opener = gevent.spawn(os.open, path, os.O_RDONLY)
gevent.sleep(0.05)
os.closerange(3, 65536)
os.close(os.open(path, os.O_WRONLY))
gevent.joinall([*waiters, opener], raise_error=True)
assert failed.get() == errno.EBADF
        """,
        tmp_path / "fifo",
    )


def test_wait_for_a_process_when_all_descriptors_are_closed(tmp_path):
    """wait_exit() says so, and doesn't close another file that has got the number of its pidfd."""
    run(
        """
import posix


def error_of_wait_exit():
    try:
        coopos.wait_exit(pid)
    except OSError as ex:
        return ex.errno


pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
waiting = gevent.spawn(error_of_wait_exit)
gevent.sleep(0.05)
os.closerange(3, 65536)
files = [posix.open(os.devnull, os.O_RDONLY) for _ in range(20)]  # os.open lets others run
assert waiting.get() == errno.EBADF
assert all(map(is_open, files))
os.kill(pid, 9)
os.waitpid(pid, 0)
        """,
        tmp_path / "file",
    )


@pytest.mark.skipif(not hasattr(os, "eventfd"), reason="os has no eventfd")
def test_a_programs_own_event_counters_and_sets_are_closed(tmp_path):
    """Though they look like the loop's; also one that somebody waits for through gevent."""
    run(
        """
gevent.sleep(0.01)
plain_epoll = monkey.get_original("select", "epoll")
for close in os.close, lambda fd: os.closerange(fd, fd + 1):
    counter, epoll = os.eventfd(0), plain_epoll()
    numbers = counter, epoll.fileno()
    watcher = gevent.get_hub().loop.io(counter, 1)
    if close is os.close:
        watcher.start(print)
        gevent.sleep(0.01)
    for fd in numbers:
        close(fd)
    gevent.sleep(0.01)
    watcher.close()
    assert not any(map(is_open, numbers))
        """,
        tmp_path,
    )


@pytest.mark.skipif(importlib.util.find_spec("daemon") is None, reason="daemon is not installed")
@pytest.mark.parametrize("io", [False, True])
def test_python_daemon(io, tmp_path):
    """It forks twice and closes all descriptors; then a thread, a program, a pipe and greenlets work in the daemon."""
    run(
        """
import daemon
use_all()
log = path + ".log"
if os.fork() == 0:
    with daemon.DaemonContext(stderr=open(log, "w"), working_directory=os.getcwd()):
        use_all()
        thread = threading.Thread(target=use_all)
        thread.start()
        thread.join()
        print("well", file=sys.stderr, flush=True)
    os._exit(0)
deadline = time.monotonic() + 60
text = ""
while not text and time.monotonic() < deadline:
    gevent.sleep(0.01)
    if os.path.exists(log):
        with open(log) as file:
            text = file.read()
assert text == "well\\n", text
        """,
        tmp_path / "file",
        io,
    )
