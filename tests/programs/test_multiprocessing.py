"""multiprocessing and concurrent.futures.ProcessPoolExecutor under patch(): they work, and let other greenlets run meanwhile.

A script waits for what comes only when another of its greenlets has run some times: where the hub stood still it would hang.
Children that are spawned import the script, and are patched like it; where it says so they are not.
"""

import importlib
import multiprocessing
import platform
import re
import subprocess
import sys
import textwrap
import types

import gevent
import pytest

from coopos import _multiprocessing as coopos_multiprocessing

from ..helpers.support import run_script

METHODS = ["fork", "forkserver", "spawn"]
each_method = pytest.mark.parametrize("method", METHODS)

PATCHES = """
from gevent import monkey
monkey.patch_all()
import coopos
coopos.patch()
"""
PATCHED = (
    PATCHES
    + """
import fcntl, io, os, signal, sys, threading, time
import gevent, gevent.event
import multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, shared_memory


class After:
    '''Have *function* called when another greenlet has run a few times; at the end it must have been.'''

    has_begun = False

    def __init__(self, function, *args):
        self.greenlet = gevent.spawn(self.run, function, args)

    def run(self, function, args):
        for _ in range(5):
            gevent.sleep(0.001)
        self.has_begun = True
        function(*args)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        assert self.has_begun, "nobody else ran"
        self.greenlet.get()


def parked(function, *args):
    greenlet = gevent.spawn(function, *args)
    for _ in range(3):
        gevent.sleep(0.001)
    assert not greenlet.ready(), (greenlet.value, greenlet.exception)
    return greenlet


def raises(error, function, *args, **kwargs):
    try:
        result = function(*args, **kwargs)
    except error as ex:
        return ex
    raise AssertionError(f"no {error.__name__}, but {result!r}")
"""
)


def run(source, **kwargs):
    return run_script(PATCHED + textwrap.dedent(source), **kwargs)


def run_with(method, source, path, **kwargs):
    """*source* has functions, and a main(ctx); what it spawns imports it from *path*."""
    source = textwrap.dedent(source) + f"\n\nif __name__ == '__main__':\n    main(mp.get_context({method!r}))\n    print('done')\n"
    assert run_script(PATCHED + source, at=path / "program.py", **kwargs) == "done\n"


# ---- the parts, under each start method --------------------------------------------------------------------------------------

PARTS = """
def answer(queue, pipe, simple, joinable):
    queue.put(pipe.recv() + 1)
    pipe.send([simple.get(), b"x" * 300_000])
    for _ in range(2):
        joinable.get()
        joinable.task_done()


def meet(lock, rlock, condition, event, semaphore, barrier, value, array, name):
    with lock, rlock, rlock:
        value.value += 1
    semaphore.release()
    with condition:
        array[0] = 1
        condition.notify_all()
    assert event.wait(60)
    memory = shared_memory.SharedMemory(name)
    memory.buf[0] += 1
    memory.close()
    barrier.wait()


def begin(gate_of_worker):
    global gate
    gate = gate_of_worker


def square(x, waits=False):
    if waits:
        assert gate.acquire()
    return x * x


def main(ctx):
    queue, simple, joinable = ctx.Queue(), ctx.SimpleQueue(), ctx.JoinableQueue()
    here, there = ctx.Pipe()
    process = ctx.Process(target=answer, args=(queue, there, simple, joinable))
    process.start()
    with After(here.send, 1):
        assert queue.get() == 2
    with After(simple.put, "y"):
        assert here.recv() == ["y", b"x" * 300_000]
    with After(lambda: (joinable.put(1), joinable.put(2))):
        process.join()
    joinable.join()
    assert process.exitcode == 0 and not process.is_alive() and process.sentinel

    lock, rlock, event = ctx.Lock(), ctx.RLock(), ctx.Event()
    condition, semaphore, barrier = ctx.Condition(), ctx.Semaphore(0), ctx.Barrier(2)
    value, array = ctx.Value("i", 1), ctx.Array("i", 1)
    memory = shared_memory.SharedMemory(create=True, size=10)
    lock.acquire()
    process = ctx.Process(target=meet, args=(lock, rlock, condition, event, semaphore, barrier, value, array, memory.name))
    with condition:
        process.start()
        with After(lock.release):
            assert semaphore.acquire(timeout=60)
        assert condition.wait_for(lambda: array[0] == 1, 60)
    with After(event.set):
        barrier.wait()
    process.join()
    assert (process.exitcode, value.value, memory.buf[0]) == (0, 2, 1)
    memory.close()
    memory.unlink()

    gate = ctx.Semaphore(0)
    with ctx.Pool(2, begin, (gate,)) as pool:
        with After(gate.release):
            assert pool.apply(square, (3, True)) == 9
        assert pool.map(square, range(500)) == [x * x for x in range(500)]
        assert sorted(pool.imap_unordered(square, range(20), chunksize=3)) == [x * x for x in range(20)]
        pool.close()
        pool.join()

    with ctx.Manager() as manager:
        shared, its_lock, its_queue = manager.dict(), manager.Lock(), manager.Queue()
        shared["a"] = [1]
        assert shared.copy() == {"a": [1]}
        its_lock.acquire()
        with After(its_lock.release):
            assert its_lock.acquire()
        with After(its_queue.put, 1):
            assert its_queue.get() == 1

    with ProcessPoolExecutor(2, mp_context=ctx, initializer=begin, initargs=(gate,)) as executor:
        with After(gate.release):
            assert executor.submit(square, 3, True).result() == 9
        assert list(executor.map(square, range(100))) == [x * x for x in range(100)]
"""


@each_method
def test_every_part_works_while_other_greenlets_run(method, tmp_path):
    run_with(method, PARTS, tmp_path)


LOAD = """
def echo(there, back):
    for message in iter(there.get, None):
        back.put(message)


def double(x):
    return 2 * x


def add(lock, value, count):
    for _ in range(count):
        with lock:
            value.value += 1


def main(ctx):
    ticks = []
    ticker = gevent.spawn(lambda: [(ticks.append(1), gevent.sleep(0.001)) for _ in iter(int, 1)])
    there, back, lock, value = ctx.Queue(), ctx.Queue(), ctx.Lock(), ctx.Value("i", 0, lock=False)
    processes = [ctx.Process(target=echo, args=(there, back)) for _ in range(2)]
    processes += [ctx.Process(target=add, args=(lock, value, 300)) for _ in range(2)]
    with ctx.Pool(2) as pool, ctx.Manager() as manager, ProcessPoolExecutor(2, mp_context=ctx) as executor:
        numbers = manager.list()
        for starting in [gevent.spawn(process.start) for process in processes]:
            starting.get()

        def work(number):
            there.put(b"x" * 10_000 * (number % 3) + b"%d" % number)
            assert pool.apply(double, (number,)) == executor.submit(double, number).result() == 2 * number
            add(lock, value, 5)
            numbers.append(number)
            return int(back.get().lstrip(b"x"))

        working = [gevent.spawn(work, number) for number in range(60)]
        assert sorted(greenlet.get() for greenlet in working) == sorted(numbers) == list(range(60))
        for _ in range(2):
            there.put(None)
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0] * 4 and value.value == 2 * 300 + 60 * 5
    ticker.kill()
    assert len(ticks) >= 10
"""


@each_method
def test_parts_together_under_load(method, tmp_path):
    """Many greenlets use a pool, an executor, queues, a manager and a lock at once, and nothing is lost.

    An older gevent may report, in a child, a lock that was made anew while it was telling who waited for it.
    """
    run_with(method, LOAD, tmp_path, may_complain=gevent.version_info < (26,))


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_children_that_are_not_patched_are_understood(method, tmp_path):
    """A fresh interpreter is what its main module makes of it; the two sides agree on pipes, semaphores and messages."""
    guarded = PATCHED.replace(PATCHES, "if __name__ == '__main__':\n" + textwrap.indent(PATCHES.strip(), "    ") + "\n")
    assert guarded != PATCHED
    main = f"\n\nif __name__ == '__main__':\n    main(mp.get_context({method!r}))\n    print('done')\n"
    check = "\nif __name__ != '__main__':\n    assert 'gevent.monkey' not in sys.modules or not monkey.is_anything_patched()\n"
    check = check.replace("monkey.is_anything_patched()", "sys.modules['gevent.monkey'].saved")
    assert run_script(guarded + check + PARTS + main, at=tmp_path / "program.py") == "done\n"


KILLED = """
def sleep(connection=None):
    if connection is not None:
        connection.send(os.getpid())
    time.sleep(1000)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def main(ctx):
    reader, writer = ctx.Pipe(duplex=False)
    process = ctx.Process(target=sleep, args=(writer,))
    process.start()
    assert reader.recv() == process.pid
    assert connection.wait([process.sentinel], 0) == [] and process.exitcode is None
    with After(process.kill):
        assert connection.wait([process.sentinel, reader]) == [process.sentinel]
    process.join()
    assert process.exitcode == -signal.SIGKILL

    process = ctx.Process(target=sleep)
    process.start()
    with After(process.terminate):
        process.join()
    assert process.exitcode == -signal.SIGTERM

    with ctx.Pool(1) as pool:
        first = pool.apply(os.getpid)
        lost = pool.apply_async(die)
        assert pool.apply(os.getpid) != first      # by the worker that has taken its place
        assert not lost.ready()

    with ProcessPoolExecutor(2, mp_context=ctx) as executor:
        assert isinstance(executor.submit(die).exception(), BrokenProcessPool)
        raises(BrokenProcessPool, executor.submit, die)
"""


@each_method
def test_worker_that_is_killed_is_noticed(method, tmp_path):
    run_with(method, KILLED, tmp_path)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_start_of_a_child_that_takes_much_to_begin_with(method, tmp_path):
    """More than a pipe holds, for a child that doesn't read yet."""
    source = """
    def measure(data, pipe):
        pipe.send(len(data))

    def main(ctx):
        here, there = ctx.Pipe()
        process = ctx.Process(target=measure, args=(b"x" * 3_000_000, there))
        with After(lambda: None):
            process.start()
        assert here.recv() == 3_000_000
        process.join()
        assert process.exitcode == 0
    """
    run_with(method, source, tmp_path)


def test_fork_server_that_is_patched_itself(tmp_path):
    """It is where it has imported a module that patches; it still notices the end of its children."""
    (tmp_path / "preloaded.py").write_text(PATCHES)
    source = """
    def fail():
        assert monkey.is_module_patched("os")
        sys.exit(3)

    def main(ctx):
        ctx.set_forkserver_preload(["preloaded"])
        processes = [ctx.Process(target=fail) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [3, 3, 3]
        with ctx.Pool(2) as pool:
            assert pool.map(abs, range(-50, 0)) == list(range(50, 0, -1))
    """
    run_with("forkserver", source, tmp_path, PYTHONPATH=str(tmp_path))


# ---- forks -------------------------------------------------------------------------------------------------------------------


def test_forked_child_has_none_of_the_parents_greenlets():
    """Whatever a fork does otherwise; also where the greenlet that starts the process isn't the main one."""
    run("""
    ctx = mp.get_context("fork")
    reader, writer = ctx.Pipe(duplex=False)
    queue = ctx.Queue()
    queue.put(0)

    def disturb():
        while True:
            gevent.sleep(0)
            if os.getpid() != parent:
                os._exit(9)

    def child():
        for _ in range(10):
            gevent.sleep(0)
        writer.send(queue.get())
        sys.exit(5)

    parent = os.getpid()
    gevent.spawn(disturb)
    gevent.sleep(0)

    def start_and_join():
        process = ctx.Process(target=child)
        process.start()
        process.join()
        return process.exitcode

    assert gevent.spawn(start_and_join).get() == 5 and reader.recv() == 0
    queue.put(1)
    with coopos.fork_policy(keep_greenlets=True):
        assert start_and_join() == 5 and reader.recv() == 1
    """)


def test_many_greenlets_start_and_join_processes_at_once():
    run("""
    ctx = mp.get_context("fork")

    def start_and_join(status):
        process = ctx.Process(target=sys.exit, args=(status,))
        process.start()
        process.join()
        return process.exitcode

    greenlets = [gevent.spawn(start_and_join, status) for status in range(30)]
    assert [greenlet.get() for greenlet in greenlets] == list(range(30))
    """)


# ---- connections -------------------------------------------------------------------------------------------------------------


def test_descriptors_are_in_blocking_mode_for_everybody():
    """While greenlets wait for them, too, and where gevent has made the socket."""
    run("""
    def is_blocking(fd):
        return not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK

    ctx = mp.get_context("fork")
    listener = connection.Listener(authkey=b"k")
    client = gevent.spawn(connection.Client, listener.address, authkey=b"k")
    accepted = listener.accept()
    queue = ctx.Queue()
    ends = [*ctx.Pipe(), *ctx.Pipe(duplex=False), accepted, client.get(), queue._reader, queue._writer]
    waiting = [parked(end.recv) for end in ends if end.readable and end is not queue._reader]
    waiting += [parked(queue.get), parked(connection.wait, [end for end in ends if end.readable])]
    process = ctx.Process(target=time.sleep, args=(1000,))
    process.start()
    waiting.append(parked(process.join, 100))
    assert all(is_blocking(fd) for fd in [process.sentinel, *[end.fileno() for end in ends]])
    process.kill()
    gevent.killall(waiting[:-1])
    waiting[-1].get()
    assert all(is_blocking(fd) for fd in [process.sentinel, *[end.fileno() for end in ends]])
    listener.close()
    """)


def test_descriptor_that_is_sent_through_a_connection():
    run("""
    from multiprocessing import reduction
    here, there = mp.Pipe()
    reader, writer = os.pipe()
    receiver = parked(reduction.recv_handle, there)
    reduction.send_handle(here, writer, os.getpid())
    os.write(receiver.get(), b"x")
    assert os.read(reader, 2) == b"x"
    assert os.get_blocking(here.fileno()) and os.get_blocking(there.fileno())
    """)


def test_connection_to_a_listener_of_another_process():
    """And what is pickled with a descriptor in it, which the resource sharer hands over: a greenlet, that blocks no signals."""
    run("""
    ctx = mp.get_context("fork")

    def serve(pipe):
        with connection.Listener(authkey=b"k") as listener:
            pipe.send(listener.address)
            with listener.accept() as client:
                end = client.recv()
                end.send(client.recv())
                end.close()

    here, there = ctx.Pipe()
    process = ctx.Process(target=serve, args=(there,))
    process.start()
    one, other = ctx.Pipe()
    with connection.Client(here.recv(), authkey=b"k") as client:
        client.send(other)
        with After(client.send, b"through a pipe that was sent"):
            assert one.recv() == b"through a pipe that was sent"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    process.join()
    assert process.exitcode == 0
    """)


def test_recv_killed_or_timed_out_loses_nothing():
    """Between two messages, and in the middle of one, which the next call goes on with."""
    run("""
    reader, writer = mp.Pipe(duplex=False)
    parked(reader.recv).kill()
    assert gevent.with_timeout(0.01, reader.recv, timeout_value=None) is None
    writer.send("a")
    assert reader.recv() == "a"

    data = bytes(range(256)) * 2000
    message = len(data).to_bytes(4, "big") + data
    for first in (2, 4, 5, 1000, 70_000):
        sender = gevent.spawn(coopos.write_all, writer.fileno(), message[:first])
        receiver = parked(reader.recv_bytes)
        sender.get()
        receiver.kill()
        sender = gevent.spawn(coopos.write_all, writer.fileno(), message[first:])
        assert reader.recv_bytes() == data
        sender.get()
    writer.send_bytes(b"")
    assert reader.recv_bytes() == b""

    os.write(writer.fileno(), message[:7])
    writer.close()
    assert str(raises(OSError, reader.recv)) == "got end of file during message"
    raises(EOFError, reader.recv)
    """)


def test_connection_that_is_closed_wakes_who_reads_from_it():
    run("""
    reader, writer = mp.Pipe()
    receiver, waiter = parked(raises, OSError, reader.recv), parked(connection.wait, [reader])
    reader.close()
    assert receiver.get().errno == 9
    assert waiter.get() == [reader]
    """)


def test_poll_without_waiting_gives_the_others_their_turn():
    run("""
    reader, writer = mp.Pipe()
    gevent.spawn(writer.send, 1)
    while not reader.poll():
        pass
    assert reader.recv() == 1
    with After(writer.send, 2):
        assert reader.poll(1e300)
    assert reader.recv() == 2 and not reader.poll(0.001) and not reader.poll(-1)
    """)


# ---- locks -------------------------------------------------------------------------------------------------------------------


def test_acquire_killed_or_timed_out_has_taken_nothing():
    run("""
    lock, queue = mp.Lock(), mp.get_context("fork").Queue()
    for lock in (mp.Lock(), mp.RLock(), mp.Semaphore(1), mp.BoundedSemaphore(1)):
        assert lock.acquire() and gevent.spawn(lock.acquire, False).get() is False
        first, second, third = parked(lock.acquire), parked(lock.acquire), parked(lock.acquire, True, 1000)
        first.kill()
        third.kill()
        with gevent.Timeout(0.01, False):
            gevent.spawn(lock.acquire, True, 0.001).get()
            lock.acquire() if not isinstance(lock, type(mp.RLock())) else second.join()
            raise AssertionError("it was taken")
        assert gevent.spawn(lock.acquire, timeout=0.01).get() is False
        lock.release()
        assert second.get() is True
        assert not gevent.spawn(lock.acquire, False).get()

    parked(queue.get).kill()
    assert gevent.with_timeout(0.01, queue.get, timeout_value=None) is None
    queue.put(1)
    assert queue.get() == 1
    """)


def test_lock_and_semaphore_between_greenlets():
    """Each greenlet is what a thread is to the stdlib's: an RLock is its greenlet's alone."""
    run("""
    lock = mp.RLock()
    assert lock.acquire() and lock.acquire() and "MainProcess" in repr(lock) and ", 2)" in repr(lock)
    assert str(gevent.spawn(raises, AssertionError, lock.release).get()) == "attempt to release recursive lock not owned by thread"
    assert gevent.spawn(lock._semlock._is_mine).get() is False and lock._semlock._is_mine()
    other = parked(lambda: lock.acquire() and lock.release())
    lock.release()
    gevent.sleep(0.001)
    assert not other.ready()
    lock.release()
    other.get()
    raises(AssertionError, lock.release)

    lock = mp.Lock()
    assert str(raises(ValueError, lock.release)) == "semaphore or lock released too many times"
    lock.acquire()
    gevent.spawn(lock.release).get()       # of a plain lock anybody is the owner
    assert lock.acquire(False) and not lock.acquire(False) and not lock.acquire(timeout=-5) and not lock.acquire(timeout=0)
    for wrong in ("1", object()):
        raises(TypeError, lock.acquire, True, wrong)
    bounded = mp.BoundedSemaphore(2)
    raises(ValueError, bounded.release)
    assert bounded.get_value() == 2 and bounded.acquire() and bounded.get_value() == 1

    condition = mp.Condition()
    raises(AssertionError, condition.notify)

    def wait():
        with condition:
            condition.wait()
            return True

    waiting = [parked(wait) for _ in range(5)]
    with condition:
        condition.notify(2)
    gevent.wait(waiting, count=2)
    with condition:
        condition.notify_all()
    assert all(greenlet.get() for greenlet in waiting)
    """)


def test_acquire_in_turn_by_many_greenlets_costs_one_thread():
    run("""
    def threads():
        return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0

    lock = mp.Lock()
    lock.acquire()
    before, begun, order = threads(), [], []

    def take(number):
        begun.append(number)
        with lock:
            order.append(number)

    greenlets = [gevent.spawn(take, number) for number in range(1000)]
    while len(begun) < 1000:
        gevent.sleep(0)
    parked(lock.acquire, True, 1e300).kill()
    assert threads() <= before + 1
    lock.release()
    gevent.joinall(greenlets, raise_error=True)
    assert order == list(range(1000))
    """)


def test_acquire_from_several_threads_and_in_the_hub():
    run("""
    from gevent.hub import get_hub
    lock, counts = mp.Lock(), []

    def count():
        for _ in range(20):
            with lock:
                n = len(counts)
                gevent.sleep(0)
                counts.append(n)

    pool = get_hub().threadpool
    waiting = [pool.spawn(count) for _ in range(3)]
    count()
    gevent.wait(waiting)
    assert counts == list(range(80))
    done = gevent.event.Event()
    get_hub().loop.run_callback(lambda: (lock.acquire(), lock.release(), done.set()))
    assert done.wait(60)
    """)


def test_acquire_in_a_thread_without_a_hub_makes_none():
    """It would leak with its descriptors when the thread ends."""
    run("""
    from gevent._hub_local import get_hub_if_exists
    start = monkey.get_original("_thread", "start_new_thread")
    lock, condition, taken = mp.Lock(), mp.Condition(), []
    lock.acquire()

    def thread():
        try:
            taken.append(lock.acquire(timeout=0.001))
            taken.append(lock.acquire())
            with condition:
                taken.append(condition.wait(0.001))
            taken.append(get_hub_if_exists())
        finally:
            done.send()

    done = gevent.get_hub().loop.async_()
    waiting = parked(gevent.get_hub().wait, done)
    start(thread, ())
    while not taken:
        gevent.sleep(0.001)
    lock.release()
    waiting.get()
    assert taken == [False, True, False, None], taken
    """)


def test_acquire_without_a_descriptor_to_wait_by_waits_on():
    """The feeder of a queue would lose what it is to write."""
    run("""
    import resource
    queue = mp.get_context("fork").Queue()
    queue.put("first")
    assert queue.get() == "first"
    queue._wlock.acquire()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    queue.put("second")
    locked, thrown = parked(queue._wlock.acquire), parked(raises, OSError, queue._wlock.acquire)
    thrown.kill(OSError("thrown in"), block=False)
    assert str(thrown.get()) == "thrown in"
    locked.kill()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    queue._wlock.release()
    assert queue.get(timeout=60) == "second"
    """)


def test_acquire_in_a_forked_child_while_a_greenlet_of_the_parent_has_the_turn():
    """That greenlet isn't there, and its turn is over."""
    run("""
    gate = mp.get_context("fork").Semaphore(0)
    waiting = parked(gate.acquire)
    pid = coopos.fork(keep_greenlets=False)
    if pid == 0:
        os._exit(not gate.acquire(timeout=60))
    gate.release()
    gate.release()
    assert coopos.waitpid(pid, 0) == (pid, 0) and waiting.get()
    """)


def test_acquire_that_another_process_lets_happen_and_a_fork_in_between():
    """A child that keeps the greenlets waits for itself."""
    run("""
    gate, done = mp.get_context("fork").Semaphore(0), mp.get_context("fork").Semaphore(0)
    waiting = parked(lambda: gate.acquire() and done.release())
    pid = coopos.fork(keep_greenlets=True)
    if pid == 0:
        waiting.join()
        os._exit(waiting.exception is not None)
    gate.release()
    gate.release()
    assert coopos.waitpid(pid, 0) == (pid, 0)
    waiting.get()
    assert done.get_value() == 2
    """)


# ---- what is thrown in -------------------------------------------------------------------------------------------------------

#: Classes that some code on the way might take for its own: a descriptor's, a child's, the end of a file.
THROWN = "(TimeoutError, EOFError, OSError, ChildProcessError, ConnectionResetError, ValueError, gevent.GreenletExit)"

THROW = f"""
THROWN = {THROWN}


def throw(error, greenlet):
    '''Throw *error* into a greenlet that waits in raises(error, ...), where it comes out.'''
    greenlet.kill(error, block=False)
    assert type(greenlet.get()) is error


def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    coopos.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
"""


def run_throwing(source, **kwargs):
    return run_script(PATCHED + THROW + textwrap.dedent(source), **kwargs)


def test_recv_loses_nothing_whatever_is_thrown_in():
    """Neither between two messages nor in the middle of one, of its length or of its bytes."""
    run_throwing("""
    reader, writer = mp.Pipe(duplex=False)
    data = bytes(range(256)) * 2000
    message = len(data).to_bytes(4, "big") + data
    for error in THROWN:
        throw(error, parked(raises, error, reader.recv))
        for first in (2, 4, 1000, 70_000):
            sender = gevent.spawn(coopos.write_all, writer.fileno(), message[:first])
            receiver = parked(raises, error, reader.recv_bytes)
            sender.get()
            throw(error, receiver)
            sender = gevent.spawn(coopos.write_all, writer.fileno(), message[first:])
            assert reader.recv_bytes() == data
            sender.get()
    """)


def test_recv_of_a_long_message_that_is_broken_off(tmp_path):
    """Its length comes in 12 bytes; here it is a small one, which no stdlib would send that way."""
    run_throwing("""
    reader, writer = mp.Pipe(duplex=False)
    message = (-1).to_bytes(4, "big", signed=True) + (5).to_bytes(8, "big") + b"hello"
    for first in range(1, len(message)):
        os.write(writer.fileno(), message[:first])
        throw(OSError, parked(raises, OSError, reader.recv_bytes))
        os.write(writer.fileno(), message[first:])
        assert reader.recv_bytes() == b"hello"
    os.write(writer.fileno(), message)
    assert str(raises(OSError, reader.recv_bytes, 4)) == "bad message length"
    """)


def test_send_that_is_broken_off_is_ended_by_the_next():
    """A part of the message is in the pipe: what follows would be taken for the rest of it."""
    run_throwing("""
    for error in THROWN:
        reader, writer = mp.Pipe(duplex=False)
        data = bytearray(bytes(range(256)) * 1000)
        expected = bytes(data)
        throw(error, parked(raises, error, writer.send_bytes, data))
        data[:] = b"y" * len(data)
        throw(error, parked(raises, error, writer.send, "not sent"))     # still at the rest of the first
        sender = gevent.spawn(lambda: [writer.send("next"), writer.send_bytes(b"")])
        assert reader.recv_bytes() == expected
        assert reader.recv() == "next" and reader.recv_bytes() == b""
        sender.get()

        full = os.write(writer.fileno(), bytes(65_536))
        throw(error, parked(raises, error, writer.send, "not sent"))
        throw(error, parked(raises, error, writer.send_bytes, expected))
        assert os.read(reader.fileno(), full) == bytes(full)
        writer.send("next")
        assert reader.recv() == "next"
        reader.close()
        raises(BrokenPipeError, writer.send, "to nobody")
    """)


def test_connection_loses_nothing_to_an_exception_that_refuses_attributes():
    run("""
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Frozen(Exception):
        why: str

    class Refusing(Exception):
        def __setattr__(self, name, value):
            raise LookupError(name)

    for error in (Frozen("thrown in"), Refusing("thrown in")):
        reader, writer = mp.Pipe(duplex=False)
        os.write(writer.fileno(), (5).to_bytes(4, "big") + b"he")
        receiver = parked(raises, type(error), reader.recv_bytes)
        receiver.kill(error, block=False)
        assert receiver.get() is error
        os.write(writer.fileno(), b"llo")
        assert reader.recv_bytes() == b"hello"

        data = bytes(range(250)) * 800
        sender = parked(raises, type(error), writer.send_bytes, data)
        sender.kill(error, block=False)
        assert sender.get() is error
        sender = gevent.spawn(writer.send_bytes, b"next")
        assert reader.recv_bytes() == data and reader.recv_bytes() == b"next"
        sender.get()
    """)


def test_join_close_and_wait_let_out_whatever_is_thrown_in(tmp_path):
    """And the process is waited for afterwards, by several greenlets at once."""
    source = """
    def main(ctx):
        process = ctx.Process(target=sleep)
        process.start()
        for error in THROWN:
            for timeout in (None, 1000):
                throw(error, parked(raises, error, process.join, timeout))
            throw(error, parked(raises, error, connection.wait, [process.sentinel]))
        assert process.is_alive() and process.exitcode is None
        raises(ValueError, process.close)
        joining = [parked(process.join) for _ in range(3)] + [parked(process.join, 1000)]
        process.kill()
        gevent.joinall(joining, raise_error=True)
        assert process.exitcode == -9 and not process.is_alive()
        process.close()

    def sleep():
        time.sleep(1000)
    """
    for method in METHODS:
        run_with(method, THROW + textwrap.dedent(source), tmp_path)


def test_pool_and_manager_let_out_whatever_is_thrown_in():
    """While they end, too; the manager's process ends all the same."""
    run_throwing("""
    ctx = mp.get_context("fork")
    for error in THROWN:
        pool = ctx.Pool(1)
        pid = pool.apply(os.getpid)
        throw(error, parked(raises, error, pool.apply, time.sleep, (1000,)))
        raises(ValueError, pool.join)
        stop(pid)
        throw(error, parked(raises, error, pool.terminate))
        os.kill(pid, signal.SIGKILL)

        manager = ctx.Manager()
        process = manager._process
        stop(process.pid)
        throw(error, parked(raises, error, manager.list))
        throw(error, parked(raises, error, manager.shutdown))
        os.kill(process.pid, signal.SIGCONT)
        process.join()
        assert process.exitcode == 0
    """)


def test_manager_call_that_is_broken_off_does_not_answer_the_next():
    """Neither while its answer is waited for nor while it is sent."""
    run_throwing("""
    with mp.get_context("fork").Manager() as manager:
        numbers, pid = manager.dict(a=1), manager._process.pid
        for error in THROWN:
            queue = manager.Queue()
            throw(error, parked(raises, error, queue.get))
            gevent.spawn(queue.put, "late").join()
            assert [numbers["a"], numbers["a"]] == [1, 1]

            def call():
                assert numbers["a"] == 1
                stop(pid)
                stopped.append(pid)
                raised = raises(error, numbers.update, {"b": b"x" * 3_000_000})
                os.kill(pid, signal.SIGCONT)
                assert numbers.copy() == {"a": 1}
                return raised

            stopped, calling = [], gevent.spawn(call)
            while not stopped:
                gevent.sleep(0.001)
            throw(error, calling)
    """)


def test_kill_while_a_proxy_is_dropped_comes_out():
    """A weakref's callback would swallow it. The manager is told all the same, at the latest when the program ends."""
    run_throwing("""
    with mp.get_context("fork").Manager() as manager:
        pid, before = manager._process.pid, manager._number_of_objects()
        for error in THROWN:
            def drop():
                proxy = manager.dict(a=1)
                assert proxy["a"] == 1
                tls = proxy._tls
                stop(pid)
                del proxy
                assert not hasattr(tls, "connection")
                dropped.append(pid)
                return raises(error, gevent.sleep, 1000)

            dropped, dropping = [], gevent.spawn(drop)
            with gevent.Timeout(60):
                while not dropped:
                    gevent.sleep(0.001)
            throw(error, dropping)
            os.kill(pid, signal.SIGCONT)
        while manager._number_of_objects() > before:
            gevent.sleep(0.001)

        def drop_and_end():
            manager.dict()

        process = mp.get_context("fork").Process(target=drop_and_end)
        process.start()
        process.join()
        assert process.exitcode == 0 and manager._number_of_objects() == before
    """)


def test_manager_call_that_fails_keeps_its_connection():
    """A lock of the manager's belongs to the connection that has acquired it."""
    run("""
    import queue
    with mp.get_context("fork").Manager() as manager:
        lock, items = manager.RLock(), manager.Queue()
        lock.acquire()
        raises(queue.Empty, items.get_nowait)
        raises(Exception, items.put, lambda: None)      # can't be pickled
        lock.release()
        raises(Exception, lock.release)
    """)


def test_proxy_of_xmlrpc_works():
    run("""
    from multiprocessing import managers
    manager = managers.SyncManager(serializer="xmlrpclib", ctx=mp.get_context("fork"))
    manager.start()
    numbers = manager.dict()
    numbers["a"] = 1
    assert [numbers["a"], len(numbers)] == [1, 1]
    manager.shutdown()
    """)


# ---- conditions --------------------------------------------------------------------------------------------------------------


def test_condition_has_its_lock_again_before_anything_thrown_in_comes_out():
    """However often, and whoever has the lock meanwhile: in the with block nobody else is."""
    run_throwing("""
    for error in THROWN:
        for lock in (mp.Lock(), mp.RLock()):
            condition, steps = mp.Condition(lock), []

            def wait():
                with condition:
                    if isinstance(lock, type(mp.RLock())):
                        lock.acquire()
                    try:
                        raised = raises(error, condition.wait)
                    finally:
                        steps.append("has it")
                        gevent.sleep(0.001)
                        steps.append("had it")
                        if isinstance(lock, type(mp.RLock())):
                            lock.release()
                return raised

            waiters = [parked(wait) for _ in range(2)]
            with condition:
                for waiter in waiters:
                    waiter.kill(error, block=False)
                    waiter.kill(ValueError, block=False)
                for _ in range(5):
                    gevent.sleep(0.001)
                assert not steps and not any(waiter.ready() for waiter in waiters)
                assert not gevent.spawn(lock.acquire, False).get()
            for waiter in waiters:
                assert type(waiter.get()) is error
            assert steps == ["has it", "had it"] * 2
            assert lock.acquire(False)
            lock.release()
            raises((ValueError, AssertionError), lock.release)
    """)


def test_condition_whose_waiter_is_timed_out_and_killed_is_left_by_the_kill():
    run_throwing("""
    condition, timeout = mp.Condition(), gevent.Timeout(1000, False)

    def wait():
        with condition:
            with timeout:
                condition.wait()
            raise AssertionError("it went on")

    waiter = parked(raises, gevent.GreenletExit, wait)
    with condition:
        waiter.kill(timeout, block=False)
        gevent.sleep(0.001)
        waiter.kill(block=False)
        gevent.sleep(0.001)
        assert not waiter.ready()
    waiter.get()
    assert condition.acquire(False)
    """)


def test_event_and_barrier_left_by_a_timeout_while_another_process_has_the_lock():
    run_throwing("""
    ctx = mp.get_context("fork")
    event, barrier = ctx.Event(), ctx.Barrier(2)

    def hold(lock, pipe):
        with lock:
            pipe.send("has it")
            pipe.recv()
            pipe.send("had it")
        pipe.recv()

    for waits, condition in ((event.wait, event._cond), (barrier.wait, barrier._cond)):
        for error in THROWN:
            here, there = ctx.Pipe()
            waiter = parked(raises, error, waits)
            process = ctx.Process(target=hold, args=(condition, there))
            process.start()
            assert here.recv() == "has it"
            for _ in range(2):        # while it waits for its turn, and while it waits for the lock
                waiter.kill(error, block=False)
                gevent.sleep(0.01)
            assert not waiter.ready()
            here.send(None)
            assert type(waiter.get()) is error and here.recv() == "had it"
            here.send(None)
            process.join()
            assert condition.acquire(False)
            condition.release()
    event.set()
    assert event.wait() and barrier.n_waiting == 0
    """)


def test_notify_that_is_broken_off_has_notified_nobody_who_had_not_woken():
    """And the counts of those who sleep stay right: the next notify wakes them."""
    run_throwing("""
    ctx = mp.get_context("fork")
    condition = ctx.Condition()

    def sleep(pipe):
        with condition:
            pipe.send(None)
            condition.wait()

    def notify():
        with condition:
            condition.notify_all()

    for error in THROWN:
        here, there = ctx.Pipe()
        process = ctx.Process(target=sleep, args=(there,))
        process.start()
        here.recv()
        with condition:       # it waits now
            stop(process.pid)
        throw(error, parked(raises, error, notify))
        with condition:
            assert not condition.wait(0.001)      # it was not meant for this one
        notifying = parked(notify)
        os.kill(process.pid, signal.SIGCONT)
        notifying.get()
        process.join()
        assert process.exitcode == 0
        with condition:
            condition.notify()
    """)


def test_put_that_is_broken_off_takes_no_place():
    """A bounded queue can be filled as before."""
    run_throwing("""
    queue = mp.get_context("fork").JoinableQueue(1)
    for error in THROWN:
        with queue._cond:       # as in task_done() of another process
            putter = gevent.spawn(raises, error, queue.put, "not put")
            while queue.qsize() == 0:
                gevent.sleep(0)
            gevent.sleep(0)
            throw(error, putter)
        queue.put(1, timeout=10)
        assert queue.get() == 1
        queue.task_done()
    queue.join()
    """)


# ---- in the hub --------------------------------------------------------------------------------------------------------------


def test_waits_in_the_hub_are_made_plainly():
    """As in a signal's handler: of connections, of semaphores, of ends, and calls of a manager."""
    run("""
    from gevent.hub import get_hub
    ctx = mp.get_context("fork")

    def in_hub():
        here.send_bytes(b"x" * 300_000)
        answers.append(here.recv_bytes() == b"x" * 300_000)
        answers.append(lock.acquire())
        answers.append(not lock.acquire(timeout=0.01) and not lock.acquire(False))
        answers.append(not here.poll(0.001))
        lock.release()
        with condition:
            answers.append(not condition.wait(0.001))
            condition.notify()
        numbers["a"] = 1
        answers.append(numbers.copy() == {"a": 1})
        here.send_bytes(b"")
        answers.append(connection.wait([process.sentinel]) == [process.sentinel])

    with ctx.Manager() as manager:
        numbers, semaphore, answers = manager.dict(), ctx.Semaphore(0), []
        lock, condition = ctx.Lock(), ctx.Condition()
        lock.acquire()
        here, there = ctx.Pipe()

        def echo(there, lock, semaphore):
            there.send_bytes(there.recv_bytes())
            assert not semaphore.acquire(timeout=0.01)
            lock.release()
            there.recv_bytes()

        process = ctx.Process(target=echo, args=(there, lock, semaphore))
        process.start()
        done = gevent.event.Event()
        get_hub().loop.run_callback(lambda: (in_hub(), done.set()))
        assert done.wait(60)
        assert answers == [True] * 7, answers
        process.join()
    """)


def test_signal_handler_in_a_child_calls_a_manager():
    """It runs in the hub, while the child sleeps."""
    run("""
    from gevent.hub import get_hub
    ctx = mp.get_context("fork")
    with ctx.Manager() as manager:
        handled = manager.Event()

        def handle(*_):
            assert gevent.getcurrent() is get_hub()
            handled.set()
            sys.exit(7)

        def sleep():
            signal.signal(signal.SIGTERM, handle)
            get_hub().loop.run_callback(os.kill, os.getpid(), signal.SIGTERM)
            while True:
                time.sleep(1)

        process = ctx.Process(target=sleep)
        process.start()
        process.join()
        assert process.exitcode == 7 and handled.is_set()
    """)


def test_signal_handler_in_a_child_has_a_connection_of_its_own_to_a_manager():
    """The hub, in which it runs, is the parent's, and has one there."""
    run("""
    from gevent.hub import get_hub
    ctx = mp.get_context("fork")

    def call_in_hub():
        called = gevent.event.AsyncResult()
        get_hub().loop.run_callback(lambda: called.set((numbers["a"], numbers._tls.connection._connection)))
        return called.get()

    with ctx.Manager() as manager:
        numbers = manager.dict(a=1)
        _, of_parent = call_in_hub()

        def child():
            assert not hasattr(numbers._tls, "connection")
            number, of_child = call_in_hub()
            sys.exit(7 if number == 1 and of_child is not of_parent else 1)

        process = ctx.Process(target=child)
        process.start()
        process.join()
        assert process.exitcode == 7
        assert call_in_hub() == (1, of_parent)
    """)


# ---- sockets -----------------------------------------------------------------------------------------------------------------


def test_socket_that_is_sent_where_multiprocessing_came_before_the_patches():
    run_script("import multiprocessing.connection, multiprocessing.reduction\n" + PATCHED + textwrap.dedent("""
    import socket
    here, there = mp.Pipe()
    for make in (socket.socketpair, monkey.get_original("socket", "socketpair")):
        one, other = make()
        receiver = parked(there.recv)
        here.send(other)
        received = receiver.get()
        assert type(received) is socket.socket
        one.send(b"x")
        assert received.recv(1) == b"x"
        for end in (one, other, received):
            end.close()
    """))


@each_method
def test_socket_between_a_process_and_its_child(method, tmp_path):
    """As an argument, and back through a pipe; a child that is spawned has imported multiprocessing first."""
    source = """
    import socket

    def work(end, pipe):
        assert type(end) is socket.socket
        one, other = socket.socketpair()
        pipe.send(other)
        end.sendall(one.recv(10))
        pipe.recv()
        for socket_of_ours in (end, one, other):
            socket_of_ours.close()

    def main(ctx):
        here, there = ctx.Pipe()
        one, other = socket.socketpair()
        process = ctx.Process(target=work, args=(other, there))
        process.start()
        with here.recv() as received:
            received.sendall(b"hello")
        assert one.recv(10) == b"hello"
        here.send(None)
        process.join()
        assert process.exitcode == 0
        one.close()
        other.close()
    """
    run_with(method, source, tmp_path)


# ---- names of the stdlib's ---------------------------------------------------------------------------------------------------


def standin_for(name, changed, value):
    """A module like multiprocessing's *name*, whose *changed* is *value*, or isn't there if that is None."""
    module = importlib.import_module(name)
    copy = root = types.ModuleType(name)
    vars(copy).update(vars(module))
    *classes, last = changed.split(".")
    for step in classes:
        inner = types.SimpleNamespace(**{key: getattr(getattr(copy, step), key) for key in dir(getattr(copy, step))})
        setattr(copy, step, inner)
        copy = inner
    if value is None:
        vars(copy).pop(last)
    else:
        setattr(copy, last, value)
    return root


def changes():
    """(module, name) of all that coopos relies on there."""
    return [
        (module, wanted.partition(":")[0].partition("(")[0])
        for module, wants in coopos_multiprocessing._WANTED.items()
        for wanted in wants.names
    ]


@pytest.mark.parametrize(("module", "name"), changes())
def test_patch_of_a_module_without_a_name_says_which(module, name):
    adopted = []
    finder = coopos_multiprocessing.Finder(adopted.append)
    with pytest.raises(NotImplementedError, match=re.escape(name)) as raised:
        finder.adopt(standin_for(module, name, None))
    assert f"{module} of Python {platform.python_version()}" in str(raised.value)
    assert not adopted


def with_another_parameter(self, a_new_one, *args):
    pass


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (module, wanted)
        for module, wants in coopos_multiprocessing._WANTED.items()
        for wanted in wants.names
        if "(" in wanted or ":" in wanted
    ],
)
def test_patch_of_a_module_with_another_signature_or_body_says_so(module, wanted):
    """The names are the same: what a function is given or what it is made of is not."""
    adopted = []
    finder = coopos_multiprocessing.Finder(adopted.append)
    name = wanted.partition(":")[0].partition("(")[0]
    with pytest.raises(NotImplementedError, match=re.escape(wanted)):
        finder.adopt(standin_for(module, name, with_another_parameter))
    with pytest.raises(NotImplementedError, match=re.escape(wanted)):
        finder.adopt(standin_for(module, name, "no function"))
    assert not adopted


def test_patch_with_an_unknown_module_patches_the_rest():
    """It raises when it is told to patch; so does the import of a module that comes later, and of no other."""
    run_script("""
    from gevent import monkey
    monkey.patch_all()
    import os, platform
    from multiprocessing import connection, heap
    import coopos
    del connection.Connection._recv_bytes, heap.BufferWrapper._heap._lock
    send_bytes = connection.Connection._send_bytes
    for _ in range(2):
        try:
            coopos.patch(keep_greenlets=False)
        except NotImplementedError as ex:
            message = str(ex)
        else:
            raise AssertionError("no error")
        assert "multiprocessing.connection" in message and "Connection._recv_bytes(self, maxsize)" in message
        assert "BufferWrapper._heap._lock" in message and platform.python_version() in message
    assert connection.Connection._send_bytes is send_bytes
    assert os.fork is coopos.fork
    import gevent
    parked = gevent.spawn(gevent.sleep, 100)
    gevent.sleep(0)
    pid = os.fork()
    if pid == 0:
        os._exit(not parked.dead)
    assert os.waitpid(pid, 0)[1] == 0
    import multiprocessing
    assert multiprocessing.Lock().acquire()
    from multiprocessing import synchronize
    assert synchronize.Condition.wait.__module__ == "coopos._multiprocessing"
    """)


def test_import_of_an_unknown_module_after_the_patch_raises():
    run_script("""
    from gevent import monkey
    monkey.patch_all()
    import coopos
    coopos.patch()
    from coopos import _multiprocessing
    wanted = _multiprocessing._WANTED
    wanted["multiprocessing.synchronize"] = wanted["multiprocessing.synchronize"]._replace(names=("Condition.new_name",))
    import multiprocessing, multiprocessing.connection
    try:
        multiprocessing.Lock()
    except NotImplementedError as ex:
        assert "multiprocessing.synchronize" in str(ex) and "Condition.new_name" in str(ex)
    else:
        raise AssertionError("no error")
    assert multiprocessing.Pipe()
    """)


# ---- patching ----------------------------------------------------------------------------------------------------------------


def test_unpatch_gives_multiprocessing_back():
    run_script("""
    from gevent import monkey
    monkey.patch_all()
    import _multiprocessing
    from multiprocessing import connection, forkserver, popen_fork, popen_forkserver, popen_spawn_posix
    import coopos
    owners = [_multiprocessing, connection, connection.Connection, connection.SocketListener]
    owners += [forkserver, popen_fork, popen_forkserver, popen_spawn_posix]
    before = [dict(vars(owner)) for owner in owners]
    coopos.patch()
    assert sum(dict(vars(owner)) != old for owner, old in zip(owners, before)) == len(owners)
    coopos.unpatch()
    assert [dict(vars(owner)) for owner in owners] == before
    coopos.patch()
    assert _multiprocessing.SemLock.__module__ == "coopos._multiprocessing"
    """)


def test_patch_leaves_multiprocessing_alone_until_gevent_patches():
    run_script("""
    import _multiprocessing, coopos
    plain = _multiprocessing.SemLock
    coopos.patch()
    assert _multiprocessing.SemLock is plain
    from gevent import monkey
    monkey.patch_all()
    coopos.patch()
    assert _multiprocessing.SemLock is not plain
    import multiprocessing
    assert multiprocessing.Lock().acquire()
    """)


def test_patch_imports_no_more_of_multiprocessing_than_the_program():
    """And what the program imports later is patched then, or not, once unpatch() was called."""
    run_script("""
    import sys
    from gevent import monkey
    monkey.patch_all()
    before = set(sys.modules)
    import coopos
    coopos.patch()
    assert not [name for name in set(sys.modules) - before if name.startswith("multiprocessing")]
    from multiprocessing import connection
    assert connection.Connection._send_bytes.__module__ == "coopos._multiprocessing"
    coopos.unpatch()
    assert connection.Connection._send_bytes.__module__ == "multiprocessing.connection"
    from multiprocessing import popen_fork
    assert popen_fork.os is sys.modules["os"]
    coopos.patch()
    assert popen_fork.os is not sys.modules["os"] and popen_fork.os.getpid is sys.modules["os"].getpid
    """)


def test_ends_are_silent(tmp_path):
    """Workers of a spawned Pool end, and a program ends with a Pool that is alive: nobody complains."""
    script = tmp_path / "program.py"
    script.write_text(PATCHES + """
import multiprocessing as mp, warnings
warnings.simplefilter("ignore", ResourceWarning)

if __name__ == "__main__":
    with mp.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        assert pool.map(abs, range(4), chunksize=1) == [0, 1, 2, 3]
        pool.close()
        pool.join()
    living = mp.get_context("fork").Pool(2)
    assert living.map(abs, [-1]) == [1]
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_child_whose_start_fails_does_not_go_on_with_the_program():
    """Of a failure that comes out of the fork in the child; it ends."""
    out = run_script(PATCHED + """
def fail():
    raise ValueError("in the child")

coopos.register_at_fork(after_in_child=fail)
process = mp.get_context("fork").Process(target=print, args=("never",))
process.start()
process.join()
assert process.exitcode == 1
print("end", flush=True)
    """, may_complain=True)
    assert out == "end\n"


@pytest.mark.smoke
def test_multiprocessing_that_was_imported_before_the_patches(tmp_path):
    """Its locks and locals are greenlets' all the same, and a manager serves who waits for one."""
    first = "import multiprocessing, multiprocessing.managers, multiprocessing.pool, concurrent.futures.process\n"
    first += "import multiprocessing.heap, multiprocessing.resource_sharer, multiprocessing.forkserver\n"
    last = """
from multiprocessing import context, forkserver, heap, managers, resource_sharer, resource_tracker, util
owners = [forkserver._forkserver, heap.BufferWrapper._heap, managers.BaseProxy._mutex, resource_sharer._resource_sharer]
for owner in (*owners, resource_tracker._resource_tracker):
    assert type(owner._lock).__module__ != "_thread", owner
assert managers.BaseProxy._mutex.acquire.__self__ is managers.BaseProxy._mutex._lock
assert isinstance(context._tls, threading.local) and isinstance(util.ForkAwareLocal()._local, threading.local)

ctx = mp.get_context("fork")
with ctx.Manager() as manager:
    lock, numbers = manager.Lock(), manager.list()

    def add(number):
        with lock:
            numbers.append(number)

    lock.acquire()
    waiting = [parked(add, number) for number in range(5)]
    lock.release()
    gevent.joinall(waiting, raise_error=True)
    assert sorted(numbers) == [0, 1, 2, 3, 4]
with ctx.Pool(2) as pool:
    assert pool.map(abs, [-1, -2]) == [1, 2]
print("done")
"""
    assert run_script(first + PATCHED + last) == "done\n"


def test_start_methods_are_those_of_this_system():
    assert set(multiprocessing.get_all_start_methods()) == set(METHODS)
