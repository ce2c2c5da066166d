"""The environment variables, all of them, parsed here and nowhere else, when coopos is imported.

A value that means nothing raises ValueError, so the import fails. An empty value is as none. docs/reference/environment.rst has the
table of the variables; tests/source/test_settings.py compares the two.
"""

from __future__ import annotations

import os
import signal

from gevent._config import config

from _coopos_plugin import OFF

#: The words that switch something on, as in gevent.
ON = ("1", "true", "on", "yes")


def _value_of(name: str) -> str:
    return os.environ.get(name, "").strip().lower()


def _refusal(name: str, allowed: str) -> ValueError:
    return ValueError(f"{name}={os.environ[name]}: the value must be {allowed}")


def _word(name: str, default: str, *others: str) -> str:
    value = _value_of(name) or default
    if value not in (default, *others):
        raise _refusal(name, " or ".join((default, *others)))
    return value


def _switch(name: str, default: str, *others: str) -> str:
    """ "on", "off" or one of *others*."""
    value = _value_of(name) or default
    if value in others:
        return value
    if value not in ON + OFF:
        raise _refusal(name, f"one of {', '.join(ON + OFF + others)}")
    return "on" if value in ON else "off"


def _count(name: str, default: int, least: int) -> int:
    try:
        value = int(_value_of(name) or default)
    except ValueError:
        value = least - 1
    if not least <= value < 2**31:
        raise _refusal(name, f"a whole number from {least} to {2**31 - 1}")
    return value


#: Signals that nobody can handle, or that the interpreter, gevent or coopos needs. Some have two names: SIGCLD, SIGIOT.
_NO_REPORT = ("SIGKILL", "SIGSTOP", "SIGCHLD", "SIGSEGV", "SIGFPE", "SIGABRT", "SIGBUS", "SIGILL", "SIGSTKFLT", "SIGEMT")


def _report_ways(name: str) -> str:
    """ "off", or "socket" and names of signals, with commas in between."""
    value = _value_of(name) or "off"
    if value in OFF:
        return "off"
    refused = [getattr(signal, each, None) for each in _NO_REPORT]
    found = []
    for word in (each.strip() for each in value.split(",")):
        signum = getattr(signal, word.upper(), None) if word.upper().startswith("SIG") else None
        if word != "socket" and (not isinstance(signum, signal.Signals) or signum in refused):
            raise _refusal(name, "off, socket, or the name of a signal that a program may handle")
        found.append(word if signum is None else signum.name)
    return ",".join(dict.fromkeys(found))


def patch_mode() -> str:
    """COOPOS_PATCH: "on", "off" or "io". Asked again at each ``patch_all()``: a program may set it once coopos is imported."""
    return _switch("COOPOS_PATCH", "off", "io")


#: GEVENT_NOWAITPID, as gevent understands it: whether children are watched by those who fork them.
WATCHES_CHILDREN = not config.disable_watch_children

CHILDREN = _word("COOPOS_CHILDREN", "pidfd", "thread")
SETS = _word("COOPOS_SETS", "epoll", "watchers")
NOWAIT = _switch("COOPOS_NOWAIT", "on") == "on"
KEEP_GREENLETS = _switch("COOPOS_KEEP_GREENLETS", "on") == "on"
FAIRNESS = _count("COOPOS_FAIRNESS", 2**31 - 1, 0)
THREADS = _count("COOPOS_THREADS", 64, 1)
REPORT = _report_ways("COOPOS_REPORT")
patch_mode()
