"""fork(2) and forkpty(3), and what a forked child keeps of its parent's greenlets.

The order of things, whoever forks:

    parent      the at-fork hooks, which may wait; `prepare`, the last of them
    fork(2)     in the child `coopos_in_child`, in the parent `coopos_in_parent`, both by pthread_atfork(3)
    child       the interpreter's own repairs; `revive`, the first of the hooks; the hooks of everybody else
    parent      `resume`, the first of the hooks; the hooks of everybody else

Rules:

1. One fork at a time in a thread: a hook that waits lets other greenlets run, and a fork of theirs waits for this one.
2. Between the last hook before the fork and the interpreter's own repairs in the child no Python code runs: another thread may have
   asked for the GIL, and there is no such thread in the child.
3. What may fail comes before the fork, or is told when its hooks are over: the interpreter is whole, and the exception has the pid.
4. A child that keeps no greenlets resumes none and frees none: a greenlet that is freed while parked runs its `finally:` blocks.
   They and what they refer to stay as the fork has found them.
5. A child that is going to exec runs no greenlet but its own: it has a new hub, with a loop of its own.

Two facts here are private to others: where a greenlet has its state (`check_greenlet`), and that the interpreter's lists of at-fork
hooks are Python lists (`put_first`). Each is checked before it is relied on. If one is not as we think, ``keep_greenlets=False``
raises NotImplementedError, and all else works.

The module knows `_children`, the hub and its loop, and greenlet's object structure (greenlet.h).
"""

cimport cython
from cpython.object cimport PyObject, PyObject_TypeCheck, PyTypeObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.errno cimport errno
from libc.signal cimport SIGCHLD
from posix.signal cimport sigaction, sigaction_t, sigaddset, sigemptyset, sigset_t
from posix.unistd cimport close as c_close, fork as c_fork

from coopos._children cimport Child, forget_parent, note_new, take_note
from coopos._parking cimport forget_calls, forget_other_threads, os_error, take_over
from coopos._posix cimport (
    DICT_OFFSET, SIG_BLOCK, SIG_SETMASK, WEAKREFS_OFFSET, PyGreenlet, PyOS_AfterFork_Child, PyOS_AfterFork_Parent, PyOS_BeforeFork,
    PySys_Audit, Py_Exit, coopos_bind_to, coopos_find, coopos_finds, coopos_hear_of_forks, coopos_import_greenlet,
    coopos_keep_for_good, coopos_leave, coopos_pending as pending, coopos_unblock_signals,
    forkpty as c_forkpty, pthread_sigmask, sigfillset, winsize)
from coopos._workers cimport ask_again

import atexit
import gc
import os
import sys
from contextvars import ContextVar

import greenlet as _greenlet_module
from gevent._config import config
from gevent._hub_local import get_hub_class, get_loop, set_hub, set_loop
from gevent.event import Event
from gevent.greenlet import Greenlet
from gevent.hub import Hub, MAIN_THREAD_IDENT as _MAIN_THREAD_IDENT, Waiter, _get_hub as get_hub_if_exists, reinit
from gevent.monkey import get_original
from greenlet import getcurrent, greenlet


# gevent.monkey, which may have come first, puts a greenlet's where we need a thread's.
_local, get_ident = get_original("_thread", ["_local", "get_ident"])

coopos_import_greenlet()


# ---- what is private to others -----------------------------------------------------------------------------------------------

cdef bint _knows_greenlet = False


def check_greenlet(kind):
    """Refuse keep_greenlets=False unless *kind*, greenlet's type, has the object structure of the greenlet.h we were compiled with.

    The type tells the offsets of all parts but one, a pointer. Whether that pointer makes a greenlet dead is tried on two new
    greenlets. https://github.com/python-greenlet/greenlet/blob/master/src/greenlet/greenlet.h
    """
    cdef PyGreenlet *a
    cdef PyGreenlet *b
    cdef bint is_state = False
    if (kind.__basicsize__, kind.__weakrefoffset__, kind.__dictoffset__) == (sizeof(PyGreenlet), WEAKREFS_OFFSET, DICT_OFFSET):
        ended, fresh = kind(int), kind(int)
        ended.switch()
        a, b = <PyGreenlet *>ended, <PyGreenlet *>fresh
        if a.pimpl != NULL and b.pimpl != NULL and a.pimpl != b.pimpl:
            a.pimpl, b.pimpl = b.pimpl, a.pimpl
            is_state = fresh.dead and not ended.dead
            a.pimpl, b.pimpl = b.pimpl, a.pimpl
    if not is_state:
        raise NotImplementedError(
            f"keep_greenlets=False: coopos doesn't know where greenlet {_greenlet_module.__version__} keeps a greenlet's state")


def put_first(*hooks):
    """Have the at-fork *hooks*, registered this moment, be the first in the interpreter's lists.

    In a child the first runs before all those that were registered earlier, which may use the hub; before a fork it runs last.
    There is no call for it, but the lists are objects like others: `before_forkers` and its like in
    https://github.com/python/cpython/blob/3.13/Modules/posixmodule.c. NotImplementedError, and nothing changed, if not each of the
    hooks is the last in exactly one list.
    """
    cdef list found = []
    cdef list lists
    referrers = [referrer for referrer in gc.get_referrers(*hooks) if type(referrer) is list]
    for hook in hooks:
        lists = [listed for listed in referrers if has(listed, hook)]
        if len(lists) == 1 and lists[0][len(lists[0]) - 1] is hook:
            found.append(lists[0])
    if len(found) < len(hooks):
        raise NotImplementedError(
            f"keep_greenlets=False: this coopos doesn't find where Python {sys.version.split()[0]} keeps at-fork hooks")
    for listed in found:
        listed.insert(0, listed.pop())


cdef bint has(list listed, hook) noexcept:
    for each in listed:
        if each is hook:
            return True
    return False


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
        was_told = error is None
        error = main.exception     # *error* is what came of telling it, if the child has destroyed its hub
        if was_told and error is not None and not isinstance(error, SystemExit):
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


cdef enum:
    KEEP = 0       # the child goes on with the parent's greenlets
    LEAVE = 1      # with the one that forks alone
    EXEC = 2       # it is going to execute a program


@cython.final
@cython.internal
cdef class Leaving:
    """The parent's greenlets, from before the fork until the child's hub works without them."""
    cdef object current
    cdef object hub
    cdef object loop           # the thread's
    cdef object main           # the thread's
    cdef object dead           # a greenlet that has ended
    cdef list objects          # that were found. Where the collector sees who refers to them: greenlet asks it when a thread ends
    cdef bint was_frozen
    cdef coopos_finds finds

    def __cinit__(self):
        """In the parent, when the at-fork hooks have run: the thread may have had no hub before, or another."""
        check_leaving()
        self.current = getcurrent()
        self.main = self.current
        while self.main.parent is not None:
            self.main = self.main.parent
        self.dead = greenlet(int)
        self.dead.switch()
        self.hub = get_hub_if_exists()
        if self.hub is not None:
            self.dead.parent = self.hub
            self.loop = self.hub.loop
        else:
            self.loop = get_loop()         # of a hub that was destroyed; the next one has it again
        self.finds.greenlet = <PyTypeObject *>greenlet
        self.finds.waiter = <PyTypeObject *>Waiter
        self.finds.hub_type = <PyTypeObject *>Hub
        self.finds.current = <PyGreenlet *>self.current
        self.finds.hub = <PyGreenlet *>self.hub if self.hub is not None else NULL
        self.finds.dead = <PyGreenlet *>self.dead
        if self.main is not self.current:
            self.finds.main = <PyObject *>self.main
        kind = config.loop if self.loop is None else type(self.loop)
        self.finds.loop = <PyTypeObject *>kind
        if self.loop is not None and not hasattr(self.loop, "_keepaliveset"):
            kind = self.loop.WatcherType
            self.finds.watcher = <PyTypeObject *>kind
        # What gc.freeze() has set aside the collector doesn't tell of: https://docs.python.org/3/library/gc.html#gc.freeze
        self.was_frozen = gc.get_freeze_count() > 0
        if self.was_frozen:
            gc.unfreeze()
        self.objects = []
        self.finds.objects = <PyObject *>self.objects
        coopos_find(&self.finds)

    cdef int empty_loops(self) except -1:
        """In the child, whose hub was re-initialised: nothing that the parent has asked a loop for happens here."""
        for each in self.objects:
            if isinstance(each, greenlet):
                continue
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


# ---- hooks of every fork -----------------------------------------------------------------------------------------------------

@cython.final
@cython.internal
cdef class Fork:
    """One call of this module: how it forks, and what has failed while it did."""
    cdef int mode
    cdef object failure


@cython.final
@cython.internal
cdef class Watching:
    """A call of something that forks, whose child is to be watched."""
    cdef object keeps          # the greenlets; or None, by the policy
    cdef dict notes            # {pid: Child}, the children to which something has happened before their fork was over


# {greenlet: the call of this module that it is in}
cdef dict _calls = {}
# {greenlet: how it watches what it forks}
cdef dict _watching = {}
#: What :func:`coopos.fork_policy` says in this context, if anything: whether children keep the parent's greenlets.
policy = ContextVar("coopos.keep_greenlets")
cdef bint _default_keeps = os.environ.get("COOPOS_KEEP_GREENLETS") != "0"
# Why no greenlet can be left behind, or None.
cdef object _disorder = None
# What is to run last of all before a fork, and in a child that has left the greenlets behind.
cdef list _last_hooks = []
cdef list _left_hooks = []


class _Turn(_local):
    """Whose fork of this thread is under way: a hook that waits lets other greenlets run, whose forks wait for that one.

    No lock of gevent's: a signal's handler that raises while Python code lets go of one would leave it locked for good.
    """

    def __init__(self):
        self.owner = None
        self.is_free = Event()


_turn = _Turn()


def set_default(bint keep_greenlets):
    """What a fork does that isn't told, where no policy holds."""
    global _default_keeps
    _default_keeps = keep_greenlets


cdef int check_leaving() except -1:
    """Refuse what can't be done: a child without the parent's greenlets."""
    global _knows_greenlet
    if _disorder is not None:
        raise NotImplementedError(_disorder)
    if not _knows_greenlet:
        check_greenlet(greenlet)
        _knows_greenlet = True
    if get_hub_if_exists() is getcurrent():
        raise RuntimeError("keep_greenlets=False: there is no greenlet to keep in a callback of the hub")
    return 0


cdef int mode_by_policy() except -1:
    cdef Watching watching = <Watching>_watching.get(getcurrent())
    if watching is not None and watching.keeps is not None:
        return KEEP if watching.keeps else LEAVE
    return KEEP if policy.get(_default_keeps) else LEAVE


cdef int mode_of(Fork call) except -1:
    """How to fork, for the hooks: told by our own call, or by the policy."""
    if call is not None:
        return call.mode
    try:
        caller = sys._getframe().f_code.co_name
    except ValueError:
        caller = None              # C code that forks, with no Python around it
    # Who calls _posixsubprocess.fork_exec(preexec_fn=...):
    # https://github.com/python/cpython/blob/3.13/Lib/subprocess.py
    return EXEC if caller == "_execute_child" else mode_by_policy()


def prepare():
    """Before a fork, whoever forks: the last of the at-fork hooks. What the others have done is to be left behind, too."""
    cdef Fork call = <Fork>_calls.get(getcurrent())
    cdef Leaving leaving
    cdef sigset_t all_signals
    end_pending()
    try:
        for hook in _last_hooks:
            hook()
        pending.mode = mode_of(call)
        if pending.mode == LEAVE:
            leaving = Leaving()
            Py_INCREF(leaving)
            pending.leaving = <PyObject *>leaving
            pending.finds = &leaving.finds
    except BaseException as ex:
        if call is None:
            # Nobody can hold this fork up: the interpreter prints what has failed. No greenlet runs that mustn't.
            pending.mode = KEEP if get_hub_if_exists() is getcurrent() else EXEC
            raise
        call.failure = ex
    finally:
        pending.is_prepared = True
        # A signal to a child whose loop is not re-initialised would be told to the parent's.
        sigfillset(&all_signals)
        pending.is_blocking = pthread_sigmask(SIG_BLOCK, &all_signals, &pending.signals) == 0


cdef int end_pending() except -1:
    cdef PyObject *leaving = pending.leaving
    pending.is_prepared = False
    pending.leaving = NULL
    pending.finds = NULL
    coopos_unblock_signals()
    Py_XDECREF(leaving)
    return 0


def resume():
    """In the parent, after a fork: the first of the at-fork hooks. What a child was to leave behind is not ours any more."""
    end_pending()


def revive():
    """In a forked child, whoever forked it: the first of the at-fork hooks."""
    revive_child()


cdef int revive_child() except -1:
    cdef Fork call = <Fork>_calls.get(getcurrent())
    cdef Leaving leaving = None
    cdef int mode
    try:
        forget_other_threads()
        forget_parent()
        if pending.is_prepared:
            mode = pending.mode
            if pending.leaving != NULL:
                leaving = <Leaving>pending.leaving
        else:
            # C code that calls PyOS_AfterFork_Child() alone, as uWSGI does.
            mode = mode_of(call)
            if mode == LEAVE:
                leaving = Leaving()
                coopos_leave(&leaving.finds)
        if mode == EXEC:
            take_new_hub()
        else:
            reinit_loop()
            take_over(mode == KEEP)
            ask_again()
        if leaving is not None:
            forget_calls(True)
            leaving.empty_loops()
            leaving.replace_main()
            for hook in _left_hooks:
                hook()
            if leaving.was_frozen:
                gc.freeze()
        if call is None:
            _turn.owner = None         # whoever that is, is in the parent
    except BaseException as ex:
        if call is None:
            raise                      # the interpreter prints it
        call.failure = ex
    finally:
        end_pending()                  # the hooks start threads and programs, and set masks of their own
    return 0


cdef int reinit_loop() except -1:
    reinit()
    hub = get_hub_if_exists()
    loop = get_loop() if hub is None else hub.loop
    if loop is None or not loop.ptr:
        return 0
    if hub is None:
        loop.reinit()              # of a hub that was destroyed
    if not hasattr(loop, "_keepaliveset"):
        # Where a thread of the parent had just told libev of something, libev still takes its loop for told, and hears of no thread
        # until something else ends its first wait: `async_pending` in http://cvs.schmorp.de/libev/ev.c
        timer = loop.timer(0.0)
        timer.start(timer.close)
    return 0


cdef int take_new_hub() except -1:
    """In a child that is going to exec. What its parent's loop would do isn't done here, in no hook that waits."""
    if get_hub_if_exists() is not None or get_loop() is not None:
        set_loop(None)
        set_hub(get_hub_class()(default=False))
    return 0


os.register_at_fork(before=prepare, after_in_child=revive, after_in_parent=resume)
try:
    put_first(prepare, revive, resume)
except NotImplementedError as ex:
    _disorder = str(ex)
if coopos_hear_of_forks():
    raise MemoryError


def call_when_left(hook):
    """Have *hook* called in every child that leaves its parent's greenlets behind."""
    _left_hooks.append(hook)


def call_last(hook):
    """Have *hook* called last of all before a fork, before its child's greenlets are looked for. It may wait."""
    _last_hooks.append(hook)


def keeping_sigchld(function, *args, **kwargs):
    """``function(*args)``. Afterwards SIGCHLD has the disposition that it had before; none is delivered in between."""
    cdef sigset_t only, mask
    cdef sigaction_t action
    sigemptyset(&only)
    sigaddset(&only, SIGCHLD)
    cdef bint is_blocking = pthread_sigmask(SIG_BLOCK, &only, &mask) == 0
    cdef bint is_known = sigaction(SIGCHLD, NULL, &action) == 0
    try:
        return function(*args, **kwargs)
    finally:
        if is_known:
            sigaction(SIGCHLD, &action, NULL)
        if is_blocking:
            pthread_sigmask(SIG_SETMASK, &mask, NULL)


# ---- fork --------------------------------------------------------------------------------------------------------------------

_hooks = []                    # to run in a child whose hub works


def register_hook(hook):
    """Have *hook* called in every child that this module forks, once its hub works."""
    _hooks.append(hook)


def fork_process(keep_greenlets=None, bint is_exec=False):
    """fork(2) with the interpreter's at-fork hooks; the pid in the parent, 0 in the child.

    *keep_greenlets*: by default as the policy says. *is_exec*: the child is going to exec, and has a hub of its own until then.
    """
    return fork_any(b"os.fork", keep_greenlets, is_exec, False, None)[0]


def forkpty_process(keep_greenlets=None, size=None):
    """forkpty(3) likewise, with a window of (rows, columns); (pid, the master's descriptor), in the child (0, -1)."""
    return fork_any(b"os.forkpty", keep_greenlets, False, True, size)


cdef tuple fork_any(const char *event, keep_greenlets, bint is_exec, bint has_pty, size):
    cdef winsize window
    cdef Fork call = Fork()
    if size is not None:
        window.ws_row, window.ws_col = size
        window.ws_xpixel = window.ws_ypixel = 0
    if is_exec:
        call.mode = EXEC
    else:
        call.mode = mode_by_policy() if keep_greenlets is None else KEEP if keep_greenlets else LEAVE
    if call.mode == LEAVE:
        check_leaving()
    PySys_Audit(event, NULL)
    if sys.version_info >= (3, 12) and sys.is_finalizing():
        raise RuntimeError("can't fork at interpreter shutdown")
    cdef int pid = -1
    cdef int master = -1
    current = getcurrent()
    before = _calls.get(current)       # a hook may fork
    turn = _turn
    owner = None
    try:
        while turn.owner is not None and turn.owner is not current and not turn.owner.dead:
            turn.is_free.clear()
            turn.is_free.wait()
        owner = turn.owner
        turn.owner = current
        try:
            _calls[current] = call
            fork_now(call, has_pty, NULL if size is None else &window, &pid, &master)
        finally:
            put_back(_calls, current, before)
            turn.owner = owner
            if owner is None:
                turn.is_free.set()
        return pid, master
    except BaseException as ex:
        if master >= 0:
            c_close(master)
        if pid > 0:
            ex.pid = pid               # or nobody would know whom to wait for
        raise


cdef int put_back(dict table, current, before) except -1:
    if before is None:
        if current in table:
            del table[current]
    else:
        table[current] = before
    return 0


cdef int fork_now(Fork call, bint has_pty, winsize *window, int *pid, int *master) except -1:
    cdef Child child = Child(0)
    cdef Watching watching
    cdef bint was_prepared
    cdef int err = 0
    PyOS_BeforeFork()
    # From here to AfterFork there is no way back into the interpreter's main loop: a starting thread that got the GIL in between
    # would wait for the forker's locks, and the forker for the GIL.
    was_prepared = pending.is_prepared
    if call.failure is None and was_prepared:
        pid[0] = c_forkpty(master, NULL, NULL, window) if has_pty else c_fork()
        err = errno
    if pid[0] == 0:
        PyOS_AfterFork_Child()
        if pending.is_prepared:
            revive_child()             # the hooks were skipped
        if call.failure is not None:
            raise call.failure
        if call.mode != EXEC:
            for hook in _hooks:
                hook()
        return 0
    if pid[0] > 0:
        # A hook that waits lets others collect any child that has ended.
        try:
            note_new(child, pid[0])
        except BaseException as ex:
            call.failure = ex
    PyOS_AfterFork_Parent()
    end_pending()                      # the hooks may have been skipped
    if call.failure is not None:
        raise call.failure
    if not was_prepared:
        raise MemoryError
    if pid[0] < 0:
        raise os_error(err, "forkpty" if has_pty else "fork", "")
    if take_note(child):
        watching = <Watching>_watching.get(getcurrent())
        if watching is not None:
            watching.notes[pid[0]] = child
    return 0


def fork_to_watch(fork, dict notes, keep_greenlets=None, **kwargs):
    """``fork(**kwargs)``. Into *notes* comes what watch_new() has to know, if anything: {pid: its Child}.

    *keep_greenlets*: the policy meanwhile, unless it is None.
    """
    cdef Watching watching = Watching()
    watching.keeps = keep_greenlets
    watching.notes = notes
    current = getcurrent()
    before = _watching.get(current)
    try:
        _watching[current] = watching
        return fork(**kwargs)
    finally:
        put_back(_watching, current, before)
