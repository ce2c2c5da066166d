# Moving bytes: one attempt, and what to do when it comes to nothing.
#
# The kernel is asked, per call, whether the call would block. The descriptor's flags are not touched. One ladder serves all reads and
# writes; each rung is tried until one answers:
#
# 1. RWF_NOWAIT: pipes, sockets, eventfds, files in the page cache. EAGAIN: wait on the hub, then try again.
# 2. Where the kernel can't tell (EOPNOTSUPP): a descriptor in non-blocking mode is read plainly, a socket with MSG_DONTWAIT.
# 3. Blocking FIFOs, terminals, inotify: wait until poll(2) calls them ready, then read under a guard. The guard is a timer whose signal
#    ends the call, in case a rival was quicker.
# 4. Files that are not in the page cache, file systems that can't tell, devices: a worker.
#
# Nothing is remembered about a rung that was refused: another file of the same kind may answer. A greenlet that is killed or timed out
# while it waits has moved no byte. A file's offset moves only once the greenlet has the bytes that a worker has read.

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
            let_others_run(fd, call)
    return 0


cdef int reset_fairness() noexcept:
    """The others have run."""
    global ready_calls
    ready_calls = 0
    return 0


cdef bint park_fairly(int fd, int events, str call, bint may_block=False) except -1:
    reset_fairness()
    return park(fd, events, call, may_block)


cdef enum Step:
    AGAIN
    IN_WORKER
    READ_NOTHING


# Bytes that are copied in less time than it takes to let go of the interpreter's lock and to get it back.
cdef enum:
    QUICK_BYTES = 4096


# ---- one attempt -------------------------------------------------------------------------------------------------------------

cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject **bytes, Py_ssize_t n) except -1


# Up to here a copy is cheaper than an allocation for each attempt.
cdef enum:
    SMALL_READ = 512


cdef ssize_t attempt_at_once(Move *move, int *err) except -2:
    """attempt(), keeping the interpreter's lock: to let go of it takes longer than a call of no more than QUICK_BYTES bytes that is sure
    not to block.
    """
    cdef ssize_t moved
    while True:
        moved = coopos_move(move)
        err[0] = errno
        if moved >= 0 or not is_interrupted(err[0]):
            return moved


cdef ssize_t attempt_guarded(Move *move, int *err) except -2:
    """attempt(), under a guard, of which there is one: it wants the interpreter's lock."""
    cdef ssize_t moved = move_guarded(move)
    err[0] = errno
    if moved < 0 and is_interrupted(err[0]):
        err[0] = EAGAIN        # the guard's signal, most likely; in any case others may run before it is tried again
    return moved


cdef ssize_t attempt(Move *move, int *err) except -2:
    """How many bytes were moved, or -1 with errno in *err*. A signal handler's exception comes out."""
    cdef ssize_t moved
    if move.how == COOPOS_NOWAIT and move.count == 1 and move.iov.iov_len <= QUICK_BYTES:
        return attempt_at_once(move, err)
    if move.how >= COOPOS_GUARDED:
        return attempt_guarded(move, err)
    while True:
        with nogil:
            moved = coopos_move(move)
            err[0] = errno
        if moved >= 0 or not is_interrupted(err[0]):
            return moved


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


cdef bint is_about_nowait(int err, const Move *move) noexcept:
    """Whether EINVAL may be about how we ask and not about what: RWF_NOWAIT for a write to the page cache, in Linux before 6.0, or
    memory that is not aligned as O_DIRECT wants it.
    """
    cdef stat_t st
    return (err == EINVAL and move.how == COOPOS_NOWAIT and move.count <= IOV_MAX and fstat(move.fd, &st) == 0
            and (S_ISREG(st.st_mode) or S_ISBLK(st.st_mode)))


cdef bint may_ignore_signals(int fd, bint writes) noexcept:
    """Whether a device, ready or not, may take its time over a call, and not hear of signals. A terminal does, and who says when he
    is ready to be read.
    """
    cdef stat_t st
    return fstat(fd, &st) == 0 and S_ISCHR(st.st_mode) and not isatty(fd) and (writes or not coopos_can_poll(fd))


cdef bint is_socket(int fd) noexcept:
    cdef stat_t st
    return fstat(fd, &st) == 0 and S_ISSOCK(st.st_mode)


cdef bint continues_short_writes(int fd) noexcept:
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
    move.may_block = False
    move.max_bytes = 0
    return move


cdef int next_step(Move *move, int err, str call, Py_ssize_t n=0) except -1:
    """An attempt came to nothing: wait on the hub, or go down a rung, and try AGAIN; or leave it to the pool, when what can be
    waited for is ready; or have read READ_NOTHING, of *n* bytes. What is wrong with the call itself is raised before anything waits.
    """
    cdef int min_bytes, tenths
    if move.flags & RWF_NOWAIT:
        raise os_error(err, call, move.fd)
    if err == EAGAIN:
        if move.offset >= 0 and is_always_ready(move.fd):
            # which the set would say, too
            return READ_NOTHING if not move.writes and is_at_end(move.fd, move.offset) else IN_WORKER
        if move.how == COOPOS_GUARDED_UNPOLLED:
            move.how = COOPOS_GUARDED
            return AGAIN
        if move.how == COOPOS_GUARDED and not move.writes and coopos_vmin_vtime(move.fd, &min_bytes, &tenths):
            return wait_as_terminal(move, n, call)
        if not park_fairly(move.fd, WRITE if move.writes else READ, call, move.may_block):
            if is_always_ready(move.fd):
                return READ_NOTHING if not move.writes and is_at_end(move.fd, move.offset) else IN_WORKER
            let_others_run(move.fd, call)
        if move.how == COOPOS_PLAIN:
            move.how = first_rung  # somebody may have changed the mode meanwhile
        return AGAIN
    if is_about_nowait(err, move):
        return IN_WORKER
    if err == ENOSYS and move.how >= COOPOS_GUARDED:
        return IN_WORKER           # there is no guard to be had
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
        return IN_WORKER
    if is_nonblocking(move.fd):
        move.how = COOPOS_PLAIN
        return AGAIN
    if move.offset < 0 and not move.flags and is_socket(move.fd):
        move.how = COOPOS_DONTWAIT
        dontwait_calls += 1
        return AGAIN
    if coopos_may_move(move.fd, move.writes, move.offset) < 0:
        raise os_error(errno, call, move.fd)
    if may_ignore_signals(move.fd, move.writes):
        park_until_ready(move.fd, WRITE if move.writes else READ, call)
        return IN_WORKER
    guarded_calls += 1
    if move.flags or coopos_is_in_background(move.fd, move.writes):
        move.how = COOPOS_GUARDED_UNPOLLED    # what the call itself says comes first
        return AGAIN
    move.how = COOPOS_GUARDED
    if not move.writes and coopos_vmin_vtime(move.fd, &min_bytes, &tenths):
        return wait_as_terminal(move, n, call)
    return AGAIN


# How often a terminal is looked at that has some bytes and is to have more, of which the kernel does not tell.
cdef double TERMINAL_POLL_S = 0.01


cdef int wait_as_terminal(Move *move, Py_ssize_t n, str call) except -1:
    """Wait as the kernel does in a read of *n* bytes of a terminal that gathers: for VMIN bytes, and no longer than VTIME says.
    Then the read does not wait, whatever poll(2) says of it.
    """
    cdef int min_bytes, tenths, there
    cdef int had = 0
    cdef Py_ssize_t wanted
    cdef long long left_us
    cdef long long since_us = coopos_now_us()
    move.how, move.max_bytes = COOPOS_GUARDED_UNPOLLED, 0
    while coopos_vmin_vtime(move.fd, &min_bytes, &tenths):
        if not has_hub_to_wait_in(move.may_block):
            move.how = COOPOS_PLAIN
            return AGAIN
        wanted = max(min(<Py_ssize_t>min_bytes, n), 1)
        there = coopos_bytes_available(move.fd)
        if there < 0 or there >= wanted:
            return AGAIN
        if there > had:
            had, since_us = there, coopos_now_us()
        left_us = NEVER
        if min_bytes == 0 or (tenths and there):
            left_us = tenths * 100000 - (coopos_now_us() - since_us)
            if left_us <= 0:
                move.max_bytes = <size_t>there
                return AGAIN if there else READ_NOTHING
        reset_fairness()
        # Of the first byte it tells where there is a VTIME, else of VMIN bytes.
        if there == 0 and (tenths or min_bytes <= wanted):
            park(move.fd, READ, call, move.may_block, left_us)
        else:
            let_others_run(move.fd, call, TERMINAL_POLL_S)
    move.how = COOPOS_GUARDED      # by now it does not gather any more
    return AGAIN


cdef int set_one_buffer(Move *move, iovec *iov) noexcept:
    """One buffer, as read(2) and write(2) have it."""
    move.iov, move.count = iov, 1
    return 0 if iov.iov_len else prepare_empty_move(move)


cdef int prepare_empty_move(Move *move) noexcept:
    """How to read or write no bytes at all. RWF_NOWAIT comes in the form of readv(2), which then returns at once; read(2) and
    write(2) may have something to say: a datagram, or that it can't be done. inotify's read waits even so.
    """
    if move.how != COOPOS_PLAIN:
        move.how = COOPOS_DONTWAIT if move.writes and is_socket(move.fd) else COOPOS_GUARDED_UNPOLLED
    return 0


# ---- workers -----------------------------------------------------------------------------------------------------------------

# Bytes that a worker is given at a time to write: they are copied.
cdef enum:
    WORKER_WRITE_BYTES = 1 << 20


cdef Job read_in_worker(Move *move, Py_ssize_t n, str call):
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


cdef Py_ssize_t write_in_worker(Move *move, str call, bint is_undoable, Py_ssize_t *late, bint has_written) except -2:
    """How many bytes a worker has written of the buffers of *move*, in one system call; in *late*, if the greenlet was killed
    meanwhile. -1 as of write_once().
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
    job.job.waits_for_peer = not is_always_ready(move.fd)
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
    """Up to *n* bytes."""
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
        job = read_in_worker(move, n, call)
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
        # Into a buffer of the thread's own: ours may be gone before it has read.
        return scatter(read_in_worker(move, n, call), move, call)


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


cdef Py_ssize_t write_from(Move *move, str call, Py_ssize_t *n_written=NULL) except -1:
    """From the buffers of *move*; how many bytes. All of them, where the descriptor is in blocking mode, as write(2) does it. If
    anything is raised, *n_written* has how many were written.
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
    """One move from the buffers; how many bytes. -1: it failed, and *has_written*, so that the first ones are the answer."""
    cdef Py_ssize_t written
    cdef int err = 0
    while True:
        written = attempt(move, &err)
        if written >= 0:
            return written
        if has_written and err != EAGAIN and not is_undecided(err) and not is_about_nowait(err, move):
            return -1
        if next_step(move, err, call) == IN_WORKER:
            return write_in_worker(move, call, is_undoable, late, has_written)


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

    cdef int set_buffers(self, Move *move) noexcept:
        move.iov = self.iov
        move.count = self.count
        if move.how == COOPOS_REFUSED and self.count <= IOV_MAX and not total_of(move):
            # As readv(2) and writev(2) do with nothing, and not as read(2) and write(2).
            move.how, move.count = COOPOS_PLAIN, 0
        return 0
