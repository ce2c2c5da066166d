# What every other chapter uses: errors, arguments, tables by descriptor, functions that look like builtins.
#
# The chapter knows libc and the interpreter, and nothing of gevent.

# What a descriptor is waited for: c/system.h has the same numbers. And how long, when there is no limit.
cdef enum:
    READ = 1
    WRITE = 2
    NEVER = -1


globals().update(READ=READ, WRITE=WRITE)


# ---- errors ------------------------------------------------------------------------------------------------------------------

cdef object os_error(int err, str call, object subject):
    """The OSError for errno *err*, of the class that Python maps it to. The message names the call and what it was made on."""
    return OSError(err, f"{strerror(err).decode()}: {call}({subject})")


cdef object path_error(int err, object path):
    """The OSError of a call on a path, as the os module raises it: *path* is its ``filename``."""
    return OSError(err, strerror(err).decode(), path)


cdef object error_with_message(int err, str what):
    """The OSError for errno *err* with a message of its own."""
    return OSError(err, f"{strerror(err).decode()}: {what}")


cdef bint is_interrupted(int err) except -1:
    """Whether a system call that failed with *err* has to be made again: a signal came. Its handlers run first, and may raise."""
    if err != EINTR:
        return False
    PyErr_CheckSignals()
    return True


# ---- arguments ---------------------------------------------------------------------------------------------------------------

cdef inline int as_int(Py_ssize_t number) except? -1:
    """A C int for what os functions take as one. Their arguments are declared Py_ssize_t, which Cython, as `os` does, takes from
    integers alone; into a C int it would also put a float.
    """
    if number != <int>number:
        raise OverflowError("signed integer is greater than maximum" if number > 0 else "signed integer is less than minimum")
    return <int>number


# ---- tables by descriptor ----------------------------------------------------------------------------------------------------

# A forked child goes through such a table. In Python containers each visit would count a reference, and thereby copy the page that
# the object is on.
cdef struct Table:
    PyObject **at                  # NULL: nothing
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
    """What is there for *fd*, borrowed, or NULL."""
    return table.at[fd] if 0 <= fd < table.size else NULL


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


def as_builtin(function, str signature not None, str module not None):
    """A builtin function of *module* that calls *function*, has its name and documentation, and *signature*.

    It takes the place of a builtin of os. As an attribute of a class, where ``_close = os.close`` is no method, a function of
    Python would be one.
    """
    # Its self is a module, as that of any builtin function: so it is pickled by its name.
    cdef object holder = type(os)(function.__name__)
    cdef PyMethodDef *method = <PyMethodDef *>malloc(sizeof(PyMethodDef))
    if method == NULL:
        raise MemoryError
    holder.function = function
    holder.name = function.__name__.encode()
    holder.doc = f"{function.__name__}{signature}\n--\n\n{function.__doc__}".encode()
    method.ml_name, method.ml_doc = holder.name, holder.doc
    method.ml_meth, method.ml_flags = <PyCFunction><void *>call_function, METH_VARARGS | METH_KEYWORDS
    return PyCFunction_NewEx(method, holder, module)    # which lives as long as the process, and *method* with it
