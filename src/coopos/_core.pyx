"""Descriptors that may have to wait: nb_read, nb_write, the reads and writes of tp_*, close.

The kernel keeps the books. Nothing here polls, or changes a descriptor's flags unasked. Three rules hold throughout:

1. A greenlet that waits is registered before its watcher is started, and leaves by a `finally`.
2. A watcher is touched only by its own loop's thread; other threads post a callback.
3. No watcher stays active between two waits: a number that was closed and used again is another file.

The module knows libc, `gevent.hub` and the loop's watchers, and nothing else of coopos or gevent.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_Import
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EAGAIN, EBADF, EINTR, EINVAL, ENOSYS, EOPNOTSUPP, EPERM, errno
from libc.stdlib cimport realloc
from libc.string cimport memset, strerror
from posix.fcntl cimport F_GETFL, F_SETFL, O_NONBLOCK, fcntl
from posix.unistd cimport close as c_close, read as c_read, write as c_write

from coopos._posix cimport (
    COOPOS_IO_MAX, POLLIN, POLLOUT, PyErr_CheckSignals, PyObject_AsFileDescriptor, S_ISBLK, S_ISREG, coopos_read_nowait,
    coopos_write_nowait, dev_t, fstat, ino_t, poll, pollfd, stat_t)

import os
import sys

from gevent.exceptions import BlockingSwitchOutError, InvalidSwitchError
from gevent.hub import _get_hub as get_hub_if_exists, _get_hub_noargs as get_hub


cdef object os_error(int err, str call, object subject):
    """The OSError for errno *err*, of the class Python maps it to, saying which call failed on what."""
    return OSError(err, f"{strerror(err).decode()}: {call}({subject})")


cdef int as_int(Py_ssize_t number) except? -1:
    """A C int for what os functions take as one. Their arguments are declared Py_ssize_t, which Cython, as `os` does, takes from
    integers alone; into a C int it would also put a float.
    """
    if number != <int>number:
        raise OverflowError("signed integer is greater than maximum" if number > 0 else "signed integer is less than minimum")
    return <int>number


# ---- giving way to the hub ---------------------------------------------------------------------------------------------------

# greenlet's C API (greenlet.h), a table that its capsule points to: as quick as it gets, and no header to build with.
ctypedef object (*GetCurrent)()
ctypedef object (*Switch)(object greenlet, PyObject *args, PyObject *kwargs)
cdef void **greenlet_api = <void **>PyCapsule_Import("greenlet._C_API", 0)
cdef GetCurrent current_greenlet = <GetCurrent>greenlet_api[4]
cdef Switch greenlet_switch = <Switch>greenlet_api[6]

# {type of greenlet: whether it has the switch_out() that gevent's hub calls before it is switched to}
cdef dict _has_switch_out = {}
# The last type that had none.
cdef object _plain_kind = None


cdef object give_way(object hub, object current):
    """Run the hub until it switches back; what it brings. gevent's ``hub.switch()``, less a look-up that nearly always fails."""
    if current is hub:
        raise BlockingSwitchOutError("Impossible to call blocking function in the event loop callback")
    global _plain_kind
    cdef object kind = type(current)
    if kind is not _plain_kind:
        if kind not in _has_switch_out:
            _has_switch_out[kind] = hasattr(kind, "switch_out")
        if _has_switch_out[kind]:
            return hub.switch()
        _plain_kind = kind
    return greenlet_switch(hub, NULL, NULL)


cdef object wrong_switch(object came_back, str what):
    return InvalidSwitchError(f"switched into {current_greenlet()!r} with {came_back!r}: it waits for {what}")


# ---- other threads' loops ----------------------------------------------------------------------------------------------------

# Counts the forks since the module was loaded, in this line of descent: what is of an older generation was made by the parent.
generation = 0


def count_generation():
    """Run by the interpreter in every forked child."""
    global generation
    cdef PutOffClose later
    generation += 1
    for later in list(_put_off.values()):
        later.forget_other_threads()


os.register_at_fork(after_in_child=count_generation)


cdef bint is_alive(object loop) noexcept:
    """Whether a loop was not destroyed with its thread."""
    try:
        return bool(loop.ptr)
    except Exception:
        return False


cdef bint post(object loop, object callback, tuple args=()) except -1:
    """Have *callback* run in the thread of *loop*; False if the loop is destroyed."""
    try:
        loop.run_callback_threadsafe(callback, *args)
    except Exception:
        return False           # also while its thread is still at destroying it
    return True


# ---- waiting for a descriptor ------------------------------------------------------------------------------------------------

@cython.final
@cython.internal
cdef class Wait:
    """One greenlet's wait for one descriptor, with the watcher that it re-aims and uses again."""
    cdef object watcher
    cdef object hub
    cdef object loop
    cdef object switch     # of the greenlet that waits
    cdef object queued     # the loop callback that will wake it, once close() has evicted it
    cdef PyObject *next    # another one parked on the same descriptor, borrowed
    cdef int fd
    cdef int error         # errno that the waiter is to raise; 0
    cdef int born          # generation


@cython.final
@cython.internal
cdef class Parking:
    """A hub's idle waits, kept by kind so that a re-used watcher needs only its descriptor changed."""
    cdef object hub
    cdef object loop
    cdef bint is_reusable  # libuv's io watchers share a handle per descriptor and can't be re-aimed
    cdef list idle_readers
    cdef list idle_writers

    def __cinit__(self, hub):
        self.hub = hub
        self.loop = hub.loop
        self.is_reusable = not hasattr(hub.loop, "_io_watchers")
        self.idle_readers = []
        self.idle_writers = []

    def __dealloc__(self):
        global _latest_parking
        if _latest_parking == <PyObject *>self:
            _latest_parking = NULL

    cdef Wait aim(self, int fd, int events):
        cdef list idle = self.idle_readers if events == READ else self.idle_writers
        cdef Wait wait
        if idle:
            wait = <Wait>idle.pop()
            # Always set, also where it is the same number: only then does libev ask the kernel again, and a number that was
            # closed and used again in the meantime is another file.
            wait.watcher.fd = fd
        else:
            wait = Wait()
            wait.hub = self.hub
            wait.loop = self.loop
            wait.watcher = self.make_watcher(fd, events)
        wait.fd = fd
        wait.error = 0
        wait.born = generation
        return wait

    cdef object make_watcher(self, int fd, int events):
        cdef int flags = -1
        if not self.is_reusable:
            flags = fcntl(fd, F_GETFL)
        watcher = self.loop.io(fd, events)
        # libuv has made the file non-blocking, for everybody who shares it.
        if flags >= 0 and not flags & O_NONBLOCK:
            fcntl(fd, F_SETFL, flags)
        return watcher

    cdef int put_back(self, Wait wait, int events) except -1:
        wait.watcher.stop()
        if self.is_reusable:
            (self.idle_readers if events == READ else self.idle_writers).append(wait)
        else:
            wait.watcher.close()
        return 0


# By descriptor, the last Wait parked on it, or NULL (borrowed: a parked greenlet's frame holds its Wait); close() reads it. The
# waits of every thread's hub are here, under the GIL.
cdef PyObject **_parked = NULL
cdef int _parked_size = 0


# The Parking that was used last, or NULL (borrowed: its hub owns it): nearly always the one that is wanted.
cdef PyObject *_latest_parking = NULL


cdef Parking parking_of(object hub):
    global _latest_parking
    cdef Parking parking
    if _latest_parking != NULL and (<Parking>_latest_parking).hub is hub:
        return <Parking>_latest_parking
    parking = getattr(hub, "_coopos_parking", None)
    if parking is None:
        parking = hub._coopos_parking = Parking(hub)
    _latest_parking = <PyObject *>parking
    return parking


cdef int enlist(Wait wait) except -1:
    global _parked, _parked_size
    cdef int fd = wait.fd
    cdef int size
    cdef PyObject **table
    if fd >= _parked_size:
        size = max(2 * fd, 64)
        table = <PyObject **>realloc(_parked, <size_t>size * sizeof(PyObject *))
        if table == NULL:
            raise MemoryError
        memset(table + _parked_size, 0, <size_t>(size - _parked_size) * sizeof(PyObject *))
        _parked, _parked_size = table, size
    wait.next = _parked[fd]
    _parked[fd] = <PyObject *>wait
    return 0


cdef int delist(Wait wait) noexcept:
    cdef PyObject **link = &_parked[wait.fd]
    while link[0] != NULL:
        if link[0] == <PyObject *>wait:
            link[0] = wait.next
            break
        link = &(<Wait>link[0]).next
    wait.next = NULL
    return 0


cdef int park(int fd, int events, str call) except -1:
    """Let the others run until *fd* is ready, or raise EBADF as soon as it is closed by this module's close().

    Killed or timed out, the greenlet leaves nothing behind, and has moved no byte.
    """
    cdef Parking parking = parking_of(get_hub())
    cdef Wait wait = parking.aim(fd, events)
    cdef object current = current_greenlet()
    wait.switch = current.switch
    enlist(wait)
    try:
        wait.watcher.start(wait.switch, wait)
        came_back = give_way(parking.hub, current)
        if came_back is not wait:
            raise wrong_switch(came_back, f"fd {fd} in {call}")
    finally:
        delist(wait)
        wait.switch = None
        if wait.queued is not None:
            wait.queued.stop()
            wait.queued = None
        parking.put_back(wait, events)
    if wait.error:
        raise os_error(wait.error, call, fd)
    return 0


cdef int evict(Wait wait) except -1:
    """Tell a parked greenlet, in its loop's thread, that its descriptor is closed."""
    if wait.switch is not None and not wait.error:
        wait.error = EBADF
        wait.watcher.stop()
        wait.queued = wait.loop.run_callback(wait.switch, wait)
    return 0


# ---- close -------------------------------------------------------------------------------------------------------------------

@cython.final
@cython.internal
cdef class PutOffClose:
    """A close(2) that has to wait until other parties' watchers on the number have been stopped."""
    cdef int fd
    cdef int parties       # how many have still to stop theirs
    cdef bint is_polled    # whether the loop of the thread that called close() is one of them
    cdef dev_t dev
    cdef ino_t ino

    cdef bint is_same_file(self) noexcept:
        cdef stat_t st
        return fstat(self.fd, &st) == 0 and st.st_dev == self.dev and st.st_ino == self.ino

    cdef int stopped(self) except -1:
        self.parties -= 1
        if self.parties == 0:
            if _put_off.get(self.fd) is self:
                del _put_off[self.fd]
            # Somebody may have closed and re-used the number behind our back: then it is not ours to close.
            if self.is_same_file():
                c_close(self.fd)
        return 0

    cdef int forget_other_threads(self) except -1:
        """In a forked child."""
        if self.parties > self.is_polled:
            self.parties = 1 + self.is_polled
            self.stopped()
        return 0

    def after_polling(self, check):
        check.stop()
        check.close()
        self.stopped()

    def evict_there(self, list waits):
        for wait in waits:
            evict(<Wait>wait)
        self.stopped()


cdef dict _put_off = {}


cdef PutOffClose put_off(int fd):
    cdef PutOffClose later = PutOffClose.__new__(PutOffClose)
    cdef stat_t st
    if fstat(fd, &st) < 0:
        raise os_error(errno, "close", fd)
    later.fd = fd
    later.dev = st.st_dev
    later.ino = st.st_ino
    _put_off[fd] = later
    return later


def close(Py_ssize_t fd):
    """Close a file descriptor.

    Like :func:`os.close`, and done when it returns: the number is free and the other end sees end-of-file. Greenlets that wait
    in a function of this module for *fd*, in any thread's hub, get ``OSError(EBADF)``. Only while a watcher of somebody else (a
    gevent socket or selector), or of another thread, is active on *fd* is the system call put off to the next turn of that
    loop, because closing a descriptor under an active watcher can abort the process.

    Args:
        fd: int, the descriptor.

    Raises:
        OSError: EBADF if *fd* is not open, or is closed already and only waits for the loop; EIO as close(2).
        TypeError, OverflowError: *fd* is not an int, or too large for one.

    Doesn't switch greenlets. Safe in any thread and after a fork.

    Source: close(2); ``gevent.os.close``, which always puts the system call off.

    .. versionadded:: 0.1.0
    """
    close_fd(as_int(fd))


cdef int close_fd(int fd) except -1:
    cdef PutOffClose later = None
    cdef dict elsewhere = None
    cdef int rc, err
    hub = get_hub_if_exists()
    loop = None if hub is None else hub.loop
    if _put_off and (<object>fd) in _put_off:
        later = <PutOffClose>_put_off[fd]
        if later.is_same_file():
            raise os_error(EBADF, "close", fd)
        del _put_off[fd]
        later = None
    if 0 <= fd < _parked_size and _parked[fd] != NULL:
        elsewhere = evict_all(fd, loop)
    if elsewhere:
        later = put_off(fd)
        later.parties = 1
        for other, waits in elsewhere.items():
            later.parties += post(other, later.evict_there, (waits,))
    if loop is not None and loop.closing_fd(fd):
        if later is None:
            later = put_off(fd)
            later.parties = 1
        later.is_polled = True
        check = loop.check()
        check.start(later.after_polling, check)
        return 0
    if later is not None:
        later.stopped()
        return 0
    with nogil:
        rc = c_close(fd)
        err = errno
    if rc < 0:
        raise os_error(err, "close", fd)
    return 0


cdef dict evict_all(int fd, object loop):
    """Evict every greenlet parked on *fd* in *loop*; return {other loop: [Wait, ...]} for the rest, or None."""
    cdef PyObject *link = _parked[fd]
    cdef Wait wait
    cdef dict elsewhere = None
    while link != NULL:
        wait = <Wait>link
        link = wait.next
        if wait.loop is loop:
            evict(wait)
        elif wait.born == generation and wait.hub.thread_ident in sys._current_frames():   # else its thread is no more
            if elsewhere is None:
                elsewhere = {}
            elsewhere.setdefault(wait.loop, []).append(wait)
    return elsewhere


# ---- reading and writing -----------------------------------------------------------------------------------------------------

ctypedef ssize_t (*Reader)(int, void *, size_t) noexcept nogil
ctypedef ssize_t (*Writer)(int, const void *, size_t) noexcept nogil


cdef ssize_t plain_read(int fd, void *buf, size_t n) noexcept nogil:
    return c_read(fd, buf, n)


cdef ssize_t plain_write(int fd, const void *buf, size_t n) noexcept nogil:
    return c_write(fd, buf, n)


cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject **bytes, Py_ssize_t n) except -1


# Up to here a copy is cheaper than an allocation for each attempt.
cdef enum:
    SMALL_READ = 512


cdef object read_once(Reader reader, int fd, Py_ssize_t n, int *err):
    """One read of up to *n* bytes: the bytes, or None with errno in *err*. A signal handler's exception comes out.

    The buffer lives only as long as the call: a greenlet that goes on to wait holds no memory for it.
    """
    cdef char[SMALL_READ] small
    cdef PyObject *data
    cdef char *buf = small
    cdef ssize_t nread
    result = None
    if n > SMALL_READ:
        result = PyBytes_FromStringAndSize(NULL, n)
        buf = PyBytes_AS_STRING(result)
    while True:
        with nogil:
            nread = reader(fd, buf, <size_t>n)
            err[0] = errno
        if nread >= 0:
            break
        if err[0] != EINTR:
            return None
        PyErr_CheckSignals()
    if result is None:
        return PyBytes_FromStringAndSize(buf, nread)
    if nread == n:
        return result
    data = <PyObject *>result
    Py_INCREF(result)
    result = None
    _PyBytes_Resize(&data, nread)
    result = <object>data
    Py_DECREF(result)
    return result


cdef ssize_t write_once(Writer writer, int fd, Py_buffer *view, Py_ssize_t start, int *err) except -2:
    """One write of a buffer's rest: the number of bytes, or -1 with errno in *err*."""
    cdef ssize_t written
    cdef Py_ssize_t n = min(view.len - start, <Py_ssize_t>COOPOS_IO_MAX)
    while True:
        with nogil:
            written = writer(fd, <char *>view.buf + start, <size_t>n)
            err[0] = errno
        if written >= 0 or err[0] != EINTR:
            return written
        PyErr_CheckSignals()


def nb_read(Py_ssize_t fd, Py_ssize_t n):
    """Read up to *n* bytes from a non-blocking descriptor, letting other greenlets run while there are none.

    Like :func:`os.read`, but waits on the hub where that raises BlockingIOError.

    Args:
        fd: int, a descriptor in non-blocking mode (see :func:`make_nonblocking`).
        n: int, bytes, 0 or more.

    Returns:
        bytes: 0 to *n* bytes long; ``b""`` at end-of-file.

    Raises:
        OSError: EBADF if *fd* is not open for reading, or :func:`close` closes it during the wait; EINVAL if *n* is negative;
            otherwise as read(2).

    Switches greenlets only when there is nothing to read. Killed or timed out while it waits, it has taken no byte. Works in any
    thread's hub and in a forked child.

    Source: read(2); ``gevent.os.nb_read``.

    .. versionadded:: 0.1.0
    """
    cdef int number = as_int(fd)
    cdef int err = 0
    if n < 0:
        raise os_error(EINVAL, "nb_read", fd)
    n = min(n, <Py_ssize_t>COOPOS_IO_MAX)
    while True:
        data = read_once(plain_read, number, n, &err)
        if data is not None:
            return data
        if err != EAGAIN:
            raise os_error(err, "nb_read", fd)
        park(number, READ, "nb_read")


def nb_write(Py_ssize_t fd, buf):
    """Write a buffer, or as much of it as fits, to a non-blocking descriptor, letting other greenlets run while nothing fits.

    Like :func:`os.write`, but waits on the hub where that raises BlockingIOError.

    Args:
        fd: int, a descriptor in non-blocking mode (see :func:`make_nonblocking`).
        buf: bytes-like, contiguous. It stays locked during the wait.

    Returns:
        int: how many bytes were written, 0 to ``len(buf)``.

    Raises:
        OSError: EBADF if *fd* is not open for writing, or :func:`close` closes it during the wait; EPIPE if nobody can read;
            otherwise as write(2).
        TypeError, BufferError: *buf* is not bytes-like, or not contiguous.

    Switches greenlets only when nothing fits. Killed or timed out while it waits, it has written no byte. Works in any thread's
    hub and in a forked child.

    Source: write(2); ``gevent.os.nb_write``.

    .. versionadded:: 0.1.0
    """
    cdef int number = as_int(fd)
    cdef Py_buffer view
    cdef ssize_t written
    cdef int err = 0
    PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE)
    try:
        while True:
            written = write_once(plain_write, number, &view, 0, &err)
            if written >= 0:
                return written
            if err != EAGAIN:
                raise os_error(err, "nb_write", fd)
            park(number, WRITE, "nb_write")
    finally:
        PyBuffer_Release(&view)


def make_nonblocking(fd):
    """Put a descriptor into non-blocking mode.

    The flag belongs to the open file description: everybody who shares it, other processes too, sees it.

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


# The errnos with which the kernel says that it can't tell whether this descriptor would block. Never remembered: another file of
# the same kind may well answer.
cdef bint is_undecided(int err) noexcept:
    return err == EOPNOTSUPP or err == ENOSYS or err == EINVAL or err == EPERM


cdef bint is_pollable(int fd, str call) except -1:
    """Whether readiness means anything for *fd*: regular files and block devices are always ready, and block all the same."""
    cdef stat_t st
    if fstat(fd, &st) < 0:
        raise os_error(errno, call, fd)
    return not S_ISREG(st.st_mode) and not S_ISBLK(st.st_mode)


cdef bint is_nonblocking(int fd) noexcept:
    cdef int flags = fcntl(fd, F_GETFL)
    return flags >= 0 and flags & O_NONBLOCK


cdef int park_until_ready(int fd, int events, str call) except -1:
    """Park, unless *fd* is ready at this moment. What can't be waited for is always ready to poll(2)."""
    cdef pollfd request
    request.fd = fd
    request.events = POLLIN if events == READ else POLLOUT
    request.revents = 0
    if poll(&request, 1, 0) == 0:
        park(fd, events, call)
    return 0


def read_or_defer(Py_ssize_t fd, Py_ssize_t n, str call):
    """Read without a thread where the kernel can tell whether the read would block; wait on the hub where it would.

    Returns bytes, or None where only a thread can make this read cooperative. Then there was something to read: a descriptor whose
    readiness means anything has been waited for. Flags are not touched. An empty read is left to the thread too: kernels before 5.8
    returned short from the page cache, so it need not be the end of the file.

    Source: preadv2(2), RWF_NOWAIT.
    """
    cdef int number = as_int(fd)
    cdef Reader reader = coopos_read_nowait
    cdef int err = 0
    if n < 0:
        raise os_error(EINVAL, call, fd)
    n = min(n, <Py_ssize_t>COOPOS_IO_MAX)
    while True:
        data = read_once(reader, number, n, &err)
        if data is not None:
            return data if data or n == 0 or is_pollable(number, call) else None
        if err == EAGAIN or is_undecided(err):
            if not is_pollable(number, call):
                return None
            if err == EAGAIN:
                park(number, READ, call)
                continue
            if is_nonblocking(number) and reader != plain_read:
                reader = plain_read
                continue
            park_until_ready(number, READ, call)
            return None
        raise os_error(err, call, fd)


def write_or_defer(Py_ssize_t fd, buf, str call):
    """Write without a thread where the kernel can tell whether the write would block; wait on the hub where it would.

    Returns how many bytes were written, or None where only a thread can make this write cooperative; nothing is written then, and a
    descriptor whose readiness means anything has been waited for. Flags are not touched. On a descriptor in blocking mode it
    returns when all is written, as write(2) does.

    Source: pwritev2(2), RWF_NOWAIT.
    """
    cdef int number = as_int(fd)
    cdef Py_buffer view
    cdef Writer writer = coopos_write_nowait
    cdef Py_ssize_t done = 0
    cdef ssize_t written
    cdef int err = 0
    PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE)
    try:
        while True:
            written = write_once(writer, number, &view, done, &err)
            if written >= 0:
                done += written
                if done >= view.len or is_nonblocking(number):
                    return done
            elif err == EAGAIN and is_pollable(number, call):
                park(number, WRITE, call)
            elif done:
                return done
            elif err == EAGAIN or is_undecided(err):
                if not is_pollable(number, call):
                    return None
                if is_nonblocking(number) and writer != plain_write:
                    writer = plain_write
                    continue
                park_until_ready(number, WRITE, call)
                return None
            else:
                raise os_error(err, call, fd)
    finally:
        PyBuffer_Release(&view)
