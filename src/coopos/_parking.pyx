"""How a greenlet waits for a descriptor, and how the descriptor is closed under it. What the compiled modules share.

The kernel keeps the books. Nothing here polls, or changes a descriptor's flags. Three rules hold throughout:

1. A greenlet that waits is registered before its watcher is started, and leaves by a `finally`.
2. A watcher is touched only by its own loop's thread; other threads post a callback.
3. No watcher stays active between two waits: a number that was closed and used again is another file.

The module knows libc, `gevent.hub` and the loop's watchers, and nothing else of coopos or gevent.
"""

cimport cython
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_GET_ITEM
from libc.errno cimport EBADF, EINTR, errno
from libc.stdlib cimport malloc, realloc
from libc.string cimport memset, strerror
from posix.fcntl cimport F_GETFD, F_GETFL, F_SETFL, O_NONBLOCK, fcntl
from posix.unistd cimport close as c_close

from coopos._posix cimport (
    POLLIN, POLLOUT, Closing, PyErr_CheckSignals, coopos_closing_drop, coopos_closing_enter, coopos_closing_is_due,
    coopos_closing_leave, coopos_closing_new, coopos_current_greenlet, coopos_import_greenlet, coopos_switch, poll, pollfd,
    pthread_atfork)

import os
import sys

from gevent.exceptions import BlockingSwitchOutError, InvalidSwitchError
from gevent.hub import _get_hub as get_hub_if_exists, _get_hub_noargs as get_hub


globals().update(READ=READ, WRITE=WRITE)


cdef object os_error(int err, str call, object subject):
    """The OSError for errno *err*, of the class Python maps it to, saying which call failed on what."""
    return OSError(err, f"{strerror(err).decode()}: {call}({subject})")


# ---- giving way to the hub ---------------------------------------------------------------------------------------------------

# greenlet's C API, as quick as it gets.
coopos_import_greenlet()


cdef object this_greenlet():
    try:
        return coopos_current_greenlet()
    except RuntimeError:
        return None                # the interpreter is being taken down, and has no greenlets any more


# {type of greenlet: whether it has the switch_out() that gevent's hub calls before it is switched to}
cdef dict _has_switch_out = {}
# The last type that had none.
cdef object _plain_kind = None


cdef object refusal():
    return BlockingSwitchOutError("Impossible to call blocking function in the event loop callback")


cdef object give_way(object hub, object current):
    """Run the hub until it switches back; what it brings. gevent's ``hub.switch()``, less a look-up that nearly always fails."""
    if current is hub:
        raise refusal()
    global _plain_kind
    cdef object kind = type(current)
    try:
        if kind is not _plain_kind:
            if kind not in _has_switch_out:
                _has_switch_out[kind] = hasattr(kind, "switch_out")
            if _has_switch_out[kind]:
                return hub.switch()
            _plain_kind = kind
        return coopos_switch(hub, NULL, NULL)
    except Exception as ex:
        if current in _outright and is_called_outright(current):
            raise Thrown(ex)
        raise


cdef object wrong_switch(object came_back, str what):
    return InvalidSwitchError(f"switched into {coopos_current_greenlet()!r} with {came_back!r}: it waits for {what}")


cdef object reachable_hub():
    """The hub that the caller can give way to. None in the hub itself, where its callbacks run, and signal handlers while it
    sleeps; None in a thread that has no hub, and so no other greenlet that could run meanwhile; and None at the interpreter's end.
    """
    cdef object hub = get_hub_if_exists()
    cdef object current = this_greenlet()
    return None if current is None or current is hub else hub


def can_give_way():
    """For Python: whether there is a hub to give way to. Where there is none, a plain wait keeps nobody from anything."""
    return reachable_hub() is not None


cdef int stand(int fd, int events, str call) except -1:
    """Wait until *fd* is ready as a plain program does, where there is no hub to give way to."""
    cdef pollfd request
    cdef int rc, err
    request.fd = fd
    request.events = POLLIN if events == READ else POLLOUT
    while True:
        request.revents = 0
        with nogil:
            rc = poll(&request, 1, -1)
            err = errno
        if rc >= 0:
            return 0
        if err != EINTR:
            raise os_error(err, call, fd)
        PyErr_CheckSignals()


# ---- what is thrown into a greenlet ------------------------------------------------------------------------------------------

# {greenlet: the frames that have called outright(), the innermost last}
cdef dict _outright = {}
# Whose `except` clauses are for errors of their own calls.
cdef frozenset _own_packages = frozenset([
    "coopos", "contextlib", "io", "multiprocessing", "os", "selectors", "subprocess", "threading"])


cdef bint is_called_outright(object current) except -1:
    """Whether nothing but code of ours and of the stdlib stands between the innermost outright() and this wait. A program's own,
    a method that overrides one or a signal's handler, catches what is thrown into it like any other.
    """
    cdef object caller = _outright[current][len(_outright[current]) - 1]
    cdef object frame = sys._getframe()
    while frame is not None and frame is not caller:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _own_packages:
            return False
        frame = frame.f_back
    return True


class Thrown(BaseException):
    """Carries an exception that was thrown into a waiting greenlet out of the innermost outright()."""


def outright(function, *args, **kwargs):
    """``function(*args, **kwargs)``, out of which comes whatever is thrown into the greenlet while it waits there.

    A timeout may be of any class: an OSError, a ChildProcessError. An ``except`` that *function*, or the stdlib's code below it,
    has for errors of its own calls must not take it for one of those. So on its way out it is a BaseException that nobody knows.
    """
    cdef object current = coopos_current_greenlet()
    cdef list frames = _outright.setdefault(current, [])
    frames.append(sys._getframe())
    try:
        return function(*args, **kwargs)
    except Thrown as ex:
        [thrown] = ex.args
        for name, value in vars(ex).items():       # how much was read, or written, before it
            setattr(thrown, name, value)
    finally:
        frames.pop()
        if not frames:
            del _outright[current]
    raise thrown


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


# ---- other threads' loops ----------------------------------------------------------------------------------------------------

# Counts the forks since the module was loaded, in this line of descent: what is of an older generation was made by the parent.
generation = 0


cdef void count_generation() noexcept nogil:
    """Inside fork(2), in every child, also of C code that runs no at-fork hooks of the interpreter."""
    global generation
    generation += 1


if pthread_atfork(NULL, NULL, count_generation):
    raise MemoryError


cdef int forget_other_threads() except -1:
    """In a forked child, which has none."""
    cdef PutOffClose later
    for later in list(_put_off.values()):
        later.forget_other_threads()
    forget_calls(False)


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
cdef class Wait:
    """One greenlet's wait for one descriptor, with the watcher that it re-aims and uses again."""

    def wake(self, switch):
        """In the hub: the descriptor is ready, or closed, for the greenlet that waits by *switch*. If it still does: the loop runs
        signal handlers before it calls us, and what one raises may have ended the wait.
        """
        if self.switch is switch:
            switch(self)

    def hear(self):
        """In the hub: the descriptor of a watcher that stays on is ready."""
        cdef object waiter = self.waiter
        if waiter is not None:
            coopos_switch(waiter, <PyObject *>self.token, NULL)
        else:
            rest(self)

    def leave(self):
        """In its loop's thread: its owner has given the descriptor up."""
        evict(self)
        if self.waiter is None:
            rest(self)


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
        wait.events = events
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


cdef int park(int fd, int events, str call, bint may_stand=True) except -1:
    """Let the others run until *fd* is ready, or raise EBADF as soon as it is closed by this module's close().

    Killed or timed out, the greenlet leaves nothing behind, and has moved no byte. In the hub it is a plain wait, as a signal
    handler's is in any program, or BlockingSwitchOutError, for what only a program that knows of greenlets calls.
    """
    cdef object hub = reachable_hub()
    if hub is None:
        if not may_stand and get_hub_if_exists() is not None:
            raise refusal()
        return stand(fd, events, call)
    check_open(fd, call)
    cdef Parking parking = parking_of(hub)
    cdef Wait wait = parking.aim(fd, events)
    cdef object current = coopos_current_greenlet()
    wait.switch = current.switch
    enlist(wait)
    try:
        wait.watcher.start(wait.wake, wait.switch)
        came_back = give_way(parking.hub, current)
        if came_back is not wait:
            raise wrong_switch(came_back, f"fd {fd} in {call}")
        # Before anything is moved: what a signal's handler raises now costs no byte.
        PyErr_CheckSignals()
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


cdef int park_until_ready(int fd, int events, str call) except -1:
    """Park, unless *fd* is ready at this moment. What can't be waited for is always ready to poll(2)."""
    cdef pollfd request
    cdef int rc
    check_open(fd, call)
    request.fd = fd
    request.events = POLLIN if events == READ else POLLOUT
    request.revents = 0
    # EINTR says nothing of the descriptor: Linux gives it, while a signal is pending, even to a poll(2) that is not to wait.
    while (rc := poll(&request, 1, 0)) < 0:
        if errno != EINTR:
            raise os_error(errno, call, fd)
        PyErr_CheckSignals()
    if rc == 0:
        park(fd, events, call)
    return 0


def wait_until_ready(int fd, int events, str call):
    """For Python: park until *fd* is ready for READ or WRITE, unless it is."""
    park_until_ready(fd, events, call)


def wait_for_any(list wanted, str call, list closed=None):
    """For Python: park until something has happened to one of the *wanted*, each (fd, READ or WRITE), which poll(2) then tells: it
    is ready, or was closed. Not where there is no hub to give way to.

    However the wait ends, it appends to *closed* the numbers that this module's close() closed meanwhile. poll(2) can't tell that:
    the number may be another file's by now.
    """
    cdef Parking parking = parking_of(get_hub())
    cdef object current = coopos_current_greenlet()
    cdef object switch = current.switch
    cdef list waits = []
    cdef Wait wait
    cdef int fd, events
    try:
        for fd, events in wanted:
            wait = parking.aim(fd, events)
            waits.append(wait)
            wait.switch = switch
            enlist(wait)
            wait.watcher.start(wait.wake, switch)
        came_back = give_way(parking.hub, current)
        if not (isinstance(came_back, Wait) and (<Wait>came_back).switch is switch):
            raise wrong_switch(came_back, f"one of the descriptors {wanted} in {call}")
    finally:
        for wait in waits:
            if wait.error and closed is not None:
                closed.append(wait.fd)
            delist(wait)
            wait.switch = None
            if wait.queued is not None:
                wait.queued.stop()
                wait.queued = None
            parking.put_back(wait, wait.events)


def awaited(int fd):
    """For Python: what greenlets of this thread are parked for on *fd*: READ, WRITE, both or 0."""
    cdef object hub = reachable_hub()
    cdef PyObject *link = _parked[fd] if hub is not None and 0 <= fd < _parked_size else NULL
    cdef Wait wait
    cdef int events = 0
    while link != NULL:
        wait = <Wait>link
        link = wait.next
        if wait.hub is hub and (wait.switch is not None or wait.waiter is not None):
            events |= wait.events
    return events


cdef int evict(Wait wait) except -1:
    """Tell a parked greenlet, in its loop's thread, that its descriptor is closed."""
    if wait.is_on:
        turn_off(wait)
        if wait.may_stay:
            wait.watcher.fd = wait.fd      # closed behind its owner's back it may be another file's by the next wait: see aim
        if wait.waiter is not None:
            wait.error = EBADF
            wait.queued = wait.loop.run_callback(wait.hear)
    if wait.switch is not None and not wait.error:
        wait.error = EBADF
        wait.watcher.stop()
        wait.queued = wait.loop.run_callback(wait.wake, wait.switch)
    return 0


# ---- waiting for a descriptor that one object owns ---------------------------------------------------------------------------

# Its watcher may stay on between two waits, since the number can't become another file's: that saves two system calls each time. It
# is in the table of the parked all that time, and keeps the loop running only while somebody waits. Not with libuv: what keeps its
# loop running is one handle per descriptor, which others who wait for the same one share.

cdef int set_ref(watcher, bint ref) except -1:
    """Say whether a watcher keeps its loop alive. libuv's io watchers are parts of one that does the counting."""
    getattr(watcher, "_watcher_ref", watcher).ref = ref
    return 0


cdef Wait new_seat(int fd, int events):
    """A wait for park_in."""
    cdef Parking parking = parking_of(get_hub())
    cdef Wait seat = Wait()
    seat.hub = parking.hub
    seat.loop = parking.loop
    seat.fd = fd
    seat.events = events
    seat.watcher = parking.make_watcher(fd, events)
    seat.token = (object(),)
    seat.born = generation
    seat.may_stay = parking.is_reusable
    return seat


cdef int turn_off(Wait seat) except -1:
    """In its loop's thread."""
    if seat.is_on:
        seat.is_on = False
        delist(seat)
        seat.watcher.stop()
    return 0


cdef int rest(Wait seat) except -1:
    """In its loop's thread, with nobody waiting: stop the watcher, and close it if nobody ever will."""
    turn_off(seat)
    if seat.is_left:
        seat.watcher.close()
    return 0


cdef int leave_seat(Wait seat) except -1:
    """Its owner gives the descriptor up, and is going to close it, or not."""
    seat.is_left = True
    hub = get_hub_if_exists()
    if hub is not None and seat.loop is hub.loop:
        seat.leave()
    elif seat.born == generation and not post(seat.loop, seat.leave) and seat.is_on:
        # Its loop is no more, and lets nobody stop the watcher.
        seat.is_on = False
        delist(seat)
        seat.watcher.callback = None
    return 0


cdef int inherit(Wait seat) except -1:
    """In a forked child: who has waited here may be dead, and the watcher stopped."""
    seat.born = generation
    if seat.waiter is not None and seat.waiter.dead:
        seat.waiter = None
    if seat.is_on and not seat.watcher.active:
        seat.is_on = False
        delist(seat)
    return 0


cdef int park_in(Wait seat, str call) except -1:
    """As park(). Whoever comes second, or from another thread, gets a watcher of his own."""
    cdef object current
    if seat.born != generation:
        inherit(seat)
    if seat.waiter is not None or seat.hub is not reachable_hub():
        return park(seat.fd, seat.events, call)
    # The owner has made no attempt. libev aborts the process over a number that somebody closed behind its back.
    if not seat.is_on and fcntl(seat.fd, F_GETFD) < 0:
        raise os_error(errno, call, seat.fd)
    current = coopos_current_greenlet()
    seat.error = 0
    seat.waiter = current
    try:
        if seat.may_stay:
            seat.watcher.ref = True
        if not seat.is_on:
            enlist(seat)
            seat.is_on = True
            seat.watcher.start(seat.hear)
        came_back = give_way(seat.hub, current)
        if came_back is not <object>PyTuple_GET_ITEM(seat.token, 0):
            raise wrong_switch(came_back, f"fd {seat.fd} in {call}")
        PyErr_CheckSignals()       # as in park()
    finally:
        seat.waiter = None
        if seat.queued is not None:
            seat.queued.stop()
            seat.queued = None
        if seat.is_left:
            rest(seat)
        elif seat.may_stay:
            seat.watcher.ref = False
        else:
            turn_off(seat)
    if seat.error:
        raise os_error(seat.error, call, seat.fd)
    return 0


# ---- descriptors in non-blocking mode ----------------------------------------------------------------------------------------

# The one thing of the kernel's that is remembered, because asking each time would cost a read of a ready pipe half its time
# again: close() forgets it. Stale (the number was closed and used again behind our back), a read or write may block, as gevent's.
cdef char[KNOWN_SIZE] is_known_nonblocking


cdef bint note_mode(int fd) noexcept:
    """Whether *fd* is in non-blocking mode, remembered if it is. What is not open isn't; the call itself says so."""
    cdef int flags = fcntl(fd, F_GETFL)
    if flags < 0 or not flags & O_NONBLOCK:
        return False
    if fd < KNOWN_SIZE:
        is_known_nonblocking[fd] = True
    return True


# ---- calls in flight ---------------------------------------------------------------------------------------------------------

# {descriptor: the Calls that use it}. The parked are in the table above.
cdef dict _calls = {}


cdef class Call:
    """A call that uses a descriptor, or two, and may give way elsewhere than in park(): from before its first system call to its
    end. If it has not begun, or only waits, when the number is closed, it has an *error* and goes on no more: the number may be
    another file's. What a thread has begun keeps the number open until it is over.
    """

    cdef int enter(self, str name) except -1:
        """Leave by leave(), in a `finally`."""
        check_open(self.fd, name)
        check_open(self.other, name)
        hub = get_hub_if_exists()
        self.loop = None if hub is None else hub.loop
        self.error = 0
        if self.fd >= 0:
            _calls.setdefault(self.fd, []).append(self)
        if self.other >= 0 and self.other != self.fd:
            _calls.setdefault(self.other, []).append(self)
        return 0

    cdef int leave(self) except -1:
        self.forget(self.fd)
        if self.other != self.fd:
            self.forget(self.other)
        return 0

    cdef int forget(self, int fd) except -1:
        cdef list calls = _calls.get(fd)
        if calls is not None and self in calls:
            calls.remove(self)
            if not calls:
                del _calls[fd]
        return 0

    cdef int hear_of_close(self, int fd, Closing *closing) except -1:
        """The number is being closed, by any thread. A call that has to be over first enters *closing*."""
        self.error = EBADF
        return 0


@cython.final
cdef class InFlight(Call):
    """For Python: a call of several steps, as a context. If a descriptor is closed OSError(EBADF) comes out of its waits."""
    cdef str name
    cdef object greenlet
    cdef list closed

    def __init__(self, str name not None, int fd, int other=-1):
        self.closed = []
        self.name = name
        self.fd = fd
        self.other = other

    def __enter__(self):
        self.greenlet = this_greenlet()
        self.enter(self.name)
        return self

    def __exit__(self, exc_type, exc_value, exc_tb):
        self.leave()
        self.greenlet = None

    def check(self):
        """Raise EBADF if a descriptor was closed."""
        if self.error:
            raise os_error(self.error, self.name, self.fd)

    def is_closed(self, int fd):
        """Whether that one was."""
        return fd in self.closed

    cdef int hear_of_close(self, int fd, Closing *closing) except -1:
        self.error = EBADF
        self.closed.append(fd)
        if self.loop is not None:
            post(self.loop, self.tell)
        return 0

    def tell(self):
        """In the hub: the greenlet may be waiting for the other descriptor."""
        if self.greenlet is not None and self.greenlet is not this_greenlet():
            self.greenlet.throw(os_error(EBADF, self.name, self.fd))


cdef int tell_calls(int fd, Closing *closing) except -1:
    cdef Call call
    for call in list(_calls[fd]):
        call.hear_of_close(fd, closing)
    return 0


cdef int forget_calls(bint all_of_them) except -1:
    """In a forked child: other threads' calls, or all, whose greenlets aren't here."""
    cdef Call call
    hub = get_hub_if_exists()
    for calls in list(_calls.values()):
        for call in list(calls):
            if all_of_them or hub is None or call.loop is not hub.loop:
                call.leave()
    return 0


cdef int take_turns(int fd=-1, str name="") except -1:
    """Let the other greenlets that are ready run once, for a call that is going to use *fd*. Without a hub: nothing."""
    cdef object hub = reachable_hub()
    cdef Call call
    if hub is None:
        return 0
    cdef object current = coopos_current_greenlet()
    cdef object switch = current.switch
    call = Call.__new__(Call)
    call.fd, call.other = fd, -1
    call.enter(name)
    queued = hub.loop.run_callback(switch, switch)
    try:
        came_back = give_way(hub, current)
        if came_back is not switch:
            raise wrong_switch(came_back, "its turn")
    finally:
        queued.stop()
        call.leave()
    if call.error:
        raise os_error(call.error, name, fd)
    return 0


def yield_turn():
    """For Python: let the other greenlets that are ready run once."""
    take_turns()


# ---- close -------------------------------------------------------------------------------------------------------------------

@cython.final
@cython.internal
cdef class PutOffClose:
    """A close(2) that has to wait: until others' watchers on the number have been stopped, and workers are done with it."""
    cdef Closing *closing
    cdef bint is_polled    # whether the loop of the thread that called close() is one of the parties

    def __dealloc__(self):
        if self.closing != NULL:
            coopos_closing_drop(self.closing)

    cdef int stopped(self) except -1:
        """One party less."""
        cdef int fd = self.closing.fd
        coopos_closing_leave(self.closing)
        if self.closing.is_made and _put_off.get(fd) is self:
            del _put_off[fd]
        return 0

    cdef int forget_other_threads(self) except -1:
        """In a forked child."""
        if self.closing.parties > self.is_polled:
            self.closing.parties = 1 + self.is_polled
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


# {descriptor: its PutOffClose, made or not}
cdef dict _put_off = {}


cdef PutOffClose put_off(int fd):
    cdef PutOffClose later = PutOffClose.__new__(PutOffClose)
    later.closing = coopos_closing_new(fd)
    if later.closing == NULL:
        raise os_error(errno, "close", fd)
    _put_off[fd] = later
    return later


cdef int check_open(int fd, str call) except -1:
    """A number whose close is put off is closed for everybody from the moment close() has returned."""
    cdef PutOffClose later
    if _put_off and (<object>fd) in _put_off:
        later = <PutOffClose>_put_off[fd]
        if coopos_closing_is_due(later.closing):
            raise os_error(EBADF, call, fd)
        del _put_off[fd]
    return 0


def close(Py_ssize_t fd):
    """Close a file descriptor.

    Like :func:`os.close`, and done when it returns: the number is free and the other end sees end-of-file. Greenlets that wait
    in a function of this module for *fd*, in any thread's hub, get ``OSError(EBADF)``. Only while a watcher of somebody else (a
    gevent socket or selector), or of another thread, is active on *fd* is the system call put off to the next turn of that
    loop, because closing a descriptor under an active watcher can abort the process; and while a thread uses *fd* for a call
    that it has begun, until that is over. Even then *fd* is EBADF for whoever comes later. A call that no thread has begun yet
    is not made, and gets ``OSError(EBADF)``.

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
    check_open(fd, "close")
    try:
        hub = get_hub_if_exists()
    except TypeError:
        hub = None                 # the interpreter is being taken down, and gevent's names with it
    loop = None if hub is None else hub.loop
    if 0 <= fd < KNOWN_SIZE:
        is_known_nonblocking[fd] = False
    if 0 <= fd < _parked_size and _parked[fd] != NULL:
        elsewhere = evict_all(fd, loop)
    if elsewhere:
        later = put_off(fd)
        for other, waits in elsewhere.items():
            coopos_closing_enter(later.closing)
            if not post(other, later.evict_there, (waits,)):
                later.stopped()
    if _calls and (<object>fd) in _calls:
        if later is None:
            later = put_off(fd)
        tell_calls(fd, later.closing)
    if loop is not None and loop.closing_fd(fd):
        if later is None:
            later = put_off(fd)
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


def closerange(Py_ssize_t fd_low, Py_ssize_t fd_high, /):
    """Close all descriptors from *fd_low* on and below *fd_high*, ignoring errors.

    Like :func:`os.closerange`, and each as :func:`close` does it: greenlets that wait for one of them get ``OSError(EBADF)``.

    Args:
        fd_low: int, the first descriptor.
        fd_high: int, the first that is not closed.

    Raises:
        TypeError, OverflowError: an argument is not an int, or too large for one.

    Doesn't switch greenlets. Safe in any thread and after a fork.

    Source: close(2).

    .. versionadded:: 0.1.0
    """
    cdef int fd
    cdef int low = max(as_int(fd_low), 0)
    cdef int high = as_int(fd_high)
    numbers = range(low, high)
    if high - low > 1000:
        try:
            numbers = [fd for fd in map(int, os.listdir("/dev/fd")) if low <= fd < high]
        except OSError:
            pass
    for fd in numbers:
        try:
            close_fd(fd)
        except OSError:
            pass


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
