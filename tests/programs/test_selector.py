"""The selector by which communicate() and multiprocessing wait for several descriptors at once."""

import os
import selectors
import socket

import gevent
import pytest
from gevent.hub import get_hub

import coopos
from coopos._stdlib import MAX_POLL_S, CooperativeSelector

from ..helpers.support import clog, drain, make_pipe, parked, result_of

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Asked:
    """A poll object that notes for how many milliseconds the kernel was asked to wait. It never lets it."""

    def __init__(self, poll):
        self.poll_now, self.timeouts = poll.poll, []

    def poll(self, timeout):
        self.timeouts.append(timeout)
        return self.poll_now(0)


@pytest.fixture
def selector():
    with CooperativeSelector() as made:
        yield made


def select(selector, timeout=None):
    return [(key.fileobj, events) for key, events in selector.select(timeout)]


def write_later(fd):
    return gevent.spawn_later(0.01, os.write, fd, b"x")


@pytest.mark.parametrize("timeout", [None, 0.5, 30])
def test_select_waits_until_one_is_ready(selector, timeout):
    with make_pipe() as (reader, writer), make_pipe() as (other, _):
        selector.register(reader, READ)
        selector.register(other, READ)
        writing = write_later(writer)
        assert select(selector, timeout) == [(reader, READ)]
        writing.get()


def test_select_of_what_is_ready_does_not_switch(selector):
    with make_pipe() as (reader, writer):
        os.write(writer, b"x")
        selector.register(reader, READ)
        other = gevent.spawn(int)
        assert select(selector) == select(selector, 0) == [(reader, READ)]
        assert not other.dead
        other.join()


@pytest.mark.parametrize("timeout", [0, -1])
def test_select_without_waiting_gives_others_a_turn(selector, timeout):
    """One each, and says what was ready before."""
    with make_pipe() as (reader, writer):
        selector.register(reader, READ)
        writing = gevent.spawn(os.write, writer, b"x")
        assert select(selector, timeout) == []
        assert writing.dead
        assert select(selector, timeout) == [(reader, READ)]


def test_select_waits_for_what_it_was_asked_for(selector):
    """A socket that can be written to is not one that can be read, and the other way round."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        selector.register(ours, READ)
        gevent.spawn_later(0.01, theirs.send, b"x")
        assert select(selector) == [(ours, READ)]
        clog(ours.fileno())
        selector.modify(ours, WRITE)
        gevent.spawn_later(0.01, drain, theirs.fileno())
        assert select(selector) == [(ours, WRITE)]


def test_select_timed_out(selector):
    """It is over before a longer sleep is, and only the hub was waited in: the kernel was asked what is ready now."""
    with make_pipe() as (reader, _):
        selector.register(reader, READ)
        selector._selector = asked = Asked(selector._selector)
        other = gevent.spawn(gevent.sleep, 0.5)
        assert select(selector, 0.001) == []
        assert not other.dead
        assert set(asked.timeouts) == {0}
        other.kill()


@pytest.mark.parametrize("timeout", [None, 0.2, 1e300])
def test_select_in_the_hub_waits_in_the_kernel(selector, timeout):
    with make_pipe() as (reader, _):
        selector.register(reader, READ)
        selector._selector = asked = Asked(selector._selector)
        result = gevent.event.AsyncResult()
        get_hub().loop.run_callback(lambda: result.set(selector.select(timeout)))
        assert result.get() == []
        assert asked.timeouts == [None if timeout is None else min(timeout, MAX_POLL_S) * 1000]


def test_select_of_a_descriptor_that_is_closed_meanwhile(selector):
    """It is reported for all that it was registered for, and no other is; its number may be another file's by then."""
    with make_pipe() as (reader, _), make_pipe() as (other, _):
        selector.register(other, READ)
        selector.register(reader, READ | WRITE)
        waiting = parked(select, selector)
        coopos.close(reader)
        assert os.dup(other) == reader
        assert result_of(waiting) == [(reader, READ | WRITE)]
