# Asking the kernel about children: at once, or by a worker that waits.
#
# A Question is one waitid(2) with WNOWAIT that a worker makes. All callers that ask the same share it, each with its own Listener.
# WNOWAIT leaves the child waitable, so the worker's answer is only a hint: the callers ask the kernel again.
# Nothing here installs a signal handler. Nothing polls, unless no descriptor or no thread is left.

# ---- asking the kernel -------------------------------------------------------------------------------------------------------

cdef bint has_ended(const Report *report) noexcept:
    return report.code == CLD_EXITED or report.code == CLD_KILLED or report.code == CLD_DUMPED


cdef int ask_now(idtype_t idtype, id_t id, int options, Report *report) except -2:
    """waitid(2) with WNOHANG. 0, also if nothing has happened (then report.pid is 0), or -1 with errno. Runs signal handlers."""
    while coopos_wait(idtype, id, options, report) < 0:
        if not is_interrupted(errno):
            return -1
    return 0


cdef object this_loop():
    """This thread's loop, or None. A destroyed hub may have left its loop: the thread's next hub will use it again."""
    hub = get_hub_if_exists()
    return get_loop() if hub is None else hub.loop


cdef int wait_plainly(idtype_t idtype, id_t id, int options) except -1:
    """Block this thread, with the GIL released, until waitid(2) may have an answer. WNOWAIT: the child stays waitable."""
    cdef siginfo_t info
    cdef int err = 0
    with nogil:
        if c_waitid(idtype, id, &info, options | WNOWAIT) < 0:
            err = errno
    if not is_interrupted(err) and err and err != ECHILD:
        raise os_error(err, "waitid", id)
    return 0


# ---- asking the kernel from a worker -----------------------------------------------------------------------------------------

# COOPOS_CHILDREN=thread: never use pidfds, as on a system that has none.
cdef bint _use_pidfds = HAVE_PIDFD and _settings.CHILDREN == "pidfd"


# How often the kernel is asked if no descriptor, or no thread, is left to wait with.
cdef enum:
    PAUSE_MS = 10


@cython.final
@cython.internal
cdef class Question(Inquiry):
    """One waitid(2) about children, which a worker makes for all Listeners.

    Its bell is a descriptor that becomes readable when there is an answer. Each Listener has the bell in its own loop's set. If no
    descriptor or no thread was left, there is no bell (`box` is NULL), and each Listener uses a timer.
    """
    cdef tuple key                 # (idtype, id, options)
    cdef dict table                # _questions or _exit_questions
    cdef list listeners

    cdef int remove_from_table(self) noexcept:
        """It has an answer, or ends. Later callers start a new Question."""
        if self.table.get(self.key) is self:
            del self.table[self.key]
        return 0

    cdef int ring(self) noexcept:
        """Wake all Listeners. Works in any thread."""
        self.remove_from_table()
        if self.box != NULL:
            coopos_bell_ring(self.box.bell)
        return 0

    cdef bint is_wanted(self) except -1:
        """Whether a Listener is left whose loop was not destroyed."""
        cdef Listener listener
        for listener in self.listeners:
            if listener.loop is None or is_alive(listener.loop):
                return True
        return False

    cdef int cancel(self) noexcept:
        """End it, since nobody waits. In a forked child, leave the parent's Question alone."""
        if self.born == generation:
            self.remove_from_table()
            self.end()
        return 0


@cython.final
@cython.internal
cdef class Listener(Wait):
    """One waiter for the answer to a Question: in the set of its loop, or by poll(2) if *loop* is None."""
    cdef Question question
    cdef object loop
    cdef object timer              # if there is no bell
    cdef object callback
    cdef tuple args

    cdef int start(self, bint ref, callback, tuple args) except -1:
        """Have ``callback(*args)`` run in the loop's hub when there is an answer."""
        cdef Question question = self.question
        self.callback, self.args = callback, args
        if question.box != NULL:
            self.fd, self.events = question.box.bell[0], READ
            set_of_loop(self.loop).enter(self, ref, "waitid")
        else:
            self.timer = self.loop.timer(PAUSE_MS / 1000.0, ref=ref)
            self.timer.start(self.wake)
        return 0

    cdef int hold(self, bint ref) except -1:
        """Set whether it keeps its loop alive."""
        if self.set is not None:
            self.set.keep_alive(self, ref)
        elif self.timer is not None and is_alive(self.loop):
            set_ref(self.timer, ref)
        return 0

    cdef int on_ready(self) except -1:
        """In the hub: there is an answer."""
        cdef Question question = self.question
        callback, args = self.callback, self.args      # the callback may call leave(), which clears them
        if callback is None:
            return 0               # leave() came first: a signal handler raised, which ended the wait
        if question.born != generation:
            question.end()         # this is a forked child, and the Question is the parent's
            return 0
        question.remove_from_table()
        callback(*args)
        return 0

    cdef int wait_without_hub(self) except -1:
        """Block this thread, with the GIL released, until there is an answer."""
        cdef Question question = self.question
        cdef pollfd rung
        cdef int has_bell = question.box != NULL
        cdef int err = 0
        rung.fd = question.box.bell[0] if has_bell else -1
        rung.events = POLLIN
        with nogil:
            if poll(&rung, 1, -1 if has_bell else PAUSE_MS) < 0:
                err = errno
        if is_interrupted(err):
            return 0
        if err:
            raise os_error(err, "poll", question.key)
        question.remove_from_table()
        return 0

    cdef int leave(self) except -1:
        """Wait no longer. The last Listener that leaves ends the Question."""
        cdef Question question = self.question
        cdef Py_ssize_t index
        for index in range(len(question.listeners)):
            if question.listeners[index] is self:
                del question.listeners[index]
                break
        self.callback = None
        if self.set is not None:
            self.set.leave(self)
        timer, self.timer = self.timer, None
        if timer is not None and is_alive(self.loop):
            timer.stop()
            timer.close()
        if not question.is_wanted():
            question.cancel()
        return 0


# {(idtype, id, options): the Question under way}. The first table has those that wait for one child's exit, the second all others.
cdef dict _exit_questions = {}
cdef dict _questions = {}


cdef Listener listen(loop, idtype_t idtype, id_t id, int options, bint ref=False, callback=None, tuple args=()):
    """Ask a Question, or join the same one that is under way. The caller must call leave() of the Listener in a `finally`."""
    # The worker always uses WNOWAIT. It has forked no children, so __WNOTHREAD would find none.
    cdef int asked = options & ~(WNOWAIT | COOPOS_WNOTHREAD)
    cdef tuple key = (idtype, id, asked)
    cdef dict table = _exit_questions if idtype == P_PID and asked == WEXITED else _questions
    cdef Question question = <Question>table.get(key)
    cdef Listener listener = Listener()
    cdef bint is_new = question is None
    if is_new:
        question = Question()
        question.key, question.table, question.listeners = key, table, []
    listener.loop = loop
    listener.question = question
    try:
        # First of all: making a watcher may let another thread run, which would cancel a Question that has no Listener.
        question.listeners.append(listener)
        if is_new and question.begin(idtype, id, asked | WNOWAIT):
            table[key] = question
        if loop is not None:
            listener.start(ref, callback, args)
    except:
        listener.leave()
        raise
    return listener


# ---- waiting for a change ----------------------------------------------------------------------------------------------------

cdef int wait_for_change(str call, idtype_t idtype, id_t id, int options) except -1:
    """Wait until the kernel may have an answer to this waitid(2)."""
    cdef object hub = reachable_hub()
    cdef object loop = None if hub is None else hub.loop
    cdef object current = None if hub is None else getcurrent()
    cdef object switch = None if hub is None else current.switch
    cdef Report report
    cdef Listener listener
    if options & COOPOS_WNOTHREAD and ask_now(idtype, id, options & ~COOPOS_WNOTHREAD | WNOWAIT, &report) == 0 and report.pid > 0:
        # Without __WNOTHREAD another thread's child answers. A worker can't ask for the children of this thread alone.
        # https://man7.org/linux/man-pages/man2/waitpid.2.html
        return wait_plainly(idtype, id, options)
    if hub is None and idtype == P_PID:
        return wait_plainly(idtype, id, options)
    # For any child even if there is no hub here: another thread's hub may collect the child, and then rings.
    listener = listen(loop, idtype, id, options, True, switch, (switch,))
    try:
        if hub is None:
            listener.wait_without_hub()
        else:
            came_back = give_way(hub, current, call, id if idtype == P_PID else -1)
            if came_back is not switch:
                raise wrong_switch(came_back, "children")
    finally:
        listener.leave()
    return 0
