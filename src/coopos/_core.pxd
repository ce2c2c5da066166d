# What _owned takes from the core: one attempt, and what to do after it.

from posix.types cimport off_t

from coopos._posix cimport Move, iovec

cdef enum Step:
    AGAIN
    IN_THREAD
    NOTHING

# Bytes that are copied in less time than it takes to let go of the interpreter's lock and to get it back.
cdef enum:
    QUICK = 4096

cdef int fairness
cdef int be_fair(int fd, str call) except -1
cdef int has_waited() noexcept
cdef bint is_undecided(int err) noexcept
cdef int take_buffer(object buffer, Py_buffer *view, bint writable, iovec *iov) except -1
cdef Move move_of(int fd, bint writes, off_t offset, int flags) noexcept
cdef ssize_t attempt(Move *move, int *err) except -2
cdef ssize_t attempt_at_once(Move *move, int *err) except -2
cdef object read_bytes(Move *move, Py_ssize_t n, str call)
cdef int give_one(Move *move, iovec *iov) noexcept
cdef Py_ssize_t read_into(Move *move, str call) except -1
cdef Py_ssize_t write_from(Move *move, str call, Py_ssize_t *told=*) except -1
cdef Py_ssize_t write_once(Move *move, str call, bint is_undoable, Py_ssize_t *late, bint is_later=*) except -2
