"""Children that may have to be waited for, and fork.

The kernel keeps the books. Nothing here installs a signal handler, asks for a child it was not asked about, or polls. Three rules
hold throughout:

1. Whoever waits is registered before anything that could wake it is started, and leaves by a `finally`.
2. An object of a loop (watcher, member of an exit set) is touched only by that loop's own thread; other threads post a callback.
3. In a forked child every object made before the fork belongs to the parent: `generation` tells, and its descriptors and threads
   are left alone.

From the bottom up: a Question is put to waitid(2) by a thread; an ExitSet holds the pidfds that one loop waits for; a Watch is one
child in one loop, by either; a Child is the record of one child, with a Watch in each loop that waits. The module knows libc,
`_core`, `gevent.hub` and the loop's watchers, and nothing else of coopos or gevent.
"""

cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport ECHILD, EINTR, EINVAL, ESRCH, errno
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset, strerror
from posix.types cimport id_t, pid_t
from posix.unistd cimport close as c_close, fork as c_fork, getpgid, getpgrp

from coopos._core cimport READ, as_int, generation, give_way, is_alive, os_error, post, wrong_switch
from coopos._posix cimport (
    COOPOS_SET_BATCH, COOPOS_WAIT_OPTIONS, HAVE_PIDFD, P_ALL, P_PGID, P_PID, PTHREAD_CANCEL_DISABLE, PyOS_AfterFork_Child,
    PyOS_AfterFork_Parent, PyOS_BeforeFork, PySys_Audit, Py_IsInitialized, WEXITED, WIFEXITED, WIFSIGNALED, WNOHANG, WNOWAIT,
    WSTOPPED, WUNTRACED, coopos_close_run, coopos_collect_pidfd, coopos_pidfd_open, coopos_pidfd_reaped_status,
    coopos_set_add, coopos_set_new, coopos_set_ready, coopos_set_rearm, coopos_thread_start, forkpty as c_forkpty, idtype_t,
    pthread_cancel, pthread_join, pthread_setcancelstate, pthread_t, rusage, siginfo_t, wait4, waitid)

import os
import sys

from gevent.hub import _get_hub as get_hub_if_exists, _get_hub_noargs as get_hub
from greenlet import getcurrent


# ---- asking the kernel from a thread -----------------------------------------------------------------------------------------

# COOPOS_CHILDREN=thread: never use pidfds, as on a system that has none.
cdef bint _use_pidfds = HAVE_PIDFD and os.environ.get("COOPOS_CHILDREN") != "thread"


cdef struct Asker:
    idtype_t idtype
    id_t id
    int options
    PyObject *question     # owned by whoever joins the thread
    pthread_t thread


cdef void *ask_kernel(void *arg) noexcept nogil:
    """A waiter thread: looks (WNOWAIT), never collects. Until the answer is there it is no Python thread."""
    cdef Asker *asker = <Asker *>arg
    cdef siginfo_t info
    cdef int before
    while waitid(asker.idtype, asker.id, &info, asker.options) < 0 and errno == EINTR:
        pass
    # Only waitid is to be cancelled, never the interpreter.
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before)
    if not Py_IsInitialized():
        return NULL            # the process outlives the interpreter for a moment, and this thread with it
    with gil:
        (<Question>asker.question).answer()
    return NULL


@cython.final
@cython.internal
cdef class Question:
    """One question to waitid(2) about children, asked by one thread for all who wait for the answer.

    The answer is only "look again": it goes to the async watcher of each who asked, in its own loop.
    """
    cdef tuple key                 # (idtype, id, options)
    cdef Asker *asker
    cdef list watchers             # started async watchers, one for each who asked
    cdef bint is_answered
    cdef int born                  # generation

    def __cinit__(self, tuple key):
        self.key = key
        self.watchers = []
        self.born = generation

    cdef int start(self) except -1:
        cdef int err
        cdef Asker *asker = <Asker *>malloc(sizeof(Asker))
        if asker == NULL:
            raise MemoryError
        asker.idtype, asker.id, asker.options = self.key
        asker.options |= WNOWAIT
        asker.question = <PyObject *>self
        err = coopos_thread_start(&asker.thread, ask_kernel, asker)
        if err:
            free(asker)
            raise os_error(err, "pthread_create", self.key)
        Py_INCREF(self)
        self.asker = asker
        return 0

    cdef int answer(self) noexcept:
        """In the waiter thread, with the GIL."""
        self.is_answered = True
        if _questions.get(self.key) is self:
            del _questions[self.key]
        for watcher in list(self.watchers):
            try:
                watcher.send()
            except Exception:
                pass           # closed, or its loop destroyed, while we were at the others: nobody waits there
        return 0

    cdef int leave(self, watcher) except -1:
        """The owner of *watcher* waits no longer; the last to leave ends the thread."""
        cdef Asker *asker
        if is_alive(watcher.loop):
            watcher.stop()
            watcher.close()
        if watcher in self.watchers:
            self.watchers.remove(watcher)
        if self.watchers or self.asker == NULL or self.born != generation:
            return 0
        asker = self.asker
        self.asker = NULL
        if _questions.get(self.key) is self:
            del _questions[self.key]
        with nogil:
            if not self.is_answered:
                pthread_cancel(asker.thread)
            pthread_join(asker.thread, NULL)
        free(asker)
        Py_DECREF(self)
        return 0


# {(idtype, id, options): the Question that is being asked}
cdef dict _questions = {}


cdef Question ask(idtype_t idtype, id_t id, int options, watcher):
    """Have *watcher*, a started async watcher, sent when the kernel has news; the same question is asked once."""
    cdef tuple key = (idtype, id, options)
    cdef Question question = <Question>_questions.get(key)
    if question is None:
        question = Question(key)
        question.watchers.append(watcher)
        question.start()
        if not question.is_answered:
            _questions[key] = question
    else:
        question.watchers.append(watcher)
    return question


# ---- pidfds in a loop --------------------------------------------------------------------------------------------------------

# By descriptor, 1 where it is a pidfd of ours. In C and not in the members' dicts, because a forked child goes through it:
# counting references to thousands of ints would copy the pages they are on.
cdef unsigned char *_is_pidfd = NULL
cdef int _is_pidfd_size = 0


cdef int open_pidfd(int pid) except -2:
    """A pidfd, or -1 with errno."""
    global _is_pidfd, _is_pidfd_size
    cdef unsigned char *table
    cdef int size
    cdef int fd = coopos_pidfd_open(pid)
    if fd >= _is_pidfd_size:
        size = max(2 * fd, 256)
        table = <unsigned char *>realloc(_is_pidfd, size)
        if table == NULL:
            c_close(fd)
            raise MemoryError
        memset(table + _is_pidfd_size, 0, size - _is_pidfd_size)
        _is_pidfd, _is_pidfd_size = table, size
    if fd >= 0:
        _is_pidfd[fd] = 1
    return fd


cdef int close_pidfd(int fd) noexcept:
    _is_pidfd[fd] = 0
    return c_close(fd)


cdef int close_all_pidfds() noexcept:
    """Run by run: thousands of close(2) take milliseconds."""
    cdef int first
    cdef int fd = 0
    while fd < _is_pidfd_size:
        first = fd
        while fd < _is_pidfd_size and _is_pidfd[fd]:
            _is_pidfd[fd] = 0
            fd += 1
        if fd > first:
            coopos_close_run(first, fd - 1)
        fd += 1
    return 0


cdef int set_ref(watcher, bint ref) except -1:
    """Say whether an active watcher keeps its loop alive. libuv's io watchers are parts of one that does the counting."""
    getattr(watcher, "_watcher_ref", watcher).ref = ref
    return 0


@cython.final
@cython.internal
cdef class ExitSet:
    """The pidfds that one loop waits for, behind one descriptor and one io watcher of that loop.

    One watcher for all: a forked child has one to stop, however many children live, and libev is told of none of them.
    """
    cdef object loop
    cdef object watcher
    cdef dict members      # {pidfd: Watch}
    cdef int fd
    cdef int holds         # members that want the loop kept alive
    cdef int born                  # generation

    def __cinit__(self, loop):
        self.loop = loop
        self.members = {}
        self.born = generation
        self.fd = coopos_set_new()
        if self.fd < 0:
            raise os_error(errno, "epoll_create1", "")
        try:
            self.watcher = loop.io(self.fd, READ, ref=False)
            self.watcher.start(self.look)
            set_ref(self.watcher, False)
        except:
            c_close(self.fd)
            raise

    cdef int add(self, int pidfd, Watch watch) except -1:
        if coopos_set_add(self.fd, pidfd) < 0:
            raise os_error(errno, "epoll_ctl", pidfd)
        self.members[pidfd] = watch
        return 0

    cdef int remove(self, int pidfd) except -1:
        """Forget a member that is about to be closed, and with the last one the set.

        Closing takes it out of the kernel's set, unless another process has a copy; then it may tell once more, of a number that
        is not a member any more or is another one's, who finds his child alive.
        """
        self.members.pop(pidfd, None)
        if not self.members:
            if _exit_sets.get(self.loop) is self:
                del _exit_sets[self.loop]
            self.shut()
        return 0

    cdef int shut(self) except -1:
        if self.fd >= 0:
            if is_alive(self.loop):
                self.watcher.stop()
                self.watcher.close()
            c_close(self.fd)
            self.fd = -1
        return 0

    cdef int hold(self, int change) except -1:
        cdef bint before = self.holds > 0
        self.holds += change
        if before != (self.holds > 0) and self.fd >= 0 and is_alive(self.loop):
            set_ref(self.watcher, self.holds > 0)
        return 0

    def look(self):
        """In the hub: some members' processes have ended."""
        cdef int fds[COOPOS_SET_BATCH]
        cdef int i, n
        cdef Watch watch
        if self.born != generation:
            self.shut()        # in the child of a plain fork, whose hub was re-initialised by hand
            return
        n = coopos_set_ready(self.fd, fds)
        for i in range(n):
            # Gone, if what ran for an earlier one has dealt with it.
            watch = <Watch>self.members.get(fds[i])
            if watch is not None:
                watch.fire()
                if watch.pidfd >= 0:
                    coopos_set_rearm(self.fd, watch.pidfd)
        # Once for all of them, as one SIGCHLD stands for several.
        call_hook(self.loop)


# {loop: its ExitSet}, while it has members
cdef dict _exit_sets = {}


cdef ExitSet exit_set_of(loop):
    cdef ExitSet exits = <ExitSet>_exit_sets.get(loop)
    if exits is None:
        exits = ExitSet(loop)
        _exit_sets[loop] = exits
    return exits


@cython.final
@cython.internal
cdef class Watch:
    """A child's exit, as one loop waits for it: a pidfd in the loop's ExitSet, or a thread's Question where there is none."""
    cdef Child child
    cdef object loop
    cdef ExitSet exits
    cdef Question question
    cdef object news           # the async watcher that the question sends
    cdef list waiters          # [(switch, token), ...] of greenlets parked here
    cdef int pidfd
    cdef int holds
    cdef int born                  # generation
    cdef bint is_closed

    def __cinit__(self, Child child, loop):
        self.child = child
        self.loop = loop
        self.waiters = []
        self.pidfd = -1
        self.born = generation

    cdef int start(self) except -1:
        """Begin to watch. ESRCH if there is no such process any more."""
        cdef int err
        if _use_pidfds:
            self.pidfd = open_pidfd(self.child.pid)
            err = errno
            if self.pidfd >= 0:
                try:
                    self.exits = exit_set_of(self.loop)
                    self.exits.add(self.pidfd, self)
                    self.child.told_by = "pidfd"
                    return 0
                except BaseException as ex:
                    self.drop_pidfd()
                    if not isinstance(ex, OSError):
                        raise
                    # Out of descriptors for the set: a thread needs none.
                    err = ex.errno
            if err == ESRCH:
                raise os_error(err, "pidfd_open", self.child.pid)
        self.ask_thread()
        self.child.told_by = "thread"
        return 0

    def start_there(self, bint ref):
        """In the loop's thread, for a child that another one has forked."""
        if self.child.state == ALIVE:
            self.start_or_lose(ref)
        else:
            self.finish()

    cdef int start_or_lose(self, bint ref) except -1:
        """Begin to watch our own child. If it is there no more, somebody else has collected it, or, because SIGCHLD is ignored, the
        kernel.
        """
        try:
            self.start()
        except OSError as ex:
            if ex.errno != ESRCH:
                raise
            self.child.lose()
        else:
            if ref:
                self.hold(1)
        return 0

    cdef int drop_pidfd(self) except -1:
        cdef int pidfd = self.pidfd
        cdef ExitSet exits = self.exits
        self.pidfd = -1
        self.exits = None
        if pidfd >= 0 and self.born == generation:
            if exits is not None:
                if self.holds:
                    exits.hold(-1)
                exits.remove(pidfd)
            close_pidfd(pidfd)
        return 0

    cdef int hold(self, int change) except -1:
        """Count who wants the loop kept alive until the child has ended."""
        cdef bint before = self.holds > 0
        self.holds += change
        if before != (self.holds > 0) and self.born == generation:
            if self.exits is not None:
                self.exits.hold(change)
            elif self.news is not None and is_alive(self.loop):
                self.news.ref = self.holds > 0
        return 0

    cdef int shut(self) except -1:
        """Watch no longer. In the loop's thread, unless the loop is gone."""
        if not self.is_closed:
            self.is_closed = True
            self.drop_pidfd()
            self.leave_thread()
        return 0

    cdef int ask_thread(self) except -1:
        """Have a thread look for us: at first, or again where its look has come to nothing."""
        if self.question is not None:
            if not self.question.is_answered:
                return 0
            self.leave_thread()
        self.news = self.loop.async_(ref=self.holds > 0)
        self.news.start(self.fire_from_thread)
        try:
            self.question = ask(P_PID, self.child.pid, WEXITED, self.news)
        except:
            self.news.stop()
            self.news.close()
            raise
        return 0

    cdef int leave_thread(self) except -1:
        cdef Question question = self.question
        news = self.news
        self.question = self.news = None
        if question is not None and self.born == generation:
            question.leave(news)
        return 0

    def fire_from_thread(self):
        self.fire()
        call_hook(self.loop)

    cdef int fire(self) except -1:
        """In the hub: the child has ended, or is said to have."""
        if self.born != generation:
            return 0
        # Whoever waits here claims the status within this call; without them it is not ours unless we were told to watch.
        if self.child.is_watched or self.waiters:
            self.child.collect()
        if self.child.state != ALIVE:
            self.shut()
            self.tell_all()
        elif self.pidfd < 0:
            self.ask_thread()
        return 0

    def finish(self):
        """In the loop's thread: the status became known without the loop. End the watch; the hub tells whom it concerns."""
        if not self.is_closed:
            self.shut()
            if self.waiters or self.child.callback is not None:
                self.loop.run_callback(self.tell_all_from_queue)
            elif self.child.home is self:
                call_hook_soon(self.loop)

    def tell_all_from_queue(self):
        self.tell_all()
        call_hook(self.loop)

    cdef int tell_all(self) except -1:
        """In the hub: tell the callback, then wake those who wait."""
        if self.child.home is self:
            self.child.tell()
        while self.waiters:
            switch, token = self.waiters.pop(0)
            try:
                switch(token)
            except:
                self.loop.handle_error(switch, *sys.exc_info())
        return 0

    cdef int wait(self) except -1:
        """Park until the child may have ended."""
        cdef object token = object()
        cdef object current = getcurrent()
        cdef tuple entry = (current.switch, token)
        if self.pidfd < 0:
            self.ask_thread()
        self.waiters.append(entry)
        self.hold(1)
        try:
            came_back = give_way(get_hub(), current)
            if came_back is not token:
                raise wrong_switch(came_back, f"child {self.child.pid}")
        finally:
            self.hold(-1)
            if entry in self.waiters:
                self.waiters.remove(entry)
            if not self.waiters and self.child.home is not self:
                self.shut()
                self.child.forget(self)
        return 0


# ---- the records -------------------------------------------------------------------------------------------------------------

cdef enum:
    ALIVE = 0      # as far as anybody has asked
    ENDED = 1      # collected here; the status waits for someone to claim it
    CLAIMED = 2    # somebody has got it
    LOST = 3       # somebody else has collected it, and the kernel doesn't tell


cdef object _child_hook = None


def set_child_hook(hook):
    """Have *hook* called, in the hub and without arguments, when watched children have ended: once for all that one look found."""
    global _child_hook
    _child_hook = hook


# Whether a watched child has ended since the hook was called, and the loop callback that will call it.
cdef bint _hook_is_due = False
cdef object _hook_queued = None
cdef object _hook_loop = None


cdef int call_hook(loop) except -1:
    """In the hub."""
    global _hook_is_due
    if _hook_is_due:
        _hook_is_due = False
        if _child_hook is not None:
            try:
                _child_hook()
            except:
                loop.handle_error(_child_hook, *sys.exc_info())
    return 0


cdef int call_hook_soon(loop) except -1:
    global _hook_queued, _hook_loop
    if _hook_is_due and (_hook_loop is not loop or not _hook_queued.pending):
        _hook_loop = loop
        _hook_queued = loop.run_callback(run_queued_hook, loop)
    return 0


def run_queued_hook(loop):
    call_hook(loop)


@cython.final
cdef class Child:
    """A child process that somebody here watches or waits for; what a ``fork_and_watch`` callback is given.

    Has the attributes of gevent's child watchers: pid, rpid, rstatus, loop, ref, callback, and stop() and close(), which have
    nothing left to do once the callback is called.
    """
    cdef readonly int pid
    cdef readonly object callback
    cdef str told_by
    cdef int status                # wait(2)'s form; valid in states ENDED and CLAIMED
    cdef rusage usage
    cdef int group                 # the process group it died in
    cdef int state
    cdef bint is_watched           # collected as soon as it ends, and the status kept until claimed
    cdef bint is_told
    cdef Watch home                # where the callback runs, in a watched child
    cdef list watches              # in each loop that waits for it

    def __cinit__(self, int pid):
        self.pid = pid
        self.watches = []

    @property
    def rpid(self):
        return self.pid if self.state != ALIVE else 0

    @property
    def rstatus(self):
        if self.state == LOST:
            raise lost_child(self.pid)
        return self.status

    @property
    def loop(self):
        return None if self.home is None else self.home.loop

    @property
    def ref(self):
        return self.home is not None and self.home.holds > 0

    @property
    def mechanism(self):
        """What tells that the child has ended: ``"pidfd"`` or ``"thread"``."""
        return self.told_by

    @property
    def active(self):
        return self.state == ALIVE

    @property
    def pending(self):
        return self.state != ALIVE and not self.is_told

    def stop(self):
        """Do nothing: a watched child is collected whether or not its callback is wanted."""

    def close(self):
        """Do nothing: see :meth:`stop`."""

    def claim_status(self):
        """Take the status, if it is there and nobody has: who waits for the child from now on gets ChildProcessError."""
        if self.state == ENDED:
            self.claim()

    def __repr__(self):
        state = ("alive", "ended", "waited for", "lost")[self.state]
        return f"<coopos child {self.pid} {state} status={self.status}>"

    cdef Watch watch_in(self, loop):
        """This child's watch in *loop*; ESRCH if there is no such process any more."""
        cdef Watch watch
        for watch in self.watches:
            if watch.loop is loop and not watch.is_closed:
                return watch
        watch = Watch(self, loop)
        watch.start()
        self.watches.append(watch)
        return watch

    cdef int forget(self, Watch watch) except -1:
        if watch in self.watches:
            self.watches.remove(watch)
        if not self.watches and not self.is_watched and _children.get(self.pid) is self:
            del _children[self.pid]
        return 0

    cdef int collect(self) except -1:
        """Ask the kernel for the status, without waiting."""
        cdef int pidfd = -1
        cdef pid_t rpid
        cdef Watch watch
        if self.state != ALIVE:
            return 0
        for watch in self.watches:
            if watch.pidfd >= 0 and watch.born == generation:
                pidfd = watch.pidfd
        # A zombie still has its group, a collected child hasn't: ask before.
        self.group = getpgid(self.pid)
        rpid = -1
        if pidfd >= 0:
            # By pidfd, since the pid may be another process by now.
            rpid = coopos_collect_pidfd(pidfd, &self.status, &self.usage)
        if pidfd < 0 or (rpid < 0 and errno == EINVAL):
            rpid = wait4(self.pid, &self.status, WNOHANG, &self.usage)
        if rpid > 0:
            self.ended()
        elif rpid < 0:
            if pidfd >= 0 and coopos_pidfd_reaped_status(pidfd, &self.status) == 0:
                self.ended()
            else:
                self.lose()
        return 0

    cdef int ended(self) except -1:
        global _hook_is_due
        self.state = ENDED
        if self.is_watched:
            _hook_is_due = True
        if self.is_watched and _children.get(self.pid) is self:
            _ended[self.pid] = self
        wake_group_waiters()
        return 0

    cdef int lose(self) except -1:
        self.state = LOST
        self.drop()
        self.settle()
        return 0

    cdef int drop(self) except -1:
        """Out of the tables: nobody will be told this status again."""
        if _children.get(self.pid) is self:
            del _children[self.pid]
        if _ended.get(self.pid) is self:
            del _ended[self.pid]
        return 0

    cdef int claim(self) except -1:
        """The caller takes the status; everybody else who waits for this child has come too late."""
        self.state = CLAIMED
        self.drop()
        self.settle()
        return 0

    cdef int settle(self) except -1:
        """End the watches that are still open, each in its own thread."""
        cdef Watch watch
        hub = get_hub_if_exists()
        loop = None if hub is None else hub.loop
        for watch in list(self.watches):
            if watch.is_closed:
                continue
            if watch.loop is loop:
                watch.finish()
            elif not post(watch.loop, watch.finish):
                watch.shut()       # its thread has ended, and its hub with it
        return 0

    cdef int tell(self) except -1:
        """In the home loop's hub: run the callback, once, and keep nothing alive that it refers to."""
        callback, self.callback = self.callback, None
        if not self.is_told:
            self.is_told = True
            try:
                if callback is not None:
                    callback(self)
            except:
                self.home.loop.handle_error(self, *sys.exc_info())
        return 0


# {pid: its Child}, while somebody watches it, waits for it, or may still ask for its status
cdef dict _children = {}
# {pid: Child}, oldest death first: watched children whose status nobody has asked for
cdef dict _ended = {}
# The parent's tables, in a forked child: kept, because freeing thousands of records would copy the pages they are on.
cdef list _parents = []


def check_loop(loop):
    """Refuse what is no event loop of gevent, or was destroyed."""
    if not hasattr(loop, "run_callback_threadsafe"):
        raise TypeError(f"loop must be an event loop of gevent or None, not {loop!r}")
    if not is_alive(loop):
        raise ValueError("operation on destroyed loop")


def watch(Py_ssize_t pid, callback=None, loop=None, bint ref=False):
    """Watch child *pid*, which nobody has waited for yet: collect it when it ends, keep its status, call the callback.

    Never switches greenlets. Returns the :class:`Child`.
    """
    cdef Child child = Child(as_int(pid))
    cdef Child before = <Child>_children.get(pid)
    if loop is None:
        loop = get_hub().loop
    child.callback = callback
    child.is_watched = True
    if before is not None:
        before.drop()      # the pid is used again
    _children[pid] = child
    child.home = Watch(child, loop)
    child.watches.append(child.home)
    try:
        if loop is get_hub().loop:
            child.home.start_or_lose(ref)
        else:
            post(loop, child.home.start_there, (ref,))
    except:
        child.drop()
        raise
    return child


# ---- waiting -----------------------------------------------------------------------------------------------------------------

# The async watchers of greenlets that wait for any child or any of a group; woken whenever a child was collected here, since a
# thread that is still asking the kernel would miss that one.
cdef list _group_waiters = []


cdef int wake_group_waiters() except -1:
    if not _group_waiters:
        return 0
    for news in list(_group_waiters):
        if is_alive(news.loop):
            news.send()
        else:
            _group_waiters.remove(news)
    return 0


cdef int wait_for_news(idtype_t idtype, id_t id, int options) except -1:
    """Park until the kernel may have an answer."""
    cdef Question question = None
    cdef object token = object()
    hub = get_hub()
    news = hub.loop.async_()
    news.start(getcurrent().switch, token)
    _group_waiters.append(news)
    try:
        question = ask(idtype, id, options, news)
        came_back = give_way(hub, getcurrent())
        if came_back is not token:
            raise wrong_switch(came_back, "children")
    finally:
        if news in _group_waiters:
            _group_waiters.remove(news)
        if question is None:
            news.stop()
            news.close()
        else:
            question.leave(news)
    return 0


cdef int question_options(int options) noexcept:
    """waitpid(2)'s options as waitid(2) writes them."""
    return WEXITED | (WSTOPPED if options & WUNTRACED else 0) | options & ~(WNOHANG | WUNTRACED)


cdef object no_child(int pid):
    return os_error(ECHILD, "waitpid", pid)


cdef object lost_child(int pid):
    return OSError(ECHILD, f"{strerror(ECHILD).decode()}: somebody else in this process collected child {pid}, and this kernel "
                           f"doesn't tell its status. gevent.subprocess does that unless coopos.patch() was called; so does "
                           f"whoever calls waitpid(-1), and ignoring SIGCHLD")


cdef bint is_used_again(int pid) noexcept:
    """Whether the pid of a child that was collected belongs to another child of ours by now."""
    cdef siginfo_t info
    return waitid(P_PID, pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0


cdef int claim_status(Child child, int *status, rusage *usage) except -1:
    status[0] = child.status
    usage[0] = child.usage
    child.claim()
    return child.pid


cdef int wait_one(int pid, int options, int *status, rusage *usage) except -1:
    """wait4(2) for one child: its pid, or 0 under WNOHANG."""
    cdef Child child = <Child>_children.get(pid)
    cdef Watch watch
    cdef int rpid
    # Stops and continues are asked of the kernel, and so is whatever needs Linux's __WALL and its like.
    cdef int special = options & ~WNOHANG
    if child is not None and child.state == ENDED and is_used_again(pid):
        child.drop()
        child = None
    while True:
        if child is not None:
            child.collect()
            if child.state == ENDED:
                return claim_status(child, status, usage)
            if child.state == CLAIMED:
                raise no_child(pid)
            if child.state == LOST:
                raise lost_child(pid)
        if child is None or special:
            rpid = wait4(pid, status, options | WNOHANG, usage)
            if rpid < 0:
                raise os_error(errno, "waitpid", pid)
            if rpid > 0:
                if child is not None and (WIFEXITED(status[0]) or WIFSIGNALED(status[0])):
                    child.status = status[0]
                    child.usage = usage[0]
                    child.ended()
                    child.claim()
                return rpid
        if options & WNOHANG:
            return 0
        if special:
            wait_for_news(P_PID, pid, question_options(options))
            continue
        if child is None:
            child = <Child>_children.get(pid)
            if child is None:
                child = Child(pid)
                _children[pid] = child
        try:
            watch = child.watch_in(get_hub().loop)
        except OSError as ex:
            if not child.watches:
                child.forget(None)
            if ex.errno == ESRCH:
                continue               # collected by another thread this moment: the kernel says so next time round
            raise
        watch.wait()


cdef bint is_asked_for(Child child, int pid) except -1:
    """Whether waitpid's *pid*, 0 or less, means this child."""
    if pid == -1:
        return True
    return child.group == (getpgrp() if pid == 0 else -pid)


cdef int wait_any(int pid, int options, int *status, rusage *usage) except -1:
    """wait4(2) for any child (-1), the caller's group (0) or group -pid: a pid, or 0 under WNOHANG."""
    cdef Child child
    cdef int rpid
    while True:
        for child in list(_ended.values()):
            if is_used_again(child.pid):
                child.drop()
            elif is_asked_for(child, pid):
                return claim_status(child, status, usage)
        rpid = wait4(pid, status, options | WNOHANG, usage)
        if rpid < 0:
            raise os_error(errno, "waitpid", pid)
        if rpid > 0:
            child = <Child>_children.get(rpid)
            if child is not None and (WIFEXITED(status[0]) or WIFSIGNALED(status[0])):
                child.status = status[0]
                child.usage = usage[0]
                child.ended()
                child.claim()
            return rpid
        if options & WNOHANG:
            return 0
        if pid == -1:
            wait_for_news(P_ALL, 0, question_options(options))
        else:
            wait_for_news(P_PGID, getpgrp() if pid == 0 else -pid, question_options(options))


def waitpid(Py_ssize_t pid, options):
    """Wait for a child process, letting other greenlets run until it ends.

    Like :func:`os.waitpid`, for any child: forked here, by the plain :func:`os.fork` or by a C library, in any thread. Of several
    who wait for one child, one gets its status and the others ChildProcessError. The status of a watched child (see
    :func:`fork_and_watch`) stays available until somebody asks for it or its pid is used again.

    Args:
        pid: int, a child's pid; -1 any child, 0 any of the caller's process group, ``-pgid`` any of that group.
        options: int, 0 or any of WNOHANG, WUNTRACED, WCONTINUED.

    Returns:
        (pid, status): int and int, the raw wait status; (0, 0) under WNOHANG when there is none yet.

    Raises:
        ChildProcessError: ECHILD, there is no such child, or somebody has waited for it. Raised at once. It says so if the child
            was watched here and somebody else collected it on a kernel (before Linux 6.15) that doesn't tell the status.
        OSError: EINVAL, unknown options.

    Switches greenlets only if it has to wait. Killed or timed out, it leaves the child waitable. Works in any thread's hub.

    Source: waitpid(2), pidfd_open(2), waitid(2); ``gevent.os.waitpid``.

    .. versionadded:: 0.1.0
    """
    cdef int status = 0
    cdef int which = as_int(pid)
    cdef int flags = as_int(options)
    cdef int rpid
    cdef rusage usage
    if flags & ~COOPOS_WAIT_OPTIONS:
        raise os_error(EINVAL, "waitpid", pid)
    rpid = (wait_one if which > 0 else wait_any)(which, flags, &status, &usage)
    return rpid, status if rpid else 0


# ---- fork --------------------------------------------------------------------------------------------------------------------

def forget_parent():
    """In a forked child: what was watched and asked is the parent's. Run by the interpreter after every fork."""
    global _children, _ended, _questions, _exit_sets, _group_waiters, _hook_loop, _hook_is_due
    _hook_is_due = False
    close_all_pidfds()
    _parents.append((_children, _ended, _questions, _exit_sets, _group_waiters, _hook_loop))
    _children, _ended, _questions, _exit_sets, _group_waiters, _hook_loop = {}, {}, {}, {}, [], None


def forget_parent_loops():
    """In a forked child whose loop has been re-initialised: take the parent's exit sets out of it.

    Not before: libuv would take them out of the parent's epoll, which the child shares until then.
    """
    cdef ExitSet exits
    hub = get_hub_if_exists()
    loop = None if hub is None else hub.loop
    for tables in _parents:
        for exits in tables[3].values():
            if exits.loop is loop:
                exits.shut()
            else:
                c_close(exits.fd)      # of a thread that is not there any more
                exits.fd = -1
        tables[3].clear()


os.register_at_fork(after_in_child=forget_parent)


cdef int before_fork(const char *event) except -1:
    PySys_Audit(event, NULL)
    if sys.version_info >= (3, 12) and sys.is_finalizing():
        raise RuntimeError("can't fork at interpreter shutdown")
    return 0


def fork_process():
    """fork(2) with the interpreter's at-fork hooks; the pid in the parent, 0 in the child. No hub is looked at."""
    cdef int pid, err
    before_fork(b"os.fork")
    # From here to AfterFork there is no way back into the interpreter's main loop: a starting thread that got the GIL in between
    # would wait for the forker's locks, and the forker for the GIL.
    PyOS_BeforeFork()
    pid = c_fork()
    err = errno
    if pid == 0:
        PyOS_AfterFork_Child()
    else:
        PyOS_AfterFork_Parent()
    if pid < 0:
        raise os_error(err, "fork", "")
    return pid


def forkpty_process():
    """forkpty(3) with the interpreter's at-fork hooks; (pid, the master's descriptor) in the parent, (0, -1) in the child."""
    cdef int pid, err
    cdef int master = -1
    before_fork(b"os.forkpty")
    PyOS_BeforeFork()
    pid = c_forkpty(&master, NULL, NULL, NULL)
    err = errno
    if pid == 0:
        PyOS_AfterFork_Child()
    else:
        PyOS_AfterFork_Parent()
    if pid < 0:
        raise os_error(err, "forkpty", "")
    return pid, master
