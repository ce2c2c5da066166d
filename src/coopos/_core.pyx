"""Reading and writing on any descriptor, letting other greenlets run while it would block.

The kernel is asked, per call, whether the call would block; a descriptor's flags are never touched unasked. One ladder for all:

1. RWF_NOWAIT: pipes, sockets, eventfds, files in the page cache. EAGAIN: wait on the hub, and again.
2. Where the kernel can't tell (EOPNOTSUPP): a descriptor in non-blocking mode is read plainly, a socket with MSG_DONTWAIT.
3. Blocking FIFOs, terminals, inotify: wait on the hub until they are ready, then read under a guard, a timer whose signal ends the
   call should a rival have been quicker. EAGAIN: as above.
4. Files that are not in the page cache, those whose file system can't tell, and devices, ready or not: a worker thread.

Nothing is remembered of a rung that was refused: another file of the same kind may well answer. A greenlet that is killed or timed
out while it waits has moved no byte, and the offset of a file is moved only once the greenlet has the bytes that a thread has read.

The module knows libc, `_parking` and `_workers`, and nothing else of coopos or gevent.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.sequence cimport PySequence_Check
from libc.errno cimport EAGAIN, EINTR, EINVAL, ENOSYS, EOPNOTSUPP, EPERM, errno
from libc.limits cimport INT_MAX
from libc.stdio cimport SEEK_CUR
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.fcntl cimport F_GETFL, F_SETFL, O_ACCMODE, O_APPEND, O_CLOEXEC, O_NONBLOCK, fcntl, open as c_open
from posix.types cimport off_t
from posix.unistd cimport isatty, lseek

from coopos._parking cimport (
    NEVER, READ, WRITE, as_int, check_open, has_hub_to_wait_in, is_always_ready, is_nonblocking, os_error, park, park_until_ready,
    take_turns)
from coopos._posix cimport (
    COOPOS_ASKED, COOPOS_DONTWAIT, COOPOS_GUARDED, COOPOS_IO_MAX, COOPOS_NOWAIT, COOPOS_PLAIN, COOPOS_REFUSED, IOV_MAX, RWF_NOWAIT,
    Move, PyErr_CheckSignals, PyObject_AsFileDescriptor, S_IFMT, S_ISBLK, S_ISCHR, S_ISFIFO, S_ISREG, S_ISSOCK, coopos_bytes_there,
    coopos_can_poll, coopos_copy_buffers, coopos_gathers, coopos_is_in_background, coopos_may_move, coopos_move, coopos_now_us,
    fstat, iovec, stat_t)
from coopos._workers cimport COOPOS_MOVE, Job, give_back, move_guarded, new_job, run, tell

import os
import posix


# ---- what this process can do ------------------------------------------------------------------------------------------------

cdef bint has_nowait() except -1:
    """Whether there is a call with RWF_NOWAIT, and we may make it. What it serves only each file knows: regular files have it since
    Linux 4.14, and pipes since 6.3. COOPOS_NOWAIT=0: as where there is none.
    """
    cdef Move move
    cdef iovec iov
    cdef char byte
    cdef bint knows
    if os.environ.get("COOPOS_NOWAIT") == "0":
        return False
    reader, writer = posix.pipe()
    iov.iov_base, iov.iov_len = &byte, 1
    memset(&move, 0, sizeof(Move))
    move.fd, move.how, move.iov, move.count, move.offset = reader, COOPOS_NOWAIT, &iov, 1, -1
    knows = coopos_move(&move) < 0 and errno in (EAGAIN, EOPNOTSUPP)
    posix.close(reader)
    posix.close(writer)
    return knows


cdef int first_rung = COOPOS_NOWAIT if has_nowait() else COOPOS_REFUSED


# ---- fairness ----------------------------------------------------------------------------------------------------------------

# COOPOS_FAIRNESS: after so many calls in a row that didn't have to wait, the others run. 0: never.
cdef int fairness = int(os.environ.get("COOPOS_FAIRNESS") or 0)
cdef int ready_calls = 0


cdef int be_fair(int fd, str call) except -1:
    """At the start of each call: a greenlet that is killed here has moved no byte."""
    global ready_calls
    check_open(fd, call)
    if fairness > 0:
        ready_calls += 1
        if ready_calls > fairness:
            ready_calls = 1
            take_turns(fd, call)
    return 0


cdef int has_waited() noexcept:
    """The others have run."""
    global ready_calls
    ready_calls = 0
    return 0


cdef bint wait_until_ready(int fd, int events, str call, bint may_stand=False) except -1:
    has_waited()
    return park(fd, events, call, may_stand)


# ---- one attempt -------------------------------------------------------------------------------------------------------------

cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject **bytes, Py_ssize_t n) except -1


# Up to here a copy is cheaper than an allocation for each attempt.
cdef enum:
    SMALL_READ = 512


cdef ssize_t attempt_at_once(Move *move, int *err) except -2:
    """attempt(), keeping the interpreter's lock: to let go of it takes longer than a call of no more than QUICK bytes that is sure
    not to block.
    """
    cdef ssize_t moved
    while True:
        moved = coopos_move(move)
        err[0] = errno
        if moved >= 0 or err[0] != EINTR:
            return moved
        PyErr_CheckSignals()


cdef ssize_t attempt_guarded(Move *move, int *err) except -2:
    """attempt(), under a guard, of which there is one: it wants the interpreter's lock."""
    cdef ssize_t moved = move_guarded(move)
    err[0] = errno
    if moved < 0 and err[0] == EINTR:
        PyErr_CheckSignals()
        err[0] = EAGAIN        # the guard's signal, most likely; in any case others may run before it is tried again
    return moved


cdef ssize_t attempt(Move *move, int *err) except -2:
    """How many bytes were moved, or -1 with errno in *err*. A signal handler's exception comes out."""
    cdef ssize_t moved
    if move.how == COOPOS_NOWAIT and move.count == 1 and move.iov.iov_len <= QUICK:
        return attempt_at_once(move, err)
    if move.how >= COOPOS_GUARDED:
        return attempt_guarded(move, err)
    while True:
        with nogil:
            moved = coopos_move(move)
            err[0] = errno
        if moved >= 0 or err[0] != EINTR:
            return moved
        PyErr_CheckSignals()


cdef object read_once(Move *move, Py_ssize_t n, int *err):
    """One read of up to *n* bytes: the bytes, or None with errno in *err*.

    The buffer lives only as long as the call: a greenlet that goes on to wait holds no memory for it.
    """
    cdef char[SMALL_READ] small
    cdef char *buf = small
    cdef iovec iov
    cdef ssize_t nread
    cdef PyObject *resized
    data = None
    if n > SMALL_READ:
        data = PyBytes_FromStringAndSize(NULL, n)
        buf = PyBytes_AS_STRING(data)
    iov.iov_base, iov.iov_len = buf, <size_t>n
    move.iov, move.count = &iov, 1
    nread = attempt(move, err)
    if nread < 0:
        return None
    if data is None:
        return PyBytes_FromStringAndSize(buf, nread)
    if nread == n:
        return data
    resized = <PyObject *>data
    Py_INCREF(data)
    data = None
    _PyBytes_Resize(&resized, nread)
    data = <object>resized
    Py_DECREF(data)
    return data


# ---- the ladder --------------------------------------------------------------------------------------------------------------

cdef bint is_undecided(int err) noexcept:
    """Whether the kernel says that it can't tell if this descriptor would block: or a seccomp filter, in its place."""
    return err == EOPNOTSUPP or err == ENOSYS or err == EPERM


cdef bint is_of_nowait(int err, const Move *move) noexcept:
    """Whether EINVAL may be about how we ask and not about what: RWF_NOWAIT for a write to the page cache, in Linux before 6.0, or
    memory that is not aligned as O_DIRECT wants it.
    """
    cdef stat_t st
    return (err == EINVAL and move.how == COOPOS_NOWAIT and move.count <= IOV_MAX and fstat(move.fd, &st) == 0
            and (S_ISREG(st.st_mode) or S_ISBLK(st.st_mode)))


cdef bint is_slow(int fd, bint writes) noexcept:
    """Whether a device, ready or not, may take its time over a call, and not hear of signals. A terminal does, and who says when he
    is ready to be read.
    """
    cdef stat_t st
    return fstat(fd, &st) == 0 and S_ISCHR(st.st_mode) and not isatty(fd) and (writes or not coopos_can_poll(fd))


cdef bint is_socket(int fd) noexcept:
    cdef stat_t st
    return fstat(fd, &st) == 0 and S_ISSOCK(st.st_mode)


cdef bint writes_on(int fd) noexcept:
    """Whether write(2) goes on when it has written a part. What has no type, an eventfd for one, takes what it takes."""
    cdef stat_t st
    if fstat(fd, &st) < 0:
        return True            # the next attempt says what is wrong
    return S_ISREG(st.st_mode) or S_ISBLK(st.st_mode) or ((st.st_mode & S_IFMT) != 0 and not is_nonblocking(fd))


cdef bint is_at_end(int fd, off_t offset) noexcept:
    """Whether a read of a regular file that brought nothing means its end. Before Linux 5.8 RWF_NOWAIT stopped short in the cache;
    and on 5.10 it says EAGAIN at the end of a file of whole pages, the page behind which is nowhere.
    """
    cdef stat_t st
    if offset < 0:
        offset = lseek(fd, 0, SEEK_CUR)
    return fstat(fd, &st) == 0 and S_ISREG(st.st_mode) and 0 < st.st_size <= offset


cdef Move move_of(int fd, bint writes, off_t offset, int flags) noexcept:
    cdef Move move
    move.fd = fd
    # Who asks for RWF_NOWAIT himself wants to hear of EAGAIN.
    move.how = COOPOS_PLAIN if flags & RWF_NOWAIT else first_rung
    move.writes = writes
    move.iov = NULL
    move.count = 0
    move.offset = offset
    move.flags = flags
    move.may_stand = False
    move.most = 0
    return move


cdef int step(Move *move, int err, str call, Py_ssize_t n=0) except -1:
    """An attempt came to nothing: wait on the hub, or go down a rung, and try AGAIN; or leave it to the pool, when what can be
    waited for is ready; or have read NOTHING, of *n* bytes. What is wrong with the call itself is raised before anything waits.
    """
    cdef int min_bytes, tenths
    if move.flags & RWF_NOWAIT:
        raise os_error(err, call, move.fd)
    if err == EAGAIN:
        if move.offset >= 0 and is_always_ready(move.fd):
            # which the set would say, too
            return NOTHING if not move.writes and is_at_end(move.fd, move.offset) else IN_THREAD
        if move.how == COOPOS_ASKED:
            move.how = COOPOS_GUARDED
            return AGAIN
        if move.how == COOPOS_GUARDED and not move.writes and coopos_gathers(move.fd, &min_bytes, &tenths):
            return wait_as_terminal(move, n, call)
        if not wait_until_ready(move.fd, WRITE if move.writes else READ, call, move.may_stand):
            if is_always_ready(move.fd):
                return NOTHING if not move.writes and is_at_end(move.fd, move.offset) else IN_THREAD
            take_turns(move.fd, call)
        if move.how == COOPOS_PLAIN:
            move.how = first_rung  # somebody may have changed the mode meanwhile
        return AGAIN
    if is_of_nowait(err, move):
        return IN_THREAD
    if err == ENOSYS and move.how >= COOPOS_GUARDED:
        return IN_THREAD           # there is no guard to be had
    if not is_undecided(err) or move.how > COOPOS_NOWAIT:
        raise os_error(err, call, move.fd)
    return step_down(move, n, call)


cdef long guarded_calls = 0
cdef long dontwait_calls = 0


def count_guarded_calls():
    """How many reads and writes needed a guard, in this process."""
    return guarded_calls


def count_dontwait_calls():
    """And how many were made of a socket's own way not to wait."""
    return dontwait_calls


cdef int step_down(Move *move, Py_ssize_t n, str call) except -1:
    global dontwait_calls, guarded_calls
    cdef int min_bytes, tenths
    if move.count > IOV_MAX:
        raise os_error(errno if coopos_may_move(move.fd, move.writes, move.offset) < 0 else EINVAL, call, move.fd)
    if is_always_ready(move.fd):
        return IN_THREAD
    if is_nonblocking(move.fd):
        move.how = COOPOS_PLAIN
        return AGAIN
    if move.offset < 0 and not move.flags and is_socket(move.fd):
        move.how = COOPOS_DONTWAIT
        dontwait_calls += 1
        return AGAIN
    if coopos_may_move(move.fd, move.writes, move.offset) < 0:
        raise os_error(errno, call, move.fd)
    if is_slow(move.fd, move.writes):
        park_until_ready(move.fd, WRITE if move.writes else READ, call)
        return IN_THREAD
    guarded_calls += 1
    if move.flags or coopos_is_in_background(move.fd, move.writes):
        move.how = COOPOS_ASKED    # what the call itself says comes first
        return AGAIN
    move.how = COOPOS_GUARDED
    if not move.writes and coopos_gathers(move.fd, &min_bytes, &tenths):
        return wait_as_terminal(move, n, call)
    return AGAIN


# How often a terminal is looked at that has some bytes and is to have more, of which the kernel does not tell.
cdef double LOOK_S = 0.01


cdef int wait_as_terminal(Move *move, Py_ssize_t n, str call) except -1:
    """Wait as the kernel does in a read of *n* bytes of a terminal that gathers: for VMIN bytes, and no longer than VTIME says.
    Then the read does not wait, whatever poll(2) says of it.
    """
    cdef int min_bytes, tenths, there
    cdef int had = 0
    cdef Py_ssize_t wanted
    cdef long long left_us
    cdef long long since_us = coopos_now_us()
    move.how, move.most = COOPOS_ASKED, 0
    while coopos_gathers(move.fd, &min_bytes, &tenths):
        if not has_hub_to_wait_in(move.may_stand):
            move.how = COOPOS_PLAIN
            return AGAIN
        wanted = max(min(<Py_ssize_t>min_bytes, n), 1)
        there = coopos_bytes_there(move.fd)
        if there < 0 or there >= wanted:
            return AGAIN
        if there > had:
            had, since_us = there, coopos_now_us()
        left_us = NEVER
        if min_bytes == 0 or (tenths and there):
            left_us = tenths * 100000 - (coopos_now_us() - since_us)
            if left_us <= 0:
                move.most = <size_t>there
                return AGAIN if there else NOTHING
        has_waited()
        # Of the first byte it tells where there is a VTIME, else of VMIN bytes.
        if there == 0 and (tenths or min_bytes <= wanted):
            park(move.fd, READ, call, move.may_stand, left_us)
        else:
            take_turns(move.fd, call, LOOK_S)
    move.how = COOPOS_GUARDED      # by now it does not gather any more
    return AGAIN


cdef int give_one(Move *move, iovec *iov) noexcept:
    """One buffer, as read(2) and write(2) have it."""
    move.iov, move.count = iov, 1
    return 0 if iov.iov_len else choose_for_nothing(move)


cdef int choose_for_nothing(Move *move) noexcept:
    """How to read or write no bytes at all. RWF_NOWAIT comes in the form of readv(2), which then returns at once; read(2) and
    write(2) may have something to say: a datagram, or that it can't be done. inotify's read waits even so.
    """
    if move.how != COOPOS_PLAIN:
        move.how = COOPOS_DONTWAIT if move.writes and is_socket(move.fd) else COOPOS_ASKED
    return 0


# ---- workers -----------------------------------------------------------------------------------------------------------------

# Bytes that a worker is given at a time to write: they are copied.
cdef enum:
    PIECE = 1 << 20


cdef Job read_in_thread(Move *move, Py_ssize_t n, str call):
    """Up to *n* bytes, read by a worker in one system call. If the greenlet is killed meanwhile, the offset is moved back."""
    cdef Job job = new_job(COOPOS_MOVE, call, move.fd, <size_t>n)
    job.job.offset, job.job.flags = move.offset, move.flags
    job.job.is_undoable = True
    job.job.waits_for_peer = not is_always_ready(move.fd)
    run(job)
    if job.job.rc < 0:
        raise os_error(job.job.err, call, move.fd)
    return job


cdef Py_ssize_t scatter(Job job, const Move *move, str call) except -1:
    """How many of the bytes that were read the buffers have taken. The others go back to the file."""
    cdef Py_ssize_t n = coopos_copy_buffers(move.iov, move.count, job.job.buf, <size_t>job.job.rc, False)
    cdef int err = errno
    if n < job.job.rc:
        give_back(job, job.job.rc - max(n, 0))
        if n < 0:
            raise os_error(err, call, move.fd)
    return n


cdef Py_ssize_t write_in_thread(Move *move, str call, bint is_undoable, Py_ssize_t *late, bint is_later) except -2:
    """How many bytes a worker has written of the buffers of *move*, in one system call; in *late*, if the greenlet was killed
    meanwhile. -1 as of write_once().
    """
    cdef Py_ssize_t n = min(total_of(move), <Py_ssize_t>PIECE)
    cdef Job job = new_job(COOPOS_MOVE, call, move.fd, <size_t>n)
    n = coopos_copy_buffers(move.iov, move.count, job.job.buf, <size_t>n, True)
    if n < 0:
        if is_later:
            return -1
        raise os_error(errno, call, move.fd)
    job.job.size = <size_t>n
    job.job.offset, job.job.flags, job.job.writes = move.offset, move.flags, True
    job.job.is_undoable = is_undoable and not appends(move.fd)
    job.job.waits_for_peer = not is_always_ready(move.fd)
    try:
        run(job)
    except BaseException:
        if job.job.rc > 0 and not job.job.is_undoable:
            late[0] = job.job.rc
        raise
    if job.job.rc < 0 and not is_later:
        raise os_error(job.job.err, call, move.fd)
    return job.job.rc


cdef bint appends(int fd) noexcept:
    cdef int flags = fcntl(fd, F_GETFL)
    return flags >= 0 and flags & O_APPEND


# ---- reads and writes, whole -------------------------------------------------------------------------------------------------

cdef object read_bytes(Move *move, Py_ssize_t n, str call):
    """Up to *n* bytes."""
    cdef Job job
    cdef int err = 0
    cdef int rung
    if n < 0:
        raise os_error(EINVAL, call, move.fd)
    n = min(n, <Py_ssize_t>COOPOS_IO_MAX)
    if n == 0:
        choose_for_nothing(move)
    be_fair(move.fd, call)
    while True:
        data = read_once(move, n, &err)
        if data is None:
            rung = step(move, err, call, n)
            if rung == AGAIN:
                continue
            if rung == NOTHING:
                return b""
        elif data or n == 0 or move.how != COOPOS_NOWAIT or not is_always_ready(move.fd) or is_at_end(move.fd, move.offset):
            return data
        job = read_in_thread(move, n, call)
        return PyBytes_FromStringAndSize(job.job.buf, job.job.rc)


cdef Py_ssize_t total_of(const Move *move) noexcept:
    cdef Py_ssize_t total = 0
    cdef int i
    for i in range(move.count):
        total += <Py_ssize_t>move.iov[i].iov_len
    return total


cdef Py_ssize_t read_into(Move *move, str call) except -1:
    """Into the buffers of *move*; how many bytes."""
    cdef Py_ssize_t nread
    cdef Py_ssize_t n = total_of(move)
    cdef int err = 0
    cdef int rung
    be_fair(move.fd, call)
    while True:
        nread = attempt(move, &err)
        if nread < 0:
            rung = step(move, err, call, n)
            if rung == AGAIN:
                continue
            if rung == NOTHING:
                return 0
        elif nread or n == 0 or move.how != COOPOS_NOWAIT or not is_always_ready(move.fd) or is_at_end(move.fd, move.offset):
            return nread
        # Into a buffer of the thread's own: ours may be gone before it has read.
        return scatter(read_in_thread(move, n, call), move, call)


cdef int advance(Move *move, Py_ssize_t written) noexcept:
    """Past what was written."""
    cdef Py_ssize_t n
    if move.offset >= 0:
        move.offset += written
    while written:
        n = min(written, <Py_ssize_t>move.iov.iov_len)
        move.iov.iov_base = <char *>move.iov.iov_base + n
        move.iov.iov_len -= <size_t>n
        written -= n
        if not move.iov.iov_len and move.count > 1:
            move.iov += 1
            move.count -= 1
    return 0


cdef Py_ssize_t write_from(Move *move, str call, Py_ssize_t *told=NULL) except -1:
    """From the buffers of *move*; how many bytes. All of them, where the descriptor is in blocking mode, as write(2) does it. If
    anything is raised, *told* has how many were written.
    """
    cdef Py_ssize_t written
    cdef Py_ssize_t done = 0
    cdef Py_ssize_t late = 0
    cdef Py_ssize_t n = total_of(move)
    try:
        be_fair(move.fd, call)
        while True:
            written = write_once(move, call, False, &late, done > 0)
            if written < 0:
                return done
            done += written
            if done >= n or move.flags & RWF_NOWAIT or not writes_on(move.fd):
                return done
            advance(move, written)
    except BaseException as ex:
        tell(ex, "characters_written", (done + late) or None)
        if told != NULL:
            told[0] = done + late
        raise


cdef Py_ssize_t write_once(Move *move, str call, bint is_undoable, Py_ssize_t *late, bint is_later=False) except -2:
    """One move from the buffers; how many bytes. -1: it failed, and *is_later*, so that the first ones are the answer."""
    cdef Py_ssize_t written
    cdef int err = 0
    while True:
        written = attempt(move, &err)
        if written >= 0:
            return written
        if is_later and err != EAGAIN and not is_undecided(err) and not is_of_nowait(err, move):
            return -1
        if step(move, err, call) == IN_THREAD:
            return write_in_thread(move, call, is_undoable, late, is_later)


cdef int take_buffer(object buffer, Py_buffer *view, bint writable, iovec *iov) except -1:
    """The caller releases *view*."""
    PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
    iov.iov_base, iov.iov_len = view.buf, <size_t>min(view.len, <Py_ssize_t>COOPOS_IO_MAX)
    return 0


@cython.final
@cython.internal
cdef class Buffers:
    """A sequence of buffers, locked, as readv and writev take it."""
    cdef Py_buffer *views
    cdef iovec *iov
    cdef int count             # of views that are held

    def __cinit__(self, str call, buffers, bint writable):
        if not PySequence_Check(buffers):
            raise TypeError(f"{call}() arg 2 must be a sequence")
        cdef tuple sources = tuple(buffers)
        if len(sources) > INT_MAX:
            raise OverflowError("signed integer is greater than maximum")
        self.views = <Py_buffer *>calloc(len(sources) + 1, sizeof(Py_buffer))
        self.iov = <iovec *>calloc(len(sources) + 1, sizeof(iovec))
        if self.views == NULL or self.iov == NULL:
            raise MemoryError
        for buffer in sources:
            take_buffer(buffer, &self.views[self.count], writable, &self.iov[self.count])
            self.count += 1

    def __dealloc__(self):
        cdef int i
        for i in range(self.count):
            PyBuffer_Release(&self.views[i])
        free(self.views)
        free(self.iov)

    cdef int give(self, Move *move) noexcept:
        move.iov = self.iov
        move.count = self.count
        if move.how == COOPOS_REFUSED and self.count <= IOV_MAX and not total_of(move):
            # As readv(2) and writev(2) do with nothing, and not as read(2) and write(2).
            move.how, move.count = COOPOS_PLAIN, 0
        return 0


# ---- descriptors in non-blocking mode ----------------------------------------------------------------------------------------

def nb_read(Py_ssize_t fd, Py_ssize_t n):
    """Read up to *n* bytes from a non-blocking descriptor, letting other greenlets run while there are none.

    Like :func:`os.read`, but waits on the hub where that raises BlockingIOError. A descriptor that was left in blocking mode is
    read as :func:`read` does it.

    Args:
        fd: int, a descriptor in non-blocking mode (see :func:`make_nonblocking`).
        n: int, bytes, 0 or more.

    Returns:
        bytes: 0 to *n* bytes long; ``b""`` at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading, or :func:`close` closes it during the wait; EINVAL if *n* is negative;
            otherwise as read(2).

    Switches greenlets only when there is nothing to read. Killed or timed out while it waits, it has taken no byte. Works in any
    thread's hub and in a forked child.

    Source: read(2); ``gevent.os.nb_read``.

    .. versionadded:: 0.1.0
    """
    cdef Move move = move_of(as_int(fd), False, -1, 0)
    return read_bytes(&move, n, "nb_read")


def nb_write(Py_ssize_t fd, buf):
    """Write a buffer, or as much of it as fits, to a non-blocking descriptor, letting other greenlets run while nothing fits.

    Like :func:`os.write`, but waits on the hub where that raises BlockingIOError. A descriptor that was left in blocking mode is
    written as :func:`write` does it.

    Args:
        fd: int, a descriptor in non-blocking mode (see :func:`make_nonblocking`).
        buf: bytes-like, contiguous. It stays locked during the wait.

    Returns:
        int: how many bytes were written, 0 to ``len(buf)``.

    Raises:
        OSError: EBADF if *fd* is not open for writing, or :func:`close` closes it during the wait; EPIPE if nobody can read;
            otherwise as write(2).
        TypeError, BufferError: *buf* is not bytes-like, or not contiguous.

    Switches greenlets only when nothing fits. Killed or timed out while it waits, it has written no byte. Works in any thread's
    hub and in a forked child.

    Source: write(2); ``gevent.os.nb_write``.

    .. versionadded:: 0.1.0
    """
    cdef Move move = move_of(as_int(fd), True, -1, 0)
    cdef Py_buffer view
    cdef iovec iov
    take_buffer(buf, &view, False, &iov)
    give_one(&move, &iov)
    try:
        return write_from(&move, "nb_write")
    finally:
        PyBuffer_Release(&view)


def make_nonblocking(fd):
    """Put a descriptor into non-blocking mode.

    The flag belongs to the open file description: everybody who shares it, other processes too, sees it.

    Args:
        fd: int, or an object with a ``fileno()`` method.

    Returns:
        True if the flag was changed, None if it was set already.

    Raises:
        OSError: EBADF if *fd* is not open.

    Doesn't switch greenlets.

    Source: fcntl(2), F_SETFL; ``gevent.os.make_nonblocking``.

    .. versionadded:: 0.1.0
    """
    cdef int number = PyObject_AsFileDescriptor(fd)
    cdef int flags = fcntl(number, F_GETFL)
    if flags >= 0:
        if flags & O_NONBLOCK:
            return None
        if fcntl(number, F_SETFL, flags | O_NONBLOCK) >= 0:
            return True
    raise os_error(errno, "make_nonblocking", number)


def in_blocking_mode(int fd, list reopened not None):
    """A descriptor for a child of the file *fd*, in the mode that programs expect of their standard streams.

    gevent's files and sockets aren't in it. A pipe is opened once more, without waiting for its other end: the mode is the open
    file's, and the parent may go on with it. That descriptor is added to *reopened*. Other files are put into blocking mode, as
    gevent's Popen does, and a pipe to be written to that nobody reads. What is no descriptor the child says.

    Not in Python: a signal's handler would run in between, and what it raises look like an error of these calls.
    """
    cdef int flags = fcntl(fd, F_GETFL)
    cdef int again = -1
    cdef stat_t st
    cdef bytes path
    if flags < 0 or not flags & O_NONBLOCK:
        return fd
    if fstat(fd, &st) == 0 and S_ISFIFO(st.st_mode):
        path = b"/proc/self/fd/%d" % fd
        again = c_open(path, (flags & (O_ACCMODE | O_APPEND)) | O_CLOEXEC | O_NONBLOCK)
    if again >= 0:                 # else no /proc, another user's pipe, or no reader
        reopened.append(again)
        fd, flags = again, fcntl(again, F_GETFL)
    fcntl(fd, F_SETFL, flags & ~O_NONBLOCK)
    return fd


# ---- the os functions --------------------------------------------------------------------------------------------------------

def read(Py_ssize_t fd, Py_ssize_t length, /):
    """Read up to *length* bytes from any descriptor, letting other greenlets run while there are none.

    Like :func:`os.read`, and cooperative on every kind of descriptor. Its flags don't matter and are not touched. What is there
    already, the page cache included, is read at once; what can be waited for is waited for on the hub; the rest is read by a
    worker thread.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        length: int, bytes, 0 or more.

    Returns:
        bytes: 0 to *length* bytes long; ``b""`` at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading, or :func:`close` closes it during the wait; EINVAL if *length* is negative;
            otherwise as read(2).

    Switches greenlets only if it has to wait. Killed or timed out while it waits on the hub, it has taken no byte. Works in any
    thread's hub and in a forked child.

    Source: preadv2(2), RWF_NOWAIT; read(2).

    .. versionadded:: 0.1.0
    """
    cdef Move move = move_of(as_int(fd), False, -1, 0)
    return read_bytes(&move, length, "read")


def readinto(Py_ssize_t fd, buffer, /):
    """Read into a buffer from any descriptor, letting other greenlets run while there is nothing.

    Like ``os.readinto`` of Python 3.14, and cooperative as :func:`read` is.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        buffer: a writable bytes-like object, contiguous. It stays locked until the call is over.

    Returns:
        int: how many bytes were read, 0 to ``len(buffer)``; 0 at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading, or :func:`close` closes it during the wait; otherwise as read(2).
        TypeError, BufferError: *buffer* is not a writable bytes-like object, or not contiguous.

    Switches greenlets only if it has to wait. Killed or timed out while it waits on the hub, it has taken no byte. Works in any
    thread's hub and in a forked child.

    Source: preadv2(2), RWF_NOWAIT; read(2).

    .. versionadded:: 0.1.0
    """
    cdef Move move = move_of(as_int(fd), False, -1, 0)
    cdef Py_buffer view
    cdef iovec iov
    try:
        take_buffer(buffer, &view, True, &iov)
    except BufferError as ex:
        if memoryview(buffer).readonly:
            raise TypeError(f"readinto() argument 2 must be read-write bytes-like object, not {type(buffer).__name__}") from ex
        raise
    give_one(&move, &iov)
    try:
        return read_into(&move, "readinto")
    finally:
        PyBuffer_Release(&view)


def write(Py_ssize_t fd, data, /):
    """Write a buffer to any descriptor, letting other greenlets run while it would block.

    Like :func:`os.write`, and cooperative on every kind of descriptor. Its flags don't matter and are not touched. As
    write(2) does, it writes all of *data* to a descriptor in blocking mode. What fits into a pipe or socket is written at once, and
    the hub waits for room; other files are written by a worker thread.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        data: bytes-like, contiguous. It stays locked until the call is over.

    Returns:
        int: how many bytes were written, 0 to ``len(data)``.

    Raises:
        OSError: EBADF if *fd* is not open for writing, or :func:`close` closes it during the wait; EPIPE if nobody can read;
            otherwise as write(2).
        TypeError, BufferError: *data* is not bytes-like, or not contiguous.

    Switches greenlets only if it has to wait. Killed or timed out before anything was written, it has written nothing; after a part
    was, the exception has an attribute ``characters_written``. Works in any thread's hub and in a forked child.

    Source: pwritev2(2), RWF_NOWAIT; write(2).

    .. versionadded:: 0.1.0
    """
    cdef Move move = move_of(as_int(fd), True, -1, 0)
    cdef Py_buffer view
    cdef iovec iov
    take_buffer(data, &view, False, &iov)
    give_one(&move, &iov)
    try:
        return write_from(&move, "write")
    finally:
        PyBuffer_Release(&view)


def readv(Py_ssize_t fd, buffers, /):
    """Read into several buffers, one after the other, letting other greenlets run while there is nothing.

    Like :func:`os.readv`, and cooperative as :func:`read` is.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        buffers: a sequence of writable bytes-like objects. They stay locked until the call is over.

    Returns:
        int: how many bytes were read in all; 0 at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading, or :func:`close` closes it during the wait; otherwise as readv(2).
        TypeError, BufferError: *buffers* is no sequence, or one of them not a writable bytes-like object.

    Switches greenlets only if it has to wait. Killed or timed out while it waits on the hub, it has taken no byte. Works in any
    thread's hub and in a forked child.

    Source: preadv2(2), RWF_NOWAIT; readv(2).

    .. versionadded:: 0.1.0
    """
    cdef Move move = move_of(as_int(fd), False, -1, 0)
    cdef Buffers locked = Buffers("readv", buffers, True)
    locked.give(&move)
    return read_into(&move, "readv")


def writev(Py_ssize_t fd, buffers, /):
    """Write several buffers, one after the other, letting other greenlets run while it would block.

    Like :func:`os.writev`, and cooperative as :func:`write` is.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        buffers: a sequence of bytes-like objects. They stay locked until the call is over.

    Returns:
        int: how many bytes were written in all.

    Raises:
        OSError: EBADF if *fd* is not open for writing, or :func:`close` closes it during the wait; EPIPE if nobody can read;
            otherwise as writev(2).
        TypeError, BufferError: *buffers* is no sequence, or one of them not bytes-like, or not contiguous.

    Switches greenlets only if it has to wait. Killed or timed out before anything was written, it has written nothing; after a part
    was, the exception has an attribute ``characters_written``. Works in any thread's hub and in a forked child.

    Source: pwritev2(2), RWF_NOWAIT; writev(2).

    .. versionadded:: 0.1.0
    """
    cdef Move move = move_of(as_int(fd), True, -1, 0)
    cdef Buffers locked = Buffers("writev", buffers, False)
    locked.give(&move)
    return write_from(&move, "writev")


def pread(Py_ssize_t fd, Py_ssize_t length, Py_ssize_t offset, /):
    """Read up to *length* bytes from a place in a file, letting other greenlets run while it would block.

    Like :func:`os.pread`. What is in the page cache is read at once, the rest by a worker thread.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        length: int, bytes, 0 or more.
        offset: int, bytes from the start of the file, 0 or more. The descriptor's own offset stays where it is.

    Returns:
        bytes: 0 to *length* bytes long; ``b""`` at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading; EINVAL if *length* or *offset* is negative; ESPIPE if *fd* has no offset.

    Switches greenlets only if it has to wait. Killed or timed out, it has moved nothing. Works in any thread's hub and in a forked
    child.

    Source: preadv2(2), RWF_NOWAIT; pread(2).

    .. versionadded:: 0.1.0
    """
    return pread_for(fd, length, offset, "pread")


def pread_for(Py_ssize_t fd, Py_ssize_t length, Py_ssize_t offset, str call):
    """pread, whose errors are those of *call*."""
    cdef Move move = move_of(as_int(fd), False, <off_t>offset, 0)
    if offset < 0:
        raise os_error(EINVAL, call, fd)
    return read_bytes(&move, length, call)


def pwrite(Py_ssize_t fd, buffer, Py_ssize_t offset, /):
    """Write a buffer to a place in a file, letting other greenlets run while it would block.

    Like :func:`os.pwrite`. Where the kernel can't tell whether that would block, a worker thread does it.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        buffer: bytes-like, contiguous. It stays locked until the call is over.
        offset: int, bytes from the start of the file, 0 or more. The descriptor's own offset stays where it is.

    Returns:
        int: how many bytes were written, 0 to ``len(buffer)``.

    Raises:
        OSError: EBADF if *fd* is not open for writing; EINVAL if *offset* is negative; ESPIPE if *fd* has no offset; otherwise as
            pwrite(2).
        TypeError, BufferError: *buffer* is not bytes-like, or not contiguous.

    Switches greenlets only if it has to wait. Killed or timed out before anything was written, it has written nothing; after a part
    was, the exception has an attribute ``characters_written``. Works in any thread's hub and in a forked child.

    Source: pwritev2(2), RWF_NOWAIT; pwrite(2).

    .. versionadded:: 0.1.0
    """
    cdef Move move = move_of(as_int(fd), True, <off_t>offset, 0)
    cdef Py_buffer view
    cdef iovec iov
    take_buffer(buffer, &view, False, &iov)
    give_one(&move, &iov)
    try:
        if offset < 0:
            raise os_error(EINVAL, "pwrite", fd)
        return write_from(&move, "pwrite")
    finally:
        PyBuffer_Release(&view)


def preadv(Py_ssize_t fd, buffers, Py_ssize_t offset, Py_ssize_t flags=0, /):
    """Read from a place in a file into several buffers, letting other greenlets run while it would block.

    Like :func:`os.preadv`, and cooperative as :func:`pread` is.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        buffers: a sequence of writable bytes-like objects. They stay locked until the call is over.
        offset: int, bytes from the start of the file; -1, on Linux: the descriptor's own offset.
        flags: int, ``os.RWF_*``. With ``RWF_NOWAIT`` it doesn't wait and raises BlockingIOError.

    Returns:
        int: how many bytes were read in all; 0 at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading; EINVAL if *offset* is negative; EOPNOTSUPP for flags that the system or the
            file doesn't know; ESPIPE if *fd* has no offset.
        TypeError, BufferError: *buffers* is no sequence, or one of them not a writable bytes-like object.

    Switches greenlets only if it has to wait. Killed or timed out, it has moved nothing. Works in any thread's hub and in a forked
    child.

    Source: preadv2(2), RWF_NOWAIT.

    .. versionadded:: 0.1.0
    """
    cdef Move move = move_of(as_int(fd), False, <off_t>offset, as_int(flags))
    cdef Buffers locked = Buffers("preadv", buffers, True)
    if offset < -1:
        raise os_error(EINVAL, "preadv", fd)
    locked.give(&move)
    return read_into(&move, "preadv")


def pwritev(Py_ssize_t fd, buffers, Py_ssize_t offset, Py_ssize_t flags=0, /):
    """Write several buffers to a place in a file, letting other greenlets run while it would block.

    Like :func:`os.pwritev`, and cooperative as :func:`pwrite` is.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        buffers: a sequence of bytes-like objects. They stay locked until the call is over.
        offset: int, bytes from the start of the file; -1, on Linux: the descriptor's own offset.
        flags: int, ``os.RWF_*``. With ``RWF_NOWAIT`` it doesn't wait and raises BlockingIOError.

    Returns:
        int: how many bytes were written in all.

    Raises:
        OSError: EBADF if *fd* is not open for writing; EINVAL if *offset* is negative; EOPNOTSUPP for flags that the system or the
            file doesn't know; ESPIPE if *fd* has no offset; otherwise as pwritev(2).
        TypeError, BufferError: *buffers* is no sequence, or one of them not bytes-like, or not contiguous.

    Switches greenlets only if it has to wait. Killed or timed out before anything was written, it has written nothing; after a part
    was, the exception has an attribute ``characters_written``. Works in any thread's hub and in a forked child.

    Source: pwritev2(2), RWF_NOWAIT.

    .. versionadded:: 0.1.0
    """
    cdef Move move = move_of(as_int(fd), True, <off_t>offset, as_int(flags))
    cdef Buffers locked = Buffers("pwritev", buffers, False)
    if offset < -1:
        raise os_error(EINVAL, "pwritev", fd)
    locked.give(&move)
    return write_from(&move, "pwritev")


# ---- all of it ---------------------------------------------------------------------------------------------------------------

def read_exactly(Py_ssize_t fd, Py_ssize_t n, /):
    """Read *n* bytes from any descriptor, letting other greenlets run until they are there.

    As :func:`read` again and again.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        n: int, bytes, 0 or more.

    Returns:
        bytes: *n* bytes long.

    Raises:
        EOFError: the file ended before. What was read is in its attribute ``partial``.
        OSError: EBADF if *fd* is not open for reading, or :func:`close` closes it during the wait; EINVAL if *n* is negative;
            otherwise as read(2).

    Switches greenlets only if it has to wait. Killed or timed out, or if an error comes in between, the exception has what was
    read until then as an attribute ``partial``. Works in any thread's hub and in a forked child.

    Source: preadv2(2), RWF_NOWAIT; read(2).

    .. versionadded:: 0.1.0
    """
    return read_telling(fd, n, None)


def read_telling(Py_ssize_t fd, Py_ssize_t n, list told, /):
    """read_exactly, which also appends to *told* what was read if anything is raised: an exception may refuse attributes."""
    cdef int number = as_int(fd)
    cdef Move move
    cdef Py_ssize_t nread
    cdef Py_ssize_t done = 0
    cdef iovec iov
    if n < 0:
        raise os_error(EINVAL, "read_exactly", fd)
    data = PyBytes_FromStringAndSize(NULL, n)
    try:
        while True:
            move = move_of(number, False, -1, 0)
            iov.iov_base = PyBytes_AS_STRING(data) + done
            iov.iov_len = <size_t>min(n - done, <Py_ssize_t>COOPOS_IO_MAX)
            give_one(&move, &iov)
            nread = read_into(&move, "read_exactly")
            done += nread
            if done == n:
                return data
            if not nread:
                end = EOFError(f"end of file after {done} of {n} bytes: read_exactly({number})")
                end.is_at_end = True       # an EOFError that is thrown in isn't
                raise end
    except BaseException as ex:
        tell(ex, "partial", data[:done])
        if told is not None:
            told.append(data[:done])
        raise


def write_all(Py_ssize_t fd, data, /):
    """Write all of a buffer to any descriptor, letting other greenlets run until it is written.

    As :func:`write` again and again: on a descriptor in non-blocking mode, too, all is written when it returns.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        data: bytes-like, contiguous. It stays locked until the call is over.

    Returns:
        None

    Raises:
        OSError: EBADF if *fd* is not open for writing, or :func:`close` closes it during the wait; EPIPE if nobody can read;
            otherwise as write(2).
        TypeError, BufferError: *data* is not bytes-like, or not contiguous.

    Switches greenlets only if it has to wait. Killed or timed out, or if an error comes in between, after a part was written, the
    exception has an attribute ``characters_written``. Works in any thread's hub and in a forked child.

    Source: pwritev2(2), RWF_NOWAIT; write(2).

    .. versionadded:: 0.1.0
    """
    write_telling(fd, data, None)


def write_telling(Py_ssize_t fd, data, list told, bint is_all=True, str call="write_all"):
    """write_all, or write, for *call*, which also appends to *told* how much was written if anything is raised: an exception may
    refuse attributes.
    """
    cdef int number = as_int(fd)
    cdef Move move
    cdef Py_buffer view
    cdef iovec iov
    cdef Py_ssize_t done = 0
    cdef Py_ssize_t late = 0
    take_buffer(data, &view, False, &iov)
    try:
        while True:
            move = move_of(number, True, -1, 0)
            iov.iov_base = <char *>view.buf + done
            iov.iov_len = <size_t>min(view.len - done, <Py_ssize_t>COOPOS_IO_MAX)
            give_one(&move, &iov)
            done += write_from(&move, call, &late)
            if done >= view.len or not is_all:
                return done
    except BaseException as ex:
        tell(ex, "characters_written", (done + late) or None)
        if told is not None:
            told.append(done + late)
        raise
    finally:
        PyBuffer_Release(&view)
