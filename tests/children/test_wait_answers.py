"""The rest of the wait family: each question, about each kind of child, beside what os answers of its twin."""

import contextlib
import ctypes
import functools
import inspect
import itertools
import os
import platform
import resource
import signal
import sys

import gevent
import pytest

import coopos

from ..helpers.children import (
    NOBODY,
    OWN_GROUP,
    STATUS,
    asked,
    both_spawns,
    dead_child,
    living_child,
    needs_p_pidfd,
    no_child,
    spawn_sh,
    until_collected,
    until_dead,
    until_stopped,
)
from ..helpers.support import Index, closing, error_of, make_pipe, parked, result_of, turn_loop

# ---- what can be asked, and of whom ------------------------------------------------------------------------------------------

idtypes = pytest.mark.parametrize("idtype", ["pid", "group", "all", pytest.param("pidfd", marks=needs_p_pidfd)])


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
