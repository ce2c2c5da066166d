"""What :func:`coopos.patch` replaces in :mod:`subprocess` and ``gevent.subprocess``. POSIX only.

There are two kinds of Popen under a patched program. New ones are ours, of `coopos.subprocess`. Somebody may have imported gevent's
before, and its children must be watched one by one, too: no SIGCHLD handler may be installed, since it would collect every child of
the program. So gevent's Popen forks, waits and polls by our functions, and its loop is a stand-in.

Must be imported before anything is replaced: it keeps gevent's own Popen. Of gevent's inside it knows Popen._loop, Popen.result and
how Popen calls fork_and_watch.
"""

from __future__ import annotations

import functools
import subprocess
from typing import TYPE_CHECKING, Any

import gevent.os
from gevent import subprocess as gevent_subprocess

from coopos import _core, _stdlib, subprocess as coopos_subprocess
from coopos._originals import get_original

if TYPE_CHECKING:
    from collections.abc import Callable

_GeventPopen: Any = gevent_subprocess.Popen

#: (name, (gevent's, ours), the stdlib's) of the other names that gevent.monkey puts into subprocess. While our Popen is there they
#: are the stdlib's own, which work over it.
_others: list[tuple[str, tuple[Any, Any], Any]] = [
    (
        name,
        (getattr(gevent_subprocess, name), getattr(coopos_subprocess, name, getattr(gevent_subprocess, name))),
        get_original("subprocess", name),
    )
    for name in coopos_subprocess.NAMES.intersection(vars(gevent_subprocess)["__implements__"]) - {"Popen"}
]


class _NoSigchld:
    """A loop as gevent.subprocess sees it, but for the SIGCHLD handler that every Popen has its loop install."""

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


def _fork_and_watch(on_child: Any, loop: Any, ref: bool, fork: object) -> int:
    """``gevent.subprocess.fork_and_watch``: its *fork* is the plain one, whose child runs no gevent before it execs.

    *on_child* is a method of the Popen. It would make up a returncode for a child that somebody else has collected and whose status
    is lost. So then it isn't called, and the Popen's result is the error.
    """
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
    """Wrap a Popen's wait or poll: once it has told the returncode, waitpid() doesn't tell it again."""

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


def places_of_popen() -> list[tuple[Any, str, Any, Any]]:
    """What patch() replaces in gevent.subprocess, and in subprocess once gevent.monkey patched it: (owner, name, theirs, ours)."""
    pairs = [(name, getattr(gevent_subprocess, name), getattr(coopos_subprocess, name)) for name in coopos_subprocess.__all__]
    return [
        (subprocess, "Popen", _GeventPopen, coopos_subprocess.Popen),
        *((gevent_subprocess, name, theirs, ours) for name, theirs, ours in pairs if theirs is not ours),
        (gevent_subprocess, "fork_and_watch", gevent.os.fork_and_watch, _fork_and_watch),
        (_GeventPopen, "wait", _GeventPopen.wait, _claiming(_GeventPopen.wait)),
        (_GeventPopen, "poll", _GeventPopen.poll, _claiming(_GeventPopen.poll)),
    ]


def _has_our_popen() -> bool:
    return subprocess.Popen.__module__ == "coopos.subprocess"


def use_stdlibs() -> None:
    """After the places were replaced: what goes with our Popen is the stdlib's, and gevent's Popen has no SIGCHLD handler."""
    if _has_our_popen():
        for name, others, stdlibs in _others:
            if getattr(subprocess, name) in others:
                setattr(subprocess, name, stdlibs)
    _GeventPopen._loop = _LoopOfPopen()


def set_pipes(*, nonblocking: bool) -> None:
    """Choose the mode of the pipes that a Popen of ours makes. The plain os.read would stop the process on one in blocking mode."""
    _stdlib.has_nonblocking_pipes = nonblocking


def use_gevents() -> None:
    """Undo use_stdlibs(), before the places get back what they held."""
    if _has_our_popen():
        for name, others, stdlibs in _others:
            # Ours: gevent.monkey has patched subprocess since, and taken what stands in gevent.subprocess.
            if getattr(subprocess, name) in (stdlibs, others[1]):
                setattr(subprocess, name, others[0])
    if "_loop" in vars(_GeventPopen):
        del _GeventPopen._loop
