"""What is given back when a greenlet is killed just when its worker has got the lock: that lock, and no other."""

import contextlib
import fcntl
import os
import subprocess
import sys

import gevent
import pytest

import coopos
from coopos import _core
from coopos._files import lock_range

from ..helpers.descriptors import until_workers_are_done
from ..helpers.support import DEADLINE_S, closing, until

#: Another process, which locks, releases and tries ranges of a file as it is told.
OTHER = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for line in sys.stdin:
    kind, start, length = line.split()
    kind = {"lock": fcntl.LOCK_EX, "share": fcntl.LOCK_SH, "release": fcntl.LOCK_UN}[kind]
    try:
        fcntl.lockf(fd, kind | (fcntl.LOCK_NB if kind != fcntl.LOCK_UN else 0), int(length), int(start))
        print("done", flush=True)
    except OSError:
        print("taken", flush=True)
"""


class Other:
    def __init__(self, path):
        command = [sys.executable, "-c", OTHER, path]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, kind, start, length):
        self._process.stdin.write(f"{kind} {start} {length}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def finds_free(self, start, length=1, kind="lock"):
        found = self.tell(kind, start, length) == "done"
        if found:
            self.tell("release", start, length)
        return found

    def close(self):
        self._process.communicate()


@pytest.fixture
def other(path):
    with contextlib.closing(Other(path)) as other:
        yield other


def lock_at(fd, start, length):
    os.lseek(fd, start, os.SEEK_SET)
    coopos.lockf(fd, os.F_LOCK, length)


def release_at(fd, start, length):
    os.lseek(fd, start, os.SEEK_SET)
    coopos.lockf(fd, os.F_ULOCK, length)


def waiting(function, *args):
    """A greenlet that a worker waits for."""
    begun = _core.count_begun()
    greenlet = gevent.spawn(function, *args)
    until(lambda: _core.count_begun() > begun)
    return greenlet


def test_range_that_another_greenlet_has_got_meanwhile_elsewhere(fd, other):
    """It is no reason to keep ours."""
    other.tell("lock", 20, 5)
    killed = waiting(lock_at, fd, 20, 5)
    lock_at(fd, 0, 5)
    other.tell("release", 20, 5)
    until_workers_are_done()
    killed.kill()
    assert other.finds_free(20, 5) and not other.finds_free(0, 5)


def test_part_of_the_range_that_was_locked_before(fd, other):
    lock_at(fd, 0, 10)
    other.tell("lock", 15, 5)
    killed = waiting(lock_at, fd, 0, 20)
    other.tell("release", 15, 5)
    until_workers_are_done()
    killed.kill()
    assert not other.finds_free(0, 10) and other.finds_free(10, 10)


def test_part_of_the_range_that_was_locked_by_another_library(fd, other):
    """The kernel knows of it."""
    os.lseek(fd, 0, os.SEEK_SET)
    os.lockf(fd, os.F_LOCK, 10)
    other.tell("lock", 15, 5)
    killed = waiting(lock_at, fd, 0, 20)
    other.tell("release", 15, 5)
    until_workers_are_done()
    killed.kill()
    assert not other.finds_free(0, 10) and other.finds_free(10, 10)


@pytest.mark.parametrize("length", [10, 0], ids=["a part", "to the end"])
def test_lock_for_reading_that_was_to_become_one_for_writing(fd, other, length):
    lock_range(fd, fcntl.LOCK_SH, length, 0)
    other.tell("share", 0, length)
    killed = waiting(lock_range, fd, fcntl.LOCK_EX, length, 0)
    other.tell("release", 0, length)
    until_workers_are_done()
    killed.kill()
    assert other.finds_free(0, 10, "share") and not other.finds_free(0, 10)


def test_middle_of_the_range_that_another_greenlet_has_got_and_released_in_part(fd, other):
    other.tell("lock", 0, 1)
    killed = waiting(lock_at, fd, 0, 30)
    lock_at(fd, 5, 20)
    release_at(fd, 10, 5)
    other.tell("release", 0, 1)
    until_workers_are_done()
    killed.kill()
    assert [start for start in range(0, 30, 5) if not other.finds_free(start, 5)] == [5, 15, 20]


def test_range_that_two_waited_for_and_both_are_killed(fd, other):
    other.tell("lock", 0, 10)
    first, second = waiting(lock_at, fd, 0, 10), waiting(lock_at, fd, 0, 10)
    other.tell("release", 0, 10)
    until_workers_are_done()
    first.kill()
    assert not other.finds_free(0, 10)
    second.kill()
    assert other.finds_free(0, 10)


def use_again(fd, path):
    """Close *fd*, and open *path* under its number."""
    coopos.close(fd)
    again = os.open(path, os.O_RDWR)
    if again != fd:
        os.dup2(again, fd)
        os.close(again)


@pytest.fixture
def another(tmp_path):
    another = tmp_path / "another"
    another.write_bytes(b"x" * 30)
    return another


def test_flock_of_a_number_that_was_used_again_before_the_greenlet_knew(path, another):
    holder, number = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
    with closing(number), closing(os.open(another, os.O_RDWR)) as (tester,):
        fcntl.flock(holder, fcntl.LOCK_EX)
        killed = waiting(coopos.flock, number, fcntl.LOCK_EX)
        os.close(holder)
        until_workers_are_done()
        use_again(number, another)
        fcntl.flock(number, fcntl.LOCK_EX)
        killed.kill()
        with pytest.raises(BlockingIOError):
            fcntl.flock(tester, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_flock_of_a_number_that_was_closed_before_the_greenlet_knew(path):
    """It gets EBADF, and whoever shares the open file has no lock by it."""
    holder, number = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
    with closing(holder, os.dup(number)):
        fcntl.flock(holder, fcntl.LOCK_EX)
        waiter = waiting(coopos.flock, number, fcntl.LOCK_EX)
        fcntl.flock(holder, fcntl.LOCK_UN)
        until_workers_are_done()
        coopos.close(number)
        with pytest.raises(OSError, match="Bad file descriptor"):
            waiter.get(timeout=DEADLINE_S)
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_lockf_of_a_number_that_was_used_again_before_the_greenlet_knew(path, another, other):
    number = os.open(path, os.O_RDWR)
    with closing(number), contextlib.closing(Other(another)) as tester:
        other.tell("lock", 0, 10)
        killed = waiting(lock_at, number, 0, 10)
        other.tell("release", 0, 10)
        until_workers_are_done()
        use_again(number, another)
        os.lockf(number, os.F_LOCK, 10)
        killed.kill()
        assert not tester.finds_free(0, 10)


def test_offset_of_a_number_that_was_used_again_before_the_greenlet_knew(another):
    """Of a file whose reads take a worker: it is put back nowhere."""
    directory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with open(f"{directory}/coopos-{os.getpid()}" if directory else another.with_name("slow"), "w+b") as file:
        os.unlink(file.name)
        file.write(b"y" * 30)
        file.flush()
        number = os.dup(file.fileno())
        os.lseek(number, 0, os.SEEK_SET)
        with closing(number):
            greenlet = gevent.spawn(coopos.read, number, 10)
            gevent.sleep(0)
            if greenlet.ready():
                pytest.skip("reads of such a file take no worker here")
            until_workers_are_done()
            use_again(number, another)
            os.read(number, 20)
            greenlet.kill()
            assert os.lseek(number, 0, os.SEEK_CUR) == 20


def test_lock_for_writing_that_became_one_for_reading_meanwhile(fd, other):
    """The latest is what the process holds."""
    lock_range(fd, fcntl.LOCK_EX, 10, 0)
    other.tell("lock", 15, 5)
    killed = waiting(lock_range, fd, fcntl.LOCK_EX, 20, 0)
    lock_range(fd, fcntl.LOCK_SH, 10, 0)
    other.tell("release", 15, 5)
    until_workers_are_done()
    killed.kill()
    assert other.finds_free(0, 10, "share") and not other.finds_free(0, 10) and other.finds_free(10, 10)


@pytest.mark.parametrize(
    ("bits", "kind"), [(fcntl.LOCK_SH | fcntl.LOCK_EX, "share"), (fcntl.LOCK_UN | fcntl.LOCK_EX, None), (fcntl.LOCK_EX, None)]
)
def test_kind_of_lock_for_combined_bits_is_the_stdlibs(fd, other, bits, kind):
    other.tell("lock", 0, 1)
    waiter = waiting(lock_range, fd, bits, 10, 0)
    other.tell("release", 0, 1)
    waiter.get(timeout=DEADLINE_S)
    waited = other.finds_free(0, 10, "share")
    fcntl.lockf(fd, fcntl.LOCK_UN)
    fcntl.lockf(fd, bits, 10, 0)
    assert waited == other.finds_free(0, 10, "share") == (kind == "share")
