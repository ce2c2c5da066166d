# Asking the kernel about children: at once, or by a worker that waits.
#
# A Question is one waitid(2) that a worker makes with WNOWAIT, for everybody who wants to know the same. The worker takes nothing: its
# answer is only "look again". Nothing here installs a signal handler, and nothing polls unless no descriptor or no thread is left.

# ---- asking the kernel -------------------------------------------------------------------------------------------------------

cdef bint has_ended(const Report *report) noexcept:
    return report.code == CLD_EXITED or report.code == CLD_KILLED or report.code == CLD_DUMPED


cdef int ask_now(idtype_t idtype, id_t id, int options, Report *report) except -2:
    """waitid(2), without waiting: 0, also where there is nothing to say, or -1 with errno. A signal's handler has its turn."""
    while coopos_wait(idtype, id, options, report) < 0:
        if not is_interrupted(errno):
            return -1
    return 0


cdef object this_loop():
    """This thread's, or None. That of a hub that was destroyed: the next one has it again."""
    hub = get_hub_if_exists()
    return get_loop() if hub is None else hub.loop


cdef int wait_plainly(idtype_t idtype, id_t id, int options) except -1:
    """Stand still, with the GIL released, until waitid(2) may have an answer. Nothing is collected."""
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
cdef bint _use_pidfds = HAVE_PIDFD and os.environ.get("COOPOS_CHILDREN") != "thread"


# Where there is no descriptor, or no thread, to wait by: how long until the kernel is asked again.
cdef enum:
    PAUSE_MS = 10


@cython.final
@cython.internal
cdef class Question(Inquiry):
    """One question to waitid(2) about children, put once for all who wait for the answer.

    The answer is only "look again": a bell, which each who asked has in its own loop's set. Where there is no descriptor left for
    it, or no thread, each looks again after a while.
    """
    cdef tuple key                 # (idtype, id, options)
    cdef dict table                # _questions or _exit_questions
    cdef list listeners            # the Listener of each who asked

    cdef int remove_from_table(self) noexcept:
        """Who asks from now on asks anew."""
        if self.table.get(self.key) is self:
            del self.table[self.key]
        return 0

    cdef int ring(self) noexcept:
        """Wake all who asked, from any thread."""
        self.remove_from_table()
        if self.box != NULL:
            coopos_bell_ring(self.box.bell)
        return 0

    cdef bint is_wanted(self) except -1:
        """Whether anybody waits whose loop was not destroyed."""
        cdef Listener listener
        for listener in self.listeners:
            if listener.loop is None or is_alive(listener.loop):
                return True
        return False

    cdef int cancel(self) noexcept:
        """Nobody waits."""
        if self.born == generation:
            self.remove_from_table()
            self.end()
        return 0


@cython.final
@cython.internal
cdef class Listener(Wait):
    """One of those who wait for the answer to a Question: in a loop by its set, or plainly, where *loop* is None."""
    cdef Question question
    cdef object loop
    cdef object timer              # where there is no bell
    cdef object callback
    cdef tuple args

    cdef int start(self, bint ref, callback, tuple args) except -1:
        """Have ``callback(*args)`` run in the loop's hub when there is news."""
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
        """Whether it keeps its loop alive."""
        if self.set is not None:
            self.set.hold(self, ref)
        elif self.timer is not None and is_alive(self.loop):
            set_ref(self.timer, ref)
        return 0

    cdef int tell(self) except -1:
        """In the hub: there is news."""
        cdef Question question = self.question
        callback, args = self.callback, self.args      # leave() lets go of them meanwhile
        if callback is None:
            return 0               # a signal's handler has raised, and ended the wait, before the loop came to us
        if question.born != generation:
            question.end()         # it is the parent's
            return 0
        question.remove_from_table()
        callback(*args)
        return 0

    cdef int wait_without_hub(self) except -1:
        """Stand still, with the GIL released, until there is news."""
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
        """Wait no longer; with the last one nobody asks any more."""
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


# {(idtype, id, options): the Question that is being asked}: those for the end of one child, and the others
cdef dict _exit_questions = {}
cdef dict _questions = {}


cdef Listener listen(loop, idtype_t idtype, id_t id, int options, bint ref=False, callback=None, tuple args=()):
    """Put a question, or join those who wait for the answer to the same one. Whoever gets the Listener must leave() by it."""
    # The worker takes nothing anyway, and has no children of its own that it could confine itself to.
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
        # Before anything else: to make a watcher may let another thread run, who would drop a question that nobody waits for.
        question.listeners.append(listener)
        if is_new and question.begin(idtype, id, asked | WNOWAIT):
            table[key] = question
        if loop is not None:
            listener.start(ref, callback, args)
    except:
        listener.leave()
        raise
    return listener


# ---- waiting for the kernel's news -------------------------------------------------------------------------------------------

cdef int wait_for_change(idtype_t idtype, id_t id, int options) except -1:
    """Wait until the kernel may have an answer to this waitid(2)."""
    cdef object hub = reachable_hub()
    cdef object loop = None if hub is None else hub.loop
    cdef object current = None if hub is None else getcurrent()
    cdef object switch = None if hub is None else current.switch
    cdef Report report
    cdef Listener listener
    if options & COOPOS_WNOTHREAD and ask_now(idtype, id, options & ~COOPOS_WNOTHREAD | WNOWAIT, &report) == 0 and report.pid > 0:
        # It is another thread's, and no other thread can ask for this one's alone.
        return wait_plainly(idtype, id, options)
    if hub is None and idtype == P_PID:
        return wait_plainly(idtype, id, options)
    # For any child also where nothing can be switched to: the hub of another thread may collect it and ring.
    listener = listen(loop, idtype, id, options, True, switch, (switch,))
    try:
        if hub is None:
            listener.wait_without_hub()
        else:
            came_back = give_way(hub, current)
            if came_back is not switch:
                raise wrong_switch(came_back, "children")
    finally:
        listener.leave()
    return 0
