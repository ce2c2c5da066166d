"""What ends a read or write that poll(2) called ready, and that blocks all the same: the hub stands still for an instant only."""

import contextlib
import errno
import fcntl
import os
import select
import shutil
import signal
import struct
import subprocess
import termios
import textwrap
import threading
import tty

import gevent
import pytest
from gevent.exceptions import BlockingSwitchOutError

import coopos

from ..helpers.descriptors import KINDS, READS, by_name, frozen_hub_is_an_error, libc, make_ends
from ..helpers.support import (
    DEADLINE_S,
    clog,
    closing,
    error_of,
    needs_libev,
    parked,
    result_of,
    run_script,
    run_seccomp,
    ticking,
    turn_loop,
    until,
)


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


GUARDED = """if True:
    import ctypes, errno, os, resource, signal, sys, tempfile, threading
    import gevent, coopos
    libc = ctypes.CDLL(None)

    def waits(outcome=errno.EINVAL):
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
                except RuntimeError as ex:
                    outcomes.append(str(ex))
            greenlet = gevent.spawn(read)
            gevent.idle()
            assert greenlet.ready() == (outcome != errno.EINVAL)
            open(os.path.join(path, "x"), "x").close()
            greenlet.join(timeout=20)
            assert outcomes == [outcome], outcomes
            os.close(fd)
"""
needs_inotify = pytest.mark.skipif(not KINDS["inotify"].is_available, reason=KINDS["inotify"].reason)


@needs_inotify
@pytest.mark.parametrize(
    "source",
    [
        "waits()",
        "resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0)); waits()",
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals());"
        "mask = signal.pthread_sigmask(signal.SIG_BLOCK, ()); waits();"
        "assert mask == signal.pthread_sigmask(signal.SIG_BLOCK, ()); assert not signal.sigpending()",
        "thread = threading.Thread(target=waits); thread.start(); thread.join()",
        "[signal.signal(number, print) for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}]; waits()",
        "signal.signal(getattr(signal, 'SIGSTKFLT', 16), print); resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0)); waits()",
    ],
    ids=["timer", "no timer to be had", "all signals blocked", "thread", "all signals handled", "no signal to be sent"],
)
def test_call_that_blocks_all_the_same_is_interrupted(source):
    run_script(f"{GUARDED}\n    {source}\n")


@needs_inotify
@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace here")
def test_guard_whose_signals_are_delivered_slowly_ends():
    """As under a debugger, where each takes longer than the time after which the next one was due."""
    under = ["strace", "-f", "-qq", "-o", os.devnull, "-e", "inject=rt_sigreturn:delay_enter=20000"]
    if subprocess.run([*under, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("strace doesn't work here")
    run_script(f"{GUARDED}\n    waits()\n", under=under)


LEFT = """
    def left():
        '''Timers, threads and descriptors of the process.'''
        with open("/proc/self/timers") as timers:
            return timers.read(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    waits()
    before = left()
"""
needs_list_of_timers = pytest.mark.skipif(not os.path.exists("/proc/self/timers"), reason="no /proc/self/timers here")


@needs_inotify
@needs_list_of_timers
def test_timer_that_can_not_be_set_is_deleted():
    """A thread sends the signal then."""
    source = """
    refuse("timer_settime", errno.EINVAL)
    for _ in range(3):
        waits()
    assert left() == before, (left(), before)
    """
    run_seccomp(textwrap.dedent(GUARDED.replace("if True:\n", "", 1)) + textwrap.dedent(LEFT + source))


@needs_inotify
@needs_list_of_timers
def test_neither_timer_nor_thread_is_to_be_had():
    """The call isn't made, and fails as one does that no worker can be started for."""
    source = """
    refuse("timer_create", errno.EAGAIN)
    refuse("clone3", errno.EAGAIN)
    refuse("clone", errno.EAGAIN)
    waits("can't start new thread")
    assert left() == before, (left(), before)
    """
    run_seccomp(textwrap.dedent(GUARDED.replace("if True:\n", "", 1)) + textwrap.dedent(LEFT + source))


# ---- the program's own signals -----------------------------------------------------------------------------------------------

SENDER = """
    def start_sender(way):
        '''A child that sends this thread a SIGURG when told so on *heard*, and the next one when that was heard; 300 in all.'''
        numbers = {"x86_64": 234, "aarch64": 131}       # of tgkill(2)
        reader, heard = os.pipe()
        parent = os.getpid()
        child = os.fork()
        if child:
            os.close(reader)
            return child, heard
        try:
            os.close(heard)
            for _ in range(300):
                assert os.read(reader, 1)
                if way == "kill":
                    os.kill(parent, signal.SIGURG)
                elif way == "sigqueue":
                    libc.sigqueue(parent, signal.SIGURG, ctypes.c_void_p(7))
                else:
                    libc.syscall(numbers[os.uname().machine], parent, parent, signal.SIGURG)
            assert os.read(reader, 1)
        except BaseException:
            os._exit(1)
        os._exit(0)
"""


@needs_inotify
@pytest.mark.parametrize("receiver", ["handler", "sigwait", "signalfd"])
@pytest.mark.parametrize("way", ["kill", "sigqueue", "tgkill"])
def test_signals_of_the_programs_arrive(receiver, way):
    """However they are sent, and heard: none is lost in a guard."""
    if way == "tgkill" and (os.uname().machine not in ("x86_64", "aarch64") or receiver != "handler"):
        pytest.skip("for the handler of one thread")
    if not hasattr(libc, {"signalfd": "signalfd"}.get(receiver, "sigqueue")):
        pytest.skip("the C library has none")
    run_script(
        GUARDED
        + SENDER
        + f"""
    receiver = {receiver!r}
    child, heard = start_sender({way!r})
    if receiver == "handler":
        signal.signal(signal.SIGURG, lambda *args: os.write(heard, b"h"))
    else:
        signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGURG}})
    os.write(heard, b"s")
    if receiver != "handler":
        fd = libc.signalfd(-1, (1 << signal.SIGURG - 1).to_bytes(128, "little"), 0) if receiver == "signalfd" else -1
        def hear():
            while True:
                # Whatever it is: no other may be seen, but for that of the sender's end.
                signals = signal.valid_signals() - {{signal.SIGCHLD}}
                assert (len(os.read(fd, 128)) == 128 if fd >= 0 else signal.sigwait(signals) == signal.SIGURG)
                os.write(heard, b"h")
        threading.Thread(target=hear, daemon=True).start()
    directory = tempfile.TemporaryDirectory()
    watch = libc.inotify_init()
    libc.inotify_add_watch(watch, os.fsencode(directory.name), 0x100)
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        with gevent.Timeout(0, False):
            coopos.read(watch, 0)       # stands there until its guard ends it
    assert ended == (child, 0)
    directory.cleanup()
    """
    )


@needs_inotify
@pytest.mark.parametrize("name", [by_name("SIGURG", signal), by_name("SIGSTKFLT", signal), by_name("SIGEMT", signal)])
def test_handler_of_the_programs_is_not_disturbed(name):
    """Whether it was there before the first guard, or came later; and whether or not the signal is blocked."""
    run_script(
        GUARDED
        + f"""
    number = signal.{name}
    waits()
    calls = []
    signal.signal(number, lambda *args: calls.append(args[0]))
    waits()
    assert not calls
    os.kill(os.getpid(), number)
    assert calls == [number]
    signal.pthread_sigmask(signal.SIG_BLOCK, {{number}})
    os.kill(os.getpid(), number)
    waits()
    assert number in signal.sigpending()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {{number}})
    assert calls == [number] * 2
    """
    )


@pytest.mark.parametrize("name", [by_name("SIGURG", signal), by_name("SIGSTKFLT", signal)])
def test_worker_is_interrupted_and_no_handler_of_the_programs_hears_of_it(name, tmp_path):
    """Whether the handler was there before the worker began, or came later: then it can't be interrupted, and ends by itself."""
    run_script(
        f"""
        import os, signal, gevent, coopos
        from coopos import _core
        path = {os.fspath(tmp_path / "fifo")!r}
        os.mkfifo(path)

        def wait_and_be_killed():
            greenlet = gevent.spawn(coopos.open, path, os.O_RDONLY)
            while not _core.count_begun():
                gevent.sleep(0.001)
            return greenlet

        calls = []
        wait_and_be_killed().kill()
        assert not _core.count_begun()
        greenlet = wait_and_be_killed()
        signal.signal(signal.{name}, lambda *args: calls.append(args))
        greenlet.kill()
        fd = os.open(path, os.O_RDWR)  # until the worker has left: it may only be about to make its call
        while _core.count_begun():
            gevent.sleep(0.001)
        os.close(fd)
        wait_and_be_killed().kill()
        assert not _core.count_begun() and not calls
        """
    )


# ---- terminals that gather ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def make_gathering_terminal(vmin, vtime):
    """(master, slave) of a terminal that is not canonical, and in blocking mode."""
    with closing(*os.openpty()) as (master, slave):
        tty.setraw(slave)
        attributes = termios.tcgetattr(slave)
        attributes[6][termios.VMIN], attributes[6][termios.VTIME] = vmin, vtime
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        yield master, slave


def read_in_thread(fd, n):
    """read(2), plainly."""
    return gevent.get_hub().threadpool.apply(os.read, (fd, n))


def read_by_file(fd, n):
    with coopos.FileIO(fd, closefd=False) as file:
        return file.read(n)


GATHERING_READS = {
    "os": read_in_thread,
    "read": coopos.read,
    "nb_read": coopos.nb_read,
    "readinto": READS["readinto"][0],
    "FileIO": read_by_file,
}
each_gathering_read = pytest.mark.parametrize("read", GATHERING_READS.values(), ids=GATHERING_READS.keys())
LONG_DS = 250


@each_gathering_read
@pytest.mark.parametrize(
    ("vmin", "vtime", "n", "there", "read_then"),
    [
        (0, 0, 5, b"", b""),
        (0, 0, 5, b"ab", b"ab"),
        (0, 0, 1, b"ab", b"a"),
        (0, 1, 5, b"", b""),
        (0, LONG_DS, 5, b"ab", b"ab"),
        (3, 0, 5, b"abc", b"abc"),
        (3, 0, 2, b"ab", b"ab"),
        (3, 1, 5, b"ab", b"ab"),
        (3, LONG_DS, 5, b"abcd", b"abcd"),
        (3, LONG_DS, 2, b"ab", b"ab"),
        (1, 1, 5, b"ab", b"ab"),
    ],
)
def test_read_of_a_terminal_that_is_over_at_once_or_in_time(read, vmin, vtime, n, there, read_then):
    with make_gathering_terminal(vmin, vtime) as (master, slave), ticking():
        if there:
            os.write(master, there)
            until_there(slave, len(there))
        assert result_of(gevent.spawn(read, slave, n)) == read_then


@each_gathering_read
@pytest.mark.parametrize(
    ("vmin", "vtime", "n", "pieces"),
    [
        (0, LONG_DS, 5, [b"ab"]),
        (3, 0, 5, [b"a", b"bc"]),
        (3, 0, 2, [b"a", b"b"]),
        (3, LONG_DS, 5, [b"a", b"bcd"]),
        (3, LONG_DS, 2, [b"a", b"b"]),
        (3, 1, 5, [b"ab"]),
        (1, 1, 5, [b"ab"]),
    ],
)
def test_read_of_a_terminal_that_waits_for_more_leaves_the_hub_running(read, vmin, vtime, n, pieces):
    with make_gathering_terminal(vmin, vtime) as (master, slave):
        greenlet = parked(read, slave, n)
        for piece in pieces:
            assert not greenlet.ready()
            with ticking() as turns:
                until(lambda: len(turns) > 20)
            assert not greenlet.ready()
            os.write(master, piece)
        assert result_of(greenlet) == b"".join(pieces)


def until_there(fd, n):
    until(lambda: struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0] >= n)


@pytest.mark.parametrize(("vmin", "vtime", "n"), [(3, LONG_DS, 5), (3, 0, 2), (5, 0, 5)])
def test_read_of_a_terminal_killed_while_it_gathers_takes_nothing(vmin, vtime, n):
    with make_gathering_terminal(vmin, vtime) as (master, slave):
        greenlet = parked(coopos.read, slave, n)
        os.write(master, b"a")
        until_there(slave, 1)
        turn_loop()
        greenlet.kill()
        assert struct.unpack("i", fcntl.ioctl(slave, termios.FIONREAD, bytes(4))) == (1,)


@pytest.mark.parametrize(("vmin", "vtime", "n"), [(3, LONG_DS, 5), (3, 0, 2), (0, LONG_DS, 5)])
def test_read_of_a_terminal_that_gathers_and_is_closed_or_hung_up(vmin, vtime, n):
    with make_gathering_terminal(vmin, vtime) as (master, slave):
        greenlet = parked(error_of, coopos.read, slave, n)
        if vmin:
            os.write(master, b"a")
            until_there(slave, 1)
        coopos.close(slave)
        assert result_of(greenlet) == (OSError, errno.EBADF)
    with make_gathering_terminal(vmin, vtime) as (master, slave):
        greenlet = parked(error_of, coopos.read, slave, n)
        os.close(master)
        assert result_of(greenlet) in [(None, b""), (OSError, errno.EIO)]


@pytest.mark.parametrize(
    ("vmin", "vtime", "there", "read_then"),
    [(3, LONG_DS, b"abc", b"abc"), (3, 1, b"ab", b"ab"), (0, 1, b"", b"")],
)
def test_read_of_a_terminal_that_gathers_in_a_thread_without_a_hub(vmin, vtime, there, read_then):
    with make_gathering_terminal(vmin, vtime) as (master, slave):
        outcomes = []
        thread = threading.Thread(target=lambda: outcomes.append(coopos.read(slave, 5)))
        thread.start()
        os.write(master, there)
        thread.join(DEADLINE_S)
        assert outcomes == [read_then]


def test_read_of_a_terminal_that_gathers_in_the_hub():
    """Where nothing can be switched to it doesn't wait."""
    with make_gathering_terminal(3, LONG_DS) as (_master, slave):
        outcomes = []
        gevent.get_hub().loop.run_callback(lambda: outcomes.append(error_of(coopos.read, slave, 5)))
        turn_loop()
        assert outcomes == [(BlockingSwitchOutError, None)]


def test_read_by_a_file_of_a_terminal_that_has_no_more():
    """VMIN=0: a read that came back short doesn't mean that the next one has to wait. In non-blocking mode, too."""
    for blocking in (True, False):
        with make_gathering_terminal(0, 0) as (master, slave):
            os.set_blocking(slave, blocking)
            with coopos.FileIO(slave, closefd=False) as file:
                os.write(master, b"ab")
                until_there(slave, 2)
                assert result_of(gevent.spawn(file.read, 5)) == b"ab"
                assert result_of(gevent.spawn(file.read, 5)) == b""


def test_master_of_a_terminal_that_gathers_does_not():
    with make_gathering_terminal(0, 0) as (master, slave):
        greenlet = parked(coopos.read, master, 5)
        os.write(slave, b"ab")
        assert result_of(greenlet) == b"ab"


# ---- a process in the background ---------------------------------------------------------------------------------------------

BACKGROUND = """if True:
    import errno, fcntl, os, signal, sys, termios, tty
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)    # the script leads a session, and is in the foreground
    attributes = termios.tcgetattr(slave)
    attributes[3] |= termios.TOSTOP
    termios.tcsetattr(slave, termios.TCSANOW, attributes)

    def in_background(function, is_orphan=False):
        '''wait(2)'s status of a child that calls it in a process group of its own; 0 if it returns True.'''
        pid = os.fork()
        if pid == 0:
            try:
                os.setpgid(0, 0)
                while is_orphan and os.getppid() == leader:
                    pass
                import gevent, coopos
                os._exit(not function(coopos, gevent))
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
        status = os.waitpid(pid, os.WUNTRACED)[1]
        if os.WIFSTOPPED(status):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return status

    def error_of(function, *args):
        try:
            return function(*args)
        except OSError as ex:
            return ex.errno

    def ignored(number):
        signal.signal(number, signal.SIG_IGN)

    def blocked(number):
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})

    def untouched(number):
        pass

    def clog():
        '''Leave the terminal no room.'''
        os.set_blocking(slave, False)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        try:
            while True:
                os.write(slave, b"x" * 100)
        except BlockingIOError:
            pass
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        os.set_blocking(slave, True)
"""


@pytest.mark.parametrize(
    "call",
    ["os.read(slave, 1)", "coopos.read(slave, 1)", "coopos.nb_read(slave, 1)", "coopos.FileIO(slave, closefd=False).read(1)"],
)
def test_read_in_the_background(call):
    """EIO at once where SIGTTIN is ignored or blocked; else it stops the process."""
    run_script(
        BACKGROUND
        + f"""
    for mute in (ignored, blocked):
        def read(coopos, gevent):
            mute(signal.SIGTTIN)
            return error_of(lambda: {call}) == errno.EIO
        assert in_background(read) == 0, mute
    assert os.WSTOPSIG(in_background(lambda coopos, gevent: {call})) == signal.SIGTTIN
    """
    )


@pytest.mark.parametrize("call", ["os.write(slave, b'x')", "coopos.write(slave, b'x')", "coopos.nb_write(slave, b'x')"])
def test_write_in_the_background(call):
    """With TOSTOP: it goes through where SIGTTOU is ignored or blocked; else it stops the process, room or not."""
    run_script(
        BACKGROUND
        + f"""
    for mute in (ignored, blocked):
        def write(coopos, gevent):
            mute(signal.SIGTTOU)
            return {call} == 1
        assert in_background(write) == 0, mute
    assert os.WSTOPSIG(in_background(lambda coopos, gevent: {call})) == signal.SIGTTOU
    clog()
    assert os.WSTOPSIG(in_background(lambda coopos, gevent: {call})) == signal.SIGTTOU
    """
    )


def test_read_goes_on_in_the_foreground():
    """Stopped in the background, and continued in the foreground: it waits on the hub, and gets what is typed."""
    run_script(
        BACKGROUND
        + """
    turns, turn = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        import gevent, coopos
        def tick():
            while True:
                gevent.sleep(0.001)
                os.write(turn, b"t")
        gevent.spawn(tick)
        os._exit(coopos.read(slave, 5) != b"ab\\n")
    assert os.WSTOPSIG(os.waitpid(pid, os.WUNTRACED)[1]) == signal.SIGTTIN
    os.tcsetpgrp(slave, pid)
    os.kill(pid, signal.SIGCONT)
    for _ in range(20):
        assert os.read(turns, 1)
    os.write(master, b"ab\\n")
    assert os.waitpid(pid, 0)[1] == 0
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
