# How a forked child leaves its parent's greenlets behind.
#
# The child keeps the greenlet that forked and the hub. Every other greenlet is made to look finished, without being resumed or freed:
# a parked greenlet that is freed runs its `finally` blocks. Their frames, and what those refer to, stay as the fork found them.
#
# Two facts here are private to other projects: where a greenlet has its state (check_greenlet), and that the interpreter's lists of
# at-fork hooks are Python lists (put_first). Each is checked before it is relied on. If one is not as we think,
# ``keep_greenlets=False`` raises NotImplementedError, and everything else works.

# ---- what is private to others -----------------------------------------------------------------------------------------------

cdef bint _knows_greenlet = False
# Why no greenlet can be left behind, or None.
cdef object _leaving_error = None


def check_greenlet(kind):
    """Refuse keep_greenlets=False unless *kind*, greenlet's type, has the object structure of the greenlet.h we were compiled with.

    The type tells the offsets of all parts but one, a pointer. Whether that pointer makes a greenlet dead is tried on two new
    greenlets. https://github.com/python-greenlet/greenlet/blob/master/src/greenlet/greenlet.h
    """
    cdef PyGreenlet *a
    cdef PyGreenlet *b
    cdef bint is_state = False
    if (kind.__basicsize__, kind.__weakrefoffset__, kind.__dictoffset__) == (sizeof(PyGreenlet), WEAKREFS_OFFSET, DICT_OFFSET):
        ended, fresh = kind(int), kind(int)
        ended.switch()
        a, b = <PyGreenlet *>ended, <PyGreenlet *>fresh
        if a.pimpl != NULL and b.pimpl != NULL and a.pimpl != b.pimpl:
            a.pimpl, b.pimpl = b.pimpl, a.pimpl
            is_state = fresh.dead and not ended.dead
            a.pimpl, b.pimpl = b.pimpl, a.pimpl
    if not is_state:
        raise NotImplementedError(
            f"keep_greenlets=False: coopos doesn't know where greenlet {_greenlet_module.__version__} keeps a greenlet's state")


def put_first(*hooks):
    """Have the at-fork *hooks*, registered this moment, be the first in the interpreter's lists.

    In a child the first runs before all those that were registered earlier, which may use the hub; before a fork it runs last.
    There is no call for it, but the lists are objects like others: `before_forkers` and its like in
    https://github.com/python/cpython/blob/3.13/Modules/posixmodule.c. NotImplementedError, and nothing changed, if not each of the
    hooks is the last in exactly one list.
    """
    cdef list found = []
    cdef list lists
    referrers = [referrer for referrer in gc.get_referrers(*hooks) if type(referrer) is list]
    for hook in hooks:
        lists = [listed for listed in referrers if contains(listed, hook)]
        if len(lists) == 1 and lists[0][len(lists[0]) - 1] is hook:
            found.append(lists[0])
    if len(found) < len(hooks):
        raise NotImplementedError(
            f"keep_greenlets=False: this coopos doesn't find where Python {sys.version.split()[0]} keeps at-fork hooks")
    for listed in found:
        listed.insert(0, listed.pop())


cdef bint contains(list listed, hook) noexcept:
    for each in listed:
        if each is hook:
            return True
    return False


cdef int check_leaving() except -1:
    """Refuse what can't be done: a child without the parent's greenlets."""
    global _knows_greenlet
    if _leaving_error is not None:
        raise NotImplementedError(_leaving_error)
    if not _knows_greenlet:
        check_greenlet(greenlet)
        _knows_greenlet = True
    if get_hub_if_exists() is getcurrent():
        raise RuntimeError("keep_greenlets=False: there is no greenlet to keep in a callback of the hub")
    return 0


# ---- leaving the parent's greenlets behind -----------------------------------------------------------------------------------

def run_as_main(main):
    """What a greenlet of the child does that stands between the one that forked, *main*, and the parent's main greenlet.

    Where the hub reports to the program's main greenlet it reports to us: that the loop has nothing left to wait for, SystemExit.
    We tell *main*; with its end the process ends, as it does with that of a main greenlet.
    """
    go_on = main.switch
    args = ()
    while True:
        error = None
        try:
            go_on(*args)
        except BaseException as ex:
            error = ex
        if main.dead:
            break
        go_on, args = (main.switch, ()) if error is None else (main.throw, (error,))
    if isinstance(main, Greenlet):
        main.unlink_all()      # or it tells us once more, while the threads of the program are waited for
        was_told = error is None
        error = main.exception     # *error* is what came of telling it, if the child has destroyed its hub
        if was_told and error is not None and not isinstance(error, SystemExit):
            exit_process(1)
    exit_with(error)


cdef int exit_with(error) except -1:
    """End the process with what the main program has ended with."""
    if error is None:
        exit_process(0)
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        exit_process(1)
    code = error.code
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        exit_process(1)
    exit_process(0 if code is None else code & 0xff)


cdef int exit_process(int status) except -1:
    """End the process as after the main program, without going back to a frame of the parent's."""
    if get_ident() == _MAIN_THREAD_IDENT:
        Py_Exit(status)
    # The interpreter can't be taken down in a child that another thread has forked: CPython crashes.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass
    os._exit(status)


cdef enum:
    KEEP = 0       # the child goes on with the parent's greenlets
    LEAVE = 1      # with the one that forks alone
    EXEC = 2       # it is going to execute a program


@cython.final
@cython.internal
cdef class Leaving:
    """The parent's greenlets, from before the fork until the child's hub works without them."""
    cdef object current
    cdef object hub
    cdef object loop           # the thread's
    cdef object main           # the thread's
    cdef object dead           # a greenlet that has ended
    cdef list objects          # that were found. Where the collector sees who refers to them: greenlet asks it when a thread ends
    cdef bint was_frozen
    cdef coopos_search search

    def __cinit__(self):
        """In the parent, when the at-fork hooks have run: the thread may have had no hub before, or another."""
        check_leaving()
        self.current = getcurrent()
        self.main = self.current
        while self.main.parent is not None:
            self.main = self.main.parent
        self.dead = greenlet(int)
        self.dead.switch()
        self.hub = get_hub_if_exists()
        if self.hub is not None:
            self.dead.parent = self.hub
            self.loop = self.hub.loop
        else:
            self.loop = get_loop()         # of a hub that was destroyed; the next one has it again
        self.search.greenlet = <PyTypeObject *>greenlet
        self.search.waiter = <PyTypeObject *>Waiter
        self.search.hub_type = <PyTypeObject *>Hub
        self.search.current = <PyGreenlet *>self.current
        self.search.hub = <PyGreenlet *>self.hub if self.hub is not None else NULL
        self.search.dead = <PyGreenlet *>self.dead
        if self.main is not self.current:
            self.search.main = <PyObject *>self.main
        kind = config.loop if self.loop is None else type(self.loop)
        self.search.loop = <PyTypeObject *>kind
        if self.loop is not None and not hasattr(self.loop, "_keepaliveset"):
            kind = self.loop.WatcherType
            self.search.watcher = <PyTypeObject *>kind
        # What gc.freeze() has set aside the collector doesn't tell of: https://docs.python.org/3/library/gc.html#gc.freeze
        self.was_frozen = gc.get_freeze_count() > 0
        if self.was_frozen:
            gc.unfreeze()
        self.objects = []
        self.search.objects = <PyObject *>self.objects
        coopos_run_search(&self.search)

    cdef int clear_loops(self) except -1:
        """In the child, whose hub was re-initialised: nothing that the parent has asked a loop for happens here."""
        for each in self.objects:
            if isinstance(each, greenlet):
                continue
            if self.search.watcher != NULL and PyObject_TypeCheck(each, self.search.watcher):
                self.stop(each)
            elif self.search.loop != NULL and PyObject_TypeCheck(each, self.search.loop):
                if each is not self.loop:
                    close_loop(each)
            elif isinstance(each, Waiter):
                if each.greenlet is self.main:
                    each.clear()
            else:
                coopos_bind_to(<PyObject *>each, <PyObject *>self.dead)
        loop = self.loop
        if loop is None or not loop.ptr:
            return 0
        for callback in list(loop._callbacks):
            callback.stop()
        if hasattr(loop, "_keepaliveset"):
            own = {loop._threadsafe_async, *[watcher._async for watcher in loop._fork_watchers]}
            for watcher in loop._keepaliveset - own:
                self.stop(watcher)
        return 0

    cdef int stop(self, watcher) except -1:
        """Stop a watcher of this thread's loop, unless it is there to run in a forked child."""
        loop = self.loop
        if watcher.loop is not loop or type(watcher).__name__ == "fork":
            return 0
        for part in list(getattr(watcher, "_multiplex_watchers", ())):
            part.stop()
        if type(watcher).__name__ == "async_" and hasattr(loop, "_keepaliveset"):
            watcher.close()        # libuv's goes on telling of itself when it is stopped
        elif watcher.active or watcher.pending:
            watcher.stop()
        return 0

    cdef int replace_main(self) except -1:
        """In the child of a greenlet that is not its thread's main one: it takes that one's place."""
        if self.main is self.current:
            return 0
        stand_in = greenlet(run_as_main, self.main)
        stand_in.switch(self.current)
        if self.hub is not None:
            self.hub.parent = stand_in
        if isinstance(self.current, Greenlet):
            self.current.unlink_all()      # who wanted to know of its end is in the parent
            self.current.rawlink(lambda ended: stand_in.switch())      # its parent has to be the hub
        else:
            self.current.parent = stand_in
        return 0


cdef int close_loop(loop) except -1:
    """The loop of a thread that is not there: close its epoll descriptor, which holds others' files open.

    Not more. The thread may have been anywhere in its loop's code when it was forked away, and what it has left there isn't to be
    walked through. Once: a fork of the child doesn't find the loop again, whose number may be another file's by then.
    """
    if not loop.ptr:
        return 0
    fd = loop.fileno()
    coopos_keep_forever(<PyObject *>loop)
    if hasattr(loop, "_keepaliveset"):
        loop._ptr = None
    if fd is not None and fd >= 0:
        c_close(fd)
    return 0
