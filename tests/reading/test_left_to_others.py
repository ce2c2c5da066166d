"""Locks, FIFOs and semaphores that nobody waits for any more, or for which there is no thread to wait: they are left to others."""

import os

import pytest

from ..helpers.files import HOLDER
from ..helpers.support import LOOP, run_script, run_seccomp

#: Has a lock of fcntl(2) on ten bytes of a file until its input ends.
PART_HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, 2, 10); print(flush=True); sys.stdin.read()"
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
        from coopos import _core
        from coopos._core import Semaphore

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
            while _core.count_begun() < ({kind!r} != "semaphore" and 3 or 1):
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
        until(lambda: _core.count_begun() == 0)
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
        from coopos import _core

        def live():
            waiting = gevent.spawn(coopos.read, copy, 3)
            while not _core.count_begun() and not waiting.ready():
                gevent.sleep(0.001)
            is_there.append(not waiting.ready())
            gevent.get_hub().destroy(destroy_loop=True)

        is_there = []
        file = tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        file.write(b"content")
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        copy = os.dup(file.fileno())
        _core.hold(True)
        thread = threading.Thread(target=live)
        thread.start()
        thread.join()
        if is_there[0]:            # else reads of such a file take no worker here
            coopos.close(copy)
            assert os.fstat(copy).st_ino == os.fstat(file.fileno()).st_ino
            _core.hold(False)
            while _core.count_begun():
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


def test_forked_child_has_none_of_its_parents_locks(path):
    """What it gets for a killed greenlet it gives back, though its parent has a lock of fcntl(2) on the same file."""
    run_script(f"""
        import os, signal, subprocess, sys, time, gevent, coopos
        from coopos import _core
        command = [sys.executable, "-c", {PART_HOLDER!r}, {str(path)!r}]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        holder.stdout.readline()
        fd = os.open({str(path)!r}, os.O_RDWR)
        waiter = gevent.spawn(coopos.lockf, fd, os.F_LOCK, 10)
        while not _core.count_begun():
            gevent.sleep(0.001)
        os.lseek(fd, 100, os.SEEK_SET)
        coopos.lockf(fd, os.F_LOCK, 10)
        go_on, say = os.pipe()
        hear, done = os.pipe()
        pid = coopos.fork()
        if pid == 0:
            coopos.read(go_on, 1)
            while not _core.count_begun():
                gevent.sleep(0.001)
            os.kill(holder.pid, signal.SIGKILL)
            deadline = time.monotonic() + 20
            while _core.count_begun() and time.monotonic() < deadline:
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


@pytest.mark.parametrize("kind", ["flock", "lockf", "lockf of fcntl", "semaphore", "FIFO", "FIFO without descriptors"])
def test_call_that_waits_for_another_party_where_no_thread_is_left(kind, tmp_path):
    """A lock is asked for again and again; what can't be asked for so says what is missing, and not that it would block."""
    run_seccomp(
        f"""
import fcntl, os, resource, subprocess, sys, threading, gevent, coopos
from _multiprocessing import SemLock
from coopos._core import Semaphore
from coopos._files import lock_range

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


def test_thread_that_ends_directly_after_a_call_leaves_no_descriptor():
    """Its hub had no turn in which to let go of where its calls arrive; gevent's own descriptors of such a hub stay."""
    run_script("""
        import os, tempfile, threading, coopos

        def eventfds():
            found = []
            for name in os.listdir("/proc/self/fd"):
                try:
                    found.append(os.readlink(f"/proc/self/fd/{name}"))
                except OSError:
                    pass
            return sum("eventfd" in each for each in found)

        def grown_by(function):
            before = eventfds()
            for _ in range(10):
                thread = threading.Thread(target=function)
                thread.start()
                thread.join()
            return eventfds() - before

        with tempfile.TemporaryFile() as file:
            import gevent
            assert grown_by(lambda: coopos.fsync(file.fileno())) <= grown_by(lambda: gevent.sleep(0.001))
    """)
