"""Descriptors that never become ready, or that poll(2) says something else of than stat(2): as os serves them, so do we."""

import contextlib
import errno
import os
import select
import socket

import pytest

import coopos

from ..helpers.support import closing, error_of, parked, result_of, run_script

needs_splice = pytest.mark.skipif(not hasattr(os, "splice"), reason="no splice")


@pytest.fixture
def odd():
    """{what: a descriptor}, none of which is ever ready."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        made = {"listening socket": listening.fileno()}
        made["socket"], _ = (stack.enter_context(end).fileno() for end in socket.socketpair())
        if hasattr(select, "epoll"):
            made["epoll"] = stack.enter_context(select.epoll()).fileno()
        if hasattr(os, "pidfd_open"):
            made["pidfd"] = stack.enter_context(closing(os.pidfd_open(os.getpid())))[0]
        yield made


@needs_splice
@pytest.mark.parametrize("offset", [None, 5])
@pytest.mark.parametrize("what", ["listening socket", "epoll", "pidfd"])
def test_splice_of_what_is_never_ready_is_refused_as_by_os(odd, what, offset):
    with closing(*os.pipe()) as (reader, writer):
        os.write(writer, b"data")
        for args in [(odd[what], writer, 7, offset), (reader, odd[what], 4, None, offset)]:
            expected = error_of(os.splice, *args)
            assert expected and error_of(coopos.splice, *args) == expected


@needs_splice
def test_splice_with_an_offset_of_a_socket_is_refused_before_anything_comes(odd):
    with closing(*os.pipe()) as (_, writer):
        args = odd["socket"], writer, 7, 5
        assert error_of(coopos.splice, *args) == error_of(os.splice, *args)


@pytest.mark.parametrize("what", ["listening socket", "epoll", "pidfd"])
def test_sendfile_of_what_is_never_ready_is_refused_as_by_os(odd, what):
    with closing(*os.pipe()) as (_, writer):
        args = writer, odd[what], None, 7
        assert error_of(coopos.sendfile, *args) == error_of(os.sendfile, *args)


@pytest.mark.skipif(not os.access("/dev/random", os.W_OK), reason="no /dev/random to write to")
@pytest.mark.parametrize("nowait", ["", "0"])
def test_write_to_a_device_that_is_never_ready_for_it(nowait):
    """Once it has enough, /dev/random takes what is written, and doesn't say so to poll(2)."""
    run_script(
        """
        import os, gevent, coopos
        fd = os.open("/dev/random", os.O_WRONLY)
        reader, writer = os.pipe()
        with gevent.Timeout(30):
            assert coopos.write(fd, b"seed") == 4
            assert coopos.FileIO(fd, "w", closefd=False).write(b"seed") == 4
            os.write(writer, b"seed")
            assert not hasattr(os, "splice") or coopos.splice(reader, fd, 4) == 4
        """,
        COOPOS_NOWAIT=nowait,
    )


def test_write_of_a_file_that_is_closed_in_its_turn():
    """COOPOS_FAIRNESS: whoever is in write() while the file is closed under him writes nothing, whatever has the number by then."""
    run_script(
        """
        import os, tempfile, gevent, coopos
        reader, writer = os.pipe()
        file = coopos.FileIO(writer, "w", closefd=False)
        with tempfile.TemporaryFile() as other:
            def write():
                file.write(b"1")
                try:
                    file.write(b"2")
                except ValueError as ex:
                    return str(ex)
            def close():
                file.close()
                os.dup2(other.fileno(), writer)
            writing = gevent.spawn(write)
            gevent.joinall([writing, gevent.spawn(close)])
            assert writing.value == "I/O operation on closed file"
            assert os.fstat(other.fileno()).st_size == 0
        """,
        COOPOS_FAIRNESS="1",
    )


def messages():
    """The kernel's messages, read to their end: a regular file to stat(2), and one that waits to poll(2)."""
    try:
        fd = os.open("/proc/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while os.read(fd, 65536):
                pass
        os.close(os.open("/dev/kmsg", os.O_WRONLY))
    except OSError:
        pytest.skip("may not read the kernel's messages")
    return fd


def say():
    with closing(os.open("/dev/kmsg", os.O_WRONLY)) as (fd,):
        os.write(fd, b"test of coopos\n")


def test_nb_read_of_a_regular_file_that_waits():
    with closing(messages()) as (fd,):
        greenlet = parked(coopos.nb_read, fd, 4096)
        say()
        assert b"test of coopos" in result_of(greenlet)


def test_read_of_a_regular_file_that_waits_takes_no_place_at_the_disks():
    os.close(messages())
    run_script(
        """
        import os, tempfile, gevent, coopos
        fd = os.open("/proc/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        try:
            while os.read(fd, 65536):
                pass
        except BlockingIOError:
            os.set_blocking(fd, True)
        reading = gevent.spawn(coopos.read, fd, 4096)
        gevent.sleep(0.01)
        with tempfile.TemporaryFile() as file, gevent.Timeout(30):
            coopos.fsync(file.fileno())
        assert not reading.ready() or b"" not in [reading.value]
        reading.kill()
        """,
        COOPOS_THREADS="1",
    )


@needs_splice
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_splice_that_is_not_to_wait_does_not_wait_for_a_socket(kind):
    """The kernel's flag is about the pipe alone."""
    with closing(*os.pipe()) as (reader, writer):
        ours, theirs = socket.socketpair(type=kind)
        with ours, theirs:
            args = ours.fileno(), writer, 10, None, None, os.SPLICE_F_NONBLOCK
            assert error_of(coopos.splice, *args) == (BlockingIOError, errno.EAGAIN)
            theirs.send(b"data")
            assert coopos.splice(*args) == 4
            assert os.read(reader, 10) == b"data"
            args = reader, ours.fileno(), 10, None, None, os.SPLICE_F_NONBLOCK
            assert error_of(coopos.splice, *args) == (BlockingIOError, errno.EAGAIN)


@needs_splice
@pytest.mark.skipif(not os.access("/dev/random", os.W_OK), reason="no /dev/random to write to")
@pytest.mark.parametrize("blocking", [True, False])
def test_splice_of_a_pipe_that_is_empty_to_a_device_that_is_never_ready(blocking):
    """It waits for the pipe alone."""
    with closing(*os.pipe()) as (reader, writer), closing(os.open("/dev/random", os.O_WRONLY)) as (device,):
        os.set_blocking(device, blocking)
        greenlet = parked(coopos.splice, reader, device, 4)
        os.write(writer, b"seed")
        assert result_of(greenlet) == 4
