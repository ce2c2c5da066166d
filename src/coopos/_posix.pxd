# C declarations that Cython's own libc and posix packages don't have, or have without `nogil`. Grouped by header.

from cpython.object cimport PyObject, PyTypeObject
from posix.types cimport id_t, mode_t, off_t, pid_t, uid_t


cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1
    int PySys_Audit(const char *event, const char *format, ...) except -1
    void PyOS_BeforeFork()
    void PyOS_AfterFork_Child()
    void PyOS_AfterFork_Parent()
    int PyObject_AsFileDescriptor(object) except -1
    void Py_Exit(int status)


cdef extern from "<errno.h>" nogil:
    int ECANCELED


cdef extern from "<limits.h>" nogil:
    int IOV_MAX


cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    short POLLIN, POLLOUT
    int poll(pollfd *fds, unsigned long n, int timeout_ms)


cdef extern from "<semaphore.h>" nogil:
    ctypedef struct sem_t:
        pass
    int sem_post(sem_t *semaphore)
    int sem_trywait(sem_t *semaphore)
    int sem_wait(sem_t *semaphore)


cdef extern from "<signal.h>" nogil:
    int CLD_EXITED, CLD_KILLED, CLD_DUMPED, CLD_CONTINUED, SIGCONT
    ctypedef struct sigset_t:
        pass
    int SIG_BLOCK, SIG_SETMASK
    int sigfillset(sigset_t *signals)
    int pthread_sigmask(int how, const sigset_t *signals, sigset_t *before)
    ctypedef struct siginfo_t:
        pass


cdef extern from "<sys/resource.h>" nogil:
    cdef struct timeval:
        long tv_sec
        long tv_usec
    cdef struct rusage:
        timeval ru_utime, ru_stime
        long ru_maxrss, ru_ixrss, ru_idrss, ru_isrss, ru_minflt, ru_majflt, ru_nswap, ru_inblock, ru_oublock
        long ru_msgsnd, ru_msgrcv, ru_nsignals, ru_nvcsw, ru_nivcsw


cdef extern from "<sys/stat.h>" nogil:
    ctypedef unsigned long dev_t
    ctypedef unsigned long ino_t
    cdef struct stat_t "stat":
        mode_t st_mode
        dev_t st_dev
        dev_t st_rdev
        ino_t st_ino
        off_t st_size
    int fstat(int fd, stat_t *buf)
    int c_stat "stat"(const char *path, stat_t *buf)
    mode_t S_IFMT
    bint S_ISREG(mode_t mode)
    bint S_ISBLK(mode_t mode)
    bint S_ISCHR(mode_t mode)
    bint S_ISFIFO(mode_t mode)
    bint S_ISSOCK(mode_t mode)
    bint S_ISDIR(mode_t mode)


cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len


cdef extern from "<sys/wait.h>" nogil:
    ctypedef int idtype_t
    idtype_t P_ALL, P_PID, P_PGID
    int WNOHANG, WUNTRACED, WCONTINUED, WEXITED, WSTOPPED, WNOWAIT
    int c_waitid "waitid"(idtype_t idtype, id_t id, siginfo_t *info, int options)


cdef extern from "<termios.h>" nogil:
    cdef struct termios:
        pass
    cdef struct winsize:
        unsigned short ws_row, ws_col, ws_xpixel, ws_ypixel


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    int pthread_atfork(void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil, void (*child)() noexcept nogil)


cdef extern from "c/closing.h" nogil:
    ctypedef struct Closing "struct coopos_closing":
        int fd
        int parties
        int is_made
    Closing *coopos_closing_new(int fd)
    void coopos_closing_drop(Closing *closing)
    void coopos_closing_enter(Closing *closing)
    void coopos_closing_leave(Closing *closing)
    bint coopos_closing_is_due(Closing *closing)


cdef extern from "c/signals.h" nogil:
    int coopos_keep_handler(int signum)
    int coopos_call_kept_handler_too(int signum)


cdef extern from "c/turns.h" nogil:
    ctypedef enum coopos_turn "enum coopos_turn":
        COOPOS_NO_TURN
        COOPOS_ASK_LOOP
        COOPOS_TURN_IS_DUE
    coopos_turn coopos_count_ready_call(int max_calls)
    void coopos_forget_ready_calls()
    void coopos_loop_asked()
    void coopos_turn_taken()


cdef extern from "c/system.h" nogil:
    int HAVE_PIDFD
    int COOPOS_WNOTHREAD, COOPOS_WCLONE, COOPOS_WAIT_OPTIONS, COOPOS_WAITID_OPTIONS
    idtype_t COOPOS_P_PIDFD
    size_t COOPOS_IO_MAX
    enum: COOPOS_SET_BATCH
    long long coopos_coarse_now_us()
    pid_t coopos_forkpty(int *master, const winsize *size)
    ctypedef struct Report "struct coopos_report":
        pid_t pid
        uid_t uid
        int code
        int status
        rusage usage
    int coopos_wait(idtype_t idtype, id_t id, int options, Report *report)
    int coopos_pidfd_open(pid_t pid)
    int coopos_pidfd_signal(int pidfd, int signum)
    int coopos_pidfd_reaped(int pidfd, Report *report)
    pid_t coopos_pidfd_pid(int pidfd)
    ino_t coopos_pidfd_inode(int pidfd)
    bint coopos_wants_clones(int options)
    int COOPOS_HAVE_EPOLL
    ctypedef struct Event "struct coopos_event":
        int fd
        int events
    long long coopos_now_us()
    int coopos_set_new()
    int coopos_set_arm(int set, int fd, int events)
    int coopos_set_ready(int set, Event *ready, int max)
    bint coopos_set_has(int set, int fd)
    bint coopos_holds_one_byte(int fd)
    void coopos_close_run(int first, int last)
    bint coopos_bell_ring(const int *bell)
    void coopos_bell_hush(const int *bell)
    bint coopos_can_poll(int fd)
    bint coopos_is_in_background(int fd, int writes)
    bint coopos_vmin_vtime(int fd, int *min, int *tenths)
    int coopos_bytes_available(int fd)
    int RWF_NOWAIT
    int coopos_sem_value(sem_t *semaphore, int *value)
    bint coopos_write_at_once(int fd, const void *data, size_t size)


cdef extern from "c/moving.h" nogil:
    enum: COOPOS_REFUSED, COOPOS_NOWAIT, COOPOS_DONTWAIT, COOPOS_PLAIN, COOPOS_GUARDED, COOPOS_GUARDED_UNPOLLED
    ctypedef struct Move "struct coopos_move":
        int fd
        int how
        int writes
        iovec *iov
        int count
        off_t offset
        int flags
        int may_block
        int as_os
        int would_block
        int has_parked
        size_t max_bytes
    ssize_t coopos_move(const Move *move)
    int coopos_may_move(int fd, int writes, off_t offset)
    ssize_t coopos_copy_buffers(const iovec *buffers, int count, char *ours, size_t size, bint to_ours)
    ssize_t coopos_move_guarded(const Move *move)


cdef extern from "c/locks.h" nogil:
    off_t COOPOS_TO_THE_END
    ctypedef struct Range "struct coopos_range":
        void *owner
        off_t start
        off_t end
        int kind
    Range coopos_range_of(int kind, off_t offset, off_t length)


cdef extern from "c/workers.h" nogil:
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
        int writes
        int is_undoable
        int is_closed
        size_t size
        char *buf
        ssize_t rc
        int err
    ctypedef struct coopos_pool_t "struct coopos_pool":
        int begun
        int threads
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
    bint coopos_job_claim(CJob *job, Range wanted)
    void coopos_job_note_held(CJob *job, Range range)
    bint coopos_has_claims()
    void coopos_locks_note(bint is_flock, int fd, Range range)
    bint coopos_job_interrupt(CJob *job)
    void coopos_job_abandon(CJob *job)
    void coopos_job_undo(CJob *job)
    void coopos_pool_set_limit(int limit)
    void coopos_pool_hold(int is_held)
    int coopos_pool_queued()
    void coopos_pool_end()
    int coopos_pool_hear_of_forks()


cdef extern from "greenlet.h":
    ctypedef struct PyGreenlet:
        void *pimpl            # everything else: the parked frames, the parent
    enum:
        WEAKREFS_OFFSET "offsetof(PyGreenlet, weakreflist)"
        DICT_OFFSET "offsetof(PyGreenlet, dict)"


cdef extern from "c/greenlets.h":
    int coopos_import_greenlet() except -1
    object coopos_current_greenlet()
    object coopos_switch(object greenlet, PyObject *args, PyObject *kwargs)
    ctypedef struct coopos_search "struct coopos_search":
        PyTypeObject *greenlet
        PyTypeObject *watcher
        PyTypeObject *loop
        PyTypeObject *waiter
        PyTypeObject *hub_type
        PyObject *main
        PyGreenlet *current
        PyGreenlet *hub
        PyGreenlet *dead
        PyObject *objects
    int coopos_run_search(coopos_search *search) except -1
    void coopos_leave_greenlets(const coopos_search *search)
    void coopos_keep_forever(PyObject *op)
    void coopos_bind_to(PyObject *method, PyObject *other)
    ctypedef struct coopos_pending_t "struct coopos_pending":
        bint is_prepared
        int mode
        bint is_blocking
        sigset_t signals
        PyObject *leaving
        const coopos_search *search
    coopos_pending_t coopos_pending
    void coopos_unblock_signals()
    int coopos_add_fork_handlers()
