# Reads and writes on a descriptor that one object owns. coopos.io.FileIO is made of them.
#
# Owned is the descriptor, and knows nothing of the file. The file keeps its Owned in a slot, and inherits from Moving the methods
# that move bytes. So there is no reference cycle: a bound method keeps the file open, and an unused file is freed at once.
#
# After a short read, the next read will probably have to wait. So it waits first, without trying. That is only a hint: if there are
# bytes after all, the wait ends at once.

cdef enum:
    SMALL_FILE_READ = 8192
    NOTHING_YET = -2           # of a file in non-blocking mode


cdef extern from "Python.h":
    int PyErr_ResourceWarning(object source, Py_ssize_t stack_level, const char *format, ...) noexcept
    void PyErr_WriteUnraisable(object where) noexcept


def warn_unclosed(source, Py_ssize_t level=2):
    """Give the ResourceWarning that the file *source* was freed without having been closed. *level* is the warning's stack level.

    Never raises. If a warnings filter turns the warning into an error, sys.unraisablehook reports it.
    """
    if PyErr_ResourceWarning(source, level, "unclosed file %R", <PyObject *>source) < 0:
        PyErr_WriteUnraisable(source)


cdef extern from "Python.h":
    """
    #include "structmember.h"
    """
    ctypedef struct PyMemberDef:
        Py_ssize_t offset
    ctypedef struct MemberDescriptor "PyMemberDescrObject":
        PyMemberDef *d_member


cdef object closed_error():
    return ValueError("I/O operation on closed file")


cdef object root_of(greenlet):
    """The main greenlet of the thread of *greenlet*."""
    while greenlet.parent is not None:
        greenlet = greenlet.parent
    return greenlet


# Those whose turn somebody waits for: {address: weak reference}. Where a thread ends, greenlets of it never leave the queue. Not a
# WeakSet, which is Python code: a signal handler that waits could run in it, and take the switch that gives the turn.
cdef dict _queues = {}


@cython.final
cdef class Owned:
    """A descriptor that one object reads, writes and closes."""
    cdef readonly int fd           # -1 once it is closed
    cdef bint may_read             # opened for reading
    cdef bint may_write
    cdef bint as_os                # in non-blocking mode reads and writes don't wait, as those of io.FileIO
    cdef bint is_stream            # read_stream() can read it; not true of regular files, and cleared when it can't tell
    cdef bint is_drained           # the last read took all there was
    cdef readonly Py_ssize_t late  # bytes that the last write wrote before it raised an exception
    cdef list in_calls             # greenlets, of any thread, in a read or write that may switch
    cdef list waiters              # (hub, Wait) of the greenlets in wait_for_others()
    cdef object __weakref__
    cdef object owner              # the greenlet in in_turn(), or None
    cdef list queue                # (greenlet, async watcher of its loop, since when) of those that wait for their turn

    def __init__(self, int fd, bint may_read, bint may_write, bint as_os=False):
        cdef stat_t st
        cdef int err
        if fstat(fd, &st) < 0:
            err = errno
            raise OSError(err, os.strerror(err))
        self.fd = fd
        self.in_calls, self.waiters, self.queue = [], [], []
        self.may_read, self.may_write, self.as_os = may_read, may_write, as_os
        self.is_stream = not S_ISREG(st.st_mode) and not S_ISBLK(st.st_mode) and not S_ISDIR(st.st_mode)

    cdef Move move(self, bint writes) except *:
        if self.fd < 0:
            raise closed_error()
        cdef Move move = move_of(self.fd, writes, -1, 0, self.as_os)
        move.may_block = True
        return move

    cdef int wait(self) except -1:
        """Wait until there are bytes to read, if the last read took all there was."""
        if not self.is_drained or (self.as_os and is_nonblocking(self.fd)):
            self.take_turn()
        else:
            current = self.enter()
            try:
                park(self.fd, READ, "read")
            finally:
                self.leave(current)
        if self.fd < 0:
            raise closed_error()
        return 0

    cdef int take_turn(self) except -1:
        if turn_is_due():
            current = self.enter()
            try:
                take_turn(self.fd, "read")
            finally:
                self.leave(current)
        return 0

    cdef ssize_t read_stream(self, Move *move) except -2:
        """One read into the buffer of *move*. -1: there is nothing to read yet, and `would_block` says if that is the answer; or
        `is_stream` is now false and read_bytes() has to find out.
        """
        cdef int err = 0
        cdef ssize_t nread
        nread = attempt(move, &err)
        if nread >= 0:
            self.is_drained = 0 < nread < <ssize_t>move.iov.iov_len
        elif err == EAGAIN:
            self.is_drained = True
            move.would_block = self.as_os and is_nonblocking(self.fd)
        elif is_undecided(err):
            self.is_stream = self.is_drained = False
        else:
            raise os_error(err, "read", self.fd)
        return nread

    cdef object read_some(self, Move *move, Py_ssize_t n):
        """One read of up to *n* bytes; None as for -1 of read_stream().

        Not part of read_from(): greenlet copies the C stack at each switch, and the buffer below would be on it.
        """
        cdef char[SMALL_FILE_READ] small
        cdef char *buf = small
        cdef iovec iov
        cdef ssize_t nread
        data = None
        if n > SMALL_FILE_READ:
            data = PyBytes_FromStringAndSize(NULL, n)
            buf = PyBytes_AS_STRING(data)
        iov.iov_base, iov.iov_len = buf, <size_t>n
        move.iov, move.count = &iov, 1
        nread = self.read_stream(move)
        if nread < 0:
            return None
        return data if nread == n and data is not None else PyBytes_FromStringAndSize(buf, nread)

    cdef object enter(self):
        """Begin a read or write that may switch. Returns the calling greenlet, for leave() in a `finally`."""
        cdef object current = this_greenlet()
        self.in_calls.append(current)
        return current

    cdef int leave(self, current) except -1:
        cdef Wait wait
        cdef Py_ssize_t last = len(self.in_calls) - 1
        if self.in_calls[last] is current:
            self.in_calls.pop()
        else:
            self.in_calls.remove(current)
        if self.waiters:
            hub = reachable_hub()
            for home, wait in list(self.waiters):      # a copy: other threads change it
                # A forked child still has the parent's waiters in this list. They may be dead.
                if home is hub and wait.queued is None and not wait.greenlet.dead:
                    wait.queued = hub.loop.run_callback(wait.wake)
        return 0

    def wait_for_others(self):
        """Park until another greenlet of this thread goes on in its read or write; True. False: there is none, or no hub.

        For the lock of the stdlib's buffers. Its owner holds it across reads and writes of this file, and switches only in them:
        https://github.com/python/cpython/blob/main/Modules/_io/bufferedio.c
        """
        cdef object hub = reachable_hub()
        cdef object current = this_greenlet()
        cdef object root
        cdef Wait wait
        if hub is None:
            return False
        root = root_of(current)
        for each in list(self.in_calls):
            if each is not current and not each.dead and root_of(each) is root:
                break
        else:
            return False
        wait = Wait.__new__(Wait)
        wait.greenlet = current
        member = (hub, wait)
        self.waiters.append(member)
        try:
            came_back = give_way(hub, current, "buffer", self.fd)
            if came_back is not wait:
                raise wrong_switch(came_back, "another greenlet's read or write")
        finally:
            self.waiters.remove(member)
            wait.greenlet = None
            if wait.queued is not None:
                wait.queued.stop()
        return True

    def in_turn(self, method, *args):
        """``method(*args)``, as the only greenlet that has a hub to wait in. The others queue, first come, first served.

        For buffers that many greenlets share. A thread without a hub waits for the buffer's own lock. Within a greenlet, as when
        its signal handler prints, the buffer itself decides.
        """
        cdef object hub = reachable_hub()
        cdef object current = this_greenlet()
        if hub is None or self.owner is current:
            return method(*args)
        if self.owner is None or self.owner.dead:
            self.owner = current
        else:
            self.wait_for_turn(hub, current)
        try:
            return method(*args)
        finally:
            self.pass_turn()

    cdef int wait_for_turn(self, hub, current) except -1:
        cdef object turn = hub.loop.async_()   # which other threads may use, and which keeps the loop alive
        member = (current, turn, coopos_coarse_now_us())
        try:
            turn.start(current.switch, member)
            self.queue.append(member)
            _queues[<size_t><PyObject *>self] = weak_reference(self)
            if self.owner is None:
                self.pass_turn()       # another thread left meanwhile
            while self.owner is not current:
                came_back = give_way(hub, current, "buffer", self.fd)
                if came_back is not member:
                    raise wrong_switch(came_back, "its turn in a file's buffer")
        except BaseException:
            if self.owner is current:
                self.pass_turn()       # it was just given
            raise
        finally:
            if member in self.queue:
                self.queue.remove(member)
            if not self.queue:
                _queues.pop(<size_t><PyObject *>self, None)
            end_watchers((turn,))
        return 0

    cdef int pass_turn(self) except -1:
        """Give the turn to the next greenlet before it runs, or the one that leaves could take it again, for ever."""
        self.owner = None
        while self.queue:
            next_one, turn, _ = self.queue.pop(0)
            if not next_one.dead:      # a forked child may have left it behind
                self.owner = next_one
                try:
                    turn.send()
                    return 0
                except Exception:      # its loop is destroyed
                    self.owner = None
        return 0

    def close(self, bint closes=True):
        """Close the descriptor, or only give it up if *closes* is false. Greenlets that wait for it get ``OSError(EBADF)``."""
        cdef int fd = self.fd
        if fd < 0:
            return
        self.fd = -1
        if closes:
            close_fd(fd)
        else:
            fail_waits_of(fd, self.in_calls)


# ---- the methods of files ----------------------------------------------------------------------------------------------------

# The class of files, and the offset of the slot that holds a file's Owned. An attribute access would search the class at each call.
cdef object kind_of_file = None
cdef Py_ssize_t slot_at = 0


def use_slot(kind, descriptor):
    """Say where files have their Owned: in objects of class *kind*, in the slot of the member descriptor *descriptor*."""
    global kind_of_file, slot_at
    slot_at = (<MemberDescriptor *><PyObject *>descriptor).d_member.offset
    kind_of_file = kind


cdef inline Owned owned_by(file):
    """The Owned of a file; None before the file is opened."""
    cdef PyObject *owned = NULL
    if kind_of_file is not None and PyObject_TypeCheck(file, <PyTypeObject *>kind_of_file):
        owned = (<PyObject **>(<char *><PyObject *>file + slot_at))[0]
    return None if owned == NULL else <Owned>owned


# Where io.FileIO returns None in non-blocking mode, `would_block` of the Move says so. The exception doesn't: it may be a timeout
# that somebody has thrown in.

cdef inline object read_from(Owned owned, Py_ssize_t n):
    """One read of up to *n* bytes. None: nothing yet."""
    cdef Move move = owned.move(False)
    n = min(n, <Py_ssize_t>COOPOS_IO_MAX)
    while owned.is_stream and n:
        owned.wait()           # before any memory is allocated
        data = owned.read_some(&move, n)
        if data is not None or move.would_block:
            return data
    move = owned.move(False)
    current = owned.enter()
    try:
        return read_bytes(&move, n, "read")
    except BaseException:
        if move.would_block:
            return None
        raise
    finally:
        owned.leave(current)


cdef Py_ssize_t fill_from(Owned owned, iovec *iov) except -1:
    """One read into *iov*. Returns how many bytes, or NOTHING_YET."""
    cdef Move move = owned.move(False)
    cdef ssize_t nread
    while owned.is_stream and iov.iov_len:
        owned.wait()
        move.iov, move.count = iov, 1
        nread = owned.read_stream(&move)
        if nread >= 0:
            return nread
        if move.would_block:
            return NOTHING_YET
    move = owned.move(False)
    set_one_buffer(&move, iov)
    current = owned.enter()
    try:
        return read_into(&move, "readinto")
    except BaseException:
        if move.would_block:
            return NOTHING_YET
        raise
    finally:
        owned.leave(current)


cdef object read_all_from(Owned owned):
    """Read until the end, into one object that grows. None: nothing yet."""
    cdef stat_t st
    cdef off_t offset
    cdef iovec iov
    cdef Py_ssize_t nread = -1
    cdef Py_ssize_t wanted = CHUNK
    cdef Collected collected = Collected()
    if fstat(owned.fd, &st) == 0 and S_ISREG(st.st_mode) and (offset := lseek(owned.fd, 0, SEEK_CUR)) >= 0:
        wanted = max(wanted, <Py_ssize_t>(st.st_size - offset) + 1)
    try:
        while nread and nread != NOTHING_YET:
            iov.iov_base = collected.room(wanted)
            wanted = PyBytes_GET_SIZE(<object>collected.data) - collected.size
            iov.iov_len = <size_t>min(wanted, <Py_ssize_t>COOPOS_IO_MAX)
            nread = fill_from(owned, &iov)
            collected.size += max(nread, 0)
            wanted -= max(nread, 0)
            if wanted == 0:
                wanted = max(collected.size >> 2, CHUNK)
        return collected.take() if collected.size or not nread else None
    except BaseException as ex:
        attach_progress(ex, "partial", collected.take())
        raise


class Moving:
    """The methods of io.FileIO that move bytes, letting other greenlets run. If the file is closed, or wasn't opened for the
    operation, they call io.FileIO's own, which raise the right error.
    """
    __slots__ = ()

    def read(self, size=-1, /):
        """Up to *size* bytes, those of one system call; all there are until the end, for -1 or None."""
        cdef Owned owned = owned_by(self)
        cdef Py_ssize_t n
        if owned is None or owned.fd < 0 or not owned.may_read:
            return super().read(size)
        n = -1 if size is None else size
        return read_all_from(owned) if n < 0 else read_from(owned, n)

    def readall(self):
        """All there is until the end."""
        cdef Owned owned = owned_by(self)
        # From Python 3.15 on io.FileIO.readall() checks the mode; before, read(2) fails with EBADF.
        # https://github.com/python/cpython/blob/main/Modules/_io/fileio.c
        if owned is None or owned.fd < 0 or (PY_VERSION_HEX >= 0x030F0000 and not owned.may_read):
            return super().readall()
        return read_all_from(owned)

    def readinto(self, buffer, /):
        """Fill *buffer* with as much as one system call brings; how many bytes."""
        cdef Owned owned = owned_by(self)
        cdef Py_buffer view
        cdef iovec iov
        cdef Py_ssize_t nread
        if owned is None or owned.fd < 0 or not owned.may_read:
            return super().readinto(buffer)
        try:
            take_buffer(buffer, &view, True, &iov)
        except BufferError:
            raise TypeError(f"readinto() argument must be read-write bytes-like object, not {type(buffer).__name__}") from None
        try:
            nread = fill_from(owned, &iov)
            return None if nread == NOTHING_YET else nread
        finally:
            PyBuffer_Release(&view)

    def write(self, data, /):
        """Write as much of *data* as one system call takes. Returns how many bytes; fewer than *data* has is no error."""
        cdef Owned owned = owned_by(self)
        cdef Move move
        cdef Py_buffer view
        cdef iovec iov
        if owned is None or owned.fd < 0 or not owned.may_write:
            return super().write(data)
        take_buffer(data, &view, False, &iov)
        owned.late = 0
        try:
            move = owned.move(True)
            set_one_buffer(&move, &iov)
            current = owned.enter()
            try:
                be_fair(owned.fd, "write")
                if owned.fd < 0:
                    raise closed_error()       # while others had their turn
                return write_once(&move, "write", True, &owned.late)
            except BaseException as ex:
                if move.would_block:
                    return None
                attach_progress(ex, "characters_written", owned.late or None)
                raise
            finally:
                owned.leave(current)
        finally:
            PyBuffer_Release(&view)
