# What the compiled modules share: how arguments and errors are made, how a greenlet gives way to its hub, other threads' loops.

from cpython.object cimport PyObject

from coopos._posix cimport Closing

cdef enum:
    READ = 1
    WRITE = 2

cdef int generation
cdef int forget_other_threads() except -1

# By descriptor, whether it was last seen in non-blocking mode. Higher numbers are asked for each time.
cdef enum:
    KNOWN_SIZE = 65536
cdef char[KNOWN_SIZE] is_known_nonblocking


cdef class Call:
    cdef int fd
    cdef int other             # -1: there is none
    cdef int error             # errno that it has to raise; 0
    cdef object loop           # of the greenlet that calls
    cdef int enter(self, str name) except -1
    cdef int leave(self) except -1
    cdef int forget(self, int fd) except -1
    cdef int hear_of_close(self, int fd, Closing *closing) except -1


cdef class Wait:
    cdef object watcher
    cdef object hub
    cdef object loop
    cdef object switch     # of the greenlet that waits
    cdef object queued     # the loop callback that will wake it, once close() has evicted it
    cdef PyObject *next    # another one parked on the same descriptor, borrowed
    cdef int fd
    cdef int events
    cdef int error         # errno that the waiter is to raise; 0
    cdef int born          # generation
    cdef bint is_on        # the watcher is, whether or not anybody waits
    cdef bint is_left      # nobody will wait again
    cdef object waiter     # the greenlet that waits by a watcher that stays on,
    cdef tuple token       # and what it is switched to with
    cdef bint may_stay     # the watcher may stay on when nobody waits

cdef object os_error(int err, str call, object subject)
cdef object give_way(object hub, object current)
cdef object refusal()
cdef object reachable_hub()
cdef int stand(int fd, int events, str call) except -1
cdef object wrong_switch(object came_back, str what)
cdef bint is_alive(object loop) noexcept
cdef bint post(object loop, object callback, tuple args=*) except -1
cdef int park(int fd, int events, str call, bint may_stand=*) except -1
cdef int park_until_ready(int fd, int events, str call) except -1
cdef Wait new_seat(int fd, int events)
cdef int park_in(Wait seat, str call) except -1
cdef int leave_seat(Wait seat) except -1
cdef int close_fd(int fd) except -1
cdef int set_ref(watcher, bint ref) except -1
cdef bint note_mode(int fd) noexcept
cdef int take_turns(int fd=*, str name=*) except -1
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
