"""Calls that a worker or gevent's threadpool makes refuse wrong arguments as os does, before anything waits."""

import contextlib
import os

import pytest

import coopos

from ..helpers.support import closing, error_of, make_pipe

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
    "ftruncate": [
        *[(fd, size) for fd in BAD_FDS for size in (0, -1)],
        ("reader", 0), ("file", -1), ("file", 1 << 70), ("file", "x"), ("file",),
    ],
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
