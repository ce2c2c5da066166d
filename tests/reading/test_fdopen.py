"""fdopen: what os.fdopen does with the same file, while other greenlets run."""

import errno
import io
import os
import pty
import tty
import warnings

import gevent
import pytest
from gevent.hub import get_hub

import coopos

from ..helpers.descriptors import HeldPool
from ..helpers.files import FILES
from ..helpers.support import (
    DEADLINE_S,
    HubThread,
    clog,
    closing,
    drain,
    error_of,
    make_pipe,
    parked,
    result_of,
    run_script,
    turn_loop,
)


def describe(file):
    """What a file made by fdopen is."""
    answers = {"type": type(file).__name__}
    for name in ("mode", "encoding", "errors", "newlines", "line_buffering", "write_through", "closed"):
        answers[name] = getattr(file, name, None)
    answers.update({name: error_of(getattr(file, name)) for name in ("readable", "writable", "seekable", "isatty", "tell")})
    answers["name"] = isinstance(file.name, int)
    if hasattr(file, "buffer"):
        answers["buffer"] = type(file.buffer).__name__
        file = file.buffer
    if hasattr(file, "raw"):
        file = file.raw
    answers["raw"] = [file.mode, file.closefd, file._blksize]
    return answers


FDOPENS = [os.fdopen, coopos.fdopen]
KEYWORDS = [
    {},
    {"buffering": 0},
    {"buffering": 1},
    {"buffering": 77},
    {"buffering": True},
    {"encoding": "utf-16"},
    {"encoding": "ascii", "errors": "replace"},
    {"newline": ""},
    {"newline": "\r\n"},
    {"newline": "x"},
    {"encoding": "nope"},
    {"encoding": 5},
    {"encoding": "a\0b"},
    {"errors": 5},
    {"newline": 5},
    {"buffering": 1.0},
    {"buffering": None},
    {"buffering": 2**40},
    {"buffering": -(2**40)},
    {"buffering": -7},
    {"closefd": False},
    {"closefd": 0},
    {"opener": os.open},
]
TEXT = b"one\ntwo\r\nthree\rfour\xc3\xa4"


@pytest.mark.parametrize(
    "mode", ["r", "w", "a", "x", "r+", "w+", "rt", "rb", "wb", "ab", "r+b", "br", "", "b", "t", "rw", "rbt", "rr", "z"]
)
@pytest.mark.parametrize("keywords", KEYWORDS, ids=repr)
def test_fdopen_is_what_os_fdopen_is(tmp_path, mode, keywords):
    """The same file or the same error, the same warnings, and the descriptor left open or not."""
    outcomes = []
    for number, fdopen in enumerate(FDOPENS):
        path = tmp_path / str(number)
        path.write_bytes(TEXT)
        with closing(os.open(path, os.O_RDWR)) as (fd,), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                file = fdopen(fd, mode, **keywords)
            except Exception as ex:
                outcome = [type(ex)]
            else:
                outcome = [describe(file), error_of(file.read)]
                outcome.append(error_of(file.write, "b\n\u00e4" if isinstance(file, io.TextIOBase) else b"b\n"))
                file.close()
            outcome.append(error_of(os.fstat, fd)[0])
        outcome.append([(each.category, str(each.message)) for each in caught])
        outcomes.append([*outcome, path.read_bytes()])
    assert outcomes[1] == outcomes[0]


@pytest.mark.parametrize("arguments", [("x",), (None,), (1.0,), (-1,), (987654,), (0, None), (0, 5), (0, b"r"), ()], ids=repr)
def test_fdopen_wrong_arguments(arguments):
    assert error_of(coopos.fdopen, *arguments) == error_of(os.fdopen, *arguments)


@pytest.mark.parametrize("make", FILES.values(), ids=FILES.keys())
@pytest.mark.parametrize("mode", ["r", "w", "rb", "wb", "r+b", "r+"])
def test_fdopen_other_files(make, mode):
    """Terminals are buffered by lines; what can't seek can't be opened for both."""
    outcomes = []
    for fdopen in FDOPENS:
        with closing(*make()) as (fd, _peer):
            try:
                with fdopen(fd, mode) as file:
                    outcome = [describe(file)]
            except OSError as ex:
                outcome = [type(ex)]
            outcomes.append([*outcome, error_of(os.fstat, fd)[0]])
    assert outcomes[1] == outcomes[0]


STREAMS = ["pipe", "socket"]


def buffer_size(file):
    buffer = getattr(file, "buffer", file)
    return buffer.__sizeof__() - type(buffer).__basicsize__


@pytest.mark.parametrize("make", FILES.values(), ids=FILES.keys())
@pytest.mark.parametrize("mode", ["r", "w", "rb", "wb"])
@pytest.mark.parametrize("buffering", [-1, 1, 100])
@pytest.mark.filterwarnings("ignore:line buffering")
def test_fdopen_buffer_size(make, mode, buffering):
    """That of os.fdopen; but what reads a pipe or socket reads ahead half of what a pipe holds, unless it is told how much."""
    sizes = []
    for fdopen in FDOPENS:
        with closing(*make()) as (fd, _peer), fdopen(fd, mode, buffering, closefd=False) as file:
            sizes.append(buffer_size(file))
    is_ours = make in [FILES[name] for name in STREAMS] and "r" in mode and buffering != 100
    assert sizes[1] == (32 * 1024 if is_ours else sizes[0])


@pytest.mark.parametrize("mode", ["r", "w", "a", "r+", "rb", "wb", "r+b"])
def test_fdopen_buffer_size_of_a_regular_file(path, mode):
    sizes = []
    for fdopen in FDOPENS:
        with fdopen(os.open(path, os.O_RDWR), mode) as file:
            sizes.append(buffer_size(file))
    assert sizes[1] == sizes[0]


@pytest.mark.parametrize("ends", [True], indirect=True, ids=["blocking"])
@pytest.mark.parametrize("kind", ["pipe", "fifo"], indirect=True)
def test_fdopen_leaves_the_rest_of_a_full_pipe(ends):
    """The writer has room for the other half while this one is read."""
    reader, writer = ends
    size = clog(writer)
    with coopos.fdopen(reader, "rb", closefd=False) as file:
        assert file.read(1) == b"x"
        assert len(drain(reader)) == size - 32 * 1024


def test_fdopen_of_a_directory_leaves_it_open():
    with closing(os.open("/", os.O_RDONLY)) as (fd,):
        assert error_of(coopos.fdopen, fd) == (IsADirectoryError, errno.EISDIR)
        os.fstat(fd)


def test_fdopen_warns_of_the_encoding_as_io_open():
    run_script(
        """
        import os, warnings
        import coopos
        for mode, keywords in ("r", {}), ("r", {"encoding": "locale"}), ("rb", {}), ("rb", {"buffering": 1}):
            seen = []
            for fdopen in os.fdopen, coopos.fdopen:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    fdopen(os.open("/dev/null", os.O_RDONLY), mode, **keywords).close()
                seen.append([(each.category, str(each.message)) for each in caught])
            assert seen[0] == seen[1], seen
            if not keywords and mode == "r":
                assert len(seen[0]) == 1 and caught[0].filename == "<string>", caught
        """,
        PYTHONWARNDEFAULTENCODING="1",
    )


@pytest.mark.parametrize("newline", [None, "", "\n", "\r", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "latin-1"])
def test_fdopen_text_is_read_and_written_as_by_os_fdopen(newline, encoding):
    """Lines in pieces, while both ends wait for each other."""
    text = "one\ntwo\r\nthree\rfo\u00e4r\n" * 50
    outcomes = []
    for fdopen in FDOPENS:
        reader, writer = os.pipe()
        with fdopen(writer, "w", encoding=encoding, newline=newline) as file:
            file.writelines(text.splitlines(keepends=True))
        with fdopen(reader, "r", encoding=encoding, newline=newline) as file:
            outcomes.append([list(file), file.newlines])
    assert outcomes[1] == outcomes[0]


def test_fdopen_lines_while_others_run(ends):
    """A line is there as soon as it is complete."""
    reader, writer = ends
    with (
        coopos.fdopen(reader, encoding="utf-8", closefd=False) as lines,
        coopos.fdopen(writer, "w", 1, "utf-8", closefd=False) as out,
    ):
        for number in range(20):
            greenlet = parked(lines.readline)
            out.write("lin")
            turn_loop()
            assert not greenlet.ready()
            out.write(f"e {number}\n")
            assert result_of(greenlet) == f"line {number}\n"


def test_fdopen_of_a_terminal():
    """Line by line, in cooked mode, both ways."""
    master, terminal = pty.openpty()
    attributes = tty.tcgetattr(terminal)
    attributes[3] &= ~tty.ECHO
    tty.tcsetattr(terminal, tty.TCSANOW, attributes)
    with coopos.fdopen(terminal, "r", encoding="ascii") as lines, coopos.FileIO(master, "r+") as keyboard:
        with coopos.fdopen(os.dup(terminal), "w", encoding="ascii") as screen:
            assert screen.line_buffering
            for number in range(3):
                greenlet = parked(lines.readline)
                keyboard.write(b"typed %d\n" % number)
                assert result_of(greenlet) == f"typed {number}\n"
                greenlet = parked(keyboard.read, 100)
                screen.write("shown")
                turn_loop()
                assert not greenlet.ready()
                screen.write(" now\n")
                assert result_of(greenlet) == b"shown now\r\n"


@pytest.mark.parametrize("buffering", [-1, 1000, 1_000_000])
@pytest.mark.parametrize("is_blocking", [True, False])
def test_fdopen_large_data(buffering, is_blocking):
    data = b"".join(b"%09d\n" % number for number in range(200_000))
    reader, writer = os.pipe()
    os.set_blocking(reader, is_blocking)
    os.set_blocking(writer, is_blocking)
    with coopos.fdopen(reader, "rb", buffering) as source:

        def put():
            with coopos.fdopen(writer, "wb", buffering) as sink:
                assert sink.write(data) == len(data)

        putter = gevent.spawn(put)
        assert result_of(gevent.spawn(source.read)) == data
        result_of(putter)


def test_fdopen_random(path):
    """Reading and writing in turn."""
    with coopos.fdopen(os.open(path, os.O_RDWR), "r+b") as file:
        assert file.read(5) == b"01234"
        assert file.write(b"xy") == 2
        assert file.read(2) == b"78"
        file.seek(0)
        assert file.readline() == b"01234xy78\n"
        file.truncate(10)
    assert path.read_bytes() == b"01234xy78\n"


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_fdopen_flush_of_a_broken_pipe(mode):
    """What os.fdopen's file raises, on flush and on close; the descriptor is closed all the same."""
    outcomes = []
    for fdopen in FDOPENS:
        reader, writer = os.pipe()
        file = fdopen(writer, mode)
        os.close(reader)
        file.write("x" if mode == "w" else b"x")
        outcomes.append([error_of(file.flush), error_of(file.close), error_of(file.close), file.closed])
        outcomes[-1].append(error_of(os.fstat, writer))
    assert outcomes[1] == outcomes[0]
    assert outcomes[1][0] == (BrokenPipeError, errno.EPIPE)


def test_fdopen_raw_close_wakes_the_reader_of_a_buffer():
    with make_pipe(blocking=True) as (reader, _writer):
        file = coopos.fdopen(reader, "rb")
        greenlet = parked(error_of, file.read, 100)
        closer = parked(file.close)
        file.raw.close()
        assert result_of(greenlet)[0] in (OSError, ValueError)
        result_of(closer)


@pytest.mark.parametrize("mode", ["r", "rb"])
def test_fdopen_close_when_the_reader_inside_is_killed(mode):
    """It waits for the reader, not for the bytes that the reader waited for."""
    with make_pipe() as (reader, _writer):
        file = coopos.fdopen(reader, mode)
        greenlet = parked(file.read, 10)
        closers = [parked(file.close) for _ in range(2)]
        greenlet.kill()
        for closer in closers:
            result_of(closer)
        assert file.closed


def test_fdopen_close_when_the_writer_inside_is_killed():
    with make_pipe() as (_reader, writer):
        clog(writer)
        file = coopos.fdopen(writer, "wb")
        greenlet = parked(file.write, b"x" * 300_000)
        closer = parked(file.close)
        greenlet.kill()
        result_of(closer)
        assert file.closed


def test_fdopen_close_when_the_reader_inside_times_out():
    with make_pipe() as (reader, _writer):
        file = coopos.fdopen(reader, "rb")

        def read():
            with gevent.Timeout(0.01, False):
                file.read(10)

        greenlet = parked(read)
        closer = parked(file.close)
        result_of(greenlet)
        result_of(closer)
        assert file.closed


def test_fdopen_close_waits_through_every_read_of_the_reader_inside():
    """A buffer reads several times for one call, and has its lock until it is done."""
    with make_pipe() as (reader, writer):
        file = coopos.fdopen(reader, "rb")
        greenlet = parked(file.read, 4)
        closer = parked(file.close)
        for piece in (b"a", b"b", b"c"):
            os.write(writer, piece)
            turn_loop()
            assert not closer.ready()
        os.write(writer, b"d")
        assert result_of(greenlet) == b"abcd"
        result_of(closer)


def test_fdopen_close_killed_while_another_reads():
    """It leaves nothing: the reader reads on, and the next close() is told."""
    with make_pipe() as (reader, writer):
        file = coopos.fdopen(reader, "rb")
        greenlet = parked(file.read, 4)
        parked(file.close).kill()
        closer = parked(file.close)
        os.write(writer, b"data")
        assert result_of(greenlet) == b"data"
        result_of(closer)


def test_fdopen_close_killed_after_the_reader_inside_has_left():
    """Its turn to run was due already, and must not come again."""
    with make_pipe() as (reader, writer), coopos.fdopen(reader, "rb", closefd=False) as file:
        greenlet = parked(file.read, 4)
        closer = parked(file.close)
        greenlet.kill(block=False)
        get_hub().loop.run_callback(closer.throw, gevent.GreenletExit)
        turn_loop()
        assert greenlet.ready()
        assert closer.ready()
        os.write(writer, b"data")
        assert file.read(4) == b"data"


@pytest.mark.parametrize("operation", ["close", "flush"])
def test_fdopen_close_while_another_writes_in_the_threadpool(path, operation):
    """There is no descriptor to wait for."""
    file = coopos.fdopen(os.open(path, os.O_RDWR), "wb")
    with HeldPool() as pool:
        writer = gevent.spawn(file.write, b"x" * 300_000)
        if not pool.until_held(writer):
            pytest.skip("it takes no thread here")
        closer = parked(getattr(file, operation))
        pool.open()
        assert result_of(writer) == 300_000
        result_of(closer)
    file.close()
    assert path.read_bytes() == b"x" * 300_000


def test_fdopen_close_in_the_hub_while_another_reads():
    """The hub can't wait: it is a reentrant call, as ever."""
    with make_pipe() as (reader, writer), coopos.fdopen(reader, "rb", closefd=False) as file:
        greenlet = parked(file.read, 4)
        outcome = []
        get_hub().loop.run_callback(lambda: outcome.append(error_of(file.close)))
        turn_loop()
        assert outcome == [(RuntimeError, None)]
        os.write(writer, b"data")
        assert result_of(greenlet) == b"data"


def test_fdopen_close_in_the_middle_of_ones_own_read():
    """It could only wait for itself."""

    class Greenlet(gevent.Greenlet):
        def switch_out(self):
            if not outcome:
                outcome.append(error_of(file.close))

    outcome = []
    with make_pipe() as (reader, writer), coopos.fdopen(reader, "rb", closefd=False) as file:
        greenlet = Greenlet.spawn(file.read, 4)
        turn_loop()
        assert outcome == [(RuntimeError, None)]
        os.write(writer, b"data")
        assert result_of(greenlet) == b"data"


def test_fdopen_close_while_another_threads_greenlet_reads():
    """The buffer's own lock is waited for, and the thread stands still."""
    with make_pipe() as (reader, writer), HubThread() as thread:
        file = coopos.fdopen(reader, "rb")
        greenlet = thread.call(parked, file.read, 4)
        writes = gevent.spawn_later(0, get_hub().threadpool.spawn, os.write, writer, b"data")
        writes.get(timeout=DEADLINE_S).get(timeout=DEADLINE_S)
        file.close()
        assert thread.call(result_of, greenlet) == b"data"


def test_fdopen_buffer_times_out_and_reads_on():
    """A reader of lines that is timed out before anything came has lost nothing."""
    with make_pipe() as (reader, writer), coopos.fdopen(reader, "rb", closefd=False) as file:
        for _ in range(3):
            with pytest.raises(gevent.Timeout), gevent.Timeout(0.001):
                file.readline()
            os.write(writer, b"line\n")
            assert file.readline() == b"line\n"


def test_fdopen_file_can_be_drained_by_others():
    """What others read is not waited for by those who know better: the file waits on until more comes."""
    with make_pipe() as (reader, writer), coopos.FileIO(reader, closefd=False) as file:
        greenlet = parked(file.read, 10)
        os.write(writer, b"lost")
        assert drain(reader) == b"lost"
        turn_loop()
        assert not greenlet.ready()
        os.write(writer, b"found")
        assert result_of(greenlet) == b"found"
