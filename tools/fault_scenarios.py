"""The programs that faults.py runs while a system call fails: reads, writes, closes and files, a few lines each.

A scenario is a function that makes the state it needs and returns its body. Only the body is under the fault: the process waits
for a signal before and after it, while faults.py lets strace in and out. fault_children.py has more of them.
"""

import contextlib
import ctypes
import fcntl
import os
import termios

import gevent
from fault_states import (
    END_S,
    beside,
    clog,
    coopos,
    draining,
    helped,
    helpers,
    kept,
    killed,
    make_fifo,
    make_file,
    make_lock_holder,
    make_path,
    make_pipe,
    make_socket,
    make_terminal,
    parked,
    scenario,
    surely,
    until_closed,
)

# ---- reading and writing -----------------------------------------------------------------------------------------------------


@scenario
def read_pipe_parked(stack):
    reader, writer = make_pipe(stack, blocking=False)
    return helped(lambda: coopos.read(reader, 10), os.write, writer, b"x")


@scenario
def read_pipe_ready(stack):
    reader, writer = make_pipe(stack)
    os.write(writer, b"ready")
    return lambda: (coopos.nb_read(reader, 2), coopos.readinto(reader, bytearray(2)), coopos.tp_read(reader, 1))


@scenario
def read_socket_parked(stack):
    here, there = make_socket(stack)
    return helped(lambda: coopos.readv(here, [bytearray(1), bytearray(1)]), os.write, there, b"x")


@scenario(COOPOS_NOWAIT="0")
def read_socket_dontwait(stack):
    here, there = make_socket(stack)
    return helped(lambda: (coopos.read(here, 10), coopos.write(here, b"abc")), os.write, there, b"x")


@scenario
def read_fifo_guarded(stack):
    path = make_fifo(stack)
    [fd] = kept(stack, os.open(path, os.O_RDWR))
    return helped(lambda: coopos.read(fd, 10), os.write, fd, b"x")


@scenario
def write_fifo_guarded(stack):
    [fd] = kept(stack, os.open(make_fifo(stack), os.O_RDWR))
    size = clog(fd)

    def body():
        draining(fd, size)
        return coopos.write(fd, b"x" * 5000)

    return body


@scenario
def read_terminal(stack):
    master, slave = make_terminal(stack)
    return helped(lambda: coopos.read(slave, 10), os.write, master, b"x")


@scenario
def write_terminal(stack):
    master, slave = make_terminal(stack)
    os.set_blocking(master, False)

    def body():
        draining(master, 6000)
        return coopos.write(slave, b"x" * 6000)

    return body


@scenario
def read_terminal_vmin(stack):
    master, slave = make_terminal(stack)
    mode = termios.tcgetattr(slave)
    mode[6][termios.VMIN] = 3
    mode[6][termios.VTIME] = 1
    termios.tcsetattr(slave, termios.TCSANOW, mode)
    return helped(lambda: coopos.read(slave, 10), os.write, master, b"xyz")


@scenario
def read_inotify(stack):
    libc = ctypes.CDLL(None)
    path = make_path(stack)
    [fd] = kept(stack, libc.inotify_init())
    libc.inotify_add_watch(fd, path.encode(), 2)

    def body():
        beside(os.truncate, path, 1)
        return len(coopos.read(fd, 4096))

    return body


@scenario
def read_eventfd(stack):
    [fd] = kept(stack, os.eventfd(0, os.EFD_NONBLOCK))
    return helped(lambda: (coopos.eventfd_read(fd), coopos.eventfd_write(fd, 1)), os.eventfd_write, fd, 3)


@scenario
def read_timed_out(stack):
    reader, _writer = make_pipe(stack)

    def body():
        with gevent.Timeout(0.01, False):
            coopos.read(reader, 1)
        return "over"

    return body


@scenario(COOPOS_NOWAIT="0")
def read_file_in_worker(stack):
    fd = make_file(stack, b"0123456789")

    def body():
        first = coopos.read(fd, 3), coopos.pread(fd, 2, 5), coopos.tp_read(fd, 2)
        return first, os.lseek(fd, 0, os.SEEK_CUR)

    return body


@scenario(COOPOS_NOWAIT="0")
def write_file_in_worker(stack):
    fd = make_file(stack)

    def body():
        return coopos.write(fd, b"abc"), coopos.pwritev(fd, [b"d", b"e"], 1), coopos.tp_write(fd, b"f"), os.fstat(fd).st_size

    return body


@scenario
def read_and_write_file(stack):
    fd = make_file(stack, b"0123456789")
    return lambda: (coopos.read(fd, 3), coopos.pwrite(fd, b"ab", 5), coopos.pread(fd, 5, 3), coopos.preadv(fd, [bytearray(4)], 8))


@scenario
def write_pipe_parked(stack):
    reader, writer = make_pipe(stack)
    size = clog(writer)

    def body():
        draining(reader, size + 100_000)
        return coopos.write_all(writer, b"x" * 100_000)

    return body


@scenario
def write_pipe_parked_nonblocking(stack):
    reader, writer = make_pipe(stack)
    size = clog(writer)
    os.set_blocking(writer, False)

    def body():
        draining(reader, size)
        return coopos.nb_write(writer, b"x") == 1

    return body


@scenario
def many_parked(stack):
    pipes = [make_pipe(stack, blocking=False) for _ in range(5)]

    def body():
        waiting = [gevent.spawn(coopos.read, reader, 1) for reader, _ in pipes]
        helpers.extend(waiting)
        gevent.sleep(0)
        for _, writer in pipes:
            beside(os.write, writer, b"x")
        return [each.get(timeout=END_S) for each in waiting]

    return body


@scenario
def kill_parked(stack):
    reader, _writer = make_pipe(stack)
    return lambda: killed(parked(coopos.read, reader, 1))


@scenario(COOPOS_SETS="watchers")
def read_by_watchers(stack):
    reader, writer = make_pipe(stack)
    return helped(lambda: coopos.read(reader, 10), os.write, writer, b"x")


# ---- close -------------------------------------------------------------------------------------------------------------------


@scenario
def close_under_waiter(stack):
    reader, _writer = make_pipe(stack)

    def body():
        waiting = parked(until_closed, coopos.read, reader, 1)
        coopos.close(reader)
        return waiting.get(timeout=END_S)

    return body


@scenario
def close_under_worker(stack):
    path = make_path(stack)
    writer = make_lock_holder(stack, path, lambda fd: fcntl.flock(fd, fcntl.LOCK_EX))
    [fd] = kept(stack, os.open(path, os.O_RDWR))

    def body():
        waiting = parked(until_closed, coopos.flock, fd, fcntl.LOCK_EX)
        coopos.close(fd)
        result = waiting.get(timeout=END_S)
        surely(os.close, writer)
        return result

    return body


@scenario
def close_under_watcher(stack):
    reader, _writer = make_pipe(stack, blocking=False)
    watcher = gevent.get_hub().loop.io(reader, 1)
    stack.callback(watcher.close)
    stack.callback(watcher.stop)

    def body():
        watcher.start(lambda: None)
        coopos.close(reader)
        watcher.stop()
        gevent.sleep(0.01)

    return body


@scenario
def close_range(stack):
    fds = kept(stack, *(os.dup(0) for _ in range(4)))
    return lambda: coopos.closerange(min(fds), max(fds) + 1)


# ---- files -------------------------------------------------------------------------------------------------------------------


@scenario
def sync_file(stack):
    fd = make_file(stack, b"abc")

    def body():
        coopos.fsync(fd), coopos.fdatasync(fd), coopos.ftruncate(fd, 2), coopos.posix_fallocate(fd, 0, 10)
        return os.fstat(fd).st_size

    return body


@scenario
def truncate_path(stack):
    path = make_path(stack, b"abc")

    def body():
        coopos.truncate(path, 1)
        return os.stat(path).st_size

    return body


@scenario
def transfer(stack):
    source, target = make_file(stack, b"0123456789"), make_file(stack)
    here, there = make_socket(stack)
    reader, writer = make_pipe(stack)

    def body():
        done = coopos.copy_file_range(source, target, 4, 0, 0), coopos.sendfile(here, source, 2, 3)
        done += coopos.splice(source, writer, 5, offset_src=1), coopos.read(there, 10), coopos.read(reader, 10)
        return done

    return body


@scenario
def sendfile_to_clogged(stack):
    source = make_file(stack, b"0123456789")
    reader, writer = make_pipe(stack)
    size = clog(writer)

    def body():
        draining(reader, size)
        return coopos.sendfile(writer, source, 0, 10)

    return body


@scenario
def random_bytes(stack):
    return lambda: (len(coopos.urandom(8)), len(coopos.getrandom(8)))


@scenario
def open_file(stack):
    path = make_path(stack, b"abc")

    def body():
        fd = coopos.open(path, os.O_RDONLY)
        try:
            return coopos.read(fd, 10)
        finally:
            surely(os.close, fd)

    return body


@scenario
def open_fifo(stack):
    path = make_fifo(stack)

    def open_other_end():
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    def body():
        helper = gevent.spawn(surely_later, open_other_end)
        helpers.append(helper)
        fd = coopos.open(path, os.O_RDONLY)
        surely(os.close, fd)

    return body


def surely_later(function):
    """surely(), until it succeeds or a second is over: ENXIO, until the worker is in its open(2)."""
    for _ in range(300):
        with contextlib.suppress(OSError):
            return function()
        gevent.sleep(0.003)
    return None


@scenario
def open_fifo_killed(stack):
    path = make_fifo(stack)
    return lambda: killed(parked(coopos.open, path, os.O_RDONLY))


@scenario
def flock_contended(stack):
    path = make_path(stack)
    writer = make_lock_holder(stack, path, lambda fd: fcntl.flock(fd, fcntl.LOCK_EX))
    [fd] = kept(stack, os.open(path, os.O_RDWR))
    return helped(lambda: coopos.flock(fd, fcntl.LOCK_EX), os.close, writer)


@scenario
def lockf_contended(stack):
    path = make_path(stack)
    writer = make_lock_holder(stack, path, lambda fd: os.lockf(fd, os.F_LOCK, 0))
    [fd] = kept(stack, os.open(path, os.O_RDWR))
    return helped(lambda: coopos.lockf(fd, os.F_LOCK, 0), os.close, writer)


@scenario
def lockf_killed(stack):
    path = make_path(stack)
    make_lock_holder(stack, path, lambda fd: os.lockf(fd, os.F_LOCK, 0))
    [fd] = kept(stack, os.open(path, os.O_RDWR))
    return lambda: killed(parked(coopos.lockf, fd, os.F_LOCK, 0))


@scenario
def fileio(stack):
    path = make_path(stack, b"0123456789")

    def body():
        with coopos.FileIO(path, "r+") as file:
            return file.read(3), file.write(b"ab"), file.seek(0), file.readall(), file.truncate(2)

    return body


@scenario
def fdopen_lines(stack):
    reader, writer = os.pipe()
    kept(stack, reader, writer)

    def body():
        beside(os.write, writer, b"one\ntwo\n")
        with coopos.fdopen(reader, "r", closefd=False) as file:
            first = file.readline()
        with coopos.fdopen(writer, "wb", closefd=False) as file:
            file.write(b"three")
        return first

    return body
