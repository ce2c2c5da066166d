"""watch and wait_exit: a callback, or an answer, when a child has ended."""

import contextlib
import errno
import os
import sys
import threading

import gevent
import pytest
from gevent.hub import get_hub

import coopos

from ..helpers.children import (
    NOBODY,
    OWN_GROUP,
    SOURCES,
    STATUS,
    TELLS_REAPED_STATUS,
    WAITS,
    both_spawns,
    collected_child,
    dead_child,
    ended,
    every_source,
    living_child,
    needs_linux,
    needs_p_pidfd,
    needs_pidfds,
    no_child,
    spawn_sh,
    until_dead,
    waited_child,
)
from ..helpers.support import DEADLINE_S, HubThread, error_of, make_pipe, open_fds, parked, result_of, run_script, turn_loop, until

#: One for each way in which the news comes.
SOME_WAITS = ["wait3", "wait4", "wait4 group", "waitid stops"]


# ---- watch -------------------------------------------------------------------------------------------------------------------


def test_watch_living_child():
    """The callback is called in the hub, once, with what watch() returned; the status stays for waitpid."""
    calls = []

    def callback(child):
        calls.append((gevent.getcurrent() is get_hub(), child, child.pid, child.rpid, child.rstatus))

    with living_child(os.posix_spawn) as (pid, end):
        watched = coopos.watch(pid, callback)
        assert (watched.pid, watched.rpid, watched.ref, watched.loop, watched.callback) == (pid, 0, False, get_hub().loop, callback)
        turn_loop()
        assert not calls
        end()
        until(lambda: calls)
        turn_loop()
        assert calls == [(True, watched, pid, pid, STATUS)]
        assert (watched.rpid, watched.rstatus) == (pid, STATUS)
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
        assert error_of(coopos.watch, pid, callback) == no_child


def test_watch_dead_child():
    """The callback is called in the loop's next turn, never before watch() has returned."""
    calls = []
    pid = dead_child(os.posix_spawn)
    other = gevent.spawn(int)
    coopos.watch(pid, calls.append)
    assert not calls and not other.ready()
    turn_loop()
    until(lambda: calls)
    assert [child.rstatus for child in calls] == [STATUS]
    assert coopos.wait4(pid, 0)[:2] == (pid, STATUS)
    other.join()


def test_watch_without_callback():
    """The child is collected when it ends, though nobody asks, and the status kept."""
    pid = dead_child(os.posix_spawn)
    watched = coopos.watch(pid)
    until(lambda: watched.rpid)
    assert error_of(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOHANG) == no_child
    assert coopos.waitpid(pid, 0) == (pid, STATUS)


def test_watch_collected_child():
    """A child whose status nobody has asked for may still be watched: the callback is called in the loop's next turn."""
    calls = []
    pid = collected_child()
    coopos.watch(pid, calls.append)
    coopos.watch(pid, calls.append)
    assert not calls
    until(lambda: len(calls) == 2)
    assert coopos.waitpid(pid, 0) == (pid, STATUS)
    turn_loop()
    assert [child.rstatus for child in calls] == [STATUS] * 2


@both_spawns
@pytest.mark.parametrize("state", ["living", "dead"])
def test_watch_twice(spawn, state):
    """Each callback is called once, in the order in which they came."""
    calls = []
    with living_child(spawn) as (pid, end):
        if state == "dead":
            end()
            until_dead(pid)
        children = [coopos.watch(pid, lambda child, n=n: calls.append((n, child.rstatus))) for n in range(3)]
        assert len(set(children)) == 1
        end()
        until(lambda: len(calls) == 3)
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
    turn_loop()
    assert calls == [(n, STATUS) for n in range(3)]


def test_watch_same_callback_twice():
    """It is called twice."""
    calls = []
    with living_child(os.posix_spawn) as (pid, end):
        coopos.watch(pid, calls.append)
        coopos.watch(pid, calls.append)
        end()
        until(lambda: len(calls) == 2)
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


def test_watch_from_the_callback():
    """A callback that watches the same child again is followed by the next one's call, in another turn."""
    calls = []

    def callback(child):
        calls.append("first")
        coopos.watch(child.pid, lambda child: calls.append("second"))
        assert calls == ["first"]

    pid = dead_child(os.posix_spawn)
    coopos.watch(pid, callback)
    until(lambda: len(calls) == 2)
    assert calls == ["first", "second"]
    assert coopos.waitpid(pid, 0) == (pid, STATUS)


@both_spawns
@pytest.mark.parametrize("wait", [WAITS[name] for name in SOME_WAITS], ids=SOME_WAITS)
@pytest.mark.parametrize("first", ["watch", "wait"])
def test_watch_child_that_is_waited_for(wait, spawn, first):
    """Who waits gets the status, and the callback is called all the same."""
    calls = []
    with living_child(spawn, **OWN_GROUP) as (pid, end):
        if first == "watch":
            coopos.watch(pid, calls.append)
        waiter = parked(wait, pid)
        if first == "wait":
            coopos.watch(pid, calls.append)
        end()
        assert ended(result_of(waiter)) == (pid, STATUS)
        until(lambda: calls)
        turn_loop()
    assert [(child.rpid, child.rstatus) for child in calls] == [(pid, STATUS)]


def test_watch_child_whose_waiter_is_killed():
    """The watch outlives the wait."""
    calls = []
    with living_child(os.posix_spawn) as (pid, end):
        waiter = parked(coopos.waitpid, pid, 0)
        coopos.watch(pid, calls.append)
        waiter.kill()
        end()
        until(lambda: calls)
        assert [child.rstatus for child in calls] == [STATUS]
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


@pytest.mark.parametrize("error", [ValueError, OSError, gevent.GreenletExit], ids=lambda error: error.__name__)
def test_watch_callback_that_raises(monkeypatch, error):
    """The hub reports it; the other callbacks, the other children and who waits are not affected."""
    reported, calls = [], []
    monkeypatch.setattr(get_hub(), "handle_error", lambda context, *exc_info: reported.append((context, exc_info[0])))

    def callback(child):
        raise error

    with living_child(os.posix_spawn) as (pid, end):
        for each in (calls.append, callback, calls.append):
            watched = coopos.watch(pid, each)
        waiter = parked(coopos.waitpid, pid, 0)
        end()
        assert result_of(waiter) == (pid, STATUS)
        assert calls == [watched] * 2
        assert reported == [(watched, error)]


@pytest.mark.parametrize("state", ["living", "dead", "collected"])
@pytest.mark.parametrize("ref", [False, True])
def test_watch_other_hubs_loop(state, ref):
    """The callback runs in the hub of the given loop, in its thread; those of other loops in theirs."""
    with HubThread() as thread:
        seen, calls = threading.Event(), []

        def callback(child):
            calls.append((threading.current_thread(), gevent.getcurrent() is get_hub(), child.rpid, child.rstatus))
            if threading.current_thread() is there:
                seen.set()

        loop, there = thread.call(lambda: (get_hub().loop, threading.current_thread()))
        with living_child(coopos.posix_spawn if state == "collected" else os.posix_spawn) as (pid, end):
            if state != "living":
                end()
                until_dead(pid)
            if state == "collected":
                turn_loop()
            coopos.watch(pid, callback, loop, ref)
            coopos.watch(pid, callback)
            end()
            assert seen.wait(DEADLINE_S)  # standing still: a hub that turns leaves the other thread no GIL for seconds
            until(lambda: len(calls) == 2)
            assert sorted(calls, key=lambda call: call[0] is there) == [
                (threading.current_thread(), True, pid, STATUS),
                (there, True, pid, STATUS),
            ]
            assert coopos.waitpid(pid, 0) == (pid, STATUS)


def test_watch_from_several_threads():
    """Threads that watch one child at the same time each have their callback called, and one waiter gets the status."""
    with contextlib.ExitStack() as stack:
        threads = [stack.enter_context(HubThread()) for _ in range(4)]
        pid, end = stack.enter_context(living_child(os.posix_spawn))
        calls = []
        for thread in threads:
            thread.call(coopos.watch, pid, lambda child: calls.append((threading.get_ident(), child.rstatus)))
        waiters = [(thread, thread.parked(error_of, coopos.waitpid, pid, 0)) for thread in threads]
        end()
        results = [thread.result_of(waiter) for thread, waiter in waiters]
        for thread in threads:
            thread.call(turn_loop)
        assert len(set(calls)) == 4 and {status for _, status in calls} == {STATUS}
        assert results.count((None, (pid, STATUS))) == 1 and results.count(no_child) == 3


@every_source
def test_watch_child_of_any_source(source):
    """A child is watched, living and dead, whoever made it."""
    run_script(
        SOURCES
        + f"make = sources[{source!r}]\n"
        + """
calls = []
pids = [make() for _ in range(2)]
for is_dead, pid in enumerate(pids):
    if is_dead:
        end(pid)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    watched = coopos.watch(pid, calls.append)
    gevent.sleep(0)
    if not is_dead:
        end(pid)
    while not calls:
        gevent.sleep(0)
    assert calls == [watched] and (watched.rpid, watched.rstatus) == (pid, signal.SIGKILL)
    assert coopos.waitpid(pid, 0) == (pid, signal.SIGKILL)
    calls.clear()
leave()
"""
    )


@pytest.mark.parametrize("ref", [True, False])
@pytest.mark.parametrize("times", [1, 2])
def test_watch_keeps_the_loop_running(ref, times):
    """With ref=True a loop with nothing else to do runs until the child has ended; without it, it doesn't."""
    output = run_script(
        SOURCES
        + f"""
pid = spawned(os.posix_spawn)
told = []
for n in range({times}):
    watched = coopos.watch(pid, told.append, ref={ref} and not n)
assert watched.ref is {ref}
killer = threading.Thread(target=lambda: (go_on.wait(), end(pid)))
go_on = threading.Event()
killer.start()
if {ref}:
    go_on.set()
gevent.get_hub().join()
print(len(told))
go_on.set()
killer.join()
while len(told) < {times}:
    gevent.sleep(0)
assert coopos.waitpid(pid, 0) == (pid, signal.SIGKILL)
"""
    )
    assert int(output) == (times if ref else 0)


@pytest.mark.parametrize(
    ("pid", "error"),
    [
        *[(0, (OSError, errno.EINVAL)), (-1, (OSError, errno.EINVAL)), (-(2**31), (OSError, errno.EINVAL))],
        *[(1, no_child), (os.getpid(), no_child), (os.getppid(), no_child), (NOBODY, no_child)],
        *[(2**31, (OverflowError, None)), (2**40, (OverflowError, None)), (2**70, (OverflowError, None))],
        *[(1.0, (TypeError, None)), ("1", (TypeError, None)), (None, (TypeError, None))],
    ],
    ids=["0", "-1", "least", "init", "own", "parent", "nobody", "2**31", "2**40", "2**70", "float", "str", "None"],
)
def test_watch_wrong_pid(pid, error):
    """An error at once, and nothing is watched."""
    calls = []
    assert error_of(coopos.watch, pid, calls.append) == error
    turn_loop()
    assert not calls


def test_watch_child_that_was_waited_for():
    """ChildProcessError, whoever has waited."""
    assert error_of(coopos.watch, waited_child()) == no_child
    pid = dead_child(os.posix_spawn)
    os.waitpid(pid, 0)
    assert error_of(coopos.watch, pid) == no_child


@pytest.mark.parametrize(("arguments", "error"), [((5,), TypeError), (("f",), TypeError), ((None, 5), TypeError)])
def test_watch_wrong_callback_or_loop(arguments, error):
    """An error, before anything is watched: the child is left to the kernel."""
    pid = dead_child(os.posix_spawn)
    with pytest.raises(error):
        coopos.watch(pid, *arguments)
    turn_loop()
    assert os.waitpid(pid, 0) == (pid, STATUS)


def test_watch_destroyed_loop():
    """ValueError, before anything is watched."""
    loop = get_hub().loop.__class__(default=False)
    loop.destroy()
    pid = dead_child(os.posix_spawn)
    with pytest.raises(ValueError, match="destroyed"):
        coopos.watch(pid, None, loop)
    turn_loop()
    assert os.waitpid(pid, 0) == (pid, STATUS)


def test_watch_stolen_child(monkeypatch):
    """Somebody else collects it: the callback is called, with the status where the kernel tells it, else with none."""
    calls = []
    with living_child(os.posix_spawn) as (pid, end):
        coopos.watch(pid, lambda child: calls.append(error_of(lambda: child.rstatus)))
        end()
        assert os.waitpid(pid, 0) == (pid, STATUS)
        until(lambda: calls)
        assert calls == [(None, STATUS)] if TELLS_REAPED_STATUS else [no_child]
        assert error_of(coopos.waitpid, pid, 0) == ((None, (pid, STATUS)) if TELLS_REAPED_STATUS else no_child)


@needs_pidfds
def test_watch_descriptors():
    """Watching a child often costs one descriptor, which is closed when it has ended."""
    before = len(open_fds())
    with living_child() as (first, end_first), living_child(os.posix_spawn) as (pid, end):
        now = len(open_fds())
        for _ in range(5):
            coopos.watch(pid)
        assert len(open_fds()) == now + 1
        end()
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
        end_first()
        assert coopos.waitpid(first, 0) == (first, STATUS)
        assert len(open_fds()) == before


def test_watch_never_switches():
    """No other greenlet runs in it, whatever the child's state."""
    other = gevent.spawn(int)
    with living_child(os.posix_spawn) as (pid, end):
        for _ in range(3):
            coopos.watch(pid, ref=True)
        end()
        until_dead(pid)
        coopos.watch(pid, int)
        assert not other.ready()
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
    other.join()


# ---- wait_exit ---------------------------------------------------------------------------------------------------------------


@needs_p_pidfd
@both_spawns
def test_wait_exit_own_child(spawn):
    """None once it has ended; it is left waitable, and who waits for it is not disturbed."""
    with living_child(spawn) as (pid, end):
        waiters = [parked(coopos.wait_exit, pid) for _ in range(3)]
        end()
        assert [result_of(waiter) for waiter in waiters] == [None] * 3
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
    with living_child(spawn) as (pid, end):
        waiter, other = parked(coopos.wait_exit, pid), parked(coopos.waitpid, pid, 0)
        end()
        assert (result_of(waiter), result_of(other)) == (None, (pid, STATUS))


@needs_p_pidfd
@both_spawns
def test_wait_exit_dead_child(spawn):
    """It has ended: no switch; and it is left waitable."""
    pid = dead_child(spawn)
    other = gevent.spawn(int)
    assert coopos.wait_exit(pid) is None
    assert not other.ready()
    other.join()
    assert coopos.waitpid(pid, 0) == (pid, STATUS)


@needs_p_pidfd
def test_wait_exit_child_that_is_no_more():
    """ProcessLookupError of one that was collected, as of one that never was."""
    pid = collected_child()
    assert error_of(coopos.wait_exit, pid) == (ProcessLookupError, errno.ESRCH)
    assert coopos.waitpid(pid, 0) == (pid, STATUS)
    assert error_of(coopos.wait_exit, pid) == (ProcessLookupError, errno.ESRCH)


@needs_p_pidfd
@pytest.mark.parametrize("ends", ["reaped", "orphaned"])
def test_wait_exit_grandchild(ends):
    """Any process may be waited for, not only a child."""
    parents = {"reaped": "wait; exit 7", "orphaned": "exit 7"}
    with make_pipe(blocking=True) as (answer, answers), make_pipe(blocking=True) as (reader, writer):
        script = f"(read line) < /dev/fd/{reader} & echo $! >&1; {parents[ends]}"
        os.set_inheritable(reader, True)
        pid = spawn_sh(os.posix_spawn, script, file_actions=[(os.POSIX_SPAWN_DUP2, answers, 1)])
        grandchild = int(os.read(answer, 100))
        if ends == "orphaned":
            until_dead(pid)
        assert error_of(coopos.waitpid, grandchild, 0) == no_child
        waiter = parked(coopos.wait_exit, grandchild)
        os.write(writer, b"\n")
        assert result_of(waiter) is None
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


@needs_p_pidfd
@pytest.mark.parametrize("whose", [os.getpid, os.getppid])
def test_wait_exit_of_oneself(whose):
    """Nothing is known against it: it waits, until a Timeout ends it, and others run meanwhile."""
    waiter = parked(coopos.wait_exit, whose())
    with gevent.Timeout(0, False):
        coopos.wait_exit(whose())
        pytest.fail("has ended")
    assert not waiter.ready()
    waiter.kill()


@needs_p_pidfd
@pytest.mark.parametrize(
    ("pid", "error"),
    [
        *[(0, (OSError, errno.EINVAL)), (-1, (OSError, errno.EINVAL)), (-(2**31), (OSError, errno.EINVAL))],
        *[(NOBODY, (ProcessLookupError, errno.ESRCH)), (2**31, (OverflowError, None)), (2**70, (OverflowError, None))],
        *[(1.0, (TypeError, None)), ("1", (TypeError, None)), (None, (TypeError, None))],
    ],
    ids=["0", "-1", "least", "nobody", "2**31", "2**70", "float", "str", "None"],
)
def test_wait_exit_wrong_pid(pid, error):
    """An error at once."""
    other = gevent.spawn(int)
    assert error_of(coopos.wait_exit, pid) == error
    assert not other.ready()
    other.join()


@needs_p_pidfd
def test_wait_exit_killed_waiter():
    """No descriptor is left, of a killed greenlet or of one that timed out; the fixture looks for watchers."""
    before = open_fds()
    waiters = [parked(coopos.wait_exit, os.getppid()) for _ in range(5)]
    assert len(open_fds()) > len(before)
    gevent.killall(waiters)
    with gevent.Timeout(0, False):
        coopos.wait_exit(os.getppid())
    assert open_fds() == before


@needs_p_pidfd
@both_spawns
def test_wait_exit_in_threads(spawn):
    """Greenlets of several threads' hubs wait for one process."""
    with contextlib.ExitStack() as stack:
        threads = [stack.enter_context(HubThread()) for _ in range(3)]
        pid, end = stack.enter_context(living_child(spawn))
        waiters = [(thread, thread.parked(coopos.wait_exit, pid)) for thread in threads for _ in range(2)]
        end()
        assert [thread.result_of(waiter) for thread, waiter in waiters] == [None] * 6
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


@needs_p_pidfd
def test_wait_exit_without_descriptors():
    """EMFILE, and nothing else happens."""
    run_script("""
        import errno, os, resource, coopos
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        try:
            coopos.wait_exit(os.getppid())
        except OSError as ex:
            assert ex.errno == errno.EMFILE, ex
        else:
            raise AssertionError("no descriptor was needed")
    """)


@needs_linux
def test_wait_exit_thread():
    """A thread that is not its process's first is no process."""
    with HubThread() as thread:
        error, number = error_of(coopos.wait_exit, thread.call(threading.get_native_id))
    assert issubclass(error, OSError) and number in (errno.EINVAL, errno.ENOENT, errno.ESRCH)


@pytest.mark.skipif(sys.platform == "linux", reason="Linux has pidfds")
def test_wait_exit_elsewhere():
    """NotImplementedError, and not a wait for ever."""
    with pytest.raises(NotImplementedError):
        coopos.wait_exit(os.getppid())


@needs_p_pidfd
def test_wait_exit_under_signals():
    """It returns for no signal: 10,000 of them a second come, also in the moment in which it looks."""
    run_script("""
        import os, signal, gevent, coopos
        signal.signal(signal.SIGALRM, lambda *args: None)
        reader, writer = os.pipe()
        pid = coopos.fork()
        if pid == 0:
            os.read(reader, 1)
            os._exit(0)
        early = 0
        signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
        for _ in range(1000):
            with gevent.Timeout(0.001, False):     # libuv warns of less
                coopos.wait_exit(pid)
                early += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(writer, b"x")
        assert early == 0
        assert coopos.waitpid(pid, 0) == (pid, 0)
    """)
