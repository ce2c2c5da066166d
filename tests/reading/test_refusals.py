"""Kernels that refuse what this one grants, and calls that end with EINTR: a library under LD_PRELOAD stands for them."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from ..helpers.support import DEADLINE_S, run_script

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or not hasattr(os, "RWF_NOWAIT"), reason="these are Linux's calls"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here"),
]

HEAD = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define IS_NOWAIT(number, flags) (((number) == SYS_preadv2 || (number) == SYS_pwritev2) && ((flags) & 8))

static int refuse(long number, const long *args);

long syscall(long number, ...)
{
    long a[6];
    va_list args;
    int i;
    va_start(args, number);
    for (i = 0; i < 6; i++)
        a[i] = va_arg(args, long);
    va_end(args);
    if (refuse(number, a))
        return -1;
    return NEXT(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
"""

#: Before Linux 6.0 regular files alone have RWF_NOWAIT. A write to the page cache is EOPNOTSUPP, or on some file systems EINVAL.
OLD_KERNEL = HEAD + r"""
static int refuse(long number, const long *a)
{
    struct stat st;
    if (!IS_NOWAIT(number, a[5]) || fstat((int)a[0], &st) < 0 || (S_ISREG(st.st_mode) && number == SYS_preadv2))
        return 0;
    errno = S_ISREG(st.st_mode) ? WRITES : EOPNOTSUPP;
    return 1;
}
"""

#: Half of the calls that a signal may end say so, by chance, and have done nothing, from interrupt(1) on.
INTERRUPTING = HEAD + r"""
static int is_on, count;

int interrupt(int on)
{
    is_on = on;
    return count;
}

static int refuse(long number, const long *a)
{
    static __thread unsigned chance = 1;
    (void)a;
    if (!is_on || (number >= 0 && number != SYS_preadv2 && number != SYS_pwritev2 && number != SYS_waitid && number != SYS_splice
                   && number != SYS_copy_file_range && number != SYS_getrandom))
        return 0;
    chance = chance * 1664525u + 1013904223u;
    if (chance >> 31)
        return 0;
    __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED);
    errno = EINTR;
    return 1;
}

#define CALL(type, name, declared, given) \
    type name declared { return refuse(-1, NULL) ? -1 : NEXT(name) given; }

CALL(ssize_t, read, (int fd, void *buf, size_t n), (fd, buf, n))
CALL(ssize_t, write, (int fd, const void *buf, size_t n), (fd, buf, n))
CALL(ssize_t, readv, (int fd, const struct iovec *iov, int n), (fd, iov, n))
CALL(ssize_t, writev, (int fd, const struct iovec *iov, int n), (fd, iov, n))
CALL(ssize_t, pread64, (int fd, void *buf, size_t n, off64_t at), (fd, buf, n, at))
CALL(ssize_t, pwrite64, (int fd, const void *buf, size_t n, off64_t at), (fd, buf, n, at))
CALL(ssize_t, sendmsg, (int fd, const struct msghdr *message, int flags), (fd, message, flags))
CALL(ssize_t, recvmsg, (int fd, struct msghdr *message, int flags), (fd, message, flags))
CALL(ssize_t, sendfile64, (int to, int from, off64_t *at, size_t n), (to, from, at, n))
CALL(int, poll, (struct pollfd *fds, nfds_t n, int timeout), (fds, n, timeout))
CALL(int, epoll_wait, (int set, struct epoll_event *events, int n, int timeout), (set, events, n, timeout))
CALL(int, waitid, (idtype_t type, id_t id, siginfo_t *info, int options), (type, id, info, options))
CALL(int, flock, (int fd, int operation), (fd, operation))
CALL(int, fsync, (int fd), (fd))
CALL(int, fdatasync, (int fd), (fd))
CALL(int, ftruncate64, (int fd, off64_t length), (fd, length))
CALL(int, truncate64, (const char *path, off64_t length), (path, length))

int posix_fallocate64(int fd, off64_t at, off64_t length)
{
    return refuse(-1, NULL) ? EINTR : NEXT(posix_fallocate64)(fd, at, length);
}

int openat64(int fd, const char *path, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0;
    va_end(args);
    return refuse(-1, NULL) ? -1 : NEXT(openat64)(fd, path, flags, mode);
}
"""


def make_library(directory, source, *options):
    path = directory / "stand-in.so"
    (directory / "stand-in.c").write_text(source)
    command = ["cc", "-shared", "-fPIC", "-O1", *options, "-o", path, directory / "stand-in.c", "-ldl"]
    subprocess.run(command, check=True, timeout=DEADLINE_S)
    return os.fspath(path)


@pytest.mark.parametrize("writes", ["EOPNOTSUPP", "EINVAL"])
def test_kernel_that_has_rwf_nowait_for_files_alone(tmp_path, writes):
    """A cached file is read without a thread, though pipes and sockets are not asked so; what they do is the same."""
    library = make_library(tmp_path, OLD_KERNEL, f"-DWRITES={writes}")
    (tmp_path / "file").write_bytes(b"0123456789" * 1000)
    out = run_script("""
        import errno, os, socket, gevent, coopos
        from coopos import _core, _doctor

        gevent.sleep(0)            # without a hub no call goes to a worker
        fd = os.open("file", os.O_RDWR)
        os.read(fd, 10_000)
        os.lseek(fd, 0, os.SEEK_SET)
        try:
            os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError as ex:
            print("not on this file system", ex)
            raise SystemExit
        buffer = bytearray(100)
        assert coopos.read(fd, 10) == coopos.pread(fd, 10, 20) == b"0123456789"
        assert coopos.readv(fd, [buffer]) == coopos.preadv(fd, [buffer], 5) == coopos.readinto(fd, buffer) == 100
        with coopos.fdopen(os.dup(fd), "rb") as file:
            assert len(file.read()) == 10_000 - 210
        assert _core.count_calls() == 0
        assert coopos.pwrite(fd, b"abc", 0) == 3 and coopos.writev(fd, [b"x", b"yz"]) == 3
        assert os.pread(fd, 4, 0) == b"abc3" and os.pread(fd, 10, 10_000) == b"xyz"
        assert _core.count_calls() == 2
        for call in (os.pwritev, coopos.pwritev):
            try:
                call(fd, [b"x"] * 2000, 0)
            except OSError as ex:
                assert ex.errno == errno.EINVAL
            else:
                raise AssertionError("so many buffers")

        for reader, writer in (os.pipe(), [end.detach() for end in socket.socketpair()]):
            waiting = gevent.spawn(coopos.read, reader, 10)
            gevent.idle()
            assert not waiting.ready()
            assert coopos.write(writer, b"abc") == 3
            assert waiting.get() == b"abc"
        assert _core.count_calls() == 2
        _doctor.main()
    """, at=tmp_path / "script.py", LD_PRELOAD=library, COOPOS_NOWAIT=None, under=["env", "-C", os.fspath(tmp_path)])
    if "not on this" in out:
        pytest.skip(out)
    told = dict(re.findall(r"^(.+?) +(?:ok|fallback) +(.+)$", out, re.MULTILINE))
    assert told["blocking pipe"] == "poll(2), and a guard"
    assert told["blocking socket"] == "MSG_DONTWAIT"
    # The doctor's own file is on another file system, perhaps.
    assert told["regular file"] in ("RWF_NOWAIT for reads, a worker thread for writes", "a worker thread")


@pytest.mark.parametrize("nowait", [None, "0"])
def test_every_other_call_is_interrupted(tmp_path, nowait):
    """By a signal that has no handler of Python's: whatever is asked is asked again, and nothing is moved twice or lost."""
    library = make_library(tmp_path, INTERRUPTING)
    run_script("""
        import ctypes, fcntl, os, signal, socket, sys, gevent, coopos
        import coopos.subprocess

        libc = ctypes.CDLL(None)
        data = os.urandom(300_000)
        with gevent.Timeout(60):
            coopos.waitpid(coopos.fork() or os._exit(0), 0)
            libc.interrupt(1)

            def through(reader, writer, read, write):
                def all_of_it():
                    parts = []
                    while part := read(reader, 10_000):
                        parts.append(part)
                    return b"".join(parts)
                taker = gevent.spawn(all_of_it)
                gevent.idle()
                done = 0
                while done < len(data):
                    done += write(writer, data[done:done + 70_000]) or len(data)
                coopos.close(writer)
                assert taker.get() == data
                coopos.close(reader)

            def readinto(fd, n):
                buffer = bytearray(n)
                return bytes(buffer[:coopos.readinto(fd, buffer)])

            for read, write in [
                (coopos.read, coopos.write), (readinto, lambda fd, part: coopos.writev(fd, [part[:10], part[10:]])),
                (coopos.nb_read, coopos.nb_write), (coopos.tp_read, coopos.write_all),
            ]:
                for blocking in (True, False):
                    for ends in (os.pipe(), [end.detach() for end in socket.socketpair()]):
                        for end in ends:
                            os.set_blocking(end, blocking)
                        part = lambda fd, data: coopos.write_all(fd, data) or len(data)
                        through(*ends, read, part if write is coopos.write_all else write)

            fd = coopos.open("file", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            assert coopos.write(fd, data) == len(data)
            assert coopos.pread(fd, len(data), 0) == data
            assert coopos.pwrite(fd, b"abc", 5) == 3 and coopos.pread(fd, 3, 5) == b"abc"
            coopos.fsync(fd)
            coopos.fdatasync(fd)
            coopos.posix_fallocate(fd, 0, 400_000)
            assert os.fstat(fd).st_size == 400_000
            coopos.ftruncate(fd, 200_000)
            coopos.truncate("file", 100_000)
            assert os.fstat(fd).st_size == 100_000
            with coopos.FileIO("file") as file:
                assert len(file.readall()) == 100_000
            other = coopos.open("other", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            assert coopos.copy_file_range(fd, other, 1000, 0, 0) == 1000
            assert coopos.sendfile(other, fd, 0, 50_000) == 50_000
            reader, writer = os.pipe()
            if hasattr(os, "splice"):
                assert coopos.splice(fd, writer, 500, 0) == 500
                assert len(coopos.read(reader, 1000)) == 500

            coopos.flock(fd, fcntl.LOCK_EX)
            second = coopos.open("file", os.O_RDWR)
            waiting = gevent.spawn(coopos.flock, second, fcntl.LOCK_EX)
            gevent.sleep(0.05)
            assert not waiting.ready()
            coopos.flock(fd, fcntl.LOCK_UN)
            waiting.get()

            os.mkfifo("fifo")
            opening = gevent.spawn(coopos.open, "fifo", os.O_RDONLY)
            gevent.sleep(0.05)
            assert not opening.ready()
            end = coopos.open("fifo", os.O_WRONLY)
            coopos.close(opening.get())
            coopos.close(end)

            assert len(coopos.getrandom(100)) == 100

            def child(seconds):
                pid = coopos.fork()
                if pid == 0:
                    gevent.sleep(seconds)
                    os._exit(7)
                return pid

            pid = child(0.1)
            assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
            pid = child(0.1)
            assert coopos.waitpid(-1, 0) == (pid, 7 << 8)
            pid = child(0.1)
            assert coopos.waitid(os.P_PID, pid, os.WEXITED).si_status == 7
            if hasattr(os, "pidfd_open"):
                pid = child(0.1)
                coopos.wait_exit(pid)
                assert coopos.waitpid(pid, os.WNOHANG) == (pid, 7 << 8)
            done = coopos.subprocess.run([sys.executable, "-S", "-c", "print(input())"], input=b"hello", capture_output=True)
            assert (done.returncode, done.stdout) == (0, b"hello\\n")

            assert libc.interrupt(0) > 100
            for fd in (fd, other, second, reader, writer):
                coopos.close(fd)
    """, at=tmp_path / "script.py", LD_PRELOAD=library, COOPOS_NOWAIT=nowait, under=["env", "-C", os.fspath(tmp_path)])
