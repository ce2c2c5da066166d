"""multiprocessing and concurrent.futures.ProcessPoolExecutor under patch(): they work, and let other greenlets run meanwhile."""

import textwrap

import gevent
import pytest

from ..helpers.multiprocess import PATCHED, PATCHES, each_method, run, run_with
from ..helpers.support import run_script

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
