# The ladder: one attempt to move bytes, and the next step if it moved none.
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
    if not _settings.NOWAIT:
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

# A greenlet whose calls are always ready gives the hub a turn, with its timers and I/O, about every 10 ms (c/turns.h).
# COOPOS_FAIRNESS: a number of ready calls after which it does so in any case. 0: it never does.
cdef int max_ready_calls = _settings.FAIRNESS


cpdef int be_fair(int fd, str call) except -1:
    """Give the hub its turn if one is due. Called before any byte is moved: a kill here loses none."""
    check_open(fd, call)
    if turn_is_due():
        take_turn(fd, call)
    return 0


cdef bint turn_is_due() except -1:
    """Count a call that may be ready."""
    cdef coopos_turn turn = coopos_count_ready_call(max_ready_calls) if max_ready_calls else COOPOS_NO_TURN
    if turn == COOPOS_ASK_LOOP:
        ask_loop()
    return turn == COOPOS_TURN_IS_DUE


cdef int ask_loop() except -1:
    """Have the loop tell when it has polled."""
    cdef object hub = reachable_hub()
    cdef object check
    if hub is None:
        coopos_turn_taken()
    else:
        check = hub.loop.check(ref=False)
        check.start(note_turn, check)
        coopos_loop_asked()
    return 0


cdef int take_turn(int fd, str call) except -1:
    coopos_turn_taken()
    let_others_run(fd, call, 0, True)
    if max_ready_calls:
        coopos_count_ready_call(max_ready_calls)       # this call is the first of the next row
        ask_loop()
    return 0


def note_turn(check):
    """Called by the watcher *check*, once: the loop has polled."""
    end_watchers((check,))
    coopos_turn_taken()


def yield_turn():
    """For Python: let the other greenlets that are ready run once, and timers and I/O if it is their turn."""
    if turn_is_due():
        take_turn(-1, "")
    else:
        let_others_run()


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


cdef Move move_of(int fd, bint writes, off_t offset, int flags, bint as_os=False) noexcept:
    cdef Move move
    move.fd = fd
    # A caller that gives RWF_NOWAIT itself gets the EAGAIN.
    move.how = COOPOS_PLAIN if flags & RWF_NOWAIT else first_rung
    move.writes = writes
    move.iov = NULL
    move.count = 0
    move.offset = offset
    move.flags = flags
    move.may_block, move.as_os, move.would_block = False, as_os, False
    move.has_parked, move.max_bytes = False, 0
    return move


cdef bint goes_plainly(Move *move, int err) except -1:
    """Whether a call in the place of a function of os is made plainly from now on: where no other greenlet could run, and if the
    kernel can't tell whether a write to a regular file would wait. That seldom does, and a worker would take five times as long.
    """
    if not move.as_os or move.how == COOPOS_PLAIN:
        return False
    if reachable_hub() is not None and not (move.writes and is_undecided(err) and is_always_ready(move.fd)):
        return False
    move.how = COOPOS_PLAIN
    return True


cdef int next_step(Move *move, int err, str call, Py_ssize_t n=0) except -1:
    """An attempt to move *n* bytes failed with *err*: park or go down a rung. Returns the Step that the caller has to take. Raises
    the errors of the call itself before it waits.
    """
    cdef int min_bytes, tenths
    if move.flags & RWF_NOWAIT:
        raise os_error(err, call, move.fd)
    if goes_plainly(move, err):
        return AGAIN
    if err == EAGAIN:
        if move.offset >= 0 and is_always_ready(move.fd):
            return READ_NOTHING if not move.writes and is_at_end(move.fd, move.offset) else IN_WORKER
        if move.how == COOPOS_GUARDED_UNPOLLED:
            move.how = COOPOS_GUARDED
            return AGAIN
        if move.how == COOPOS_GUARDED and not move.writes and coopos_vmin_vtime(move.fd, &min_bytes, &tenths):
            return wait_as_terminal(move, n, call)
        if move.as_os and is_nonblocking(move.fd) and not is_always_ready(move.fd):
            move.would_block = True
            raise os_error(err, call, move.fd)
        if move.has_parked and move.writes and is_ready_now(move.fd, WRITE, call):
            return wait_for_room(move, call)
        move.has_parked = True
        if not park(move.fd, WRITE if move.writes else READ, call, move.may_block):
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


# How often to look at a descriptor that counts as ready, and is not ready for this call: the kernel reports no event then. A
# terminal may have fewer bytes than the read wants, an eventfd less room than the write needs.
cdef double POLL_S = 0.01


cdef int wait_for_room(Move *move, str call) except -1:
    """An eventfd counts as ready for writing while its counter can take 1 (eventfd(2)). Try again later. Returns a Step."""
    if reachable_hub() is not None:
        let_others_run(move.fd, call, POLL_S)
    elif is_nonblocking(move.fd):
        with nogil:
            poll(NULL, 0, <int>(POLL_S * 1000))
        PyErr_CheckSignals()
    else:
        move.how = COOPOS_PLAIN        # nobody else could run
    return AGAIN


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
        # With a VTIME, poll(2) reports the first byte; without, only VMIN bytes: input_available_p in
        # https://github.com/torvalds/linux/blob/master/drivers/tty/n_tty.c
        if there == 0 and (tenths or min_bytes <= wanted):
            park(move.fd, READ, call, move.may_block, left_us)
        else:
            let_others_run(move.fd, call, POLL_S)
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
