"""What :func:`coopos.patch` replaces in :mod:`time`: gevent's sleep, which raises in the hub. POSIX only."""

from __future__ import annotations

import time
from typing import Any

import gevent

from coopos import _core
from coopos._originals import get_original

_plain_sleep = get_original("time", "sleep")


def sleep(seconds: float = 0, ref: bool = True) -> None:
    """``gevent.sleep``. In the hub, where a signal handler often runs, it is the plain ``time.sleep``."""
    if _core.can_give_way():
        gevent.sleep(seconds, ref)
    else:
        _plain_sleep(seconds)


def places() -> list[tuple[Any, str, Any, Any]]:
    """(module, name, what the name holds once gevent.monkey has patched it, ours)."""
    return [(time, "sleep", gevent.sleep, sleep)]
