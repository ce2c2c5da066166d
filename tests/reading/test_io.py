"""FileIO and fdopen: what io.FileIO and os.fdopen do with the same file, while other greenlets run."""

import contextlib
import copy
import dataclasses
import errno
import gc
import io
import os
import pathlib
import pickle
import pty
import socket
import stat
import tty
import warnings

import gevent
import pytest
from gevent.hub import get_hub

import coopos

from ..helpers.descriptors import HeldPool
from ..helpers.support import (
    DEADLINE_S,
    HAS_RWF_NOWAIT,
    HubThread,
    active_watchers,
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

BOTH = [io.FileIO, coopos.FileIO]


@pytest.fixture
def path(tmp_path):
    """A file of 30 bytes in three lines."""
    path = tmp_path / "file"
    path.write_bytes(b"012345678\n" * 3)
    return path


def pipe():
    return os.pipe()


def socket_pair():
    one, other = socket.socketpair()
    return one.detach(), other.detach()


def pty_pair():
    master, terminal = pty.openpty()
    tty.setraw(terminal)
    return terminal, master


@contextlib.contextmanager
def make_fifo(directory):
    path = directory / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with closing(reader, os.open(path, os.O_WRONLY)) as ends:
        os.set_blocking(reader, True)
        yield ends


@pytest.fixture(params=["pipe", "socket", "pty", "fifo"])
def kind(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["blocking", "nonblocking"])
def ends(request, kind, tmp_path):
    """(reader, writer) of a file that can be waited for."""
    make = {"pipe": pipe, "socket": socket_pair, "pty": pty_pair}.get(kind)
    with make_fifo(tmp_path) if make is None else closing(*make()) as (reader, writer):
        os.set_blocking(reader, request.param)
        os.set_blocking(writer, request.param)
        flags = [os.get_blocking(reader), os.get_blocking(writer)]
        yield reader, writer
        for fd, is_blocking in zip((reader, writer), flags, strict=True):
            with contextlib.suppress(OSError):
                assert os.get_blocking(fd) == is_blocking, "a descriptor's flags were touched"


@contextlib.contextmanager
def files(reader, writer):
    """The same as files, which are closed at the end, and close nothing."""
    with coopos.FileIO(reader, "r", closefd=False) as read, coopos.FileIO(writer, "w", closefd=False) as write:
        yield read, write


@contextlib.contextmanager
def pipe_files(blocking=False):
    """(reader, writer), files of a pipe that are its owners."""
    reader, writer = os.pipe()
    os.set_blocking(reader, blocking)
    os.set_blocking(writer, blocking)
    with coopos.FileIO(reader, "r") as read, coopos.FileIO(writer, "w") as write:
        yield read, write


def have_waited(file, write):
    """Let *file* wait once in this hub, and be woken."""
    write(b"1")
    assert file.read(100) == b"1"  # less than was asked for: the next one waits
    greenlet = parked(file.read, 100)
    write(b"22")
    assert result_of(greenlet) == b"22"


def io_watchers():
    return [watcher for watcher in active_watchers() if hasattr(watcher, "fd")]


# ---- against io.FileIO -------------------------------------------------------------------------------------------------------


def tell_all(file):
    """What a file says of itself."""
    names = ["mode", "closefd", "closed", "_blksize"]
    answers = {name: getattr(file, name) for name in names}
    answers.update({name: error_of(getattr(file, name)) for name in ("readable", "writable", "seekable", "tell", "isatty")})
    return answers


OPERATIONS = {
    "read": lambda file: file.read(),
    "read 3": lambda file: file.read(3),
    "read 0": lambda file: file.read(0),
    "read None": lambda file: file.read(None),
    "read much": lambda file: file.read(1_000_000),
    "read float": lambda file: file.read(1.0),
    "read str": lambda file: file.read("1"),
    "read huge": lambda file: file.read(2**70),
    "readall": lambda file: file.readall(),
    "readall twice": lambda file: (file.readall(), file.readall()),
    "readline": lambda file: file.readline(),
    "readlines": lambda file: file.readlines(),
    "iterate": lambda file: list(file),
    "readinto": lambda file: [file.readinto(buffer := bytearray(4)), buffer],
    "readinto empty": lambda file: file.readinto(bytearray()),
    "readinto bytes": lambda file: file.readinto(b"1234"),
    "readinto str": lambda file: file.readinto("1234"),
    "readinto memoryview": lambda file: [file.readinto(memoryview(buffer := bytearray(4))[1:]), buffer],
    "write": lambda file: file.write(b"abc"),
    "write empty": lambda file: file.write(b""),
    "write memoryview": lambda file: file.write(memoryview(b"abcdef")[1:3]),
    "write str": lambda file: file.write("abc"),
    "write int": lambda file: file.write(5),
    "writelines": lambda file: file.writelines([b"a", b"b"]),
    "seek": lambda file: (file.seek(5), file.read(2)),
    "seek to the end": lambda file: (file.seek(-3, os.SEEK_END), file.tell()),
    "seek before the start": lambda file: file.seek(-1),
    "seek float": lambda file: file.seek(1.0),
    "seek whence": lambda file: file.seek(0, 77),
    "seek and write": lambda file: (file.seek(25), file.write(b"x" * 10), file.tell()),
    "truncate": lambda file: file.truncate(5),
    "truncate longer": lambda file: (file.truncate(50), file.tell()),
    "truncate here": lambda file: (file.seek(7), file.truncate()),
    "truncate negative": lambda file: file.truncate(-1),
    "flush": lambda file: file.flush(),
    "fileno": lambda file: file.fileno() >= 0,
    "detach": lambda file: file.detach(),
    "pickle": lambda file: pickle.dumps(file),
    "copy": lambda file: copy.copy(file),
    "tell all": tell_all,
    "set an attribute": lambda file: setattr(file, "anything", 1),
    "set mode": lambda file: setattr(file, "mode", "w"),
    "set closefd": lambda file: setattr(file, "closefd", False),
}
MODES = ["r", "w", "a", "r+", "w+", "a+", "rb", "wb", "b+r", "+a", "bbr"]
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


@pytest.mark.smoke
@pytest.mark.parametrize("mode", MODES)
@each_operation
def test_fileio_regular_file(tmp_path, mode, operation):
    """The same results, errors and contents."""
    outcomes = []
    for number, kind in enumerate(BOTH):
        path = tmp_path / str(number)
        path.write_bytes(b"012345678\n" * 3)
        with kind(path, mode) as file:
            outcomes.append([error_of(operation, file), tell_all(file)])
        outcomes[-1].append(path.read_bytes())
    assert outcomes[1] == outcomes[0]


@pytest.mark.parametrize("is_opened", [True, False], ids=["closed", "never opened"])
@each_operation
def test_fileio_closed(path, operation, is_opened):
    """ValueError where io.FileIO raises it."""
    outcomes = []
    for kind in BOTH:
        if is_opened:
            file = kind(path, "r+")
            file.close()
            file.close()
        else:
            file = kind.__new__(kind)
        outcomes.append(error_of(operation, file))
    if operation is OPERATIONS["tell all"]:
        outcomes = [{**answers, "mode": 0, "closefd": 0, "_blksize": 0} for _error, answers in outcomes]
    assert outcomes[1] == outcomes[0]


def test_fileio_closed_can_not_be_entered(path):
    for kind in BOTH:
        with kind(path) as file:
            assert not file.closed
        assert file.closed
        with pytest.raises(ValueError, match="closed file"), file:
            pass


FILES = {"pipe": pipe, "socket": socket_pair, "pty": pty_pair, "null": lambda: (os.open(os.devnull, os.O_RDWR), os.dup(1))}
NO_WAITING = [name for name in OPERATIONS if name.startswith(("write", "seek", "trunc", "flush", "fileno", "tell", "pickle"))]


@pytest.mark.parametrize("mode", ["r", "w", "a", "r+"])
@pytest.mark.parametrize("operation", [OPERATIONS[name] for name in NO_WAITING], ids=NO_WAITING)
@pytest.mark.parametrize("make", FILES.values(), ids=FILES.keys())
def test_fileio_other_files(make, operation, mode):
    """Pipes, sockets, terminals and devices, where nothing waits."""
    outcomes = []
    for kind in BOTH:
        with closing(*make()) as (fd, _peer), kind(fd, mode, closefd=False) as file:
            if make is not FILES["null"]:
                os.set_blocking(fd, False)
            if operation in (OPERATIONS["seek"], OPERATIONS["seek and write"]) and make is FILES["null"]:
                continue  # reads
            outcomes.append([error_of(operation, file), tell_all(file)])
    assert outcomes[-1:] == outcomes[:1]


def opener_of(result):
    def opener(_path, _flags):
        if isinstance(result, BaseException):
            raise result
        return result

    return opener


@pytest.mark.parametrize(
    "arguments",
    [
        *[(file,) for file in ("", "nonexistent", "nonexistent/x", "/", b"/", "a\0b", "\ud800", None, 1.5, [], 1j)],
        *[(number,) for number in (-1, -7, 2**31, 2**70, -(2**70), 987654)],
        *[("x", mode) for mode in ("", "rw", "ww", "r++", "+", "rt", "z", "U", "b", "r\0", None, 1, b"r", "ax", "xyz")],
        *[(0, mode) for mode in ("", "rw", "z")],
        ("/", "w"),
        ("x", "r", False),
        ("/dev/null", "r", False),
        ("/dev/null", "x"),
        *[("x", "r", True, opener_of(result)) for result in (-1, -5, "1", None, 1.0, OSError(5, "x"), KeyError(1))],
        ("x", "r", True, 5),
        (),
        ("x", "r", True, None, 1),
    ],
    ids=repr,
)
def test_fileio_wrong_arguments(tmp_path, monkeypatch, arguments):
    """The same errors, with the same file named; no descriptor is left and no file made."""
    monkeypatch.chdir(tmp_path)
    before = open_fds()
    outcomes = []
    for kind in BOTH:
        with pytest.raises(Exception) as caught:  # noqa: PT011 (compared below)
            kind(*arguments)
        outcomes.append((type(caught.value), getattr(caught.value, "errno", None), getattr(caught.value, "filename", None)))
    assert outcomes[1] == outcomes[0]
    assert os.listdir() == []
    turn_loop()
    assert open_fds() == before


@pytest.mark.parametrize("mode", ["r", "w", "q"])
@pytest.mark.parametrize("name", ["a\0b", b"a\0b", 1.5, None, "\ud800\0", pathlib.Path("x")], ids=repr)
@pytest.mark.parametrize("number", [-1, -5, 2**31, 2**70, 987654, None, 1.0, "1", "directory"], ids=repr)
def test_fileio_opener_is_asked_and_answers_as_with_io(tmp_path, number, name, mode):
    """Not for a name that is none."""
    outcomes = []
    for kind in BOTH:
        asked = []

        def opener(path, flags, asked=asked):
            asked.append((path, flags))
            return os.open(tmp_path, os.O_RDONLY) if number == "directory" else number

        outcomes.append((error_of(kind, name, mode, True, opener), asked))
    assert outcomes[1] == outcomes[0]


@pytest.mark.parametrize("is_path", [True, False], ids=["path", "descriptor"])
def test_fileio_whose_last_step_fails_leaves_nothing(path, monkeypatch, is_path):
    """It closes what it has opened, and no other; what there is of it is closed, and keeps no number."""

    def fail(*args):
        raise MemoryError

    before = open_fds()
    with closing(os.open(path, os.O_RDONLY)) as (fd,):
        file = coopos.FileIO.__new__(coopos.FileIO)
        with monkeypatch.context() as patch:
            patch.setattr(coopos.io, "Owned", fail)
            with pytest.raises(MemoryError):
                file.__init__(path if is_path else fd)
        assert file.closed
        assert error_of(file.read)[0] is ValueError
        assert os.fstat(fd)
        file.__init__(path)
        with file:
            assert file.read() == path.read_bytes()
    turn_loop()
    assert open_fds() == before


def test_fileio_of_a_directory_leaves_a_descriptor_open():
    fd = os.open("/", os.O_RDONLY)
    for kind in BOTH:
        assert error_of(kind, fd) == (IsADirectoryError, errno.EISDIR)
    os.close(fd)


def test_fileio_bool_is_warned_of_as_by_io():
    outcomes = []
    for kind in BOTH:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kind(True, "w", closefd=False).close()
        outcomes.append([(each.category, str(each.message)) for each in caught])
    assert outcomes[1] == outcomes[0]


def test_fileio_name_and_repr(path):
    """The name is what the file was opened by, and may be changed."""
    for name in (str(path), os.fsencode(path), path):
        with coopos.FileIO(name, "r+") as file, io.FileIO(name, "r+") as plain:
            assert file.name is name
            assert repr(file) == repr(plain).replace("_io.", "coopos.io.")
            del file.name, plain.name
            assert repr(file).startswith(f"<coopos.io.FileIO fd={file.fileno()} mode='rb+' closefd=True")
    assert repr(file) == "<coopos.io.FileIO [closed]>"
    with closing(os.open(path, os.O_RDONLY)) as (fd,):
        with coopos.FileIO(fd, closefd=False) as file:
            assert file.name is fd
            assert repr(file) == f"<coopos.io.FileIO name={fd} mode='rb' closefd=False>"
        os.fstat(fd)


def test_fileio_is_a_raw_file_of_io(path):
    with coopos.FileIO(path) as file:
        assert isinstance(file, (io.RawIOBase, io.FileIO))


def test_fileio_is_not_inherited(path):
    for opener in (None, lambda path, flags: os.open(path, flags & ~os.O_CLOEXEC)):
        with coopos.FileIO(path, opener=opener) as file:
            assert not os.get_inheritable(file.fileno())


def test_fileio_opener_gets_the_flags_that_io_gives_it(path):
    seen = {kind: [] for kind in BOTH}
    for kind in BOTH:
        for mode in MODES:
            with kind(path, mode, opener=lambda *given, kind=kind: seen[kind].append(given) or os.open(*given)):
                pass
    assert seen[coopos.FileIO] == seen[io.FileIO]


def test_fileio_makes_files_with_the_same_permissions(tmp_path):
    permissions = []
    for number, kind in enumerate(BOTH):
        with kind(tmp_path / str(number), "x") as file:
            permissions.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
    assert permissions[0] == permissions[1]


def test_fileio_used_again(path):
    """Initialised again, it lets go of the first descriptor, as io.FileIO does."""
    for kind in BOTH:
        with kind(path) as file:
            before = open_fds()
            file.__init__(path, "r+")
            assert file.read(3) == b"012"
            turn_loop()
            assert open_fds() == before


@pytest.mark.parametrize("arguments", [("nonexistent",), ("/", "w"), (None, "z")], ids=["file", "directory", "mode"])
def test_fileio_used_again_in_vain(path, arguments):
    """The first descriptor is closed, and so is the file: it has no number that will be another's."""
    outcomes = []
    for kind in BOTH:
        file = kind(path)
        before = file.fileno()
        outcomes.append([error_of(file.__init__, arguments[0] or path, *arguments[1:]), file.closed, error_of(file.fileno)])
        outcomes[-1] += [error_of(os.fstat, before), error_of(file.read, 1), error_of(file.close)]
        with file.__init__(path) or file:
            outcomes[-1].append(file.read(3))
    assert outcomes[1] == outcomes[0]


def test_fileio_has_nothing_in_its_namespace_but_its_name(path):
    """Its methods are those of its class: who replaces one there replaces it everywhere."""
    outcomes = []
    for kind in BOTH:
        with kind(path) as file:
            outcomes.append([vars(file), file.read.__self__ is file, error_of(kind.read, 5, 1), error_of(kind.write, path, b"")])
    assert outcomes[1] == outcomes[0]


@pytest.mark.parametrize("make", [str, os.fsencode, pathlib.Path], ids=["str", "bytes", "path"])
def test_fileio_error_names_the_file_as_it_was_given(tmp_path, make):
    name = make(str(tmp_path / "nonexistent"))
    for kind in BOTH:
        with pytest.raises(FileNotFoundError) as caught:
            kind(name)
        assert caught.value.filename is name


def test_fileio_audit():
    """The event that io.FileIO raises tells the path and the mode; it comes first."""
    run_script("""
        import sys, io
        import coopos
        events = []
        sys.addaudithook(lambda event, args: event == "open" and events.append(args))
        for kind in io.FileIO, coopos.FileIO:
            kind("/dev/null", "r").close()
            first = events.pop(0)
            assert first[:2] == ("/dev/null", "r"), first
            if kind is io.FileIO:
                flags = first[2]
            assert first[2] == flags
            events.clear()
    """)


class Own(coopos.FileIO):
    """A subclass whose methods are its own."""

    def __init__(self, *args):
        self.calls = []
        super().__init__(*args)

    def read(self, size=-1, /):
        self.calls.append("read")
        return super().read(size)

    def readinto(self, buffer, /):
        self.calls.append("readinto")
        return super().readinto(buffer)

    def write(self, data, /):
        self.calls.append("write")
        return super().write(data)

    def close(self):
        self.calls.append("close")
        super().close()


def test_fileio_subclass_has_its_own_methods(path):
    with Own(path, "r+") as file:
        assert file.readline() == b"012345678\n"
        buffer = io.BufferedReader(file)
        assert buffer.read(3) == b"012"
        buffer.detach()
        assert file.write(b"") == 0
    assert set(file.calls) == {"read", "readinto", "write", "close"}
    assert error_of(file.read) == error_of(file.write, b"") == (ValueError, None)


@each_operation
def test_fileio_subclass_does_what_io_fileio_does(path, operation):
    class Sub(coopos.FileIO):
        pass

    outcomes = []
    for kind in (io.FileIO, Sub):
        path.write_bytes(b"012345678\n" * 3)
        with kind(path, "r") as file:
            outcomes.append([error_of(operation, file), tell_all(file)])
    assert outcomes[1] == outcomes[0]


# ---- collected without having been closed ------------------------------------------------------------------------------------

MAKERS = {
    "raw": lambda fd: coopos.FileIO(fd, "w"),
    "buffered": lambda fd: coopos.fdopen(fd, "wb"),
    "text": lambda fd: coopos.fdopen(fd, "w", encoding="ascii"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_unclosed_file_is_warned_of_and_closed(make):
    """One ResourceWarning, of the file that was lost, where it was lost; what it had buffered is written."""
    with make_pipe() as (reader, writer):
        file = make(writer)
        name = repr(file)
        file.write("x" if isinstance(file, io.TextIOBase) else b"x")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del file
            gc.collect()
        [warning] = caught
        assert (warning.category, str(warning.message)) == (ResourceWarning, f"unclosed file {name}")
        assert pathlib.Path(warning.filename) == pathlib.Path(__file__)
        assert error_of(os.fstat, writer) == (OSError, errno.EBADF)
        assert os.read(reader, 10) == b"x"


def test_unclosed_file_of_somebody_elses_descriptor_is_not_warned_of():
    with make_pipe() as (reader, _writer):
        file = coopos.FileIO(reader, closefd=False)
        del file
        gc.collect()
        os.fstat(reader)


def test_unclosed_file_is_closed_where_warnings_are_errors(monkeypatch):
    """The warning goes to sys.unraisablehook."""
    seen = []
    monkeypatch.setattr("sys.unraisablehook", lambda what: seen.append(what.exc_type))
    with make_pipe() as (_reader, writer):
        for make in MAKERS.values():
            file = make(os.dup(writer))
            fd = file.fileno()
            del file
            gc.collect()
            assert error_of(os.fstat, fd) == (OSError, errno.EBADF)
    assert seen == [ResourceWarning] * 3


KEPT = {
    "read": lambda method: method(1),
    "readinto": lambda method: method(bytearray(1)),
    "readall": lambda method: method(),
    "write": lambda method: method(b"x"),
}


@pytest.mark.parametrize("name", KEPT)
def test_method_kept_keeps_the_file_open(path, name):
    """As long as it is kept and no longer; it is warned of when it goes, as it is with io.FileIO."""
    outcomes = []
    for kind in BOTH:
        method = getattr(kind(path, "r+"), name)
        gc.collect()
        fd = method.__self__.fileno()
        outcomes.append([KEPT[name](method)])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del method  # the last reference: the collector isn't needed
        outcomes[-1] += [[each.category for each in caught], error_of(os.fstat, fd)]
    assert outcomes[1] == outcomes[0]
    assert outcomes[1][1:] == [[ResourceWarning], (OSError, errno.EBADF)]


def test_method_kept_by_its_file_is_collected_with_it(path):
    for kind in BOTH:
        file = kind(path)
        file.method = file.read
        fd = file.fileno()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del file
            gc.collect()
        assert [each.category for each in caught] == [ResourceWarning]
        assert error_of(os.fstat, fd) == (OSError, errno.EBADF)


def test_greenlet_that_waits_keeps_the_file_open():
    with make_pipe() as (reader, writer):
        greenlet = parked(coopos.FileIO(os.dup(reader), closefd=True).read, 10)
        gc.collect()
        os.write(writer, b"x")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            assert result_of(greenlet) == b"x"
            del greenlet
            gc.collect()


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


@pytest.mark.parametrize("is_blocking", [True, False], ids=["blocking", "nonblocking"])
@pytest.mark.parametrize("call", ["reader.read(1)", "reader.readinto(bytearray(1))", "writer.write(b'x')"])
def test_fairness_of_ready_calls(call, is_blocking):
    """After every tenth call in a row the others have their turn; a call that had to wait begins a new row."""
    run_script(
        f"""
        import os
        import gevent
        import coopos
        fds = os.pipe()
        for fd in fds:
            os.set_blocking(fd, {is_blocking})
        reader, writer = (coopos.FileIO(fd, mode) for fd, mode in zip(fds, "rw"))
        writer.write(b"x" * 1000)
        turns = []
        def turn():
            while True:
                turns.append(1)
                gevent.sleep(0)
        ticker = gevent.spawn(turn)
        gevent.sleep(0)
        before = len(turns)
        for _ in range(100):
            {call}
        assert 9 <= len(turns) - before <= 11, len(turns) - before
        ticker.kill()
        reader.close(), writer.close()
        """,
        COOPOS_FAIRNESS="10",
    )


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


# ---- fdopen ------------------------------------------------------------------------------------------------------------------


def describe(file):
    """What a file made by fdopen is."""
    answers = {"type": type(file).__name__}
    for name in ("mode", "encoding", "errors", "newlines", "line_buffering", "write_through", "closed"):
        answers[name] = getattr(file, name, None)
    answers.update({name: error_of(getattr(file, name)) for name in ("readable", "writable", "seekable", "isatty", "tell")})
    answers["name"] = isinstance(file.name, int)
    if hasattr(file, "buffer"):
        answers["buffer"] = type(file.buffer).__name__
        file = file.buffer
    if hasattr(file, "raw"):
        file = file.raw
    answers["raw"] = [file.mode, file.closefd, file._blksize]
    return answers


FDOPENS = [os.fdopen, coopos.fdopen]
KEYWORDS = [
    {},
    {"buffering": 0},
    {"buffering": 1},
    {"buffering": 77},
    {"buffering": True},
    {"encoding": "utf-16"},
    {"encoding": "ascii", "errors": "replace"},
    {"newline": ""},
    {"newline": "\r\n"},
    {"newline": "x"},
    {"encoding": "nope"},
    {"encoding": 5},
    {"encoding": "a\0b"},
    {"errors": 5},
    {"newline": 5},
    {"buffering": 1.0},
    {"buffering": None},
    {"buffering": 2**40},
    {"buffering": -(2**40)},
    {"buffering": -7},
    {"closefd": False},
    {"closefd": 0},
    {"opener": os.open},
]
TEXT = b"one\ntwo\r\nthree\rfour\xc3\xa4"


@pytest.mark.parametrize(
    "mode", ["r", "w", "a", "x", "r+", "w+", "rt", "rb", "wb", "ab", "r+b", "br", "", "b", "t", "rw", "rbt", "rr", "z"]
)
@pytest.mark.parametrize("keywords", KEYWORDS, ids=repr)
def test_fdopen_is_what_os_fdopen_is(tmp_path, mode, keywords):
    """The same file or the same error, the same warnings, and the descriptor left open or not."""
    outcomes = []
    for number, fdopen in enumerate(FDOPENS):
        path = tmp_path / str(number)
        path.write_bytes(TEXT)
        with closing(os.open(path, os.O_RDWR)) as (fd,), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                file = fdopen(fd, mode, **keywords)
            except Exception as ex:
                outcome = [type(ex)]
            else:
                outcome = [describe(file), error_of(file.read)]
                outcome.append(error_of(file.write, "b\n\u00e4" if isinstance(file, io.TextIOBase) else b"b\n"))
                file.close()
            outcome.append(error_of(os.fstat, fd)[0])
        outcome.append([(each.category, str(each.message)) for each in caught])
        outcomes.append([*outcome, path.read_bytes()])
    assert outcomes[1] == outcomes[0]


@pytest.mark.parametrize("arguments", [("x",), (None,), (1.0,), (-1,), (987654,), (0, None), (0, 5), (0, b"r"), ()], ids=repr)
def test_fdopen_wrong_arguments(arguments):
    assert error_of(coopos.fdopen, *arguments) == error_of(os.fdopen, *arguments)


@pytest.mark.parametrize("make", FILES.values(), ids=FILES.keys())
@pytest.mark.parametrize("mode", ["r", "w", "rb", "wb", "r+b", "r+"])
def test_fdopen_other_files(make, mode):
    """Terminals are buffered by lines; what can't seek can't be opened for both."""
    outcomes = []
    for fdopen in FDOPENS:
        with closing(*make()) as (fd, _peer):
            try:
                with fdopen(fd, mode) as file:
                    outcome = [describe(file)]
            except OSError as ex:
                outcome = [type(ex)]
            outcomes.append([*outcome, error_of(os.fstat, fd)[0]])
    assert outcomes[1] == outcomes[0]


STREAMS = ["pipe", "socket"]


def buffer_size(file):
    buffer = getattr(file, "buffer", file)
    return buffer.__sizeof__() - type(buffer).__basicsize__


@pytest.mark.parametrize("make", FILES.values(), ids=FILES.keys())
@pytest.mark.parametrize("mode", ["r", "w", "rb", "wb"])
@pytest.mark.parametrize("buffering", [-1, 1, 100])
@pytest.mark.filterwarnings("ignore:line buffering")
def test_fdopen_buffer_size(make, mode, buffering):
    """That of os.fdopen; but what reads a pipe or socket reads ahead half of what a pipe holds, unless it is told how much."""
    sizes = []
    for fdopen in FDOPENS:
        with closing(*make()) as (fd, _peer), fdopen(fd, mode, buffering, closefd=False) as file:
            sizes.append(buffer_size(file))
    is_ours = make in [FILES[name] for name in STREAMS] and "r" in mode and buffering != 100
    assert sizes[1] == (32 * 1024 if is_ours else sizes[0])


@pytest.mark.parametrize("mode", ["r", "w", "a", "r+", "rb", "wb", "r+b"])
def test_fdopen_buffer_size_of_a_regular_file(path, mode):
    sizes = []
    for fdopen in FDOPENS:
        with fdopen(os.open(path, os.O_RDWR), mode) as file:
            sizes.append(buffer_size(file))
    assert sizes[1] == sizes[0]


@pytest.mark.parametrize("ends", [True], indirect=True, ids=["blocking"])
@pytest.mark.parametrize("kind", ["pipe", "fifo"], indirect=True)
def test_fdopen_leaves_the_rest_of_a_full_pipe(ends):
    """The writer has room for the other half while this one is read."""
    reader, writer = ends
    size = clog(writer)
    with coopos.fdopen(reader, "rb", closefd=False) as file:
        assert file.read(1) == b"x"
        assert len(drain(reader)) == size - 32 * 1024


def test_fdopen_of_a_directory_leaves_it_open():
    with closing(os.open("/", os.O_RDONLY)) as (fd,):
        assert error_of(coopos.fdopen, fd) == (IsADirectoryError, errno.EISDIR)
        os.fstat(fd)


def test_fdopen_warns_of_the_encoding_as_io_open():
    run_script(
        """
        import os, warnings
        import coopos
        for mode, keywords in ("r", {}), ("r", {"encoding": "locale"}), ("rb", {}), ("rb", {"buffering": 1}):
            seen = []
            for fdopen in os.fdopen, coopos.fdopen:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    fdopen(os.open("/dev/null", os.O_RDONLY), mode, **keywords).close()
                seen.append([(each.category, str(each.message)) for each in caught])
            assert seen[0] == seen[1], seen
            if not keywords and mode == "r":
                assert len(seen[0]) == 1 and caught[0].filename == "<string>", caught
        """,
        PYTHONWARNDEFAULTENCODING="1",
    )


@pytest.mark.parametrize("newline", [None, "", "\n", "\r", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "latin-1"])
def test_fdopen_text_is_read_and_written_as_by_os_fdopen(newline, encoding):
    """Lines in pieces, while both ends wait for each other."""
    text = "one\ntwo\r\nthree\rfo\u00e4r\n" * 50
    outcomes = []
    for fdopen in FDOPENS:
        reader, writer = os.pipe()
        with fdopen(writer, "w", encoding=encoding, newline=newline) as file:
            file.writelines(text.splitlines(keepends=True))
        with fdopen(reader, "r", encoding=encoding, newline=newline) as file:
            outcomes.append([list(file), file.newlines])
    assert outcomes[1] == outcomes[0]


def test_fdopen_lines_while_others_run(ends):
    """A line is there as soon as it is complete."""
    reader, writer = ends
    with (
        coopos.fdopen(reader, encoding="utf-8", closefd=False) as lines,
        coopos.fdopen(writer, "w", 1, "utf-8", closefd=False) as out,
    ):
        for number in range(20):
            greenlet = parked(lines.readline)
            out.write("lin")
            turn_loop()
            assert not greenlet.ready()
            out.write(f"e {number}\n")
            assert result_of(greenlet) == f"line {number}\n"


def test_fdopen_of_a_terminal():
    """Line by line, in cooked mode, both ways."""
    master, terminal = pty.openpty()
    attributes = tty.tcgetattr(terminal)
    attributes[3] &= ~tty.ECHO
    tty.tcsetattr(terminal, tty.TCSANOW, attributes)
    with coopos.fdopen(terminal, "r", encoding="ascii") as lines, coopos.FileIO(master, "r+") as keyboard:
        with coopos.fdopen(os.dup(terminal), "w", encoding="ascii") as screen:
            assert screen.line_buffering
            for number in range(3):
                greenlet = parked(lines.readline)
                keyboard.write(b"typed %d\n" % number)
                assert result_of(greenlet) == f"typed {number}\n"
                greenlet = parked(keyboard.read, 100)
                screen.write("shown")
                turn_loop()
                assert not greenlet.ready()
                screen.write(" now\n")
                assert result_of(greenlet) == b"shown now\r\n"


@pytest.mark.parametrize("buffering", [-1, 1000, 1_000_000])
@pytest.mark.parametrize("is_blocking", [True, False])
def test_fdopen_large_data(buffering, is_blocking):
    data = b"".join(b"%09d\n" % number for number in range(200_000))
    reader, writer = os.pipe()
    os.set_blocking(reader, is_blocking)
    os.set_blocking(writer, is_blocking)
    with coopos.fdopen(reader, "rb", buffering) as source:

        def put():
            with coopos.fdopen(writer, "wb", buffering) as sink:
                assert sink.write(data) == len(data)

        putter = gevent.spawn(put)
        assert result_of(gevent.spawn(source.read)) == data
        result_of(putter)


def test_fdopen_random(path):
    """Reading and writing in turn."""
    with coopos.fdopen(os.open(path, os.O_RDWR), "r+b") as file:
        assert file.read(5) == b"01234"
        assert file.write(b"xy") == 2
        assert file.read(2) == b"78"
        file.seek(0)
        assert file.readline() == b"01234xy78\n"
        file.truncate(10)
    assert path.read_bytes() == b"01234xy78\n"


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_fdopen_flush_of_a_broken_pipe(mode):
    """What os.fdopen's file raises, on flush and on close; the descriptor is closed all the same."""
    outcomes = []
    for fdopen in FDOPENS:
        reader, writer = os.pipe()
        file = fdopen(writer, mode)
        os.close(reader)
        file.write("x" if mode == "w" else b"x")
        outcomes.append([error_of(file.flush), error_of(file.close), error_of(file.close), file.closed])
        outcomes[-1].append(error_of(os.fstat, writer))
    assert outcomes[1] == outcomes[0]
    assert outcomes[1][0] == (BrokenPipeError, errno.EPIPE)


def test_fdopen_raw_close_wakes_the_reader_of_a_buffer():
    with make_pipe(blocking=True) as (reader, _writer):
        file = coopos.fdopen(reader, "rb")
        greenlet = parked(error_of, file.read, 100)
        closer = parked(file.close)
        file.raw.close()
        assert result_of(greenlet)[0] in (OSError, ValueError)
        result_of(closer)


@pytest.mark.parametrize("mode", ["r", "rb"])
def test_fdopen_close_when_the_reader_inside_is_killed(mode):
    """It waits for the reader, not for the bytes that the reader waited for."""
    with make_pipe() as (reader, _writer):
        file = coopos.fdopen(reader, mode)
        greenlet = parked(file.read, 10)
        closers = [parked(file.close) for _ in range(2)]
        greenlet.kill()
        for closer in closers:
            result_of(closer)
        assert file.closed


def test_fdopen_close_when_the_writer_inside_is_killed():
    with make_pipe() as (_reader, writer):
        clog(writer)
        file = coopos.fdopen(writer, "wb")
        greenlet = parked(file.write, b"x" * 300_000)
        closer = parked(file.close)
        greenlet.kill()
        result_of(closer)
        assert file.closed


def test_fdopen_close_when_the_reader_inside_times_out():
    with make_pipe() as (reader, _writer):
        file = coopos.fdopen(reader, "rb")

        def read():
            with gevent.Timeout(0.01, False):
                file.read(10)

        greenlet = parked(read)
        closer = parked(file.close)
        result_of(greenlet)
        result_of(closer)
        assert file.closed


def test_fdopen_close_waits_through_every_read_of_the_reader_inside():
    """A buffer reads several times for one call, and has its lock until it is done."""
    with make_pipe() as (reader, writer):
        file = coopos.fdopen(reader, "rb")
        greenlet = parked(file.read, 4)
        closer = parked(file.close)
        for piece in (b"a", b"b", b"c"):
            os.write(writer, piece)
            turn_loop()
            assert not closer.ready()
        os.write(writer, b"d")
        assert result_of(greenlet) == b"abcd"
        result_of(closer)


def test_fdopen_close_killed_while_another_reads():
    """It leaves nothing: the reader reads on, and the next close() is told."""
    with make_pipe() as (reader, writer):
        file = coopos.fdopen(reader, "rb")
        greenlet = parked(file.read, 4)
        parked(file.close).kill()
        closer = parked(file.close)
        os.write(writer, b"data")
        assert result_of(greenlet) == b"data"
        result_of(closer)


def test_fdopen_close_killed_after_the_reader_inside_has_left():
    """Its turn to run was due already, and must not come again."""
    with make_pipe() as (reader, writer), coopos.fdopen(reader, "rb", closefd=False) as file:
        greenlet = parked(file.read, 4)
        closer = parked(file.close)
        greenlet.kill(block=False)
        get_hub().loop.run_callback(closer.throw, gevent.GreenletExit)
        turn_loop()
        assert greenlet.ready()
        assert closer.ready()
        os.write(writer, b"data")
        assert file.read(4) == b"data"


@pytest.mark.parametrize("operation", ["close", "flush"])
def test_fdopen_close_while_another_writes_in_the_threadpool(path, operation):
    """There is no descriptor to wait for."""
    file = coopos.fdopen(os.open(path, os.O_RDWR), "wb")
    with HeldPool() as pool:
        writer = gevent.spawn(file.write, b"x" * 300_000)
        if not pool.until_held(writer):
            pytest.skip("it takes no thread here")
        closer = parked(getattr(file, operation))
        pool.open()
        assert result_of(writer) == 300_000
        result_of(closer)
    file.close()
    assert path.read_bytes() == b"x" * 300_000


def test_fdopen_close_in_the_hub_while_another_reads():
    """The hub can't wait: it is a reentrant call, as ever."""
    with make_pipe() as (reader, writer), coopos.fdopen(reader, "rb", closefd=False) as file:
        greenlet = parked(file.read, 4)
        outcome = []
        get_hub().loop.run_callback(lambda: outcome.append(error_of(file.close)))
        turn_loop()
        assert outcome == [(RuntimeError, None)]
        os.write(writer, b"data")
        assert result_of(greenlet) == b"data"


def test_fdopen_close_in_the_middle_of_ones_own_read():
    """It could only wait for itself."""

    class Greenlet(gevent.Greenlet):
        def switch_out(self):
            if not outcome:
                outcome.append(error_of(file.close))

    outcome = []
    with make_pipe() as (reader, writer), coopos.fdopen(reader, "rb", closefd=False) as file:
        greenlet = Greenlet.spawn(file.read, 4)
        turn_loop()
        assert outcome == [(RuntimeError, None)]
        os.write(writer, b"data")
        assert result_of(greenlet) == b"data"


def test_fdopen_close_while_another_threads_greenlet_reads():
    """The buffer's own lock is waited for, and the thread stands still."""
    with make_pipe() as (reader, writer), HubThread() as thread:
        file = coopos.fdopen(reader, "rb")
        greenlet = thread.call(parked, file.read, 4)
        writes = gevent.spawn_later(0, get_hub().threadpool.spawn, os.write, writer, b"data")
        writes.get(timeout=DEADLINE_S).get(timeout=DEADLINE_S)
        file.close()
        assert thread.call(result_of, greenlet) == b"data"


def test_fdopen_buffer_times_out_and_reads_on():
    """A reader of lines that is timed out before anything came has lost nothing."""
    with make_pipe() as (reader, writer), coopos.fdopen(reader, "rb", closefd=False) as file:
        for _ in range(3):
            with pytest.raises(gevent.Timeout), gevent.Timeout(0.001):
                file.readline()
            os.write(writer, b"line\n")
            assert file.readline() == b"line\n"


def test_fdopen_file_can_be_drained_by_others():
    """What others read is not waited for by those who know better: the file waits on until more comes."""
    with make_pipe() as (reader, writer), coopos.FileIO(reader, closefd=False) as file:
        greenlet = parked(file.read, 10)
        os.write(writer, b"lost")
        assert drain(reader) == b"lost"
        turn_loop()
        assert not greenlet.ready()
        os.write(writer, b"found")
        assert result_of(greenlet) == b"found"
