# fork(2) and forkpty(3), and the hooks of every fork, whoever makes it.
#
#     parent      the at-fork hooks, which may wait; prepare(), the last of them
#     fork(2)     in the child coopos_atfork_child(), in the parent coopos_atfork_parent(), both by pthread_atfork(3)
#     child       the interpreter's own repairs; revive(), the first of the hooks; everybody else's hooks
#     parent      resume(), the first of the hooks; everybody else's hooks
#
# 1. One fork at a time in a thread: a hook that waits lets other greenlets run, and their forks wait for this one.
# 2. No Python code runs between the last hook before the fork and the interpreter's own repairs in the child. Another thread may have
#    asked for the GIL, and that thread is not in the child.
# 3. What may fail comes before the fork, or is raised after its hooks are over: then the interpreter is whole, and the exception has
#    the pid.
# 4. A child that is going to exec runs no greenlet but its own, in a new hub with a loop of its own.

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
cdef dict _forks = {}
# {greenlet: how it watches what it forks}
cdef dict _watching = {}
#: What :func:`coopos.fork_policy` says in this context, if anything: whether children keep the parent's greenlets.
policy = ContextVar("coopos.keep_greenlets")
cdef bint _default_keeps = os.environ.get("COOPOS_KEEP_GREENLETS") != "0"
# What is to run last of all before a fork, and in a child that has left the greenlets behind.
cdef list _last_hooks = []
cdef list _left_hooks = []


class _Turn(_local):
    """Whose fork of this thread is under way: a hook that waits lets other greenlets run, whose forks wait for that one.

    No lock of gevent's: a signal's handler that raises while Python code lets go of one would leave it locked for good.
    """

    def __init__(self):
        self.owner = None
        self.is_free = _Event()


_turn = _Turn()


def set_default(bint keep_greenlets):
    """What a fork does that isn't told, where no policy holds."""
    global _default_keeps
    _default_keeps = keep_greenlets


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
    cdef Fork call = <Fork>_forks.get(getcurrent())
    cdef Leaving leaving
    cdef sigset_t all_signals
    end_pending()
    try:
        for hook in _last_hooks:
            hook()
        coopos_pending.mode = mode_of(call)
        if coopos_pending.mode == LEAVE:
            leaving = Leaving()
            Py_INCREF(leaving)
            coopos_pending.leaving = <PyObject *>leaving
            coopos_pending.search = &leaving.search
    except BaseException as ex:
        if call is None:
            # Nobody can hold this fork up: the interpreter prints what has failed. No greenlet runs that mustn't.
            coopos_pending.mode = KEEP if get_hub_if_exists() is getcurrent() else EXEC
            raise
        call.failure = ex
    finally:
        coopos_pending.is_prepared = True
        # A signal to a child whose loop is not re-initialised would be told to the parent's.
        sigfillset(&all_signals)
        coopos_pending.is_blocking = pthread_sigmask(SIG_BLOCK, &all_signals, &coopos_pending.signals) == 0


cdef int end_pending() except -1:
    cdef PyObject *leaving = coopos_pending.leaving
    coopos_pending.is_prepared = False
    coopos_pending.leaving = NULL
    coopos_pending.search = NULL
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
    cdef Fork call = <Fork>_forks.get(getcurrent())
    cdef Leaving leaving = None
    cdef int mode
    try:
        forget_other_threads()
        make_own_tables()
        if coopos_pending.is_prepared:
            mode = coopos_pending.mode
            if coopos_pending.leaving != NULL:
                leaving = <Leaving>coopos_pending.leaving
        else:
            # C code that calls PyOS_AfterFork_Child() alone, as uWSGI does.
            mode = mode_of(call)
            if mode == LEAVE:
                leaving = Leaving()
                coopos_leave_greenlets(&leaving.search)
        if mode == EXEC:
            take_new_hub()
        else:
            reinit_loop()
            take_over(mode == KEEP)
            ask_again()
        if leaving is not None:
            forget_calls(True)
            leaving.clear_loops()
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
    _leaving_error = str(ex)
if coopos_add_fork_handlers():
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
    before = _forks.get(current)       # a hook may fork
    turn = _turn
    owner = None
    try:
        while turn.owner is not None and turn.owner is not current and not turn.owner.dead:
            turn.is_free.clear()
            turn.is_free.wait()
        owner = turn.owner
        turn.owner = current
        try:
            _forks[current] = call
            fork_now(call, has_pty, NULL if size is None else &window, &pid, &master)
        finally:
            restore_entry(_forks, current, before)
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


cdef int restore_entry(dict table, current, before) except -1:
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
    was_prepared = coopos_pending.is_prepared
    if call.failure is None and was_prepared:
        pid[0] = c_forkpty(master, NULL, NULL, window) if has_pty else c_fork()
        err = errno
    if pid[0] == 0:
        PyOS_AfterFork_Child()
        if coopos_pending.is_prepared:
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
            add_forked(child, pid[0])
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
    if remove_forked(child):
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
        restore_entry(_watching, current, before)
