"""multiprocessing and concurrent.futures.ProcessPoolExecutor under patch(): they work, and let other greenlets run meanwhile.

A script waits for what comes only when another of its greenlets has run some times: where the hub stood still it would hang.
Children that are spawned import the script, and are patched like it; where it says so they are not.
"""

import multiprocessing
import subprocess
import sys
import textwrap

import gevent
import pytest

from .support import run_script

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
    before, order = threads(), []

    def take(number):
        with lock:
            order.append(number)

    greenlets = [gevent.spawn(take, number) for number in range(1000)]
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
    assert connection.Connection._send.__module__ == "coopos._multiprocessing"
    coopos.unpatch()
    assert connection.Connection._send.__module__ == "multiprocessing.connection"
    from multiprocessing import popen_fork
    assert popen_fork.os is sys.modules["os"]
    coopos.patch()
    assert popen_fork.os is not sys.modules["os"] and popen_fork.os.getpid is sys.modules["os"].getpid
    """)


def test_manager_call_that_was_timed_out():
    """Its answer is not taken for the next one's."""
    run_script(PATCHED + """
with mp.get_context("fork").Manager() as manager:
    queue, numbers = manager.Queue(), manager.dict(a=1)
    with gevent.Timeout(0.05, False):
        queue.get()
    gevent.spawn(queue.put, "late").join()
    assert [numbers["a"], numbers["a"]] == [1, 1]
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
assert isinstance(context._tls, threading.local) and issubclass(util.ForkAwareLocal, threading.local)

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
