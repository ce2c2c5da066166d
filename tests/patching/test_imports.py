"""The import lock of a patched program: a fork waits for the greenlet that has it."""

import textwrap

import pytest

from ..helpers.support import run_script

PRELUDE = """
import gevent.monkey
gevent.monkey.patch_all()
import _imp, os, sys
import gevent, gevent.event
import coopos

plain = _imp.acquire_lock
coopos.patch(keep_greenlets={keep_greenlets})
assert _imp.acquire_lock is not plain
got_it, may_release = gevent.event.Event(), gevent.event.Event()
steps = []


def hold():
    _imp.acquire_lock()
    _imp.acquire_lock()
    steps.append("half")
    got_it.set()
    may_release.wait()
    _imp.release_lock()
    gevent.sleep(0)
    steps.append("done")
    _imp.release_lock()


def fork_and_check(expected):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if steps == expected and not _imp.lock_held() else 1)
    assert os.waitpid(pid, 0) == (pid, 0)
"""

both_settings = pytest.mark.parametrize("keep_greenlets", [True, False])


def run(source, keep_greenlets=False):
    return run_script(PRELUDE.format(keep_greenlets=keep_greenlets) + textwrap.dedent(source))


@pytest.mark.smoke
@both_settings
def test_fork_waits_for_the_import_lock_of_another_greenlet(keep_greenlets):
    """The child finds done what the other was half-way through with, and the lock free."""
    run(
        """
        holder = gevent.spawn(hold)
        got_it.wait()
        gevent.spawn(may_release.set)
        fork_and_check(["half", "done"])
        holder.get()
        """,
        keep_greenlets,
    )


def test_fork_does_not_wait_for_the_import_lock_of_its_own():
    run(
        """
        may_release.set()
        _imp.acquire_lock()
        pid = os.fork()
        held = _imp.lock_held()
        _imp.release_lock()
        if pid == 0:
            os._exit(0 if held and not _imp.lock_held() else 1)
        assert os.waitpid(pid, 0) == (pid, 0)
        assert held and not _imp.lock_held()
        """
    )


def test_fork_does_not_wait_for_a_greenlet_that_has_ended_with_the_import_lock():
    run(
        """
        gevent.spawn(_imp.acquire_lock).join()
        assert _imp.lock_held()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        assert os.waitpid(pid, 0) == (pid, 0)
        """
    )


def test_import_lock_is_released_as_often_as_it_was_acquired():
    run(
        """
        try:
            _imp.release_lock()
        except RuntimeError:
            pass
        else:
            raise AssertionError("released what it didn't have")
        may_release.set()
        hold()
        assert not _imp.lock_held()
        coopos.unpatch()
        assert _imp.acquire_lock is plain
        """
    )
