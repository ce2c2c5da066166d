"""The same input to coopos, os and gevent.os: the same result, or an exception of the same type with the same errno.

All of it before anything waits: a wrong argument must not be noticed only when the hub has run.
"""

import array
import contextlib
import decimal
import errno
import fcntl
import fractions
import os
import socket
import sys

import gevent
import gevent.os
import hypothesis
import pytest
from hypothesis import strategies

import coopos

from ..helpers.support import INT_MAX, Broken, Index, Int, closing, error_of, make_pipe, outcomes, run_script, turn_loop


class Number(int):
    """An int of a subclass."""


class Fileno:
    """Something like a file, which read, write and close of os refuse."""

    def fileno(self):
        return 10**6


#: What os says about them doesn't depend on what is open.
BAD_FDS = {
    "-1": -1,
    "-2": -2,
    "lowest": -INT_MAX - 1,
    "highest": INT_MAX,
    "too high": INT_MAX + 1,
    "too low": -INT_MAX - 2,
    "huge": 2**64,
    "minus huge": -(2**64),
    "huger": 10**30,
    "float": 1.5,
    "whole float": 1e6,
    "nan": float("nan"),
    "inf": float("inf"),
    "Decimal": decimal.Decimal(10**6),
    "Fraction": fractions.Fraction(10**6),
    "complex": 1j,
    "Int": Int(10**6),
    "Index": Index(10**6),
    "Index too high": Index(2**64),
    "Broken": Broken(),
    "Number": Number(10**6),
    "None": None,
    "str": "3",
    "bytes": b"3",
    "list": [3],
    "Fileno": Fileno(),
    "type": int,
}

each_bad_fd = pytest.mark.parametrize("fd", BAD_FDS.values(), ids=BAD_FDS.keys())
READERS = {"nb_read": (coopos.nb_read, gevent.os.nb_read), "tp_read": (coopos.tp_read, gevent.os.tp_read)}
WRITERS = {"nb_write": (coopos.nb_write, gevent.os.nb_write), "tp_write": (coopos.tp_write, gevent.os.tp_write)}
each_reader = pytest.mark.parametrize(("ours", "gevents"), READERS.values(), ids=READERS.keys())
each_writer = pytest.mark.parametrize(("ours", "gevents"), WRITERS.values(), ids=WRITERS.keys())


@pytest.fixture(autouse=True)
def _quiet_threadpool(monkeypatch):
    """What fails in gevent's threadpool is also reported by its hub."""
    monkeypatch.setattr(gevent.get_hub(), "NOT_ERROR", (Exception,))


def check_same(functions, *args):
    """All functions make the same of *args*, without a turn of the loop but for a thread of gevent's; what it is."""
    ours, *others = outcomes(functions, *args)
    assert [ours] * len(others) == others, f"{functions[0].__name__}{args}"
    return ours


# ---- descriptors -------------------------------------------------------------------------------------------------------------


@each_reader
@each_bad_fd
def test_read_of_a_bad_descriptor(ours, gevents, fd):
    assert check_same((ours, os.read, gevents), fd, 10)[0] is not None


@each_writer
@each_bad_fd
def test_write_to_a_bad_descriptor(ours, gevents, fd):
    assert check_same((ours, os.write, gevents), fd, b"x")[0] is not None


@each_bad_fd
def test_close_of_a_bad_descriptor(fd):
    assert check_same((coopos.close, os.close), fd)[0] is not None


@each_bad_fd
def test_make_nonblocking_of_a_bad_descriptor(fd):
    """It takes what fcntl takes: an object with fileno(), too."""
    assert check_same((coopos.make_nonblocking, gevent.os.make_nonblocking), fd)[0] is not None


@pytest.mark.parametrize("make", [float, decimal.Decimal, Int, lambda fd: fd + 0.5], ids=["float", "Decimal", "Int", "half"])
def test_what_rounds_to_an_open_descriptor_is_a_type_error(make):
    """And nothing is done to that descriptor."""
    with make_pipe() as (reader, writer):
        os.write(writer, b"abc")
        for ours, _gevents in READERS.values():
            assert error_of(ours, make(reader), 1) == (TypeError, None)
        for ours, _gevents in WRITERS.values():
            assert error_of(ours, make(writer), b"x") == (TypeError, None)
        assert error_of(coopos.close, make(reader)) == (TypeError, None)
        assert error_of(coopos.make_nonblocking, make(reader)) == (TypeError, None)
        assert os.read(reader, 10) == b"abc"


def test_functions_on_a_closed_descriptor():
    with make_pipe() as (reader, writer):
        os.close(reader)
        os.close(writer)
        for ours, gevents in READERS.values():
            for n in (0, 1, 10):
                assert check_same((ours, os.read, gevents), reader, n) == (OSError, errno.EBADF)
        for ours, gevents in WRITERS.values():
            for data in (b"", b"x"):
                assert check_same((ours, os.write, gevents), writer, data) == (OSError, errno.EBADF)
        assert check_same((coopos.close, os.close), reader) == (OSError, errno.EBADF)


def test_functions_on_the_wrong_end_of_a_pipe():
    with make_pipe() as (reader, writer):
        for ours, gevents in READERS.values():
            assert check_same((ours, os.read, gevents), writer, 1) == (OSError, errno.EBADF)
            assert check_same((ours, os.read, gevents), writer, 0) == (OSError, errno.EBADF)
        for ours, gevents in WRITERS.values():
            assert check_same((ours, os.write, gevents), reader, b"x") == (OSError, errno.EBADF)
            assert check_same((ours, os.write, gevents), reader, b"") == (OSError, errno.EBADF)


def test_functions_on_a_directory(tmp_path):
    with closing(os.open(tmp_path, os.O_RDONLY)) as (fd,):
        for ours, gevents in READERS.values():
            assert check_same((ours, os.read, gevents), fd, 1) == (IsADirectoryError, errno.EISDIR)
        for ours, gevents in WRITERS.values():
            assert check_same((ours, os.write, gevents), fd, b"x") == (OSError, errno.EBADF)


def test_functions_on_a_regular_file(tmp_path):
    with contextlib.ExitStack() as stack:
        (tmp_path / "file").write_bytes(b"content")
        for ours, gevents in READERS.values():
            for n in (0, 3, 100, 100):
                found = []
                for read in (ours, os.read, gevents):
                    [fd] = stack.enter_context(closing(os.open(tmp_path / "file", os.O_RDONLY)))
                    os.lseek(fd, n, os.SEEK_SET)
                    found.append(error_of(read, fd, n))
                assert found[0] == found[1] == found[2]


def test_functions_take_bools_and_other_integers():
    """Whatever os makes of them: here every number is open."""
    out = run_script(
        """
        import os, sys
        import gevent.os
        import coopos

        report = os.dup(1)

        class Index:
            def __init__(self, number):
                self.number = number
            def __index__(self):
                return self.number

        def outcome(function, *args):
            try:
                return function(*args)
            except Exception as ex:
                return type(ex), getattr(ex, "errno", None)

        reader, writer = os.pipe()

        def check(make, number):
            found = []
            for name, functions in calls.items():
                for function in functions:
                    os.dup2(reader if "read" in name else writer, number)
                    os.write(writer, b"abc")
                    args = {"read": (3,), "write": (b"def",), "close": ()}[name.partition("_")[2] or name]
                    result = outcome(function, make(number), *args)
                    after = outcome(os.fstat, number)
                    found.append((name, result, type(after)))
                    os.set_blocking(reader, False)
                    try:
                        os.read(reader, 100)
                    except BlockingIOError:
                        pass
                    os.set_blocking(reader, True)
            for name in calls:
                assert len({str(entry) for entry in found if entry[0] == name}) == 1, (make, number, found)

        calls = {
            "nb_read": (os.read, coopos.nb_read),
            "tp_read": (os.read, coopos.tp_read),
            "nb_write": (os.write, coopos.nb_write),
            "tp_write": (os.write, coopos.tp_write),
            "close": (os.close, coopos.close),
        }
        for make in (bool, Index, type("Number", (int,), {})):
            for number in (0, 1):
                check(make, number)
        os.write(report, b"same")
        """,
        PYTHONWARNINGS="default",
        may_complain=True,
    )
    assert out == "same"


# ---- sizes and buffers -------------------------------------------------------------------------------------------------------

SIZES = {
    "0": 0,
    "1": 1,
    "more than there is": 1000,
    "True": True,
    "Index": Index(2),
    "-1": -1,
    "lowest": -sys.maxsize - 1,
    "highest": sys.maxsize,
    "too high": sys.maxsize + 1,
    "too low": -sys.maxsize - 2,
    "huge": 2**100,
    "half the memory there can be": sys.maxsize // 2,
    "float": 1.0,
    "Decimal": decimal.Decimal(1),
    "Int": Int(1),
    "Broken": Broken(),
    "None": None,
    "str": "1",
    "bytes": b"1",
}


@each_reader
@pytest.mark.parametrize("n", SIZES.values(), ids=SIZES.keys())
def test_read_of_any_size(ours, gevents, n):
    found = []
    for read in (ours, os.read, gevents):
        with make_pipe() as (reader, writer):
            os.write(writer, b"abc")
            found.append(error_of(read, reader, n))
    assert found[0] == found[1] == found[2]


@each_reader
def test_read_of_no_bytes_and_of_negative_size_where_there_is_nothing(ours, gevents):
    with make_pipe() as (reader, _writer):
        assert check_same((ours, os.read, gevents), reader, 0) == (None, b"")
        assert check_same((ours, os.read, gevents), reader, -1) == (OSError, errno.EINVAL)


BUFFERS = {
    "bytes": b"abcd",
    "bytearray": bytearray(b"abcd"),
    "readonly memoryview": memoryview(b"abcd"),
    "array": array.array("h", [1, 2]),
    "2-D memoryview": memoryview(b"abcd").cast("B", (2, 2)),
    "empty": b"",
    "every other": memoryview(b"abcd")[::2],
    "backwards": memoryview(b"abcd")[::-1],
    "str": "abcd",
    "empty str": "",
    "None": None,
    "int": 4,
    "list": [1, 2],
    "list of bytes": [b"ab"],
    "type": bytes,
}
released = memoryview(b"abcd")
released.release()
BUFFERS["released memoryview"] = released


@each_writer
@pytest.mark.parametrize("buffer", BUFFERS.values(), ids=BUFFERS.keys())
def test_write_of_any_buffer(ours, gevents, buffer):
    found = []
    for write in (ours, os.write, gevents):
        with make_pipe() as (reader, writer):
            outcome = error_of(write, writer, buffer)
            found.append((outcome, error_of(os.read, reader, 100)))
    assert found[0] == found[1] == found[2]


@each_writer
def test_write_to_a_pipe_without_a_reader(ours, gevents):
    with make_pipe() as (reader, writer):
        os.close(reader)
        assert check_same((ours, os.write, gevents), writer, b"x") == (BrokenPipeError, errno.EPIPE)
        assert check_same((ours, os.write, gevents), writer, b"") == (None, 0)


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])
def test_functions_on_a_socket_that_was_hung_up(blocking):
    for ours, others in [(coopos.nb_read, os.read), (coopos.tp_read, os.read), (coopos.tp_read, gevent.os.tp_read)]:
        near, far = socket.socketpair()
        with near:
            near.setblocking(blocking)
            far.close()
            assert check_same((ours, others), near.fileno(), 10) == (None, b"")
    for ours, others in [(coopos.nb_write, os.write), (coopos.tp_write, os.write), (coopos.tp_write, gevent.os.tp_write)]:
        near, far = socket.socketpair()
        with near:
            near.setblocking(blocking)
            far.close()
            assert check_same((ours, others), near.fileno(), b"x") == (BrokenPipeError, errno.EPIPE)


# ---- argument counts ---------------------------------------------------------------------------------------------------------

COUNTS = {
    "nb_read": (os.read, gevent.os.nb_read, (0, 1, 3)),
    "nb_write": (os.write, gevent.os.nb_write, (0, 1, 3)),
    "tp_read": (os.read, gevent.os.tp_read, (0, 1, 3)),
    "tp_write": (os.write, gevent.os.tp_write, (0, 1, 3)),
    "close": (os.close, gevent.os.close, (0, 2)),
    "waitpid": (os.waitpid, gevent.os.waitpid, (0, 1, 3)),
    "make_nonblocking": (gevent.os.make_nonblocking, gevent.os.make_nonblocking, (0, 2)),
    "fork_gevent": (os.fork, gevent.os.fork_gevent, (1,)),
    "forkpty_gevent": (os.forkpty, gevent.os.forkpty_gevent, (1,)),
    "fork_and_watch": (gevent.os.fork_and_watch, gevent.os.fork_and_watch, (5,)),
    "forkpty_and_watch": (gevent.os.forkpty_and_watch, gevent.os.forkpty_and_watch, (5,)),
    "posix_spawn": (os.posix_spawn, gevent.os.posix_spawn, (0, 1)),
    "posix_spawnp": (os.posix_spawnp, gevent.os.posix_spawnp, (0, 1)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_wrong_number_of_arguments(name):
    *others, counts = COUNTS[name]
    for count in counts:
        assert check_same((getattr(coopos, name), *others), *[-1] * count) == (TypeError, None)
    for functions in (getattr(coopos, name), others[1]):
        assert error_of(functions, -1, no_such_argument=1)[0] is TypeError


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("nb_read", {"fd": -1, "n": 1}),
        ("nb_write", {"fd": -1, "buf": b"x"}),
        ("tp_read", {"fd": -1, "n": 1}),
        ("tp_write", {"fd": -1, "buf": b"x"}),
        ("make_nonblocking", {"fd": -1}),
        ("waitpid", {"pid": os.getpid(), "options": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_by_name(name, kwargs):
    functions = getattr(coopos, name), getattr(gevent.os, name)
    ours, gevents = outcomes(functions, **kwargs)
    assert ours == gevents
    assert ours[0] is not TypeError


def test_close_takes_its_argument_by_name():
    assert outcomes((coopos.close, os.close), fd=10**6) == [(OSError, errno.EBADF)] * 2


# ---- a property --------------------------------------------------------------------------------------------------------------

SMALLEST_PIPE = 4096
WOULD_WAIT = "would wait"


def make_small_pipe(stack):
    """A non-blocking pipe that few writes fill."""
    reader, writer = stack.enter_context(make_pipe())
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
    return reader, writer


def by_os(function, *args):
    kind, value = error_of(function, *args)
    return WOULD_WAIT if kind is BlockingIOError else (kind, value)


def by_coopos(function, *args):
    """The same, where waiting is cut short as soon as nobody else has anything to do: a fair call lets the others run first."""
    greenlet = gevent.spawn(error_of, function, *args)
    gevent.idle()
    if greenlet.ready():
        return greenlet.value
    greenlet.kill()
    return WOULD_WAIT


steps = strategies.one_of(
    strategies.tuples(strategies.sampled_from(["nb_read", "tp_read"]), strategies.integers(0, 2 * SMALLEST_PIPE)),
    strategies.tuples(strategies.sampled_from(["nb_write", "tp_write"]), strategies.binary(max_size=20)),
    strategies.tuples(
        strategies.sampled_from(["nb_write", "tp_write"]), strategies.integers(0, 3 * SMALLEST_PIPE).map(lambda n: b"x" * n)
    ),
    strategies.sampled_from([("close reader",), ("close writer",), ("turn",)]),
)


@hypothesis.settings(max_examples=200, deadline=None, database=None)
@hypothesis.given(strategies.lists(steps, max_size=30))
def test_any_sequence_of_reads_and_writes_on_a_pipe_is_what_os_makes_of_it(sequence):
    """Result for result and error for error; what raises BlockingIOError there waits here, and has moved no byte."""
    with contextlib.ExitStack() as stack:
        ours, theirs = make_small_pipe(stack), make_small_pipe(stack)
        for name, *args in sequence:
            if name == "turn":
                turn_loop()
            elif name.startswith("close"):
                end = 0 if name == "close reader" else 1
                assert error_of(coopos.close, ours[end]) == error_of(os.close, theirs[end])
            else:
                end = 0 if "read" in name else 1
                plain = os.read if "read" in name else os.write
                assert by_coopos(getattr(coopos, name), ours[end], *args) == by_os(plain, theirs[end], *args)
        left = [by_os(os.read, reader, 1 << 20) for reader, _writer in (ours, theirs)]
        assert left[0] == left[1]
