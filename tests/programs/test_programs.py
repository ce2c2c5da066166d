"""system and popen: what os does with the same command, while other greenlets run."""

import contextlib
import gc
import os
import pathlib
import signal
import sys
import warnings

import gevent
import pytest

import coopos

from ..helpers.children import STATUS, TELLS_REAPED_STATUS, children, has_no_child, needs_proc, no_child
from ..helpers.support import (
    HubThread,
    error_of,
    make_pipe,
    needs_libev,
    open_fds,
    parked,
    result_of,
    run_script,
    ticking,
    turn_loop,
    until,
)


def lines(path):
    return path.read_text().splitlines()


# ---- system ------------------------------------------------------------------------------------------------------------------

COMMANDS = {
    "success": ":",
    "exit 7": "exit 7",
    "exit 255": "exit 255",
    "signal": "kill -TERM $$",
    "missing": "/nonexistent/program 2>/dev/null",
    "syntax": "( 2>/dev/null",
    "empty": "",
    "bytes": b"exit 3 # \xff",
    "surrogate": "exit 3 # \udcff",
    "path": pathlib.Path("/bin/true"),
    "several": "true; false",
    "name": 'test "$0" = sh',
    "stdin": "test -e /dev/stdin",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_system_status(command, capfd):
    """The raw status, as of os.system."""
    assert error_of(coopos.system, command) == error_of(os.system, command)


def test_system_command_that_is_too_long():
    """A shell that can't be started is told as os.system tells it."""
    command = ": " + "x" * 200_000  # more than one argument may have
    assert coopos.system(command) == os.system(command)


@needs_libev  # gevent's libuv loop is Python: a handler that raises in it ends the hub
def test_what_a_signal_handler_raises_while_the_shell_starts_comes_out():
    """And is not taken for an error of the start."""
    run_script(
        """
        import signal, gevent, coopos

        def handle(*_):
            raise TimeoutError("raised")

        gevent.sleep(0.001)        # a handler that raises while gevent's hub begins ends it

        signal.signal(signal.SIGALRM, handle)
        outcomes = []
        for n in range(100):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.00001 * (n + 1))
                    outcomes.append(coopos.system("exit 4"))
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except TimeoutError:
                pass
        assert set(outcomes) <= {4 << 8}, outcomes
        """,
        may_complain=True,  # the hub prints what handlers raise in it
    )


@pytest.mark.parametrize("call", ["system", "Popen"])
@pytest.mark.parametrize("error", ['OSError(errno.ENOMEM, "raised")', 'FileNotFoundError(errno.ENOENT, "raised", "/bin/sh")'])
def test_error_that_is_raised_on_any_line_while_a_shell_starts_comes_out(error, call):
    """As a signal's handler raises it: it may look like one of the start's own."""
    run_script(
        f"""
        import errno, gc, os, sys, coopos, coopos.subprocess
        gc.disable()               # a __del__ that it runs would be traced

        def start():
            if {call!r} == "system":
                return coopos.system("exit 4")
            return coopos.subprocess.Popen("exit 4", shell=True, stdin=reader)

        def trace(frame, event, arg):
            global left
            if frame.f_globals.get("__name__") not in ("coopos._programs", "coopos.subprocess"):
                return None
            if frame.f_code.co_name == "__del__":
                return None        # out of which nothing comes
            if event == "line":
                left -= 1
                if left == 0:
                    raise error
            return trace

        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        start()
        tried = 0
        while True:
            tried += 1
            left, error = tried, {error}
            sys.settrace(trace)
            try:
                result = start()
            except OSError as ex:
                assert ex is error, ex
            else:
                assert left > 0, (tried, result)
                break
            finally:
                sys.settrace(None)
        assert tried > 15, tried
        while True:
            try:
                coopos.waitpid(-1, 0)
            except ChildProcessError:
                break
        """,
        may_complain=True,
    )


@pytest.mark.parametrize(
    "arguments", [(), (None,), (1,), ("a\0b",), (b"a\0b",), ("\ud800",), (bytearray(b"x"),), (["x"],), ("x", "y")], ids=repr
)
def test_system_wrong_arguments(arguments):
    """The same exception as os.system's, and nothing is started."""
    error = error_of(coopos.system, *arguments)
    assert error[0] is not None
    assert error == error_of(os.system, *arguments)
    assert has_no_child()


def test_system_keyword():
    assert coopos.system(command="exit 7") == STATUS


def test_system_audit():
    """The auditing event of os.system is raised, with the command."""
    output = run_script("""
        import sys, os, gevent, coopos
        events = []
        sys.addaudithook(lambda event, args: events.append((event, args)) if event == "os.system" else None)
        coopos.system("exit 0")
        os.system("exit 0")
        print(events[0] == events[1])
    """)
    assert output == "True\n"


@pytest.mark.smoke
def test_system_lets_others_run(gate):
    """Another greenlet goes on turning until the command has ended."""
    turns = []
    waiter = parked(coopos.system, f"{gate.wait}; exit 7")

    def turn():
        while not waiter.ready():
            turns.append(1)
            gevent.sleep(0)

    ticker = gevent.spawn(turn)
    until(lambda: len(turns) > 10)
    gate.open()
    assert result_of(waiter) == STATUS
    ticker.join()


def test_system_many_at_once(gate):
    """Commands run beside each other, and each status comes to who asked."""
    waiters = [parked(coopos.system, f"{gate.wait}; exit {n}") for n in range(20)]
    assert len(children()) == 20
    gate.open(20)
    assert [result_of(waiter) for waiter in waiters] == [n << 8 for n in range(20)]


def test_system_in_threads(gate):
    """It works in any thread's hub."""
    with HubThread() as one, HubThread() as two:
        waiters = [(thread, thread.parked(coopos.system, f"{gate.wait}; exit 7")) for thread in (one, two)]
        gate.open(2)
        assert [thread.result_of(waiter) for thread, waiter in waiters] == [STATUS] * 2


def test_system_killed(gate):
    """The command goes on, leaves no zombie when it ends, and its status is waitable."""
    waiter = parked(coopos.system, f"{gate.wait}; exit 7")
    (pid,) = children()
    waiter.kill()
    assert children() == [pid]
    gate.open()
    until(has_no_child)
    assert coopos.waitpid(-1, 0) == (pid, STATUS)
    assert error_of(coopos.wait) == no_child


@pytest.mark.parametrize("error", [TimeoutError, OSError, ValueError, gevent.Timeout], ids=lambda error: error.__name__)
def test_system_timeout(gate, error):
    """A Timeout comes out, whatever it raises: it is no failure of the shell."""
    waiter = parked(error_of, coopos.system, f"{gate.wait}; exit 7")
    waiter.kill(error(), block=False)
    turn_loop()
    outcome = waiter.exception if error is gevent.Timeout else waiter.value
    gate.open()
    until(has_no_child)
    coopos.wait()
    assert type(outcome) is error if error is gevent.Timeout else outcome == (error, getattr(error(), "errno", None))


def test_system_while_sigchld_is_ignored():
    """The status where the kernel tells it, else -1, as os.system says; never a hang."""
    run_script(f"""
        import os, signal, gevent, coopos
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        assert os.system("exit 7") == -1
        reader, writer = os.pipe()
        os.set_inheritable(reader, True)
        waiter = gevent.spawn(coopos.system, f"read line < /dev/fd/{{reader}}; exit 7")
        gevent.sleep(0)
        os.write(writer, b"\\n")
        assert waiter.get(timeout=30) == {STATUS if TELLS_REAPED_STATUS else -1}
        # This one may be gone before anybody can look.
        assert coopos.system("exit 7") in ({STATUS}, -1)
    """)


def test_system_inheritance(tmp_path):
    """Directory, inheritable descriptors and standard streams are the parent's."""
    told = []
    with make_pipe(blocking=True) as (reader, writer), contextlib.chdir(tmp_path) if sys.version_info >= (3, 11) else in_(tmp_path):
        os.set_inheritable(writer, True)
        for module in (os, coopos):
            assert module.system(f"{{ pwd -P; test -e /dev/fd/{reader}; echo $?; }} > /dev/fd/{writer}") == 0
            told.append(os.read(reader, 1000))
    assert told[0] == told[1]
    assert told[0].split()[-1] == b"1"


@contextlib.contextmanager
def in_(path):
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


@needs_proc
def signals_of(status_lines):
    """The standard signals of lines from /proc/self/status. 32 and 33 are glibc's own: its posix_spawn leaves them ignored."""
    return {name: int(mask, 16) & 0x7FFFFFFF for name, mask in map(str.split, status_lines)}


def test_system_signals(tmp_path):
    """Which signals the command ignores and blocks is what os.system gives it."""
    for module in (os, coopos):
        module.system(f"grep -E 'SigIgn|SigBlk' /proc/self/status > {tmp_path / module.__name__}")
    assert signals_of(lines(tmp_path / "coopos")) == signals_of(lines(tmp_path / "os"))


CHANGES = {
    "os.environ": ("os.environ['COOPOS_X'] = '5'", "5"),
    "os.environb": ("os.environb[b'COOPOS_X'] = b'5'", "5"),
    "os.putenv": ("os.putenv('COOPOS_X', '5')", "5"),
    "the C library": ("ctypes.CDLL(None).setenv(b'COOPOS_X', b'5', 1)", "5"),
    "del": ("del os.environ['COOPOS_X']", "unset"),
    "os.unsetenv": ("os.unsetenv('COOPOS_X')", "unset"),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_system_and_popen_environment(change, expected):
    """The command gets the process's environment, as it is now, whoever has changed it."""
    output = run_script(
        f"""
        import ctypes, os, gevent, coopos
        {change}
        command = "echo ${{COOPOS_X-unset}}"
        for module in (os, coopos):
            module.system(command)
            with module.popen(command) as file:
                print(file.read(), end="", flush=True)
        """,
        COOPOS_X="1",
    )
    assert output.split() == [expected] * 4


@needs_proc
def test_system_and_popen_leave_signals_alone():
    """Nothing changes which signals are caught, ignored or blocked: not before, not meanwhile, not afterwards."""
    run_script("""
        import os, signal, gevent, coopos

        def signals():
            # Less those that the C library keeps for its threads.
            with open("/proc/self/status") as status:
                fields = dict(line.split(":", 1) for line in status)
            return [int(fields[name], 16) & 0x7FFFFFFF for name in ("SigCgt", "SigIgn", "SigBlk")]

        gevent.sleep(0)
        before = signals()
        os.mkfifo(fifo := f"/tmp/coopos-{os.getpid()}")
        try:
            gate = os.open(fifo, os.O_RDWR)
        finally:
            os.unlink(fifo)
        command = f"read line < /dev/fd/{gate}"
        os.set_inheritable(gate, True)
        argv = ["sh", "-c", command]
        for call in (
            lambda: coopos.system(command),
            lambda: coopos.spawnv(os.P_WAIT, "/bin/sh", argv),
            lambda: coopos.spawnvp(os.P_WAIT, "sh", argv),
            lambda: coopos.waitpid(coopos.spawnv(os.P_NOWAIT, "/bin/sh", argv), 0)[1],
        ):
            waiter = gevent.spawn(call)
            gevent.sleep(0)
            assert signals() == before and not waiter.ready()
            os.write(gate, b"\\n")
            assert waiter.get(timeout=30) == 0
            assert signals() == before
        for mode in "rw":
            assert coopos.popen("exit 0", mode).close() is None
            assert signals() == before
    """)


# ---- popen -------------------------------------------------------------------------------------------------------------------


def both(function):
    """What *function* makes of os.popen, and of coopos.popen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # subprocess's, of what wasn't closed
        return function(os.popen), function(coopos.popen)


def output_of(popen, command):
    with popen(command) as file:
        return file.read()


def test_popen_read():
    """What the command writes is read as text, whole or by lines; close() returns None for success."""
    with coopos.popen("printf 'one\\r\\ntwo\\nthree'") as file:
        assert file.readline() == "one\n"
        assert file.read() == "two\nthree"
        assert file.read() == ""
    assert file.closed
    file = coopos.popen("printf 'one\\r\\ntwo\\nthree'; exit 7")
    assert list(file) == ["one\n", "two\n", "three"]
    assert file.close() == STATUS


def test_popen_write(tmp_path):
    """The command reads what is written."""
    with coopos.popen(f"cat > {tmp_path / 'out'}", "w") as file:
        assert file.write("hällo\n") == 6
        file.writelines(["one\n", "two\n"])
    assert (tmp_path / "out").read_text("utf-8") == "hällo\none\ntwo\n"


@pytest.mark.parametrize("mode", ["r", "w"])
@pytest.mark.parametrize("script", ["exit 0", "exit 7", "exit 255", "kill -TERM $$", "kill -KILL $$", "/nonexistent 2>/dev/null"])
def test_popen_close(mode, script):
    """close() returns as os.popen's does, again each time, and the context manager closes."""

    def close(popen):
        file = popen(script, mode)
        first = file.close()
        with file as same:
            assert same is file
        return first, file.close(), file.closed

    expected, got = both(close)
    assert got == expected
    if script == "exit 7":
        assert got == (7 << 8, 7 << 8, True)
    if script == "kill -TERM $$":
        assert got[0] == -signal.SIGTERM << 8


ATTRIBUTES = ["encoding", "errors", "newlines", "closed"]


@pytest.mark.parametrize(("mode", "buffering"), [("r", -1), ("w", -1), ("r", 1), ("w", 1), ("r", 100), ("w", 100), ("w", True)])
def test_popen_file(mode, buffering):
    """The file is as os.popen's: encoding, errors, newlines and buffering."""

    def look(popen):
        file = popen("cat >&2" if mode == "w" else "exit 0", mode, buffering)
        answers = {name: getattr(file, name) for name in ATTRIBUTES}
        answers.update(readable=file.readable(), writable=file.writable(), seekable=file.seekable(), isatty=file.isatty())
        answers.update(line_buffering=file.line_buffering, write_through=file.write_through, mode=getattr(file, "mode", None))
        answers.update(name=type(file.name), raw=file.buffer.raw.mode)
        answers["fileno"] = type(file.fileno())
        answers["buffer"] = type(file.buffer).__name__
        answers["read"] = error_of(file.read, 1)
        answers["close"] = file.close()
        return answers

    expected, got = both(look)
    assert got == expected


def test_popen_line_buffering():
    """With buffering 1 a line is handed on when it is complete, without a flush."""
    with make_pipe() as (reader, writer):
        os.set_inheritable(writer, True)
        file = popen_to(writer, "cat", 1)
        file.write("one\n")
        assert result_of(gevent.spawn(coopos.nb_read, reader, 100)) == b"one\n"
        file.write("two")
        assert file.close() is None
        assert result_of(gevent.spawn(coopos.nb_read, reader, 100)) == b"two"


def popen_to(writer, command, buffering=-1):
    """A command that writes to *writer* whatever it inherits."""
    if not os.path.exists(f"/proc/{os.getpid()}/fd/{writer}"):
        pytest.skip("no /proc")
    return coopos.popen(f"{command} > /proc/{os.getpid()}/fd/{writer}", "w", buffering)


@pytest.mark.parametrize(
    "arguments",
    [
        *[(), (1,), (b"x",), (None,), (pathlib.Path("x"),), (["x"],), ("a\0b",), ("\ud800",)],
        *[(":", mode) for mode in ("rb", "a", "", None, 1, ["r"])],
        *[(":", "r", buffering) for buffering in (0, None, "x", 1.0, [])],
        *[(":", "w", buffering) for buffering in (0, None, "x", 1.0)],
        (":", "r", -1, 0),
    ],
    ids=repr,
)
def test_popen_wrong_arguments(arguments):
    """The same exception as os.popen's, and nothing is started."""
    expected, got = both(lambda popen: error_of(popen, *arguments))
    assert expected[0] is not None
    gc.collect()
    left = error_of(coopos.wait)
    assert got == expected
    assert left == no_child


@pytest.mark.parametrize("mode", ["r", "w"])
def test_popen_buffering_that_is_too_large(mode):
    """The same exception as os.popen's (which leaves its pipe open), and nothing is started; no descriptor is left."""
    before = open_fds()
    outcome = error_of(coopos.popen, ":", mode, 2**70)
    left = error_of(coopos.wait)
    assert outcome == (OverflowError, None)
    assert left == no_child
    assert open_fds() == before


def test_popen_command_that_is_too_long():
    """A shell that can't be started is told as os.popen tells it; no descriptor is left."""
    before = open_fds()
    expected, got = both(lambda popen: error_of(popen, ": " + "x" * 200_000))
    assert got == expected
    assert open_fds() == before


def test_popen_lets_others_run(gate):
    """Reading and closing wait in the hub only."""
    file = coopos.popen(f"echo one; {gate.wait}; echo two; exec >&-; {gate.wait}; exit 7")
    assert file.readline() == "one\n"
    reader = parked(file.read)
    gate.open()
    assert result_of(reader) == "two\n"
    closer = parked(file.close)
    gate.open()
    assert result_of(closer) == STATUS


def test_popen_much_data(gate, tmp_path):
    """More than a pipe holds, both ways at once, while others run."""
    data = "".join(f"{n:09}\n" for n in range(100_000))
    with ticking() as turns:
        writer = coopos.popen(f"cat > {tmp_path / 'copy'}", "w")
        reader = coopos.popen("seq -f %09.0f 0 99999")
        got = gevent.spawn(reader.read)
        put = gevent.spawn(writer.write, data)
        gevent.joinall([got, put])
        assert (got.value, put.value) == (data, len(data))
        assert (reader.close(), writer.close()) == (None, None)
        assert (tmp_path / "copy").read_text() == data
        assert turns


def test_popen_command_that_never_reads(gate):
    """Who writes waits in the hub; when the command has ended, BrokenPipeError; close() then does as os.popen's."""
    file = coopos.popen(f"{gate.wait}; exit 7", "w")
    writer = parked(error_of, file.write, "x" * 1_000_000)
    gate.open()
    assert result_of(writer)[0] is BrokenPipeError
    with contextlib.suppress(BrokenPipeError):
        file.close()
    assert file.close() == STATUS


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_popen_command_that_has_ended(size):
    """What writing and closing raise, and what close() returns then, is what os.popen's do."""

    def write(popen):
        file = popen("exit 7", "w")
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        answers = [error_of(file.write, "x" * size), error_of(file.close), error_of(file.close), file.closed]
        return answers

    expected, got = both(write)
    with contextlib.suppress(ChildProcessError):
        coopos.wait()
    assert got == expected


@pytest.mark.parametrize("writes", ["\\377\\376", "abc\\377", "\\303"])
def test_popen_undecodable(writes):
    """Bytes that are no text are the same error as os.popen's, and the file can be closed."""

    def read(popen):
        file = popen(f"printf '{writes}'; exit 7")
        return error_of(file.read), file.close()

    expected, got = both(read)
    assert got == expected


def test_popen_close_while_another_closes(gate):
    """Each who closes waits for the command, and is told its result."""
    file = coopos.popen(f"exec >&-; {gate.wait}; exit 7")
    first = parked(file.close)
    second = gevent.spawn(file.close)
    turn_loop()
    waited = not second.ready()
    gate.open()
    assert (result_of(first), result_of(second)) == (STATUS, STATUS)
    assert waited


@pytest.mark.parametrize("error", [gevent.GreenletExit, gevent.Timeout, TimeoutError], ids=lambda error: error.__name__)
def test_popen_close_that_was_given_up(gate, error):
    """A close() that was killed or timed out is done again by the next, which returns the command's result."""
    file = coopos.popen(f"exec >&-; {gate.wait}; exit 7")
    parked(file.close).kill(error())
    gate.open()
    result = file.close()
    with contextlib.suppress(ChildProcessError):
        coopos.wait()
    assert result == STATUS


def test_popen_that_is_not_closed():
    """No zombie and no descriptor is left of a file that was let go."""
    before = open_fds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        file = coopos.popen("exit 7")
        del file
        gc.collect()
    until(has_no_child)
    with contextlib.suppress(ChildProcessError):
        coopos.wait()  # unless the command had ended when its file went
    assert open_fds() == before


def test_popen_reader_that_goes_away():
    """A command that writes on is ended by SIGPIPE, though Python ignores it: as under os.popen."""
    expected, got = both(lambda popen: popen("exec yes").close())
    assert expected == -signal.SIGPIPE << 8
    assert got == expected


@needs_proc
def test_popen_signals():
    """Which signals the command ignores and blocks is what os.popen gives it."""
    expected, got = both(lambda popen: output_of(popen, "grep -E 'SigIgn|SigBlk' /proc/self/status"))
    assert signals_of(got.splitlines()) == signals_of(expected.splitlines())


def test_popen_descriptors():
    """The command gets the three standard streams and nothing else that is open here, inheritable or not."""

    with make_pipe() as (reader, writer), coopos.popen("cat", "w"):
        os.set_inheritable(reader, True)
        os.set_inheritable(writer, True)
        expected, got = both(lambda popen: output_of(popen, f"test -e /dev/fd/{reader}; echo $?; ls /dev/fd"))
    assert got == expected


def test_popen_keeps_no_other_open(gate):
    """Of two commands that are written to, each sees its end of file when its own file is closed."""
    first, second = coopos.popen("cat; exit 3", "w"), coopos.popen("cat; exit 4", "w")
    assert result_of(gevent.spawn(first.close)) == 3 << 8
    assert result_of(gevent.spawn(second.close)) == 4 << 8


def test_popen_name_of_the_shell():
    """$0 is what it is under os.popen."""
    expected, got = both(lambda popen: output_of(popen, "echo $0"))
    assert got == expected


def test_popen_in_threads(gate):
    """It works in any thread's hub."""
    with HubThread() as thread:
        file = thread.call(coopos.popen, f"{gate.wait}; echo hello; exit 7")
        reader = thread.parked(file.read)
        gate.open()
        assert thread.result_of(reader) == "hello\n"
        assert thread.call(file.close) == STATUS


@pytest.mark.parametrize("closed", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_popen_with_standard_streams_closed(closed):
    """The pipe reaches the command also where its descriptors are 0, 1 or 2."""
    run_script(f"""
        import os, gevent, coopos
        gevent.sleep(0)
        out = os.dup(1)
        for fd in {closed}:
            os.close(fd)
        with coopos.popen("echo hello; exit 7") as file:
            assert file.read() == "hello\\n"
        assert file.close() == 7 << 8
        with coopos.popen("read line; test $line = hello && exit 5", "w") as file:
            file.write("hello\\n")
        assert file.close() == 5 << 8
    """)


def test_popen_stolen_child():
    """Somebody else waits for any child: close() says so, or tells what the kernel still knows; no success is made up."""
    file = coopos.popen("exit 7")
    assert os.waitpid(-1, 0)[1] == STATUS
    assert error_of(file.close) in ([(None, STATUS)] if TELLS_REAPED_STATUS else [no_child])
