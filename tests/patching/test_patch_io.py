"""patch(io=True): programs that know nothing of coopos wait without stopping the others, and see no other difference."""

import textwrap

import pytest

from ..helpers.support import run_script

PATCHED = """
from gevent import monkey
monkey.patch_all()
import builtins, errno, fcntl, io, os, signal, socket, sys, tempfile, threading
import gevent
from gevent.hub import get_hub
before = {name: getattr(os, name) for name in dir(os)}
before_open, before_input, before_streams = open, input, (sys.stdin, sys.stdout, sys.stderr)
import coopos
coopos.patch(io=True)
ticks = []


def tick():
    while True:
        ticks.append(1)
        gevent.sleep(0.001)


ticker = gevent.spawn(tick)


def after_ticks(function, *args):
    '''function(*args), called when others have run three times from now on.'''
    start = len(ticks)
    while len(ticks) < start + 3:
        gevent.sleep(0.001)
    return function(*args)


def waits(function, *args, until):
    '''What function returns. It must wait until others have run, and then until() is called.'''
    start = len(ticks)
    job = gevent.spawn(after_ticks, until)
    result = function(*args)
    assert len(ticks) >= start + 3, "it did not wait"
    job.get()
    return result


def in_hub(function, *args):
    '''function(*args), called in the hub; what it returns or raises.'''
    done = gevent.event.AsyncResult()

    def call():
        try:
            done.set(function(*args))
        except BaseException as ex:
            done.set_exception(ex)

    get_hub().loop.run_callback(call)
    return done.get()


def raises(error, function, *args):
    try:
        result = function(*args)
    except error:
        return True
    raise AssertionError(f"no {error.__name__}, but {result!r}")


directory = tempfile.mkdtemp()
fifo = os.path.join(directory, "fifo")
os.mkfifo(fifo)
path = os.path.join(directory, "file")
"""


def run(source, **kwargs):
    return run_script(PATCHED + textwrap.dedent(source), **kwargs)


# ---- os ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_os_read_and_write_wait():
    """On a blocking pipe, in both directions, whoever imported os."""
    run("""
        reader, writer = os.pipe()
        assert waits(os.read, reader, 5, until=lambda: os.write(writer, b"hello")) == b"hello"

        def empty():
            left = 200000
            while left:
                left -= len(os.read(reader, left))

        emptier = gevent.Greenlet(empty)
        assert waits(os.write, writer, bytes(200000), until=emptier.start) == 200000
        emptier.get()
        assert waits(os.readv, reader, [bytearray(3)], until=lambda: os.writev(writer, [b"a", b"b"])) == 2
    """)


def test_non_blocking_mode_counts():
    """A program that asks for non-blocking mode wants BlockingIOError, as gunicorn's arbiter does to empty its pipe."""
    run("""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        os.write(writer, b"..")
        got = []
        try:
            while data := os.read(reader, 1):
                got.append(data)
        except BlockingIOError as ex:
            assert ex.errno == errno.EAGAIN
        assert got == [b".", b"."]
        assert raises(BlockingIOError, os.readv, reader, [bytearray(1)])
        while True:
            try:
                os.write(writer, bytes(4096))
            except BlockingIOError:
                break
        ours, theirs = socket.socketpair()
        assert raises(BlockingIOError, os.read, ours.fileno(), 1)  # gevent's sockets are in that mode
        if hasattr(os, "eventfd"):
            counter = os.eventfd(0, os.EFD_NONBLOCK)
            assert raises(BlockingIOError, os.eventfd_read, counter)
        if hasattr(os, "splice"):
            empty, full = os.pipe()
            os.set_blocking(empty, False)
            assert raises(BlockingIOError, os.splice, empty, os.pipe()[1], 10)
    """)


def test_in_the_hub_the_calls_are_plain():
    """In a callback of the loop nothing raises BlockingSwitchOutError; what is there is read, and what fits is written."""
    run("""
        reader, writer = os.pipe()
        assert in_hub(os.write, writer, b"hello") == 5
        assert in_hub(os.read, reader, 5) == b"hello"
        fd = in_hub(os.open, path, os.O_RDWR | os.O_CREAT)
        assert in_hub(os.write, fd, b"data") == 4
        assert in_hub(os.pread, fd, 10, 0) == b"data"
        in_hub(os.fsync, fd)
        in_hub(os.lockf, fd, os.F_LOCK, 0)
        in_hub(os.ftruncate, fd, 0)
        assert in_hub(os.pread, fd, 10, 0) == b""
        os.set_blocking(reader, False)
        try:
            in_hub(os.read, reader, 1)
        except BlockingIOError:
            pass
        else:
            raise AssertionError("there was something")
        if hasattr(os, "eventfd"):
            counter = os.eventfd(1)
            assert in_hub(os.eventfd_read, counter) == 1
    """)


def test_a_signal_handler_writes_to_a_pipe():
    """While the hub sleeps the handler runs in it; the reader, another greenlet, gets the byte."""
    run("""
        reader, writer = os.pipe()
        signal.signal(signal.SIGUSR1, lambda *_: os.write(writer, b"!"))
        gevent.spawn_later(0.01, os.kill, os.getpid(), signal.SIGUSR1)
        assert os.read(reader, 1) == b"!"
    """)


def test_everything_cooperative_is_in_os():
    """All of coopos.__cooperative__ stands in os, under its name, as a builtin, and unpatch() takes it out to the identity."""
    run("""
        import pickle
        IO = set(coopos.__cooperative__) - set(coopos.__implements__)
        same = [name for name in coopos.__cooperative__ if getattr(os, name) is before[name]]
        import gevent.os
        closes = ["close"] if "close" not in gevent.os.__implements__ else []  # an older gevent's, which leaves os.close alone
        assert same == [*closes, "fdopen", "register_at_fork"], same
        for name in set(coopos.__cooperative__) - set(same):
            function = getattr(os, name)
            assert function.__name__ == name
            assert type(function) is type(len) or name not in IO, function
        assert os.read.__doc__ == before["read"].__doc__
        assert pickle.loads(pickle.dumps(os.read)) is os.read and pickle.loads(pickle.dumps(open)) is open
        assert io.open is builtins.open is not before_open
        coopos.patch()  # takes nothing back
        assert io.open is builtins.open is not before_open
        coopos.unpatch()
        plain = {name for name, value in before.items() if getattr(os, name, None) is not value}
        import gevent.os
        assert plain == {name for name in plain if getattr(gevent.os, name, None) is getattr(os, name)} == set(), plain
        assert io.open is builtins.open is before_open and input is before_input
        assert (sys.stdin, sys.stdout, sys.stderr) == before_streams
    """)


# ---- open() ------------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_open_of_a_fifo():
    """A tailer and a writer with plain open(), in one process: opening, reading and writing all wait for the other."""
    run("""
        import pathlib

        def write():
            with open(fifo, "w") as file:
                for number in range(3):
                    after_ticks(file.write, f"{number}\\n")
                    file.flush()

        gevent.spawn(write)
        with open(fifo) as file:
            assert (file.name, file.mode) == (fifo, "r")
            assert [line for line in file] == ["0\\n", "1\\n", "2\\n"]
        class Path:
            def __fspath__(self):
                return fifo
        writer = gevent.spawn(after_ticks, lambda: open(Path(), "w").close())
        with open(Path()) as file:
            assert file.name == fifo
        writer.join()  # while it has the FIFO open, the next reader's open() waits for nobody
        try:
            open(Path(), "x")
        except FileExistsError as ex:
            assert ex.filename == fifo
        if sys.version_info >= (3, 11):  # before, pathlib has a copy of io.open
            gevent.spawn(after_ticks, pathlib.Path(fifo).write_bytes, b"data")
            assert pathlib.Path(fifo).read_text() == "data"
    """)


@pytest.mark.parametrize(
    "arguments",
    ["'rb'", "'rb', 0", "'r', -1, 'utf-8', 'strict', '\\n'", "mode='r', encoding='latin-1'", "'rb', buffering=3"],
)
def test_os_fdopen_and_open_of_a_pipe(arguments):
    """The same kinds of files as without coopos, with the same names and modes; their reads wait."""
    run(f"""
        for call in (open, os.fdopen, io.open):
            reader, writer = os.pipe()
            plain = before_open(os.dup(reader), {arguments})
            with call(reader, {arguments}) as file:
                assert isinstance(file, type(plain)), file
                assert file.mode == plain.mode and file.name == reader and file.fileno() == reader
                assert getattr(file, "encoding", None) == getattr(plain, "encoding", None)
                def end():
                    os.write(writer, b"one\\ntwo")
                    os.close(writer)
                data = waits(file.read, until=end)
                assert data in ("one\\ntwo", b"one\\ntwo"), data
            plain.close()
    """)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_unpatch_while_greenlets_print(unbuffered):
    """What they print comes out whole, and print() may go on with the stream that it began with. A buffer is written first."""
    source = """
        reader, writer = os.pipe()
        coopos.unpatch()
        saved = os.dup(1)
        os.dup2(writer, 1)
        for _ in range(3):
            coopos.patch(io=True)
            assert sys.stdout is not sys.__stdout__
            printing = gevent.spawn(print, "x" * 300_000)
            reading = gevent.spawn_later(0.1, coopos.read_exactly, reader, 300_001)
            gevent.sleep(0.05)
            coopos.unpatch()
            coopos.patch(io=True)
            printing.get()
            sys.stdout.flush()
            got = reading.get()
            assert got == b"x" * 300_000 + b"\\n"
            coopos.unpatch()
        os.dup2(saved, 1)
    """
    run(source, PYTHONUNBUFFERED=unbuffered)


@pytest.mark.parametrize("arguments", ["bogus=1", "mode=3", "mode='q'", "newline='z'", "'rb', newline=''", "'rb', encoding='x'"])
def test_wrong_arguments_of_open_get_the_error_they_had(arguments):
    run(f"""
        def error_of(call):
            try:
                call(os.dup(reader), {arguments})
            except Exception as ex:
                return type(ex), str(ex)
        reader, writer = os.pipe()
        ours, theirs = error_of(open), error_of(before_open)
        if "bogus" in {arguments!r}:  # Python 3.10 has other words
            assert ours[0] == theirs[0] and ours[1] == "open() got an unexpected keyword argument 'bogus'", (ours, theirs)
        else:
            assert ours == theirs is not None, (ours, theirs)
    """)


def test_class_of_a_buffer_may_be_extended():
    """What a program overrides is called, and reaches what it overrides."""
    run("""
        reader, writer = os.pipe()
        os.write(writer, b"xyz")
        file = open(reader, "rb")
        class Doubling(type(file)):
            def read(self, n=-1):
                return 2 * super().read(n)
        doubling = Doubling(file.detach())
        assert (doubling.read(1), doubling.peek(), doubling.read(2)) == (b"xx", b"yz", b"yzyz")
        doubling.close()
    """)


def test_a_file_in_non_blocking_mode_does_not_wait():
    """It returns None, as io's own; also if it was put into that mode after it was opened."""
    run("""
        reader, writer = os.pipe()
        with open(reader, "rb", 0) as file, open(writer, "wb", 0) as other:
            other.write(b"x")
            assert file.read(10) == b"x"  # the file may now expect to wait
            os.set_blocking(reader, False)
            os.set_blocking(writer, False)
            assert file.read(10) is None and file.readall() is None and file.readinto(bytearray(1)) is None
            while other.write(bytes(4096)) is not None:
                pass
            assert len(file.readall()) >= 4096
            os.set_blocking(reader, True)
            assert waits(file.read, 1, until=lambda: os.write(writer, b"y")) == b"y"
    """)


def test_open_leaves_other_files_to_io():
    """Regular files, directories, /dev/null, and what open() refuses: io's own classes and its own errors."""
    run("""
        with open(path, "w") as file:
            assert type(file.buffer) is io.BufferedWriter and type(file.buffer.raw) is io.FileIO
        with open("/dev/null", "rb", 0) as file:
            assert type(file) is io.FileIO
        wrong = [("/nowhere",), (directory,), ("nul\\0l",), (-1,), (3.5,), (), (fifo, "q"), (fifo, 5), (fifo, "r", 0),
                 (fifo, "rb", 1.5),
                 (fifo, "rb", -1, "utf-8"), (fifo, "rt", -1, None, None, "x"), (fifo, "r", -1, "no codec"), (2**40,), (fifo, "rw"),
                 (fifo, "r", -1, None, None, None, False)]
        keeper = os.open(fifo, os.O_RDWR)
        for arguments in wrong:
            errors = []
            for call in (before_open, open):
                try:
                    call(*arguments).close()
                    errors.append(None)
                except Exception as ex:
                    errors.append((type(ex), getattr(ex, "errno", None), str(ex)))
            assert errors[0] == errors[1] and errors[0] is not None, (arguments, errors)
    """)


def test_open_with_an_opener():
    """What the opener opens counts. It is called once, and what it returns is closed with the file."""
    run("""
        reader, writer = os.pipe()
        calls = []
        def opener(path, flags):
            calls.append(path)
            return os.dup(reader)
        with open("a name", "rb", opener=opener) as file:
            assert file.name == "a name" and calls == ["a name"]
            number = file.fileno()
            assert waits(file.read, 2, until=lambda: os.write(writer, b"xy")) == b"xy"
        assert raises(OSError, os.fstat, number)
        with open(path, "wb", opener=os.open) as file:
            assert type(file) is io.BufferedWriter
        with open(path, "wb", opener=None) as file:
            assert type(file.raw) is io.FileIO
        with open(reader, "rb", 0, closefd=False, opener=opener) as file:  # io.open asks none for a descriptor either
            assert waits(file.read, 2, until=lambda: os.write(writer, b"xy")) == b"xy"
        assert raises(ValueError, lambda: open("a", opener=lambda *_: -1))
        assert raises(ZeroDivisionError, lambda: open("a", opener=lambda *_: 1 / 0))
    """)


def test_greenlets_share_a_file():
    """Where one waits inside a buffer another waits for it, as threads do: no line is lost or torn, and nothing raises."""
    run("""
        reader, writer = os.pipe()
        out = open(writer, "w")
        def write(number):
            for _ in range(50):
                out.write(f"{number}" * 999 + "\\n")
                out.flush()
        jobs = [gevent.spawn(write, number) for number in range(5)]
        gevent.spawn(lambda: (gevent.joinall(jobs), out.close()))
        with open(reader) as file:
            lines = file.readlines()
        gevent.joinall(jobs, raise_error=True)
        assert sorted(lines) == sorted(f"{number}" * 999 + "\\n" for number in range(5) for _ in range(50))
    """)


def test_greenlets_take_turns_at_a_file():
    """One that is always inside a buffer, and waits there, doesn't keep the others out: not even one that comes back at once."""
    run("""
        reader, writer = os.pipe()
        out, source = open(writer, "w"), open(reader, "rb")
        counts = {}
        def loop(name, call):
            counts[name] = 0
            while True:
                call()
                counts[name] += 1
        jobs = [gevent.spawn(loop, f"write {n}", lambda: print("x" * 2000, file=out, flush=True)) for n in range(2)]
        jobs += [gevent.spawn(loop, f"read {n}", source.readline) for n in range(2)]
        gevent.sleep(0.3)
        assert all(count > 3 for count in counts.values()), counts
        # One is killed while it waits for its turn, and one just when it gets it.
        for job in jobs:
            gevent.sleep(0)
            job.kill()
    """)


def test_threads_with_hubs_share_a_file():
    """While a greenlet of one thread is inside, one of another thread waits. Its hub runs on, and has what reads the pipe."""
    run_script("""
        from gevent import monkey
        monkey.patch_all(thread=False)
        import os, threading
        import gevent
        import coopos
        coopos.patch(io=True)
        reader, writer = os.pipe()
        out = open(writer, "w", buffering=1)
        def print_in_thread():
            with gevent.Timeout(20):
                gevent.joinall([gevent.spawn(print, "x" * 100_000, file=out) for _ in range(3)], raise_error=True)
        threads = [threading.Thread(target=print_in_thread) for _ in range(2)]
        for thread in threads:
            thread.start()
        gevent.sleep(0.05)
        killed = gevent.spawn(print, "never", file=out)
        gevent.sleep(0.01)
        killed.kill()
        printing = gevent.spawn(print, "y", file=out)
        gevent.sleep(0.01)
        assert not printing.dead
        read = 0
        while read < 600_000 + 6 + 2:
            read += len(coopos.read(reader, 65536))
        printing.get()
        for thread in threads:
            thread.join()
        out.close()
        os.close(reader)
    """)


def test_signal_handler_waits_inside_a_buffer():
    """The greenlet that it interrupts may be in the middle of a write or flush. Others wait until that is over. (The end of a line
    is a write of its own in print(), and a signal handler may be called before it.)
    """
    run("""
        reader, writer = os.pipe()
        out = open(writer, "w")
        signal.signal(signal.SIGALRM, lambda *_: gevent.sleep(0.003) if gevent.getcurrent() is not get_hub() else None)
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        def write(number):
            for _ in range(50):
                print(f"{number}" * 3000 + "\\n", end="", file=out, flush=True)
        jobs = [gevent.spawn(write, number) for number in range(5)]
        gevent.spawn(lambda: (gevent.joinall(jobs), out.close()))
        with open(reader) as file:
            lines = file.readlines()
        signal.setitimer(signal.ITIMER_REAL, 0)
        gevent.joinall(jobs, raise_error=True)
        assert sorted(lines) == sorted(f"{number}" * 3000 + "\\n" for number in range(5) for _ in range(50))
    """)


def test_timeout_that_is_a_blockingioerror():
    """It is no EAGAIN of the file's: nothing returns None, and no text ends."""
    run("""
        class Late(BlockingIOError):
            pass
        reader, writer = os.pipe()
        raw = open(writer, "wb", 0, closefd=False)
        def late(function, *args):
            with gevent.Timeout(0.02, Late):
                function(*args)
        for mode, buffering in (("rb", 0), ("rb", -1), ("r", -1)):
            for method, *args in (["read"], ["readline"], ["readlines"], ["readinto", bytearray(3)], ["readall"]):
                file = open(reader, mode, buffering, closefd=False)
                if hasattr(file, method):
                    assert raises(Late, late, getattr(file, method), *args)
        assert raises(Late, late, os.read, reader, 1)
        assert raises(Late, late, raw.write, bytes(100_000))
    """)


def test_keywords_in_any_order():
    """The descriptors whose mode counts are found by their names."""
    run("""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, bytes(4096))
        except BlockingIOError:
            pass
        with before_open(path, "wb+") as file:
            file.write(b"x" * 10)
            file.flush()
            for names in (("in_fd", "out_fd"), ("out_fd", "in_fd")):
                fds = {"in_fd": file.fileno(), "out_fd": writer}
                assert raises(BlockingIOError, lambda: os.sendfile(**{name: fds[name] for name in names}, offset=0, count=10))
        os.set_blocking(writer, True)
        source, sink = os.pipe()
        os.write(sink, b"ab")
        def empty():
            before["read"](reader, 65536)
        assert waits(lambda: os.splice(count=2, dst=writer, src=source), until=empty) == 2
    """)


# ---- the standard streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_streams_are_as_they_were(unbuffered):
    """The same encoding, errors, buffering and names; the interpreter's own are in sys.__stdout__ and its kin."""
    run_script(
        PATCHED
        + f"unbuffered = {unbuffered!r}"
        + """
assert (sys.__stdin__, sys.__stdout__, sys.__stderr__) == before_streams
for plain, ours in zip(before_streams[1:], (sys.stdout, sys.stderr)):
    assert ours is not plain
    for name in ("name", "mode", "encoding", "errors", "line_buffering", "write_through"):
        assert getattr(ours, name) == getattr(plain, name), name
    assert ours.buffer.closefd is False if unbuffered else ours.buffer.raw.closefd is False
    assert ours.isatty() is False and ours.fileno() == plain.fileno()
""",
        PYTHONIOENCODING="latin-1:replace",
        PYTHONUNBUFFERED=unbuffered,
    )


def test_unpatch_writes_first_what_streams_hold():
    """What is printed later, to the interpreter's own stream, comes later."""
    out = run("""
        print("first")
        coopos.unpatch()
        print("second", flush=True)
    """, PYTHONUNBUFFERED="")
    assert out == "first\nsecond\n"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_unpatch_while_streams_are_redirected(name):
    """The stream that comes back at the end of the block works, and the next unpatch() takes it out."""
    run(f"""
        import contextlib
        with contextlib.redirect_{name}(io.StringIO()):
            coopos.unpatch()
        assert coopos.patched()["sys.{name}"] == "coopos" and sys.{name} is not sys.__{name}__
        print(end="", file=sys.{name})
        coopos.unpatch()
        assert coopos.patched()["sys.{name}"] != "coopos" and sys.{name} is sys.__{name}__
    """)


def test_streams_whose_buffer_the_program_takes():
    """A program that wants another encoding calls detach(). Nothing complains, at the end neither, and patch() makes a new one."""
    out = run("""
        sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding="latin-1")
        print("\xe4".isalpha())
        coopos.unpatch()
        sys.stdout.flush()
        sys.stdout = sys.__stdout__
        coopos.patch(io=True)
        assert sys.stdout is not sys.__stdout__
        print("second")
    """)
    assert out == "True\nsecond\n"


def test_unpatch_after_streams_were_closed():
    """By a daemon, for instance."""
    run("""
        sys.stdout.close()
        coopos.unpatch()
        assert sys.stdout is sys.__stdout__ and input is before_input
    """)


def test_end_of_the_program_while_a_greenlet_prints():
    """What atexit functions print waits for it, as in threads."""
    program = """
import atexit
from gevent import monkey
monkey.patch_all()
import gevent
import coopos
coopos.patch(io=True)
atexit.register(print, "the last line")
printing = gevent.spawn(print, "x" * 300_000)
gevent.sleep(0.05)
"""
    run_script(f"""
import subprocess, sys, time
with subprocess.Popen([sys.executable, "-c", {program!r}], stdout=subprocess.PIPE) as process:
    time.sleep(0.5)  # it prints to a full pipe
    written = process.stdout.read()
    assert written.count(b"x") == 300_000 and b"the last line" in written
assert process.returncode == 0
""", PYTHONUNBUFFERED="")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_print_that_outlives_the_patch_is_written_at_the_end(unbuffered):
    run_script(
        textwrap.dedent("""
            import fcntl, subprocess, sys, termios, textwrap, time
            program = '''
            from gevent import monkey
            monkey.patch_all()
            import gevent
            import coopos
            coopos.patch(io=True)
            printing = gevent.spawn(print, "x" * 300_000)
            gevent.sleep(0.05)
            coopos.unpatch()
            printing.join()
            '''
            with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE) as process:
                while int.from_bytes(fcntl.ioctl(process.stdout, termios.FIONREAD, bytes(4)), sys.byteorder) < 30000:
                    time.sleep(0.01)  # until its pipe is full
                time.sleep(0.1)
                assert process.stdout.read() == b"x" * 300_000 + b"\\n"
            assert process.returncode == 0
        """),
        PYTHONUNBUFFERED=unbuffered,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_print_to_a_full_pipe(unbuffered):
    """print() waits for room while others run, in order, also what was printed before the patch and by a forked child."""
    run_script(
        textwrap.dedent("""
            import fcntl, os, subprocess, sys, termios
            program = '''
            from gevent import monkey
            monkey.patch_all()
            import gevent, os, sys
            print("first")
            import coopos
            coopos.patch(io=True)
            ticks = []
            def tick():
                while True:
                    ticks.append(1)
                    gevent.sleep(0.001)
            gevent.spawn(tick)
            for number in range(3000):
                print(number, "x" * 100)
            assert len(ticks) > 5, ticks
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                print("child", flush=True)
                os._exit(0)
            os.waitpid(pid, 0)
            print("last" * 50000)
            '''
            import textwrap, time
            process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
            while int.from_bytes(fcntl.ioctl(process.stdout, termios.FIONREAD, bytes(4)), sys.byteorder) < 30000:
                time.sleep(0.01)  # until its pipe is full
            time.sleep(0.1)
            with process.stdout:
                lines = process.stdout.read().splitlines()
            assert process.wait() == 0
            assert lines == ["first", *[f"{number} " + "x" * 100 for number in range(3000)], "child", "last" * 50000]
        """),
        PYTHONUNBUFFERED=unbuffered,
    )


def test_stdin_that_was_read_before():
    """Nothing is lost of what the stream before had read ahead."""
    run_script(
        textwrap.dedent("""
            import subprocess, sys
            program = '''
            from gevent import monkey
            monkey.patch_all()
            import sys
            lines = [sys.stdin.readline()]
            import coopos
            coopos.patch(io=True)
            lines += [sys.stdin.readline(), input()]
            coopos.unpatch()
            lines += sys.stdin.readlines()
            assert lines == ["1\\\\r\\\\n", "2\\\\n", "3", "\\xe4\\\\n", "5"], lines
            '''
            import textwrap
            process = subprocess.Popen([sys.executable, "-X", "utf8", "-c", textwrap.dedent(program)], stdin=subprocess.PIPE)
            process.communicate("1\\r\\n2\\n3\\n\\xe4\\n5".encode())
            assert process.returncode == 0
        """)
    )


# ---- input() -----------------------------------------------------------------------------------------------------------------

REPL = """
import gevent, sys, signal
{imports}
ticks = []
def tick():
    while True:
        ticks.append(1)
        gevent.sleep(0.001)
ticker = gevent.spawn(tick)
while True:
    if ticker.dead:  # Ctrl-C came while it ran
        ticker = gevent.spawn(tick)
    before = len(ticks)
    try:
        line = input("> ")
    except EOFError:
        print("end", flush=True)
        break
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        continue
    except gevent.Timeout as ex:
        print("timeout", flush=True)
        continue
    print("got", repr(line), "ticked" if len(ticks) > before + 3 else "stood", flush=True)
    if line == "time":
        gevent.Timeout(0.3).start()
"""


@pytest.mark.parametrize("loop", ["pty", "pipe"])
@pytest.mark.parametrize("imports", ["", "import readline"])
def test_repl_on_input(loop, imports, tmp_path):
    """A REPL under python -m coopos: others run at the prompt; Ctrl-C, a timeout and the end come out of input()."""
    program = tmp_path / "repl.py"
    program.write_text(REPL.format(imports=imports))
    run_script(f"""
        import os, pty, signal, subprocess, sys, time, select

        is_pty = {loop!r} == "pty"
        arguments = [sys.executable, "-m", "coopos", {str(program)!r}]
        if is_pty:
            pid, fd = pty.fork()
            if pid == 0:
                os.environ["TERM"] = "dumb"
                os.execv(arguments[0], arguments)
            out = fd
            write = lambda data: os.write(fd, data)
        else:
            process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            out, pid = process.stdout.fileno(), process.pid
            write = process.stdin.write
        seen = b""

        def expect(text):
            global said, seen
            while text not in seen:
                assert select.select([out], [], [], 20)[0], (text, seen)
                data = os.read(out, 10000)
                assert data, (text, seen)
                seen += data
            said, _, seen = seen.partition(text)

        def others_run_at_the_prompt(word):
            for seconds in (0.3, 1, 3, 9):  # a busy machine may not have been at the prompt before the line came
                time.sleep(seconds)
                write(word + b"\\n")
                expect(b"got '" + word + b"' ")
                expect(b"> ")
                if said.startswith(b"ticked"):
                    return
            raise AssertionError(said)

        expect(b"> ")
        others_run_at_the_prompt(b"hello")
        if is_pty:
            time.sleep(0.3)
            write(b"\\x03")
            expect(b"interrupted")
            expect(b"> ")
            others_run_at_the_prompt(b"after")
        write(b"time\\n")
        expect(b"got 'time'")
        expect(b"timeout")
        expect(b"> ")
        others_run_at_the_prompt(b"again")
        write(b"\\x04") if is_pty else process.stdin.close()
        expect(b"end")
        assert (os.waitpid(pid, 0)[1] if is_pty else process.wait()) == 0
        os.close(fd) if is_pty else process.stdout.close()
    """)


AT_A_TERMINAL = """
import resource
coopos.unpatch()
main, terminal = os.openpty()
saved = os.dup(1)
os.dup2(terminal, 0), os.dup2(terminal, 1)
coopos.patch(io=True)
reading = gevent.spawn(input)
gevent.sleep(0.1)
assert not reading.dead
"""


def test_kill_of_input_when_no_descriptor_is_free():
    run(
        AT_A_TERMINAL
        + """
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
held = []
raises(OSError, lambda: [held.append(os.dup(main)) for _ in range(200)])
reading.kill()
for fd in held:
    os.close(fd)
os.dup2(saved, 1)
"""
    )


def test_input_in_a_child_without_the_greenlet_that_was_in_it():
    run(
        AT_A_TERMINAL
        + """
pid = coopos.fork(keep_greenlets=False)
if pid == 0:
    reader, writer = os.pipe()
    os.dup2(reader, 0)
    gevent.spawn_later(0.01, os.write, writer, b"a line\\n")
    assert input() == "a line"
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    raises(EOFError, input)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
reading.kill()
os.dup2(saved, 1)
"""
    )


# ---- how it is asked for -----------------------------------------------------------------------------------------------------


def test_coopos_patch_io_in_the_environment():
    """COOPOS_PATCH=io: gevent.monkey.patch_all() alone calls patch(io=True)."""
    run_script("from gevent import monkey; monkey.patch_all(); import os; assert os.read.__module__ == 'os'", COOPOS_PATCH="io")


@pytest.mark.parametrize("option", ["", "--no-io"])
def test_command_line(option, tmp_path):
    """python -m coopos patches io, unless told not to."""
    program = tmp_path / "program.py"
    program.write_text("import os\nprint(os.read.__module__)\n")
    run_script(f"""
        import subprocess, sys
        arguments = [sys.executable, "-m", "coopos", *{option.split()!r}, {str(program)!r}]
        out = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
        assert out == {("posix" if option else "os")!r} + "\\n", out
    """)
