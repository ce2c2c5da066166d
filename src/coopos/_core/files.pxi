# The functions of os that read and write: nb_read, nb_write, read, write, readv ... And read_exactly and write_all, which go on
# until all bytes are moved.
#
# Each makes a Move, which says what to move and where, and hands it to the chapter `moving`, which waits if it has to. A caller's
# buffers stay locked until the call is over, so that no other code resizes them.

# ---- what they have in common -------------------------------------------------------------------------------------------------

# *as_os*: see the chapter patched.

cdef Py_ssize_t write_buffer(str call, Py_ssize_t fd, data, Py_ssize_t offset, bint has_offset=False, bint as_os=False) except -1:
    cdef Move move = move_of(as_int(fd), True, <off_t>offset, 0, as_os)
    cdef Py_buffer view
    cdef iovec iov
    take_buffer(data, &view, False, &iov)
    set_one_buffer(&move, &iov)
    try:
        if has_offset and offset < 0:
            raise os_error(EINVAL, call, fd)
        return write_from(&move, call)
    finally:
        PyBuffer_Release(&view)


cdef Py_ssize_t read_buffer(Py_ssize_t fd, buffer, bint as_os=False) except -1:
    cdef Move move = move_of(as_int(fd), False, -1, 0, as_os)
    cdef Py_buffer view
    cdef iovec iov
    try:
        take_buffer(buffer, &view, True, &iov)
    except BufferError:
        raise TypeError(f"readinto() argument 2 must be read-write bytes-like object, not {type(buffer).__name__}") from None
    set_one_buffer(&move, &iov)
    try:
        return read_into(&move, "readinto")
    finally:
        PyBuffer_Release(&view)


cdef Py_ssize_t move_buffers(
        str call, Py_ssize_t fd, buffers, bint writes, Py_ssize_t offset, Py_ssize_t flags, bint as_os=False) except -1:
    cdef Move move = move_of(as_int(fd), writes, <off_t>offset, as_int(flags), as_os)
    cdef Buffers locked = Buffers(call, buffers, not writes)
    if offset < -1:
        raise os_error(EINVAL, call, fd)
    locked.set_buffers(&move)
    return write_from(&move, call) if writes else read_into(&move, call)


# ---- descriptors in non-blocking mode ----------------------------------------------------------------------------------------

def nb_read(Py_ssize_t fd, Py_ssize_t n):
    """Read up to *n* bytes from a non-blocking descriptor, letting other greenlets run while there are none.

    Like :func:`os.read`, but waits on the hub where that raises BlockingIOError. A descriptor that was left in blocking mode is
    read as :func:`read` does it.

    Args:
        fd: int, a descriptor in non-blocking mode (see :func:`make_nonblocking`).
        n: int, bytes, 0 or more.

    Returns:
        bytes: 0 to *n* bytes long; ``b""`` at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading, or :func:`close` closes it during the wait; EINVAL if *n* is negative;
            otherwise as read(2).

    Keeps :ref:`what every function promises <promises>`.

    Source: read(2); ``gevent.os.nb_read``.

    .. versionadded:: 0.1.0
    """
    cdef Move move = move_of(as_int(fd), False, -1, 0)
    return read_bytes(&move, n, "nb_read")


def nb_write(Py_ssize_t fd, buf):
    """Write a buffer, or as much of it as fits, to a non-blocking descriptor, letting other greenlets run while nothing fits.

    Like :func:`os.write`, but waits on the hub where that raises BlockingIOError. A descriptor that was left in blocking mode is
    written as :func:`write` does it.

    Args:
        fd: int, a descriptor in non-blocking mode (see :func:`make_nonblocking`).
        buf: bytes-like, contiguous. It stays locked during the wait.

    Returns:
        int: how many bytes were written, 0 to ``len(buf)``.

    Raises:
        OSError: EBADF if *fd* is not open for writing, or :func:`close` closes it during the wait; EPIPE if nobody can read;
            otherwise as write(2).
        TypeError, BufferError: *buf* is not bytes-like, or not contiguous.

    Keeps :ref:`what every function promises <promises>`.

    Source: write(2); ``gevent.os.nb_write``.

    .. versionadded:: 0.1.0
    """
    return write_buffer("nb_write", fd, buf, -1)


def make_nonblocking(fd):
    """Put a descriptor into non-blocking mode.

    The flag belongs to the open file description. Everybody who shares it sees the change, other processes included.

    Args:
        fd: int, or an object with a ``fileno()`` method.

    Returns:
        True if the flag was changed, None if it was set already.

    Raises:
        OSError: EBADF if *fd* is not open.

    Doesn't switch greenlets.

    Source: fcntl(2), F_SETFL; ``gevent.os.make_nonblocking``.

    .. versionadded:: 0.1.0
    """
    cdef int number = PyObject_AsFileDescriptor(fd)
    cdef int flags = fcntl(number, F_GETFL)
    if flags >= 0:
        if flags & O_NONBLOCK:
            return None
        if fcntl(number, F_SETFL, flags | O_NONBLOCK) >= 0:
            return True
    raise os_error(errno, "make_nonblocking", number)


def in_blocking_mode(int fd, list reopened not None):
    """A descriptor for a child of the file *fd*, in the mode that programs expect of their standard streams.

    gevent's files and sockets aren't in it. A pipe is opened once more, without waiting for its other end: the mode is the open
    file's, and the parent may go on with it. That descriptor is added to *reopened*. Other files are put into blocking mode, as
    gevent's Popen does, and a pipe to be written to that nobody reads. What is no descriptor the child says.

    Not in Python: a signal's handler would run in between, and what it raises look like an error of these calls.
    """
    cdef int flags = -1 if fd == -1 else fcntl(fd, F_GETFL)        # -1: the child has the parent's
    cdef int again = -1
    cdef stat_t st
    cdef bytes path
    if flags < 0 or not flags & O_NONBLOCK:
        return fd
    if fstat(fd, &st) == 0 and S_ISFIFO(st.st_mode):
        path = b"/proc/self/fd/%d" % fd
        again = c_open(path, (flags & (O_ACCMODE | O_APPEND)) | O_CLOEXEC | O_NONBLOCK)
    if again >= 0:                 # else no /proc, another user's pipe, or no reader
        reopened.append(again)
        fd, flags = again, fcntl(again, F_GETFL)
    fcntl(fd, F_SETFL, flags & ~O_NONBLOCK)
    return fd


# ---- the os functions --------------------------------------------------------------------------------------------------------

def read(Py_ssize_t fd, Py_ssize_t length, /):
    """Read up to *length* bytes from any descriptor, letting other greenlets run while there are none.

    Like :func:`os.read`, and cooperative on every kind of descriptor. Its flags don't matter and are not touched. Bytes that are
    there already, in a pipe or in the page cache, are read at once. For pipes, sockets and terminals it waits on the hub; a worker
    thread reads files from a disk.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        length: int, bytes, 0 or more.

    Returns:
        bytes: 0 to *length* bytes long; ``b""`` at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading, or :func:`close` closes it during the wait; EINVAL if *length* is negative;
            otherwise as read(2).

    Keeps :ref:`what every function promises <promises>`.

    Source: preadv2(2), RWF_NOWAIT; read(2).

    .. versionadded:: 0.1.0
    """
    cdef Move move = move_of(as_int(fd), False, -1, 0)
    return read_bytes(&move, length, "read")


def readinto(Py_ssize_t fd, buffer, /):
    """Read into a buffer from any descriptor, letting other greenlets run while there is nothing.

    Like ``os.readinto`` of Python 3.14, and cooperative as :func:`read` is.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        buffer: a writable bytes-like object, contiguous. It stays locked until the call is over.

    Returns:
        int: how many bytes were read, 0 to ``len(buffer)``; 0 at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading, or :func:`close` closes it during the wait; otherwise as read(2).
        TypeError: *buffer* is not a writable bytes-like object, or not contiguous.

    Keeps :ref:`what every function promises <promises>`.

    Source: preadv2(2), RWF_NOWAIT; read(2).

    .. versionadded:: 0.1.0
    """
    return read_buffer(fd, buffer)


def write(Py_ssize_t fd, data, /):
    """Write a buffer to any descriptor, letting other greenlets run while it would block.

    Like :func:`os.write`, and cooperative on every kind of descriptor. Its flags don't matter and are not touched. As write(2)
    does, it writes all of *data* to a descriptor in blocking mode. What fits into a pipe or socket is written at once; for more
    room it waits on the hub. A worker thread writes to files on a disk.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        data: bytes-like, contiguous. It stays locked until the call is over.

    Returns:
        int: how many bytes were written, 0 to ``len(data)``.

    Raises:
        OSError: EBADF if *fd* is not open for writing, or :func:`close` closes it during the wait; EPIPE if nobody can read;
            otherwise as write(2).
        TypeError, BufferError: *data* is not bytes-like, or not contiguous.

    Keeps :ref:`what every function promises <promises>`.

    Source: pwritev2(2), RWF_NOWAIT; write(2).

    .. versionadded:: 0.1.0
    """
    return write_buffer("write", fd, data, -1)


def readv(Py_ssize_t fd, buffers, /):
    """Read into several buffers, one after the other, letting other greenlets run while there is nothing.

    Like :func:`os.readv`, and cooperative as :func:`read` is.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        buffers: a sequence of writable bytes-like objects. They stay locked until the call is over.

    Returns:
        int: how many bytes were read in all; 0 at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading, or :func:`close` closes it during the wait; otherwise as readv(2).
        TypeError, BufferError: *buffers* is no sequence, or one of them not a writable bytes-like object.

    Keeps :ref:`what every function promises <promises>`.

    Source: preadv2(2), RWF_NOWAIT; readv(2).

    .. versionadded:: 0.1.0
    """
    return move_buffers("readv", fd, buffers, False, -1, 0)


def writev(Py_ssize_t fd, buffers, /):
    """Write several buffers, one after the other, letting other greenlets run while it would block.

    Like :func:`os.writev`, and cooperative as :func:`write` is.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        buffers: a sequence of bytes-like objects. They stay locked until the call is over.

    Returns:
        int: how many bytes were written in all.

    Raises:
        OSError: EBADF if *fd* is not open for writing, or :func:`close` closes it during the wait; EPIPE if nobody can read;
            otherwise as writev(2).
        TypeError, BufferError: *buffers* is no sequence, or one of them not bytes-like, or not contiguous.

    Keeps :ref:`what every function promises <promises>`.

    Source: pwritev2(2), RWF_NOWAIT; writev(2).

    .. versionadded:: 0.1.0
    """
    return move_buffers("writev", fd, buffers, True, -1, 0)


def pread(Py_ssize_t fd, Py_ssize_t length, Py_ssize_t offset, /):
    """Read up to *length* bytes from a place in a file, letting other greenlets run while it would block.

    Like :func:`os.pread`. What is in the page cache is read at once, the rest by a worker thread.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        length: int, bytes, 0 or more.
        offset: int, bytes from the start of the file, 0 or more. The descriptor's own offset stays where it is.

    Returns:
        bytes: 0 to *length* bytes long; ``b""`` at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading; EINVAL if *length* or *offset* is negative; ESPIPE if *fd* has no offset.

    Keeps :ref:`what every function promises <promises>`.

    Source: preadv2(2), RWF_NOWAIT; pread(2).

    .. versionadded:: 0.1.0
    """
    return pread_for("pread", fd, length, offset)


cdef object pread_for(str call, Py_ssize_t fd, Py_ssize_t length, Py_ssize_t offset, bint as_os=False):
    cdef Move move = move_of(as_int(fd), False, <off_t>offset, 0, as_os)
    if offset < 0:
        raise os_error(EINVAL, call, fd)
    return read_bytes(&move, length, call)


def pread_of_sendfile(Py_ssize_t fd, Py_ssize_t length, Py_ssize_t offset):
    """pread, whose errors name sendfile."""
    return pread_for("sendfile", fd, length, offset)


def pwrite(Py_ssize_t fd, buffer, Py_ssize_t offset, /):
    """Write a buffer to a place in a file, letting other greenlets run while it would block.

    Like :func:`os.pwrite`. If the kernel can't tell whether the write would block, a worker thread makes it.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        buffer: bytes-like, contiguous. It stays locked until the call is over.
        offset: int, bytes from the start of the file, 0 or more. The descriptor's own offset stays where it is.

    Returns:
        int: how many bytes were written, 0 to ``len(buffer)``.

    Raises:
        OSError: EBADF if *fd* is not open for writing; EINVAL if *offset* is negative; ESPIPE if *fd* has no offset; otherwise as
            pwrite(2).
        TypeError, BufferError: *buffer* is not bytes-like, or not contiguous.

    Keeps :ref:`what every function promises <promises>`.

    Source: pwritev2(2), RWF_NOWAIT; pwrite(2).

    .. versionadded:: 0.1.0
    """
    return write_buffer("pwrite", fd, buffer, offset, True)


def preadv(Py_ssize_t fd, buffers, Py_ssize_t offset, Py_ssize_t flags=0, /):
    """Read from a place in a file into several buffers, letting other greenlets run while it would block.

    Like :func:`os.preadv`, and cooperative as :func:`pread` is.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        buffers: a sequence of writable bytes-like objects. They stay locked until the call is over.
        offset: int, bytes from the start of the file; -1, on Linux: the descriptor's own offset.
        flags: int, ``os.RWF_*``. With ``RWF_NOWAIT`` it doesn't wait and raises BlockingIOError.

    Returns:
        int: how many bytes were read in all; 0 at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading; EINVAL if *offset* is negative; EOPNOTSUPP for flags that the system or the
            file doesn't know; ESPIPE if *fd* has no offset.
        TypeError, BufferError: *buffers* is no sequence, or one of them not a writable bytes-like object.

    Keeps :ref:`what every function promises <promises>`.

    Source: preadv2(2), RWF_NOWAIT.

    .. versionadded:: 0.1.0
    """
    return move_buffers("preadv", fd, buffers, False, offset, flags)


def pwritev(Py_ssize_t fd, buffers, Py_ssize_t offset, Py_ssize_t flags=0, /):
    """Write several buffers to a place in a file, letting other greenlets run while it would block.

    Like :func:`os.pwritev`, and cooperative as :func:`pwrite` is.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        buffers: a sequence of bytes-like objects. They stay locked until the call is over.
        offset: int, bytes from the start of the file; -1, on Linux: the descriptor's own offset.
        flags: int, ``os.RWF_*``. With ``RWF_NOWAIT`` it doesn't wait and raises BlockingIOError.

    Returns:
        int: how many bytes were written in all.

    Raises:
        OSError: EBADF if *fd* is not open for writing; EINVAL if *offset* is negative; EOPNOTSUPP for flags that the system or the
            file doesn't know; ESPIPE if *fd* has no offset; otherwise as pwritev(2).
        TypeError, BufferError: *buffers* is no sequence, or one of them not bytes-like, or not contiguous.

    Keeps :ref:`what every function promises <promises>`.

    Source: pwritev2(2), RWF_NOWAIT.

    .. versionadded:: 0.1.0
    """
    return move_buffers("pwritev", fd, buffers, True, offset, flags)


# ---- all bytes ---------------------------------------------------------------------------------------------------------------

def read_exactly(Py_ssize_t fd, Py_ssize_t n, /):
    """Read *n* bytes from any descriptor, letting other greenlets run until they are there.

    Calls :func:`read` until it has them all.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        n: int, bytes, 0 or more.

    Returns:
        bytes: *n* bytes long.

    Raises:
        EOFError: the file ended before that. What was read is in the exception's attribute ``partial``.
        OSError: EBADF if *fd* is not open for reading, or :func:`close` closes it during the wait; EINVAL if *n* is negative;
            otherwise as read(2).

    Keeps :ref:`what every function promises <promises>`. If anything is raised, the exception has what was read until then
    as its attribute ``partial``.

    Source: preadv2(2), RWF_NOWAIT; read(2).

    .. versionadded:: 0.1.0
    """
    return read_telling(fd, n, None)


def read_telling(Py_ssize_t fd, Py_ssize_t n, list partial, /):
    """read_exactly(). If it raises, it also appends what was read to *partial*: not every exception can have attributes."""
    cdef int number = as_int(fd)
    cdef Move move
    cdef Py_ssize_t nread
    cdef Py_ssize_t done = 0
    cdef iovec iov
    if n < 0:
        raise os_error(EINVAL, "read_exactly", fd)
    data = PyBytes_FromStringAndSize(NULL, n)
    try:
        while True:
            move = move_of(number, False, -1, 0)
            iov.iov_base = PyBytes_AS_STRING(data) + done
            iov.iov_len = <size_t>min(n - done, <Py_ssize_t>COOPOS_IO_MAX)
            set_one_buffer(&move, &iov)
            nread = read_into(&move, "read_exactly")
            done += nread
            if done == n:
                return data
            if not nread:
                end = EOFError(f"end of file after {done} of {n} bytes: read_exactly({number})")
                end.is_at_end = True       # unlike an EOFError that other code throws into the greenlet
                raise end
    except BaseException as ex:
        attach_progress(ex, "partial", data[:done])
        if partial is not None:
            partial.append(data[:done])
        raise


def write_all(Py_ssize_t fd, data, /):
    """Write all of a buffer to any descriptor, letting other greenlets run until it is written.

    Calls :func:`write` until all is written, on a descriptor in non-blocking mode too.

    Args:
        fd: int, an open descriptor, in blocking mode or not.
        data: bytes-like, contiguous. It stays locked until the call is over.

    Returns:
        None

    Raises:
        OSError: EBADF if *fd* is not open for writing, or :func:`close` closes it during the wait; EPIPE if nobody can read;
            otherwise as write(2).
        TypeError, BufferError: *data* is not bytes-like, or not contiguous.

    Keeps :ref:`what every function promises <promises>`. If anything is raised after a part was written, an error too, the
    exception has an attribute ``characters_written``.

    Source: pwritev2(2), RWF_NOWAIT; write(2).

    .. versionadded:: 0.1.0
    """
    write_telling(fd, data, None)


def write_telling(Py_ssize_t fd, data, list written, bint is_all=True, str call="write_all"):
    """write_all(), or write() if *is_all* is false; its errors name *call*. If it raises, it also appends how many bytes were
    written to *written*: not every exception can have attributes.
    """
    cdef int number = as_int(fd)
    cdef Move move
    cdef Py_buffer view
    cdef iovec iov
    cdef Py_ssize_t done = 0
    cdef Py_ssize_t late = 0
    take_buffer(data, &view, False, &iov)
    try:
        while True:
            move = move_of(number, True, -1, 0)
            iov.iov_base = <char *>view.buf + done
            iov.iov_len = <size_t>min(view.len - done, <Py_ssize_t>COOPOS_IO_MAX)
            set_one_buffer(&move, &iov)
            done += write_from(&move, call, &late)
            if done >= view.len or not is_all:
                return done
    except BaseException as ex:
        attach_progress(ex, "characters_written", (done + late) or None)
        if written is not None:
            written.append(done + late)
        raise
    finally:
        PyBuffer_Release(&view)
