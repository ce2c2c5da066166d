# The operations of workers, as the Python modules call them: fsync, open, locks, sendfile and their kin.

cdef int check_fd(int fd, str name) except -1:
    """Refuse a descriptor that is not open, before anything waits."""
    check_open(fd, name)
    if fcntl(fd, F_GETFD) < 0:
        raise os_error(errno, name, fd)
    return 0


cdef dict _operations = {
    "fsync": COOPOS_FSYNC, "fdatasync": COOPOS_FDATASYNC, "ftruncate": COOPOS_FTRUNCATE, "posix_fallocate": COOPOS_FALLOCATE}


def on_file(str name not None, fd, Py_ssize_t length=0, Py_ssize_t offset=0):
    """fsync(2), fdatasync(2), ftruncate(2) or posix_fallocate(3)."""
    cdef int number = as_int(fd) if name in ("ftruncate", "posix_fallocate") else PyObject_AsFileDescriptor(fd)
    cdef Job job
    if name == "ftruncate" and length < 0:
        raise os_error(EINVAL, name, number)   # as the kernel does, before it looks at the descriptor
    check_fd(number, name)
    job = new_job(<coopos_operation><int>_operations[name], name, number)
    job.job.offset, job.job.length = offset, length
    run(job)
    result_of(job, number)


def sync():
    """sync(2)."""
    run(new_job(COOPOS_SYNC, "sync"))


cdef Job new_path_job(coopos_operation operation, str name, int fd, bytes path):
    cdef Job job = new_job(operation, name, fd, len(path) + 1)
    memcpy(job.job.buf, <const char *>path, len(path) + 1)
    return job


def truncate(bytes path not None, Py_ssize_t length, subject):
    """truncate(2). Its error has *subject* as the file name."""
    cdef Job job = new_path_job(COOPOS_TRUNCATE, "truncate", -1, path)
    job.job.length = length
    run(job)
    result_of(job, None, subject)


def open_at_once(bytes path not None, Py_ssize_t flags, Py_ssize_t mode, dir_fd, subject):
    """openat(2) without waiting. -1: it would wait for another process, which has a lease or the FIFO's other end."""
    cdef int number = AT_FDCWD if dir_fd is None else as_int(dir_fd)
    cdef int how = as_int(flags)
    cdef mode_t bits = <mode_t>as_int(mode)
    cdef const char *name = path
    cdef stat_t st
    cdef int fd, err
    while True:
        with nogil:
            fd = openat(number, name, how | O_NONBLOCK, bits)
            err = errno
        if fd >= 0:
            break
        if err in (EAGAIN, ENXIO):
            return -1
        if not is_interrupted(err):
            raise path_error(err, subject)
    if fstat(fd, &st) == 0 and not S_ISREG(st.st_mode) and (S_ISFIFO(st.st_mode) or S_ISCHR(st.st_mode)) and not how & O_RDWR:
        c_close(fd)
        return -1
    fcntl(fd, F_SETFL, how)
    return fd


def wait_open(bytes path not None, Py_ssize_t flags, Py_ssize_t mode, dir_fd, subject):
    """openat(2) that may wait for another process. Its error has *subject* as the file name."""
    cdef Job job = new_path_job(COOPOS_OPEN, "open", AT_FDCWD if dir_fd is None else as_int(dir_fd), path)
    job.job.flags = as_int(flags)
    job.job.mode = <mode_t>as_int(mode)
    job.job.waits_for_peer = True
    run(job)
    return result_of(job, None, subject)


cdef list locks_held(int fd):
    """What this process has locked of a file by fcntl(2), which only the kernel knows: [(kind, start, end), ...].

    https://man7.org/linux/man-pages/man5/proc_locks.5.html. Where there is no such file, nothing is known.
    """
    cdef stat_t st
    cdef list found = []
    if fstat(fd, &st) < 0:
        return found
    pid, inode = str(os.getpid()), f":{st.st_ino}"
    try:
        with open("/proc/locks") as file:
            lines = file.readlines()
    except OSError:
        return found
    for line in lines:
        fields = line.split()
        if len(fields) == 8 and fields[1] == "POSIX" and fields[4] == pid and fields[5].endswith(inode):
            end = COOPOS_TO_THE_END if fields[7] == "EOF" else int(fields[7]) + 1
            found.append((F_WRLCK if fields[3] == "WRITE" else F_RDLCK, int(fields[6]), end))
    return found


cdef int claim_lock(Job job, Range wanted, list held) except -1:
    """Tell a job what to lock, and what of it this process holds already."""
    cdef Range range
    if not coopos_job_claim(job.job, wanted):
        raise os_error(errno, job.name, job.fd)
    range.owner = NULL
    for range.kind, range.start, range.end in held:
        coopos_job_note_held(job.job, range)
    return 0


cdef Range range_of(int fd, int kind, Py_ssize_t length, Py_ssize_t start, int whence) noexcept:
    """The bytes that fcntl(2) would lock now. The offset and the end of the file may move later."""
    cdef stat_t st
    if whence == SEEK_CUR:
        start += max(lseek(fd, 0, SEEK_CUR), 0)
    elif whence == SEEK_END and fstat(fd, &st) == 0:
        start += st.st_size
    return coopos_range_of(kind, start, length)


def wait_lock(Py_ssize_t fd, Py_ssize_t length, Py_ssize_t start=0, Py_ssize_t whence=1, kind=None):
    """fcntl(2) with F_SETLKW; with the defaults lockf(3) with F_LOCK. A greenlet that is killed or timed out holds no lock."""
    cdef Job job = new_job(COOPOS_SETLK, "lockf", as_int(fd))
    claim_lock(job, range_of(job.fd, F_WRLCK if kind is None else as_int(kind), length, start, as_int(whence)), locks_held(job.fd))
    job.job.waits_for_peer = True
    run(job)
    result_of(job, fd)


def note_lock(Py_ssize_t fd, kind, Py_ssize_t length, Py_ssize_t start=0, Py_ssize_t whence=1):
    """Record that a range was locked (F_RDLCK, F_WRLCK) or released (F_UNLCK) without waiting. A greenlet that waits for the same
    bytes must not release it if it is killed.
    """
    if coopos_has_claims():            # else spare the lseek(2) of every lockf()
        coopos_locks_note(False, as_int(fd), range_of(as_int(fd), as_int(kind), length, start, as_int(whence)))


def wait_flock(Py_ssize_t fd, Py_ssize_t operation):
    """flock(2). A greenlet that is killed or timed out holds no lock."""
    cdef Job job = new_job(COOPOS_FLOCK, "flock", as_int(fd))
    # While it waits, the open file has no lock: flock(2) releases the old one first.
    # https://man7.org/linux/man-pages/man2/flock.2.html
    claim_lock(job, coopos_range_of(F_WRLCK, 0, 0), [])
    job.job.flags = as_int(operation)
    job.job.waits_for_peer = True
    run(job)
    result_of(job, fd)


def note_flock(Py_ssize_t fd, bint is_got):
    """As note_lock()."""
    coopos_locks_note(True, as_int(fd), coopos_range_of(F_WRLCK if is_got else F_UNLCK, 0, 0))


cdef dict _transfers = {"copy_file_range": COOPOS_COPY, "sendfile": COOPOS_SENDFILE, "splice": COOPOS_SPLICE}


def transfer(
    str name not None, Py_ssize_t source, offset, Py_ssize_t target, target_offset, Py_ssize_t count, Py_ssize_t flags=0,
    bint waits_for_peer=False, int expected=0,
):
    """copy_file_range(2), sendfile(2) or splice(2). An offset of None is the descriptor's own. Returns the number of bytes; -1 if
    it failed with the errno *expected*.
    """
    cdef Job job = new_job(<coopos_operation><int>_transfers[name], name, as_int(source))
    job.job.other = job.other = as_int(target)
    job.job.offset = -1 if offset is None else <off_t>offset
    job.job.other_offset = -1 if target_offset is None else <off_t>target_offset
    job.job.size = <size_t>count
    job.job.flags = as_int(flags)
    job.job.waits_for_peer = waits_for_peer
    try:
        run(job)
    except BaseException as ex:
        attach_progress(ex, "characters_written", job.job.rc if job.job.rc > 0 else None)
        raise
    if job.job.rc < 0 and job.job.err == expected:
        return -1
    return result_of(job, source)


def random(Py_ssize_t size, Py_ssize_t flags):
    """getrandom(2)."""
    cdef Job job = new_job(COOPOS_RANDOM, "getrandom", -1, <size_t>size)
    job.job.flags = as_int(flags)
    job.job.waits_for_peer = True
    run(job)
    return PyBytes_FromStringAndSize(job.job.buf, result_of(job, size))


cdef int wait_semaphore(sem_t *semaphore, object subject) except -1:
    """sem_wait(3). A greenlet that is killed or timed out has taken nothing from it."""
    cdef Job job = new_job(COOPOS_SEM_WAIT, "sem_wait")
    job.job.semaphore = semaphore
    job.job.waits_for_peer = True
    run(job)
    result_of(job, subject)
    return 0
