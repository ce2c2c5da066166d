"""Children to wait for, in the state that a test needs; and what this kernel can tell of them.

They are programs started by posix_spawn, so that most tests need no interpreter of their own.
"""

import contextlib
import errno
import functools
import gc
import os
import signal
import struct

import gevent
import psutil
import pytest

import coopos

from .support import closing, error_of

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


def until(holds):
    """Let the hub run until holds(). It sleeps in between: a hub that never does leaves other threads no GIL for many seconds."""
    while not holds():
        gevent.sleep(0.001)


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
    return [child.pid for child in psutil.Process().children()]


def has_no_child():
    """Whether there is none, living or dead; psutil would look through all processes for that."""
    return error_of(os.waitid, os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) == no_child
