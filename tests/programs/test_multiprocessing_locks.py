"""multiprocessing's locks and conditions under patch(), and what it does in the hub."""

import textwrap

from ..helpers.multiprocess import run, run_throwing

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


# ---- queues ------------------------------------------------------------------------------------------------------------------

QUEUES = """
class Slow:
    def __reduce__(self):
        gevent.sleep(0.001)
        return int, (-1,)


class Never:
    def __reduce__(self):
        raise ValueError("not to be pickled")


reported = []


def idle(queue):
    '''Wait until the feeder has sent all it was given.'''
    while queue._buffer or not queue._notempty.is_waited_for():
        gevent.sleep(0.001)


def begun(*args):
    queue = mp.Queue(*args)
    queue._on_queue_feeder_error = lambda ex, obj: reported.append(str(ex))
    queue.put("this begins the feeder")
    assert queue.get()
    idle(queue)
    return queue
"""


def run_queues(source):
    run(QUEUES + textwrap.dedent(source))


def test_queue_keeps_the_order_of_objects_of_all_kinds():
    """Of those that put() sends itself, and of those that the feeder sends, which may wait while it pickles or writes."""
    run_queues("""
    import random
    KINDS = [
        lambda i: i,
        lambda i: (i, b"x" * 4090),
        lambda i: (i, b"x" * 100_000),
        lambda i: (i, {"a": [None, 1.5]}),
        lambda i: (i, Slow()),
    ]

    def take(queue, count):
        got = [queue.get() for _ in range(count)]
        return [one if type(one) is int else one[0] for one in got]

    for kind in mp.Queue, mp.JoinableQueue:
        queue = kind()
        for seed in range(5):
            dice = random.Random(seed)
            taker = gevent.spawn(take, queue, 400)
            for i in range(400):
                queue.put(dice.choice(KINDS)(i))
                if dice.random() < 0.3:
                    gevent.sleep(0)
                if dice.random() < 0.05:
                    idle(queue)
            assert taker.get() == list(range(400))
    """)


def test_small_object_is_in_the_pipe_when_put_returns():
    """If there is room for it, and no other process sends. Otherwise the feeder gets it. Nothing is lost or sent twice."""
    run_queues("""
    queue = begun()
    for one in 1, (2, {"three": [4, None]}), "\\udcff":
        queue.put(one)
        assert queue._reader.poll() and not queue._buffer
        assert queue.get() == one and not queue._reader.poll()
    with queue._wlock:
        queue.put(5)
        assert queue._buffer and not queue._reader.poll()
    assert queue.get() == 5
    idle(queue)
    sent = 0
    while not queue._buffer:
        queue.put(b"x" * 4000)
        sent += 1
    queue.put("last")
    assert [len(queue.get()) for _ in range(sent)] == [4000] * sent and sent > 2
    assert queue.get() == "last"
    idle(queue)
    assert not queue._reader.poll()
    """)


def test_object_that_cannot_be_pickled_is_reported_and_takes_no_place():
    """put() returns, as in the stdlib, and what follows comes."""
    run_queues("""
    queue = begun(2)
    for _ in range(3):
        queue.put([Never()], timeout=10)
        queue.put(2, timeout=10)
        assert queue.get() == 2
        idle(queue)
    assert reported == ["not to be pickled"] * 3 and queue.qsize() == 0
    """)


def test_put_while_the_pipe_is_closed_is_the_feeders():
    """It reports that, as in the stdlib."""
    run_queues("""
    queue = begun(1)
    queue._writer.close()
    for i in range(2):
        queue.put(i, timeout=10)
        idle(queue)
    assert reported == ["handle is closed"] * 2
    """)


def test_no_message_is_sent_into_the_middle_of_another():
    """Of one that was broken off, and whose rest the next one sends first."""
    run_throwing("""
    from coopos._patch._connections import message_at_once
    reader, writer = mp.Pipe(duplex=False)
    assert message_at_once(writer, b"1") == b"\\0\\0\\0\\x011"
    throw(ValueError, parked(raises, ValueError, writer.send_bytes, b"x" * 300_000))
    receiver = gevent.spawn(reader.recv_bytes)
    while reader.poll():
        gevent.sleep(0.001)
    assert message_at_once(writer, b"2") is None
    writer.send_bytes(b"3")
    assert receiver.get() == b"x" * 300_000 and reader.recv_bytes() == b"3"
    assert message_at_once(writer, b"4")
    """)


def test_put_broken_off_by_a_signal_handler():
    """At whatever moment: no lock is lost, no place is given back twice, and tasks are counted right."""
    run_queues("""
    import random
    dice = random.Random(1)
    thrown = []

    class Broken(Exception):
        pass

    def handle(number, frame):
        if frame is not None and frame.f_code.co_filename.endswith("_processes.py"):
            thrown.append(frame.f_lineno)
            raise Broken

    signal.signal(signal.SIGALRM, handle)
    for kind in mp.Queue, mp.JoinableQueue:
        queue = kind(50)
        queue.put(0)
        assert queue.get() == 0
        got, put = [], []
        for i in range(6000):
            signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.00001, 0.0002))
            try:
                queue.put(i, timeout=10)
                put.append(i)
            except Broken:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if i % 20 == 19:
                idle(queue)
                while queue._reader.poll():
                    got.append(queue.get())
                    if kind is mp.JoinableQueue:
                        queue.task_done()
            if queue._sem._semlock._get_value() < 25:  # an object that took a place, and didn't come
                queue._sem.release()
        assert set(put) <= set(got) and got == sorted(set(got))
    assert len(thrown) > 50, thrown
    """)


def test_put_near_the_recursion_limit():
    """A RecursionError counts no task, so join() ends."""
    run_queues("""
    queue = mp.JoinableQueue()
    queue.put(0)
    put = [0]

    def deep(n):
        try:
            queue.put(n)
            put.append(n)
        except RecursionError:
            pass
        deep(n + 1)

    idle(queue)
    try:
        deep(1)
    except RecursionError:
        pass
    for _ in put:
        queue.get()
        queue.task_done()
    with gevent.Timeout(20):
        queue.join()
    """)


def test_queue_with_a_pickler_of_the_program():
    run_queues("""
    import io, multiprocessing.reduction, pickle, zlib
    from multiprocessing.reduction import ForkingPickler

    class Compressing(ForkingPickler):
        @classmethod
        def dumps(cls, obj, protocol=None):
            return zlib.compress(ForkingPickler.dumps(obj, protocol))

        @staticmethod
        def loads(data):
            return pickle.loads(zlib.decompress(data))

    import multiprocessing.queues
    multiprocessing.queues._ForkingPickler = Compressing
    queue = begun()
    for i in range(5):
        queue.put(i)
        assert queue.get() == i
        idle(queue)
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
