"""What patch() does: it puts coopos under a program that `gevent.monkey` has patched. unpatch() takes it out again.

The table of places says what may be replaced; the modules beside this one make it: `_os`, `_io`, `_subprocess`, `_time` and
`_multiprocessing`. Whether a place is patched isn't noted anywhere: it is, if its name holds our function. Each place keeps what it
held before.

The façade hands its functions down with offer(); nothing here imports the façade. gevent's ``monkey.patch_all()`` tells
on_did_patch_all() when it is done, by way of _coopos_plugin.
"""

from __future__ import annotations

import os
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

from coopos import _settings
from coopos._originals import is_module_patched

if TYPE_CHECKING:
    from collections.abc import Callable

    from coopos._patch import _multiprocessing

#: (module or class, name, what the name holds before, ours)
_Place = tuple[Any, str, Any, Any]

#: The modules of which one at least is patched once gevent.monkey has done anything.
_MONKEYS = ("os", "subprocess", "socket", "time", "thread", "threading", "select", "signal", "ssl", "queue")

# They return {name: function}, what the façade offers in place of those of os and gevent.os, and for patch(io=True) in os alone.
_offered: list[Callable[[], dict[str, Any]]] = []
# What patch() may replace, whether or not it has. The first call finds it, while every name still holds what gevent and Python gave
# it. These names hold something of gevent's, so they tell by themselves whether gevent.monkey has patched their module.
_gevents: list[_Place] = []
# These gevent leaves alone. They are replaced only if gevent.monkey has patched os.
_stdlibs: list[_Place] = []
# What patch(io=True) replaces besides, but for the standard streams: _io has noted those.
_ios: list[_Place] = []
# Whether patch(io=True) was called, and unpatch() not since.
_wants_io = False
# Whether the warning about an early patch() has been given.
_has_warned = False
# Finds the places in multiprocessing, when a program imports it.
_finder: _multiprocessing.Finder | None = None


def offer(ours: Callable[[], dict[str, Any]], forms: Callable[[], dict[str, Any]]) -> None:
    """Called by the façade. *ours* imports the functions that patch() is to put in place, *forms* those of patch(io=True)."""
    _offered[:] = ours, forms


def _ours() -> dict[str, Any]:
    return _offered[0]()


def _forms() -> dict[str, Any]:
    return _offered[1]()


def _find_places() -> None:
    if _gevents:
        return
    from coopos._patch import _os

    ours = _ours()
    gevents, stdlibs = _os.places_of_gevent(ours), _os.places_of_stdlib(ours)
    if hasattr(os, "fork"):
        from coopos._patch import _subprocess, _time

        gevents += _subprocess.places_of_popen() + _time.places()
    _gevents.extend(gevents)
    _stdlibs.extend(stdlibs)


def _set(owner: Any, name: str, value: Any) -> None:
    """Put *value* in the place of what is there; in the place of a static method it is one."""
    setattr(owner, name, staticmethod(value) if isinstance(vars(owner).get(name), staticmethod) else value)


def _replace(places: list[_Place]) -> None:
    for owner, name, theirs, ours in places:
        if getattr(owner, name, None) is theirs:
            _set(owner, name, ours)


def _put_back(places: list[_Place]) -> None:
    for owner, name, theirs, ours in places:
        if getattr(owner, name, None) is ours:
            if theirs is None:
                delattr(owner, name)
            else:
                _set(owner, name, theirs)


def _patch_io() -> None:
    from coopos._patch import _io

    if not _ios:
        _ios.extend(_io.places(_forms()))
    _replace(_ios)
    _replace(_io.streams())


def _unpatch_io() -> None:
    from coopos._patch import _io

    _put_back(_ios)
    _io.flush_streams()
    _put_back(_io.made_streams())


def _adopt(places: list[_Place]) -> None:
    """Called when a part of multiprocessing is imported while the program is patched."""
    _stdlibs.extend(places)
    if is_module_patched("os"):
        _replace(places)


def _patch_multiprocessing() -> None:
    """Last: it builds on what gevent.monkey has put into other modules, and it may raise NotImplementedError."""
    global _finder
    if _finder is None:
        try:
            from coopos._patch import _multiprocessing
        except ImportError:  # a system without the kernel's semaphores
            return
        _finder = _multiprocessing.Finder(_adopt)
    _finder.install()


def patch(*, keep_greenlets: bool | None = None, io: bool = False) -> None:
    """Put coopos under a program that uses gevent.

    In gevent's own modules it replaces the functions of ``gevent.os``, ``gevent.fork``, and what is in ``gevent.subprocess``, by
    :mod:`coopos.subprocess`. A Popen of gevent's that somebody has imported before forks and waits by coopos, so that nothing
    installs a SIGCHLD handler any more. In the standard library, once ``gevent.monkey`` has patched it, this replaces:

    * in :mod:`os`, what gevent replaces there and the rest of ``coopos.__implements__``, but never ``os.read`` and ``os.write``;
    * what gevent replaces in :mod:`subprocess`, by :mod:`coopos.subprocess`;
    * ``fcntl.flock`` and ``fcntl.lockf``, and what :mod:`multiprocessing` waits with;
    * :func:`time.sleep`, so that it sleeps in the hub, too, where signal handlers often run;
    * the interpreter's import lock: a fork waits while another greenlet has it.

    With ``io=True`` it replaces besides, under ``gevent.monkey``:

    * in :mod:`os`, the rest of ``coopos.__cooperative__``: ``read``, ``write``, ``open``, ``fsync`` and others;
    * :func:`open` and :func:`io.open`, for files that may make one wait: FIFOs, terminals, pipes, sockets and devices;
    * ``sys.stdin``, ``sys.stdout`` and ``sys.stderr``, where they are such files and nobody has replaced them;
    * :func:`input`, which lets other greenlets run until there is a line.

    See :doc:`/patching`. Names that other modules have imported before stay as they are. A second call replaces nothing twice.

    With COOPOS_PATCH=1 in the environment ``gevent.monkey.patch_all()`` makes this call; with COOPOS_PATCH=io, ``patch(io=True)``.

    Args:
        io: bool, whether reads, writes and files cooperate everywhere in the program. False changes nothing: what was replaced
            stays.
        keep_greenlets: what holds for forks that don't say it themselves. False: the child has only the greenlet that forked (see
            :func:`fork_gevent`). True: it has all of them. None, the default, changes nothing: what the last call has said holds,
            or COOPOS_KEEP_GREENLETS=0 in the environment, else True.

    Keeps :ref:`what every function promises <promises>`. Doesn't switch greenlets. Call it early, before the program has children.

    .. versionadded:: 0.1.0
    """
    global _wants_io
    _find_places()
    _warn_if_early()
    _wants_io |= bool(io)
    _replace(_gevents)
    if is_module_patched("os"):
        _replace(_stdlibs)
    if hasattr(os, "fork"):
        from coopos import _core
        from coopos._patch import _subprocess

        _subprocess.use_stdlibs()
        if keep_greenlets is not None:
            _core.set_default(keep_greenlets)
        _subprocess.set_pipes(nonblocking=not _wants_io)
        if is_module_patched("os"):
            if _wants_io:
                _patch_io()
            _patch_multiprocessing()


def _warn_if_early() -> None:
    global _has_warned
    if not _has_warned and not any(map(is_module_patched, _MONKEYS)):
        _has_warned = True
        warnings.warn(
            "coopos.patch() replaces little before gevent.monkey has patched anything: call gevent.monkey.patch_all() first",
            RuntimeWarning,
            stacklevel=3,
        )


def unpatch() -> None:
    """Undo :func:`patch`: every name that holds a function of coopos gets gevent's own back. A second call does nothing.

    Children that were forked in between stay watched; wait for them with :func:`waitpid` of this module. A ``sys.stdin`` that was
    read from stays as it is, since it may have read ahead.

    Keeps :ref:`what every function promises <promises>`. It writes what the standard streams of ``patch(io=True)`` hold, which may
    have to wait; else it doesn't switch greenlets.

    .. versionadded:: 0.1.0
    """
    global _wants_io
    _wants_io = False
    if _finder is not None:
        _finder.remove()
    if _gevents and hasattr(os, "fork"):
        from coopos._patch import _subprocess

        _subprocess.use_gevents()
        _subprocess.set_pipes(nonblocking=False)
    if _ios:
        _unpatch_io()
    _put_back(_gevents + _stdlibs)


def on_did_patch_all() -> None:
    """Called at the end of ``gevent.monkey.patch_all()``: patch, if the environment says so or patch() was called."""
    wanted = _settings.patch_mode()
    if mode() != "off" or wanted != "off":
        patch(io=wanted == "io")


def mode() -> str:
    """What of :func:`patch` is in place: "off", "on", or "io"."""
    if not any(getattr(owner, name, None) is ours for owner, name, _, ours in _gevents + _stdlibs):
        return "off"
    return "io" if _wants_io else "on"


def patched() -> dict[str, str]:
    """Say what :func:`patch` has replaced in this process, and why it has not replaced the rest.

    Returns:
        dict: from the full name of each function, class or stream that ``patch()`` and ``patch(io=True)`` may replace to
        ``"coopos"``, if coopos has replaced it, or to the reason why it has not. What they replace in :mod:`multiprocessing` is
        there once the program has imported that.

    Keeps :ref:`what every function promises <promises>`. Doesn't switch greenlets, and replaces nothing.

    .. versionadded:: 0.1.0
    """
    _find_places()
    found = {_name_of(place): _state_of(place, "patch() was not called") for place in _gevents + _stdlibs}
    if not hasattr(os, "fork"):
        return found
    from coopos._patch import _io, _os

    found |= {f"os.{name}": "gevent.monkey leaves it alone" for name in _os.names_left_to_os(_gevents)}

    if not _ios:
        _ios.extend(_io.places(_forms()))
    found |= {_name_of(place): _state_of(place, "patch(io=True) was not called") for place in _ios}
    found |= {f"os.{name}": reason for name, reason in _io.LEFT_ALONE.items()}
    reason = "it is not the interpreter's, or never makes anybody wait" if _wants_io else "patch(io=True) was not called"
    found |= {f"sys.{name}": "coopos" if _io.is_ours(getattr(sys, name)) else reason for name in _io.STREAMS}
    return found


def _name_of(place: _Place) -> str:
    owner, name = place[:2]
    return f"{owner.__name__ if isinstance(owner, types.ModuleType) else f'{owner.__module__}.{owner.__qualname__}'}.{name}"


def _state_of(place: _Place, reason: str) -> str:
    owner, name, theirs, ours = place
    value = getattr(owner, name, None)
    if value is ours:
        return "coopos"
    if not is_module_patched("os") and not owner.__name__.startswith("gevent"):
        return "gevent.monkey has not patched os"
    return reason if value is theirs else "somebody else has replaced it"
