"""close: done when it returns, whoever waits for the descriptor and wherever."""

import errno
import os
import socket
import threading
from concurrent.futures import Future

import gevent
import gevent.event
import gevent.selectors
import gevent.socket
import pytest
from gevent.hub import get_hub

import coopos

from ..helpers.support import (
    DEADLINE_S,
    HubThread,
    clog,
    closing,
    deadline,
    drain,
    error_of,
    make_clogged_pipe,
    make_pipe,
    needs_libev,
    parked,
    result_of,
    run_script,
    turn_loop,
)

each_reader = pytest.mark.parametrize("read", [coopos.nb_read, coopos.tp_read], ids=["nb_read", "tp_read"])
each_writer = pytest.mark.parametrize("write", [coopos.nb_write, coopos.tp_write], ids=["nb_write", "tp_write"])

BAD_FD = (OSError, errno.EBADF)


def is_open(fd):
    return error_of(os.fstat, fd) != BAD_FD


# ---- nobody waits ------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_close_frees_the_number_at_once():
    with make_pipe() as (reader, writer):
        coopos.close(reader)
        assert not is_open(reader)
        with closing(os.dup(writer)) as (copy,):
            assert copy == reader


def test_close_shows_the_other_end_end_of_file_at_once():
    """Programs that fork and report read in a plain os.read what their child's death tells them."""
    with make_pipe(blocking=True) as (reader, writer):
        coopos.close(writer)
        assert os.read(reader, 1) == b""


def test_close_twice_is_ebadf():
    with make_pipe() as (reader, _writer):
        assert coopos.close(reader) is None
        assert error_of(coopos.close, reader) == BAD_FD


def test_close_ten_thousand_pipes_without_a_turn_of_the_loop_needs_two_descriptors():
    numbers = set()
    for _ in range(10_000):
        reader, writer = os.pipe()
        numbers.update((reader, writer))
        coopos.close(reader)
        coopos.close(writer)
    assert len(numbers) == 2


def test_close_after_waits_for_the_number_needs_no_turn_of_the_loop():
    """A watcher that served a wait and is idle now doesn't count."""
    numbers = set()
    for _ in range(100):
        with make_pipe() as (reader, writer):
            numbers.update((reader, writer))
            gevent.spawn(os.write, writer, b"x")
            assert coopos.nb_read(reader, 1) == b"x"
            coopos.close(reader)
            assert not is_open(reader)
            coopos.close(writer)
    assert len(numbers) == 2


def test_close_makes_no_hub():
    run_script(
        """
        import os
        import threading
        import coopos
        from gevent._hub_local import get_hub_if_exists

        def close_both():
            reader, writer = os.pipe()
            coopos.close(reader)
            coopos.close(writer)
            assert get_hub_if_exists() is None

        close_both()
        thread = threading.Thread(target=close_both)
        thread.start()
        thread.join()
        """
    )


def test_close_works_in_a_hub_callback():
    outcome = []
    with make_pipe() as (reader, _writer):
        get_hub().loop.run_callback(lambda: outcome.append(coopos.close(reader)))
        turn_loop()
        assert outcome == [None]
        assert not is_open(reader)


@pytest.mark.smoke
def test_close_of_every_kind_of_file(tmp_path):
    ours, theirs = socket.socketpair()
    master, slave = os.openpty()
    fds = [ours.detach(), theirs.detach(), master, slave, os.open(tmp_path, os.O_RDONLY)]
    fds.append(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT))
    for fd in fds:
        coopos.close(fd)
        assert not is_open(fd)


# ---- our own greenlets wait --------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@each_reader
def test_close_wakes_a_reader_with_ebadf(read):
    with make_pipe() as (reader, _writer):
        greenlet = parked(error_of, read, reader, 10)
        coopos.close(reader)
        assert not is_open(reader)
        assert result_of(greenlet) == BAD_FD


@pytest.mark.smoke
@each_writer
def test_close_wakes_a_writer_with_ebadf(write):
    with make_clogged_pipe() as (_reader, writer, _size):
        greenlet = parked(error_of, write, writer, b"y")
        coopos.close(writer)
        assert not is_open(writer)
        assert result_of(greenlet) == BAD_FD


def test_close_wakes_all_who_wait():
    ours, theirs = socket.socketpair()
    with theirs, closing(ours.detach()) as (fd,):
        os.set_blocking(fd, False)
        clog(fd)
        greenlets = [parked(error_of, coopos.nb_read, fd, 1) for _ in range(3)]
        greenlets += [parked(error_of, coopos.nb_write, fd, b"y") for _ in range(3)]
        coopos.close(fd)
        assert not is_open(fd)
        assert [result_of(greenlet) for greenlet in greenlets] == [BAD_FD] * 6


def test_close_leaves_those_alone_who_wait_for_a_dup():
    with make_pipe() as (reader, writer), closing(os.dup(reader)) as (copy,):
        greenlet = parked(coopos.nb_read, copy, 10)
        coopos.close(reader)
        turn_loop()
        assert not greenlet.ready()
        os.write(writer, b"abc")
        assert result_of(greenlet) == b"abc"


def test_close_does_not_switch():
    with make_pipe() as (reader, _writer):
        greenlet = parked(error_of, coopos.nb_read, reader, 10)
        coopos.close(reader)
        assert not greenlet.ready()
        greenlet.join()


def test_close_by_a_greenlet_that_is_woken_by_the_same_event():
    """Its neighbour on the same descriptor is in the same batch of events."""
    with make_pipe() as (reader, writer):

        def read_and_close():
            data = coopos.nb_read(reader, 10)
            coopos.close(reader)
            return data

        greenlets = [parked(error_of, read_and_close) for _ in range(2)]
        os.write(writer, b"abc")
        assert sorted(map(repr, map(result_of, greenlets))) == sorted(map(repr, [(None, b"abc"), BAD_FD]))


def test_close_after_data_came_is_ebadf_and_takes_nothing():
    with make_pipe() as (reader, writer), closing(os.dup(reader)) as (copy,):
        greenlet = parked(error_of, coopos.nb_read, reader, 10)
        os.write(writer, b"abc")
        coopos.close(reader)
        assert result_of(greenlet) == BAD_FD
        assert drain(copy) == b"abc"


def test_close_then_kill_of_the_waiter_ends_it():
    with make_pipe() as (reader, _writer):
        greenlet = parked(error_of, coopos.nb_read, reader, 10)
        coopos.close(reader)
        greenlet.kill()
        assert greenlet.value == BAD_FD or isinstance(greenlet.value, gevent.GreenletExit)


def test_close_of_a_waiter_that_something_else_wakes_first_leaves_nothing_queued():
    """What would have brought it EBADF must not wake it out of its next wait."""

    class Woken(Exception):
        pass

    with make_pipe() as (reader, _writer):

        def wait_twice():
            with pytest.raises(Woken):
                coopos.nb_read(reader, 1)
            return event.wait()

        event = gevent.event.Event()
        greenlet = parked(wait_twice)
        get_hub().loop.run_callback(greenlet.throw, Woken)
        coopos.close(reader)
        turn_loop()
        assert not greenlet.ready()
        event.set()
        assert result_of(greenlet) is True


def test_close_and_use_of_the_number_again_before_the_waiter_ran():
    """The old waiter gets EBADF, the new one the new pipe's data."""
    with make_pipe() as (reader, _writer):
        old = gevent.spawn(error_of, coopos.nb_read, reader, 10)
        turn_loop()
        coopos.close(reader)
        with make_pipe() as (again, writer):
            assert again == reader
            new = gevent.spawn(coopos.nb_read, again, 10)
            os.write(writer, b"abc")
            assert result_of(old) == BAD_FD
            assert result_of(new) == b"abc"
            os.write(writer, b"def")
            assert coopos.nb_read(again, 10) == b"def"


@pytest.mark.smoke
def test_close_and_use_of_the_number_again_misses_no_wake():
    for turn in range(200):
        with make_pipe() as (reader, writer):
            old = gevent.spawn(error_of, coopos.nb_read, reader, 10)
            gevent.idle()
            coopos.close(reader)
            with make_pipe() as (again, other):
                assert again == reader
                new = gevent.spawn(coopos.nb_read, again, 10)
                gevent.idle()
                os.write(other, b"%d" % turn)
                assert result_of(new) == b"%d" % turn
            assert result_of(old) == BAD_FD
            coopos.close(writer)


def test_close_of_a_descriptor_frees_the_buffer_of_its_writer():
    buffer = bytearray(b"y")
    with make_clogged_pipe() as (_reader, writer, _size):
        greenlet = parked(error_of, coopos.nb_write, writer, buffer)
        coopos.close(writer)
        greenlet.join()
        buffer.append(1)


# ---- another thread's greenlets wait -----------------------------------------------------------------------------------------


def test_close_wakes_another_threads_sleeping_hub():
    """Nothing else happens there."""
    woken = Future()
    with make_pipe() as (reader, _writer), HubThread() as thread:
        thread.parked(lambda: woken.set_result(error_of(coopos.nb_read, reader, 1)))
        coopos.close(reader)
        assert woken.result(DEADLINE_S) == BAD_FD
        assert not is_open(reader)


@pytest.mark.smoke
@each_reader
def test_close_wakes_a_reader_in_another_thread_with_ebadf(read):
    with make_pipe() as (reader, _writer), HubThread() as thread:
        greenlet = thread.parked(error_of, read, reader, 10)
        coopos.close(reader)
        assert thread.result_of(greenlet) == BAD_FD
        assert not is_open(reader)


@each_writer
def test_close_wakes_a_writer_in_another_thread_with_ebadf(write):
    with make_clogged_pipe() as (reader, writer, size), HubThread() as thread:
        greenlet = thread.parked(error_of, write, writer, b"y")
        coopos.close(writer)
        assert thread.result_of(greenlet) == BAD_FD
        assert not is_open(writer)
        assert os.read(reader, size) == b"x" * size
        assert os.read(reader, 1) == b""


def test_close_wakes_readers_in_three_threads():
    with make_pipe() as (reader, _writer), HubThread() as one, HubThread() as two:
        there = [(thread, thread.parked(error_of, coopos.nb_read, reader, 1)) for thread in (one, two, one)]
        here = parked(error_of, coopos.nb_read, reader, 1)
        coopos.close(reader)
        assert result_of(here) == BAD_FD
        assert [thread.result_of(greenlet) for thread, greenlet in there] == [BAD_FD] * 3
        assert not is_open(reader)


def test_close_by_a_thread_without_a_hub_wakes_the_main_threads_reader():
    with make_pipe() as (reader, _writer):
        greenlet = parked(error_of, coopos.nb_read, reader, 10)
        thread = threading.Thread(target=coopos.close, args=(reader,))
        thread.start()
        thread.join(DEADLINE_S)
        assert result_of(greenlet) == BAD_FD
        assert not is_open(reader)


def test_close_twice_while_another_thread_has_to_be_told_is_ebadf():
    """The descriptor counts as closed from the first call on, although the number is not free yet."""
    with make_pipe() as (reader, _writer), HubThread() as thread:
        greenlet = thread.parked(error_of, coopos.nb_read, reader, 10)
        may_go_on = threading.Event()
        thread.post(may_go_on.wait, DEADLINE_S)  # its hub stands still
        coopos.close(reader)
        try:
            assert error_of(coopos.close, reader) == BAD_FD
        finally:
            may_go_on.set()
        assert thread.result_of(greenlet) == BAD_FD
        assert not is_open(reader)


def test_close_put_off_by_another_thread_then_dup2_keeps_the_new_file():
    with make_pipe() as (reader, _writer), make_pipe() as (other, other_writer), HubThread() as thread:
        greenlet = thread.parked(error_of, coopos.nb_read, reader, 10)
        may_go_on = threading.Event()
        thread.post(may_go_on.wait, DEADLINE_S)
        coopos.close(reader)
        os.dup2(other, reader)
        may_go_on.set()
        assert thread.result_of(greenlet) == BAD_FD
        os.write(other_writer, b"abc")
        assert os.read(reader, 10) == b"abc"
        coopos.close(reader)
        assert not is_open(reader)


@pytest.mark.parametrize(
    "end",
    [
        # gevent can't destroy a libuv loop in which somebody waits
        pytest.param("gevent.get_hub().destroy(destroy_loop=True)", id="hub destroyed", marks=needs_libev),
        pytest.param("pass", id="hub left behind"),
    ],
)
def test_close_of_a_descriptor_for_which_a_dead_threads_greenlet_waited(end):
    """Nobody is left to be told: not of this file, nor of a later one with its number."""
    out = run_script(
        f"""
        import os
        import threading
        import gevent
        import coopos

        reader, writer = os.pipe()
        coopos.make_nonblocking(reader)

        def wait():
            gevent.spawn(coopos.nb_read, reader, 10)
            gevent.idle()
            {end}

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
        for _ in range(2):
            coopos.close(reader)
            assert os.dup(writer) == reader
        print("closed twice")
        """
    )
    assert out == "closed twice\n"


def test_close_in_a_forked_child_of_a_descriptor_for_which_a_thread_of_the_parent_waits():
    """The thread is not in the child: nobody has to be told, and nobody could be waited for."""
    out = run_script(
        """
        import os
        import threading
        import gevent
        import coopos

        reader, writer = os.pipe()
        coopos.make_nonblocking(reader)
        is_parked = threading.Event()

        def wait():
            greenlet = gevent.spawn(coopos.nb_read, reader, 10)
            gevent.idle()
            is_parked.set()
            print("parent reads", greenlet.get(), flush=True)
            gevent.get_hub().destroy(destroy_loop=True)

        thread = threading.Thread(target=wait)
        thread.start()
        is_parked.wait()
        pid = coopos.fork_gevent()
        if not pid:
            coopos.close(reader)
            try:
                os.fstat(reader)
            except OSError:
                print("closed in the child", flush=True)
            os._exit(0)
        coopos.waitpid(pid, 0)
        os.write(writer, b"abc")
        thread.join()
        """
    )
    assert out == "closed in the child\nparent reads b'abc'\n"


def test_close_in_a_forked_child_of_a_descriptor_whose_close_the_parent_has_put_off():
    """Without epoll the parent's other thread has to be told first, and is not in the child: there the descriptor is just open."""
    out = run_script(
        """
        import os
        import threading
        import gevent
        from gevent.hub import get_hub
        import coopos

        reader, writer = os.pipe()
        coopos.make_nonblocking(reader)
        stands_still, may_go_on = threading.Event(), threading.Event()

        def stand_still():
            stands_still.set()
            may_go_on.wait()

        def wait():
            greenlet = gevent.spawn(coopos.nb_read, reader, 10)
            gevent.idle()
            get_hub().loop.run_callback(stand_still)
            try:
                greenlet.get()
            except OSError as ex:
                print("parent reads", ex.errno, flush=True)
            get_hub().destroy(destroy_loop=True)

        thread = threading.Thread(target=wait)
        thread.start()
        stands_still.wait()
        coopos.close(reader)
        pid = coopos.fork_gevent()
        if not pid:
            try:
                coopos.close(reader)
            except OSError as ex:
                print("child's close:", ex.errno, flush=True)
            try:
                os.fstat(reader)
            except OSError:
                print("closed in the child", flush=True)
            os._exit(0)
        coopos.waitpid(pid, 0)
        may_go_on.set()
        thread.join()
        """,
        may_complain=True,  # the greenlet's OSError is also reported by its hub
        COOPOS_SETS="watchers",
    )
    assert out == "child's close: 9\nclosed in the child\nparent reads 9\n"


# ---- others' watchers --------------------------------------------------------------------------------------------------------
# An active libev watcher on a closed number can end in abort(), so these run in interpreters of their own.

SOCKETS = """
import os, socket, sys
import gevent, gevent.selectors, gevent.socket, gevent.select
from gevent.hub import get_hub
import coopos

def error_of(function, *args):
    try:
        return None, function(*args)
    except Exception as ex:
        return type(ex).__name__, getattr(ex, "errno", None)

def is_open(fd):
    return error_of(os.fstat, fd)[0] is None

def turn():
    for _ in range(3):
        gevent.idle()

ours, theirs = gevent.socket.socketpair()
fd = ours.fileno()
"""


MOMENTS = {
    "before the loop knows": "get_hub().loop.run_callback(coopos.close, fd)",
    "while it waits": "turn(); coopos.close(fd)",
    "with data": "turn(); theirs.send(b'abc'); coopos.close(fd)",
    "with a hang-up": "turn(); theirs.close(); coopos.close(fd)",
    "in a callback": "turn(); get_hub().loop.run_callback(coopos.close, fd)",
}


@pytest.mark.parametrize("call", ["recv, 10", "sendall, bytes(10_000_000)"], ids=["recv", "sendall"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_close_under_a_gevent_socket_does_not_abort(moment, call):
    out = run_script(
        SOCKETS
        + f"""
waiting = gevent.spawn(error_of, ours.{call})
{MOMENTS[moment]}
turn()
assert not is_open(fd)
ours.detach()
theirs.close()
waiting.kill()
turn()
print("alive")
"""
    )
    assert out == "alive\n"


def test_close_under_a_gevent_selector_does_not_abort():
    out = run_script(
        SOCKETS
        + """
selector = gevent.selectors.DefaultSelector()
selector.register(fd, gevent.selectors.EVENT_READ)
waiting = gevent.spawn(error_of, selector.select, 0.01)
turn()
coopos.close(fd)
turn()
assert not is_open(fd)
error_of(waiting.get)
error_of(selector.unregister, fd)
error_of(selector.close)
ours.detach()
theirs.close()
turn()
print("alive")
"""
    )
    assert out == "alive\n"


@pytest.mark.smoke
def test_close_under_gevents_select_and_poll_does_not_abort():
    out = run_script(
        SOCKETS
        + """
poll = gevent.select.poll()
poll.register(fd)
waiting = [gevent.spawn(error_of, gevent.select.select, [fd], [fd], [], 0.01), gevent.spawn(error_of, poll.poll, 10)]
gevent.idle()
coopos.close(fd)
turn()
assert not is_open(fd)
gevent.joinall(waiting)
ours.detach()
theirs.close()
turn()
print("alive")
"""
    )
    assert out == "alive\n"


def test_close_under_a_wait_of_gevents_own_nb_read_does_not_abort():
    """Whether it is woken is the loop's affair."""
    out = run_script(
        SOCKETS
        + """
import gevent.os
waiting = gevent.spawn(error_of, gevent.os.nb_read, fd, 10)
turn()
coopos.close(fd)
turn()
assert not is_open(fd)
waiting.kill()
ours.detach()
theirs.close()
turn()
print("alive")
"""
    )
    assert out == "alive\n"


@pytest.mark.parametrize("turns", [0, 1])
def test_close_many_times_under_gevent_sockets_does_not_abort(turns):
    """Numbers closed at any moment and used again at once."""
    out = run_script(
        SOCKETS
        + f"""
import random
random.seed(20)
for _ in range(300):
    pairs = [gevent.socket.socketpair() for _ in range(3)]
    waiting = [gevent.spawn(error_of, end.recv, 10) for pair in pairs for end in pair]
    for _ in range(random.randrange(3)):
        gevent.idle()
    for one, other in pairs:
        if random.random() < .5:
            error_of(other.send, b"x")
        coopos.close(one.detach() if random.random() < .5 else one.fileno())
        if {turns}:
            gevent.idle()
    gevent.killall(waiting)
    for one, other in pairs:
        one.detach()
        other.close()
    turn()
ours.close()
theirs.close()
turn()
print("alive")
"""
    )
    assert out == "alive\n"


@pytest.fixture
def watched():
    """fd of a socket for which an io watcher that is not ours is active; (fd, the other end, the watcher)."""
    ours, theirs = socket.socketpair()
    with theirs, closing(ours.detach()) as (fd,):
        watcher = get_hub().loop.io(fd, 1)
        watcher.start(lambda: None)
        turn_loop()
        yield fd, theirs, watcher
        watcher.stop()
        watcher.close()
        turn_loop()


def test_close_under_anothers_watcher_is_put_off_to_the_next_turn(watched):
    fd, theirs, _watcher = watched
    coopos.close(fd)
    assert error_of(coopos.close, fd) == BAD_FD
    turn_loop()
    assert not is_open(fd)
    assert theirs.recv(1) == b""
    assert error_of(coopos.close, fd) == BAD_FD


@pytest.mark.smoke
def test_close_put_off_then_dup2_keeps_the_new_file(watched):
    fd, _theirs, _watcher = watched
    with make_pipe() as (reader, writer):
        coopos.close(fd)
        os.dup2(reader, fd)
        turn_loop()
        os.write(writer, b"abc")
        assert os.read(fd, 10) == b"abc"
        coopos.close(fd)
        turn_loop()
        assert not is_open(fd)


def test_close_put_off_then_os_close_and_use_again_keeps_the_new_file(watched):
    fd, _theirs, _watcher = watched
    coopos.close(fd)
    os.close(fd)
    with make_pipe() as (reader, writer):
        assert reader == fd
        turn_loop()
        assert coopos.nb_write(writer, b"abc") == 3
        assert coopos.nb_read(reader, 10) == b"abc"


def test_close_put_off_then_use_again_and_close_closes_the_new_file(watched):
    """The first call's mark was for another file."""
    fd, _theirs, _watcher = watched
    coopos.close(fd)
    os.close(fd)
    with make_pipe() as (reader, _writer):
        assert reader == fd
        coopos.close(reader)
        turn_loop()
        assert not is_open(reader)


def test_close_under_anothers_watcher_wakes_our_readers_too(watched):
    fd, _theirs, _watcher = watched
    os.set_blocking(fd, False)
    greenlet = parked(error_of, coopos.nb_read, fd, 1)
    coopos.close(fd)
    assert result_of(greenlet) == BAD_FD
    turn_loop()
    assert not is_open(fd)


def test_close_put_off_is_made_though_the_loop_has_nothing_else_to_do(watched):
    """Whoever waits at the other end, in another thread, is not kept waiting until something happens here."""
    fd, theirs, _watcher = watched
    heard = gevent.event.Event()
    at_end = Future()

    def read():
        at_end.set_result(theirs.recv(1))
        news.send()

    news = get_hub().loop.async_()  # which also keeps the loop alive meanwhile
    news.start(heard.set)
    threading.Thread(target=read, daemon=True).start()
    coopos.close(fd)
    with deadline():
        heard.wait()
    news.stop()
    news.close()
    assert at_end.result() == b""


WAITS = {"coopos": lambda fd: coopos.read(fd, 1), "gevent": gevent.socket.wait_read}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
@pytest.mark.parametrize("is_first", [True, False], ids=["before it", "after it"])
def test_close_while_anothers_watcher_is_about_to_be_called(wait, is_first):
    """A gevent socket and whoever closes its number are woken in one turn of the loop. What the socket reads is its own."""
    ours, theirs = gevent.socket.socketpair()
    stranger, sender = socket.socketpair()
    sender.send(b"another's")
    fd = ours.fileno()
    with theirs, stranger, sender, make_pipe() as (reader, writer):

        def close():
            wait(reader)
            coopos.close(fd)
            assert error_of(coopos.close, fd) == BAD_FD
            return os.dup(stranger.fileno())

        calls = [close, lambda: ours.recv(100)]
        greenlets = [gevent.spawn(call) for call in (calls if is_first else reversed(calls))]
        turn_loop()
        theirs.send(b"its own")
        os.write(writer, b"x")
        assert {result_of(greenlet) for greenlet in greenlets} >= {b"its own"}
        turn_loop()
        ours.detach()
        [copy] = [greenlet.value for greenlet in greenlets if greenlet.value != b"its own"]
        with closing(copy):
            assert copy == fd or not is_open(fd)


CLOSED_AGAIN_AND_AGAIN = """
        import errno, gevent, os, signal, sys, threading, time, coopos
        from gevent.hub import get_hub

        to_close = []

        def read_again_and_again(count):
            for _ in range(count):
                reader, writer = os.pipe()
                to_close.append(reader)
                try:
                    coopos.nb_read(reader, 1)
                except OSError as ex:
                    assert ex.errno == errno.EBADF, ex
                else:
                    raise AssertionError("nothing to read")
                os.close(writer)
"""


def test_closes_by_another_thread_while_loops_run_and_numbers_are_used_again():
    """Each of two threads has readers whose descriptors a third closes. Their loops are busy meanwhile, without the GIL too."""
    run_script(
        CLOSED_AGAIN_AND_AGAIN
        + """
        sys.setswitchinterval(1e-5)

        def turn(readers):
            while not all(reader.ready() for reader in readers):
                gevent.sleep(0)

        def run():
            get_hub()
            readers = [gevent.spawn(read_again_and_again, 500) for _ in range(2)]
            gevent.joinall([gevent.spawn(turn, readers)], raise_error=True)
            count.extend(reader.successful() for reader in readers)
            get_hub().destroy(destroy_loop=True)

        count = []
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            while to_close:
                coopos.close(to_close.pop())
            threads[0].join(0)
        assert count == [True] * 4, count
"""
    )


def test_close_of_what_another_thread_waits_for_while_a_signal_handler_raises():
    """The handler's exceptions come out of close(), and whoever waits gets EBADF all the same."""
    run_script(
        CLOSED_AGAIN_AND_AGAIN
        + """
        class Alarm(Exception):
            pass

        raised = caught = 0
        closing = False

        def handler(*_):
            global raised
            if closing:
                raised += 1
                raise Alarm

        def wait_for_readers():
            get_hub()
            read_again_and_again(1000)
            ended.append(True)
            get_hub().destroy(destroy_loop=True)

        ended = []
        thread = threading.Thread(target=wait_for_readers)
        thread.start()
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
        while thread.is_alive():
            if not to_close:
                time.sleep(0)
                continue
            reader = to_close.pop()
            time.sleep(0.0003)     # most have begun to wait by then
            while True:
                try:
                    closing = True
                    coopos.close(reader)
                    closing = False
                    break
                except Alarm:
                    closing = False
                    caught += 1
                except OSError:        # the exception came after the close
                    closing = False
                    break
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert ended and raised == caught, (ended, raised, caught)
"""
    )
