"""waitpid: whose status is told, how often, and what is left behind.

Children are programs started by posix_spawn, so that most tests need no interpreter of their own. What forks is in tests/forking.
"""

import contextlib
import errno
import gc
import inspect
import os
import signal

import gevent
import pytest
from gevent.hub import get_hub

import coopos

from ..helpers.children import (
    HAS_PIDFDS,
    OWN_GROUP,
    STATUS,
    both_spawns,
    collected_child,
    count_questions,
    dead_child,
    living_child,
    needs_pidfds,
    no_child,
    question_about,
    spawn_sh,
    start,
    until_dead,
    until_stopped,
    waited_child,
)
from ..helpers.support import error_of, open_fds, parked, result_of, run_script, turn_loop, until

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
