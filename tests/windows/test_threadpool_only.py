"""What coopos is where it has no compiled core: tp_read and tp_write in threads, the names of os, patch(), and the command line."""

import errno
import importlib.metadata
import os
import pkgutil
import sys

import gevent
import gevent.os
import pytest
from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import get_hub

import coopos

RUN_COOPOS = """
import runpy
sys.argv[0] = "coopos"
runpy.run_module("coopos", run_name="__main__", alter_sys=True)
"""


def ticks_while(function, *args):
    """What function returns, and how often another greenlet ran meanwhile."""
    ticks = []
    # A hub that never sleeps would leave the pool's threads no GIL for many seconds.
    ticker = gevent.spawn(lambda: [(ticks.append(1), gevent.sleep(0.001)) for _ in iter(int, 1)])
    try:
        return function(*args), len(ticks)
    finally:
        ticker.kill()


# ---- names -------------------------------------------------------------------------------------------------------------------


def test_names():
    """The two, what patches and proves, and nothing that would need the core."""
    assert coopos.__all__ == ["doctor", "patch", "patched", "tp_read", "tp_write", "unpatch"]
    assert (coopos.__implements__, coopos.__extensions__, coopos.__cooperative__) == ([], ["tp_read", "tp_write"], [])


def test_names_of_os():
    """They are os's own, and all there."""
    public = [name for name in vars(os) if not name.startswith("__")]
    assert set(public) == set(coopos.__imports__)
    assert [name for name in public if getattr(coopos, name) is not getattr(os, name)] == []


def test_names_of_gevent_os():
    """Every documented one is here."""
    assert set(gevent.os.__all__) <= set(coopos.__all__)


@pytest.mark.skipif(os.name == "posix", reason="here the package has the other modules as well")
def test_modules():
    """What needs the core is not installed, and all that is can be imported."""
    installed = {module.name for module in pkgutil.walk_packages(coopos.__path__, "coopos.")}
    modules = {"__main__", "_doctor", "_files", "_originals", "_patch", "_patch._os", "_settings"}
    assert installed == {f"coopos.{name}" for name in modules}
    for name in installed:
        __import__(name)
    files = [str(file) for file in importlib.metadata.files("coopos")]
    assert not [file for file in files if file.endswith((".pyi", ".pyx", ".pxd", ".h"))]
    assert "coopos/py.typed" in [file.replace("\\", "/") for file in files]


@pytest.mark.skipif(os.name == "posix", reason="here the package has a core")
def test_wheel_is_for_this_system():
    """One wheel for every Python of this system, and for no other system."""
    tags = importlib.metadata.distribution("coopos").read_text("WHEEL")
    assert "\nTag: py3-none-win_amd64\n" in tags and tags.count("Tag:") == 1


# ---- reading and writing -----------------------------------------------------------------------------------------------------


def test_tp_read_lets_others_run(pipe):
    """An empty pipe is waited for, in a thread, and the data comes back."""
    reader, writer = pipe
    greenlet = gevent.spawn(ticks_while, coopos.tp_read, reader, 100)
    gevent.sleep(0)
    gevent.sleep(0)
    assert not greenlet.ready()
    assert coopos.tp_write(writer, b"coopos") == 6
    data, ticks = greenlet.get()
    assert data == b"coopos" and ticks


def test_tp_write_lets_others_run(pipe):
    """A full pipe is waited for, and all of the data is written, as in blocking mode it is."""
    reader, writer = pipe
    data = bytes(range(256)) * 4096
    greenlet = gevent.spawn(ticks_while, coopos.tp_write, writer, data)
    got = b""
    while len(got) < len(data):
        got += coopos.tp_read(reader, 65536)
    written, ticks = greenlet.get()
    assert (written, got) == (len(data), data) and ticks


def test_tp_read_end_of_file(pipe):
    """Nothing, once the other end is closed; not before what was written."""
    reader, writer = pipe
    os.write(writer, b"coopos")
    os.close(writer)
    assert [coopos.tp_read(reader, 4), coopos.tp_read(reader, 4), coopos.tp_read(reader, 4)] == [b"coop", b"os", b""]


def test_file(tmp_path):
    """A regular file's bytes are written and read as they are."""
    data = b"one\r\ntwo\n\x1a\0three"
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0))
    try:
        assert coopos.tp_write(fd, memoryview(data)) == len(data)
        os.lseek(fd, 0, os.SEEK_SET)
        assert coopos.tp_read(fd, 100) == data
        assert coopos.tp_read(fd, 100) == b""
        assert (coopos.tp_read(fd, 0), coopos.tp_write(fd, b"")) == (b"", 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "number"),
    [
        (coopos.tp_read, lambda reader, writer: (-1, 1), OSError, errno.EBADF),
        (coopos.tp_read, lambda reader, writer: (writer, 1), OSError, errno.EBADF),
        (coopos.tp_read, lambda reader, writer: (reader, -1), OSError, errno.EINVAL),
        (coopos.tp_read, lambda reader, writer: (reader, "1"), TypeError, None),
        (coopos.tp_write, lambda reader, writer: (-1, b"x"), OSError, errno.EBADF),
        (coopos.tp_write, lambda reader, writer: (reader, b"x"), OSError, errno.EBADF),
        (coopos.tp_write, lambda reader, writer: (writer, "x"), TypeError, None),
    ],
    ids=["read -1", "read writer", "read negative", "read str", "write -1", "write reader", "write str"],
)
def test_error(pipe, function, arguments, error, number):
    """It is that of os, and raised here, not printed by the thread."""
    with pytest.raises(error) as caught:
        function(*arguments(*pipe))
    assert getattr(caught.value, "errno", None) == number


@pytest.mark.parametrize("function", [coopos.tp_read, coopos.tp_write])
def test_in_the_hub(pipe, function):
    """Refused, before a thread is asked: nobody could wait for it."""
    caught = []

    def call():
        try:
            function(pipe[0], 1 if function is coopos.tp_read else b"x")
        except BlockingSwitchOutError as ex:
            caught.append(ex)

    get_hub().loop.run_callback(call)
    gevent.sleep(0)
    gevent.sleep(0)
    assert len(caught) == 1


def test_call_that_has_not_begun_is_not_made(tmp_path):
    """Killed while it waits for a thread, a write is not made later, when its number may be another file's."""
    pool = get_hub().threadpool
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    pipes = [os.pipe() for _ in range(pool.maxsize)]
    busy = [gevent.spawn(coopos.tp_read, reader, 1) for reader, _ in pipes]
    while len(pool) < pool.maxsize:
        gevent.sleep(0)
    greenlet = gevent.spawn(coopos.tp_write, fd, b"coopos")
    gevent.sleep(0)
    greenlet.kill()
    for _, writer in pipes:
        os.write(writer, b"x")
    assert gevent.joinall(busy, raise_error=True)
    pool.apply(lambda: None)
    assert os.fstat(fd).st_size == 0
    for end in [fd, *sum(pipes, ())]:
        os.close(end)


# ---- patch, and the command line ---------------------------------------------------------------------------------------------


def test_patch(python):
    """Under gevent.monkey it puts the two in gevent.os, leaves os alone, and unpatch() takes them away; twice is once."""
    out, err, status = python("""
        from gevent import monkey
        monkey.patch_all()
        import subprocess
        import coopos
        before = dict(vars(os)), gevent.os.tp_read, gevent.os.tp_write
        for _ in range(2):
            coopos.patch()
            assert (gevent.os.tp_read, gevent.os.tp_write) == (coopos.tp_read, coopos.tp_write)
            assert vars(os) == before[0]
        print(subprocess.check_output([sys.executable, "-c", "print(7)"]).split())
        for _ in range(2):
            coopos.unpatch()
            assert (gevent.os.tp_read, gevent.os.tp_write) == before[1:]
            assert set(coopos.patched().values()) == {"patch() was not called"}
        coopos.patch(keep_greenlets=False)
        assert gevent.os.tp_read is coopos.tp_read
    """)
    assert (out.strip(), err, status) == ("[b'7']", "", 0)


def test_doctor(python):
    """It says that the threadpool serves pipes and files, and that both are well."""
    out, err, status = python(RUN_COOPOS, "doctor")
    assert not err and not status, out + err
    patched, *lines, result = out.splitlines()[2:]
    assert patched.startswith("not patched: ")
    assert [line.split("  ")[0] for line in lines] == ["blocking pipe", "regular file"]
    assert [line.partition(" ok ")[2].strip() for line in lines] == ["the threadpool"] * 2
    assert result == "2 of 2 are well"


@pytest.mark.parametrize("kind", ["script", "module"])
def test_program(python, tmp_path, kind):
    """A program runs patched, with its own argv, and its exit status is passed on."""
    source = """
        import os, sys
        import gevent.monkey, gevent.os
        print(sys.argv[1:], __name__, gevent.monkey.is_module_patched("socket"), gevent.os.tp_read.__module__)
        raise SystemExit(7)
    """
    (tmp_path / "program.py").write_text("\n".join(line.strip() for line in source.splitlines()), encoding="utf-8")
    at = f"sys.path.insert(0, {os.fspath(tmp_path)!r})\n"
    arguments = ["-m", "program"] if kind == "module" else [os.fspath(tmp_path / "program.py")]
    out, err, status = python(at + RUN_COOPOS.lstrip(), *arguments, "one", "two")
    assert (out.strip(), err, status) == ("['one', 'two'] __main__ True coopos._files", "", 7)


def test_environment_variable(python):
    """COOPOS_PATCH=1 has gevent.monkey call patch(), through the entry point that was installed."""
    out, err, status = python("""
        os.environ["COOPOS_PATCH"] = "1"
        from gevent import monkey
        monkey.patch_all()
        print(gevent.os.tp_read.__module__)
    """)
    assert (out.strip(), err, status) == ("coopos._files", "", 0)


def test_core_is_not_here():
    """These tests are of a package without its core, on whatever system."""
    assert not [name for name, module in sys.modules.items() if name.startswith("coopos._c") and module is not None]
    assert coopos._files._core is None
