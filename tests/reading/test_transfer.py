"""Each function that moves bytes, on each kind of descriptor, in either mode: the same is asked of all.

The result, the errno, the bytes and the offset are those of `os`; flags stay; others run while it waits; who is killed has moved no
byte; close gives EBADF. A test has a case for each kind, and goes through the functions itself.
"""

import array
import contextlib
import dataclasses
import errno
import io
import os
import select
import socket
import termios

import gevent
import pytest

import coopos
from coopos._copying import sendfile_with_headers
from coopos.io import WholeFileIO

from ..helpers.descriptors import (
    FILLABLE,
    HAS_PREADV2,
    KINDS,
    READS,
    STREAMS,
    WRITES,
    HeldPool,
    Observer,
    StandingWorkers,
    content_of,
    each_kind,
    each_mode,
    each_of,
    each_stream,
    flags_of,
    make_ends,
    make_file,
    needs_nowait_in_use,
    rival_reader,
    tells_whether_cached,
    until_readable,
)
from ..helpers.support import (
    HubThread,
    clog,
    closing,
    drain,
    error_of,
    make_clogged_pipe,
    make_pipe,
    parked,
    result_of,
    run_script,
    turn_loop,
    until,
)

BAD_FD = (OSError, errno.EBADF)
each_fillable = each_of(FILLABLE)
#: Those that take no more than a part of what is LARGE.
each_limited = each_of([*FILLABLE, "pty slave"])

#: Those that close(2) leaves at its end, and not hung up.
ENDING = [kind for kind in STREAMS if not kind.startswith("pty")]

#: Where files lie in memory, and the kernel can't say whether a read would block.
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None

has_offset_calls = pytest.mark.skipif(not hasattr(os, "preadv"), reason="no os.preadv here")


def outcome_of(greenlet):
    """(class, errno) of what a greenlet raised, or (None, its result)."""
    return error_of(result_of, greenlet)


def make_readable(ends):
    """Unless something is left: a terminal's bytes come when they come, some of them with those that were there."""
    if not select.select([ends.reader], [], [], 0)[0]:
        ends.feed()
        until_readable(ends.reader)


def take(reader, size):
    """Exactly that many bytes, by plain reads of a stream that has or gets them; greenlets run in between."""
    data = b""
    while len(data) < size:
        until(lambda: select.select([reader], [], [], 0)[0])
        data += os.read(reader, size - len(data))
    return data


def arrived(ends, kind, outcome):
    """What came of a write, or of several of a stream's. A terminal takes its time."""
    error, written = outcome
    return take(ends.reader, written) if kind in STREAMS and not error else drain(ends.reader)


pytestmark = pytest.mark.usefixtures("live_hub")


# ---- reads -------------------------------------------------------------------------------------------------------------------


@each_kind
@each_mode
def test_read_of_what_is_there_is_that_of_os(blocking, kind, tmp_path):
    """More than there is, nothing, and a part."""
    for read, os_read in READS.values():
        with make_ends(kind, tmp_path, blocking) as ours, make_ends(kind, tmp_path, blocking) as theirs:
            for n in (100, 2):
                for ends in (ours, theirs):
                    make_readable(ends)
                assert error_of(read, ours.reader, 0) == error_of(os_read, theirs.reader, 0), read
                assert error_of(read, ours.reader, n) == error_of(os_read, theirs.reader, n), read
            assert flags_of(ours.reader) == flags_of(theirs.reader)


#: Sizes of buffers, of which no first ones are what a message fills: a second message would be waited for.
SHAPES = [[], [0], [0, 0], [100], [0, 100], [100, 0], [4, 100], [3, 0, 3], [1] * 3 + [200], [1] * 1024, [1] * 1025, [0] * 1025]


@each_kind
@each_mode
def test_readv_into_any_buffers_is_that_of_os(blocking, kind, tmp_path):
    with make_ends(kind, tmp_path, blocking) as ours, make_ends(kind, tmp_path, blocking) as theirs:
        for sizes in SHAPES:
            found = []
            for ends, readv in ((ours, coopos.readv), (theirs, os.readv)):
                make_readable(ends)
                buffers = [bytearray(size) for size in sizes]
                found.append((error_of(readv, ends.reader, buffers), buffers))
            assert found[0] == found[1], sizes


@each_kind
@each_mode
def test_writev_of_any_buffers_is_that_of_os(blocking, kind, tmp_path):
    pieces = {2: b"ab", 4: b"\1\0\0\0", 8: b"\1" + bytes(7)}
    with make_ends(kind, tmp_path, blocking) as ours, make_ends(kind, tmp_path, blocking) as theirs:
        for sizes in ([], [0], [0, 0], [2], [0, 8], [8, 0], [4, 4], [2, 2, 2], [0] * 1024, [0] * 1025):
            buffers = [pieces.get(size, b"") for size in sizes]
            found = [error_of(coopos.writev, ours.writer, buffers), error_of(os.writev, theirs.writer, buffers)]
            if kind != "timerfd" and kind != "inotify":
                found = [(outcome, arrived(ends, kind, outcome)) for outcome, ends in zip(found, (ours, theirs), strict=True)]
            assert found[0] == found[1], sizes


@each_kind
@each_mode
def test_read_waits_while_others_run_and_takes_no_thread(blocking, kind, tmp_path):
    with make_ends(kind, tmp_path, blocking) as ends:
        flags, in_pool = flags_of(ends.reader), coopos._core.count_calls()
        for read, _os_read in READS.values():
            greenlet = parked(read, ends.reader, 100)
            assert flags_of(ends.reader) == flags
            assert result_of(greenlet) == ends.feed() if greenlet.ready() else ends.feed() == result_of(greenlet)
        assert coopos._core.count_calls() == in_pool


@each_kind
def test_flags_are_never_touched_as_another_process_sees_them(kind, tmp_path):
    with make_ends(kind, tmp_path) as ends, Observer(ends.reader, ends.writer) as observer:
        before = observer.flags()
        greenlet = parked(coopos.read, ends.reader, 100)
        assert observer.flags() == before
        ends.feed()
        result_of(greenlet)
        assert observer.flags() == before


@each_kind
@each_mode
def test_read_killed_has_taken_nothing(blocking, kind, tmp_path):
    """While it waits, as its data comes, and timed out."""
    with make_ends(kind, tmp_path, blocking) as ends:
        for read, os_read in READS.values():
            parked(read, ends.reader, 100).kill()
            with gevent.Timeout(0), pytest.raises(gevent.Timeout):
                read(ends.reader, 100)
            greenlet = parked(read, ends.reader, 100)
            data = ends.feed()
            until_readable(ends.reader)
            greenlet.kill()
            assert isinstance(greenlet.value, gevent.GreenletExit)
            assert os_read(ends.reader, 100) == data, read


@each_kind
@each_mode
def test_close_wakes_who_reads_in_any_thread_with_ebadf(blocking, kind, tmp_path):
    for read, _os_read in READS.values():
        with make_ends(kind, tmp_path, blocking) as ends, HubThread() as thread:
            here, there = parked(read, ends.reader, 100), thread.parked(read, ends.reader, 100)
            coopos.close(ends.reader)
            assert outcome_of(here) == BAD_FD, read
            assert error_of(thread.result_of, there) == BAD_FD, read


@each_kind
@each_mode
def test_close_of_what_is_ready_to_be_read_is_ebadf_and_takes_nothing_of_the_next_file(blocking, kind, tmp_path):
    """The number is another file's before the reader runs."""
    with make_ends(kind, tmp_path, blocking) as ends:
        greenlet = parked(coopos.read, ends.reader, 100)
        ends.feed()
        until_readable(ends.reader)
        coopos.close(ends.reader)
        with make_pipe(blocking) as (reader, writer):
            os.write(writer, b"another's")
            assert outcome_of(greenlet) == BAD_FD
            assert drain(reader) == b"another's"


@each_stream
@each_mode
def test_read_waits_for_the_end_of_a_stream_and_is_that_of_os_then(blocking, kind, tmp_path):
    """A terminal is hung up."""
    for read, os_read in READS.values():
        with make_ends(kind, tmp_path, blocking) as ends:
            greenlet = parked(read, ends.reader, 10)
            coopos.close(ends.writer)
            assert outcome_of(greenlet) == error_of(os_read, ends.reader, 10) == error_of(read, ends.reader, 10)


@each_kind
@each_mode
def test_read_by_two_gives_each_its_own_and_holds_no_thread(blocking, kind, tmp_path):
    with make_ends(kind, tmp_path, blocking) as ends, HubThread() as thread:
        greenlets = [parked(coopos.read, ends.reader, 40) for _ in range(2)]
        there = thread.parked(coopos.read, ends.reader, 40)
        fed = []
        for _ in range(3):
            fed.append(ends.feed())
            until(lambda: sum(g.ready() for g in [*greenlets, there]) == len(fed))
        assert sorted([*map(result_of, greenlets), thread.result_of(there)]) == sorted(fed)


@each_of(["pipe", "FIFO", "pty master", "pty slave", "socketpair"])
def test_read_with_a_rival_in_another_process_never_freezes_the_hub(kind, tmp_path):
    with make_ends(kind, tmp_path) as ends, rival_reader(ends.reader) as received:
        got = bytearray()

        def read():
            while True:
                got.extend(coopos.read(ends.reader, 1))

        greenlet = gevent.spawn(read)
        for number in range(100):
            ends.feed(b"%c" % number)
            until(lambda: len(got) + len(received()) == number + 1)  # noqa: B023
        greenlet.kill()


# ---- writes ------------------------------------------------------------------------------------------------------------------


@each_of([kind for kind in KINDS if kind not in ("timerfd", "inotify")])
@each_mode
def test_write_of_what_fits_is_that_of_os(blocking, kind, tmp_path):
    for write, os_write in WRITES.values():
        with make_ends(kind, tmp_path, blocking) as ours, make_ends(kind, tmp_path, blocking) as theirs:
            for data in (b"abc", b"\1" + bytes(7), b"\2" + bytes(999), b""):
                if kind == "eventfd" and write is WRITES["write_all"][0]:
                    continue  # which goes on after 8 bytes
                outcomes = error_of(write, ours.writer, data), error_of(os_write, theirs.writer, data)
                assert outcomes[0] == outcomes[1], (write, data)
                assert arrived(ours, kind, outcomes[0]) == arrived(theirs, kind, outcomes[1])


@each_fillable
@each_mode
def test_write_waits_for_room_while_others_run_and_takes_no_thread(blocking, kind, tmp_path):
    with make_ends(kind, tmp_path, blocking) as ends:
        flags, in_pool = flags_of(ends.writer), coopos._core.count_calls()
        for write, _os_write in WRITES.values():
            size = clog(ends.writer)
            greenlet = parked(write, ends.writer, b"y")
            assert flags_of(ends.writer) == flags
            assert take(ends.reader, size + 1).endswith(b"xy")
            assert result_of(greenlet) == 1
        assert coopos._core.count_calls() == in_pool


@each_fillable
@each_mode
def test_write_killed_before_anything_was_written_has_written_nothing(blocking, kind, tmp_path):
    with make_ends(kind, tmp_path, blocking) as ends:
        for write, _os_write in WRITES.values():
            size = clog(ends.writer)
            parked(write, ends.writer, b"y" * 10).kill()
            with gevent.Timeout(0) as timeout, pytest.raises(gevent.Timeout):
                write(ends.writer, b"y" * 10)
            assert not hasattr(timeout, "characters_written")
            assert b"y" not in take(ends.reader, size) + drain(ends.reader)


@each_of(["pty slave"])
@each_mode
def test_write_to_a_stopped_terminal_waits_is_killed_and_is_closed(blocking, kind, tmp_path):
    for write, _os_write in WRITES.values():
        with make_ends(kind, tmp_path, blocking) as ends:
            termios.tcflow(ends.writer, termios.TCOOFF)
            parked(write, ends.writer, b"killed").kill()
            greenlet = parked(write, ends.writer, b"y")
            termios.tcflow(ends.writer, termios.TCOON)
            assert result_of(greenlet) == 1
            assert take(ends.reader, 1) == b"y"
            termios.tcflow(ends.writer, termios.TCOOFF)
            greenlet = parked(write, ends.writer, b"closed")
            coopos.close(ends.writer)
            assert outcome_of(greenlet) == BAD_FD


@each_fillable
@each_mode
def test_close_wakes_who_writes_in_any_thread_with_ebadf(blocking, kind, tmp_path):
    for write, _os_write in WRITES.values():
        with make_ends(kind, tmp_path, blocking) as ends, HubThread() as thread:
            clog(ends.writer)
            here, there = parked(write, ends.writer, b"y"), thread.parked(write, ends.writer, b"y")
            coopos.close(ends.writer)
            assert outcome_of(here) == BAD_FD
            assert error_of(thread.result_of, there) == BAD_FD


LARGE = bytes(range(251)) * 4000


@each_limited
@pytest.mark.parametrize("end", ["kill", "close"])
def test_write_ended_half_way_says_how_much_it_wrote(end, kind, tmp_path):
    """In blocking mode, and write_all in either."""
    for write, _os_write in WRITES.values():
        with make_ends(kind, tmp_path) as ends:
            greenlet = parked(write, ends.writer, LARGE)
            first = take(ends.reader, 10_000)
            turn_loop()
            if end == "kill":
                greenlet.kill(gevent.Timeout, block=False)
            else:
                coopos.close(ends.writer)
            with pytest.raises((gevent.Timeout, OSError)) as caught:
                result_of(greenlet)
            # A terminal that is hung up forgets what was not read.
            if (kind, end) != ("pty slave", "close"):
                written = caught.value.characters_written
                assert first + take(ends.reader, written - 10_000) == LARGE[:written]
                assert not drain(ends.reader)


@each_limited
@each_mode
def test_write_in_blocking_mode_and_write_all_in_either_write_everything(blocking, kind, tmp_path):
    for write, _os_write in WRITES.values() if blocking else [WRITES["write_all"]]:
        with make_ends(kind, tmp_path, blocking) as ends:
            greenlet = gevent.spawn(write, ends.writer, LARGE)
            assert take(ends.reader, len(LARGE)) == LARGE
            assert result_of(greenlet) == len(LARGE)


# ---- offsets -----------------------------------------------------------------------------------------------------------------


@has_offset_calls
@each_of([kind for kind in KINDS if kind not in ("eventfd", "timerfd", "inotify")])
@each_mode
def test_call_with_an_offset_on_what_has_none_is_espipe(blocking, kind, tmp_path):
    with make_ends(kind, tmp_path, blocking) as ends:
        for fd, name, *args in (
            (ends.reader, "pread", 3, 0),
            (ends.reader, "preadv", [bytearray(2), bytearray(1)], 0),
            (ends.reader, "preadv", [bytearray(0)], 0),
            (ends.writer, "pwrite", b"abc", 0),
            (ends.writer, "pwritev", [b"ab", b"c"], 0),
            (ends.writer, "pwritev", [b""], 0),
        ):
            ours = error_of(getattr(coopos, name), fd, *args)
            assert ours == error_of(getattr(os, name), fd, *args), (name, args)
            assert ours == (OSError, errno.ESPIPE)
        assert not drain(ends.reader)


# ---- regular files and devices -----------------------------------------------------------------------------------------------


def test_read_of_a_file_killed_while_a_worker_reads_leaves_the_offset():
    with make_file(b"0123456789", MEMORY) as fd, StandingWorkers() as workers:
        greenlet = gevent.spawn(coopos.read, fd, 4)
        if not workers.until_begun(greenlet):
            pytest.skip("it takes no thread here")
        greenlet.kill(block=False)
        turn_loop()
        workers.go_on()
        greenlet.join()
        assert coopos.read(fd, 4) == b"0123"


def test_write_of_a_file_killed_twice_while_a_worker_writes_says_what_it_wrote_in_the_last_exception():
    class Second(Exception):
        pass

    with make_file(b"", MEMORY) as fd, StandingWorkers() as workers:
        greenlet = gevent.spawn(coopos.write, fd, b"abc")
        if not workers.until_begun(greenlet):
            pytest.skip("it takes no thread here")
        greenlet.kill(block=False)
        turn_loop()
        greenlet.kill(Second, block=False)
        turn_loop()
        workers.go_on()
        with pytest.raises(Second) as caught:
            result_of(greenlet)
        assert caught.value.characters_written == 3
        assert content_of(fd) == b"abc"


class ReadOnly(Exception):
    @property
    def characters_written(self):
        return 7

    partial = characters_written


class OfClass(Exception):
    characters_written = partial = "of the class"


class Slots(Exception):
    __slots__ = ("characters_written", "partial")


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    why: str = ""


@pytest.mark.parametrize("kind", [ReadOnly, OfClass, Slots, Frozen])
def test_exception_that_refuses_attributes_comes_out_all_the_same(kind):
    with make_pipe(blocking=True) as (reader, writer), make_file(bytes(1_000_000)) as fd:
        calls = [
            (coopos.write, writer, bytes(100_000)),
            (coopos.write_all, writer, b"x"),
            (coopos.read_exactly, reader, 10**6),
            (coopos.sendfile, writer, fd, 0, 1_000_000),
            (WholeFileIO(writer, "w", closefd=False).write, bytes(100_000)),
            (coopos.fdopen(writer, "wb", 0, closefd=False).write, bytes(100_000)),
        ]
        for call, *args in calls:
            thrown = kind()
            greenlet = parked(call, *args)
            greenlet.kill(thrown, block=False)
            with pytest.raises(kind) as caught:
                result_of(greenlet)
            assert caught.value is thrown


@pytest.mark.parametrize("kind", [OfClass, Slots])
def test_write_by_several_moves_counts_what_it_wrote_and_not_what_the_exception_had(kind):
    with make_pipe(blocking=True) as (reader, writer), make_file(bytes(1_000_000)) as fd:
        write = WholeFileIO(writer, "w", closefd=False).write
        for call, *args in [(coopos.sendfile, writer, fd, 0, 1_000_000), (write, bytes(1_000_000))]:
            thrown = kind()
            thrown.characters_written = 5
            greenlet = parked(call, *args)
            until(lambda: select.select([reader], [], [], 0)[0])
            greenlet.kill(thrown, block=False)
            error_of(result_of, greenlet)
            assert thrown.characters_written == len(drain(reader))


# ---- bad input, and how much it takes -----------------------------------------------------------------------------------------

NOTHING = {
    "read": (lambda fd: os.read(fd, 0), lambda fd: coopos.read(fd, 0)),
    "readinto": (lambda fd: len(os.read(fd, 0)), lambda fd: coopos.readinto(fd, bytearray())),
    "pread": (lambda fd: os.pread(fd, 0, 0), lambda fd: coopos.pread(fd, 0, 0)),
    "readv": (lambda fd: os.readv(fd, [bytearray()]), lambda fd: coopos.readv(fd, [bytearray()])),
    "write": (lambda fd: os.write(fd, b""), lambda fd: coopos.write(fd, b"")),
    "pwrite": (lambda fd: os.pwrite(fd, b"", 0), lambda fd: coopos.pwrite(fd, b"", 0)),
    "writev": (lambda fd: os.writev(fd, [b""]), lambda fd: coopos.writev(fd, [b""])),
    "read of a file": tuple(lambda fd, io=io: io.FileIO(fd, "r", closefd=False).read(0) for io in (io, coopos)),
    "readinto of a file": tuple(lambda fd, io=io: io.FileIO(fd, "r", closefd=False).readinto(bytearray()) for io in (io, coopos)),
    "write of a file": tuple(lambda fd, io=io: io.FileIO(fd, "w", closefd=False).write(b"") for io in (io, coopos)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_at_all_is_what_the_kernel_makes_of_it(name, tmp_path):
    """read(2) and write(2) may have something to say of it; readv(2) and writev(2) may not."""
    by_os, ours = NOTHING[name]
    with contextlib.ExitStack() as stack:
        fds = {"no descriptor": 987_654, "no number": -1}
        for kind in KINDS:
            # inotify's read waits even so.
            if KINDS[kind].is_available and (kind != "inotify" or "read" not in name):
                fds[kind] = stack.enter_context(make_ends(kind, tmp_path)).reader
        for path in ["/dev/null", "/dev/zero", "/dev/full", "/proc/self/stat", "/", os.fspath(tmp_path)]:
            for way in (os.O_RDONLY, os.O_WRONLY):
                with contextlib.suppress(OSError):
                    [fds[path, way]] = stack.enter_context(closing(os.open(path, way)))
        for way in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
            fds["file", way] = stack.enter_context(make_file(b"abc", flags=way))
        unconnected, unbound = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
        fds["TCP, not connected"] = stack.enter_context(unconnected).fileno()
        fds["UDP, not connected"] = stack.enter_context(unbound).fileno()
        for kind, fd in fds.items():
            expected = error_of(by_os, fd)
            assert (kind, outcome_of(gevent.spawn(ours, fd))) == (kind, expected)


@has_offset_calls
@pytest.mark.skipif(not HAS_PREADV2, reason="no flags here")
@pytest.mark.parametrize("is_ready", [True, False], ids=["ready", "not ready"])
@each_mode
@each_of([kind for kind in KINDS if kind not in ("timerfd", "inotify")])
def test_flags_that_a_file_does_not_know_are_refused_and_nothing_is_moved(kind, blocking, is_ready, tmp_path):
    """Before anything waits."""
    unknown = 1 << 30
    with make_ends(kind, tmp_path, blocking) as ends:
        data = b""
        if is_ready:
            data = ends.feed()
            until_readable(ends.reader)
        assert error_of(coopos.preadv, ends.reader, [bytearray(8)], -1, unknown) == (OSError, errno.EOPNOTSUPP)
        assert error_of(coopos.pwritev, ends.writer, [b"12345678"], -1, unknown) == (OSError, errno.EOPNOTSUPP)
        assert drain(ends.reader) == data


@pytest.mark.parametrize("name", ["write", "writev", "pwrite", "pwritev", "write_all", "sendfile"])
def test_write_that_fails_later_on_is_a_short_one(name):
    """As of os: the error is the next call's. write_all has to raise it, and says how much it wrote."""
    run_script(f"""
        import os, resource, tempfile, coopos
        name = {name!r}
        data = os.urandom(4 << 20)
        limit = (3 << 20) + 5
        with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
            source.write(data)
            source.flush()
            args = {{
                "write": (data,), "writev": ([data],), "pwrite": (data, 0), "pwritev": ([data], 0), "write_all": (data,),
                "sendfile": (source.fileno(), 0, len(data)),
            }}[name]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                assert getattr(coopos, name)(target.fileno(), *args) == limit
            except OSError as ex:
                assert name == "write_all" and ex.characters_written == limit, ex
            else:
                assert name != "write_all"
            assert os.pread(target.fileno(), len(data), 0) == data[:limit]
    """)


@pytest.mark.parametrize("name", ["write", "writev", "pwrite", "pwritev", "read", "pread"])
def test_close_of_a_file_whose_call_no_thread_has_begun_is_ebadf_and_leaves_the_next_file_alone(name):
    args = {"write": (b"x",), "writev": ([b"x"],), "pwrite": (b"x", 0), "pwritev": ([b"x", b"y"], 0), "read": (1,), "pread": (1, 0)}
    with make_file(b"content", MEMORY) as fd, make_file(b"another's") as other, HeldPool() as pool:
        greenlet = gevent.spawn(getattr(coopos, name), fd, *args[name])
        if not pool.until_held(greenlet):
            pytest.skip("it takes no thread here")
        coopos.close(fd)
        assert os.dup(other) == fd
        pool.open()
        assert outcome_of(greenlet) == BAD_FD
        assert (content_of(fd), os.lseek(fd, 0, os.SEEK_CUR)) == (b"another's", 0)


def test_close_of_a_file_that_a_thread_writes_is_done_when_it_has_written():
    with make_file(b"", MEMORY) as fd, closing(os.dup(fd)) as (same,), HubThread() as thread, StandingWorkers() as workers:
        greenlet = gevent.spawn(coopos.write, fd, b"abc")
        elsewhere = thread.call(gevent.spawn, coopos.write, fd, b"def")
        if not workers.until_begun(greenlet, 2):
            pytest.skip("it takes no thread here")
        coopos.close(fd)
        assert error_of(coopos.close, fd) == BAD_FD
        with closing(os.dup(same)) as (other,):
            assert other != fd
        workers.go_on()
        assert outcome_of(greenlet) == (None, 3)
        assert error_of(thread.result_of, elsewhere) == (None, 3)
        until(lambda: error_of(os.fstat, fd) == BAD_FD)
        assert content_of(same) in [b"abcdef", b"defabc"]


@needs_nowait_in_use
def test_read_of_a_cached_file_takes_no_thread():
    with make_file(b"x" * 100) as fd:
        if not tells_whether_cached(fd):
            pytest.skip("this file system can't tell")
        before = coopos._core.count_calls()
        for read, _os_read in READS.values():
            assert read(fd, 10) == b"x" * 10
        assert coopos.pread(fd, 10, 0) == b"x" * 10
        assert coopos._core.count_calls() == before


@needs_nowait_in_use
@pytest.mark.parametrize("size", [100, 4096, 8192])
def test_end_of_a_cached_file_takes_no_thread(size):
    """Linux 5.10 knows nothing of the page behind a file of whole pages, and says EAGAIN."""
    with make_file(b"x" * size) as fd:
        if not tells_whether_cached(fd):
            pytest.skip("this file system can't tell")
        os.lseek(fd, 0, os.SEEK_END)
        before = coopos._core.count_calls()
        for read, _os_read in READS.values():
            assert read(fd, 10) == b""
        assert coopos.pread(fd, 10, size) == coopos.pread(fd, 10, size + 10_000) == b""
        assert coopos._core.count_calls() == before


DEVICES = ["/dev/zero", "/dev/null", "/dev/full", "/dev/urandom", "/proc/self/limits", "/proc/self/status"]


@pytest.mark.parametrize("path", [path for path in DEVICES if os.path.exists(path)])
@each_mode
def test_calls_on_a_kernels_file_are_those_of_os(blocking, path):
    flags = (os.O_RDWR if path.startswith("/dev") else os.O_RDONLY) | (0 if blocking else os.O_NONBLOCK)
    with closing(os.open(path, flags), os.open(path, flags)) as (ours, theirs):
        for read, os_read in READS.values():
            found = [error_of(read, ours, 5), error_of(os_read, theirs, 5)]
            if path == "/dev/urandom":
                found = [(error, len(data)) for error, data in found]
            assert found[0] == found[1]
        for data in (b"abc", b""):
            for write, os_write in WRITES.values():
                assert error_of(write, ours, data) == error_of(os_write, theirs, data)
        for buffers in ([b"", b"abc"], [b"ab", b"c"], [b"", b""]):
            assert error_of(coopos.writev, ours, buffers) == error_of(os.writev, theirs, buffers)


# ---- read_exactly and write_all ----------------------------------------------------------------------------------------------


@each_stream
@each_mode
def test_read_exactly_waits_until_all_is_there(blocking, kind, tmp_path):
    with make_ends(kind, tmp_path, blocking) as ends:
        assert coopos.read_exactly(ends.reader, 0) == b""
        greenlet = parked(coopos.read_exactly, ends.reader, 6)
        ends.feed(b"abc")
        until_readable(ends.reader)
        turn_loop()
        assert not greenlet.ready()
        ends.feed(b"defg")
        assert result_of(greenlet) == b"abcdef"
        assert drain(ends.reader) == b"g"


@each_of(ENDING)
@pytest.mark.parametrize("end", ["end-of-file", "kill", "close"])
@each_mode
def test_read_exactly_ended_early_has_the_part_there_was(blocking, end, kind, tmp_path):
    with make_ends(kind, tmp_path, blocking) as ends:
        greenlet = parked(coopos.read_exactly, ends.reader, 6)
        ends.feed(b"abc")
        until_readable(ends.reader)
        turn_loop()
        if end == "kill":
            greenlet.kill(gevent.Timeout, block=False)
        else:
            coopos.close(ends.writer if end == "end-of-file" else ends.reader)
        with pytest.raises((EOFError, gevent.Timeout, OSError)) as caught:
            result_of(greenlet)
        assert caught.value.partial == b"abc"


# ---- sendfile and splice -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "sendfile"), reason="no os.sendfile here")
@each_of(["pipe", "FIFO", "socketpair", "TCP"])
@pytest.mark.parametrize("offset", [None, 1000])
@each_mode
def test_sendfile_of_more_than_fits(blocking, offset, kind, tmp_path):
    with make_file(LARGE) as file, make_ends(kind, tmp_path, blocking) as ends:
        clogged = clog(ends.writer)
        if not blocking:
            with contextlib.suppress(BlockingIOError):
                os.sendfile(ends.writer, file, 0, 1)
                pytest.skip("sendfile(2) finds room here where write(2) found none")
        greenlet = parked(coopos.sendfile, ends.writer, file, offset, len(LARGE))
        assert len(take(ends.reader, clogged)) == clogged
        if blocking:
            start = offset or 0
            assert take(ends.reader, len(LARGE) - start) == LARGE[start:]
            assert result_of(greenlet) == len(LARGE) - start
        else:
            sent = result_of(greenlet)
            assert take(ends.reader, sent) == LARGE[offset or 0 :][:sent]
        assert os.lseek(file, 0, os.SEEK_CUR) == (greenlet.value if offset is None else 0)


@each_of(["socketpair", "TCP"])
@pytest.mark.parametrize("count", [0, 1000, 3 * 128 * 1024 + 1, 2 * len(LARGE)])
@each_mode
def test_sendfile_with_headers(blocking, count, kind, tmp_path):
    """As macOS and the BSDs have it."""
    headers, trailers = [b"head", bytearray(b"er"), b""], (memoryview(array.array("i", [1, 2])), b"end")
    with make_file(LARGE) as file, make_ends(kind, tmp_path, blocking) as ends:
        clogged = clog(ends.writer)
        greenlet = parked(sendfile_with_headers, ends.writer, file, 1000, count, headers, trailers)
        assert len(take(ends.reader, clogged)) == clogged
        expected = b"header" + LARGE[1000 : 1000 + count if count else None] + bytes(trailers[0]) + b"end"
        if blocking:
            assert take(ends.reader, len(expected)) == expected
            assert result_of(greenlet) == len(expected)
        else:
            sent = result_of(greenlet)
            assert 0 < sent <= len(expected)
            assert take(ends.reader, sent) == expected[:sent]
        assert os.lseek(file, 0, os.SEEK_CUR) == 0


def test_sendfile_with_headers_killed_tells_how_much_was_sent(tmp_path):
    with make_file(LARGE) as file, make_ends("socketpair", tmp_path, True) as ends:
        greenlet = parked(sendfile_with_headers, ends.writer, file, 0, 0, [b"header"])
        until(lambda: not select.select([], [ends.writer], [], 0)[1])  # where a thread reads the file, that takes a moment
        greenlet.kill(gevent.Timeout, block=False)
        with pytest.raises(gevent.Timeout) as caught:
            result_of(greenlet)
        sent = caught.value.characters_written
        assert sent > len(b"header")
        assert take(ends.reader, sent) == (b"header" + LARGE)[:sent]
        assert drain(ends.reader) == b""


@pytest.mark.parametrize("send", [coopos.sendfile, sendfile_with_headers])
def test_sendfile_that_is_made_of_other_calls_has_errors_of_its_own(send, tmp_path):
    with make_file(LARGE) as file, make_ends("socketpair", tmp_path, True) as ends:
        coopos.close(ends.reader)
        with pytest.raises(BrokenPipeError, match=rf": sendfile\({ends.writer}\)$"):
            send(ends.writer, file, 0, 10)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file here whose reads fail")
@pytest.mark.parametrize("send", [coopos.sendfile, sendfile_with_headers])
@each_mode
def test_sendfile_that_can_not_read_says_so_of_its_file(send, blocking, tmp_path):
    with make_ends("socketpair", tmp_path, blocking) as ends, open("/proc/self/mem", "rb", buffering=0) as file:
        with pytest.raises(OSError, match=rf": sendfile\({file.fileno()}\)$") as caught:
            send(ends.writer, file.fileno(), 0, 10)
        assert caught.value.errno == errno.EIO


@pytest.mark.skipif(not hasattr(os, "splice"), reason="no os.splice here")
@each_of(["pipe", "FIFO", "socketpair"])
@each_mode
def test_splice_waits_for_source_and_room_and_close_gives_ebadf(blocking, kind, tmp_path):
    with make_ends(kind, tmp_path, blocking) as ends, make_clogged_pipe(blocking) as (reader, writer, size):
        parked(coopos.splice, ends.reader, writer, 10).kill()
        greenlet = parked(coopos.splice, ends.reader, writer, 10)
        assert len(drain(reader)) == size
        data = ends.feed()
        assert result_of(greenlet) == len(data)
        assert drain(reader) == data
        greenlet = parked(coopos.splice, ends.reader, writer, 10)
        coopos.close(ends.reader)
        assert outcome_of(greenlet) == BAD_FD
