"""The rest of the wait family, watch and wait_exit: each question, about each kind of child, beside what os answers of its twin.

waitpid, and what children are as such, is in test_children.py.
"""

import contextlib
import ctypes
import errno
import functools
import inspect
import itertools
import os
import platform
import resource
import signal
import sys
import threading

import gevent
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
    needs_p_pidfd,
    needs_pidfds,
    needs_proc,
    needs_reaped_status,
    no_child,
    spawn_in,
    spawn_sh,
    until,
    until_dead,
    until_stopped,
    waited_child,
)
from ..helpers.support import (
    DEADLINE_S,
    HubThread,
    closing,
    error_of,
    make_pipe,
    open_fds,
    parked,
    result_of,
    run_script,
    turn_loop,
)

NOBODY = 2**31 - 1


def tells_pidfds_apart():
    """Whether each process's pidfds have an inode of their own (pidfs), by which a collected child is found."""
    inodes = set()
    with contextlib.suppress(OSError, AttributeError):
        for pid in (os.getpid(), os.getppid()):
            with closing(os.pidfd_open(pid)) as (pidfd,):
                inodes.add(os.fstat(pidfd).st_ino)
    return len(inodes) == 2


FINDS_BY_PIDFD = HAS_PIDFDS and tells_pidfds_apart()
needs_pidfs = pytest.mark.skipif(not FINDS_BY_PIDFD, reason="no pidfs here, or COOPOS_CHILDREN=thread")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has pidfds")


@pytest.fixture(autouse=True)
def _no_status_is_left():
    """The status of a watched child is kept until somebody asks: no test leaves one to the next."""
    yield
    with contextlib.suppress(ChildProcessError):
        assert coopos.waitpid(-1, os.WNOHANG) == (0, 0)


# ---- what can be asked, and of whom ------------------------------------------------------------------------------------------

idtypes = pytest.mark.parametrize("idtype", ["pid", "group", "all", pytest.param("pidfd", marks=needs_p_pidfd)])


@contextlib.contextmanager
def asked(idtype, pid, spawn=None):
    """(idtype, id) for waitid, of a child that leads its own group; *spawn* is told where coopos may collect it meanwhile."""
    if idtype == "pidfd":
        if spawn is coopos.posix_spawn and not FINDS_BY_PIDFD:
            pytest.skip("without pidfs, or with COOPOS_CHILDREN=thread, a collected child is not found by its pidfd")
        with closing(os.pidfd_open(pid)) as (pidfd,):
            yield os.P_PIDFD, pidfd
    else:
        yield {"pid": (os.P_PID, pid), "group": (os.P_PGID, pid), "all": (os.P_ALL, 0)}[idtype]


def waitid(module, idtype, pid, options):
    """The fields of what *module* answers, less the pid; or None; or (class, errno)."""
    with asked(idtype, pid) as question:
        error, result = error_of(module.waitid, *question, options)
    if error or result is None:
        return (error, result) if error else None
    assert type(result) is os.waitid_result
    assert [type(field) for field in result] == [int] * 5
    assert result.si_pid == pid
    return tuple(result)[1:]


def until_collected(pid):
    """Let the hub run until it has collected a watched child that is dead."""
    until(lambda: error_of(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) == no_child)


def until_continued(pid):
    os.waitid(os.P_PID, pid, os.WCONTINUED | os.WNOWAIT)


@contextlib.contextmanager
def child_in(state, spawn, script="read line; exit 7"):
    """The pid of a child in its own group that is *state*. What is left of it is ended and waited for."""
    with living_child(spawn, script, **OWN_GROUP) as (pid, end):
        if state in ("stopped", "continued"):
            os.kill(pid, signal.SIGSTOP)
            until_stopped(pid)
        if state == "continued":
            os.kill(pid, signal.SIGCONT)
            until_continued(pid)
        if state in ("dead", "collected"):
            end()
            until_dead(pid)
        if state == "collected":
            until_collected(pid)
        yield pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            coopos.waitpid(pid, 0)


def in_states(*states):
    """Children watched and unwatched, each in each state. Only a watched one is collected; to whoever asks it is a dead one."""
    return pytest.mark.parametrize(
        ("state", "spawn"),
        [*itertools.product(states, (coopos.posix_spawn, os.posix_spawn)), ("collected", coopos.posix_spawn)],
        ids=lambda value: value if isinstance(value, str) else "watched" if value is coopos.posix_spawn else "unwatched",
    )


every_state = in_states("living", "stopped", "continued", "dead")


def combinations(*flags):
    """Every combination of option bits, 0 included."""
    return [sum(some) for n in range(len(flags) + 1) for some in itertools.combinations(flags, n)]


@functools.cache
def waitid_of_os(idtype, state, options):
    """What os.waitid answers of such a child without waiting, and what there is to be told of it afterwards."""
    with child_in("dead" if state == "collected" else state, os.posix_spawn) as pid:
        return waitid(os, idtype, pid, options | os.WNOHANG), waitid(os, "pid", pid, EVERYTHING)


EVERYTHING = os.WEXITED | os.WSTOPPED | os.WCONTINUED | os.WNOHANG


@idtypes
@every_state
def test_waitid_every_option(idtype, state, spawn):
    """What is told and what is taken are what os.waitid tells and takes of a twin, whatever the options."""
    if state == "collected" and idtype == "pidfd":
        pytest.skip("its pidfd has to be opened while it is there: test_waitid_pidfd_of_a_collected_child")
    for options in combinations(os.WEXITED, os.WSTOPPED, os.WCONTINUED, os.WNOWAIT):
        expected = waitid_of_os(idtype, state, options)
        with child_in(state, spawn) as pid:
            assert (waitid(coopos, idtype, pid, options | os.WNOHANG), waitid(coopos, "pid", pid, EVERYTHING)) == expected, options
        if expected[0] is not None:
            with child_in(state, spawn) as pid:
                other = gevent.spawn(int)
                assert waitid(coopos, idtype, pid, options) == expected[0], options
                assert not other.ready()
                other.join()


#: Those that answer with (pid, status) or (pid, status, usage), called with a child that leads its own group, and options.
BY_STATUS = {
    "waitpid": lambda module, pid, options: module.waitpid(pid, options),
    "waitpid any": lambda module, pid, options: module.waitpid(-1, options),
    "waitpid group": lambda module, pid, options: module.waitpid(-pid, options),
    "wait3": lambda module, pid, options: module.wait3(options),
    "wait4": lambda module, pid, options: module.wait4(pid, options),
    "wait4 any": lambda module, pid, options: module.wait4(-1, options),
    "wait4 group": lambda module, pid, options: module.wait4(-pid, options),
}


def by_status(module, call, pid, options):
    """What *module* answers, whether it is this child, and what kind of usage comes with it."""
    error, result = error_of(BY_STATUS[call], module, pid, options)
    if error:
        return error, result
    usage = [(type(each), each.ru_maxrss > 0) for each in result[2:]]
    return result[0] == pid, [type(field) for field in result[:2]], result[1], usage


@functools.cache
def status_of_os(call, state, options):
    with child_in("dead" if state == "collected" else state, os.posix_spawn) as pid:
        return by_status(os, call, pid, options | os.WNOHANG), waitid(os, "pid", pid, EVERYTHING)


@pytest.mark.parametrize("call", BY_STATUS)
@every_state
def test_wait3_and_wait4_every_option(call, state, spawn):
    """The same of those that answer with a status."""
    for options in combinations(os.WUNTRACED, os.WCONTINUED):
        expected = status_of_os(call, state, options)
        with child_in(state, spawn) as pid:
            assert (by_status(coopos, call, pid, options | os.WNOHANG), waitid(coopos, "pid", pid, EVERYTHING)) == expected, options
        if expected[0][0] is True:
            with child_in(state, spawn) as pid:
                other = gevent.spawn(int)
                assert by_status(coopos, call, pid, options) == expected[0], options
                assert not other.ready()
                other.join()


ENDS = {"exit": "exit 7", "exit 255": "exit 255", "killed": "kill -KILL $$", "core": "ulimit -c 0; kill -QUIT $$"}


@pytest.mark.parametrize("script", ENDS.values(), ids=ENDS)
@in_states("dead")
def test_waitid_every_end(state, spawn, script):
    """si_status and si_code tell an exit from a signal as os.waitid does, and the status that waitid reads is waitpid's."""
    told = []
    for module, its_spawn, its_state in ((os, os.posix_spawn, "dead"), (coopos, spawn, state)):
        with child_in(its_state, its_spawn, script) as pid:
            answer = waitid(module, "pid", pid, os.WEXITED | os.WNOWAIT)
            told.append((answer, module.waitpid(pid, 0)[1]))
    assert told[0] == told[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
@in_states("dead")
def test_waitid_child_of_another_user(state, spawn):
    """si_uid is the child's, not ours."""
    arguments = [sys.executable, "-ISc", "import os; os.setuid(65534); os._exit(7)"]
    pid = spawn(sys.executable, arguments, os.environ, **OWN_GROUP)
    until_dead(pid)
    if state == "collected":
        until_collected(pid)
    assert waitid(coopos, "pid", pid, os.WEXITED) == (65534, int(signal.SIGCHLD), 7, os.CLD_EXITED)


def test_wait_dead_child():
    """(pid, status), without a switch; without children ChildProcessError."""
    pids = {dead_child(), dead_child(os.posix_spawn)}
    other = gevent.spawn(int)
    assert {coopos.wait(), coopos.wait()} == {(pid, STATUS) for pid in pids}
    assert error_of(coopos.wait) == no_child
    assert not other.ready()
    other.join()


# ---- wrong arguments ---------------------------------------------------------------------------------------------------------


class Index:
    def __init__(self, number):
        self.number = number

    def __index__(self):
        return self.number

    def __repr__(self):
        return f"Index({self.number})"


P_PIDFD = getattr(os, "P_PIDFD", 3)
WRONG = {
    "wait": [(0,), (None,)],
    "wait3": [(), (None,), ("0",), (0.0,), (4,), (1 << 20,), (-1,), (2**40,), (2**70,), (0, 0), (Index(1 << 20),)],
    "wait4": [
        *[(), (1,), (1, None), ("1", 0), (1.0, 0), (1, 0.0), (2**40, 0), (2**70, 0), (-(2**70), 0), (1, 2**40), (1, 0, 0)],
        *[(-1, 4), (-1, 1 << 20), (-1, 0x01000000), (NOBODY, 0), (-NOBODY, 0), (-(2**31), 0), (1, 0), (Index(NOBODY), Index(0))],
    ],
    "waitid": [
        *[(), (os.P_PID,), (os.P_PID, 1), (os.P_PID, 1, 4, 0), (os.P_PID, 1, None), (None, 1, 4), (os.P_PID, None, 4)],
        *[(os.P_PID, "1", 4), ("1", 1, 4), (1.0, 1, 4), (os.P_PID, 1.0, 4), (os.P_PID, 1, 4.0)],
        *[(2**40, 1, 4), (os.P_PID, 2**40, 4), (os.P_PID, 2**70, 4), (os.P_PID, 1, 2**40), (os.P_ALL, 2**40, 4)],
        *[(os.P_PID, 1, options) for options in (0, os.WNOHANG, os.WNOWAIT, 1 << 20, 4 | 1 << 20, -1)],
        *[(idtype, 1, os.WEXITED) for idtype in (99, 4, -1)],
        *[(idtype, number, os.WEXITED) for idtype in (os.P_PID, os.P_PGID) for number in (-1, -2, -(2**31), NOBODY)],
        *[(os.P_PID, 0, os.WEXITED), (os.P_PID, 1, os.WEXITED), (Index(os.P_PID), Index(NOBODY), Index(os.WEXITED))],
        *[(P_PIDFD, number, os.WEXITED) for number in (-1, -2, 10**6, 2**31 - 1)],
        *[(P_PIDFD, -1, 0), (P_PIDFD, 10**6, 1 << 20), (99, -1, 0), (P_PIDFD, 10**6, os.WSTOPPED | os.WNOHANG)],
    ],
}


@pytest.mark.parametrize(("name", "arguments"), [(name, each) for name, all in WRONG.items() for each in all], ids=repr)
def test_wait_family_wrong_arguments(name, arguments):
    """The same error as that of os, before anything is waited for."""
    other = gevent.spawn(int)
    with living_child() as (pid, end):
        expected = error_of(getattr(os, name), *arguments)
        assert expected[0] is not None
        assert error_of(getattr(coopos, name), *arguments) == expected
        assert not other.ready()
        end()
        coopos.waitpid(pid, 0)
    other.join()


@needs_p_pidfd
@pytest.mark.parametrize("options", [os.WEXITED, os.WEXITED | os.WNOHANG, os.WSTOPPED | os.WNOWAIT])
def test_waitid_pidfd_that_is_none(options):
    """A pipe and a directory are refused as os.waitid refuses them."""
    with make_pipe() as (reader, _), closing(os.open("/", os.O_RDONLY)) as (directory,):
        for fd in (reader, directory):
            expected = error_of(os.waitid, os.P_PIDFD, fd, options)
            assert expected[0] is OSError
            assert error_of(coopos.waitid, os.P_PIDFD, fd, options) == expected


@pytest.mark.parametrize("name", ["wait", "wait3", "wait4", "waitid"])
def test_wait_family_signature(name):
    """The parameters are named as those of os."""
    assert list(inspect.signature(getattr(coopos, name)).parameters) == list(inspect.signature(getattr(os, name)).parameters)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coopos.wait(), r"wait\(-1\)"),
        (lambda: coopos.wait3(0), r"wait3\(-1\)"),
        (lambda: coopos.wait4(NOBODY, 0), rf"wait4\({NOBODY}\)"),
        (lambda: coopos.waitid(os.P_PID, NOBODY, os.WEXITED), rf"waitid\({NOBODY}\)"),
        (lambda: coopos.watch(NOBODY), rf"watch\({NOBODY}\)"),
    ],
    ids=["wait", "wait3", "wait4", "waitid", "watch"],
)
def test_wait_family_message_names_the_call(call, message):
    with pytest.raises(ChildProcessError, match=message):
        call()


# ---- waiting -----------------------------------------------------------------------------------------------------------------


def ended(result):
    """(pid, raw status) of any answer that tells of an exit."""
    if isinstance(result, os.waitid_result):
        assert result.si_code == os.CLD_EXITED
        return result.si_pid, result.si_status << 8
    return result[:2]


def by_pidfd(pid, options):
    with asked("pidfd", pid) as question:
        return coopos.waitid(*question, options)


#: Every way to wait for the end of a child that leads its own group.
WAITS = {
    "wait": lambda pid: coopos.wait(),
    "wait3": lambda pid: coopos.wait3(0),
    "wait3 stops": lambda pid: coopos.wait3(os.WCONTINUED),
    "wait4": lambda pid: coopos.wait4(pid, 0),
    "wait4 any": lambda pid: coopos.wait4(-1, 0),
    "wait4 group": lambda pid: coopos.wait4(-pid, 0),
    "wait4 stops": lambda pid: coopos.wait4(pid, os.WUNTRACED | os.WCONTINUED),
    "waitid pid": lambda pid: coopos.waitid(os.P_PID, pid, os.WEXITED),
    "waitid group": lambda pid: coopos.waitid(os.P_PGID, pid, os.WEXITED),
    "waitid all": lambda pid: coopos.waitid(os.P_ALL, 0, os.WEXITED),
    "waitid stops": lambda pid: coopos.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED),
    "waitid all stops": lambda pid: coopos.waitid(os.P_ALL, 0, os.WEXITED | os.WCONTINUED),
    "waitid pidfd": lambda pid: by_pidfd(pid, os.WEXITED),
    "waitid pidfd stops": lambda pid: by_pidfd(pid, os.WEXITED | os.WSTOPPED),
}
#: One for each way in which the news comes.
SOME_WAITS = ["wait3", "wait4", "wait4 group", "waitid stops"]
every_wait = pytest.mark.parametrize(
    "wait",
    [pytest.param(wait, id=name, marks=[needs_p_pidfd] if "pidfd" in name else []) for name, wait in WAITS.items()],
)


@pytest.mark.smoke
@both_spawns
@every_wait
def test_wait_family_living_child(wait, spawn):
    """Another greenlet goes on turning until the child has ended; then it is told, once."""
    turns = []

    def turn():
        while not waiter.ready():
            turns.append(waiter.ready())
            gevent.sleep(0)

    with living_child(spawn, **OWN_GROUP) as (pid, end):
        waiter = parked(wait, pid)
        ticker = gevent.spawn(turn)
        until(lambda: len(turns) > 10)
        end()
        assert ended(result_of(waiter)) == (pid, STATUS)
        ticker.join()
        assert error_of(coopos.waitpid, pid, 0) == no_child


@both_spawns
@every_wait
def test_wait_family_three_waiters(wait, spawn):
    """One is told, the two others that there is no such child."""
    with living_child(spawn, **OWN_GROUP) as (pid, end):
        waiters = [parked(error_of, wait, pid) for _ in range(3)]
        end()
        results = [result_of(waiter) for waiter in waiters]
    assert sorted(result == no_child for result in results) == [False, True, True]
    assert [ended(result) for error, result in results if error is None] == [(pid, STATUS)]


@both_spawns
def test_wait_family_all_at_once(spawn):
    """One greenlet for each way to wait, and of several threads' hubs: one is told, the others that there is no such child."""
    waits = [wait for name, wait in WAITS.items() if "pidfd" not in name or hasattr(os, "P_PIDFD")]
    with contextlib.ExitStack() as stack:
        pid, end = stack.enter_context(living_child(spawn, **OWN_GROUP))
        threads = [stack.enter_context(HubThread()) for _ in range(3)]
        here = [parked(error_of, wait, pid) for wait in waits]
        there = [(thread, thread.parked(error_of, wait, pid)) for thread in threads for wait in waits]
        end()
        results = [result_of(waiter) for waiter in here] + [thread.result_of(waiter) for thread, waiter in there]
    assert [ended(result) for error, result in results if error is None] == [(pid, STATUS)]
    assert results.count(no_child) == len(results) - 1


@both_spawns
@every_wait
def test_wait_family_child_of_another_thread(wait, spawn):
    """A child started in one thread is waited for in another, living or dead."""
    with HubThread() as one, HubThread() as two:
        with living_child(spawn_in(one, spawn), **OWN_GROUP) as (pid, end):
            waiter = two.parked(wait, pid)
            end()
            assert ended(two.result_of(waiter)) == (pid, STATUS)
        pid = one.call(functools.partial(dead_child, spawn, **OWN_GROUP))
        if wait in (WAITS["waitid pidfd"], WAITS["waitid pidfd stops"]):
            wait = WAITS["waitid pid"]  # to open a pidfd now may be too late
        assert ended(two.call(wait, pid)) == (pid, STATUS)
        assert one.call(error_of, coopos.waitpid, pid, 0) == no_child


@both_spawns
@every_wait
def test_wait_family_timeout_and_kill(wait, spawn):
    """Either leaves the child waitable, and no worker at it; the fixture looks for the rest."""
    with living_child(spawn, **OWN_GROUP) as (pid, end):
        for _ in range(3):
            with gevent.Timeout(0, False):
                wait(pid)
                pytest.fail("nothing has ended")
        waiters = [parked(wait, pid) for _ in range(3)]
        waiters[0].kill()
        waiters[2].kill()
        end()
        assert ended(result_of(waiters[1])) == (pid, STATUS)
    until(lambda: not count_questions())


@both_spawns
@every_wait
def test_wait_family_thrown_error(wait, spawn):
    """What another greenlet throws into one that waits comes out of it, also where it is an OSError, and takes nothing."""
    with living_child(spawn, **OWN_GROUP) as (pid, end):
        for error in (ProcessLookupError(errno.ESRCH, "thrown"), ChildProcessError(errno.ECHILD, "thrown"), TimeoutError()):
            waiter = parked(wait, pid)
            waiter.kill(error, block=False)
            turn_loop()
            assert waiter.exception is error
        end()
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


@both_spawns
@every_wait
def test_wait_family_killed_in_the_turn_in_which_the_child_ends(wait, spawn):
    """Whether the kill or the news comes first, the status is not lost with the greenlet."""
    with living_child(spawn, **OWN_GROUP) as (pid, end):
        waiter = parked(wait, pid)
        end()
        until_dead(pid)
        waiter.kill()
        if waiter.value is None or isinstance(waiter.value, gevent.GreenletExit):
            assert coopos.waitpid(pid, 0) == (pid, STATUS)
        else:
            assert ended(waiter.value) == (pid, STATUS)
            assert error_of(coopos.waitpid, pid, 0) == no_child


@every_wait
def test_wait_family_stolen_child(wait):
    """Somebody else collects a watched child under those who wait: its status or ChildProcessError, never a hang."""
    with living_child(**OWN_GROUP) as (pid, end):
        waiter = parked(error_of, wait, pid)
        end()
        os.waitpid(pid, 0)
        error, result = result_of(waiter)
        assert (error, result) == no_child or ended(result) == (pid, STATUS)
        with contextlib.suppress(ChildProcessError):
            assert coopos.waitpid(pid, 0) == (pid, STATUS)


STOLEN = {
    "wait4": lambda pid, pidfd: coopos.wait4(pid, 0),
    "waitid pid": lambda pid, pidfd: coopos.waitid(os.P_PID, pid, os.WEXITED),
    "waitid pidfd": lambda pid, pidfd: coopos.waitid(os.P_PIDFD, pidfd, os.WEXITED),
}


@needs_reaped_status
@pytest.mark.parametrize("wait", STOLEN.values(), ids=STOLEN)
@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "unnoticed"])
def test_wait_family_stolen_status(wait, noticed):
    """The status of a watched child that somebody else has collected is told, whichever way it is asked for."""
    pid = coopos.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], os.environ)
    with closing(os.pidfd_open(pid)) as (pidfd,):
        os.waitpid(pid, 0)
        if noticed:
            turn_loop()
        error, result = error_of(wait, pid, pidfd)
        left = error_of(coopos.waitpid, pid, 0)
    assert error is None
    assert ended(result) == (pid, STATUS)
    assert left == no_child
    if isinstance(result, os.waitid_result):
        assert tuple(result) == (pid, os.getuid(), signal.SIGCHLD, 7, os.CLD_EXITED)
    else:
        assert tuple(result[2]) == (0,) * 16


# ---- stops and continues -----------------------------------------------------------------------------------------------------


@both_spawns
@idtypes
def test_waitid_stop_continue_and_end(spawn, idtype):
    """Each is waited for by its own flag, and told as os.waitid tells it; the others go by unseen."""
    with living_child(spawn, **OWN_GROUP) as (pid, end), asked(idtype, pid) as question:
        exits = parked(coopos.waitid, *question, os.WEXITED)
        for sent, flag, code, status in (
            (signal.SIGSTOP, os.WSTOPPED, os.CLD_STOPPED, signal.SIGSTOP),
            (signal.SIGCONT, os.WCONTINUED, os.CLD_CONTINUED, signal.SIGCONT),
            (signal.SIGTSTP, os.WSTOPPED, os.CLD_STOPPED, signal.SIGTSTP),
            (signal.SIGCONT, os.WCONTINUED, os.CLD_CONTINUED, signal.SIGCONT),
        ):
            waiter = parked(coopos.waitid, *question, flag)
            os.kill(pid, sent)
            assert tuple(result_of(waiter)) == (pid, os.getuid(), signal.SIGCHLD, status, code)
            assert coopos.waitid(*question, flag | os.WNOHANG) is None
            assert not exits.ready()
        end()
        assert tuple(result_of(exits)) == (pid, os.getuid(), signal.SIGCHLD, 7, os.CLD_EXITED)


@both_spawns
@idtypes
def test_waitid_stop_that_never_comes(spawn, idtype):
    """Who waits for a stop or a continue only is told, when the child has ended, that there is none; the status stays."""
    with living_child(spawn, **OWN_GROUP) as (pid, end), asked(idtype, pid) as question:
        waiters = [parked(error_of, coopos.waitid, *question, flag) for flag in (os.WSTOPPED, os.WCONTINUED)]
        end()
        assert [result_of(waiter) for waiter in waiters] == [no_child] * 2
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


@both_spawns
@pytest.mark.parametrize("call", ["wait3", "wait4", "wait4 any", "wait4 group"])
def test_wait4_stop_and_continue(spawn, call):
    """Both are told with the kernel's status, and take nothing of the end."""
    with living_child(spawn, **OWN_GROUP) as (pid, end):
        for sent, option, status in (
            (signal.SIGSTOP, os.WUNTRACED, signal.SIGSTOP << 8 | 0x7F),
            (signal.SIGCONT, os.WCONTINUED, 0xFFFF),
        ):
            waiter = parked(BY_STATUS[call], coopos, pid, option)
            os.kill(pid, sent)
            got, got_status, usage = result_of(waiter)
            assert (got, got_status) == (pid, status)
            assert type(usage) is resource.struct_rusage
        end()
        assert coopos.wait4(pid, 0)[:2] == (pid, STATUS)


@both_spawns
@idtypes
def test_waitid_stop_that_is_only_looked_at(spawn, idtype):
    """WNOWAIT leaves the report of a stop to the next, who takes it."""
    with living_child(spawn, **OWN_GROUP) as (pid, end), asked(idtype, pid) as question:
        waiters = [parked(coopos.waitid, *question, os.WSTOPPED | os.WNOWAIT) for _ in range(3)]
        os.kill(pid, signal.SIGSTOP)
        stop = (pid, os.getuid(), signal.SIGCHLD, signal.SIGSTOP, os.CLD_STOPPED)
        assert [tuple(result_of(waiter)) for waiter in waiters] == [stop] * 3
        assert tuple(coopos.waitid(*question, os.WSTOPPED)) == stop
        assert coopos.waitid(*question, os.WSTOPPED | os.WNOHANG) is None
        os.kill(pid, signal.SIGCONT)
        end()
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


# ---- looking without taking --------------------------------------------------------------------------------------------------

LOOK = os.WEXITED | os.WNOWAIT


@both_spawns
@idtypes
def test_waitid_wnowait_living_child(spawn, idtype):
    """Any number of greenlets are told, and the child is left to who waits."""
    with living_child(spawn, **OWN_GROUP) as (pid, end), asked(idtype, pid, spawn) as question:
        lookers = [parked(coopos.waitid, *question, LOOK) for _ in range(3)]
        end()
        exit_7 = (pid, os.getuid(), signal.SIGCHLD, 7, os.CLD_EXITED)
        assert [tuple(result_of(looker)) for looker in lookers] == [exit_7] * 3
        assert tuple(coopos.waitid(*question, LOOK)) == exit_7
        turn_loop()
        assert tuple(coopos.waitid(*question, LOOK | os.WNOHANG)) == exit_7
        assert tuple(coopos.waitid(*question, os.WEXITED)) == exit_7
        assert error_of(coopos.waitid, *question, LOOK) == no_child


@both_spawns
@idtypes
@pytest.mark.parametrize("first", ["who looks", "who waits"])
def test_waitid_wnowait_while_another_waits(spawn, idtype, first):
    """Who waits gets the status; who looks is told it, or that it is gone."""
    with living_child(spawn, **OWN_GROUP) as (pid, end), asked(idtype, pid, spawn) as question:
        if first == "who looks":
            looker = parked(error_of, coopos.waitid, *question, LOOK)
        waiter = parked(coopos.waitpid, pid, 0)
        if first == "who waits":
            looker = parked(error_of, coopos.waitid, *question, LOOK)
        end()
        assert result_of(waiter) == (pid, STATUS)
        looked = result_of(looker)
        assert looked == no_child or tuple(looked[1]) == (pid, os.getuid(), signal.SIGCHLD, 7, os.CLD_EXITED)
        assert error_of(coopos.waitpid, pid, 0) == no_child


@both_spawns
@idtypes
def test_waitid_wnowait_dead_child_that_another_waits_for(spawn, idtype):
    """A look at a child that is dead, whose waiter has not run yet, takes nothing from it."""
    with living_child(spawn, **OWN_GROUP) as (pid, end), asked(idtype, pid, spawn) as question:
        waiter = parked(coopos.waitpid, pid, 0)
        end()
        until_dead(pid)
        exit_7 = (pid, os.getuid(), signal.SIGCHLD, 7, os.CLD_EXITED)
        assert tuple(coopos.waitid(*question, LOOK)) == exit_7
        assert tuple(coopos.waitid(*question, LOOK | os.WNOHANG)) == exit_7
        assert result_of(waiter) == (pid, STATUS)


# ---- usage -------------------------------------------------------------------------------------------------------------------

BURN = "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; exit 7"
FIELDS = "ru_utime ru_stime maxrss ixrss idrss isrss minflt majflt nswap inblock oublock msgsnd msgrcv nsignals nvcsw nivcsw"


def usage_of_the_kernel(pid):
    """The rusage of a dead child that is left as it is: the system call tells it, os.waitid doesn't."""
    number = {"x86_64": 247, "aarch64": 95}.get(platform.machine())
    if sys.platform != "linux" or number is None:
        pytest.skip("no system call number for this machine")
    usage = (ctypes.c_long * 18)()
    assert ctypes.CDLL(None).syscall(number, os.P_PID, pid, None, os.WEXITED | os.WNOWAIT, usage) == 0
    return (usage[0] + usage[1] * 1e-6, usage[2] + usage[3] * 1e-6, *usage[4:])


@in_states("dead")
@pytest.mark.parametrize("call", ["wait3", "wait4", "wait4 any", "wait4 group"])
def test_wait4_usage(spawn, call, state):
    """Each field is the kernel's, of a child that has used processor time."""
    with living_child(spawn, "read line; " + BURN, **OWN_GROUP) as (pid, end):
        end()
        until_dead(pid)
        expected = usage_of_the_kernel(pid)
        if state == "collected":
            until_collected(pid)
        got, status, usage = BY_STATUS[call](coopos, pid, 0)
    assert (got, status) == (pid, STATUS)
    assert type(usage) is resource.struct_rusage
    assert tuple(usage) == expected
    assert [type(field) for field in usage] == [float, float] + [int] * 14
    assert usage.ru_utime + usage.ru_stime > 0 and usage.ru_maxrss > 0 and usage.ru_minflt > 0


@both_spawns
@pytest.mark.parametrize("call", ["wait3", "wait4", "wait4 group"])
def test_wait4_usage_of_a_child_that_was_waited_for(spawn, call):
    """A greenlet that waited while the child burned is told what os.wait4 tells of a twin, give or take."""
    _, status, twins = os.wait4(spawn_sh(os.posix_spawn, BURN), 0)
    with living_child(spawn, "read line; " + BURN, **OWN_GROUP) as (pid, end):
        waiter = parked(BY_STATUS[call], coopos, pid, 0)
        end()
        got, got_status, usage = result_of(waiter)
    assert (got, got_status) == (pid, status)
    assert twins.ru_utime + twins.ru_stime < 20 * (usage.ru_utime + usage.ru_stime)
    assert usage.ru_utime + usage.ru_stime < 20 * (twins.ru_utime + twins.ru_stime)
    assert usage.ru_maxrss < 2 * twins.ru_maxrss < 4 * usage.ru_maxrss


@both_spawns
def test_wait4_usage_when_there_is_nothing_to_report(spawn):
    """All zero, as of os.wait4, and not what an earlier child has used."""
    coopos.wait4(spawn_sh(spawn, "exit 7"), 0)
    with living_child(spawn) as (pid, end):
        assert coopos.wait4(pid, os.WNOHANG) == os.wait4(pid, os.WNOHANG)
        assert tuple(coopos.wait3(os.WNOHANG)[2]) == (0,) * 16
        end()
        coopos.waitpid(pid, 0)


# ---- groups ------------------------------------------------------------------------------------------------------------------

GROUP_WAITS = {
    "waitpid": lambda group: coopos.waitpid(-group, 0),
    "wait4": lambda group: coopos.wait4(-group, 0),
    "waitid": lambda group: coopos.waitid(os.P_PGID, group, os.WEXITED),
}
group_waits = pytest.mark.parametrize("wait", GROUP_WAITS.values(), ids=GROUP_WAITS)


@both_spawns
@group_waits
def test_wait_family_child_that_joins_the_group(wait, spawn):
    """A child that becomes a member after the wait began is told, one that isn't is not."""
    with (
        living_child(spawn, **OWN_GROUP) as (leader, end_leader),
        living_child(os.posix_spawn, "read line; exit 3", **OWN_GROUP) as (stranger, end_stranger),
        # After execve(2) only the child itself may change its group.
        joining_child(spawn, leader) as (pid, join, end),
    ):
        waiter = parked(wait, leader)
        join()
        end_stranger()
        until_dead(stranger)
        turn_loop()
        assert not waiter.ready()
        end()
        assert ended(result_of(waiter)) == (pid, STATUS)
        end_leader()
        assert ended(wait(leader)) == (leader, STATUS)
        assert error_of(wait, leader) == no_child
        assert os.waitpid(stranger, 0) == (stranger, 3 << 8)


@contextlib.contextmanager
def joining_child(spawn, group):
    """(pid, join, end): a child that joins a group when join() is called, which returns when it has."""
    source = f"import os; os.read(0, 1); os.setpgid(0, {group}); os.write(1, b'x'); os.read(0, 1); os._exit(7)"
    with make_pipe(blocking=True) as (commands, command), make_pipe(blocking=True) as (answer, answers):
        actions = [(os.POSIX_SPAWN_DUP2, commands, 0), (os.POSIX_SPAWN_DUP2, answers, 1)]
        pid = spawn(sys.executable, [sys.executable, "-ISc", source], os.environ, file_actions=actions)

        def join():
            os.write(command, b"x")
            assert os.read(answer, 1) == b"x"
            assert os.getpgid(pid) == group

        yield pid, join, functools.partial(os.write, command, b"x")


@both_spawns
@group_waits
def test_wait_family_own_group(wait, spawn):
    """Group 0 is the caller's own: children of other groups are not told."""
    with living_child(spawn) as (pid, end), living_child(spawn, "read line; exit 3", **OWN_GROUP) as (other, end_other):
        waiter = parked(wait, 0)
        end_other()
        until_dead(other)
        turn_loop()
        assert not waiter.ready()
        end()
        assert ended(result_of(waiter)) == (pid, STATUS)
        assert error_of(wait, 0) == no_child
        assert coopos.waitpid(other, 0) == (other, 3 << 8)


# ---- pidfds ------------------------------------------------------------------------------------------------------------------


@needs_p_pidfd
@both_spawns
@pytest.mark.parametrize("options", [os.WEXITED, os.WEXITED | os.WNOWAIT, os.WEXITED | os.WSTOPPED])
def test_waitid_nonblocking_pidfd(spawn, options):
    """BlockingIOError, without a switch, until the process has ended; under WNOHANG None."""
    with living_child(spawn) as (pid, end), closing(os.pidfd_open(pid, os.O_NONBLOCK)) as (pidfd,):
        other = gevent.spawn(int)
        assert error_of(coopos.waitid, os.P_PIDFD, pidfd, options) == error_of(os.waitid, os.P_PIDFD, pidfd, options)
        assert error_of(coopos.waitid, os.P_PIDFD, pidfd, options) == (BlockingIOError, errno.EAGAIN)
        assert coopos.waitid(os.P_PIDFD, pidfd, options | os.WNOHANG) is None
        assert not other.ready()
        end()
        until_dead(pid)
        assert ended(coopos.waitid(os.P_PIDFD, pidfd, options)) == (pid, STATUS)
        other.join()
        with contextlib.suppress(ChildProcessError):
            coopos.waitpid(pid, 0)


@needs_pidfs
@pytest.mark.parametrize("options", [os.WEXITED, os.WEXITED | os.WNOHANG, os.WEXITED | os.WSTOPPED])
def test_waitid_pidfd_of_a_collected_child(options):
    """The status that coopos has collected is told of the pidfd too, of this child and no other, and once."""
    with contextlib.ExitStack() as stack:
        pids, pidfds = [], []
        for code in (7, 8, 9):
            pids.append(spawn_sh(coopos.posix_spawn, f"exit {code}"))
            pidfds.extend(stack.enter_context(closing(os.pidfd_open(pids[-1]))))
            until_dead(pids[-1])
            until_collected(pids[-1])
        for pid, pidfd, code in reversed(list(zip(pids, pidfds, (7, 8, 9), strict=True))):
            exit_code = (pid, os.getuid(), signal.SIGCHLD, code, os.CLD_EXITED)
            assert error_of(os.waitid, os.P_PIDFD, pidfd, options) == no_child
            assert tuple(coopos.waitid(os.P_PIDFD, pidfd, options | os.WNOWAIT)) == exit_code
            assert tuple(coopos.waitid(os.P_PIDFD, pidfd, options)) == exit_code
            assert error_of(coopos.waitid, os.P_PIDFD, pidfd, options) == no_child
            assert error_of(coopos.waitpid, pid, 0) == no_child


@needs_p_pidfd
@pytest.mark.parametrize("options", [os.WEXITED, os.WEXITED | os.WNOHANG, os.WSTOPPED])
def test_waitid_pidfd_of_a_stranger(options):
    """A process that is no child, and one that is no more: ChildProcessError."""
    pid = coopos.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], os.environ)
    with closing(os.pidfd_open(pid), os.pidfd_open(os.getppid()), os.pidfd_open(os.getpid())) as pidfds:
        coopos.waitpid(pid, 0)
        other = gevent.spawn(int)
        for pidfd in pidfds:
            assert error_of(os.waitid, os.P_PIDFD, pidfd, options) == no_child
            assert error_of(coopos.waitid, os.P_PIDFD, pidfd, options) == no_child
        assert not other.ready()
        other.join()


@needs_p_pidfd
@both_spawns
def test_waitid_pidfd_that_is_closed_while_it_is_waited_for(spawn):
    """The child is waited for, not the descriptor."""
    with living_child(spawn) as (pid, end):
        with closing(os.pidfd_open(pid)) as (pidfd,):
            waiter = parked(coopos.waitid, os.P_PIDFD, pidfd, os.WEXITED)
        end()
        assert ended(result_of(waiter)) == (pid, STATUS)


@needs_p_pidfd
def test_waitid_pidfd_without_descriptors():
    """A wait by pidfd needs no further descriptor."""
    run_script("""
        import os, resource, gevent, coopos
        gevent.sleep(0)
        reader, writer = os.pipe()
        for spawn in (coopos.posix_spawn, os.posix_spawn):
            reader, writer = os.pipe()
            pid = spawn("/bin/sh", ["sh", "-c", "read line; exit 7"], os.environ,
                        file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0)])
            pidfd = os.pidfd_open(pid)
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
            waiter = gevent.spawn(coopos.waitid, os.P_PIDFD, pidfd, os.WEXITED)
            gevent.sleep(0)
            os.close(writer)
            assert waiter.get(timeout=30).si_status == 7
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    """)


@needs_linux
@both_spawns
def test_wait4_linux_options(spawn):
    """__WALL and __WNOTHREAD change nothing of a plain child; of __WCLONE it is none."""
    wall, nothread, clone = 0x40000000, 0x20000000, -(2**31)
    for options in (wall, nothread, wall | nothread):
        pid = spawn_sh(spawn, "exit 7")
        assert coopos.wait4(pid, options)[:2] == (pid, STATUS)
    pid = dead_child(spawn)
    try:
        assert error_of(os.wait4, pid, clone) == no_child
        assert error_of(coopos.wait4, pid, clone) == no_child
    finally:
        with contextlib.suppress(ChildProcessError):
            coopos.waitpid(pid, 0)


# ---- whose child, and who else waits -----------------------------------------------------------------------------------------

SOURCES = """
import contextlib, ctypes, multiprocessing, os, signal, subprocess, sys, threading, gevent, coopos

def forked(fork):
    pid = fork()
    if pid == 0:
        while True:
            signal.pause()
    return pid

def spawned(posix_spawn):
    return posix_spawn("/bin/sh", ["sh", "-c", "exec sleep 1000"], os.environ)

def by_c_library():
    # What comes back from fork() in C knows nothing of the interpreter's hooks: it may only wait for its end.
    libc = ctypes.PyDLL(None)
    pid = libc.fork()
    if pid == 0:
        while True:
            libc.pause()
    return pid

def by_multiprocessing():
    process = multiprocessing.get_context("fork").Process(target=signal.pause)
    process.start()
    processes.append(process)
    return process.pid

def by_subprocess():
    process = subprocess.Popen(["sh", "-c", "exec sleep 1000"])
    processes.append(process)
    return process.pid

def end(pid):
    os.kill(pid, signal.SIGKILL)

def leave():
    for process in processes:
        process.returncode = 0  # it was waited for, and need not warn
    os._exit(0)

processes = []
sources = {
    "coopos.fork": lambda: forked(coopos.fork),
    "coopos.fork_gevent": lambda: forked(coopos.fork_gevent),
    "os.fork": lambda: forked(os.fork),
    "os.posix_spawn": lambda: spawned(os.posix_spawn),
    "a C library": by_c_library,
    "multiprocessing": by_multiprocessing,
    "subprocess": by_subprocess,
}
"""
SOURCE_NAMES = [line.split('"')[1] for line in SOURCES.splitlines() if line.startswith('    "')]
every_source = pytest.mark.parametrize("source", SOURCE_NAMES)


@every_source
def test_wait_family_child_of_any_source(source):
    """A child is waited for in each way, living and dead, whoever made it."""
    run_script(
        SOURCES
        + f"make = sources[{source!r}]\n"
        + """
waits = [
    lambda pid: coopos.wait4(pid, 0)[:2],
    lambda pid: coopos.wait(),
    lambda pid: coopos.wait3(os.WUNTRACED)[:2],
    lambda pid: coopos.wait4(0, 0)[:2],
    lambda pid: (coopos.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT), coopos.waitpid(pid, 0))[1],
    lambda pid: (coopos.waitid(os.P_ALL, pid, os.WEXITED).si_pid, signal.SIGKILL),
]
pids = [make() for _ in waits]  # before there are threads
for pid, wait in zip(pids, waits):
    waiter = gevent.spawn(wait, pid)
    gevent.sleep(0)
    assert not waiter.ready()
    end(pid)
    assert waiter.get(timeout=30) == (pid, signal.SIGKILL), waiter
leave()
"""
    )


def test_wait_family_leaves_children_to_others():
    """A library that starts children and waits for them in a plain thread gets each, also after a thousand of ours."""
    run_script("""
        import os, queue, threading, gevent, coopos

        def start(code):
            reader, writer = os.pipe()
            pid = os.posix_spawn("/bin/sh", ["sh", "-c", f"read line; exit {code}"], os.environ,
                                 file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0)])
            os.close(reader)
            return pid, writer

        class Library(threading.Thread):
            def run(self):
                self.living, self.dead = start(3), start(4)
                os.close(self.dead[1])
                os.waitid(os.P_PID, self.dead[0], os.WEXITED | os.WNOWAIT)
                started.set()
                assert thousand.wait(60)
                os.close(self.living[1])
                self.told = [os.waitpid(self.living[0], 0), os.waitid(os.P_PID, self.dead[0], os.WEXITED).si_status]

        started, thousand = threading.Event(), threading.Event()
        library = Library()
        library.start()
        started.wait()
        waits = [
            lambda pid: coopos.waitpid(pid, 0)[1],
            lambda pid: coopos.waitpid(-pid, os.WUNTRACED)[1],
            lambda pid: coopos.wait4(pid, 0)[1],
            lambda pid: coopos.waitid(os.P_PID, pid, os.WEXITED).si_status << 8,
            lambda pid: coopos.waitid(os.P_PGID, pid, os.WEXITED).si_status << 8,
        ]
        for batch in range(20):
            pids = [
                (coopos.posix_spawn if n % 2 else os.posix_spawn)("/bin/true", ["true"], os.environ, setpgroup=0) for n in range(50)
            ]
            waiters = [gevent.spawn(waits[n % len(waits)], pid) for n, pid in enumerate(pids)]
            gevent.joinall(waiters)
            assert [waiter.value for waiter in waiters] == [0] * 50
        thousand.set()
        library.join()
        assert library.told == [(library.living[0], 3 << 8), 4]
        try:
            coopos.wait()
        except ChildProcessError:
            pass
        else:
            raise AssertionError("one was left")
    """)


ALL_WAYS = """
import os, signal, socket, gevent, coopos

def living(spawn, group=None):
    reader, writer = os.pipe()
    pid = spawn("/bin/sh", ["sh", "-c", "read line; exit 7"], os.environ, setpgroup=0,
                file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0)])
    os.close(reader)
    return pid, writer

WAYS = {
    "waitpid": lambda pid: coopos.waitpid(pid, 0)[1],
    "wait": lambda pid: coopos.wait()[1],
    "wait3": lambda pid: coopos.wait3(0)[1],
    "wait4": lambda pid: coopos.wait4(pid, os.WUNTRACED)[1],
    "waitid": lambda pid: coopos.waitid(os.P_PID, pid, os.WEXITED).si_status << 8,
    "waitid all": lambda pid: coopos.waitid(os.P_ALL, 0, os.WEXITED).si_status << 8,
    "waitid group": lambda pid: coopos.waitid(os.P_PGID, pid, os.WEXITED).si_status << 8,
    "waitid look": lambda pid: (coopos.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT), coopos.waitpid(pid, 0))[1][1],
    "watch": lambda pid: (coopos.watch(pid), coopos.waitpid(pid, 0))[1][1],
}
if hasattr(os, "pidfd_open"):
    WAYS["wait_exit"] = lambda pid: (coopos.wait_exit(pid), coopos.waitpid(pid, 0))[1][1]

def in_all_ways(meanwhile=lambda: None):
    for spawn in (coopos.posix_spawn, os.posix_spawn):
        for name, wait in WAYS.items():
            pid, writer = living(spawn)
            waiter = gevent.spawn(wait, pid)
            gevent.sleep(0)
            assert not waiter.ready()
            meanwhile()
            os.close(writer)
            assert waiter.get(timeout=30) == 7 << 8, name
            meanwhile()
"""


@needs_proc
def test_wait_family_leaves_signals_alone():
    """Nothing of it changes which signals are caught, ignored or blocked: not before, not meanwhile, not afterwards."""
    run_script(
        ALL_WAYS
        + """
def signals():
    # Less those that the C library keeps for its threads, and the one that nobody else sends, by which a worker's call is ended.
    others = 0x7FFFFFFF & ~(1 << getattr(signal, "SIGSTKFLT", 16) - 1)
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return [int(fields[name], 16) & others for name in ("SigCgt", "SigIgn", "SigBlk")]

gevent.sleep(0)
before = signals()
handlers = [signal.getsignal(number) for number in signal.valid_signals()]

def check():
    assert signals() == before, (signals(), before)
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers

in_all_ways(check)
"""
    )


@pytest.mark.parametrize("installed", ["before", "during"])
def test_wait_family_sigchld_handler(installed):
    """A handler of the program's own is called for each child, and changes nothing."""
    run_script(
        ALL_WAYS
        + f"""
calls = []

def handler(number, frame):
    assert number == signal.SIGCHLD
    calls.append(number)

def install():
    calls.clear()
    signal.signal(signal.SIGCHLD, handler)

if {installed!r} == "before":
    install()
for name in list(WAYS):
    def wait(pid, wait=WAYS[name]):
        status = wait(pid)
        while not calls:
            gevent.sleep(0)
        calls.clear()
        return status
    WAYS[name] = wait
in_all_ways(install if {installed!r} == "during" else lambda: None)
assert signal.getsignal(signal.SIGCHLD) is handler
"""
    )


def test_wait_family_wakeup_fd():
    """The descriptor given to signal.set_wakeup_fd is written to for each child, and stays set."""
    run_script(
        ALL_WAYS
        + """
reader, writer = socket.socketpair()
for end in (reader, writer):
    end.setblocking(False)
signal.signal(signal.SIGCHLD, lambda *args: None)
signal.set_wakeup_fd(writer.fileno())
for name in list(WAYS):
    def wait(pid, wait=WAYS[name]):
        status = wait(pid)
        while True:
            try:
                assert set(reader.recv(100)) == {signal.SIGCHLD}
                return status
            except BlockingIOError:
                gevent.sleep(0)
    WAYS[name] = wait
in_all_ways()
assert signal.set_wakeup_fd(-1) == writer.fileno()
reader.close()
writer.close()
"""
    )


def test_wait_family_while_sigchld_is_ignored():
    """The kernel reaps each child itself: its status where the kernel tells it, else ChildProcessError; never a hang."""
    run_script(
        ALL_WAYS
        + f"""
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for name in list(WAYS):
    def wait(pid, name=name, wait=WAYS[name]):
        try:
            return wait(pid)
        except ChildProcessError:
            # It is told only of a child that was looked for by its pid while it lived.
            assert not {TELLS_REAPED_STATUS} or name not in ("waitpid", "watch")
            return 7 << 8
        finally:
            try:
                coopos.waitpid(pid, 0)  # no status is left to the next
            except ChildProcessError:
                pass
    WAYS[name] = wait
in_all_ways()
assert signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
"""
    )


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
