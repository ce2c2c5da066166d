"""The set of a loop: all that coopos waits for in it, behind one watcher. What it tells is a hint."""

import contextlib
import errno
import gc
import os
import socket
import threading

import gevent
import gevent.event
import greenlet as greenlets
import pytest
from gevent.hub import get_hub

import coopos
from coopos import _core

from ..helpers.support import (
    LOOP,
    HubThread,
    active_watchers,
    clog,
    closing,
    drain,
    error_of,
    make_clogged_pipe,
    make_pipe,
    parked,
    result_of,
    run_script,
    turn_loop,
)

BAD_FD = (OSError, errno.EBADF)
HAS_SETS = os.path.exists("/proc/self") and os.environ.get("COOPOS_SETS") != "watchers"
needs_sets = pytest.mark.skipif(not HAS_SETS, reason="no epoll, or COOPOS_SETS=watchers")


@needs_sets
def test_loop_never_sees_the_number_of_what_is_waited_for():
    """So no loop changes its flags, and none aborts when it is closed."""
    with make_pipe(blocking=True) as (reader, writer), make_clogged_pipe(blocking=True) as (_reader, clogged, _size):
        waiters = [parked(coopos.read, reader, 1), parked(coopos.write, clogged, b"x")]
        assert not {reader, clogged} & {getattr(watcher, "fd", None) for watcher in active_watchers()}
        os.write(writer, b"1")
        assert result_of(waiters[0]) == b"1"
        gevent.killall(waiters)


def test_many_waits_leave_nothing():
    """A thousand parked greenlets give back what they took."""
    before = None
    for _ in range(2):
        with make_pipe() as (reader, _writer):
            waiters = [gevent.spawn(coopos.nb_read, reader, 1) for _ in range(1000)]
            turn_loop()
            gevent.killall(waiters)
        waiters = None
        turn_loop()
        gc.collect()
        count = sum(isinstance(each, _core.Wait) or type(each).__name__ == "io" for each in gc.get_objects())
        before = count if before is None else before
    assert count <= before


@pytest.mark.parametrize("n", [3, 300, 700])
def test_all_that_is_ready_at_once_is_told(n):
    """More than one look takes."""
    with contextlib.ExitStack() as stack:
        pipes = [stack.enter_context(make_pipe()) for _ in range(n)]
        waiters = [gevent.spawn(coopos.nb_read, reader, 1) for reader, _writer in pipes]
        turn_loop()
        for _reader, writer in pipes:
            os.write(writer, b"x")
        gevent.joinall(waiters, timeout=20)
        assert [waiter.value for waiter in waiters] == [b"x"] * n


def test_more_numbers_of_one_file_than_the_kernel_takes_into_a_set_of_a_set():
    with make_pipe() as (reader, writer), closing(*[os.dup(reader) for _ in range(700)]) as copies:
        waiters = [gevent.spawn(coopos.nb_read, fd, 1) for fd in copies[:100]]
        turn_loop()
        waiters += [gevent.spawn(coopos.nb_read, fd, 1) for fd in copies[100:]]
        turn_loop()
        os.write(writer, b"x" * 700)
        gevent.joinall(waiters, timeout=20)
        assert [waiter.value for waiter in waiters] == [b"x"] * 700


def test_reader_and_writer_of_one_descriptor_are_told_each_of_its_own():
    ours, theirs = socket.socketpair()
    with theirs, closing(ours.detach()) as (fd,):
        os.set_blocking(fd, False)
        size = clog(fd)
        reader, writer = parked(coopos.nb_read, fd, 1), parked(coopos.nb_write, fd, b"y")
        theirs.send(b"a")
        assert result_of(reader) == b"a"
        turn_loop()
        assert not writer.ready()
        reader = parked(coopos.nb_read, fd, 1)
        while size:
            size -= len(theirs.recv(min(size, 65536)))
        assert result_of(writer) == 1
        turn_loop()
        assert not reader.ready()
        theirs.send(b"b")
        assert result_of(reader) == b"b"


def test_second_reader_is_told_after_the_first_was_killed():
    with make_pipe() as (reader, writer):
        first, second = parked(coopos.nb_read, reader, 1), parked(coopos.nb_read, reader, 1)
        first.kill()
        os.write(writer, b"x")
        assert result_of(second) == b"x"


def test_greenlet_that_dies_of_an_exception_keeps_nobody_from_being_told():
    """A plain greenlet's exception comes out in the hub, in the middle of what the set has to tell."""
    with make_pipe() as (reader, writer), closing(*[os.dup(reader) for _ in range(20)]) as copies:
        errors = []
        hub = get_hub()

        def read_and_die(fd):
            coopos.nb_read(fd, 1)
            raise ZeroDivisionError

        hub.handle_error = lambda *args: errors.append(args[1])
        try:
            waiters = []
            for number, fd in enumerate(copies):
                if number % 3:
                    waiters.append(gevent.spawn(coopos.nb_read, fd, 1))
                else:
                    raw = greenlets.greenlet(read_and_die, hub)
                    hub.loop.run_callback(raw.switch, fd)
            turn_loop()
            os.write(writer, b"x" * 20)
            gevent.joinall(waiters, timeout=20)
            assert [waiter.value for waiter in waiters] == [b"x"] * 13
            turn_loop()
            assert errors == [ZeroDivisionError] * 7
        finally:
            del hub.handle_error


def test_event_of_a_file_that_had_the_number_before_is_a_hint():
    """The old file is still open by another number, and tells of the one it was waited for by."""
    with make_pipe() as (reader, writer), closing(os.dup(reader)) as (copy,):
        old = parked(error_of, coopos.nb_read, reader, 1)
        coopos.close(reader)
        assert result_of(old) == BAD_FD
        with make_pipe() as (again, other):
            assert again == reader
            new = parked(coopos.nb_read, again, 1)
            os.write(writer, b"old")
            turn_loop()
            assert not new.ready()
            os.write(other, b"n")
            assert result_of(new) == b"n"
        assert drain(copy) == b"old"


def test_number_closed_by_others_and_used_again_is_another_file():
    with make_pipe() as (reader, writer):
        os.write(writer, b"1")
        assert coopos.nb_read(reader, 1) == b"1"
        parked(coopos.nb_read, reader, 1).kill()
        os.close(reader)
        with make_pipe() as (again, other):
            assert again == reader
            new = parked(coopos.nb_read, again, 1)
            os.write(other, b"n")
            assert result_of(new) == b"n"


def test_wait_for_what_is_closed_is_ebadf():
    with make_pipe() as (reader, _writer):
        os.close(reader)
        assert error_of(_core.wait_for_any, [(reader, _core.READ)], "select") == BAD_FD
        assert error_of(_core.wait_for_any, [(-1, _core.READ)], "select") == BAD_FD


def test_wait_for_a_number_whose_close_is_put_off_is_ebadf():
    """It is closed for everybody from the moment in which close() returns."""
    ours, theirs = socket.socketpair()
    with theirs, closing(ours.detach()) as (fd,):
        os.set_blocking(fd, False)
        watcher = get_hub().loop.io(fd, 1)
        watcher.start(lambda: None)
        turn_loop()
        coopos.close(fd)
        assert error_of(coopos.nb_read, fd, 1) == BAD_FD
        watcher.stop()
        watcher.close()
        turn_loop()


def test_wait_for_a_file_that_is_always_ready_takes_a_turn(tmp_path):
    """epoll(7) refuses it."""
    turns = []
    with (tmp_path / "file").open("w") as file:
        get_hub().loop.run_callback(turns.append, 1)
        _core.wait_for_any([(file.fileno(), _core.READ)], "select")
        assert turns == [1]


def test_close_of_what_a_dead_threads_greenlet_waits_for_whose_ident_is_used_again():
    """Nobody can be told, whoever has the thread's number now; the descriptor is closed."""
    run_script(
        """
        import os, threading
        import gevent
        import coopos

        def wait():
            coopos.make_nonblocking(reader)
            gevent.spawn(coopos.nb_read, reader, 10)
            gevent.idle()

        for _ in range(20):
            reader, writer = os.pipe()
            thread = threading.Thread(target=wait)
            thread.start()
            thread.join()
            may_end = threading.Event()
            other = threading.Thread(target=may_end.wait)
            other.start()
            is_used_again = other.ident == thread.ident
            coopos.close(reader)
            try:
                os.fstat(reader)
            except OSError:
                pass
            else:
                raise AssertionError("still open")
            may_end.set()
            other.join()
            os.close(writer)
            if is_used_again:
                break
        else:
            raise AssertionError("no ident was used again")
        """
    )


@needs_sets
def test_close_of_what_another_threads_greenlet_waits_for_is_made_at_once():
    """Though that thread's hub stands still."""
    with make_pipe() as (reader, _writer), HubThread() as thread:
        waiter = thread.parked(error_of, coopos.nb_read, reader, 10)
        may_go_on = threading.Event()
        thread.post(may_go_on.wait, 20)
        coopos.close(reader)
        try:
            with make_pipe() as (again, _other):
                assert again == reader
                may_go_on.set()
                assert thread.result_of(waiter) == BAD_FD
        finally:
            may_go_on.set()


def test_descriptors_of_threads_are_given_back_with_them():
    run_script(
        """
        import os, threading
        import gevent
        import coopos

        def wait(is_last_destroyed):
            reader, writer = os.pipe()
            coopos.make_nonblocking(reader)
            waiter = gevent.spawn(coopos.nb_read, reader, 10)
            gevent.idle()
            os.write(writer, b"x")
            assert waiter.get() == b"x"
            gevent.get_hub().destroy(destroy_loop=True)
            coopos.close(reader)
            coopos.close(writer)
            if not is_last_destroyed:
                waiter = gevent.spawn(coopos.wait_exit, os.getpid())
                gevent.idle()
                waiter.kill()
                gevent.get_hub().destroy(destroy_loop=True)

        def count():
            return len(os.listdir("/dev/fd"))

        before = None
        for _ in range(10):
            thread = threading.Thread(target=wait, args=(_ % 2,))
            thread.start()
            thread.join()
            before = before or count()
        assert count() == before, (before, count())
        """
    )


@needs_sets
def test_set_that_somebody_has_closed_is_made_anew():
    """Programs close all descriptors when they become daemons."""
    run_script(
        """
        import os
        import gevent
        import coopos

        def sets():
            return [fd for fd in map(int, os.listdir("/proc/self/fd")) if is_set(fd)]

        def is_set(fd):
            try:
                return "eventpoll" in os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                return False

        def wait_once():
            os.write(writer, b"x")
            gevent.spawn(os.write, writer, b"x")
            assert coopos.nb_read(reader, 1) + coopos.nb_read(reader, 1) == b"xx"

        gevent.sleep(0)
        before = sets()
        reader, writer = os.pipe()
        coopos.make_nonblocking(reader)
        wait_once()
        for replacement in None, reader:
            [ours] = set(sets()) - set(before)
            if replacement is None:
                os.close(ours)
            else:
                os.dup2(replacement, ours)
            wait_once()
            wait_once()
        """
    )


@needs_sets
def test_number_that_is_closed_twice_and_is_the_sets_by_then():
    """The second close is EBADF, as it was before there was a set; who waits is told all the same."""
    run_script(
        """
        import errno, os
        import gevent
        import coopos

        gevent.sleep(0)
        reader, writer = os.pipe()
        coopos.make_nonblocking(reader)
        twice = os.open(os.devnull, os.O_RDONLY)
        coopos.close(twice)
        waiter = gevent.spawn(coopos.nb_read, reader, 1)
        gevent.sleep(0)
        assert "eventpoll" in os.readlink(f"/proc/self/fd/{twice}")
        for close in coopos.close, lambda fd: coopos.closerange(fd, fd + 1):
            try:
                close(twice)
            except OSError as ex:
                assert ex.errno == errno.EBADF
            gevent.sleep(0.01)
            os.write(writer, b"x")
            assert waiter.get() == b"x"
            waiter = gevent.spawn(coopos.nb_read, reader, 1)
            gevent.sleep(0)
        # Behind our back: the number is another file's, which is the program's to close.
        os.dup2(writer, twice)
        os.close(writer)
        watcher = gevent.get_hub().loop.io(twice, 2)
        watcher.start(print)
        coopos.close(twice)
        gevent.sleep(0.01)
        watcher.close()
        try:
            os.fstat(twice)
        except OSError:
            pass
        else:
            raise AssertionError("it is still open")
        """
    )


def test_first_wait_of_a_process_that_is_out_of_descriptors():
    run_script(
        """
        import os, resource
        import gevent
        import coopos

        gevent.sleep(0)
        (reader, writer), (other, other_writer) = os.pipe(), os.pipe()
        for fd in reader, other:
            coopos.make_nonblocking(fd)
        free = os.dup(0)
        os.close(free)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        first = gevent.spawn(coopos.nb_read, reader, 10)
        gevent.idle()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        second = gevent.spawn(coopos.nb_read, other, 10)
        gevent.idle()
        os.write(writer, b"a")
        os.write(other_writer, b"b")
        assert (first.get(timeout=20), second.get(timeout=20)) == (b"a", b"b")
        """
    )


def test_forked_child_has_a_set_of_its_own():
    """What it waits for, and closes, is nothing to those who wait in the parent, and what they waited for it waits for, too."""
    run_script(
        """
        import os
        import gevent
        import coopos

        (reader, writer), (other, other_writer) = os.pipe(), os.pipe()
        for fd in reader, other:
            coopos.make_nonblocking(fd)
        waiters = [gevent.spawn(coopos.nb_read, fd, 1) for fd in (reader, other)]
        gevent.idle()
        pid = coopos.fork(keep_greenlets=True)
        if not pid:
            coopos.close(reader)
            try:
                waiters[0].get(timeout=20)
            except OSError:
                pass
            os.write(other_writer, b"c")
            os._exit(waiters[1].get(timeout=20) != b"c")
        waiters[1].kill()
        assert coopos.waitpid(pid, 0) == (pid, 0)
        os.write(writer, b"p")
        assert waiters[0].get(timeout=20) == b"p"
        """,
        may_complain=True,  # the child's hub reports the OSError
    )


@pytest.mark.skipif(
    LOOP == "libuv" and not HAS_SETS,
    reason="gevent's libuv loop has an order of its own for the watchers of one number",
)
def test_forked_child_serves_its_greenlets_in_the_parents_order():
    """Whoever began to wait for a descriptor first is the first to be told, in the child too."""
    run_script(
        """
        import os
        import gevent
        import coopos

        reader, writer = os.pipe()
        served = []

        def read(number):
            coopos.read(reader, 1)
            served.append(number)

        waiters = [gevent.spawn(read, number) for number in range(4)]
        gevent.idle()
        if not coopos.fork(keep_greenlets=True):
            for count in range(1, 5):
                os.write(writer, b"x")
                with gevent.Timeout(20):
                    while len(served) < count:
                        gevent.sleep(0.001)
            os._exit(served != [0, 1, 2, 3])
        gevent.killall(waiters)
        assert coopos.wait()[1] == 0
        """
    )


# ---- direct switches ---------------------------------------------------------------------------------------------------------


class Switches:
    """A context in which this thread's switches are traced: a list of (from, to)."""

    def __enter__(self):
        self.seen = []
        self._before = greenlets.settrace(self._trace)
        return self.seen

    def _trace(self, event, args):
        if event in ("switch", "throw"):
            self.seen.append(args)

    def __exit__(self, *exc_info):
        greenlets.settrace(self._before)


@contextlib.contextmanager
def ping_pong(turns=None):
    """Two greenlets that throw one byte back and forth, for so many turns or for ever; the greenlets."""
    with make_pipe() as (there, to_there), make_pipe() as (here, to_here):

        def play(reader, writer):
            count = 0
            while turns is None or count < turns:
                coopos.nb_write(writer, coopos.nb_read(reader, 1))
                count += 1

        players = [gevent.spawn(play, there, to_here), gevent.spawn(play, here, to_there)]
        turn_loop()
        os.write(to_there, b"x")
        try:
            yield players
        finally:
            gevent.killall(players)


@needs_sets
def test_greenlet_that_waits_switches_to_one_that_is_ready():
    """Tracers see it. The hub has a turn after 64 at the latest."""
    with Switches() as switches, ping_pong(1000) as players:
        gevent.joinall(players, timeout=20, raise_error=True)
    direct, most, in_a_row = 0, 0, 0
    for origin, target in switches:
        in_a_row = in_a_row + 1 if origin in players and target in players else 0
        direct += in_a_row > 0
        most = max(most, in_a_row)
    assert direct > 500
    assert 1 < most <= 64


def test_timers_callbacks_and_other_greenlets_have_their_turn_beside_a_ping_pong():
    turns, callbacks = [], []

    def turn():
        while True:
            turns.append(1)
            gevent.sleep(0)

    with ping_pong():
        ticker = gevent.spawn(turn)
        get_hub().loop.run_callback(callbacks.append, 1)
        with gevent.Timeout(20):
            gevent.sleep(0.05)
            while len(turns) < 100:
                gevent.sleep(0.001)
        ticker.kill()
        assert callbacks == [1]


def test_ping_pong_alone_leaves_timers_their_turn():
    with ping_pong():
        for _ in range(10):
            with pytest.raises(gevent.Timeout), gevent.Timeout(0.005):
                gevent.event.Event().wait()


@needs_sets
def test_greenlet_that_is_to_be_killed_is_not_switched_to():
    """Its kill is a callback of the hub's, which comes first, as without direct switches."""
    with make_pipe() as (reader, writer), make_pipe() as (mine, _other):
        victim = parked(coopos.nb_read, reader, 1)

        def kill_and_wait():
            os.write(writer, b"x")
            victim.kill(block=False)
            coopos.nb_read(mine, 1)

        killer = parked(kill_and_wait)
        assert victim.ready()
        assert isinstance(victim.value, gevent.GreenletExit)
        assert drain(reader) == b"x"
        killer.kill()


def test_greenlet_that_was_timed_out_is_not_switched_to():
    with make_pipe() as (reader, writer), make_pipe() as (mine, _other):
        outcomes = []

        def read_in_time():
            with gevent.Timeout(0.001, False):
                outcomes.append(coopos.nb_read(reader, 1))
            has_timed_out.set()
            outcomes.append(event.wait())

        event, has_timed_out = gevent.event.Event(), gevent.event.Event()
        reading = gevent.spawn(read_in_time)
        has_timed_out.wait()
        os.write(writer, b"x")
        waiting = parked(coopos.nb_read, mine, 1)
        assert outcomes == []
        event.set()
        reading.join()
        assert outcomes == [True]
        waiting.kill()


@needs_sets
def test_greenlet_of_another_thread_is_not_switched_to():
    """What it waits for is ready, and it alone is: who waits here goes to the hub."""
    with make_pipe() as (reader, writer), make_pipe() as (mine, _), make_pipe() as (other, _), HubThread() as thread:
        theirs = thread.parked(coopos.nb_read, reader, 1)
        may_go_on = threading.Event()
        thread.post(may_go_on.wait, 20)
        try:
            os.write(writer, b"x")
            with Switches() as switches:
                waiting = [parked(coopos.nb_read, fd, 1) for fd in (mine, other)]
            assert theirs not in [each for switch in switches for each in switch]
        finally:
            may_go_on.set()
        assert thread.result_of(theirs) == b"x"
        gevent.killall(waiting)


@needs_sets
def test_child_and_descriptor_that_are_ready_beside_a_wait_are_told_by_the_hub():
    """A greenlet that finds them in the set can't: it leaves them to the hub."""
    with make_pipe() as (reader, writer), make_pipe() as (mine, _other):
        told = []
        pid = coopos.fork_and_watch(lambda child: told.append(child.rpid))
        if not pid:
            os._exit(0)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        readers = [parked(error_of, coopos.nb_read, reader, 1) for _ in range(2)]
        os.write(writer, b"xx")
        waiting = parked(coopos.nb_read, mine, 1)
        gevent.joinall(readers, timeout=20)
        assert [each.value for each in readers] == [(None, b"x")] * 2
        with gevent.Timeout(20):
            while not told:
                gevent.sleep(0.001)
        assert told == [pid]
        assert coopos.waitpid(pid, 0) == (pid, 0)
        waiting.kill()


@needs_sets
def test_callback_of_the_hub_switches_to_nobody():
    """A read in a callback is refused, or stands; never does the hub go to a greenlet by itself from there."""
    with make_pipe() as (reader, writer), make_pipe() as (mine, _other):
        waiting = parked(coopos.nb_read, reader, 1)
        outcomes = []

        def read_in_hub():
            os.write(writer, b"x")
            outcomes.append(error_of(coopos.nb_read, mine, 1)[0])
            outcomes.append(waiting.ready())

        get_hub().loop.run_callback(read_in_hub)
        turn_loop()
        assert outcomes[1] is False
        assert result_of(waiting) == b"x"
