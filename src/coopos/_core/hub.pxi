# Giving way to the hub, and coming back.
#
# A greenlet that waits calls give_way() and comes back with the object that somebody switched to it with. It compares that object with
# the one it registered: another object means that foreign code has switched to it, and gets InvalidSwitchError.
#
# Where there is no hub to give way to (a thread that has none, the hub itself, the interpreter's end) reachable_hub() is None. Then a
# plain system call keeps no other greenlet from running.

# gevent.monkey, which may have come first, puts a greenlet's where we need a thread's.
_local, get_ident = get_original("_thread", ["_local", "get_ident"])


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


cdef object in_hub_error():
    return BlockingSwitchOutError("Impossible to call blocking function in the event loop callback")


cdef bint has_switch_out(object greenlet) except -1:
    kind = type(greenlet)
    if kind not in _has_switch_out:
        _has_switch_out[kind] = hasattr(kind, "switch_out")
    return _has_switch_out[kind]


cdef object give_way(object hub, object current):
    """Run the hub until it switches back; what it brings. gevent's ``hub.switch()``, less a look-up that nearly always fails."""
    if current is hub:
        raise in_hub_error()
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


# ---- other threads' loops ----------------------------------------------------------------------------------------------------

# Counts the forks since the module was loaded, in this line of descent: what is of an older generation was made by the parent.
cdef int generation = 0


cdef void count_generation() noexcept nogil:
    """Inside fork(2), in every child, also of C code that runs no at-fork hooks of the interpreter."""
    global generation
    generation += 1


if pthread_atfork(NULL, NULL, count_generation):
    raise MemoryError


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
