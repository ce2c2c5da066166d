"""Puts coopos under a monkey-patched gevent program, and takes it out again.

Whether a name is patched is asked of its module: it is, if it holds our function. Only gevent.os's own functions are kept aside.
`os.read` and `os.write` are never touched: signal handlers rely on the plain ones. Knows the façade by name, and of gevent's inside
what is written at `_NoSigchld`.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

import gevent.os

if TYPE_CHECKING:
    from types import ModuleType

# {name: gevent.os's own function}, from the first patch() on.
_gevents_own: dict[str, Any] = {}


class _NoSigchld:
    """Stands for a loop in gevent.subprocess, where every Popen has its loop install a SIGCHLD handler.

    That handler would collect every child of the program, and nobody needs it: the children are watched one by one.
    """

    def __init__(self, loop: Any) -> None:
        self._watched_loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watched_loop, name)

    def install_sigchld(self) -> None:
        """Do nothing."""


class _LoopOfPopen:
    """The attribute ``gevent.subprocess.Popen._loop``, while patched."""

    def __get__(self, popen: Any, owner: type | None = None) -> Any:
        return self if popen is None else _NoSigchld(vars(popen)["_loop"])

    def __set__(self, popen: Any, loop: Any) -> None:
        vars(popen)["_loop"] = loop


def _fork_and_watch_for_popen(on_child: Any, loop: Any, ref: bool, fork: object) -> int:
    """``gevent.subprocess.fork_and_watch``: its *fork* is the plain one, whose child runs no gevent before it execs.

    *on_child* is a method of the Popen, whom the child belongs to: nobody who waits for any child is given its status, and the
    status is kept no longer than the Popen. Where somebody else has collected the child and its status is lost, *on_child* isn't
    called, since it would make up a returncode.
    """
    from coopos import _children

    popen = on_child.__self__

    def ended(child: _children.Child) -> None:
        try:
            child.rstatus  # noqa: B018
        except ChildProcessError as ex:
            popen.result.set_exception(ex)
        else:
            on_child(child)

    pid = _children.fork_process()
    if pid:
        child = _children.watch(pid, ended, loop._watched_loop, ref, True)
        weakref.finalize(popen, child.discard).atexit = False
    return pid


def _replacements() -> list[tuple[ModuleType, str, Any, Any]]:
    """[(module, name, gevent's function, ours), ...]: what patch() may replace, whether or not it has."""
    from gevent import subprocess as gevent_subprocess

    import coopos

    found: list[tuple[ModuleType, str, Any, Any]] = []
    for name, gevents in _gevents_own.items():
        ours = getattr(coopos, name)
        found += [(module, name, gevents, ours) for module in (gevent.os, os)]
    if "fork" in _gevents_own:
        found.append((gevent, "fork", _gevents_own["fork"], coopos.fork))
        found.append((gevent_subprocess, "fork_and_watch", _gevents_own["fork_and_watch"], _fork_and_watch_for_popen))
    return found


def patch() -> None:
    """Put coopos under a program that uses gevent.

    Replaces the functions of ``gevent.os``; those of :mod:`os` that ``gevent.monkey`` has replaced or will replace (never
    ``os.read`` and ``os.write``); ``gevent.fork``; and what ``gevent.subprocess`` forks and watches with, so that it installs no
    SIGCHLD handler any more. Names that other modules have imported before stay as they are. A second call does nothing.

    With COOPOS_PATCH=1 in the environment ``gevent.monkey.patch_all()`` makes this call.

    Doesn't switch greenlets. Call it early, before the program has children.

    .. versionadded:: 0.1.0
    """
    from gevent import subprocess as gevent_subprocess

    import coopos

    if not _gevents_own:
        names = coopos.__implements__ + coopos.__extensions__
        _gevents_own.update((name, getattr(gevent.os, name)) for name in names if hasattr(gevent.os, name))
    for module, name, gevents, ours in _replacements():
        if getattr(module, name, None) is gevents:
            setattr(module, name, ours)
    if hasattr(os, "fork"):
        popen: Any = gevent_subprocess.Popen
        popen._loop = _LoopOfPopen()


def unpatch() -> None:
    """Undo :func:`patch`: every name that holds a function of coopos gets gevent's own back. A second call does nothing.

    Children that were forked in between stay watched; wait for them with :func:`waitpid` of this module.

    Doesn't switch greenlets.

    .. versionadded:: 0.1.0
    """
    from gevent import subprocess as gevent_subprocess

    for module, name, gevents, ours in _replacements():
        if getattr(module, name, None) is ours:
            setattr(module, name, gevents)
    popen: Any = gevent_subprocess.Popen
    if "_loop" in vars(popen):
        del popen._loop


def on_did_patch_all(event: object) -> None:
    """Called by ``gevent.monkey.patch_all()``, through an entry point: patch, if the environment says so."""
    if os.environ.get("COOPOS_PATCH", "").lower() in ("1", "true", "yes", "on"):
        patch()
