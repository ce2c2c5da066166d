"""fork(2) and forkpty(3), and what a forked child keeps of its parent's greenlets.

The order of things, in one place. In the parent: at-fork hooks (which may wait), fork, hooks. In the child: what `leave_greenlets`
does, the interpreter's own repairs, `revive` as the first of the at-fork hooks, the hooks of everybody else. Rules:

1. One fork at a time in a thread: a hook that waits lets other greenlets run, and a fork of theirs waits for this one.
2. Between fork(2) and the interpreter's own repairs no Python code runs: another thread may have asked for the GIL, and there is no
   such thread in the child.
3. A child that keeps no greenlets resumes none and frees none: a greenlet that is freed while parked runs its `finally:` blocks.
   They and what they refer to stay as the fork has found them.

The module knows `_children`, the hub and its loop, and greenlet's object structure.
"""

cimport cython
from cpython.object cimport PyObject, PyObject_TypeCheck, PyTypeObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport errno
from libc.stdlib cimport free
from posix.unistd cimport close as c_close, fork as c_fork

from coopos._children cimport forget_parent_loops, forget_parent, note_new, take_note
from coopos._parking cimport count_generation, os_error
from coopos._posix cimport (
    COOPOS_GREENLET_IS_ACTIVE, COOPOS_GREENLET_IS_MAIN, COOPOS_GREENLET_IS_STARTED, SIG_BLOCK, SIG_SETMASK,
    PyOS_AfterFork_Child, PyOS_AfterFork_Parent, PyOS_BeforeFork, PySys_Audit, Py_Exit, coopos_bind_to, coopos_find,
    coopos_finds, coopos_greenlet, coopos_greenlet_function, coopos_greenlet_is, coopos_keep_for_good, coopos_knows_lists,
    forkpty as c_forkpty, pthread_sigmask, sigfillset, sigset_t, winsize)

import atexit
import gc
import os
import sys

from gevent._config import config
from gevent._hub_local import get_loop
from gevent.greenlet import Greenlet
from gevent.hub import MAIN_THREAD_IDENT as _MAIN_THREAD_IDENT, Waiter, _get_hub as get_hub_if_exists, reinit
from gevent.lock import RLock
from gevent.monkey import get_original
from greenlet import getcurrent, greenlet


# gevent.monkey, which may have come first, puts a greenlet's where we need a thread's.
_local, get_ident = get_original("_thread", ["_local", "get_ident"])
cdef PyTypeObject *_greenlet_type = <PyTypeObject *>greenlet
cdef coopos_greenlet_is is_main = coopos_greenlet_function(COOPOS_GREENLET_IS_MAIN)
cdef coopos_greenlet_is is_active = coopos_greenlet_function(COOPOS_GREENLET_IS_ACTIVE)
cdef coopos_greenlet_is is_started = coopos_greenlet_function(COOPOS_GREENLET_IS_STARTED)
cdef bint _knows_lists = coopos_knows_lists(len(gc.get_objects()) + gc.get_freeze_count())
cdef bint _knows_greenlet = greenlet.__basicsize__ == sizeof(coopos_greenlet)


# ---- leaving the parent's greenlets behind -----------------------------------------------------------------------------------

def run_as_main(main):
    """What a greenlet of the child does that stands between the one that forked, *main*, and the parent's main greenlet.

    Where the hub reports to the program's main greenlet it reports to us: that the loop has nothing left to wait for, SystemExit.
    We tell *main*; with its end the process ends, as it does with that of a main greenlet.
    """
    go_on = main.switch
    args = ()
    while True:
        error = None
        try:
            go_on(*args)
        except BaseException as ex:
            error = ex
        if main.dead:
            break
        go_on, args = (main.switch, ()) if error is None else (main.throw, (error,))
    if isinstance(main, Greenlet):
        main.unlink_all()      # or it tells us once more, while the threads of the program are waited for
    if error is None:
        error = getattr(main, "exception", None)      # a gevent.Greenlet has told it already
        if error is not None and not isinstance(error, SystemExit):
            exit_process(1)
    exit_with(error)


cdef int exit_with(error) except -1:
    """End the process with what the main program has ended with."""
    if error is None:
        exit_process(0)
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        exit_process(1)
    code = error.code
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        exit_process(1)
    exit_process(0 if code is None else code & 0xff)


cdef int exit_process(int status) except -1:
    """End the process as after the main program, without going back to a frame of the parent's."""
    if get_ident() == _MAIN_THREAD_IDENT:
        Py_Exit(status)
    # The interpreter can't be taken down in a child that another thread has forked: CPython crashes.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass
    os._exit(status)


@cython.final
@cython.internal
cdef class Leaving:
    """The parent's greenlets, from before the fork until the child's hub works without them."""
    cdef object current
    cdef object hub
    cdef object loop           # the thread's
    cdef object main           # the thread's
    cdef object dead           # a greenlet that has ended
    cdef coopos_finds finds

    def __cinit__(self):
        """In the parent: what the interpreter is needed for."""
        if not _knows_greenlet:
            raise NotImplementedError("keep_greenlets=False: not with this version of greenlet")
        self.current = getcurrent()
        if get_hub_if_exists() is self.current:
            raise RuntimeError("keep_greenlets=False: there is no greenlet to keep in a callback of the hub")
        self.main = self.current
        while self.main.parent is not None:
            self.main = self.main.parent
        self.dead = greenlet(int)
        self.dead.switch()
        self.finds.greenlet = _greenlet_type
        self.finds.waiter = <PyTypeObject *>Waiter
        if self.main is not self.current:
            self.finds.main = <PyObject *>self.main

    cdef int look_for_hub(self) except -1:
        """In the parent, when the at-fork hooks have run: the thread may have had no hub before, or another."""
        self.hub = get_hub_if_exists()
        if self.hub is not None:
            self.dead.parent = self.hub
            self.loop = self.hub.loop
        else:
            self.loop = get_loop()         # of a hub that was destroyed; the next one has it again
        kind = config.loop if self.loop is None else type(self.loop)
        self.finds.loop = <PyTypeObject *>kind
        if self.loop is not None and not hasattr(self.loop, "_keepaliveset"):
            kind = self.loop.WatcherType
            self.finds.watcher = <PyTypeObject *>kind
        return 0

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.finds.n):
            Py_DECREF(<object>self.finds.objects[i])
        free(self.finds.objects)

    cdef int leave(self) except -1:
        """In the child, first of all: from here on no greenlet of the parent can be resumed.

        Each takes the state of one that has ended: it is dead for whoever looks at it, switches to it or throws into it. What it
        had, its parked frames above all, is nobody's, and never freed. The garbage collector must not count what the shared state
        refers to several times.
        """
        cdef Py_ssize_t i
        cdef coopos_greenlet *each
        coopos_find(&self.finds, _knows_lists)
        coopos_keep_for_good(<PyObject *>self.dead)
        for i in range(self.finds.n):
            each = <coopos_greenlet *>self.finds.objects[i]
            if PyObject_TypeCheck(<object>self.finds.objects[i], _greenlet_type) and not (
                    <PyObject *>each == <PyObject *>self.current or <PyObject *>each == <PyObject *>self.hub):
                if is_active(each):
                    coopos_keep_for_good(<PyObject *>each)
                    if not is_main(each):
                        each.state = (<coopos_greenlet *>self.dead).state
                elif not is_started(each):
                    Py_INCREF(<object>each)        # known to the collector: who starts it here has it left behind in a fork
        return 0

    cdef int empty_loops(self) except -1:
        """In the child, whose hub was re-initialised: nothing that the parent has asked a loop for happens here."""
        cdef Py_ssize_t i
        for i in range(self.finds.n):
            if PyObject_TypeCheck(<object>self.finds.objects[i], _greenlet_type):
                continue
            each = <object>self.finds.objects[i]
            if self.finds.watcher != NULL and PyObject_TypeCheck(each, self.finds.watcher):
                self.stop(each)
            elif self.finds.loop != NULL and PyObject_TypeCheck(each, self.finds.loop):
                if each is not self.loop:
                    close_loop(each)
            elif isinstance(each, Waiter):
                if each.greenlet is self.main:
                    each.clear()
            else:
                coopos_bind_to(<PyObject *>each, <PyObject *>self.dead)
        loop = self.loop
        if loop is None or not loop.ptr:
            return 0
        if self.hub is None:
            loop.reinit()
        for callback in list(loop._callbacks):
            callback.stop()
        if hasattr(loop, "_keepaliveset"):
            own = {loop._threadsafe_async, *[watcher._async for watcher in loop._fork_watchers]}
            for watcher in loop._keepaliveset - own:
                self.stop(watcher)
        return 0

    cdef int stop(self, watcher) except -1:
        """Stop a watcher of this thread's loop, unless it is there to run in a forked child."""
        loop = self.loop
        if watcher.loop is not loop or type(watcher).__name__ == "fork":
            return 0
        for part in list(getattr(watcher, "_multiplex_watchers", ())):
            part.stop()
        if type(watcher).__name__ == "async_" and hasattr(loop, "_keepaliveset"):
            watcher.close()        # libuv's goes on telling of itself when it is stopped
        elif watcher.active or watcher.pending:
            watcher.stop()
        return 0

    cdef int replace_main(self) except -1:
        """In the child of a greenlet that is not its thread's main one: it takes that one's place."""
        if self.main is self.current:
            return 0
        stand_in = greenlet(run_as_main, self.main)
        stand_in.switch(self.current)
        if self.hub is not None:
            self.hub.parent = stand_in
        if isinstance(self.current, Greenlet):
            self.current.unlink_all()      # who wanted to know of its end is in the parent
            self.current.rawlink(lambda ended: stand_in.switch())      # its parent has to be the hub
        else:
            self.current.parent = stand_in
        return 0


cdef int close_loop(loop) except -1:
    """The loop of a thread that is not there: close its epoll descriptor, which holds others' files open.

    Not more. The thread may have been anywhere in its loop's code when it was forked away, and what it has left there isn't to be
    walked through. Once: a fork of the child doesn't find the loop again, whose number may be another file's by then.
    """
    if not loop.ptr:
        return 0
    fd = loop.fileno()
    coopos_keep_for_good(<PyObject *>loop)
    if hasattr(loop, "_keepaliveset"):
        loop._ptr = None
    if fd is not None and fd >= 0:
        c_close(fd)
    return 0


# ---- fork --------------------------------------------------------------------------------------------------------------------

class _Turn(_local):
    """The lock of a thread's forks: a hook that waits lets other greenlets run, whose forks wait for this one."""

    def __init__(self):
        self.lock = RLock()
        self.leaving = []          # what the forks under way leave, the innermost first: a hook may fork


_turn = _Turn()
_hooks = []                    # to run in a child whose hub works
# In a forked child, until its hub works.
cdef bint _is_reviving = False
cdef object _failure = None
# What fork_now() has blocked in the child, and the signal mask to go back to.
cdef bint _is_blocking = False
cdef sigset_t _signals


def prepare():
    """Before a fork, the last of the hooks: what they have done is to be left behind, too."""
    cdef Leaving leaving = _turn.leaving[0] if _turn.leaving else None      # another's fork, or one that leaves nothing
    if leaving is not None:
        leaving.look_for_hub()


cdef int unblock_signals() except -1:
    global _is_blocking
    if _is_blocking:
        _is_blocking = False
        pthread_sigmask(SIG_SETMASK, &_signals, NULL)
    return 0


def revive():
    """In a forked child, by whoever it was forked: the first of the at-fork hooks."""
    global _is_reviving, _failure
    cdef Leaving leaving
    count_generation()
    forget_parent()
    if not _is_reviving:
        unblock_signals()
        return
    _is_reviving = False
    try:
        reinit()
        forget_parent_loops()
        leaving = _turn.leaving[0]
        if leaving is not None:
            leaving.empty_loops()
            leaving.replace_main()
    except BaseException as ex:
        _failure = ex          # the interpreter would print it and go on
    finally:
        unblock_signals()      # the hooks start threads and programs, and set masks of their own


def put_first(hook):
    """Have the at-fork hook *hook*, registered this moment, be the first in the list.

    In a child it runs before all those that were registered earlier: they may use the hub. Before a fork it runs after them. The
    interpreter has no call for it, but its list of hooks is an object like others.
    """
    for hooks in gc.get_referrers(hook):
        if type(hooks) is list and hook in hooks:
            hooks.remove(hook)
            hooks.insert(0, hook)


os.register_at_fork(before=prepare, after_in_child=revive)
put_first(prepare)
put_first(revive)


def register_hook(hook):
    """Have *hook* called in every child that this module forks, once its hub works."""
    _hooks.append(hook)


def fork_process(bint keep_greenlets=True, bint is_plain=False):
    """fork(2) with the interpreter's at-fork hooks; the pid in the parent, 0 in the child."""
    return fork_any(b"os.fork", keep_greenlets, is_plain, False, None)[0]


def forkpty_process(bint keep_greenlets=True, size=None):
    """forkpty(3) likewise, with a window of (rows, columns); (pid, the master's descriptor), in the child (0, -1)."""
    return fork_any(b"os.forkpty", keep_greenlets, False, True, size)


cdef tuple fork_any(const char *event, bint keep_greenlets, bint is_plain, bint has_pty, size):
    """*is_plain*: the child's hub is not looked at; it is going to exec."""
    cdef winsize window
    if size is not None:
        window.ws_row, window.ws_col = size
        window.ws_xpixel = window.ws_ypixel = 0
    leaving = None if keep_greenlets else Leaving()
    PySys_Audit(event, NULL)
    if sys.version_info >= (3, 12) and sys.is_finalizing():
        raise RuntimeError("can't fork at interpreter shutdown")
    lock = _turn.lock
    lock.acquire()
    try:
        return fork_now(is_plain, leaving, has_pty, NULL if size is None else &window)
    finally:
        lock.release()


cdef tuple fork_now(bint is_plain, Leaving leaving, bint has_pty, winsize *window):
    global _is_reviving, _failure, _is_blocking, _signals
    cdef int pid, err
    cdef int master = -1
    cdef sigset_t all_signals, signals
    sigfillset(&all_signals)
    _turn.leaving.insert(0, leaving)
    PyOS_BeforeFork()
    # From here to AfterFork there is no way back into the interpreter's main loop: a starting thread that got the GIL in between
    # would wait for the forker's locks, and the forker for the GIL.
    #
    # A signal to a child whose loop is not re-initialised would be told to the parent's.
    pthread_sigmask(SIG_BLOCK, &all_signals, &signals)
    pid = c_forkpty(&master, NULL, NULL, window) if has_pty else c_fork()
    err = errno
    if pid != 0:
        pthread_sigmask(SIG_SETMASK, &signals, NULL)
        # A hook that waits lets others collect any child that has ended.
        note = note_new(pid) if pid > 0 else None
        PyOS_AfterFork_Parent()
        _turn.leaving.pop(0)
        take_note(note)
        if pid < 0:
            raise os_error(err, "forkpty" if has_pty else "fork", "")
        return pid, master
    try:
        if leaving is not None:
            leaving.leave()
    except BaseException as ex:
        _failure = ex
    _is_reviving = not is_plain
    _is_blocking = True
    _signals = signals
    PyOS_AfterFork_Child()
    unblock_signals()
    _turn.leaving.pop(0)
    failure, _failure = _failure, None
    if failure is not None:
        raise failure
    if not is_plain:
        for hook in _hooks:
            hook()
    return 0, -1
