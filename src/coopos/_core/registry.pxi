# The registry of calls in flight, and closes that have to wait for them.
#
# A call owns its descriptor's number from its first system call to its return. A wait in park() is in the table of waits (the next
# chapter). A call that may give way anywhere else is a Call, in the registry from before its first system call until it returns.
# close() asks these two, and nothing else:
#
# - a call that waits, or that no worker has begun, fails with EBADF;
# - a call that a worker has begun keeps the number open: the close is put off until the worker is done;
# - a number whose close is put off counts as closed: a later call gets EBADF (check_open).

# ---- calls in flight ---------------------------------------------------------------------------------------------------------

# {descriptor: the Calls that use it}
cdef dict _calls = {}


cdef class Call:
    """A call in flight on one descriptor or two.

    If close() sets *error* the call must not touch the number again, which may belong to another file by then.
    """
    cdef int fd
    cdef int other             # the second descriptor, or -1
    cdef int error             # the errno that the call has to raise, or 0
    cdef object loop           # that of the calling greenlet

    cdef int enter(self, str name) except -1:
        """Register the call. leave() must follow, in a `finally`."""
        check_open(self.fd, name)
        check_open(self.other, name)
        hub = get_hub_if_exists()
        self.loop = None if hub is None else hub.loop
        self.error = 0
        try:
            self.note(self.fd)
            if self.other != self.fd:
                self.note(self.other)
        except:
            self.leave()
            raise
        return 0

    cdef int note(self, int fd) except -1:
        cdef list calls
        if fd < 0:
            return 0
        # Not setdefault(): that of CPython 3.13.0 hides a MemoryError, and the dict is broken then.
        calls = _calls.get(fd)
        if calls is None:
            calls = _calls[fd] = []
        calls.append(self)
        return 0

    cdef int leave(self) except -1:
        self.forget(self.fd)
        if self.other != self.fd:
            self.forget(self.other)
        return 0

    cdef int forget(self, int fd) except -1:
        cdef list calls = _calls.get(fd)
        if calls is not None:
            if self in calls:
                calls.remove(self)
            if not calls:
                del _calls[fd]
        return 0

    cdef int on_close(self, int fd, Closing *closing) except -1:
        """In any thread: *fd* is being closed. A call that must end first becomes a party of *closing*."""
        self.error = EBADF
        return 0


@cython.final
cdef class InFlight(Call):
    """For Python: a context manager for a call of several steps. If a descriptor is closed, its waits raise OSError(EBADF)."""
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
        return fd in self.closed

    cdef int on_close(self, int fd, Closing *closing) except -1:
        self.error = EBADF
        self.closed.append(fd)
        if self.loop is not None:
            post(self.loop, self.throw_closed)
        return 0

    def throw_closed(self):
        """In the hub: raise EBADF in the greenlet, which may be waiting for its other descriptor."""
        if self.greenlet is not None and self.greenlet is not this_greenlet():
            self.greenlet.throw(os_error(EBADF, self.name, self.fd))


cdef int notify_calls(int fd, Closing *closing) except -1:
    cdef Call call
    for call in list(_calls[fd]):
        call.on_close(fd, closing)
    return 0


cdef int forget_calls(bint all_of_them) except -1:
    """In a forked child: remove the calls of greenlets that don't exist here, those of other threads or all."""
    cdef Call call
    if not _calls:
        return 0
    hub = get_hub_if_exists()
    for calls in list(_calls.values()):
        for call in list(calls):
            if all_of_them or hub is None or call.loop is not hub.loop:
                call.leave()
    return 0


cdef tuple call_after_poll(object loop, object callback, tuple args):
    """Call *callback* when *loop* has polled once more and has run the callbacks of that poll. Returns the watchers to end then."""
    cdef object idle = loop.idle()
    # It keeps the loop from sleeping in that poll.
    idle.start(bool)
    try:
        check = loop.check(priority=loop.MINPRI)
        check.start(callback, *args)
    except BaseException:
        end_watchers((idle,))
        raise
    return idle, check


cdef int end_watchers(tuple watchers) except -1:
    for watcher in watchers:
        watcher.stop()
        watcher.close()
    return 0


cdef int let_others_run(int fd=-1, str name="", double seconds=0, bint polls=False) except -1:
    """Let the other ready greenlets run once, or for *seconds*. If it *polls*, timers and I/O run too. EBADF if *fd* is closed
    meanwhile. Without a hub: nothing.
    """
    cdef object hub = reachable_hub()
    cdef Call call
    if hub is None:
        return 0
    cdef object current = coopos_current_greenlet()
    cdef object switch = current.switch
    cdef tuple watchers = ()
    call = Call.__new__(Call)
    call.fd, call.other = fd, -1
    call.enter(name)
    try:
        if polls:
            watchers = call_after_poll(hub.loop, switch, (switch,))
        elif seconds > 0:
            watchers = (hub.loop.timer(seconds),)
            watchers[0].start(switch, switch)
        else:
            watchers = (hub.loop.run_callback(switch, switch),)
        came_back = give_way(hub, current, name or None, fd)
        if came_back is not switch:
            raise wrong_switch(came_back, "its turn")
    finally:
        end_watchers(watchers)
        call.leave()
    if call.error:
        raise os_error(call.error, name, fd)
    return 0


# ---- close -------------------------------------------------------------------------------------------------------------------

@cython.final
@cython.internal
cdef class PutOffClose:
    """A close(2) that waits until its parties are done: workers that use the number, loops with a watcher on it, close() itself."""
    cdef Closing *closing
    cdef tuple watchers        # those of call_after_poll()
    cdef bint waits_for_loop   # the loop of the thread that called close() is a party

    def __dealloc__(self):
        if self.closing != NULL:
            coopos_closing_drop(self.closing)

    cdef int party_left(self) except -1:
        """One party is done. The last one makes the system call."""
        cdef int fd = self.closing.fd
        coopos_closing_leave(self.closing)
        if self.closing.is_made and _put_off.get(fd) is self:
            del _put_off[fd]
        return 0

    cdef int forget_other_threads(self) except -1:
        """In a forked child: the parties of other threads don't exist here. One stands for them, and is done now."""
        if self.closing.parties > self.waits_for_loop:
            self.closing.parties = 1 + self.waits_for_loop
            self.party_left()
        return 0

    cdef int wait_for_turn(self, object loop) except -1:
        """Make *loop* a party until it has polled once more and has run the callbacks of that poll."""
        self.waits_for_loop = True
        self.watchers = call_after_poll(loop, self.after_polling, ())
        return 0

    def after_polling(self):
        end_watchers(self.watchers)
        self.party_left()


# {descriptor: its PutOffClose}. C code may have made the close already.
cdef dict _put_off = {}


cdef PutOffClose put_off_close(int fd):
    cdef PutOffClose later = PutOffClose.__new__(PutOffClose)
    later.closing = coopos_closing_new(fd)
    if later.closing == NULL:
        raise os_error(errno, "close", fd)
    _put_off[fd] = later
    return later


cdef int check_open(int fd, str call) except -1:
    """Raise EBADF if close() of the number was called, and only put off the system call."""
    cdef PutOffClose later
    if _put_off and (<object>fd) in _put_off:
        later = <PutOffClose>_put_off[fd]
        if coopos_closing_is_due(later.closing):
            raise os_error(EBADF, call, fd)
        del _put_off[fd]
    return 0


cdef int forget_other_threads() except -1:
    """In a forked child, which has no other threads."""
    cdef PutOffClose later
    if _put_off:
        for later in list(_put_off.values()):
            later.forget_other_threads()
    forget_calls(False)
