"""How coopos watches children: by pidfds and without, beside others who wait for them, under pids that are used again."""

import errno
import functools
import os
import signal
import subprocess
import threading

import gevent
import gevent.signal
import pytest
from gevent.hub import get_hub

import coopos

from ..helpers.children import (
    ENDED_THREAD,
    FORK_LIVING,
    OWN_GROUP,
    STATUS,
    TELLS_REAPED_STATUS,
    both_spawns,
    dead_child,
    living_child,
    may_choose_pids,
    needs_pidfds,
    needs_proc,
    needs_reaped_status,
    no_child,
    question_about,
    run_used_pid,
    spawn_sh,
    start,
    until_dead,
    waited_child,
)
from ..helpers.support import DEADLINE_S, HubThread, error_of, parked, result_of, run_script, run_seccomp, turn_loop, until

# ---- watching ----------------------------------------------------------------------------------------------------------------


def test_fork_and_watch_dead_child():
    """A child that was dead before it was watched is noticed: the callback is called, the status is kept."""
    ended = []
    pid = coopos.fork_and_watch(ended.append, fork=functools.partial(dead_child, os.posix_spawn))
    assert not ended
    until(lambda: ended)
    assert [child.rpid for child in ended] == [pid]
    assert coopos.waitpid(pid, 0) == (pid, STATUS)


def test_fork_and_watch_callback():
    """The callback gets, once and in the hub, an object like gevent's child watchers."""
    seen = []

    def callback(child):
        child.stop()
        child.close()
        seen.append((gevent.getcurrent() is get_hub(), child.pid, child.rpid, child.rstatus, child.loop is get_hub().loop))

    with living_child(watch={"callback": callback}) as (pid, end):
        turn_loop()
        assert not seen
        end()
        until(lambda: seen)
        turn_loop()
    assert seen == [(True, pid, pid, STATUS, True)]
    assert coopos.waitpid(pid, 0) == (pid, STATUS)
    turn_loop()
    assert len(seen) == 1


@pytest.mark.parametrize("question", ["pid", "any", "group"])
@pytest.mark.parametrize("state", ["parked", "dead"])
def test_fork_and_watch_callback_of_a_child_that_is_waited_for(question, state):
    """The callback is called once, in the hub, also where a waitpid was quicker."""
    calls = []

    def callback(child):
        calls.append((gevent.getcurrent() is get_hub(), child.rpid, child.rstatus))

    with living_child(watch={"callback": callback}, **OWN_GROUP) as (pid, end):
        if state == "parked":
            waiter = parked(coopos.waitpid, question_about(pid, question), 0)
            end()
            assert result_of(waiter) == (pid, STATUS)
        else:
            end()
            until_dead(pid)
            assert coopos.waitpid(question_about(pid, question), 0) == (pid, STATUS)
        until(lambda: calls)
        turn_loop()
    assert calls == [(True, pid, STATUS)]


def test_fork_and_watch_callback_may_wait_for_its_child():
    """waitpid in the callback returns the status that the callback is about."""
    statuses = []
    pid = start(os.posix_spawn, "exit 7", {"callback": lambda child: statuses.append(coopos.waitpid(child.pid, os.WNOHANG))})
    until(lambda: statuses)
    assert statuses == [(pid, STATUS)]


def test_fork_and_watch_callback_may_start_the_next():
    """A callback that starts a watched child, as a supervisor does, gets its end too."""
    pids = []

    def restart(child=None):
        if len(pids) < 5:
            pids.append(start(os.posix_spawn, "exit 7", {"callback": restart}))
        else:
            pids.append(None)

    restart()
    until(lambda: pids[-1] is None)
    assert [coopos.waitpid(pid, 0) for pid in pids[:-1]] == [(pid, STATUS) for pid in pids[:-1]]


@pytest.mark.parametrize("error", [ValueError, gevent.GreenletExit], ids=lambda error: error.__name__)
def test_fork_and_watch_callback_that_raises(monkeypatch, error):
    """The hub reports it with the child as the context; other children and the status are not affected."""
    reported, ended = [], []
    monkeypatch.setattr(get_hub(), "handle_error", lambda context, *exc_info: reported.append((context, exc_info[0])))

    def callback(child):
        raise error

    pids = [start(os.posix_spawn, "exit 7", {"callback": each}) for each in (callback, ended.append, callback)]
    for pid in pids:
        until_dead(pid)
    until(lambda: len(reported) == 2 and ended)
    assert sorted(context.pid for context, _ in reported) == [pids[0], pids[2]]
    assert {kind for _, kind in reported} == {error}
    for pid in pids:
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


@pytest.mark.parametrize("fork", [coopos.fork_and_watch, coopos.forkpty_and_watch, coopos.fork, coopos.forkpty])
@pytest.mark.parametrize("callback", [5, "f"])
def test_fork_and_watch_wrong_callback(fork, callback):
    """TypeError, before anything is forked."""
    with pytest.raises(TypeError, match="callback"):
        fork(callback)


def test_fork_and_watch_wrong_loop():
    """An object that is no loop is refused before anything is forked."""
    forked = []

    def fork():
        forked.append(spawn_sh(os.posix_spawn, "exit 7"))
        return forked[0]

    try:
        with pytest.raises((TypeError, AttributeError)):
            coopos.fork_and_watch(loop=5, fork=fork)
    finally:
        for pid in forked:
            os.waitpid(pid, 0)
    assert not forked


def test_fork_and_watch_fork_that_fails():
    """What the forking function raises comes out, and nothing is watched."""

    def fork():
        raise BlockingIOError(errno.EAGAIN, "no")

    assert error_of(coopos.fork_and_watch, None, fork=fork) == (BlockingIOError, errno.EAGAIN)


def test_fork_and_watch_other_hubs_loop():
    """The callback runs in the hub of the given loop, in its thread, although that hub is asleep."""
    with HubThread() as thread:
        seen = threading.Event()
        calls = []

        def callback(child):
            calls.append((threading.current_thread(), gevent.getcurrent() is get_hub(), child.rpid, child.rstatus))
            seen.set()

        loop = thread.call(lambda: get_hub().loop)
        with living_child(watch={"callback": callback, "loop": loop}) as (pid, end):
            end()
            assert seen.wait(DEADLINE_S)
        assert calls == [(thread._thread, True, pid, STATUS)]
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


def test_gevent_signal_handlers():
    """A SIGCHLD handler set through gevent.signal runs for each watched child, in a greenlet, and gets the signal's number."""
    calls = []
    before = gevent.signal.signal(signal.SIGCHLD, lambda number, frame: calls.append((number, frame, coopos.waitpid(-1, 0))))
    try:
        for count in range(1, 4):
            pid = spawn_sh(coopos.posix_spawn, "exit 7")
            until(lambda count=count: len(calls) == count)
            assert calls[-1] == (signal.SIGCHLD, None, (pid, STATUS))
    finally:
        gevent.signal.signal(signal.SIGCHLD, before)


def test_gevent_signal_handlers_of_a_child_that_is_waited_for():
    """The handler runs also where a waitpid was quicker than the hub."""
    calls = []
    before = gevent.signal.signal(signal.SIGCHLD, lambda number, frame: calls.append(number))
    try:
        pid = dead_child()
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
        until(lambda: calls)
    finally:
        gevent.signal.signal(signal.SIGCHLD, before)


def test_gevent_signal_handlers_of_a_child_of_another_hub():
    """A handler runs in its own hub, whichever hub has learned of the child."""
    hubs = []
    handler = gevent.signal_handler(signal.SIGCHLD, lambda: hubs.append(get_hub()))
    try:
        with HubThread() as thread:
            pid = thread.call(spawn_sh, coopos.posix_spawn, "exit 7")
            until(lambda: hubs)
            assert thread.call(coopos.waitpid, pid, 0) == (pid, STATUS)
    finally:
        handler.cancel()
    assert set(hubs) == {get_hub()}


def test_gevent_signal_handler_that_another_has_cancelled():
    """It isn't called, not even for the child for which the other was; and nothing is reported."""
    run_script("""
        import os, signal, gevent, coopos
        called = []
        handlers = []

        def cancel_all(name):
            called.append(name)
            for handler in handlers:
                handler.cancel()

        handlers += [gevent.signal_handler(signal.SIGCHLD, cancel_all, name) for name in "ab"]
        for _ in range(2):
            pid = coopos.fork()
            if pid == 0:
                os._exit(0)
            assert coopos.waitpid(pid, 0) == (pid, 0)
            gevent.sleep(0.01)
        assert len(called) == 1, called
    """)


def test_gevent_signal_handlers_after_a_thread_has_ended():
    """A thread that ended with a report still to be made doesn't keep the reports of others back."""
    run_script(
        ENDED_THREAD
        + """
import signal, gevent.signal

def dead_and_waited():
    pid, writer = fork_living()
    os.close(writer)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert coopos.waitpid(pid, 0) == (pid, 7 << 8)

calls = []
gevent.signal.signal(signal.SIGCHLD, lambda number, frame: calls.append(number))
in_a_thread(dead_and_waited)
calls.clear()
dead_and_waited()
gevent.sleep(0)
gevent.idle()
assert calls == [signal.SIGCHLD]
"""
    )


# ---- other parties -----------------------------------------------------------------------------------------------------------


def test_waitpid_child_of_subprocess():
    """A child of the standard library's Popen is waited for cooperatively, and Popen copes with that."""
    with subprocess.Popen(["/bin/sh", "-c", "read line; exit 7"], stdin=subprocess.PIPE) as process:
        waiter = parked(coopos.waitpid, process.pid, 0)
        process.stdin.close()
        assert result_of(waiter) == (process.pid, STATUS)


def test_subprocess_gets_its_own_child():
    """Whoever starts a child and waits for it himself gets its status, however many coopos waits for meanwhile."""
    with subprocess.Popen(["/bin/sh", "-c", "read line; exit 7"], stdin=subprocess.PIPE) as process:
        for _ in range(50):
            waited_child()
        process.stdin.close()
        until_dead(process.pid)
        turn_loop()
        assert process.wait(DEADLINE_S) == 7


@needs_reaped_status
@pytest.mark.parametrize("state", ["parked", "unasked"])
def test_waitpid_stolen_child(state):
    """Somebody else in the process reaps our child first: the kernel still tells its status."""
    ended = []
    with living_child(watch={"callback": ended.append}) as (pid, end):
        waiter = parked(coopos.waitpid, pid, 0) if state == "parked" else None
        end()
        assert os.waitpid(pid, 0) == (pid, STATUS)
        assert (result_of(waiter) if waiter else coopos.waitpid(pid, 0)) == (pid, STATUS)
        until(lambda: ended)
        assert (ended[0].rpid, ended[0].rstatus) == (pid, STATUS)


@needs_reaped_status
def test_waitpid_child_stolen_by_a_thread_that_waits_for_any():
    """The thief may be a plain thread that stands in waitpid(-1) itself."""
    stolen = []
    with living_child() as (pid, end):
        waiter = parked(coopos.waitpid, pid, 0)
        thief = threading.Thread(target=lambda: stolen.append(error_of(os.waitpid, -1, 0)))
        thief.start()
        end()
        assert result_of(waiter) == (pid, STATUS)
        thief.join(DEADLINE_S)
        assert stolen in ([(None, (pid, STATUS))], [no_child])  # whichever was quicker


@needs_reaped_status
def test_waitpid_stolen_unwatched_child():
    """It is no different for a child that was only being waited for."""
    with living_child(os.posix_spawn) as (pid, end):
        waiter = parked(coopos.waitpid, pid, 0)
        end()
        assert os.waitpid(pid, 0) == (pid, STATUS)
        assert result_of(waiter) == (pid, STATUS)


@both_spawns
@pytest.mark.parametrize(("question", "options"), [("pid", 0), ("any", 0), ("pid", os.WUNTRACED), ("own group", os.WCONTINUED)])
def test_waitpid_stolen_child_never_hangs(spawn, question, options):
    """Whatever was asked and however the kernel is asked: the status, or ChildProcessError."""
    with living_child(spawn) as (pid, end):
        waiter = parked(error_of, coopos.waitpid, question_about(pid, question), options)
        end()
        assert os.waitpid(pid, 0) == (pid, STATUS)
        assert result_of(waiter) in [no_child, (None, (pid, STATUS))]
        assert error_of(coopos.waitpid, pid, os.WNOHANG) in [no_child, (None, (pid, STATUS))]


@needs_proc
def test_waitpid_leaves_sigchld_alone():
    """Neither watching nor waiting, of any kind, changes what the process does about SIGCHLD."""
    run_script("""
        import os, signal, gevent, coopos

        def about_sigchld():
            with open("/proc/self/status") as status:
                fields = dict(line.split(":", 1) for line in status)
            masks = [int(fields[name], 16) for name in ("SigCgt", "SigIgn", "SigBlk")]
            return [bool(mask & 1 << signal.SIGCHLD - 1) for mask in masks]

        gevent.sleep(0)
        before = about_sigchld()
        assert before == [False, False, False]
        for kind in (lambda pid: pid, lambda pid: -1, lambda pid: 0):
            for fork in (coopos.fork, coopos.fork_gevent, lambda: coopos.forkpty()[0]):
                pid = fork()
                if pid == 0:
                    gevent.sleep(0)
                    assert about_sigchld() == before
                    os._exit(7)
                assert about_sigchld() == before
                coopos.waitpid(kind(pid) or pid, os.WUNTRACED)
                assert about_sigchld() == before
    """)


def test_signal_handler_of_the_user():
    """A handler that the program set with signal.signal runs, and takes nothing away."""
    run_script("""
        import os, signal, gevent, coopos
        calls = []
        signal.signal(signal.SIGCHLD, lambda *args: calls.append(args[0]))
        for _ in range(3):
            pid = coopos.fork()
            if pid == 0:
                os._exit(7)
            assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
            while not calls:
                gevent.sleep(0)
            calls.clear()
        assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL
    """)


@pytest.mark.parametrize("question", ["pid", "-1"])
@pytest.mark.parametrize("watched", [True, False], ids=["watched", "unwatched"])
def test_waitpid_while_sigchld_is_ignored(question, watched):
    """The kernel reaps each child itself: its status where the kernel tells it, else ChildProcessError; never a hang."""
    run_script(
        f"""
        import os, signal, gevent, coopos
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        reader, writer = os.pipe()
        pid = (coopos.fork if {watched} else coopos.fork_gevent)()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(7)
        gevent.spawn(os.close, writer)
        try:
            answer = coopos.waitpid({question}, 0)
        except ChildProcessError:
            assert not {TELLS_REAPED_STATUS and question == "pid"}
        else:
            assert answer == (pid, 7 << 8)
            assert {TELLS_REAPED_STATUS}
        """
    )


# ---- where there is no pidfd -------------------------------------------------------------------------------------------------

FALLBACK = """
from gevent.hub import get_hub

for fork in (coopos.fork, coopos.fork_gevent):
    pid, writer = fork_living(fork)
    waiters = [gevent.spawn(coopos.waitpid, pid, 0)]
    gevent.sleep(0)
    assert not waiters[0].ready()
    os.close(writer)
    assert waiters[0].get(timeout=30) == (pid, 7 << 8)
    try:
        coopos.waitpid(pid, 0)
    except ChildProcessError:
        pass
    else:
        raise AssertionError("told twice")
"""


def run_refused(source, **kwargs):
    return run_seccomp(source.replace("FALLBACK", FORK_LIVING + FALLBACK), **kwargs)


@needs_pidfds
@pytest.mark.parametrize("err", ["ENOSYS", "EPERM", "EMFILE", "ENFILE", "ENODEV"])
def test_pidfd_open_refused(err):
    """Where the kernel or a sandbox refuses pidfds, a thread waits instead; the doctor counts that, and nobody else is told."""
    run_refused(f"""
refuse("pidfd_open", errno.{err})
try:
    os.pidfd_open(os.getpid())
except OSError as ex:
    assert ex.errno == errno.{err}
else:
    raise AssertionError("not refused")
FALLBACK
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()) as report:
    coopos.doctor()
counted = coopos._core.count_refusals()
assert list(counted) == [errno.{err}] and counted[errno.{err}] >= 4, counted
assert f"pidfds refused in this process: {err} {{counted[errno.{err}]}} times" in report.getvalue(), report.getvalue()
""")


@needs_pidfds
def test_waitid_without_p_pidfd():
    """A kernel that has pidfds and can't collect by them (5.3) is asked by the pid."""
    run_refused("""
refuse("waitid", errno.EINVAL, 0, 3)
try:
    os.waitid(os.P_PIDFD, 0, os.WEXITED)
except OSError as ex:
    assert ex.errno == errno.EINVAL
else:
    raise AssertionError("not refused")
FALLBACK
""")


@needs_pidfds
def test_waitpid_stolen_child_on_an_old_kernel():
    """The kernel doesn't tell: ChildProcessError that names patch(); and no status is made up for the callback."""
    run_refused(
        """
import gevent, coopos
refuse("ioctl", errno.ENOTTY, 1, 0xC040FF0B)
ended = []
reader, writer = os.pipe()
pid = coopos.fork_and_watch(ended.append)
if pid == 0:
    os.close(writer)
    os.read(reader, 1)
    os._exit(7)
waiter = gevent.spawn(coopos.waitpid, pid, 0)
gevent.sleep(0)
os.close(writer)
assert os.waitpid(pid, 0) == (pid, 7 << 8)
waiter.join(30)
assert isinstance(waiter.exception, ChildProcessError), waiter
assert waiter.exception.errno == errno.ECHILD
assert "coopos.patch()" in str(waiter.exception) and str(pid) in str(waiter.exception)
while not ended:
    gevent.sleep(0)
try:
    ended[0].rstatus
except ChildProcessError:
    pass
else:
    raise AssertionError("a status was made up")
""",
        may_complain=True,  # the hub reports the greenlet that failed
    )


def test_children_without_pidfds_by_the_environment():
    """COOPOS_CHILDREN=thread uses no pidfd, whatever the kernel has."""
    run_script(
        """
        import contextlib, os, gevent, coopos
        reader, writer = os.pipe()
        pid = coopos.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(7)
        os.close(reader)
        waiter = gevent.spawn(coopos.waitpid, pid, 0)
        gevent.sleep(0)
        for fd in os.listdir("/dev/fd"):
            with contextlib.suppress(OSError):
                assert "pidfd" not in os.readlink(f"/dev/fd/{fd}")
        os.close(writer)
        assert waiter.get() == (pid, 7 << 8)
        """,
        COOPOS_CHILDREN="thread",
    )


@pytest.mark.parametrize("free", [0, 1])
def test_out_of_descriptors(free):
    """With no descriptor left, or just one, a child is watched and waited for all the same, and nobody is told."""
    run_script(f"""
        import os, resource, gevent, coopos
        gevent.sleep(0)
        reader, writer = os.pipe()
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        fds = []
        try:
            while True:
                fds.append(os.dup(0))
        except OSError:
            pass
        for fd in fds[:{free}]:
            os.close(fd)
        for fork in (coopos.fork, coopos.fork_gevent):
            for end in range(2):
                pid = fork()
                if pid == 0:
                    os._exit(7)
                waiter = gevent.spawn(coopos.waitpid, pid, 0)
                assert waiter.get(timeout=30) == (pid, 7 << 8)
                pid = fork()
                if pid == 0:
                    os._exit(7)
                assert coopos.waitpid(-1, 0) == (pid, 7 << 8)
    """)


# ---- pids that are used again ------------------------------------------------------------------------------------------------


@may_choose_pids
@pytest.mark.parametrize("fork", ["coopos.fork", "coopos.fork_gevent", "os.fork"])
def test_waitpid_used_pid(fork):
    """A status that nobody asked for is not told of the next child that gets the same pid, whoever forked it."""
    run_used_pid(f"""
while not ended:
    gevent.sleep(0)
fork_as({fork}, pid, 9)
assert coopos.waitpid(pid, 0) == (pid, 9 << 8)
""")


@may_choose_pids
@pytest.mark.parametrize("fork", ["coopos.fork", "coopos.fork_gevent", "os.fork"])
def test_waitpid_used_pid_of_a_stolen_child(fork):
    """Nor is that of a child which somebody else has collected before the hub could see its end."""
    run_used_pid(f"""
os.waitpid(pid, 0)
fork_as({fork}, pid, 9)
assert coopos.waitpid(pid, 0) == (pid, 9 << 8)
""")


@may_choose_pids
def test_watch_used_pid_of_a_stolen_child():
    """The watch is of the child that has the pid now, and calls its callback with that one's status."""
    run_used_pid("""
os.waitpid(pid, 0)
fork_as(os.fork, pid, 9)
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
told = []
coopos.watch(pid, lambda child: told.append(child.rstatus))
while not told:
    gevent.sleep(0.001)
assert told == [9 << 8], told
assert coopos.waitpid(pid, 0) == (pid, 9 << 8)
""")


@needs_reaped_status
@may_choose_pids
def test_waitpid_any_used_pid_of_a_stolen_child():
    """waitpid(-1) tells the status of the child that has the pid now; the older child's callback hears its own."""
    run_used_pid("""
os.waitpid(pid, 0)
fork_as(os.fork, pid, 9)
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
assert coopos.waitpid(-1, 0) == (pid, 9 << 8)
while not ended:
    gevent.sleep(0.001)
assert [child.rstatus for child in ended] == [1 << 8]
""")


@needs_reaped_status
@may_choose_pids
def test_waitpid_used_pid_of_a_stolen_child_that_others_wait_for():
    """Who waits for the older child gets its status, and whoever asks afterwards that of the child that has the pid now."""
    run_used_pid("""
os.waitpid(pid, 0)
reader, writer = os.pipe()
older = os.fork()
if older == 0:
    os.read(reader, 1)
    os._exit(7)
waiter = gevent.spawn(coopos.waitpid, older, 0)
gevent.sleep(0)
os.write(writer, b"x")
os.waitpid(older, 0)
fork_as(os.fork, older, 9)
assert coopos.waitpid(older, 0) == (older, 9 << 8)
assert waiter.get() == (older, 7 << 8)
""")


@needs_reaped_status
@may_choose_pids
def test_fork_and_watch_used_pid_of_a_stolen_child():
    """Both callbacks are called, each with its own child, and no descriptor is left."""
    run_used_pid("""
import gc
fds = len(os.listdir("/dev/fd"))
os.waitpid(pid, 0)
fork_as(lambda: coopos.fork_and_watch(ended.append), pid, 9)
gc.collect()
while len([child for child in ended if child.pid == pid]) < 2:
    gevent.sleep(0)
assert {child.rstatus for child in ended if child.pid == pid} == {1 << 8, 9 << 8}
assert coopos.waitpid(pid, 0) == (pid, 9 << 8)
gevent.idle()
assert len(os.listdir("/dev/fd")) < fds
""")
