"""nb_read, nb_write, make_nonblocking, tp_read and tp_write: descriptors that may have to wait."""

import array
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import socket
import sys
import threading
from functools import partial

import gevent
import pytest
from gevent.exceptions import BlockingSwitchOutError, InvalidSwitchError
from gevent.hub import get_hub

import coopos
import coopos.subprocess

from ..helpers.descriptors import FILLABLE, each_of, frozen_hub_is_an_error, make_ends
from ..helpers.support import (
    DEADLINE_S,
    HubThread,
    clog,
    closing,
    drain,
    error_of,
    make_clogged_pipe,
    make_pipe,
    needs_libev,
    parked,
    result_of,
    run_script,
    turn_loop,
)

pytestmark = pytest.mark.smoke
each_reader = pytest.mark.parametrize("read", [coopos.nb_read, coopos.tp_read], ids=["nb_read", "tp_read"])
each_writer = pytest.mark.parametrize("write", [coopos.nb_write, coopos.tp_write], ids=["nb_write", "tp_write"])
needs_no_fairness = pytest.mark.skipif(bool(os.environ.get("COOPOS_FAIRNESS")), reason="COOPOS_FAIRNESS: ready calls switch")


def flags_of(fd):
    return fcntl.fcntl(fd, fcntl.F_GETFL)


# ---- a mode that changes -----------------------------------------------------------------------------------------------------


def put_into_blocking_mode(fd):
    os.set_blocking(fd, True)


def give_to_a_program(fd):
    """As its standard input, for which the file is put into blocking mode, if it can't be opened once more."""
    process = coopos.subprocess.Popen([sys.executable, "-I", "-S", "-c", ""], stdin=fd)
    assert process.wait(DEADLINE_S) == 0
    put_into_blocking_mode(fd)


each_change = pytest.mark.parametrize("change", [put_into_blocking_mode, give_to_a_program])
each_changing_kind = each_of(["pipe", "FIFO", "pty slave", "socketpair", "TCP"])


@each_changing_kind
@each_change
@pytest.mark.parametrize("by_file", [False, True], ids=["nb_read", "FileIO"])
def test_nb_read_of_what_is_in_blocking_mode_by_now(kind, change, by_file, tmp_path):
    """It was in non-blocking mode the last time: nothing is remembered of that."""
    with make_ends(kind, tmp_path, blocking=False) as ends, frozen_hub_is_an_error():
        file = coopos.FileIO(ends.reader, closefd=False) if by_file else None
        read = file.read if by_file else partial(coopos.nb_read, ends.reader)
        ends.feed()
        assert result_of(gevent.spawn(read, 3)) == b"abc"
        change(ends.reader)
        greenlet = parked(read, 3)
        ends.feed()
        assert result_of(greenlet) == b"abc"
        assert os.get_blocking(ends.reader)
        if by_file:
            file.close()


@each_of(FILLABLE)
@each_change
@pytest.mark.parametrize("by_file", [False, True], ids=["nb_write", "FileIO"])
def test_nb_write_to_what_is_in_blocking_mode_by_now(kind, change, by_file, tmp_path):
    with make_ends(kind, tmp_path, blocking=False) as ends, frozen_hub_is_an_error():
        file = coopos.FileIO(ends.writer, "w", closefd=False) if by_file else None
        write = file.write if by_file else partial(coopos.nb_write, ends.writer)
        assert write(b"x") == 1
        change(ends.writer)
        clog(ends.writer)
        greenlet = parked(write, b"y")
        drain(ends.reader)
        assert result_of(greenlet) == 1
        if by_file:
            file.close()


# ---- what is ready -----------------------------------------------------------------------------------------------------------


@needs_no_fairness
@each_reader
def test_read_takes_what_is_there_without_switching(read):
    with make_pipe() as (reader, writer):
        os.write(writer, b"abcdef")
        turn_loop()
        other = gevent.spawn(lambda: None)
        assert read(reader, 4) == b"abcd"
        assert read(reader, 100) == b"ef"
        assert not other.started or not other.ready()
        other.join()


@needs_no_fairness
@each_writer
def test_write_puts_what_fits_without_switching(write):
    with make_pipe() as (reader, writer):
        turn_loop()
        other = gevent.spawn(lambda: None)
        assert write(writer, b"abc") == 3
        assert not other.ready()
        assert os.read(reader, 100) == b"abc"
        other.join()


@each_reader
def test_read_of_no_bytes_does_not_wait(read):
    with make_pipe() as (reader, _writer):
        assert read(reader, 0) == b""


@each_writer
def test_write_of_no_bytes_does_not_wait(write):
    with make_clogged_pipe() as (_reader, writer, _size):
        assert write(writer, b"") == 0


@each_reader
def test_read_at_end_of_file_is_empty(read):
    with make_pipe() as (reader, writer):
        os.write(writer, b"last")
        os.close(writer)
        assert read(reader, 10) == b"last"
        assert read(reader, 10) == b""
        assert read(reader, 10) == b""


@each_writer
def test_write_without_a_reader_is_epipe(write):
    with make_pipe() as (reader, writer):
        os.close(reader)
        with pytest.raises(BrokenPipeError) as caught:
            write(writer, b"x")
        assert caught.value.errno == errno.EPIPE


def test_write_to_a_nearly_full_pipe_is_partial():
    """In non-blocking mode tp_write, too, returns once some of the buffer is written."""
    data = b"y" * 3 * mmap.PAGESIZE
    for write in (coopos.nb_write, coopos.tp_write):
        with make_clogged_pipe() as (reader, writer, size):
            os.read(reader, mmap.PAGESIZE)
            written = write(writer, data)
            assert 0 < written < len(data)
            assert drain(reader) == b"x" * (size - mmap.PAGESIZE) + b"y" * written


BUFFERS = {
    "bytes": lambda: b"abcdefgh",
    "bytearray": lambda: bytearray(b"abcdefgh"),
    "memoryview": lambda: memoryview(bytearray(b"abcdefgh")),
    "readonly": lambda: memoryview(bytearray(b"abcdefgh")).toreadonly(),
    "slice": lambda: memoryview(b"--abcdefgh--")[2:-2],
    "2-D": lambda: memoryview(b"abcdefgh").cast("B", (2, 4)),
    "array": lambda: array.array("i", b"abcdefgh"),
    "ctypes": lambda: (ctypes.c_char * 8)(*b"abcdefgh"),
    "empty": lambda: b"",
    "empty array": lambda: array.array("d"),
}


@pytest.mark.parametrize("kind", BUFFERS)
@each_writer
def test_write_takes_every_contiguous_buffer(write, kind):
    buffer = BUFFERS[kind]()
    with make_pipe() as (reader, writer):
        assert write(writer, buffer) == memoryview(buffer).nbytes
        assert drain(reader) == memoryview(buffer).tobytes()


def test_write_takes_a_mapped_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"mapped")
    with make_pipe() as (reader, writer), path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        assert coopos.nb_write(writer, mapped) == 6
        assert coopos.tp_write(writer, mapped) == 6
        assert drain(reader) == b"mappedmapped"


def test_eventfd_is_read_and_written():
    if not hasattr(os, "eventfd"):
        pytest.skip("no eventfd here")
    with closing(os.eventfd(0, os.EFD_NONBLOCK)) as (fd,):
        for read, write in ((coopos.nb_read, coopos.nb_write), (coopos.tp_read, coopos.tp_write)):
            greenlet = parked(read, fd, 8)
            assert write(fd, (3).to_bytes(8, "little")) == 8
            assert int.from_bytes(result_of(greenlet), "little") == 3


# ---- waiting -----------------------------------------------------------------------------------------------------------------


@each_reader
def test_read_waits_for_data_while_others_run(read):
    with make_pipe() as (reader, writer):
        greenlet = parked(read, reader, 10)
        os.write(writer, b"abc")
        assert result_of(greenlet) == b"abc"


@each_reader
def test_read_waits_for_end_of_file(read):
    with make_pipe() as (reader, writer):
        greenlet = parked(read, reader, 10)
        os.close(writer)
        assert result_of(greenlet) == b""


@each_writer
def test_write_waits_for_room_while_others_run(write):
    with make_clogged_pipe() as (reader, writer, size):
        greenlet = parked(write, writer, b"y")
        assert drain(reader) == b"x" * size
        assert result_of(greenlet) == 1
        assert drain(reader) == b"y"


@each_writer
def test_write_that_waits_is_told_that_the_reader_is_gone(write):
    with make_clogged_pipe() as (reader, writer, _size):
        greenlet = parked(write, writer, b"y")
        os.close(reader)
        with pytest.raises(BrokenPipeError):
            result_of(greenlet)


@each_reader
def test_read_wakes_each_of_many_readers_with_its_own_data(read):
    with contextlib.ExitStack() as stack:
        pipes = [stack.enter_context(make_pipe()) for _ in range(100)]
        greenlets = [gevent.spawn(read, reader, 10) for reader, _writer in pipes]
        turn_loop()
        for number, (_reader, writer) in reversed(list(enumerate(pipes))):
            os.write(writer, b"%d" % number)
        assert [result_of(greenlet) for greenlet in greenlets] == [b"%d" % number for number in range(100)]


@each_reader
def test_read_by_two_gives_each_byte_to_one(read):
    with make_pipe() as (reader, writer):
        greenlets = [parked(read, reader, 1), parked(read, reader, 1)]
        os.write(writer, b"1")
        turn_loop()
        assert [greenlet.ready() for greenlet in greenlets].count(True) == 1
        os.write(writer, b"2")
        assert sorted(map(result_of, greenlets)) == [b"1", b"2"]


@each_writer
def test_write_by_two_gets_both_buffers_in(write):
    with make_clogged_pipe() as (reader, writer, size):
        greenlets = [parked(write, writer, b"1"), parked(write, writer, b"2")]
        assert len(drain(reader)) == size
        assert [result_of(greenlet) for greenlet in greenlets] == [1, 1]
        assert sorted(drain(reader)) == sorted(b"12")


@pytest.mark.parametrize("first", ["reader", "writer"])
def test_read_and_write_wait_on_one_descriptor(first):
    """Each is woken by its own event, whoever parked first, and whichever comes first."""
    for read, write in ((coopos.nb_read, coopos.nb_write), (coopos.tp_read, coopos.tp_write)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            fd = ours.fileno()
            clog(fd)
            if first == "reader":
                reading, writing = parked(read, fd, 10), parked(write, fd, b"y")
            else:
                writing, reading = parked(write, fd, b"y"), parked(read, fd, 10)
            if first == "reader":
                theirs.send(b"abc")
                assert result_of(reading) == b"abc"
                assert not writing.ready()
                drain(theirs.fileno())
                assert result_of(writing) == 1
            else:
                drain(theirs.fileno())
                assert result_of(writing) == 1
                assert not reading.ready()
                theirs.send(b"abc")
                assert result_of(reading) == b"abc"


@each_writer
def test_write_locks_its_buffer_while_it_waits(write):
    buffer = bytearray(b"y" * 10)
    with make_clogged_pipe() as (_reader, writer, _size):
        greenlet = parked(write, writer, buffer)
        with pytest.raises(BufferError):
            buffer.append(1)
        greenlet.kill()
        buffer.append(1)


@each_writer
def test_write_releases_its_buffer_when_it_fails(write):
    buffer = bytearray(b"y")
    with make_pipe() as (reader, writer):
        os.close(reader)
        with pytest.raises(BrokenPipeError):
            write(writer, buffer)
        buffer.append(1)


# ---- killed, timed out, woken by something else ------------------------------------------------------------------------------


@each_reader
def test_read_killed_while_it_waits_has_taken_nothing(read):
    with make_pipe() as (reader, writer):
        greenlet = parked(read, reader, 10)
        greenlet.kill()
        os.write(writer, b"abc")
        turn_loop()
        assert drain(reader) == b"abc"


@each_reader
def test_read_killed_as_its_data_comes_has_taken_nothing(read):
    with make_pipe() as (reader, writer):
        greenlet = parked(read, reader, 10)
        os.write(writer, b"abc")
        greenlet.kill()
        assert isinstance(greenlet.value, gevent.GreenletExit)
        assert drain(reader) == b"abc"


@each_reader
def test_read_timed_out_has_taken_nothing(read):
    with make_pipe() as (reader, writer):
        with gevent.Timeout(0) as timeout, pytest.raises(gevent.Timeout) as caught:
            read(reader, 10)
        assert caught.value is timeout
        os.write(writer, b"abc")
        assert read(reader, 10) == b"abc"


@each_reader
def test_read_timed_out_as_its_data_comes_returns_it_or_leaves_it(read):
    """Both are due in one turn of the loop; whichever wins, the byte is in one place."""
    with make_pipe() as (reader, writer):
        for turn in range(100):
            data = b"%02d" % turn
            get_hub().loop.run_callback(os.write, writer, data)
            taken = None
            with gevent.Timeout(0, False):
                taken = read(reader, 10)
            turn_loop()
            assert (taken or drain(reader)) == data
            assert drain(reader) == b""


@each_writer
def test_write_killed_while_it_waits_has_put_nothing(write):
    with make_clogged_pipe() as (reader, writer, size):
        greenlet = parked(write, writer, b"y")
        greenlet.kill()
        turn_loop()
        assert drain(reader) == b"x" * size
        assert write(writer, b"z") == 1
        assert drain(reader) == b"z"


@each_writer
def test_write_timed_out_has_put_nothing(write):
    with make_clogged_pipe() as (reader, writer, size):
        with gevent.Timeout(0), pytest.raises(gevent.Timeout):
            write(writer, b"y")
        assert drain(reader) == b"x" * size


@each_reader
def test_read_after_a_kill_waits_as_before(read):
    """A watcher that a killed greenlet gave back serves the next one."""
    with make_pipe() as (reader, writer):
        for _ in range(10):
            parked(read, reader, 1).kill()
            greenlet = parked(read, reader, 1)
            os.write(writer, b"x")
            assert result_of(greenlet) == b"x"


@each_reader
def test_read_switched_into_by_a_stranger_is_an_invalid_switch(read):
    outcome = []
    with make_pipe() as (reader, writer):
        greenlet = parked(lambda: outcome.append(error_of(read, reader, 1)))
        get_hub().loop.run_callback(gevent.getcurrent().switch)
        greenlet.switch("not what it waits for")
        assert outcome == [(InvalidSwitchError, None)]
        os.write(writer, b"x")
        turn_loop()
        assert drain(reader) == b"x"


@pytest.mark.parametrize("function", ["nb_read", "nb_write", "tp_read", "tp_write"])
def test_call_in_the_hub_itself_is_an_error_not_a_hang(function):
    outcome = []
    with make_clogged_pipe() as (_reader, writer, _size), make_pipe() as (reader, _writer):
        args = (reader, 1) if function.endswith("read") else (writer, b"y")
        get_hub().loop.run_callback(lambda: outcome.append(error_of(getattr(coopos, function), *args)))
        turn_loop()
    assert outcome == [(BlockingSwitchOutError, None)]


@each_reader
def test_read_in_the_hub_itself_takes_what_is_there(read):
    outcome = []
    with make_pipe() as (reader, writer):
        os.write(writer, b"abc")
        get_hub().loop.run_callback(lambda: outcome.append(read(reader, 10)))
        turn_loop()
    assert outcome == [b"abc"]


# ---- signals -----------------------------------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """What a signal handler raises."""


@contextlib.contextmanager
def signals_until(enough, handle):
    """SIGUSR1 to this thread again and again, *enough* times; the last one is answered by ``handle()``.

    One that comes just before a system call doesn't interrupt it, so the next is sent whether or not that one was noticed.
    """
    count = 0
    noticed = threading.Event()

    def on_signal(_signum, _frame):
        nonlocal count
        count += 1
        noticed.set()
        if count == enough:
            handle()

    def send():
        while count < enough:
            noticed.clear()
            signal.pthread_kill(main, signal.SIGUSR1)
            noticed.wait(0.01)

    main = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, on_signal)
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        yield
    finally:
        sender.join(DEADLINE_S)
        signal.signal(signal.SIGUSR1, before)
    assert count >= enough


def test_nb_read_goes_on_after_signal_handlers_have_run():
    with make_pipe(blocking=True) as (reader, writer), signals_until(20, lambda: os.write(writer, b"abc")):
        assert coopos.nb_read(reader, 10) == b"abc"


def test_nb_write_goes_on_after_signal_handlers_have_run():
    with make_clogged_pipe(blocking=True) as (reader, writer, _size), signals_until(20, lambda: drain(reader)):
        assert coopos.nb_write(writer, b"y") == 1


def interrupt():
    raise Interrupted


@needs_libev  # gevent's libuv loop is Python: a handler that raises in it ends the hub
def test_nb_read_lets_a_signal_handlers_exception_out():
    with make_pipe(blocking=True) as (reader, writer):
        with pytest.raises(Interrupted), signals_until(20, interrupt):
            coopos.nb_read(reader, 10)
        os.write(writer, b"abc")
        assert drain(reader) == b"abc"


@needs_libev  # gevent's libuv loop is Python: a handler that raises in it ends the hub
def test_nb_write_lets_a_signal_handlers_exception_out():
    buffer = bytearray(b"y")
    with make_clogged_pipe(blocking=True) as (reader, writer, size):
        with pytest.raises(Interrupted), signals_until(20, interrupt):
            coopos.nb_write(writer, buffer)
        buffer.append(1)
        assert len(drain(reader)) == size


@each_reader
def test_read_that_waits_lets_signal_handlers_run(read):
    with make_pipe() as (reader, writer), signals_until(20, lambda: os.write(writer, b"abc")):
        assert read(reader, 10) == b"abc"


# ---- numbers used again ------------------------------------------------------------------------------------------------------


def write_now(writer, data):
    os.write(writer, data)


def write_after_a_turn(writer, data):
    gevent.idle()
    os.write(writer, data)


@pytest.mark.parametrize("write", [write_now, write_after_a_turn])
@each_reader
def test_read_misses_no_wake_when_the_number_is_another_pipe_each_time(read, write):
    """Closed and opened by plain os calls, without a turn of the loop in between: the loop is not told."""
    numbers = set()
    for turn in range(300):
        with make_pipe() as (reader, writer):
            numbers.add(reader)
            gevent.spawn(write, writer, b"%d" % turn)
            assert read(reader, 10) == b"%d" % turn
    assert len(numbers) == 1


@each_reader
def test_read_misses_no_wake_when_the_number_is_replaced_by_dup2(read):
    with make_pipe() as (reader, _writer):
        for turn in range(300):
            with make_pipe() as (another, writer):
                os.dup2(another, reader)
                gevent.spawn(write_after_a_turn, writer, b"%d" % turn)
                assert read(reader, 10) == b"%d" % turn


@each_writer
def test_write_misses_no_wake_when_the_number_is_another_pipe_each_time(write):
    for _ in range(100):
        with make_clogged_pipe() as (reader, writer, _size):
            draining = gevent.spawn(lambda reader=reader: (gevent.idle(), drain(reader)))
            assert write(writer, b"y") == 1
            draining.join()


@each_reader
def test_read_misses_no_wake_when_a_killed_waits_number_is_used_again(read):
    for turn in range(300):
        with make_pipe() as (reader, _writer):
            waiting = gevent.spawn(read, reader, 1)
            gevent.idle()
            waiting.kill()
        with make_pipe() as (again, writer):
            assert again == reader
            gevent.spawn(write_after_a_turn, writer, b"%d" % turn)
            assert read(again, 10) == b"%d" % turn


@each_reader
def test_read_misses_no_wake_when_reader_and_writer_swap_numbers(read):
    """The number that was waited on for reading is next waited on for writing, and back."""
    for turn in range(100):
        with make_pipe() as (one, two):
            if turn % 2:
                gevent.spawn(write_after_a_turn, two, b"x")
                assert read(one, 1) == b"x"
            else:
                # The lower number, till now a reader, becomes the writing end.
                with closing(os.dup(one)) as (spare,):
                    os.dup2(two, one)
                    clog(one)
                    draining = gevent.spawn(lambda spare=spare: (gevent.idle(), drain(spare)))
                    assert coopos.nb_write(one, b"y") == 1
                    draining.join()


# ---- threads and processes ---------------------------------------------------------------------------------------------------


@each_reader
def test_read_works_in_another_threads_hub(read):
    with make_pipe() as (reader, writer), HubThread() as thread:
        greenlet = thread.parked(read, reader, 10)
        os.write(writer, b"abc")
        assert thread.result_of(greenlet) == b"abc"


@each_writer
def test_write_works_in_another_threads_hub(write):
    with make_clogged_pipe() as (reader, writer, size), HubThread() as thread:
        greenlet = thread.parked(write, writer, b"y")
        received = os.read(reader, size)
        assert thread.result_of(greenlet) == 1
        assert received + drain(reader) == b"x" * size + b"y"


@each_reader
def test_read_in_two_threads_on_one_descriptor_gives_each_byte_to_one(read):
    with make_pipe() as (reader, writer), HubThread() as thread:
        there, here = thread.parked(read, reader, 1), parked(read, reader, 1)
        os.write(writer, b"12")
        assert sorted([thread.result_of(there), result_of(here)]) == [b"1", b"2"]


@each_reader
def test_read_in_threads_one_after_another_reuses_no_dead_threads_watcher(read):
    with make_pipe() as (reader, writer):
        for _ in range(5):
            with HubThread() as thread:
                for _ in range(2):
                    greenlet = thread.parked(read, reader, 10)
                    os.write(writer, b"abc")
                    assert thread.result_of(greenlet) == b"abc"


def test_functions_work_in_a_forked_child(tmp_path):
    """With the parent's greenlets parked, and its threadpool in use."""
    (tmp_path / "file").write_text("content")
    out = run_script(
        """
        import os
        import gevent
        from gevent.hub import get_hub
        import coopos

        def check(who):
            reader, writer = os.pipe()
            coopos.make_nonblocking(reader)
            for read in (coopos.nb_read, coopos.tp_read):
                greenlet = gevent.spawn(read, reader, 10)
                gevent.idle()
                os.write(writer, b"data")
                assert greenlet.get() == b"data"
            fd = os.open(os.environ["A_FILE"], os.O_RDONLY)
            assert coopos.tp_read(fd, 100) == b"content"
            assert coopos.tp_read(fd, 100) == b""
            print(who, flush=True)

        mine, writer = os.pipe()
        coopos.make_nonblocking(mine)
        waiting = gevent.spawn(coopos.nb_read, mine, 10)
        gevent.idle()
        check("before")
        pid = coopos.fork_gevent()
        if not pid:
            check("child")
            os._exit(0)
        assert coopos.waitpid(pid, 0) == (pid, 0)
        check("parent")
        os.write(writer, b"x")
        assert waiting.get() == b"x"
        """,
        A_FILE=os.fspath(tmp_path / "file"),
    )
    assert out == "before\nchild\nparent\n"


# ---- make_nonblocking --------------------------------------------------------------------------------------------------------


def test_make_nonblocking_says_whether_it_changed_the_flag():
    with make_pipe(blocking=True) as (reader, writer):
        before = flags_of(reader)
        assert coopos.make_nonblocking(reader) is True
        assert flags_of(reader) == before | os.O_NONBLOCK
        assert coopos.make_nonblocking(reader) is None
        assert flags_of(reader) == before | os.O_NONBLOCK
        assert os.get_blocking(writer)


def test_make_nonblocking_takes_an_object_with_fileno():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert coopos.make_nonblocking(ours) is True
        assert not os.get_blocking(ours.fileno())


def test_make_nonblocking_of_a_closed_descriptor_is_ebadf():
    with make_pipe() as (reader, _writer):
        os.close(reader)
        assert error_of(coopos.make_nonblocking, reader) == (OSError, errno.EBADF)
