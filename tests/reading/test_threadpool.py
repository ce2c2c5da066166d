"""The functions that only gevent's threadpool can make cooperative."""

import os
import threading

import pytest
from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import get_hub

import coopos

from ..helpers.support import DEADLINE_S, closing, error_of, in_hub, parked, result_of

# ---- states ------------------------------------------------------------------------------------------------------------------


class Standstill:
    """A function for a thread to stand in until it is let go."""

    def __init__(self, result=None):
        self.calls = []
        self.threads = set()
        self._result = result
        self._has_begun = threading.Semaphore(0)
        self._may_end = threading.Event()

    def __call__(self, *args):
        self.calls.append(args)
        self.threads.add(threading.get_ident())
        self._has_begun.release()
        assert self._may_end.wait(DEADLINE_S)
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def wait_for_call(self):
        assert get_hub().threadpool.apply(self._has_begun.acquire, (True, DEADLINE_S))

    def let_go(self):
        self._may_end.set()


# ---- what the threadpool does ------------------------------------------------------------------------------------------------

IN_POOL = {
    name: args
    for name, args in {
        "getlogin": (),
        "getgrouplist": ("name", 0),
        "initgroups": ("name", 0),
    }.items()
    if hasattr(os, name)
}
each_in_pool = pytest.mark.parametrize(("name", "args"), IN_POOL.items(), ids=IN_POOL)


@pytest.fixture
def stand_still(monkeypatch):
    """``stand_still(name, result)`` puts a Standstill in the place of the system's function; they are let go at the end."""
    made = []

    def stand_still(name, result=None):
        made.append(Standstill(result))
        monkeypatch.setattr(f"posix.{name}", made[-1])
        return made[-1]

    yield stand_still
    for standstill in made:
        standstill.let_go()


@each_in_pool
def test_call_in_pool_lets_others_run(stand_still, name, args):
    """It returns what the system's function does, whose arguments are its own."""
    slow = stand_still(name, result="result")
    greenlet = parked(getattr(coopos, name), *args)
    slow.wait_for_call()
    slow.let_go()
    returns_something = name in ("getlogin", "getgrouplist")
    assert result_of(greenlet) == ("result" if returns_something else None)
    assert slow.calls == [args]
    assert threading.get_ident() not in slow.threads


@each_in_pool
def test_call_in_pool_raises_what_os_raises(stand_still, name, args):
    stand_still(name, OSError(5, "Input/output error")).let_go()
    assert error_of(getattr(coopos, name), *args) == (OSError, 5)


@each_in_pool
def test_call_in_pool_from_the_event_loop(stand_still, name, args):
    """It is refused before a thread is asked."""
    slow = stand_still(name)
    assert in_hub(getattr(coopos, name), *args)[0] is BlockingSwitchOutError
    assert slow.calls == []


def test_call_in_pool_killed_while_it_waits_for_a_thread(stand_still, monkeypatch):
    pool = get_hub().threadpool
    monkeypatch.setattr(pool, "maxsize", 1)
    try:
        slow = stand_still("getgrouplist", [])
        first = parked(coopos.getgrouplist, "first", 0)
        second = parked(coopos.getgrouplist, "second", 0)
        second.kill()
        slow.let_go()
        result_of(first)
        coopos.getgrouplist("third", 0)
        assert slow.calls == [("first", 0), ("third", 0)]
    finally:
        pool.maxsize = 10


def test_fsync_asks_for_the_descriptor_in_its_own_thread(fd):
    class File:
        def fileno(self):
            self.thread = threading.get_ident()
            return fd

    file = File()
    coopos.fsync(file)
    assert file.thread == threading.get_ident()


def test_files_are_changed_as_by_os(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with closing(os.open(path, os.O_RDWR)) as (fd,):
        coopos.fsync(fd)
        coopos.truncate(path, 8)
        assert path.read_bytes() == b"01234567"
        coopos.truncate(path=fd, length=6)
        coopos.ftruncate(fd, 4)
        assert path.read_bytes() == b"0123"
        if hasattr(os, "posix_fallocate"):
            coopos.fdatasync(fd)
            coopos.posix_fallocate(fd, 0, 6)
            assert path.read_bytes() == b"0123\0\0"


def test_users_are_those_of_os():
    assert error_of(coopos.getlogin) == error_of(os.getlogin)
    assert coopos.getgrouplist("root", 0) == os.getgrouplist("root", 0)
