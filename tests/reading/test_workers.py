"""Calls that a thread makes: what becomes of them when their descriptor is closed, their greenlet killed, or the process forked."""

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import gevent
import pytest

import coopos
from coopos import _core

from ..helpers.descriptors import HeldPool, StandingWorkers
from ..helpers.files import HOLDER
from ..helpers.support import (
    DEADLINE_S,
    HubThread,
    clog,
    closing,
    error_of,
    make_pipe,
    open_fds,
    parked,
    result_of,
    run_script,
    turn_loop,
    until,
)

BAD_FD = (OSError, errno.EBADF)
#: A file system in memory takes a thread for each read and write: it knows no RWF_NOWAIT, or is so on every kernel that was seen.
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux copies memory so that it can fail")


@contextlib.contextmanager
def make_file(content=b"", flags=0):
    with tempfile.NamedTemporaryFile(dir=MEMORY) as file:
        file.write(content)
        file.flush()
        fd = os.open(file.name, os.O_RDWR | flags)
        with closing(fd):
            yield fd


def content_of(fd):
    return os.pread(fd, 1 << 20, 0)


def outcome_of(greenlet):
    return error_of(result_of, greenlet)


#: Calls that only a worker makes, by the name of the function, and their arguments after the descriptor.
ON_FILES = {
    name: args
    for name, args in {
        "ftruncate": (0,),
        "truncate": (0,),
        "fsync": (),
        "fdatasync": (),
        "posix_fallocate": (0, 1 << 16),
    }.items()
    if hasattr(coopos, name)
}

each_on_file = pytest.mark.parametrize("name", ON_FILES)


# ---- closed ------------------------------------------------------------------------------------------------------------------


@each_on_file
def test_call_that_is_queued_when_its_descriptor_is_closed_leaves_the_next_file_alone(name):
    with make_file(b"content") as fd, make_file(b"another's") as other, HeldPool() as pool:
        greenlet = gevent.spawn(getattr(coopos, name), fd, *ON_FILES[name])
        assert pool.until_held(greenlet)
        coopos.close(fd)
        assert os.dup(other) == fd
        assert outcome_of(greenlet) == BAD_FD
        pool.open()
        assert content_of(fd) == b"another's"


@each_on_file
def test_call_that_has_begun_when_its_descriptor_is_closed_keeps_the_number(name):
    with make_file(b"content") as fd, closing(os.dup(fd)) as (same,), StandingWorkers() as workers:
        greenlet = gevent.spawn(getattr(coopos, name), fd, *ON_FILES[name])
        assert workers.until_begun(greenlet)
        coopos.close(fd)
        for call in (coopos.close, coopos.fsync, lambda fd: coopos.read(fd, 1), lambda fd: coopos.write(fd, b"x")):
            assert error_of(call, fd) == BAD_FD
        with closing(os.dup(same)) as (other,):
            assert other != fd
        workers.go_on()
        assert outcome_of(greenlet) == (None, None)
        until(lambda: error_of(os.fstat, fd) == BAD_FD)


@pytest.mark.parametrize("name", ["copy_file_range", "sendfile", "splice"])
@pytest.mark.parametrize("which", ["source", "target"])
def test_transfer_that_is_queued_when_a_descriptor_is_closed_leaves_the_next_file_alone(name, which):
    if not hasattr(coopos, name):
        pytest.skip("not here")
    with (
        make_file(b"content") as source,
        make_file() as target,
        make_file(b"another's") as other,
        make_pipe(blocking=True) as (_, writer),
        HeldPool() as pool,
    ):
        args = {
            "copy_file_range": (source, target, 7),
            "sendfile": (target, source, 0, 7),
            "splice": (source, writer, 7),
        }[name]
        greenlet = gevent.spawn(getattr(coopos, name), *args)
        if not pool.until_held(greenlet):
            pytest.skip("it takes no thread here")
        fd = source if which == "source" else writer if name == "splice" else target
        coopos.close(fd)
        assert os.dup(other) == fd
        assert outcome_of(greenlet) == BAD_FD
        pool.open()
        assert (content_of(other), os.lseek(other, 0, os.SEEK_CUR)) == (b"another's", 0)


def test_sendfile_that_waits_for_room_when_its_file_is_closed():
    with make_file(b"x" * 100) as source, make_file(b"y" * 100) as other, make_pipe() as (_, writer):
        clog(writer)
        greenlet = parked(coopos.sendfile, writer, source, 0, 100)
        until(lambda: _core.awaited(writer))
        coopos.close(source)
        assert os.dup(other) == source
        assert outcome_of(greenlet) == BAD_FD


def test_call_in_its_fairness_turn_when_its_descriptor_is_closed():
    run_script(
        """
        import os, gevent, coopos
        fd = os.open("/proc/self/status", os.O_RDONLY)
        others, theirs = os.pipe()
        os.write(theirs, b"another's")
        def close():
            coopos.close(fd)
            os.dup2(others, fd)
        gevent.get_hub()
        coopos.read(others, 0)
        closer = gevent.spawn(close)
        try:
            coopos.read(fd, 4)
        except OSError as ex:
            assert ex.errno == 9, ex
        else:
            raise AssertionError
        assert os.read(others, 20) == b"another's"
        """,
        COOPOS_FAIRNESS="1",
    )


def test_close_wakes_who_waits_for_a_lock():
    with make_file() as fd:
        path = os.readlink(f"/proc/self/fd/{fd}") if os.path.exists("/proc/self/fd") else None
        if path is None:
            pytest.skip("no /proc")
        with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            holder.stdout.readline()
            for lock, *args in [(coopos.lockf, os.F_LOCK, 0), (coopos.flock, fcntl.LOCK_EX)]:
                copy = os.open(path, os.O_RDWR)
                greenlet = parked(lock, copy, *args)
                coopos.close(copy)
                assert outcome_of(greenlet) == BAD_FD
                assert error_of(os.fstat, copy) == BAD_FD
            holder.stdin.close()


def test_close_by_another_thread():
    with make_file(b"content") as fd, HubThread() as thread, HeldPool() as pool:
        greenlet = gevent.spawn(coopos.ftruncate, fd, 0)
        assert pool.until_held(greenlet)
        thread.call(coopos.close, fd)
        assert outcome_of(greenlet) == BAD_FD
        os.open("/dev/null", os.O_RDONLY)


def test_close_that_is_put_off_is_made_though_the_hub_is_gone():
    with make_file() as fd, StandingWorkers() as workers:
        with HubThread() as thread:
            greenlet = thread.call(gevent.spawn, coopos.fsync, fd)
            until(_core.count_begun)
            coopos.close(fd)
            thread.call(greenlet.kill)
        assert error_of(os.fstat, fd) == (None, os.fstat(fd))
        workers.go_on()
        until(lambda: error_of(os.fstat, fd) == BAD_FD)
        os.open("/dev/null", os.O_RDONLY)
        with make_file() as other:
            coopos.fsync(other)  # the next call tidies up after the hub


def test_wait_on_a_number_whose_close_is_put_off_is_refused():
    """libev would abort the process, or the wait have no end."""
    ours, theirs = socket.socketpair()
    with theirs:
        fd = ours.detach()
        watcher = gevent.get_hub().loop.io(fd, 1)
        watcher.start(lambda: None)
        coopos.close(fd)
        assert error_of(coopos.read, fd, 1) == BAD_FD
        assert error_of(coopos.nb_read, fd, 1) == BAD_FD
        watcher.stop()
        watcher.close()
        turn_loop()
        assert error_of(os.fstat, fd) == BAD_FD


# ---- killed ------------------------------------------------------------------------------------------------------------------


@each_on_file
def test_call_that_is_killed_before_it_begins_is_not_made(name):
    with make_file(b"content") as fd, HeldPool() as pool:
        greenlet = gevent.spawn(getattr(coopos, name), fd, *ON_FILES[name])
        assert pool.until_held(greenlet)
        greenlet.kill()
        pool.open()
        turn_loop()
        assert content_of(fd) == b"content"
        assert os.fstat(fd).st_blocks <= 8


def test_write_that_is_killed_copies_nothing_from_memory_that_is_somebody_elses():
    with make_file() as fd, StandingWorkers() as workers:
        data = bytearray(b"a" * 5000)
        greenlet = gevent.spawn(coopos.write, fd, data)
        if not workers.until_begun(greenlet):
            pytest.skip("it takes no thread here")
        data[:] = b"b" * 5000
        greenlet.kill(block=False)
        turn_loop()
        workers.go_on()
        greenlet.join()
        assert content_of(fd) == b"a" * 5000


def test_call_that_never_ends_is_left_to_its_worker(monkeypatch):
    """The greenlet is gone after a while, and what comes out later is undone."""
    with make_file(b"0123456789") as fd, StandingWorkers() as workers:
        greenlet = gevent.spawn(coopos.read, fd, 4)
        if not workers.until_begun(greenlet):
            pytest.skip("it takes no thread here")
        greenlet.kill(timeout=DEADLINE_S)
        assert greenlet.ready()
        assert _core.count_begun() == 1
        workers.go_on()
        until(lambda: not _core.count_begun())
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
        coopos.fsync(fd)  # the next call tidies up


def test_flush_that_is_killed_writes_nothing_twice():
    """io's buffer writes again what it takes for not written."""
    data = bytes(range(256)) * 782
    with make_file() as fd, coopos.fdopen(os.dup(fd), "wb", 1 << 20) as file:
        file.write(data)
        with StandingWorkers() as workers:
            greenlet = gevent.spawn(file.flush)
            if not workers.until_begun(greenlet):
                pytest.skip("it takes no thread here")
            greenlet.kill(block=False)
            turn_loop()
            workers.go_on()
            greenlet.join()
        file.flush()
        assert content_of(fd) == data


def test_flush_into_a_pipe_that_is_timed_out_again_and_again_writes_nothing_twice():
    data = bytes(range(256)) * 782
    with make_pipe(blocking=True) as (reader, writer), coopos.fdopen(writer, "wb", 1 << 20, closefd=False) as file:
        received = []
        file.write(data)
        while True:
            with gevent.Timeout(0.001, False):
                file.flush()
                break
            received.append(os.read(reader, 10_000))
        while sum(map(len, received)) < len(data):
            received.append(os.read(reader, 10_000))
        assert b"".join(received) == data


def test_splice_to_a_socket_that_nobody_reads_holds_up_no_disk():
    """Neither while it waits nor when it was killed."""
    if not hasattr(coopos, "splice"):
        pytest.skip("no splice")
    before = _core.set_limit(1)
    try:
        with contextlib.ExitStack() as stack, make_file() as fd:
            greenlets = []
            for _ in range(3):
                reader, writer = stack.enter_context(make_pipe(blocking=True))
                ours, theirs = socket.socketpair()
                stack.enter_context(ours)
                stack.enter_context(theirs)
                fcntl.fcntl(writer, getattr(fcntl, "F_SETPIPE_SZ", 1031), 1 << 20)
                assert os.write(writer, bytes(1 << 20)) == 1 << 20
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                greenlets.append(parked(coopos.splice, reader, ours.fileno(), 1 << 20))
            coopos.fsync(fd)
            gevent.killall(greenlets, timeout=DEADLINE_S)
            coopos.fsync(fd)
            until(lambda: not _core.count_begun())
    finally:
        _core.set_limit(before)


# ---- limits and order --------------------------------------------------------------------------------------------------------


def test_disk_work_is_bounded_and_made_in_order_of_arrival():
    before = _core.set_limit(0)
    done = []

    def truncate(fd, n):
        coopos.ftruncate(fd, n)
        done.append(n)

    try:
        with make_file() as fd:
            greenlets = [parked(truncate, fd, n) for n in range(20)]
            assert _core.count_begun() == 0
            _core.set_limit(1)
            gevent.joinall(greenlets, raise_error=True)
            assert done == list(range(20))
            assert os.fstat(fd).st_size == 19
    finally:
        _core.set_limit(before)


def test_what_waits_for_another_party_takes_no_place_at_the_disks(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    before = _core.set_limit(1)
    try:
        with make_file() as fd:
            greenlets = [parked(coopos.open, path, os.O_RDONLY) for _ in range(5)]
            coopos.fsync(fd)
            gevent.killall(greenlets)
    finally:
        _core.set_limit(before)


def test_limit_is_read_from_the_environment():
    out = run_script("from coopos import _core; print(_core.set_limit(1))", COOPOS_THREADS="3")
    assert out.strip() == "3"


def threads():
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc")
def test_workers_take_the_next_call_and_end_when_there_is_none():
    run_script("""
        import os, tempfile, time, gevent, coopos
        def threads():
            return len(os.listdir("/proc/self/task"))
        with tempfile.TemporaryFile() as file:
            gevent.get_hub()
            before = threads()
            for _ in range(100):
                coopos.ftruncate(file.fileno(), 0)
            assert threads() == before + 1, threads()
            deadline = time.monotonic() + 30
            while threads() > before:
                assert time.monotonic() < deadline
                gevent.sleep(0.05)
    """)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc")
def test_workers_block_all_signals():
    run_script("""
        import os, signal, tempfile, gevent, coopos
        gevent.get_hub()
        before = set(os.listdir("/proc/self/task"))
        with tempfile.TemporaryFile() as file:
            coopos.ftruncate(file.fileno(), 0)
            [worker] = set(os.listdir("/proc/self/task")) - before
            with open(f"/proc/self/task/{worker}/status") as status:
                [line] = [line for line in status if line.startswith("SigBlk")]
        blocked = int(line.split()[1], 16)
        for number in range(1, 65):
            assert blocked >> (number - 1) & 1 or number in (signal.SIGKILL, signal.SIGSTOP, 32, 33), number
    """)


def test_exit_does_not_wait_for_another_party(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    run_script(f"""
        import gevent, os, coopos
        from coopos import _core
        greenlet = gevent.spawn(coopos.open, {str(tmp_path / "fifo")!r}, os.O_RDONLY)
        while not _core.count_begun():
            gevent.sleep(0.001)
    """)


# ---- forks -------------------------------------------------------------------------------------------------------------------


def test_forked_child_asks_again_what_had_not_begun_and_what_can_be_asked_twice():
    run_script("""
        import os, sys, tempfile, traceback, gevent, coopos
        from coopos import _core
        file = tempfile.TemporaryFile()
        file.write(b"content")
        file.flush()
        for hold, go_on in [(lambda: _core.set_limit(0), lambda: _core.set_limit(9)),
                            (lambda: _core.hold(True), lambda: _core.hold(False))]:
            hold()
            greenlets = [gevent.spawn(coopos.ftruncate, file.fileno(), 3), gevent.spawn(coopos.fsync, file.fileno())]
            gevent.sleep(0)
            gevent.sleep(0)
            pid = coopos.fork()
            go_on()
            if pid == 0:
                status = 1
                try:
                    gevent.joinall(greenlets, timeout=20, raise_error=True)
                    assert all(each.successful() for each in greenlets)
                    coopos.fsync(file.fileno())
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            gevent.joinall(greenlets, timeout=20, raise_error=True)
            assert coopos.waitpid(pid, 0) == (pid, 0)
        file.close()
    """)


def test_forked_child_is_told_that_its_parent_may_have_written():
    run_script("""
        import errno, os, sys, tempfile, traceback, gevent, coopos
        from coopos import _core
        file = tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        _core.hold(True)
        greenlet = gevent.spawn(coopos.write, file.fileno(), b"content")
        while not _core.count_begun() and not greenlet.ready():
            gevent.sleep(0.001)
        if greenlet.ready():
            sys.exit(0)
        pid = coopos.fork()
        if pid == 0:
            status = 1
            try:
                try:
                    greenlet.get(timeout=20)
                except OSError as ex:
                    assert ex.errno == errno.ECANCELED, ex
                    status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _core.hold(False)
        assert greenlet.get(timeout=20) == 7
        assert coopos.waitpid(pid, 0) == (pid, 0)
        assert os.pread(file.fileno(), 100, 0) == b"content"
    """, may_complain=True)


# ---- what a read and a write are ---------------------------------------------------------------------------------------------


def test_threads_read_of_a_shared_file_is_one_system_call():
    """Processes that share the offset read each record once."""
    run_script("""
        import os, tempfile, gevent, coopos
        records = [b"%07d\\n" % n for n in range(3000)]
        file = tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        file.write(b"".join(records))
        file.flush()
        os.lseek(file.fileno(), 0, 0)
        reader, writer = os.pipe()
        def read():
            found = []
            while data := coopos.read(file.fileno(), 8):
                found.append(data)
            return b"".join(found)
        pid = coopos.fork()
        if pid == 0:
            try:
                coopos.write_all(writer, read())
            finally:
                os._exit(0)
        os.close(writer)
        theirs = gevent.spawn(lambda: b"".join(iter(lambda: coopos.read(reader, 65536), b"")))
        both = read() + theirs.get(timeout=30)
        assert coopos.waitpid(pid, 0) == (pid, 0)
        assert sorted(both[n:n + 8] for n in range(0, len(both), 8)) == records
        file.close()
    """, COOPOS_NOWAIT="0")


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT")
def test_read_and_write_of_a_direct_file(tmp_path):
    """Into memory that is aligned as the disk wants it."""
    data = os.urandom(8192)
    (tmp_path / "file").write_bytes(data)
    try:
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("not on this file system")
    with closing(fd):
        aligned = mmap.mmap(-1, 4096)
        if error_of(os.preadv, fd, [aligned], 0)[0]:
            pytest.skip("not on this file system")
        assert coopos.read(fd, 4096) == data[:4096]
        assert coopos.pread(fd, 4096, 4096) == data[4096:]
        buffer = bytearray(4097)
        assert coopos.preadv(fd, [memoryview(buffer)[1:]], 0) == 4096
        assert buffer[1:] == data[:4096]
        assert coopos.pwrite(fd, bytes(4096), 0) == 4096
        assert error_of(coopos.pread, fd, 5, 3) == error_of(os.pread, fd, 5, 3)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT")
@pytest.mark.parametrize("name", ["read", "pread", "readv", "preadv", "write", "pwrite", "writev", "pwritev"])
def test_call_on_a_direct_file_is_that_of_os(name, tmp_path):
    """With memory as the disk wants it; in sizes and at offsets that it wants, and others."""
    data = os.urandom(16384)
    try:
        os.close(os.open(tmp_path / "file", os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("not on this file system")

    def outcome(module, size, offset):
        (tmp_path / "file").write_bytes(data)
        buffer = memoryview(mmap.mmap(-1, 65536))[:size]
        has_offset, is_vector = name.startswith("p"), name.endswith("v")
        arg = [buffer] if is_vector else size if name.endswith("read") else buffer
        with closing(os.open(tmp_path / "file", os.O_RDWR | os.O_DIRECT)) as (fd,):
            os.lseek(fd, offset, os.SEEK_SET)
            error, result = error_of(getattr(module, name), fd, arg, *([offset] if has_offset else []))
            return error, result, bytes(buffer), os.lseek(fd, 0, os.SEEK_CUR), (tmp_path / "file").read_bytes()

    for size in (0, 100, 512, 4096, 4097, 32768):
        for offset in (0, 1, 512, 4096, 16384):
            by_os, ours = outcome(os, size, offset), outcome(coopos, size, offset)
            # os.read takes memory as it comes, which may be wrong.
            assert (size, offset, ours) == (size, offset, by_os) or (name in ("read", "pread") and by_os[0] and not ours[0])


@needs_linux
@pytest.mark.parametrize("nowait", ["0", None])
def test_buffer_of_a_file_that_is_shorter_by_now_is_efault(nowait, tmp_path):
    """As os has it, wherever the bytes are copied; the part before it is moved, and the offset is where that ends."""
    run_script("""
        import fcntl, mmap, os, sys, coopos

        data = os.urandom(16384)
        with open("data", "wb") as file:
            file.write(data)


        def truncated():
            with open("map", "w+b") as file:
                file.truncate(8192)
                file.flush()
                area = mmap.mmap(file.fileno(), 8192)
                file.truncate(0)
            return area


        def opened(how):
            if how == "memory":
                fd = os.memfd_create("memory")
                os.write(fd, data)
                os.lseek(fd, 0, os.SEEK_SET)
                return fd
            if how in ("/dev/zero", "/proc/self/maps"):
                return os.open(how, os.O_RDONLY)
            if how == "direct":
                try:
                    return os.open("data", os.O_RDWR | os.O_DIRECT)
                except OSError:
                    how = "cached"
            fd = os.open("data", os.O_RDWR)
            if how == "cold":
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return fd


        def outcome(module, name, how, buffers):
            fd = opened(how)
            args = ([0] if name.startswith("p") else [])
            try:
                result = getattr(module, name)(fd, buffers(), *args)
            except OSError as ex:
                result = ex.errno
            where = None if how.startswith("/dev") else os.lseek(fd, 0, os.SEEK_CUR)
            os.close(fd)
            return result, where


        # Page by page, as the kernel does it of a file.
        shapes = {"alone": lambda: [truncated()], "second": lambda: [bytearray(4096), truncated()]}
        for how in ["cached", "cold", "direct", "memory", "/dev/zero", "/proc/self/maps"]:
            for name in ["readv", "preadv", "writev", "pwritev"]:
                if "write" in name and how[0] == "/":
                    continue
                for shape, buffers in shapes.items():
                    if shape == "second" and how in ("direct", "/proc/self/maps"):
                        continue               # of these it is a matter of the kernel's version
                    expected = outcome(os, name, how, buffers)
                    assert outcome(coopos, name, how, buffers) == expected, (how, name, shape, expected)
        for area in (truncated(), memoryview(truncated())[10:20]):
            for call in (coopos.write, coopos.readinto, coopos.FileIO.write, coopos.FileIO.readinto):
                file = coopos.FileIO("data", "r+")
                try:
                    call(file if "FileIO" in call.__qualname__ or "Moving" in call.__qualname__ else file.fileno(), area)
                except OSError as ex:
                    assert ex.errno == 14, ex
                else:
                    raise AssertionError(call)
                assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 0
                file.close()
    """, at=tmp_path / "script.py", COOPOS_NOWAIT=nowait, under=["env", "-C", os.fspath(tmp_path)])


def test_large_write_is_whole():
    data = os.urandom(3_500_000)
    with make_file() as fd:
        assert coopos.write(fd, data) == len(data)
        assert coopos.pread(fd, len(data), 0) == data
        assert coopos.pwritev(fd, [data[:10], data[10:2_000_000]], 5) == 2_000_000
        assert coopos.pread(fd, len(data), 5)[:2_000_000] == data[:2_000_000]


# ---- what was shared ---------------------------------------------------------------------------------------------------------


def test_thread_without_a_hub_makes_the_call_itself():
    with make_file(b"content") as fd:
        results = []
        before = _core.count_calls()
        thread = threading.Thread(target=lambda: results.append((coopos.ftruncate(fd, 3), coopos.read(fd, 10))))
        thread.start()
        thread.join()
        assert results == [(None, b"con")]
        assert _core.count_calls() == before


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux's eventfds")
def test_result_that_arrives_while_the_bell_is_full():
    """A bell that can take no more rings already."""
    before = open_fds()
    with make_file() as fd, StandingWorkers() as workers:
        waiter = parked(coopos.fsync, fd)
        until(_core.count_begun)
        [bell] = [number for number, name in open_fds().items() if "eventfd" in name and number not in before]
        os.write(bell, (2**64 - 2).to_bytes(8, sys.byteorder))
        assert error_of(os.write, bell, (1).to_bytes(8, sys.byteorder)) == (BlockingIOError, errno.EAGAIN)
        workers.go_on()
        while _core.count_begun():  # the hub has no turn
            time.sleep(0)
        assert result_of(waiter) is None


def test_thread_that_ends_leaves_no_descriptor():
    before = open_fds()
    for _ in range(3):
        with make_file() as fd, HubThread() as thread:
            thread.call(coopos.fsync, fd)
    import gc

    gc.collect()
    with make_file() as fd, HubThread() as thread:
        thread.call(coopos.fsync, fd)
    gc.collect()
    assert set(open_fds()) == set(before)


def test_greenlet_that_dies_of_its_call_keeps_nobody_from_theirs():
    """A plain one, whose parent is the hub: what it raises the hub prints."""
    run_script(
        """
        import tempfile
        import gevent, greenlet
        from gevent.hub import get_hub
        import coopos

        def fail():
            coopos.fsync(file)
            raise ValueError("it has died")

        with tempfile.TemporaryFile() as file:
            get_hub().loop.run_callback(greenlet.greenlet(fail, get_hub()).switch)
            others = [gevent.spawn(coopos.fsync, file) for _ in range(5)]
            assert len(gevent.joinall(others, timeout=10, raise_error=True)) == 5
        """,
        may_complain=True,
        COOPOS_THREADS="1",
    )


def test_signal_during_a_call_of_a_worker():
    """A signal says nothing of the call, and its handler has its turn."""
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *args: seen.append(1))
    try:
        with make_file() as fd, StandingWorkers() as workers:
            greenlet = gevent.spawn(coopos.fsync, fd)
            workers.until_begun(greenlet)
            os.kill(os.getpid(), signal.SIGUSR1)
            workers.go_on()
            assert result_of(greenlet) is None
            assert seen == [1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_write_without_a_descriptor_or_a_thread_to_wait_by_is_made_all_the_same():
    run_script("""
        import os, resource, tempfile, gevent, coopos
        from coopos import _core
        gevent.get_hub()
        with tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:
            lowest = os.dup(file.fileno())
            os.close(lowest)
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, most))
            assert coopos.write(file.fileno(), b"content") == 7
            coopos.fsync(file.fileno())
            assert coopos.pread(file.fileno(), 100, 0) == b"content"
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, most))
            coopos.fsync(file.fileno())
    """)
