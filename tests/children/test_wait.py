"""The rest of the wait family: who waits, for children of whoever's, in groups and by pidfd."""

import contextlib
import errno
import functools
import os
import signal
import sys

import gevent
import pytest

import coopos

from ..helpers.children import (
    OWN_GROUP,
    SOURCES,
    STATUS,
    TELLS_REAPED_STATUS,
    WAITS,
    both_spawns,
    count_questions,
    dead_child,
    ended,
    every_source,
    living_child,
    needs_linux,
    needs_p_pidfd,
    needs_pidfs,
    needs_proc,
    needs_reaped_status,
    no_child,
    spawn_in,
    spawn_sh,
    until_collected,
    until_dead,
)
from ..helpers.support import HubThread, closing, error_of, make_pipe, parked, result_of, run_script, turn_loop, until

# ---- waiting -----------------------------------------------------------------------------------------------------------------

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
