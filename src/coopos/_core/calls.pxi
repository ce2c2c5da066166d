# The operations of workers, as the Python modules call them: fsync, open, locks, sendfile and their kin.

# ---- for Python --------------------------------------------------------------------------------------------------------------

cdef int check_fd(int fd, str name) except -1:
    """Before anything waits."""
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
    """truncate(2). What it raises names *subject* as the file."""
    cdef Job job = new_path_job(COOPOS_TRUNCATE, "truncate", -1, path)
    job.job.length = length
    run(job)
    result_of(job, None, subject)


def open_at_once(bytes path not None, Py_ssize_t flags, Py_ssize_t mode, dir_fd, subject):
    """openat(2) of what nobody has to be waited for. -1: somebody has, who keeps a lease on the file; or it is a FIFO by now."""
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
    """openat(2) that may wait for somebody at the other end. What it raises names *subject* as the file."""
    cdef Job job = new_path_job(COOPOS_OPEN, "open", AT_FDCWD if dir_fd is None else as_int(dir_fd), path)
    job.job.flags = as_int(flags)
    job.job.mode = <mode_t>as_int(mode)
    job.job.waits_for_peer = True
    run(job)
    return result_of(job, None, subject)


def wait_lock(Py_ssize_t fd, Py_ssize_t length, Py_ssize_t start=0, Py_ssize_t whence=1, kind=None):
    """fcntl(2) with F_SETLKW; with the defaults lockf(3) with F_LOCK. A greenlet that is killed or timed out has no lock by it."""
    cdef Job job = new_job(COOPOS_SETLK, "lockf", as_int(fd))
    cdef off_t position = -1
    cdef stat_t st
    job.job.flags, job.job.whence = F_WRLCK if kind is None else as_int(kind), as_int(whence)
    # What is undone is to be what was locked, wherever the offset and the end of the file are by then.
    if job.job.whence == SEEK_CUR:
        position = lseek(job.fd, 0, SEEK_CUR)
    elif job.job.whence == SEEK_END and fstat(job.fd, &st) == 0:
        position = st.st_size
    if position >= 0:
        job.job.whence = SEEK_SET
        start += position
    job.job.offset, job.job.length = start, length
    job.job.waits_for_peer = True
    run(job)
    result_of(job, fd)


def note_lock(Py_ssize_t fd, bint is_flock, bint is_got):
    """A lock was got, or released, without waiting: whoever waits for it in this process has to know."""
    coopos_lock_note(COOPOS_FLOCK if is_flock else COOPOS_SETLK, as_int(fd), is_got)


def wait_flock(Py_ssize_t fd, Py_ssize_t operation):
    """flock(2). A greenlet that is killed or timed out has no lock by it."""
    cdef Job job = new_job(COOPOS_FLOCK, "flock", as_int(fd))
    job.job.flags = as_int(operation)
    job.job.waits_for_peer = True
    run(job)
    result_of(job, fd)


cdef dict _transfers = {"copy_file_range": COOPOS_COPY, "sendfile": COOPOS_SENDFILE, "splice": COOPOS_SPLICE}


def transfer(
    str name not None, Py_ssize_t source, offset, Py_ssize_t target, target_offset, Py_ssize_t count, Py_ssize_t flags=0,
    bint waits_for_peer=False,
):
    """copy_file_range(2), sendfile(2) or splice(2); an offset of None is the descriptor's own. How many bytes."""
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
    return result_of(job, source)


def random(Py_ssize_t size, Py_ssize_t flags):
    """getrandom(2)."""
    cdef Job job = new_job(COOPOS_RANDOM, "getrandom", -1, <size_t>size)
    job.job.flags = as_int(flags)
    job.job.waits_for_peer = True
    run(job)
    return PyBytes_FromStringAndSize(job.job.buf, result_of(job, size))


cdef bint wait_semaphore(sem_t *semaphore, object subject) except -1:
    """sem_wait(3). False: there was no thread, or no descriptor, to wait by. A greenlet that is killed or timed out has taken
    nothing from it.
    """
    cdef Job job = new_job(COOPOS_SEM_WAIT, "sem_wait")
    job.job.semaphore = semaphore
    job.job.waits_for_peer = True
    try:
        run(job)
    except OSError:
        if job.has_begun:          # thrown in
            raise
        return False
    result_of(job, subject)
    return True
