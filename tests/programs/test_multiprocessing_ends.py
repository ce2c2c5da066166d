"""How the workers of a pool end in a program that has a SIGTERM handler: a server's, which they inherit, or the program's own."""

from ..helpers.multiprocess import each_method, run, run_with

# A child that is spawned imports the script, and has the handler too.
FLAG = """
from coopos._patch import _processes


def tell(_signum, _frame):
    '''A server's handler: the server looks at the flag; a worker doesn't.'''
    told.append(1)


told = []
signal.signal(signal.SIGTERM, tell)


def begin(begun_of_worker):
    global begun
    begun = begun_of_worker


def stay(code=None):
    begun.release()
    while True:
        signal.pause()
"""


@each_method
def test_busy_worker_that_sigterm_does_not_end_is_killed(method, tmp_path):
    """Without the kill ``terminate()`` would wait for the end of the task."""
    source = """
    _processes.GRACE_S = 0.1


    def main(ctx):
        begun = ctx.Semaphore(0)
        with ctx.Pool(2, begin, (begun,)) as pool:
            workers = list(pool._pool)
            for _ in workers:
                pool.apply_async(stay)
                begun.acquire()
        assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 2
    """
    run_with(method, FLAG + source.replace("\n    ", "\n"), tmp_path)


def test_workers_that_wait_for_a_task_end_by_themselves():
    """No signal has to end them, so none is waited for, and none is killed."""
    run(
        FLAG
        + """
_processes.GRACE_S = 1000
for count in (1, 8, 8, 8, 8):
    with mp.get_context("fork").Pool(count) as pool:
        assert pool.map(abs, range(50)) == list(range(50))
        workers = list(pool._pool)
    assert [worker.exitcode for worker in workers] == [0] * count
"""
    )


def test_no_task_is_begun_by_a_worker_that_ends():
    """Tasks that no worker has taken are dropped, also if there are more of them than a pipe holds."""
    run(
        FLAG
        + """
_processes.GRACE_S = 0.1
ctx = mp.get_context("fork")
begun = ctx.Semaphore(0)
for size in (1, 100_000):
    with ctx.Pool(2, begin, (begun,)) as pool:
        for _ in range(20):
            pool.apply_async(stay, (b"x" * size,))
        begun.acquire()
        begun.acquire()
    assert not begun.acquire(False)
"""
    )


def test_results_that_are_larger_than_a_pipe():
    """The end may come while a worker writes one that nobody reads any more."""
    run(
        """
def large():
    return b"x" * 3_000_000


for round in range(12):
    with mp.get_context("fork").Pool(3) as pool:
        for _ in range(200):
            pool.apply_async(large)
        time.sleep(0.005 * round)
"""
    )


def test_handler_of_the_program_ends_the_worker():
    """A handler that raises has its time, whether it was inherited or set in the worker: the ``finally:`` of a task is run."""
    run(
        FLAG
        + """
_processes.GRACE_S = 1000


def leave(_signum, _frame):
    sys.exit(7)


def set_handler(*args):
    begin(*args)
    signal.signal(signal.SIGTERM, leave)


def stay_and_clean():
    try:
        stay()
    finally:
        cleaned.release()


ctx = mp.get_context("fork")
begun, cleaned = ctx.Semaphore(0), ctx.Semaphore(0)
for initializer in (set_handler, begin):
    with ctx.Pool(1, initializer, (begun,)) as pool:
        [worker] = pool._pool
        pool.apply_async(stay_and_clean)
        begun.acquire()
    assert worker.exitcode == 7 and cleaned.acquire(False)
    signal.signal(signal.SIGTERM, leave)
"""
    )


def test_process_of_the_program_is_not_killed():
    """``Process.terminate()`` only sends the signal, as in the stdlib: what the program's handler does with it is its business."""
    run(
        FLAG
        + """
_processes.GRACE_S = 0


def go_on(begun, go):
    begun.release()
    go.acquire()
    sys.exit(len(told))


ctx = mp.get_context("fork")
begun, go = ctx.Semaphore(0), ctx.Semaphore(0)
process = ctx.Process(target=go_on, args=(begun, go))
process.start()
begun.acquire()
process.terminate()
with After(go.release):
    process.join()
assert process.exitcode == 1
"""
    )


def test_broken_executor_ends_its_busy_workers():
    """A worker has died; the executor terminates the others and waits for them."""
    run(
        FLAG
        + """
_processes.GRACE_S = 0.1
ctx = mp.get_context("fork")
begun = ctx.Semaphore(0)
with ProcessPoolExecutor(2, mp_context=ctx, initializer=begin, initargs=(begun,)) as executor:
    futures = [executor.submit(stay) for _ in range(2)]
    begun.acquire()
    begun.acquire()
    workers = list(executor._processes.values())
    workers[0].kill()
    raises(BrokenProcessPool, futures[1].result)
assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 2
"""
    )


def test_signal_of_a_child_is_not_reported_to_the_parent():
    """A server's wake-up descriptor, such as asyncio's, is inherited: the server would take the child's SIGTERM for its own."""
    run(
        FLAG
        + """
reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer)


def signal_itself():
    os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(len(told))


process = mp.get_context("fork").Process(target=signal_itself)
process.start()
process.join()
assert process.exitcode == 1
assert signal.set_wakeup_fd(-1) == writer
os.close(writer)
data = os.read(reader, 100)
assert signal.SIGTERM not in data, data
"""
    )
