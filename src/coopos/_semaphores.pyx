"""Semaphores that processes share, as the locks of `multiprocessing` are made of, taken and given back by greenlets.

1. What can be had is taken without waiting. What can't is waited for by a thread, one for each hub and semaphore: the greenlets of
   a hub take turns, so that a thousand of them cost one thread.
2. The owner of a lock is a greenlet, not a thread: two greenlets of a thread exclude each other.
3. Between the moment a greenlet has got a semaphore and the return to who asked nothing switches. One that is killed or timed out
   has taken nothing.
4. The hub can't switch, and a thread without a hub has nobody to switch to: there the stdlib's object waits, plainly.

The stdlib's object, which a Semaphore has inside, makes, names and closes the kernel's; its counting of threads isn't used. Knows
libc, `_parking`, `_workers` and how gevent waits in turn.
"""

from libc.errno cimport EAGAIN, EINTR, ENOSYS, errno

from coopos._parking cimport generation, os_error, reachable_hub, this_greenlet
from coopos._posix cimport PyErr_CheckSignals, coopos_sem_value, sem_post, sem_t, sem_trywait
from coopos._workers cimport wait_semaphore

from gevent import Greenlet, GreenletExit, Timeout
from gevent.lock import Semaphore as _Turns


# multiprocessing's number for a lock that its owner may take again; the other kind is 1.
cdef enum:
    RECURSIVE_MUTEX = 0

#: Nobody is told of a later end, and every loop can count so far.
cdef double LONGEST_S = 1e9


cdef class Semaphore:
    """What ``_multiprocessing.SemLock`` is to :mod:`multiprocessing`, for greenlets.

    *plain*: an instance of that class, which nobody else uses.
    """
    cdef object plain
    cdef sem_t *sem
    cdef bint is_recursive
    cdef int maximum
    cdef int held              # how many times somebody of this process has taken it, less how many times it was given back
    cdef object owner          # the greenlet that was last to take it
    cdef dict turns            # {hub: [turns, how many of its greenlets wait]}
    cdef int born              # generation: in a forked child the turn may be one's who isn't there

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
        """Take one, waiting for it if *block*, up to *timeout* seconds; whether there was one to take."""
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
            if errno != EINTR:
                raise os_error(errno, "sem_trywait", self.plain.name)
            PyErr_CheckSignals()
        return True

    cdef bint wait(self, double seconds) except -1:
        """Wait for one; whether it came in time. Negative: for ever."""
        cdef bint has_one = False
        if reachable_hub() is None:
            has_one = self.plain.acquire(True, None if seconds < 0 else min(seconds, LONGEST_S))
            self.plain._after_fork()               # it forgets who has taken it
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
            place = self.turns[hub] = [_Turns(1), 0]
        place[1] += 1
        try:
            with place[0]:
                if not self.take():
                    wait_semaphore(self.sem, self.plain.name)
        finally:
            place[1] -= 1
            if place[1] == 0 and self.turns.get(hub) is place:
                del self.turns[hub]
        return 0

    def take_back(self, int count, thrown=None):
        """Acquire *count* times what its caller has released; then raise *thrown*, if anything. If more is thrown in meanwhile it
        waits on, and a GreenletExit takes the place of anything else.
        """
        if reachable_hub() is None:
            self.take() or self.wait(-1)
        else:
            while not self.take():
                # Nothing is thrown into a greenlet that nobody else knows.
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
        """Give one back."""
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
        elif self.maximum == 1 and self.take():      # the system doesn't tell a value
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
        """How many times somebody of this process has taken it, less how many times it was given back."""
        return self.held

    def _is_mine(self):
        """Whether the greenlet that asks was the last to take it, and it was not given back."""
        return self.held > 0 and self.owner is this_greenlet()

    def _get_value(self):
        """How many can be taken now. NotImplementedError where the system doesn't tell."""
        return self.plain._get_value()

    def _is_zero(self):
        """Whether none can be taken now."""
        return self.plain._is_zero()

    def _after_fork(self):
        """In a child: nobody here has taken it, or waits for it."""
        self.held = 0
        self.owner = None
