# How a forked child leaves its parent's greenlets behind (``keep_greenlets=False``).
#
# The child keeps the greenlet that forked, and the hub. To leave the others behind means: in the child they look finished, but are
# neither resumed nor freed, since a parked greenlet that is freed runs its `finally` blocks. Their frames are never freed either.
#
# Two facts here are private to other projects: where a greenlet has its state (check_greenlet), and that CPython keeps at-fork
# hooks in Python lists (put_first). Both are checked before use. If a check fails, only ``keep_greenlets=False`` doesn't work: it
# raises NotImplementedError.

# ---- what is private to others -----------------------------------------------------------------------------------------------

cdef bint _knows_greenlet = False
# The message of the NotImplementedError if put_first() has failed; else None.
cdef object _leaving_error = None


def check_greenlet(kind):
    """Raise NotImplementedError unless *kind*, greenlet's type, has the object structure of the greenlet.h we were compiled with.

    The type has the offsets of all fields but one, the pointer to the state. So we swap that pointer of two new greenlets, and look
    which of them is dead. https://github.com/python-greenlet/greenlet/blob/master/src/greenlet/greenlet.h
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
    """Move the at-fork *hooks*, which were just registered, to the front of the interpreter's lists.

    In a child our hook then runs before all others, which may use the hub. Before a fork it runs last. No API does that, but the
    lists are Python lists, which the garbage collector can find: `before_forkers`, `after_forkers_child` and
    `after_forkers_parent` in https://github.com/python/cpython/blob/3.13/Modules/posixmodule.c. If one of the hooks is not the last
    in exactly one list, NotImplementedError is raised and nothing has changed.
    """
    cdef list found = []
    cdef list lists
    cdef bint was_frozen = unfreeze()
    referrers = [referrer for referrer in gc.get_referrers(*hooks) if type(referrer) is list]
    if was_frozen:
        gc.freeze()
    for hook in hooks:
        lists = [listed for listed in referrers if contains(listed, hook)]
        if len(lists) == 1 and lists[0][len(lists[0]) - 1] is hook:
            found.append(lists[0])
    if len(found) < len(hooks):
        raise NotImplementedError(
            f"keep_greenlets=False: this coopos doesn't find where Python {sys.version.split()[0]} keeps at-fork hooks")
    for listed in found:
        listed.insert(0, listed.pop())


cdef bint unfreeze() except -1:
    """Undo gc.freeze(): the collector doesn't visit what that has set aside. Whether there was anything.
    https://docs.python.org/3/library/gc.html#gc.freeze
    """
    if gc.get_freeze_count() == 0:
        return False
    gc.unfreeze()
    return True


cdef bint contains(list listed, hook) noexcept:
    for each in listed:
        if each is hook:
            return True
    return False


cdef int check_leaving() except -1:
    """Raise if a child can't leave the parent's greenlets behind."""
    global _knows_greenlet
    if _leaving_error is not None:
        raise NotImplementedError(_leaving_error)
    if not _knows_greenlet:
        check_greenlet(greenlet)
        _knows_greenlet = True
    if get_hub_if_exists() is getcurrent():
        raise RuntimeError(
            "keep_greenlets=False: a callback of the hub is no greenlet, which the child could keep; "
            "there, gevent.spawn() a greenlet that forks")
    return 0


# ---- leaving the parent's greenlets behind -----------------------------------------------------------------------------------

def run_as_main(main):
    """Run in the child as the hub's parent, in place of the parent process's main greenlet, which is left behind.

    *main* is the greenlet that forked. The hub reports to its parent: LoopExit, SystemExit. We pass these on to *main*. When *main*
    ends the process ends, as with any main greenlet.
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
        main.unlink_all()      # else its link would switch to us again, while Py_Exit() joins the threads
        is_reported = error is None
        error = main.exception     # *error* may be another one, if the child has destroyed its hub
        if is_reported and error is not None and not isinstance(error, SystemExit):
            exit_process(1)
    exit_with(error)


cdef int exit_with(error) except -1:
    """End the process as the main program would if it ended with *error*, or with None."""
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
    """End the process as after the main program, without returning to a frame of the parent."""
    if get_ident() == _MAIN_THREAD_IDENT:
        Py_Exit(status)
    # CPython crashes in Py_Exit() in a child that a non-main thread forked. So do the most important steps of it here.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass
    os._exit(status)


cdef enum:
    KEEP = 0       # the child goes on with the parent's greenlets
    LEAVE = 1      # it goes on with the greenlet that forks, and leaves the others behind
    EXEC = 2       # it is going to exec a program


@cython.final
@cython.internal
cdef class Leaving:
    """The greenlets and watchers to leave behind: found before the fork, kept until the child's hub works without them."""
    cdef object current
    cdef object hub
    cdef object loop           # of this thread
    cdef object main           # the main greenlet of this thread
    cdef object dead           # a greenlet that has ended
    # The objects found. In a list, so that gc.get_referrers() finds their references. greenlet counts these when a thread ends:
    # https://github.com/python-greenlet/greenlet/blob/master/src/greenlet/TThreadState.hpp
    cdef list objects
    cdef bint was_frozen       # gc.freeze() was in effect
    cdef coopos_search search

    def __cinit__(self):
        """In the parent, after all other at-fork hooks, which may give the thread a hub or another one."""
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
            self.loop = get_loop()         # a destroyed hub left it; the thread's next hub will use it again
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
        self.was_frozen = unfreeze()
        self.objects = []
        self.search.objects = <PyObject *>self.objects
        coopos_run_search(&self.search)

    cdef int clear_loops(self) except -1:
        """In the child, after reinit(): stop the watchers and callbacks of the parent, and close the loops of other threads."""
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
        cdef Inbox inbox = _inboxes.get(loop)
        if watcher.loop is not loop or type(watcher).__name__ == "fork" or (inbox is not None and watcher is inbox.watcher):
            return 0
        for part in list(getattr(watcher, "_multiplex_watchers", ())):
            part.stop()
        if not hasattr(loop, "_keepaliveset"):
            if watcher.active or watcher.pending:
                watcher.stop()
        elif type(watcher).__name__ == "async_":
            watcher.close()        # libuv can't stop a uv_async_t: https://docs.libuv.org/en/v1.x/async.html
        else:
            # Active or not: gevent may have queued the callback of a timer, which is not active any more:
            # https://github.com/gevent/gevent/blob/26.9.0/src/gevent/libuv/loop.py (__run_queued_callbacks)
            watcher.stop()
            # Never freed: libuv's lists and gevent's queue go on pointing to its memory. Not closed: the child may use it.
            Py_INCREF(watcher)
        return 0

    cdef int replace_main(self) except -1:
        """In the child: if a greenlet other than the main one forked, make it the one that the process ends with."""
        if self.main is self.current:
            return 0
        stand_in = greenlet(run_as_main, self.main)
        stand_in.switch(self.current)
        if self.hub is not None:
            self.hub.parent = stand_in
        if isinstance(self.current, Greenlet):
            self.current.unlink_all()      # its links belong to the parent process
            self.current.rawlink(lambda ended: stand_in.switch())      # by a link, since a Greenlet's parent must be the hub
        else:
            self.current.parent = stand_in
        return 0


cdef int close_loop(loop) except -1:
    """In the child: close the epoll descriptor of another thread's loop, since an epoll set keeps the files in it open.

    Nothing else is safe: that thread may have been in the middle of changing its loop when the fork came. The loop is untracked, so
    that a fork of the child doesn't find it and close the number again, which may be another file by then.
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
