"""Children that do their worst, and what a program that is started must not inherit."""

import contextlib
import os
import re
import shutil
import signal
import sys

import gevent
import pytest

import coopos
from coopos import subprocess

from ..helpers.children import has_pidfds
from ..helpers.support import deadline, run_script, ticking

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="no strace here")

# ---- what is not inherited ---------------------------------------------------------------------------------------------------

#: Everything in coopos that makes a descriptor. It writes a mark before and after.
MAKERS = """
import fcntl, os, sys, tempfile, threading
import gevent, coopos
from coopos import io, subprocess

MARK = b"these calls are coopos'"

def read_one(fd):
    writer = gevent.spawn(os.write, fd[1], b"x")
    assert coopos.read(fd[0], 1) == b"x"
    writer.join()
    coopos.close(fd[0])
    coopos.close(fd[1])

def in_thread():
    read_one(os.pipe())
    gevent.get_hub().destroy(destroy_loop=True)

with tempfile.TemporaryDirectory() as directory:
    null = os.open(os.devnull, os.O_RDWR)
    gevent.sleep(0.001)
    subprocess.run(["true"])           # imports
    os.write(null, MARK)
    read_one(os.pipe())
    for fork in (coopos.fork_gevent, coopos.fork_and_watch):
        pid = fork()
        if pid == 0:
            os._exit(0)
        assert coopos.waitpid(pid, 0) == (pid, 0)
    for fork in (coopos.forkpty_gevent, coopos.forkpty_and_watch):
        pid, fd = fork(winsize=(24, 80))
        if pid == 0:
            os._exit(0)
        assert coopos.waitpid(pid, 0) == (pid, 0)
        assert not os.get_inheritable(fd)
        coopos.close(fd)
    subprocess.run(["cat"], input=b"x", capture_output=True)
    subprocess.run(["true"], stdin=subprocess.DEVNULL)
    coopos.system("true")
    coopos.popen("true").close()
    pid = coopos.posix_spawn("/bin/sh", ["sh", "-c", "exit"], os.environ)
    coopos.wait_exit(pid)
    assert coopos.wait() == (pid, 0)
    fd = coopos.open(directory + "/file", os.O_RDWR | os.O_CREAT)
    coopos.fsync(fd)
    coopos.flock(fd, fcntl.LOCK_EX)
    coopos.close(fd)
    io.FileIO(directory + "/file").close()
    os.mkfifo(directory + "/fifo")
    reader = gevent.spawn(coopos.open, directory + "/fifo", os.O_RDONLY)
    coopos.close(coopos.open(directory + "/fifo", os.O_WRONLY))
    coopos.close(reader.get())
    fifo = os.open(directory + "/fifo", os.O_RDWR)
    gevent.spawn(os.write, fifo, b"x")
    coopos.read(fifo, 1)               # poll(2), and a guard: it may open the FIFO again
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    coopos.report()
    os.write(null, MARK)
"""
CALLS = "write openat pipe pipe2 dup dup2 dup3 fcntl socket socketpair accept accept4 epoll_create epoll_create1 eventfd " \
    "eventfd2 timerfd_create pidfd_open inotify_init1 signalfd4 memfd_create io_uring_setup pidfd_getfd ioctl open creat execve"
#: Of each call that makes a descriptor, what says that it is close-on-exec. A pidfd always is: pidfd_open(2). strace shows the
#: flags of TIOCGPTPEER as a number.
SAYS = r"CLOEXEC|pidfd_open|io_uring_setup|TIOCGPTPEER, 0x8\w{4}\)"
MAKES = r"^\d+ +(openat|open|creat|pipe2?|dup[23]?|socket|socketpair|accept4?|epoll_create1?|eventfd2?|timerfd_create|pidfd_\w+|" \
    r"inotify_init1|signalfd4|memfd_create|io_uring_setup|fcntl\(\d+, F_DUPFD|ioctl\(\d+, TIOCGPTPEER)"


def whole_lines(text):
    """strace's lines. It writes two for a call during which another thread made one; they are joined."""
    lines, begun = [], {}
    for line in text.splitlines():
        thread = line.split()[0]
        before, resumed, after = line.partition(" resumed>")
        if resumed and " <... " in before and thread in begun:
            lines[begun.pop(thread)] += after
        elif line.endswith("<unfinished ...>"):
            begun[thread] = len(lines)
            lines.append(line.removesuffix("<unfinished ...>"))
        else:
            lines.append(line)
    return lines


@needs_strace
def test_every_descriptor_is_close_on_exec_from_the_start(tmp_path):
    """No system call of this process makes one that is not. So no program inherits one, whichever thread starts it, and when."""
    trace = tmp_path / "trace"
    names = ",".join(f"?{name}" for name in CALLS.split())
    run_script(MAKERS, under=["strace", "-f", "-o", str(trace), "-e", f"trace={names}", "-e", "signal=none"])
    lines = whole_lines(trace.read_text())
    first, last = (index for index, line in enumerate(lines) if "these calls are coopos" in line)
    lines = lines[first:last]
    programs = {line.split()[0] for line in lines if " execve(" in line}
    made = [line for line in lines if re.match(MAKES, line) and re.search(r"= \d+", line)]
    # Standard streams are there to be inherited.
    mine = [line for line in made if line.split()[0] not in programs and not re.search(r" dup2\(\d+, [012]\b", line)]
    expected = {"eventfd2", "pipe2", "openat"} | ({"pidfd_open"} if has_pidfds() else set())
    assert expected <= {re.split(r"[ (]+", line)[1] for line in mine}
    # The interpreter's openpty(), for Popen(pty=True), is not among the calls; gevent's libuv loop reads the last file by itself.
    assert [line for line in mine if not re.search(SAYS, line) and "/proc/self/status" not in line] == []


def test_forkpty_another_child_does_not_keep_the_terminal():
    """A program that is started meanwhile has no master: the hang-up comes when this process closes it."""
    run_script(
        """
        import os, signal
        import coopos

        pid, fd = coopos.forkpty()
        if pid == 0:
            os.execvp("sleep", ["sleep", "100"])
        other = coopos.posix_spawn("/bin/sleep", ["sleep", "100"], os.environ)
        coopos.close(fd)
        assert coopos.waitpid(pid, 0) == (pid, signal.SIGHUP)
        os.kill(other, signal.SIGKILL)
        coopos.waitpid(other, 0)
        """
    )


def test_forkpty_while_standard_streams_are_closed():
    """The terminal is all three standard streams of the child and of its program, whichever of their numbers it was opened with."""
    run_script(
        """
        import os
        import coopos

        for closed in ((0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)):
            pid = coopos.fork()
            if pid == 0:
                for fd in closed:
                    os.close(fd)
                pid, master = coopos.forkpty()
                if pid == 0:
                    os.execv("/bin/sh", ["sh", "-c", "test -t 0 && test -t 1 && test -t 2"])
                os._exit(os.waitstatus_to_exitcode(coopos.waitpid(pid, 0)[1]))
            assert coopos.waitpid(pid, 0) == (pid, 0), closed
        """
    )


# ---- children that do their worst --------------------------------------------------------------------------------------------


def sh(text, **kwargs):
    return subprocess.Popen(["sh", "-c", text], start_new_session=True, **kwargs)


def test_wait_for_a_child_that_stops_itself():
    """A stop is no end: the wait goes on until the child was continued and has ended."""
    with deadline(), sh("kill -STOP $$; exit 3") as process:
        waiter = gevent.spawn(process.wait)
        coopos.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert process.poll() is None and not waiter.ready()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
        process.send_signal(signal.SIGCONT)
        assert waiter.get() == 3


def test_wait_for_a_child_that_ignores_signals():
    """What a timeout of run() sends is SIGKILL, which nobody ignores."""
    script = "trap '' TERM INT HUP QUIT; echo ready; while :; do sleep 0.01; done"
    with deadline(), sh(script, stdout=subprocess.PIPE) as process:
        assert process.stdout.read(6) == b"ready\n"
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL


def test_communicate_with_a_child_that_floods():
    """A timeout ends it, while output comes without end; other greenlets run meanwhile."""
    with deadline(), ticking() as turns, pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(["cat", "/dev/zero"], stdout=subprocess.PIPE, timeout=0.2)
    assert len(turns) > 2


def test_wait_for_a_child_that_forks_twice_and_leaves_its_session():
    """The grandchild is nobody's here: the wait ends with the child, and a wait for any child doesn't find another."""
    script = "setsid sh -c 'echo $$; exec sleep 100' & exit 4"
    with deadline(), sh(script, stdout=subprocess.PIPE) as process:
        grandchild = int(process.stdout.readline())
        try:
            assert process.wait() == 4
            with pytest.raises(ChildProcessError):
                coopos.waitpid(-1, os.WNOHANG)
            with pytest.raises(ChildProcessError):
                coopos.waitpid(grandchild, 0)
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_send_signal_to_a_child_that_was_reaped_signals_nobody(monkeypatch):
    """Whoever reaped it, this process or other code, and also if kill(2) is all there is."""
    sent = []
    for reap in (lambda process: process.wait(), lambda process: os.waitpid(process.pid, 0)):
        with contextlib.suppress(ChildProcessError), sh("exit 0") as process:   # a kernel may not tell the status any more
            reap(process)
            monkeypatch.setattr(os, "kill", lambda *args: sent.append(args))
            for send in (process.kill, process.terminate, lambda process=process: process.send_signal(signal.SIGUSR1)):
                send()
            monkeypatch.undo()
    assert sent == []


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's here")
def test_wait_for_a_child_that_runs_out_of_memory():
    """Its end is told as it was: by the signal of an abort, or by its exit status."""
    script = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 ** 28, 2 ** 28)); x = b'x' * 2 ** 30"
    with deadline():
        done = subprocess.run([sys.executable, "-I", "-c", script], stderr=subprocess.PIPE)
    assert done.returncode == 1 and b"MemoryError" in done.stderr
