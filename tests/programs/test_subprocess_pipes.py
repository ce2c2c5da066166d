"""coopos.subprocess: communicate(), pipes and terminals."""

import errno
import fcntl
import os
import signal
import socket
import subprocess as stdlib
import tracemalloc
import warnings

import gevent
import gevent.socket
import psutil
import pytest

import coopos
from coopos import subprocess
from coopos.io import BufferedReader

from ..helpers.children import has_no_child
from ..helpers.programs import DEVNULL, MUCH, PIPE, STDOUT, outcome_of, same, sh
from ..helpers.support import closing, error_of, parked, result_of, run_script, ticking, turn_loop, until

# ---- communicate -------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("pipes", [{}, {"stderr": PIPE}, {"stderr": STDOUT}], ids=["out", "out, err", "one for both"])
def test_communicate_much(pipes):
    """More than pipes hold, in and out at once, while others run."""
    with ticking() as turns:
        process = sh("tee /dev/stderr" if pipes else "cat", stdin=PIPE, stdout=PIPE, **pipes)
        out, err = process.communicate(MUCH)
        assert turns
    if pipes.get("stderr") == STDOUT:
        assert (len(out), err) == (2 * len(MUCH), None)
    else:
        assert out == MUCH
        assert err == (MUCH if pipes else None)
    assert process.returncode == 0
    assert process.stdin.closed
    assert process.stdout.closed


@pytest.mark.parametrize("pipes", [{}, {"stderr": PIPE}], ids=["out", "out, err"])
def test_communicate_holds_the_output_once(pipes):
    """The stdlib's own, which joins pieces, holds it twice."""
    size = 1 << 24
    process = subprocess.Popen(["head", "-c", str(size), "/dev/zero"], stdout=PIPE, **pipes)
    tracemalloc.start()
    try:
        out, _ = process.communicate()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(out) == size
    assert peak < 1.5 * size


def test_communicate_loses_nothing_without_memory():
    """The object can't grow. Once it can the next communicate() goes on."""
    run_script("""
    import resource, sys
    from coopos import subprocess

    MB = 1 << 20
    program = "for i in range(100): print('%3d' % i * 700_000, end='')"
    expected = "".join("%3d" % i * 700_000 for i in range(100)).encode()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    for more in 60, 90, 90, 120:
        resource.setrlimit(resource.RLIMIT_AS, (used + more * MB, limits[1]))
        try:
            process.communicate()
        except MemoryError:
            pass
        else:
            raise AssertionError("there was enough")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
    assert process.communicate()[0] == expected
    """)


def test_communicate_in_a_signal_handler_of_communicate():
    """No byte is lost, and none comes twice."""
    run_script("""
    import signal
    from coopos import subprocess

    process = subprocess.Popen(["head", "-c", str(3 << 22), "/dev/zero"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    called = []

    def handle(*_):
        try:
            process.communicate(timeout=0)
        except subprocess.TimeoutExpired:
            called.append(1)

    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    out, _ = process.communicate()
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(out) == 3 << 22 and called, (len(out), called)
    """)


def test_communicate_timed_out_after_an_output_without_a_byte(gate):
    """The exception has b"" of what has ended, as in the stdlib."""
    process = sh(f"exec >&-; {gate.wait}", stdout=PIPE, stderr=PIPE)
    with pytest.raises(stdlib.TimeoutExpired) as raised:
        process.communicate(timeout=0.2)
    assert (raised.value.output, raised.value.stderr) == (b"", None)
    gate.open()
    assert process.communicate() == (b"", b"")


def test_communicate_timeout_and_again(gate):
    """What was read and written before the timeout is not lost; the exception has what was read."""
    process = sh(f"head -c 100000; {gate.wait}; cat; echo late >&2", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    with pytest.raises(stdlib.TimeoutExpired) as raised:
        process.communicate(MUCH, timeout=0.2)
    assert MUCH.startswith(raised.value.output)
    assert len(raised.value.output) >= 100_000
    gate.open()
    assert process.communicate() == (MUCH, b"late\n")


def test_communicate_timeout_after_the_child_has_closed_its_input(gate):
    """There is nothing left to write then."""
    process = sh(f"exec <&-; {gate.wait}; echo late", stdin=PIPE, stdout=PIPE)
    with pytest.raises(stdlib.TimeoutExpired):
        process.communicate(MUCH, timeout=0.1)
    gate.open()
    assert process.communicate() == (b"late\n", None)


def test_communicate_killed(gate):
    process = sh(f"echo early; {gate.wait}; echo late", stdout=PIPE, stderr=PIPE)
    parked(process.communicate).kill()
    gate.open()
    assert process.communicate() == (b"early\nlate\n", b"")


@pytest.mark.parametrize("timeout", [None, 30])
def test_communicate_with_a_child_that_does_not_read(timeout):
    """BrokenPipeError is nobody's business."""
    process = sh("exec <&-; echo done", stdin=PIPE, stdout=PIPE)
    assert process.communicate(MUCH, timeout) == (b"done\n", None)


@pytest.mark.parametrize("kwargs", [{}, {"text": True}, {"encoding": "latin-1"}, {"universal_newlines": True}], ids=str)
@pytest.mark.parametrize("bufsize", [-1, 0, 1, 4096])
def test_communicate_text(kwargs, bufsize):
    """Encoding, decoding and newlines are the stdlib's."""
    is_text = bool(kwargs)
    if bufsize == 1 and not is_text:
        pytest.skip("warned of as line buffering of bytes")
    text = "one\ntwo\r\nthr\u00e9e\r"

    def talk(module):
        process = sh("cat; printf 'x\\r\\ny' >&2", module, stdin=PIPE, stdout=PIPE, stderr=PIPE, bufsize=bufsize, **kwargs)
        return process.communicate(text if is_text else text.encode())

    same(talk)


def test_communicate_without_pipes():
    assert same(lambda module: sh("exit 7", module).communicate()) == (None, None)


def test_communicate_by_two():
    """Each ends: with what it has read, or told that the other has closed the pipe."""
    process = sh("echo out; sleep 0.1; echo more", stdout=PIPE, stderr=PIPE)
    first, second = gevent.spawn(outcome_of, process.communicate), gevent.spawn(outcome_of, process.communicate)
    results = [result_of(first), result_of(second)]
    assert any(isinstance(result[0], bytes) for result in results)
    assert all(isinstance(result[0], bytes) or result[1] == errno.EBADF or result[0] is ValueError for result in results)


@pytest.mark.parametrize("name", ["stdout", "stdin"])
def test_communicate_while_another_closes(name):
    process = sh("exec sleep 100", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    other = parked(error_of, process.communicate, MUCH)
    getattr(process, name).raw.close()
    assert result_of(other)[0] in (OSError, ValueError)
    process.kill()
    process.__exit__(None, None, None)


@pytest.mark.parametrize("pipes", [{"stdout": PIPE}, {"stdout": PIPE, "stderr": PIPE}], ids=" ".join)
@pytest.mark.parametrize("how", ["with", "close"])
def test_communicate_while_the_number_is_used_again(pipes, how):
    """It takes nothing from another's pipe."""
    process = subprocess.Popen(["sleep", "100"], **pipes)
    other = parked(error_of, process.communicate)
    process.kill()
    fds = []

    def use_numbers():
        for _ in range(3):
            fds.extend(os.pipe())
            os.write(fds[-1], b"secret")

    number = process.stdout.fileno()
    user = gevent.spawn(use_numbers)
    if how == "with":
        process.__exit__(None, None, None)
    else:
        process.stdout.raw.close()
    user.join()
    assert result_of(other) == (OSError, errno.EBADF)
    assert number in fds
    for read_end, write_end in zip(fds[::2], fds[1::2], strict=True):
        assert os.read(read_end, 10) == b"secret"
        os.close(read_end)
        os.close(write_end)
    process.__exit__(None, None, None)


def test_wait_does_not_rely_on_poll():
    """Which a subclass may make of wait()."""

    class Polling(subprocess.Popen):
        def poll(self):
            try:
                return self.wait(timeout=0)
            except stdlib.TimeoutExpired:
                return None

    process = Polling(["sh", "-c", "exit 7"])
    until(lambda: process.poll() is not None)
    assert process.wait() == 7


@pytest.mark.parametrize("pipes", [{"stdout": PIPE}, {"stdout": PIPE, "stderr": PIPE}], ids=["read", "select"])
def test_exit_while_another_communicates(pipes):
    """It closes the pipes; the other is told."""
    process = subprocess.Popen(["sleep", "100"], **pipes)
    other = parked(error_of, process.communicate if len(pipes) > 1 else process.stdout.read)
    process.kill()
    process.__exit__(None, None, None)
    assert result_of(other) == (OSError, errno.EBADF)
    assert process.stdout.closed
    assert process.returncode == -signal.SIGKILL


def test_exit_while_another_reads(gate):
    process = sh(f"{gate.wait}", stdout=PIPE)
    reader = parked(error_of, process.stdout.read)
    leaver = gevent.spawn(process.__exit__, None, None, None)
    assert result_of(reader) == (OSError, errno.EBADF)
    gate.open()
    result_of(leaver)
    assert process.stdout.closed


# ---- files -------------------------------------------------------------------------------------------------------------------


def layers(file):
    """The classes of a file and what is below it, with what they were told."""
    if file is None:
        return None
    found = []
    while True:
        names = ("encoding", "errors", "line_buffering", "write_through", "mode")
        base = next(kind for kind in type(file).__mro__ if kind.__module__ in ("io", "_io"))
        found.append((base, {name: getattr(file, name) for name in names if hasattr(file, name)}))
        below = getattr(file, "buffer", None) or getattr(file, "raw", None)
        if below is None:
            return found
        file = below


@pytest.mark.parametrize("bufsize", [-1, 0, 1, 100, None])
@pytest.mark.parametrize("text", [{}, {"text": True}, {"encoding": "utf-16"}, {"errors": "ignore"}], ids=str)
def test_files_are_made_as_the_stdlibs(text, bufsize):
    def look(module):
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            process = sh("exit 0", module, stdin=PIPE, stdout=PIPE, stderr=PIPE, bufsize=bufsize, **text)
        with process:
            return [layers(file) for file in (process.stdin, process.stdout, process.stderr)]

    same(look)


@pytest.mark.skipif(not hasattr(fcntl, "F_GETPIPE_SZ"), reason="no F_GETPIPE_SZ here")
def test_pipesize():
    def look(module):
        with sh("exit 0", module, stdin=PIPE, stdout=PIPE, pipesize=8192) as process:
            return [fcntl.fcntl(file, fcntl.F_GETPIPE_SZ) for file in (process.stdin, process.stdout)]

    assert same(look) == [8192, 8192]


def test_stdout_lets_others_run(gate):
    process = sh(f"echo one; {gate.wait}; echo two", stdout=PIPE, text=True)
    with process:
        assert process.stdout.readline() == "one\n"
        reader = parked(process.stdout.read)
        gate.open()
        assert result_of(reader) == "two\n"


def test_stdin_lets_others_run(gate):
    with sh(f"{gate.wait}; wc -c", stdin=PIPE, stdout=PIPE, bufsize=0) as process:
        writer = parked(process.stdin.write, MUCH)
        gate.open()
        assert result_of(writer) == len(MUCH)
        process.stdin.close()
        assert int(process.stdout.read()) == len(MUCH)


@pytest.mark.parametrize("text", [False, True], ids=["bytes", "text"])
def test_close_while_another_reads(gate, text):
    """It waits until the read is over, as in threads, and lets others run."""
    with sh(f"echo one; {gate.wait}; echo two", stdout=PIPE, text=text) as process:
        reader = parked(process.stdout.read)
        closer = parked(process.stdout.close)
        turn_loop()
        assert not closer.ready()
        gate.open()
        assert result_of(reader) == ("one\ntwo\n" if text else b"one\ntwo\n")
        result_of(closer)
        assert process.stdout.closed
    assert process.returncode == 0


@pytest.mark.parametrize("text", [False, True], ids=["bytes", "text"])
def test_close_while_another_writes(gate, tmp_path, text):
    """What is written is all there, and then the end."""
    with sh(f"{gate.wait}; wc -c > {tmp_path}/count", stdin=PIPE, text=text) as process:
        writer = parked(process.stdin.write, "x" * 300_000 if text else b"x" * 300_000)
        closer = parked(process.stdin.close)
        gate.open()
        assert result_of(writer) == 300_000
        result_of(closer)
    assert int((tmp_path / "count").read_text()) == 300_000


def test_close_while_another_reads_that_is_told(gate):
    """Whoever closes the file below lets both go."""
    with sh(f"{gate.wait}", stdout=PIPE) as process:
        reader = parked(error_of, process.stdout.read)
        closer = parked(process.stdout.close)
        process.stdout.raw.close()
        assert result_of(reader) == (OSError, errno.EBADF)
        result_of(closer)
        gate.open()


def test_close_in_the_middle_of_ones_own_read():
    """It is a reentrant call, as ever: a signal handler's could only wait for itself."""

    class Raw(coopos.FileIO):
        def readinto(self, buffer):
            outcome.append(error_of(file.close))
            return super().readinto(buffer)

    outcome = []
    with sh("sleep 0.05; echo out", stdout=PIPE) as process:
        with BufferedReader(Raw(process.stdout.fileno(), closefd=False)) as file:
            assert file.read(3) == b"out"
    assert outcome == [(RuntimeError, None)]


def test_exit_while_another_writes():
    """Its file is closed under it, too: the child has its end-of-file, and ends."""
    with sh("read line; cat > /dev/null; exit 3", stdin=PIPE) as process:
        writer = parked(error_of, process.stdin.write, b"x" * 30_000_000)
    assert process.returncode == 3
    assert result_of(writer) == (OSError, errno.EBADF)


def test_exit_with_a_child_that_does_not_read():
    """What closing says comes out, when the child was waited for."""

    def leave(module):
        process = sh("exit 3", module, stdin=PIPE)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        try:
            with process:
                process.stdin.write(b"data")
        finally:
            assert process.returncode == 3

    assert [error_of(leave, module) for module in (stdlib, subprocess)] == [(BrokenPipeError, errno.EPIPE)] * 2


def test_pipe_that_is_the_childs_stays_as_it_is_here():
    """In non-blocking mode, since others rely on that; the child's is another open file of the same pipe."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with coopos.fdopen(reader, "rb", 0) as file, closing(writer):
        os.write(writer, b"data")
        script = "head -c 2; grep flags: /proc/self/fdinfo/0"
        out = subprocess.run(["sh", "-c", script], stdin=file, stdout=PIPE).stdout
        assert out[:2] == b"da"
        assert not int(out.split()[-1], 8) & os.O_NONBLOCK
        assert not os.get_blocking(reader)
        assert file.read(10) == b"ta"
        waiter = parked(file.read, 10)
        os.write(writer, b"more")
        assert result_of(waiter) == b"more"


@pytest.mark.parametrize("mode", [os.O_RDONLY, os.O_WRONLY], ids=["stdin", "stdout"])
def test_fifo_without_another_end(tmp_path, mode):
    """It is in blocking mode for the child, and nobody waits for somebody to open the other end."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    # In an interpreter of its own: where it is waited for, nothing else runs.
    run_script(f"""
        import os
        from coopos import subprocess
        both = os.open({str(path)!r}, os.O_RDWR)
        fd = os.open({str(path)!r}, {mode} | os.O_NONBLOCK)
        os.close(both)
        out = subprocess.run(
            ["sh", "-c", "grep flags: /proc/self/fdinfo/{int(mode != os.O_RDONLY)} >&2"],
            {"stdin" if mode == os.O_RDONLY else "stdout"}=fd, stderr=subprocess.PIPE, timeout=30,
        ).stderr
        assert not int(out.split()[-1], 8) & os.O_NONBLOCK, out
    """)


def test_standard_streams_are_in_blocking_mode_for_the_child():
    """A socket of gevent's isn't, and few programs expect that of their standard streams."""
    ours, theirs = gevent.socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(["cat"], stdin=theirs, stdout=theirs)
        theirs.close()
        until(lambda: psutil.Process(process.pid).status() in (psutil.STATUS_SLEEPING, psutil.STATUS_ZOMBIE))
        ours.sendall(b"data")
        ours.shutdown(socket.SHUT_WR)
        assert ours.recv(10) == b"data"
        assert process.wait() == 0


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_stream_that_is_no_descriptor(stream):
    """The stdlib's error, and no child and no descriptor is left."""
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    same(lambda module: sh("exit 0", module, **{stream: 10_000}))


# ---- terminals ---------------------------------------------------------------------------------------------------------------


def read_terminal(process):
    return process.pty.read().replace(b"\r\n", b"\n")


@pytest.mark.smoke
def test_pty_is_the_childs_terminal():
    """Its standard streams are one terminal, which is its controlling one; it leads a session and a foreground group."""
    script = "test -t 0 && test -t 1 && test -t 2 && echo ctty > /dev/tty; stty size; ps -o sid=,tpgid= -p $$"
    with sh(script, pty=True, winsize=(12, 34)) as process:
        ctty, size, ids = read_terminal(process).decode().splitlines()
        assert (ctty, size) == ("ctty", "12 34")
        assert ids.split() == [str(process.pid)] * 2
        assert process.wait() == 0
        assert (process.stdin, process.stdout, process.stderr) == (None, None, None)


def test_pty_lets_others_run(gate):
    with sh(f"read line; echo got $line; {gate.wait}; exit 7", winsize=(1, 1)) as process:
        reader = parked(read_terminal, process)
        process.pty.write(b"line\n")
        turn_loop()
        gate.open()
        assert result_of(reader) == b"line\ngot line\n"
        assert process.wait() == 7


def test_pty_end_after_much():
    """All that was written comes, and then the end, once and for all."""
    with sh("seq 20000", pty=True) as process:
        assert read_terminal(process) == b"".join(b"%d\n" % n for n in range(1, 20001))
        assert process.pty.read() == process.pty.read(10) == b""
        assert process.pty.readinto(bytearray(5)) == 0


def test_pty_of_text():
    with sh("read line; echo got $line", pty=True, text=True) as process:
        process.pty.write("l\u00efne\n")
        assert process.pty.readline() == "l\u00efne\n"
        assert process.pty.read() == "got l\u00efne\n"


def test_pty_of_text_that_is_written_in_the_middle_of_a_character():
    script = r"stty -echo; printf 'x\n\303'; read line; printf '\251z\n'"
    with sh(script, pty=True, encoding="utf-8") as process:
        assert process.pty.readline() == "x\n"
        process.pty.write("go\n")
        assert process.pty.read() == "\u00e9z\n"


def test_pty_with_standard_streams_closed_here():
    """Its descriptor is not taken for one of the child's."""
    run_script("""
        import os
        from coopos import subprocess
        os.close(0)
        os.close(1)
        pipe = subprocess.PIPE
        with subprocess.Popen(["sh", "-c", "echo tty > /dev/tty"], pty=True, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            process.wait()
            assert process.pty.read() == b"tty\\r\\n"
    """)


def test_pty_beside_pipes():
    """A stream that an argument speaks of is that; the terminal is the controlling one all the same."""
    process = sh("cat; test -t 0 || test -t 1 || echo no >&2; echo tty > /dev/tty", pty=True, stdin=PIPE, stdout=PIPE)
    with process:
        process.stdin.write(b"data")
        process.stdin.close()
        assert process.stdout.read() == b"data"
        assert read_terminal(process) == b"no\ntty\n"


def test_pty_with_all_streams_elsewhere():
    process = sh("echo tty > /dev/tty", pty=True, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
    process.wait()
    with process:
        assert read_terminal(process) == b"tty\n"


def test_pty_and_preexec_fn():
    with sh("pwd", pty=True, preexec_fn=lambda: os.chdir("/usr")) as process:
        assert read_terminal(process) == b"/usr\n"


def test_pty_hangs_up():
    """Closed, it ends the child by SIGHUP; so does the end of the block."""
    with sh("read line; read line", pty=True) as process:
        pass
    assert process.returncode == -signal.SIGHUP


def test_pty_close_wakes_who_reads():
    process = subprocess.Popen(["sleep", "100"], pty=True)
    reader = parked(error_of, process.pty.read)
    process.pty.close()
    assert result_of(reader) == (OSError, errno.EBADF)
    assert process.wait() == -signal.SIGHUP


@pytest.mark.parametrize("winsize", [(1,), 1, (1, 2, 3), ("a", 1), (1, 65536), (-1, 1), (1.5, 1)], ids=str)
def test_pty_wrong_winsize(winsize):
    """Refused before anything is started."""
    assert error_of(subprocess.Popen, ["true"], winsize=winsize)[0] in (TypeError, ValueError, OverflowError)
    assert has_no_child()


@pytest.mark.parametrize("text", [False, True])
def test_pty_is_resized(text):
    """The child gets SIGWINCH and finds the new size."""
    script = "trap 'stty size; exit' WINCH; stty size; while :; do sleep 0.01; done"
    with sh(script, winsize=(12, 34), text=text) as process:
        process.pty.readline()
        process.resize(56, 78)
        assert process.pty.read().strip() in ("56 78", b"56 78")


def test_pty_that_cant_be_resized():
    """A wrong size leaves the terminal's as it is; without a terminal, and after its end here, there is a ValueError."""
    with sh("read line; stty size", winsize=(12, 34)) as process:
        for size in [(-1, 1), (1, 65536), ("1", 1), (1.5, 1), (None, 1)]:
            assert error_of(process.resize, *size)[0] in (TypeError, ValueError, OverflowError)
        process.pty.write(b"\n")
        assert process.pty.read().endswith(b"\n12 34\r\n")
    assert error_of(process.resize, 1, 1)[0] is ValueError
    with sh("exit") as process:
        assert error_of(process.resize, 1, 1)[0] is ValueError
