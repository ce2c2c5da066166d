"""The note of an exception that has ended a wait: where that was."""

import dataclasses
import os
import sys
import traceback
import typing

import gevent
import pytest

import coopos
from coopos import _core
from coopos.subprocess import Popen

from ..helpers.children import living_child
from ..helpers.support import make_clogged_pipe, make_pipe, parked, result_of, run_script, until

PLACE = "coopos: while in "


class Late(Exception):
    pass


def thrown_into(function, *args, exception=None):
    """What comes out of ``function(*args)``, which waits, when *exception* is thrown in."""
    caught = []

    def run():
        try:
            function(*args)
        except BaseException as ex:
            caught.append(ex)

    greenlet = parked(run)
    greenlet.kill(Late() if exception is None else exception)
    [ex] = caught
    return ex


def notes_of(function, *args, exception=None):
    return getattr(thrown_into(function, *args, exception=exception), "__notes__", [])


# ---- each kind of wait -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nb_read", "read", "readinto"])
def test_note_of_a_read(name):
    with make_pipe() as (reader, _writer):
        room = bytearray(1) if name == "readinto" else 1
        assert notes_of(getattr(coopos, name), reader, room) == [f"{PLACE}{name}({reader})"]


@pytest.mark.parametrize("name", ["nb_write", "write", "writev"])
def test_note_of_a_write(name):
    with make_clogged_pipe() as (_reader, writer, _size):
        data = [b"x"] if name == "writev" else b"x"
        assert notes_of(getattr(coopos, name), writer, data) == [f"{PLACE}{name}({writer})"]


def test_note_of_a_timeout_is_printed():
    """Where Python prints notes: since 3.11."""
    with make_pipe() as (reader, _writer), pytest.raises(gevent.Timeout) as info, gevent.Timeout(0.001):
        coopos.read(reader, 1)
    assert info.value.__notes__ == [f"{PLACE}read({reader})"]
    if sys.version_info >= (3, 11):
        assert f"{PLACE}read({reader})\n" in traceback.format_exception(info.value)


def test_note_of_a_wait_for_children():
    """One child, any child, the child of a Popen, and any process."""
    with living_child() as (pid, end):
        assert notes_of(coopos.waitpid, pid, 0) == [f"{PLACE}waitpid({pid})"]
        assert notes_of(coopos.wait4, pid, 0) == [f"{PLACE}wait4({pid})"]
        assert notes_of(coopos.waitpid, -1, 0) == [f"{PLACE}waitpid()"]
        assert notes_of(coopos.waitpid, pid, os.WUNTRACED) == [f"{PLACE}waitpid({pid})"]
        if hasattr(os, "pidfd_open"):
            [note] = notes_of(coopos.wait_exit, pid)
            assert note.startswith(f"{PLACE}wait_exit(")
        end()
        assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
    with Popen(["sleep", "1000"]) as process:
        assert notes_of(process.wait) == [f"{PLACE}wait({process.pid})"]
        process.kill()


def test_note_of_a_call_that_a_worker_makes(tmp_path):
    """With the path, or the descriptor."""
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    assert notes_of(coopos.open, path, os.O_RDONLY) == [f"{PLACE}open({path!r})"]
    with open(tmp_path / "file", "w") as file:
        _core.hold(True)
        try:
            assert notes_of(coopos.fsync, file.fileno()) == [f"{PLACE}fsync({file.fileno()})"]
            assert notes_of(coopos.sync) == [f"{PLACE}sync()"]
        finally:
            _core.hold(False)
        until(lambda: _core.count_begun() == 0)
        coopos.fsync(file.fileno())  # with its answer come those that were left to their workers


def test_note_of_a_semaphore():
    """Of the greenlet that waits with a worker, and of those that wait for their turn."""
    run_script("""
        import warnings
        warnings.simplefilter("ignore")
        from gevent import monkey
        monkey.patch_all()
        import coopos, gevent, multiprocessing
        coopos.patch()
        warnings.simplefilter("error")
        lock = multiprocessing.get_context("fork").Lock()
        lock.acquire()
        found = []

        def wait():
            try:
                lock.acquire()
            except ValueError as ex:
                found.extend(ex.__notes__)

        greenlets = [gevent.spawn(wait) for _ in range(2)]
        gevent.sleep(0.01)
        for greenlet in reversed(greenlets):
            greenlet.kill(ValueError())
        assert len(found) == 2 and {note.partition("(")[0] for note in found} == {"coopos: while in sem_wait"}, found
        lock.release()
    """)


def test_note_of_a_timeout_of_an_ordinary_class():
    """It passes the stdlib's `except` clauses, and has its note all the same."""
    with Popen(["sleep", "1000"]) as process:
        late = OSError("late")
        assert thrown_into(process.wait, exception=late) is late
        assert late.__notes__ == [f"{PLACE}wait({process.pid})"]
        process.kill()


# ---- what has none -----------------------------------------------------------------------------------------------------------


def test_note_is_not_for_a_plain_kill():
    """GreenletExit is shown to nobody."""
    with make_pipe() as (reader, _writer):
        ex = thrown_into(coopos.read, reader, 1, exception=gevent.GreenletExit)
        assert type(ex) is gevent.GreenletExit and not hasattr(ex, "__notes__")


def test_note_is_not_for_the_errors_of_the_call():
    with make_pipe() as (reader, _writer):

        def read():
            with pytest.raises(OSError, match="Bad file descriptor") as info:
                coopos.read(reader, 1)
            return info.value

        greenlet = parked(read)
        coopos.close(reader)
        assert not hasattr(result_of(greenlet), "__notes__")


# ---- exceptions of all kinds -------------------------------------------------------------------------------------------------


def test_note_of_one_exception_for_many_waits():
    """It has one note of ours, of the last wait, beside those of others."""
    late = Late()
    late.__notes__ = ["theirs"]
    with make_pipe() as (one, _), make_pipe() as (other, _):
        for fd in (one, other, one, other):
            assert thrown_into(coopos.read, fd, 1, exception=late) is late
            assert late.__notes__ == ["theirs", f"{PLACE}read({fd})"]


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Refusing(Exception):
    @property
    def __notes__(self):
        raise ZeroDivisionError

    def add_note(self, note):
        raise ZeroDivisionError


class Odd(Exception):
    __notes__ = ("a", "tuple")


class Mapping(Exception):
    __notes__: typing.ClassVar = {}


class Closed(Exception):
    def __getattribute__(self, name):
        raise ZeroDivisionError


class Strange(Exception):
    __notes__ = None

    def __setattr__(self, name, value):
        raise KeyboardInterrupt


@pytest.mark.parametrize("exception", [Frozen(7), Refusing(), Odd(), Mapping(), Strange(), KeyboardInterrupt(), SystemExit(7)])
def test_note_takes_no_exceptions_place(exception):
    """One that refuses a note comes out as it is."""
    with make_pipe() as (reader, _writer):
        assert thrown_into(coopos.read, reader, 1, exception=exception) is exception
        assert not Mapping.__notes__
        assert not sys.exc_info()[1]


def test_note_of_an_exception_whose_attributes_raise():
    with make_pipe() as (reader, _writer):
        assert type(thrown_into(coopos.read, reader, 1, exception=Closed())) is Closed
