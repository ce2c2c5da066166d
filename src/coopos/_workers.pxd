# Calls that only a thread can make, as the other compiled modules make them.

from posix.types cimport id_t, mode_t, off_t

from coopos._parking cimport Call
from coopos._posix cimport Closing, Move, idtype_t, sem_t


cdef extern from "_workers.h" nogil:
    ctypedef enum coopos_operation "enum coopos_operation":
        COOPOS_MOVE, COOPOS_OPEN, COOPOS_SETLK, COOPOS_FLOCK, COOPOS_SEM_WAIT, COOPOS_WAITID, COOPOS_FSYNC, COOPOS_FDATASYNC,
        COOPOS_SYNC, COOPOS_FTRUNCATE, COOPOS_TRUNCATE, COOPOS_FALLOCATE, COOPOS_COPY, COOPOS_SENDFILE, COOPOS_SPLICE, COOPOS_RANDOM
    ctypedef enum coopos_state "enum coopos_state":
        COOPOS_IDLE, COOPOS_QUEUED, COOPOS_BEGUN, COOPOS_DONE
    ctypedef struct CMailbox "struct coopos_mailbox":
        int bell[2]
    ctypedef struct CJob "struct coopos_job":
        void *owner
        coopos_operation operation
        int waits_for_peer
        int fd, other
        int flags
        mode_t mode
        off_t offset, other_offset, length
        idtype_t idtype
        id_t id
        sem_t *semaphore
        int whence
        int writes
        int is_undoable
        int is_closed
        size_t size
        char *buf
        ssize_t rc
        int err
    ctypedef struct coopos_pool_t "struct coopos_pool":
        int begun
        int is_ending
    coopos_pool_t coopos_pool
    CMailbox *coopos_mailbox_new()
    void coopos_mailbox_shut(CMailbox *mailbox)
    CJob *coopos_mailbox_take(CMailbox *mailbox)
    bint coopos_mailbox_recall(CJob *job)
    CJob *coopos_job_new(size_t room)
    void coopos_job_free(CJob *job)
    void coopos_job_make(CJob *job)
    void coopos_job_poll(CJob *job)
    int coopos_job_submit(CJob *job, CMailbox *mailbox)
    bint coopos_job_take_back(CJob *job)
    coopos_state coopos_job_state(CJob *job)
    coopos_state coopos_job_orphan(CJob *job)
    bint coopos_job_keep_open(CJob *job, int which, Closing *closing, bint is_useless)
    void coopos_lock_note(coopos_operation operation, int fd, bint is_got)
    bint coopos_job_interrupt(CJob *job)
    void coopos_job_abandon(CJob *job)
    void coopos_job_undo(CJob *job)
    void coopos_pool_set_limit(int limit)
    void coopos_pool_hold(int is_held)
    void coopos_pool_end()
    int coopos_pool_hear_of_forks()
    ssize_t coopos_move_guarded(const Move *move)


cdef extern from "_compat.h" nogil:
    void coopos_bell_hush(const int *bell)


cdef class Job(Call):
    cdef CJob *job
    cdef str name
    cdef object waiter             # the greenlet, while it waits
    cdef object mailbox            # of its hub
    cdef int born                  # generation in which it was submitted
    cdef coopos_state found        # what a forked child found it in
    cdef bint is_late
    cdef bint is_left_behind       # nobody waits any more, and its worker is still at it
    cdef int arrive(self) except -1


cdef class Inquiry:
    cdef CJob *job
    cdef CMailbox *box             # NULL: nobody is asking
    cdef int born                  # generation
    cdef bint begin(self, idtype_t idtype, id_t id, int options) except -1
    cdef int end(self) noexcept


cdef int ask_again() except -1
cdef Job new_job(coopos_operation operation, str name, int fd=*, size_t room=*)
cdef int run(Job job) except -1
cdef int give_back(Job job, ssize_t n) except -1
cdef int tell(ex, str name, value) except -1
cdef ssize_t move_guarded(const Move *move) noexcept
cdef int wait_semaphore(sem_t *semaphore, object subject) except -1
