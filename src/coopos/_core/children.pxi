# The records of children that somebody watches or waits for.
#
# A Child has a Watch in each loop that waits for it. Whoever is first collects it; exactly one caller gets the status. Its states, and
# the method on each edge:
#
#                  collect()              claim()
#         ALIVE ------------> ENDED ----------------> CLAIMED
#           |                 (only if it is watched,    ^
#           |                  else nobody keeps it)     |
#           |                                            |
#           +---------------- claim(), collected() ------+
#           |
#           +-- lose() -----> LOST     somebody else collected it, and the kernel doesn't tell the status
#
# In a forked child every record that was made before the fork belongs to the parent: `generation` tells, and its descriptors and
# workers are left alone.

# ---- the records ------------------------------------------------------------------------------------------------------------

@cython.final
cdef class Child(Record):
    """A child process that somebody here watches or waits for; what a ``fork_and_watch`` callback is given.

    Has the attributes of gevent's child watchers: pid, rpid, rstatus, loop, ref, callback, and stop() and close(), which have
    nothing left to do once the callback is called.
    """
    cdef Report report             # once it has ended
    cdef int group                 # the process group it died in
    cdef bint is_stolen            # by somebody else in this process, who has collected it
    cdef ino_t inode               # of its pidfd, where that is its own; 0
    cdef object home               # the Watch in the loop where it was watched first
    cdef list watches              # a Watch in each loop that waits for it
    cdef int born                  # generation

    def __cinit__(self, int pid):
        self.pid = pid
        self.watches = []
        self.born = generation

    @property
    def rpid(self):
        return self.pid if self.state != ALIVE else 0

    @property
    def rstatus(self):
        if self.state == LOST:
            raise lost_child(self)
        return self.report.status

    @property
    def loop(self):
        return None if self.home is None else (<Watch>self.home).loop

    @property
    def ref(self):
        return self.home is not None and (<Watch>self.home).holds > 0

    @property
    def callback(self):
        cdef list callbacks = None if self.home is None else (<Watch>self.home).callbacks
        return callbacks[0][0] if callbacks else None

    @property
    def mechanism(self):
        """What tells that the child has ended: ``"pidfd"`` or ``"thread"``."""
        return self.watched_by

    @property
    def is_ours(self):
        """Whether this process has made it, and not its parent."""
        return not self.is_parents()

    @property
    def active(self):
        return self.state == ALIVE

    @property
    def pending(self):
        return self.state != ALIVE and self.callback is not None

    def stop(self):
        """Do nothing: a watched child is collected whether or not its callback is wanted."""

    def close(self):
        """Do nothing: see :meth:`stop`."""

    def look(self):
        """Ask the kernel, without waiting, whether it has ended; so :attr:`rpid` tells it before the hub has seen it."""
        self.collect(False, NULL)

    def join(self):
        """Park in this thread's hub until it has ended. Nobody's status is taken: any number of greenlets and threads may wait."""
        self.collect(False, NULL)
        while self.state == ALIVE:
            self.wait()
            self.collect(False, NULL)

    def send_signal(self, signum):
        """kill(2), never to another process that has got its pid. Nothing is sent, and nothing raised, once it has ended."""
        cdef int number = as_int(signum)
        cdef int pidfd, rc
        self.collect(False, NULL)
        if self.state != ALIVE:
            return
        pidfd = self.pidfd()
        rc = coopos_pidfd_signal(pidfd, number) if pidfd >= 0 else -1
        # A child that was not collected keeps its pid. Sandboxes refuse the newer call.
        if pidfd < 0 or (rc < 0 and (errno == ENOSYS or errno == EPERM)):
            rc = kill(self.pid, number)
        if rc < 0 and errno != ESRCH:
            raise os_error(errno, "kill", self.pid)

    def link(self, callback, bint ref):
        """Have ``callback(child)`` called in this thread's hub when it has ended; soon, if it has."""
        self.add_callback(callback, get_hub().loop, ref)

    def unlink(self, callback):
        """Undo :meth:`link`, and keep *callback* no longer."""
        cdef Watch watch
        cdef Py_ssize_t index
        for watch in self.watches:
            for index in range(len(watch.callbacks or ())):
                each, ref = watch.callbacks[index]
                if each == callback:
                    del watch.callbacks[index]
                    if ref:
                        watch.release() if watch.loop is this_loop() else post(watch.loop, watch.release)
                    return

    def collect_for_nobody(self):
        """Whether it has ended; then nobody will ask for the status."""
        self.collect(False, NULL)
        self.claim_status()
        return self.state != ALIVE

    def claim_status(self):
        """Take the status, if it is there and nobody has: who waits for the child from now on gets ChildProcessError."""
        if self.state == ENDED:
            self.claim()

    def __repr__(self):
        state = ("alive", "ended", "waited for", "lost")[self.state]
        return f"<coopos child {self.pid} {state} status={self.report.status}>"

    cdef bint is_parents(self) except -1:
        """Whether this is a forked child, and the record its parent's: nobody's here, whoever has the pid, and nobody is told."""
        if self.born == generation:
            return False
        if self.state == ALIVE:
            self.state = LOST
            self.watches = []
        return True

    cdef bint wait(self) except -1:
        """Wait, in this thread's hub if there is one that can run, until the child may have ended. False, at once, if there is no
        such process any more.
        """
        cdef Watch watch
        cdef Watch found = None
        hub = reachable_hub()
        loop = None if hub is None else hub.loop
        if hub is not None:
            for watch in self.watches:
                if watch.loop is loop and not watch.is_closed:
                    found = watch
        if found is None:
            found = Watch(self, loop)
        try:
            if found not in self.watches:
                self.watches.append(found)
                if hub is not None and not found.start():
                    return False
            if hub is None:
                wait_plainly(P_PID, self.pid, WEXITED)
            else:
                found.wait(hub)
        finally:
            found.close_if_unused()
        return True

    cdef ino_t pidfd_inode(self) except? 0:
        """What its pidfds have in common with nobody else's, as far as that is known; 0."""
        if not self.inode:
            self.inode = coopos_pidfd_inode(self.pidfd())
        return self.inode

    cdef int pidfd(self) except -2:
        """A pidfd of it, in any loop's watch, or -1."""
        cdef Watch watch
        for watch in self.watches:
            if watch.fd >= 0 and watch.born == generation:
                return watch.fd
        return -1

    cdef int remove_watch(self, watch) except -1:
        """A watch that nobody needs any more, and with the last one the record, unless somebody may still ask for the status."""
        if watch in self.watches:
            self.watches.remove(watch)
        if not self.watches and not self.is_watched and children.get(self.pid) is self:
            del children[self.pid]
        return 0

    cdef int ask(self, int options, Report *report) except -2:
        """waitid(2) of this child, without waiting: 0, also where there is nothing to say, or -1 if somebody else collected it."""
        cdef int pidfd = self.pidfd()
        cdef int rc = -1
        if pidfd >= 0:
            # By pidfd, since the pid may be another process by now.
            rc = ask_now(COOPOS_P_PIDFD, pidfd, options, report)
        # Linux before 5.4 doesn't know P_PIDFD, and sandboxes refuse it.
        if pidfd < 0 or (rc < 0 and errno != ECHILD):
            rc = ask_now(P_PID, self.pid, options, report)
        if rc < 0 and errno != ECHILD:
            raise os_error(errno, "waitid", self.pid)
        return rc

    cdef bint collect(self, bint claims, Report *stop, bint is_dead=False) except -1:
        """Ask the kernel for the status, without waiting. Whether somebody *claims* it before anybody else can ask.

        True if it is a child that we trace, and has stopped, which every wait tells: it is taken into *stop*, or, if that is NULL,
        left there. What *is_dead* needn't be looked at first.
        """
        cdef Report report
        cdef int pidfd, rc
        if self.state != ALIVE or self.is_parents():
            return False
        # A zombie still has its group, a collected child hasn't: ask before.
        if not claims:
            self.group = getpgid(self.pid)
        rc = 0
        if stop == NULL and not is_dead:
            rc = self.ask(WEXITED | WNOWAIT, &report)
            if rc == 0 and not has_ended(&report):
                return report.pid > 0
        if rc == 0:
            rc = self.ask(WEXITED, &report)
        if rc == 0 and report.pid > 0 and not has_ended(&report):
            if stop != NULL:
                stop[0] = report
            return True
        pidfd = self.pidfd()
        if rc < 0 and pidfd >= 0:
            self.is_stolen = True
            rc = coopos_pidfd_reaped(pidfd, &report)
            report.pid = self.pid
            report.uid = getuid()
        if rc < 0:
            self.is_stolen = True
            self.lose()
        elif report.pid > 0:
            self.report = report
            self.state = ENDED
            if self.is_watched:
                if not claims:
                    self.inode = coopos_pidfd_inode(pidfd)
                if children.get(self.pid) is self:
                    ended[self.pid] = self
            self.announce_end()
        return False

    cdef int claim_from_kernel(self, const Report *report) except -1:
        """The caller has asked the kernel itself, and keeps what it got."""
        self.report = report[0]
        return self.claim()

    cdef int announce_end(self) except -1:
        """Those who must hear of the end without having watched for this child."""
        global _hook_is_due
        if self.is_watched:
            _hook_is_due = True
        cdef Question question
        if _questions:
            # A thread that asks for any child would miss this one; a stop that is waited for will not come.
            for question in list(_questions.values()):
                if question.is_wanted():
                    question.ring()
                else:
                    question.cancel()
        return 0

    cdef int lose(self) except -1:
        self.state = LOST
        self.remove_from_tables()
        self.end_watches()
        return 0

    cdef int remove_from_tables(self) except -1:
        """Out of the tables: nobody will be told this status again."""
        if children.get(self.pid) is self:
            del children[self.pid]
        if ended and ended.get(self.pid) is self:
            del ended[self.pid]
        return 0

    cdef int claim(self) except -1:
        """The caller takes the status; everybody else who waits for this child has come too late."""
        cdef bint was_alive = self.state == ALIVE
        self.state = CLAIMED
        self.remove_from_tables()
        if was_alive:
            self.announce_end()
        self.end_watches()
        return 0

    cdef int end_watches(self) except -1:
        """End the watches that are still open, each in its own thread."""
        cdef Watch watch
        cdef list still_open = None
        for watch in self.watches:
            if not watch.is_closed:
                if still_open is None:
                    still_open = []
                still_open.append(watch)
        if still_open is None:
            return 0
        loop = this_loop()
        for watch in still_open:
            if watch.loop is None:
                watch.close()
            elif watch.loop is loop:
                watch.close_and_notify()
            elif not post(watch.loop, watch.close_and_notify):
                watch.close()       # its thread has ended, and its hub with it
        return 0

    cdef int add_callback(self, callback, loop, bint ref) except -1:
        """Watch in *loop* from now on; where the child has ended already, the callback is called in the loop's next turn. Without
        a loop, only know it.
        """
        cdef Watch watch
        cdef Watch found = None
        cdef bint is_new
        self.is_parents()
        for watch in self.watches:
            if watch.loop is loop and (watch.is_lasting or not watch.is_closed):
                found = watch
        is_new = found is None
        if is_new:
            found = Watch(self, loop)
            self.watches.append(found)
        try:
            if callback is not None:
                if found.callbacks is None:
                    found.callbacks = []
                found.callbacks.append((callback, ref))
            if loop is None:
                if is_new:
                    found.start_plainly()
            else:
                begin = found.start_in_loop if is_new else found.notify_again
                if loop is this_loop():
                    begin(ref)
                else:
                    post(loop, begin, (ref,))
        except:
            if is_new:
                self.watches.remove(found)
            elif found.callbacks and found.callbacks[len(found.callbacks) - 1][0] is callback:
                found.callbacks.pop()
            raise
        found.is_lasting = True
        if self.home is None:
            self.home = found
        return 0


# {pid: its Child}, while somebody watches it, waits for it, or may still ask for its status
cdef dict children = {}
# {pid: Child}, oldest death first: watched children whose status nobody has asked for
cdef dict ended = {}
# The parent's tables, in a forked child: kept, because freeing thousands of records would copy the pages they are on.
cdef list _parent_tables = []


cdef object lost_child(Child child):
    if child.born != generation:
        return said_error(ECHILD, f"{child.pid} is a child of the process that has forked this one")
    return said_error(ECHILD, f"somebody else in this process collected child {child.pid}, and this "
                           f"kernel doesn't tell its status. gevent.subprocess does that unless coopos.patch() was called; so does "
                           f"whoever calls waitpid(-1), and ignoring SIGCHLD")


cdef bint is_used_again(int pid) except -1:
    """Whether the pid of a child that was collected belongs to another child of ours by now."""
    cdef Report report
    return ask_now(P_PID, pid, WEXITED | WNOWAIT, &report) == 0


def check_loop(loop):
    """Refuse what is no event loop of gevent, or was destroyed."""
    if not hasattr(loop, "run_callback_threadsafe"):
        raise TypeError(f"loop must be an event loop of gevent or None, not {loop!r}")
    if not is_alive(loop):
        raise ValueError("operation on destroyed loop")


cdef Child record(int pid, callback, loop, bint ref, Child child, bint needs_hub=True):
    """Watch *child*, or *pid* as a child that there is no record of.

    Of threads without a hub, the main one gets one, and others if the callback needs it: nobody would destroy it, nor run it. There
    the child is only known, and a callback that needs no hub is not called.
    """
    cdef bint is_new = child is None
    if loop is None:
        loop = this_loop()
        if loop is None:
            if PyThread_get_thread_ident() == _MAIN_THREAD_IDENT or (callback is not None and needs_hub):
                loop = get_hub().loop
            else:
                callback = None
    if is_new:
        child = Child(pid)
        children[pid] = child
    child.is_watched = True
    try:
        child.add_callback(callback, loop, ref)
    except:
        if is_new:
            child.remove_from_tables()
        raise
    return child


def watch_new(Py_ssize_t pid, callback=None, loop=None, bint ref=False, dict notes=None, bint needs_hub=True):
    """Watch child *pid*, which was forked this moment: collect it when it ends, keep its status, call the callback.

    *notes*: what has happened to children in the meantime, as _forking tells it. Never switches greenlets. Returns the
    :class:`Child`. Where *needs_hub* is False, the callback is not called in a thread that has no hub. What is raised has the pid:
    else nobody would know whom to wait for.
    """
    cdef int number = as_int(pid)
    cdef Child before
    cdef Child note
    try:
        before = <Child>children.get(number)
        note = <Child>notes.get(number) if notes else None
        if note is None and before is not None:
            # The pid is used again. Only a pidfd still knows the child that had it before.
            if before.state == ALIVE:
                if before.pidfd() >= 0:
                    before.collect(False, NULL)
                else:
                    before.lose()
            before.remove_from_tables()
        return record(number, callback, loop, ref, note, needs_hub)
    except BaseException as ex:
        ex.pid = pid
        raise


def watch_any(Py_ssize_t pid, callback=None, loop=None, bint ref=False):
    """Watch child *pid*, whoever has forked it and whoever waits for it or watches it already.

    Never switches greenlets. Returns the :class:`Child`. ECHILD if it isn't a child of this process, or was waited for.
    """
    cdef int number = as_int(pid)
    cdef Child child
    cdef Report report
    cdef bint is_there
    ensure_own_tables()
    child = <Child>children.get(number)
    if child is not None:
        child.collect(False, NULL)     # if somebody else has collected it, the pid may be another child's
    is_there = ask_now(P_PID, number, WEXITED | WNOWAIT, &report) == 0
    if child is not None and child.state != ALIVE and is_there:
        child.remove_from_tables()       # the pid is used again, also where the kernel doesn't tell the status of the child that had it
        child = None
    if not is_there and (child is None or child.state != ENDED):
        raise os_error(errno, "watch", number)
    return record(number, callback, loop, ref, child)


# ---- fork --------------------------------------------------------------------------------------------------------------------

cdef int add_forked(Child child, int pid) except -1:
    """Record *child*, which was made before the fork, as child *pid* until the fork is over. Runs no Python code."""
    child.pid = pid
    if pid not in children:    # else a child had the pid before: nobody was quick enough to collect that one either
        child.is_watched = True
        children[pid] = child
    return 0


cdef bint remove_forked(Child child) except -1:
    """Its fork is over. True if at-fork hooks have let others do something to the child, as waitpid(-1) does."""
    if not child.is_watched:
        return False
    child.is_watched = False
    if child.state != ALIVE or child.watches:
        return True
    if children.get(child.pid) is child:
        del children[child.pid]
    return False


# The generation that the tables are of.
cdef int _born = 0


cdef int ensure_own_tables() except -1:
    """In the child of C code that runs no at-fork hooks: its first question finds the parent's tables here."""
    return make_own_tables() if _born != generation else 0


cdef int make_own_tables() except -1:
    """In a forked child: what was watched and asked is the parent's."""
    global children, ended, _exit_questions, _questions, _hook_loop, _hook_is_due, _born
    _hook_is_due = False
    _born = generation
    close_all_pidfds()
    _parent_tables.append((children, ended, _exit_questions, _questions, _hook_loop))
    children, ended, _exit_questions, _questions, _hook_loop = {}, {}, {}, {}, None
    return 0
