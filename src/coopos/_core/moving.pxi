# Moving bytes: whole reads and writes, as the ladder leads them, and by a worker if it ends there.

# ---- workers -----------------------------------------------------------------------------------------------------------------

# The most bytes that a worker gets to write at a time: each of its jobs holds a copy.
cdef enum:
    WORKER_WRITE_BYTES = 1 << 20


cdef bint may_wait_for_peer(int fd) noexcept:
    """Whether a read or write by a worker may wait for more than a disk. Some regular files wait for other processes, and poll(2)
    supports them: /proc/kmsg, trace_pipe. Their size is 0.
    """
    cdef stat_t st
    return not is_always_ready(fd) or (fstat(fd, &st) == 0 and st.st_size == 0 and coopos_can_poll(fd))


cdef Job read_in_worker(Move *move, Py_ssize_t n, str call):
    """Let a worker read up to *n* bytes in one system call; they are in the job's buffer. If the greenlet is killed meanwhile, the
    worker moves the offset back. None: a file in non-blocking mode had nothing, and has been waited for.
    """
    cdef Job job = new_job(COOPOS_MOVE, call, move.fd, <size_t>n)
    job.job.offset, job.job.flags = move.offset, move.flags
    job.job.is_undoable = True
    job.job.waits_for_peer = may_wait_for_peer(move.fd)
    run(job)
    if job.job.rc < 0:
        if job.job.err == EAGAIN and job.job.waits_for_peer and park(move.fd, READ, call, move.may_block):
            return None
        raise os_error(job.job.err, call, move.fd)
    return job


cdef Py_ssize_t scatter(Job job, const Move *move, str call) except -1:
    """Copy the bytes that a worker has read into the buffers of *move*; returns how many. If a buffer can't be written to, the
    offset moves back by the rest.
    """
    cdef Py_ssize_t n = coopos_copy_buffers(move.iov, move.count, job.job.buf, <size_t>job.job.rc, False)
    cdef int err = errno
    if n < job.job.rc:
        give_back(job, job.job.rc - max(n, 0))
        if n < 0:
            raise os_error(err, call, move.fd)
    return n


cdef Py_ssize_t write_in_worker(Move *move, str call, bint is_undoable, Py_ssize_t *late, bint has_written) except -2:
    """Let a worker write from the buffers of *move* in one system call; returns how many bytes, or -1 as write_once() does. If the
    greenlet is killed meanwhile, *late* gets the number.
    """
    cdef Py_ssize_t n = min(total_of(move), <Py_ssize_t>WORKER_WRITE_BYTES)
    cdef Job job = new_job(COOPOS_MOVE, call, move.fd, <size_t>n)
    n = coopos_copy_buffers(move.iov, move.count, job.job.buf, <size_t>n, True)
    if n < 0:
        if has_written:
            return -1
        raise os_error(errno, call, move.fd)
    job.job.size = <size_t>n
    job.job.offset, job.job.flags, job.job.writes = move.offset, move.flags, True
    job.job.is_undoable = is_undoable and not appends(move.fd)
    job.job.waits_for_peer = may_wait_for_peer(move.fd)
    try:
        run(job)
    except BaseException:
        if job.job.rc > 0 and not job.job.is_undoable:
            late[0] = job.job.rc
        raise
    if job.job.rc < 0 and not has_written:
        raise os_error(job.job.err, call, move.fd)
    return job.job.rc


cdef bint appends(int fd) noexcept:
    cdef int flags = fcntl(fd, F_GETFL)
    return flags >= 0 and flags & O_APPEND


# ---- reads and writes, whole -------------------------------------------------------------------------------------------------

cdef object read_bytes(Move *move, Py_ssize_t n, str call):
    """Read up to *n* bytes."""
    cdef Job job
    cdef int err = 0
    cdef int outcome
    if n < 0:
        raise os_error(EINVAL, call, move.fd)
    n = min(n, <Py_ssize_t>COOPOS_IO_MAX)
    if n == 0:
        prepare_empty_move(move)
    be_fair(move.fd, call)
    while True:
        data = read_once(move, n, &err)
        if data is None:
            outcome = next_step(move, err, call, n)
            if outcome == AGAIN:
                continue
            if outcome == READ_NOTHING:
                return b""
        elif data or n == 0 or move.how != COOPOS_NOWAIT or not is_always_ready(move.fd) or is_at_end(move.fd, move.offset):
            return data
        elif goes_plainly(move, 0):
            continue
        job = read_in_worker(move, n, call)
        if job is not None:
            return PyBytes_FromStringAndSize(job.job.buf, job.job.rc)


cdef Py_ssize_t total_of(const Move *move) noexcept:
    cdef Py_ssize_t total = 0
    cdef int i
    for i in range(move.count):
        total += <Py_ssize_t>move.iov[i].iov_len
    return total


cdef Py_ssize_t read_into(Move *move, str call) except -1:
    """Read into the buffers of *move*; returns how many bytes."""
    cdef Py_ssize_t nread
    cdef Py_ssize_t n = total_of(move)
    cdef Job job
    cdef int err = 0
    cdef int outcome
    be_fair(move.fd, call)
    while True:
        nread = attempt(move, &err)
        if nread < 0:
            outcome = next_step(move, err, call, n)
            if outcome == AGAIN:
                continue
            if outcome == READ_NOTHING:
                return 0
        elif nread or n == 0 or move.how != COOPOS_NOWAIT or not is_always_ready(move.fd) or is_at_end(move.fd, move.offset):
            return nread
        elif goes_plainly(move, 0):
            continue
        # Through the job's own buffer: the caller's may be freed before the worker has read.
        job = read_in_worker(move, n, call)
        if job is not None:
            return scatter(job, move, call)


cdef int advance(Move *move, Py_ssize_t written) noexcept:
    """Set *move* to the bytes behind those that were written."""
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


cdef Py_ssize_t write_from(Move *move, str call, Py_ssize_t *n_written=NULL) except -1:
    """Write from the buffers of *move*; returns how many bytes. In blocking mode that is all of them, as with write(2).

    If this raises, *n_written* gets the number of bytes written.
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
            if done >= n or move.flags & RWF_NOWAIT or not continues_short_writes(move.fd):
                return done
            advance(move, written)
    except BaseException as ex:
        attach_progress(ex, "characters_written", (done + late) or None)
        if n_written != NULL:
            n_written[0] = done + late
        raise


cdef Py_ssize_t write_once(Move *move, str call, bint is_undoable, Py_ssize_t *late, bint has_written=False) except -2:
    """Write once from the buffers; returns how many bytes. -1: it failed, but the caller *has_written* some already, and returns
    their number instead of raising.
    """
    cdef Py_ssize_t written
    cdef int err = 0
    while True:
        written = attempt(move, &err)
        if written >= 0:
            move.has_parked = False
            return written
        if has_written and err != EAGAIN and not is_undecided(err) and not is_about_nowait(err, move):
            return -1
        if next_step(move, err, call) == IN_WORKER:
            return write_in_worker(move, call, is_undoable, late, has_written)


cdef int take_buffer(object buffer, Py_buffer *view, bint writable, iovec *iov) except -1:
    """Lock *buffer* and describe it in *iov*. The caller has to release *view*."""
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

    cdef int set_buffers(self, Move *move) noexcept:
        move.iov = self.iov
        move.count = self.count
        if move.how == COOPOS_REFUSED and self.count <= IOV_MAX and not total_of(move):
            # 0 bytes by readv(2) and writev(2) return at once; by read(2) and write(2) they may not.
            move.how, move.count = COOPOS_PLAIN, 0
        return 0
