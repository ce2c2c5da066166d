# What the compiled modules share: how arguments and errors are made, how a greenlet gives way to its hub, other threads' loops.

cdef enum:
    READ = 1
    WRITE = 2

cdef int generation

cdef int as_int(Py_ssize_t number) except? -1
cdef int park_until_ready(int fd, int events, str call) except -1
cdef object os_error(int err, str call, object subject)
cdef object give_way(object hub, object current)
cdef object wrong_switch(object came_back, str what)
cdef bint is_alive(object loop) noexcept
cdef bint post(object loop, object callback, tuple args=*) except -1
