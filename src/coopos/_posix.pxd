# C declarations that Cython's own libc and posix packages lack or lack `nogil` for, grouped by header.

from posix.types cimport pid_t, id_t


cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1
    int PySys_Audit(const char *event, const char *format, ...) except -1
    int Py_IsInitialized() nogil
    void PyOS_BeforeFork()
    void PyOS_AfterFork_Child()
    void PyOS_AfterFork_Parent()
    int PyObject_AsFileDescriptor(object) except -1


cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    short POLLIN, POLLOUT
    int poll(pollfd *fds, unsigned long n, int timeout_ms)


cdef extern from "<signal.h>" nogil:
    ctypedef struct siginfo_t:
        pass


cdef extern from "<sys/resource.h>" nogil:
    cdef struct rusage:
        pass


cdef extern from "<sys/stat.h>" nogil:
    ctypedef unsigned int mode_t
    ctypedef unsigned long dev_t
    ctypedef unsigned long ino_t
    cdef struct stat_t "stat":
        mode_t st_mode
        dev_t st_dev
        ino_t st_ino
    int fstat(int fd, stat_t *buf)
    bint S_ISREG(mode_t mode)
    bint S_ISBLK(mode_t mode)


cdef extern from "<sys/wait.h>" nogil:
    ctypedef int idtype_t
    idtype_t P_ALL, P_PID, P_PGID
    int WNOHANG, WUNTRACED, WCONTINUED, WEXITED, WSTOPPED, WNOWAIT
    bint WIFEXITED(int status)
    bint WIFSIGNALED(int status)
    pid_t wait4(pid_t pid, int *status, int options, rusage *usage)
    int waitid(idtype_t idtype, id_t id, siginfo_t *info, int options)


cdef extern from "<termios.h>" nogil:
    cdef struct termios:
        pass
    cdef struct winsize:
        pass


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    int PTHREAD_CANCEL_DISABLE
    int pthread_cancel(pthread_t thread)
    int pthread_join(pthread_t thread, void **value)
    int pthread_setcancelstate(int state, int *old)


cdef extern from "_compat.h" nogil:
    int HAVE_PIDFD
    int COOPOS_WAIT_OPTIONS
    size_t COOPOS_IO_MAX
    enum: COOPOS_SET_BATCH
    pid_t forkpty(int *master, char *name, const termios *term, const winsize *size)
    int coopos_pidfd_open(pid_t pid)
    pid_t coopos_collect_pidfd(int pidfd, int *status, rusage *usage)
    int coopos_pidfd_reaped_status(int pidfd, int *status)
    int coopos_set_new()
    int coopos_set_add(int set, int fd)
    int coopos_set_rearm(int set, int fd)
    int coopos_set_ready(int set, int *fds)
    void coopos_close_run(int first, int last)
    ssize_t coopos_read_nowait(int fd, void *buf, size_t n)
    ssize_t coopos_write_nowait(int fd, const void *buf, size_t n)
    int coopos_thread_start(pthread_t *thread, void *(*run)(void *) noexcept nogil, void *arg)
