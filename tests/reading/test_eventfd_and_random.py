"""eventfd_read and eventfd_write, getrandom and urandom: they wait, and others run meanwhile."""

import contextlib
import os
import posix

import gevent
import pytest

import coopos

from ..helpers.descriptors import StandingWorkers
from ..helpers.support import closing, error_of, in_hub, parked, result_of, turn_loop

needs_eventfd = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="eventfds, which only Linux has")
needs_getrandom = pytest.mark.skipif(not hasattr(os, "getrandom"), reason="getrandom, which only Linux has")


# ---- eventfd -----------------------------------------------------------------------------------------------------------------

each_mode = pytest.mark.parametrize("nonblocking", [False, True], ids=["blocking", "nonblocking"])
FULL = (1 << 64) - 2


@contextlib.contextmanager
def eventfd(count, nonblocking):
    with closing(os.eventfd(0, os.EFD_NONBLOCK if nonblocking else 0)) as (fd,):
        os.eventfd_write(fd, count)
        yield fd
        assert os.get_blocking(fd) is not nonblocking


@needs_eventfd
@each_mode
def test_eventfd_read_waits_until_it_is_written(nonblocking):
    with eventfd(0, nonblocking) as fd:
        greenlet = parked(coopos.eventfd_read, fd)
        coopos.eventfd_write(fd=fd, value=7)
        assert result_of(greenlet) == 7


@needs_eventfd
@each_mode
def test_eventfd_read_killed(nonblocking):
    with eventfd(0, nonblocking) as fd:
        parked(coopos.eventfd_read, fd).kill()
        os.eventfd_write(fd, 7)
        turn_loop()
        assert os.eventfd_read(fd) == 7


@needs_eventfd
@each_mode
def test_eventfd_write_waits_for_room(nonblocking):
    with eventfd(FULL, nonblocking) as fd:
        greenlet = parked(coopos.eventfd_write, fd, 7)
        assert os.eventfd_read(fd) == FULL
        assert result_of(greenlet) is None
        assert coopos.eventfd_read(fd) == 7


@needs_eventfd
@each_mode
def test_eventfd_write_killed(nonblocking):
    with eventfd(FULL, nonblocking) as fd:
        parked(coopos.eventfd_write, fd, 7).kill()
        assert os.eventfd_read(fd) == FULL
        os.eventfd_write(fd, 1)
        turn_loop()
        assert os.eventfd_read(fd) == 1


@needs_eventfd
def test_eventfd_of_an_object_with_fileno_and_a_semaphore():
    class Object:
        def fileno(self):
            return fd

    with closing(os.eventfd(0, os.EFD_SEMAPHORE)) as (fd,):
        coopos.eventfd_write(Object(), FULL)
        assert coopos.eventfd_read(Object()) == 1


@needs_eventfd
def test_eventfd_write_that_does_not_fit_yet_leaves_the_loop_asleep():
    """An eventfd counts as ready while its counter can take 1. The write asks again now and then, not in each turn of the loop."""
    turns = []
    with eventfd(FULL - 1, True) as fd:
        check = gevent.get_hub().loop.check(ref=False)
        check.start(lambda: turns.append(1))
        greenlet = parked(coopos.eventfd_write, fd, 5)
        gevent.sleep(0.1)
        assert not greenlet.ready() and len(turns) < 50
        check.stop()
        check.close()
        assert os.eventfd_read(fd) == FULL - 1
        result_of(greenlet)
        assert os.eventfd_read(fd) == 5


# ---- randomness --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_entropy_yet(monkeypatch):
    """The machine has just started, as far as anybody can tell without waiting."""
    getrandom = posix.getrandom

    def not_yet(size, flags=0):
        if flags & os.GRND_NONBLOCK:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return getrandom(size, flags)

    monkeypatch.setattr("posix.getrandom", not_yet)


@needs_getrandom
@pytest.mark.parametrize(("name", "args"), [("getrandom", (6, 0)), ("urandom", (6,))])
@pytest.mark.usefixtures("no_entropy_yet")
def test_random_bytes_when_the_machine_has_just_started(name, args):
    with StandingWorkers() as workers:
        greenlet = parked(getattr(coopos, name), *args)
        workers.go_on()
        assert len(result_of(greenlet)) == 6


@needs_getrandom
@pytest.mark.usefixtures("no_entropy_yet")
def test_getrandom_that_must_not_wait():
    assert error_of(coopos.getrandom, 6, os.GRND_NONBLOCK) == (BlockingIOError, 11)


@pytest.mark.parametrize("name", ["getrandom", "urandom"])
def test_random_bytes_at_once(name):
    """As a rule no thread is asked: in the event loop too."""
    if not hasattr(os, name):
        pytest.skip("getrandom, which only Linux has")
    error, data = in_hub(getattr(coopos, name), 100)
    assert error is None and len(data) == 100


def test_urandom_where_getrandom_is_forbidden(monkeypatch):
    def getrandom(size, flags=0):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("posix.getrandom", getrandom, raising=False)
    assert len(coopos.urandom(10)) == 10
