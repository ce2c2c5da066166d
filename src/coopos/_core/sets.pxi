# One set per loop: it holds all descriptors that the loop's greenlets wait for.
#
# The set is an epoll(7) instance behind one io watcher of the loop. The loop sees no other descriptor of ours. Four rules:
#
# 1. A greenlet registers its Wait before the kernel can report an event for it, and leaves in a `finally`.
# 2. An event is a hint: a greenlet that is woken asks the kernel again. So a late event is harmless (the greenlet was killed, the
#    number belongs to another file by now, another process shares the file), and nothing has to be disarmed.
# 3. A descriptor is armed for one event (EPOLLONESHOT), again for each wait.
# 4. Only the loop's own thread touches its set. Other threads post a callback to the loop.
#
# A greenlet that has to wait looks into the set first. If another waiter is ready it switches to that one directly, without a turn
# of the loop. MAX_DIRECT and MAX_DIRECT_US bound how often and for how long, for the sake of the loop's timers and callbacks.
#
# Where there is no epoll (macOS), or under COOPOS_SETS=watchers, each wait has an io watcher of its own: start_watcher() and
# stop_watcher() are all that differs.

# ---- waiting for a descriptor ------------------------------------------------------------------------------------------------

cdef bint _has_epoll = COOPOS_HAVE_EPOLL and _settings.SETS == "epoll"

# By descriptor, the newest Wait for it, which links to the older ones. The waits of all threads are here, under the GIL, for
# close(). Borrowed: the waiting call owns its Wait.
cdef Table _parked

# By number, the Set whose epoll it is; of all threads. Borrowed.
cdef Table _sets

cdef enum:
    MAX_DIRECT = 64        # direct switches from one greenlet to the next, before the loop has a turn
    MAX_DIRECT_US = 1000   # and for how long

cdef enum:
    UNKNOWN = -1       # a watcher's state, if start() or stop() has raised in the middle

cdef enum:
    ARMED = 1          # results of Set.arm() and start_watcher()
    ALWAYS_READY = 2
    FULL = 3


cdef class Set


cdef class Wait:
    """One greenlet's wait for one descriptor; or another use of a descriptor in the set, by a subclass with its own on_ready().

    Each wait makes a new one. The greenlet must be switched to with this object; any other comes from foreign code.
    """
    cdef Set set               # the set that it is in, or None
    cdef PyObject *next        # an older Wait for the same descriptor, borrowed
    cdef int fd
    cdef int events
    cdef bint is_listed        # it is in _parked
    cdef int error             # the errno that the waiter has to raise, or 0
    cdef bint keeps_alive      # the loop must not end while this waits
    cdef long long since_us    # when it began, by the coarse clock
    cdef object greenlet       # the waiter, or None
    cdef object queued         # the loop callback that will wake the waiter, or None
    cdef object watcher        # its own watcher, where there is no epoll

    def __dealloc__(self):
        if self.is_listed:
            delist(self)           # the loop was destroyed and the waiter was freed without leave()

    cdef int on_ready(self) except -1:
        """In the hub: the descriptor may be ready."""
        cdef tuple args
        greenlet = self.greenlet       # leave() clears it during the switch
        if greenlet is not None:
            args = (self,)
            coopos_switch(greenlet, <PyObject *>args, NULL)
        return 0

    cdef int lose_loop(self) except -1:
        """Its loop was destroyed, or its thread has ended."""
        return 0

    def wake(self):
        """A loop callback: the descriptor was closed, or the waiter has another reason to look again."""
        self.on_ready()

    def on_watcher(self):
        """The callback of its own watcher."""
        if self.watcher is not None:
            self.watcher.stop()
            self.on_ready()


cdef int enlist(Wait wait) except -1:
    cdef int fd = wait.fd
    reserve(&_parked, fd)
    wait.next = _parked.at[fd]
    wait.is_listed = True
    _parked.at[fd] = <PyObject *>wait
    return 0


cdef bint delist(Wait wait) noexcept:
    """Take *wait* out of the table. False: it wasn't there, because remake_sets_in_child() has dropped it."""
    cdef PyObject **link
    if wait.is_listed:
        wait.is_listed = False
        link = &_parked.at[wait.fd]
        while link[0] != NULL:
            if link[0] == <PyObject *>wait:
                link[0] = wait.next
                return True
            link = &(<Wait>link[0]).next
    return False


cdef list waits_of(int fd):
    """The Waits for *fd*, of all threads, the newest first. (Other code may free them, and the links are borrowed.)"""
    cdef list found = []
    cdef PyObject *link = at_fd(&_parked, fd)
    while link != NULL:
        found.append(<object>link)
        link = (<Wait>link).next
    return found


# Where there is no epoll each wait has an io watcher, from start_watcher() to leave(). A close of such a number waits until other
# threads have stopped theirs.

# Numbers that libuv is setting to non-blocking mode just now, and that start_watcher() will set back.
cdef list _briefly_nonblocking = []


cdef bint is_nonblocking(int fd) noexcept:
    """Whether *fd* is in non-blocking mode. False if it isn't open: the call itself then fails with EBADF."""
    cdef int flags = fcntl(fd, F_GETFL)
    return flags >= 0 and flags & O_NONBLOCK and not (_briefly_nonblocking and (<object>fd) in _briefly_nonblocking)


cdef int start_watcher(Wait wait, str call) except -1:
    """Start the Wait's own watcher. Returns ARMED or ALWAYS_READY."""
    cdef object loop = wait.set.loop
    cdef int flags = fcntl(wait.fd, F_GETFL)
    if flags < 0:
        raise os_error(errno, call, wait.fd)
    if is_always_ready(wait.fd) and not coopos_can_poll(wait.fd):
        return ALWAYS_READY        # libev would call it ready at once, but libuv refuses it
    if flags & O_NONBLOCK or not hasattr(loop, "_io_watchers"):
        wait.watcher = loop.io(wait.fd, wait.events)
    else:
        _briefly_nonblocking.append(wait.fd)
        try:
            wait.watcher = loop.io(wait.fd, wait.events)
            # uv_poll_init made the open file non-blocking, for all processes that share it:
            # https://github.com/libuv/libuv/blob/v1.x/src/unix/poll.c
            fcntl(wait.fd, F_SETFL, flags)
        finally:
            _briefly_nonblocking.remove(wait.fd)
    wait.watcher.start(wait.on_watcher)
    if not wait.keeps_alive:
        set_ref(wait.watcher, False)   # on libuv for all waiters of the number; so only for numbers that only we use
    return ARMED


cdef int stop_watcher(Wait wait) except -1:
    watcher, wait.watcher = wait.watcher, None
    if is_alive(wait.set.loop):
        watcher.stop()
        watcher.close()
    return 0


@cython.final
@cython.internal
cdef class SetCallback:
    """The callback of a set's watcher. It borrows the set: the watcher must not keep alive a set whose thread has ended."""
    cdef PyObject *set             # or NULL

    def __call__(self):
        cdef Set here
        if self.set != NULL:
            here = <Set>self.set
            here.look()


@cython.final
@cython.no_gc_clear
cdef class Set:
    """The waits of one loop. Only that loop's thread uses it; other threads post."""
    cdef readonly object loop
    cdef object hub            # the hub that used it last, or None
    cdef object watcher        # the loop's io watcher for *fd*
    cdef object callback       # the watcher's SetCallback
    cdef int fd                # the epoll descriptor; -1 before the first wait
    cdef int members           # how many Waits are in it
    cdef int n_keep_alive      # how many of them keep the loop alive
    cdef int is_started        # of the watcher: 0, 1 or UNKNOWN
    cdef int keeps_alive       # of the watcher: 0, 1 or UNKNOWN
    cdef bint is_looking       # the hub is in look(), which updates the watcher at its end
    cdef bint is_over          # the thread has ended or the loop was destroyed
    cdef int born              # generation
    cdef Event *ready          # the *n* events that look() has got; it has handled those before *at*
    cdef int at
    cdef int n
    cdef int n_direct          # direct switches since the loop had its turn
    cdef long long direct_since_us
    cdef Wait mailbox          # of the loop's workers, or None
    cdef Inbox inbox             # for other threads
    cdef list posted           # by other threads that have closed a descriptor: [(Wait, PutOffClose or None), ...]

    def __cinit__(self, loop):
        self.loop = loop
        self.fd = -1
        self.born = generation
        self.posted = []
        self.inbox = Inbox()
        self.inbox.open(loop)

    def __dealloc__(self):
        global _latest_set
        if _latest_set == <PyObject *>self:
            _latest_set = NULL
        self.shut()
        free(self.ready)

    cdef int open(self) except -1:
        """Make the epoll descriptor. Not before the first wait: most children that a program forks never wait, and many close all
        descriptors. Returns 0, or the errno if there is no epoll or no descriptor left for one.
        """
        cdef int fd
        cdef SetCallback callback
        if not _has_epoll:
            return ENOSYS
        callback = SetCallback()
        if self.ready == NULL:
            self.ready = <Event *>malloc(COOPOS_SET_BATCH * sizeof(Event))
            if self.ready == NULL:
                raise MemoryError
        fd = coopos_set_new()
        if fd < 0:
            return errno
        try:
            reserve(&_sets, fd)
            watcher = self.loop.io(fd, READ, ref=False)
            set_ref(watcher, False)
        except:
            c_close(fd)
            raise
        if self.fd >= 0:           # meanwhile a signal handler has waited and made it
            watcher.close()
            c_close(fd)
            return 0
        callback.set = <PyObject *>self
        _sets.at[fd] = <PyObject *>self
        self.fd, self.watcher, self.callback = fd, watcher, callback
        self.is_started = self.keeps_alive = False
        return 0

    cdef int shut(self) noexcept:
        cdef int fd = self.fd
        watcher, self.watcher = self.watcher, None
        self.forget_number()
        self.at = self.n = 0
        if self.callback is not None:
            (<SetCallback>self.callback).set = NULL
        try:
            if watcher is not None and self.born == generation and is_alive(self.loop):
                watcher.stop()
                watcher.close()
        except:
            pass                   # the interpreter is finalizing
        if fd >= 0:
            c_close(fd)
        return 0

    cdef int forget_number(self) noexcept:
        if self.fd >= 0:
            _sets.at[self.fd] = NULL
        self.fd = -1
        return 0

    cdef int end(self) noexcept:
        """The thread has ended or the loop was destroyed, so that no waiter here will ever run: drop the waits."""
        cdef PutOffClose later
        cdef PyObject **link
        cdef int fd
        self.is_over = True
        self.inbox.shut()
        self.shut()
        self.hub = None
        if self.born == generation:
            for fd in range(_parked.size):
                link = &_parked.at[fd]
                while link[0] != NULL:
                    if (<Wait>link[0]).set is self:
                        link[0] = (<Wait>link[0]).next
                    else:
                        link = &(<Wait>link[0]).next
            if self.mailbox is not None:
                try:
                    self.mailbox.lose_loop()
                except:
                    pass           # the interpreter is being taken down, and gevent's libuv watchers are Python
            for _, later in self.posted:
                if later is not None:
                    later.party_left()
        self.posted = []
        return 0

    cdef int update_watcher(self, int members, int n_keep_alive) except -1:
        """Start the watcher if there are *members*, else stop it; let it keep the loop alive if some of them do."""
        cdef int is_started = members > 0
        cdef int keeps_alive = n_keep_alive > 0
        if self.watcher is None or not is_alive(self.loop):
            return 0
        try:
            if self.is_started != is_started:
                self.is_started = UNKNOWN
                if is_started:
                    self.watcher.start(self.callback)
                else:
                    self.watcher.stop()
                self.is_started = is_started
            if is_started and self.keeps_alive != keeps_alive:
                self.keeps_alive = UNKNOWN
                set_ref(self.watcher, keeps_alive)
                self.keeps_alive = keeps_alive
        except:
            # gevent's libuv watchers are Python code: a signal handler may raise in the middle of it.
            self.loop.run_callback(self.update_watcher_again)
            raise
        return 0

    def update_watcher_again(self):
        self.update_watcher(self.members, self.n_keep_alive)

    cdef int keep_alive(self, Wait wait, bint keeps_alive) except -1:
        """Say whether *wait*, a member, keeps the loop alive."""
        if wait.keeps_alive != keeps_alive:
            wait.keeps_alive = keeps_alive
            self.n_keep_alive += 1 if keeps_alive else -1
            if wait.watcher is not None:
                if is_alive(self.loop):
                    set_ref(wait.watcher, keeps_alive)
            elif not self.is_looking:
                self.update_watcher(self.members, self.n_keep_alive)
        return 0

    cdef bint enter(self, Wait wait, bint keeps_alive, str call) except -1:
        """Add *wait* and arm its descriptor. False: that is always ready, and a greenlet waits for it. leave() must follow, also if
        this raises.
        """
        check_open(wait.fd, call)
        if wait.fd < 0:
            raise os_error(EBADF, call, wait.fd)
        cdef bint has_set = self.fd >= 0 or self.open() == 0
        if self.is_started != 1 or (keeps_alive and self.keeps_alive != 1):
            # This may run a signal handler, so it comes before *wait* is registered.
            self.update_watcher(self.members + 1, self.n_keep_alive + keeps_alive)
        wait.set = self
        wait.keeps_alive = keeps_alive
        wait.since_us = coopos_coarse_now_us()
        enlist(wait)
        self.members += 1
        self.n_keep_alive += keeps_alive
        cdef int rc = self.arm(wait.fd, call) if has_set else FULL
        if rc == FULL:
            rc = start_watcher(wait, call)
        if rc == ALWAYS_READY and wait.greenlet is None:
            raise os_error(EPERM, call, wait.fd)   # a descriptor of ours, which no set takes
        return rc != ALWAYS_READY

    cdef int leave(self, Wait wait) except -1:
        """Remove *wait*, if it is here. Its descriptor stays armed: dispatch() finds no Wait for a late event."""
        if wait.set is not self:
            return 0
        self.drop(wait)
        wait.greenlet = None
        wait.set = None
        if wait.queued is not None:
            wait.queued.stop()
            wait.queued = None
        return 0

    cdef int drop(self, Wait wait) except -1:
        """Take *wait* out of the table and the counts."""
        if delist(wait):
            self.members -= 1
            self.n_keep_alive -= wait.keeps_alive
            if not self.n_keep_alive and not self.is_looking:
                self.update_watcher(self.members, self.n_keep_alive)
        if wait.watcher is not None:
            stop_watcher(wait)
        return 0

    cdef int events_of(self, int fd) noexcept:
        """The events that all Waits of this set for *fd* want."""
        cdef PyObject *link = at_fd(&_parked, fd)
        cdef int events = 0
        while link != NULL:
            if (<Wait>link).set is self and (<Wait>link).watcher is None:
                events |= (<Wait>link).events
            link = (<Wait>link).next
        return events

    cdef int arm(self, int fd, str call) except -1:
        """Ask the kernel for one event of *fd*. Returns ARMED, ALWAYS_READY or FULL."""
        cdef int err
        if coopos_set_arm(self.fd, fd, self.events_of(fd)) == 0:
            return ARMED
        err = errno
        if err == EPERM:
            return ALWAYS_READY
        if err == E2BIG:
            return FULL
        if err != EINVAL and (err != EBADF or fcntl(self.fd, F_GETFD) >= 0):
            raise os_error(err, call, fd)
        # The program has closed all descriptors, also the set's. The number may belong to another file by now: don't close it.
        self.forget_number()
        self.shut()
        self.renew()
        return ARMED

    cdef int renew(self) except -1:
        """Make a new epoll descriptor and arm all members in it."""
        cdef int err = self.open()
        if err:
            raise os_error(err, "epoll_create1", "")
        self.update_watcher(self.members, self.n_keep_alive)
        self.arm_all()
        return 0

    cdef int arm_all(self) except -1:
        cdef int fd
        for fd in range(_parked.size):
            self.arm_again(fd)
        return 0

    cdef int arm_again(self, int fd) except -1:
        """Arm *fd* for the Waits that are left. If that fails, wake their greenlets: their next system call raises the error."""
        cdef Wait wait
        cdef int events = self.events_of(fd)
        if not events or self.fd < 0 or coopos_set_arm(self.fd, fd, events) == 0:
            return 0
        for wait in waits_of(fd):
            if wait.set is self and wait.queued is None:
                wait.queued = self.loop.run_callback(wait.wake)
        return 0

    cdef int look(self) except -1:
        """In the hub, as the watcher's callback: get the events and wake the waiters."""
        cdef int at
        if self.born != generation:
            remake_sets_in_child(True)     # C code has forked, and doesn't run the at-fork hooks
            return 0
        if self.at >= self.n:
            self.at = 0
            self.n = coopos_set_ready(self.fd, self.ready, COOPOS_SET_BATCH)
        self.is_looking = True
        try:
            while self.at < self.n:
                at = self.at
                self.at += 1
                self.dispatch(self.ready[at].fd, self.ready[at].events)
        except:
            # A greenlet has died, or the hub ends. gevent would stop the watcher of a callback that raises (gevent_callback in
            # https://github.com/gevent/gevent/blob/master/src/gevent/libev/callbacks.c), so report it here.
            self.loop.handle_error(self.watcher, *sys.exc_info())
        finally:
            self.is_looking = False
            self.n_direct = 0
            while self.at < self.n:    # the rest comes again in the next turn
                self.arm_again(self.ready[self.at].fd)
                self.at += 1
            self.update_watcher(self.members, self.n_keep_alive)
        return 0

    cdef int dispatch(self, int fd, int events) except -1:
        """Call on_ready() of the Waits for these events of *fd*, oldest first."""
        cdef PyObject *link = at_fd(&_parked, fd)
        cdef Wait wait
        cdef list woken
        cdef bint are_others = False
        if link == NULL:
            return 0
        wait = <Wait>link
        if wait.next == NULL and wait.set is self and wait.events & events:
            return wait.on_ready()
        woken = []
        while link != NULL:
            wait = <Wait>link
            link = wait.next
            if wait.set is self:
                if wait.events & events:
                    woken.append(wait)
                else:
                    are_others = True
        try:
            while woken:
                wait = <Wait>woken.pop()
                if wait.set is self:
                    wait.on_ready()
        finally:
            if woken or are_others:
                self.arm_again(fd)
        return 0

    cdef Wait next_ready(self, object hub, object current):
        """A ready Wait that the caller can switch to directly, without a turn of the loop; or None.

        None after MAX_DIRECT switches or MAX_DIRECT_US: the loop's timers come first. None while callbacks are queued: one of them
        may be about to kill that greenlet.
        """
        cdef Event event
        cdef PyObject *link
        cdef Wait wait
        cdef long long now
        if self.n_direct >= MAX_DIRECT or self.fd < 0 or hub.loop._callbacks or has_switch_out(current):
            return None
        now = coopos_now_us()
        if self.n_direct == 0:
            self.direct_since_us = now
        elif now - self.direct_since_us > MAX_DIRECT_US:
            return None
        if self.at < self.n:           # look() has more events than it has handled
            event = self.ready[self.at]
        elif coopos_set_ready(self.fd, &event, 1) != 1:
            return None
        self.n_direct += 1
        link = at_fd(&_parked, event.fd)
        if link != NULL:
            wait = <Wait>link
            if wait.next == NULL and wait.set is self and wait.greenlet is not None and wait.events & event.events:
                self.at += self.at < self.n
                return wait
        # Only the hub may handle it (several waiters, a child, a worker), or it is a late event.
        if self.at >= self.n:
            self.arm_again(event.fd)
        return None

    def run_posted(self):
        """In the loop's thread: wake the greenlets whose descriptor another thread has closed."""
        cdef Wait wait
        cdef PutOffClose later
        while self.posted:
            wait, later = self.posted.pop(0)
            wake_with_error(wait)
            if later is not None:
                later.party_left()


@cython.final
@cython.internal
@cython.no_gc_clear
cdef class Sets:
    """The sets of one thread. They end with it."""
    cdef dict by_loop              # {loop: Set}

    def __cinit__(self):
        self.by_loop = {}

    def __dealloc__(self):
        cdef Set here
        for here in self.by_loop.values():
            here.end()


_here = _local()
# The Set that was used last, a cache for set_of(); or NULL. Borrowed: its thread owns it.
cdef PyObject *_latest_set = NULL


cdef dict sets_of_this_thread():
    cdef Sets sets = getattr(_here, "sets", None)
    if sets is None:
        sets = _here.sets = Sets()
    return sets.by_loop


cdef Set set_of_loop(object loop):
    """The set of *loop*. Only in the loop's thread."""
    cdef dict by_loop = sets_of_this_thread()
    cdef Set here = <Set>by_loop.get(loop)
    cdef Set other
    if here is None:
        for other in list(by_loop.values()):
            if not is_alive(other.loop):
                del by_loop[other.loop]
                other.end()
        here = by_loop[loop] = Set(loop)
        hub = get_hub_if_exists()
        here.hub = hub if hub is not None and hub.loop is loop else None
    if here.born != generation:
        remake_sets_in_child(True)
    return here


def open_inbox(loop):
    set_of_loop(loop)              # which has the inbox


def set_error(loop):
    """For the doctor: the errno with which *loop* has got no epoll descriptor, so that each wait has a watcher of its own; or 0."""
    cdef Set here = set_of_loop(loop)
    return 0 if here.fd >= 0 else here.open()


cdef Set set_of(object hub):
    global _latest_set
    cdef Set here
    if _latest_set != NULL and (<Set>_latest_set).hub is hub and (<Set>_latest_set).born == generation:
        return <Set>_latest_set
    here = set_of_loop(hub.loop)
    here.hub = hub
    _latest_set = <PyObject *>here
    return here


cdef int remake_sets_in_child(bint keeps_greenlets) except -1:
    """In a forked child, once its loop is its own: leave the parent's epolls and make new ones. Only greenlets of this thread go on
    waiting, and only if *keeps_greenlets*.
    """
    cdef PyObject *link
    cdef PyObject *next
    cdef PyObject **end
    cdef Set here
    cdef Wait wait
    cdef int fd
    cdef dict by_loop = sets_of_this_thread()
    for here in by_loop.values():
        here.born = generation
        here.shut()
        here.members = here.n_keep_alive = 0
        here.posted = []
    # A Wait that is dropped is not written to, not even its reference count: the kernel would copy its page.
    for fd in range(_parked.size):
        if _parked.at[fd] == NULL:
            continue
        link, _parked.at[fd] = _parked.at[fd], NULL
        end = &_parked.at[fd]
        while link != NULL:
            next = (<Wait>link).next
            if (<Wait>link).set is not None and (<Wait>link).set.born == generation:
                if keeps_greenlets and (<Wait>link).greenlet is not None:
                    wait = <Wait>link
                    end[0], wait.next = link, NULL     # in the parent's order
                    end = &wait.next
                    wait.set.members += 1
                    wait.set.n_keep_alive += wait.keeps_alive
                elif (<Wait>link).watcher is not None:
                    stop_watcher(<Wait>link)
            link = next
    for here in by_loop.values():
        if here.members and _has_epoll:
            here.renew()
    return 0


cdef int wake_with_error(Wait wait) except -1:
    """In the loop's thread: end a wait whose *error* is set, and let the loop wake its greenlet."""
    if wait.greenlet is not None:
        wait.set.drop(wait)
        if wait.queued is None:
            wait.queued = wait.set.loop.run_callback(wait.wake)
    return 0
