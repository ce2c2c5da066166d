"""flock and lockf: they wait while others run, and nobody is left with a lock that he doesn't know of."""

import contextlib
import errno
import fcntl
import os
import pathlib
import re
import subprocess
import sys

import gevent
import pytest
from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import get_hub

import coopos
from coopos import _core
from coopos._files import lock_range

from ..helpers.descriptors import StandingWorkers, until_workers_are_done
from ..helpers.files import HOLDER
from ..helpers.support import DEADLINE_S, Index, closing, error_of, in_hub, parked, result_of, run_script, turn_loop, until

# ---- flock, and both ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(path):
    with closing(os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)) as fds:
        yield fds


def is_locked(path):
    with closing(os.open(path, os.O_RDWR)) as (fd,):
        return error_of(fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB) == (BlockingIOError, errno.EAGAIN)


def test_flock_waits_while_others_run(path, two):
    first, second = two
    coopos.flock(first, fcntl.LOCK_EX)
    greenlet = parked(coopos.flock, second, fcntl.LOCK_SH)
    coopos.flock(first, fcntl.LOCK_UN)
    assert result_of(greenlet) is None
    assert is_locked(path)


def test_flock_killed(path, two):
    first, second = two
    coopos.flock(first, fcntl.LOCK_EX)
    greenlet = parked(coopos.flock, second, fcntl.LOCK_EX)
    greenlet.kill()
    coopos.flock(first, fcntl.LOCK_UN)
    turn_loop()
    assert not is_locked(path)


def test_flock_killed_in_the_moment_of_success(path, two):
    first, second = two
    coopos.flock(first, fcntl.LOCK_EX)
    greenlet = parked(coopos.flock, second, fcntl.LOCK_EX)
    coopos.flock(first, fcntl.LOCK_UN)
    greenlet.kill()
    assert not is_locked(path)


def test_lock_by_an_object_that_is_an_index(path, two):
    first, _ = two
    for operation in (fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN, fcntl.LOCK_EX):
        assert coopos.flock(first, Index(operation)) is None
        assert is_locked(path) == (operation != fcntl.LOCK_UN)
        assert lock_range(first, Index(operation)) is None
    for command in (os.F_LOCK, os.F_ULOCK, os.F_TLOCK, os.F_TEST):
        assert coopos.lockf(first, Index(command), 0) is None


def have_locked(path):
    """Whether this process has fcntl(2)'s lock on a file."""
    script = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return subprocess.run([sys.executable, "-c", script, path], stderr=subprocess.DEVNULL).returncode != 0


def let_go_in_one_turn(holder):
    """Have a HOLDER end, and workers get what it had, while the hub has no turn."""
    holder.stdin.close()
    holder.wait()
    until_workers_are_done()


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_lock_that_two_have_got_stays_when_one_is_killed(kind, path, two):
    """It is the process's, or the open file's, and not the greenlet's."""
    first, second = two if kind == "lockf" else (two[0], two[0])
    lock, *args = (coopos.lockf, os.F_LOCK, 0) if kind == "lockf" else (coopos.flock, fcntl.LOCK_EX)
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        killed, other, last = (gevent.spawn(lock, fd, *args) for fd in (first, second, second))
        until(lambda: _core.count_begun() == 3)
        let_go_in_one_turn(holder)
    killed.kill()
    assert result_of(other) is None
    assert have_locked(path) if kind == "lockf" else is_locked(path)
    last.kill()
    assert have_locked(path) if kind == "lockf" else is_locked(path)
    coopos.lockf(first, os.F_ULOCK, 0) if kind == "lockf" else coopos.flock(first, fcntl.LOCK_UN)
    assert not (have_locked(path) if kind == "lockf" else is_locked(path))


def test_lockf_of_a_killed_greenlet_is_undone_where_it_was(path, two):
    fd, _ = two
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        greenlet = gevent.spawn(coopos.lockf, fd, os.F_LOCK, 10)
        until(lambda: _core.count_begun() == 1)
        os.lseek(fd, 50, os.SEEK_SET)
        let_go_in_one_turn(holder)
    greenlet.kill()
    assert not have_locked(path)


def test_lock_of_a_closed_number_is_undone_before_the_number_is_used_again(path, two, tmp_path):
    (tmp_path / "other").touch()
    holder, _ = two
    number = os.open(path, os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with StandingWorkers() as workers:     # which hear of no signal
        greenlet = gevent.spawn(coopos.flock, number, fcntl.LOCK_EX)
        until(_core.count_begun)
        fcntl.flock(holder, fcntl.LOCK_UN)
        workers.go_on()
        until_workers_are_done()
    coopos.close(number)
    assert os.open(tmp_path / "other", os.O_RDWR) == number
    with closing(number):
        fcntl.flock(number, fcntl.LOCK_EX)
        greenlet.join()
        assert is_locked(tmp_path / "other")


def test_flock_that_does_not_wait(two):
    first, second = two
    coopos.flock(first, fcntl.LOCK_EX)
    assert error_of(coopos.flock, second, fcntl.LOCK_EX | fcntl.LOCK_NB) == (BlockingIOError, errno.EAGAIN)


@pytest.mark.parametrize("args", [(-1, 2), ("x", 2), (1.5, 2), (1 << 40, 2), (0, "x"), (0, 0), (0, 99), (0, 1 << 40), (0,), ()])
def test_flock_wrong_arguments_are_refused_as_by_fcntl(args):
    assert error_of(coopos.flock, *args) == error_of(fcntl.flock, *args)


def test_patch_puts_the_locks_into_fcntl(path):
    run_script(f"""
        from gevent import monkey; monkey.patch_all()
        import fcntl, os, pickle, subprocess, sys, gevent, coopos
        before = fcntl.flock, fcntl.lockf
        coopos.patch()
        assert fcntl.flock is coopos.flock
        holder = subprocess.Popen([sys.executable, "-c", {HOLDER!r}, {str(path)!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        holder.stdout.readline()
        with open({str(path)!r}, "r+") as file:
            waiters = [gevent.spawn(fcntl.flock, file, fcntl.LOCK_EX), gevent.spawn(fcntl.lockf, file, fcntl.LOCK_EX, 5, 2, 0)]
            gevent.sleep(0.01)
            assert not any(each.ready() for each in waiters)
            holder.stdin.close()
            gevent.joinall(waiters, timeout=20, raise_error=True)
            holder.wait()
            holder.stdout.close()
            fcntl.lockf(file, fcntl.LOCK_UN)
        coopos.unpatch()
        assert (fcntl.flock, fcntl.lockf) == before
    """)


# ---- lockf -------------------------------------------------------------------------------------------------------------------

OTHER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for line in sys.stdin:
    try:
        os.lockf(fd, getattr(os, line.strip()), 0)
        print("done", flush=True)
    except OSError:
        print("taken", flush=True)
"""


class OtherProcess:
    """Another process that has the file open, and calls lockf when it is told to."""

    def __init__(self, path):
        command = [sys.executable, "-c", OTHER, path]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def lockf(self, command):
        """ "done" or "taken"."""
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self):
        self._process.communicate(timeout=DEADLINE_S)


@pytest.fixture
def other(path):
    """Another process, which has the lock."""
    with contextlib.closing(OtherProcess(path)) as other:
        assert other.lockf("F_LOCK") == "done"
        yield other


def test_lockf_that_is_free(path, fd):
    """It is taken at once: in the event loop too."""
    with contextlib.closing(OtherProcess(path)) as other:
        assert in_hub(coopos.lockf, fd, os.F_LOCK, 0) == (None, None)
        assert other.lockf("F_TLOCK") == "taken"
        coopos.lockf(fd, os.F_ULOCK, 0)
        assert other.lockf("F_TLOCK") == "done"


def test_lockf_that_another_process_has(fd, other):
    greenlet = parked(coopos.lockf, fd, os.F_LOCK, 0)
    assert other.lockf("F_ULOCK") == "done"
    assert result_of(greenlet) is None
    assert other.lockf("F_TEST") == "taken"


def test_lockf_from_the_event_loop(fd, other):
    assert in_hub(coopos.lockf, fd, os.F_LOCK, 0)[0] is BlockingSwitchOutError
    assert other.lockf("F_ULOCK") == "done"
    assert other.lockf("F_TLOCK") == "done"


@pytest.mark.parametrize("command", ["F_TLOCK", "F_TEST"])
def test_lockf_that_does_not_wait(fd, other, command):
    error = error_of(os.lockf, fd, getattr(os, command), 0)
    assert issubclass(error[0], OSError)
    assert in_hub(coopos.lockf, fd, getattr(os, command), 0) == error


def test_lockf_of_a_file_object(path, other):
    with open(path, "r+b") as file:
        greenlet = parked(coopos.lockf, file, os.F_LOCK, 0)
        other.lockf("F_ULOCK")
        result_of(greenlet)
        assert other.lockf("F_TEST") == "taken"


def waiting_for_lock(fd):
    """A greenlet that waits for the lock, and the kernel knows."""
    greenlet = parked(coopos.lockf, fd, os.F_LOCK, 0)
    locks = pathlib.Path("/proc/locks")
    if locks.exists():
        inode = os.fstat(fd).st_ino
        until(lambda: re.search(rf"-> .* {os.getpid()} \S+:{inode} ", locks.read_text()))
    return greenlet


def test_lockf_killed(fd, other):
    """It doesn't get the lock later."""
    waiting_for_lock(fd).kill()
    assert other.lockf("F_ULOCK") == "done"
    assert other.lockf("F_TLOCK") == "done"


def test_lockf_killed_in_the_moment_of_success(fd, other):
    """The lock that it has got is given back."""
    greenlet = waiting_for_lock(fd)
    assert other.lockf("F_ULOCK") == "done"
    greenlet.kill()
    assert other.lockf("F_TLOCK") == "done"


def test_lockf_timed_out_and_tried_again(path, fd, other):
    """The lock that the second attempt gets, by a new descriptor, is not given back for the first."""
    with closing(os.open(path, os.O_RDWR)) as (first,):
        waiting_for_lock(first).kill(gevent.Timeout)
    greenlet = waiting_for_lock(fd)
    assert other.lockf("F_ULOCK") == "done"
    result_of(greenlet)
    turn_loop()
    assert other.lockf("F_TEST") == "taken"


def test_lockf_holds_no_thread_of_the_pool(fd, other):
    greenlets = [parked(coopos.lockf, fd, os.F_LOCK, 0) for _ in range(get_hub().threadpool.maxsize + 5)]
    assert get_hub().threadpool.apply(lambda: "served") == "served"
    gevent.killall(greenlets)
    assert other.lockf("F_ULOCK") == "done"
    assert other.lockf("F_TLOCK") == "done"
