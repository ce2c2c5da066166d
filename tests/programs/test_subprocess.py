"""coopos.subprocess: the stdlib's subprocess in all that it does, while other greenlets run."""

import contextlib
import errno
import fcntl
import functools
import gc
import inspect
import os
import signal
import socket
import subprocess as stdlib
import sys
import warnings

import gevent
import gevent.socket
import gevent.subprocess
import pytest

import coopos
from coopos import subprocess
from coopos.io import BufferedReader

from ..helpers.children import has_no_child, needs_pidfds, needs_proc, needs_reaped_status, no_child, until
from ..helpers.support import HubThread, clog, closing, error_of, open_fds, parked, result_of, run_script, ticking, turn_loop

PIPE, STDOUT, DEVNULL = stdlib.PIPE, stdlib.STDOUT, stdlib.DEVNULL
is_root = os.geteuid() == 0


PATCHED = """
from gevent import monkey
monkey.patch_all()
import coopos
coopos.patch()
import signal, subprocess, gevent, gevent.subprocess
"""


def sh(script, module=subprocess, **kwargs):
    return module.Popen(["sh", "-c", script], **kwargs)


def outcome_of(function, *args, **kwargs):
    """What it returns, or all that its exception says."""
    try:
        return function(*args, **kwargs)
    except Exception as ex:
        names = ("errno", "strerror", "filename", "returncode", "cmd", "output", "stderr")
        return type(ex), *[getattr(ex, name, None) for name in names], None if isinstance(ex, stdlib.SubprocessError) else str(ex)


def same(function):
    """What *function* makes of coopos.subprocess, which must be what it makes of the stdlib's."""
    expected, got = outcome_of(function, stdlib), outcome_of(function, subprocess)
    assert got == expected
    return got


# ---- names -------------------------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_stdlib():
    assert set(subprocess.__all__) == set(stdlib.__all__)
    assert [name for name in subprocess.__all__ if not hasattr(subprocess, name)] == []


def test_exceptions_and_constants_are_the_stdlibs_own():
    """So that whoever catches or compares them need not know where they come from."""
    names = ["SubprocessError", "CalledProcessError", "TimeoutExpired", "CompletedProcess", "PIPE", "STDOUT", "DEVNULL"]
    assert [name for name in names if getattr(subprocess, name) is not getattr(stdlib, name)] == []


def test_popen_is_a_kind_of_the_stdlibs():
    with sh("exit 0") as process:
        assert isinstance(process, stdlib.Popen)
        assert type(process).__name__ == "Popen"
        assert repr(process) == "<Popen: returncode: None args: ['sh', '-c', 'exit 0']>"


def test_popen_signature_is_the_stdlibs_with_a_terminal():
    ours, theirs = (list(inspect.signature(module.Popen).parameters.values()) for module in (subprocess, stdlib))
    assert ours[: len(theirs)] == theirs
    assert [(each.name, each.kind) for each in ours[len(theirs) :]] == [
        ("pty", inspect.Parameter.KEYWORD_ONLY),
        ("winsize", inspect.Parameter.KEYWORD_ONLY),
        ("threadpool", inspect.Parameter.KEYWORD_ONLY),
    ]


def test_popen_threadpool():
    """gevent's Popen has it; here nothing is done with it."""
    with subprocess.Popen(["sh", "-c", "exit 7"], threadpool=gevent.get_hub().threadpool) as process:
        pass
    assert process.returncode == 7


def test_popen_can_be_subscripted():
    assert subprocess.Popen[bytes]


# ---- an stdlib that isn't as we know it --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "missing"),
    [
        ("_communicate(self, input, endtime, orig_timeout)", "_talk(self, input, endtime, orig_timeout)", "Popen._communicate"),
        (
            "_communicate(self, input, endtime, orig_timeout)",
            "_communicate(self, input, deadline, orig_timeout)",
            "the parameter 'endtime' of Popen._communicate, Popen._communicate without a parameter 'deadline'",
        ),
        ("def _wait(self, timeout)", "def _wait(self, timeout, flags=0)", "Popen._wait without a parameter 'flags'"),
        ("preexec_fn", "before_exec", "the parameter 'preexec_fn' of Popen._execute_child"),
        ("_internal_poll", "_poll", "Popen._internal_poll"),
        ("_PopenSelector", "_Selector", "_PopenSelector"),
        ("_input_offset", "_input_at", "Popen._input_offset"),
    ],
)
def test_stdlib_that_is_another(tmp_path, old, new, missing):
    """Only what runs programs by it is an error, which names what is missing; all else works, and patch() has replaced nothing."""
    source = inspect.getsource(stdlib)
    assert old in source
    (tmp_path / "subprocess.py").write_text(source.replace(old, new))
    run_script(f"""
        import os, sys, coopos
        plain = os.waitpid
        pid = coopos.fork()
        if not pid:
            os._exit(7)
        assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
        assert coopos.spawnlp(os.P_WAIT, "sh", "sh", "-c", "exit 7") == 7
        for use in (lambda: coopos.system("exit 7"), lambda: coopos.popen("exit 7"), coopos.patch, coopos.patch):
            try:
                use()
            except NotImplementedError as ex:
                assert {missing!r} in str(ex) and sys.version.split()[0] in str(ex), str(ex)
            else:
                raise AssertionError("no error")
        assert os.waitpid is plain
    """, PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))


# ---- wait and poll -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "returncode"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", -15), ("kill -KILL $$", -9)])
def test_wait_returncode(script, returncode):
    process = sh(script)
    assert process.wait() == process.returncode == process.poll() == process.wait(timeout=1) == returncode


@pytest.mark.smoke
def test_wait_lets_others_run(gate):
    process = sh(f"{gate.wait}; exit 7")
    waiter = parked(process.wait)
    assert process.poll() is None
    assert process.returncode is None
    gate.open()
    assert result_of(waiter) == 7


def test_wait_lets_others_run_that_has_nothing_to_wait_for():
    """Each has its turn between two programs, also where those have ended by the time they are waited for."""
    with ticking() as turns:
        for _ in range(10):
            turns.clear()
            process = sh("exit 7")
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            gevent.spawn(turns.append, 1)
            process.wait()
            assert turns


def test_wait_by_many(gate):
    """Each is told the same."""
    process = sh(f"{gate.wait}; exit 7")
    waiters = [parked(process.wait, timeout) for timeout in (None, 30, None, 30)]
    gate.open()
    assert [result_of(waiter) for waiter in waiters] == [7] * 4


def test_wait_in_other_threads(gate):
    """A child of one thread is waited for in others, by each in its own hub."""
    with HubThread() as one, HubThread() as two:
        process = one.call(sh, f"{gate.wait}; exit 7")
        waiters = [(thread, thread.parked(process.wait)) for thread in (one, two)]
        here = parked(process.wait)
        gate.open()
        assert [thread.result_of(waiter) for thread, waiter in waiters] == [7, 7]
        assert result_of(here) == 7
        assert process.returncode == 7


def test_wait_for_a_child_of_a_thread_that_is_gone():
    run_script("""
        import threading, gevent, coopos
        from coopos import subprocess

        def start():
            processes.append(subprocess.Popen(["sh", "-c", "read line; exit 7"], stdin=subprocess.PIPE))
            gevent.get_hub().destroy(destroy_loop=True)

        processes = []
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        [process] = processes
        assert process.poll() is None
        waiter = gevent.spawn(process.wait)
        gevent.sleep(0)
        process.stdin.close()
        assert waiter.get() == process.returncode == 7
    """)


@pytest.mark.parametrize("timeout", [0, -1, 0.001])
def test_wait_timeout(gate, timeout):
    """TimeoutExpired, and the child goes on and can be waited for."""
    process = sh(f"{gate.wait}; exit 7")
    with pytest.raises(stdlib.TimeoutExpired) as raised:
        process.wait(timeout)
    assert (raised.value.cmd, raised.value.timeout) == (process.args, timeout)
    gate.open()
    assert process.wait(1e30) == 7


@pytest.mark.parametrize("error", [gevent.GreenletExit, gevent.Timeout, ValueError], ids=lambda error: error.__name__)
def test_wait_killed(gate, error):
    """The child goes on, and can be waited for."""
    process = sh(f"{gate.wait}; exit 7")
    parked(process.wait).kill(error())
    assert process.poll() is None
    gate.open()
    assert process.wait() == 7


def test_returncode_is_set_by_the_hub():
    """As by gevent's: nobody has to ask."""
    process = sh("exit 7")
    until(lambda: process.returncode is not None)
    assert process.returncode == 7
    assert has_no_child()
    assert process.wait() == 7


def test_waitpid_has_the_status_until_wait_or_poll_has():
    process = sh("exit 7")
    assert coopos.waitpid(process.pid, 0) == (process.pid, 7 << 8)
    assert process.wait() == 7
    for ask in (lambda process: process.wait(), lambda process: [until(lambda: process.poll() is not None)]):
        process = sh("exit 7")
        ask(process)
        assert error_of(coopos.waitpid, process.pid, 0) == no_child
        assert error_of(os.waitpid, process.pid, 0) == no_child


@needs_reaped_status
@pytest.mark.parametrize("ask", ["wait", "poll"])
def test_returncode_of_a_child_that_others_collect(ask):
    """Its own, and never an invented one."""
    process = sh("exit 7")
    os.waitpid(process.pid, 0)
    assert getattr(process, ask)() == 7
    assert process.returncode == 7


@needs_reaped_status
def test_wait_while_others_collect(gate):
    process = sh(f"{gate.wait}; exit 7")
    waiter = parked(process.wait)
    gate.open()
    os.waitpid(process.pid, 0)
    assert result_of(waiter) == 7


def test_status_that_is_lost():
    """ChildProcessError, for everybody and each time, where the kernel doesn't tell it; never a hang."""
    run_script("""
        import os, gevent, coopos
        from coopos import subprocess
        process = subprocess.Popen(["sh", "-c", "read line; exit 7"], stdin=subprocess.PIPE)
        waiter = gevent.spawn(process.wait)
        gevent.sleep(0)
        process.stdin.close()
        os.waitpid(process.pid, 0)
        for ask in (waiter.get, process.wait, process.poll):
            try:
                ask()
            except ChildProcessError as ex:
                assert str(process.pid) in str(ex)
            else:
                assert process.returncode == 7    # the kernel tells by a thread, too
    """, may_complain=True, COOPOS_CHILDREN="thread")


def test_wait_while_sigchld_is_ignored():
    """The status where the kernel tells it, else 0, as the stdlib says; never a hang."""
    run_script("""
        import signal, coopos
        from coopos import subprocess
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        process = subprocess.Popen(["sh", "-c", "read line; exit 7"], stdin=subprocess.PIPE)
        process.stdin.close()
        assert process.wait() in (0, 7)
    """)


def test_run_while_sigchld_is_ignored():
    """Programs that end before anybody can look have returned 0, as the stdlib says."""
    run_script("""
        import signal, coopos
        from coopos import subprocess
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        for _ in range(200):
            assert subprocess.run(["sh", "-c", "exit 7"]).returncode in (0, 7)
            assert coopos.popen("exit 7").close() in (None, 7 << 8)
        process = subprocess.Popen(["true"])
        assert process.result.get(timeout=30) == 0
    """)


# ---- waiting for several -----------------------------------------------------------------------------------------------------


def test_gevent_wait(gate):
    """A Popen is something to wait for."""
    first, second = sh(f"{gate.wait}; exit 1"), sh("exit 2")
    assert gevent.wait([first, second], count=1) == [second]
    assert (first.returncode, second.returncode) == (None, 2)
    assert gevent.wait([first], timeout=0.001) == []
    gate.open()
    assert gevent.wait([first, second]) == [second, first]
    assert first.returncode == 1


def test_gevent_wait_in_other_threads(gate):
    """For a child of this thread in another's hub, and of one whose hub doesn't run here."""
    with HubThread() as thread:
        process = sh(f"{gate.wait}; exit 7")
        there = thread.parked(gevent.wait, [process])
        here = parked(gevent.wait, [process])
        waiter = thread.parked(process.wait)
        gate.open()
        assert (thread.result_of(there), result_of(here), thread.result_of(waiter)) == ([process], [process], 7)
    run_script("""
        import threading, gevent
        from coopos import subprocess
        processes = []
        thread = threading.Thread(target=lambda: processes.append(subprocess.Popen(["sh", "-c", "exit 7"])))
        thread.start()
        thread.join()
        assert gevent.wait(processes, timeout=30) == processes
        assert processes[0].returncode == processes[0].result.get(timeout=30) == 7
    """)


def test_rawlink_and_unlink():
    """A link is called in the hub with the Popen, also one that comes late, and not one that was taken back."""
    process = sh("exit 7")
    called = []
    taken_back = functools.partial(called.append, "taken back")
    process.rawlink(called.append)
    process.rawlink(taken_back)
    process.unlink(taken_back)
    process.unlink(taken_back)
    process.wait()
    turn_loop()
    assert called == [process]
    process.rawlink(called.append)
    turn_loop()
    assert called == [process] * 2
    assert process.result.get() == 7


def test_500_at_once(gate):
    processes = [sh(f"{gate.wait}; exit {n % 100}") for n in range(500)]
    with ticking() as turns:
        gate.open(500)
        assert {gevent.spawn(process.wait).get() for process in processes} == set(range(100))
        assert turns
    assert [process.returncode for process in processes] == [n % 100 for n in range(500)]


def test_popen_in_several_threads_at_once():
    with contextlib.ExitStack() as stack:
        threads = [stack.enter_context(HubThread()) for _ in range(4)]

        def run_ten():
            return [subprocess.run(["sh", "-c", f"echo {n}; exit {n}"], stdout=PIPE) for n in range(10)]

        greenlets = [(thread, thread.call(gevent.spawn, run_ten)) for thread in threads]
        for thread, greenlet in greenlets:
            assert [(done.stdout, done.returncode) for done in thread.result_of(greenlet)] == [(b"%d\n" % n, n) for n in range(10)]


# ---- communicate -------------------------------------------------------------------------------------------------------------

MUCH = b"".join(b"%09d\n" % n for n in range(200_000))


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


# ---- what is thrown in -------------------------------------------------------------------------------------------------------

each_thrown = pytest.mark.parametrize("throw", [
    functools.partial(TimeoutError, "thrown"),
    functools.partial(OSError, errno.EIO, "thrown"),
    functools.partial(ChildProcessError, errno.ECHILD, "thrown"),
    functools.partial(BlockingIOError, errno.EAGAIN, "thrown"),
    functools.partial(BrokenPipeError, errno.EPIPE, "thrown"),
    functools.partial(InterruptedError, errno.EINTR, "thrown"),
    functools.partial(ValueError, "thrown"),
    functools.partial(RuntimeError, "thrown"),
    functools.partial(stdlib.TimeoutExpired, "thrown", 1),
    functools.partial(gevent.Timeout),  # without a timer, which would have to be closed
], ids=lambda throw: throw.func.__name__)


def raised_by(function, *args, **kwargs):
    """What comes out of it as an exception."""
    try:
        return None, function(*args, **kwargs)
    except BaseException as ex:
        return ex, None


def throw_into(throw, function, *args, **kwargs):
    """Have a greenlet wait in function(*args), and what *throw* makes come out of it."""
    thrown = throw()
    waiter = parked(raised_by, functools.partial(function, *args, **kwargs))
    waiter.kill(thrown, block=False)
    assert result_of(waiter) == (thrown, None)
    assert thrown.__context__ is None


@each_thrown
@pytest.mark.parametrize("pipes", [{"stdout": PIPE}, {"stderr": PIPE}, {"stdout": PIPE, "stderr": PIPE}], ids=" ".join)
@pytest.mark.parametrize("text", [False, True], ids=["bytes", "text"])
def test_communicate_loses_nothing(gate, throw, pipes, text):
    process = sh(f"echo one; echo one >&2; {gate.wait}; echo two; echo two >&2; exit 7", text=text, **{"stderr": DEVNULL, **pipes})
    throw_into(throw, process.communicate)
    gate.open()
    expected = "one\ntwo\n" if text else b"one\ntwo\n"
    assert [out for out in process.communicate() if out is not None] == [expected] * len(pipes)
    assert process.returncode == 7


@pytest.mark.parametrize("text", [False, True], ids=["bytes", "text"])
def test_communicate_loses_nothing_when_only_the_end_is_waited_for(gate, text):
    process = sh(f"echo out; exec >&-; {gate.wait}", text=text, stdout=PIPE)
    waiter = parked(process.communicate)
    until(lambda: process.stdout.closed)
    waiter.kill()
    gate.open()
    assert process.communicate() == ("out\n" if text else b"out\n", None)


@pytest.mark.parametrize("pipes", [{"stdout": PIPE}, {"stdout": PIPE, "stderr": PIPE}], ids=" ".join)
@pytest.mark.parametrize("kwargs", [{}, {"text": True}, {"encoding": "utf-16"}, {"bufsize": 0}], ids=str)
@pytest.mark.parametrize("is_killed", [False, True], ids=["", "killed"])
def test_communicate_has_what_was_read_ahead(gate, tmp_path, kwargs, pipes, is_killed):
    """By a readline() before it; also the first bytes of a character."""
    said = "a\n" + "\u20ac" * 5_001 + "\n"
    data = said.encode(kwargs.get("encoding", "utf-8"))
    with open(tmp_path / "data", "wb") as file:
        file.write(data)
    process = sh(f"head -c 10001 {tmp_path}/data; {gate.wait}; tail -c +10002 {tmp_path}/data", **pipes, **kwargs)
    is_text = bool(kwargs.keys() - {"bufsize"})
    line = process.stdout.readline()
    if is_killed:
        parked(process.communicate).kill()
    gate.open()
    assert line + process.communicate()[0] == (said if is_text else data)


@each_thrown
@pytest.mark.parametrize("pipes", [{}, {"stdout": PIPE}], ids=["stdin", "both"])
def test_communicate_writes_all_of_its_input(gate, tmp_path, throw, pipes):
    """Once, in however many calls."""
    process = sh(f"head -c 10; {gate.wait}; wc -c > {tmp_path}/count", stdin=PIPE, **{"stdout": DEVNULL, **pipes})
    throw_into(throw, process.communicate, MUCH)
    gate.open()
    process.communicate()
    assert process.returncode == 0
    assert int((tmp_path / "count").read_text()) <= len(MUCH) - 10  # head reads ahead
    assert int((tmp_path / "count").read_text()) > len(MUCH) - 100_000


@each_thrown
@pytest.mark.parametrize("call", ["wait", "wait quietly", "communicate", "with"])
def test_what_is_thrown_into_a_wait_comes_out(gate, throw, call):
    process = sh(f"{gate.wait}; exit 7")
    calls = {
        "wait": process.wait,
        "wait quietly": functools.partial(process.wait, 100, False),
        "communicate": process.communicate,
        "with": functools.partial(process.__exit__, None, None, None),
    }
    throw_into(throw, calls[call])
    gate.open()
    assert process.wait() == 7


@each_thrown
def test_what_is_thrown_into_a_flush_comes_out(gate, throw):
    """Of the end of a ``with`` block, whose child doesn't read."""
    process = sh(f"{gate.wait}; cat > /dev/null", stdin=PIPE)
    throw_into(throw, lambda: (clog(process.stdin.fileno()), process.stdin.write(b"x"), process.__exit__(None, None, None)))
    gate.open()
    process.__exit__(None, None, None)
    assert process.returncode == 0


@each_thrown
@pytest.mark.parametrize("call", ["run", "check_output", "call", "check_call"])
def test_what_is_thrown_into_a_call_comes_out(gate, throw, call):
    """And the child is killed, as by the stdlib."""
    throw_into(throw, getattr(subprocess, call), ["sh", "-c", f"{gate.wait}; exit 7"])
    assert has_no_child()


@each_thrown
def test_what_is_thrown_into_system_popen_and_terminals_comes_out(gate, throw):
    throw_into(throw, coopos.system, f"{gate.wait}; exit 7")
    gate.open()
    assert coopos.wait()[1] == 7 << 8
    file = coopos.popen(f"exec >&-; {gate.wait}; exit 7")
    throw_into(throw, file.close)
    gate.open()
    assert file.close() == 7 << 8
    with sh("read line; exit 7", pty=True) as process:
        throw_into(throw, process.pty.read)
        throw_into(throw, coopos.read_pty, process.pty.fileno(), 1)
        process.pty.write(b"\n")
    assert process.returncode in (7, -signal.SIGHUP)


# ---- where nothing can switch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [
    'subprocess.run(["sh", "-c", "cat; exit 7"], input=b"out", capture_output=True).stdout == b"out"',
    'subprocess.run(["sh", "-c", "cat; exit 7"], input=b"out", capture_output=True, timeout=30).stdout == b"out"',
    'subprocess.run(["sh", "-c", "sleep 0.01; exit 7"], timeout=30).returncode == 7',
    'subprocess.run(["sh", "-c", "exit 7"], preexec_fn=os.getpid).returncode == 7',
    'subprocess.Popen(["sh", "-c", "exit 7"], pty=True).wait() == 7',
    'subprocess.check_output(["sh", "-c", "sleep 0.01; echo out"]) == b"out\\n"',
    'gevent.subprocess.check_output(["sh", "-c", "sleep 0.01; echo out"]) == b"out\\n"',
    'os.system("sleep 0.01; exit 7") == 7 << 8',
    'os.popen("sleep 0.01; echo out").read() == "out\\n"',
    'os.popen("sleep 0.01; exit 7").close() == 7 << 8',
    'os.waitpid(os.posix_spawn("/bin/sh", ["sh", "-c", "sleep 0.01; exit 7"], os.environ), 0)[1] == 7 << 8',
    'os.spawnlp(os.P_WAIT, "sh", "sh", "-c", "sleep 0.01; exit 7") == 7',
])
def test_program_in_a_signal_handler(call):
    """It runs in the hub, where it waits as in any program; other programs' ends are told afterwards."""
    run_script(PATCHED + f"""
import os
outcome = []
def handle(signum, frame):
    if gevent.getcurrent() is not gevent.get_hub():
        return signal.setitimer(signal.ITIMER_REAL, 0.005)
    try:
        outcome.append({call})
    except BaseException as ex:
        outcome.append(ex)
signal.signal(signal.SIGALRM, handle)
other = gevent.spawn(subprocess.run, ["sleep", "0.02"])
gevent.sleep(0)
signal.setitimer(signal.ITIMER_REAL, 0.005)
while not outcome:
    gevent.sleep(0.01)
assert outcome == [True], outcome
assert other.get(timeout=30).returncode == 0
""", may_complain=True)


@pytest.mark.parametrize("call", [
    'subprocess.run(["true"], capture_output=True)',
    'subprocess.run(["cat"], input=b"in", capture_output=True, timeout=30)',
    'subprocess.run(["true"], timeout=30)',
    'os.system("true")',
    'os.popen("true").close()',
    'os.waitpid(os.posix_spawn("/bin/true", ["true"], os.environ), 0)',
])
def test_programs_in_threads_without_a_hub(call):
    """They wait as threads do, and leave no hub behind, whose descriptors nobody would close."""
    run_script(PATCHED + f"""
import os
from gevent.hub import _get_hub
from gevent.monkey import get_original
start, Lock = get_original("_thread", "start_new_thread"), get_original("_thread", "allocate_lock")
outcome = []
def use(lock):
    try:
        {call}
        outcome.append(_get_hub())
    except BaseException as ex:
        outcome.append(ex)
    lock.release()
def in_thread():
    lock = Lock()
    lock.acquire()
    start(use, (lock,))
    lock.acquire()
in_thread()
before = os.listdir("/dev/fd")
for _ in range(200):
    in_thread()
assert outcome == [None] * 201, outcome[:3]
assert os.listdir("/dev/fd") == before
""", may_complain=True)


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
        gevent.sleep(0.02)
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


# ---- run and its kin ---------------------------------------------------------------------------------------------------------

CALLS = {
    "run": lambda module: vars(module.run(["sh", "-c", "echo out; echo err >&2; exit 7"], capture_output=True)),
    "run input": lambda module: vars(module.run(["cat"], input=b"in", stdout=PIPE)),
    "run text": lambda module: vars(module.run("echo $0", shell=True, stdout=PIPE, text=True)),
    "run check": lambda module: module.run(["sh", "-c", "echo out; exit 7"], stdout=PIPE, check=True),
    "run timeout": lambda module: module.run(["sh", "-c", "echo out; exec sleep 30"], stdout=PIPE, timeout=0.5),
    "run input and stdin": lambda module: module.run(["cat"], input=b"in", stdin=PIPE),
    "run capture and stdout": lambda module: module.run(["cat"], capture_output=True, stdout=PIPE),
    "call": lambda module: module.call(["sh", "-c", "exit 7"]),
    "call timeout": lambda module: module.call(["sleep", "30"], timeout=0.01),
    "check_call": lambda module: module.check_call(["true"]),
    "check_call fails": lambda module: module.check_call(["sh", "-c", "kill -KILL $$"]),
    "check_output": lambda module: module.check_output(["echo", "out"]),
    "check_output fails": lambda module: module.check_output(["sh", "-c", "echo out; echo err >&2; exit 7"], stderr=PIPE),
    "check_output input": lambda module: module.check_output(["cat"], input=b"in"),
    "check_output stdout": lambda module: module.check_output(["cat"], stdout=PIPE),
    "check_output timeout": lambda module: module.check_output(["sh", "-c", "echo out; exec sleep 30"], timeout=0.5),
    "getoutput": lambda module: module.getoutput("echo out; echo err >&2; exit 7"),
    "getstatusoutput": lambda module: module.getstatusoutput("echo out; exit 7"),
    "getstatusoutput signal": lambda module: module.getstatusoutput("kill -TERM $$"),
    "list2cmdline": lambda module: module.list2cmdline(["a b", 'c"d']),
}


@pytest.mark.parametrize("call", CALLS)
def test_call_is_the_stdlibs(call):
    same(CALLS[call])


def test_run_lets_others_run(gate):
    runner = parked(functools.partial(subprocess.run, f"echo one; {gate.wait}; echo two; exit 7", shell=True, capture_output=True))
    gate.open()
    done = result_of(runner)
    assert (done.stdout, done.stderr, done.returncode) == (b"one\ntwo\n", b"", 7)


def test_run_killed(gate):
    """As the stdlib's when it is interrupted: the child is killed and collected."""
    runner = parked(functools.partial(subprocess.run, ["sleep", "100"], stdout=PIPE))
    runner.kill()
    assert has_no_child()


# ---- arguments ---------------------------------------------------------------------------------------------------------------

REPORT = """
    pwd -P
    umask
    ps -o pid=,pgid=,sid= -p $$ | tr -s ' ' | sed s/$$/PID/g
    id
    env | grep ^COOPOS_T
    for fd in /proc/$$/fd/*; do echo ${fd##*/}; done
"""
ARGUMENTS = {
    "nothing": {},
    "cwd": {"cwd": "/tmp"},
    "env": {"env": {"COOPOS_TEST": "x", "PATH": os.environ["PATH"]}},
    "umask": {"umask": 0o27},
    "start_new_session": {"start_new_session": True},
    "close_fds": {"close_fds": False},
    "restore_signals": {"restore_signals": False},
    "executable": {"executable": "/bin/sh"},
    "preexec_fn": {"preexec_fn": lambda: os.chdir("/usr")},
}
if sys.version_info >= (3, 11):
    ARGUMENTS["process_group"] = {"process_group": 0}
if is_root:
    ARGUMENTS |= {
        "user": {"user": 65534},
        "group": {"group": 65534},
        "extra_groups": {"extra_groups": [65534, 1]},
    }


@needs_proc
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_do_what_they_do_for_the_stdlib(arguments):
    def report(module):
        return module.run(["sh", "-c", REPORT], capture_output=True, text=True, **ARGUMENTS[arguments]).stdout

    assert len(same(report)) > 20


def test_pass_fds():
    reader, writer = os.pipe()
    with closing(reader, writer):
        os.write(writer, b"data")
        assert subprocess.run(["sh", "-c", f"head -c 4 < /dev/fd/{reader}"], pass_fds=[reader], stdout=PIPE).stdout == b"data"
        assert subprocess.run(["sh", "-c", f"test -e /dev/fd/{reader}"]).returncode == 1


WRONG = {
    "no such program": (["/nonexistent/program"], {}),
    "no such program on the path": (["nonexistent-program"], {}),
    "no program": (["/etc/passwd"], {}),
    "directory": (["/tmp"], {}),
    "cwd": (["true"], {"cwd": "/nonexistent"}),
    "null": (["true\0"], {}),
    "null in an argument": (["true", "a\0b"], {}),
    "environment": (["true"], {"env": {"a=b": "c"}}),
    "empty": ([], {}),
    "argument of another type": (["true", 1], {}),
    "args of another type": (1, {}),
    "bufsize": (["true"], {"bufsize": "1"}),
    "pipesize": (["true"], {"pipesize": "1"}),
    "stdout": (["true"], {"stdout": STDOUT}),
    "stdin of another type": (["true"], {"stdin": "file"}),
    "user": (["true"], {"user": -5}),
    "user of another type": (["true"], {"user": 1.5}),
    "user that is none": (["true"], {"user": "no-such-user-here"}),
    "extra_groups": (["true"], {"extra_groups": "str"}),
    "encoding": (["true"], {"encoding": "no-such-encoding", "stdout": PIPE}),
    "text and universal_newlines": (["true"], {"text": True, "universal_newlines": False}),
    "too long": (["true", "x" * 200_000], {}),
    "preexec_fn": (["true"], {"preexec_fn": lambda: 1 / 0}),
    "preexec_fn that is none": (["true"], {"preexec_fn": 1}),
    "keyword": (["true"], {"no_such_argument": 1}),
    "path-like in a shell": (functools.partial, {"shell": True}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    """The stdlib's exception, and no child and no descriptor is left."""
    args, kwargs = WRONG[wrong]

    def start(module):
        with module.Popen(args, **kwargs) as process:
            return process.wait()

    result = same(start)
    assert not isinstance(result, int)


@pytest.mark.smoke
def test_preexec_fn_that_takes_its_time(gate):
    """It runs in a fork, for which others need not wait."""
    fifo = os.open(gate.wait.split()[-1], os.O_RDWR)
    with closing(fifo):
        starter = parked(functools.partial(sh, "exit 7", preexec_fn=lambda: os.read(fifo, 1)))
        gate.open()
        assert result_of(starter).wait() == 7


def test_preexec_fn_killed(gate):
    """No child is left of a greenlet that was killed before it had its Popen."""
    fifo = os.open(gate.wait.split()[-1], os.O_RDWR)
    before = open_fds()
    with closing(fifo):
        parked(functools.partial(sh, "exec sleep 100", preexec_fn=lambda: os.read(fifo, 1), stdout=PIPE)).kill()
        until(has_no_child)
        gc.collect()
        assert open_fds() == before


def test_popen_does_not_switch():
    """A child is no sooner there than its Popen: nobody can be killed in between."""
    turns = []

    def turn():
        while True:
            turns.append(1)
            gevent.sleep(0)

    ticker = gevent.spawn(turn)
    gevent.sleep(0)
    turns.clear()
    processes = [sh("exit 0", close_fds=n % 2, stdin=PIPE if n % 3 else None) for n in range(50)]
    assert not turns
    ticker.kill()
    for process in processes:
        with process:
            assert process.wait() == 0


def test_popen_in_a_forked_child():
    """A child of a fork has subprocesses of its own, and none of its parent's."""
    run_script("""
        import os, gevent, coopos
        from coopos import subprocess
        theirs = subprocess.Popen(["sh", "-c", "read line; exit 7"], stdin=subprocess.PIPE)
        for keeps in (True, False):
            pid = coopos.fork_gevent(keep_greenlets=keeps)
            if pid == 0:
                assert subprocess.check_output(["echo", "out"]) == b"out\\n"
                theirs.kill()         # is not sent, and no error
                process = subprocess.Popen(["sh", "-c", "exit 3"])
                assert gevent.wait([process]) == [process] and process.returncode == 3
                os._exit(5)
            assert coopos.waitpid(pid, 0) == (pid, 5 << 8)
        theirs.stdin.close()
        assert theirs.wait() == 7
    """)


# ---- signals -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "signum"), [("terminate", signal.SIGTERM), ("kill", signal.SIGKILL)])
def test_terminate_and_kill(method, signum):
    process = subprocess.Popen(["sleep", "100"])
    getattr(process, method)()
    assert process.wait() == -signum
    assert getattr(process, method)() is None


def test_send_signal(gate):
    process = sh(f"trap 'exit 7' USR1; echo; {gate.wait}; {gate.wait}", stdout=PIPE)
    with process:
        process.stdout.readline()
        process.send_signal(0)
        process.send_signal(signal.SIGUSR1)
        assert process.wait() == 7


def test_send_signal_wrong():
    process = subprocess.Popen(["sleep", "100"])
    assert error_of(process.send_signal, 1000) == error_of(os.kill, process.pid, 1000) == (OSError, errno.EINVAL)
    assert error_of(process.send_signal, "TERM")[0] is TypeError
    process.kill()
    process.wait()


def test_signal_to_a_child_that_has_ended(monkeypatch):
    """None is sent, whoever has its pid by now: it is asked for by its pidfd, or was not collected yet."""

    def refuse(*args):
        raise AssertionError("os.kill was called")

    monkeypatch.setattr(os, "kill", refuse)
    process = sh("exit 7")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    process.kill()
    assert process.returncode == 7
    process = sh("exit 7")
    os.waitpid(process.pid, 0)
    with contextlib.suppress(ChildProcessError):  # where the status is lost
        process.terminate()


@needs_pidfds
@pytest.mark.skipif(not os.access("/proc/sys/kernel/ns_last_pid", os.W_OK), reason="may not choose pids")
def test_signal_after_the_pid_is_used_again():
    """The process that has got it lives on."""
    run_script("""
        import os, signal
        from coopos import subprocess
        process = subprocess.Popen(["sh", "-c", "exit 7"])
        os.waitpid(process.pid, 0)
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(process.pid - 1))
        other = os.posix_spawn("/bin/sleep", ["sleep", "100"], os.environ)
        assert other == process.pid
        try:
            process.kill()
        except ChildProcessError:
            pass
        assert os.waitpid(other, os.WNOHANG) == (0, 0), "it was killed"
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    """, under=["unshare", "--fork", "--pid", "--mount-proc"])


@pytest.mark.skipif(not os.access("/proc/sys/kernel/ns_last_pid", os.W_OK), reason="may not choose pids")
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("call", ["process.poll()", "process.wait()", "process.kill()", "process.communicate()", "del process"])
def test_popen_of_the_parent_in_a_child_that_has_a_child_of_that_pid(call, keep):
    """The child's own child is nobody's but its own."""
    run_script(f"""
        import os, time, gevent, coopos
        from coopos import subprocess

        process = subprocess.Popen(["sleep", "0.1"])
        reader, writer = os.pipe()
        child = coopos.fork(keep_greenlets={keep})
        if child == 0:
            os.read(reader, 1)     # the parent has waited for it
            with open("/proc/sys/kernel/ns_last_pid", "w") as file:
                file.write(str(process.pid - 1))
            other = os.fork()
            if other == 0:
                os._exit(7)
            assert other == process.pid
            os.waitid(os.P_PID, other, os.WEXITED | os.WNOWAIT)
            try:
                with gevent.Timeout(5):
                    {call}
            except ChildProcessError:
                pass
            assert os.waitpid(other, 0) == (other, 7 << 8)
            os._exit(0)
        process.wait()
        os.write(writer, b"x")
        assert coopos.waitpid(child, 0) == (child, 0)
    """, under=["unshare", "--fork", "--pid", "--mount-proc"], may_complain=call == "del process")


def test_popen_of_the_parent_tells_nobody_in_a_forked_child():
    """What was given to rawlink() is the parent's; and no child is said to have ended, also where SIGCHLD is ignored."""
    run_script("""
        import os, signal, gevent, coopos
        from coopos import subprocess

        told = []
        processes = [subprocess.Popen(["sleep", "100"]) for _ in range(2)]
        processes[0].rawlink(told.append)
        child = coopos.fork(keep_greenlets=False)
        if child == 0:
            for process in processes:
                try:
                    process.poll()
                except ChildProcessError as ex:
                    assert "the process that has forked this one" in str(ex)
                else:
                    os._exit(2)
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            gevent.sleep(0.01)
            os._exit(3 if told else 0)
        assert coopos.waitpid(child, 0) == (child, 0)
        for process in processes:
            assert process.poll() is None
            process.kill()
            process.wait()
        gevent.sleep(0.01)
        assert told == processes[:1]
    """)


# ---- what is left ------------------------------------------------------------------------------------------------------------


def test_popen_that_is_dropped_while_it_runs(gate):
    """It is warned of, closes its files, and leaves no zombie when it ends."""
    before = open_fds()
    process = sh(gate.wait, stdout=PIPE, bufsize=0)
    pid = process.pid
    with pytest.warns(ResourceWarning) as warned:  # noqa: PT031
        del process
        gc.collect()
        assert f"subprocess {pid} is still running" in [str(warning.message) for warning in warned]
        warned.clear()  # it has the Popen
        gc.collect()
    assert {fd for fd in open_fds().keys() - before.keys() if "pipe" in open_fds()[fd]} == set()
    gate.open()
    until(has_no_child)


def test_popen_that_is_dropped_when_it_has_ended():
    process = sh("exit 7")
    gevent.wait([process])
    assert process.returncode == 7
    del process
    turn_loop()  # gevent.wait() keeps it for as long
    gc.collect()
    assert error_of(coopos.waitpid, -1, os.WNOHANG) == no_child


def test_popens_that_are_dropped_in_threads_that_are_gone():
    """The next Popen collects their children, which the threads' hubs can't."""
    run_script("""
        import os, threading, time, warnings
        from coopos import subprocess
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(5):
            thread = threading.Thread(target=lambda: subprocess.Popen(["sleep", "0.01"]) and None)
            thread.start()
            thread.join()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            subprocess.run(["true"])
            try:
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
        else:
            raise AssertionError("zombies are left")
    """)


def test_popens_that_are_dropped_while_others_are_swept(monkeypatch):
    """By another thread, or by the garbage collector: they are in the next sweep."""

    class Child:
        def __init__(self, meanwhile):
            self.meanwhile = meanwhile

        def collect_for_nobody(self):
            dropped.update(self.meanwhile)
            return True

    late = Child([])
    dropped = {Child([late])}
    monkeypatch.setattr(subprocess, "_dropped", dropped)
    subprocess.run(["true"])
    assert dropped == {late}
    subprocess.run(["true"])
    assert dropped == set()


def test_child_that_can_not_be_watched(monkeypatch):
    """The error comes out, and it is as if there had been no process to be had."""

    def refuse(*args, **kwargs):
        raise BlockingIOError(errno.EAGAIN, "no thread")

    monkeypatch.setattr(subprocess._core, "watch_new", refuse)
    before = open_fds()
    assert error_of(subprocess.Popen, ["sleep", "100"], stdout=PIPE) == (BlockingIOError, errno.EAGAIN)
    assert has_no_child()
    gc.collect()
    assert open_fds() == before


def test_with_block_closes_and_waits(gate):
    with sh(f"{gate.wait}; exit 7", stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        gate.open()
    assert process.returncode == 7
    assert all(file.closed for file in (process.stdin, process.stdout, process.stderr))


def test_failed_start_leaves_nothing():
    before = open_fds()
    for _ in range(3):
        assert error_of(subprocess.Popen, ["true"], pty=True, encoding="no-such-encoding")[0] is LookupError
        assert error_of(subprocess.Popen, ["/nonexistent"], stdin=PIPE, stdout=PIPE, stderr=PIPE)[1] == errno.ENOENT
        assert error_of(subprocess.Popen, ["/nonexistent"], pty=True)[1] == errno.ENOENT
    gc.collect()
    assert open_fds() == before
    assert has_no_child()


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


# ---- under patch() -----------------------------------------------------------------------------------------------------------

def test_patched_subprocess():
    """It is ours under both names, and nothing installs a SIGCHLD handler."""
    run_script(PATCHED + """
from coopos import subprocess as ours
assert subprocess.Popen is gevent.subprocess.Popen is ours.Popen
assert subprocess.run(["sh", "-c", "echo out; exit 7"], stdout=subprocess.PIPE).returncode == 7
assert type(subprocess.run(["true"])) is subprocess.CompletedProcess
assert gevent.subprocess.check_output(["echo", "out"]) == b"out\\n"
assert isinstance(subprocess.Popen(["true"]), subprocess.Popen)
assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
with open("/proc/self/status") as file:
    assert not any(int(line.split()[1], 16) & 1 << signal.SIGCHLD - 1 for line in file if line.startswith("SigCgt"))
""", may_complain=True)


def test_patched_run_uses_what_stands_for_popen():
    """A test that puts a mock there sees what run() and its kin do."""
    run_script(PATCHED + """
from unittest import mock
with mock.patch("subprocess.Popen") as popen:
    popen.return_value.__enter__.return_value.communicate.return_value = b"mocked", None
    popen.return_value.__enter__.return_value.poll.return_value = 0
    assert subprocess.check_output(["nothing"]) == b"mocked"
with mock.patch("subprocess._fork_exec" if hasattr(subprocess, "_fork_exec") else "_posixsubprocess.fork_exec") as fork_exec:
    fork_exec.side_effect = RuntimeError("mocked")
    try:
        subprocess.run(["true"])
    except RuntimeError:
        pass
    else:
        raise AssertionError("it was not called")
""")


def test_patched_popen_of_gevents_that_was_imported_before():
    run_script("""
from gevent import monkey
monkey.patch_all()
from subprocess import Popen, run, check_output
import coopos, signal
coopos.patch()
assert Popen(["sh", "-c", "exit 7"]).wait() == 7
assert run(["sh", "-c", "exit 7"]).returncode == 7
assert check_output(["echo", "out"]) == b"out\\n"
assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
""", may_complain=True)


def test_a_program_catches_its_own_timeout_inside_communicate():
    """In a method that overrides one of Popen's, and which communicate() calls."""

    class Patient(subprocess.Popen):
        timeouts = 0

        def wait(self, timeout=None):
            reader, writer = os.pipe()
            with closing(reader, writer):
                try:
                    with gevent.Timeout(0.001, TimeoutError):
                        coopos.read(reader, 1)
                except TimeoutError:
                    self.timeouts += 1
            return super().wait(timeout)

    with Patient(["echo", "out"], stdout=PIPE) as popen:
        assert popen.communicate() == (b"out\n", None)
    assert popen.timeouts
