# Moving bytes: one attempt, and the next step if it moved none.
#
# Each call asks the kernel whether it would block, and leaves the descriptor's flags alone. One ladder serves all reads and writes.
# A call goes down until a rung answers:
#
# 1. RWF_NOWAIT: pipes, sockets, eventfds, files in the page cache. EAGAIN: park, then try again.
# 2. The kernel can't tell (EOPNOTSUPP): a plain call in non-blocking mode, MSG_DONTWAIT for a socket.
# 3. Blocking FIFOs, terminals, inotify: park until poll(2) calls them ready, then make the call under a guard. The guard is a timer
#    whose signal ends the call if it blocks all the same, because another reader or writer was faster.
# 4. Files that are not in the page cache, file systems that can't tell, devices: a worker.
#
# The next call begins at the first rung again: another file of the same kind may answer there. A greenlet that is killed or timed
# out while it is parked has moved no byte. If it is killed while a worker reads for it, the worker moves the file's offset back.

# ---- what this process can do ------------------------------------------------------------------------------------------------

cdef bint has_nowait() except -1:
    """Whether the kernel knows RWF_NOWAIT, and no seccomp filter refuses preadv2(2). False under COOPOS_NOWAIT=0.

    Support differs by file: regular files have it since Linux 4.14 (https://man7.org/linux/man-pages/man2/readv.2.html), pipes
    since 6.4 (https://github.com/bytecodealliance/rustix/pull/812), but not after a splice(2) (pipe_clear_nowait in
    https://github.com/torvalds/linux/blob/master/fs/splice.c).
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

# COOPOS_FAIRNESS: after so many calls in a row that didn't wait, the other greenlets get a turn. 0: never.
cdef int fairness = int(os.environ.get("COOPOS_FAIRNESS") or 0)
cdef int ready_calls = 0


cdef int be_fair(int fd, str call) except -1:
    """Count a call, and let the others run if it is their turn. Called before any byte is moved: a kill here loses none."""
    global ready_calls
    check_open(fd, call)
    if fairness > 0:
        ready_calls += 1
        if ready_calls > fairness:
            ready_calls = 1
            let_others_run(fd, call)
    return 0


cdef int reset_fairness() noexcept:
    """The calling greenlet waits, so the others run now: count anew."""
    global ready_calls
    ready_calls = 0
    return 0


cdef bint park_fairly(int fd, int events, str call, bint may_block=False) except -1:
    reset_fairness()
    return park(fd, events, call, may_block)


cdef enum Step:
    AGAIN              # make the attempt again
    IN_WORKER          # let a worker make the call
    READ_NOTHING       # the read is over, with 0 bytes


# To copy so many bytes takes less time than to release the GIL and take it again.
cdef enum:
    QUICK_BYTES = 4096


# ---- one attempt -------------------------------------------------------------------------------------------------------------

cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject **bytes, Py_ssize_t n) except -1


# Up to this size a copy is cheaper than an allocation for each attempt.
cdef enum:
    SMALL_READ = 512


cdef ssize_t attempt_at_once(Move *move, int *err) except -2:
    """attempt() with the GIL held, for a call that can't block and moves no more than QUICK_BYTES."""
    cdef ssize_t moved
    while True:
        moved = coopos_move(move)
        err[0] = errno
        if moved >= 0 or not is_interrupted(err[0]):
            return moved


cdef ssize_t attempt_guarded(Move *move, int *err) except -2:
    """attempt() under the guard. There is only one guard, which the GIL protects."""
    cdef ssize_t moved = move_guarded(move)
    err[0] = errno
    if moved < 0 and is_interrupted(err[0]):
        err[0] = EAGAIN        # probably by the guard's signal; let others run before the next attempt
    return moved


cdef ssize_t attempt(Move *move, int *err) except -2:
    """Make one attempt. Returns the number of bytes moved, or -1 with errno in *err*. Raises what a signal handler raises."""
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
    """One read of up to *n* bytes. Returns them, or None with errno in *err*.

    Each attempt has its own buffer: a parked greenlet holds no memory for one.
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
    """Whether *err* means that the kernel can't tell if the call would block, or that a seccomp filter refuses the question."""
    return err == EOPNOTSUPP or err == ENOSYS or err == EPERM


cdef bint is_about_nowait(int err, const Move *move) noexcept:
    """Whether EINVAL may come from how we make the call, and not from the caller's arguments: RWF_NOWAIT for a write to the page
    cache (Linux before 6.0), or our memory, which is not aligned as O_DIRECT (open(2)) wants it.
    """
    cdef stat_t st
    return (err == EINVAL and move.how == COOPOS_NOWAIT and move.count <= IOV_MAX and fstat(move.fd, &st) == 0
            and (S_ISREG(st.st_mode) or S_ISBLK(st.st_mode)))


cdef bint may_ignore_signals(int fd, bint writes) noexcept:
    """True for character devices whose calls may block and ignore signals. Not for terminals, which signals interrupt, nor for
    reads of devices that poll(2) supports.
    """
    cdef stat_t st
    return fstat(fd, &st) == 0 and S_ISCHR(st.st_mode) and not isatty(fd) and (writes or not coopos_can_poll(fd))


cdef bint is_socket(int fd) noexcept:
    cdef stat_t st
    return fstat(fd, &st) == 0 and S_ISSOCK(st.st_mode)


cdef bint continues_short_writes(int fd) noexcept:
    """Whether write(2), after a part, waits to write the rest: not in non-blocking mode, nor for eventfds, which have no type."""
    cdef stat_t st
    if fstat(fd, &st) < 0:
        return True            # the next attempt raises the error
    return S_ISREG(st.st_mode) or S_ISBLK(st.st_mode) or ((st.st_mode & S_IFMT) != 0 and not is_nonblocking(fd))


cdef bint is_at_end(int fd, off_t offset) noexcept:
    """Whether the offset is at or behind the end of a regular file.

    RWF_NOWAIT alone doesn't tell: on Linux 5.9 and 5.10 it may read 0 bytes in the middle of a file (BUGS in
    https://man7.org/linux/man-pages/man2/readv.2.html), and on 5.10 it fails with EAGAIN at the end of a file whose last page is
    full (generic_file_buffered_read in https://github.com/torvalds/linux/blob/v5.10/mm/filemap.c).
    """
    cdef stat_t st
    if offset < 0:
        offset = lseek(fd, 0, SEEK_CUR)
    return fstat(fd, &st) == 0 and S_ISREG(st.st_mode) and 0 < st.st_size <= offset


cdef Move move_of(int fd, bint writes, off_t offset, int flags) noexcept:
    cdef Move move
    move.fd = fd
    # A caller that gives RWF_NOWAIT itself gets the EAGAIN.
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
    """An attempt to move *n* bytes failed with *err*: park or go down a rung. Returns the Step that the caller has to take. Raises
    the errors of the call itself before it waits.
    """
    cdef int min_bytes, tenths
    if move.flags & RWF_NOWAIT:
        raise os_error(err, call, move.fd)
    if err == EAGAIN:
        if move.offset >= 0 and is_always_ready(move.fd):
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
            move.how = first_rung  # the descriptor may have left non-blocking mode meanwhile
        return AGAIN
    if is_about_nowait(err, move):
        return IN_WORKER
    if err == ENOSYS and move.how >= COOPOS_GUARDED:
        return IN_WORKER           # no guard is available
    if not is_undecided(err) or move.how > COOPOS_NOWAIT:
        raise os_error(err, call, move.fd)
    return step_down(move, n, call)


cdef long guarded_calls = 0
cdef long dontwait_calls = 0


def count_guarded_calls():
    """How many reads and writes needed a guard, in this process."""
    return guarded_calls


def count_dontwait_calls():
    """How many were made with MSG_DONTWAIT."""
    return dontwait_calls


cdef int step_down(Move *move, Py_ssize_t n, str call) except -1:
    """RWF_NOWAIT got no answer: choose the next rung by what the descriptor is. Returns a Step."""
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
        if not move.writes:        # a device may take writes without ever being ready for them, as /dev/random does
            park_until_ready(move.fd, READ, call)
        return IN_WORKER
    guarded_calls += 1
    if move.flags or coopos_is_in_background(move.fd, move.writes):
        move.how = COOPOS_GUARDED_UNPOLLED     # unknown flags, or a background process: the call may fail whatever poll(2) says
        return AGAIN
    move.how = COOPOS_GUARDED
    if not move.writes and coopos_vmin_vtime(move.fd, &min_bytes, &tenths):
        return wait_as_terminal(move, n, call)
    return AGAIN


# How often to look at a terminal that has fewer bytes than the read wants: the kernel reports no event for the next ones.
cdef double TERMINAL_POLL_S = 0.01


cdef int wait_as_terminal(Move *move, Py_ssize_t n, str call) except -1:
    """Wait as a read of *n* bytes from a non-canonical terminal does: for VMIN bytes, at most as long as VTIME says (termios(3)).
    After that the read doesn't block, even if poll(2) doesn't call the terminal ready. Returns a Step.
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
        # With a VTIME, poll(2) reports the first byte; without, only VMIN bytes: input_available_p in
        # https://github.com/torvalds/linux/blob/master/drivers/tty/n_tty.c
        if there == 0 and (tenths or min_bytes <= wanted):
            park(move.fd, READ, call, move.may_block, left_us)
        else:
            let_others_run(move.fd, call, TERMINAL_POLL_S)
    move.how = COOPOS_GUARDED      # the terminal's mode was changed meanwhile
    return AGAIN


cdef int set_one_buffer(Move *move, iovec *iov) noexcept:
    """One buffer, as for read(2) and write(2)."""
    move.iov, move.count = iov, 1
    return 0 if iov.iov_len else prepare_empty_move(move)


cdef int prepare_empty_move(Move *move) noexcept:
    """Choose how to move 0 bytes. RWF_NOWAIT needs preadv2(2), which then returns at once. read(2) and write(2) may do more: take
    or send an empty datagram, or fail. A read of inotify blocks even then, so it needs the guard.
    """
    if move.how != COOPOS_PLAIN:
        move.how = COOPOS_DONTWAIT if move.writes and is_socket(move.fd) else COOPOS_GUARDED_UNPOLLED
    return 0


# ---- workers -----------------------------------------------------------------------------------------------------------------

# The most bytes that a worker gets to write at a time: each of its jobs holds a copy.
cdef enum:
    WORKER_WRITE_BYTES = 1 << 20


cdef bint may_wait_for_peer(int fd) noexcept:
    """Whether a read or write by a worker may wait for more than a disk. The kernel also has regular files of which poll(2) tells, and
    that wait for other processes: /proc/kmsg, trace_pipe. They have no size.
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
        if job.job.err == EAGAIN and job.job.waits_for_peer and park_fairly(move.fd, READ, call, move.may_block):
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
