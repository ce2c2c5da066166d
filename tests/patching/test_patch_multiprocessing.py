"""patch() and unpatch() of multiprocessing."""

import multiprocessing
import subprocess
import sys

import pytest

from ..helpers.multiprocess import METHODS, PATCHED, PATCHES
from ..helpers.support import run_script


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
    assert _multiprocessing.SemLock.__module__ == "coopos._patch._processes"
    """)


def test_static_methods_stay_static():
    run_script("""
    from gevent import monkey
    monkey.patch_all()
    from multiprocessing import managers
    import coopos
    places = [(managers.BaseManager, "_finalize_manager"), (managers.BaseProxy, "_decref")]
    before = [vars(owner)[name] for owner, name in places]
    coopos.patch()
    assert all(type(vars(owner)[name]) is staticmethod for owner, name in places)
    assert [vars(owner)[name] for owner, name in places] != before
    coopos.unpatch()
    assert all(type(vars(owner)[name]) is staticmethod for owner, name in places)
    assert [getattr(owner, name) for owner, name in places] == [each.__func__ for each in before]
    """)


def test_patch_leaves_multiprocessing_alone_until_gevent_patches():
    run_script("""
    import _multiprocessing, coopos
    plain = _multiprocessing.SemLock
    import warnings
    warnings.simplefilter("ignore")  # it comes before gevent.monkey
    coopos.patch()
    assert _multiprocessing.SemLock is plain
    from gevent import monkey
    monkey.patch_all()
    coopos.patch()
    assert _multiprocessing.SemLock is not plain
    import multiprocessing
    assert multiprocessing.Lock().acquire()
    """)


def test_patch_leaves_multiprocessing_alone_on_a_system_without_semaphores():
    """There the module _multiprocessing can't be imported. All else is patched."""
    run_script("""
    import sys
    sys.modules["_multiprocessing"] = None
    from gevent import monkey
    monkey.patch_all()
    import coopos, os
    for _ in range(2):
        coopos.patch()
        assert os.fork is coopos.fork
        coopos.unpatch()
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
    assert connection.Connection._send_bytes.__module__ == "coopos._patch._connections"
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
