"""docs/census.rst against os and against coopos, and the functions that only a thread can make cooperative."""

import contextlib
import inspect
import os
import pathlib
import posix
import re
import signal
import subprocess
import sys
import threading

import gevent
import pytest
from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import get_hub

import coopos

from ..helpers.children import until
from ..helpers.descriptors import StandingWorkers
from ..helpers.support import (
    DEADLINE_S,
    HubThread,
    closing,
    error_of,
    make_pipe,
    open_fds,
    parked,
    result_of,
    run_script,
    turn_loop,
)

CENSUS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "census.rst"

needs_census = pytest.mark.skipif(not CENSUS.exists(), reason="the documentation is not beside the tests")
needs_eventfd = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="eventfds, which only Linux has")
needs_getrandom = pytest.mark.skipif(not hasattr(os, "getrandom"), reason="getrandom, which only Linux has")


# ---- the census --------------------------------------------------------------------------------------------------------------

#: The names that came to os after Python 3.10, or that one of the two systems has not.
SINCE = {
    (3, 11): "login_tty",
    (3, 12): "setns unshare",
    (3, 13): "grantpt posix_openpt process_cpu_count ptsname unlockpt "
    "timerfd_create timerfd_gettime timerfd_gettime_ns timerfd_settime timerfd_settime_ns",
    (3, 14): "readinto reload_environ",
    (3, 15): "statx _clearenv",
}
NOT_ON = {
    "linux": "chflags lchflags lchmod",
    "darwin": "copy_file_range eventfd eventfd_read eventfd_write fdatasync getrandom getresgid getresuid getxattr listxattr "
    "memfd_create pidfd_open pipe2 posix_fadvise posix_fallocate removexattr sched_getaffinity sched_getparam sched_getscheduler "
    "sched_rr_get_interval sched_setaffinity sched_setparam sched_setscheduler setns setresgid setresuid setxattr splice statx "
    "timerfd_create timerfd_gettime timerfd_gettime_ns timerfd_settime timerfd_settime_ns unshare waitid",
}


def census():
    """[(names, can it block, here), ...], a row of the table each."""
    rows = re.findall(r"^   \* - (.*?)\n     - (.*?)\n     - (.*?)(?=\n   \*|\n\n)", CENSUS.read_text(), re.MULTILINE | re.DOTALL)
    return [(re.findall(r"``(\w+)``", names), block, " ".join(here.split())) for names, block, here in rows[1:]]


def functions_of_os():
    return {name for name in dir(os) if inspect.isroutine(getattr(os, name)) and (not name.startswith("_") or name in os.__all__)}


@needs_census
def test_census_has_every_function_of_os():
    """A function that comes to os in a new Python has to be looked at, and put there."""
    assert functions_of_os() - {name for names, _, _ in census() for name in names} == set()


@needs_census
def test_census_has_functions_of_os_only():
    later = {name for version, names in SINCE.items() if version > sys.version_info for name in names.split()}
    elsewhere = later | set(NOT_ON.get(sys.platform, "").split())
    assert {name for names, _, _ in census() for name in names} - functions_of_os() - elsewhere == set()


@needs_census
def test_census_has_a_function_once():
    names = [name for names, _, _ in census() for name in names]
    assert sorted(names) == sorted(set(names))


@needs_census
def test_census_gives_one_of_a_few_answers():
    for names, block, here in census():
        assert block in ("no", "for a disk", "for another party"), names
        assert re.match("cooperative: |that of os: |cannot be: ", here), names


@needs_census
def test_cooperative_is_what_the_census_says():
    said = {name for names, _, here in census() if here.startswith("cooperative") for name in names}
    assert {name for name in said if hasattr(os, name)} == set(coopos.__cooperative__)


def test_cooperative_is_sorted_and_our_own():
    assert coopos.__cooperative__ == sorted(set(coopos.__cooperative__))
    assert [name for name in coopos.__cooperative__ if getattr(coopos, name) is getattr(os, name)] == []
    assert set(coopos.__cooperative__) <= set(coopos.__all__)


FORMS = sorted(name for name in coopos.__cooperative__ if getattr(coopos, name).__module__ == "coopos._threadpool")


@pytest.mark.parametrize("name", FORMS)
def test_signature_is_that_of_os(name):
    def shape(function):
        return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]

    assert shape(getattr(coopos, name)) == shape(getattr(os, name))


def test_patch_leaves_the_forms_out():
    run_script("""
        from gevent import monkey; monkey.patch_all()
        import os
        before = dict(vars(os))
        import coopos
        coopos.patch()
        forms = set(coopos.__cooperative__) - set(coopos.__implements__)
        assert forms and all(getattr(os, name) is before[name] for name in forms)
    """)


# ---- states ------------------------------------------------------------------------------------------------------------------


def in_hub(function, *args):
    """What error_of() says of ``function(*args)`` in a callback of the event loop."""
    results = []
    get_hub().loop.run_callback(lambda: results.append(error_of(function, *args)))
    turn_loop()
    [result] = results
    return result


class Standstill:
    """A function for a thread to stand in until it is let go."""

    def __init__(self, result=None):
        self.calls = []
        self.threads = set()
        self._result = result
        self._has_begun = threading.Semaphore(0)
        self._may_end = threading.Event()

    def __call__(self, *args):
        self.calls.append(args)
        self.threads.add(threading.get_ident())
        self._has_begun.release()
        assert self._may_end.wait(DEADLINE_S)
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def wait_for_call(self):
        assert get_hub().threadpool.apply(self._has_begun.acquire, (True, DEADLINE_S))

    def let_go(self):
        self._may_end.set()


# ---- what the threadpool does ------------------------------------------------------------------------------------------------

IN_POOL = {
    name: args
    for name, args in {
        "getlogin": (),
        "getgrouplist": ("name", 0),
        "initgroups": ("name", 0),
    }.items()
    if hasattr(os, name)
}
each_in_pool = pytest.mark.parametrize(("name", "args"), IN_POOL.items(), ids=IN_POOL)


@pytest.fixture
def stand_still(monkeypatch):
    """``stand_still(name, result)`` puts a Standstill in the place of the system's function; they are let go at the end."""
    made = []

    def stand_still(name, result=None):
        made.append(Standstill(result))
        monkeypatch.setattr(f"posix.{name}", made[-1])
        return made[-1]

    yield stand_still
    for standstill in made:
        standstill.let_go()


@each_in_pool
def test_call_in_pool_lets_others_run(stand_still, name, args):
    """It returns what the system's function does, whose arguments are its own."""
    slow = stand_still(name, result="result")
    greenlet = parked(getattr(coopos, name), *args)
    slow.wait_for_call()
    slow.let_go()
    returns_something = name in ("getlogin", "getgrouplist")
    assert result_of(greenlet) == ("result" if returns_something else None)
    assert slow.calls == [args]
    assert threading.get_ident() not in slow.threads


@each_in_pool
def test_call_in_pool_raises_what_os_raises(stand_still, name, args):
    stand_still(name, OSError(5, "Input/output error")).let_go()
    assert error_of(getattr(coopos, name), *args) == (OSError, 5)


@each_in_pool
def test_call_in_pool_from_the_event_loop(stand_still, name, args):
    """It is refused before a thread is asked."""
    slow = stand_still(name)
    assert in_hub(getattr(coopos, name), *args)[0] is BlockingSwitchOutError
    assert slow.calls == []


def test_call_in_pool_killed_while_it_waits_for_a_thread(stand_still, monkeypatch):
    pool = get_hub().threadpool
    monkeypatch.setattr(pool, "maxsize", 1)
    try:
        slow = stand_still("getgrouplist", [])
        first = parked(coopos.getgrouplist, "first", 0)
        second = parked(coopos.getgrouplist, "second", 0)
        second.kill()
        slow.let_go()
        result_of(first)
        coopos.getgrouplist("third", 0)
        assert slow.calls == [("first", 0), ("third", 0)]
    finally:
        pool.maxsize = 10


def test_fsync_asks_for_the_descriptor_in_its_own_thread(fd):
    class File:
        def fileno(self):
            self.thread = threading.get_ident()
            return fd

    file = File()
    coopos.fsync(file)
    assert file.thread == threading.get_ident()


BAD_FDS = [-1, 1 << 20, 1 << 40, "x", None, 1.5, b"x"]


class Nothing:
    def fileno(self):
        return "nothing"


WRONG = {
    "fsync": [*[(fd,) for fd in BAD_FDS], (Nothing(),), (), (1, 2)],
    "fdatasync": [*[(fd,) for fd in BAD_FDS], (Nothing(),), (), (1, 2)],
    "sync": [(1,)],
    "posix_fallocate": [
        *[(fd, 0, 1) for fd in BAD_FDS],
        ("reader", 0, 1),
        ("file", -1, 1),
        ("file", 0, 0),
        ("file", 0, 1 << 70),
        (),
    ],
    "truncate": [("/nonexistent/file", 0), ("/", 0), ("a\0b", 0), (None, 0), (1.5, 0), ("file", -1), ("file", "x"), ("file",)],
    "ftruncate": [*[(fd, 0) for fd in BAD_FDS], ("reader", 0), ("file", -1), ("file", 1 << 70), ("file", "x"), ("file",)],
    "lockf": [
        *[(fd, os.F_LOCK, 0) for fd in BAD_FDS],
        (Nothing(), os.F_LOCK, 0),
        ("reader", os.F_LOCK, 0),
        ("read-only", os.F_LOCK, 0),
        ("file", os.F_LOCK, "x"),
        ("file", os.F_LOCK, 1 << 70),
        ("file", os.F_LOCK, -1),
        ("file", 99, 0),
        ("file", "x", 0),
        ("file", 1.0, 0),
        ("file", os.F_LOCK),
    ],
    "eventfd_read": [*[(fd,) for fd in BAD_FDS], (Nothing(),), ("writer",), ()],
    "eventfd_write": [
        *[(fd, 1) for fd in BAD_FDS],
        ("reader", 1),
        *[("eventfd", n) for n in (-1, 1 << 64, (1 << 64) - 1, "x", 1.5)],
    ],
    "getrandom": [(-1,), ("x",), (1.5,), (1, 1 << 20), (1, "x"), (1, 1 << 40), ()],
    "urandom": [(-1,), ("x",), (1.5,), ()],
    "getlogin": [(1,)],
    "getgrouplist": [(1, 0), ("a\0b", 0), ("root", "x"), ("root", 1 << 70), ()],
    "initgroups": [(1, 0), ("a\0b", 0), ("root", "x"), ("root", 1 << 70), ()],
}


@pytest.mark.parametrize(("name", "args"), [(name, args) for name in WRONG for args in WRONG[name] if hasattr(os, name)])
def test_wrong_arguments_are_refused_as_by_os(tmp_path, name, args):
    with make_pipe() as (reader, writer), contextlib.ExitStack() as stack:
        path = tmp_path / "file"
        path.touch()
        fds = {"reader": reader, "writer": writer}
        if name == "truncate":
            fds["file"] = path
        else:
            fds["file"], fds["read-only"] = stack.enter_context(closing(os.open(path, os.O_RDWR), os.open(path, os.O_RDONLY)))
        if hasattr(os, "eventfd"):
            [fds["eventfd"]] = stack.enter_context(closing(os.eventfd(0, os.EFD_NONBLOCK)))
        args = [fds.get(arg, arg) if isinstance(arg, str) else arg for arg in args]
        error = error_of(getattr(os, name), *args)
        assert error[0] is not None
        assert error_of(getattr(coopos, name), *args) == error


def test_files_are_changed_as_by_os(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with closing(os.open(path, os.O_RDWR)) as (fd,):
        coopos.fsync(fd)
        coopos.truncate(path, 8)
        assert path.read_bytes() == b"01234567"
        coopos.truncate(path=fd, length=6)
        coopos.ftruncate(fd, 4)
        assert path.read_bytes() == b"0123"
        if hasattr(os, "posix_fallocate"):
            coopos.fdatasync(fd)
            coopos.posix_fallocate(fd, 0, 6)
            assert path.read_bytes() == b"0123\0\0"


def test_users_are_those_of_os():
    assert error_of(coopos.getlogin) == error_of(os.getlogin)
    assert coopos.getgrouplist("root", 0) == os.getgrouplist("root", 0)


# ---- open --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


#: (how one end is opened, how the other)
ENDS = pytest.mark.parametrize(
    ("ours", "theirs"), [(os.O_RDONLY, os.O_WRONLY), (os.O_WRONLY, os.O_RDONLY)], ids=["reader", "writer"]
)


def is_deserted(fifo, theirs):
    """Whether nobody has the other end of *fifo* open, or waits for it to be opened."""
    if theirs == os.O_WRONLY:
        return error_of(os.open, fifo, os.O_WRONLY | os.O_NONBLOCK)[0] is OSError  # ENXIO
    with closing(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)) as (fd,):
        return error_of(os.read, fd, 1) == (None, b"")


@ENDS
def test_open_fifo(fifo, ours, theirs):
    """It waits for the other end, and the two are connected then."""
    greenlet = parked(coopos.open, fifo, ours)
    with closing(os.open(fifo, theirs)) as (there,), closing(result_of(greenlet)) as (here,):
        reader, writer = (here, there) if ours == os.O_RDONLY else (there, here)
        os.write(writer, b"data")
        assert os.read(reader, 10) == b"data"
        assert os.get_blocking(here) and not os.get_inheritable(here)


def test_open_fifo_both_ends_in_one_hub(fifo):
    reader = parked(coopos.open, fifo, os.O_RDONLY)
    with closing(coopos.open(fifo, os.O_WRONLY), result_of(reader)):
        pass


@ENDS
def test_open_fifo_killed(fifo, ours, theirs):
    before = open_fds()
    parked(coopos.open, fifo, ours).kill()
    assert open_fds() == before
    assert is_deserted(fifo, theirs)


@ENDS
def test_open_fifo_timed_out_again_and_again(fifo, ours, theirs):
    """Every attempt leaves the FIFO as it was, and the last one gets it."""
    for _ in range(3):
        with gevent.Timeout(0, False):
            coopos.open(fifo, ours)
        assert is_deserted(fifo, theirs)
    test_open_fifo(fifo, ours, theirs)


@ENDS
def test_open_fifo_killed_in_the_moment_of_success(fifo, ours, theirs):
    """The descriptor that it has got is closed."""
    before = open_fds()
    greenlet = parked(coopos.open, fifo, ours)
    with closing(os.open(fifo, theirs)):
        greenlet.kill()
    assert open_fds() == before
    assert is_deserted(fifo, theirs)


def test_open_fifo_killed_leaves_the_signal_to_its_handler(fifo):
    """The thread is interrupted by a signal that the program may have a use for."""
    seen = []
    before = signal.signal(signal.SIGURG, lambda *args: seen.append(args))
    try:
        parked(coopos.open, fifo, os.O_RDONLY).kill()
        assert seen == []
        signal.raise_signal(signal.SIGURG)
        assert len(seen) == 1
    finally:
        signal.signal(signal.SIGURG, before)


def test_open_fifo_holds_no_thread_of_the_pool(fifo):
    greenlets = [parked(coopos.open, fifo, os.O_RDONLY) for _ in range(get_hub().threadpool.maxsize + 5)]
    assert get_hub().threadpool.apply(lambda: "served") == "served"
    gevent.killall(greenlets)
    assert is_deserted(fifo, os.O_WRONLY)


def test_open_fifo_kill_of_one_reader_leaves_the_other(fifo):
    """Who waits for the same end notices nothing."""
    stays, goes = [parked(coopos.open, fifo, os.O_RDONLY) for _ in range(2)]
    goes.kill()
    turn_loop()
    assert not stays.ready()
    with closing(os.open(fifo, os.O_WRONLY)) as (writer,), closing(result_of(stays)) as (reader,):
        os.write(writer, b"data")
        assert os.read(reader, 10) == b"data"


def test_open_fifo_in_another_thread(fifo):
    with HubThread() as other:
        greenlet = other.parked(coopos.open, fifo, os.O_RDONLY)
        with closing(coopos.open(fifo, os.O_WRONLY), other.result_of(greenlet)):
            pass


def test_open_fifo_that_waits_while_the_process_forks(fifo):
    """In the child, which has no thread that opens it, it is killed without harm, or opens the FIFO for itself."""
    run_script(f"""
        import os, gevent, coopos
        path = {str(fifo)!r}
        killed, stays = [gevent.spawn(coopos.open, path, os.O_RDONLY) for _ in range(2)]
        gevent.idle()
        pid = coopos.fork()
        if not pid:
            killed.kill()
            os.close(stays.get(timeout=20))
            os._exit(7)
        writer = os.open(path, os.O_WRONLY)
        for greenlet in (killed, stays):
            os.close(greenlet.get(timeout=20))
        assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
    """)


def test_open_fifo_from_the_event_loop(fifo):
    assert in_hub(coopos.open, fifo, os.O_RDONLY)[0] is BlockingSwitchOutError
    assert is_deserted(fifo, os.O_WRONLY)


@pytest.mark.parametrize(
    "flags", [os.O_RDONLY | os.O_NONBLOCK, os.O_RDWR, os.O_CREAT | os.O_WRONLY], ids=["nonblock", "rdwr", "file"]
)
def test_open_that_can_not_wait(fifo, flags):
    """It is made at once, by no thread: in the event loop too."""
    path = fifo.with_name("file") if flags & os.O_CREAT else fifo
    error, fd = in_hub(coopos.open, path, flags)
    assert error is None
    os.close(fd)


def test_open_character_device():
    with closing(coopos.open("/dev/null", os.O_RDWR), os.open("/dev/null", os.O_RDWR)) as (ours, plain):
        assert os.fstat(ours) == os.fstat(plain)


@pytest.mark.parametrize("kind", [str, os.fsencode, pathlib.Path])
def test_open_takes_any_path_and_a_directory(fifo, kind):
    with closing(os.open(fifo.parent, os.O_RDONLY)) as (directory,):
        greenlet = parked(lambda: coopos.open(path=kind("fifo"), flags=os.O_RDONLY, mode=0o600, dir_fd=directory))
        with closing(os.open(fifo, os.O_WRONLY), result_of(greenlet)):
            pass


@pytest.mark.parametrize(
    ("path", "args", "dir_fd"),
    [
        ("/nonexistent/file", (os.O_RDONLY,), None),
        ("fifo", (os.O_RDONLY | os.O_DIRECTORY,), None),
        ("fifo", (os.O_RDONLY | os.O_CREAT | os.O_EXCL,), None),
        ("fifo", (1 << 40,), None),
        ("fifo", (1.5,), None),
        ("fifo", ("x",), None),
        ("fifo", (), None),
        ("fifo", (os.O_RDONLY, 1 << 40), None),
        ("fifo", (os.O_RDONLY, 1.5), None),
        ("fifo", (os.O_RDONLY, "x"), None),
        ("fifo", (os.O_RDONLY,), 1 << 20),
        ("fifo", (os.O_RDONLY,), 1.5),
        ("fifo", (os.O_RDONLY,), "x"),
        ("a\0b", (os.O_RDONLY,), None),
        ("\ud800", (os.O_RDONLY,), None),
        (None, (os.O_RDONLY,), None),
        (0, (os.O_RDONLY,), None),
        ("", (os.O_RDONLY,), None),
        ("/", (os.O_WRONLY,), None),
    ],
)
def test_open_wrong_arguments(fifo, monkeypatch, path, args, dir_fd):
    """The exception is that of os.open, the file's name in it included."""
    monkeypatch.chdir(fifo.parent)
    errors = []
    for function in (os.open, coopos.open):
        with pytest.raises(Exception) as info:  # noqa: PT011
            function(path, *args, dir_fd=dir_fd)
        errors.append((info.type, getattr(info.value, "errno", None), getattr(info.value, "filename", None)))
    assert errors[0] == errors[1]


def test_open_error_of_a_fifo_tells_the_path(fifo):
    with pytest.raises(NotADirectoryError) as info:
        coopos.open(fifo, os.O_RDONLY | os.O_DIRECTORY)
    assert info.value.filename == os.fspath(fifo)
    assert info.value.strerror == os.strerror(info.value.errno)


def test_open_audit(fifo):
    """One event, the same as that of os.open."""
    run_script(f"""
        import os, sys, gevent, coopos
        events = []
        sys.addaudithook(lambda event, args: event == "open" and {str(fifo)!r} in args and events.append(args))
        def both(open):
            writer = os.open({str(fifo)!r}, os.O_RDWR)
            del events[:]
            os.close(open({str(fifo)!r}, os.O_WRONLY | os.O_APPEND))
            os.close(writer)
            return events[:]
        assert both(os.open) == both(coopos.open) != [], events
    """)


# ---- lockf -------------------------------------------------------------------------------------------------------------------

OTHER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for line in sys.stdin:
    try:
        os.lockf(fd, getattr(os, line.strip()), 0)
        print("done", flush=True)
    except OSError:
        print("taken", flush=True)
"""


class OtherProcess:
    """Another process that has the file open, and calls lockf when it is told to."""

    def __init__(self, path):
        command = [sys.executable, "-c", OTHER, path]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def lockf(self, command):
        """ "done" or "taken"."""
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self):
        self._process.communicate(timeout=DEADLINE_S)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.touch()
    return path


@pytest.fixture
def other(path):
    """Another process, which has the lock."""
    with contextlib.closing(OtherProcess(path)) as other:
        assert other.lockf("F_LOCK") == "done"
        yield other


@pytest.fixture
def fd(path):
    with closing(os.open(path, os.O_RDWR)) as (fd,):
        yield fd


def test_lockf_that_is_free(path, fd):
    """It is taken at once: in the event loop too."""
    with contextlib.closing(OtherProcess(path)) as other:
        assert in_hub(coopos.lockf, fd, os.F_LOCK, 0) == (None, None)
        assert other.lockf("F_TLOCK") == "taken"
        coopos.lockf(fd, os.F_ULOCK, 0)
        assert other.lockf("F_TLOCK") == "done"


def test_lockf_that_another_process_has(fd, other):
    greenlet = parked(coopos.lockf, fd, os.F_LOCK, 0)
    assert other.lockf("F_ULOCK") == "done"
    assert result_of(greenlet) is None
    assert other.lockf("F_TEST") == "taken"


def test_lockf_from_the_event_loop(fd, other):
    assert in_hub(coopos.lockf, fd, os.F_LOCK, 0)[0] is BlockingSwitchOutError
    assert other.lockf("F_ULOCK") == "done"
    assert other.lockf("F_TLOCK") == "done"


@pytest.mark.parametrize("command", ["F_TLOCK", "F_TEST"])
def test_lockf_that_does_not_wait(fd, other, command):
    error = error_of(os.lockf, fd, getattr(os, command), 0)
    assert issubclass(error[0], OSError)
    assert in_hub(coopos.lockf, fd, getattr(os, command), 0) == error


def test_lockf_of_a_file_object(path, other):
    with open(path, "r+b") as file:
        greenlet = parked(coopos.lockf, file, os.F_LOCK, 0)
        other.lockf("F_ULOCK")
        result_of(greenlet)
        assert other.lockf("F_TEST") == "taken"


def waiting_for_lock(fd):
    """A greenlet that waits for the lock, and the kernel knows."""
    greenlet = parked(coopos.lockf, fd, os.F_LOCK, 0)
    locks = pathlib.Path("/proc/locks")
    if locks.exists():
        inode = os.fstat(fd).st_ino
        until(lambda: re.search(rf"-> .* {os.getpid()} \S+:{inode} ", locks.read_text()))
    return greenlet


def test_lockf_killed(fd, other):
    """It doesn't get the lock later."""
    waiting_for_lock(fd).kill()
    assert other.lockf("F_ULOCK") == "done"
    assert other.lockf("F_TLOCK") == "done"


def test_lockf_killed_in_the_moment_of_success(fd, other):
    """The lock that it has got is given back."""
    greenlet = waiting_for_lock(fd)
    assert other.lockf("F_ULOCK") == "done"
    greenlet.kill()
    assert other.lockf("F_TLOCK") == "done"


def test_lockf_timed_out_and_tried_again(path, fd, other):
    """The lock that the second attempt gets, by a new descriptor, is not given back for the first."""
    with closing(os.open(path, os.O_RDWR)) as (first,):
        waiting_for_lock(first).kill(gevent.Timeout)
    greenlet = waiting_for_lock(fd)
    assert other.lockf("F_ULOCK") == "done"
    result_of(greenlet)
    turn_loop()
    assert other.lockf("F_TEST") == "taken"


def test_lockf_holds_no_thread_of_the_pool(fd, other):
    greenlets = [parked(coopos.lockf, fd, os.F_LOCK, 0) for _ in range(get_hub().threadpool.maxsize + 5)]
    assert get_hub().threadpool.apply(lambda: "served") == "served"
    gevent.killall(greenlets)
    assert other.lockf("F_ULOCK") == "done"
    assert other.lockf("F_TLOCK") == "done"


# ---- eventfd -----------------------------------------------------------------------------------------------------------------

each_mode = pytest.mark.parametrize("nonblocking", [False, True], ids=["blocking", "nonblocking"])
FULL = (1 << 64) - 2


@contextlib.contextmanager
def eventfd(count, nonblocking):
    with closing(os.eventfd(0, os.EFD_NONBLOCK if nonblocking else 0)) as (fd,):
        os.eventfd_write(fd, count)
        yield fd
        assert os.get_blocking(fd) is not nonblocking


@needs_eventfd
@each_mode
def test_eventfd_read_waits_until_it_is_written(nonblocking):
    with eventfd(0, nonblocking) as fd:
        greenlet = parked(coopos.eventfd_read, fd)
        coopos.eventfd_write(fd=fd, value=7)
        assert result_of(greenlet) == 7


@needs_eventfd
@each_mode
def test_eventfd_read_killed(nonblocking):
    with eventfd(0, nonblocking) as fd:
        parked(coopos.eventfd_read, fd).kill()
        os.eventfd_write(fd, 7)
        turn_loop()
        assert os.eventfd_read(fd) == 7


@needs_eventfd
@each_mode
def test_eventfd_write_waits_for_room(nonblocking):
    with eventfd(FULL, nonblocking) as fd:
        greenlet = parked(coopos.eventfd_write, fd, 7)
        assert os.eventfd_read(fd) == FULL
        assert result_of(greenlet) is None
        assert coopos.eventfd_read(fd) == 7


@needs_eventfd
@each_mode
def test_eventfd_write_killed(nonblocking):
    with eventfd(FULL, nonblocking) as fd:
        parked(coopos.eventfd_write, fd, 7).kill()
        assert os.eventfd_read(fd) == FULL
        os.eventfd_write(fd, 1)
        turn_loop()
        assert os.eventfd_read(fd) == 1


@needs_eventfd
def test_eventfd_of_an_object_with_fileno_and_a_semaphore():
    class Object:
        def fileno(self):
            return fd

    with closing(os.eventfd(0, os.EFD_SEMAPHORE)) as (fd,):
        coopos.eventfd_write(Object(), FULL)
        assert coopos.eventfd_read(Object()) == 1


# ---- randomness --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_entropy_yet(monkeypatch):
    """The machine has just started, as far as anybody can tell without waiting."""
    getrandom = posix.getrandom

    def not_yet(size, flags=0):
        if flags & os.GRND_NONBLOCK:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return getrandom(size, flags)

    monkeypatch.setattr("posix.getrandom", not_yet)


@needs_getrandom
@pytest.mark.parametrize(("name", "args"), [("getrandom", (6, 0)), ("urandom", (6,))])
@pytest.mark.usefixtures("no_entropy_yet")
def test_random_bytes_when_the_machine_has_just_started(name, args):
    with StandingWorkers() as workers:
        greenlet = parked(getattr(coopos, name), *args)
        workers.go_on()
        assert len(result_of(greenlet)) == 6


@needs_getrandom
@pytest.mark.usefixtures("no_entropy_yet")
def test_getrandom_that_must_not_wait():
    assert error_of(coopos.getrandom, 6, os.GRND_NONBLOCK) == (BlockingIOError, 11)


@pytest.mark.parametrize("name", ["getrandom", "urandom"])
def test_random_bytes_at_once(name):
    """As a rule no thread is asked: in the event loop too."""
    if not hasattr(os, name):
        pytest.skip("getrandom, which only Linux has")
    error, data = in_hub(getattr(coopos, name), 100)
    assert error is None and len(data) == 100


def test_urandom_where_getrandom_is_forbidden(monkeypatch):
    def getrandom(size, flags=0):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("posix.getrandom", getrandom, raising=False)
    assert len(coopos.urandom(10)) == 10
