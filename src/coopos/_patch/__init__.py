"""What patch() does: it puts coopos under a program that `gevent.monkey` has patched. unpatch() takes it out again.

The table of places says what may be replaced; the modules beside this one make it: `_os`, `_subprocess`, `_time` and
`_multiprocessing`. Whether a place is patched isn't noted anywhere: it is, if its name holds our function. Each place keeps what it
held before.

gevent calls on_did_patch_all() at the end of every ``monkey.patch_all()``. If there is nothing to do, it imports nothing. The
façade hands its functions down with offer(); nothing here imports the façade.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from gevent.monkey import is_module_patched

if TYPE_CHECKING:
    from coopos._patch import _multiprocessing

#: (module or class, name, what the name holds before, ours)
_Place = tuple[Any, str, Any, Any]

# {name: function}, what the façade offers in place of those of os and gevent.os.
_ours: dict[str, Any] = {}
# What patch() may replace, whether or not it has. The first call finds it, while every name still holds what gevent and Python gave
# it. These names hold something of gevent's, so they tell by themselves whether gevent.monkey has patched their module.
_gevents: list[_Place] = []
# These gevent leaves alone. They are replaced only if gevent.monkey has patched os.
_stdlibs: list[_Place] = []
# Finds the places in multiprocessing, when a program imports it.
_finder: _multiprocessing.Finder | None = None


def offer(ours: dict[str, Any]) -> None:
    """Called by the façade, with the functions that patch() is to put in place."""
    _ours.update(ours)


def _find_places() -> None:
    from coopos._patch import _os

    gevents, stdlibs = _os.places_of_gevent(_ours), _os.places_of_stdlib(_ours)
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


def patch(*, keep_greenlets: bool | None = None) -> None:
    """Put coopos under a program that uses gevent.

    In gevent's own modules it replaces the functions of ``gevent.os``, ``gevent.fork``, and what is in ``gevent.subprocess``, by
    :mod:`coopos.subprocess`. A Popen of gevent's that somebody has imported before forks and waits by coopos, so that nothing
    installs a SIGCHLD handler any more. In the standard library, once ``gevent.monkey`` has patched it, this replaces:

    * in :mod:`os`, what gevent replaces there and the rest of ``coopos.__implements__``, but never ``os.read`` and ``os.write``;
    * what gevent replaces in :mod:`subprocess`, by :mod:`coopos.subprocess`;
    * ``fcntl.flock`` and ``fcntl.lockf``, and what :mod:`multiprocessing` waits with;
    * :func:`time.sleep`, so that it sleeps in the hub, too, where signal handlers often run;
    * the interpreter's import lock: a fork waits while another greenlet has it.

    Names that other modules have imported before stay as they are. A second call does nothing.

    With COOPOS_PATCH=1 in the environment ``gevent.monkey.patch_all()`` makes this call.

    Args:
        keep_greenlets: what holds for forks that don't say it themselves. False: the child has only the greenlet that forked (see
            :func:`fork_gevent`). True: it has all of them. None, the default, changes nothing: what the last call has said holds,
            or COOPOS_KEEP_GREENLETS=0 in the environment, else True.

    Keeps :ref:`what every function promises <promises>`. Doesn't switch greenlets. Call it early, before the program has children.

    .. versionadded:: 0.1.0
    """
    if not _gevents:
        _find_places()
    _replace(_gevents)
    if is_module_patched("os"):
        _replace(_stdlibs)
    if hasattr(os, "fork"):
        from coopos import _core
        from coopos._patch import _subprocess

        _subprocess.use_stdlibs()
        if keep_greenlets is not None:
            _core.set_default(keep_greenlets)
        if is_module_patched("os"):
            _patch_multiprocessing()


def unpatch() -> None:
    """Undo :func:`patch`: every name that holds a function of coopos gets gevent's own back. A second call does nothing.

    Children that were forked in between stay watched; wait for them with :func:`waitpid` of this module.

    Keeps :ref:`what every function promises <promises>`. Doesn't switch greenlets.

    .. versionadded:: 0.1.0
    """
    if _finder is not None:
        _finder.remove()
    if _gevents and hasattr(os, "fork"):
        from coopos._patch import _subprocess

        _subprocess.use_gevents()
    for owner, name, theirs, ours in _gevents + _stdlibs:
        if getattr(owner, name, None) is ours:
            if theirs is None:
                delattr(owner, name)
            else:
                _set(owner, name, theirs)


def on_did_patch_all(event: object) -> None:
    """Called by ``gevent.monkey.patch_all()``, through an entry point: patch, if the environment says so or patch() was called."""
    is_patched = any(getattr(owner, name, None) is ours for owner, name, _, ours in _gevents + _stdlibs)
    if is_patched or os.environ.get("COOPOS_PATCH", "").lower() in ("1", "true", "yes", "on"):
        patch()
