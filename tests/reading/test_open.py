"""open: of FIFOs, which wait for the other end, and of whatever else may take its time."""

import fcntl
import os
import pathlib
import signal
import subprocess
import sys

import gevent
import pytest
from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import get_hub

import coopos

from ..helpers.support import HubThread, closing, error_of, in_hub, open_fds, parked, result_of, run_script, turn_loop

# ---- what changes meanwhile --------------------------------------------------------------------------------------------------


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


# ---- FIFOs and arguments -----------------------------------------------------------------------------------------------------


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
