"""tp_read and tp_write on every kind of descriptor."""

import contextlib
import errno
import os
import pathlib
import socket
import threading
import tty

import gevent
import pytest
from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import get_hub

import coopos

from ..helpers.descriptors import each_mode, each_stream, flags_of
from ..helpers.support import HubThread, clog, closing, drain, error_of, make_pipe, needs_rwf_nowait, parked, result_of, turn_loop

pytestmark = pytest.mark.smoke


@contextlib.contextmanager
def make_stream(kind, path):
    """(reader, writer) of one kind, in blocking mode, *path* being free for a FIFO."""
    with contextlib.ExitStack() as stack:
        if kind == "pipe":
            reader, writer = os.pipe()
        elif kind == "FIFO":
            os.mkfifo(path)
            reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            writer = os.open(path, os.O_WRONLY)
            os.set_blocking(reader, True)
        elif kind in ("pty master", "pty slave"):
            master, slave = os.openpty()
            tty.setraw(slave)
            reader, writer = (master, slave) if kind == "pty master" else (slave, master)
        elif kind == "TCP":
            with socket.create_server(("127.0.0.1", 0)) as server:
                reader = socket.create_connection(server.getsockname()).detach()
                writer = server.accept()[0].detach()
        else:
            reader, writer = (end.detach() for end in socket.socketpair())
        stack.enter_context(closing(reader, writer))
        yield reader, writer


@each_stream
@each_mode
def test_tp_read_and_tp_write_carry_data_over_any_stream(kind, blocking, tmp_path):
    with make_stream(kind, tmp_path / "fifo") as (reader, writer):
        os.set_blocking(reader, blocking)
        os.set_blocking(writer, blocking)
        flags = flags_of(reader), flags_of(writer)
        for data in (b"one", b"two", b"x" * 1000):
            assert coopos.tp_write(writer, data) == len(data)
            received = b""
            while len(received) < len(data):
                received += coopos.tp_read(reader, 4096)
            assert received == data
        assert (flags_of(reader), flags_of(writer)) == flags


@each_stream
def test_descriptor_that_is_put_into_blocking_mode_while_greenlets_wait(kind, tmp_path):
    """Both are woken by one byte: who finds none waits on, and the hub with nobody."""
    with make_stream(kind, tmp_path / "fifo") as (reader, writer):
        os.set_blocking(reader, False)
        first, second = parked(coopos.read, reader, 1), parked(coopos.nb_read, reader, 1)
        os.set_blocking(reader, True)
        rescue = threading.Timer(20, os.write, (writer, b"late"))
        rescue.start()
        os.write(writer, b"1")
        assert result_of(first) == b"1"
        turn_loop()
        assert not second.ready()
        rescue.cancel()
        os.write(writer, b"2")
        assert result_of(second) == b"2"


@pytest.mark.parametrize("kind", ["pipe", "FIFO", "socketpair"])  # the others make room by themselves
def test_full_descriptor_that_is_put_into_blocking_mode_while_a_greenlet_waits(kind, tmp_path):
    with make_stream(kind, tmp_path / "fifo") as (reader, writer):
        clogged = clog(writer)
        os.set_blocking(writer, False)
        data = b"y" * 300_000
        greenlet = parked(coopos.write, writer, data)
        os.set_blocking(writer, True)
        received = b""
        rescue = threading.Timer(20, drain, (reader,))
        rescue.start()
        while len(received) < clogged + len(data):
            received += coopos.read(reader, 65536)
        rescue.cancel()
        assert result_of(greenlet) == len(data)
        assert received[clogged:] == data


def let_threads_try():
    """Let the threadpool's threads get at what was given them before."""
    for _ in range(3):
        get_hub().threadpool.apply(lambda: None)


@each_stream
@each_mode
def test_tp_read_waits_for_any_stream_while_others_run(kind, blocking, tmp_path):
    with make_stream(kind, tmp_path / "fifo") as (reader, writer):
        os.set_blocking(reader, blocking)
        flags = flags_of(reader)
        greenlet = parked(coopos.tp_read, reader, 10)
        let_threads_try()
        assert flags_of(reader) == flags
        os.write(writer, b"abc")
        assert result_of(greenlet) == b"abc"
        assert flags_of(reader) == flags


@pytest.mark.parametrize("kind", ["pipe", "FIFO", "socketpair"])  # the kernel moves what fills the others on by itself
@each_mode
def test_tp_write_waits_for_room_in_any_stream_while_others_run(kind, blocking, tmp_path):
    with make_stream(kind, tmp_path / "fifo") as (reader, writer):
        size = clog(writer)
        os.set_blocking(writer, blocking)
        flags = flags_of(writer)
        greenlet = parked(coopos.tp_write, writer, b"y")
        let_threads_try()
        assert flags_of(writer) == flags
        received = b""
        while len(received) < size:
            received += os.read(reader, size)
        assert result_of(greenlet) == 1
        assert received + drain(reader) == b"x" * size + b"y"
        assert flags_of(writer) == flags


@each_stream
def test_tp_read_does_not_touch_the_flags_of_a_shared_description(kind, tmp_path):
    """Whoever else holds the open file, by a dup or in another process, sees it as it was."""
    with make_stream(kind, tmp_path / "fifo") as (reader, writer), closing(os.dup(reader), os.dup(writer)) as copies:
        flags = list(map(flags_of, copies))
        greenlet = parked(coopos.tp_read, reader, 10)
        assert list(map(flags_of, copies)) == flags
        assert coopos.tp_write(writer, b"abc") == 3
        assert result_of(greenlet) == b"abc"
        assert list(map(flags_of, copies)) == flags


def test_tp_write_to_a_blocking_pipe_writes_all_of_it():
    data = bytes(range(256)) * 4096
    with make_pipe(blocking=True) as (reader, writer):
        greenlet = parked(coopos.tp_write, writer, data)
        received = gevent.spawn(lambda: b"".join(iter(lambda: coopos.tp_read(reader, 1 << 20), b"")))
        assert result_of(greenlet) == len(data)
        os.close(writer)
        assert result_of(received) == data


@needs_rwf_nowait
def test_tp_write_whose_reader_goes_away_says_how_much_it_wrote():
    with make_pipe(blocking=True) as (reader, writer):
        greenlet = parked(coopos.tp_write, writer, b"x" * 1_000_000)
        written = len(drain(reader))
        turn_loop()
        os.close(reader)
        assert written <= result_of(greenlet) < 1_000_000
        with pytest.raises(BrokenPipeError):
            coopos.tp_write(writer, b"x")


@needs_rwf_nowait
def test_tp_write_killed_in_the_middle_has_written_the_first_part():
    data = bytes(range(256)) * 4096
    with make_pipe(blocking=True) as (reader, writer):
        greenlet = parked(coopos.tp_write, writer, data)
        greenlet.kill()
        received = drain(reader)
        turn_loop()
        assert received and data.startswith(received)
        assert drain(reader) == b""


@each_stream
def test_tp_read_on_fifteen_silent_streams_leaves_the_threadpool_free(kind, tmp_path):
    pool = get_hub().threadpool
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(make_stream(kind, tmp_path / f"fifo{number}")) for number in range(15)]
        greenlets = [parked(coopos.tp_read, reader, 10) for reader, _writer in streams]
        assert pool.maxsize < len(greenlets)
        assert len(pool) == 0
        assert pool.apply(lambda: "free") == "free"
        for _reader, writer in streams:
            os.write(writer, b"abc")
        assert [result_of(greenlet) for greenlet in greenlets] == [b"abc"] * 15


@each_stream
@each_mode
def test_tp_read_killed_while_it_waits_for_any_stream_has_taken_nothing(kind, blocking, tmp_path):
    with make_stream(kind, tmp_path / "fifo") as (reader, writer):
        os.set_blocking(reader, blocking)
        greenlet = parked(coopos.tp_read, reader, 10)
        greenlet.kill()
        os.write(writer, b"abc")
        let_threads_try()
        assert coopos.tp_read(reader, 10) == b"abc"


@each_stream
def test_tp_read_by_two_on_a_blocking_stream_keeps_the_hub_running(kind, tmp_path):
    """One byte makes the stream ready for both; whoever comes too late waits on, in a thread if need be, and can be killed."""
    with make_stream(kind, tmp_path / "fifo") as (reader, writer):
        greenlets = [parked(coopos.tp_read, reader, 1), parked(coopos.tp_read, reader, 1)]
        os.write(writer, b"1")
        [first] = gevent.wait(greenlets, count=1)
        [second] = set(greenlets) - {first}
        assert result_of(first) == b"1"
        let_threads_try()
        assert not second.ready()
        second.kill()
        assert isinstance(second.value, gevent.GreenletExit)
        os.write(writer, b"2")  # for the thread, where there is one
        get_hub().threadpool.join()


def test_tp_read_reads_a_regular_file_from_beginning_to_end(tmp_path):
    content = os.urandom(1_000_000)
    (tmp_path / "file").write_bytes(content)
    with closing(os.open(tmp_path / "file", os.O_RDONLY)) as (fd,):
        flags = flags_of(fd)
        assert coopos.tp_read(fd, 0) == b""
        pieces = []
        while piece := coopos.tp_read(fd, 65536):
            pieces.append(piece)
        assert b"".join(pieces) == content
        assert coopos.tp_read(fd, 10) == b""
        assert os.lseek(fd, 0, os.SEEK_CUR) == len(content)
        with open(tmp_path / "file", "ab") as file:
            file.write(b"more")
        assert coopos.tp_read(fd, 10) == b"more"
        os.lseek(fd, -2, os.SEEK_END)
        assert coopos.tp_read(fd, 10) == b"re"
        assert flags_of(fd) == flags


def test_tp_read_reads_a_file_that_is_not_cached(tmp_path):
    content = os.urandom(1_000_000)
    (tmp_path / "file").write_bytes(content)
    with closing(os.open(tmp_path / "file", os.O_RDONLY)) as (fd,):
        if hasattr(os, "posix_fadvise"):
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        received = b""
        while piece := coopos.tp_read(fd, 65536):
            received += piece
        assert received == content


def test_tp_write_writes_a_regular_file(tmp_path):
    with closing(os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)) as (fd,):
        flags = flags_of(fd)
        assert coopos.tp_write(fd, b"one") == 3
        assert coopos.tp_write(fd, memoryview(bytearray(b"two"))) == 3
        assert coopos.tp_write(fd, b"") == 0
        os.lseek(fd, 1, os.SEEK_SET)
        assert coopos.tp_write(fd, b"N") == 1
        assert flags_of(fd) == flags
    with closing(os.open(tmp_path / "file", os.O_WRONLY | os.O_APPEND)) as (fd,):
        assert coopos.tp_write(fd, b"three") == 5
    assert (tmp_path / "file").read_bytes() == b"oNetwothree"


@pytest.mark.parametrize("path", ["/proc/version", "/proc/self/cmdline", "/proc/cpuinfo", "/dev/null"])
def test_tp_read_reads_a_kernels_file(path):
    if not os.path.exists(path):
        pytest.skip(f"no {path} here")
    expected = pathlib.Path(path).read_bytes()
    with closing(os.open(path, os.O_RDONLY)) as (fd,):
        received = b""
        while piece := coopos.tp_read(fd, 65536):
            received += piece
    if path != "/proc/cpuinfo":  # its frequencies change
        assert received == expected
    assert received[:20] == expected[:20]


def test_tp_read_of_an_endless_device():
    with closing(os.open("/dev/zero", os.O_RDONLY)) as (fd,):
        assert coopos.tp_read(fd, 1000) == bytes(1000)


def test_tp_write_to_a_full_device_is_enospc():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with closing(os.open("/dev/full", os.O_WRONLY)) as (fd,):
        assert error_of(coopos.tp_write, fd, b"x") == (OSError, errno.ENOSPC)


def test_tp_read_of_a_hung_up_terminal_is_what_os_read_says():
    for read in (os.read, coopos.tp_read):
        with make_stream("pty master", None) as (master, slave):
            os.close(slave)
            outcome = error_of(read, master, 10)
            assert outcome in ((OSError, errno.EIO), (None, b""))


def test_tp_read_of_a_file_in_the_hub_itself_is_an_error_not_a_hang_where_it_takes_a_thread(tmp_path):
    """At the end of a file kernels are asked twice."""
    outcome = []
    with closing(os.open(tmp_path / "file", os.O_RDONLY | os.O_CREAT)) as (fd,):
        get_hub().loop.run_callback(lambda: outcome.append(error_of(coopos.tp_read, fd, 100)))
        turn_loop()
        get_hub().threadpool.join()
    assert outcome in ([(None, b"")], [(BlockingSwitchOutError, None)])


@pytest.mark.parametrize("kind", ["pipe", "FIFO", "pty slave", "socketpair"])
def test_tp_read_in_the_hub_itself_that_fails_has_taken_nothing(kind, tmp_path):
    """What is there is returned or left, not read by a thread after the error was raised."""
    outcome = []
    with make_stream(kind, tmp_path / "fifo") as (reader, writer):
        os.write(writer, b"abc")
        get_hub().loop.run_callback(lambda: outcome.append(error_of(coopos.tp_read, reader, 10)))
        turn_loop()
        get_hub().threadpool.join()
        [(kind_of_error, data)] = outcome
        assert kind_of_error in (None, BlockingSwitchOutError)
        assert (drain(reader) if kind_of_error else data) == b"abc"


def test_tp_read_and_tp_write_work_in_another_threads_hub(tmp_path):
    with closing(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)) as (fd,), HubThread() as thread:
        assert thread.call(coopos.tp_write, fd, b"content") == 7
        os.lseek(fd, 0, os.SEEK_SET)
        assert thread.call(coopos.tp_read, fd, 100) == b"content"
        assert thread.call(coopos.tp_read, fd, 100) == b""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_sendfile_of_a_file_that_the_kernel_refuses():
    """By reading and writing, to a descriptor in blocking mode."""
    with make_pipe(blocking=True) as (reader, writer), open("/proc/self/status", "rb") as file:
        assert coopos.sendfile(writer, file.fileno(), 0, 5) == 5
        assert os.read(reader, 10) == b"Name:"
