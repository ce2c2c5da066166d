# What coopos.report() and coopos.counters() ask of the other chapters.
#
# A report is made in signal handlers, and in a thread without a hub while the hub stands in a callback. So nothing here waits,
# changes anything, or calls code of the program. Counts are counted when they are asked for.

# ---- descriptors -------------------------------------------------------------------------------------------------------------

cdef list all_waits():
    """The Waits of all threads, and of no parent. They are held before anything is allocated that could free one of them."""
    cdef list found = []
    cdef list living = []
    cdef PyObject *link
    cdef Wait wait
    cdef int fd
    for fd in range(_parked.size):
        link = _parked.at[fd]
        while link != NULL:
            found.append(<object>link)
            link = (<Wait>link).next
    for wait in found:
        if wait.set is not None and wait.set.born == generation:
            living.append(wait)
    return living


cdef double seconds_since(long long us) noexcept:
    return (coopos_coarse_now_us() - us) / 1e6


def waits():
    """[(descriptor, READ or WRITE, greenlet, its hub, for how many seconds), ...]: the greenlets that wait for descriptors, of all
    threads.
    """
    cdef list found = []
    cdef Wait wait
    for wait in all_waits():
        if wait.greenlet is not None:
            found.append((wait.fd, wait.events, wait.greenlet, wait.set.hub, seconds_since(wait.since_us)))
    return found


def sets():
    """[(hub or None, loop, number of the epoll or -1, how many waits), ...]: the loops in which something waits, or has waited."""
    cdef list found = []
    cdef list rows = []
    cdef Wait wait
    cdef Set here
    cdef int fd
    for fd in range(_sets.size):
        if _sets.at[fd] != NULL:
            found.append(<object>_sets.at[fd])
    for wait in all_waits():           # without epoll a set has no number
        if wait.set not in found:
            found.append(wait.set)
    for here in found:
        if here.born == generation:
            rows.append((here.hub, here.loop, here.fd, here.members))
    return rows


def turns():
    """[(descriptor, greenlet, for how many seconds), ...]: the greenlets that wait until another is done with a file's buffer."""
    cdef list found = []
    cdef Owned owned
    for reference in list(_queues.values()):
        owned = <Owned>reference()
        for waiter, _, since_us in () if owned is None else owned.queue.copy():
            if not waiter.dead:
                found.append((owned.fd, waiter, seconds_since(since_us)))
    return found


def put_off_closes():
    """[(descriptor, whether a loop has to poll first, how many others have to end first), ...]"""
    cdef list found = []
    cdef PutOffClose later
    for later in list(_put_off.values()):
        if coopos_closing_is_due(later.closing):
            found.append((later.closing.fd, later.waits_for_loop, later.closing.parties - later.waits_for_loop))
    return found


# ---- workers -----------------------------------------------------------------------------------------------------------------

def jobs():
    """[(call, what it is on, whether a worker has begun, whether it waits for a peer, greenlet or None, loop, seconds), ...]"""
    cdef list found = []
    cdef Mailbox mailbox
    cdef Job job
    cdef coopos_state state
    for mailbox in list(_mailboxes.values()):
        for job in list(mailbox.jobs) if mailbox.born == generation else ():
            state = coopos_job_state(job.job)
            if state != COOPOS_DONE:
                has_begun = state == COOPOS_BEGUN
                waits_for_peer = bool(job.job.waits_for_peer)
                found.append(
                    (job.name, str(job), has_begun, waits_for_peer, job.waiter, mailbox.loop, seconds_since(job.since_us)))
    return found


# ---- children ----------------------------------------------------------------------------------------------------------------

cdef object waiter_of(switch):
    """The greenlet whose bound `switch` this is, or None."""
    found = getattr(switch, "__self__", None)
    return found if isinstance(found, greenlet) else None


def questions():
    """[(idtype, id, options, greenlets, how many threads without a hub), ...]: the waits for children that a worker makes for them.
    Those for Watches are left out.
    """
    cdef list found = []
    cdef list greenlets
    cdef Question question
    cdef Listener each
    cdef int n_threads
    for question in list(_exit_questions.values()) + list(_questions.values()):
        greenlets = []
        n_threads = 0
        for each in list(question.listeners):
            n_threads += each.loop is None
            if waiter_of(each.callback) is not None:
                greenlets.append(waiter_of(each.callback))
        if question.born == generation and (greenlets or n_threads):
            found.append((*question.key, greenlets, n_threads))
    return found


def records():
    """[(Child, greenlets that wait for it, how many callbacks, whether any of these keeps a loop alive), ...]"""
    cdef list found = []
    cdef list greenlets
    cdef Child child
    cdef Watch watch
    cdef Py_ssize_t n_callbacks
    cdef bint keeps_alive
    for child in list(children.values()):
        if child.born != generation:
            continue
        greenlets = []
        n_callbacks = 0
        keeps_alive = False
        for watch in list(child.watches):
            greenlets += [waiter_of(switch) for switch in watch.waiters]
            n_callbacks += len(watch.callbacks or ())
            keeps_alive = keeps_alive or watch.holds > 0
        found.append((child, greenlets, n_callbacks, keeps_alive))
    return found


# ---- counts ------------------------------------------------------------------------------------------------------------------

def counters():
    """Return what coopos has counted, and how much it has to do now, in this process.

    Costs nothing until it is called: most numbers are lengths of what coopos has anyway. A program may call it every second, for
    its metrics. A forked child goes on with its parent's counts.

    Returns:
        dict[str, int]. These only grow:

        * ``worker_calls``: calls that were given to a worker thread
        * ``guarded_calls``: reads and writes that could have blocked, so that a timer's signal guarded them
        * ``dontwait_calls``: reads and writes of sockets that were made with MSG_DONTWAIT, since the kernel refused RWF_NOWAIT
        * ``refused_pidfds``: pidfds that the kernel refused, so that a thread watched the child

        And these are of now, of all threads:

        * ``parked``: waits of greenlets for descriptors
        * ``children``: children that are alive and watched or waited for
        * ``statuses``: children that have ended, and whose status nobody has asked for yet
        * ``questions``: waits for children that a worker makes
        * ``workers``: worker threads, with those that are idle
        * ``busy_workers``: worker threads that are in a system call
        * ``queued_jobs``: calls for which no worker is free, as ``COOPOS_THREADS`` of them wait for disks
        * ``put_off_closes``: closes that wait for somebody

    Doesn't switch greenlets. Safe in any thread, in the hub, in signal handlers and after a fork.

    .. versionadded:: 0.1.0
    """
    cdef list states = []
    cdef Child child
    for child in list(children.values()):
        if child.born == generation:
            states.append(child.state)
    return {
        "worker_calls": _calls_made,
        "guarded_calls": guarded_calls,
        "dontwait_calls": dontwait_calls,
        "refused_pidfds": sum(list(_refusals.values())),
        "parked": len(waits()),
        "children": states.count(ALIVE),
        "statuses": states.count(ENDED),
        "questions": len(_inquiries),
        "workers": coopos_pool.threads,
        "busy_workers": coopos_pool.begun,
        "queued_jobs": coopos_pool_queued(),
        "put_off_closes": len(put_off_closes()),
    }


# ---- sockets -----------------------------------------------------------------------------------------------------------------

def socket_facts(kind, int fd, int how, options):
    """[address, peer's address or None, and of each of *options*, (level, name, length), the value or None] of socket *fd*.

    *kind* is ``_socket.socket``. One that owns the program's descriptor, for a moment, must not outlive an exception of a signal
    handler, so no Python code may run here. *how*: a type with SOCK_NONBLOCK, with which it leaves the socket's mode alone:
    https://github.com/python/cpython/blob/main/Modules/socketmodule.c (init_sockobject)
    """
    cdef object handle = kind(-1, how, -1, fd)
    cdef list found = []
    try:
        calls = [(handle.getsockname, ()), (handle.getpeername, ())]
        for call, arguments in calls + [(handle.getsockopt, each) for each in options]:
            try:
                found.append(call(*arguments))
            except OSError:
                found.append(None)
    finally:
        handle.detach()
    return found


# ---- signals -----------------------------------------------------------------------------------------------------------------

def register_both(int signum, register):
    """Call *register*, which puts another C handler in the place of that of *signum*; then have both called, the new one first."""
    if coopos_keep_handler(signum):
        raise os_error(errno, "sigaction", signum)
    register()
    if coopos_call_kept_handler_too(signum):
        raise os_error(errno, "sigaction", signum)
