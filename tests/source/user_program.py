"""Calls every public function of coopos, with every keyword that os and gevent lack. Never run: test_types.py checks its types.

It is written as a user would, without a cast and without an ignored error.
"""

import fcntl
import os
from collections.abc import Callable
from typing import Any

import coopos
from coopos import subprocess


def ended(child: Any) -> None:
    print(child.pid, child.rpid, child.rstatus)


def forks(loop: Any) -> None:
    pid: int = coopos.fork(keep_greenlets=False)
    pid = coopos.fork()
    pid = coopos.fork(ended, loop, True, coopos.fork_gevent, keep_greenlets=True)
    pid = coopos.fork_gevent(keep_greenlets=None)
    pid = coopos.fork_and_watch(callback=ended, loop=loop, ref=True, fork=os.fork, keep_greenlets=False)
    pid, fd = coopos.forkpty(winsize=(24, 80), keep_greenlets=False)
    pid, fd = coopos.forkpty(callback=ended, loop=loop, ref=False, forkpty=coopos.forkpty_gevent)
    pid, fd = coopos.forkpty_gevent(winsize=(24, 80), keep_greenlets=True)
    pid, fd = coopos.forkpty_and_watch(callback=ended, ref=True, forkpty=os.forkpty, keep_greenlets=False, winsize=(24, 80))
    with coopos.fork_policy(keep_greenlets=False):
        print(pid, coopos.read_pty(fd, 100).decode())
    coopos.register_at_fork(before=lambda: None, after_in_child=lambda: None, after_in_parent=lambda: None)


def waits(pid: int, loop: Any) -> None:
    child = coopos.watch(pid, callback=ended, loop=loop, ref=True)
    coopos.wait_exit(child.pid)
    child.stop()
    pid, status = coopos.waitpid(child.rpid, os.WNOHANG)
    pid, status = coopos.wait()
    pid, status, usage = coopos.wait3(0)
    pid, status, usage = coopos.wait4(-1, 0)
    result = coopos.waitid(os.P_PID, pid, os.WEXITED)
    if result is not None:
        print(result.si_status, status, usage.ru_utime)


def programs(env: dict[str, str]) -> None:
    pid: int = coopos.posix_spawn("/bin/true", ["true"], env, setsid=True)
    pid = coopos.posix_spawnp("true", ["true"], env, file_actions=[(os.POSIX_SPAWN_CLOSE, 0)])
    pid = coopos.spawnl(os.P_NOWAIT, "/bin/true", "true")
    pid = coopos.spawnle(os.P_NOWAIT, "/bin/true", "true", env)
    pid = coopos.spawnlp(os.P_NOWAIT, "true", "true")
    pid = coopos.spawnlpe(os.P_NOWAIT, "true", "true", env)
    pid = coopos.spawnv(os.P_NOWAIT, "/bin/true", ["true"])
    pid = coopos.spawnve(os.P_NOWAIT, "/bin/true", ["true"], env)
    pid = coopos.spawnvp(os.P_NOWAIT, "true", ["true"])
    pid = coopos.spawnvpe(os.P_NOWAIT, "true", ["true"], env)
    status: int = coopos.system("true")
    with coopos.popen("true", "r", 1) as output:
        print(pid, status, output.read())
    with subprocess.Popen(["true"], pty=True, winsize=(24, 80), text=True) as process:
        process.rawlink(print)
        process.unlink(print)
        print(process.pty.read(), process.wait(timeout=1.5), process.result.get())
    print(subprocess.run(["true"], capture_output=True, check=True).stdout)
    print(subprocess.check_output(["true"], text=True).upper())


def moves(fd: int, other: int) -> None:
    data: bytes = coopos.read(fd, 10) + coopos.nb_read(fd, 10) + coopos.pread(fd, 10, 0) + coopos.tp_read(fd, 10)
    data += coopos.read_exactly(fd, 10)
    buffer = bytearray(10)
    count: int = coopos.readinto(fd, buffer) + coopos.readv(fd, [buffer]) + coopos.preadv(fd, [buffer], 0)
    count += coopos.write(fd, data) + coopos.nb_write(fd, data) + coopos.pwrite(fd, data, 0) + coopos.tp_write(fd, data)
    count += coopos.writev(fd, [data]) + coopos.pwritev(fd, [data], 0)
    coopos.write_all(fd, memoryview(data))
    count += coopos.sendfile(fd, other, 0, 10) + coopos.splice(fd, other, 10) + coopos.copy_file_range(fd, other, count)
    coopos.eventfd_write(fd, coopos.eventfd_read(fd))
    coopos.make_nonblocking(fd)


def files(fd: int, opener: Callable[[str, int], int]) -> None:
    coopos.posix_fallocate(fd, 0, 100)
    coopos.truncate("file", 10)
    coopos.ftruncate(fd, 10)
    coopos.fsync(fd)
    coopos.fdatasync(fd)
    coopos.sync()
    coopos.lockf(fd, os.F_LOCK, 0)
    coopos.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with coopos.fdopen(fd, "w", buffering=1, encoding="utf-8", closefd=False) as text:
        text.write("line\n")
    with coopos.FileIO(coopos.open("file", os.O_RDWR, 0o600, dir_fd=None), mode="r+", closefd=True) as raw:
        print(raw.read(10), raw.write(b"more"), raw.fileno())
    coopos.FileIO("file", "w", opener=opener).close()
    coopos.close(fd)
    coopos.closerange(10, 20)


def others() -> None:
    print(coopos.getrandom(8) + coopos.urandom(8))
    print(coopos.getlogin(), coopos.getgrouplist("root", 0))
    coopos.initgroups("root", 0)
    coopos.patch(io=True, keep_greenlets=False)
    state: str = coopos.patched()["os.read"]
    coopos.unpatch()
    status: int = coopos.doctor()
    text: str = coopos.report() + coopos.report(as_json=True)
    count: int = coopos.counters()["parked"]

    print(coopos.getpid(), coopos.environ["PATH"], state, status, text, count)
