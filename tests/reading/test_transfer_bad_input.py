"""Each function that moves bytes, with every argument that is wrong: what os makes of it."""

import io
import os

import pytest

import coopos

from ..helpers.descriptors import by_name, content_of, each_mode, make_file, readinto_by_os
from ..helpers.support import INT_MAX, Index, drain, error_of, make_pipe

pytestmark = pytest.mark.usefixtures("live_hub")

BAD_FDS = [-1, -INT_MAX - 1, 10**6, INT_MAX + 1, 2**64, Index(10**6), 1.5, None, "3", b"3", [3]]
SIZES = [0, 1, Index(2), -1, -(2**63), 2**63, 1.0, None, "1"]
OFFSETS = [0, 1, 1000, Index(2), -1, -2, -(2**63), 2**63, 1.0, "1"]
BUFFERS = [b"abcd", bytearray(b"abcd"), b"", memoryview(b"abcd")[::2], "abcd", None, 4, [1, 2]]
LISTS = [*([buffer] for buffer in BUFFERS), [], (), b"abcd", "abcd", None, 4, {}, set(), [[]], [bytearray(2)] * 1024]
LISTS += [[bytearray(2)] * 1025, (bytearray(2), bytearray(2)), iter(())]
FLAGS = [0, -1, 1 << 20, 2**31, 1.0, None, Index(0)]
READER, WRITER, FILE, OTHER_FILE, CLOSED = "reader", "writer", "file", "other file", "closed"
FDS = [*BAD_FDS, READER, WRITER, FILE, CLOSED]
#: {function: (the arguments that are right, what else to try for each)}
INPUTS = {
    "read": ([READER, 3], [FDS, SIZES]),
    "write": ([WRITER, b"xy"], [FDS, BUFFERS]),
    "readv": ([READER, [bytearray(2), bytearray(3)]], [FDS, LISTS]),
    "writev": ([WRITER, [b"x", b"yz"]], [FDS, LISTS]),
    "readinto": ([READER, bytearray(3)], [FDS, []]),
    "pread": ([FILE, 3, 1], [FDS, SIZES, OFFSETS]),
    "pwrite": ([FILE, b"xy", 1], [FDS, BUFFERS, OFFSETS]),
    "preadv": ([FILE, [bytearray(2), bytearray(3)], 1, 0], [FDS, LISTS, OFFSETS, FLAGS]),
    "pwritev": ([FILE, [b"x", b"yz"], 1, 0], [FDS, LISTS, OFFSETS, FLAGS]),
    "sendfile": ([WRITER, FILE, 1, 3], [FDS, FDS, [None, *OFFSETS], SIZES]),
    "splice": ([READER, WRITER, 3, None, None, 0], [FDS, FDS, SIZES, [None, *OFFSETS], [None, *OFFSETS], FLAGS]),
    "copy_file_range": ([FILE, OTHER_FILE, 3, None, None], [FDS, FDS, SIZES, [None, *OFFSETS], [None, *OFFSETS]]),
}


def fresh(arg):
    """A copy of what a call may change."""
    if isinstance(arg, bytearray):
        return bytearray(arg)
    return type(arg)(map(fresh, arg)) if type(arg) in (list, tuple) else arg


def outcome_and_state(function, args, blocking):
    """What it returns or raises, and what is left in every file: two pipes, one of which had something in it, and two more."""
    args = [fresh(arg) for arg in args]
    with (
        make_pipe(blocking) as (reader, filler),
        make_pipe(blocking) as (drainer, writer),
        make_file(b"0123456789") as file,
        make_file(b"abc") as other,
    ):
        closed = os.dup(file)
        os.close(closed)
        os.write(filler, b"abcdef")
        fds = {READER: reader, WRITER: writer, FILE: file, OTHER_FILE: other, CLOSED: closed}
        outcome = error_of(function, *(fds.get(arg, arg) if isinstance(arg, str) else arg for arg in args))
        positions = [os.lseek(fd, 0, os.SEEK_CUR) for fd in (file, other)]
        return outcome, str(args), [*map(drain, (reader, drainer)), *map(content_of, (file, other)), *positions]


@each_mode
@pytest.mark.parametrize("name", [by_name(name) if name != "readinto" else name for name in INPUTS])
def test_bad_input_is_what_os_makes_of_it(name, blocking):
    """Class and errno, every byte and every position."""
    right, others = INPUTS[name]
    theirs = getattr(os, name, readinto_by_os)
    different = []
    for place, values in enumerate(others):
        for value in values:
            args = [value if index == place else arg for index, arg in enumerate(right)]
            ours = outcome_and_state(getattr(coopos, name), args, blocking)
            if ours != (expected := outcome_and_state(theirs, args, blocking)):
                different.append(f"{name}: argument {place + 1} = {value!r:.40}: {ours!s:.150} instead of {expected!s:.150}")
    assert not different, "\n".join(different)


@pytest.mark.parametrize("buffer", [b"xy", memoryview(b"xy"), memoryview(bytearray(4))[::2], "xy", None], ids=repr)
def test_readinto_of_a_wrong_buffer_is_what_io_makes_of_it(buffer):
    """As os.readinto, which came with Python 3.14, and converts its argument in the same way."""
    with make_file(b"abc") as fd:
        ours = error_of(coopos.readinto, fd, buffer)
        assert ours == error_of(io.BytesIO(b"abc").readinto, buffer) and ours[0] is TypeError
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
