# Giving way to the hub, and coming back.
#
# A greenlet that waits registers an object, calls give_way(), and gets the object that it was switched to with. If that is another
# object, foreign code has switched to the greenlet, which raises InvalidSwitchError.
#
# reachable_hub() is None where there is no hub to give way to: in a thread without one, in the hub itself, at the interpreter's
# end. There a plain blocking system call keeps no other greenlet from running.

# The threads' own: gevent.monkey may have replaced them by ones for greenlets.
_local, get_ident = get_original("_thread", ["_local", "get_ident"])


# ---- giving way to the hub ---------------------------------------------------------------------------------------------------

coopos_import_greenlet()           # greenlet's C API


cdef object this_greenlet():
    try:
        return coopos_current_greenlet()
    except RuntimeError:
        return None                # the interpreter is finalizing and has no greenlets any more


# {type of greenlet: whether it has a switch_out()}. gevent's hub.switch() calls that of the greenlet that gives way:
# https://github.com/gevent/gevent/blob/master/src/gevent/_greenlet_primitives.py
cdef dict _has_switch_out = {}


cdef object in_hub_error():
    return BlockingSwitchOutError(
        "Impossible to call blocking function in the event loop callback: there, gevent.spawn() a greenlet that calls it")


cdef bint has_switch_out(object greenlet) except -1:
    kind = type(greenlet)
    if kind not in _has_switch_out:
        _has_switch_out[kind] = hasattr(kind, "switch_out")
    return _has_switch_out[kind]


# A note of ours (PEP 678) begins like this. An exception has one at most: of the wait that it ended last.
cdef str PLACE = "coopos: while in "


cdef int note_place(object ex, str call, object subject) noexcept:
    """Have an exception that ended a wait say which one. Some refuse, as a frozen dataclass does: they come out as they are.

    The attribute is what add_note() fills, which Python 3.10 doesn't have. A GreenletExit is shown to nobody.
    """
    cdef str text
    if call is None or issubclass(type(ex), GreenletExit):
        return 0
    try:
        if type(ex) is Thrown:
            [ex] = ex.args
        text = f"{PLACE}{call}({subject})"
        notes = getattr(ex, "__notes__", None)
        if notes is None:
            ex.__notes__ = [text]
        elif isinstance(notes, list):      # one object may be thrown into any number of greenlets
            notes[:] = [note for note in notes if not (isinstance(note, str) and note.startswith(PLACE))] + [text]
    except:
        pass
    return 0


cdef object give_way(object hub, object current, str call, long long number):
    """Run the hub until something switches back; returns the object that comes with the switch. *call* and *number*, a descriptor
    or a pid, or -1: what the greenlet waits in, for exceptions that are thrown into it.

    The same as gevent's ``hub.switch()``, without its look-up of switch_out(), which nearly always fails.
    """
    if current is hub:
        raise in_hub_error()
    coopos_forget_ready_calls()
    return switch_to(hub, None, current, call, number)


cdef object switch_to(object greenlet, tuple args, object current, str call, long long number):
    """Switch to *greenlet*, the hub unless there are *args*; returns the object that comes with the switch back."""
    try:
        if args is not None:
            return coopos_switch(greenlet, <PyObject *>args, NULL)
        if has_switch_out(current):
            return greenlet.switch()
        return coopos_switch(greenlet, NULL, NULL)
    except BaseException as ex:
        note_place(ex, call, "" if number < 0 else number)
        if issubclass(type(ex), Exception) and current in _outright and is_called_outright(current):
            raise Thrown(ex)
        raise


cdef object wrong_switch(object came_back, str what):
    return InvalidSwitchError(f"switched into {coopos_current_greenlet()!r} with {came_back!r}: it waits for {what}")


cdef object reachable_hub():
    """The hub that the caller can give way to, or None: in the hub itself (its callbacks, and signal handlers while it sleeps), in
    a thread that has no hub and so no other greenlets, and at the interpreter's end.
    """
    if get_hub_if_exists is None:  # the names of this module are gone
        return None
    cdef object hub = get_hub_if_exists()
    cdef object current = this_greenlet()
    return None if current is None or current is hub else hub


def can_give_way():
    """For Python: whether there is a hub to give way to. If not, a blocking call keeps no other greenlet from running."""
    return reachable_hub() is not None


# ---- what is thrown into a greenlet ------------------------------------------------------------------------------------------

# {greenlet: the frames that have called outright(), the innermost last}
cdef dict _outright = {}
# Packages whose `except` clauses mean errors of their own calls, and never an exception that was thrown into the greenlet.
cdef frozenset _own_packages = frozenset([
    "coopos", "contextlib", "io", "multiprocessing", "os", "selectors", "subprocess", "threading"])


cdef bint is_called_outright(object current) except -1:
    """Whether all frames from the innermost outright() down to this wait belong to us or to the stdlib.

    A program's own frame among them (an overriding method, a signal handler) may want to catch the exception itself.
    """
    cdef object caller = _outright[current][len(_outright[current]) - 1]
    cdef object frame = sys._getframe()
    while frame is not None and frame is not caller:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _own_packages:
            return False
        frame = frame.f_back
    return True


class Thrown(BaseException):
    """Carries an exception, thrown into a waiting greenlet, past all ``except`` clauses to the innermost outright()."""


def outright(function, *args, **kwargs):
    """Call ``function(*args, **kwargs)``. An exception that is thrown into the greenlet while it waits there comes out unchanged.

    A timeout may be of any class, OSError and ChildProcessError too. *function* and the stdlib code below it have ``except``
    clauses for such errors of their own calls, which must not catch the timeout. So it travels as a Thrown, and none catches it.
    """
    cdef object current = coopos_current_greenlet()
    cdef object frame = sys._getframe()
    cdef list frames = _outright.get(current)
    if frames is None:
        _outright[current] = frames = [frame]
    else:
        frames.append(frame)
    try:
        return function(*args, **kwargs)
    except Thrown as ex:
        [thrown] = ex.args
        for name, value in vars(ex).items():       # how much was read or written before it came
            setattr(thrown, name, value)
    finally:
        frames.pop()
        if not frames:
            del _outright[current]
    raise thrown


# ---- other threads' loops ----------------------------------------------------------------------------------------------------

# How many forks lie between the process that loaded the module and this one. An object whose *born* is less is the parent's.
cdef int generation = 0


cdef void count_generation() noexcept nogil:
    """Runs inside fork(2), in every child, also if C code forks and doesn't run the interpreter's at-fork hooks."""
    global generation
    generation += 1


if pthread_atfork(NULL, NULL, count_generation):
    raise MemoryError


cdef bint is_alive(object loop) noexcept:
    """Whether the loop still exists; gevent destroys it with its thread. Runs no Python code: a signal handler may raise there."""
    try:
        if not hasattr(loop, "_keepaliveset"):
            return bool(loop.ptr)
        pointer = loop._ptr        # libuv's `ptr` is a function
        return bool(pointer) and bool(getattr(pointer, "data", True))
    except MemoryError:
        return True                # a loop that exists has an address, and there was no memory for that number
    except Exception:
        return False


cdef int set_ref(watcher, bint ref) except -1:
    """Say whether a watcher keeps its loop alive. In gevent's libuv loop the io watchers of a descriptor share one handle, and only
    that one counts: _watcher_ref in https://github.com/gevent/gevent/blob/master/src/gevent/libuv/watcher.py.
    """
    getattr(watcher, "_watcher_ref", watcher).ref = ref
    return 0


# {loop: its Inbox}, of all threads
cdef dict _inboxes = {}


@cython.final
@cython.internal
cdef class Inbox:
    """Calls that other threads have left for the thread of *loop*.

    Behind an async watcher: its send() is all that libev and libuv let other threads do to a loop. gevent's
    run_callback_threadsafe() does more: it changes counts and lists that the loop may be using without the GIL.
    https://docs.libuv.org/en/v1.x/async.html, https://github.com/gevent/gevent/blob/26.9.0/src/gevent/_ffi/loop.py
    """
    cdef object loop
    cdef object watcher
    cdef object send               # the watcher's send(), in C, and its arguments
    cdef tuple send_args
    cdef list posted               # [(callback, args), ...]
    cdef int born                  # generation

    cdef int open(self, object loop) except -1:
        """In the thread of *loop*."""
        self.loop = loop
        self.posted = []
        self.born = generation
        self.watcher = loop.async_(ref=False)
        self.watcher.start(self.run_posted)
        if hasattr(loop, "_io_watchers"):
            # libuv's send() is Python code, in which signal handlers run. What they raised would leave calls unsent.
            self.send, self.send_args = loop._lib.uv_async_send, (self.watcher._watcher,)
        else:
            self.send, self.send_args = self.watcher.send, ()
        _inboxes[loop] = self
        return 0

    cdef int shut(self) noexcept:
        """In the thread of *loop*, which will run nothing more."""
        try:
            if _inboxes.get(self.loop) is self:
                del _inboxes[self.loop]
            if self.born == generation and is_alive(self.loop):
                self.watcher.stop()
                self.watcher.close()
        except:
            pass                   # the interpreter is finalizing
        return 0

    cdef int forget_parents_calls(self) except -1:
        if self.born != generation:
            self.born = generation
            self.posted = []
        return 0

    def run_posted(self):
        """In the hub."""
        self.forget_parents_calls()
        while self.posted:
            callback, args = self.posted.pop(0)
            try:
                callback(*args)
            except:
                self.loop.handle_error(None, *sys.exc_info())


cpdef bint post(object loop, object callback, tuple args=()) except -1:
    """Make *callback* run in the thread of *loop*. False: the loop is destroyed. No signal handler runs in between."""
    cdef Inbox inbox = _inboxes.get(loop)
    if not is_alive(loop):
        return False
    if inbox is not None:
        inbox.forget_parents_calls()
        inbox.posted.append((callback, args))
        inbox.send(*inbox.send_args)
        return True
    loop.run_callback_threadsafe(callback, *args)  # its hub is older than this module, and has not waited here yet
    return True
