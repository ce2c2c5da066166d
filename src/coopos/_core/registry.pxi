# The registry of calls in flight, and closes that have to wait for them.
#
# A call owns its descriptor's number from its first look to its return. A call that may give way anywhere else than in park() is a
# Call, and is in the registry from before its first system call until it returns. close() asks the registry and the table of waits
# (the next chapter), and nothing else:
#
# - a call that waits, or has not begun, is told EBADF;
# - a call that a worker has begun keeps the number open: the close is put off until the worker has left it;
# - a number whose close is put off is closed for everybody who comes later (check_open).

# ---- calls in flight ---------------------------------------------------------------------------------------------------------

# {descriptor: the Calls that use it}. The parked are in the table above.
cdef dict _calls = {}


cdef class Call:
    """A call that uses a descriptor, or two, and may give way elsewhere than in park(): from before its first system call to its
    end. If it has not begun, or only waits, when the number is closed, it has an *error* and goes on no more: the number may be
    another file's. What a thread has begun keeps the number open until it is over.
    """
    cdef int fd
    cdef int other             # -1: there is none
    cdef int error             # errno that it has to raise; 0
    cdef object loop           # of the greenlet that calls

    cdef int enter(self, str name) except -1:
        """Leave by leave(), in a `finally`."""
        check_open(self.fd, name)
        check_open(self.other, name)
        hub = get_hub_if_exists()
        self.loop = None if hub is None else hub.loop
        self.error = 0
        if self.fd >= 0:
            _calls.setdefault(self.fd, []).append(self)
        if self.other >= 0 and self.other != self.fd:
            _calls.setdefault(self.other, []).append(self)
        return 0

    cdef int leave(self) except -1:
        self.forget(self.fd)
        if self.other != self.fd:
            self.forget(self.other)
        return 0

    cdef int forget(self, int fd) except -1:
        cdef list calls = _calls.get(fd)
        if calls is not None and self in calls:
            calls.remove(self)
            if not calls:
                del _calls[fd]
        return 0

    cdef int on_close(self, int fd, Closing *closing) except -1:
        """The number is being closed, by any thread. A call that has to be over first enters *closing*."""
        self.error = EBADF
        return 0


@cython.final
cdef class InFlight(Call):
    """For Python: a call of several steps, as a context. If a descriptor is closed OSError(EBADF) comes out of its waits."""
    cdef str name
    cdef object greenlet
    cdef list closed

    def __init__(self, str name not None, int fd, int other=-1):
        self.closed = []
        self.name = name
        self.fd = fd
        self.other = other

    def __enter__(self):
        self.greenlet = this_greenlet()
        self.enter(self.name)
        return self

    def __exit__(self, exc_type, exc_value, exc_tb):
        self.leave()
        self.greenlet = None

    def check(self):
        """Raise EBADF if a descriptor was closed."""
        if self.error:
            raise os_error(self.error, self.name, self.fd)

    def is_closed(self, int fd):
        """Whether that one was."""
        return fd in self.closed

    cdef int on_close(self, int fd, Closing *closing) except -1:
        self.error = EBADF
        self.closed.append(fd)
        if self.loop is not None:
            post(self.loop, self.throw_closed)
        return 0

    def throw_closed(self):
        """In the hub: the greenlet may be waiting for the other descriptor."""
        if self.greenlet is not None and self.greenlet is not this_greenlet():
            self.greenlet.throw(os_error(EBADF, self.name, self.fd))


cdef int notify_calls(int fd, Closing *closing) except -1:
    cdef Call call
    for call in list(_calls[fd]):
        call.on_close(fd, closing)
    return 0


cdef int forget_calls(bint all_of_them) except -1:
    """In a forked child: other threads' calls, or all, whose greenlets aren't here."""
    cdef Call call
    hub = get_hub_if_exists()
    for calls in list(_calls.values()):
        for call in list(calls):
            if all_of_them or hub is None or call.loop is not hub.loop:
                call.leave()
    return 0


cdef int let_others_run(int fd=-1, str name="", double seconds=0) except -1:
    """Let the other greenlets that are ready run once, or for so long, for a call that is going to use *fd*. Without a hub it does
    nothing.
    """
    cdef object hub = reachable_hub()
    cdef Call call
    if hub is None:
        return 0
    cdef object current = coopos_current_greenlet()
    cdef object switch = current.switch
    call = Call.__new__(Call)
    call.fd, call.other = fd, -1
    call.enter(name)
    if seconds > 0:
        queued = hub.loop.timer(seconds)
        queued.start(switch, switch)
    else:
        queued = hub.loop.run_callback(switch, switch)
    try:
        came_back = give_way(hub, current)
        if came_back is not switch:
            raise wrong_switch(came_back, "its turn")
    finally:
        queued.stop()
        queued.close()
        call.leave()
    if call.error:
        raise os_error(call.error, name, fd)
    return 0


def yield_turn():
    """For Python: let the other greenlets that are ready run once."""
    let_others_run()


# ---- close -------------------------------------------------------------------------------------------------------------------

@cython.final
@cython.internal
cdef class PutOffClose:
    """A close(2) that has to wait: until others' watchers on the number have been stopped, and workers are done with it."""
    cdef Closing *closing
    cdef bint waits_for_loop    # whether the loop of the thread that called close() is one of the parties

    def __dealloc__(self):
        if self.closing != NULL:
            coopos_closing_drop(self.closing)

    cdef int party_left(self) except -1:
        """One party less."""
        cdef int fd = self.closing.fd
        coopos_closing_leave(self.closing)
        if self.closing.is_made and _put_off.get(fd) is self:
            del _put_off[fd]
        return 0

    cdef int forget_other_threads(self) except -1:
        """In a forked child."""
        if self.closing.parties > self.waits_for_loop:
            self.closing.parties = 1 + self.waits_for_loop
            self.party_left()
        return 0

    cdef int wait_for_turn(self, object loop) except -1:
        """Have the loop that is asked to be a party, until it has polled once more and called whoever had something to hear."""
        self.waits_for_loop = True
        # Without something to do the loop would sleep before that, for as long as nothing happens.
        idle = loop.idle()
        idle.start(bool)
        check = loop.check(priority=loop.MINPRI)
        check.start(self.after_polling, check, idle)
        return 0

    def after_polling(self, *watchers):
        for watcher in watchers:
            watcher.stop()
            watcher.close()
        self.party_left()


# {descriptor: its PutOffClose, made or not}
cdef dict _put_off = {}


cdef PutOffClose put_off_close(int fd):
    cdef PutOffClose later = PutOffClose.__new__(PutOffClose)
    later.closing = coopos_closing_new(fd)
    if later.closing == NULL:
        raise os_error(errno, "close", fd)
    _put_off[fd] = later
    return later


cdef int check_open(int fd, str call) except -1:
    """A number whose close is put off is closed for everybody from the moment close() has returned."""
    cdef PutOffClose later
    if _put_off and (<object>fd) in _put_off:
        later = <PutOffClose>_put_off[fd]
        if coopos_closing_is_due(later.closing):
            raise os_error(EBADF, call, fd)
        del _put_off[fd]
    return 0


cdef int forget_other_threads() except -1:
    """In a forked child, which has none."""
    cdef PutOffClose later
    for later in list(_put_off.values()):
        later.forget_other_threads()
    forget_calls(False)
