# Waiting for a descriptor: park(), which nearly every wait goes through.
#
# A greenlet that is killed or timed out while it is parked has moved no byte and leaves nothing behind.

cdef bint block_until_ready(int fd, int events, str call) except -1:
    """Block in poll(2) until *fd* is ready: for where there is no hub to give way to. False, at once: *fd* is always ready."""
    cdef pollfd request
    cdef int rc, err
    if is_always_ready(fd):
        return False
    request.fd = fd
    request.events = POLLIN if events == READ else POLLOUT
    while True:
        request.revents = 0
        with nogil:
            rc = poll(&request, 1, -1)
            err = errno
        if rc >= 0:
            return True
        if not is_interrupted(err):
            raise os_error(err, call, fd)


cdef object switch_away(Set here, Wait wait, object hub, object current, str call):
    """Register *wait* and let others run; returns the object that comes with the switch back: *wait*, unless foreign code switched.
    None, at once: the descriptor is always ready.
    """
    cdef Wait other
    if not here.enter(wait, True, call):
        return None
    other = here.next_ready(hub, current) if here.members > 1 else None
    if other is None:
        if not here.is_looking:
            here.n_direct = 0      # the loop now has its turn
        return give_way(hub, current, call, wait.fd)
    if other is wait:
        return wait
    return switch_to(other.greenlet, (other,), current, call, wait.fd)


cdef bint has_hub_to_wait_in(bint may_block) except -1:
    """False: the caller may block, because no other greenlet could run or because *may_block* allows it in the hub too. Otherwise
    BlockingSwitchOutError in the hub.
    """
    if reachable_hub() is not None:
        return True
    if not may_block and get_hub_if_exists() is not None:
        raise in_hub_error()
    return False


cdef bint park(int fd, int events, str call, bint may_block=True, long long us=NEVER) except -1:
    """Let other greenlets run until *fd* may be ready, or *us* microseconds are over. Raises EBADF if this module's close() closes
    it. False, at once: *fd* is always ready.

    In the hub it blocks if *may_block*: a signal handler that calls an `os` function expects that. Otherwise it raises
    BlockingSwitchOutError, for functions that only programs with greenlets call.
    """
    cdef object hub = reachable_hub()
    cdef object current
    cdef object timer = None
    cdef Set here
    cdef Wait wait
    if hub is None:
        has_hub_to_wait_in(may_block)
        return block_until_ready(fd, events, call)
    here = set_of(hub)
    wait = Wait.__new__(Wait)
    wait.fd, wait.events = fd, events
    wait.greenlet = current = coopos_current_greenlet()
    try:
        if us != NEVER:
            # libuv's watcher warns of less: https://github.com/gevent/gevent/blob/master/src/gevent/libuv/watcher.py
            timer = hub.loop.timer(max(us, 1000) / 1e6)
            timer.start(wait.wake)
        came_back = switch_away(here, wait, hub, current, call)
    finally:
        here.leave(wait)
        if timer is not None:
            timer.stop()
            timer.close()
    if came_back is None:
        return False
    if came_back is not wait:
        raise wrong_switch(came_back, f"fd {fd} in {call}")
    # Now, before a byte is moved: a signal handler that raises loses none.
    PyErr_CheckSignals()
    if wait.error:
        raise os_error(wait.error, call, fd)
    return True


cdef bint is_ready_now(int fd, int events, str call) except -1:
    """Whether poll(2) calls *fd* ready, without waiting."""
    cdef pollfd request
    cdef int rc
    request.fd = fd
    request.events = POLLIN if events == READ else POLLOUT
    while True:
        request.revents = 0
        rc = poll(&request, 1, 0)
        # While a signal is pending, Linux gives EINTR even for a timeout of 0, if no descriptor is ready (do_poll in
        # https://github.com/torvalds/linux/blob/master/fs/select.c).
        if rc >= 0 or not is_interrupted(errno):
            break
    if rc < 0:
        raise os_error(errno, call, fd)
    return rc > 0


cdef int park_until_ready(int fd, int events, str call) except -1:
    """Park until poll(2) says that *fd* is ready. It says so at once of what epoll refuses, such as regular files."""
    check_open(fd, call)
    while not is_ready_now(fd, events, call):
        if not park(fd, events, call):
            let_others_run()
    return 0


def is_ready(int fd, int events, str call):
    """For Python: whether *fd* is ready for *events*, READ or WRITE, now."""
    return is_ready_now(fd, events, call)


def wait_until_ready(int fd, int events, str call):
    """For Python: park until *fd* is ready for *events*, READ or WRITE."""
    park_until_ready(fd, events, call)


def wait_for_any(list wanted, str call, list closed=None):
    """For Python: park until one of *wanted*, a list of (fd, READ or WRITE), may be ready or was closed. The caller then asks
    poll(2). Only where there is a hub to give way to.

    However the wait ends, it appends to *closed* the numbers that this module's close() closed meanwhile. poll(2) can't tell that:
    the number may belong to another file by now.
    """
    cdef object hub = get_hub()
    cdef object current = coopos_current_greenlet()
    cdef Set here = set_of(hub)
    cdef list waits = []
    cdef Wait wait
    cdef bint may_wait = True
    try:
        for fd, events in wanted:
            wait = Wait.__new__(Wait)
            wait.fd, wait.events, wait.greenlet = fd, events, current
            waits.append(wait)
            may_wait = here.enter(wait, True, call) and may_wait
        if may_wait:
            came_back = give_way(hub, current, call, -1)
            if came_back not in waits:
                raise wrong_switch(came_back, f"one of the descriptors {wanted} in {call}")
        else:
            let_others_run()
    finally:
        for wait in waits:
            if wait.error and closed is not None:
                closed.append(wait.fd)
            here.leave(wait)


def awaited(int fd):
    """For Python: the events that greenlets of this thread wait for on *fd*: READ, WRITE, both or 0."""
    cdef object hub = reachable_hub()
    cdef PyObject *link = at_fd(&_parked, fd) if hub is not None else NULL
    cdef int events = 0
    while link != NULL:
        if (<Wait>link).greenlet is not None and (<Wait>link).set.hub is hub:
            events |= (<Wait>link).events
        link = (<Wait>link).next
    return events
