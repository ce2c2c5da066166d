# One set per loop, in which lies everything that is waited for there.
#
# The set is an epoll(7) behind one io watcher of the loop. The loop never sees any other number of ours. Four rules:
#
# 1. A greenlet is registered before the kernel is asked to tell of its descriptor, and leaves in a `finally`.
# 2. An event is a hint and never an answer: whoever is woken asks the kernel again. So a late event does no harm. The greenlet may
#    have been killed, the number may be another file's by now, another process may share the file. Nothing has to be disarmed.
# 3. A descriptor is armed for one event (EPOLLONESHOT), each time somebody waits for it.
# 4. Only the loop's own thread touches its set. Other threads post a callback to the loop.
#
# A greenlet that has to wait looks into the set first. If another waiter is ready it switches to that one directly, without a turn of
# the loop. MAX_DIRECT and MAX_DIRECT_US bound how often and for how long, so that the loop's timers and callbacks get their turn.
#
# Where there is no epoll (macOS), or under COOPOS_SETS=watchers, each wait has an io watcher of its own: start_watcher() and
# stop_watcher() are all that differs.

cdef bint is_always_ready(int fd) noexcept:
    """Whether readiness means nothing for *fd*: regular files and block devices are always ready, and block all the same."""
    cdef stat_t st
    return fstat(fd, &st) == 0 and (S_ISREG(st.st_mode) or S_ISBLK(st.st_mode))


# ---- waiting for a descriptor ------------------------------------------------------------------------------------------------

# COOPOS_SETS=watchers: as where there is no epoll, of the loop's own watchers; see start_watcher().
cdef bint _has_epoll = COOPOS_HAVE_EPOLL and os.environ.get("COOPOS_SETS") != "watchers"

# By descriptor, the last Wait for it, or NULL (borrowed: whoever waits has it); close() reads it. The waits of every thread are
# here, under the GIL.
cdef Table _parked


cdef enum:
    MAX_DIRECT = 64        # how many greenlets switch to the next one themselves, before the loop has a turn
    MAX_DIRECT_US = 1000   # and how long that goes on

cdef enum:
    UNKNOWN = -1       # whether a watcher is on: else 0 or 1

cdef enum:
    ARMED = 1          # what comes of asking the set to tell of a number
    ALWAYS_READY = 2
    FULL = 3


cdef class Set


cdef class Wait:
    """One greenlet's wait for one descriptor; or, where a subclass has a tell() of its own, whatever else is to be told.

    A new one each time: it is also what the greenlet is switched to with, and proves who has woken it.
    """
    cdef Set set               # while it is there
    cdef PyObject *next        # another one for the same descriptor, borrowed
    cdef int fd
    cdef int events
    cdef bint is_listed        # in the table
    cdef int error             # errno that the waiter is to raise; 0
    cdef bint keeps_alive          # it wants the loop kept alive
    cdef object greenlet       # that waits, or None
    cdef object queued         # the loop callback that will wake it
    cdef object watcher        # of its own, where there is no epoll

    def __dealloc__(self):
        if self.is_listed:
            delist(self)           # its loop was destroyed, and what waited has gone without a word

    cdef int on_ready(self) except -1:
        """In the hub: the descriptor may be ready."""
        cdef tuple args
        greenlet = self.greenlet       # leave() lets go of it meanwhile
        if greenlet is not None:
            args = (self,)
            coopos_switch(greenlet, <PyObject *>args, NULL)
        return 0

    def wake(self):
        """In the hub, from its queue: the descriptor is closed, or there is something else to see."""
        self.on_ready()

    def on_watcher(self):
        """In the hub: the watcher of its own has told."""
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
    """Whether it was there: not, if a fork has left it behind."""
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


cdef int set_ref(watcher, bint ref) except -1:
    """Say whether a watcher keeps its loop alive. libuv's io watchers are parts of one that does the counting."""
    getattr(watcher, "_watcher_ref", watcher).ref = ref
    return 0


# Where there is no epoll each wait has an io watcher, from arm to leave. What is written here is all that differs: no other
# function makes one, and a close of such a number waits for other threads to stop theirs.

# Numbers that libuv may just be showing in non-blocking mode, though they aren't.
cdef list _briefly_nonblocking = []


cdef bint is_nonblocking(int fd) noexcept:
    """Whether *fd* is in non-blocking mode, now. What is not open isn't; the call itself says so."""
    cdef int flags = fcntl(fd, F_GETFL)
    return flags >= 0 and flags & O_NONBLOCK and not (_briefly_nonblocking and (<object>fd) in _briefly_nonblocking)


cdef int start_watcher(Wait wait, str call) except -1:
    """ARMED, or ALWAYS_READY."""
    cdef object loop = wait.set.loop
    cdef int flags = fcntl(wait.fd, F_GETFL)
    if flags < 0:
        raise os_error(errno, call, wait.fd)
    if is_always_ready(wait.fd):
        return ALWAYS_READY        # libev would say so; libuv refuses it
    if flags & O_NONBLOCK or not hasattr(loop, "_io_watchers"):
        wait.watcher = loop.io(wait.fd, wait.events)
    else:
        _briefly_nonblocking.append(wait.fd)
        try:
            wait.watcher = loop.io(wait.fd, wait.events)
            # libuv has made the file non-blocking, for everybody who shares it.
            fcntl(wait.fd, F_SETFL, flags)
        finally:
            _briefly_nonblocking.remove(wait.fd)
    wait.watcher.start(wait.on_watcher)
    if not wait.keeps_alive:
        set_ref(wait.watcher, False)   # libuv shares it with others who wait for the number: only for numbers of our own
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
    """What the loop calls for a set. The watcher keeps this one alive, and not the set, which goes with its thread."""
    cdef PyObject *set             # borrowed, or NULL

    def __call__(self):
        cdef Set here
        if self.set != NULL:
            here = <Set>self.set
            here.look()


@cython.final
@cython.no_gc_clear
cdef class Set:
    """What is waited for in one loop. Only that loop's thread uses it; other threads post."""
    cdef readonly object loop
    cdef object hub            # that it was last used in, or None
    cdef object watcher        # the loop's, for *fd*
    cdef object callback            # what that calls
    cdef int fd                # of the epoll; -1 before the first wait
    cdef int members           # how many wait
    cdef int n_keep_alive             # how many of them want the loop kept alive
    cdef int is_started             # the watcher is: 0, 1 or UNKNOWN
    cdef int keeps_alive           # and keeps the loop alive
    cdef bint is_looking       # the hub is in look(), which sees to that at its end
    cdef bint is_over
    cdef int born              # generation
    cdef Event *ready          # what look() has got, and how far it is
    cdef int at
    cdef int n
    cdef int n_direct          # switches since the loop had its turn
    cdef long long direct_since_us
    cdef list posted           # by other threads: [(Wait, PutOffClose or None), ...]

    def __cinit__(self, loop):
        self.loop = loop
        self.fd = -1
        self.born = generation
        self.posted = []

    def __dealloc__(self):
        global _latest_set
        if _latest_set == <PyObject *>self:
            _latest_set = NULL
        self.shut()
        free(self.ready)

    cdef int open(self) except -1:
        """At the first wait: a program that never waits has no descriptor more, and a forked child none that it might close. 0, or
        errno: there is no epoll, or no descriptor left for one.
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
            watcher = self.loop.io(fd, READ, ref=False)
            set_ref(watcher, False)
        except:
            c_close(fd)
            raise
        if self.fd >= 0:           # a signal's handler has waited meanwhile
            watcher.close()
            c_close(fd)
            return 0
        callback.set = <PyObject *>self
        self.fd, self.watcher, self.callback = fd, watcher, callback
        self.is_started = self.keeps_alive = False
        return 0

    cdef int shut(self) noexcept:
        cdef int fd = self.fd
        watcher, self.watcher = self.watcher, None
        self.fd = -1
        self.at = self.n = 0
        if self.callback is not None:
            (<SetCallback>self.callback).set = NULL
        try:
            if watcher is not None and self.born == generation and is_alive(self.loop):
                watcher.stop()
                watcher.close()
        except:
            pass                   # the interpreter is being taken down
        if fd >= 0:
            c_close(fd)
        return 0

    cdef bint is_intact(self, loop) except -1:
        """Whether it is this loop's, and the number is still the set's."""
        cdef Event event
        cdef int n
        if self.loop is not loop:
            return False
        n = coopos_set_ready(self.fd, &event, 1)
        if n == 1:
            self.arm_again(event.fd)
        return n >= 0

    cdef int end(self) noexcept:
        """Its thread has ended, or its loop was destroyed: nobody who waits here will ever run."""
        cdef PutOffClose later
        cdef PyObject **link
        cdef int fd
        self.is_over = True
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
            for _, later in self.posted:
                if later is not None:
                    later.party_left()
        self.posted = []
        return 0

    cdef int update_watcher(self, int members, int n_keep_alive) except -1:
        """Have the watcher on exactly while there are members, and keep the loop alive exactly while some of them want that."""
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
            # libuv's watchers are Python, and a signal's handler has raised in the middle.
            self.loop.run_callback(self.update_watcher_again)
            raise
        return 0

    def update_watcher_again(self):
        self.update_watcher(self.members, self.n_keep_alive)

    cdef int keep_alive(self, Wait wait, bint keeps_alive) except -1:
        """Whether *wait*, a member, wants the loop kept alive."""
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
        """Begin to wait. False: that can't be waited for, and is always ready. Whatever is raised, leave() comes after it."""
        check_open(wait.fd, call)
        if wait.fd < 0:
            raise os_error(EBADF, call, wait.fd)
        cdef bint has_set = self.fd >= 0 or self.open() == 0
        if self.is_started != 1 or (keeps_alive and self.keeps_alive != 1):
            # May run a signal's handler: before anybody could wake us.
            self.update_watcher(self.members + 1, self.n_keep_alive + keeps_alive)
        wait.set = self
        wait.keeps_alive = keeps_alive
        enlist(wait)
        self.members += 1
        self.n_keep_alive += keeps_alive
        cdef int rc = self.arm(wait.fd, call) if has_set else FULL
        if rc == FULL:
            rc = start_watcher(wait, call)
        return rc != ALWAYS_READY

    cdef int leave(self, Wait wait) except -1:
        """Wait no longer."""
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
        """Not disarmed: what the set still tells finds nobody."""
        if delist(wait):
            self.members -= 1
            self.n_keep_alive -= wait.keeps_alive
            if not self.n_keep_alive and not self.is_looking:
                self.update_watcher(self.members, self.n_keep_alive)
        if wait.watcher is not None:
            stop_watcher(wait)
        return 0

    cdef int events_of(self, int fd) noexcept:
        """What all who wait here for *fd* want."""
        cdef PyObject *link = at_fd(&_parked, fd)
        cdef int events = 0
        while link != NULL:
            if (<Wait>link).set is self and (<Wait>link).watcher is None:
                events |= (<Wait>link).events
            link = (<Wait>link).next
        return events

    cdef int arm(self, int fd, str call) except -1:
        """Have the kernel tell once of *fd*."""
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
        # Somebody has closed all descriptors, the set's too, and its number may be another file's by now.
        self.fd = -1
        self.shut()
        self.renew()
        return ARMED

    cdef int renew(self) except -1:
        """Have those who wait in a new set."""
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
        """Or, where that can't be, have those who wait ask the kernel, and hear why."""
        cdef PyObject *link
        cdef Wait wait
        cdef int events = self.events_of(fd)
        if not events or self.fd < 0 or coopos_set_arm(self.fd, fd, events) == 0:
            return 0
        link = _parked.at[fd]
        while link != NULL:
            wait = <Wait>link
            link = wait.next
            if wait.set is self and wait.queued is None:
                wait.queued = self.loop.run_callback(wait.wake)
        return 0

    cdef int look(self) except -1:
        """In the hub: there is something to tell."""
        cdef int at
        if self.born != generation:
            remake_sets_in_child(True)        # in the child of C code that runs no at-fork hooks
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
            # Of a greenlet that has died, or the hub's own end. Not to the loop: gevent stops an io watcher whose callback raises.
            self.loop.handle_error(self.watcher, *sys.exc_info())
        finally:
            self.is_looking = False
            self.n_direct = 0
            while self.at < self.n:    # they are told in the next turn
                self.arm_again(self.ready[self.at].fd)
                self.at += 1
            self.update_watcher(self.members, self.n_keep_alive)
        return 0

    cdef int dispatch(self, int fd, int events) except -1:
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
                wait = <Wait>woken.pop()       # who has come first has waited longest
                if wait.set is self:
                    wait.on_ready()
        finally:
            if woken or are_others:
                self.arm_again(fd)
        return 0

    cdef Wait next_ready(self, object hub, object current):
        """One who waits here, and can be switched to at once, without a turn of the loop; or None.

        So many in a row, and for so long, that the loop's timers and callbacks are not kept waiting; and none while there are
        callbacks, of which one may be to kill it.
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
        if self.at < self.n:           # look() has got it, and is not there yet
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
        # The hub's affair: several who wait for it, a child, news of a thread. Or it concerns nobody any more.
        if self.at >= self.n:
            self.arm_again(event.fd)
        return None

    def run_posted(self):
        """In the loop's thread: another thread has closed what is waited for here."""
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
    """Those of one thread: {loop: Set}."""
    cdef dict by_loop

    def __cinit__(self):
        self.by_loop = {}

    def __dealloc__(self):
        cdef Set here
        for here in self.by_loop.values():
            here.end()


_here = _local()
# The Set that was used last, or NULL (borrowed: its thread owns it): nearly always the one that is wanted.
cdef PyObject *_latest_set = NULL


cdef dict sets_of_this_thread():
    cdef Sets sets = getattr(_here, "sets", None)
    if sets is None:
        sets = _here.sets = Sets()
    return sets.by_loop


cdef Set set_of_loop(object loop):
    """In the loop's thread."""
    cdef dict by_loop = sets_of_this_thread()
    cdef Set here = <Set>by_loop.get(loop)
    cdef Set other
    if here is None:
        for other in list(by_loop.values()):
            if not is_alive(other.loop):
                del by_loop[other.loop]
                other.end()
        here = by_loop[loop] = Set(loop)
    if here.born != generation:
        remake_sets_in_child(True)
    return here


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
    """In a forked child, once its loop is its own: sets that are not the parent's. Of those who waited only the greenlets of this
    thread still do, unless they are left behind.
    """
    cdef PyObject *link
    cdef PyObject *next
    cdef Set here
    cdef Wait wait
    cdef int fd
    cdef dict by_loop = sets_of_this_thread()
    for here in by_loop.values():
        here.born = generation
        here.shut()
        here.members = here.n_keep_alive = 0
        here.posted = []
    # What isn't kept is not written to: that would copy the page it is on.
    for fd in range(_parked.size):
        link, _parked.at[fd] = _parked.at[fd], NULL
        while link != NULL:
            next = (<Wait>link).next
            if (<Wait>link).set is not None and (<Wait>link).set.born == generation:
                wait = <Wait>link
                if keeps_greenlets and wait.greenlet is not None:
                    enlist(wait)
                    wait.set.members += 1
                    wait.set.n_keep_alive += wait.keeps_alive
                elif wait.watcher is not None:
                    stop_watcher(wait)
            link = next
    for here in by_loop.values():
        if here.members and _has_epoll:
            here.renew()
    return 0


cdef int wake_with_error(Wait wait) except -1:
    """Tell a parked greenlet, in its loop's thread, that its descriptor is closed."""
    if wait.greenlet is not None:
        wait.set.drop(wait)
        if wait.queued is None:
            wait.queued = wait.set.loop.run_callback(wait.wake)
    return 0
