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
from coopos import _parking, _workers
from coopos._threadpool import lock_range

from .descriptors import HeldPool, StandingWorkers, until
from .support import (
    DEADLINE_S,
    LOOP,
    HubThread,
    clog,
    closing,
    error_of,
    make_pipe,
    open_fds,
    parked,
    result_of,
    run_script,
    run_seccomp,
    turn_loop,
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
        until(lambda: _parking.awaited(writer))
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


#: Has both kinds of lock on a file until its input ends.
HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.flock(f, 2); fcntl.lockf(f, 2); print(flush=True); sys.stdin.read()"
#: Has a lock of fcntl(2) on ten bytes of a file.
PART_HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, 2, 10); print(flush=True); sys.stdin.read()"


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
            until(_workers.count_begun)
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
        assert _workers.count_begun() == 1
        workers.go_on()
        until(lambda: not _workers.count_begun())
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
    before = _workers.set_limit(1)
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
            until(lambda: not _workers.count_begun())
    finally:
        _workers.set_limit(before)


# ---- limits and order --------------------------------------------------------------------------------------------------------


def test_disk_work_is_bounded_and_made_in_order_of_arrival():
    before = _workers.set_limit(0)
    done = []

    def truncate(fd, n):
        coopos.ftruncate(fd, n)
        done.append(n)

    try:
        with make_file() as fd:
            greenlets = [parked(truncate, fd, n) for n in range(20)]
            assert _workers.count_begun() == 0
            _workers.set_limit(1)
            gevent.joinall(greenlets, raise_error=True)
            assert done == list(range(20))
            assert os.fstat(fd).st_size == 19
    finally:
        _workers.set_limit(before)


def test_what_waits_for_another_party_takes_no_place_at_the_disks(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    before = _workers.set_limit(1)
    try:
        with make_file() as fd:
            greenlets = [parked(coopos.open, path, os.O_RDONLY) for _ in range(5)]
            coopos.fsync(fd)
            gevent.killall(greenlets)
    finally:
        _workers.set_limit(before)


def test_limit_is_read_from_the_environment():
    out = run_script("from coopos import _workers; print(_workers.set_limit(1))", COOPOS_THREADS="3")
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
        greenlet = gevent.spawn(coopos.open, {str(tmp_path / "fifo")!r}, os.O_RDONLY)
        gevent.sleep(0.01)
    """)


#: What a greenlet waits for, how somebody lets it have that, and whether it has been left to others.
WAITS = {
    "flock": (
        "fcntl.flock(ours, fcntl.LOCK_EX)",
        "coopos.flock(theirs, fcntl.LOCK_EX)",
        "fcntl.flock(ours, fcntl.LOCK_UN)",
        "fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)",
    ),
    "lockf": (
        "holder = hold()",
        "coopos.lockf(theirs, os.F_LOCK, 0)",
        "holder.communicate()",
        "hold().communicate()",
    ),
    "FIFO": (
        "os.mkfifo('fifo')",
        "coopos.open('fifo', os.O_RDONLY)",
        "pass",
        "assert not has_reader('fifo')",
    ),
    "semaphore": (
        "semaphore = Semaphore(SemLock(1, 0, 1, f'/coopos-{os.getpid()}', True))",
        "semaphore.acquire()",
        "semaphore.release()",
        "assert semaphore.acquire(False)",
    ),
}


#: On libuv gevent's own ``hub.destroy()`` has no end while a greenlet waits for anything.
can_destroy_a_hub = pytest.mark.skipif(LOOP == "libuv", reason="gevent's libuv hub can't be destroyed while somebody waits")


@pytest.mark.parametrize("end", ["thread", *(pytest.param(end, marks=can_destroy_a_hub) for end in ("hub and thread", "hub"))])
@pytest.mark.parametrize("kind", WAITS)
def test_call_of_a_hub_that_is_gone_gets_nothing(kind, end, tmp_path):
    """What a greenlet has waited for that will never run is left to others. Of a hub that is destroyed the next call hears."""
    prepare, wait, let_go, is_left = WAITS[kind]
    run_script(
        f"""
        import fcntl, os, subprocess, sys, threading, time, traceback, gevent, coopos
        from _multiprocessing import SemLock
        from coopos import _workers
        from coopos._semaphores import Semaphore

        def hold():
            holder = subprocess.Popen([sys.executable, "-c", {HOLDER!r}, "file"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert holder.stdout.readline()
            return holder

        def until(holds):
            deadline = time.monotonic() + 20
            while not holds():
                assert time.monotonic() < deadline
                time.sleep(0.001)

        def live():
            def fail(*args):
                raise AssertionError("nobody waits any more")
            for _ in range(3):
                gevent.spawn({"lambda: " + wait}).rawlink(fail)
            while _workers.count_begun() < ({kind!r} != "semaphore" and 3 or 1):
                gevent.sleep(0.001)
            if "hub" in {end!r}:
                gevent.get_hub().destroy(destroy_loop=True)
            if {end!r} == "hub":
                is_gone.set()
                may_end.wait(20)

        def has_reader(path):
            try:
                return os.open(path, os.O_WRONLY | os.O_NONBLOCK) >= 0
            except OSError:
                return False

        def count(what):
            return len(os.listdir(f"/proc/self/{{what}}"))

        open("file", "w").close()
        ours, theirs = os.open("file", os.O_RDWR), os.open("file", os.O_RDWR)
        coopos.fsync(ours)
        {prepare}
        is_gone, may_end = threading.Event(), threading.Event()
        fds, tasks = count("fd"), count("task")
        thread = threading.Thread(target=live)
        thread.start()
        if {end!r} == "hub":
            is_gone.wait(20)
            gevent.spawn(coopos.fsync, ours).get()
        else:
            thread.join()
        until(lambda: _workers.count_begun() == 0)
        {let_go}
        {is_left}
        may_end.set()
        thread.join()
        until(lambda: count("task") <= tasks)
        if "hub" in {end!r} and "holder" not in globals():
            assert count("fd") <= fds + ({end!r} == "hub") * 3, (count("fd"), fds)
        """,
        under=["env", "-C", os.fspath(tmp_path)],
        at=tmp_path / "script.py",
    )


@can_destroy_a_hub
def test_read_of_a_hub_that_is_gone_gives_back_what_it_has_got():
    """Its descriptor stays open until its worker has done so."""
    run_script("""
        import os, tempfile, threading, time, gevent, coopos
        from coopos import _workers

        def live():
            waiting = gevent.spawn(coopos.read, copy, 3)
            while not _workers.count_begun() and not waiting.ready():
                gevent.sleep(0.001)
            is_there.append(not waiting.ready())
            gevent.get_hub().destroy(destroy_loop=True)

        is_there = []
        file = tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        file.write(b"content")
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        copy = os.dup(file.fileno())
        _workers.hold(True)
        thread = threading.Thread(target=live)
        thread.start()
        thread.join()
        if is_there[0]:            # else reads of such a file take no worker here
            coopos.close(copy)
            assert os.fstat(copy).st_ino == os.fstat(file.fileno()).st_ino
            _workers.hold(False)
            while _workers.count_begun():
                time.sleep(0.001)
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 0
            for _ in range(10_000):
                try:
                    os.fstat(copy)
                except OSError:
                    break
                time.sleep(0.001)
            else:
                raise AssertionError("it stays open")
        file.close()
    """)


# ---- forks -------------------------------------------------------------------------------------------------------------------


def test_forked_child_asks_again_what_had_not_begun_and_what_can_be_asked_twice():
    run_script("""
        import os, sys, tempfile, traceback, gevent, coopos
        from coopos import _workers
        file = tempfile.TemporaryFile()
        file.write(b"content")
        file.flush()
        for hold, go_on in [(lambda: _workers.set_limit(0), lambda: _workers.set_limit(9)),
                            (lambda: _workers.hold(True), lambda: _workers.hold(False))]:
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
        from coopos import _workers
        file = tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        _workers.hold(True)
        greenlet = gevent.spawn(coopos.write, file.fileno(), b"content")
        while not _workers.count_begun() and not greenlet.ready():
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
        _workers.hold(False)
        assert greenlet.get(timeout=20) == 7
        assert coopos.waitpid(pid, 0) == (pid, 0)
        assert os.pread(file.fileno(), 100, 0) == b"content"
    """, may_complain=True)


def test_forked_child_has_none_of_its_parents_locks(path):
    """What it gets for a killed greenlet it gives back, though its parent has a lock of fcntl(2) on the same file."""
    run_script(f"""
        import os, signal, subprocess, sys, time, gevent, coopos
        from coopos import _workers
        command = [sys.executable, "-c", {PART_HOLDER!r}, {str(path)!r}]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        holder.stdout.readline()
        fd = os.open({str(path)!r}, os.O_RDWR)
        waiter = gevent.spawn(coopos.lockf, fd, os.F_LOCK, 10)
        while not _workers.count_begun():
            gevent.sleep(0.001)
        os.lseek(fd, 100, os.SEEK_SET)
        coopos.lockf(fd, os.F_LOCK, 10)
        go_on, say = os.pipe()
        hear, done = os.pipe()
        pid = coopos.fork()
        if pid == 0:
            coopos.read(go_on, 1)
            while not _workers.count_begun():
                gevent.sleep(0.001)
            os.kill(holder.pid, signal.SIGKILL)
            deadline = time.monotonic() + 20
            while _workers.count_begun() and time.monotonic() < deadline:
                time.sleep(0.001)
            waiter.kill()
            os.write(done, b"x")
            coopos.read(go_on, 1)
            os._exit(0)
        waiter.kill()
        coopos.lockf(fd, os.F_ULOCK, 10)
        os.write(say, b"x")
        coopos.read(hear, 1)
        os.lseek(fd, 0, os.SEEK_SET)
        os.lockf(fd, os.F_TEST, 0)
        os.write(say, b"x")
        assert coopos.waitpid(pid, 0) == (pid, 0)
        holder.communicate()
    """)


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


# ---- open --------------------------------------------------------------------------------------------------------------------


def test_open_of_a_fifo_that_takes_the_place_of_a_file(tmp_path, monkeypatch):
    """Between the look and the open."""
    path = tmp_path / "file"
    stat = os.stat

    def replace(*args, **kwargs):
        try:
            return stat(*args, **kwargs)
        finally:
            if not path.is_fifo():
                path.unlink(missing_ok=True)
                os.mkfifo(path)

    for exists in (True, False):
        for flags in (os.O_RDONLY, os.O_WRONLY):
            path.unlink(missing_ok=True)
            if exists:
                path.touch()
            with monkeypatch.context() as patch:
                patch.setattr("posix.stat", replace)
                greenlet = parked(coopos.open, path, flags)
            assert path.is_fifo()
            other = coopos.open(path, os.O_RDWR)
            with closing(other, result_of(greenlet)):
                pass


@pytest.mark.skipif(not hasattr(fcntl, "F_SETLEASE"), reason="no leases")
def test_open_of_a_file_that_another_process_has_a_lease_on(tmp_path):
    path = tmp_path / "file"
    path.touch()
    program = (
        "import fcntl, os, signal, sys; f = os.open(sys.argv[1], os.O_RDONLY); signal.signal(signal.SIGIO, lambda *a: None);"
        "fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_RDLCK); print(flush=True); sys.stdin.readline();"
        "fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_UNLCK); print(flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen([sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        greenlet = parked(coopos.open, path, os.O_WRONLY)
        holder.stdin.write(b"\n")
        holder.stdin.flush()
        with closing(result_of(greenlet)) as (fd,):
            assert os.get_blocking(fd)
        holder.stdin.close()


def test_open_has_the_flags_that_were_asked_for(tmp_path):
    for flags in (os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_APPEND, os.O_RDONLY, getattr(os, "O_NOATIME", 0) | os.O_RDWR):
        ours, theirs = coopos.open(tmp_path / "file", flags), os.open(tmp_path / "file", flags)
        with closing(ours, theirs):
            assert fcntl.fcntl(ours, fcntl.F_GETFL) == fcntl.fcntl(theirs, fcntl.F_GETFL)
            assert fcntl.fcntl(ours, fcntl.F_GETFD) == fcntl.fcntl(theirs, fcntl.F_GETFD)


# ---- flock -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.touch()
    return path


@pytest.fixture
def two(path):
    with closing(os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)) as fds:
        yield fds


def is_locked(path):
    with closing(os.open(path, os.O_RDWR)) as (fd,):
        return error_of(fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB) == (BlockingIOError, errno.EAGAIN)


def test_flock_waits_while_others_run(path, two):
    first, second = two
    coopos.flock(first, fcntl.LOCK_EX)
    greenlet = parked(coopos.flock, second, fcntl.LOCK_SH)
    coopos.flock(first, fcntl.LOCK_UN)
    assert result_of(greenlet) is None
    assert is_locked(path)


def test_flock_killed(path, two):
    first, second = two
    coopos.flock(first, fcntl.LOCK_EX)
    greenlet = parked(coopos.flock, second, fcntl.LOCK_EX)
    greenlet.kill()
    coopos.flock(first, fcntl.LOCK_UN)
    turn_loop()
    assert not is_locked(path)


def test_flock_killed_in_the_moment_of_success(path, two):
    first, second = two
    coopos.flock(first, fcntl.LOCK_EX)
    greenlet = parked(coopos.flock, second, fcntl.LOCK_EX)
    coopos.flock(first, fcntl.LOCK_UN)
    greenlet.kill()
    assert not is_locked(path)


class Index:
    """An integer by __index__, which fcntl takes, and which has no bits to be asked for."""

    def __init__(self, number):
        self.number = number

    def __index__(self):
        return self.number


def test_lock_by_an_object_that_is_an_index(path, two):
    first, _ = two
    for operation in (fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN, fcntl.LOCK_EX):
        assert coopos.flock(first, Index(operation)) is None
        assert is_locked(path) == (operation != fcntl.LOCK_UN)
        assert lock_range(first, Index(operation)) is None
    for command in (os.F_LOCK, os.F_ULOCK, os.F_TLOCK, os.F_TEST):
        assert coopos.lockf(first, Index(command), 0) is None


def have_locked(path):
    """Whether this process has fcntl(2)'s lock on a file."""
    script = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return subprocess.run([sys.executable, "-c", script, path], stderr=subprocess.DEVNULL).returncode != 0


def let_go_in_one_turn(holder):
    """Have a HOLDER end, and workers get what it had, while the hub has no turn."""
    holder.stdin.close()
    holder.wait()
    deadline = time.monotonic() + DEADLINE_S
    while _workers.count_begun() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not _workers.count_begun()


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_lock_that_two_have_got_stays_when_one_is_killed(kind, path, two):
    """It is the process's, or the open file's, and not the greenlet's."""
    first, second = two if kind == "lockf" else (two[0], two[0])
    lock, *args = (coopos.lockf, os.F_LOCK, 0) if kind == "lockf" else (coopos.flock, fcntl.LOCK_EX)
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        killed, other, last = (gevent.spawn(lock, fd, *args) for fd in (first, second, second))
        until(lambda: _workers.count_begun() == 3)
        let_go_in_one_turn(holder)
    killed.kill()
    assert result_of(other) is None
    assert have_locked(path) if kind == "lockf" else is_locked(path)
    last.kill()
    assert have_locked(path) if kind == "lockf" else is_locked(path)
    coopos.lockf(first, os.F_ULOCK, 0) if kind == "lockf" else coopos.flock(first, fcntl.LOCK_UN)
    assert not (have_locked(path) if kind == "lockf" else is_locked(path))


def test_lockf_of_a_killed_greenlet_is_undone_where_it_was(path, two):
    fd, _ = two
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        greenlet = gevent.spawn(coopos.lockf, fd, os.F_LOCK, 10)
        until(lambda: _workers.count_begun() == 1)
        os.lseek(fd, 50, os.SEEK_SET)
        let_go_in_one_turn(holder)
    greenlet.kill()
    assert not have_locked(path)


def test_lock_of_a_closed_number_is_undone_before_the_number_is_used_again(path, two, tmp_path):
    (tmp_path / "other").touch()
    holder, _ = two
    number = os.open(path, os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with StandingWorkers() as workers:     # which hear of no signal
        greenlet = gevent.spawn(coopos.flock, number, fcntl.LOCK_EX)
        until(_workers.count_begun)
        fcntl.flock(holder, fcntl.LOCK_UN)
        workers.go_on()
        deadline = time.monotonic() + DEADLINE_S
        while _workers.count_begun() and time.monotonic() < deadline:
            time.sleep(0.001)
    coopos.close(number)
    assert os.open(tmp_path / "other", os.O_RDWR) == number
    with closing(number):
        fcntl.flock(number, fcntl.LOCK_EX)
        greenlet.join()
        assert is_locked(tmp_path / "other")


def test_flock_that_does_not_wait(two):
    first, second = two
    coopos.flock(first, fcntl.LOCK_EX)
    assert error_of(coopos.flock, second, fcntl.LOCK_EX | fcntl.LOCK_NB) == (BlockingIOError, errno.EAGAIN)


@pytest.mark.parametrize("args", [(-1, 2), ("x", 2), (1.5, 2), (1 << 40, 2), (0, "x"), (0, 0), (0, 99), (0, 1 << 40), (0,), ()])
def test_flock_wrong_arguments_are_refused_as_by_fcntl(args):
    assert error_of(coopos.flock, *args) == error_of(fcntl.flock, *args)


def test_patch_puts_the_locks_into_fcntl(path):
    run_script(f"""
        from gevent import monkey; monkey.patch_all()
        import fcntl, os, pickle, subprocess, sys, gevent, coopos
        before = fcntl.flock, fcntl.lockf
        coopos.patch()
        assert fcntl.flock is coopos.flock
        holder = subprocess.Popen([sys.executable, "-c", {HOLDER!r}, {str(path)!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        holder.stdout.readline()
        with open({str(path)!r}, "r+") as file:
            waiters = [gevent.spawn(fcntl.flock, file, fcntl.LOCK_EX), gevent.spawn(fcntl.lockf, file, fcntl.LOCK_EX, 5, 2, 0)]
            gevent.sleep(0.01)
            assert not any(each.ready() for each in waiters)
            holder.stdin.close()
            gevent.joinall(waiters, timeout=20, raise_error=True)
            holder.wait()
            holder.stdout.close()
            fcntl.lockf(file, fcntl.LOCK_UN)
        coopos.unpatch()
        assert (fcntl.flock, fcntl.lockf) == before
    """)


def test_write_without_a_descriptor_or_a_thread_to_wait_by_is_made_all_the_same():
    run_script("""
        import os, resource, tempfile, gevent, coopos
        from coopos import _workers
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


@pytest.mark.parametrize("kind", ["flock", "lockf", "lockf of fcntl", "semaphore", "FIFO", "FIFO without descriptors"])
def test_call_that_waits_for_another_party_where_no_thread_is_left(kind, tmp_path):
    """A lock is asked for again and again; what can't be asked for so says what is missing, and not that it would block."""
    run_seccomp(
        f"""
import fcntl, os, resource, subprocess, sys, threading, gevent, coopos
from _multiprocessing import SemLock
from coopos._semaphores import Semaphore
from coopos._threadpool import lock_range

open("file", "w").close()
os.mkfifo("fifo")
kind = {kind!r}
if "FIFO" not in kind:
    holder = subprocess.Popen([sys.executable, "-c", {HOLDER!r}, "file"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
gevent.get_hub()
refuse("clone3", errno.EAGAIN)
try:
    threading.Thread(target=int).start()
except RuntimeError as ex:
    expected = str(ex)
else:
    print("skip: threads are made in another way")
    raise SystemExit

ours, theirs = os.open("file", os.O_RDWR), os.open("file", os.O_RDWR)
semaphore = Semaphore(SemLock(1, 0, 1, f"/coopos-{{os.getpid()}}", True))
if kind == "FIFO":
    try:
        coopos.open("fifo", os.O_RDONLY)
    except RuntimeError as ex:
        assert str(ex) == expected == "can't start new thread"
    else:
        raise AssertionError
    raise SystemExit
if kind == "FIFO without descriptors":
    resource.setrlimit(resource.RLIMIT_NOFILE, (theirs + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        coopos.open("fifo", os.O_RDONLY)
    except OSError as ex:
        assert ex.errno == errno.EMFILE
    else:
        raise AssertionError
    raise SystemExit

def wait(fd):
    {{"flock": lambda: coopos.flock(fd, fcntl.LOCK_EX), "lockf": lambda: coopos.lockf(fd, os.F_LOCK, 0),
      "lockf of fcntl": lambda: lock_range(fd, fcntl.LOCK_EX), "semaphore": semaphore.acquire}}[kind]()

def wait_to_be_closed(fd):
    try:
        wait(fd)
    except OSError as ex:
        return ex.errno

killed, closed, got = gevent.spawn(wait, ours), gevent.spawn(wait_to_be_closed, copy := os.dup(ours)), gevent.spawn(wait, theirs)
gevent.sleep(0.05)
assert not (killed.ready() or closed.ready() or got.ready())
killed.kill()
if kind != "semaphore":
    coopos.close(copy)
    assert closed.get(timeout=20) == errno.EBADF
else:
    closed.kill()
holder.stdin.close()
semaphore.release()
got.get(timeout=20)
holder.wait()
holder.stdout.close()
if kind == "flock":
    try:
        fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit
    raise AssertionError("it has got nothing")
""",
        under=["env", "-C", os.fspath(tmp_path)],
        at=tmp_path / "script.py",
    )


# ---- what was shared ---------------------------------------------------------------------------------------------------------


def test_thread_without_a_hub_makes_the_call_itself():
    with make_file(b"content") as fd:
        results = []
        before = _workers.count_calls()
        thread = threading.Thread(target=lambda: results.append((coopos.ftruncate(fd, 3), coopos.read(fd, 10))))
        thread.start()
        thread.join()
        assert results == [(None, b"con")]
        assert _workers.count_calls() == before


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux's eventfds")
def test_result_that_arrives_while_the_bell_is_full():
    """A bell that can take no more rings already."""
    before = open_fds()
    with make_file() as fd, StandingWorkers() as workers:
        waiter = parked(coopos.fsync, fd)
        until(_workers.count_begun)
        [bell] = [number for number, name in open_fds().items() if "eventfd" in name and number not in before]
        os.write(bell, (2**64 - 2).to_bytes(8, sys.byteorder))
        assert error_of(os.write, bell, (1).to_bytes(8, sys.byteorder)) == (BlockingIOError, errno.EAGAIN)
        workers.go_on()
        while _workers.count_begun():  # the hub has no turn
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
