# fork(2) and forkpty(3), and the at-fork hooks of this module, which run in every fork of the process. The order:
#
#     parent      all other hooks, which may wait; prepare() last
#     fork(2)     in the child coopos_atfork_child(), in the parent coopos_atfork_parent(), both by pthread_atfork(3)
#     child       PyOS_AfterFork_Child(): the interpreter's own repairs; revive() first; all other hooks
#     parent      PyOS_AfterFork_Parent(): resume() first; all other hooks
#
# 1. One fork at a time in a thread: a hook that waits lets other greenlets run, and their forks wait for this one.
# 2. No Python code runs between prepare() and the interpreter's repairs in the child: another thread may have asked for the GIL,
#    and that thread does not exist in the child.
# 3. An error before the fork prevents it. A later error is raised after all hooks, when the interpreter is consistent again. The
#    exception has the pid as an attribute then.
# 4. A child that is going to exec runs only the greenlet that forked, in a new hub with a new loop.

# ---- hooks of every fork -----------------------------------------------------------------------------------------------------

@cython.final
@cython.internal
cdef class Fork:
    """One fork by a function of this module: its mode, and the exception that it has to raise when the hooks are over."""
    cdef int mode
    cdef object failure
    cdef object run            # what a child that is going to exec calls, to do so
    cdef unsigned long thread  # the number of the one that forks
    cdef object is_over        # an event that the thread's other forks wait for, or None


@cython.final
@cython.internal
cdef class Watching:
    """One call of fork_to_watch(): how its child is to be forked and watched."""
    cdef object keeps          # whether the child keeps the greenlets; None: by the policy
    cdef dict notes            # {pid: Child}, children that others collected or watched while at-fork hooks ran


# {greenlet: the Fork that it is in}
cdef dict _forks = {}
# {greenlet: the Watching that it is in}
cdef dict _watching = {}
#: Whether children keep the parent's greenlets, as :func:`coopos.fork_policy` says in this context. It may be unset.
policy = PyContextVar_New("coopos.keep_greenlets", NULL)
cdef bint _default_keeps = _settings.KEEP_GREENLETS
# The hooks of call_last() and of call_when_left().
cdef list _last_hooks = []
cdef list _left_hooks = []


def set_default(bint keep_greenlets):
    """Set whether children keep the greenlets if neither the call nor a policy says so."""
    global _default_keeps
    _default_keeps = keep_greenlets


cdef int mode_by_policy() except -1:
    cdef Watching watching = <Watching>_watching.get(getcurrent())
    if watching is not None and watching.keeps is not None:
        return KEEP if watching.keeps else LEAVE
    return KEEP if policy.get(_default_keeps) else LEAVE


cdef int mode_of(Fork call) except -1:
    """How to fork: as *call*, a fork of this module, says. None: other code forks, and the policy decides."""
    if call is not None:
        return call.mode
    try:
        caller = sys._getframe().f_code.co_name
    except ValueError:
        caller = None              # C code forks, and no Python code has called it
    # subprocess calls _posixsubprocess.fork_exec(preexec_fn=...) there:
    # https://github.com/python/cpython/blob/3.13/Lib/subprocess.py
    return EXEC if caller == "_execute_child" else mode_by_policy()


def prepare():
    """Before every fork. The last of the at-fork hooks, so that greenlets which the other hooks start are left behind too."""
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
            # Other code forks, and a hook can't prevent that: the interpreter only prints the exception. With a new hub, as for
            # EXEC, the child at least runs none of the parent's greenlets. The hub itself can't be replaced while it forks.
            coopos_pending.mode = KEEP if get_hub_if_exists() is getcurrent() else EXEC
            raise
        call.failure = ex
    finally:
        coopos_pending.is_prepared = True
        # Until the child has its own loop, a signal in the child would be written to the descriptors of the parent's loop.
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
    """In the parent, after every fork: the first of the at-fork hooks. Frees what prepare() made."""
    end_pending()


def revive():
    """In every forked child: the first of the at-fork hooks."""
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
            # C code that calls PyOS_AfterFork_Child() but not PyOS_BeforeFork(), as uWSGI does:
            # https://github.com/unbit/uwsgi/blob/master/plugins/python/python_plugin.c
            mode = mode_of(call)
            if mode == LEAVE:
                leaving = Leaving()
                coopos_leave_greenlets(&leaving.search)
        if mode == EXEC:
            take_new_hub()
        else:
            reinit_loop()
            remake_sets_in_child(mode == KEEP)
            ask_again()
        if leaving is not None:
            forget_calls(True)
            leaving.clear_loops()
            leaving.replace_main()
            for hook in _left_hooks:
                hook()
            if leaving.was_frozen:
                gc.freeze()
        if len(_forks) > (call is not None):
            forget_forks(call, mode == KEEP)
    except BaseException as ex:
        if call is None:
            raise                      # the interpreter prints the exception
        call.failure = ex
    finally:
        end_pending()                  # unblocks signals: the other hooks may start threads and programs, which inherit the mask
    return 0


cdef int forget_forks(Fork call, bint keeps_greenlets) except -1:
    """In a forked child, which *call* has made: take out the forks of greenlets that don't exist here."""
    cdef Fork other
    for greenlet in list(_forks):
        other = <Fork>_forks[greenlet]
        if other is not call and not (keeps_greenlets and other.thread == get_ident()):
            del _forks[greenlet]
    return 0


cdef int reinit_loop() except -1:
    reinit()
    hub = get_hub_if_exists()
    loop = get_loop() if hub is None else hub.loop
    if loop is None or not loop.ptr:
        return 0
    if hub is None:
        loop.reinit()              # the loop that a destroyed hub left
    if not hasattr(loop, "_keepaliveset"):
        # If a thread of the parent had just sent an async event, libev's `async_pending` is still set in the child, and libev drops
        # all async events until something else ends its first wait. The timer does. http://cvs.schmorp.de/libev/ev.c
        timer = loop.timer(0.0)
        timer.start(timer.close)
    return 0


cdef int take_new_hub() except -1:
    """In a child that is going to exec: the hooks that wait run in a new hub, so that nothing of the parent's loop runs."""
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
    """Have ``hook()`` called in every child that has left its parent's greenlets behind."""
    _left_hooks.append(hook)


def call_last(hook):
    """Have ``hook()`` called before every fork, after all at-fork hooks and before the greenlets are searched for. It may wait."""
    _last_hooks.append(hook)


def keeping_sigchld(function, *args, **kwargs):
    """``function(*args, **kwargs)``, and restore the disposition of SIGCHLD. SIGCHLD is blocked meanwhile."""
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

_hooks = []                    # of register_hook()


def register_hook(hook):
    """Have ``hook()`` called in every child that this module forks, except those that are going to exec, once the hub works."""
    _hooks.append(hook)


def fork_process(keep_greenlets=None, bint is_exec=False, run=None):
    """fork(2) with the interpreter's at-fork hooks. Returns the pid in the parent, 0 in the child.

    *keep_greenlets*: None: as the policy says. *is_exec*: the child is going to exec, and has a new hub until then. Where it can't
    get that far it ends with 127. *run*: called in that child, which doesn't return from here.
    """
    return fork_any(b"os.fork", keep_greenlets, is_exec, False, None, run)[0]


def forkpty_process(keep_greenlets=None, size=None):
    """forkpty(3) likewise. *size*: (rows, columns) of the terminal. Returns (pid, master descriptor), in the child (0, -1)."""
    return fork_any(b"os.forkpty", keep_greenlets, False, True, size, None)


def window_size(size):
    """(rows, columns), as *size* has them; what is wrong with it is in the exception."""
    if isinstance(size, (str, bytes)) or not hasattr(size, "__iter__"):
        raise TypeError(f"winsize must be (rows, columns), not {size!r}")
    numbers = tuple(size)
    if len(numbers) != 2:
        raise ValueError(f"winsize must be (rows, columns), not {size!r}")
    for number in numbers:
        if not hasattr(number, "__index__"):
            raise TypeError(f"winsize must be two integers, not {size!r}")
        if not 0 <= number <= 0xFFFF:
            raise OverflowError(f"winsize must be two integers from 0 to 65535, not {size!r}")
    return numbers


cdef tuple fork_any(const char *event, keep_greenlets, bint is_exec, bint has_pty, size, run):
    cdef winsize window
    cdef Fork call = Fork()
    call.run = run
    if size is not None:
        window.ws_row, window.ws_col = window_size(size)
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
    call.thread = get_ident()
    try:
        if _forks:
            wait_for_forks(current, call.thread)
        try:
            _forks[current] = call
            fork_now(call, has_pty, NULL if size is None else &window, &pid, &master)
        finally:
            restore_entry(_forks, current, before)
            if call.is_over is not None:
                call.is_over.set()
        return pid, master
    except BaseException as ex:
        if master >= 0:
            c_close(master)
        if pid > 0:
            ex.pid = pid               # so that the caller can wait for the child
        raise


cdef int wait_for_forks(current, unsigned long thread) except -1:
    """Wait until no other greenlet of this thread is forking. *thread*: its number.

    Not by a lock of gevent's: if a signal handler raised inside its release(), which is Python code, it would stay locked forever.
    """
    cdef Fork other
    cdef bint is_free = False
    while not is_free:
        is_free = True
        for greenlet in list(_forks):
            other = <Fork>_forks.get(greenlet)
            if other is not None and other.thread == thread and greenlet is not current and not greenlet.dead:
                if other.is_over is None:
                    other.is_over = _Event()
                other.is_over.wait()
                is_free = False
    return 0


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
    # From here to PyOS_AfterFork_*() no Python code may run. A starting thread could get the GIL: it would wait for the locks that
    # PyOS_BeforeFork() took, and we for the GIL.
    was_prepared = coopos_pending.is_prepared
    if call.failure is None and was_prepared:
        pid[0] = coopos_forkpty(master, window) if has_pty else c_fork()
        err = errno
    if pid[0] == 0:
        PyOS_AfterFork_Child()
        if call.mode == EXEC:
            run_to_exec(call)
            return 0
        if coopos_pending.is_prepared:
            revive_child()             # the hooks were skipped
        if call.failure is not None:
            raise call.failure
        for hook in _hooks:
            hook()
        return 0
    if pid[0] > 0:
        # Before the hooks: one that waits lets other greenlets run, and a waitpid(-1) of theirs may collect this child.
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


cdef void run_to_exec(Fork call) noexcept:
    """In a child that is going to exec. Whatever fails, the child doesn't go on with its parent's program."""
    cdef bint is_ready = False
    try:
        if coopos_pending.is_prepared:
            revive_child()             # the hooks were skipped
        is_ready = call.failure is None
        if is_ready and call.run is not None:
            call.run()
    except BaseException:
        is_ready = False
    if not is_ready or call.run is not None:
        c_exit(127)


def fork_to_watch(fork, dict notes, keep_greenlets=None, **kwargs):
    """``fork(**kwargs)``, before watch_new() of the same child.

    *notes*: a dict, in which watch_new() will find the Child if other greenlets collected or watched it while at-fork hooks ran.
    *keep_greenlets*: the policy for this fork, unless it is None.
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
