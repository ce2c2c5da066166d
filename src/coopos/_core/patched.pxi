# What patch(io=True) puts in the places of functions of os, of io.open and of input().

# ---- os -----------------------------------------------------------------------------------------------------------------------

# These stand in os, in programs that know nothing of coopos. So in non-blocking mode they raise BlockingIOError, as such a program
# expects. In the hub they are plain: a signal handler may write to a pipe. The program sees them under the names of os (like_os).

def os_read(Py_ssize_t fd, Py_ssize_t length, /):
    cdef Move move = move_of(as_int(fd), False, -1, 0, True)
    return read_bytes(&move, length, "read")


def os_readinto(Py_ssize_t fd, buffer, /):
    return read_buffer(fd, buffer, True)


def os_write(Py_ssize_t fd, data, /):
    return write_buffer("write", fd, data, -1, False, True)


def os_readv(Py_ssize_t fd, buffers, /):
    return move_buffers("readv", fd, buffers, False, -1, 0, True)


def os_writev(Py_ssize_t fd, buffers, /):
    return move_buffers("writev", fd, buffers, True, -1, 0, True)


def os_pread(Py_ssize_t fd, Py_ssize_t length, Py_ssize_t offset, /):
    return pread_for("pread", fd, length, offset, True)


def os_pwrite(Py_ssize_t fd, buffer, Py_ssize_t offset, /):
    return write_buffer("pwrite", fd, buffer, offset, True, True)


def os_preadv(Py_ssize_t fd, buffers, Py_ssize_t offset, Py_ssize_t flags=0, /):
    return move_buffers("preadv", fd, buffers, False, offset, flags, True)


def os_pwritev(Py_ssize_t fd, buffers, Py_ssize_t offset, Py_ssize_t flags=0, /):
    return move_buffers("pwritev", fd, buffers, True, offset, flags, True)


# ---- open() -------------------------------------------------------------------------------------------------------------------

# Only a FIFO, a terminal, a socket or another device can make a caller wait. All other files are left to io.open: the answer costs
# them one stat(2), and no frame of Python.

ctypedef int (*InputHook)() noexcept nogil


cdef extern from "Python.h":
    enum: METH_FASTCALL
    int PyUnicode_FSConverter(object path, PyObject **result) except 0
    PyObject *PyObject_Vectorcall(PyObject *function, PyObject **args, size_t nargsf, PyObject *names) except NULL
    PyObject *PyTuple_GET_ITEM(PyObject *names, Py_ssize_t i)
    Py_ssize_t PyTuple_GET_SIZE(PyObject *names)
    InputHook PyOS_InputHook


# What is_waiting_file() leaves alone though it is a device: {st_rdev of /dev/null, /dev/zero ...}, which never wait.
cdef set _never_wait = set()
for _path in ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"):
    if os.path.exists(_path):
        _never_wait.add(posix.stat(_path).st_rdev)


def never_waits(rdev):
    """Whether a character device, given by its st_rdev, is one that never makes anybody wait."""
    return rdev in _never_wait


cpdef bint is_waiting_file(file) except -1:
    """Whether *file*, a path or a descriptor, is a file that may make a caller wait. False for what io.open refuses."""
    cdef stat_t st
    cdef PyObject *path = NULL
    cdef int rc
    try:
        if isinstance(file, int):
            rc = fstat(as_int(file), &st)
        else:
            PyUnicode_FSConverter(file, &path)
            rc = c_stat(PyBytes_AS_STRING(<object>path), &st)
    except Exception:
        return False
    finally:
        Py_XDECREF(path)
    if rc < 0 or S_ISREG(st.st_mode) or S_ISDIR(st.st_mode) or S_ISBLK(st.st_mode):
        return False
    return not S_ISCHR(st.st_mode) or <object>st.st_rdev not in _never_wait


cdef PyObject *_plain_open = NULL
cdef PyObject *_own_open = NULL


cdef PyObject *call_open(PyObject *self, PyObject **args, Py_ssize_t nargs, PyObject *names) except NULL:
    """open(): *args* are the positional arguments, with those behind them that *names* names."""
    cdef PyObject *file = args[0] if nargs else NULL
    cdef PyObject *opener = args[7] if nargs > 7 else <PyObject *>None
    cdef Py_ssize_t i
    if names != NULL:
        for i in range(PyTuple_GET_SIZE(names)):
            name = <object>PyTuple_GET_ITEM(names, i)
            if name == "file":
                file = args[nargs + i]
            elif name == "opener":
                opener = args[nargs + i]
    cdef bint has_opener = opener != <PyObject *>None and file != NULL and not isinstance(<object>file, int)
    if file != NULL and (has_opener or is_waiting_file(<object>file)):
        return PyObject_Vectorcall(_own_open, args, <size_t>nargs, names)
    return PyObject_Vectorcall(_plain_open, args, <size_t>nargs, names)


def make_open(plain, own):
    """What stands in for io.open. It calls *own* for files that may wait, and where there is an opener; else *plain*."""
    global _own_open, _plain_open
    cdef PyMethodDef *method = new_method(plain)
    Py_INCREF(plain)
    Py_INCREF(own)
    _plain_open, _own_open = <PyObject *>plain, <PyObject *>own
    method.ml_meth, method.ml_flags = <PyCFunction><void *>call_open, METH_FASTCALL | METH_KEYWORDS
    return PyCFunction_NewEx(method, plain.__self__, "io")


# ---- input() -----------------------------------------------------------------------------------------------------------------

# CPython calls PyOS_InputHook, without the GIL, when it is going to wait for a line from a terminal: before fgets(3), and in
# readline's loop every 0.1 s. https://github.com/python/cpython/blob/main/Modules/readline.c (readline_until_enter_or_signal)

# What the call of read_line() has to wait with, and None while there is none.
cdef object _wait_for_input = None


cdef int run_input_hook() noexcept with gil:
    if _wait_for_input is not None:
        _wait_for_input()
    return 0


def read_line(function, prompt, wait):
    """``function(prompt)``, the builtin input(). Where it would wait for the terminal it calls *wait*, which must not raise."""
    global _wait_for_input, PyOS_InputHook
    cdef InputHook before = PyOS_InputHook
    _wait_for_input, PyOS_InputHook = wait, run_input_hook
    try:
        return function(prompt)
    finally:
        _wait_for_input, PyOS_InputHook = None, before
