"""What the tests share: states to test in, made without sleeping. What a test must not leave behind is coopos.testing's.

Helpers are named by the state they make. What is waited for is waited for under DEADLINE_S, which turns a hang into a failure
and measures nothing.
"""

import collections
import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from concurrent.futures import Future

import gevent
import gevent.event
import pytest
from gevent.hub import get_hub

from coopos.testing import active_watchers as active_watchers, open_fds as open_fds, turn_loop as turn_loop

DEADLINE_S = 30
#: For a whole test: more than a script is given, less than pytest's faulthandler_timeout.
TEST_DEADLINE_S = 100

INT_MAX = 2**31 - 1

LOOP = type(get_hub().loop).__module__.split(".")[1]
#: Whether coopos can ask the kernel if a read or write would block. It can where the kernel says so of a pipe.
HAS_RWF_NOWAIT = False
with contextlib.suppress(AttributeError, OSError):
    _reader, _writer = os.pipe()
    try:
        os.preadv(_reader, [bytearray(1)], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        HAS_RWF_NOWAIT = os.environ.get("COOPOS_NOWAIT") != "0"
    finally:
        os.close(_reader)
        os.close(_writer)

needs_rwf_nowait = pytest.mark.skipif(not HAS_RWF_NOWAIT, reason="no RWF_NOWAIT for pipes here, or COOPOS_NOWAIT=0")
needs_libev = pytest.mark.skipif(LOOP != "libev", reason="libev's own behaviour")


class TookTooLong(BaseException):
    """A deadline passed. Not an Exception, so that no test takes it for what it expects."""


def deadline(seconds=DEADLINE_S):
    """A context in which a greenlet that waits longer than that is woken by TookTooLong. It keeps no loop running."""
    return gevent.Timeout(seconds, TookTooLong(f"still waiting after {seconds} s"), ref=False)


# ---- descriptors -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def closing(*fds):
    """*fds*, closed at the end if they are still open."""
    try:
        yield fds
    finally:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)


@contextlib.contextmanager
def make_pipe(blocking=False):
    """(reader, writer) of an empty pipe, in non-blocking mode unless told otherwise; closed at the end if still open."""
    with closing(*os.pipe()) as (reader, writer):
        os.set_blocking(reader, blocking)
        os.set_blocking(writer, blocking)
        yield reader, writer


def clog(fd):
    """Fill the other end of *fd*, a pipe or a socket, until nothing fits any more; return how much that was. Flags stay."""
    was_blocking = os.get_blocking(fd)
    os.set_blocking(fd, False)
    size = 0
    for piece in (b"x" * 65536, b"x"):
        with contextlib.suppress(BlockingIOError):
            while True:
                size += os.write(fd, piece)
    os.set_blocking(fd, was_blocking)
    return size


def drain(fd):
    """Everything that is in *fd* now. Flags stay."""
    was_blocking = os.get_blocking(fd)
    os.set_blocking(fd, False)
    pieces = []
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(fd, 65536):
            pieces.append(piece)
    os.set_blocking(fd, was_blocking)
    return b"".join(pieces)


@contextlib.contextmanager
def make_clogged_pipe(blocking=False):
    """(reader, writer, size) of a pipe that takes not one byte more than the *size* it holds."""
    with make_pipe(blocking) as (reader, writer):
        yield reader, writer, clog(writer)


# ---- greenlets and threads ---------------------------------------------------------------------------------------------------


def parked(function, *args):
    """A greenlet that stands in ``function(*args)`` and waits for the hub."""
    greenlet = gevent.spawn(function, *args)
    turn_loop()
    assert not greenlet.ready(), f"didn't wait: {greenlet.value!r}, {greenlet.exception!r}"
    return greenlet


def until(holds):
    """Let the hub run until holds(). It sleeps in between: a hub that never does leaves other threads no GIL for many seconds."""
    while not holds():
        gevent.sleep(0.001)


@contextlib.contextmanager
def ticking():
    """A greenlet that runs whenever it may; a list of its turns."""
    turns = []

    def turn():
        while True:
            turns.append(1)
            gevent.sleep(0.001)

    ticker = gevent.spawn(turn)
    try:
        yield turns
    finally:
        ticker.kill()


def result_of(greenlet):
    """What a greenlet returned; what it raised is raised."""
    return greenlet.get(timeout=DEADLINE_S)


def error_of(function, *args, **kwargs):
    """(class, errno) of what ``function(*args)`` raises, or (None, its result)."""
    try:
        result = function(*args, **kwargs)
    except Exception as ex:
        return type(ex), getattr(ex, "errno", None)
    return None, result


def outcomes(functions, *args, **kwargs):
    return [error_of(function, *args, **kwargs) for function in functions]


def in_hub(function, *args):
    """What error_of() says of ``function(*args)`` in a callback of the event loop."""
    results = []
    get_hub().loop.run_callback(lambda: results.append(error_of(function, *args)))
    turn_loop()
    [result] = results
    return result


class Index:
    """An integer by __index__, which os takes, and which has no bits to be asked for."""

    def __init__(self, number):
        self.number = number

    def __index__(self):
        return self.number

    def __repr__(self):
        return f"Index({self.number})"


class Int:
    """An integer by __int__ only, which os refuses."""

    def __init__(self, number):
        self.number = number

    def __int__(self):
        return self.number


class Broken:
    def __index__(self):
        raise ZeroDivisionError


class Inbox:
    """Other threads may have this thread's hub call functions. *ref*: the loop goes on running, also with nothing to wait for.

    Not by gevent's run_callback_threadsafe(), which crashes libuv: it starts a watcher in the loop of another thread.
    """

    def __init__(self, ref=True):
        self._calls = collections.deque()
        self._watcher = get_hub().loop.async_(ref=ref)
        self._watcher.start(self._run)

    def _run(self):
        while self._calls:
            self._calls.popleft()()

    def post(self, function, *args):
        self._calls.append(functools.partial(function, *args))
        self._watcher.send()

    def close(self):
        self._watcher.stop()
        self._watcher.close()


class HubThread:
    """Another thread, with a hub of its own that runs what it is told to; a context manager."""

    def __enter__(self):
        started = Future()
        self._has_posted = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        self.inbox = started.result(DEADLINE_S)
        return self

    def __exit__(self, *exc_info):
        self.post(self._told_to_end.set)
        self._has_posted.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def _run(self, started):
        hub = get_hub()
        inbox = Inbox()
        try:
            self._told_to_end = gevent.event.Event()
            started.set_result(inbox)
            self._told_to_end.wait()
            self._has_posted.wait(DEADLINE_S)  # a loop must not be destroyed while it is being posted to
        finally:
            inbox.close()
            hub.destroy(destroy_loop=True)

    def post(self, function, *args):
        """Have its hub call ``function(*args)``, and don't wait."""
        self.inbox.post(function, *args)

    def call(self, function, *args):
        """``function(*args)`` in a new greenlet there; returns what it returns. This thread stands still meanwhile."""
        future = Future()

        def run():
            try:
                future.set_result(function(*args))
            except BaseException as ex:
                future.set_exception(ex)

        self.post(gevent.spawn, run)
        return future.result(DEADLINE_S)

    def parked(self, function, *args):
        """A greenlet there that stands in ``function(*args)`` and waits for that hub."""
        return self.call(parked, function, *args)

    def result_of(self, greenlet):
        """What a greenlet there returned; what it raised is raised."""
        return self.call(result_of, greenlet)


# ---- fresh interpreters ------------------------------------------------------------------------------------------------------


def run_script(source, *, at=None, **how):
    """Run *source* in a fresh interpreter, as run_program() does, and return its standard output.

    *at* is a path to write the source to and to run it from: what multiprocessing spawns imports it.
    """
    program = ["-c", textwrap.dedent(source)]
    if at is not None:
        at.write_text(textwrap.dedent(source))
        program = [str(at)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        return run_program(program, **{"TMPDIR": directory, **how})


def run_program(program, *, may_complain=False, timeout_s=DEADLINE_S * 2, under=(), **env):
    """Run ``python *program``, warnings being errors; it must exit with status 0. Returns its standard output.

    *env* is added to this process's environment; a name that is None is taken out. The program must print nothing on standard
    error, where hubs report, unless it *may_complain*. *under* is a command that runs the interpreter. If it hangs, the stacks of
    its threads are shown. What it has left running in its process group is killed.
    """
    environment = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    process = subprocess.Popen(
        [*under, sys.executable, "-W", "error", "-X", "faulthandler", *program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    with process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # faulthandler answers with the stacks
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=5)
            kill_group(process.pid)
            out, err = process.communicate()
            pytest.fail(f"script still running after {timeout_s} s\n--- stdout\n{out}\n--- stderr\n{err}", pytrace=False)
        except BaseException:
            kill_group(process.pid)
            raise
    kill_group(process.pid)
    if process.returncode or (err and not may_complain):
        pytest.fail(f"script ended with {process.returncode}\n--- stdout\n{out}\n--- stderr\n{err}", pytrace=False)
    return out


#: For scripts that count descriptors: this thread's hub has waited once, and has what it keeps from then on.
HAS_WAITED = """
import os, gevent, coopos

def wait_once():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with gevent.Timeout(0.001, False):
        coopos.nb_read(reader, 1)
    os.close(reader)
    os.close(writer)

wait_once()
"""

#: For scripts that fork: how a child says that something is wrong. They have imported os, sys, traceback and coopos, and named the
#: function that forks *fork*.
IN_CHILD = """
def in_child(function, fork=fork):
    '''Run function() in a forked child; what it raises there is printed, and is a failure here.'''
    pid = fork()
    if pid == 0:
        run_and_exit(function)
    assert coopos.waitpid(pid, 0) == (pid, 0)


def run_and_exit(function):
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def raises(error, function, *args):
    try:
        result = function(*args)
    except error:
        return True
    raise AssertionError(f"no {error.__name__}, but {result!r}")
"""


#: For scripts of run_seccomp().
SECCOMP = """
import ctypes, errno, os, platform, struct
if platform.machine() not in ("x86_64", "aarch64"):
    print("skip: no system call numbers for this machine")
    raise SystemExit
libc = ctypes.CDLL(None, use_errno=True)
#: Those of Linux 5.1 and later have one number on all machines.
numbers = {"pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "pidfd_open": 434,
           "clone3": 435, "close_range": 436, "openat2": 437, "pidfd_getfd": 438, "faccessat2": 439, "epoll_pwait2": 441,
           "futex_waitv": 449}
for name, *both in (("waitid", 247, 95), ("ioctl", 16, 29), ("timer_create", 222, 107), ("timer_settime", 223, 110),
                    ("clone", 56, 220), ("epoll_create1", 291, 20), ("preadv2", 327, 286), ("pwritev2", 328, 287),
                    ("process_vm_readv", 310, 270), ("process_vm_writev", 311, 271), ("kcmp", 312, 272), ("userfaultfd", 323, 282),
                    ("copy_file_range", 326, 285)):
    numbers[name] = both[platform.machine() == "aarch64"]

def refuse(call, err, argument=None, value=None):
    '''From now on this process's *call*, with that value of an argument, fails with errno *err*.'''
    load, jump_equal, ret = 0x20, 0x15, 0x06
    program = [(load, 0, 0, 0)]
    checks = [numbers[call]] + ([] if argument is None else [value])
    for index, expected in enumerate(checks):
        if index:
            program.append((load, 0, 0, 16 + 8 * argument))
        left = 2 * (len(checks) - 1 - index)
        program.append((jump_equal, 0, left + 1, expected))
    program += [(ret, 0, 0, 0x00050000 | err), (ret, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
    filter = Program(len(program), ctypes.addressof(code))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(filter), 0, 0):
        print("skip: no seccomp here")
        raise SystemExit
"""


def run_seccomp(source, **kwargs):
    """run_script() with a function refuse(), which has system calls fail from then on."""
    output = run_script(SECCOMP + source, **kwargs)
    if output.startswith("skip: "):
        pytest.skip(output[6:].strip())
    return output


def kill_group(pgid):
    """SIGKILL to all that is left of a process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, signal.SIGKILL)
