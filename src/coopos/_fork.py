"""The fork family: what happens in parent and child, in order, in one place. POSIX only.

In the parent: fork, then watch, with nothing in between that could switch greenlets, so that no child ends unnoticed. In the child:
the interpreter's at-fork hooks (by which `_children` forgets the parent's), then gevent's hub is re-initialised, then the parent's
watchers are taken out of the loop. Knows `_children` and `gevent.hub.reinit`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent.os
from gevent._config import config
from gevent.hub import reinit

from coopos import _children

if TYPE_CHECKING:
    from collections.abc import Callable


# What gevent.signal puts there runs the SIGCHLD handlers that were set through it.
_children.set_child_hook(lambda: gevent.os._on_child_hook())  # type: ignore[attr-defined]


def _revive_hub() -> None:
    reinit()
    _children.forget_parent_loops()


def fork_gevent() -> int:
    """Fork the process, and make gevent work in the child before returning there.

    Like :func:`os.fork`. The child is not watched: :func:`waitpid` still waits for it cooperatively. No DeprecationWarning about
    threads is given, and the warning filters are not touched.

    Returns:
        int: in the parent the child's pid, in the child 0.

    Raises:
        OSError: EAGAIN or ENOMEM as fork(2).

    Doesn't switch greenlets. The child goes on with all of the parent's greenlets, but for those that wait for a child of the
    parent: they wait for good. Works in any thread's hub.

    Source: fork(2); ``gevent.os.fork_gevent``.

    .. versionadded:: 0.1.0
    """
    pid = _children.fork_process()
    if not pid:
        _revive_hub()
    return pid


def forkpty_gevent() -> tuple[int, int]:
    """Fork the process with a new pseudo-terminal as the child's controlling terminal and standard streams.

    Like :func:`os.forkpty`, with gevent working in the child before it returns there. The child is not watched.

    Returns:
        (pid, fd): in the parent the child's pid and the master's descriptor, in blocking mode; in the child 0 and -1.

    Raises:
        OSError: as forkpty(3).

    Doesn't switch greenlets. Works in any thread's hub.

    Source: forkpty(3); ``gevent.os.forkpty_gevent``.

    .. versionadded:: 0.1.0
    """
    pid, master_fd = _children.forkpty_process()
    if not pid:
        _revive_hub()
    return pid, master_fd


def _check(callback: object, loop: object) -> None:
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable or None, not {callback!r}")
    if loop is not None:
        _children.check_loop(loop)


def fork_and_watch(
    callback: Callable[[Any], object] | None = None,
    loop: Any = None,
    ref: bool = False,
    fork: Callable[[], int] = fork_gevent,
) -> int:
    """Fork, and watch the child: it is collected when it ends, and its status kept for :func:`waitpid`.

    Args:
        callback: called in the hub when the child has ended, with an object that has ``pid``, ``rpid`` and ``rstatus`` (the raw
            wait status; see :func:`watch`). What it raises is reported by the hub.
        loop: the event loop that runs the callback; by default that of the current hub.
        ref: whether the watch keeps the loop running until the child has ended.
        fork: what forks; it takes nothing and returns the pid, or 0 in the child.

    Returns:
        int: in the parent the child's pid, in the child 0.

    Raises:
        TypeError, ValueError: *callback* is not callable, *loop* not a loop, or destroyed; before anything is forked.
        OSError: as fork(2).

    Doesn't switch greenlets. Works in any thread's hub.

    Source: fork(2), pidfd_open(2); ``gevent.os.fork_and_watch``.

    .. versionadded:: 0.1.0
    """
    _check(callback, loop)
    pid = fork()
    if pid:
        _children.watch_new(pid, callback, loop, ref)
    return pid


def forkpty_and_watch(
    callback: Callable[[Any], object] | None = None,
    loop: Any = None,
    ref: bool = False,
    forkpty: Callable[[], tuple[int, int]] = forkpty_gevent,
) -> tuple[int, int]:
    """Fork with a pseudo-terminal, as :func:`forkpty_gevent`, and watch the child, as :func:`fork_and_watch`.

    Args:
        callback, loop, ref: as for :func:`fork_and_watch`.
        forkpty: what forks; it takes nothing and returns ``(pid, fd)``.

    Returns:
        (pid, fd): in the parent the child's pid and the master's descriptor; in the child 0 and -1.

    Raises:
        TypeError, ValueError: *callback* is not callable, *loop* not a loop, or destroyed; before anything is forked.
        OSError: as forkpty(3).

    Doesn't switch greenlets. Works in any thread's hub.

    Source: forkpty(3), pidfd_open(2); ``gevent.os.forkpty_and_watch``.

    .. versionadded:: 0.1.0
    """
    _check(callback, loop)
    pid, master_fd = forkpty()
    if pid:
        _children.watch_new(pid, callback, loop, ref)
    return pid, master_fd


def watch(
    pid: int,
    callback: Callable[[Any], object] | None = None,
    loop: Any = None,
    ref: bool = False,
) -> _children.Child:
    """Watch a child that somebody else has made, as :func:`fork_and_watch` does its own.

    From now on it is collected when it ends, and its status kept for :func:`waitpid`. A child may be watched several times, in
    several loops; each callback is called once. If the child has ended already, that is in the loop's next turn.

    Args:
        pid: int, a child of this process that was not waited for, from whatever source.
        callback: called in the hub when the child has ended, with what this function returns. What it raises is reported by the
            hub.
        loop: the event loop that runs the callback; by default that of the current hub.
        ref: whether the watch keeps the loop running until the child has ended.

    Returns:
        An object that has ``pid``, ``rpid`` (*pid* once the child has ended, before that 0) and ``rstatus`` (the raw wait status;
        to ask for it raises ChildProcessError if somebody else has collected the child and the kernel doesn't tell).

    Raises:
        ChildProcessError: ECHILD, there is no such child, or somebody has waited for it.
        OSError: EINVAL, *pid* is not positive.
        TypeError, ValueError: *callback* is not callable, *loop* not a loop, or destroyed.

    Doesn't switch greenlets. Works in any thread's hub.

    Source: pidfd_open(2), waitid(2).

    .. versionadded:: 0.1.0
    """
    _check(callback, loop)
    return _children.watch_any(pid, callback, loop, ref)


if config.disable_watch_children:

    def fork() -> int:
        """Fork without watching the child, because GEVENT_NOWAITPID is set: :func:`fork_gevent`.

        Returns:
            int: in the parent the child's pid, in the child 0.

        Raises:
            OSError: as fork(2).

        Doesn't switch greenlets. Works in any thread's hub.

        Source: fork(2); ``gevent.os.fork``.

        .. versionadded:: 0.1.0
        """
        return fork_gevent()

    def forkpty() -> tuple[int, int]:
        """Fork with a pseudo-terminal without watching the child, because GEVENT_NOWAITPID is set: :func:`forkpty_gevent`.

        Returns:
            (pid, fd): in the parent the child's pid and the master's descriptor; in the child 0 and -1.

        Raises:
            OSError: as forkpty(3).

        Doesn't switch greenlets. Works in any thread's hub.

        Source: forkpty(3); ``gevent.os.forkpty``.

        .. versionadded:: 0.1.0
        """
        return forkpty_gevent()

else:

    def fork(*args: Any, **kwargs: Any) -> int:  # type: ignore[misc]
        """Fork, and watch the child: :func:`fork_and_watch`, whose arguments it takes.

        With GEVENT_NOWAITPID in the environment when the module is imported, it takes none and doesn't watch.

        Returns:
            int: in the parent the child's pid, in the child 0.

        Raises:
            OSError: as fork(2).

        Doesn't switch greenlets. Works in any thread's hub.

        Source: fork(2); ``gevent.os.fork``.

        .. versionadded:: 0.1.0
        """
        return fork_and_watch(*args, **kwargs)

    def forkpty(*args: Any, **kwargs: Any) -> tuple[int, int]:  # type: ignore[misc]
        """Fork with a pseudo-terminal, and watch the child: :func:`forkpty_and_watch`, whose arguments it takes.

        With GEVENT_NOWAITPID in the environment when the module is imported, it takes none and doesn't watch.

        Returns:
            (pid, fd): in the parent the child's pid and the master's descriptor; in the child 0 and -1.

        Raises:
            OSError: as forkpty(3).

        Doesn't switch greenlets. Works in any thread's hub.

        Source: forkpty(3); ``gevent.os.forkpty``.

        .. versionadded:: 0.1.0
        """
        return forkpty_and_watch(*args, **kwargs)
