"""Forks that others make, and forks in which something fails.

Whoever forks, the child has a loop of its own before any other hook runs there, and the policy on greenlets holds. Whatever fails,
the interpreter is whole afterwards and the child can be waited for. Each test is a script in an interpreter of its own.
"""

import sys
import textwrap

import pytest

from ..helpers.children import needs_pidfds
from ..helpers.support import HAS_WAITED, IN_CHILD, needs_libev, run_script

PRELUDE = """
import ctypes, os, signal, subprocess, sys, threading, traceback

# Registered before coopos is there: the first that would run in a child.
is_told_to_wait = False

def wait_in_child():
    if is_told_to_wait:
        gevent.sleep(0.005)

os.register_at_fork(after_in_child=wait_in_child)

import gevent, gevent.event, gevent.monkey, coopos, coopos.subprocess
from gevent.hub import get_hub
from coopos import _core

fork = coopos.fork
plain_fork = gevent.monkey.get_original("os", "fork")
PARENT = os.getpid()


class Trace:
    '''What children have done, in lines.'''

    def __init__(self):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def add(self, what="ran"):
        if os.getpid() != PARENT:
            os.write(self.writer, f"{os.getpid()} {what}\\n".encode())

    def of_children(self):
        try:
            return os.read(self.reader, 65536).decode().splitlines()
        except BlockingIOError:
            return []


trace = Trace()


def work():
    while True:
        trace.add()
        gevent.sleep(0)


def fork_by_c_code():
    '''As uWSGI does: the interpreter is told in the child alone.'''
    pid = ctypes.pythonapi.fork()
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    return pid


def fork_by_c_code_with_hooks():
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = ctypes.pythonapi.fork()
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    return pid


def signal_mask():
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])


def exit_code(pid):
    return os.waitstatus_to_exitcode(coopos.waitpid(pid, 0)[1])
"""


def run(*sources, **kwargs):
    return run_script(PRELUDE + IN_CHILD + "".join(map(textwrap.dedent, sources)), **kwargs)


# ---- others fork -------------------------------------------------------------------------------------------------------------

PROGRAMS = {
    "the stdlib's preexec_fn": 'subprocess.Popen(["true"], preexec_fn=int)',
    "preexec_fn": 'coopos.subprocess.Popen(["true"], preexec_fn=int)',
    "pty": 'coopos.subprocess.Popen(["true"], pty=True)',
    "spawnv": 'coopos.spawnv(os.P_NOWAIT, "/bin/true", ["true"])',
}
FORKS = ["plain_fork", "fork_by_c_code_with_hooks"]
if sys.version_info < (3, 13):
    # From then on the interpreter refuses children that it was not told of before: _PyImport_ReleaseLock() is fatal in
    # https://github.com/python/cpython/blob/3.13/Python/import.c
    FORKS.append("fork_by_c_code")


@pytest.mark.parametrize("place", ["main", "spawned"])
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_no_greenlet_runs_in_a_child_that_is_going_to_exec(program, place):
    """Not while a hook waits there that was registered before coopos was imported. The child's end is told to the parent."""
    run(
        f"""
        is_told_to_wait = True
        workers = [gevent.spawn(work) for _ in range(3)]
        get_hub().loop.run_callback(trace.add, "callback")
        timer = get_hub().loop.timer(0.001, 0.001)
        timer.start(trace.add, "timer")

        def start():
            gevent.sleep(0.002)
            for _ in range(5):
                child = {program}
                while (pid := child if isinstance(child, int) else child.pid) and coopos.waitpid(pid, os.WNOHANG) == (0, 0):
                    gevent.sleep(0.001)

        gevent.spawn(start).get() if {place!r} == "spawned" else start()
        timer.stop()
        timer.close()
        gevent.killall(workers)
        assert trace.of_children() == []
        """,
        may_complain=True,  # a Popen whose child somebody else has waited for
    )


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_reader_in_the_parent_loses_nothing_to_a_child_that_is_going_to_exec(program):
    run(
        f"""
        is_told_to_wait = True
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        lines = []

        def read():
            while len(lines) < 60:
                lines.extend(coopos.nb_read(reader, 4).decode().split())

        reading = gevent.spawn(read)
        gevent.sleep(0)
        children = []
        for number in range(60):
            if number % 6 == 0:
                children.append({program})
            coopos.nb_write(writer, b"%03d\\n" % number)
            gevent.sleep(0.001)
        reading.join(10)
        assert lines == [f"{{number:03}}" for number in range(60)], lines
        for child in children:
            coopos.waitpid(child, 0) if isinstance(child, int) else child.wait()
        """
    )


@pytest.mark.parametrize("place", ["main", "spawned", "thread"])
@pytest.mark.parametrize("fork", FORKS)
def test_the_policy_on_greenlets_holds_whoever_forks(fork, place):
    """No greenlet, timer or callback of the parent runs, while a hook waits or afterwards; the child's hub works."""
    run(
        f"""
        is_told_to_wait = True
        event = gevent.event.Event()

        def wait():
            event.wait()
            trace.add("went on")

        def start():
            workers = [gevent.spawn(work), gevent.spawn(wait), gevent.spawn_later(0.001, trace.add)]
            gevent.sleep(0.002)
            for _ in range(5):
                pid = {fork}()
                if pid == 0:
                    def check():
                        event.set()
                        gevent.sleep(0.002)
                        assert all(worker.dead for worker in workers)
                        assert not signal_mask()
                        get_hub().threadpool.apply(int)
                        in_child(lambda: gevent.sleep(0.001), coopos.fork)
                    run_and_exit(check)
                assert not signal_mask()
                assert exit_code(pid) == 0
            gevent.killall(workers)

        if {place!r} == "thread":
            thread = threading.Thread(target=start)
            thread.start()
            thread.join()
        else:
            gevent.spawn(start).get() if {place!r} == "spawned" else start()
        assert trace.of_children() == []
        """,
        COOPOS_KEEP_GREENLETS="0",
    )


@pytest.mark.parametrize("fork", FORKS)
def test_a_child_that_others_fork_has_its_own_loop_before_any_hook_runs(fork):
    """It keeps the greenlets, and what it waits for is not taken out of the parent's loop."""
    run(
        f"""
        is_told_to_wait = True
        reader, writer = os.pipe()
        waiting = gevent.spawn(coopos.read, reader, 1)
        gevent.sleep(0)
        for _ in range(5):
            pid = {fork}()
            if pid == 0:
                def check():
                    other_reader, other_writer = os.pipe()
                    reading = gevent.spawn(coopos.read, other_reader, 1)
                    gevent.sleep(0.001)
                    coopos.write(other_writer, b"y")
                    assert reading.get(timeout=10) == b"y"
                    in_child(lambda: gevent.sleep(0.001), coopos.fork)
                run_and_exit(check)
            assert exit_code(pid) == 0
        coopos.write(writer, b"x")
        assert waiting.get(timeout=10) == b"x"
        """
    )


def test_a_signal_to_a_child_of_a_plain_fork_is_not_its_parents():
    """However early it comes. gevent's handler runs in the child."""
    run("""
        gevent.signal_handler(signal.SIGTERM, lambda: os._exit(3 if os.getpid() != PARENT else 4))
        gevent.sleep(0)
        for _ in range(100):
            pid = plain_fork()
            if pid == 0:
                while True:
                    gevent.sleep(1)
            os.kill(pid, signal.SIGTERM)
            assert exit_code(pid) == 3
    """)


def test_fork_after_its_hub_was_destroyed():
    """The loop, which gevent keeps for the next hub, still watches children; the forked child ends those watches."""
    run("""
        reader, writer = os.pipe()
        pid = fork()
        if pid == 0:
            os.read(reader, 1)
            os._exit(5)
        get_hub().destroy()
        for keeps in (True, False):
            in_child(lambda: (gevent.sleep(0.001), in_child(lambda: None)), lambda: coopos.fork(keep_greenlets=keeps))
        os.write(writer, b"x")
        assert exit_code(pid) == 5
    """)


def test_a_fork_waits_for_none_that_its_child_does_not_have():
    """A plain fork while another greenlet's fork has a hook that waits: in the child that other fork is over."""
    run(
        """
        may_go_on = gevent.event.Event()
        is_first = True

        def before():
            global is_first
            if is_first:
                is_first = False
                may_go_on.wait()

        os.register_at_fork(before=before)
        slow = gevent.spawn(lambda: exit_code(fork()) if True else None)
        slow = gevent.spawn(lambda: (pid := fork()) or os._exit(0))
        gevent.sleep(0)
        pid = plain_fork()
        if pid == 0:
            run_and_exit(lambda: in_child(lambda: None, coopos.fork))
        assert exit_code(pid) == 0
        may_go_on.set()
        """,
        COOPOS_KEEP_GREENLETS="0",
        timeout_s=20,
    )


def test_fork_while_a_thread_of_the_pool_has_a_hub():
    """gevent destroys that hub in the child."""
    run("""
        gevent.monkey.patch_all()
        import time
        sleep = time.sleep

        def background():
            while True:
                get_hub().threadpool.apply(sleep, (0.003,))

        for _ in range(2):
            gevent.spawn(background)
        gevent.sleep(0.05)
        for _ in range(3):
            gevent.spawn(lambda: in_child(lambda: get_hub().threadpool.apply(int), lambda: coopos.fork(keep_greenlets=False))).get()
        os._exit(0)
    """)


@pytest.mark.parametrize("fork", ["fork", "plain_fork", "lambda: coopos.fork(keep_greenlets=False)"])
def test_fork_while_threads_tell_the_loop_something(fork):
    """libev notes that its loop was told before it is. The child's hears of its own threads all the same."""
    run(f"""
        import time
        fork = {fork}
        told = get_hub().loop.async_()
        told.start(int)
        get_hub().threadpool.apply(int)

        def tell():
            while True:
                told.send()
                time.sleep(0)

        threading.Thread(target=tell, daemon=True).start()
        for _ in range(60):
            gevent.sleep(0)
            in_child(lambda: gevent.with_timeout(10, get_hub().threadpool.apply, int), fork)
        os._exit(0)
    """)


@pytest.mark.parametrize("had", ["coopos.waitpid(fork() or os._exit(0), 0)", "greenlet.getcurrent()"])
def test_fork_while_another_thread_ends(had):
    """A fork waits for the import lock, and lets others run. greenlet looks who refers to what a thread that ends has had."""
    run(f"""
        import _imp, time, greenlet

        def use_greenlets():
            {had}
            is_forking.wait(20)

        def fork_and_wait():
            is_about_to_fork.set()
            in_child(lambda: None, lambda: coopos.fork(keep_greenlets=False))

        is_forking, is_about_to_fork = threading.Event(), threading.Event()
        user, forker = threading.Thread(target=use_greenlets), threading.Thread(target=fork_and_wait)
        user.start()
        _imp.acquire_lock()
        forker.start()
        is_about_to_fork.wait(20)
        time.sleep(0.1)
        is_forking.set()
        user.join()
        _imp.release_lock()
        forker.join()
    """)


def test_sigchld_handlers_are_left_behind():
    """Those given to gevent.signal_handler, as every other handler of the parent's."""
    run("""
        handler = gevent.signal_handler(signal.SIGCHLD, trace.add, "handler")
        in_child(
            lambda: (in_child(lambda: None), gevent.sleep(0.01)), lambda: coopos.fork(keep_greenlets=False)
        )
        assert trace.of_children() == []
    """)


@pytest.mark.parametrize(("end", "code"), [("sys.exit(7)", 7), ("None", 0), ("1 / 0", 1)])
def test_the_child_of_a_spawned_greenlet_may_destroy_its_hub(end, code):
    """And ends with what the greenlet ends with."""
    run(
        f"""
        def child():
            pid = coopos.fork(keep_greenlets=False)
            if pid == 0:
                get_hub().destroy(destroy_loop=True)
                {end}
            else:
                assert exit_code(pid) == {code}

        gevent.spawn(child).get()
        """,
        may_complain=True,
    )


def test_others_fork_after_a_signal_handler_has_raised_in_a_fork():
    """As the hooks of the fork end: its thread's other greenlets don't wait for it for ever."""
    run("""
        import functools
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with it ignored
        strike = functools.partial(ctypes.PyDLL(None)["raise"], signal.SIGINT)  # C alone: the handler runs at the next bytecode
        os.register_at_fork(after_in_parent=strike)
        try:
            if fork() == 0:
                os._exit(0)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("not interrupted")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        gevent.spawn(lambda: in_child(lambda: None, coopos.fork_gevent)).get(timeout=10)
    """)


def test_forks_of_a_thread_without_a_hub_while_sigchld_is_ignored():
    """No descriptor stays for a child that nobody can ask for."""
    run("""
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        fds = []

        def work():
            for _ in range(20):
                if fork() == 0:
                    os._exit(0)
                fds.append(len(os.listdir("/proc/self/fd")))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert len(set(fds)) == 1, fds
    """)


def test_a_child_without_hooks_has_no_children():
    """C code that forks and doesn't tell the interpreter: the parent's records are not its own."""
    run("""
        collected = []
        first = fork(collected.append)
        if first == 0:
            os._exit(5)
        while not collected:
            gevent.sleep(0.001)
        pid = ctypes.PyDLL(None).fork()
        if pid == 0:
            run_and_exit(lambda: [raises(ChildProcessError, coopos.waitpid, asked, os.WNOHANG) for asked in (-1, first)])
        assert exit_code(pid) == 0
        assert coopos.waitpid(first, 0) == (first, 5 << 8)
    """)


# ---- something fails ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 0], ids=["one fails", "all fail"])
@pytest.mark.parametrize("keep", [True, False])
# gevent's libuv loop is Python, and loses what is raised while it makes a watcher: to watch a child there is no test of ours.
@pytest.mark.parametrize(
    "name", [pytest.param("fork", marks=needs_libev), "fork_gevent", pytest.param("forkpty", marks=needs_libev), "plain_fork"]
)
def test_fork_without_memory(name, keep, count):
    """Wherever memory runs out the next fork works, and the child, if one was made, can be waited for.

    If memory is there again to say so, whoever called knows its pid.
    """
    pytest.importorskip("_testcapi", reason="this Python has no _testcapi, which makes allocations fail")
    if not count and sys.version_info[:2] == (3, 12):
        pytest.skip("CPython's own at-fork hooks loop for ever in such a child: https://github.com/python/cpython/issues/132508")
    run(
        HAS_WAITED,
        f"""
        import _testcapi
        coopos.fork_policy(keep_greenlets={keep}).__enter__()
        make = plain_fork if {name!r} == "plain_fork" else coopos.{name.replace("plain_fork", "fork")}

        def count_fds():
            return len(os.listdir("/proc/self/fd"))

        def attempt(first):
            '''What the fork has made of it that the *first* allocation fails, and all that follow it or none.'''
            pid = result = error = None
            at = -1
            _testcapi.set_nomemory(first, {count} and first + {count})
            try:
                result = make()
                if result if type(result) is int else result[0]:
                    for at in steps:   # the parent: is there an allocation left that fails?
                        bytearray(1)
                _testcapi.remove_mem_hooks()
            except MemoryError as ex:
                _testcapi.remove_mem_hooks()
                if result is None:
                    error = ex
                    pid = getattr(ex, "pid", None)
            if os.getpid() != PARENT:
                os._exit(7)
            if result is not None:
                pid = result if isinstance(result, int) else result[0]
            if pid is not None:
                # In the child CPython itself may have given up: it can't make the locks that it makes anew.
                assert coopos.waitpid(pid, 0)[0] == pid
            elif not {count} or make is plain_fork:
                try:
                    coopos.waitpid(-1, 0)
                except ChildProcessError:
                    pass
            if result is not None and not isinstance(result, int):
                os.close(result[1])
            assert raises(ChildProcessError, coopos.waitpid, -1, os.WNOHANG), f"allocation {{first}}: a child nobody knows"
            if result is None:
                return "raised"
            return "not reached" if (at < len(steps) - 1 if {count} else at > 0) else "silent"

        parked = [gevent.spawn(gevent.sleep, 1000) for _ in range(3)]
        gevent.sleep(0)
        # Of the probe itself so many may be the first to fail: its iterator, and a bytearray with its buffer. One fork makes some
        # allocations more than another.
        IN_PROBE = 3 + 3
        # os.fork looks for threads to warn of, and tells nobody what fails there.
        IN_WARNING = 10 if make is plain_fork and sys.version_info >= (3, 12) else 0
        steps = list(range(2000))
        told = []
        sys.unraisablehook = lambda one: told.append(one.exc_type)
        assert attempt(1000) == "not reached"
        fds = count_fds()
        outcomes = []
        while outcomes[-30:].count("not reached") < 30:     # in the child something may fail for some time to come
            told.clear()
            outcomes.append(attempt(len(outcomes)))
            if outcomes[-1] == "silent" and MemoryError in told:
                outcomes[-1] = "told"      # hooks that fail have nobody to raise it to
            assert len(outcomes) < 1000
            assert count_fds() == fds, (outcomes, count_fds(), fds)
            assert not signal_mask(), outcomes
        assert outcomes.count("silent") <= (IN_WARNING if {count} else IN_PROBE), outcomes
        assert "raised" in outcomes
        assert set(outcomes[:outcomes.index("not reached")]) <= {{"raised", "told", "silent"}}, outcomes
        """,
        may_complain=True,  # the interpreter prints what hooks have raised
    )


@needs_pidfds  # or a thread would watch the child, which can't be started without one either
def test_fork_that_may_not_set_the_signal_mask():
    """rt_sigprocmask(2) refused, as by a filter: the child and the parent have the mask that they had."""
    run("""
        import struct
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        libc = ctypes.CDLL(None, use_errno=True)
        PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
        NUMBER = {"x86_64": 14, "aarch64": 135}[os.uname().machine]
        code = [(0x20, 0, 0, 0), (0x15, 0, 1, NUMBER), (0x06, 0, 0, 0x00050000 | 22), (0x06, 0, 0, 0x7FFF0000)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
        filter = struct.pack("HxxxxxxP", len(code), ctypes.addressof(program))
        assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
        assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(filter)) == 0

        def mask():
            with open("/proc/self/status") as status:
                [line] = [line for line in status if line.startswith("SigBlk")]
            return int(line.split()[1], 16)

        before = mask()
        assert before == 1 << (signal.SIGUSR2 - 1)
        for keeps in (True, False):
            pid = coopos.fork(keep_greenlets=keeps)
            if pid == 0:
                os._exit(mask() != before)
            assert exit_code(pid) == 0
            assert mask() == before
    """)


def test_what_happens_to_a_child_during_its_fork_is_not_forgotten_for_anothers():
    """A child is collected while a hook waits; before it is watched another thread forks. Each status goes where it belongs."""
    run("""
        stolen, seen = [], []

        def after():
            while threading.current_thread() is threading.main_thread() and not stolen:
                gevent.sleep(0.001)

        os.register_at_fork(after_in_parent=after)
        thief = gevent.spawn(lambda: stolen.append(coopos.waitpid(-1, 0)))

        def fork_in_thread():
            pid = coopos.fork_gevent()
            if pid == 0:
                os._exit(6)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            others.append(pid)

        others = []

        def fork_both():
            pid = coopos.fork_gevent()
            if pid == 0:
                os._exit(5)
            thread = threading.Thread(target=fork_in_thread)
            thread.start()
            thread.join()
            return pid

        told = gevent.event.Event()
        pid = coopos.fork_and_watch(lambda child: (seen.append((child.pid, child.rstatus)), told.set()), fork=fork_both)
        assert told.wait(10)
        assert stolen == seen == [(pid, 5 << 8)]
        assert coopos.waitpid(others[0], 0) == (others[0], 6 << 8)
    """)


def test_an_exception_from_the_wait_before_a_fork_comes_out():
    """A greenlet that is killed while its fork waits for the import lock has forked nothing."""
    run("""
        import _imp
        gevent.monkey.patch_all()
        coopos.patch()

        def hold():
            _imp.acquire_lock()
            try:
                go_on.wait()
            finally:
                _imp.release_lock()

        class Stop(Exception):
            pass

        go_on = gevent.event.Event()
        holder = gevent.spawn(hold)
        gevent.sleep(0)
        forker = gevent.spawn(lambda: coopos.fork() or os._exit(0))
        gevent.sleep(0.001)
        forker.kill(Stop, block=False)
        forker.join()
        assert isinstance(forker.exception, Stop), forker
        assert raises(ChildProcessError, coopos.waitpid, -1, os.WNOHANG)
        go_on.set()
        holder.join()
        in_child(lambda: None, coopos.fork)
    """, may_complain=True)


# ---- what is private to others -----------------------------------------------------------------------------------------------

GATES = {
    "at-fork hooks in no list": """
        import gc
        find = gc.get_referrers
        gc.get_referrers = lambda *objects: []
    """,
    "at-fork hooks in two lists": """
        import gc
        find = gc.get_referrers
        copies = []
        def get_referrers(*objects):
            found = find(*objects)
            copies[:] = [list(each) for each in found if type(each) is list]
            return found + copies
        gc.get_referrers = get_referrers
    """,
    "another greenlet": """
        import gevent, gevent.event, gevent.lock, greenlet
        class Larger(greenlet.greenlet):
            __slots__ = ("more",)
        greenlet.greenlet = Larger
    """,
}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_what_is_not_as_we_think_costs_keep_greenlets_alone(gate):
    """NotImplementedError that names the version; all other forks work, and nothing was changed."""
    run_script(
        textwrap.dedent(gate)
        + textwrap.dedent("""
        import os, sys, traceback
        import gevent, coopos, greenlet as module
        fork = coopos.fork
        """)
        + IN_CHILD
        + textwrap.dedent("""
        for make in (coopos.fork, coopos.forkpty, coopos.fork_gevent):
            try:
                make(keep_greenlets=False)
            except NotImplementedError as ex:
                assert "keep_greenlets=False" in str(ex), ex
                assert module.__version__ in str(ex) or sys.version.split()[0] in str(ex), ex
            else:
                raise AssertionError("no error")
        gevent.spawn(gevent.sleep, 100)
        in_child(lambda: (gevent.sleep(0.001), in_child(lambda: None)))
        reader, writer = os.pipe()
        assert coopos.write(writer, b"x") == 1 and coopos.read(reader, 1) == b"x"
        """)
    )


def test_greenlets_object_structure_is_checked():
    """By the parts that a type tells of, and by trying what the rest is."""
    run("""
        import greenlet

        class Slotted(greenlet.greenlet):
            __slots__ = ("more",)

        class NoGreenlet:
            __slots__ = ("a", "b", "c")

        _core.check_greenlet(greenlet.greenlet)
        for kind in (Slotted, NoGreenlet, int, object):
            assert raises(NotImplementedError, _core.check_greenlet, kind), kind
    """)


def test_greenlets_that_the_collector_has_set_aside_are_left_behind():
    """gc.freeze() before the fork, as gunicorn's recipes have it."""
    run("""
        import gc
        event = gevent.event.Event()
        worker = gevent.spawn(lambda: (event.wait(), trace.add("went on")))
        gevent.sleep(0)
        gc.freeze()
        def check():
            event.set()
            gevent.sleep(0.001)
            assert worker.dead
            assert gc.get_freeze_count() > 100
        in_child(check, lambda: coopos.fork(keep_greenlets=False))
        assert trace.of_children() == []
    """)


def test_fork_in_a_program_that_has_set_aside_what_it_had_before_it_imported_coopos():
    """gc.freeze(), then the import: the interpreter's at-fork hooks are found, and what was set aside stays so."""
    run_script("""
        import gc, os, random                # whose at-fork hooks are there already
        gc.freeze()
        frozen = gc.get_freeze_count()
        import coopos, gevent
        assert gc.get_freeze_count() > frozen // 2
        pid = coopos.fork(keep_greenlets=False)
        if pid == 0:
            os._exit(7)
        assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
    """)
