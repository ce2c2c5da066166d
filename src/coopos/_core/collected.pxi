# Bytes of unknown number, collected in one object that grows: to join pieces would copy each byte, and hold it twice.
#
# 1. Where there is no memory nothing is lost.
# 2. No Python code runs within a method: a signal handler finds each piece added once, or not at all.
# 3. What take() has returned never changes.

cdef enum:
    CHUNK = 65536


cdef extern from *:
    """
    /* As _PyBytes_Resize(), which frees the bytes if there is no memory for more of them. *data* has one reference. The interpreter
     * shares objects of a byte or none, so neither it nor what it becomes is so short. 0, or -1: *data* is as it was.
     */
    static inline int coopos_resize_bytes(PyObject **data, Py_ssize_t size)
    {
    #ifdef Py_TRACE_REFS       /* objects know where others are, so none can move */
        PyObject *moved = PyBytes_FromStringAndSize(NULL, size);
        if (moved == NULL) {
            PyErr_Clear();
            return -1;
        }
        memcpy(PyBytes_AS_STRING(moved), PyBytes_AS_STRING(*data), (size_t)Py_MIN(size, PyBytes_GET_SIZE(*data)));
        Py_DECREF(*data);
    #else
        PyObject *moved = PyObject_Realloc(*data, offsetof(PyBytesObject, ob_sval) + (size_t)size + 1);
        if (moved == NULL)
            return -1;
        Py_SET_SIZE(moved, size);
        PyBytes_AS_STRING(moved)[size] = 0;
    #endif
        *data = moved;
        return 0;
    }
    """
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t size) except NULL
    int coopos_resize_bytes(PyObject **data, Py_ssize_t size)


@cython.final
cdef class Collected:
    """Bytes that were read one piece after the other."""
    cdef PyObject *data        # a bytes object of at least *size*; NULL: nothing was collected
    cdef Py_ssize_t size       # how much was collected
    cdef bint is_given         # whether others may have the object: it can't change any more
    cdef list late             # pieces that there was no memory for

    def __cinit__(self):
        self.late = []

    def __dealloc__(self):
        Py_XDECREF(self.data)

    cdef char *room(self, Py_ssize_t wanted) except NULL:
        """Where *wanted* bytes more can be put."""
        cdef Py_ssize_t length = self.size + wanted
        cdef PyObject *data
        if self.data == NULL or self.is_given:
            data = new_bytes(NULL, max(length, CHUNK))
            if self.size:
                memcpy(PyBytes_AS_STRING(<object>data), PyBytes_AS_STRING(<object>self.data), self.size)
            Py_XDECREF(self.data)
            self.data = data
            self.is_given = False
        elif length > PyBytes_GET_SIZE(<object>self.data):
            if coopos_resize_bytes(&self.data, max(length, self.size + (self.size >> 2))) < 0:
                raise MemoryError
        return PyBytes_AS_STRING(<object>self.data) + self.size

    cdef bytes take(self):
        """All that was collected. It isn't copied, unless it is short."""
        if self.size <= 1:
            return PyBytes_AS_STRING(<object>self.data)[:self.size] if self.size else b""
        if self.size < PyBytes_GET_SIZE(<object>self.data) and coopos_resize_bytes(&self.data, self.size) < 0:
            raise MemoryError
        self.is_given = True
        return <bytes><object>self.data

    cdef int add_late(self) except -1:
        cdef bytes piece
        while self.late:
            piece = self.late[0]
            memcpy(self.room(PyBytes_GET_SIZE(piece)), PyBytes_AS_STRING(piece), PyBytes_GET_SIZE(piece))
            self.size += PyBytes_GET_SIZE(piece)
            del self.late[0]
        return 0

    def append(self, bytes piece not None):
        """Add *piece* at the end. MemoryError: it is added by the next call."""
        self.late.append(piece)
        self.add_late()

    def __bool__(self):
        """Whether anything was added, be it empty."""
        return self.data != NULL or bool(self.late)

    def __iter__(self):
        """An iterator over all that was collected, as one object."""
        self.add_late()
        return iter((self.take(),))
