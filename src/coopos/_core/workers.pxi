# Calls that only a thread can make: the one door into threads.
#
# The threads are C alone (c/workers.h): a job has its operation, its descriptors and its own buffer. Six rules:
#
# 1. A Job is in the registry of calls in flight from before it is submitted until it is over. close() asks there.
# 2. The jobs of a hub arrive in its Mailbox, behind one descriptor in the loop's set. Only that hub's thread takes them out.
# 3. A greenlet that is killed or timed out takes back a job that has not begun. A job that has begun is interrupted if it waits
#    for a peer; it is waited for if a byte or an offset would be lost; otherwise its result is undone. All that takes a bounded
#    time. After it the worker does the rest alone.
# 4. At most COOPOS_THREADS jobs use the disks at once. A job that waits for a peer (another process, possibly for ever) is not
#    counted.
# 5. A forked child has no workers. A job that was under way is asked again there, unless the parent's worker may have moved bytes.
# 6. The jobs of a hub that is gone are given up, like those of killed greenlets: when its thread ends, or, if the thread destroyed
#    its hub and lives on, at the next call of any thread that needs a worker.
#
# A thread without a hub makes the call itself. Arguments have been checked when they come here.

# How many jobs use the disks at once.
cdef int _limit = _settings.THREADS
coopos_pool_set_limit(_limit)

if coopos_pool_hear_of_forks():
    raise MemoryError

cdef long _calls_made = 0

#: How long a killed greenlet waits for its job if a byte or an offset would be lost otherwise.
cdef double LAST_WORD_S = 1.0

#: How long until a lock or semaphore is tried again, if no thread or no descriptor is left to wait with.
cdef double PAUSE_S = 0.01


def count_calls():
    """How many calls were given to a worker, in this process."""
    return _calls_made


def set_limit(int limit):
    """For tests: set how many jobs use the disks at once, 0 or more. Returns the limit before."""
    global _limit
    before, _limit = _limit, limit
    coopos_pool_set_limit(limit)
    return before


def hold(bint is_held):
    """For tests: make workers stop just before their system call, or let them go on."""
    coopos_pool_hold(is_held)


def count_begun():
    """For tests: how many jobs the workers are at."""
    return coopos_pool.begun


def end_workers():
    """Run at exit."""
    with nogil:
        coopos_pool_end()


atexit.register(end_workers)


# ---- the mailbox of a hub -----------------------------------------------------------------------------------------------------

# {loop: its Mailbox}, while it has jobs
cdef dict _mailboxes = {}


class NoWorker(Exception):
    """No thread or no descriptor is left to wait with. Its argument is the exception to raise if nothing else helps."""


@cython.final
@cython.internal
cdef class Mailbox(Wait):
    """Where the finished jobs of one hub arrive. It has a descriptor only while there are jobs, so an idle hub has none open."""
    cdef object loop
    cdef CMailbox *box
    cdef set jobs                  # submitted and not yet arrived
    cdef int waiting               # how many greenlets wait for one of them
    cdef int born                  # generation

    def __cinit__(self, loop):
        self.loop = loop
        self.born = generation
        self.jobs = set()
        self.box = coopos_mailbox_new()
        if self.box == NULL:
            raise NoWorker(os_error(errno, "eventfd", ""))
        self.fd, self.events = self.box.bell[0], READ
        _mailboxes[loop] = self
        set_of_loop(loop).mailbox = self

    def __dealloc__(self):
        if self.box != NULL:
            coopos_mailbox_shut(self.box)

    cdef int listen(self) except -1:
        """Join the loop's set, which also keeps the loop alive until something arrives."""
        if self.set is None:
            set_of_loop(self.loop).enter(self, True, "eventfd")
        return 0

    cdef int stop_if_idle(self) except -1:
        """No greenlet waits any more: leave the set. A job that was left to its worker is looked at when the next one arrives."""
        if self.waiting or self.box == NULL or self.born != generation or not is_alive(self.loop):
            return 0
        if not self.jobs:
            return self.shut()
        if self.set is not None:
            self.set.leave(self)
        return 0

    cdef int on_ready(self) except -1:
        """In the hub: jobs have arrived."""
        cdef CJob *done
        cdef Job job
        if self.born != generation:
            self.shut()            # C code forked, and ran no at-fork hooks
        if self.box == NULL:
            return 0
        self.set.leave(self)       # it is armed for one event
        coopos_bell_hush(self.box.bell)
        while self.box != NULL and (done := coopos_mailbox_take(self.box)) != NULL:
            job = <Job>done.owner
            self.jobs.discard(job)
            try:
                job.arrive()
            except:
                self.loop.handle_error(self, *sys.exc_info())
        if self.waiting and self.box != NULL:
            self.listen()
        return self.stop_if_idle()

    cdef int lose_loop(self) except -1:
        return self.shut()

    cdef int shut(self) except -1:
        """Close it: it is empty, its hub is gone, or this is a forked child and it belongs to the parent.

        A job that its worker has not ended stays in the registry, since close() has to wait for it. Then the next call that needs a
        worker calls shut() again.
        """
        cdef CMailbox *box = self.box
        cdef long long until_us = coopos_now_us() + <long long>(LAST_WORD_S * 1e6)
        cdef Job job
        self.box = NULL
        if self.set is not None:
            self.set.leave(self)
        if box != NULL:
            coopos_mailbox_shut(box)
        for job in list(self.jobs):
            if self.born == generation and not coopos_job_take_back(job.job):
                coopos_job_abandon(job.job)
                if job.job.waits_for_peer and coopos_now_us() < until_us:
                    coopos_job_interrupt(job.job)
                if coopos_job_state(job.job) == COOPOS_BEGUN:
                    job.is_left_behind = True
                    continue
            self.jobs.discard(job)
            job.leave()
        if not self.jobs and _mailboxes.get(self.loop) is self:
            del _mailboxes[self.loop]
        return 0


cdef Mailbox mailbox_of(loop):
    cdef Mailbox mailbox = <Mailbox>_mailboxes.get(loop)
    cdef Mailbox other
    if mailbox is None or len(_mailboxes) > 1:
        for other in list(_mailboxes.values()):
            if other.box == NULL or not is_alive(other.loop):
                other.shut()
    if mailbox is None or mailbox.born != generation:
        mailbox = Mailbox(loop)
    try:
        mailbox.listen()
    except:
        mailbox.stop_if_idle()
        raise
    return mailbox


cdef int ask_again() except -1:
    """In a forked child whose loop was re-initialised: wake every greenlet that waited for a worker, so that it asks again."""
    global _mailboxes
    cdef dict parents = _mailboxes
    cdef Mailbox mailbox
    cdef Job job
    if not parents:
        return 0
    hub = get_hub_if_exists()
    loop = None if hub is None else hub.loop
    _mailboxes = {}
    for mailbox in parents.values():
        for job in mailbox.jobs:
            job.found = coopos_job_orphan(job.job)
            if mailbox.loop is loop and job.waiter is not None:
                loop.run_callback(job.wake)
            else:
                job.leave()
        mailbox.jobs = set()
        if mailbox.loop is loop:
            mailbox.shut()
        elif mailbox.box != NULL:
            # Its thread is not in the child, and the loop must not be touched.
            coopos_mailbox_shut(mailbox.box)
            mailbox.box = NULL
    for inquiry in list(_inquiries):
        (<Inquiry>inquiry).end()
    return 0


# ---- jobs --------------------------------------------------------------------------------------------------------------------

@cython.final
cdef class Job(Call):
    """One call, and the greenlet that waits for it."""
    cdef CJob *job
    cdef str name
    cdef object waiter             # the greenlet, while it waits
    cdef object mailbox            # its hub's Mailbox
    cdef int born                  # generation in which it was submitted
    cdef long long since_us        # when, by the coarse clock
    cdef coopos_state found        # its state at the fork, in a forked child
    cdef bint is_late
    cdef bint is_left_behind       # its greenlet is gone, and its worker not done

    def __dealloc__(self):
        if self.job != NULL:
            coopos_job_free(self.job)

    def __str__(self):
        """What the call is on."""
        if self.job.operation in (COOPOS_OPEN, COOPOS_TRUNCATE):
            return repr(os.fsdecode(<bytes>self.job.buf))
        return str(self.fd) if self.fd >= 0 else ""

    cdef int arrive(self) except -1:
        """In the hub: the worker is done."""
        if self.waiter is not None:
            self.wake()
        elif self.is_left_behind:
            self.leave()
        return 0

    def wake(self):
        """In the hub: switch to its greenlet, which looks at the job's state."""
        cdef object args = (self,)
        if self.waiter is not None:
            coopos_switch(self.waiter, <PyObject *>args, NULL)

    def run_out(self):
        """In the hub: its greenlet has waited long enough."""
        self.is_late = True
        self.wake()

    cdef int on_close(self, int fd, Closing *closing) except -1:
        cdef bint is_useless = self.job.waits_for_peer and not moves_bytes(self)
        if coopos_job_take_back(self.job):
            (<Mailbox>self.mailbox).jobs.discard(self)
            self.error = EBADF
            post(self.loop, self.wake)
        elif coopos_job_keep_open(self.job, fd != self.fd, closing, is_useless):
            if not self.is_left_behind:
                self.error = EBADF     # unless it has a result: has_answer()
                if self.job.waits_for_peer:
                    coopos_job_interrupt(self.job)
        elif is_useless or coopos_job_state(self.job) == COOPOS_IDLE:
            self.error = EBADF
        return 0


cdef Job new_job(coopos_operation operation, str name, int fd=-1, size_t room=0):
    cdef Job job = Job.__new__(Job)
    job.job = coopos_job_new(room)
    if job.job == NULL:
        raise MemoryError
    job.job.owner = <void *>job
    job.job.operation = operation
    job.job.fd = job.fd = fd
    job.other = -1
    job.name = name
    return job


cdef int make_here(Job job) except -1:
    """Make the call in this thread, which has no other greenlets."""
    while True:
        with nogil:
            coopos_job_make(job.job)
        if job.job.rc >= 0 or not is_interrupted(job.job.err):
            return 0


cdef bint moves_bytes(Job job) noexcept:
    return job.job.operation in (COOPOS_MOVE, COOPOS_COPY, COOPOS_SENDFILE, COOPOS_SPLICE)


cdef int run(Job job) except -1:
    """Have a worker make the call, and let the others run; the result is in *rc* and *err*. EBADF if it was closed before it has
    begun, or while it waited for another party. If anything is raised, *rc* tells whether it came to something all the same.
    """
    global _calls_made
    cdef object hub = reachable_hub()
    job.job.rc, job.job.err = -1, 0
    if hub is None:
        if get_hub_if_exists() is not None:
            # Refuse before a worker moves bytes for a call that can't wait for them.
            raise in_hub_error()
        return make_here(job)
    _calls_made += 1
    job.enter(job.name)
    try:
        while not wait_for(job, hub):
            pass
    finally:
        if not job.is_left_behind:
            job.leave()
    if job.error and not has_answer(job):
        raise os_error(job.error, job.name, job.fd)
    return 0


cdef bint has_answer(Job job) noexcept:
    """Whether a call whose descriptor was closed has a result all the same. A lock is useless without its descriptor."""
    if job.job.rc < 0:
        return job.job.err != 0 and job.job.err != EINTR
    return moves_bytes(job) or not job.job.waits_for_peer


cdef Mailbox submit(Job job, loop):
    cdef Mailbox mailbox = mailbox_of(loop)
    cdef int err
    job.since_us = coopos_coarse_now_us()
    try:
        # Before a worker has it: from then on the job must stay until it arrives, so nothing may fail in between.
        mailbox.jobs.add(job)
        err = coopos_job_submit(job.job, mailbox.box)
        if err:
            raise NoWorker(RuntimeError("can't start new thread"))
    except:
        mailbox.jobs.discard(job)
        mailbox.stop_if_idle()
        raise
    job.mailbox = mailbox
    job.born = generation
    return mailbox


cdef bint make_anyhow(Job job, ex) except -1:
    """Do without a worker. True: it is over. False: try again. What can't be tried without waiting raises *ex*'s exception."""
    if not job.job.waits_for_peer:
        make_here(job)             # blocks, but a disk answers
        return True
    coopos_job_poll(job.job)
    if job.job.rc >= 0:
        return True
    if job.job.err == ENOSYS:
        raise ex.args[0] from None
    if job.job.err not in (EAGAIN, EACCES, EINTR):
        return True
    job.job.err = 0
    sleep(PAUSE_S)
    return False


cdef bint wait_for(Job job, object hub) except -1:
    """Submit the job and wait for it. True: it is over. False: it has to be submitted again."""
    cdef Mailbox mailbox
    cdef bint has_arrived = False
    cdef object current = coopos_current_greenlet()
    if job.error:
        return True
    try:
        mailbox = submit(job, hub.loop)
    except NoWorker as ex:
        return make_anyhow(job, ex)
    job.waiter = current
    mailbox.waiting += 1
    try:
        came_back = give_way(hub, current, None, -1)
        if came_back is not job:
            raise wrong_switch(came_back, job.name)
        has_arrived = coopos_job_state(job.job) == COOPOS_DONE
    except BaseException as ex:
        job.waiter = None
        thrown = give_up(job, hub, current)
        note_place(ex if thrown is None else thrown, job.name, job)
        if thrown is not None:
            raise thrown           # as if the greenlet had been killed again in a `finally`
        raise
    finally:
        job.waiter = None
        mailbox.waiting -= 1
        if not has_arrived:        # else on_ready() does so, when this greenlet gives way
            mailbox.stop_if_idle()
    return True if job.born == generation else is_over_in_child(job)


cdef bint is_over_in_child(Job job) except -1:
    """In a forked child, which has no worker for the job: whether it needn't be submitted again."""
    if job.found == COOPOS_DONE or job.error:
        return True
    if job.found == COOPOS_BEGUN and moves_bytes(job) and (job.job.writes or job.job.operation != COOPOS_MOVE):
        raise error_with_message(ECANCELED, f"{job.name}({job.fd}): a thread of the parent process was at it")
    return False


cdef object give_up(Job job, object hub, object current):
    """Its greenlet was killed or timed out: see rule 3. Returns the exception that was thrown in meanwhile, or None."""
    thrown = None
    if job.born != generation:
        return None
    if coopos_job_take_back(job.job):
        (<Mailbox>job.mailbox).jobs.discard(job)
        return None
    if job.job.waits_for_peer:
        coopos_job_interrupt(job.job)
    elif moves_bytes(job):
        thrown = last_word(job, hub, current)
        if job.born != generation:
            return thrown
    coopos_job_abandon(job.job)
    job.is_left_behind = coopos_job_state(job.job) == COOPOS_BEGUN
    if coopos_mailbox_recall(job.job):
        (<Mailbox>job.mailbox).jobs.discard(job)
    return thrown


cdef object last_word(Job job, object hub, object current):
    """Wait up to LAST_WORD_S for a job that has begun. Returns the exception that was thrown in meanwhile, or None."""
    thrown = None
    timer = hub.loop.timer(LAST_WORD_S)
    timer.start(job.run_out)
    try:
        while coopos_job_state(job.job) == COOPOS_BEGUN and not job.is_late and job.born == generation:
            job.waiter = current
            try:
                give_way(hub, current, None, -1)
            except BaseException as ex:
                thrown = ex
            finally:
                job.waiter = None
    finally:
        timer.stop()
        timer.close()
    return thrown


cdef int give_back(Job job, ssize_t n) except -1:
    """Move the offset back by the last *n* bytes that a read has brought."""
    job.job.rc = n
    if not job.job.is_closed:
        coopos_job_undo(job.job)
    return 0


cdef int attach_progress(ex, str name, value) except -1:
    """Have an exception say what was moved before it came; None: nothing. One object may come more than once, as Timeouts do. Some
    classes refuse attributes, as a frozen dataclass does: what was thrown in comes out all the same.
    """
    try:
        if value is not None:
            setattr(ex, name, value)
        elif hasattr(ex, name):
            delattr(ex, name)
    except Exception:
        pass
    return 0


cdef object result_of(Job job, object subject, object path=None):
    """What the system call returned; its error is raised."""
    if job.job.rc >= 0:
        return job.job.rc
    if path is not None:
        raise path_error(job.job.err, path)
    raise os_error(job.job.err, job.name, subject)


cdef ssize_t move_guarded(const Move *move) noexcept:
    """One read or write under a guard: a signal ends it if it blocks. The workers' interrupts use the same signal."""
    return coopos_move_guarded(move)


# ---- questions of more than one hub ------------------------------------------------------------------------------------------

# Inquiries that have begun and not ended.
cdef set _inquiries = set()


cdef class Inquiry:
    """A waitid(2) that a worker makes for any number of loops and threads. Its bell stays readable once there is an answer.

    Nothing is lost if nobody waits for it any more: it has to be asked with WNOWAIT.
    """
    cdef CJob *job
    cdef CMailbox *box             # NULL: it has ended
    cdef int born                  # generation

    cdef bint begin(self, idtype_t idtype, id_t id, int options) except -1:
        """False: there is no descriptor for the bell, or no thread."""
        self.born = generation
        _inquiries.add(self)
        self.job = coopos_job_new(0)
        if self.job == NULL:
            self.end()
            raise MemoryError
        self.job.operation = COOPOS_WAITID
        self.job.waits_for_peer = True
        self.job.idtype, self.job.id, self.job.flags = idtype, id, options
        self.box = coopos_mailbox_new()
        if self.box == NULL or coopos_job_submit(self.job, self.box):
            self.end()
            return False
        return True

    cdef int end(self) noexcept:
        """No loop and no thread wants the answer any more."""
        cdef CJob *job = self.job
        cdef CMailbox *box = self.box
        self.job, self.box = NULL, NULL
        _inquiries.discard(self)
        if job == NULL:
            return 0
        if self.born != generation:
            coopos_job_orphan(job)
        elif coopos_job_state(job) == COOPOS_BEGUN:
            coopos_job_interrupt(job)
        if box != NULL:
            coopos_mailbox_shut(box)
        coopos_job_free(job)
        return 0
