# The records of children that somebody watches or waits for.
#
# A Child has a Watch in each loop that waits for it. To collect a child means to reap its zombie and keep the status in the record.
# One loop or caller collects the child, and one caller claims the status. The states, and the method on each edge:
#
#            collect()           claim()
#     ALIVE -----------> ENDED ----------> CLAIMED
#       |                                     ^
#       +--- claim_from_kernel() -------------+     a caller's own waitid(2) reaped it
#       |
#       +--- lose() ---> LOST                       other code reaped it, and the kernel doesn't tell the status
#
# collect() calls lose() if other code was first. The record of a child that nobody watches is ENDED only until a waiter claims it.
# In a forked child the parent's records, whose `born` is not `generation`, become LOST by is_parents().

# ---- the records ------------------------------------------------------------------------------------------------------------

@cython.final
cdef class Child(Record):
    """A child process that somebody here watches or waits for. A ``fork_and_watch`` callback gets it as its argument.

    It has the attributes of gevent's child watchers: pid, rpid, rstatus, loop, ref, callback, stop() and close().
    """
    cdef Report report             # once it has ended
    cdef int group                 # its process group when it ended
    cdef bint is_stolen            # other code in this process collected it
    cdef ino_t inode               # of its pidfds, if no other process's pidfd has the same; else 0
    cdef object home               # the Watch of the loop that watched it first
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
        """How the end of the child is noticed: by ``"pidfd"`` or by ``"thread"``."""
        return self.watched_by

    @property
    def state_word(self):
        """"alive" when it was last asked for; "ended", "waited for" or "lost"."""
        return ("alive", "ended", "waited for", "lost")[self.state]

    @property
    def is_ours(self):
        """Whether it is a child of this process, and not of its parent."""
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
        """Ask the kernel, without waiting, whether it has ended. :attr:`rpid` is up to date then, even if the hub has not run."""
        self.collect(False, NULL)

    def join(self):
        """Park in this thread's hub until it has ended. Claims nothing, so any number of greenlets and threads may wait."""
        self.collect(False, NULL)
        while self.state == ALIVE:
            self.wait("wait")
            self.collect(False, NULL)

    def send_signal(self, signum):
        """kill(2), but never of a new process with the same pid. Does nothing once the child has ended."""
        cdef int number = as_int(signum)
        cdef int pidfd, rc
        self.collect(False, NULL)
        if self.state != ALIVE:
            return
        pidfd = self.pidfd()
        rc = coopos_pidfd_signal(pidfd, number) if pidfd >= 0 else -1
        # A child that was not reaped keeps its pid. Sandboxes refuse pidfd_send_signal(2), which is newer.
        if pidfd < 0 or (rc < 0 and (errno == ENOSYS or errno == EPERM)):
            rc = kill(self.pid, number)
        if rc < 0 and errno != ESRCH:
            raise os_error(errno, "kill", self.pid)

    def link(self, callback, bint ref):
        """Have ``callback(child)`` called in this thread's hub when the child has ended; soon, if it has ended already."""
        self.add_callback(callback, get_hub().loop, ref)

    def unlink(self, callback):
        """Undo :meth:`link`."""
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
        """Collect it if it has ended, and throw the status away. Whether it has ended."""
        self.collect(False, NULL)
        self.claim_status()
        return self.state != ALIVE

    def claim_status(self):
        """Claim the status if nobody has yet. Later waits for the child raise ChildProcessError."""
        if self.state == ENDED:
            self.claim()

    def __repr__(self):
        cdef str text = f"<coopos child {self.pid} {self.state_word}"
        cdef Py_ssize_t n_waiting = 0, n_callbacks = 0
        cdef Watch watch
        if self.state == ALIVE:
            for watch in self.watches:
                n_waiting += len(watch.waiters)
                n_callbacks += len(watch.callbacks or ())
            text += f", watched by {self.watched_by}" if self.watched_by else ""
            text += f", waiting: {n_waiting}" if n_waiting else ""
            text += f", callbacks: {n_callbacks}" if n_callbacks else ""
        elif self.state != LOST:
            text += f", status {self.report.status:#x}: "
            text += f"signal {self.report.status & 0x7f}" if self.report.status & 0x7f else f"exit {self.report.status >> 8}"
        return text + ">"

    cdef bint is_parents(self) except -1:
        """Whether the record is from before a fork, so that the child is the parent's. It is LOST then, and notifies nobody."""
        if self.born == generation:
            return False
        if self.state == ALIVE:
            self.state = LOST
            self.watches = []
        return True

    cdef bint wait(self, str call) except -1:
        """Wait until the child may have ended, in this thread's hub if it has one. False, at once: the process doesn't exist."""
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
                found.wait(hub, call)
        finally:
            found.close_if_unused()
        return True

    cdef ino_t pidfd_inode(self) except? 0:
        """The inode number of its pidfds, which identifies the child. 0: unknown, or the kernel doesn't number them."""
        if not self.inode:
            self.inode = coopos_pidfd_inode(self.pidfd())
        return self.inode

    cdef int pidfd(self) except -2:
        """A pidfd of it, from any loop's Watch, or -1."""
        cdef Watch watch
        for watch in self.watches:
            if watch.fd >= 0 and watch.born == generation:
                return watch.fd
        return -1

    cdef int remove_watch(self, watch) except -1:
        """Forget a Watch. After the last one, forget the record too, unless a caller may still ask for the status."""
        if watch in self.watches:
            self.watches.remove(watch)
        if not self.watches and not self.is_watched and children.get(self.pid) is self:
            del children[self.pid]
        return 0

    cdef int ask(self, int options, Report *report) except -2:
        """waitid(2) of this child with WNOHANG. 0, also if nothing has happened; -1 if other code collected the child."""
        cdef int pidfd = self.pidfd()
        cdef int rc = -1
        if pidfd >= 0:
            # By pidfd, since the pid may have been used again.
            rc = ask_now(COOPOS_P_PIDFD, pidfd, options, report)
        # P_PIDFD is new in Linux 5.4, and sandboxes refuse it: https://man7.org/linux/man-pages/man2/waitid.2.html
        if pidfd < 0 or (rc < 0 and errno != ECHILD):
            rc = ask_now(P_PID, self.pid, options, report)
        if rc < 0 and errno != ECHILD:
            raise os_error(errno, "waitid", self.pid)
        return rc

    cdef bint collect(self, bint claims, Report *stop, bint is_dead=False) except -1:
        """Ask the kernel for the status, without waiting. *claims*: the caller will claim it before any other code can run.

        True: the child has not ended, but this process traces it, and it has stopped. The stop is taken into *stop*, or left in the
        kernel if *stop* is NULL. *is_dead*: a pidfd said that the child has ended, so it can't be such a stop.
        """
        global _is_incomplete
        cdef Report report
        cdef int pidfd, rc
        if self.state != ALIVE or self.is_parents():
            return False
        # A zombie still has its process group. Once it is reaped the group can't be asked for.
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
                try:
                    if children.get(self.pid) is self:
                        ended[self.pid] = self
                except MemoryError:
                    _is_incomplete = True
            self.announce_end()
        return False

    cdef int claim_from_kernel(self, const Report *report) except -1:
        """The caller's own waitid(2) reaped the child. The caller keeps the status."""
        self.report = report[0]
        return self.claim()

    cdef int announce_end(self) except -1:
        """Have the child hook called, and wake the waiters for any child, which have no Watch of this one."""
        global _hook_is_due
        if self.is_watched:
            _hook_is_due = True
        cdef Question question
        if _questions:
            # The child is reaped, so the workers' waitid(2) can't report it any more, nor a stop of it.
            for question in list(_questions.values()):
                if question.is_wanted():
                    question.ring()
                else:
                    question.cancel()
        return 0

    cdef int lose(self) except -1:
        """Other code reaped the child, and the kernel doesn't tell the status."""
        self.state = LOST
        self.remove_from_tables()
        self.end_watches()
        return 0

    cdef int remove_from_tables(self) except -1:
        """No later call finds this record by its pid."""
        if children.get(self.pid) is self:
            del children[self.pid]
        if ended and ended.get(self.pid) is self:
            del ended[self.pid]
        return 0

    cdef int claim(self) except -1:
        """The caller takes the status: it has seen that nobody had (take_from_record), with no switch in between. All other waiters
        for the child wake, and get ChildProcessError.
        """
        cdef bint was_alive = self.state == ALIVE
        self.state = CLAIMED
        self.remove_from_tables()
        if was_alive:
            self.announce_end()
        self.end_watches()
        return 0

    cdef int end_watches(self) except -1:
        """Close every open Watch in its own thread, and wake its waiters."""
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
                watch.close()      # its thread has ended, and its hub with it
        return 0

    cdef int add_callback(self, callback, loop, bint ref) except -1:
        """Watch in *loop*. If the child has ended already, the callback is called in the loop's next turn. If *loop* is None, only
        keep a pidfd, and call nothing.
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


# {pid: its Child}, while it is watched or waited for, or its status can still be claimed
cdef dict children = {}
# {pid: Child}: the watched children that are ENDED, in the order in which they were collected
cdef dict ended = {}
# Whether there was no memory to put one there.
cdef bint _is_incomplete = False
# In a forked child, the parent's tables. They are never freed: freeing thousands of records would copy the pages they are on.
cdef list _parent_tables = []


cdef object lost_child(Child child):
    if child.born != generation:
        return error_with_message(ECHILD, f"{child.pid} is a child of the process that has forked this one")
    return error_with_message(
        ECHILD, f"somebody else in this process collected child {child.pid}, before it was watched or on a kernel that doesn't "
        f"tell its status (Linux does since 6.15). gevent.subprocess does that unless coopos.patch() was called; so does whoever "
        f"calls waitpid(-1), and ignoring SIGCHLD")


cdef bint is_used_again(int pid) except -1:
    """Whether the pid of a child that was collected belongs to a newer child of ours."""
    cdef Report report
    return ask_now(P_PID, pid, WEXITED | WNOWAIT, &report) == 0


def check_loop(loop):
    """Raise unless *loop* is an event loop of gevent that was not destroyed."""
    if not hasattr(loop, "run_callback_threadsafe"):
        raise TypeError(f"loop must be an event loop of gevent or None, not {loop!r}")
    if not is_alive(loop):
        raise ValueError("operation on destroyed loop")


cdef Child record(int pid, callback, loop, bint ref, Child child, bint needs_hub=True):
    """Watch *child*, or if that is None make a record for child *pid*.

    A thread without a hub gets one if it is the main thread, or if the callback needs it. Any other thread gets none, since nothing
    would run or destroy it: the child has only a record then, and the callback is not called.
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
    """Watch child *pid*, which was just forked: collect it when it ends, keep its status, call the callback. Returns the Child.

    *notes*: from fork_to_watch(). *needs_hub*: if False, a thread without a hub gets none, and the callback is not called there.
    Exceptions have the pid as an attribute, so that the caller can wait for the child. Never switches greenlets.
    """
    cdef int number = as_int(pid)
    cdef Child before
    cdef Child note
    try:
        before = <Child>children.get(number)
        note = <Child>notes.get(number) if notes else None
        if note is None and before is not None:
            # The pid is used again. Only a pidfd can still ask for the older child.
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
    """Watch child *pid*, however it was forked, and even if others wait for it or watch it. Returns the Child.

    Raises ECHILD if it isn't a child of this process, or was waited for. Never switches greenlets.
    """
    cdef int number = as_int(pid)
    cdef Child child
    cdef Report report
    cdef bint is_there
    ensure_own_tables()
    child = <Child>children.get(number)
    if child is not None:
        child.collect(False, NULL)     # if other code collected it, the pid may be a newer child's
    is_there = ask_now(P_PID, number, WEXITED | WNOWAIT, &report) == 0
    if child is not None and child.state != ALIVE and is_there:
        child.remove_from_tables()     # the record is of an older child with this pid
        child = None
    if not is_there and (child is None or child.state != ENDED):
        raise os_error(errno, "watch", number)
    return record(number, callback, loop, ref, child)


# ---- fork --------------------------------------------------------------------------------------------------------------------

cdef int add_forked(Child child, int pid) except -1:
    """Keep *child*, a record made before the fork, as child *pid* until the at-fork hooks are over. Runs no Python code."""
    child.pid = pid
    if pid not in children:    # else the record is of an older child with this pid, and no code has asked for it since
        child.is_watched = True
        children[pid] = child
    return 0


cdef bint remove_forked(Child child) except -1:
    """The at-fork hooks are over: remove *child* again. True if other greenlets collected or watched it during the hooks."""
    if not child.is_watched:
        return False
    child.is_watched = False
    if child.state != ALIVE or child.watches:
        return True
    if children.get(child.pid) is child:
        del children[child.pid]
    return False


cdef int _born = 0                 # the generation that the tables are of


cdef int ensure_own_tables() except -1:
    """For children forked by C code that runs no at-fork hooks: they still have the parent's tables when they first ask."""
    return make_own_tables() if _born != generation else 0


cdef int complete_ended() except -1:
    """Put the children into `ended` that collect() had no memory for."""
    global _is_incomplete
    cdef Child child
    if _is_incomplete:
        for child in children.values():
            if child.is_watched and child.state == ENDED and child.pid not in ended:
                ended[child.pid] = child
        _is_incomplete = False
    return 0


cdef int make_own_tables() except -1:
    """In a forked child: start with empty tables. What was watched and asked before belongs to the parent."""
    global children, ended, _exit_questions, _questions, _hook_loop, _hook_is_due, _born
    _hook_is_due = False
    _born = generation
    close_all_pidfds()
    if not (children or ended or _exit_questions or _questions or _hook_loop is not None):
        return 0                   # an empty table needs no new page
    _parent_tables.append((children, ended, _exit_questions, _questions, _hook_loop))
    children, ended, _exit_questions, _questions, _hook_loop = {}, {}, {}, {}, None
    return 0
