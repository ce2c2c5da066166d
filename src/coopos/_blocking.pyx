"""The waits that the kernel makes a caller stand in and offers no descriptor for: open(2) of a FIFO, lockf(3) with F_LOCK, and
sem_wait(3).

Each call has a thread of its own and not one of the hub's threadpool: it waits for another party, who may never come, and ten such
calls would leave nothing for the DNS resolver. The thread is C alone. A greenlet that is killed or timed out interrupts it, and
joins it before anybody can close the descriptor or ask again, so that no lock and no open file is got in nobody's name: a lock
belongs to the process, and a thread that got it later and gave it back would take it from whoever has it by then. A semaphore that
was got all the same is posted.
The module knows libc and `_parking`. Arguments are right when they come here.
"""

from libc.errno cimport EINTR, errno
from libc.stdlib cimport free, malloc
from posix.fcntl cimport AT_FDCWD, openat
from posix.types cimport mode_t, off_t
from posix.unistd cimport F_LOCK, F_ULOCK, close as c_close, lockf as c_lockf

from coopos._parking cimport READ, as_int, generation, os_error, park_until_ready
from coopos._posix cimport (
    coopos_bell_close, coopos_bell_new, coopos_bell_ring, coopos_thread_be_interruptible, coopos_thread_interrupt,
    coopos_thread_start, pthread_join, pthread_t, sem_post, sem_t, sem_wait)

import os


cdef struct Call:
    const char *path       # to open; or NULL,
    sem_t *semaphore       # to wait for; or NULL: to lock
    int fd                 # the directory, or what to lock
    int flags
    mode_t mode
    off_t length
    int rc                 # -1 until it has succeeded
    bint has_begun         # there was a thread for it
    bint is_abandoned
    int err
    int bell[2]
    pthread_t thread


cdef void *make_call(void *arg) noexcept nogil:
    """The thread. It rings when it has the answer, or is not to wait for it any longer."""
    cdef Call *call = <Call *>arg
    coopos_thread_be_interruptible(NULL)
    while not call.is_abandoned:
        if call.path != NULL:
            call.rc = openat(call.fd, call.path, call.flags, call.mode)
        elif call.semaphore != NULL:
            call.rc = sem_wait(call.semaphore)
        else:
            call.rc = c_lockf(call.fd, F_LOCK, call.length)
        call.err = errno
        if call.rc >= 0 or call.err != EINTR:
            break
    coopos_bell_ring(call.bell)
    return NULL


cdef int take_back(Call *call) noexcept:
    """Undo what succeeded for somebody who is no longer there to have it."""
    if call.rc >= 0:
        if call.path != NULL:
            c_close(call.rc)
        elif call.semaphore != NULL:
            sem_post(call.semaphore)
        else:
            c_lockf(call.fd, F_ULOCK, call.length)
    return 0


cdef int wait_for_call(Call *call, str name, object subject) except -2:
    """Have the call made in a thread, and let other greenlets run until it has returned; its result."""
    cdef int born, err
    cdef bint has_returned = False
    while not has_returned:
        born = generation
        call.rc = -1
        call.has_begun = call.is_abandoned = False
        if coopos_bell_new(call.bell) < 0:
            raise os_error(errno, name, subject)
        err = coopos_thread_start(&call.thread, make_call, call)
        if err:
            coopos_bell_close(call.bell)
            raise os_error(err, "pthread_create", name)
        call.has_begun = True
        try:
            park_until_ready(call.bell[0], READ, name)
            # Of a forked child nobody makes the call: what rang was the parent's thread. The child asks for itself.
            has_returned = born == generation
        finally:
            if born == generation:
                if has_returned:
                    pthread_join(call.thread, NULL)
                else:
                    call.is_abandoned = True
                    coopos_thread_interrupt(call.thread, call.bell)
                    take_back(call)
            coopos_bell_close(call.bell)
    return call.rc


cdef Call *new_call(const char *path, int fd) except NULL:
    """On the heap: a greenlet's stack is moved elsewhere while another runs in its place."""
    cdef Call *call = <Call *>malloc(sizeof(Call))
    if call == NULL:
        raise MemoryError
    call.path = path
    call.semaphore = NULL
    call.fd = fd
    return call


def wait_open(bytes path not None, Py_ssize_t flags, Py_ssize_t mode, dir_fd, subject):
    """openat(2) that may wait for somebody at the other end. What it raises names *subject* as the file."""
    cdef Call *call = new_call(path, AT_FDCWD if dir_fd is None else as_int(dir_fd))
    cdef int fd
    try:
        call.flags = as_int(flags)
        call.mode = <mode_t>as_int(mode)
        fd = wait_for_call(call, "open", subject)
        if fd < 0:
            raise OSError(call.err, os.strerror(call.err), subject)
        return fd
    finally:
        free(call)


def wait_lock(Py_ssize_t fd, off_t length):
    """lockf(3) with F_LOCK. A greenlet that is killed or timed out has no lock by it."""
    cdef Call *call = new_call(NULL, as_int(fd))
    try:
        call.length = length
        if wait_for_call(call, "lockf", fd) < 0:
            raise os_error(call.err, "lockf", fd)
    finally:
        free(call)


cdef bint wait_semaphore(sem_t *semaphore, object subject) except -1:
    """sem_wait(3). False: there was no thread, or no descriptor, to wait by. A greenlet that is killed or timed out has taken
    nothing from it.
    """
    cdef Call *call = new_call(NULL, -1)
    try:
        call.semaphore = semaphore
        if wait_for_call(call, "sem_wait", subject) < 0:
            raise os_error(call.err, "sem_wait", subject)
        return True
    except OSError:
        if call.has_begun:     # the call's own, or thrown in
            raise
        return False
    finally:
        free(call)
