"""The fork family: what is forked, which greenlets the child keeps, and who watches it. POSIX only.

Between the fork and the watch nothing can switch greenlets, so no child ends unnoticed. What happens in the child before the
program's own code goes on is `_core`'s.

When it is imported, this module also keeps SIGCHLD away from libev, which would collect every child of the process, and calls the
program's own handlers of that signal in libev's place: see the last section.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import weakref
from typing import TYPE_CHECKING, Any

import gevent.os
from gevent.hub import Hub, _get_hub as get_hub_if_exists, signal as SignalHandler  # type: ignore[attr-defined]  # noqa: N812

from coopos import _core, _settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def fork_policy(*, keep_greenlets: bool) -> Iterator[None]:
    """Say for a ``with`` block whether the children that are forked in it go on with the parent's greenlets.

    It holds for the greenlet and the thread that enter the block, and for every fork there that has no argument of its own for it,
    also those that other libraries make. (Processes of :mod:`multiprocessing` never go on with their parent's greenlets.) Blocks
    may be nested.

    Args:
        keep_greenlets: True, the child goes on with all of the parent's greenlets; False, with the one that forks alone. See
            :func:`fork_gevent`.

    Returns:
        A context manager, for one ``with``.

    Raises:
        TypeError: *keep_greenlets* is missing.

    Keeps :ref:`what every function promises <promises>`. Doesn't switch greenlets.

    Source: :mod:`contextvars`.

    .. versionadded:: 0.1.0
    """
    token = _core.policy.set(bool(keep_greenlets))
    try:
        yield
    finally:
        _core.policy.reset(token)


def register_at_fork(
    *,
    before: Callable[[], object] | None = None,
    after_in_child: Callable[[], object] | None = None,
    after_in_parent: Callable[[], object] | None = None,
) -> None:
    """Have functions called when the process forks, as :func:`os.register_at_fork` does; in the child, once its hub works.

    Args:
        before: called before the fork, the last registered first. May wait: the fork comes when it returns, and no other fork of
            this thread begins in the meantime.
        after_in_child: called in the child when everything else of the fork is done, the first registered first; may wait, start
            greenlets, use the threadpool. Only in children that the functions of this module fork, or :func:`os.fork` after
            :func:`patch`. What it raises comes out of the fork.
        after_in_parent: called in the parent after the fork, the first registered first. May wait.

    Raises:
        TypeError: none is given, or one isn't callable.

    Keeps :ref:`what every function promises <promises>`. Doesn't switch greenlets.

    Source: :func:`os.register_at_fork`.

    .. versionadded:: 0.1.0
    """
    hooks = {"before": before, "after_in_child": after_in_child, "after_in_parent": after_in_parent}
    for name, hook in hooks.items():
        if hook is not None and not callable(hook):
            raise TypeError(f"{name} must be callable, not {hook!r}")
    if before is after_in_child is after_in_parent is None:
        raise TypeError("at least one of before, after_in_child and after_in_parent must be given")
    others = {"before": before, "after_in_parent": after_in_parent}
    others = {name: hook for name, hook in others.items() if hook is not None}
    if others:
        os.register_at_fork(**others)
    if after_in_child is not None:
        _core.register_hook(after_in_child)


def fork_gevent(*, keep_greenlets: bool | None = None) -> int:
    """Fork the process, and make gevent work in the child before returning there.

    Like :func:`os.fork`. The child is not watched: :func:`waitpid` still waits for it cooperatively. No DeprecationWarning about
    threads is given, and the warning filters are not touched.

    Args:
        keep_greenlets: whether the child goes on with the parent's greenlets, timers, callbacks and signal watchers, as it does
            under gevent. By default what :func:`fork_policy` or :func:`patch` has said, and if neither has, True. With False only
            the greenlet that called is left. In the child the others look finished: they are never resumed, their ``finally:``
            blocks don't run, ``dead`` is true, and ``join()`` and ``kill()`` return at once. Their frames stay in memory. Signals
            that gevent has handled have their default action. Loops of other threads are closed. If the greenlet isn't its
            thread's main one it takes that place: the child ends when it does, with the exit status that ``sys.exit()`` gives.

    Returns:
        int: in the parent the child's pid, in the child 0.

    Raises:
        OSError: EAGAIN or ENOMEM as fork(2).
        RuntimeError: *keep_greenlets* is False, and the caller is a callback of the hub.
        NotImplementedError: *keep_greenlets* is False, and this version of greenlet or of CPython is not as coopos knows it.
        MemoryError: if the child is there, the exception has its ``pid``, and it can be waited for.

    Keeps :ref:`what every function promises <promises>`. Switches greenlets only if another fork of this thread is in the middle of
    its at-fork hooks, or if one of its own hooks waits. In the child the hooks run once the hub works.

    Source: fork(2); ``gevent.os.fork_gevent``.

    .. versionadded:: 0.1.0
    """
    return _core.fork_process(keep_greenlets)


def forkpty_gevent(*, keep_greenlets: bool | None = None, winsize: tuple[int, int] | None = None) -> tuple[int, int]:
    """Fork the process with a new pseudo-terminal as the child's controlling terminal and standard streams.

    Like :func:`os.forkpty`, with gevent working in the child before it returns there. The child is not watched. The master is
    close-on-exec from the start, unlike that of :func:`os.forkpty`; :func:`os.set_inheritable` changes that.

    Args:
        keep_greenlets: as for :func:`fork_gevent`.
        winsize: (rows, columns), the size of the terminal's window, each 0..65535; by default 0 x 0, the kernel's.

    Returns:
        (pid, fd): in the parent the child's pid and the master's descriptor, in blocking mode; in the child 0 and -1.
        :func:`read_pty` reads from it up to the child's end.

    Raises:
        OSError: as forkpty(3).
        RuntimeError: as :func:`fork_gevent`.
        TypeError, ValueError, OverflowError: *winsize* is no such pair; before anything is forked.

    Keeps :ref:`what every function promises <promises>`. Switches greenlets as :func:`fork_gevent`.

    Source: forkpty(3); ``gevent.os.forkpty_gevent``.

    .. versionadded:: 0.1.0
    """
    return _core.forkpty_process(keep_greenlets, winsize)


def _check(callback: object, loop: object, **functions: object) -> None:
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be callable, not {function!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable or None, not {callback!r}")
    if loop is not None:
        _core.check_loop(loop)


def fork_and_watch(
    callback: Callable[[Any], object] | None = None,
    loop: Any = None,
    ref: bool = False,
    fork: Callable[[], int] = fork_gevent,
    *,
    keep_greenlets: bool | None = None,
) -> int:
    """Fork, and watch the child: it is collected when it ends, and its status kept for :func:`waitpid`.

    Args:
        callback: called in the hub when the child has ended, with an object that has ``pid``, ``rpid`` and ``rstatus`` (the raw
            wait status; see :func:`watch`). What it raises is reported by the hub. It must not wait. It may fork, but that child is
            in a callback of its hub, too: it may only exec or ``os._exit()``. To do more, ``gevent.spawn`` a greenlet there.
        loop: the event loop that runs the callback; by default that of the current hub.
        ref: whether the watch keeps the loop running until the child has ended. With False, the default as in gevent, the loop may
            end before: if all greenlets wait for what only the callback would bring, they get ``gevent.exceptions.LoopExit``
            ("This operation would block forever"). :func:`waitpid` keeps the loop running in any case.
        fork: what forks; it takes nothing and returns the pid, or 0 in the child.
        keep_greenlets: as for :func:`fork_gevent`; for *fork* it is the :func:`fork_policy`.

    Returns:
        int: in the parent the child's pid, in the child 0.

    Raises:
        TypeError, ValueError: *callback* or *fork* is not callable, *loop* not a loop, or destroyed; before anything is forked.
        OSError: as fork(2). If the child is there and can't be watched, the exception has its ``pid``, and it can be waited for.
        RuntimeError: as :func:`fork_gevent`.

    Keeps :ref:`what every function promises <promises>`. Switches greenlets as :func:`fork_gevent`.

    Source: fork(2), pidfd_open(2); ``gevent.os.fork_and_watch``.

    .. versionadded:: 0.1.0
    """
    _check(callback, loop, fork=fork)
    notes: dict[int, Any] = {}
    pid = _core.fork_to_watch(fork, notes, keep_greenlets)
    if not isinstance(pid, int):
        raise TypeError(f"fork must return the pid of a child, or 0 in it, not {pid!r}")
    if pid:
        _core.watch_new(pid, callback, loop, ref, notes)
    return pid


def forkpty_and_watch(
    callback: Callable[[Any], object] | None = None,
    loop: Any = None,
    ref: bool = False,
    forkpty: Callable[..., tuple[int, int]] = forkpty_gevent,
    *,
    keep_greenlets: bool | None = None,
    winsize: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Fork with a pseudo-terminal, as :func:`forkpty_gevent`, and watch the child, as :func:`fork_and_watch`.

    Args:
        callback, loop, ref: as for :func:`fork_and_watch`.
        forkpty: what forks; it takes nothing and returns ``(pid, fd)``.
        keep_greenlets: as for :func:`fork_gevent`; for *forkpty* it is the :func:`fork_policy`.
        winsize: (rows, columns) of the terminal's window, as for :func:`forkpty_gevent`; *forkpty* is given it, as a keyword.

    Returns:
        (pid, fd): in the parent the child's pid and the master's descriptor; in the child 0 and -1.

    Raises:
        TypeError, ValueError, OverflowError: *callback* or *forkpty* is not callable, *loop* not a loop, or destroyed, *winsize* no
            such pair; before anything is forked.
        OSError: as forkpty(3). If the child is there and can't be watched, the exception has its ``pid``, and the master is closed.
        RuntimeError: as :func:`fork_gevent`.

    Keeps :ref:`what every function promises <promises>`. Switches greenlets as :func:`fork_gevent`.

    Source: forkpty(3), pidfd_open(2); ``gevent.os.forkpty_and_watch``.

    .. versionadded:: 0.1.0
    """
    _check(callback, loop, forkpty=forkpty)
    how = {} if winsize is None else {"winsize": _core.window_size(winsize)}
    notes: dict[int, Any] = {}
    forked = _core.fork_to_watch(forkpty, notes, keep_greenlets, **how)
    if not (isinstance(forked, tuple) and len(forked) == 2):
        raise TypeError(f"forkpty must return (pid, fd), not {forked!r}")
    pid, master_fd = forked
    if pid:
        try:
            _core.watch_new(pid, callback, loop, ref, notes)
        except BaseException:
            os.close(master_fd)
            raise
    return pid, master_fd


def watch(
    pid: int,
    callback: Callable[[Any], object] | None = None,
    loop: Any = None,
    ref: bool = False,
) -> _core.Child:
    """Watch a child that somebody else has made, as :func:`fork_and_watch` does its own.

    From now on it is collected when it ends, and its status kept for :func:`waitpid`. A child may be watched several times, in
    several loops; each callback is called once. If the child has ended already, that is in the loop's next turn.

    Args:
        pid: int, a child of this process that was not waited for, from whatever source.
        callback: called in the hub when the child has ended, with what this function returns. What it may do there, see
            :func:`fork_and_watch`.
        loop: the event loop that runs the callback; by default that of the current hub.
        ref: whether the watch keeps the loop running until the child has ended. If it doesn't, who waits for the callback may get
            ``LoopExit``, as :func:`fork_and_watch` says.

    Returns:
        An object that has ``pid``, ``rpid`` (*pid* once the child has ended, before that 0) and ``rstatus`` (the raw wait status;
        to ask for it raises ChildProcessError if somebody else has collected the child and the kernel doesn't tell).

    Raises:
        ChildProcessError: ECHILD, there is no such child, or somebody has waited for it.
        OSError: EINVAL, *pid* is not positive.
        TypeError, ValueError: *callback* is not callable, *loop* not a loop, or destroyed.

    Keeps :ref:`what every function promises <promises>`. Doesn't switch greenlets.

    Source: pidfd_open(2), waitid(2).

    .. versionadded:: 0.1.0
    """
    _check(callback, loop)
    return _core.watch_any(pid, callback, loop, ref)


def fork(
    callback: Callable[[Any], object] | None = None,
    loop: Any = None,
    ref: bool = False,
    fork: Callable[[], int] | None = None,
    *,
    keep_greenlets: bool | None = None,
) -> int:
    """Fork, and watch the child: :func:`fork_and_watch`.

    With GEVENT_NOWAITPID in the environment when the module is imported, this is :func:`fork_gevent`: it takes *keep_greenlets*
    alone, and doesn't watch.

    Args:
        callback, loop, ref, keep_greenlets: as for :func:`fork_and_watch`.
        fork: as there, by default :func:`fork_gevent`.

    Returns:
        int: in the parent the child's pid, in the child 0.

    Raises:
        OSError, RuntimeError, TypeError, ValueError: as :func:`fork_and_watch`.

    Keeps :ref:`what every function promises <promises>`. Switches greenlets as :func:`fork_gevent`.

    Source: fork(2); ``gevent.os.fork``.

    .. versionadded:: 0.1.0
    """
    return fork_and_watch(callback, loop, ref, fork_gevent if fork is None else fork, keep_greenlets=keep_greenlets)


def forkpty(
    callback: Callable[[Any], object] | None = None,
    loop: Any = None,
    ref: bool = False,
    forkpty: Callable[..., tuple[int, int]] | None = None,
    *,
    keep_greenlets: bool | None = None,
    winsize: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Fork with a pseudo-terminal, and watch the child: :func:`forkpty_and_watch`.

    With GEVENT_NOWAITPID in the environment when the module is imported, this is :func:`forkpty_gevent`: it takes *keep_greenlets*
    and *winsize* alone, and doesn't watch.

    Args:
        callback, loop, ref, keep_greenlets, winsize: as for :func:`forkpty_and_watch`.
        forkpty: as there, by default :func:`forkpty_gevent`.

    Returns:
        (pid, fd): in the parent the child's pid and the master's descriptor; in the child 0 and -1.

    Raises:
        OSError, RuntimeError, TypeError, ValueError, OverflowError: as :func:`forkpty_and_watch`.

    Keeps :ref:`what every function promises <promises>`. Switches greenlets as :func:`fork_gevent`.

    Source: forkpty(3); ``gevent.os.forkpty``.

    .. versionadded:: 0.1.0
    """
    how = forkpty_gevent if forkpty is None else forkpty
    return forkpty_and_watch(callback, loop, ref, how, keep_greenlets=keep_greenlets, winsize=winsize)


if not TYPE_CHECKING and not _settings.WATCHES_CHILDREN:
    fork, forkpty = fork_gevent, forkpty_gevent


# ---- SIGCHLD -----------------------------------------------------------------------------------------------------------------

# libev's default loop has a callback of its own for SIGCHLD. It collects every child of the process before it tells the loop's
# other watchers of that signal: `childcb` in https://github.com/enki/libev/blob/master/ev.c. So libev must never get the signal.
# gevent takes the signal back from the first default loop, but not from later ones, made after ``hub.destroy(destroy_loop=True)``:
# https://github.com/gevent/gevent/blob/26.9.0/src/gevent/libev/libev.h, ``gevent_ev_default_loop()``. _keeping_sigchld() does it
# for these, too. _noting() keeps what a program gives to ``gevent.signal_handler(SIGCHLD, ...)``, and _tell_sigchld_handlers()
# calls it in libev's place. libuv needs nothing of this: there the kernel's signal reaches the handlers.

#: The handlers of SIGCHLD that are not cancelled. The loop keeps them alive.
_handlers: set[weakref.ref[Any]] = set()


def _noting(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def note(handler: Any, signalnum: int, *args: Any, **kwargs: Any) -> None:
        init(handler, signalnum, *args, **kwargs)
        if signalnum == signal.SIGCHLD and type(handler.hub.loop).__module__ == "gevent.libev.corecext":
            _handlers.add(weakref.ref(handler, _handlers.discard))

    return note


def _keeping_sigchld(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def make_hub(hub: Hub, *args: Any, **kwargs: Any) -> None:
        _core.keeping_sigchld(init, hub, *args, **kwargs)
        _core.open_inbox(hub.loop)  # other threads may post to it from now on

    return make_hub


def _call_handler(handler: Any) -> None:
    if handler.hub is not None:  # it may have been cancelled since its greenlet was made
        handler.handle()


def _tell_sigchld_handlers() -> None:
    """In a hub, when watched children have ended: call each handler in a greenlet of its own hub, as gevent does."""
    for one in _handlers.copy():  # the garbage collector may take one out at any time
        handler: Any = one()
        hub = None if handler is None else handler.hub
        if hub is None:  # cancelled
            continue
        if hub is get_hub_if_exists():
            gevent.spawn(_call_handler, handler)
        elif hub.loop is not None:
            _core.post(hub.loop, gevent.spawn, (_call_handler, handler))
    gevent.os._on_child_hook()  # type: ignore[attr-defined]  # gevent.signal's


if (_hub := get_hub_if_exists()) is not None:
    _core.open_inbox(_hub.loop)
Hub.__init__ = _keeping_sigchld(Hub.__init__)  # type: ignore[method-assign]
_core.call_when_left(_handlers.clear)
SignalHandler.__init__ = _noting(SignalHandler.__init__)  # type: ignore[method-assign]
_core.set_child_hook(_tell_sigchld_handlers)
