"""Calls that only a thread can make: the one door into threads.

The threads are C alone (_workers.h): a job has its operation, its descriptors and a buffer of its own. Five rules hold:

1. A Job is in the registry of calls in flight from before it is submitted until it is over. close() asks there.
2. The jobs of a hub arrive in its Mailbox, behind one descriptor in the loop's set. Only that hub's thread takes them out.
3. A greenlet that is killed or timed out takes back what has not begun. What has begun is interrupted where it waits for another
   party, waited for where a byte or an offset would be lost, and undone. All that takes a bounded time; after it the worker does
   the rest alone.
4. Work for a disk is limited to COOPOS_THREADS at once. What waits for another party isn't counted among it.
5. A forked child has no workers. What was under way is asked again there, unless the parent's worker may have moved bytes.
6. A hub that is gone gets nothing. When its thread ends, its jobs are given up as those of killed greenlets are. A thread that
   destroys its hub and lives on tells nobody: the next call that needs a worker, in any thread, gives them up.

In a thread that has no hub the call is made plainly. The module knows libc and `_parking`. Arguments are right when they come here.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.pythread cimport PyThread_get_thread_ident
from libc.errno cimport EACCES, EAGAIN, EBADF, EINTR, ENOSYS, ENXIO, errno
from libc.stdio cimport SEEK_CUR, SEEK_END, SEEK_SET
from libc.string cimport memcpy
from posix.fcntl cimport AT_FDCWD, F_GETFD, F_SETFL, F_WRLCK, O_NONBLOCK, O_RDWR, fcntl, openat
from posix.types cimport id_t, mode_t, off_t
from posix.unistd cimport close as c_close, lseek

from coopos._parking cimport (
    READ, Call, Wait, as_int, check_open, generation, give_way, is_alive, os_error, post, reachable_hub, refusal, set_of_loop,
    wrong_switch)
from coopos._posix cimport (
    ECANCELED, Closing, Move, PyErr_CheckSignals, PyObject_AsFileDescriptor, S_ISCHR, S_ISFIFO, S_ISREG, coopos_current_greenlet,
    coopos_import_greenlet, coopos_now_us, coopos_switch, fstat, idtype_t, sem_t, stat_t)

import atexit
import os
import sys

from gevent.hub import _get_hub as get_hub_if_exists, sleep
from gevent.monkey import get_original


coopos_import_greenlet()

# At the disks at once.
cdef int _limit = max(int(os.environ.get("COOPOS_THREADS") or 64), 1)
coopos_pool_set_limit(_limit)

if coopos_pool_hear_of_forks():
    raise MemoryError

cdef long _calls_made = 0

#: A call that has begun when its greenlet is killed is waited for so long, where something would be lost otherwise.
cdef double LAST_WORD_S = 1.0

#: Before what another party has is asked for again, where there is no thread, or no descriptor, to wait by.
cdef double PAUSE_S = 0.01


def count_calls():
    """How many calls were given to a worker, in this process."""
    return _calls_made


def set_limit(int limit):
    """For tests: work at so many jobs at the disks at once, 0 or more; what was the limit."""
    global _limit
    before, _limit = _limit, limit
    coopos_pool_set_limit(limit)
    return before


def hold(bint is_held):
    """For tests: let workers stand still just before the system call; or go on."""
    coopos_pool_hold(is_held)


def count_begun():
    """For tests: how many jobs workers have begun, and not ended."""
    return coopos_pool.begun


def end_workers():
    """Run at exit."""
    with nogil:
        coopos_pool_end()


atexit.register(end_workers)


# ---- where a hub's jobs arrive -----------------------------------------------------------------------------------------------

# {loop: its Mailbox}, while it has jobs
cdef dict _mailboxes = {}


@cython.final
@cython.internal
cdef class ThreadEnd:
    """Goes with the thread that it belongs to."""

    def __dealloc__(self):
        cdef unsigned long thread = PyThread_get_thread_ident()
        cdef Mailbox mailbox
        if coopos_pool.is_ending:
            return                 # with all threads, and the interpreter
        for mailbox in list(_mailboxes.values()):
            if mailbox.thread == thread and mailbox.born == generation:
                mailbox.shut()


_here = get_original("_thread", "_local")()


class NoWorker(Exception):
    """There is no thread, or no descriptor, to wait by. Carries what is to be raised if that can't be helped."""


@cython.final
@cython.internal
cdef class Mailbox(Wait):
    """The jobs of one hub. It has a descriptor only while there are some: a hub that is done leaves none open."""
    cdef object loop
    cdef CMailbox *box
    cdef set jobs                  # that have been submitted, and not arrived
    cdef int waiting               # greenlets
    cdef int born                  # generation
    cdef unsigned long thread      # its hub's

    def __cinit__(self, loop):
        self.loop = loop
        self.born = generation
        self.thread = PyThread_get_thread_ident()
        if not hasattr(_here, "end"):
            _here.end = ThreadEnd()
        self.jobs = set()
        self.box = coopos_mailbox_new()
        if self.box == NULL:
            raise NoWorker(os_error(errno, "eventfd", ""))
        self.fd, self.events = self.box.bell[0], READ
        _mailboxes[loop] = self

    def __dealloc__(self):
        if self.box != NULL:
            coopos_mailbox_shut(self.box)

    cdef int listen(self) except -1:
        """Have the loop tell of what arrives, and live until then."""
        if self.set is None:
            set_of_loop(self.loop).enter(self, True, "eventfd")
        return 0

    cdef int rest(self) except -1:
        """Nobody waits any more. What is left to its worker is looked at with the next job."""
        if self.waiting or self.box == NULL or self.born != generation or not is_alive(self.loop):
            return 0
        if not self.jobs:
            return self.shut()
        if self.set is not None:
            self.set.leave(self)
        return 0

    cdef int tell(self) except -1:
        """In the hub: some jobs are over."""
        cdef CJob *done
        cdef Job job
        if self.born != generation:
            self.shut()            # in the child of C code that runs no at-fork hooks
        if self.box == NULL:
            return 0
        self.set.leave(self)       # which has told once, and no more
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
        return self.rest()

    cdef int shut(self) except -1:
        """It is empty; its loop is destroyed, or its thread has ended; or it is the parent's, in a forked child.

        What its workers are still at stays in the registry: a close waits for them. So a hub that is gone calls for this again and
        again, until they are done.
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
        mailbox.rest()
        raise
    return mailbox


cdef int ask_again() except -1:
    """In a forked child whose loop has been re-initialised: whoever waited for a worker looks what has become of it."""
    global _mailboxes
    cdef dict parents = _mailboxes
    cdef Mailbox mailbox
    cdef Job job
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
            # Of a thread that isn't here, whose loop is left alone.
            coopos_mailbox_shut(mailbox.box)
            mailbox.box = NULL
    for inquiry in list(_inquiries):
        (<Inquiry>inquiry).end()
    return 0


# ---- jobs --------------------------------------------------------------------------------------------------------------------

@cython.final
cdef class Job(Call):
    """One call, and the greenlet that waits for it."""

    def __dealloc__(self):
        if self.job != NULL:
            coopos_job_free(self.job)

    cdef int arrive(self) except -1:
        """In the hub: the worker is done."""
        if self.waiter is not None:
            self.wake()
        elif self.is_left_behind:
            self.leave()
        return 0

    def wake(self):
        """In the hub: for its greenlet to look what has become of it."""
        cdef object args = (self,)
        if self.waiter is not None:
            coopos_switch(self.waiter, <PyObject *>args, NULL)

    def run_out(self):
        """In the hub: its greenlet has waited long enough."""
        self.is_late = True
        self.wake()

    cdef int hear_of_close(self, int fd, Closing *closing) except -1:
        if coopos_job_take_back(self.job):
            (<Mailbox>self.mailbox).jobs.discard(self)
            self.error = EBADF
            post(self.loop, self.wake)
        elif coopos_job_keep_open(self.job, fd != self.fd, closing, self.job.waits_for_peer and not moves_bytes(self)):
            if not self.is_left_behind:
                self.error = EBADF     # unless it comes to something
                if self.job.waits_for_peer:
                    coopos_job_interrupt(self.job)
        elif coopos_job_state(self.job) == COOPOS_IDLE:
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
    """In a thread that has no other greenlets."""
    while True:
        with nogil:
            coopos_job_make(job.job)
        if job.job.rc >= 0 or job.job.err != EINTR:
            return 0
        PyErr_CheckSignals()


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
            # Before a worker is asked: what it would move then would be nobody's.
            raise refusal()
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
    """Whether a call whose descriptor was closed has come to something. A lock got by the number is of no use to anybody."""
    if job.job.rc < 0:
        return job.job.err != 0 and job.job.err != EINTR
    return moves_bytes(job) or not job.job.waits_for_peer


cdef Mailbox submit(Job job, loop):
    cdef Mailbox mailbox = mailbox_of(loop)
    cdef int err = coopos_job_submit(job.job, mailbox.box)
    if err:
        mailbox.rest()
        raise NoWorker(RuntimeError("can't start new thread"))
    return mailbox


cdef bint make_anyhow(Job job, ex) except -1:
    """Without a worker; whether it is over. What can't be asked for without waiting is refused."""
    if not job.job.waits_for_peer:
        make_here(job)             # a disk comes to an end
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
    """Whether it is over, or has to be asked once more."""
    cdef Mailbox mailbox
    cdef bint has_arrived = False
    cdef object current = coopos_current_greenlet()
    if job.error:
        return True
    try:
        mailbox = submit(job, hub.loop)
    except NoWorker as ex:
        return make_anyhow(job, ex)
    job.mailbox = mailbox
    job.born = generation
    job.waiter = current
    mailbox.jobs.add(job)
    mailbox.waiting += 1
    try:
        came_back = give_way(hub, current)
        if came_back is not job:
            raise wrong_switch(came_back, job.name)
        has_arrived = coopos_job_state(job.job) == COOPOS_DONE
    except BaseException:
        job.waiter = None
        thrown = give_up(job, hub, current)
        if thrown is not None:
            raise thrown           # the latest word, as of who is killed again in a `finally`
        raise
    finally:
        job.waiter = None
        mailbox.waiting -= 1
        if not has_arrived:        # else look() goes on when this greenlet gives way
            mailbox.rest()
    return True if job.born == generation else is_over_in_child(job)


cdef bint is_over_in_child(Job job) except -1:
    """In a forked child, which has no worker for it."""
    if job.found == COOPOS_DONE or job.error:
        return True
    if job.found == COOPOS_BEGUN and moves_bytes(job) and (job.job.writes or job.job.operation != COOPOS_MOVE):
        raise OSError(ECANCELED, f"{os.strerror(ECANCELED)}: {job.name}({job.fd}): a thread of the parent process was at it")
    return False


cdef object give_up(Job job, object hub, object current):
    """Its greenlet goes: see rule 3. Returns what is thrown in meanwhile, or None."""
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
    """Wait for what has begun; but not for ever. Returns what is thrown in meanwhile, or None."""
    thrown = None
    timer = hub.loop.timer(LAST_WORD_S)
    timer.start(job.run_out)
    try:
        while coopos_job_state(job.job) == COOPOS_BEGUN and not job.is_late and job.born == generation:
            job.waiter = current
            try:
                give_way(hub, current)
            except BaseException as ex:
                thrown = ex
            finally:
                job.waiter = None
    finally:
        timer.stop()
        timer.close()
    return thrown


cdef int give_back(Job job, ssize_t n) except -1:
    """Of what a read has brought, the last *n* bytes."""
    job.job.rc = n
    if not job.job.is_closed:
        coopos_job_undo(job.job)
    return 0


cdef int tell(ex, str name, value) except -1:
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
    """What the system call has returned, once it was run; or its error."""
    if job.job.rc >= 0:
        return job.job.rc
    if path is not None:
        raise OSError(job.job.err, os.strerror(job.job.err), path)
    raise os_error(job.job.err, job.name, subject)


cdef ssize_t move_guarded(const Move *move) noexcept:
    """One read or write of what poll(2) calls ready; a signal ends it, should it block. The signal that interrupts workers, too."""
    return coopos_move_guarded(move)


# ---- what concerns more than one hub -----------------------------------------------------------------------------------------

# Those that are under way, or whose answer somebody has still to hear.
cdef set _inquiries = set()


cdef class Inquiry:
    """A waitid(2) that a worker makes, for any number of loops and threads. Its bell rings, for good, when there is an answer.

    Nothing is lost if nobody waits for it any more: it has to be asked with WNOWAIT.
    """

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
        """Nobody wants to know any more."""
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


# ---- for Python --------------------------------------------------------------------------------------------------------------

cdef int check_fd(int fd, str name) except -1:
    """Before anything waits."""
    check_open(fd, name)
    if fcntl(fd, F_GETFD) < 0:
        raise os_error(errno, name, fd)
    return 0


cdef dict _operations = {
    "fsync": COOPOS_FSYNC, "fdatasync": COOPOS_FDATASYNC, "ftruncate": COOPOS_FTRUNCATE, "posix_fallocate": COOPOS_FALLOCATE}


def on_file(str name not None, fd, Py_ssize_t length=0, Py_ssize_t offset=0):
    """fsync(2), fdatasync(2), ftruncate(2) or posix_fallocate(3)."""
    cdef int number = as_int(fd) if name in ("ftruncate", "posix_fallocate") else PyObject_AsFileDescriptor(fd)
    cdef Job job
    check_fd(number, name)
    job = new_job(<coopos_operation><int>_operations[name], name, number)
    job.job.offset, job.job.length = offset, length
    run(job)
    result_of(job, number)


def sync():
    """sync(2)."""
    run(new_job(COOPOS_SYNC, "sync"))


cdef Job new_path_job(coopos_operation operation, str name, int fd, bytes path):
    cdef Job job = new_job(operation, name, fd, len(path) + 1)
    memcpy(job.job.buf, <const char *>path, len(path) + 1)
    return job


def truncate(bytes path not None, Py_ssize_t length, subject):
    """truncate(2). What it raises names *subject* as the file."""
    cdef Job job = new_path_job(COOPOS_TRUNCATE, "truncate", -1, path)
    job.job.length = length
    run(job)
    result_of(job, None, subject)


def open_at_once(bytes path not None, Py_ssize_t flags, Py_ssize_t mode, dir_fd, subject):
    """openat(2) of what nobody has to be waited for. -1: somebody has, who keeps a lease on the file; or it is a FIFO by now."""
    cdef int number = AT_FDCWD if dir_fd is None else as_int(dir_fd)
    cdef int how = as_int(flags)
    cdef mode_t bits = <mode_t>as_int(mode)
    cdef const char *name = path
    cdef stat_t st
    cdef int fd, err
    while True:
        with nogil:
            fd = openat(number, name, how | O_NONBLOCK, bits)
            err = errno
        if fd >= 0:
            break
        if err in (EAGAIN, ENXIO):
            return -1
        if err != EINTR:
            raise OSError(err, os.strerror(err), subject)
        PyErr_CheckSignals()
    if fstat(fd, &st) == 0 and not S_ISREG(st.st_mode) and (S_ISFIFO(st.st_mode) or S_ISCHR(st.st_mode)) and not how & O_RDWR:
        c_close(fd)
        return -1
    fcntl(fd, F_SETFL, how)
    return fd


def wait_open(bytes path not None, Py_ssize_t flags, Py_ssize_t mode, dir_fd, subject):
    """openat(2) that may wait for somebody at the other end. What it raises names *subject* as the file."""
    cdef Job job = new_path_job(COOPOS_OPEN, "open", AT_FDCWD if dir_fd is None else as_int(dir_fd), path)
    job.job.flags = as_int(flags)
    job.job.mode = <mode_t>as_int(mode)
    job.job.waits_for_peer = True
    run(job)
    return result_of(job, None, subject)


def wait_lock(Py_ssize_t fd, Py_ssize_t length, Py_ssize_t start=0, Py_ssize_t whence=1, kind=None):
    """fcntl(2) with F_SETLKW; with the defaults lockf(3) with F_LOCK. A greenlet that is killed or timed out has no lock by it."""
    cdef Job job = new_job(COOPOS_SETLK, "lockf", as_int(fd))
    cdef off_t position = -1
    cdef stat_t st
    job.job.flags, job.job.whence = F_WRLCK if kind is None else as_int(kind), as_int(whence)
    # What is undone is to be what was locked, wherever the offset and the end of the file are by then.
    if job.job.whence == SEEK_CUR:
        position = lseek(job.fd, 0, SEEK_CUR)
    elif job.job.whence == SEEK_END and fstat(job.fd, &st) == 0:
        position = st.st_size
    if position >= 0:
        job.job.whence = SEEK_SET
        start += position
    job.job.offset, job.job.length = start, length
    job.job.waits_for_peer = True
    run(job)
    result_of(job, fd)


def note_lock(Py_ssize_t fd, bint is_flock, bint is_got):
    """A lock was got, or released, without waiting: whoever waits for it in this process has to know."""
    coopos_lock_note(COOPOS_FLOCK if is_flock else COOPOS_SETLK, as_int(fd), is_got)


def wait_flock(Py_ssize_t fd, Py_ssize_t operation):
    """flock(2). A greenlet that is killed or timed out has no lock by it."""
    cdef Job job = new_job(COOPOS_FLOCK, "flock", as_int(fd))
    job.job.flags = as_int(operation)
    job.job.waits_for_peer = True
    run(job)
    result_of(job, fd)


cdef dict _transfers = {"copy_file_range": COOPOS_COPY, "sendfile": COOPOS_SENDFILE, "splice": COOPOS_SPLICE}


def transfer(
    str name not None, Py_ssize_t source, offset, Py_ssize_t target, target_offset, Py_ssize_t count, Py_ssize_t flags=0,
    bint waits_for_peer=False,
):
    """copy_file_range(2), sendfile(2) or splice(2); an offset of None is the descriptor's own. How many bytes."""
    cdef Job job = new_job(<coopos_operation><int>_transfers[name], name, as_int(source))
    job.job.other = job.other = as_int(target)
    job.job.offset = -1 if offset is None else <off_t>offset
    job.job.other_offset = -1 if target_offset is None else <off_t>target_offset
    job.job.size = <size_t>count
    job.job.flags = as_int(flags)
    job.job.waits_for_peer = waits_for_peer
    try:
        run(job)
    except BaseException as ex:
        tell(ex, "characters_written", job.job.rc if job.job.rc > 0 else None)
        raise
    return result_of(job, source)


def random(Py_ssize_t size, Py_ssize_t flags):
    """getrandom(2)."""
    cdef Job job = new_job(COOPOS_RANDOM, "getrandom", -1, <size_t>size)
    job.job.flags = as_int(flags)
    job.job.waits_for_peer = True
    run(job)
    return PyBytes_FromStringAndSize(job.job.buf, result_of(job, size))


cdef int wait_semaphore(sem_t *semaphore, object subject) except -1:
    """sem_wait(3). A greenlet that is killed or timed out has taken nothing from it."""
    cdef Job job = new_job(COOPOS_SEM_WAIT, "sem_wait")
    job.job.semaphore = semaphore
    job.job.waits_for_peer = True
    run(job)
    result_of(job, subject)
    return 0
