# How one loop learns that a child has ended: by a pidfd in the loop's set, or by a Question where there is no pidfd.
#
# 1. A waiter is registered before anything starts that could wake it, and is removed in a `finally`.
# 2. A notification can let other threads run: gevent's libuv watchers call C by cffi, which releases the GIL. So a record gets its
#    new state first, and then notifies others. https://cffi.readthedocs.io/en/latest/ref.html#conversions

# ---- pidfds in a loop --------------------------------------------------------------------------------------------------------

# {pidfd: its Watch}. The reference is counted.
cdef Table _watch_of

# {errno: how often the kernel has refused a pidfd}
cdef dict _refusals = {}


cdef int open_pidfd(int pid) except -2:
    """A pidfd, or -1 with errno."""
    cdef int fd = coopos_pidfd_open(pid)
    if fd >= 0:
        try:
            reserve(&_watch_of, fd)
        except:
            c_close(fd)
            raise
    return fd


cdef int close_all_pidfds() noexcept:
    """In a forked child. Closes each run of adjacent numbers by one call: thousands of close(2) take milliseconds."""
    cdef int first
    cdef int fd = 0
    while fd < _watch_of.size:
        first = fd
        while fd < _watch_of.size and _watch_of.at[fd] != NULL:
            _watch_of.at[fd] = NULL
            fd += 1
        if fd > first:
            coopos_close_run(first, fd - 1)
        fd += 1
    return 0


def count_refusals():
    """How often the kernel refused a pidfd in this process, so that a thread watched the child: {errno: int}."""
    return dict(_refusals)


# ---- watching in a loop ------------------------------------------------------------------------------------------------------

cdef enum:
    ALIVE = 0      # when it was last asked for
    ENDED = 1      # collected here; nobody has claimed the status yet
    CLAIMED = 2    # one caller has got the status
    LOST = 3       # other code collected it, and the kernel doesn't tell the status


cdef class Record:
    """What a Watch needs to know of its child. The next chapter has the rest: Child."""
    cdef readonly int pid
    cdef str watched_by            # "pidfd" or "thread"
    cdef int state
    cdef bint is_watched           # collect it as soon as it ends, and keep the status until somebody claims it

    cdef bint collect(self, bint claims, Report *stop, bint is_dead=False) except -1:
        """Ask the kernel for the status, without waiting."""
        raise NotImplementedError

    cdef int lose(self) except -1:
        """Other code collected it, and the kernel doesn't tell the status."""
        raise NotImplementedError

    cdef int remove_watch(self, watch) except -1:
        """Forget a Watch that is not needed any more."""
        raise NotImplementedError


@cython.final
@cython.internal
cdef class Watch(Wait):
    """One loop's wait for the exit of one child: a pidfd in the loop's set, or a Question."""
    cdef Record child
    cdef object loop
    cdef Listener listener         # of the Question, while a worker asks it for us
    cdef list waiters              # the bound `switch` of each greenlet parked here
    cdef list callbacks            # (callback, whether it keeps the loop alive), until they are called; or None
    cdef int holds                 # how many waiters and callbacks keep the loop alive
    cdef int born                  # generation
    cdef bint is_lasting           # add_callback() made it: it stays when no greenlet waits
    cdef bint is_closed

    def __cinit__(self, Record child, loop):
        self.child = child
        self.loop = loop           # None: for threads without a hub
        self.waiters = []
        self.fd = -1               # a pidfd
        self.events = READ
        self.born = generation

    cdef bint start(self) except -1:
        """Begin to watch. False if the process does not exist any more."""
        cdef int err
        if _use_pidfds:
            err = self.open_pidfd()
            if not err:
                try:
                    set_of_loop(self.loop).enter(self, False, "pidfd_open")
                    self.child.watched_by = "pidfd"
                    return True
                except BaseException as ex:
                    self.close_pidfd()
                    if not isinstance(ex, OSError):
                        raise
                    # No descriptor is left for the set. A worker needs none.
                    err = ex.errno
            if err == ESRCH:
                return False
            _refusals[err] = _refusals.get(err, 0) + 1
        self.ask_worker()
        self.child.watched_by = "thread"
        return True

    cdef int start_plainly(self) except -1:
        """Begin to watch in a thread without a hub: keep a pidfd, which still means this child if its pid is used again."""
        cdef sigaction_t action
        if sigaction(SIGCHLD, NULL, &action) == 0 and action.sa_handler == SIG_IGN:
            # The kernel collects the child, so no caller will claim it, and nothing would close the pidfd.
            # https://man7.org/linux/man-pages/man2/waitpid.2.html
            return 0
        if _use_pidfds:
            if self.open_pidfd() == ESRCH:
                self.child.lose()
        return 0

    cdef int open_pidfd(self) except -1:
        """Open and register our pidfd. 0, or errno."""
        cdef int pidfd = open_pidfd(self.child.pid)
        if pidfd < 0:
            return errno
        self.fd = pidfd
        Py_INCREF(self)
        _watch_of.at[pidfd] = <PyObject *>self
        return 0

    def start_in_loop(self, bint ref):
        """In the loop's thread: begin to watch there."""
        if self.child.state == ALIVE:
            self.start_or_lose(ref)
        else:
            self.close_and_notify()

    def notify_again(self, bint ref):
        """In the loop's thread: a callback was added to a Watch that had begun before."""
        if self.child.state != ALIVE:
            self.notify_soon()
        elif ref:
            self.hold(1)

    cdef int start_or_lose(self, bint ref) except -1:
        """Begin to watch a child. If it is gone, other code collected it, or the kernel, because the program ignores SIGCHLD."""
        if not self.start():
            self.child.lose()
        elif ref:
            self.hold(1)
        return 0

    cdef int close_pidfd(self) except -1:
        cdef int pidfd = self.fd
        if pidfd >= 0 and self.born == generation:
            if self.set is not None:
                self.set.leave(self)
            _watch_of.at[pidfd] = NULL
            c_close(pidfd)
            self.fd = -1
            Py_DECREF(self)
        return 0

    cdef int hold(self, int change) except -1:
        """Count one more, or one less, that keeps the loop alive until the child has ended."""
        cdef bint before = self.holds > 0
        self.holds += change
        if before != (self.holds > 0) and self.born == generation:
            if self.set is not None:
                self.set.keep_alive(self, self.holds > 0)
            elif self.listener is not None:
                self.listener.hold(self.holds > 0)
        return 0

    def release(self):
        """In the loop's thread: a callback that kept the loop alive was unlinked."""
        self.hold(-1)

    cdef int close(self) except -1:
        """Stop watching. In the loop's thread, unless the loop is destroyed."""
        if not self.is_closed:
            self.is_closed = True
            self.close_pidfd()
            self.leave_question()
        return 0

    cdef int ask_worker(self) except -1:
        """Have a worker wait for the child's exit."""
        self.listener = listen(
            self.loop, P_PID, self.child.pid, WEXITED, self.set is None and self.holds > 0, self.check_child_on_answer)
        return 0

    cdef int leave_question(self) except -1:
        cdef Listener listener = self.listener
        self.listener = None
        if listener is not None and self.born == generation:
            listener.leave()
        return 0

    cdef int on_ready(self) except -1:
        """In the hub: the pidfd is readable."""
        if self.set is not None:
            self.check_child(True)
            # One call for all children of this turn, as one SIGCHLD may stand for several children.
            # https://man7.org/linux/man-pages/man7/signal.7.html
            call_hook_soon(self.loop)
        return 0

    def check_child_on_answer(self):
        self.check_child(False)
        call_hook(self.loop)

    cdef int check_child(self, bint is_dead) except -1:
        """In the hub: the child has probably ended. Exceptions go to the hub's handle_error(), since other children come next."""
        if self.born != generation:
            return 0
        try:
            # A waiter claims the status within this call. Without waiters we may collect the child only if it is watched.
            if (self.child.is_watched or self.waiters) and self.child.collect(self.waiters and not self.callbacks, NULL, is_dead):
                self.leave_question()
                self.wake_waiters()    # a traced child has stopped, which the waiters have to report
            elif self.child.state != ALIVE:
                self.close()
                self.notify()
            else:
                # The worker's waitid(2) gave no answer, or the zombie is visible to its tracer only, until the tracer detaches. The
                # pidfd is readable all that time, so let a worker wait. https://github.com/torvalds/linux/blob/master/kernel/exit.c
                self.leave_question()
                self.ask_worker()
        except:
            self.loop.handle_error(self.child, *sys.exc_info())
            self.close()
            self.wake_waiters()        # they try again, and raise the error if it lasts
        return 0

    def close_and_notify(self):
        """In the loop's thread: the child ended, and other code learned it first. Stop watching, and notify from the hub."""
        if not self.is_closed:
            self.close()
            self.notify_soon()

    cdef int notify_soon(self) except -1:
        if self.waiters or self.callbacks:
            self.loop.run_callback(self.notify_from_queue)
        elif self.is_lasting:
            call_hook_soon(self.loop)
        return 0

    def notify_from_queue(self):
        self.notify()
        call_hook(self.loop)

    cdef int notify(self) except -1:
        """In the hub: call each callback once, drop the references to them, then wake the waiters."""
        callbacks, self.callbacks = self.callbacks, None
        if callbacks:
            for callback, _ in callbacks:
                try:
                    callback(self.child)
                except:
                    self.loop.handle_error(self.child, *sys.exc_info())
        if self.waiters:
            call_hook(self.loop)       # a SIGCHLD handler would run before the waiters do
            self.wake_waiters()
        return 0

    cdef int wake_waiters(self) except -1:
        while self.waiters:
            switch = self.waiters.pop(0)
            try:
                switch(switch)
            except:
                self.loop.handle_error(switch, *sys.exc_info())
        return 0

    cdef int wait(self, hub, str call) except -1:
        """Park until the child may have ended."""
        cdef object current = getcurrent()
        cdef object switch = current.switch      # a new object each time: if it comes back, wake_waiters() woke us
        self.waiters.append(switch)
        self.hold(1)
        try:
            came_back = give_way(hub, current, call, self.child.pid)
            if came_back is not switch:
                raise wrong_switch(came_back, f"child {self.child.pid}")
        finally:
            self.hold(-1)
            if self.waiters and switch in self.waiters:
                self.waiters.remove(switch)
        return 0

    cdef int close_if_unused(self) except -1:
        if not self.waiters and not self.is_lasting:
            self.close()
            self.child.remove_watch(self)
        return 0


# ---- the hook ------------------------------------------------------------------------------------------------------------------

cdef object _child_hook = None


def set_child_hook(hook):
    """Have ``hook()`` called in the hub when watched children have ended: once for all that ended in one turn."""
    global _child_hook
    _child_hook = hook


# Whether a watched child has ended since the last call of the hook; the queued call of it, and its loop.
cdef bint _hook_is_due = False
cdef object _hook_queued = None
cdef object _hook_loop = None


cdef int call_hook(loop) except -1:
    """In the hub."""
    global _hook_is_due
    if _hook_is_due:
        _hook_is_due = False
        if _child_hook is not None:
            try:
                _child_hook()
            except:
                loop.handle_error(_child_hook, *sys.exc_info())
    return 0


cdef int call_hook_soon(loop) except -1:
    global _hook_queued, _hook_loop
    if _hook_is_due and (_hook_loop is not loop or not _hook_queued.pending):
        _hook_loop = loop
        _hook_queued = loop.run_callback(run_queued_hook, loop)
    return 0


def run_queued_hook(loop):
    call_hook(loop)
