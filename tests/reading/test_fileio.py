"""FileIO: what io.FileIO does with the same file."""

import copy
import errno
import gc
import io
import os
import pathlib
import pickle
import stat
import warnings

import pytest

import coopos

from ..helpers.files import BOTH, FILES
from ..helpers.support import closing, error_of, make_pipe, open_fds, parked, result_of, run_script, turn_loop

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
        events, kinds = [], (io.FileIO, coopos.FileIO)
        sys.addaudithook(lambda event, args: event == "open" and events.append(args))
        for kind in kinds:
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
