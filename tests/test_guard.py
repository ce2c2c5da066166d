"""What ends a read or write that poll(2) called ready, and that blocks all the same: the hub stands still for an instant only."""

import os
import select
import termios
import tty

import gevent
import pytest

import coopos

from .descriptors import KINDS, frozen_hub_is_an_error, make_ends, until
from .support import clog, closing, needs_libev, parked, result_of, run_script, turn_loop


@pytest.fixture(autouse=True)
def _frozen_hub_is_an_error():
    with frozen_hub_is_an_error():
        yield


def test_write_to_a_terminal_with_less_room_than_poll_promises_leaves_the_hub_running(tmp_path):
    with make_ends("pty slave", tmp_path) as ends:
        clog(ends.writer)
        greenlet = gevent.spawn(coopos.write, ends.writer, b"y" * 20_000)
        left = 20_000
        while left:
            until(lambda: select.select([ends.reader], [], [], 0)[0])
            left -= os.read(ends.reader, 100).count(b"y")
            turn_loop()
        assert result_of(greenlet) == 20_000


def test_read_of_a_terminal_that_waits_for_more_leaves_the_hub_running():
    """With VMIN and VTIME a read that has begun stands there between two characters; poll(2) calls it ready after one."""
    master, slave = os.openpty()
    with closing(master, slave):
        tty.setraw(slave)
        attributes = termios.tcgetattr(slave)
        attributes[6][termios.VMIN], attributes[6][termios.VTIME] = 5, 200
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        greenlet = parked(coopos.read, slave, 5)
        os.write(master, b"a")
        with gevent.Timeout(10):
            assert greenlet.get() == b"a"


GUARDED = """if True:
    import ctypes, errno, os, resource, signal, tempfile, threading
    import gevent, coopos
    libc = ctypes.CDLL(None)

    def waits():
        '''inotify's read of nothing, which waits like any other, and is an error then.'''
        with tempfile.TemporaryDirectory() as path:
            fd = libc.inotify_init()
            libc.inotify_add_watch(fd, os.fsencode(path), 0x100)
            outcomes = []
            def read():
                try:
                    outcomes.append(coopos.read(fd, 0))
                except OSError as ex:
                    outcomes.append(ex.errno)
            greenlet = gevent.spawn(read)
            gevent.idle()
            assert not greenlet.ready()
            open(os.path.join(path, "x"), "x").close()
            greenlet.join(timeout=20)
            assert outcomes == [errno.EINVAL], outcomes
            os.close(fd)
"""
needs_inotify = pytest.mark.skipif(not KINDS["inotify"].is_available, reason=KINDS["inotify"].reason)


@needs_inotify
@pytest.mark.parametrize(
    "source",
    [
        "waits()",
        "resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0)); waits()",
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGURG}); waits();"
        "assert signal.SIGURG in signal.pthread_sigmask(signal.SIG_BLOCK, ()); assert not signal.sigpending()",
        "thread = threading.Thread(target=waits); thread.start(); thread.join()",
    ],
    ids=["timer", "no timer to be had", "SIGURG blocked", "thread"],
)
def test_call_that_blocks_all_the_same_is_interrupted(source):
    run_script(f"{GUARDED}\n    {source}\n")


@needs_inotify
def test_handler_of_the_programs_is_not_disturbed():
    run_script(
        GUARDED
        + """
    calls = []
    signal.signal(signal.SIGURG, lambda *args: calls.append(args[0]))
    waits()
    assert not calls
    os.kill(os.getpid(), signal.SIGURG)
    assert calls == [signal.SIGURG]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGURG})
    os.kill(os.getpid(), signal.SIGURG)
    waits()
    assert signal.SIGURG in signal.sigpending()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGURG})
    assert calls == [signal.SIGURG] * 2
    """
    )


@needs_libev  # gevent's libuv loop is Python: a handler that raises in it ends the hub
def test_wait_after_a_signal_handler_has_raised():
    """It comes with the byte and ends the read. The loop still makes the read's callback, which the next wait doesn't hear."""
    run_script(
        """
        import os, select, signal, gevent, coopos

        class Interrupt(BaseException):
            pass

        def handle(*args):
            global may_raise
            if may_raise:
                may_raise = False
                raise Interrupt

        signal.signal(signal.SIGUSR1, handle)
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        parent, may_raise = os.getpid(), False
        go, start = os.pipe()
        child = coopos.fork(keep_greenlets=False)
        if child == 0:
            os.close(start)
            while os.read(go, 1):
                for _ in range(20000):
                    pass  # until the parent sleeps
                os.write(writer, b"x")
                os.kill(parent, signal.SIGUSR1)
            os._exit(0)

        def read():  # a call of its own, so that no instruction which can be interrupted lies outside the try
            global may_raise
            may_raise = True
            os.write(start, b"g")
            coopos.nb_read(reader, 1)
            while may_raise:
                os.getpid()

        for _ in range(200):
            try:
                read()
            except Interrupt:
                gevent.sleep(0.002)
            # As with os.read, the byte is lost if the handler raises when it was read and not yet assigned.
            while select.select([reader], [], [], 0)[0]:
                os.read(reader, 1)
        os.close(start)
        coopos.waitpid(child, 0)
        """,
        may_complain=True,  # the hub prints what handlers raise in it
    )
