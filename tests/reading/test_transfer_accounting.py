"""Every byte is in one place: 100,000 kills and timeouts at random moments, and then the sums.

A writer counts what its calls returned and the `characters_written` of what was thrown into them; a reader what it got, `partial`
included. At any moment both may be killed, time out, or end and be replaced. What was sent is what was received, in order where
there is one of each. The moments come from a seed; which of two events is first is the kernel's and the threads' affair.
"""

import collections
import contextlib
import fcntl
import os
import random
import socket
import stat

import gevent
import pytest

import coopos

from ..helpers.descriptors import KINDS, READS, WRITES, frozen_hub_is_an_error, let_threads_end, make_ends
from ..helpers.support import deadline, drain, make_pipe, turn_loop

SEED = 20
SMALL = 4096  # what a pipe or socket holds: less than most writes, so that both sides often wait

#: {(kind, whether it is in blocking mode): kills}
IN_ORDER = {
    ("pipe", True): 18_000,
    ("pipe", False): 18_000,
    ("socketpair", True): 18_000,
    ("socketpair", False): 18_000,
    ("TCP", True): 3_000,
    ("TCP", False): 3_000,
    ("FIFO", True): 3_000,
    ("FIFO", False): 6_000,
    ("pty master", True): 1_000,
    ("pty master", False): 1_000,
    ("pty slave", True): 1_000,
    ("pty slave", False): 1_000,
}
IN_ANY_ORDER = {
    ("pipe", True): 3_000,
    ("pipe", False): 3_000,
    ("socketpair", True): 4_000,
    ("FIFO", True): 2_000,
    ("pty slave", True): 500,
}
SPLICED = {True: 1_000, False: 1_000}


class Killed(gevent.GreenletExit):
    """Thrown into a call; whoever made it goes on. Who has not begun never does."""


def test_kills_are_a_hundred_thousand():
    assert sum(IN_ORDER.values()) + sum(IN_ANY_ORDER.values()) + sum(SPLICED.values()) >= 100_000


# What is written at any position of the stream.
PERIOD = 65_521
_round = random.Random(SEED).randbytes(PERIOD)
PATTERN = memoryview(_round + _round)


def pattern_at(position, size):
    start = position % PERIOD
    return PATTERN[start : start + size]


class Traffic:
    """A reader and a writer of one stream, whom random kills and timeouts befall."""

    def __init__(self, seed, reader, writer):
        self.rng = random.Random(seed)
        self.reader = reader
        self.writer = writer
        self.sent = 0
        self.received = 0
        self.interrupted = 0
        self.is_over = False
        self.reads = [read for read, _os_read in READS.values()] + [coopos.read_exactly]
        self.writes = [write for write, _os_write in WRITES.values()]

    def size(self):
        return self.rng.choice((1, 7, 500, 3000, 9000))

    def work(self, step):
        """Call step() until the end, or until killed for good."""
        while not self.is_over:
            try:
                step()
                if self.rng.random() < 0.2:
                    gevent.sleep(0)
            except Killed:
                pass  # in sleep()

    @contextlib.contextmanager
    def interruptions(self, account):
        """What is thrown into a call is counted, and given to *account*; a GreenletExit goes on."""
        timeout = gevent.Timeout(0) if self.rng.random() < 0.3 else None
        try:
            if timeout is not None:
                timeout.start()
            yield
        except (gevent.Timeout, gevent.GreenletExit) as ex:
            if isinstance(ex, gevent.Timeout) and ex is not timeout:
                raise
            self.interrupted += 1
            account(ex)
            if type(ex) is gevent.GreenletExit:
                raise
        finally:
            if timeout is not None:
                timeout.close()

    def write_once(self):
        data = pattern_at(self.sent, self.size())
        with self.interruptions(lambda ex: self.count_sent(getattr(ex, "characters_written", 0))):
            self.count_sent(self.rng.choice(self.writes)(self.writer, data))

    def read_once(self):
        with self.interruptions(lambda ex: self.count_received(getattr(ex, "partial", b""))):
            self.count_received(self.rng.choice(self.reads)(self.reader, self.size()))

    def count_sent(self, size):
        self.sent += size

    def count_received(self, data):
        assert data == pattern_at(self.received, len(data)), f"not what was sent at {self.received}"
        self.received += len(data)

    def steps(self):
        return [self.read_once, self.write_once]

    def run(self, kills):
        """Interrupt that many calls; then read the rest, and compare the sums."""
        steps = self.steps()
        workers = [gevent.spawn(self.work, step) for step in steps]
        try:
            while self.interrupted < kills:
                number = self.rng.randrange(len(workers))
                if workers[number].ready():
                    workers[number].get()
                    workers[number] = gevent.spawn(self.work, steps[number])
                else:
                    workers[number].kill(Killed if self.rng.random() < 0.95 else gevent.GreenletExit, block=False)
                for _ in range(self.rng.randrange(4)):
                    gevent.sleep(0)
        finally:
            self.is_over = True
            gevent.killall(workers)
        for worker in workers:
            worker.get()
        turn_loop()
        self.read_the_rest()

    def read_the_rest(self):
        while self.received < self.sent:
            self.count_received(coopos.read(self.reader, 100_000))
        assert self.received == self.sent
        with gevent.Timeout(0), pytest.raises(gevent.Timeout):
            pytest.fail(f"more than was sent: {coopos.read(self.reader, 100_000)!r}")


class Crowd(Traffic):
    """Two readers and two writers: the order is anybody's, the sums are not."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sent_of = collections.Counter()
        self.received_of = collections.Counter()

    def steps(self):
        return [self.read_once, self.read_once, lambda: self.write_byte(1), lambda: self.write_byte(2)]

    def write_byte(self, byte):
        data = bytes([byte]) * self.size()
        with self.interruptions(lambda ex: self.count_byte(byte, getattr(ex, "characters_written", 0))):
            self.count_byte(byte, self.rng.choice(self.writes)(self.writer, data))

    def count_byte(self, byte, size):
        self.sent += size
        self.sent_of[byte] += size

    def count_received(self, data):
        self.received += len(data)
        self.received_of.update({byte: data.count(byte) for byte in set(data)})

    def read_the_rest(self):
        super().read_the_rest()
        assert self.received_of == self.sent_of


class Spliced(Traffic):
    """What is sent goes through a second pipe, by splices that are killed as well."""

    def __init__(self, seed, reader, writer, source, target):
        super().__init__(seed, reader, writer)
        self.source = source
        self.target = target

    def steps(self):
        return [self.read_once, self.write_once, self.move_once]

    def move_once(self):
        with self.interruptions(lambda ex: None):
            assert coopos.splice(self.source, self.target, self.size()) > 0

    def read_the_rest(self):
        mover = gevent.spawn(lambda: [self.move_once() for _ in iter(int, 1)])
        self.rng = random.Random()  # its timeouts are the mover's now
        self.rng.random = lambda: 1.0
        super().read_the_rest()
        mover.kill()


def make_small(fd):
    """Let it hold little, where that can be said."""
    with contextlib.suppress(AttributeError, OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, SMALL)
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        with socket.socket(fileno=os.dup(fd)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)


def named(blocking):
    return "blocking" if blocking else "non-blocking"


@pytest.fixture(autouse=True)
def _frozen_hub_is_an_error():
    with frozen_hub_is_an_error(), deadline():
        yield


@pytest.mark.parametrize(("kind", "blocking"), IN_ORDER, ids=lambda value: value if isinstance(value, str) else named(value))
def test_what_is_sent_is_received_in_order_whoever_is_killed(kind, blocking, tmp_path):
    assert KINDS[kind].is_available
    with make_ends(kind, tmp_path, blocking) as ends:
        make_small(ends.writer)
        make_small(ends.reader)
        Traffic(SEED, ends.reader, ends.writer).run(IN_ORDER[kind, blocking])
        let_threads_end()
        assert drain(ends.reader) == b""


@pytest.mark.parametrize(("kind", "blocking"), IN_ANY_ORDER, ids=lambda value: value if isinstance(value, str) else named(value))
def test_what_two_writers_send_is_what_two_readers_receive_whoever_is_killed(kind, blocking, tmp_path):
    with make_ends(kind, tmp_path, blocking) as ends:
        make_small(ends.writer)
        Crowd(SEED, ends.reader, ends.writer).run(IN_ANY_ORDER[kind, blocking])
        let_threads_end()
        assert drain(ends.reader) == b""


@pytest.mark.skipif(not hasattr(os, "splice"), reason="no os.splice here")
@pytest.mark.parametrize("blocking", SPLICED, ids=named)
def test_what_is_spliced_arrives_in_order_whoever_is_killed(blocking):
    with make_pipe(blocking) as first, make_pipe(blocking) as second:
        make_small(first[1])
        make_small(second[1])
        Spliced(SEED, second[0], first[1], first[0], second[1]).run(SPLICED[blocking])
        assert drain(first[0]) == b""
