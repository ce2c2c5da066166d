# close(2), and what it means for greenlets that wait for the number.
#
# close() has made the system call when it returns, except in three cases. It puts the call off while a worker uses the number
# (registry), another thread has one of our watchers on it (only without epoll), or a watcher of gevent's is active on it: libev may
# abort the process if a number is closed under an active watcher (epoll_modify in
# https://github.com/gevent/gevent/blob/master/deps/libev/ev_epoll.c).

# ---- close --------------------------------------------------------------------------------------------------------------------

def close(Py_ssize_t fd):
    """Close a file descriptor.

    Like :func:`os.close`. When it returns, the number is free and the other end sees end-of-file. Greenlets that wait for *fd* in a
    function of this module, in any thread's hub, get ``OSError(EBADF)``. So does a call that no worker has begun; it is not made.

    In three cases the system call comes later. Even then *fd* is EBADF for all later calls as soon as :func:`close` has returned.

    * A watcher of somebody else, of a gevent socket for one, is active on *fd* or about to be called. To close a descriptor under
      it can abort the process. The system call is made in the next turn of the loop, which comes at once.
    * A worker has begun a call that uses *fd*. The system call is made when that one is over.
    * There is no epoll, and greenlets of other threads wait for *fd*. It is made when their loops have stopped the watchers.

    Args:
        fd: int, the descriptor.

    Raises:
        OSError: EBADF if *fd* is not open, or was closed before and its system call is still to come, or if the hub or coopos works
            with it; EIO as close(2).
        TypeError, OverflowError: *fd* is not an int, or too large for one.

    Doesn't switch greenlets. Safe in any thread and after a fork.

    Source: close(2); ``gevent.os.close``, which always puts the system call off.

    .. versionadded:: 0.1.0
    """
    close_fd(as_int(fd))


cdef bint may_be_pending(object loop, int fd) except -1:
    """Whether libev may be about to call a watcher of *fd* in this turn.

    gevent's closing_fd() makes the active watchers pending and compares the count of pending ones; so it misses a watcher that was
    pending already (ev_feed_event in https://github.com/gevent/gevent/blob/master/deps/libev/ev.c). libev's epoll has its number.
    """
    if not loop.pendingcnt:
        return False
    epoll = loop.fileno()
    return epoll is None or coopos_set_has(epoll, fd)


cdef object loop_of_this_thread():
    """The loop of this thread's hub, or None."""
    try:
        hub = get_hub_if_exists()
    except TypeError:
        return None                # the interpreter is finalizing, and gevent's globals are None
    return None if hub is None else hub.loop


# A program that closes all descriptors, to become a daemon, means its own files. The loop's descriptors and those of this module
# stay open. Without them libev and libuv abort the process, or write into the file that has the number by then. Linux tells which
# they are.

cdef str target_of(fd):
    """What a descriptor leads to, or "" where the kernel doesn't tell."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


cdef object members_of(epoll):
    """The descriptors that are in an epoll."""
    try:
        with open(f"/proc/self/fdinfo/{epoll}") as file:
            return {int(line.split()[1]) for line in file if line.startswith("tfd:")}
    except OSError:
        return set()


cdef bint is_libuvs(int fd, str target, dict ends) except -1:
    """Whether libuv may have made *fd*, which is not in its epoll: a ring, or one end of a pipe that only this process has.

    It has two such pipes. One is its lock for signals, which holds a byte; the other tells of signals and is in non-blocking mode:
    https://github.com/libuv/libuv/blob/v1.x/src/unix/signal.c
    """
    if target.startswith("pipe:"):
        return ends[target] == 2 and (is_nonblocking(fd) or coopos_holds_one_byte(fd))
    return target == "anon_inode:[io_uring]"


cdef object numbers_of_loop(object loop, bint is_for_all):
    """The descriptors with which *loop* works by itself. *is_for_all*: in doubt a descriptor is among them."""
    cdef dict targets
    cdef dict ends = {}
    epoll = loop.fileno()
    if epoll is None:
        return set()
    members = members_of(epoll)
    watched = getattr(loop, "_io_watchers", None)
    if watched is None:
        # libev has one eventfd. The others that are in its epoll belong to gevent's watchers of the program.
        # Before the loop's first turn its epoll is empty.
        own = {fd for fd in members or map(int, os.listdir("/dev/fd"))
               if target_of(fd) == "anon_inode:[eventfd]" and is_nonblocking(fd) and at_fd(&_parked, fd) == NULL}
        if len(own) > 1 and not is_for_all:
            own = set()
    else:
        targets = {fd: target_of(fd) for fd in map(int, os.listdir("/dev/fd"))}
        for target in targets.values():
            ends[target] = ends.get(target, 0) + 1
        own = members | {fd for fd, target in targets.items() if is_libuvs(fd, target, ends)}
        if is_for_all and not members:     # a child that was just forked: its loop has not had a turn yet
            own |= {fd for fd, target in targets.items() if target == "anon_inode:[eventfd]" and is_nonblocking(fd)}
        own = {fd for fd in own if fd not in watched and at_fd(&_parked, fd) == NULL}
    own.add(epoll)
    return own


cdef bint is_loops(object loop, int fd, bint is_watched) except -1:
    """Whether *loop* works with *fd* by itself. A pipe of libuv's is not recognized: a program's may look like it."""
    cdef stat_t st
    if not is_watched and not hasattr(loop, "_io_watchers"):
        return fd == loop.fileno()     # libev has a watcher for its own eventfd
    if fstat(fd, &st) < 0 or st.st_mode & S_IFMT:
        return False               # a file that has a type: what the loop has made has none, but for pipes
    return fd in numbers_of_loop(loop, False)


cdef bint is_ours(int fd) except -1:
    """Whether *fd* is a set, or this module waits with it for a child or a worker. Without it greenlets would wait for ever. The
    number may be another file's by now, if C code has closed it.
    """
    cdef PyObject *link = at_fd(&_parked, fd)
    if at_fd(&_sets, fd) != NULL:
        return target_of(fd) == "anon_inode:[eventpoll]"
    if link == NULL or type(<object>link) is Wait:
        return False
    target = target_of(fd)
    return not target or "pidfd" in target or "eventfd" in target


cdef int close_fd(int fd) except -1:
    cdef PutOffClose later = None
    cdef int rc, err
    cdef bint is_watched
    if fd < 0:
        raise os_error(EBADF, "close", fd)
    check_open(fd, "close")
    loop = loop_of_this_thread()
    if is_ours(fd):
        raise os_error(EBADF, "close", fd)
    if at_fd(&_parked, fd) != NULL:
        later = fail_waits(fd)
    if _calls and (<object>fd) in _calls:
        if later is None:
            later = put_off_close(fd)
        notify_calls(fd, later.closing)
    is_watched = loop is not None and (loop.closing_fd(fd) or may_be_pending(loop, fd))
    if loop is not None and is_loops(loop, fd, is_watched):
        raise os_error(EBADF, "close", fd)
    if is_watched:
        if later is None:
            later = put_off_close(fd)
        later.wait_for_turn(loop)
        return 0
    if later is not None:
        later.party_left()
        return 0
    with nogil:
        rc = c_close(fd)
        err = errno
    if rc < 0:
        raise os_error(err, "close", fd)
    return 0


def closerange(Py_ssize_t fd_low, Py_ssize_t fd_high, /):
    """Close all descriptors from *fd_low* on and below *fd_high*, ignoring errors.

    Like :func:`os.closerange`, and each as :func:`close` does it: greenlets that wait for one of them get ``OSError(EBADF)``.

    The descriptors with which the hub of this thread works stay open, and so do those by which coopos waits: a program that closes
    everything above 2, to become a daemon, goes on with its greenlets. They are closed when it executes another program. This needs
    Linux, whose kernel tells which they are. :func:`close` refuses them with EBADF, so a program may also close the numbers one by
    one; but with libuv it can't recognize two pipes of libuv's. With libuv, :func:`closerange` leaves pipes and eventfds of the
    program's open, too, that look like libuv's: in non-blocking mode, and a pipe's two ends are in this process.

    Args:
        fd_low: int, the first descriptor.
        fd_high: int, the first that is not closed.

    Raises:
        TypeError, OverflowError: an argument is not an int, or too large for one.

    Doesn't switch greenlets. Safe in any thread and after a fork.

    Source: close(2).

    .. versionadded:: 0.1.0
    """
    cdef int fd
    cdef int low = max(as_int(fd_low), 0)
    cdef int high = as_int(fd_high)
    numbers = range(low, high)
    if high - low > 1000:
        try:
            numbers = [fd for fd in map(int, os.listdir("/dev/fd")) if low <= fd < high]
        except OSError:
            pass
    loop = loop_of_this_thread()
    loops = set() if loop is None else numbers_of_loop(loop, True)
    for fd in numbers:
        if (<object>fd) in loops:
            continue
        try:
            close_fd(fd)
        except OSError:
            pass


cdef int fail_waits_of(int fd, list greenlets) except -1:
    """Raise EBADF in those of *greenlets*, of any thread, that are parked on *fd*. The number stays open."""
    if at_fd(&_parked, fd) != NULL:
        fail_waits(fd, greenlets)
    return 0


def fail_waiters(int fd):
    """For Python: raise EBADF in the greenlets that are parked on *fd*, which the caller is going to close by other means."""
    fail_waits_of(fd, [(<Wait>wait).greenlet for wait in waits_of(fd)])


cdef PutOffClose fail_waits(int fd, list greenlets=None):
    """Raise EBADF in all greenlets that are parked on *fd*, or in those of *greenlets*. Returns a PutOffClose if the close has to
    wait for other threads to stop their watchers, else None.
    """
    cdef PutOffClose later = None
    cdef Wait wait
    cdef bint are_more = True
    loop = loop_of_this_thread()
    while are_more:                # another thread may have begun to wait meanwhile
        are_more = False
        for wait in waits_of(fd):
            if wait.greenlet is None or wait.error or wait.set.is_over or wait.set.born != generation:
                continue
            if greenlets is not None and wait.greenlet not in greenlets:
                continue
            are_more = True
            wait.error = EBADF
            if wait.set.loop is loop:
                wake_with_error(wait)
                continue
            if (wait.watcher is not None or wait.set.fd < 0) and greenlets is None:    # it has a watcher, or makes one now
                if later is None:
                    later = put_off_close(fd)
                coopos_closing_enter(later.closing)
            wait.set.posted.append((wait, later))
            if not post(wait.set.loop, wait.set.run_posted):
                wait.set.end()
    return later
