"""Locks, queues and processes of multiprocessing under :func:`coopos.patch`. POSIX only.

`_multiprocessing` puts these functions in place; its rules hold here. Each does what the stdlib's function of that name does, and
differs where a greenlet may be killed or timed out in the middle: then no lock is lost, no place in a queue is taken, and a child
that failed to start doesn't go on with the parent's program. The worker of a pool comes to an end when it is told to.
"""

from __future__ import annotations

import functools
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from contextlib import nullcontext, suppress
from errno import ECHILD
from queue import Full
from select import PIPE_BUF
from typing import TYPE_CHECKING, Any

from coopos import _core, io as coopos_io
from coopos._patch import _connections

if TYPE_CHECKING:
    from collections.abc import Callable


_QUEUES, _PICKLER = "multiprocessing.queues", "multiprocessing.reduction"
_SCALARS = frozenset((int, float, bool, str, bytes, type(None)))
#: So long a pool's worker that was terminated has for its own SIGTERM handler.
GRACE_S = 2.0


# ---- locks -------------------------------------------------------------------------------------------------------------------


def make_semlock(plain: Any) -> type:
    class SemLock(_core.Semaphore):
        """``_multiprocessing.SemLock``, which owns and waits greenlet by greenlet."""

        __slots__ = ()

        SEM_VALUE_MAX = plain.SEM_VALUE_MAX

        def __new__(cls, *args: Any, **kwargs: Any) -> SemLock:
            return super().__new__(cls, plain(*args, **kwargs))  # type: ignore[no-any-return]

        @classmethod
        def _rebuild(cls, *state: Any) -> SemLock:
            return super().__new__(cls, plain._rebuild(*state))  # type: ignore[no-any-return]

    return SemLock


def wait_for_condition(condition: Any, timeout: float | None = None) -> bool:
    """``Condition.wait``. An exception that is thrown in comes out only once the lock is held again."""
    lock = condition._lock
    assert lock._semlock._is_mine(), "must acquire() condition before using wait()"
    condition._sleeping_count.release()
    count = lock._semlock._count()
    for _ in range(count):
        lock.release()
    thrown = None
    is_notified = False
    try:
        is_notified = condition._wait_semaphore.acquire(True, timeout)
    except BaseException as ex:
        thrown = ex
    condition._woken_count.release()
    try:
        if isinstance(lock._semlock, _core.Semaphore):
            lock._semlock.take_back(count, thrown)
        else:  # made before the patch: a thread's lock, so nothing is thrown in while it waits
            for _ in range(count):
                lock.acquire()
    finally:
        thrown = None
    return is_notified


def notify_condition(condition: Any, n: int = 1) -> None:
    """``Condition.notify``. If an exception comes out, a waiter that has not woken yet sleeps on, and counts as asleep."""
    sleeping, woken, gate = condition._sleeping_count, condition._woken_count, condition._wait_semaphore
    assert condition._lock._semlock._is_mine(), "lock is not owned"
    assert not gate.acquire(False), "notify: Should not have been able to acquire _wait_semaphore"
    while woken.acquire(False):
        res = sleeping.acquire(False)
        assert res, "notify: Bug in sleeping_count.acquire- res should not be False"
    notified = 0
    while notified < n and sleeping.acquire(False):
        gate.release()
        notified += 1
    if notified:
        try:
            while notified:
                woken.acquire()
                notified -= 1
        finally:
            while gate.acquire(False):
                pass
            for _ in range(notified):
                sleeping.release()


# ---- queues ------------------------------------------------------------------------------------------------------------------


class NotEmpty(threading.Condition):
    """The :class:`threading.Condition` of a queue, in which its feeder waits for the next object."""

    def __init__(self, lock: Any) -> None:
        super().__init__(lock)
        # The stdlib's tries to take the lock. A gevent lock that can't be taken gives the hub a turn, in each wait() and notify().
        self._is_owned = lock.locked

    def is_waited_for(self) -> bool:
        return bool(self._waiters)  # type: ignore[attr-defined]


def _is_small(obj: Any, depth: int = 3) -> bool:
    """Whether *obj* is soon pickled, and no code of the program takes part in that: it may wait, or fail."""
    kind = type(obj)
    if kind in _SCALARS:
        return kind not in (str, bytes) or len(obj) <= PIPE_BUF
    if not (kind in (tuple, list, dict) and depth and len(obj) <= 16):
        return False
    for one in (*obj, *obj.values()) if kind is dict else obj:
        if not _is_small(one, depth - 1):
            return False
    return True


def _message_at_once(queue: Any, obj: Any) -> bytes | None:
    """What to send for *obj* at once. None: the feeder is to send it, which has others before it, or may have to wait."""
    if queue._buffer or not (isinstance(queue._notempty, NotEmpty) and queue._notempty.is_waited_for()):
        return None
    is_ours = isinstance(getattr(queue._wlock, "_semlock", None), _core.Semaphore)
    if not (is_ours and sys.modules[_QUEUES]._ForkingPickler is sys.modules[_PICKLER].ForkingPickler and _is_small(obj)):
        return None
    return _connections.message_at_once(queue._writer, pickle.dumps(obj))


def put(queue: Any, obj: Any, block: bool = True, timeout: float | None = None) -> None:
    """``Queue.put`` and ``JoinableQueue.put``. If an exception comes out, the object takes no place in the queue.

    A small object is sent at once if the feeder waits for one: to wake the feeder takes longer than all the rest.
    """
    if queue._closed:
        raise ValueError(f"Queue {queue!r} is closed")
    if not queue._sem.acquire(block, timeout):
        raise Full
    is_joinable = hasattr(queue, "_unfinished_tasks")
    is_placed = False
    try:
        with queue._notempty, queue._cond if is_joinable else nullcontext():
            if queue._thread is None:
                queue._start_thread()
            message = _message_at_once(queue, obj)
            # If a signal handler raises from here on, nobody can tell whether the object was placed. So it counts as placed.
            is_placed = True
            if is_joinable:
                queue._unfinished_tasks.release()
            if message is None or not queue._wlock._semlock.write_at_once(queue._writer.fileno(), message):
                queue._buffer.append(obj)
                queue._notempty.notify()
    except BaseException:
        if not is_placed:
            queue._sem.release()
        raise


# ---- processes ---------------------------------------------------------------------------------------------------------------


def poll(popen: Any, flag: int = os.WNOHANG) -> int | None:
    """``popen_fork.Popen.poll``, which takes ECHILD and no other OSError for a child that is not there."""
    if popen.returncode is None:
        try:
            pid, status = os.waitpid(popen.pid, flag)
        except ChildProcessError as ex:
            if ex.errno != ECHILD:
                raise
        else:
            if pid == popen.pid:
                popen.returncode = os.waitstatus_to_exitcode(status)
    return popen.returncode


def poll_fork_server(popen: Any, flag: int = os.WNOHANG) -> int | None:
    """``popen_forkserver.Popen.poll``. The server sends the exit status once, so of several greenlets that wait one reads it."""
    from multiprocessing.connection import wait
    from multiprocessing.forkserver import SIGNED_STRUCT

    if popen.returncode is None:
        has_ended = wait([popen.sentinel], 0 if flag == os.WNOHANG else None)
        if has_ended and popen.returncode is None:
            try:
                (popen.returncode,) = SIGNED_STRUCT.unpack(os.read(popen.sentinel, SIGNED_STRUCT.size))
            except (OSError, struct.error):  # the server was killed
                popen.returncode = 255
    return popen.returncode


def forking_by(fork: Callable[..., int]) -> Callable[[], int]:
    """os.fork for a Process. If it fails in the child, the child ends: it must not go on with the parent's program.

    The child has no wake-up descriptor: through the inherited one the parent would hear of the child's signals as its own.
    """

    def fork_process() -> int:
        parent = os.getpid()
        try:
            pid = fork(keep_greenlets=False)
            if pid == 0:
                signal.set_wakeup_fd(-1)
            return pid
        except BaseException:
            if os.getpid() == parent:
                raise
            traceback.print_exc()
            os._exit(1)

    return fork_process


# ---- the end of a pool's workers ---------------------------------------------------------------------------------------------

# A forked worker inherits the SIGTERM handler of a server. gunicorn's and Celery's set a flag and return. Nobody in the worker
# looks at the flag, so the stdlib waits for such a worker until its task is over, and for one that waits for a task for ever. We
# change no handler: docs/reference/multiprocessing.rst has the reasons. The workers that wait for a task are told to end. Those
# that are still there after GRACE_S are killed.


def dismissing_workers(help_stuff_finish: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``Pool._help_stuff_finish``. It keeps the lock that workers take to get a task, so that none takes one any more.

    Once the feeder has ended, each worker is told that there is no task, and the lock is released. Until then nobody is terminated:
    a worker that is ended while it writes a result keeps the lock of the results, which the feeder needs for its sentinel.
    """

    @functools.wraps(help_stuff_finish)
    def help_and_dismiss(tasks: Any, feeder: Any, size: int) -> None:
        help_stuff_finish(tasks, feeder, size)
        deadline = time.monotonic() + GRACE_S
        while feeder.is_alive() and threading.current_thread() is not feeder and time.monotonic() < deadline:
            if tasks._reader.poll():
                tasks._reader.recv_bytes()
            else:
                feeder.join(0.001)
        if feeder.is_alive():
            return
        while tasks._reader.poll():
            tasks._reader.recv_bytes()
        for _ in range(size):
            tasks.put(None)
        tasks._rlock.release()

    return help_and_dismiss


def reading_on(handle_results: Callable[..., None], terminate: str) -> Callable[..., None]:
    """Wrap ``Pool._handle_results``: in a pool whose state is *terminate* it reads until both sentinels have come, the feeder's and
    that of ``terminate()``, and no further.

    The stdlib's stops where there is nothing to read for a moment. If a worker then begins to write a result that doesn't fit into
    the pipe, it keeps the queue's lock for ever, and ``terminate()`` waits for that lock to put its sentinel. What comes behind the
    sentinels may have no end: its worker was terminated.
    """

    @functools.wraps(handle_results)
    def handle(results: Any, get: Callable[[], Any], cache: Any) -> None:
        sentinels = 0

        def get_until_told() -> Any:
            nonlocal sentinels
            if sentinels == 2:
                raise EOFError
            task = get()
            sentinels += task is None
            return task

        handle_results(results, get_until_told, cache)
        with suppress(OSError, EOFError):
            while hasattr(results, "_reader") and threading.current_thread()._state == terminate:  # type: ignore[attr-defined]
                get_until_told()

    return handle


def noting_workers(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``popen_fork.Popen.__init__``: after the start a Process doesn't have its target any more."""

    @functools.wraps(init)
    def note(popen: Any, process: Any) -> None:
        target = getattr(process, "_target", None)
        popen._coopos_is_worker = getattr(target, "__module__", None) in ("multiprocessing.pool", "concurrent.futures.process")
        init(popen, process)

    return note


def terminate(popen: Any) -> None:
    """``popen_fork.Popen.terminate``. A pool's worker has GRACE_S from the first call on."""
    popen._send_signal(signal.SIGTERM)
    if getattr(popen, "_coopos_is_worker", False) and not hasattr(popen, "_coopos_killed_at"):
        popen._coopos_killed_at = time.monotonic() + GRACE_S


def killing_late_workers(wait: Callable[..., int | None]) -> Callable[..., int | None]:
    """Wrap ``popen_fork.Popen.wait``. Who waits without a timeout kills a worker whose GRACE_S is over."""

    @functools.wraps(wait)
    def wait_or_kill(popen: Any, timeout: float | None = None) -> int | None:
        killed_at = getattr(popen, "_coopos_killed_at", None)
        if timeout is None and killed_at is not None and wait(popen, max(0.0, killed_at - time.monotonic())) is None:
            popen.kill()
        return wait(popen, timeout)

    return wait_or_kill


# ---- the fork server ---------------------------------------------------------------------------------------------------------


class ServerSocket(socket.socket):
    """The socket that the fork server listens at, in blocking mode once it does."""

    def listen(self, *args: Any) -> None:
        super().listen(*args)
        os.set_blocking(self.fileno(), True)


def open_file(fd: int, mode: str, closefd: bool = True) -> Any:
    return coopos_io.fdopen(fd, mode, closefd=closefd)
