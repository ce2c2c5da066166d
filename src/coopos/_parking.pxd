# What the compiled modules share: how arguments and errors are made, how a greenlet gives way to its hub, other threads' loops.

from cpython.object cimport PyObject

from coopos._posix cimport Closing, Event

cdef enum:
    READ = 1
    WRITE = 2
    NEVER = -1

cdef int generation
cdef int forget_other_threads() except -1


cdef class Call:
    cdef int fd
    cdef int other             # -1: there is none
    cdef int error             # errno that it has to raise; 0
    cdef object loop           # of the greenlet that calls
    cdef int enter(self, str name) except -1
    cdef int leave(self) except -1
    cdef int forget(self, int fd) except -1
    cdef int hear_of_close(self, int fd, Closing *closing) except -1


# What is waited for in one loop.
cdef class Set:
    cdef readonly object loop
    cdef object hub            # that it was last used in, or None
    cdef object watcher        # the loop's, for *fd*
    cdef object ear            # what that calls
    cdef int fd                # of the epoll; -1 before the first wait
    cdef int members           # how many wait
    cdef int holds             # how many of them want the loop kept alive
    cdef int is_on             # the watcher is: 0, 1 or UNKNOWN
    cdef int is_held           # and keeps the loop alive
    cdef bint is_looking       # the hub is in look(), which sees to that at its end
    cdef bint is_over
    cdef int born              # generation
    cdef Event *ready          # what look() has got, and how far it is
    cdef int at
    cdef int n
    cdef int n_direct          # switches since the loop had its turn
    cdef long long direct_since_us
    cdef list posted           # by other threads: [(Wait, PutOffClose or None), ...]
    cdef int open(self) except -1
    cdef int renew(self) except -1
    cdef int shut(self) noexcept
    cdef bint is_there(self, loop) except -1
    cdef int end(self) noexcept
    cdef int settle(self, int members, int holds) except -1
    cdef int hold(self, Wait wait, bint is_held) except -1
    cdef bint enter(self, Wait wait, bint is_held, str call) except -1
    cdef int leave(self, Wait wait) except -1
    cdef int drop(self, Wait wait) except -1
    cdef int events_of(self, int fd) noexcept
    cdef int arm(self, int fd, str call) except -1
    cdef int arm_all(self) except -1
    cdef int arm_again(self, int fd) except -1
    cdef int look(self) except -1
    cdef Wait next_ready(self, object hub, object current)
    cdef int tell(self, int fd, int events) except -1


cdef class Wait:
    cdef Set set               # while it is there
    cdef PyObject *next        # another one for the same descriptor, borrowed
    cdef int fd
    cdef int events
    cdef bint is_listed        # in the table
    cdef int error             # errno that the waiter is to raise; 0
    cdef bint is_held          # it wants the loop kept alive
    cdef object greenlet       # that waits, or None
    cdef object queued         # the loop callback that will wake it
    cdef object watcher        # of its own, where there is no epoll
    cdef int tell(self) except -1

cdef object os_error(int err, str call, object subject)
cdef object give_way(object hub, object current)
cdef object refusal()
cdef object reachable_hub()
cdef bint stand(int fd, int events, str call) except -1
cdef bint is_always_ready(int fd) noexcept
cdef bint is_nonblocking(int fd) noexcept
cdef object wrong_switch(object came_back, str what)
cdef bint is_alive(object loop) noexcept
cdef bint post(object loop, object callback, tuple args=*) except -1
cdef bint park(int fd, int events, str call, bint may_stand=*, long long us=*) except -1
cdef bint has_hub_to_wait_in(bint may_stand) except -1
cdef int park_until_ready(int fd, int events, str call) except -1
cdef Set set_of_loop(object loop)
cdef int take_over(bint keeps_greenlets) except -1
cdef int close_fd(int fd) except -1
cdef int evict(int fd, list greenlets) except -1
cdef int set_ref(watcher, bint ref) except -1
cdef int take_turns(int fd=*, str name=*, double seconds=*) except -1
cdef int check_open(int fd, str call) except -1
cdef int forget_calls(bint all_of_them) except -1
cdef object this_greenlet()


cdef inline int as_int(Py_ssize_t number) except? -1:
    """A C int for what os functions take as one. Their arguments are declared Py_ssize_t, which Cython, as `os` does, takes from
    integers alone; into a C int it would also put a float.
    """
    if number != <int>number:
        raise OverflowError("signed integer is greater than maximum" if number > 0 else "signed integer is less than minimum")
    return <int>number
