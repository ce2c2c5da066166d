"""Any sequence of calls, to coopos and to os on non-blocking twins: result for result, error for error, byte for byte.

What raises BlockingIOError there waits here, and has moved no byte when it is woken. What additions do is said by a loop over os.
"""

import contextlib
import dataclasses
import fcntl
import os
import socket
import tempfile

import gevent
import hypothesis
import pytest
from hypothesis import strategies

import coopos

from ..helpers.descriptors import HAS_PREADV2, content_of, frozen_hub_is_an_error, readinto_by_os
from ..helpers.support import closing, error_of, turn_loop

SMALLEST_PIPE = 4096


@pytest.fixture(autouse=True)
def _frozen_hub_is_an_error():
    with frozen_hub_is_an_error():
        yield


# ---- what os makes of it -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    error: type | None = None  # BlockingIOError of os is a wait here
    errno: int | None = None
    result: object = None
    partial: bytes = b""
    characters_written: int = 0


def outcome_of_error(ex, result=None):
    return Outcome(type(ex), getattr(ex, "errno", None), result, getattr(ex, "partial", b""), getattr(ex, "characters_written", 0))


def by_os(function, *args, **kwargs):
    try:
        return Outcome(result=function(*args, **kwargs))
    except Exception as ex:
        return outcome_of_error(ex)


def by_coopos(expected, function, *args, **kwargs):
    """The same; where os would have to wait, waiting is cut short at once."""
    if expected.error is not BlockingIOError:
        return by_os(function, *args, **kwargs)
    try:
        with gevent.Timeout(0):
            return Outcome(result=function(*args, **kwargs))
    except gevent.Timeout as ex:
        return dataclasses.replace(outcome_of_error(ex), error=BlockingIOError, errno=expected.errno)
    except Exception as ex:
        return outcome_of_error(ex)


def read_exactly_by_os(fd, n):
    received = os.read(fd, 0) if n == 0 else b""
    try:
        while len(received) < n:
            piece = os.read(fd, n - len(received))
            if not piece:
                raise EOFError
            received += piece
    except (OSError, EOFError) as ex:
        ex.partial = received
        raise
    return received


def write_all_by_os(fd, data):
    written = 0
    while True:
        try:
            written += os.write(fd, data[written:])
        except OSError as ex:
            if isinstance(ex, BlockingIOError):
                ex.characters_written = written
            raise
        if written == len(data):
            return


def function_pair(name):
    by_os = {"read_exactly": read_exactly_by_os, "write_all": write_all_by_os, "readinto": readinto_by_os}
    return getattr(coopos, name), by_os.get(name) or getattr(os, name)


def call(side, expected, name, fds, args):
    """The outcome of one call, the filled buffers included; *args* name descriptors, and say how long buffers are."""
    ours, theirs = function_pair(name)
    args = [fds[arg] if isinstance(arg, str) else arg for arg in args]
    buffers = []
    if name == "readinto":
        args[1] = bytearray(args[1])
        buffers = [args[1]]
    elif name in ("readv", "preadv"):
        args[1] = buffers = [bytearray(size) for size in args[1]]
    outcome = by_os(theirs, *args) if side == "os" else by_coopos(expected, ours, *args)
    return outcome, [bytes(buffer) for buffer in buffers]


# ---- descriptors -------------------------------------------------------------------------------------------------------------

STREAM_READERS = ["pipe reader", "fifo reader", "socket", "other socket", "second pipe reader"]
STREAM_WRITERS = ["pipe writer", "fifo writer", "socket", "other socket", "second pipe writer"]
FILES = ["file", "other file", "memory file", "read-only file", "appended file"]
OTHERS = ["null", "zero", "eventfd", "directory"]
ANY = [*STREAM_READERS, *STREAM_WRITERS, *FILES, *OTHERS]


def make_one_of_each(stack):
    """{name: descriptor in non-blocking mode}, the same each time."""
    fds = {}
    directory = stack.enter_context(tempfile.TemporaryDirectory())
    for name in ("pipe", "second pipe"):
        fds[f"{name} reader"], fds[f"{name} writer"] = os.pipe()
    path = os.path.join(directory, "fifo")
    os.mkfifo(path)
    fds["fifo reader"] = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fds["fifo writer"] = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    for name in ("pipe writer", "second pipe writer", "fifo writer"):
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            fcntl.fcntl(fds[name], fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
    fds["socket"], fds["other socket"] = (end.detach() for end in socket.socketpair())
    for name, flags in (("file", 0), ("other file", 0), ("appended file", os.O_APPEND)):
        fds[name] = os.open(os.path.join(directory, name), os.O_RDWR | os.O_CREAT | flags)
        os.write(fds[name], bytes(range(256)) * 10)
        os.lseek(fds[name], 0, os.SEEK_SET)
    fds["read-only file"] = os.open(os.path.join(directory, "file"), os.O_RDONLY)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else directory
    with tempfile.NamedTemporaryFile(dir=memory) as file:
        file.write(bytes(range(100)))
        file.flush()
        fds["memory file"] = os.open(file.name, os.O_RDWR)
    fds["null"] = os.open("/dev/null", os.O_RDWR)
    fds["zero"] = os.open("/dev/zero", os.O_RDWR)
    fds["eventfd"] = os.eventfd(0) if hasattr(os, "eventfd") else os.dup(fds["null"])
    fds["directory"] = os.open(directory, os.O_RDONLY)
    stack.enter_context(closing(*fds.values()))
    for fd in fds.values():
        os.set_blocking(fd, False)
    return fds


def what_is_left(fds):
    """Everything in every stream and file, and every position, by os alone."""
    left = {name: error_of(os.read, fds[name], 1 << 20) for name in STREAM_READERS}
    for name in FILES:
        left[name] = error_of(content_of, fds[name]), error_of(os.lseek, fds[name], 0, os.SEEK_CUR)
    return left


# ---- what may happen ---------------------------------------------------------------------------------------------------------

sizes = strategies.one_of(strategies.integers(0, 20), strategies.integers(0, 2 * SMALLEST_PIPE))
# Of /dev/zero and the sockets as much may be had; files are as long as offsets make them.
offsets = strategies.one_of(strategies.integers(-2, 300), strategies.integers(0, 20_000))
maybe_offsets = strategies.one_of(strategies.none(), strategies.none(), offsets)
short_data = strategies.binary(max_size=20)
data = strategies.one_of(short_data, sizes.map(lambda n: b"%04d" % n + b"x" * n), strategies.just((2).to_bytes(8, "little")))
lists_of_sizes = strategies.lists(sizes, max_size=4)
lists_of_data = strategies.lists(data, max_size=4)


def named(*names):
    return strategies.sampled_from([name for group in names for name in group])


readers = strategies.one_of(named(STREAM_READERS), named(FILES), named(ANY))
writers = strategies.one_of(named(STREAM_WRITERS), named(FILES), named(ANY))
files = strategies.one_of(named(FILES), named(FILES), named(ANY))


def step(name, *args):
    return strategies.tuples(strategies.just(name), *args)


steps = [
    step("read", readers, sizes),
    step("readv", readers, lists_of_sizes),
    step("readinto", readers, sizes),
    step("read_exactly", readers.filter(lambda name: name != "eventfd"), sizes),
    step("pread", files, sizes, offsets),
    step("preadv", files, lists_of_sizes, offsets),
    step("write", writers, data),
    step("writev", writers, lists_of_data),
    step("write_all", writers, data),
    step("pwrite", files, data, offsets),
    step("pwritev", files, lists_of_data, offsets),
]
if hasattr(os, "sendfile"):
    steps.append(step("sendfile", writers, files, maybe_offsets, sizes))
if hasattr(os, "splice"):
    steps.append(step("splice", readers, writers, sizes, maybe_offsets, maybe_offsets))
if hasattr(os, "copy_file_range"):
    steps.append(step("copy_file_range", files, files, sizes, maybe_offsets, maybe_offsets))
changes = [
    step("close", named(ANY)),
    step("lseek", named(FILES), strategies.integers(0, 3000)),
    step("turn"),
]
any_step = strategies.one_of(*steps, *steps, *changes)


@hypothesis.settings(
    max_examples=400, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(strategies.lists(any_step, min_size=1, max_size=40))
def test_any_sequence_of_calls_is_what_os_makes_of_it(sequence):
    with contextlib.ExitStack() as stack:
        ours, theirs = make_one_of_each(stack), make_one_of_each(stack)
        for name, *args in sequence:
            if name == "turn":
                turn_loop()
            elif name == "close":
                assert error_of(coopos.close, ours[args[0]]) == error_of(os.close, theirs[args[0]])
            elif name == "lseek":
                assert error_of(os.lseek, ours[args[0]], args[1], 0) == error_of(os.lseek, theirs[args[0]], args[1], 0)
            else:
                expected, filled = call("os", None, name, theirs, args)
                assert call("coopos", expected, name, ours, args) == (expected, filled)
        turn_loop()
        assert what_is_left(ours) == what_is_left(theirs)


# ---- streams in blocking mode ------------------------------------------------------------------------------------------------


def make_blocking_stream(stack, kind):
    if kind == "socketpair":
        reader, writer = (end.detach() for end in socket.socketpair())
    elif kind == "pipe":
        reader, writer = os.pipe()
    else:
        path = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "fifo")
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(path, os.O_WRONLY)
        os.set_blocking(reader, True)
    stack.enter_context(closing(reader, writer))
    return reader, writer


writing_steps = strategies.lists(
    strategies.one_of(
        strategies.tuples(strategies.sampled_from(["write", "write_all"]), strategies.integers(0, 100_000)),
        strategies.tuples(strategies.just("writev"), strategies.lists(strategies.integers(0, 50_000), max_size=3)),
    ),
    max_size=4,
)
READ_NAMES = ["read", "readv", "readinto", "read_exactly", *(["preadv"] if HAS_PREADV2 else [])]
reading_steps = strategies.lists(
    strategies.tuples(strategies.sampled_from(READ_NAMES), strategies.integers(1000, 100_000), strategies.integers(0, 3)),
    min_size=1,
)


@pytest.mark.parametrize("kind", ["pipe", "FIFO", "socketpair"])
@hypothesis.settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(writing_steps, reading_steps)
def test_any_writes_and_reads_of_a_blocking_stream_carry_every_byte(kind, writing, reading):
    """A write returns all it was given; a read what there is, or the end."""
    numbers = b"".join(b"%07d" % number for number in range(200_000))
    position = 0

    def write_everything():
        nonlocal position
        for name, size in writing:
            pieces = [numbers[position : position + size]] if isinstance(size, int) else []
            start = position
            for length in size if name == "writev" else ():
                pieces.append(numbers[start : start + length])
                start += length
            total = sum(map(len, pieces))
            result = getattr(coopos, name)(writer, pieces if name == "writev" else pieces[0])
            assert result == (None if name == "write_all" else total)
            position += total
        os.close(writer)

    with contextlib.ExitStack() as stack:
        reader, writer = make_blocking_stream(stack, kind)
        writer_greenlet = gevent.spawn(write_everything)
        received = bytearray()
        while True:
            name, n, turns = reading[len(received) % len(reading)]
            for _ in range(turns):
                gevent.sleep(0)
            try:
                piece = read_by(name, reader, n)
            except EOFError as ex:
                piece = ex.partial
            received += piece
            if not piece:
                break
        writer_greenlet.get()
        assert received == numbers[:position]


def read_by(name, fd, n):
    if name in ("read", "read_exactly"):
        return getattr(coopos, name)(fd, n)
    if name == "readinto":
        buffer = bytearray(n)
        nread = coopos.readinto(fd, buffer)
        return bytes(buffer[:nread])
    buffers = [bytearray(n // 3), bytearray(n - n // 3)]
    args = (fd, buffers, -1) if name == "preadv" else (fd, buffers)
    nread = getattr(coopos, name)(*args)
    return b"".join(buffers)[:nread]
