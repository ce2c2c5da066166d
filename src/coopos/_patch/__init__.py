"""Puts coopos under a monkey-patched gevent program, and takes it out again.

Whether a name is patched is asked of its module: it is, if it holds our function. Only gevent.os's own functions are kept aside.
`os.read` and `os.write` are never touched: signal handlers rely on the plain ones. Knows the façade by name, and of gevent's inside
what is written at `_NoSigchld`.
"""

from __future__ import annotations

import _imp
import functools
import os
import subprocess
from typing import TYPE_CHECKING, Any, NamedTuple

import gevent.os
from gevent.monkey import get_original, is_module_patched

if TYPE_CHECKING:
    from collections.abc import Callable

    from coopos import _multiprocessing


class _Replacement(NamedTuple):
    owner: Any  # a module or class
    name: str
    gevents: Any
    ours: Any
    is_plain: bool = False  # gevent leaves the name alone, so that it doesn't tell whether os is patched


# What gevent.monkey replaces in os, in its newest version.
_GEVENTS = ("fork", "forkpty", "waitpid", "close", "posix_spawn", "posix_spawnp")

# What patch() may replace, whether or not it has: found by the first one, while gevent.os still has its own functions.
_replacements: list[_Replacement] = []
# (name, (gevent's, ours), the stdlib's): what else gevent.monkey puts into subprocess. Where our Popen is, the stdlib's own does.
_stdlibs: list[tuple[str, tuple[Any, Any], Any]] = []
# Tells of those in multiprocessing, when a program imports it.
_finder: _multiprocessing.Finder | None = None


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

    *on_child* is a method of the Popen. Where somebody else has collected the child and its status is lost, it isn't called, since
    it would make up a returncode.
    """
    from coopos import _core

    popen = on_child.__self__

    def ended(child: _core.Child) -> None:
        try:
            child.rstatus  # noqa: B018
        except ChildProcessError as ex:
            popen.result.set_exception(ex)
        else:
            on_child(child)

    notes: dict[int, Any] = {}
    pid = _core.fork_to_watch(_core.fork_process, notes, is_exec=True)
    if pid:
        popen._coopos_child = _core.watch_new(pid, ended, loop._watched_loop, ref, notes)
    return pid


def _claiming(method: Callable[..., Any]) -> Callable[..., Any]:
    """A Popen's wait or poll that, once it has told the returncode, has waited for the child: waitpid() doesn't tell it again."""

    @functools.wraps(method)
    def wait_or_poll(popen: Any, *args: Any, **kwargs: Any) -> Any:
        returncode = method(popen, *args, **kwargs)
        if returncode is None and popen.result.exception is not None:
            raise popen.result.exception
        child = vars(popen).get("_coopos_child")
        if returncode is not None and child is not None:
            child.claim_status()
            del popen._coopos_child
        return returncode

    return wait_or_poll


@functools.cache
def _gevents_popen() -> Any:
    """Asked for the first time before it is replaced."""
    from gevent.subprocess import Popen

    return Popen


def _find_replacements() -> list[_Replacement]:
    from gevent import subprocess as gevent_subprocess

    import coopos

    found = []
    for name in coopos.__implements__ + coopos.__extensions__:
        ours = getattr(coopos, name)
        gevents = getattr(gevent.os, name, None)
        if gevents is not None:
            found.append(_Replacement(gevent.os, name, gevents, ours))
        if hasattr(os, name):
            plain = get_original("os", name)
            if name not in _GEVENTS:
                found.append(_Replacement(os, name, plain, ours, is_plain=True))
            elif gevents is not plain:
                # Before 25.8 gevent had no close and posix_spawn of its own, and left those of os alone.
                found.append(_Replacement(os, name, gevents, ours))
    if hasattr(os, "fork"):
        import fcntl

        from coopos import _core, _imports, _threadpool, subprocess as coopos_subprocess

        popen = _gevents_popen()
        found.append(_Replacement(subprocess, "Popen", popen, coopos_subprocess.Popen))
        for name in coopos_subprocess.NAMES.intersection(vars(gevent_subprocess)["__implements__"]) - {"Popen"}:
            gevents = getattr(gevent_subprocess, name)
            ours = getattr(coopos_subprocess, name, gevents)
            _stdlibs.append((name, (gevents, ours), get_original("subprocess", name)))
        for name in coopos_subprocess.__all__:
            gevents, ours = getattr(gevent_subprocess, name), getattr(coopos_subprocess, name)
            if ours is not gevents:
                found.append(_Replacement(gevent_subprocess, name, gevents, ours))
        lockf = _core.as_builtin(_threadpool.lock_range, "(fd, cmd, len=0, start=0, whence=0, /)", "fcntl")
        found += [
            _Replacement(fcntl, "flock", fcntl.flock, coopos.flock, is_plain=True),
            _Replacement(fcntl, "lockf", fcntl.lockf, lockf, is_plain=True),
            _Replacement(_imp, "acquire_lock", _imports.plain_acquire, _imports.acquire_lock, is_plain=True),
            _Replacement(_imp, "release_lock", _imports.plain_release, _imports.release_lock, is_plain=True),
            _Replacement(gevent, "fork", gevent.os.fork, coopos.fork),
            _Replacement(gevent_subprocess, "fork_and_watch", gevent.os.fork_and_watch, _fork_and_watch_for_popen),
            _Replacement(popen, "wait", popen.wait, _claiming(popen.wait)),
            _Replacement(popen, "poll", popen.poll, _claiming(popen.poll)),
        ]
    return found


def _has_our_popen() -> bool:
    return subprocess.Popen.__module__ == "coopos.subprocess"


def _replace(replacements: list[_Replacement]) -> None:
    for owner, name, gevents, ours, is_plain in replacements:
        if getattr(owner, name, None) is gevents and (not is_plain or is_module_patched("os")):
            setattr(owner, name, ours)


def _adopt(found: list[tuple[Any, str, Any, Any]]) -> None:
    """Something of multiprocessing is imported, and patched."""
    replacements = [_Replacement(*names, is_plain=True) for names in found]
    _replacements.extend(replacements)
    _replace(replacements)


def _patch_multiprocessing() -> None:
    """What is made for it is made of what gevent.monkey has put into other modules."""
    global _finder
    if _finder is None:
        try:
            from coopos import _multiprocessing
        except ImportError:  # a system without the kernel's semaphores
            return
        _finder = _multiprocessing.Finder(_adopt)
    _finder.install()


def patch(*, keep_greenlets: bool | None = None) -> None:
    """Put coopos under a program that uses gevent.

    Replaces the functions of ``gevent.os``; in :mod:`os`, once ``gevent.monkey`` has patched it, what gevent replaces there and the
    rest of ``coopos.__implements__`` (never ``os.read`` and ``os.write``); ``gevent.fork``; what is in ``gevent.subprocess`` and,
    once it is patched, in :mod:`subprocess`, by :mod:`coopos.subprocess`; what a Popen of gevent's that somebody has imported
    before forks and watches with, so that nothing installs a SIGCHLD handler any more; what :mod:`multiprocessing` waits with; and
    the interpreter's import lock, for which a fork waits when another greenlet has it. Names that other modules have imported
    before stay as they are. A second call does nothing.

    With COOPOS_PATCH=1 in the environment ``gevent.monkey.patch_all()`` makes this call.

    Args:
        keep_greenlets: what a fork does that isn't told: False, its child has only the greenlet that forked (see
            :func:`fork_gevent`); True, all of them. None, the default, leaves it as it is: as the last call has said, or
            COOPOS_KEEP_GREENLETS=0 in the environment, else True.

    Doesn't switch greenlets. Call it early, before the program has children.

    .. versionadded:: 0.1.0
    """
    if not _replacements:
        _replacements.extend(_find_replacements())
    _replace(_replacements)
    if _has_our_popen():
        for name, others, stdlibs in _stdlibs:
            if getattr(subprocess, name) in others:
                setattr(subprocess, name, stdlibs)
    if hasattr(os, "fork"):
        _gevents_popen()._loop = _LoopOfPopen()
        if keep_greenlets is not None:
            from coopos import _core

            _core.set_default(keep_greenlets)
        if is_module_patched("os"):
            _patch_multiprocessing()  # the last: it may raise NotImplementedError


def unpatch() -> None:
    """Undo :func:`patch`: every name that holds a function of coopos gets gevent's own back. A second call does nothing.

    Children that were forked in between stay watched; wait for them with :func:`waitpid` of this module.

    Doesn't switch greenlets.

    .. versionadded:: 0.1.0
    """
    if _finder is not None:
        _finder.remove()
    if _has_our_popen():
        for name, others, stdlibs in _stdlibs:
            if getattr(subprocess, name) is stdlibs:
                setattr(subprocess, name, others[0])
    for owner, name, gevents, ours, _ in _replacements:
        if getattr(owner, name, None) is ours:
            if gevents is None:
                delattr(owner, name)
            else:
                setattr(owner, name, gevents)
    if "_loop" in vars(_gevents_popen()):
        del _gevents_popen()._loop


def on_did_patch_all(event: object) -> None:
    """Called by ``gevent.monkey.patch_all()``, through an entry point: patch, if the environment says so or patch() was called."""
    is_patched = any(getattr(owner, name, None) is ours for owner, name, _, ours, _ in _replacements)
    if is_patched or os.environ.get("COOPOS_PATCH", "").lower() in ("1", "true", "yes", "on"):
        patch()
