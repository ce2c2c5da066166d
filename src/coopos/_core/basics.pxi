cdef object os_error(int err, str call, object subject):
    """The OSError for errno *err*, of the class Python maps it to, saying which call failed on what."""
    return OSError(err, f"{strerror(err).decode()}: {call}({subject})")


cdef inline int as_int(Py_ssize_t number) except? -1:
    """A C int for what os functions take as one. Their arguments are declared Py_ssize_t, which Cython, as `os` does, takes from
    integers alone; into a C int it would also put a float.
    """
    if number != <int>number:
        raise OverflowError("signed integer is greater than maximum" if number > 0 else "signed integer is less than minimum")
    return <int>number


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
