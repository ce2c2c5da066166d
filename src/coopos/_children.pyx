"""Children that may have to be waited for.

The kernel keeps the books. Nothing here installs a signal handler, or asks for a child it was not asked about. Nothing polls,
unless no descriptor or no thread is left to wait by. Four rules hold throughout:

1. Whoever waits is registered before anything that could wake it is started, and leaves by a `finally`.
2. An object of a loop (watcher, member of its set) is touched only by that loop's own thread; other threads post a callback.
3. In a forked child every object made before the fork belongs to the parent: `generation` tells, and its descriptors and threads
   are left alone.
4. To tell anybody anything can let other threads run (libuv's watchers release the GIL): a record is first brought to its new
   state, and then others are told.

From the bottom up: a worker puts a Question to waitid(2); a Watch is one child in one loop, by such a question or by a pidfd in
the loop's set; a Child is the record of one child, with a Watch in each loop that waits. The module knows libc,
`_parking`, `_workers`, `gevent.hub` and the loop's watchers, and nothing else of coopos or gevent.
"""

cimport cython
from cpython.object cimport PyObject
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport ECHILD, EINTR, ENOSYS, EPERM, ESRCH, errno
from libc.signal cimport SIGCHLD, SIG_IGN
from libc.stdlib cimport realloc
from libc.string cimport memset, strerror
from posix.signal cimport kill, sigaction, sigaction_t
from posix.types cimport id_t
from posix.unistd cimport close as c_close, getpgid, getuid

from coopos._parking cimport (
    READ, Wait, as_int, generation, give_way, is_alive, os_error, post, reachable_hub, set_of_loop, set_ref, wrong_switch)
from coopos._posix cimport (
    COOPOS_P_PIDFD, COOPOS_WNOTHREAD, HAVE_PIDFD, P_PID, POLLIN, PyErr_CheckSignals, Report, WEXITED, WNOWAIT, coopos_bell_ring,
    coopos_close_run, coopos_has_ended, coopos_pidfd_inode, coopos_pidfd_open, coopos_pidfd_reaped, coopos_pidfd_signal,
    coopos_wait, idtype_t, poll, pollfd, siginfo_t, waitid)
from coopos._workers cimport Inquiry

import os
import sys

from gevent._hub_local import get_loop
from gevent.hub import MAIN_THREAD_IDENT as _MAIN_THREAD_IDENT, _get_hub as get_hub_if_exists, _get_hub_noargs as get_hub
from greenlet import getcurrent


# ---- asking the kernel -------------------------------------------------------------------------------------------------------

cdef int ask_now(idtype_t idtype, id_t id, int options, Report *report) except -2:
    """waitid(2), without waiting: 0, also where there is nothing to say, or -1 with errno. A signal's handler has its turn."""
    while coopos_wait(idtype, id, options, report) < 0:
        if errno != EINTR:
            return -1
        PyErr_CheckSignals()
    return 0


cdef object this_loop():
    """This thread's, or None. That of a hub that was destroyed: the next one has it again."""
    hub = get_hub_if_exists()
    return get_loop() if hub is None else hub.loop


cdef int wait_plainly(idtype_t idtype, id_t id, int options) except -1:
    """Stand still, with the GIL released, until waitid(2) may have an answer. Nothing is collected."""
    cdef siginfo_t info
    cdef int err = 0
    with nogil:
        if waitid(idtype, id, &info, options | WNOWAIT) < 0:
            err = errno
    if err == EINTR:
        PyErr_CheckSignals()
    elif err and err != ECHILD:
        raise os_error(err, "waitid", id)
    return 0


# ---- asking the kernel from a worker -----------------------------------------------------------------------------------------

# COOPOS_CHILDREN=thread: never use pidfds, as on a system that has none.
cdef bint _use_pidfds = HAVE_PIDFD and os.environ.get("COOPOS_CHILDREN") != "thread"


# Where there is no descriptor, or no thread, to wait by: how long until the kernel is asked again.
cdef enum:
    PAUSE_MS = 10


@cython.final
@cython.internal
cdef class Question(Inquiry):
    """One question to waitid(2) about children, put once for all who wait for the answer.

    The answer is only "look again": a bell, which each who asked has in its own loop's set. Where there is no descriptor left for
    it, or no thread, each looks again after a while.
    """
    cdef tuple key                 # (idtype, id, options)
    cdef dict table                # _questions or _exit_questions
    cdef list listeners            # the Listener of each who asked

    cdef int close_to_others(self) noexcept:
        """Who asks from now on asks anew."""
        if self.table.get(self.key) is self:
            del self.table[self.key]
        return 0

    cdef int ring(self) noexcept:
        """Wake all who asked, from any thread."""
        self.close_to_others()
        if self.box != NULL:
            coopos_bell_ring(self.box.bell)
        return 0

    cdef bint is_wanted(self) except -1:
        """Whether anybody waits whose loop was not destroyed."""
        cdef Listener listener
        for listener in self.listeners:
            if listener.loop is None or is_alive(listener.loop):
                return True
        return False

    cdef int drop(self) noexcept:
        """Nobody waits."""
        if self.born == generation:
            self.close_to_others()
            self.end()
        return 0


@cython.final
@cython.internal
cdef class Listener(Wait):
    """One of those who wait for the answer to a Question: in a loop by its set, or plainly, where *loop* is None."""
    cdef Question question
    cdef object loop
    cdef object timer              # where there is no bell
    cdef object callback
    cdef tuple args

    cdef int start(self, bint ref, callback, tuple args) except -1:
        """Have ``callback(*args)`` run in the loop's hub when there is news."""
        cdef Question question = self.question
        self.callback, self.args = callback, args
        if question.box != NULL:
            self.fd, self.events = question.box.bell[0], READ
            set_of_loop(self.loop).enter(self, ref, "waitid")
        else:
            self.timer = self.loop.timer(PAUSE_MS / 1000.0, ref=ref)
            self.timer.start(self.wake)
        return 0

    cdef int hold(self, bint ref) except -1:
        """Whether it keeps its loop alive."""
        if self.set is not None:
            self.set.hold(self, ref)
        elif self.timer is not None and is_alive(self.loop):
            set_ref(self.timer, ref)
        return 0

    cdef int tell(self) except -1:
        """In the hub: there is news."""
        cdef Question question = self.question
        callback, args = self.callback, self.args      # leave() lets go of them meanwhile
        if callback is None:
            return 0               # a signal's handler has raised, and ended the wait, before the loop came to us
        if question.born != generation:
            question.end()         # it is the parent's
            return 0
        question.close_to_others()
        callback(*args)
        return 0

    cdef int stand(self) except -1:
        """Stand still, with the GIL released, until there is news."""
        cdef Question question = self.question
        cdef pollfd rung
        cdef int has_bell = question.box != NULL
        cdef int err = 0
        rung.fd = question.box.bell[0] if has_bell else -1
        rung.events = POLLIN
        with nogil:
            if poll(&rung, 1, -1 if has_bell else PAUSE_MS) < 0:
                err = errno
        if err == EINTR:
            PyErr_CheckSignals()
        elif err:
            raise os_error(err, "poll", question.key)
        else:
            question.close_to_others()
        return 0

    cdef int leave(self) except -1:
        """Wait no longer; with the last one nobody asks any more."""
        cdef Question question = self.question
        cdef Py_ssize_t index
        for index in range(len(question.listeners)):
            if question.listeners[index] is self:
                del question.listeners[index]
                break
        self.callback = None
        if self.set is not None:
            self.set.leave(self)
        timer, self.timer = self.timer, None
        if timer is not None and is_alive(self.loop):
            timer.stop()
            timer.close()
        if not question.is_wanted():
            question.drop()
        return 0


# {(idtype, id, options): the Question that is being asked}: those for the end of one child, and the others
cdef dict _exit_questions = {}
cdef dict _questions = {}


cdef Listener listen(loop, idtype_t idtype, id_t id, int options, bint ref=False, callback=None, tuple args=()):
    """Put a question, or join those who wait for the answer to the same one. Whoever gets the Listener must leave() by it."""
    # The worker takes nothing anyway, and has no children of its own that it could confine itself to.
    cdef int asked = options & ~(WNOWAIT | COOPOS_WNOTHREAD)
    cdef tuple key = (idtype, id, asked)
    cdef dict table = _exit_questions if idtype == P_PID and asked == WEXITED else _questions
    cdef Question question = <Question>table.get(key)
    cdef Listener listener = Listener()
    cdef bint is_new = question is None
    if is_new:
        question = Question()
        question.key, question.table, question.listeners = key, table, []
    listener.loop = loop
    listener.question = question
    try:
        # Before anything else: to make a watcher may let another thread run, who would drop a question that nobody waits for.
        question.listeners.append(listener)
        if is_new and question.begin(idtype, id, asked | WNOWAIT):
            table[key] = question
        if loop is not None:
            listener.start(ref, callback, args)
    except:
        listener.leave()
        raise
    return listener


# ---- pidfds in a loop --------------------------------------------------------------------------------------------------------

# By descriptor, the Watch whose pidfd it is, or NULL. In C, because a forked child goes through it, and to count references to
# thousands of objects would copy the pages they are on: there they stay counted.
cdef PyObject **_watch_of = NULL
cdef int _watch_of_size = 0

# {errno: how often the kernel has refused a pidfd}
cdef dict _refusals = {}


cdef int open_pidfd(int pid) except -2:
    """A pidfd, or -1 with errno."""
    global _watch_of, _watch_of_size
    cdef PyObject **table
    cdef int size
    cdef int fd = coopos_pidfd_open(pid)
    if fd >= _watch_of_size:
        size = max(2 * fd, 256)
        table = <PyObject **>realloc(_watch_of, <size_t>size * sizeof(PyObject *))
        if table == NULL:
            c_close(fd)
            raise MemoryError
        memset(table + _watch_of_size, 0, <size_t>(size - _watch_of_size) * sizeof(PyObject *))
        _watch_of, _watch_of_size = table, size
    return fd


cdef int close_all_pidfds() noexcept:
    """In a forked child. Run by run: thousands of close(2) take milliseconds."""
    cdef int first
    cdef int fd = 0
    while fd < _watch_of_size:
        first = fd
        while fd < _watch_of_size and _watch_of[fd] != NULL:
            _watch_of[fd] = NULL
            fd += 1
        if fd > first:
            coopos_close_run(first, fd - 1)
        fd += 1
    return 0


def count_refusals():
    """How often a child could not be watched by pidfd, in this process: {errno: int}. A thread has watched it."""
    return dict(_refusals)


@cython.final
@cython.internal
cdef class Watch(Wait):
    """A child's exit, as one loop waits for it: a pidfd in the loop's set, or a Question where there is none."""
    cdef Child child
    cdef object loop
    cdef Listener news             # while a thread asks for us
    cdef list waiters              # of the greenlets parked here, their switch
    cdef list callbacks            # to be told: (callback, whether it wants the loop kept alive); or None
    cdef int holds
    cdef int born                  # generation
    cdef bint is_lasting           # somebody watches in this loop, whether or not anybody waits
    cdef bint is_closed

    def __cinit__(self, Child child, loop):
        self.child = child
        self.loop = loop           # None: of a thread without a hub
        self.waiters = []
        self.fd = -1               # a pidfd
        self.events = READ
        self.born = generation

    cdef bint start(self) except -1:
        """Begin to watch. False if there is no such process any more."""
        cdef int err
        if _use_pidfds:
            err = self.open_pidfd()
            if not err:
                try:
                    set_of_loop(self.loop).enter(self, False, "pidfd_open")
                    self.child.told_by = "pidfd"
                    return True
                except BaseException as ex:
                    self.drop_pidfd()
                    if not isinstance(ex, OSError):
                        raise
                    # Out of descriptors for the set: a thread needs none.
                    err = ex.errno
            if err == ESRCH:
                return False
            _refusals[err] = _refusals.get(err, 0) + 1
        self.ask_thread()
        self.child.told_by = "thread"
        return True

    cdef int start_plainly(self) except -1:
        """Begin to watch in a thread without a hub: keep a pidfd, by which the child is known whatever becomes of its pid."""
        cdef sigaction_t action
        if sigaction(SIGCHLD, NULL, &action) == 0 and action.sa_handler == SIG_IGN:
            return 0           # the kernel collects it, so nobody will ask, and nobody would close the pidfd
        if _use_pidfds:
            if self.open_pidfd() == ESRCH:
                self.child.lose()
        return 0

    cdef int open_pidfd(self) except -1:
        """0, or errno."""
        cdef int pidfd = open_pidfd(self.child.pid)
        if pidfd < 0:
            return errno
        self.fd = pidfd
        Py_INCREF(self)
        _watch_of[pidfd] = <PyObject *>self
        return 0

    def start_there(self, bint ref):
        """In the loop's thread."""
        if self.child.state == ALIVE:
            self.start_or_lose(ref)
        else:
            self.finish()

    def tell_again(self, bint ref):
        """In the loop's thread, when a callback was added to a watch that is there already."""
        if self.child.state != ALIVE:
            self.tell_all_soon()
        elif ref:
            self.hold(1)

    cdef int start_or_lose(self, bint ref) except -1:
        """Begin to watch our own child. If it is there no more, somebody else has collected it, or, because SIGCHLD is ignored, the
        kernel.
        """
        if not self.start():
            self.child.lose()
        elif ref:
            self.hold(1)
        return 0

    cdef int drop_pidfd(self) except -1:
        cdef int pidfd = self.fd
        if pidfd >= 0 and self.born == generation:
            if self.set is not None:
                self.set.leave(self)
            _watch_of[pidfd] = NULL
            c_close(pidfd)
            self.fd = -1
            Py_DECREF(self)
        return 0

    cdef int hold(self, int change) except -1:
        """Count who wants the loop kept alive until the child has ended."""
        cdef bint before = self.holds > 0
        self.holds += change
        if before != (self.holds > 0) and self.born == generation:
            if self.set is not None:
                self.set.hold(self, self.holds > 0)
            elif self.news is not None:
                self.news.hold(self.holds > 0)
        return 0

    def release(self):
        """In the loop's thread: one that wanted the loop kept alive was unlinked."""
        self.hold(-1)

    cdef int shut(self) except -1:
        """Watch no longer. In the loop's thread, unless the loop is gone."""
        if not self.is_closed:
            self.is_closed = True
            self.drop_pidfd()
            self.leave_thread()
        return 0

    cdef int ask_thread(self) except -1:
        """Have a thread look for us."""
        self.news = listen(self.loop, P_PID, self.child.pid, WEXITED, self.set is None and self.holds > 0, self.fire_from_thread)
        return 0

    cdef int leave_thread(self) except -1:
        cdef Listener news = self.news
        self.news = None
        if news is not None and self.born == generation:
            news.leave()
        return 0

    cdef int tell(self) except -1:
        """In the hub: the pidfd is readable."""
        if self.set is not None:
            self.fire(True)
            # Once for all that this turn brings, as one SIGCHLD stands for several.
            call_hook_soon(self.loop)
        return 0

    def fire_from_thread(self):
        self.fire(False)
        call_hook(self.loop)

    cdef int fire(self, bint is_dead) except -1:
        """In the hub: the child has ended, or is said to have. One of several: what it raises the hub reports."""
        if self.born != generation:
            return 0
        try:
            # Whoever waits here claims the status within this call; without them it is not ours unless we were told to watch.
            if (self.child.is_watched or self.waiters) and self.child.collect(self.waiters and not self.callbacks, NULL, is_dead):
                self.leave_thread()
                self.wake_waiters()    # a traced child has stopped: a matter for them
            elif self.child.state != ALIVE:
                self.shut()
                self.tell_all()
            else:
                # The thread's look has come to nothing; or a tracer holds the end back: then the pidfd stays readable, and only
                # a thread that waits as the parent does is told when the tracer lets go.
                self.leave_thread()
                self.ask_thread()
        except:
            self.loop.handle_error(self.child, *sys.exc_info())
            self.shut()
            self.wake_waiters()        # they begin anew, and meet the same, or not
        return 0

    def finish(self):
        """In the loop's thread: the status became known without the loop. End the watch; the hub tells whom it concerns."""
        if not self.is_closed:
            self.shut()
            self.tell_all_soon()

    cdef int tell_all_soon(self) except -1:
        if self.waiters or self.callbacks:
            self.loop.run_callback(self.tell_all_from_queue)
        elif self.is_lasting:
            call_hook_soon(self.loop)
        return 0

    def tell_all_from_queue(self):
        self.tell_all()
        call_hook(self.loop)

    cdef int tell_all(self) except -1:
        """In the hub: run the callbacks, once, and keep nothing alive that they refer to; then wake those who wait."""
        callbacks, self.callbacks = self.callbacks, None
        if callbacks:
            for callback, _ in callbacks:
                try:
                    callback(self.child)
                except:
                    self.loop.handle_error(self.child, *sys.exc_info())
        if self.waiters:
            call_hook(self.loop)       # a signal would come before them
            self.wake_waiters()
        return 0

    cdef int wake_waiters(self) except -1:
        while self.waiters:
            switch = self.waiters.pop(0)
            try:
                switch(switch)
            except:
                self.loop.handle_error(switch, *sys.exc_info())
        return 0

    cdef int wait(self, hub) except -1:
        """Park until the child may have ended."""
        cdef object current = getcurrent()
        cdef object switch = current.switch      # a new object each time: it also proves who has woken us
        self.waiters.append(switch)
        self.hold(1)
        try:
            came_back = give_way(hub, current)
            if came_back is not switch:
                raise wrong_switch(came_back, f"child {self.child.pid}")
        finally:
            self.hold(-1)
            if self.waiters and switch in self.waiters:
                self.waiters.remove(switch)
        return 0

    cdef int end_unless_wanted(self) except -1:
        if not self.waiters and not self.is_lasting:
            self.shut()
            self.child.forget(self)
        return 0


# ---- the records -------------------------------------------------------------------------------------------------------------

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

    def __cinit__(self, int pid):
        self.pid = pid
        self.watches = []
        self.born = generation

    @property
    def rpid(self):
        return self.pid if self.state != ALIVE else 0

    @property
    def rstatus(self):
        if self.state == LOST:
            raise lost_child(self)
        return self.report.status

    @property
    def loop(self):
        return None if self.home is None else (<Watch>self.home).loop

    @property
    def ref(self):
        return self.home is not None and (<Watch>self.home).holds > 0

    @property
    def callback(self):
        cdef list callbacks = None if self.home is None else (<Watch>self.home).callbacks
        return callbacks[0][0] if callbacks else None

    @property
    def mechanism(self):
        """What tells that the child has ended: ``"pidfd"`` or ``"thread"``."""
        return self.told_by

    @property
    def is_ours(self):
        """Whether this process has made it, and not its parent."""
        return not self.is_parents()

    @property
    def active(self):
        return self.state == ALIVE

    @property
    def pending(self):
        return self.state != ALIVE and self.callback is not None

    def stop(self):
        """Do nothing: a watched child is collected whether or not its callback is wanted."""

    def close(self):
        """Do nothing: see :meth:`stop`."""

    def look(self):
        """Ask the kernel, without waiting, whether it has ended; so :attr:`rpid` tells it before the hub has seen it."""
        self.collect(False, NULL)

    def join(self):
        """Park in this thread's hub until it has ended. Nobody's status is taken: any number of greenlets and threads may wait."""
        self.collect(False, NULL)
        while self.state == ALIVE:
            self.wait()
            self.collect(False, NULL)

    def send_signal(self, signum):
        """kill(2), never to another process that has got its pid. Nothing is sent, and nothing raised, once it has ended."""
        cdef int number = as_int(signum)
        cdef int pidfd, rc
        self.collect(False, NULL)
        if self.state != ALIVE:
            return
        pidfd = self.pidfd()
        rc = coopos_pidfd_signal(pidfd, number) if pidfd >= 0 else -1
        # A child that was not collected keeps its pid. Sandboxes refuse the newer call.
        if pidfd < 0 or (rc < 0 and (errno == ENOSYS or errno == EPERM)):
            rc = kill(self.pid, number)
        if rc < 0 and errno != ESRCH:
            raise os_error(errno, "kill", self.pid)

    def link(self, callback, bint ref):
        """Have ``callback(child)`` called in this thread's hub when it has ended; soon, if it has."""
        self.add_callback(callback, get_hub().loop, ref)

    def unlink(self, callback):
        """Undo :meth:`link`, and keep *callback* no longer."""
        cdef Watch watch
        cdef Py_ssize_t index
        for watch in self.watches:
            for index in range(len(watch.callbacks or ())):
                each, ref = watch.callbacks[index]
                if each == callback:
                    del watch.callbacks[index]
                    if ref:
                        watch.release() if watch.loop is this_loop() else post(watch.loop, watch.release)
                    return

    def collect_for_nobody(self):
        """Whether it has ended; then nobody will ask for the status."""
        self.collect(False, NULL)
        self.claim_status()
        return self.state != ALIVE

    def claim_status(self):
        """Take the status, if it is there and nobody has: who waits for the child from now on gets ChildProcessError."""
        if self.state == ENDED:
            self.claim()

    def __repr__(self):
        state = ("alive", "ended", "waited for", "lost")[self.state]
        return f"<coopos child {self.pid} {state} status={self.report.status}>"

    cdef bint is_parents(self) except -1:
        """Whether this is a forked child, and the record its parent's: nobody's here, whoever has the pid, and nobody is told."""
        if self.born == generation:
            return False
        if self.state == ALIVE:
            self.state = LOST
            self.watches = []
        return True

    cdef bint wait(self) except -1:
        """Wait, in this thread's hub if there is one that can run, until the child may have ended. False, at once, if there is no
        such process any more.
        """
        cdef Watch watch
        cdef Watch found = None
        hub = reachable_hub()
        loop = None if hub is None else hub.loop
        if hub is not None:
            for watch in self.watches:
                if watch.loop is loop and not watch.is_closed:
                    found = watch
        if found is None:
            found = Watch(self, loop)
        try:
            if found not in self.watches:
                self.watches.append(found)
                if hub is not None and not found.start():
                    return False
            if hub is None:
                wait_plainly(P_PID, self.pid, WEXITED)
            else:
                found.wait(hub)
        finally:
            found.end_unless_wanted()
        return True

    cdef ino_t pidfd_inode(self) except? 0:
        """What its pidfds have in common with nobody else's, as far as that is known; 0."""
        if not self.inode:
            self.inode = coopos_pidfd_inode(self.pidfd())
        return self.inode

    cdef int pidfd(self) except -2:
        """A pidfd of it, in any loop's watch, or -1."""
        cdef Watch watch
        for watch in self.watches:
            if watch.fd >= 0 and watch.born == generation:
                return watch.fd
        return -1

    cdef int forget(self, watch) except -1:
        """A watch that nobody needs any more, and with the last one the record, unless somebody may still ask for the status."""
        if watch in self.watches:
            self.watches.remove(watch)
        if not self.watches and not self.is_watched and children.get(self.pid) is self:
            del children[self.pid]
        return 0

    cdef int ask(self, int options, Report *report) except -2:
        """waitid(2) of this child, without waiting: 0, also where there is nothing to say, or -1 if somebody else collected it."""
        cdef int pidfd = self.pidfd()
        cdef int rc = -1
        if pidfd >= 0:
            # By pidfd, since the pid may be another process by now.
            rc = ask_now(COOPOS_P_PIDFD, pidfd, options, report)
        # Linux before 5.4 doesn't know P_PIDFD, and sandboxes refuse it.
        if pidfd < 0 or (rc < 0 and errno != ECHILD):
            rc = ask_now(P_PID, self.pid, options, report)
        if rc < 0 and errno != ECHILD:
            raise os_error(errno, "waitid", self.pid)
        return rc

    cdef bint collect(self, bint claims, Report *stop, bint is_dead=False) except -1:
        """Ask the kernel for the status, without waiting. Whether somebody *claims* it before anybody else can ask.

        True if it is a child that we trace, and has stopped, which every wait tells: it is taken into *stop*, or, if that is NULL,
        left there. What *is_dead* needn't be looked at first.
        """
        cdef Report report
        cdef int pidfd, rc
        if self.state != ALIVE or self.is_parents():
            return False
        # A zombie still has its group, a collected child hasn't: ask before.
        if not claims:
            self.group = getpgid(self.pid)
        rc = 0
        if stop == NULL and not is_dead:
            rc = self.ask(WEXITED | WNOWAIT, &report)
            if rc == 0 and not coopos_has_ended(&report):
                return report.pid > 0
        if rc == 0:
            rc = self.ask(WEXITED, &report)
        if rc == 0 and report.pid > 0 and not coopos_has_ended(&report):
            if stop != NULL:
                stop[0] = report
            return True
        pidfd = self.pidfd()
        if rc < 0 and pidfd >= 0:
            self.is_stolen = True
            rc = coopos_pidfd_reaped(pidfd, &report)
            report.pid = self.pid
            report.uid = getuid()
        if rc < 0:
            self.is_stolen = True
            self.lose()
        elif report.pid > 0:
            self.report = report
            self.state = ENDED
            if self.is_watched:
                if not claims:
                    self.inode = coopos_pidfd_inode(pidfd)
                if children.get(self.pid) is self:
                    ended[self.pid] = self
            self.tell_others()
        return False

    cdef int collected(self, const Report *report) except -1:
        """The caller has asked the kernel itself, and keeps what it got."""
        self.report = report[0]
        return self.claim()

    cdef int tell_others(self) except -1:
        """Those who must hear of the end without having watched for this child."""
        global _hook_is_due
        if self.is_watched:
            _hook_is_due = True
        cdef Question question
        if _questions:
            # A thread that asks for any child would miss this one; a stop that is waited for will not come.
            for question in list(_questions.values()):
                if question.is_wanted():
                    question.ring()
                else:
                    question.drop()
        return 0

    cdef int lose(self) except -1:
        self.state = LOST
        self.drop()
        self.settle()
        return 0

    cdef int drop(self) except -1:
        """Out of the tables: nobody will be told this status again."""
        if children.get(self.pid) is self:
            del children[self.pid]
        if ended and ended.get(self.pid) is self:
            del ended[self.pid]
        return 0

    cdef int claim(self) except -1:
        """The caller takes the status; everybody else who waits for this child has come too late."""
        cdef bint was_alive = self.state == ALIVE
        self.state = CLAIMED
        self.drop()
        if was_alive:
            self.tell_others()
        self.settle()
        return 0

    cdef int settle(self) except -1:
        """End the watches that are still open, each in its own thread."""
        cdef Watch watch
        cdef list still_open = None
        for watch in self.watches:
            if not watch.is_closed:
                if still_open is None:
                    still_open = []
                still_open.append(watch)
        if still_open is None:
            return 0
        loop = this_loop()
        for watch in still_open:
            if watch.loop is None:
                watch.shut()
            elif watch.loop is loop:
                watch.finish()
            elif not post(watch.loop, watch.finish):
                watch.shut()       # its thread has ended, and its hub with it
        return 0

    cdef int add_callback(self, callback, loop, bint ref) except -1:
        """Watch in *loop* from now on; where the child has ended already, the callback is called in the loop's next turn. Without
        a loop, only know it.
        """
        cdef Watch watch
        cdef Watch found = None
        cdef bint is_new
        self.is_parents()
        for watch in self.watches:
            if watch.loop is loop and (watch.is_lasting or not watch.is_closed):
                found = watch
        is_new = found is None
        if is_new:
            found = Watch(self, loop)
            self.watches.append(found)
        try:
            if callback is not None:
                if found.callbacks is None:
                    found.callbacks = []
                found.callbacks.append((callback, ref))
            if loop is None:
                if is_new:
                    found.start_plainly()
            else:
                begin = found.start_there if is_new else found.tell_again
                if loop is this_loop():
                    begin(ref)
                else:
                    post(loop, begin, (ref,))
        except:
            if is_new:
                self.watches.remove(found)
            elif found.callbacks and found.callbacks[len(found.callbacks) - 1][0] is callback:
                found.callbacks.pop()
            raise
        found.is_lasting = True
        if self.home is None:
            self.home = found
        return 0


# {pid: its Child}, while somebody watches it, waits for it, or may still ask for its status
cdef dict children = {}
# {pid: Child}, oldest death first: watched children whose status nobody has asked for
cdef dict ended = {}
# The parent's tables, in a forked child: kept, because freeing thousands of records would copy the pages they are on.
cdef list _parents = []


cdef object lost_child(Child child):
    if child.born != generation:
        return OSError(ECHILD, f"{strerror(ECHILD).decode()}: {child.pid} is a child of the process that has forked this one")
    return OSError(ECHILD, f"{strerror(ECHILD).decode()}: somebody else in this process collected child {child.pid}, and this "
                           f"kernel doesn't tell its status. gevent.subprocess does that unless coopos.patch() was called; so does "
                           f"whoever calls waitpid(-1), and ignoring SIGCHLD")


cdef bint is_used_again(int pid) except -1:
    """Whether the pid of a child that was collected belongs to another child of ours by now."""
    cdef Report report
    return ask_now(P_PID, pid, WEXITED | WNOWAIT, &report) == 0


def check_loop(loop):
    """Refuse what is no event loop of gevent, or was destroyed."""
    if not hasattr(loop, "run_callback_threadsafe"):
        raise TypeError(f"loop must be an event loop of gevent or None, not {loop!r}")
    if not is_alive(loop):
        raise ValueError("operation on destroyed loop")


cdef Child record(int pid, callback, loop, bint ref, Child child, bint needs_hub=True):
    """Watch *child*, or *pid* as a child that there is no record of.

    Of threads without a hub, the main one gets one, and others if the callback needs it: nobody would destroy it, nor run it. There
    the child is only known, and a callback that needs no hub is not called.
    """
    cdef bint is_new = child is None
    if loop is None:
        loop = this_loop()
        if loop is None:
            if PyThread_get_thread_ident() == _MAIN_THREAD_IDENT or (callback is not None and needs_hub):
                loop = get_hub().loop
            else:
                callback = None
    if is_new:
        child = Child(pid)
        children[pid] = child
    child.is_watched = True
    try:
        child.add_callback(callback, loop, ref)
    except:
        if is_new:
            child.drop()
        raise
    return child


def watch_new(Py_ssize_t pid, callback=None, loop=None, bint ref=False, dict notes=None, bint needs_hub=True):
    """Watch child *pid*, which was forked this moment: collect it when it ends, keep its status, call the callback.

    *notes*: what has happened to children in the meantime, as _forking tells it. Never switches greenlets. Returns the
    :class:`Child`. Where *needs_hub* is False, the callback is not called in a thread that has no hub. What is raised has the pid:
    else nobody would know whom to wait for.
    """
    cdef int number = as_int(pid)
    cdef Child before
    cdef Child note
    try:
        before = <Child>children.get(number)
        note = <Child>notes.get(number) if notes else None
        if note is None and before is not None:
            # The pid is used again. Only a pidfd still knows the child that had it before.
            if before.state == ALIVE:
                if before.pidfd() >= 0:
                    before.collect(False, NULL)
                else:
                    before.lose()
            before.drop()
        return record(number, callback, loop, ref, note, needs_hub)
    except BaseException as ex:
        ex.pid = pid
        raise


def watch_any(Py_ssize_t pid, callback=None, loop=None, bint ref=False):
    """Watch child *pid*, whoever has forked it and whoever waits for it or watches it already.

    Never switches greenlets. Returns the :class:`Child`. ECHILD if it isn't a child of this process, or was waited for.
    """
    cdef int number = as_int(pid)
    cdef Child child
    cdef Report report
    cdef bint is_there
    leave_parents()
    child = <Child>children.get(number)
    if child is not None:
        child.collect(False, NULL)     # if somebody else has collected it, the pid may be another child's
    is_there = ask_now(P_PID, number, WEXITED | WNOWAIT, &report) == 0
    if child is not None and child.state != ALIVE and is_there:
        child.drop()       # the pid is used again, also where the kernel doesn't tell the status of the child that had it
        child = None
    if not is_there and (child is None or child.state != ENDED):
        raise os_error(errno, "watch", number)
    return record(number, callback, loop, ref, child)


# ---- waiting for the kernel's news -------------------------------------------------------------------------------------------

cdef int wait_for_news(idtype_t idtype, id_t id, int options) except -1:
    """Wait until the kernel may have an answer to this waitid(2)."""
    cdef object hub = reachable_hub()
    cdef object loop = None if hub is None else hub.loop
    cdef object current = None if hub is None else getcurrent()
    cdef object switch = None if hub is None else current.switch
    cdef Report report
    cdef Listener news
    if options & COOPOS_WNOTHREAD and ask_now(idtype, id, options & ~COOPOS_WNOTHREAD | WNOWAIT, &report) == 0 and report.pid > 0:
        # It is another thread's, and no other thread can ask for this one's alone.
        return wait_plainly(idtype, id, options)
    if hub is None and idtype == P_PID:
        return wait_plainly(idtype, id, options)
    # For any child also where nothing can be switched to: the hub of another thread may collect it and ring.
    news = listen(loop, idtype, id, options, True, switch, (switch,))
    try:
        if hub is None:
            news.stand()
        else:
            came_back = give_way(hub, current)
            if came_back is not switch:
                raise wrong_switch(came_back, "children")
    finally:
        news.leave()
    return 0


# ---- fork --------------------------------------------------------------------------------------------------------------------

cdef int note_new(Child child, int pid) except -1:
    """Record *child*, which was made before the fork, as child *pid* until the fork is over. Runs no Python code."""
    child.pid = pid
    if pid not in children:    # else a child had the pid before: nobody was quick enough to collect that one either
        child.is_watched = True
        children[pid] = child
    return 0


cdef bint take_note(Child child) except -1:
    """Its fork is over. True if at-fork hooks have let others do something to the child, as waitpid(-1) does."""
    if not child.is_watched:
        return False
    child.is_watched = False
    if child.state != ALIVE or child.watches:
        return True
    if children.get(child.pid) is child:
        del children[child.pid]
    return False


# The generation that the tables are of.
cdef int _born = 0


cdef int leave_parents() except -1:
    """In the child of C code that runs no at-fork hooks: its first question finds the parent's tables here."""
    return forget_parent() if _born != generation else 0


cdef int forget_parent() except -1:
    """In a forked child: what was watched and asked is the parent's."""
    global children, ended, _exit_questions, _questions, _hook_loop, _hook_is_due, _born
    _hook_is_due = False
    _born = generation
    close_all_pidfds()
    _parents.append((children, ended, _exit_questions, _questions, _hook_loop))
    children, ended, _exit_questions, _questions, _hook_loop = {}, {}, {}, {}, None
    return 0
