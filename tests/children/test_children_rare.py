"""Children in rare states: no hub to wait in, refused system calls, tracers, no memory, pids used again, other people's SIGCHLD.

Each in a fresh interpreter, since it changes the process.
"""

import os

import pytest

from ..helpers.children import may_choose_pids, needs_p_pidfd, run_used_pid
from ..helpers.support import HAS_WAITED, LOOP, needs_libev, run_script

SETUP = """
import ctypes, gc, os, signal, subprocess, sys, threading
import gevent, coopos
from gevent.hub import _get_hub

def fds():
    return sorted(os.listdir("/dev/fd"), key=int)

def living(spawn=os.posix_spawn, script="read line; exit 7"):
    '''(pid, a descriptor): the child ends when that is closed.'''
    reader, writer = os.pipe()
    pid = spawn("/bin/sh", ["sh", "-c", script], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0)])
    os.close(reader)
    return pid, writer

def turns_until(done):
    '''How often the loop goes round until greenlet *done* is ready.'''
    turns = []
    counter = gevent.get_hub().loop.check(ref=False)
    counter.start(lambda: turns.append(1))
    done.join()
    counter.stop()
    counter.close()
    return len(turns)

def later():
    '''A greenlet that is ready when another process says so, in a moment.'''
    reader, writer = os.pipe()
    process = os.posix_spawn("/bin/sh", ["sh", "-c", "sleep 0.3"], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)])
    os.close(writer)
    def read():
        coopos.read(reader, 1)
        os.close(reader)
        os.waitpid(process, 0)
    return gevent.spawn(read)
"""

PTRACE = """
TRACEME, CONT, SEIZE = 0, 7, 0x4206
libc = ctypes.CDLL(None, use_errno=True)
def ptrace(request, pid):
    if libc.ptrace(ctypes.c_long(request), ctypes.c_long(pid), ctypes.c_void_p(0), ctypes.c_void_p(0)) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")
"""

both_paths = pytest.mark.parametrize("children", [None, "thread"], ids=["pidfd", "thread"])


def run_here(source, **kwargs):
    return run_script(SETUP + source, **kwargs)


# ---- no memory ---------------------------------------------------------------------------------------------------------------


@needs_libev  # gevent's libuv loop is Python, which has faults of its own there
@both_paths
@pytest.mark.parametrize("call", ["coopos.waitpid(pid, 0)", "coopos.waitid(os.P_ALL, 0, os.WEXITED)", "coopos.watch(pid)"])
def test_wait_undoes_itself_without_memory(call, children):
    """Wherever an allocation fails on the way to parking: no descriptor, thread or listener stays, and the child is waitable."""
    pytest.importorskip("_testcapi")
    run_here(
        f"""
import _testcapi
hub = gevent.get_hub()
pid, end = living()
with gevent.Timeout(0.01, False):
    coopos.waitpid(pid, 0)
with gevent.Timeout(0.01, False):
    coopos.waitpid(-1, 0)
class Waiter(gevent.Greenlet):
    def switch_out(self):
        _testcapi.remove_mem_hooks()     # greenlet itself doesn't survive it when there is no memory for a stack
def call():
    {call}
def attempt(n):
    _testcapi.set_nomemory(n, n + 1)
    try:
        call()
    except MemoryError:
        return True
    finally:
        _testcapi.remove_mem_hooks()
failed = 0
for n in range(70):
    before, threads = fds(), len(os.listdir("/proc/self/task"))
    greenlet = Waiter.spawn(attempt, n)
    gevent.idle()
    if greenlet.ready() and greenlet.value:
        failed += 1
        del greenlet
        gevent.idle()
        assert fds() == before, (n, before, fds())
        assert len(os.listdir("/proc/self/task")) == threads, n
    elif not greenlet.ready():
        greenlet.kill()
    else:
        break
assert failed >= 3, failed
os.close(end)
assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
""",
        COOPOS_CHILDREN=children,
        may_complain=True,
    )


@both_paths
def test_status_collected_without_memory(children):
    """Wherever an allocation fails once the kernel has given the status: waitpid(-1) finds it."""
    pytest.importorskip("_testcapi")
    run_here(
        """
import _testcapi
gevent.get_hub()
def poll(child, n):
    _testcapi.set_nomemory(n, n + 1)
    try:
        child.look()
    finally:
        _testcapi.remove_mem_hooks()
for n in range(30):
    pid, end = living()
    child = coopos.watch(pid)
    os.close(end)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        poll(child, n)
    except MemoryError:
        pass
    with gevent.Timeout(5):
        assert coopos.waitpid(-1, 0) == (pid, 7 << 8), n
""",
        COOPOS_CHILDREN=children,
        may_complain=True,
    )


# ---- nothing to switch to ----------------------------------------------------------------------------------------------------


@both_paths
def test_waits_in_threads_without_hubs(children):
    """They make no hub, leave no descriptor, and exactly one of those who wait gets the status."""
    run_here(
        HAS_WAITED
        + """
results = []
def wait(function, *args):
    try:
        results.append(function(*args))
    except ChildProcessError:
        results.append(None)
    assert _get_hub() is None
def in_hub(pid):
    try:
        return coopos.waitpid(pid, 0)
    except ChildProcessError:
        return None
def in_threads(*calls):
    results.clear()
    threads = [threading.Thread(target=wait, args=call) for call in calls]
    for thread in threads:
        thread.start()
    return threads
hub = gevent.get_hub()
for spawn in os.posix_spawn, coopos.posix_spawn:
    before = fds()
    for question in "pid", "id", "any", "four":
        pid, end = living(spawn)
        call = {"pid": (coopos.waitpid, pid, 0), "id": (coopos.waitid, os.P_PID, pid, os.WEXITED),
                "any": (coopos.waitpid, -1, 0), "four": (coopos.wait4, pid, 0)}[question]
        threads = in_threads(*[call] * 4)
        greenlet = gevent.spawn(in_hub, pid)
        gevent.idle()
        os.close(end)
        for thread in threads:
            while thread.is_alive():
                gevent.sleep(0)
        results.append(greenlet.get())
        greenlet = None
        got = [result for result in results if result is not None]
        assert len(got) == 1 and pid in got[0], (spawn, question, results)
        gevent.idle()
        assert fds() == before, (before, fds())
""",
        COOPOS_CHILDREN=children,
    )


@both_paths
def test_programs_in_threads_without_hubs(children):
    """A native thread that starts a program and waits for it gets no hub and keeps no descriptor."""
    run_here(
        """
import coopos.subprocess
gevent.get_hub()
def run():
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], os.environ)
    child = coopos._core.watch_new(pid, print, None, True, needs_hub=False)
    child.join()
    assert child.rstatus == 7 << 8
    pid = coopos.posix_spawn("/bin/true", ["true"], {})
    assert coopos.waitpid(pid, 0) == (pid, 0)
    child.claim_status()
    assert _get_hub() is None
    done.append(1)
done = []
before = fds()
for _ in range(5):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
gc.collect()
assert len(done) == 5 and fds() == before, (before, fds())
""",
        COOPOS_CHILDREN=children,
    )


@both_paths
@pytest.mark.parametrize("question", ["coopos.waitpid(pid, 0)[1]", "coopos.wait()[1]", "coopos.waitpid(0, os.WUNTRACED)[1]"])
def test_wait_in_a_signal_handler_that_runs_in_the_hub(question, children):
    """Nothing can be switched to there: it stands still, as in plain Python."""
    run_here(
        f"""
def handler(signum, frame):
    if gevent.getcurrent() is not gevent.get_hub():
        signal.setitimer(signal.ITIMER_REAL, 0.01)     # it came before the hub slept
        return
    pid, end = living()
    os.close(end)
    statuses.append({question})
statuses = []
gevent.sleep(0.001)
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.01)
while not statuses:
    gevent.sleep(0.02)
assert statuses == [7 << 8]
""",
        COOPOS_CHILDREN=children,
    )


def test_plain_wait_is_interrupted():
    """A signal's handler runs while the main thread stands in a wait, and what it raises comes out."""
    run_here(
        """
class Enough(Exception):
    pass
def handler(signum, frame):
    raise Enough
signal.signal(signal.SIGALRM, handler)
pid, end = living()
assert _get_hub() is None
for wait in lambda: coopos.waitpid(pid, 0), lambda: coopos.waitpid(-1, 0):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        wait()
    except Enough:
        pass
    else:
        raise AssertionError
os.close(end)
assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
assert _get_hub() is None
"""
    )


# ---- refused system calls ----------------------------------------------------------------------------------------------------


@needs_p_pidfd
@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
def test_pidfd_calls_refused_but_for_pidfd_open(error):
    """Children are then collected by pid, and signals sent by pid."""
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers of system calls are x86-64's")
    run_here(
        f"""
import errno, struct
libc = ctypes.CDLL(None, use_errno=True)
ERRNO, ALLOW = 0x00050000 | errno.{error}, 0x7FFF0000
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
program = [
    (LOAD, 0, 0, 0), (EQUAL, 4, 0, 424), (EQUAL, 0, 2, 247),      # pidfd_send_signal, waitid
    (LOAD, 0, 0, 16), (EQUAL, 1, 0, 3),                           # its first argument: P_PIDFD
    (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERRNO),
]
code = b"".join(struct.pack("HBBI", *each) for each in program)
buffer = ctypes.create_string_buffer(code)
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, filter, 0, 0) == 0, ctypes.get_errno()
for spawn in os.posix_spawn, coopos.posix_spawn:
    pid, end = living(spawn)
    waiter = gevent.spawn(coopos.waitpid, pid, 0)
    gevent.sleep(0)
    os.close(end)
    assert waiter.get() == (pid, 7 << 8)
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
    else:
        raise AssertionError("a zombie")
pid, end = living()
child = coopos.watch(pid)
child.send_signal(signal.SIGKILL)
child.join()
assert child.rstatus == signal.SIGKILL
"""
    )


# ---- tracers -----------------------------------------------------------------------------------------------------------------


def test_waiting_for_a_child_whose_end_a_tracer_holds_back():
    """The hub sleeps until the tracer lets go."""
    run_here(
        PTRACE
        + """
pid, end = living(coopos.posix_spawn)
in_tracer, to_tracer = os.pipe()
from_tracer, out_tracer = os.pipe()
tracer = os.fork()
if tracer == 0:
    try:
        os.close(to_tracer)
        os.close(end)
        ptrace(SEIZE, pid)
        os.write(out_tracer, b"x")
        os.read(in_tracer, 1)
    finally:
        os._exit(0)
if os.read(from_tracer, 1) != b"x":
    raise SystemExit
waiter = gevent.spawn(coopos.waitpid, pid, 0)
gevent.sleep(0)
os.close(end)
os.kill(pid, signal.SIGKILL)
turns = turns_until(later())
assert not waiter.ready()
assert turns < 100, turns
os.close(to_tracer)
assert waiter.get()[0] == pid
os.waitpid(tracer, 0)
"""
    )


@both_paths
@pytest.mark.parametrize("fork", ["os.fork", "coopos.fork"])
def test_waitpid_tells_the_stops_of_a_child_that_it_traces(fork, children):
    """Without WUNTRACED, as in os; and the end after that."""
    run_here(
        PTRACE
        + f"""
reader, writer = os.pipe()
pid = {fork}()
if pid == 0:
    ptrace(TRACEME, 0)
    os.write(writer, b"x")
    signal.raise_signal(signal.SIGUSR1)
    os._exit(7)
os.read(reader, 1)
gevent.sleep(0)
stopped = gevent.spawn(coopos.waitpid, pid, 0).get()
assert stopped == (pid, signal.SIGUSR1 << 8 | 0x7f), stopped
ptrace(CONT, pid)
assert gevent.spawn(coopos.waitpid, pid, 0).get() == (pid, 7 << 8)
""",
        COOPOS_CHILDREN=children,
    )


def test_waitpid_of_this_threads_children_beside_another_threads_zombie():
    """__WNOTHREAD: the zombie is left alone, no thread is started over and over, and the own child's end is told."""
    run_here(
        """
NOTHREAD = 0x20000000
theirs = []
class Native(threading.Thread):
    def run(self):
        theirs.append(os.posix_spawn("/bin/sh", ["sh", "-c", "exit 9"], os.environ))
        os.waitid(os.P_PID, theirs[0], os.WEXITED | os.WNOWAIT)
        zombie.set()
        leave.wait()
zombie, leave = threading.Event(), threading.Event()
native = Native()
native.start()
zombie.wait()
pid = os.posix_spawn("/bin/sh", ["sh", "-c", "sleep 0.2; exit 7"], os.environ)
turns = turns_until(waiter := gevent.spawn(coopos.waitpid, -1, NOTHREAD))
assert waiter.get() == (pid, 7 << 8)
assert turns < 20, turns
leave.set()
native.join()
assert coopos.waitpid(theirs[0], 0) == (theirs[0], 9 << 8)
"""
    )


# ---- pids used again ---------------------------------------------------------------------------------------------------------


@needs_p_pidfd
@may_choose_pids
def test_waitid_pidfd_of_a_child_whose_pid_is_used_again():
    """It tells the first child's status, or that there is no such child; the second one's is left to who waits for that."""
    run_used_pid("""
pidfd = os.pidfd_open(pid)
while not ended:
    gevent.sleep(0)
fork_as(os.fork, pid, 9)
try:
    result = coopos.waitid(os.P_PIDFD, pidfd, os.WEXITED)
except ChildProcessError:
    pass
else:
    assert result.si_status == 1, result
assert coopos.waitpid(pid, 0) == (pid, 9 << 8)
""")


# ---- SIGCHLD -----------------------------------------------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize(
    "how",
    ["handler", pytest.param("watcher", marks=pytest.mark.skipif(LOOP == "libev", reason="libev would collect others' children"))],
)
def test_sigchld_watchers_hear_of_watched_children(how, children):
    """gevent.signal_handler(SIGCHLD) does, on libuv a loop's own watcher, too; and nobody's child is collected."""
    run_here(
        f"""
heard = []
if {how!r} == "handler":
    watcher = gevent.signal_handler(signal.SIGCHLD, heard.append, 1)
else:
    watcher = gevent.get_hub().loop.signal(signal.SIGCHLD, ref=False)
    watcher.start(heard.append, 1)
other = gevent.signal_handler(signal.SIGUSR2, heard.append, "wrong")
strange, end = living(script="exit 5")
for count in range(1, 4):
    pid = coopos.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], os.environ)
    heard.clear()
    assert gevent.spawn(coopos.waitpid, pid, 0).get() == (pid, 7 << 8)
    while not heard:
        gevent.sleep(0)
assert "wrong" not in heard
assert os.waitpid(strange, 0) == (strange, 5 << 8)
watcher.cancel() if hasattr(watcher, "cancel") else watcher.stop()
pid = coopos.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], os.environ)
heard.clear()
gevent.spawn(coopos.waitpid, pid, 0).get()
gevent.idle()
gevent.idle()
assert heard == []
other.cancel()
""",
        COOPOS_CHILDREN=children,
    )


@needs_libev
@both_paths
def test_new_default_loop_collects_nobodys_children(children):
    """After hub.destroy(destroy_loop=True) libev installs its handler for SIGCHLD, unless it is kept from that."""
    run_here(
        """
watched, end = living(coopos.posix_spawn)
with gevent.Timeout(0.01, False):
    coopos.waitpid(watched, 0)
for _ in range(2):
    gevent.get_hub().destroy(destroy_loop=True)
    gevent.sleep(0.01)
    strange, strange_end = living()
    os.close(strange_end)
    os.waitid(os.P_PID, strange, os.WEXITED | os.WNOWAIT)
    gevent.sleep(0.05)
    assert os.waitpid(strange, 0) == (strange, 7 << 8)
os.close(end)
assert coopos.waitpid(watched, 0) == (watched, 7 << 8)
heard = []
watcher = gevent.signal_handler(signal.SIGCHLD, heard.append, 1)
pid = coopos.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], os.environ)
assert gevent.spawn(coopos.waitpid, pid, 0).get() == (pid, 7 << 8)
while not heard:
    gevent.sleep(0)
""",
        COOPOS_CHILDREN=children,
    )


@pytest.mark.parametrize("where", ["here", "in another thread"])
def test_gevent_signal_handlers_come_before_the_waiter(where):
    """A SIGCHLD handler that was set through gevent.signal is called before who waits for the child goes on."""
    run_here(
        f"""
import gevent.signal
order = []
gevent.signal.signal(signal.SIGCHLD, lambda *args: order.append("handler"))
pid, end = living(coopos.posix_spawn)
def wait():
    coopos.waitpid(pid, 0)
    order.append("waiter")
def wait_in_thread():
    gevent.spawn(wait).join()
    gevent.get_hub().destroy(destroy_loop=True)
if {where!r} == "here":
    waiter = gevent.spawn(wait)
    gevent.idle()
    os.close(end)
    waiter.join()
else:
    thread = threading.Thread(target=wait_in_thread)
    thread.start()
    os.close(end)
    while thread.is_alive() or len(order) < 2:
        gevent.sleep(0)
assert sorted(order) == ["handler", "waiter"], order
assert {where!r} != "here" or order == ["handler", "waiter"], order
"""
    )


# ---- links -------------------------------------------------------------------------------------------------------------------


def test_popen_unlink_keeps_nothing():
    """What was linked and unlinked again is freed while the child runs, and keeps the loop alive no longer."""
    run_here(
        """
import weakref
from coopos.subprocess import Popen, PIPE
popen = Popen(["/bin/cat"], stdin=PIPE)
class Callback:
    def __call__(self, popen):
        called.append(self)
called, seen = [], []
for _ in range(100):
    callback = Callback()
    seen.append(weakref.ref(callback))
    popen.rawlink(callback)
    popen.unlink(callback)
del callback
gc.collect()
assert not any(ref() for ref in seen)
popen.rawlink(kept := Callback())
popen.stdin.close()
popen.wait()
gevent.idle()
assert called == [kept]
assert popen._links == []
"""
    )
