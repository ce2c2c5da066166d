"""How a greenlet waits for a descriptor, and how the descriptor is closed under it. What the compiled modules share.

The kernel keeps the books. Nothing here polls, or changes a descriptor's flags. Three rules hold throughout:

1. A greenlet that waits is registered before the kernel is asked to tell of its descriptor, and leaves by a `finally`.
2. A loop's set is touched only by the loop's own thread; other threads post a callback.
3. An event is a hint: whoever is woken asks the kernel again.

The module knows libc, `gevent.hub` and the loop's watchers, and nothing else of coopos or gevent.
"""

cimport cython
from cpython.object cimport PyObject
from libc.errno cimport E2BIG, EBADF, EINTR, EINVAL, ENOSYS, EPERM, errno
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset, strerror
from posix.fcntl cimport F_GETFD, F_GETFL, F_SETFL, O_NONBLOCK, fcntl
from posix.unistd cimport close as c_close

from coopos._posix cimport (
    COOPOS_HAVE_EPOLL, COOPOS_SET_BATCH, POLLIN, POLLOUT, S_ISBLK, S_ISREG, Closing, Event, PyErr_CheckSignals, coopos_closing_drop,
    coopos_closing_enter, coopos_closing_is_due, coopos_closing_leave, coopos_closing_new, coopos_current_greenlet,
    coopos_import_greenlet, coopos_now_us, coopos_set_arm, coopos_set_has, coopos_set_new, coopos_set_ready, coopos_switch, fstat,
    poll, pollfd, pthread_atfork, stat_t)

import os
import sys

from gevent.exceptions import BlockingSwitchOutError, InvalidSwitchError
from gevent.hub import _get_hub as get_hub_if_exists, _get_hub_noargs as get_hub
from gevent.monkey import get_original


# gevent.monkey, which may have come first, puts a greenlet's where we need a thread's.
[_local] = get_original("_thread", ["_local"])


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


cdef object refusal():
    return BlockingSwitchOutError("Impossible to call blocking function in the event loop callback")


cdef bint has_switch_out(object greenlet) except -1:
    kind = type(greenlet)
    if kind not in _has_switch_out:
        _has_switch_out[kind] = hasattr(kind, "switch_out")
    return _has_switch_out[kind]


cdef object give_way(object hub, object current):
    """Run the hub until it switches back; what it brings. gevent's ``hub.switch()``, less a look-up that nearly always fails."""
    if current is hub:
        raise refusal()
    return switch_to(hub, None, current)


cdef object switch_to(object greenlet, tuple args, object current):
    """Go to the hub, or with *args* to *greenlet*, and come back with what somebody switches back with."""
    try:
        if args is not None:
            return coopos_switch(greenlet, <PyObject *>args, NULL)
        if has_switch_out(current):
            return greenlet.switch()
        return coopos_switch(greenlet, NULL, NULL)
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


cdef bint is_always_ready(int fd) noexcept:
    """Whether readiness means nothing for *fd*: regular files and block devices are always ready, and block all the same."""
    cdef stat_t st
    return fstat(fd, &st) == 0 and (S_ISREG(st.st_mode) or S_ISBLK(st.st_mode))


cdef bint stand(int fd, int events, str call) except -1:
    """Wait until *fd* is ready as a plain program does, where there is no hub to give way to. False: that says nothing of it."""
    cdef pollfd request
    cdef int rc, err
    if is_always_ready(fd):
        return False
    request.fd = fd
    request.events = POLLIN if events == READ else POLLOUT
    while True:
        request.revents = 0
        with nogil:
            rc = poll(&request, 1, -1)
            err = errno
        if rc >= 0:
            return True
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
#
# All that is waited for in one loop lies in one set of ours, an epoll(7) behind one io watcher of that loop. The loop never sees
# another number of ours. A member tells once each time it is armed. What it tells is a hint and never an answer: who is woken asks
# the kernel again. So a hint that comes late (the greenlet was killed, the number is another file's by now, another process has the
# file) does no harm, and nobody has to be disarmed.

# COOPOS_SETS=watchers: as where there is no epoll, of the loop's own watchers; see start_watcher().
cdef bint _has_epoll = COOPOS_HAVE_EPOLL and os.environ.get("COOPOS_SETS") != "watchers"

# By descriptor, the last Wait for it, or NULL (borrowed: whoever waits has it); close() reads it. The waits of every thread are
# here, under the GIL.
cdef PyObject **_parked = NULL
cdef int _parked_size = 0


cdef enum:
    MAX_DIRECT = 64        # how many greenlets switch to the next one themselves, before the loop has a turn
    MAX_DIRECT_US = 1000   # and how long that goes on

cdef enum:
    UNKNOWN = -1       # whether a watcher is on: else 0 or 1

cdef enum:
    ARMED = 1          # what comes of asking the set to tell of a number
    ALWAYS_READY = 2
    FULL = 3


cdef class Wait:
    """One greenlet's wait for one descriptor; or, where a subclass has a tell() of its own, whatever else is to be told.

    A new one each time: it is also what the greenlet is switched to with, and proves who has woken it.
    """

    def __dealloc__(self):
        if self.is_listed:
            delist(self)           # its loop was destroyed, and what waited has gone without a word

    cdef int tell(self) except -1:
        """In the hub: the descriptor may be ready."""
        cdef tuple args
        greenlet = self.greenlet       # leave() lets go of it meanwhile
        if greenlet is not None:
            args = (self,)
            coopos_switch(greenlet, <PyObject *>args, NULL)
        return 0

    def wake(self):
        """In the hub, from its queue: the descriptor is closed, or there is something else to see."""
        self.tell()

    def hear(self):
        """In the hub: the watcher of its own has told."""
        if self.watcher is not None:
            self.watcher.stop()
            self.tell()


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
    wait.is_listed = True
    _parked[fd] = <PyObject *>wait
    return 0


cdef bint delist(Wait wait) noexcept:
    """Whether it was there: not, if a fork has left it behind."""
    cdef PyObject **link
    if wait.is_listed:
        wait.is_listed = False
        link = &_parked[wait.fd]
        while link[0] != NULL:
            if link[0] == <PyObject *>wait:
                link[0] = wait.next
                return True
            link = &(<Wait>link[0]).next
    return False


cdef int set_ref(watcher, bint ref) except -1:
    """Say whether a watcher keeps its loop alive. libuv's io watchers are parts of one that does the counting."""
    getattr(watcher, "_watcher_ref", watcher).ref = ref
    return 0


# Where there is no epoll each wait has an io watcher, from arm to leave. What is written here is all that differs: no other
# function makes one, and a close of such a number waits for other threads to stop theirs.

# Numbers that libuv may just be showing in non-blocking mode, though they aren't.
cdef list _moments = []


cdef bint is_nonblocking(int fd) noexcept:
    """Whether *fd* is in non-blocking mode, now. What is not open isn't; the call itself says so."""
    cdef int flags = fcntl(fd, F_GETFL)
    return flags >= 0 and flags & O_NONBLOCK and not (_moments and (<object>fd) in _moments)


cdef int start_watcher(Wait wait, str call) except -1:
    """ARMED, or ALWAYS_READY."""
    cdef object loop = wait.set.loop
    cdef int flags = fcntl(wait.fd, F_GETFL)
    if flags < 0:
        raise os_error(errno, call, wait.fd)
    if is_always_ready(wait.fd):
        return ALWAYS_READY        # libev would say so; libuv refuses it
    if flags & O_NONBLOCK or not hasattr(loop, "_io_watchers"):
        wait.watcher = loop.io(wait.fd, wait.events)
    else:
        _moments.append(wait.fd)
        try:
            wait.watcher = loop.io(wait.fd, wait.events)
            # libuv has made the file non-blocking, for everybody who shares it.
            fcntl(wait.fd, F_SETFL, flags)
        finally:
            _moments.remove(wait.fd)
    wait.watcher.start(wait.hear)
    if not wait.is_held:
        set_ref(wait.watcher, False)   # libuv shares it with others who wait for the number: only for numbers of our own
    return ARMED


cdef int stop_watcher(Wait wait) except -1:
    watcher, wait.watcher = wait.watcher, None
    if is_alive(wait.set.loop):
        watcher.stop()
        watcher.close()
    return 0


@cython.final
@cython.internal
cdef class Ear:
    """What the loop calls for a set. The watcher keeps this one alive, and not the set, which goes with its thread."""
    cdef PyObject *set             # borrowed, or NULL

    def __call__(self):
        cdef Set here
        if self.set != NULL:
            here = <Set>self.set
            here.look()


@cython.final
@cython.no_gc_clear
cdef class Set:
    """What is waited for in one loop. Only that loop's thread uses it; other threads post."""

    def __cinit__(self, loop):
        self.loop = loop
        self.fd = -1
        self.born = generation
        self.posted = []

    def __dealloc__(self):
        global _latest_set
        if _latest_set == <PyObject *>self:
            _latest_set = NULL
        self.shut()
        free(self.ready)

    cdef int open(self) except -1:
        """At the first wait: a program that never waits has no descriptor more, and a forked child none that it might close. 0, or
        errno: there is no epoll, or no descriptor left for one.
        """
        cdef int fd
        cdef Ear ear
        if not _has_epoll:
            return ENOSYS
        ear = Ear()
        if self.ready == NULL:
            self.ready = <Event *>malloc(COOPOS_SET_BATCH * sizeof(Event))
            if self.ready == NULL:
                raise MemoryError
        fd = coopos_set_new()
        if fd < 0:
            return errno
        try:
            watcher = self.loop.io(fd, READ, ref=False)
            set_ref(watcher, False)
        except:
            c_close(fd)
            raise
        if self.fd >= 0:           # a signal's handler has waited meanwhile
            watcher.close()
            c_close(fd)
            return 0
        ear.set = <PyObject *>self
        self.fd, self.watcher, self.ear = fd, watcher, ear
        self.is_on = self.is_held = False
        return 0

    cdef int shut(self) noexcept:
        cdef int fd = self.fd
        watcher, self.watcher = self.watcher, None
        self.fd = -1
        self.at = self.n = 0
        if self.ear is not None:
            (<Ear>self.ear).set = NULL
        try:
            if watcher is not None and self.born == generation and is_alive(self.loop):
                watcher.stop()
                watcher.close()
        except:
            pass                   # the interpreter is being taken down
        if fd >= 0:
            c_close(fd)
        return 0

    cdef bint is_there(self, loop) except -1:
        """Whether it is this loop's, and the number is still the set's."""
        cdef Event event
        cdef int n
        if self.loop is not loop:
            return False
        n = coopos_set_ready(self.fd, &event, 1)
        if n == 1:
            self.arm_again(event.fd)
        return n >= 0

    cdef int end(self) noexcept:
        """Its thread has ended, or its loop was destroyed: nobody who waits here will ever run."""
        cdef PutOffClose later
        cdef PyObject **link
        cdef int fd
        self.is_over = True
        self.shut()
        self.hub = None
        if self.born == generation:
            for fd in range(_parked_size):
                link = &_parked[fd]
                while link[0] != NULL:
                    if (<Wait>link[0]).set is self:
                        link[0] = (<Wait>link[0]).next
                    else:
                        link = &(<Wait>link[0]).next
            for _, later in self.posted:
                if later is not None:
                    later.stopped()
        self.posted = []
        return 0

    cdef int settle(self, int members, int holds) except -1:
        """Have the watcher on exactly while there are members, and keep the loop alive exactly while some of them want that."""
        cdef int is_on = members > 0
        cdef int is_held = holds > 0
        if self.watcher is None or not is_alive(self.loop):
            return 0
        try:
            if self.is_on != is_on:
                self.is_on = UNKNOWN
                if is_on:
                    self.watcher.start(self.ear)
                else:
                    self.watcher.stop()
                self.is_on = is_on
            if is_on and self.is_held != is_held:
                self.is_held = UNKNOWN
                set_ref(self.watcher, is_held)
                self.is_held = is_held
        except:
            # libuv's watchers are Python, and a signal's handler has raised in the middle.
            self.loop.run_callback(self.settle_again)
            raise
        return 0

    def settle_again(self):
        self.settle(self.members, self.holds)

    cdef int hold(self, Wait wait, bint is_held) except -1:
        """Whether *wait*, a member, wants the loop kept alive."""
        if wait.is_held != is_held:
            wait.is_held = is_held
            self.holds += 1 if is_held else -1
            if wait.watcher is not None:
                if is_alive(self.loop):
                    set_ref(wait.watcher, is_held)
            elif not self.is_looking:
                self.settle(self.members, self.holds)
        return 0

    cdef bint enter(self, Wait wait, bint is_held, str call) except -1:
        """Begin to wait. False: that can't be waited for, and is always ready. Whatever is raised, leave() comes after it."""
        check_open(wait.fd, call)
        if wait.fd < 0:
            raise os_error(EBADF, call, wait.fd)
        cdef bint has_set = self.fd >= 0 or self.open() == 0
        if self.is_on != 1 or (is_held and self.is_held != 1):
            # May run a signal's handler: before anybody could wake us.
            self.settle(self.members + 1, self.holds + is_held)
        wait.set = self
        wait.is_held = is_held
        enlist(wait)
        self.members += 1
        self.holds += is_held
        cdef int rc = self.arm(wait.fd, call) if has_set else FULL
        if rc == FULL:
            rc = start_watcher(wait, call)
        return rc != ALWAYS_READY

    cdef int leave(self, Wait wait) except -1:
        """Wait no longer."""
        if wait.set is not self:
            return 0
        self.drop(wait)
        wait.greenlet = None
        wait.set = None
        if wait.queued is not None:
            wait.queued.stop()
            wait.queued = None
        return 0

    cdef int drop(self, Wait wait) except -1:
        """Not disarmed: what the set still tells finds nobody."""
        if delist(wait):
            self.members -= 1
            self.holds -= wait.is_held
            if not self.holds and not self.is_looking:
                self.settle(self.members, self.holds)
        if wait.watcher is not None:
            stop_watcher(wait)
        return 0

    cdef int events_of(self, int fd) noexcept:
        """What all who wait here for *fd* want."""
        cdef PyObject *link = _parked[fd] if fd < _parked_size else NULL
        cdef int events = 0
        while link != NULL:
            if (<Wait>link).set is self and (<Wait>link).watcher is None:
                events |= (<Wait>link).events
            link = (<Wait>link).next
        return events

    cdef int arm(self, int fd, str call) except -1:
        """Have the kernel tell once of *fd*."""
        cdef int err
        if coopos_set_arm(self.fd, fd, self.events_of(fd)) == 0:
            return ARMED
        err = errno
        if err == EPERM:
            return ALWAYS_READY
        if err == E2BIG:
            return FULL
        if err != EINVAL and (err != EBADF or fcntl(self.fd, F_GETFD) >= 0):
            raise os_error(err, call, fd)
        # Somebody has closed all descriptors, the set's too, and its number may be another file's by now.
        self.fd = -1
        self.shut()
        self.renew()
        return ARMED

    cdef int renew(self) except -1:
        """Have those who wait in a new set."""
        cdef int err = self.open()
        if err:
            raise os_error(err, "epoll_create1", "")
        self.settle(self.members, self.holds)
        self.arm_all()
        return 0

    cdef int arm_all(self) except -1:
        cdef int fd
        for fd in range(_parked_size):
            self.arm_again(fd)
        return 0

    cdef int arm_again(self, int fd) except -1:
        """Or, where that can't be, have those who wait ask the kernel, and hear why."""
        cdef PyObject *link
        cdef Wait wait
        cdef int events = self.events_of(fd)
        if not events or self.fd < 0 or coopos_set_arm(self.fd, fd, events) == 0:
            return 0
        link = _parked[fd]
        while link != NULL:
            wait = <Wait>link
            link = wait.next
            if wait.set is self and wait.queued is None:
                wait.queued = self.loop.run_callback(wait.wake)
        return 0

    cdef int look(self) except -1:
        """In the hub: there is something to tell."""
        cdef int at
        if self.born != generation:
            take_over(True)        # in the child of C code that runs no at-fork hooks
            return 0
        if self.at >= self.n:
            self.at = 0
            self.n = coopos_set_ready(self.fd, self.ready, COOPOS_SET_BATCH)
        self.is_looking = True
        try:
            while self.at < self.n:
                at = self.at
                self.at += 1
                self.tell(self.ready[at].fd, self.ready[at].events)
        except:
            # Of a greenlet that has died, or the hub's own end. Not to the loop: gevent stops an io watcher whose callback raises.
            self.loop.handle_error(self.watcher, *sys.exc_info())
        finally:
            self.is_looking = False
            self.n_direct = 0
            while self.at < self.n:    # they are told in the next turn
                self.arm_again(self.ready[self.at].fd)
                self.at += 1
            self.settle(self.members, self.holds)
        return 0

    cdef int tell(self, int fd, int events) except -1:
        cdef PyObject *link = _parked[fd] if fd < _parked_size else NULL
        cdef Wait wait
        cdef list woken
        cdef bint are_others = False
        if link == NULL:
            return 0
        wait = <Wait>link
        if wait.next == NULL and wait.set is self and wait.events & events:
            return wait.tell()
        woken = []
        while link != NULL:
            wait = <Wait>link
            link = wait.next
            if wait.set is self:
                if wait.events & events:
                    woken.append(wait)
                else:
                    are_others = True
        try:
            while woken:
                wait = <Wait>woken.pop()       # who has come first has waited longest
                if wait.set is self:
                    wait.tell()
        finally:
            if woken or are_others:
                self.arm_again(fd)
        return 0

    cdef Wait next_ready(self, object hub, object current):
        """One who waits here, and can be switched to at once, without a turn of the loop; or None.

        So many in a row, and for so long, that the loop's timers and callbacks are not kept waiting; and none while there are
        callbacks, of which one may be to kill it.
        """
        cdef Event event
        cdef PyObject *link
        cdef Wait wait
        cdef long long now
        if self.n_direct >= MAX_DIRECT or self.fd < 0 or hub.loop._callbacks or has_switch_out(current):
            return None
        now = coopos_now_us()
        if self.n_direct == 0:
            self.direct_since_us = now
        elif now - self.direct_since_us > MAX_DIRECT_US:
            return None
        if self.at < self.n:           # look() has got it, and is not there yet
            event = self.ready[self.at]
        elif coopos_set_ready(self.fd, &event, 1) != 1:
            return None
        self.n_direct += 1
        link = _parked[event.fd] if event.fd < _parked_size else NULL
        if link != NULL:
            wait = <Wait>link
            if wait.next == NULL and wait.set is self and wait.greenlet is not None and wait.events & event.events:
                self.at += self.at < self.n
                return wait
        # The hub's affair: several who wait for it, a child, news of a thread. Or it concerns nobody any more.
        if self.at >= self.n:
            self.arm_again(event.fd)
        return None

    def run_posted(self):
        """In the loop's thread: another thread has closed what is waited for here."""
        cdef Wait wait
        cdef PutOffClose later
        while self.posted:
            wait, later = self.posted.pop(0)
            evict_here(wait)
            if later is not None:
                later.stopped()


@cython.final
@cython.internal
@cython.no_gc_clear
cdef class Sets:
    """Those of one thread: {loop: Set}."""
    cdef dict by_loop

    def __cinit__(self):
        self.by_loop = {}

    def __dealloc__(self):
        cdef Set here
        for here in self.by_loop.values():
            here.end()


_here = _local()
# The Set that was used last, or NULL (borrowed: its thread owns it): nearly always the one that is wanted.
cdef PyObject *_latest_set = NULL


cdef dict sets_of_this_thread():
    cdef Sets sets = getattr(_here, "sets", None)
    if sets is None:
        sets = _here.sets = Sets()
    return sets.by_loop


cdef Set set_of_loop(object loop):
    """In the loop's thread."""
    cdef dict by_loop = sets_of_this_thread()
    cdef Set here = <Set>by_loop.get(loop)
    cdef Set other
    if here is None:
        for other in list(by_loop.values()):
            if not is_alive(other.loop):
                del by_loop[other.loop]
                other.end()
        here = by_loop[loop] = Set(loop)
    if here.born != generation:
        take_over(True)
    return here


cdef Set set_of(object hub):
    global _latest_set
    cdef Set here
    if _latest_set != NULL and (<Set>_latest_set).hub is hub and (<Set>_latest_set).born == generation:
        return <Set>_latest_set
    here = set_of_loop(hub.loop)
    here.hub = hub
    _latest_set = <PyObject *>here
    return here


cdef int take_over(bint keeps_greenlets) except -1:
    """In a forked child, once its loop is its own: sets that are not the parent's. Of those who waited only the greenlets of this
    thread still do, unless they are left behind.
    """
    cdef PyObject *link
    cdef PyObject *next
    cdef Set here
    cdef Wait wait
    cdef int fd
    cdef dict by_loop = sets_of_this_thread()
    for here in by_loop.values():
        here.born = generation
        here.shut()
        here.members = here.holds = 0
        here.posted = []
    # What isn't kept is not written to: that would copy the page it is on.
    for fd in range(_parked_size):
        link, _parked[fd] = _parked[fd], NULL
        while link != NULL:
            next = (<Wait>link).next
            if (<Wait>link).set is not None and (<Wait>link).set.born == generation:
                wait = <Wait>link
                if keeps_greenlets and wait.greenlet is not None:
                    enlist(wait)
                    wait.set.members += 1
                    wait.set.holds += wait.is_held
                elif wait.watcher is not None:
                    stop_watcher(wait)
            link = next
    for here in by_loop.values():
        if here.members and _has_epoll:
            here.renew()
    return 0


cdef object rest(Set here, Wait wait, object hub, object current, str call):
    """Wait until somebody wakes us, who says as whom: as *wait*, it has to be. None: it is always ready."""
    cdef Wait other
    if not here.enter(wait, True, call):
        return None
    other = here.next_ready(hub, current) if here.members > 1 else None
    if other is None:
        if not here.is_looking:
            here.n_direct = 0      # the loop has a whole turn
        return give_way(hub, current)
    if other is wait:
        return wait
    return switch_to(other.greenlet, (other,), current)


cdef bint has_hub_to_wait_in(bint may_stand) except -1:
    """False: a plain wait keeps nobody from anything. BlockingSwitchOutError: it would keep the hub, and that may not be."""
    if reachable_hub() is not None:
        return True
    if not may_stand and get_hub_if_exists() is not None:
        raise refusal()
    return False


cdef bint park(int fd, int events, str call, bint may_stand=True, long long us=NEVER) except -1:
    """Let the others run until *fd* may be ready, or so much time is over; raise EBADF as soon as it is closed by this module's
    close(). False, and at once: *fd* can't be waited for.

    Killed or timed out, the greenlet leaves nothing behind, and has moved no byte. In the hub it is a plain wait, as a signal
    handler's is in any program, or BlockingSwitchOutError, for what only a program that knows of greenlets calls.
    """
    cdef object hub = reachable_hub()
    cdef object current
    cdef object timer = None
    cdef Set here
    cdef Wait wait
    if hub is None:
        has_hub_to_wait_in(may_stand)
        return stand(fd, events, call)
    here = set_of(hub)
    wait = Wait.__new__(Wait)
    wait.fd, wait.events = fd, events
    wait.greenlet = current = coopos_current_greenlet()
    try:
        if us != NEVER:
            timer = hub.loop.timer(max(us, 1000) / 1e6)  # libuv warns of less
            timer.start(wait.wake)
        came_back = rest(here, wait, hub, current, call)
    finally:
        here.leave(wait)
        if timer is not None:
            timer.stop()
            timer.close()
    if came_back is None:
        return False
    if came_back is not wait:
        raise wrong_switch(came_back, f"fd {fd} in {call}")
    # Before anything is moved: what a signal's handler raises now costs no byte.
    PyErr_CheckSignals()
    if wait.error:
        raise os_error(wait.error, call, fd)
    return True


cdef int park_until_ready(int fd, int events, str call) except -1:
    """Park until *fd* is ready, which poll(2) says. What can't be waited for is always ready to it."""
    cdef pollfd request
    cdef int rc
    check_open(fd, call)
    request.fd = fd
    request.events = POLLIN if events == READ else POLLOUT
    while True:
        request.revents = 0
        rc = poll(&request, 1, 0)
        if rc > 0:
            return 0
        if rc == 0:
            if not park(fd, events, call):
                take_turns()
        elif errno == EINTR:
            # It says nothing of the descriptor: Linux gives it, while a signal is pending, even to a poll(2) that is not to wait.
            PyErr_CheckSignals()
        else:
            raise os_error(errno, call, fd)


def wait_until_ready(int fd, int events, str call):
    """For Python: park until *fd* is ready for READ or WRITE, unless it is."""
    park_until_ready(fd, events, call)


def wait_for_any(list wanted, str call, list closed=None):
    """For Python: park until something may have happened to one of the *wanted*, each (fd, READ or WRITE), which poll(2) then
    tells: it is ready, or was closed. Not where there is no hub to give way to.

    However the wait ends, it appends to *closed* the numbers that this module's close() closed meanwhile. poll(2) can't tell that:
    the number may be another file's by now.
    """
    cdef object hub = get_hub()
    cdef object current = coopos_current_greenlet()
    cdef Set here = set_of(hub)
    cdef list waits = []
    cdef Wait wait
    cdef bint may_wait = True
    try:
        for fd, events in wanted:
            wait = Wait.__new__(Wait)
            wait.fd, wait.events, wait.greenlet = fd, events, current
            waits.append(wait)
            may_wait = here.enter(wait, True, call) and may_wait
        if may_wait:
            came_back = give_way(hub, current)
            if came_back not in waits:
                raise wrong_switch(came_back, f"one of the descriptors {wanted} in {call}")
        else:
            take_turns()
    finally:
        for wait in waits:
            if wait.error and closed is not None:
                closed.append(wait.fd)
            here.leave(wait)


def awaited(int fd):
    """For Python: what greenlets of this thread are parked for on *fd*: READ, WRITE, both or 0."""
    cdef object hub = reachable_hub()
    cdef PyObject *link = _parked[fd] if hub is not None and 0 <= fd < _parked_size else NULL
    cdef int events = 0
    while link != NULL:
        if (<Wait>link).greenlet is not None and (<Wait>link).set.hub is hub:
            events |= (<Wait>link).events
        link = (<Wait>link).next
    return events


cdef int evict_here(Wait wait) except -1:
    """Tell a parked greenlet, in its loop's thread, that its descriptor is closed."""
    if wait.greenlet is not None:
        wait.set.drop(wait)
        if wait.queued is None:
            wait.queued = wait.set.loop.run_callback(wait.wake)
    return 0


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


cdef int take_turns(int fd=-1, str name="", double seconds=0) except -1:
    """Let the other greenlets that are ready run once, or for so long, for a call that is going to use *fd*. Without a hub it does
    nothing.
    """
    cdef object hub = reachable_hub()
    cdef Call call
    if hub is None:
        return 0
    cdef object current = coopos_current_greenlet()
    cdef object switch = current.switch
    call = Call.__new__(Call)
    call.fd, call.other = fd, -1
    call.enter(name)
    if seconds > 0:
        queued = hub.loop.timer(seconds)
        queued.start(switch, switch)
    else:
        queued = hub.loop.run_callback(switch, switch)
    try:
        came_back = give_way(hub, current)
        if came_back is not switch:
            raise wrong_switch(came_back, "its turn")
    finally:
        queued.stop()
        queued.close()
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

    cdef int wait_for_turn(self, object loop) except -1:
        """Have the loop that is asked to be a party, until it has polled once more and called whoever had something to hear."""
        self.is_polled = True
        # Without something to do the loop would sleep before that, for as long as nothing happens.
        idle = loop.idle()
        idle.start(bool)
        check = loop.check(priority=loop.MINPRI)
        check.start(self.after_polling, check, idle)
        return 0

    def after_polling(self, *watchers):
        for watcher in watchers:
            watcher.stop()
            watcher.close()
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
    gevent socket or selector) is active on *fd* is the system call put off to the next turn of that loop, which comes at once,
    because closing a descriptor under an active watcher can abort the process; and while a thread uses *fd* for a call that it has
    begun, until that is over. Without epoll, greenlets of other threads that wait for *fd* put it off in the same way. Even then
    *fd* is EBADF for whoever comes later. A call that no thread has begun yet is not made, and gets ``OSError(EBADF)``.

    Args:
        fd: int, the descriptor.

    Raises:
        OSError: EBADF if *fd* is not open, or is closed already and only waits for the loop, or is the set by which coopos
            waits; EIO as close(2).
        TypeError, OverflowError: *fd* is not an int, or too large for one.

    Doesn't switch greenlets. Safe in any thread and after a fork.

    Source: close(2); ``gevent.os.close``, which always puts the system call off.

    .. versionadded:: 0.1.0
    """
    close_fd(as_int(fd))


cdef bint may_be_pending(object loop, int fd) except -1:
    """Whether libev may be about to call a watcher of *fd* in this turn. gevent's closing_fd() tells of active watchers by making
    them pending, and of those that are pending already it does not tell: ev_feed_event in
    https://github.com/enki/libev/blob/master/ev.c. A watcher's number is in libev's own epoll.
    """
    if not loop.pendingcnt:
        return False
    epoll = loop.fileno()
    return epoll is None or coopos_set_has(epoll, fd)


cdef int close_fd(int fd) except -1:
    cdef PutOffClose later = None
    cdef int rc, err
    if fd < 0:
        raise os_error(EBADF, "close", fd)
    check_open(fd, "close")
    try:
        hub = get_hub_if_exists()
    except TypeError:
        hub = None                 # the interpreter is being taken down, and gevent's names with it
    loop = None if hub is None else hub.loop
    if fd < _parked_size and _parked[fd] != NULL:
        later = evict_all(fd)
    if _calls and (<object>fd) in _calls:
        if later is None:
            later = put_off(fd)
        tell_calls(fd, later.closing)
    if _latest_set != NULL and (<Set>_latest_set).fd == fd and (<Set>_latest_set).is_there(loop):
        # A program that closes a number twice has the set in its hands, without which the hub would wait for ever.
        raise os_error(EBADF, "close", fd)
    if loop is not None and (loop.closing_fd(fd) or may_be_pending(loop, fd)):
        if later is None:
            later = put_off(fd)
        later.wait_for_turn(loop)
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


cdef int evict(int fd, list greenlets) except -1:
    """Have those of *greenlets* that are parked on *fd* get EBADF, of any thread. The number stays open."""
    if 0 <= fd < _parked_size and _parked[fd] != NULL:
        evict_all(fd, greenlets)
    return 0


cdef PutOffClose evict_all(int fd, list greenlets=None):
    """Have all that are parked on *fd*, or those of *greenlets*, get EBADF; the close that others' watchers put off, or None."""
    cdef PyObject *link = _parked[fd]
    cdef PutOffClose later = None
    cdef Wait wait
    loop = None if get_hub_if_exists() is None else get_hub().loop
    while link != NULL:
        wait = <Wait>link
        link = wait.next
        if wait.greenlet is None or wait.error or wait.set.is_over or wait.set.born != generation:
            continue
        if greenlets is not None and wait.greenlet not in greenlets:
            continue
        wait.error = EBADF
        if wait.set.loop is loop:
            evict_here(wait)
        else:
            if wait.watcher is not None and greenlets is None:
                if later is None:
                    later = put_off(fd)
                coopos_closing_enter(later.closing)
            wait.set.posted.append((wait, later))
            if not post(wait.set.loop, wait.set.run_posted):
                wait.set.end()
    return later
