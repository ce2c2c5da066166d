"""Waiting for children: whose status is told, to whom, how often, and what is left behind.

Children are programs started by posix_spawn, so that most tests need no interpreter of their own. What forks is in test_fork.py.
"""

import contextlib
import ctypes
import errno
import functools
import gc
import inspect
import os
import shutil
import signal
import subprocess
import threading

import gevent
import gevent.signal
import pytest
from gevent.hub import get_hub

import coopos

from ..helpers.children import (
    HAS_PIDFDS,
    OWN_GROUP,
    STATUS,
    TELLS_REAPED_STATUS,
    both_spawns,
    collected_child,
    count_questions,
    dead_child,
    living_child,
    needs_pidfds,
    needs_proc,
    needs_reaped_status,
    no_child,
    questions,
    spawn_in,
    spawn_sh,
    start,
    thread_ids,
    until,
    until_dead,
    until_stopped,
    waited_child,
)
from ..helpers.support import (
    DEADLINE_S,
    HAS_WAITED,
    LOOP,
    HubThread,
    error_of,
    open_fds,
    parked,
    result_of,
    run_script,
    run_seccomp,
    turn_loop,
)


@pytest.fixture(autouse=True)
def _no_status_is_left():
    """The status of a watched child is kept until somebody asks: no test leaves one to the next."""
    yield
    with contextlib.suppress(ChildProcessError):
        assert coopos.waitpid(-1, os.WNOHANG) == (0, 0)


# ---- one child ---------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@both_spawns
def test_waitpid_living_child(spawn):
    """Other greenlets run until the child ends; then its status is returned."""
    with living_child(spawn) as (pid, end):
        waiter = parked(coopos.waitpid, pid, 0)
        end()
        assert result_of(waiter) == (pid, STATUS)


@pytest.mark.smoke
@both_spawns
def test_waitpid_dead_child(spawn):
    """A child that was dead before anybody waited is returned at once."""
    pid = dead_child(spawn)
    assert coopos.waitpid(pid, 0) == (pid, STATUS)


def test_waitpid_collected_child():
    """The status of a watched child is kept after its callback has run, and told once."""
    pid = collected_child()
    assert coopos.waitpid(pid, 0) == (pid, STATUS)
    assert error_of(coopos.waitpid, pid, 0) == no_child


@both_spawns
def test_waitpid_killed_child(spawn):
    """The status is the kernel's raw one, with the signal in it."""
    with living_child(spawn) as (pid, _):
        waiter = parked(coopos.waitpid, pid, 0)
        os.kill(pid, signal.SIGKILL)
        assert result_of(waiter) == (pid, signal.SIGKILL)


@both_spawns
def test_waitpid_dumped_core(spawn):
    """The status is the kernel's, with the core dump flag or without it."""
    statuses = []
    for wait in (os.waitpid, coopos.waitpid):
        pid = spawn_sh(os.posix_spawn if wait is os.waitpid else spawn, "ulimit -c unlimited; cd /tmp; kill -QUIT $$")
        statuses.append(wait(pid, 0)[1])
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"/tmp/core.{pid}")
    assert statuses[0] == statuses[1]
    assert os.WTERMSIG(statuses[1]) == signal.SIGQUIT


@pytest.mark.parametrize("code", [0, 1, 127, 128, 255])
def test_waitpid_exit_codes(code):
    """Every exit code comes out as os.waitpid would give it."""
    pid = spawn_sh(coopos.posix_spawn, f"exit {code}")
    assert coopos.waitpid(pid, 0) == (pid, code << 8)


@both_spawns
def test_waitpid_wnohang_living_child(spawn):
    """There is no status yet: (0, 0), without a switch."""
    with living_child(spawn) as (pid, end):
        other = gevent.spawn(int)
        assert coopos.waitpid(pid, os.WNOHANG) == (0, 0)
        assert not other.ready()
        end()
        other.join()
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


@both_spawns
def test_waitpid_wnohang_in_a_loop_that_never_yields(spawn):
    """The kernel is asked each time, so the exit is seen although the hub never runs."""
    pid = spawn_sh(spawn, "exit 7")
    other = gevent.spawn(int)
    while (answer := coopos.waitpid(pid, os.WNOHANG)) == (0, 0):
        pass
    assert answer == (pid, STATUS)
    assert not other.ready()
    other.join()


def test_waitpid_wnohang_any_in_a_loop_that_never_yields():
    """waitpid(-1, WNOHANG) asks the kernel each time too."""
    pid = spawn_sh(coopos.posix_spawn, "exit 7")
    while (answer := coopos.waitpid(-1, os.WNOHANG)) == (0, 0):
        pass
    assert answer == (pid, STATUS)


@both_spawns
@pytest.mark.parametrize("options", [0, os.WNOHANG, os.WUNTRACED])
def test_waitpid_second_time(spawn, options):
    """A status is told once."""
    pid = dead_child(spawn)
    assert coopos.waitpid(pid, options) == (pid, STATUS)
    assert error_of(coopos.waitpid, pid, options) == no_child


@pytest.mark.parametrize("options", [0, os.WNOHANG, os.WUNTRACED, os.WCONTINUED])
@pytest.mark.parametrize("whose", ["nobody", "any", "own group", "other group", "init", "self"])
def test_waitpid_without_children(whose, options):
    """ChildProcessError, at once: no other greenlet runs."""
    pid = {"nobody": 2**31 - 1, "any": -1, "own group": 0, "other group": -os.getppid(), "init": 1, "self": os.getpid()}[whose]
    other = gevent.spawn(int)
    assert error_of(coopos.waitpid, pid, options) == error_of(os.waitpid, pid, options) == no_child
    assert not other.ready()
    other.join()


@pytest.mark.parametrize(
    "arguments",
    [(-1, 1 << 20), (1.0, 0), ("1", 0), (1, None), (1, "0"), (2**40, 0), (1, 2**40), (-(2**31), 0), (), (1,), (1, 0, 0)],
    ids=repr,
)
def test_waitpid_wrong_arguments(arguments):
    """The same error as os.waitpid's, before anything is waited for."""
    with living_child() as (pid, end):
        assert error_of(coopos.waitpid, *arguments) == error_of(os.waitpid, *arguments)
        end()
        coopos.waitpid(pid, 0)


def test_waitpid_message_names_the_call_and_the_pid():
    with pytest.raises(ChildProcessError, match=r"waitpid\(2147483647\)"):
        coopos.waitpid(2**31 - 1, 0)


def test_waitpid_keywords():
    """The parameters can't be told from those that os.waitpid documents."""
    assert list(inspect.signature(coopos.waitpid).parameters) == ["pid", "options"]


def test_waitpid_from_the_hub():
    """In a callback of the loop nothing can wait: an ended child is returned, a living one is an error of the hub."""
    pid = dead_child()
    results = []
    get_hub().loop.run_callback(lambda: results.append(error_of(coopos.waitpid, pid, 0)))
    until(lambda: results)
    assert results == [(None, (pid, STATUS))]


# ---- giving up ---------------------------------------------------------------------------------------------------------------

wait_kinds = pytest.mark.parametrize(
    ("question", "options"), [("pid", 0), ("any", 0), ("group", 0), ("pid", os.WUNTRACED), ("any", os.WCONTINUED)]
)


def question_about(pid, kind):
    return {"pid": pid, "any": -1, "group": -os.getpgid(pid), "own group": 0}[kind]


@both_spawns
@wait_kinds
def test_waitpid_timeout(spawn, question, options):
    """A Timeout leaves the child waitable, and no worker at it; the fixture looks for the rest."""
    with living_child(spawn, **OWN_GROUP) as (pid, end):
        for _ in range(5):
            with gevent.Timeout(0, False):
                coopos.waitpid(question_about(pid, question), options)
                pytest.fail("nothing has ended")
        if spawn is os.posix_spawn or HAS_PIDFDS:
            until(lambda: not count_questions())
        end()
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
    until(lambda: not count_questions())


@both_spawns
@wait_kinds
def test_waitpid_killed_waiter(spawn, question, options):
    """A killed greenlet leaves the child waitable for the others, and no worker at it."""
    with living_child(spawn, **OWN_GROUP) as (pid, end):
        waiters = [parked(coopos.waitpid, question_about(pid, question), options) for _ in range(3)]
        waiters[0].kill()
        waiters[1].kill()
        end()
        assert result_of(waiters[2]) == (pid, STATUS)
    until(lambda: not count_questions())


@both_spawns
@wait_kinds
def test_waitpid_killed_in_the_turn_in_which_the_child_ends(spawn, question, options):
    """Whether the kill or the news comes first, the status is not lost with the greenlet."""
    with living_child(spawn, **OWN_GROUP) as (pid, end):
        waiter = parked(coopos.waitpid, question_about(pid, question), options)
        end()
        until_dead(pid)
        waiter.kill(block=False)
        waiter.join()
        if isinstance(waiter.value, tuple):
            assert waiter.value == (pid, STATUS)
        else:
            assert coopos.waitpid(pid, 0) == (pid, STATUS)


def test_waitpid_switched_into_by_somebody_else():
    """A stray switch is an error in the greenlet that waits, never taken for the child's end."""
    with living_child() as (pid, end):
        waiter = parked(error_of, coopos.waitpid, pid, 0)
        get_hub().loop.run_callback(waiter.switch)
        assert result_of(waiter)[0].__name__ == "InvalidSwitchError"
        end()
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


def test_waitpid_keyboard_interrupt():
    """An interrupt that the hub hands to the main greenlet ends its waitpid, and the child stays waitable."""
    run_script(
        """
        import os, gevent, coopos

        def interrupt():
            raise KeyboardInterrupt

        reader, writer = os.pipe()
        pid = coopos.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(7)
        gevent.get_hub().loop.run_callback(interrupt)
        try:
            coopos.waitpid(pid, 0)
        except KeyboardInterrupt:
            os.close(writer)
            assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
        else:
            raise AssertionError("not interrupted")
        """,
        may_complain=True,  # gevent's hub prints it
    )


def test_waitpid_signal_handler_that_returns():
    """A signal whose handler returns doesn't end the wait."""
    run_script("""
        import os, signal, gevent, coopos
        calls = []
        signal.signal(signal.SIGUSR1, lambda *args: calls.append(args[0]))
        reader, writer = os.pipe()
        pid = coopos.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(7)
        waiter = gevent.spawn(coopos.waitpid, pid, 0)
        gevent.sleep(0)
        for _ in range(10):
            os.kill(os.getpid(), signal.SIGUSR1)
            gevent.sleep(0)
        assert calls and not waiter.ready()
        os.close(writer)
        assert waiter.get() == (pid, 7 << 8)
    """)


# ---- many who wait -----------------------------------------------------------------------------------------------------------


def outcomes(results, pid):
    """How many got the status; the others must have been told that there is no child."""
    got = results.count((None, (pid, STATUS)))
    assert results.count(no_child) == len(results) - got, results
    return got


@both_spawns
def test_waitpid_many_greenlets(spawn):
    """Exactly one of those who wait for a child gets its status."""
    with living_child(spawn) as (pid, end):
        waiters = [parked(error_of, coopos.waitpid, pid, 0) for _ in range(10)]
        end()
        assert outcomes([result_of(waiter) for waiter in waiters], pid) == 1


@both_spawns
def test_waitpid_many_threads(spawn):
    """Greenlets of several threads wait for one child: exactly one gets its status."""
    with contextlib.ExitStack() as stack:
        pid, end = stack.enter_context(living_child(spawn))
        threads = [stack.enter_context(HubThread()) for _ in range(4)]
        there = [(thread, thread.parked(error_of, coopos.waitpid, pid, 0)) for thread in threads for _ in range(3)]
        here = [parked(error_of, coopos.waitpid, pid, 0) for _ in range(3)]
        end()
        results = [result_of(waiter) for waiter in here]
        results += [thread.result_of(waiter) for thread, waiter in there]
        assert outcomes(results, pid) == 1


@both_spawns
def test_waitpid_many_questions(spawn):
    """One waits for the pid, one for any, one for its group, one for a stop: one gets the status, the others no child."""
    with living_child(spawn, **OWN_GROUP) as (pid, end):
        waiters = [parked(error_of, coopos.waitpid, *question) for question in [(pid, 0), (-1, 0), (-pid, 0), (pid, os.WUNTRACED)]]
        end()
        assert outcomes([result_of(waiter) for waiter in waiters], pid) == 1


@both_spawns
def test_waitpid_many_questions_in_threads(spawn):
    """The same, each in a thread's hub of its own."""
    with contextlib.ExitStack() as stack:
        pid, end = stack.enter_context(living_child(spawn, **OWN_GROUP))
        threads = [stack.enter_context(HubThread()) for _ in range(4)]
        questions = [(pid, 0), (-1, 0), (-pid, 0), (pid, os.WUNTRACED)]
        waiters = [
            (thread, thread.parked(error_of, coopos.waitpid, *question))
            for thread, question in zip(threads, questions, strict=True)
        ]
        end()
        assert outcomes([thread.result_of(waiter) for thread, waiter in waiters], pid) == 1


@both_spawns
def test_waitpid_child_of_another_thread(spawn):
    """A child started in one thread is waited for in another, living or dead."""
    with HubThread() as one, HubThread() as two:
        with living_child(spawn_in(one, spawn)) as (pid, end):
            waiter = two.parked(coopos.waitpid, pid, 0)
            end()
            assert two.result_of(waiter) == (pid, STATUS)
        pid = one.call(dead_child, spawn)
        assert two.call(coopos.waitpid, pid, 0) == (pid, STATUS)
        assert one.call(error_of, coopos.waitpid, pid, 0) == no_child


ENDED_THREAD = (
    HAS_WAITED
    + """
import threading

def fork_living():
    reader, writer = os.pipe()
    pid = coopos.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(7)
    os.close(reader)
    return pid, writer

def in_a_thread(function):
    results = []
    def run():
        try:
            results.append(function())
        finally:
            gevent.get_hub().destroy(destroy_loop=True)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]

wait_once()
fds = sorted(os.listdir("/dev/fd"))
"""
)


def test_waitpid_child_of_a_thread_that_has_ended():
    """The watch of a thread that is gone is no hindrance, and its descriptors are not left open."""
    run_script(
        ENDED_THREAD
        + """
for is_parked in (True, False):
    pid, writer = in_a_thread(fork_living)
    if is_parked:
        waiter = gevent.spawn(coopos.waitpid, pid, 0)
        gevent.sleep(0)
        os.close(writer)
        assert waiter.get() == (pid, 7 << 8)
    else:
        os.close(writer)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
assert sorted(os.listdir("/dev/fd")) == fds
"""
    )


@pytest.mark.skipif(LOOP == "libuv", reason="gevent's own libuv loop can't be destroyed with a watcher that keeps it running")
@pytest.mark.parametrize("question", ["pid", "-1", "0"])
@pytest.mark.parametrize("options", ["0", "os.WUNTRACED"])
def test_waitpid_after_a_thread_that_ended_in_one(question, options):
    """A greenlet that still waited when its thread ended is no hindrance to others who wait, and holds no descriptor."""
    run_script(
        ENDED_THREAD
        + f"""
pid, writer = fork_living()

def wait_and_leave():
    gevent.spawn(coopos.waitpid, {question}, {options})
    gevent.sleep(0)

in_a_thread(wait_and_leave)
waiter = gevent.spawn(coopos.waitpid, pid, 0)
gevent.sleep(0)
os.close(writer)
assert waiter.get() == (pid, 7 << 8)
pid, writer = fork_living()
os.close(writer)
assert coopos.waitpid(-1, 0) == (pid, 7 << 8)
assert sorted(os.listdir("/dev/fd")) == fds
"""
    )


IN_A_SEND = """
import os, threading, gevent, coopos
from gevent.libuv import watcher

reader, writer = os.pipe()
pid = coopos.fork()
if pid == 0:
    os.close(writer)
    os.read(reader, 1)
    os._exit(7)

parked, in_send, go_on, results = threading.Event(), threading.Event(), threading.Event(), []
send = watcher.async_.send

def send_slowly(self, *args):
    '''As if the other thread got the GIL in the middle.'''
    if threading.current_thread() is thread and parked.is_set() and not in_send.is_set():
        in_send.set()
        assert go_on.wait(30)
    return send(self, *args)

watcher.async_.send = send_slowly

def outcome(*args):
    try:
        return coopos.waitpid(*args)
    except Exception as ex:
        return type(ex)

def run():
    waiter = gevent.spawn(outcome, -1, 0)
    gevent.sleep(0)
    parked.set()
    results.append(waiter.get())
    gevent.get_hub().destroy(destroy_loop=True)

other = gevent.spawn(outcome, -1, 0)
gevent.sleep(0)
thread = threading.Thread(target=run)
thread.start()
assert parked.wait(30)
os.close(writer)
assert in_send.wait(30)  # the thread has collected the child, and is about to tell the others
"""
needs_libuv = pytest.mark.skipif(LOOP != "libuv", reason="in libev no other thread runs while a watcher is sent")


@needs_libuv
def test_waitpid_while_another_thread_is_telling():
    """A thread that has collected a child and is telling others who wait doesn't share the status with one who asks just then."""
    run_script(
        IN_A_SEND
        + """
results.append(outcome(pid, os.WNOHANG))
go_on.set()
thread.join()
results.append(other.get())
assert sorted(map(repr, results)) == sorted(map(repr, [(pid, 7 << 8), ChildProcessError, ChildProcessError])), results
"""
    )


@needs_libuv
def test_waitpid_killed_while_another_thread_is_telling():
    """Nor is it harmed when one whom it is about to tell waits no longer."""
    run_script(
        IN_A_SEND
        + """
other.kill()
gevent.idle()
go_on.set()
thread.join()
assert results == [(pid, 7 << 8)], results
"""
    )


@both_spawns
def test_waitpid_each_thread_its_own_child(spawn):
    """Threads start and wait at the same time; each gets its own child's status."""
    count, threads = 20, 4

    def start_and_wait(number):
        for _ in range(count):
            pid = spawn_sh(spawn, f"exit {number}")
            assert coopos.waitpid(pid, 0) == (pid, number << 8)
        return number

    with contextlib.ExitStack() as stack:
        hubs = [stack.enter_context(HubThread()) for _ in range(threads)]
        waiters = [hub.call(gevent.spawn, start_and_wait, number) for number, hub in enumerate(hubs, 1)]
        assert [hub.result_of(waiter) for hub, waiter in zip(hubs, waiters, strict=True)] == [1, 2, 3, 4]


@both_spawns
def test_waitpid_in_a_thread_without_a_hub(spawn):
    """A plain thread that has never used gevent gets a hub when it has to wait."""
    results = []

    def run():
        pid = spawn_sh(spawn, "exit 7")
        results.append(coopos.waitpid(pid, 0) == (pid, STATUS))
        get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(DEADLINE_S)
    assert results == [True]


# ---- groups of children ------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_waitpid_any_child():
    """-1 returns the child that ended, watched or not, and then says that there are no more."""
    with living_child() as (first, end_first), living_child(os.posix_spawn) as (second, end_second):
        waiter = parked(coopos.waitpid, -1, 0)
        end_second()
        assert result_of(waiter) == (second, STATUS)
        waiter = parked(coopos.waitpid, -1, 0)
        end_first()
        assert result_of(waiter) == (first, STATUS)
    assert error_of(coopos.waitpid, -1, 0) == no_child


def test_waitpid_any_after_waitpid_pid():
    """-1 never returns a pid that has been waited for."""
    waited_child()
    with living_child() as (pid, end):
        waited_child()
        assert coopos.waitpid(-1, os.WNOHANG) == (0, 0)
        waiter = parked(coopos.waitpid, -1, 0)
        end()
        assert result_of(waiter) == (pid, STATUS)
    waited_child()
    assert error_of(coopos.waitpid, -1, 0) == no_child


def test_waitpid_any_that_loses_its_last_child():
    """Whoever waits for any child when the last one is waited for by its pid is told that there are none."""
    with living_child() as (pid, end):
        waiter = parked(error_of, coopos.waitpid, -1, 0)
        end()
        until_dead(pid)
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
        assert result_of(waiter) == no_child


def test_waitpid_any_collected_children():
    """Children whose callbacks have run are returned one by one, in the order in which they died."""
    pids = [collected_child() for _ in range(3)]
    assert [coopos.waitpid(-1, 0) for _ in pids] == [(pid, STATUS) for pid in pids]
    assert error_of(coopos.waitpid, -1, os.WNOHANG) == no_child


@both_spawns
@pytest.mark.parametrize("dead_first", [False, True], ids=["living", "dead"])
def test_waitpid_group(spawn, dead_first):
    """-pgid returns only children of that group, cooperatively."""
    with living_child(spawn, **OWN_GROUP) as (stranger, end_stranger):
        with (
            living_child(spawn, **OWN_GROUP) as (leader, end_leader),
            living_child(spawn, setpgroup=leader) as (member, end_member),
        ):
            end_stranger()
            until_dead(stranger)
            if dead_first:
                end_member()
                until_dead(member)
                assert coopos.waitpid(-leader, 0) == (member, STATUS)
            else:
                waiter = parked(coopos.waitpid, -leader, 0)
                end_member()
                assert result_of(waiter) == (member, STATUS)
            waiter = parked(coopos.waitpid, -leader, 0)
            end_leader()
            assert result_of(waiter) == (leader, STATUS)
        assert error_of(coopos.waitpid, -leader, 0) == no_child
        assert coopos.waitpid(-stranger, os.WNOHANG) == (stranger, STATUS)


def test_waitpid_group_of_a_collected_child():
    """A child that the hub collected before anybody asked is still known by the group it died in."""
    ended = []
    pid = start(os.posix_spawn, "exit 7", {"callback": ended.append}, **OWN_GROUP)
    until(lambda: ended)
    assert error_of(coopos.waitpid, 0, os.WNOHANG) == no_child
    assert coopos.waitpid(-pid, 0) == (pid, STATUS)


def test_waitpid_group_changed_while_it_lived():
    """It is the group at death that counts, not the one the child was started in."""
    with living_child(watch={}, **OWN_GROUP) as (leader, end_leader):
        with living_child(os.posix_spawn, "exec cat", **OWN_GROUP) as (pid, end):
            coopos.fork_and_watch(fork=lambda: pid)
            moved = error_of(os.setpgid, pid, leader)
            if moved == (PermissionError, errno.EACCES):  # it has called exec: a child of our own makes the move then
                end()
                assert coopos.waitpid(pid, 0) == (pid, 0)
            else:
                waiter = parked(coopos.waitpid, -leader, 0)
                end()
                assert result_of(waiter) == (pid, 0)
        end_leader()
        assert coopos.waitpid(-leader, 0) == (leader, STATUS)


def test_waitpid_own_group():
    """0 returns only children of the caller's process group."""
    with living_child(**OWN_GROUP) as (stranger, end_stranger), living_child() as (pid, end):
        waiter = parked(coopos.waitpid, 0, 0)
        end_stranger()
        until_dead(stranger)
        turn_loop()
        assert not waiter.ready()
        end()
        assert result_of(waiter) == (pid, STATUS)
        assert error_of(coopos.waitpid, 0, 0) == no_child
        assert coopos.waitpid(stranger, 0) == (stranger, STATUS)


def test_waitpid_children_that_come_while_waiting():
    """A child that is started after the wait for any began is returned if it ends first."""
    with living_child() as (pid, end):
        waiter = parked(coopos.waitpid, -1, 0)
        other = spawn_sh(coopos.posix_spawn, "exit 7")
        assert result_of(waiter) == (other, STATUS)
        end()
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


# ---- stops -------------------------------------------------------------------------------------------------------------------


@both_spawns
@pytest.mark.parametrize("kind", ["pid", "any", "group"])
def test_waitpid_stopped_and_continued(spawn, kind):
    """WUNTRACED and WCONTINUED report a stop, a continuation and the end, each once."""
    with living_child(spawn, **OWN_GROUP) as (pid, end):
        question = question_about(pid, kind)
        waiter = parked(coopos.waitpid, question, os.WUNTRACED)
        os.kill(pid, signal.SIGSTOP)
        stopped, status = result_of(waiter)
        assert stopped == pid and os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
        assert coopos.waitpid(question, os.WUNTRACED | os.WNOHANG) == (0, 0)

        waiter = parked(coopos.waitpid, question, os.WCONTINUED)
        os.kill(pid, signal.SIGCONT)
        continued, status = result_of(waiter)
        assert continued == pid and os.WIFCONTINUED(status)
        assert coopos.waitpid(question, os.WCONTINUED | os.WNOHANG) == (0, 0)

        waiter = parked(coopos.waitpid, question, os.WUNTRACED | os.WCONTINUED)
        end()
        assert result_of(waiter) == (pid, STATUS)
        assert error_of(coopos.waitpid, question, os.WUNTRACED) == no_child


@both_spawns
def test_waitpid_already_stopped(spawn):
    """A stop that was there before anybody asked is reported at once."""
    with living_child(spawn) as (pid, end):
        os.kill(pid, signal.SIGSTOP)
        until_stopped(pid)
        other = gevent.spawn(int)
        stopped, status = coopos.waitpid(pid, os.WUNTRACED)
        assert stopped == pid and os.WIFSTOPPED(status)
        assert not other.ready()
        other.join()
        os.kill(pid, signal.SIGCONT)
        end()
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


@both_spawns
def test_waitpid_stop_that_was_not_asked_for(spawn):
    """Without WUNTRACED a stopped child has not ended, and its watch doesn't spin."""
    with living_child(spawn) as (pid, end):
        waiter = parked(coopos.waitpid, pid, 0)
        os.kill(pid, signal.SIGSTOP)
        until_stopped(pid)
        turn_loop()
        assert not waiter.ready()
        os.kill(pid, signal.SIGCONT)
        end()
        assert result_of(waiter) == (pid, STATUS)


def test_waitpid_stop_is_told_to_one():
    """Two ask for a stop, one gets it, the other gets the end."""
    with living_child() as (pid, end):
        waiters = [parked(coopos.waitpid, pid, os.WUNTRACED) for _ in range(2)]
        os.kill(pid, signal.SIGSTOP)
        done = gevent.wait(waiters, count=1)
        assert len(done) == 1 and os.WIFSTOPPED(result_of(done[0])[1])
        [other] = set(waiters) - set(done)
        turn_loop()
        assert not other.ready()
        os.kill(pid, signal.SIGCONT)
        end()
        assert result_of(other) == (pid, STATUS)


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


# ---- workers that wait -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("question", "options"), [("any", 0), ("own group", 0), ("pid", os.WUNTRACED), ("group", os.WCONTINUED)])
def test_questions_are_put_once(question, options):
    """However many greenlets of however many threads ask, one worker asks the kernel; after the answer none does."""
    with HubThread() as other:
        with living_child(os.posix_spawn) as (pid, end):
            asked = question_about(pid, question), options
            here = [parked(error_of, coopos.waitpid, *asked) for _ in range(5)]
            there = [other.parked(error_of, coopos.waitpid, *asked) for _ in range(5)]
            assert count_questions() == 1
            end()
            results = [result_of(waiter) for waiter in here] + [other.result_of(waiter) for waiter in there]
        assert outcomes(results, pid) == 1
        until(lambda: not count_questions())


def test_questions_that_are_distinct():
    """Each question has a worker of its own, and none once the last who asked was killed."""
    with living_child(os.posix_spawn, **OWN_GROUP) as (pid, end):
        waiters = [
            parked(coopos.waitpid, *question)
            for question in [(-1, 0), (-pid, 0), (pid, os.WUNTRACED), (-1, os.WUNTRACED), (-1, 0), (-pid, 0)]
        ]
        assert count_questions() == 4
        gevent.killall(waiters)
        until(lambda: not count_questions())
        end()
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


def test_questions_one_for_each_child():
    """Without pidfds a child has one worker, however many wait for it; with them none."""
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(living_child(spawn)) for spawn in (coopos.posix_spawn, os.posix_spawn) for _ in range(3)]
        waiters = [parked(error_of, coopos.waitpid, pid, 0) for pid, _ in children for _ in range(3)]
        assert count_questions() == (0 if HAS_PIDFDS else len(children))
        for _, end in children:
            end()
        assert sum(result_of(waiter)[0] is None for waiter in waiters) == len(children)
    until(lambda: not count_questions())


def test_questions_are_asked_again():
    """A question that was answered and is asked again gets a fresh answer, by the worker that has put the last one."""
    before, threads = thread_ids(), set()
    with living_child() as (pid, end):
        for _ in range(20):
            with living_child() as (other, end_other):
                waiter = parked(coopos.waitpid, -1, 0)
                threads |= thread_ids()
                end_other()
                assert result_of(waiter) == (other, STATUS)
        end()
        assert coopos.waitpid(-1, 0) == (pid, STATUS)
    assert len(threads - before) < 20, threads


def test_questions_where_no_thread_is_left():
    """Where no thread can be made the kernel is asked again and again."""
    run_seccomp("""
import threading, gevent, coopos
refuse("clone3", errno.EAGAIN)
try:
    threading.Thread(target=int).start()
except RuntimeError:
    pass
else:
    print("skip: threads are made in another way")
    raise SystemExit

for fork in (coopos.fork, coopos.fork_gevent):
    for question, options in ((-1, 0), (None, os.WUNTRACED)):
        reader, writer = os.pipe()
        pid = fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(7)
        waiter = gevent.spawn(coopos.waitpid, question or pid, options)
        gevent.sleep(0)
        other = gevent.spawn(coopos.waitpid, question or pid, options)
        gevent.sleep(0)
        other.kill()
        assert not waiter.ready()
        os.close(writer)
        assert waiter.get(timeout=30) == (pid, 7 << 8)
""")


def test_exit_with_living_children():
    """An interpreter that ends while children are watched and waited for ends quietly."""
    run_script("""
        import os, gevent, coopos
        reader, writer = os.pipe()
        pids = []
        for _ in range(5):
            pid = coopos.fork()
            if pid == 0:
                os.close(writer)
                os.read(reader, 1)
                os._exit(0)
            pids.append(pid)
        for pid in (*pids, -1, 0):
            gevent.spawn(coopos.waitpid, pid, 0)
        gevent.sleep(0)
    """)


def test_exit_while_children_die():
    """The same, while the children die."""
    run_script(
        """
        import os, gevent, coopos
        for _ in range(20):
            pid = coopos.fork()
            if pid == 0:
                os._exit(0)
            gevent.spawn(coopos.waitpid, pid, 0)
            gevent.spawn(coopos.waitpid, pid, os.WUNTRACED)
        gevent.spawn(coopos.waitpid, -1, 0)
        gevent.sleep(0)
        """,
        may_complain=True,  # most are told that there is no such child any more
    )


DIES_LATE = """
import ctypes, os, signal, sys, gevent, coopos
pid = coopos.fork()
if pid == 0:
    while True:
        signal.pause()
gevent.spawn(coopos.waitpid, {question}, 0)
gevent.sleep(0)
libc = ctypes.CDLL(None)
# Called with the exit status, the last one first: kill(pid, SIGKILL), then some microseconds in which that may do its harm.
for _ in range(10):
    libc.on_exit(libc.usleep, None)
libc.on_exit(libc.kill, ctypes.c_void_p(signal.SIGKILL))
print(pid & 0xFF, flush=True)
sys.exit(pid)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "on_exit"), reason="the C library has no on_exit()")
@pytest.mark.parametrize("question", ["pid", "-1", "0"])
def test_child_that_dies_after_the_interpreter(question):
    """A child whose end comes when the interpreter is gone, and the process not yet, does no harm."""
    run_script(
        f"""
import subprocess, sys
done = subprocess.run([sys.executable, "-c", {DIES_LATE.format(question=question)!r}], stdout=subprocess.PIPE)
assert done.returncode == int(done.stdout), done
"""
    )


@pytest.mark.parametrize("question", ["pid", "-1", "0"])
def test_child_that_dies_after_the_interpreter_without_descriptors(question):
    """The same where no descriptor was left to wait with."""
    run_script(
        f"""
import subprocess, sys
source = {DIES_LATE.format(question=question)!r}.replace(
    "gevent.spawn(", "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); gevent.spawn("
)
done = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE)
assert done.returncode == int(done.stdout), done
"""
    )


@needs_proc
@both_spawns
@pytest.mark.parametrize("kind", ["pid", "any"])
@pytest.mark.parametrize("option", [0x20000000, 0x40000000], ids=["__WNOTHREAD", "__WALL"])
def test_waitpid_linux_options_are_waited_for(spawn, kind, option):
    """One worker asks, and goes on asking: __WNOTHREAD, taken at its word, would leave it no children."""
    with living_child(spawn) as (pid, end):
        waiter = parked(coopos.waitpid, question_about(pid, kind), option)
        before = questions()
        for _ in range(20):
            turn_loop()
        assert questions() == before
        end()
        assert result_of(waiter) == (pid, STATUS)


@needs_reaped_status
@pytest.mark.parametrize("question", ["-1", "pid"])
def test_waitpid_collected_by_the_kernel(question):
    """Where SIGCHLD is ignored the kernel collects; ECHILD is not said before every watched child's status was told."""
    run_script(f"""
        import os, signal, coopos
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        reader, writer = os.pipe()
        pid = coopos.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(7)
        os.close(writer)
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass
        assert coopos.waitpid({question}, 0) == (pid, 7 << 8)
        try:
            coopos.waitpid({question}, 0)
        except ChildProcessError:
            pass
        else:
            raise AssertionError("told twice")
    """)


@needs_libuv
def test_waitpid_asked_while_another_thread_leaves():
    """A question that somebody is about to join is not ended by another thread that was the last to ask it."""
    run_script("""
        import os, threading, gevent, coopos
        from gevent.libuv import loop

        reader, writer = os.pipe()
        pid = coopos.fork_gevent()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(7)
        parked, leave, left = threading.Event(), threading.Event(), threading.Event()

        def run():
            waiter = gevent.spawn(coopos.waitpid, pid, os.WUNTRACED)
            gevent.sleep(0)
            parked.set()
            leave.wait(30)
            waiter.kill()
            left.set()
            gevent.get_hub().destroy(destroy_loop=True)

        thread = threading.Thread(target=run)
        thread.start()
        assert parked.wait(30)
        io = loop.loop.io

        def io_slowly(self, *args, **kwargs):
            # As if the other thread got the GIL before the watcher is there.
            if threading.current_thread() is not thread:
                leave.set()
                assert left.wait(30)
            return io(self, *args, **kwargs)

        loop.loop.io = io_slowly
        waiter = gevent.spawn(coopos.waitpid, pid, os.WUNTRACED)
        gevent.sleep(0)
        os.close(writer)
        assert waiter.get(timeout=30) == (pid, 7 << 8)
        thread.join()
    """)


@pytest.mark.parametrize("question", ["pid", "-1"])
def test_waitpid_beside_a_busy_hub(question):
    """A hub that always has something to do leaves other threads no GIL: those that watch a child must not need it."""
    run_script(
        f"""
        import os, gevent, coopos
        for _ in range(20):
            pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], os.environ)
            waiter = gevent.spawn(coopos.waitpid, {question}, 0)
            while not waiter.ready():
                gevent.sleep(0)
            assert waiter.get() == (pid, 7 << 8)
        """
    )


# ---- where there is no pidfd -------------------------------------------------------------------------------------------------

FALLBACK = """
import gevent, coopos
from gevent.hub import get_hub

def fork_living():
    reader, writer = os.pipe()
    pid = fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(7)
    os.close(reader)
    return pid, writer

for fork in (coopos.fork, coopos.fork_gevent):
    pid, writer = fork_living()
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
    return run_seccomp(source.replace("FALLBACK", FALLBACK), **kwargs)


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

USED_PID = """
import os, gevent, coopos
LAST_PID = "/proc/sys/kernel/ns_last_pid"

def fork_as(fork, pid, status):
    '''fork() until the child gets *pid*.'''
    for _ in range(200):
        try:
            with open(LAST_PID, "w") as last:
                last.write(str(pid - 1))
        except OSError:
            print("skip: may not choose pids")
            raise SystemExit
        got = fork()
        if got == 0:
            os._exit(status if os.getpid() == pid else 0)
        if got == pid:
            return
        coopos.waitpid(got, 0)
    print("skip: the pid is taken")
    raise SystemExit

ended = []
pid = coopos.fork_and_watch(ended.append)
if pid == 0:
    os._exit(1)
"""
# In a namespace of its own: who chooses pids gives others pids that they had before.
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
may_choose_pids = pytest.mark.skipif(
    not os.access("/proc/sys/kernel/ns_last_pid", os.W_OK) or shutil.which("unshare") is None, reason="may not choose pids"
)


def run_used_pid(source):
    output = run_script(USED_PID + source, under=NAMESPACE)
    if output.startswith("skip: "):
        pytest.skip(output[6:].strip())


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


# ---- what is left ------------------------------------------------------------------------------------------------------------


@both_spawns
def test_many_children_at_once(spawn):
    """Two hundred children that live at the same time are each waited for, in any order."""
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(living_child(spawn)) for _ in range(200)]
        waiters = [parked(coopos.waitpid, pid, 0) for pid, _ in children[::2]]
        for _, end in reversed(children):
            end()
        assert [result_of(waiter) for waiter in waiters] == [(pid, STATUS) for pid, _ in children[::2]]
        for pid, _ in children[1::2]:
            assert coopos.waitpid(pid, 0) == (pid, STATUS)


@both_spawns
def test_descriptors_after_a_wait(spawn):
    """Every descriptor is closed when waitpid returns, not some time later."""
    before = open_fds()
    pid = spawn_sh(spawn, "exit 7")
    assert coopos.waitpid(pid, 0) == (pid, STATUS)
    assert open_fds() == before


@needs_pidfds
def test_descriptors_while_a_child_is_watched():
    """A watched child costs one descriptor, and nothing in a loop in which somebody has waited before."""
    turn_loop()
    before = len(open_fds())
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(living_child()) for _ in range(10)]
        assert len(open_fds()) == before + 2 * len(children)  # the pipe by which each is ended is ours
        for pid, end in children:
            end()
            coopos.waitpid(pid, 0)
    assert len(open_fds()) == before


def test_collected_children_are_let_go():
    """Once a status was told nothing holds the callback any more."""

    class Callback:
        def __call__(self, child):
            calls.append(child.pid)

    calls = []
    callback = Callback()
    pid = start(os.posix_spawn, "exit 7", {"callback": callback})
    until(lambda: calls)
    coopos.waitpid(pid, 0)
    turn_loop()
    gc.collect()
    holders = [holder for holder in gc.get_referrers(callback) if not inspect.isframe(holder)]
    assert [type(holder).__name__ for holder in holders if type(holder).__name__ == "Child"] == []


def test_cpu_while_waiting():
    """Waiting for a child costs no processor time: nobody polls."""
    with living_child() as (pid, end), living_child(os.posix_spawn) as (other, end_other):
        waiters = [parked(coopos.waitpid, *question) for question in [(pid, 0), (other, 0), (pid, os.WUNTRACED)]]
        turn_loop()
        turns = []
        check = get_hub().loop.check()
        check.start(lambda: turns.append(1))
        gevent.sleep(0.2)  # not for anything to happen, but to see that nothing does
        check.stop()
        check.close()
        assert len(turns) < 20, "the loop turned though nothing happened"
        gevent.killall(waiters)
        end()
        end_other()
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
        assert coopos.waitpid(other, 0) == (other, STATUS)
