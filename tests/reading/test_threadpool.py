"""The functions that only gevent's threadpool can make cooperative."""

import contextlib
import os
import threading

import pytest
from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import get_hub

import coopos

from ..helpers.support import DEADLINE_S, closing, error_of, in_hub, make_pipe, parked, result_of

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


BAD_FDS = [-1, 1 << 20, 1 << 40, "x", None, 1.5, b"x"]


class Nothing:
    def fileno(self):
        return "nothing"


WRONG = {
    "fsync": [*[(fd,) for fd in BAD_FDS], (Nothing(),), (), (1, 2)],
    "fdatasync": [*[(fd,) for fd in BAD_FDS], (Nothing(),), (), (1, 2)],
    "sync": [(1,)],
    "posix_fallocate": [
        *[(fd, 0, 1) for fd in BAD_FDS],
        ("reader", 0, 1),
        ("file", -1, 1),
        ("file", 0, 0),
        ("file", 0, 1 << 70),
        (),
    ],
    "truncate": [("/nonexistent/file", 0), ("/", 0), ("a\0b", 0), (None, 0), (1.5, 0), ("file", -1), ("file", "x"), ("file",)],
    "ftruncate": [*[(fd, 0) for fd in BAD_FDS], ("reader", 0), ("file", -1), ("file", 1 << 70), ("file", "x"), ("file",)],
    "lockf": [
        *[(fd, os.F_LOCK, 0) for fd in BAD_FDS],
        (Nothing(), os.F_LOCK, 0),
        ("reader", os.F_LOCK, 0),
        ("read-only", os.F_LOCK, 0),
        ("file", os.F_LOCK, "x"),
        ("file", os.F_LOCK, 1 << 70),
        ("file", os.F_LOCK, -1),
        ("file", 99, 0),
        ("file", "x", 0),
        ("file", 1.0, 0),
        ("file", os.F_LOCK),
    ],
    "eventfd_read": [*[(fd,) for fd in BAD_FDS], (Nothing(),), ("writer",), ()],
    "eventfd_write": [
        *[(fd, 1) for fd in BAD_FDS],
        ("reader", 1),
        *[("eventfd", n) for n in (-1, 1 << 64, (1 << 64) - 1, "x", 1.5)],
    ],
    "getrandom": [(-1,), ("x",), (1.5,), (1, 1 << 20), (1, "x"), (1, 1 << 40), ()],
    "urandom": [(-1,), ("x",), (1.5,), ()],
    "getlogin": [(1,)],
    "getgrouplist": [(1, 0), ("a\0b", 0), ("root", "x"), ("root", 1 << 70), ()],
    "initgroups": [(1, 0), ("a\0b", 0), ("root", "x"), ("root", 1 << 70), ()],
}


@pytest.mark.parametrize(("name", "args"), [(name, args) for name in WRONG for args in WRONG[name] if hasattr(os, name)])
def test_wrong_arguments_are_refused_as_by_os(tmp_path, name, args):
    with make_pipe() as (reader, writer), contextlib.ExitStack() as stack:
        path = tmp_path / "file"
        path.touch()
        fds = {"reader": reader, "writer": writer}
        if name == "truncate":
            fds["file"] = path
        else:
            fds["file"], fds["read-only"] = stack.enter_context(closing(os.open(path, os.O_RDWR), os.open(path, os.O_RDONLY)))
        if hasattr(os, "eventfd"):
            [fds["eventfd"]] = stack.enter_context(closing(os.eventfd(0, os.EFD_NONBLOCK)))
        args = [fds.get(arg, arg) if isinstance(arg, str) else arg for arg in args]
        error = error_of(getattr(os, name), *args)
        assert error[0] is not None
        assert error_of(getattr(coopos, name), *args) == error


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
