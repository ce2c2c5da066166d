"""The programs that faults.py runs while a system call fails: a few lines each, one process each.

``python fault_scenarios.py`` is a server. It has imported gevent and the standard library, and forks a process for each case, which
imports coopos then: a fresh interpreter for each would take ten times as long. faults.py tells it what to run, line by line.

A scenario is a function that makes the state it needs and returns its body. Only the body is under the fault: the process waits
for a signal before and after it, while faults.py lets strace in and out. What a scenario does for the other side of coopos' call
goes through surely(), which tries again, so that the fault can't break the scenario itself.
"""

import asyncio  # noqa: F401  multiprocessing and gevent ask for it when it is there
import concurrent.futures  # noqa: F401
import contextlib
import ctypes
import errno
import fcntl
import gc
import json
import multiprocessing
import multiprocessing.context
import multiprocessing.popen_fork
import multiprocessing.popen_spawn_posix
import multiprocessing.queues
import multiprocessing.synchronize
import os
import pty  # noqa: F401
import resource  # noqa: F401
import select
import signal
import socket
import subprocess  # noqa: F401
import sys
import tempfile
import termios
import threading
import time
import traceback
import tty

import gevent
import gevent.monkey
import gevent.subprocess
import greenlet

#: The process waits for it before and after the body. No other code sends it.
MARK = signal.SIGUSR1
#: How long what a scenario has started may take to end by itself.
END_S = 5

SCENARIOS = {}
SETTINGS = {}
coopos = core = None


def scenario(function=None, **settings):
    """Register a scenario; *settings* go into the environment before coopos is imported."""

    def register(function):
        SCENARIOS[function.__name__] = function
        SETTINGS[function.__name__] = settings
        return function

    return register if function is None else register(function)


# ---- what scenarios use ------------------------------------------------------------------------------------------------------

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


# ---- reading and writing -----------------------------------------------------------------------------------------------------


@scenario
def read_pipe_parked(stack):
    reader, writer = make_pipe(stack, blocking=False)
    return helped(lambda: coopos.read(reader, 10), os.write, writer, b"x")


@scenario
def read_pipe_ready(stack):
    reader, writer = make_pipe(stack)
    os.write(writer, b"ready")
    return lambda: (coopos.nb_read(reader, 2), coopos.readinto(reader, bytearray(2)), coopos.tp_read(reader, 1))


@scenario
def read_socket_parked(stack):
    here, there = make_socket(stack)
    return helped(lambda: coopos.readv(here, [bytearray(1), bytearray(1)]), os.write, there, b"x")


@scenario(COOPOS_NOWAIT="0")
def read_socket_dontwait(stack):
    here, there = make_socket(stack)
    return helped(lambda: (coopos.read(here, 10), coopos.write(here, b"abc")), os.write, there, b"x")


@scenario
def read_fifo_guarded(stack):
    path = make_fifo(stack)
    [fd] = kept(stack, os.open(path, os.O_RDWR))
    return helped(lambda: coopos.read(fd, 10), os.write, fd, b"x")


@scenario
def write_fifo_guarded(stack):
    [fd] = kept(stack, os.open(make_fifo(stack), os.O_RDWR))
    size = clog(fd)

    def body():
        draining(fd, size)
        return coopos.write(fd, b"x" * 5000)

    return body


@scenario
def read_terminal(stack):
    master, slave = make_terminal(stack)
    return helped(lambda: coopos.read(slave, 10), os.write, master, b"x")


@scenario
def write_terminal(stack):
    master, slave = make_terminal(stack)
    os.set_blocking(master, False)

    def body():
        draining(master, 6000)
        return coopos.write(slave, b"x" * 6000)

    return body


@scenario
def read_terminal_vmin(stack):
    master, slave = make_terminal(stack)
    mode = termios.tcgetattr(slave)
    mode[6][termios.VMIN] = 3
    mode[6][termios.VTIME] = 1
    termios.tcsetattr(slave, termios.TCSANOW, mode)
    return helped(lambda: coopos.read(slave, 10), os.write, master, b"xyz")


@scenario
def read_inotify(stack):
    libc = ctypes.CDLL(None)
    path = make_path(stack)
    [fd] = kept(stack, libc.inotify_init())
    libc.inotify_add_watch(fd, path.encode(), 2)

    def body():
        beside(os.truncate, path, 1)
        return len(coopos.read(fd, 4096))

    return body


@scenario
def read_eventfd(stack):
    [fd] = kept(stack, os.eventfd(0, os.EFD_NONBLOCK))
    return helped(lambda: (coopos.eventfd_read(fd), coopos.eventfd_write(fd, 1)), os.eventfd_write, fd, 3)


@scenario
def read_timed_out(stack):
    reader, _writer = make_pipe(stack)

    def body():
        with gevent.Timeout(0.01, False):
            coopos.read(reader, 1)
        return "over"

    return body


@scenario(COOPOS_NOWAIT="0")
def read_file_in_worker(stack):
    fd = make_file(stack, b"0123456789")

    def body():
        first = coopos.read(fd, 3), coopos.pread(fd, 2, 5), coopos.tp_read(fd, 2)
        return first, os.lseek(fd, 0, os.SEEK_CUR)

    return body


@scenario(COOPOS_NOWAIT="0")
def write_file_in_worker(stack):
    fd = make_file(stack)

    def body():
        return coopos.write(fd, b"abc"), coopos.pwritev(fd, [b"d", b"e"], 1), coopos.tp_write(fd, b"f"), os.fstat(fd).st_size

    return body


@scenario
def read_and_write_file(stack):
    fd = make_file(stack, b"0123456789")
    return lambda: (coopos.read(fd, 3), coopos.pwrite(fd, b"ab", 5), coopos.pread(fd, 5, 3), coopos.preadv(fd, [bytearray(4)], 8))


@scenario
def write_pipe_parked(stack):
    reader, writer = make_pipe(stack)
    size = clog(writer)

    def body():
        draining(reader, size + 100_000)
        return coopos.write_all(writer, b"x" * 100_000)

    return body


@scenario
def write_pipe_parked_nonblocking(stack):
    reader, writer = make_pipe(stack)
    size = clog(writer)
    os.set_blocking(writer, False)

    def body():
        draining(reader, size)
        return coopos.nb_write(writer, b"x") == 1

    return body


@scenario
def many_parked(stack):
    pipes = [make_pipe(stack, blocking=False) for _ in range(5)]

    def body():
        waiting = [gevent.spawn(coopos.read, reader, 1) for reader, _ in pipes]
        helpers.extend(waiting)
        gevent.sleep(0)
        for _, writer in pipes:
            beside(os.write, writer, b"x")
        return [each.get(timeout=END_S) for each in waiting]

    return body


@scenario
def kill_parked(stack):
    reader, _writer = make_pipe(stack)
    return lambda: killed(parked(coopos.read, reader, 1))


@scenario(COOPOS_SETS="watchers")
def read_by_watchers(stack):
    reader, writer = make_pipe(stack)
    return helped(lambda: coopos.read(reader, 10), os.write, writer, b"x")


# ---- close -------------------------------------------------------------------------------------------------------------------


@scenario
def close_under_waiter(stack):
    reader, _writer = make_pipe(stack)

    def body():
        waiting = parked(until_closed, coopos.read, reader, 1)
        coopos.close(reader)
        return waiting.get(timeout=END_S)

    return body


@scenario
def close_under_worker(stack):
    path = make_path(stack)
    writer = make_lock_holder(stack, path, lambda fd: fcntl.flock(fd, fcntl.LOCK_EX))
    [fd] = kept(stack, os.open(path, os.O_RDWR))

    def body():
        waiting = parked(until_closed, coopos.flock, fd, fcntl.LOCK_EX)
        coopos.close(fd)
        result = waiting.get(timeout=END_S)
        surely(os.close, writer)
        return result

    return body


@scenario
def close_under_watcher(stack):
    reader, _writer = make_pipe(stack, blocking=False)
    watcher = gevent.get_hub().loop.io(reader, 1)
    stack.callback(watcher.close)
    stack.callback(watcher.stop)

    def body():
        watcher.start(lambda: None)
        coopos.close(reader)
        watcher.stop()
        gevent.sleep(0.01)

    return body


@scenario
def close_range(stack):
    fds = kept(stack, *(os.dup(0) for _ in range(4)))
    return lambda: coopos.closerange(min(fds), max(fds) + 1)


# ---- files -------------------------------------------------------------------------------------------------------------------


@scenario
def sync_file(stack):
    fd = make_file(stack, b"abc")

    def body():
        coopos.fsync(fd), coopos.fdatasync(fd), coopos.ftruncate(fd, 2), coopos.posix_fallocate(fd, 0, 10)
        return os.fstat(fd).st_size

    return body


@scenario
def truncate_path(stack):
    path = make_path(stack, b"abc")

    def body():
        coopos.truncate(path, 1)
        return os.stat(path).st_size

    return body


@scenario
def transfer(stack):
    source, target = make_file(stack, b"0123456789"), make_file(stack)
    here, there = make_socket(stack)
    reader, writer = make_pipe(stack)

    def body():
        done = coopos.copy_file_range(source, target, 4, 0, 0), coopos.sendfile(here, source, 2, 3)
        done += coopos.splice(source, writer, 5, offset_src=1), coopos.read(there, 10), coopos.read(reader, 10)
        return done

    return body


@scenario
def sendfile_to_clogged(stack):
    source = make_file(stack, b"0123456789")
    reader, writer = make_pipe(stack)
    size = clog(writer)

    def body():
        draining(reader, size)
        return coopos.sendfile(writer, source, 0, 10)

    return body


@scenario
def random_bytes(stack):
    return lambda: (len(coopos.urandom(8)), len(coopos.getrandom(8)))


@scenario
def open_file(stack):
    path = make_path(stack, b"abc")

    def body():
        fd = coopos.open(path, os.O_RDONLY)
        try:
            return coopos.read(fd, 10)
        finally:
            surely(os.close, fd)

    return body


@scenario
def open_fifo(stack):
    path = make_fifo(stack)

    def open_other_end():
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    def body():
        helper = gevent.spawn(surely_later, open_other_end)
        helpers.append(helper)
        fd = coopos.open(path, os.O_RDONLY)
        surely(os.close, fd)

    return body


def surely_later(function):
    """surely(), until it succeeds or a second is over: ENXIO, until the worker is in its open(2)."""
    for _ in range(300):
        with contextlib.suppress(OSError):
            return function()
        gevent.sleep(0.003)
    return None


@scenario
def open_fifo_killed(stack):
    path = make_fifo(stack)
    return lambda: killed(parked(coopos.open, path, os.O_RDONLY))


@scenario
def flock_contended(stack):
    path = make_path(stack)
    writer = make_lock_holder(stack, path, lambda fd: fcntl.flock(fd, fcntl.LOCK_EX))
    [fd] = kept(stack, os.open(path, os.O_RDWR))
    return helped(lambda: coopos.flock(fd, fcntl.LOCK_EX), os.close, writer)


@scenario
def lockf_contended(stack):
    path = make_path(stack)
    writer = make_lock_holder(stack, path, lambda fd: os.lockf(fd, os.F_LOCK, 0))
    [fd] = kept(stack, os.open(path, os.O_RDWR))
    return helped(lambda: coopos.lockf(fd, os.F_LOCK, 0), os.close, writer)


@scenario
def lockf_killed(stack):
    path = make_path(stack)
    make_lock_holder(stack, path, lambda fd: os.lockf(fd, os.F_LOCK, 0))
    [fd] = kept(stack, os.open(path, os.O_RDWR))
    return lambda: killed(parked(coopos.lockf, fd, os.F_LOCK, 0))


@scenario
def fileio(stack):
    path = make_path(stack, b"0123456789")

    def body():
        with coopos.FileIO(path, "r+") as file:
            return file.read(3), file.write(b"ab"), file.seek(0), file.readall(), file.truncate(2)

    return body


@scenario
def fdopen_lines(stack):
    reader, writer = os.pipe()
    kept(stack, reader, writer)

    def body():
        beside(os.write, writer, b"one\ntwo\n")
        with coopos.fdopen(reader, "r", closefd=False) as file:
            first = file.readline()
        with coopos.fdopen(writer, "wb", closefd=False) as file:
            file.write(b"three")
        return first

    return body


# ---- children ----------------------------------------------------------------------------------------------------------------


@scenario
def fork_and_wait(stack):
    return lambda: coopos.waitpid(forked(), 0)[1]


@scenario(COOPOS_CHILDREN="thread")
def fork_and_wait_by_thread(stack):
    return lambda: coopos.waitpid(forked(), 0)[1]


@scenario
def fork_and_watch(stack):
    def body():
        told = gevent.event.Event()
        pid = coopos.fork_and_watch(lambda child: told.set())
        if pid == 0:
            exits(7)
        told.wait(END_S)
        return coopos.waitpid(pid, 0)[1], told.is_set()

    return body


@scenario
def fork_without_greenlets(stack):
    waiting = gevent.spawn(gevent.sleep, 1000)
    stack.callback(waiting.kill)

    def body():
        pid = coopos.fork(keep_greenlets=False)
        if pid == 0:
            gevent.sleep(0)
            exits(7)
        return coopos.waitpid(pid, 0)[1]

    return body


@scenario
def wait_for_killed(stack):
    pid = make_sleeper(stack)
    return helped(lambda: coopos.waitpid(pid, 0)[1], os.kill, pid, signal.SIGKILL)


@scenario
def wait_for_any(stack):
    pid = make_sleeper(stack)
    return helped(lambda: (coopos.wait()[1], forked() > 0, coopos.wait3(0)[1]), os.kill, pid, signal.SIGKILL)


@scenario
def wait_family(stack):
    def body():
        pid = forked()
        found = coopos.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT).si_status
        return found, coopos.wait4(pid, 0)[1]

    return body


@scenario
def wait_for_stop(stack):
    pid = make_sleeper(stack)

    def body():
        beside(os.kill, pid, signal.SIGSTOP)
        stopped = coopos.waitpid(pid, os.WUNTRACED)[1]
        surely(os.kill, pid, signal.SIGCONT)
        return stopped, coopos.waitpid(pid, os.WCONTINUED)[1]

    return body


@scenario
def wait_killed(stack):
    pid = make_sleeper(stack)
    return lambda: killed(parked(coopos.waitpid, pid, 0))


@scenario
def wait_without_hub(stack):
    pid = make_sleeper(stack)
    result = []

    def wait():
        try:
            result.append(coopos.waitpid(pid, 0)[1])
        except BaseException as ex:
            result.append(ex)

    def body():
        thread = threading.Thread(target=wait, daemon=True)
        surely(thread.start)
        surely(os.kill, pid, signal.SIGKILL)
        thread.join(END_S)
        [status] = result
        if isinstance(status, BaseException):
            raise status
        return status

    return body


@scenario
def wait_for_foreign(stack):
    pid = make_sleeper(stack)
    return helped(lambda: coopos.wait_exit(pid), os.kill, pid, signal.SIGKILL)


@scenario
def spawn(stack):
    return lambda: coopos.spawnv(os.P_WAIT, "/bin/true", ["true"])


class SystemFailed(Exception):
    """system(3) returns -1 for any error."""


@scenario
def system(stack):
    def body():
        status = coopos.system("exit 3")
        if status == -1:
            raise SystemFailed
        return status

    return body


@scenario
def posix_spawn(stack):
    return lambda: coopos.waitpid(coopos.posix_spawn("/bin/true", ["true"], os.environ), 0)[1]


@scenario
def popen_function(stack):
    def body():
        with coopos.popen("echo x") as file:
            return file.read()

    return body


@scenario
def run_program(stack):
    def body():
        done = coopos.subprocess.run(["cat"], input=b"abc", capture_output=True, timeout=END_S)
        return done.returncode, done.stdout, done.stderr

    return body


@scenario
def popen_killed(stack):
    def body():
        with coopos.subprocess.Popen(["sleep", "60"]) as process:
            try:
                process.wait(0.01)
            except coopos.subprocess.TimeoutExpired:
                pass
            finally:
                surely(process.kill)
        return process.returncode

    return body


@scenario
def popen_preexec(stack):
    return lambda: coopos.subprocess.call(["/bin/true"], preexec_fn=os.getpid)


@scenario
def popen_terminal(stack):
    def body():
        with coopos.subprocess.Popen(["echo", "x"], pty=True) as process:
            result = coopos.read_pty(process.pty.fileno() if hasattr(process.pty, "fileno") else process.pty, 100)
            process.wait()  # before the terminal is closed, which ends it
        return result, process.returncode

    return body


@scenario
def forkpty(stack):
    def body():
        pid, fd = coopos.forkpty()
        if pid == 0:
            surely(os.write, 1, b"x")
            exits(7)
        try:
            return coopos.read_pty(fd, 100), coopos.waitpid(pid, 0)[1]
        finally:
            surely(os.close, fd)

    return body


def patched():
    gevent.monkey.patch_all()
    coopos.patch()


@scenario
def multiprocessing_lock(stack):
    patched()
    context = multiprocessing.get_context("fork")
    lock = context.Lock()

    def body():
        lock.acquire()
        waiting = gevent.spawn(lock.acquire)
        helpers.append(waiting)
        gevent.sleep(0.005)
        surely(lock.release)
        return waiting.get(timeout=END_S)

    return body


@scenario
def multiprocessing_pipe(stack):
    patched()
    here, there = multiprocessing.Pipe()
    stack.callback(here.close)
    stack.callback(there.close)

    def body():
        helpers.append(gevent.spawn(here.recv))
        gevent.sleep(0)
        there.send("x" * 100)
        return len(helpers[-1].get(timeout=END_S))

    return body


@scenario
def multiprocessing_process(stack):
    patched()
    context = multiprocessing.get_context("fork")

    def body():
        process = context.Process(target=exits, args=(7,))
        try:
            process.start()
            process.join(END_S)
            return process.exitcode
        finally:
            if process.pid:
                surely(process.join, END_S)
            surely(process.close)

    return body


# ---- one case ----------------------------------------------------------------------------------------------------------------


def mark():
    """Wait until faults.py has let strace in, or out."""
    signal.sigwait({MARK})


def open_fds():
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return {fd: target for fd, target in found.items() if not (target.startswith("/proc/") and target.endswith("/fd"))}


def timers():
    with contextlib.suppress(OSError), open("/proc/self/timers") as file:
        return sum(line.startswith("ID:") for line in file)
    return 0


def greenlets():
    return {id(each): each for each in gc.get_objects() if isinstance(each, greenlet.greenlet) and not each.dead}


def state():
    return {
        "fds": open_fds(),
        "timers": timers(),
        "threads": set(os.listdir("/proc/self/task")),
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "greenlets": greenlets(),
    }


def described(ex):
    return {
        "class": type(ex).__name__,
        "errno": getattr(ex, "errno", None),
        "message": str(ex),
        "where": "".join(traceback.format_exception(type(ex), ex, ex.__traceback__))[-3000:],
    }


def leftovers(before):
    """What there is now that was not there *before*: a list of sentences."""
    left = []
    deadline = time.monotonic() + END_S
    core.end_workers()
    gevent.idle()
    gevent.idle()
    while set(os.listdir("/proc/self/task")) - before["threads"] and time.monotonic() < deadline:
        gevent.sleep(0.002)
    gc.collect()
    now = state()
    # The set of the hub, which stays until the thread ends.
    sets = [fd for fd, target in now["fds"].items() if target == "anon_inode:[eventpoll]" and fd not in before["fds"]]
    for fd, target in now["fds"].items():
        # /dev/urandom is the interpreter's, which keeps it open.
        if before["fds"].get(fd) != target and fd not in sets[:1] and target != "/dev/urandom":
            left.append(f"descriptor {target.split(':')[0]} {target}")
    left += [f"closed {target}" for fd, target in before["fds"].items() if fd not in now["fds"]]
    left += ["timer"] * (now["timers"] - before["timers"])
    left += ["thread"] * len(now["threads"] - before["threads"])
    if now["mask"] != before["mask"]:
        left.append(f"signal mask {sorted(now['mask'] ^ before['mask'])}")
    hub = gevent.get_hub()
    for each in set(now["greenlets"]) - set(before["greenlets"]):
        if now["greenlets"][each] not in (hub, hub.parent, greenlet.getcurrent()):
            left.append(f"greenlet {now['greenlets'][each]!r}"[:200])
    while True:
        try:
            pid, _status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        left.append(f"child {'zombie' if pid else 'running'}")
        if not pid:
            break
    return left


def probe():
    """Whether the hub is alive: a parked read, a worker and a child come to their ends."""
    with gevent.Timeout(END_S):
        reader, writer = os.pipe()
        helper = gevent.spawn(os.write, writer, b"x")
        assert coopos.read(reader, 1) == b"x"
        helper.join()
        coopos.posix_fallocate(multiprobe, 0, 1)
        assert coopos.waitpid(forked(), 0)[1] == 7 << 8
        os.close(reader)
        os.close(writer)


multiprobe = None


def run_case(scenario_name, result_path):
    global coopos, core, multiprobe
    errors = []
    hub = gevent.get_hub()
    hub.handle_error = lambda context, type, value, tb: errors.append(described(value))
    hub.loop.run_callback_threadsafe(lambda: None)
    gevent.sleep(0.001)
    os.environ.update(SETTINGS[scenario_name])
    # All of it now: an import is the interpreter's.
    import coopos
    import coopos._copying
    import coopos._programs
    import coopos.io
    import coopos.subprocess
    from coopos import _core as core

    for name in coopos.__all__:
        getattr(coopos, name)

    multiprobe = os.open(result_path + ".probe", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    parent = os.getpid()
    stack = contextlib.ExitStack()
    gc.freeze()  # what is there already is not gone through again
    gc.enable()
    before = state()
    body = SCENARIOS[scenario_name](stack)
    mark()
    result = {}
    try:
        result["value"] = repr(body())
    except BaseException as ex:
        if os.getpid() != parent:
            traceback.print_exc()
            os._exit(99)
        result["raised"] = described(ex)
    if os.getpid() != parent:
        os._exit(98)
    mark()
    began = time.monotonic()
    try:
        gevent.killall(drains)
        drains.clear()
        gevent.joinall(helpers, timeout=2)
        result["stuck"] = [repr(each) for each in helpers if not each.dead]
        gevent.killall(helpers)
        helpers.clear()
        stack.close()
        if "value" not in result:
            for pid in filter(None, forks):
                with contextlib.suppress(OSError):
                    coopos.waitpid(pid, 0)
        body = stack = None
        gevent.idle()
        probe()
        result["alive"] = True
        result["left"] = leftovers(before)
    except BaseException as ex:
        result["check"] = described(ex)
    result["errors"] = errors
    result["took"] = time.monotonic() - began
    with open(result_path + ".new", "w") as file:
        json.dump(result, file)
    os.rename(result_path + ".new", result_path)


def child(name, result_path):
    import faulthandler

    os.setsid()
    libc = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    libc.prctl(0x59616D61, -1, 0, 0, 0)  # PR_SET_PTRACER: anybody
    signal.pthread_sigmask(signal.SIG_BLOCK, {MARK})
    log = os.open(result_path + ".err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    status = 1
    try:
        run_case(name, result_path)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


# ---- the server --------------------------------------------------------------------------------------------------------------


def children_of_this():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def end_all():
    """Kill and collect all that is left of a case, also what has left its session: it becomes this process's child."""
    statuses = {}
    while True:
        for pid in children_of_this():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return statuses
        statuses[pid] = status


def serve():
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    gc.disable()
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "run":
            pid = os.fork()
            if pid == 0:
                child(*arguments)
            print(pid, flush=True)
        elif command == "status":
            pid, status = os.waitpid(int(arguments[0]), 0)
            end_all()
            print(status, flush=True)
        else:
            end_all()
            print(flush=True)


if __name__ == "__main__":
    serve()
