# Semaphores that processes share, the base of multiprocessing's locks, for greenlets.
#
# 1. A semaphore that is free is taken without waiting. Otherwise a worker waits, one for each hub and semaphore: the greenlets of a
#    hub take turns, so that a thousand of them cost one thread.
# 2. The owner of a lock is a greenlet, not a thread: two greenlets of one thread exclude each other.
# 3. Nothing switches between the moment a greenlet gets a semaphore and the return to its caller. A greenlet that is killed or
#    timed out has taken nothing.
# 4. In the hub, and in a thread without a hub, the stdlib's object waits plainly.
#
# A Semaphore contains the stdlib's object, which creates, names and closes the kernel's. The stdlib's count of threads is unused.

# multiprocessing's number for a lock that its owner may take again; the other kind is 1.
cdef enum:
    RECURSIVE_MUTEX = 0

#: A longer timeout counts as this one: every loop can count so far.
cdef double LONGEST_S = 1e9


cdef class Semaphore:
    """What ``_multiprocessing.SemLock`` is to :mod:`multiprocessing`, for greenlets.

    *plain*: an instance of that class, which nobody else uses.
    """
    cdef object plain
    cdef sem_t *sem
    cdef bint is_recursive
    cdef int maximum
    cdef int held              # how often this process has taken it, minus how often it has released it
    cdef object owner          # the greenlet that took it last
    cdef dict turns            # {hub: [turns, how many of its greenlets wait]}
    cdef int born              # generation: in a forked child a greenlet of the parent may have the turn

    def __cinit__(self, plain):
        self.plain = plain
        self.sem = <sem_t *><size_t>plain.handle
        self.is_recursive = plain.kind == RECURSIVE_MUTEX
        self.maximum = plain.maxvalue
        self.turns = {}
        self.born = generation

    @property
    def handle(self):
        """The address of the kernel's object in this process."""
        return self.plain.handle

    @property
    def kind(self):
        """0: a lock that its owner may take again; 1: a semaphore."""
        return self.plain.kind

    @property
    def maxvalue(self):
        """The value that it never exceeds."""
        return self.maximum

    @property
    def name(self):
        """Its name in the file system, while it has one."""
        return self.plain.name

    def acquire(self, block=True, timeout=None):
        """Take it, waiting if *block*, up to *timeout* seconds. Returns whether it was taken."""
        cdef double seconds = -1
        if self.is_recursive and self.held > 0 and self.owner is this_greenlet():
            self.held += 1
            return True
        if timeout is not None:
            seconds = max(<double>timeout, 0)
        if not self.take():
            if not block or seconds == 0 or not self.wait(seconds):
                return False
        self.held += 1
        self.owner = this_greenlet()
        return True

    cdef bint take(self) except -1:
        while sem_trywait(self.sem) < 0:
            if errno == EAGAIN:
                return False
            if not is_interrupted(errno):
                raise os_error(errno, "sem_trywait", self.plain.name)
        return True

    cdef bint wait(self, double seconds) except -1:
        """Wait until it can be taken, and take it. Returns whether that was in time. A negative number of seconds: no limit."""
        cdef bint has_one = False
        if reachable_hub() is None:
            has_one = self.plain.acquire(True, None if seconds < 0 else min(seconds, LONGEST_S))
            self.plain._after_fork()               # which resets its count
            return has_one
        if seconds < 0:
            self.wait_in_turn()
            return True
        with Timeout(min(seconds, LONGEST_S), False):
            self.wait_in_turn()
            has_one = True
        return has_one

    cdef int wait_in_turn(self) except -1:
        hub = reachable_hub()
        if self.born != generation:
            self.turns = {}
            self.born = generation
        place = self.turns.get(hub)
        if place is None:
            place = self.turns[hub] = [new_turns(), 0]
        place[1] += 1
        try:
            with place[0]:
                if not self.take():
                    wait_semaphore(self.sem, self.plain.name)
        except BaseException as ex:
            note_place(ex, "sem_wait", self.plain.name)
            raise
        finally:
            place[1] -= 1
            if place[1] == 0 and self.turns.get(hub) is place:
                del self.turns[hub]
        return 0

    def write_at_once(self, int fd, data):
        """Write *data* to a pipe if nobody has to wait for that: if this can be taken, and the pipe has room for all of it. Nobody
        else may write to the pipe without having taken this. Returns whether it was written. No signal handler runs meanwhile.
        """
        cdef Py_buffer view
        cdef iovec iov
        cdef bint is_written = False
        take_buffer(data, &view, False, &iov)
        try:
            if self.take():
                is_written = coopos_write_at_once(fd, view.buf, <size_t>view.len)
                sem_post(self.sem)
            return is_written
        finally:
            PyBuffer_Release(&view)

    def take_back(self, int count, thrown=None):
        """Acquire *count* times what its caller has released; then raise *thrown*, if anything. If more is thrown in meanwhile it
        waits on, and a GreenletExit takes the place of anything else.
        """
        if reachable_hub() is None:
            self.take() or self.wait(-1)
        else:
            while not self.take():
                # A greenlet of its own, into which no other code can throw.
                other = Greenlet.spawn(self.wait_for_other)
                while not other.ready():
                    try:
                        other.join()
                    except BaseException as ex:
                        if thrown is None or isinstance(ex, GreenletExit):
                            thrown = ex
                if other.value is True:
                    break
        self.held += count
        self.owner = this_greenlet()
        if thrown is not None:
            raise thrown

    def wait_for_other(self):
        """For take_back: wait for one, for whoever asked; True."""
        self.wait_in_turn()
        return True

    def release(self):
        """Release it."""
        cdef int value
        if self.is_recursive:
            if not (self.held > 0 and self.owner is this_greenlet()):
                raise AssertionError("attempt to release recursive lock not owned by thread")
            if self.held > 1:
                self.held -= 1
                return
        elif coopos_sem_value(self.sem, &value) == 0:
            if value >= self.maximum:
                raise ValueError("semaphore or lock released too many times")
        elif errno != ENOSYS:
            raise os_error(errno, "sem_getvalue", self.plain.name)
        elif self.maximum == 1 and self.take():      # the system has no sem_getvalue(3)
            sem_post(self.sem)
            raise ValueError("semaphore or lock released too many times")
        if sem_post(self.sem) < 0:
            raise os_error(errno, "sem_post", self.plain.name)
        self.held -= 1
        if self.held <= 0:
            self.owner = None

    def __enter__(self):
        return self.acquire()

    def __exit__(self, exc_type=None, exc_value=None, exc_tb=None):
        self.release()

    def _count(self):
        """How often this process has taken it, minus how often it has released it."""
        return self.held

    def _is_mine(self):
        """Whether the current greenlet took it last, and it was not released since."""
        return self.held > 0 and self.owner is this_greenlet()

    def _get_value(self):
        """How often it can be taken now. NotImplementedError if the system has no sem_getvalue(3)."""
        return self.plain._get_value()

    def _is_zero(self):
        """Whether it can't be taken now."""
        return self.plain._is_zero()

    def _after_fork(self):
        """In a forked child: none of its greenlets has taken it or waits for it."""
        self.held = 0
        self.owner = None
