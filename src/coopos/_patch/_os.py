"""What :func:`coopos.patch` replaces in ``gevent.os``, :mod:`os`, :mod:`fcntl` and the interpreter's import lock.

places_of_gevent() and places_of_stdlib() are given *ours*, {name: function}, which the façade offers. They return places: (module,
name, what the name holds now, ours). Nothing is replaced here. The places must be looked for before anything is replaced, so that
each keeps what was there.
The façade doesn't offer `read` and `write`: signal handlers rely on the plain `os.read` and `os.write`.
"""

from __future__ import annotations

import _imp
import os
from typing import Any

import gevent
import gevent.os

from coopos._originals import get_original, is_module_patched

#: What gevent.monkey replaces in os, in its newest version.
_GEVENTS = ("fork", "forkpty", "waitpid", "close", "posix_spawn", "posix_spawnp")


def places_of_gevent(ours: dict[str, Any]) -> list[tuple[Any, str, Any, Any]]:
    """Names that hold a function of gevent's: in os only once gevent.monkey has patched it."""
    places = [(gevent.os, name, getattr(gevent.os, name), ours[name]) for name in ours if hasattr(gevent.os, name)]
    for _, name, theirs, function in places[:]:
        # Before 25.8 gevent had no close and posix_spawn of its own, and left those of os alone: gevent.os has the plain ones.
        if name in _GEVENTS and theirs is not get_original("os", name):
            places.append((os, name, theirs, function))
    if "fork" in ours:
        places.append((gevent, "fork", gevent.os.fork, ours["fork"]))
    return places


def names_left_to_os(places: list[tuple[Any, str, Any, Any]]) -> list[str]:
    """Names of os that gevent.monkey replaces elsewhere, and here not. POSIX only. *places*: of places_of_gevent().

    This gevent is too old, or GEVENT_NOWAITPID is in the environment.
    """
    replaced = [name for owner, name, *_ in places if owner is os]
    if is_module_patched("os"):
        replaced = [name for name in replaced if getattr(os, name) is not get_original("os", name)]
    return [name for name in _GEVENTS if name not in replaced]


def places_of_stdlib(ours: dict[str, Any]) -> list[tuple[Any, str, Any, Any]]:
    """Names that gevent.monkey leaves alone: what they hold doesn't tell whether it has patched os."""
    places = [(os, name, get_original("os", name), ours[name]) for name in ours if hasattr(os, name) and name not in _GEVENTS]
    if hasattr(os, "fork"):
        import fcntl

        from coopos import _core, _files
        from coopos._patch import _import_lock

        lockf = _core.as_builtin(_files.lock_range, "(fd, cmd, len=0, start=0, whence=0, /)", "fcntl")
        places += [
            (fcntl, "flock", fcntl.flock, ours["flock"]),
            (fcntl, "lockf", fcntl.lockf, lockf),
            (_imp, "acquire_lock", _import_lock.plain_acquire, _import_lock.acquire_lock),
            (_imp, "release_lock", _import_lock.plain_release, _import_lock.release_lock),
        ]
    return places
