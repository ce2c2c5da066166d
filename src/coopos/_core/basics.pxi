# Every other chapter uses these: errors, arguments, tables by descriptor, functions that look like builtins.
#
# The chapter knows libc and the interpreter, and nothing of gevent.

cdef enum:
    READ = 1           # the event that a wait is for: c/system.h has the same numbers
    WRITE = 2
    NEVER = -1         # a time limit that is none


globals().update(READ=READ, WRITE=WRITE)


# ---- errors ------------------------------------------------------------------------------------------------------------------

cdef object os_error(int err, str call, object subject):
    """The OSError for errno *err*, of the class that Python maps it to. Its message names the call and its *subject*."""
    return OSError(err, f"{strerror(err).decode()}: {call}({subject})")


cdef object path_error(int err, object path):
    """The OSError of a call on a path, as the os module raises it: *path* is its ``filename``."""
    return OSError(err, strerror(err).decode(), path)


cdef object error_with_message(int err, str what):
    """The OSError for errno *err* with the message *what*."""
    return OSError(err, f"{strerror(err).decode()}: {what}")


cdef bint is_interrupted(int err) except -1:
    """True for EINTR: run the signal handlers, which may raise; then the caller makes the system call again."""
    if err != EINTR:
        return False
    PyErr_CheckSignals()
    return True


# ---- arguments ---------------------------------------------------------------------------------------------------------------

cdef inline int as_int(Py_ssize_t number) except? -1:
    """An argument as a C int, with the OverflowError that `os` raises.

    The callers declare their arguments as Py_ssize_t: Cython converts only integers to that, as `os` does, but also a float to int.
    """
    if number != <int>number:
        raise OverflowError("signed integer is greater than maximum" if number > 0 else "signed integer is less than minimum")
    return <int>number


# ---- tables by descriptor ----------------------------------------------------------------------------------------------------

# Objects by descriptor, borrowed. A forked child walks through such tables. A Python container would change reference counts at
# each visit, and so make the kernel copy the pages of the objects.
cdef struct Table:
    PyObject **at
    int size


cdef int reserve(Table *table, int fd) except -1:
    """Make room for *fd*."""
    cdef PyObject **at
    cdef int size
    if fd >= table.size:
        size = max(2 * fd, 64)
        at = <PyObject **>realloc(table.at, <size_t>size * sizeof(PyObject *))
        if at == NULL:
            raise MemoryError
        memset(at + table.size, 0, <size_t>(size - table.size) * sizeof(PyObject *))
        table.at, table.size = at, size
    return 0


cdef inline PyObject *at_fd(Table *table, int fd) noexcept:
    """The object for *fd*, borrowed, or NULL."""
    return table.at[fd] if 0 <= fd < table.size else NULL


cdef bint is_always_ready(int fd) noexcept:
    """True for regular files and block devices: poll(2) always calls them ready, but reads and writes block all the same."""
    cdef stat_t st
    return fstat(fd, &st) == 0 and (S_ISREG(st.st_mode) or S_ISBLK(st.st_mode))


# ---- functions that stand for builtins ---------------------------------------------------------------------------------------

cdef extern from "Python.h":
    ctypedef object (*PyCFunction)(object, object)
    ctypedef struct PyMethodDef:
        const char *ml_name
        PyCFunction ml_meth
        int ml_flags
        const char *ml_doc
    int METH_VARARGS, METH_KEYWORDS
    object PyCFunction_NewEx(PyMethodDef *method, object self, object module)
    object PyObject_Call(object function, object args, PyObject *kwargs)


cdef object call_function(object holder, object args, PyObject *kwargs):
    return PyObject_Call(holder.function, args, kwargs)


cdef extern from "Python.h":
    ctypedef struct BuiltinFunction "PyCFunctionObject":
        PyMethodDef *m_ml


cdef PyMethodDef *new_method(builtin=None) except NULL:
    """A definition, to begin with that of the *builtin* function. It is never freed, nor is what is made of it."""
    cdef PyMethodDef *method = <PyMethodDef *>malloc(sizeof(PyMethodDef))
    if method == NULL:
        raise MemoryError
    if builtin is not None:
        method[0] = (<BuiltinFunction *><PyObject *>builtin).m_ml[0]
    return method


def like_os(function, plain):
    """The compiled *function* under the name of *plain*, which it replaces in os, and with its documentation and signature."""
    cdef PyMethodDef *method = new_method(function)
    Py_INCREF(plain)               # the name and the documentation are its own
    method.ml_name = (<BuiltinFunction *><PyObject *>plain).m_ml.ml_name
    method.ml_doc = (<BuiltinFunction *><PyObject *>plain).m_ml.ml_doc
    return PyCFunction_NewEx(method, os, "os")


def as_builtin(function, str signature not None, str module not None):
    """A builtin function of *module* that calls *function*, with its name, its documentation and *signature*.

    It replaces a builtin of os. Classes keep those as attributes (``_close = os.close``) and call them without self: a Python
    function there would become a method.
    """
    # Like any builtin function's, its self is a module. pickle then stores the function by its name.
    cdef object holder = type(os)(function.__name__)
    cdef PyMethodDef *method = new_method()
    holder.function = function
    holder.name = function.__name__.encode()
    holder.doc = f"{function.__name__}{signature}\n--\n\n{function.__doc__}".encode()
    method.ml_name, method.ml_doc = holder.name, holder.doc
    method.ml_meth, method.ml_flags = <PyCFunction><void *>call_function, METH_VARARGS | METH_KEYWORDS
    return PyCFunction_NewEx(method, holder, module)
