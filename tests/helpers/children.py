"""Children to wait for, in the state that a test needs; and what this kernel can tell of them.

They are programs started by posix_spawn, so that most tests need no interpreter of their own.
"""

import contextlib
import errno
import functools
import gc
import os
import shutil
import signal
import struct
import sys

import psutil
import pytest

import coopos
from coopos import testing

from .support import HAS_WAITED, closing, error_of, run_script, until

no_child = (ChildProcessError, errno.ECHILD)
STATUS = 7 << 8  # of every child here, unless the test says otherwise
OWN_GROUP = {"setpgroup": 0}


def has_pidfds():
    """Whether coopos may wait by pidfd: the kernel has them, and the environment doesn't forbid it."""
    if os.environ.get("COOPOS_CHILDREN") == "thread" or not hasattr(os, "pidfd_open"):
        return False
    with contextlib.suppress(OSError):
        os.close(os.pidfd_open(os.getpid()))
        return True
    return False


def tells_reaped_status():
    """Whether this kernel tells, by a pidfd, the status of a process that was waited for."""
    fcntl = pytest.importorskip("fcntl")
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], os.environ)
    pidfd = os.pidfd_open(pid)
    with closing(pidfd):
        os.waitpid(pid, 0)
        info = bytearray(struct.pack("=Q56x", 1 << 3))  # PIDFD_INFO_EXIT
        with contextlib.suppress(OSError):
            fcntl.ioctl(pidfd, (3 << 30) | (len(info) << 16) | (0xFF << 8) | 11, info)  # PIDFD_GET_INFO
            return bool(struct.unpack_from("=Q", info)[0] & 1 << 3)
    return False


def waits_by_pidfd():
    """Whether the kernel has pidfds, and waitid(2) takes them."""
    if not (hasattr(os, "pidfd_open") and hasattr(os, "P_PIDFD")):
        return False
    # Of another process's it says that it is no child of ours, and not that it knows no such call or idtype.
    with contextlib.suppress(OSError), closing(os.pidfd_open(os.getppid())) as (pidfd,):
        return error_of(os.waitid, os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) == no_child
    return False


HAS_PIDFDS = has_pidfds()
TELLS_REAPED_STATUS = HAS_PIDFDS and tells_reaped_status()
needs_pidfds = pytest.mark.skipif(not HAS_PIDFDS, reason="no pidfds here, or COOPOS_CHILDREN=thread")
needs_reaped_status = pytest.mark.skipif(not TELLS_REAPED_STATUS, reason="the kernel doesn't tell the status of a reaped child")
#: Of the kernel alone, whatever coopos may use.
HAS_P_PIDFD = waits_by_pidfd()
needs_p_pidfd = pytest.mark.skipif(not HAS_P_PIDFD, reason="the kernel has no pidfds, or doesn't wait by them")
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")


# ---- the states a child can be in --------------------------------------------------------------------------------------------


def spawn_sh(spawn, script, **kwargs):
    return spawn("/bin/sh", ["sh", "-c", script], os.environ, **kwargs)


@contextlib.contextmanager
def living_child(spawn=coopos.posix_spawn, script="read line; exit 7", watch=None, **kwargs):
    """(pid, end): a child, watched if *spawn* is coopos's or by the arguments *watch*; it ends once end() is called."""
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, writer)
        with closing(reader):
            pid = start(spawn, script, watch, file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0)], **kwargs)
        try:
            yield pid, stack.close
        except BaseException:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                coopos.waitpid(pid, 0)
            raise


def start(spawn, script, watch=None, **kwargs):
    if watch is None:
        return spawn_sh(spawn, script, **kwargs)
    return coopos.fork_and_watch(**watch, fork=lambda: spawn_sh(os.posix_spawn, script, **kwargs))


def spawn_in(thread, spawn=coopos.posix_spawn):
    """A *spawn* for living_child that starts the child in another thread."""
    return lambda *args, **kwargs: thread.call(functools.partial(spawn, *args, **kwargs))


def until_dead(pid):
    """Stand still until a child is dead. It stays a zombie, and no greenlet runs."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def until_stopped(pid):
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def dead_child(spawn=coopos.posix_spawn, script="exit 7", watch=None, **kwargs):
    """The pid of a child that is dead, and of which the hub knows nothing yet."""
    pid = start(spawn, script, watch, **kwargs)
    until_dead(pid)
    return pid


def collected_child():
    """The pid of a watched child whose end the hub has noticed, and whose status nobody has asked for."""
    ended = []
    pid = start(os.posix_spawn, "exit 7", {"callback": ended.append})
    until(lambda: ended)
    return pid


def waited_child():
    """The pid of a child that has been waited for."""
    pid = coopos.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], os.environ)
    assert coopos.waitpid(pid, 0) == (pid, STATUS)
    return pid


def thread_ids():
    """Of this process's threads, those included that Python knows nothing of."""
    return {thread.id for thread in psutil.Process().threads()}


def count_questions():
    """How many questions about children workers are putting to the kernel; no worker has anything else to do meanwhile."""
    return coopos._core.count_begun()


def questions():
    """Those questions themselves, and others that somebody waits for."""
    return [each for each in gc.get_objects() if type(each).__name__ == "Question"]


both_spawns = pytest.mark.parametrize("spawn", [coopos.posix_spawn, os.posix_spawn], ids=["watched", "unwatched"])


class Gate:
    """A FIFO that a shell command stands at, with ``read line < path``, until it is let through."""

    def __init__(self, path):
        os.mkfifo(path)
        self.wait = f"read line < {path}"
        # Open at both ends, so that nobody waits for it to be opened.
        self._fd = os.open(path, os.O_RDWR)

    def open(self, n=1):
        os.write(self._fd, b"\n" * n)

    def close(self):
        os.close(self._fd)


def children():
    """The pids of this process's children, the dead included."""
    return list(testing.children())


def has_no_child():
    """Whether there is none, living or dead."""
    return error_of(os.waitid, os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) == no_child


def question_about(pid, kind):
    return {"pid": pid, "any": -1, "group": -os.getpgid(pid), "own group": 0}[kind]


#: For scripts: a child of *fork* that lives until *writer* is closed, or its parent ends.
FORK_LIVING = """
import os, gevent, coopos

def fork_living(fork=coopos.fork):
    reader, writer = os.pipe()
    pid = fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(7)
    os.close(reader)
    return pid, writer
"""

ENDED_THREAD = (
    HAS_WAITED
    + FORK_LIVING
    + """
import threading

def in_a_thread(function):
    results = []
    def run():
        try:
            results.append(function())
        finally:
            gevent.get_hub().destroy(destroy_loop=True)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]

wait_once()
fds = sorted(os.listdir("/dev/fd"))
"""
)

USED_PID = """
import os, gevent, coopos
LAST_PID = "/proc/sys/kernel/ns_last_pid"

def fork_as(fork, pid, status):
    '''fork() until the child gets *pid*.'''
    for _ in range(200):
        try:
            with open(LAST_PID, "w") as last:
                last.write(str(pid - 1))
        except OSError:
            print("skip: may not choose pids")
            raise SystemExit
        got = fork()
        if got == 0:
            os._exit(status if os.getpid() == pid else 0)
        if got == pid:
            return
        coopos.waitpid(got, 0)
    print("skip: the pid is taken")
    raise SystemExit

ended = []
pid = coopos.fork_and_watch(ended.append)
if pid == 0:
    os._exit(1)
"""
# In a namespace of its own: who chooses pids gives others pids that they had before.
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
may_choose_pids = pytest.mark.skipif(
    not os.access("/proc/sys/kernel/ns_last_pid", os.W_OK) or shutil.which("unshare") is None, reason="may not choose pids"
)


def run_used_pid(source):
    output = run_script(USED_PID + source, under=NAMESPACE)
    if output.startswith("skip: "):
        pytest.skip(output[6:].strip())


NOBODY = 2**31 - 1


def tells_pidfds_apart():
    """Whether each process's pidfds have an inode of their own (pidfs), by which a collected child is found."""
    inodes = set()
    with contextlib.suppress(OSError, AttributeError):
        for pid in (os.getpid(), os.getppid()):
            with closing(os.pidfd_open(pid)) as (pidfd,):
                inodes.add(os.fstat(pidfd).st_ino)
    return len(inodes) == 2


FINDS_BY_PIDFD = HAS_PIDFDS and tells_pidfds_apart()
needs_pidfs = pytest.mark.skipif(not FINDS_BY_PIDFD, reason="no pidfs here, or COOPOS_CHILDREN=thread")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has pidfds")


@contextlib.contextmanager
def asked(idtype, pid, spawn=None):
    """(idtype, id) for waitid, of a child that leads its own group; *spawn* is told where coopos may collect it meanwhile."""
    if idtype == "pidfd":
        if spawn is coopos.posix_spawn and not FINDS_BY_PIDFD:
            pytest.skip("without pidfs, or with COOPOS_CHILDREN=thread, a collected child is not found by its pidfd")
        with closing(os.pidfd_open(pid)) as (pidfd,):
            yield os.P_PIDFD, pidfd
    else:
        yield {"pid": (os.P_PID, pid), "group": (os.P_PGID, pid), "all": (os.P_ALL, 0)}[idtype]


def until_collected(pid):
    """Let the hub run until it has collected a watched child that is dead."""
    until(lambda: error_of(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) == no_child)


def ended(result):
    """(pid, raw status) of any answer that tells of an exit."""
    if isinstance(result, os.waitid_result):
        assert result.si_code == os.CLD_EXITED
        return result.si_pid, result.si_status << 8
    return result[:2]


def by_pidfd(pid, options):
    with asked("pidfd", pid) as question:
        return coopos.waitid(*question, options)


#: Every way to wait for the end of a child that leads its own group.
WAITS = {
    "wait": lambda pid: coopos.wait(),
    "wait3": lambda pid: coopos.wait3(0),
    "wait3 stops": lambda pid: coopos.wait3(os.WCONTINUED),
    "wait4": lambda pid: coopos.wait4(pid, 0),
    "wait4 any": lambda pid: coopos.wait4(-1, 0),
    "wait4 group": lambda pid: coopos.wait4(-pid, 0),
    "wait4 stops": lambda pid: coopos.wait4(pid, os.WUNTRACED | os.WCONTINUED),
    "waitid pid": lambda pid: coopos.waitid(os.P_PID, pid, os.WEXITED),
    "waitid group": lambda pid: coopos.waitid(os.P_PGID, pid, os.WEXITED),
    "waitid all": lambda pid: coopos.waitid(os.P_ALL, 0, os.WEXITED),
    "waitid stops": lambda pid: coopos.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED),
    "waitid all stops": lambda pid: coopos.waitid(os.P_ALL, 0, os.WEXITED | os.WCONTINUED),
    "waitid pidfd": lambda pid: by_pidfd(pid, os.WEXITED),
    "waitid pidfd stops": lambda pid: by_pidfd(pid, os.WEXITED | os.WSTOPPED),
}

SOURCES = """
import contextlib, ctypes, multiprocessing, os, signal, subprocess, sys, threading, gevent, coopos

def forked(fork):
    pid = fork()
    if pid == 0:
        while True:
            signal.pause()
    return pid

def spawned(posix_spawn):
    return posix_spawn("/bin/sh", ["sh", "-c", "exec sleep 1000"], os.environ)

def by_c_library():
    # What comes back from fork() in C knows nothing of the interpreter's hooks: it may only wait for its end.
    libc = ctypes.PyDLL(None)
    pid = libc.fork()
    if pid == 0:
        while True:
            libc.pause()
    return pid

def by_multiprocessing():
    process = multiprocessing.get_context("fork").Process(target=signal.pause)
    process.start()
    processes.append(process)
    return process.pid

def by_subprocess():
    process = subprocess.Popen(["sh", "-c", "exec sleep 1000"])
    processes.append(process)
    return process.pid

def end(pid):
    os.kill(pid, signal.SIGKILL)

def leave():
    for process in processes:
        process.returncode = 0  # it was waited for, and need not warn
    os._exit(0)

processes = []
sources = {
    "coopos.fork": lambda: forked(coopos.fork),
    "coopos.fork_gevent": lambda: forked(coopos.fork_gevent),
    "os.fork": lambda: forked(os.fork),
    "os.posix_spawn": lambda: spawned(os.posix_spawn),
    "a C library": by_c_library,
    "multiprocessing": by_multiprocessing,
    "subprocess": by_subprocess,
}
"""
SOURCE_NAMES = [line.split('"')[1] for line in SOURCES.splitlines() if line.startswith('    "')]
every_source = pytest.mark.parametrize("source", SOURCE_NAMES)
