"""What os.register_at_fork() was given, in a fork that keeps the greenlets and in one that doesn't."""

import sys
import textwrap

import pytest

from ..helpers.keep_greenlets import PRELUDE, main_thread_places, run
from ..helpers.support import IN_CHILD, run_script


@pytest.mark.parametrize("keep", [True, False])
def test_a_fork_waits_for_the_other_whose_hooks_wait(keep):
    """A lock that a hook takes before the fork is never found taken by a fork inside the first."""
    run(
        f"""
        lock = gevent.lock.BoundedSemaphore()
        events = []

        def before():
            events.append("before")
            gevent.sleep(0.001)
            assert lock.acquire(blocking=False), "a fork inside another"

        def after():
            gevent.sleep(0.001)
            lock.release()
            events.append("after")

        def one():
            in_child(lambda: None, lambda: coopos.fork(keep_greenlets={keep}))

        os.register_at_fork(before=before, after_in_parent=after, after_in_child=lock.release)
        forks = [gevent.spawn(one) for _ in range(10)]
        gevent.joinall(forks, raise_error=True)
        assert events == ["before", "after"] * 10
        """
    )


@pytest.mark.smoke
@pytest.mark.parametrize("keep", [True, False])
def test_hooks_in_the_child_may_use_the_hub_and_its_threadpool(keep):
    """Those that were registered before coopos was imported, too."""
    source = """
        import os, sys
        import gevent
        from gevent.hub import get_hub
        done = []

        def hook():
            gevent.sleep(0.001)
            done.append(get_hub().threadpool.apply(os.getpid))

        os.register_at_fork(after_in_child=hook)
        import coopos
        coopos.register_at_fork(after_in_child=lambda: done.append("last"))
        os.register_at_fork(after_in_child=hook)
        get_hub().threadpool.apply(int)
        pid = coopos.fork(keep_greenlets=KEEP)
        if pid == 0:
            os._exit(0 if done == [os.getpid(), os.getpid(), "last"] else 1)
        assert coopos.waitpid(pid, 0) == (pid, 0)
        """
    run_script(textwrap.dedent(source.replace("KEEP", str(keep))))


@pytest.mark.parametrize("keep", [True, False])
def test_hooks_in_the_child_have_the_signal_mask_of_its_parent(keep):
    """So have the threads that they start; and the mask that they set stays."""
    run(
        f"""
        signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGUSR2}})
        masks = []

        def mask():
            return signal.pthread_sigmask(signal.SIG_BLOCK, ())

        def hook():
            masks.extend([mask(), get_hub().threadpool.apply(mask)])
            signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGUSR1}})

        os.register_at_fork(after_in_child=hook)

        def child():
            assert masks == [{{signal.SIGUSR2}}] * 2, masks
            assert mask() == {{signal.SIGUSR1, signal.SIGUSR2}}

        in_child(child, lambda: coopos.fork(keep_greenlets={keep}))
        """
    )


PATCHED_FIRST = "import gevent.monkey; gevent.monkey.patch_all()\n"


def run_patched(source, place="main"):
    """gevent.monkey comes first, as it does where an entry point of ours is called by it."""
    return run_script(PATCHED_FIRST + PRELUDE.format(place=place) + IN_CHILD + textwrap.dedent(source))


def test_forks_take_turns_in_a_program_that_was_patched_before():
    """What gevent.monkey makes of a thread's own data and lock is a greenlet's."""
    run_patched(
        """
        events = []

        def note(what):
            events.append(what)
            gevent.sleep(0)

        os.register_at_fork(before=lambda: note("before"), after_in_parent=lambda: note("after"))
        gevent.joinall([gevent.spawn(in_child, int) for _ in range(3)], raise_error=True)
        assert events == ["before", "after"] * 3, events
        """
    )


@main_thread_places
def test_a_child_waits_for_its_threads_at_its_end_in_a_program_that_was_patched_before(place):
    """As the main program does: those that are no daemons end before the atexit functions are called."""
    if place != "main" and sys.version_info < (3, 13):
        pytest.skip("threading waits only in a main thread that it knows as such from the beginning")
    printed = run_patched(
        """
        import atexit

        def parent():
            pid = fork()
            if pid == 0:
                atexit.register(print, "atexit", flush=True)
                threading.Thread(target=lambda: (gevent.sleep(0.005), print("thread", flush=True))).start()
                sys.exit(5)
            assert exit_code(pid) == 5

        at_place(parent)
        """,
        place=place,
    )
    assert printed.split() == ["thread", "atexit"]


def test_register_at_fork_is_that_of_os_but_in_the_child():
    run(
        """
        events = []
        coopos.register_at_fork(
            before=lambda: events.append("before"),
            after_in_parent=lambda: events.append("parent"),
            after_in_child=lambda: events.append("child"),
        )
        in_child(lambda: events == ["before", "child"] or 1 / 0)
        assert events == ["before", "parent"]
        for wrong in ({}, {"before": 1}, {"after_in_child": 1}, {"after_in_parent": 1}):
            assert raises(TypeError, lambda: coopos.register_at_fork(**wrong)), wrong
        """
    )


@pytest.mark.parametrize("watched", [True, False])
def test_a_child_that_was_collected_while_a_hook_waits_is_known(watched):
    """Its status is told to whoever waits for any child, and by the callback of its watch."""
    run(
        f"""
        seen = []
        stolen = []

        def after():
            while not stolen:
                gevent.sleep(0.001)

        os.register_at_fork(after_in_parent=after)
        thief = gevent.spawn(lambda: stolen.append(coopos.waitpid(-1, 0)))
        sentinel = None

        def fork_and_die(fork, *args):
            pid = fork(*args)
            if pid == 0:
                os._exit(5)
            return pid

        if {watched}:
            told = gevent.event.Event()
            pid = fork_and_die(coopos.fork, lambda child: (seen.append((child.pid, child.rstatus)), told.set()))
            assert told.wait(10)
            assert seen == [(pid, 5 << 8)]
        else:
            pid = fork_and_die(coopos.fork_gevent)
        assert stolen == [(pid, 5 << 8)]
        assert raises(ChildProcessError, coopos.waitpid, pid, 0), "told twice"
        """
    )


def test_fork_in_a_child_that_was_forked_while_another_thread_forked():
    """That thread isn't there: a thread of the child, which with glibc gets its number, doesn't wait for it."""
    run_script(
        """
        import os, threading, _thread
        import gevent, coopos

        gevent.get_hub()
        main, is_inside, numbers = threading.get_ident(), threading.Event(), []

        def before():
            if threading.get_ident() != main and not is_inside.is_set():
                numbers.append(threading.get_ident())
                is_inside.set()
                gevent.sleep(3600)

        def fork():
            numbers.append(threading.get_ident())
            pid = coopos.fork()
            if pid == 0:
                os._exit(0)
            assert coopos.waitpid(pid, 0) == (pid, 0)
            numbers.append("done")

        os.register_at_fork(before=before)
        threading.Thread(target=coopos.fork, daemon=True).start()
        assert is_inside.wait(60)
        pid = os.fork()
        if pid == 0:
            thread = threading.Thread(target=fork)
            thread.start()
            thread.join(60)
            os._exit(numbers[-1] != "done")
        assert os.waitpid(pid, 0)[1] == 0
        os._exit(0)
        """
    )
