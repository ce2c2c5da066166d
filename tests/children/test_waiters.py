"""Many who wait for the same children, in greenlets, threads and workers: who is told, and that it is one."""

import contextlib
import ctypes
import os
import threading

import gevent
import pytest
from gevent.hub import get_hub

import coopos

from ..helpers.children import (
    ENDED_THREAD,
    FORK_LIVING,
    HAS_PIDFDS,
    OWN_GROUP,
    STATUS,
    both_spawns,
    count_questions,
    dead_child,
    living_child,
    needs_proc,
    needs_reaped_status,
    no_child,
    question_about,
    questions,
    spawn_in,
    spawn_sh,
    thread_ids,
)
from ..helpers.support import DEADLINE_S, LOOP, HubThread, error_of, parked, result_of, run_script, run_seccomp, turn_loop, until

# ---- many who wait -----------------------------------------------------------------------------------------------------------


def outcomes(results, pid):
    """How many got the status; the others must have been told that there is no child."""
    got = results.count((None, (pid, STATUS)))
    assert results.count(no_child) == len(results) - got, results
    return got


@both_spawns
def test_waitpid_many_greenlets(spawn):
    """Exactly one of those who wait for a child gets its status."""
    with living_child(spawn) as (pid, end):
        waiters = [parked(error_of, coopos.waitpid, pid, 0) for _ in range(10)]
        end()
        assert outcomes([result_of(waiter) for waiter in waiters], pid) == 1


@both_spawns
def test_waitpid_many_threads(spawn):
    """Greenlets of several threads wait for one child: exactly one gets its status."""
    with contextlib.ExitStack() as stack:
        pid, end = stack.enter_context(living_child(spawn))
        threads = [stack.enter_context(HubThread()) for _ in range(4)]
        there = [(thread, thread.parked(error_of, coopos.waitpid, pid, 0)) for thread in threads for _ in range(3)]
        here = [parked(error_of, coopos.waitpid, pid, 0) for _ in range(3)]
        end()
        results = [result_of(waiter) for waiter in here]
        results += [thread.result_of(waiter) for thread, waiter in there]
        assert outcomes(results, pid) == 1


@both_spawns
def test_waitpid_many_questions(spawn):
    """One waits for the pid, one for any, one for its group, one for a stop: one gets the status, the others no child."""
    with living_child(spawn, **OWN_GROUP) as (pid, end):
        waiters = [parked(error_of, coopos.waitpid, *question) for question in [(pid, 0), (-1, 0), (-pid, 0), (pid, os.WUNTRACED)]]
        end()
        assert outcomes([result_of(waiter) for waiter in waiters], pid) == 1


@both_spawns
def test_waitpid_many_questions_in_threads(spawn):
    """The same, each in a thread's hub of its own."""
    with contextlib.ExitStack() as stack:
        pid, end = stack.enter_context(living_child(spawn, **OWN_GROUP))
        threads = [stack.enter_context(HubThread()) for _ in range(4)]
        questions = [(pid, 0), (-1, 0), (-pid, 0), (pid, os.WUNTRACED)]
        waiters = [
            (thread, thread.parked(error_of, coopos.waitpid, *question))
            for thread, question in zip(threads, questions, strict=True)
        ]
        end()
        assert outcomes([thread.result_of(waiter) for thread, waiter in waiters], pid) == 1


@both_spawns
def test_waitpid_child_of_another_thread(spawn):
    """A child started in one thread is waited for in another, living or dead."""
    with HubThread() as one, HubThread() as two:
        with living_child(spawn_in(one, spawn)) as (pid, end):
            waiter = two.parked(coopos.waitpid, pid, 0)
            end()
            assert two.result_of(waiter) == (pid, STATUS)
        pid = one.call(dead_child, spawn)
        assert two.call(coopos.waitpid, pid, 0) == (pid, STATUS)
        assert one.call(error_of, coopos.waitpid, pid, 0) == no_child


def test_waitpid_child_of_a_thread_that_has_ended():
    """The watch of a thread that is gone is no hindrance, and its descriptors are not left open."""
    run_script(
        ENDED_THREAD
        + """
for is_parked in (True, False):
    pid, writer = in_a_thread(fork_living)
    if is_parked:
        waiter = gevent.spawn(coopos.waitpid, pid, 0)
        gevent.sleep(0)
        os.close(writer)
        assert waiter.get() == (pid, 7 << 8)
    else:
        os.close(writer)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
assert sorted(os.listdir("/dev/fd")) == fds
"""
    )


@pytest.mark.skipif(LOOP == "libuv", reason="gevent's own libuv loop can't be destroyed with a watcher that keeps it running")
@pytest.mark.parametrize("question", ["pid", "-1", "0"])
@pytest.mark.parametrize("options", ["0", "os.WUNTRACED"])
def test_waitpid_after_a_thread_that_ended_in_one(question, options):
    """A greenlet that still waited when its thread ended is no hindrance to others who wait, and holds no descriptor."""
    run_script(
        ENDED_THREAD
        + f"""
pid, writer = fork_living()

def wait_and_leave():
    gevent.spawn(coopos.waitpid, {question}, {options})
    gevent.sleep(0)

in_a_thread(wait_and_leave)
waiter = gevent.spawn(coopos.waitpid, pid, 0)
gevent.sleep(0)
os.close(writer)
assert waiter.get() == (pid, 7 << 8)
pid, writer = fork_living()
os.close(writer)
assert coopos.waitpid(-1, 0) == (pid, 7 << 8)
assert sorted(os.listdir("/dev/fd")) == fds
"""
    )


IN_A_SEND = """
import os, threading, gevent, coopos
from gevent.libuv import loop

parked, in_send, go_on, results = threading.Event(), threading.Event(), threading.Event(), []

class Libuv:
    def __getattr__(self, name):
        return getattr(libuv, name)

    def uv_async_send(self, handle):
        '''As if the other thread got the GIL in the middle.'''
        if threading.current_thread() is thread and parked.is_set() and not in_send.is_set():
            in_send.set()
            assert go_on.wait(30)
        return libuv.uv_async_send(handle)

libuv, loop.libuv = loop.libuv, Libuv()

reader, writer = os.pipe()
pid = coopos.fork()
if pid == 0:
    os.close(writer)
    os.read(reader, 1)
    os._exit(7)

def outcome(*args):
    try:
        return coopos.waitpid(*args)
    except Exception as ex:
        return type(ex)

def run():
    waiter = gevent.spawn(outcome, -1, 0)
    gevent.sleep(0)
    parked.set()
    results.append(waiter.get())
    gevent.get_hub().destroy(destroy_loop=True)

other = gevent.spawn(outcome, -1, 0)
gevent.sleep(0)
thread = threading.Thread(target=run)
thread.start()
assert parked.wait(30)
os.close(writer)
assert in_send.wait(30)  # the thread has collected the child, and is about to tell the others
"""
needs_libuv = pytest.mark.skipif(LOOP != "libuv", reason="in libev no other thread runs while a watcher is sent")


@needs_libuv
def test_waitpid_while_another_thread_is_telling():
    """A thread that has collected a child and is telling others who wait doesn't share the status with one who asks just then."""
    run_script(
        IN_A_SEND
        + """
results.append(outcome(pid, os.WNOHANG))
go_on.set()
thread.join()
results.append(other.get())
assert sorted(map(repr, results)) == sorted(map(repr, [(pid, 7 << 8), ChildProcessError, ChildProcessError])), results
"""
    )


@needs_libuv
def test_waitpid_killed_while_another_thread_is_telling():
    """Nor is it harmed when one whom it is about to tell waits no longer."""
    run_script(
        IN_A_SEND
        + """
other.kill()
gevent.idle()
go_on.set()
thread.join()
assert results == [(pid, 7 << 8)], results
"""
    )


@both_spawns
def test_waitpid_each_thread_its_own_child(spawn):
    """Threads start and wait at the same time; each gets its own child's status."""
    count, threads = 20, 4

    def start_and_wait(number):
        for _ in range(count):
            pid = spawn_sh(spawn, f"exit {number}")
            assert coopos.waitpid(pid, 0) == (pid, number << 8)
        return number

    with contextlib.ExitStack() as stack:
        hubs = [stack.enter_context(HubThread()) for _ in range(threads)]
        waiters = [hub.call(gevent.spawn, start_and_wait, number) for number, hub in enumerate(hubs, 1)]
        assert [hub.result_of(waiter) for hub, waiter in zip(hubs, waiters, strict=True)] == [1, 2, 3, 4]


@both_spawns
def test_waitpid_in_a_thread_without_a_hub(spawn):
    """A plain thread that has never used gevent gets a hub when it has to wait."""
    results = []

    def run():
        pid = spawn_sh(spawn, "exit 7")
        results.append(coopos.waitpid(pid, 0) == (pid, STATUS))
        get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(DEADLINE_S)
    assert results == [True]


# ---- workers that wait -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("question", "options"), [("any", 0), ("own group", 0), ("pid", os.WUNTRACED), ("group", os.WCONTINUED)])
def test_questions_are_put_once(question, options):
    """However many greenlets of however many threads ask, one worker asks the kernel; after the answer none does."""
    with HubThread() as other:
        with living_child(os.posix_spawn) as (pid, end):
            asked = question_about(pid, question), options
            here = [parked(error_of, coopos.waitpid, *asked) for _ in range(5)]
            there = [other.parked(error_of, coopos.waitpid, *asked) for _ in range(5)]
            assert count_questions() == 1
            end()
            results = [result_of(waiter) for waiter in here] + [other.result_of(waiter) for waiter in there]
        assert outcomes(results, pid) == 1
        until(lambda: not count_questions())


def test_questions_that_are_distinct():
    """Each question has a worker of its own, and none once the last who asked was killed."""
    with living_child(os.posix_spawn, **OWN_GROUP) as (pid, end):
        waiters = [
            parked(coopos.waitpid, *question)
            for question in [(-1, 0), (-pid, 0), (pid, os.WUNTRACED), (-1, os.WUNTRACED), (-1, 0), (-pid, 0)]
        ]
        assert count_questions() == 4
        gevent.killall(waiters)
        until(lambda: not count_questions())
        end()
        assert coopos.waitpid(pid, 0) == (pid, STATUS)


def test_questions_one_for_each_child():
    """Without pidfds a child has one worker, however many wait for it; with them none."""
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(living_child(spawn)) for spawn in (coopos.posix_spawn, os.posix_spawn) for _ in range(3)]
        waiters = [parked(error_of, coopos.waitpid, pid, 0) for pid, _ in children for _ in range(3)]
        assert count_questions() == (0 if HAS_PIDFDS else len(children))
        for _, end in children:
            end()
        assert sum(result_of(waiter)[0] is None for waiter in waiters) == len(children)
    until(lambda: not count_questions())


def test_questions_are_asked_again():
    """A question that was answered and is asked again gets a fresh answer, by the worker that has put the last one."""
    before, threads = thread_ids(), set()
    with living_child() as (pid, end):
        for _ in range(20):
            with living_child() as (other, end_other):
                waiter = parked(coopos.waitpid, -1, 0)
                threads |= thread_ids()
                end_other()
                assert result_of(waiter) == (other, STATUS)
        end()
        assert coopos.waitpid(-1, 0) == (pid, STATUS)
    assert len(threads - before) < 20, threads


def test_questions_where_no_thread_is_left():
    """Where no thread can be made the kernel is asked again and again."""
    run_seccomp(
        FORK_LIVING
        + """
import threading
refuse("clone3", errno.EAGAIN)
try:
    threading.Thread(target=int).start()
except RuntimeError:
    pass
else:
    print("skip: threads are made in another way")
    raise SystemExit

for fork in (coopos.fork, coopos.fork_gevent):
    for question, options in ((-1, 0), (None, os.WUNTRACED)):
        pid, writer = fork_living(fork)
        waiter = gevent.spawn(coopos.waitpid, question or pid, options)
        gevent.sleep(0)
        other = gevent.spawn(coopos.waitpid, question or pid, options)
        gevent.sleep(0)
        other.kill()
        assert not waiter.ready()
        os.close(writer)
        assert waiter.get(timeout=30) == (pid, 7 << 8)
"""
    )


def test_exit_with_living_children():
    """An interpreter that ends while children are watched and waited for ends quietly."""
    run_script("""
        import os, gevent, coopos
        reader, writer = os.pipe()
        pids = []
        for _ in range(5):
            pid = coopos.fork()
            if pid == 0:
                os.close(writer)
                os.read(reader, 1)
                os._exit(0)
            pids.append(pid)
        for pid in (*pids, -1, 0):
            gevent.spawn(coopos.waitpid, pid, 0)
        gevent.sleep(0)
    """)


def test_exit_while_children_die():
    """The same, while the children die."""
    run_script(
        """
        import os, gevent, coopos
        for _ in range(20):
            pid = coopos.fork()
            if pid == 0:
                os._exit(0)
            gevent.spawn(coopos.waitpid, pid, 0)
            gevent.spawn(coopos.waitpid, pid, os.WUNTRACED)
        gevent.spawn(coopos.waitpid, -1, 0)
        gevent.sleep(0)
        """,
        may_complain=True,  # most are told that there is no such child any more
    )


DIES_LATE = """
import ctypes, os, signal, sys, gevent, coopos
pid = coopos.fork()
if pid == 0:
    while True:
        signal.pause()
gevent.spawn(coopos.waitpid, {question}, 0)
gevent.sleep(0)
libc = ctypes.CDLL(None)
# Called with the exit status, the last one first: kill(pid, SIGKILL), then some microseconds in which that may do its harm.
for _ in range(10):
    libc.on_exit(libc.usleep, None)
libc.on_exit(libc.kill, ctypes.c_void_p(signal.SIGKILL))
print(pid & 0xFF, flush=True)
sys.exit(pid)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "on_exit"), reason="the C library has no on_exit()")
@pytest.mark.parametrize("question", ["pid", "-1", "0"])
def test_child_that_dies_after_the_interpreter(question):
    """A child whose end comes when the interpreter is gone, and the process not yet, does no harm."""
    run_script(
        f"""
import subprocess, sys
done = subprocess.run([sys.executable, "-c", {DIES_LATE.format(question=question)!r}], stdout=subprocess.PIPE)
assert done.returncode == int(done.stdout), done
"""
    )


@pytest.mark.parametrize("question", ["pid", "-1", "0"])
def test_child_that_dies_after_the_interpreter_without_descriptors(question):
    """The same where no descriptor was left to wait with."""
    run_script(
        f"""
import subprocess, sys
source = {DIES_LATE.format(question=question)!r}.replace(
    "gevent.spawn(", "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); gevent.spawn("
)
done = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE)
assert done.returncode == int(done.stdout), done
"""
    )


@needs_proc
@both_spawns
@pytest.mark.parametrize("kind", ["pid", "any"])
@pytest.mark.parametrize("option", [0x20000000, 0x40000000], ids=["__WNOTHREAD", "__WALL"])
def test_waitpid_linux_options_are_waited_for(spawn, kind, option):
    """One worker asks, and goes on asking: __WNOTHREAD, taken at its word, would leave it no children."""
    with living_child(spawn) as (pid, end):
        waiter = parked(coopos.waitpid, question_about(pid, kind), option)
        before = questions()
        for _ in range(20):
            turn_loop()
        assert questions() == before
        end()
        assert result_of(waiter) == (pid, STATUS)


@needs_reaped_status
@pytest.mark.parametrize("question", ["-1", "pid"])
def test_waitpid_collected_by_the_kernel(question):
    """Where SIGCHLD is ignored the kernel collects; ECHILD is not said before every watched child's status was told."""
    run_script(f"""
        import os, signal, coopos
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        reader, writer = os.pipe()
        pid = coopos.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(7)
        os.close(writer)
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass
        assert coopos.waitpid({question}, 0) == (pid, 7 << 8)
        try:
            coopos.waitpid({question}, 0)
        except ChildProcessError:
            pass
        else:
            raise AssertionError("told twice")
    """)


@needs_libuv
def test_waitpid_asked_while_another_thread_leaves():
    """A question that somebody is about to join is not ended by another thread that was the last to ask it."""
    run_script("""
        import os, threading, gevent, coopos
        from gevent.libuv import loop

        reader, writer = os.pipe()
        pid = coopos.fork_gevent()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(7)
        parked, leave, left = threading.Event(), threading.Event(), threading.Event()

        def run():
            waiter = gevent.spawn(coopos.waitpid, pid, os.WUNTRACED)
            gevent.sleep(0)
            parked.set()
            leave.wait(30)
            waiter.kill()
            left.set()
            gevent.get_hub().destroy(destroy_loop=True)

        thread = threading.Thread(target=run)
        thread.start()
        assert parked.wait(30)
        io = loop.loop.io

        def io_slowly(self, *args, **kwargs):
            # As if the other thread got the GIL before the watcher is there.
            if threading.current_thread() is not thread:
                leave.set()
                assert left.wait(30)
            return io(self, *args, **kwargs)

        loop.loop.io = io_slowly
        waiter = gevent.spawn(coopos.waitpid, pid, os.WUNTRACED)
        gevent.sleep(0)
        os.close(writer)
        assert waiter.get(timeout=30) == (pid, 7 << 8)
        thread.join()
    """)


@pytest.mark.parametrize("question", ["pid", "-1"])
def test_waitpid_beside_a_busy_hub(question):
    """A hub that always has something to do leaves other threads no GIL: those that watch a child must not need it."""
    run_script(
        f"""
        import os, gevent, coopos
        for _ in range(20):
            pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], os.environ)
            waiter = gevent.spawn(coopos.waitpid, {question}, 0)
            while not waiter.ready():
                gevent.sleep(0)
            assert waiter.get() == (pid, 7 << 8)
        """
    )
