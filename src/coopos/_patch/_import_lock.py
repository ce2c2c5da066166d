"""The import lock, greenlet by greenlet: a fork waits until no other greenlet has it.

The interpreter takes its import lock before it forks, so that no child finds a module that another thread is half-way through with.
The lock's owner is a thread, so the interpreter can't tell greenlets of that thread apart. :func:`coopos.patch` puts two functions
in the place of its own, which note which greenlet has the lock. They don't lock one greenlet out while another imports: an import
in the hub could not wait.
"""

from __future__ import annotations

import _imp
from typing import Any

from gevent.hub import _get_hub as get_hub_if_exists, sleep  # type: ignore[attr-defined]
from greenlet import getcurrent

from coopos import _core

#: How long a fork sleeps until it looks again. The owner may be of another thread, which can't easily wake this hub.
POLL_S = 0.001

plain_acquire, plain_release = _imp.acquire_lock, _imp.release_lock
# {greenlet: how many times it has the lock}
_holds: dict[Any, int] = {}


def acquire_lock() -> None:
    """``_imp.acquire_lock``."""
    plain_acquire()
    try:
        current = getcurrent()
    except RuntimeError:  # at the end of the interpreter there are no greenlets any more
        return
    _holds[current] = _holds.get(current, 0) + 1


def release_lock() -> None:
    """``_imp.release_lock``."""
    try:
        current = getcurrent()
        count = _holds.pop(current, 0)
        if count > 1:
            _holds[current] = count - 1
    except RuntimeError:
        pass
    plain_release()


def _is_held_by_others() -> bool:
    """Whether another greenlet has the lock, and can release it."""
    if not _holds or not _imp.lock_held():
        return False
    current = getcurrent()
    return any(holder is not current and not holder.dead for holder in list(_holds))


def _wait_before_fork() -> None:
    """The last of the at-fork hooks. The hub can't wait, and doesn't."""
    while _is_held_by_others() and getcurrent() is not get_hub_if_exists():
        sleep(POLL_S)


_core.call_last(_wait_before_fork)
