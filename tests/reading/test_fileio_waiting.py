"""FileIO: what waits for a file, while other greenlets run; who is killed, and who waits beside others."""

import dataclasses
import errno
import os

import gevent
import pytest
from gevent.hub import get_hub

import coopos

from ..helpers.files import files, have_waited, io_watchers, pipe_files, socket_pair
from ..helpers.support import (
    DEADLINE_S,
    HAS_RWF_NOWAIT,
    HubThread,
    clog,
    closing,
    deadline,
    drain,
    error_of,
    make_pipe,
    open_fds,
    parked,
    result_of,
    run_script,
    turn_loop,
)

# ---- waiting -----------------------------------------------------------------------------------------------------------------

READS = {
    "read": lambda file: file.read(100),
    "readinto": lambda file: bytes(buffer[: file.readinto(buffer)]) if (buffer := bytearray(100)) else None,
    "readline": lambda file: file.readline(),
}


@pytest.mark.smoke
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_read_waits_in_the_hub(ends, read):
    """On every kind of file, again and again, after short reads too."""
    with files(*ends) as (reader, writer):
        for number in range(3):
            greenlet = parked(read, reader)
            data = b"line %d\n" % number
            assert writer.write(data) == len(data)
            assert result_of(greenlet) == data
            assert gevent.spawn(writer.write, b"12\n").get(timeout=DEADLINE_S) == 3
            assert result_of(gevent.spawn(read, reader)) == b"12\n"


def test_read_of_more_than_was_asked_for(ends):
    """What is left is there at once for the next."""
    with files(*ends) as (reader, writer):
        greenlet = parked(reader.read, 4)
        writer.write(b"0123456789")
        assert result_of(greenlet) == b"0123"
        assert result_of(gevent.spawn(reader.read, 4)) == b"4567"
        assert result_of(gevent.spawn(reader.read, 4)) == b"89"
        greenlet = parked(reader.read, 4)
        writer.write(b"x")
        assert result_of(greenlet) == b"x"


@pytest.mark.parametrize("ends", [True], indirect=True, ids=["blocking"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "fifo"], indirect=True)
def test_readall_until_the_writer_closes(ends):
    reader, writer = ends
    with coopos.FileIO(reader, closefd=False) as file:
        greenlet = parked(file.read)
        os.write(writer, b"one")
        turn_loop()
        os.write(writer, b"two")
        os.close(writer)
        assert result_of(greenlet) == b"onetwo"
        assert file.read() == file.read(5) == b""


def test_write_waits_in_the_hub(ends):
    """Until there is room, and, in blocking mode, until everything is written."""
    with files(*ends) as (reader, writer):
        size = clog(ends[1])
        greenlet = gevent.spawn(writer.write, b"y" * 10)  # a terminal may have found some room again
        turn_loop()
        got = b""
        with deadline():
            while not greenlet.ready() or len(got) < size + greenlet.value:
                got += reader.read(65536)
        assert got == b"x" * size + b"y" * result_of(greenlet)


def test_large_data_while_others_run(ends, kind):
    """Both ends in one hub; a third greenlet has its turns meanwhile."""
    turns = []

    def turn():
        while True:
            turns.append(1)
            gevent.sleep(0.001)  # one that is always ready would keep the interpreter's lock from the threads

    data = bytes(range(1, 251)) * (400 if kind == "pty" else 4000)
    with files(*ends) as (reader, writer):

        def put():
            rest = memoryview(data)
            while rest:
                rest = rest[writer.write(rest) :]

        ticker = gevent.spawn(turn)
        putter = gevent.spawn(put)
        got = b""
        with deadline():
            while len(got) < len(data):
                got += reader.read(10_000)
        result_of(putter)
        ticker.kill()
    assert got == data
    assert turns


@pytest.mark.parametrize("has_waited", [False, True])
@pytest.mark.parametrize("mode", ["rb", "wb"])
def test_file_in_the_hub_stands_still(mode, has_waited):
    """Nothing could switch there; a signal handler that runs while the hub sleeps waits for a program as in any program."""
    script = "sleep 0.05; echo out; exec >&-; cat >/dev/null" if mode == "rb" else "sleep 0.05; cat > /dev/null"
    with make_pipe(blocking=True) as (reader, writer):
        ours, theirs = (reader, writer) if mode == "rb" else (writer, reader)
        if mode == "wb" or not has_waited:
            clog(writer)
        if mode == "rb":
            drain(reader)
        with coopos.fdopen(ours, mode, 0, closefd=False) as file:
            if has_waited and mode == "rb":
                waiter = parked(file.read, 1)
                os.write(writer, b"x")
                assert result_of(waiter) == b"x"
            actions = [(os.POSIX_SPAWN_DUP2, theirs, int(mode == "rb")), (os.POSIX_SPAWN_CLOSE, ours)]
            pid = os.posix_spawn("/bin/sh", ["sh", "-c", script], os.environ, file_actions=actions)
            outcome = []
            args = (100,) if mode == "rb" else (b"x" * 300_000,)
            get_hub().loop.run_callback(lambda: outcome.append((file.read if mode == "rb" else file.write)(*args)))
            turn_loop()
        assert outcome == [b"out\n"] if mode == "rb" else 0 < outcome[0] <= 300_000
        os.close(writer)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_file_in_a_thread_without_a_hub(tmp_path):
    """It waits as a thread does, and makes no hub, whose descriptors nobody would close."""
    run_script("""
        import os, threading, coopos
        from gevent.hub import _get_hub
        found = []
        def use():
            reader, writer = os.pipe()
            with coopos.fdopen(reader, "rb", 0) as file, coopos.fdopen(writer, "wb", 0) as other:
                timer = threading.Timer(0.02, other.write, [b"data"])
                timer.start()
                found.append(file.read(100))
                timer.join()
                timer = threading.Timer(0.02, coopos.write, [writer, b"data"])
                timer.start()
                found.append(coopos.read(reader, 100))
                timer.join()
            with open("file", "wb+", 0) as file:
                found.append(coopos.write(file.fileno(), b"x" * 10_000_000))
                coopos.fsync(file.fileno())
            found.append(_get_hub())
        os.chdir(os.environ["DIRECTORY"])
        before = os.listdir("/dev/fd")
        for _ in range(3):
            thread = threading.Thread(target=use)
            thread.start()
            thread.join()
        assert found == [b"data", b"data", 10_000_000, None] * 3, found
        assert os.listdir("/dev/fd") == before
    """, DIRECTORY=str(tmp_path))


@pytest.mark.parametrize("mode", ["r", "w"])
def test_open_of_a_fifo_waits_in_the_hub(tmp_path, mode):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    greenlet = parked(coopos.FileIO, path, mode)
    with coopos.FileIO(path, "w" if mode == "r" else "r") as ours, result_of(greenlet) as theirs:
        reader, writer = (ours, theirs) if mode == "w" else (theirs, ours)
        assert writer.write(b"x") == 1
        assert reader.read(5) == b"x"


def test_open_of_a_fifo_killed_leaves_nothing(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    before = open_fds()
    parked(coopos.FileIO, path).kill()
    turn_loop()
    assert open_fds() == before


# ---- killed ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_killed_reader_loses_nothing(ends, read):
    with files(*ends) as (reader, writer):
        for _ in range(3):
            parked(read, reader).kill()
            writer.write(b"one\n")
            assert result_of(gevent.spawn(read, reader)) == b"one\n"


def test_timed_out_reader_loses_nothing(ends):
    with files(*ends) as (reader, writer):
        for _ in range(3):
            with pytest.raises(gevent.Timeout), gevent.Timeout(0.001):
                reader.read(100)
            writer.write(b"one\n")
            assert result_of(gevent.spawn(reader.read, 100)) == b"one\n"


def test_reader_killed_in_the_moment_of_success(ends):
    """What came is the next reader's."""
    with files(*ends) as (reader, writer):
        for _ in range(3):
            greenlet = parked(reader.read, 100)
            writer.write(b"one\n")
            greenlet.kill()
            assert greenlet.value in (b"one\n", None) or isinstance(greenlet.value, gevent.GreenletExit)
            if greenlet.value != b"one\n":
                assert result_of(gevent.spawn(reader.read, 100)) == b"one\n"


def test_readall_killed_tells_what_it_read():
    with pipe_files() as (reader, writer):
        writer.write(b"one")
        with pytest.raises(gevent.Timeout) as caught, gevent.Timeout(0.001):
            reader.readall()
        assert caught.value.partial == b"one"


def test_readall_lets_out_an_exception_that_refuses_attributes():
    @dataclasses.dataclass(frozen=True)
    class Frozen(Exception):
        why: str

    with pipe_files() as (reader, _):
        greenlet = parked(reader.readall)
        greenlet.kill(Frozen("thrown in"), block=False)
        with pytest.raises(Frozen):
            result_of(greenlet)


@pytest.mark.parametrize("kind", ["pipe", "socket", "fifo"], indirect=True)  # a full terminal soon finds room again
def test_killed_writer_has_written_nothing(ends):
    with files(*ends) as (reader, writer):
        size = clog(ends[1])
        parked(writer.write, b"y").kill()
        got = b""
        while len(got) < size:
            got += reader.read(65536)
        assert got == b"x" * size
        parked(reader.read, 1).kill()


# ---- who waits for a file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
def test_two_readers_on_one_file(is_warm):
    """Each gets what comes; none is forgotten."""
    with pipe_files() as (reader, writer):
        if is_warm:
            have_waited(reader, writer.write)
        greenlets = [parked(reader.read, 1) for _ in range(3)]
        writer.write(b"abc")
        assert sorted(result_of(greenlet) for greenlet in greenlets) == [b"a", b"b", b"c"]
        greenlets = [parked(reader.read, 1) for _ in range(3)]
        greenlets[0].kill()
        writer.write(b"de")
        assert sorted(result_of(greenlet) for greenlet in greenlets[1:]) == [b"d", b"e"]


def test_reader_in_another_threads_hub():
    """Before, while and after this one reads; each in its own hub."""
    with pipe_files() as (reader, writer), HubThread() as thread:
        have_waited(reader, writer.write)
        theirs = thread.parked(reader.read, 1)
        writer.write(b"a")
        assert thread.result_of(theirs) == b"a"
        ours, theirs = parked(reader.read, 1), thread.parked(reader.read, 1)
        writer.write(b"bc")
        assert {result_of(ours), thread.result_of(theirs)} == {b"b", b"c"}
        have_waited(reader, writer.write)


def test_first_reader_in_another_threads_hub_that_ends():
    """The file works on, and can be closed, though the loop that has waited for it is no more."""
    run_script("""
        import os, threading
        import gevent
        import coopos
        def wait_once():
            greenlet = gevent.spawn(reader.read, 100)
            gevent.idle()
            writer.write(b"x")
            assert greenlet.get(timeout=20) == b"x"
        def visit():
            wait_once()
            gevent.get_hub().destroy(destroy_loop=True)
        for _ in range(3):
            reader, writer = (coopos.FileIO(fd, mode) for fd, mode in zip(os.pipe(), "rw"))
            thread = threading.Thread(target=visit)
            thread.start()
            thread.join()
            wait_once()
            fd = reader.fileno()
            reader.close(), writer.close()
            try:
                os.fstat(fd)
            except OSError:
                pass
            else:
                raise AssertionError("still open")
    """)


@pytest.mark.parametrize("closefd", [True, False])
def test_close_wakes_the_reader(ends, kind, closefd):
    reader, _writer = ends
    file = coopos.FileIO(os.dup(reader) if closefd else reader, closefd=closefd)
    if not closefd and os.get_blocking(reader) and (kind in ("pty", "fifo") or not HAS_RWF_NOWAIT):
        file.close()
        pytest.skip("the kernel can't be asked about it: its reader waits as one of coopos.read")
    greenlet = parked(error_of, file.read, 100)
    file.close()
    assert result_of(greenlet) == (OSError, errno.EBADF)
    if not closefd:
        os.fstat(reader)


def test_close_wakes_every_reader_and_writer():
    """The second reader, and who waits to write, too."""
    ours, theirs = socket_pair()
    with closing(theirs):
        clog(ours)
        file = coopos.FileIO(ours, "r+")
        greenlets = [parked(error_of, file.read, 1), parked(error_of, file.read, 1), parked(error_of, file.write, b"x" * 100)]
        file.close()
        assert [result_of(greenlet) for greenlet in greenlets] == [(OSError, errno.EBADF)] * 3
        assert error_of(os.fstat, ours) == (OSError, errno.EBADF)


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("closefd", [True, False])
def test_close_in_another_thread_wakes_the_reader(is_warm, closefd):
    with make_pipe() as (fd, writer), HubThread() as thread:
        reader = coopos.FileIO(fd, closefd=closefd)
        if is_warm:
            have_waited(reader, lambda data: os.write(writer, data))
        greenlet = parked(error_of, reader.read, 100)
        thread.call(reader.close)
        assert result_of(greenlet) == (OSError, errno.EBADF)
        turn_loop()
        assert error_of(os.fstat, fd)[0] == (OSError if closefd else None)


def test_close_wakes_readers_in_other_threads_hubs():
    with make_pipe() as (fd, writer), HubThread() as one, HubThread() as other:
        reader = coopos.FileIO(fd)
        one.call(have_waited, reader, lambda data: os.write(writer, data))
        greenlets = [(thread, thread.parked(error_of, reader.read, 100)) for thread in (one, other)]
        ours = parked(error_of, reader.read, 100)
        reader.close()
        assert result_of(ours) == (OSError, errno.EBADF)
        assert [thread.result_of(greenlet) for thread, greenlet in greenlets] == [(OSError, errno.EBADF)] * 2


def test_close_in_a_thread_without_a_hub_wakes_the_reader():
    with make_pipe() as (fd, _writer):
        reader = coopos.FileIO(fd)
        greenlet = parked(error_of, reader.read, 100)
        get_hub().threadpool.apply(reader.close)
        assert result_of(greenlet) == (OSError, errno.EBADF)


def test_reader_killed_after_the_close():
    """It is told once, and leaves nothing behind."""
    with make_pipe() as (fd, _writer):
        reader = coopos.FileIO(fd)
        greenlet = parked(reader.read, 100)
        reader.close()
        greenlet.kill()
        turn_loop()


@pytest.mark.parametrize("closefd", [True, False])
def test_close_with_nobody_waiting_leaves_no_watcher(closefd):
    with make_pipe() as (fd, writer):
        reader = coopos.FileIO(fd, closefd=closefd)
        have_waited(reader, lambda data: os.write(writer, data))
        reader.close()
        assert io_watchers() == []
        assert error_of(os.fstat, fd)[0] == (OSError if closefd else None)


def test_number_used_again_right_after_close():
    """The new file's reader is woken by the new file, and by nothing of the old one's."""
    for _ in range(5):
        with make_pipe() as (fd, writer):
            reader = coopos.FileIO(fd)
            have_waited(reader, lambda data, writer=writer: os.write(writer, data))
            reader.close()
            again, other = os.pipe()
            assert again == fd
            with coopos.FileIO(again) as second, coopos.FileIO(other, "w") as peer:
                greenlet = parked(second.read, 10)
                os.close(writer)
                turn_loop()
                assert not greenlet.ready()
                peer.write(b"new")
                assert result_of(greenlet) == b"new"
                have_waited(second, peer.write)


def test_number_used_again_under_a_reader_that_was_woken():
    with make_pipe() as (fd, _writer):
        reader = coopos.FileIO(fd)
        first = parked(error_of, reader.read, 10)
        reader.close()
        again, other = os.pipe()
        assert again == fd
        with coopos.FileIO(again) as second, coopos.FileIO(other, "w") as peer:
            greenlet = parked(second.read, 10)
            assert result_of(first) == (OSError, errno.EBADF)
            peer.write(b"new")
            assert result_of(greenlet) == b"new"


def test_number_closed_behind_its_back():
    """By coopos.close: the reader is told, and so is the next one."""
    with make_pipe() as (fd, writer):
        reader = coopos.FileIO(fd, closefd=False)
        have_waited(reader, lambda data: os.write(writer, data))
        greenlet = parked(error_of, reader.read, 10)
        coopos.close(fd)
        assert result_of(greenlet) == (OSError, errno.EBADF)
        assert result_of(gevent.spawn(error_of, reader.read, 10)) == (OSError, errno.EBADF)
        reader.close()


def test_number_closed_behind_its_back_by_others():
    """By os.close: an error as io.FileIO's, though the last read has told the next one to wait."""
    with make_pipe() as (fd, writer):
        reader = coopos.FileIO(fd, closefd=False)
        os.write(writer, b"x")
        assert reader.read(100) == b"x"
        os.close(fd)
        assert error_of(reader.read, 100) == (OSError, errno.EBADF)
        reader.close()


def test_number_used_again_behind_its_back():
    """After coopos.close and with another file there, it waits for that one."""
    with make_pipe() as (fd, writer):
        reader = coopos.FileIO(fd, closefd=False)
        have_waited(reader, lambda data: os.write(writer, data))
        coopos.close(fd)
        with closing(*os.pipe()) as (again, other):
            assert again == fd
            greenlet = parked(reader.read, 10)
            os.write(other, b"new")
            assert result_of(greenlet) == b"new"
            reader.close()


def test_file_that_has_been_waited_for_keeps_no_loop_running():
    """With nobody waiting the hub is done; with somebody who nobody will wake, LoopExit."""
    run_script("""
        import os
        import gevent
        import coopos
        from gevent.exceptions import LoopExit
        reader, writer = (coopos.FileIO(fd, mode) for fd, mode in zip(os.pipe(), "rw"))
        for _ in range(3):
            greenlet = gevent.spawn(reader.read, 100)
            gevent.idle()
            writer.write(b"x")
            assert greenlet.get() == b"x"
            assert gevent.get_hub().join(timeout=20) is True
            assert gevent.wait(timeout=20) is True
        try:
            gevent.event.Event().wait() if hasattr(gevent, "event") else gevent.get_hub().switch()
        except LoopExit:
            pass
        else:
            raise AssertionError("no LoopExit")
        reader.close(), writer.close()
    """)


def test_second_waiter_keeps_the_loop_running():
    """Also when the first waits no more; and the loop ends when the second does."""
    run_script("""
        import socket, threading
        import gevent
        import coopos
        for direction in "read", "write":
            one, other = socket.socketpair()
            file = coopos.FileIO(one.detach(), "r+")
            if direction == "write":
                one = socket.socket(fileno=file.fileno())
                one.setblocking(False)
                try:
                    while True:
                        one.send(b"x" * 65536)
                except BlockingIOError:
                    pass
                one.setblocking(True)
                one.detach()
            second = file.write if direction == "write" else file.read
            first = gevent.spawn(file.read, 10)
            gevent.idle()
            greenlet = gevent.spawn(second, b"y" if direction == "write" else 10)
            gevent.idle()
            first.kill()
            def act():
                if direction == "write":
                    while other.recv(65536)[-1:] != b"y":
                        pass
                else:
                    other.send(b"y")
            thread = threading.Timer(0.2, act)
            thread.start()
            assert greenlet.get() in (b"y", 1)
            thread.join()
            file.close()
            other.close()
        assert gevent.get_hub().join(timeout=20) is True
    """)


def test_hub_does_not_spin_over_unread_data():
    with pipe_files() as (reader, writer):
        have_waited(reader, writer.write)
        writer.write(b"unread")
        turns = []
        check = get_hub().loop.check()
        check.start(turns.append, 1)
        gevent.sleep(0.05)  # a loop that spins takes thousands of turns in it
        check.stop()
        check.close()
        assert len(turns) < 50
        assert reader.read(10) == b"unread"
        have_waited(reader, writer.write)


@pytest.mark.parametrize("waits", [False, True], ids=["unwaited", "waited"])
def test_open_and_close_leaves_nothing(waits):
    before = open_fds()
    for _ in range(1000):
        with pipe_files() as (reader, writer):
            if waits:
                greenlet = gevent.spawn(reader.read, 10)
                gevent.sleep(0)
                writer.write(b"x")
                assert result_of(greenlet) == b"x"
                gevent.spawn(reader.read, 10).kill()
    assert open_fds() == before
    assert io_watchers() == []


def test_forked_child():
    """Parent and child each read on with a file that was waited for."""
    run_script("""
        import os
        import gevent
        import coopos
        reader, writer = (coopos.FileIO(fd, mode) for fd, mode in zip(os.pipe(), "rw"))
        def wait_once(data):
            greenlet = gevent.spawn(reader.read, 100)
            gevent.idle()
            writer.write(data)
            assert greenlet.get(timeout=20) == data
        for _ in range(2):
            wait_once(b"x")
            pid = coopos.fork()
            if not pid:
                wait_once(b"child")
                wait_once(b"child")
                reader.close(), writer.close()
                os._exit(0)
            assert coopos.waitpid(pid, 0) == (pid, 0)
            wait_once(b"parent")
        reader.close(), writer.close()
    """)
