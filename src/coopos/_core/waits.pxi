# The wait family: waitpid, wait, wait3, wait4, waitid, and wait_exit for any process.
#
# Each asks the kernel by waitid(2) with WNOHANG. If nothing has happened yet, it parks and asks again. If the child has a record,
# the record is asked first, since it may have collected the child already.

# ---- one wait, in the form of waitid(2) --------------------------------------------------------------------------------------

cdef int take(Child child, int options, Report *report) except -1:
    """Take the status of a child that is ENDED. Claims it, unless WNOWAIT leaves it to the next wait."""
    report[0] = child.report
    if not options & WNOWAIT:
        child.claim()
    return 0


cdef bint take_from_record(str call, Child child, int options, Report *report) except -1:
    """The answer of the record: the status, or ChildProcessError. False: the child is alive."""
    if child.state == ALIVE:
        return False
    if child.state == CLAIMED:
        raise os_error(ECHILD, call, child.pid)
    if child.state == LOST:
        raise lost_child(child)
    take(child, options, report)
    return True


cdef int wait_one(str call, int pid, int options, Report *report) except -1:
    """waitid(2) with P_PID. Under WNOHANG report.pid is 0 when there is nothing to report."""
    cdef Child child = <Child>children.get(pid)
    # Whether the kernel has to be asked too: for stops and continues, and for WNOWAIT, __WALL and other options of Linux.
    cdef bint is_special = (options & ~WNOHANG) != WEXITED
    cdef bint asks_records = options & WEXITED and not coopos_wants_clones(options)
    cdef bint takes = not options & WNOWAIT
    cdef bint has_waited = False
    if child is not None:
        # The record may be of an older child: if other code collected that one, its pid may have been used again.
        if child.is_watched and asks_records and child.collect(takes, report if takes else NULL) and takes:
            return 0
        if (child.state == ENDED or child.is_stolen) and is_used_again(pid):
            child.remove_from_tables()
            child = None
    while True:
        if child is None:
            child = <Child>children.get(pid)
        if child is not None and asks_records:
            # If nobody watches the child, a look with WNOWAIT must not collect it: another waiter may want it.
            if (child.is_watched or takes) and child.collect(takes, report if takes else NULL) and takes:
                return 0
            if child.is_stolen and not has_waited and is_used_again(pid):
                child.remove_from_tables()     # the record is of an older child, for which another caller still waits
                child = None
                continue
            if take_from_record(call, child, options, report):
                return 0
        if child is None or is_special:
            if ask_now(P_PID, pid, options, report) < 0:
                raise os_error(errno, call, pid)
            if report.pid > 0:
                if child is not None and has_ended(report) and takes:
                    child.claim_from_kernel(report)
                return 0
        if options & WNOHANG:
            return 0
        if is_special or is_traced(pid):
            wait_for_change(call, P_PID, pid, options)
            continue
        if child is None:
            child = Child(pid)
            children[pid] = child
        has_waited = True
        if not child.wait(call) and not child.is_watched:
            child = None       # the process is gone: the kernel will say ECHILD, or knows a newer child


cdef bint is_traced(int pid) except -1:
    """Whether we trace the child. If so every wait reports its stops, but no pidfd does.

    __WCLONE leaves out ordinary children, unless we trace them: https://man7.org/linux/man-pages/man2/ptrace.2.html and
    eligible_child() in https://github.com/torvalds/linux/blob/master/kernel/exit.c
    """
    cdef Report report
    return COOPOS_WCLONE and ask_now(P_PID, pid, WEXITED | WNOWAIT | COOPOS_WCLONE, &report) == 0


cdef Child find_ended(idtype_t idtype, id_t id):
    """The child of P_ALL, or of group *id*, that was collected first and whose status nobody has claimed; or None."""
    cdef Child child
    for child in ended.values():
        if idtype == P_ALL or child.group == <int>id:
            return child
    return None


cdef bint find_stolen() except -1:
    """Collect the watched children that have ended and the hub has not noticed yet. Whether there is one with a status.

    The kernel has no child left, so other code reaped them.
    """
    cdef Child child
    cdef bint found = False
    for child in list(children.values()):
        if child.is_watched and child.state == ALIVE:
            child.collect(False, NULL)
            found = found or child.state == ENDED
    return found


cdef int wait_any(str call, idtype_t idtype, id_t id, int options, Report *report) except -1:
    """waitid(2) with P_ALL or P_PGID. Under WNOHANG report.pid is 0 when there is nothing to report."""
    cdef Child child
    cdef bint asks_records = options & WEXITED and not coopos_wants_clones(options)
    cdef bint looks
    cdef int err, pid
    while True:
        complete_ended()
        while ended and asks_records:
            child = find_ended(idtype, id)
            if child is None:
                break
            if not is_used_again(child.pid):
                return take(child, options, report)
            child.remove_from_tables()
        looks = bool(children) and asks_records and not options & WNOWAIT
        if ask_now(idtype, id, options | WNOWAIT if looks else options, report) < 0:
            err = errno
            if err == ECHILD and asks_records and find_stolen():
                continue
            raise os_error(err, call, -1 if idtype == P_ALL else -<int>id)
        if report.pid > 0:
            if not looks:
                return 0
            # wait_one() reaps it. First it compares it with the record, which may be of an older child with this pid.
            pid = report.pid
            try:
                wait_one(call, pid, options | WNOHANG, report)
            except ChildProcessError:
                continue           # another thread was first
            if report.pid > 0:
                return 0
            continue
        if options & WNOHANG:
            return 0
        wait_for_change(call, idtype, id, options)


cdef int wait_pidfd(str call, int fd, int options, Report *report) except -1:
    """waitid(2) with P_PIDFD: find the pid, and wait for that child."""
    cdef Child child
    cdef ino_t inode
    cdef int err
    if ask_now(COOPOS_P_PIDFD, fd, options | WNOWAIT, report) == 0:
        if report.pid > 0:
            return wait_one(call, report.pid, options, report)
        if options & WNOHANG:
            return 0
        if is_nonblocking(fd):
            raise os_error(EAGAIN, call, fd)
        pid = pid_of(fd)
        # Reading the pid may have let another thread reap the child. Until it is reaped the pid can't be used again.
        if ask_now(COOPOS_P_PIDFD, fd, options | WNOWAIT, report) == 0:
            return wait_one(call, pid, options, report)
    err = errno
    if err == ECHILD and options & WEXITED:
        inode = coopos_pidfd_inode(fd)
        for child in list(children.values()) if inode else ():
            if child.pidfd_inode() == inode:
                # Not by its pid, which may have been used again.
                child.collect(not options & WNOWAIT, NULL)
                if child.state == ENDED:
                    return take(child, options, report)
                if child.state == LOST:
                    raise lost_child(child)
    raise os_error(err, call, fd)


cdef int pid_of(int pidfd) except -1:
    cdef int pid = coopos_pidfd_pid(pidfd)
    if pid > 0:
        return pid
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        for line in file:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    raise os_error(EINVAL, "waitid", pidfd)


cdef int wait_by_pid(str call, int pid, int flags, Report *report) except -1:
    """wait4(2)."""
    cdef int options
    memset(report, 0, sizeof(Report))
    ensure_own_tables()
    if flags & ~COOPOS_WAIT_OPTIONS:
        raise os_error(EINVAL, call, pid)
    options = WEXITED | (WSTOPPED if flags & WUNTRACED else 0) | flags & ~WUNTRACED
    if pid > 0:
        return wait_one(call, pid, options, report)
    if pid == -1:
        return wait_any(call, P_ALL, 0, options, report)
    if pid == -<long>2 ** 31:
        raise os_error(ESRCH, call, pid)
    return wait_any(call, P_PGID, getpgrp() if pid == 0 else -pid, options, report)


# ---- the public functions ----------------------------------------------------------------------------------------------------

def waitpid(Py_ssize_t pid, options):
    """Wait for a child process, letting other greenlets run until it ends.

    Like :func:`os.waitpid`, for any child, whoever has forked it: this module, :func:`os.fork` or a C library, in any thread. If
    several greenlets or threads wait for one child, one gets its status and the others get ChildProcessError. The status of a
    watched child (see :func:`fork_and_watch`) stays available until somebody asks for it or its pid is used again. The wait keeps
    the loop running: it never ends in ``LoopExit``, not even if the child is watched with ``ref=False``.

    Args:
        pid: int, a child's pid; -1 any child, 0 any of the caller's process group, ``-pgid`` any of that group.
        options: int, 0 or any of WNOHANG, WUNTRACED, WCONTINUED.

    Returns:
        (pid, status): int and int, the raw wait status; (0, 0) under WNOHANG when there is none yet.

    Raises:
        ChildProcessError: ECHILD, there is no such child, or somebody has waited for it. Raised at once. If other code has
            collected a child that was watched here, and the kernel doesn't tell the status (Linux does since 6.15), the message
            says so.
        OSError: EINVAL, unknown options.

    Keeps :ref:`what every function promises <promises>`.

    Source: waitpid(2), pidfd_open(2), waitid(2); ``gevent.os.waitpid``.

    .. versionadded:: 0.1.0
    """
    cdef Report report
    wait_by_pid("waitpid", as_int(pid), as_int(options), &report)
    return report.pid, report.status


def wait():
    """Wait for any child process, letting other greenlets run until one ends: ``waitpid(-1, 0)``.

    Like :func:`os.wait`.

    Returns:
        (pid, status): int and int, the raw wait status.

    Raises:
        ChildProcessError: ECHILD, there is no child to wait for. Raised at once.

    Keeps :ref:`what every function promises <promises>`.

    Source: wait(2).

    .. versionadded:: 0.1.0
    """
    cdef Report report
    wait_by_pid("wait", -1, 0, &report)
    return report.pid, report.status


cdef int si_status(const Report *report) noexcept:
    """The si_status of siginfo_t, from a raw wait status: https://man7.org/linux/man-pages/man2/sigaction.2.html"""
    if report.code == CLD_KILLED or report.code == CLD_DUMPED:
        return report.status & 0x7f
    return SIGCONT if report.code == CLD_CONTINUED else report.status >> 8


cdef double seconds(const timeval *time) noexcept:
    return time.tv_sec + time.tv_usec * 1e-6


cdef tuple pid_status_usage(Report *report, kind):
    cdef const timeval *user = &report.usage.ru_utime
    cdef const timeval *system = &report.usage.ru_stime
    usage = report.usage
    return report.pid, report.status, kind((
        seconds(user), seconds(system), usage.ru_maxrss, usage.ru_ixrss, usage.ru_idrss, usage.ru_isrss, usage.ru_minflt,
        usage.ru_majflt, usage.ru_nswap, usage.ru_inblock, usage.ru_oublock, usage.ru_msgsnd, usage.ru_msgrcv, usage.ru_nsignals,
        usage.ru_nvcsw, usage.ru_nivcsw))


def wait3(options):
    """Wait for any child process, letting other greenlets run until one ends, and return what it used: ``wait4(-1, options)``.

    Like :func:`os.wait3`.

    Args:
        options: int, as for :func:`waitpid`.

    Returns:
        (pid, status, usage): as :func:`wait4`.

    Raises:
        ChildProcessError: ECHILD, there is no child to wait for. Raised at once.
        OSError: EINVAL, unknown options.

    Keeps :ref:`what every function promises <promises>`.

    Source: wait3(2).

    .. versionadded:: 0.1.0
    """
    cdef Report report
    kind = struct_rusage()         # before a status is collected: an import may fail
    wait_by_pid("wait3", -1, as_int(options), &report)
    return pid_status_usage(&report, kind)


def wait4(Py_ssize_t pid, options):
    """Wait for a child process, letting other greenlets run until it ends, and return its status and what it used.

    Like :func:`os.wait4`; otherwise as :func:`waitpid`.

    Args:
        pid: int, as for :func:`waitpid`.
        options: int, as for :func:`waitpid`.

    Returns:
        (pid, status, usage): int, int and :class:`resource.struct_rusage`, the child's own as the kernel counted it (times in
        seconds, ``ru_maxrss`` in KiB on Linux and bytes on macOS). All zero if other code had collected the child.

    Raises:
        ChildProcessError, OSError: as :func:`waitpid`.

    Keeps :ref:`what every function promises <promises>`.

    Source: wait4(2), getrusage(2).

    .. versionadded:: 0.1.0
    """
    cdef Report report
    kind = struct_rusage()         # before a status is collected: an import may fail
    wait_by_pid("wait4", as_int(pid), as_int(options), &report)
    return pid_status_usage(&report, kind)


def waitid(idtype, Py_ssize_t id, options):
    """Wait for a child process to change its state, letting other greenlets run until one does.

    Like :func:`os.waitid`.

    Args:
        idtype: int, P_PID, P_PGID, P_ALL or, on Linux, P_PIDFD.
        id: int: with P_PID a pid, with P_PGID a process group (0 is the caller's), with P_PIDFD a pidfd; ignored with P_ALL.
        options: int, at least one of WEXITED, WSTOPPED and WCONTINUED; WNOHANG; WNOWAIT, which leaves the child as it is, so that
            it can be waited for again.

    Returns:
        :class:`os.waitid_result` (si_pid, si_uid, si_signo, si_status, si_code), or None under WNOHANG when there is nothing to
        report. If other code had collected the child, si_uid is this process's user.

    Raises:
        ChildProcessError: ECHILD, there is no such child, or somebody has waited for it. Raised at once.
        BlockingIOError: EAGAIN, the pidfd is in non-blocking mode and its process has not ended.
        OSError: EINVAL, unknown options, idtype or id; EBADF, not a pidfd.

    Keeps :ref:`what every function promises <promises>`.

    Source: waitid(2).

    .. versionadded:: 0.1.0
    """
    cdef Report report
    cdef idtype_t kind = as_int(idtype)
    cdef int number = as_int(id)
    cdef int flags = as_int(options)
    memset(&report, 0, sizeof(Report))
    ensure_own_tables()
    if flags & ~COOPOS_WAITID_OPTIONS or not flags & (WEXITED | WSTOPPED | WCONTINUED):
        raise os_error(EINVAL, "waitid", id)
    if kind == P_PID and number > 0:
        wait_one("waitid", number, flags, &report)
    elif kind == P_ALL:
        wait_any("waitid", P_ALL, 0, flags, &report)
    elif kind == P_PGID and number >= 0:
        wait_any("waitid", P_PGID, number if number else getpgrp(), flags, &report)
    elif kind == COOPOS_P_PIDFD and HAVE_PIDFD:
        wait_pidfd("waitid", number, flags, &report)
    else:
        raise os_error(EINVAL, "waitid", id)
    if not report.pid:
        return None
    return os.waitid_result((report.pid, report.uid, int(signal.SIGCHLD), si_status(&report), report.code))


def wait_exit(Py_ssize_t pid):
    """Wait until a process has ended, whoever its parent is, letting other greenlets run meanwhile.

    The status stays where it is: a child of this process can still be waited for.

    Args:
        pid: int, of any process.

    Raises:
        ProcessLookupError: ESRCH, there is no such process (any more). Raised at once.
        OSError: EINVAL, *pid* is not positive; EMFILE or ENFILE, no descriptor is left.
        NotImplementedError: not Linux.

    Keeps :ref:`what every function promises <promises>`.

    Source: pidfd_open(2).

    .. versionadded:: 0.1.0
    """
    cdef int number = as_int(pid)
    cdef int pidfd
    if not HAVE_PIDFD:
        raise NotImplementedError("wait_exit() needs pidfds, which only Linux has")
    pidfd = coopos_pidfd_open(number)
    if pidfd < 0:
        raise os_error(errno, "wait_exit", number)
    try:
        park_until_ready(pidfd, READ, "wait_exit")
    except OSError as ex:
        if ex.errno == EBADF and "pidfd" not in target_of(pidfd):
            pidfd = -1             # the program has closed all descriptors; the number may be another file's
        raise
    finally:
        if pidfd >= 0:
            c_close(pidfd)
