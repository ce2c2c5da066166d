"""coopos.subprocess: who waits for programs, what is thrown in, signals, and what is left."""

import contextlib
import errno
import functools
import gc
import os
import signal
import subprocess as stdlib

import gevent
import pytest

import coopos
from coopos import subprocess

from ..helpers.children import has_no_child, needs_pidfds, needs_reaped_status, no_child
from ..helpers.programs import DEVNULL, MUCH, PIPE, sh
from ..helpers.support import HubThread, clog, error_of, open_fds, parked, result_of, run_script, ticking, turn_loop, until

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


def test_wait_lets_others_run_that_only_looks(gate):
    """With a timeout of 0 or less, too: a greenlet may look again and again."""
    process = sh(gate.wait)
    for timeout in (0, -1):
        turned = gevent.spawn(int)
        for _ in range(5):
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout)
        assert turned.dead
    gate.open()
    assert process.wait() == 0


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


@pytest.mark.parametrize("pipes", [{"stdout": PIPE}, {"stdout": PIPE, "stderr": PIPE}], ids=" ".join)
@pytest.mark.parametrize(
    ("kwargs", "first", "second", "text"),
    [
        ({"encoding": "ascii", "errors": "replace"}, b"line\n\xffabc", b"", "\ufffdabc"),
        ({"encoding": "utf-16"}, "\ufeffline\n".encode("utf-16-be"), "more\n".encode("utf-16-be"), "more\n"),
        ({"text": True}, b"line\nabc\r", b"\ndef", "abc\ndef"),
        ({"encoding": "utf-8"}, b"line\nx\xc3", b"\xa9z", "x\xe9z"),
        ({"encoding": "iso2022_jp"}, "line\n\u3042".encode("iso2022_jp")[:-3], "\u3042\u3044".encode("iso2022_jp")[3:],
         "\u3042\u3042\u3044"),
    ],
)  # fmt: skip
def test_communicate_goes_on_with_the_decoder_of_the_file(gate, tmp_path, kwargs, pipes, first, second, text):
    """What a readline() before it has read ahead counts: a byte order, a shift, half a character or line's end, errors replaced."""
    (tmp_path / "first").write_bytes(first)
    (tmp_path / "second").write_bytes(second)
    process = sh(f"cat {tmp_path}/first; {gate.wait}; cat {tmp_path}/second", **pipes, **kwargs)
    assert process.stdout.readline() == "line\n"
    with pytest.raises(stdlib.TimeoutExpired):
        process.communicate(timeout=0.01)
    gate.open()
    assert process.communicate()[0] == text
    assert process.communicate()[0] == text
    assert process.stdout.closed


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
        while not told:
            gevent.sleep(0.001)
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


def test_popen_that_a_greenlet_drops_that_is_killed_in_communicate():
    """What was thrown in keeps neither it nor its pipes until the garbage collector runs."""
    run_script("""
        import gc, os, warnings, weakref, gevent
        from coopos import subprocess
        def talk():
            process = subprocess.Popen(["sh", "-c", "read line"], stdin=reader, stdout=pipe, stderr=pipe)
            popens.append(weakref.ref(process))
            process.communicate()
        reader, writer = os.pipe()  # the program ends when this one does
        gc.disable()
        warnings.simplefilter("ignore", ResourceWarning)
        pipe, popens = subprocess.PIPE, []
        talking = gevent.spawn(talk)
        gevent.sleep(0.01)
        talking.kill()
        del talking
        gevent.sleep(0)
        assert [popen() for popen in popens] == [None]
    """)


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
