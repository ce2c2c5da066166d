"""A table of calls of the public functions, one way or several each, for what is tried with all of them.

They are text, for scripts of run_script(), which have the globals of CALLS_NEED.
"""

#: What makes the state for a call (with *first* the call itself is made at once), the call, and what ends its wait if it waits.
READY = "reader, writer = os.pipe(); os.write(writer, bytes(4000))"
EMPTY = "reader, writer = os.pipe()"
FILE = "fd = os.open(path, os.O_RDWR); other = os.open(path + '2', os.O_RDWR | os.O_CREAT)"
ENDED = "pid = os.fork() or os._exit(7); os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)"
CHILD = "pid = alive()"
KILL = "os.kill(pid, signal.SIGKILL)"
FEED = "os.write(writer, b'x')"

#: {public name: (state, call, what ends its wait), ...}; several for one name, if there are ways that differ.
CALLS = {
    "FileIO": [(FILE, "coopos.FileIO(path, 'r+').close()")],
    "close": [(EMPTY, "coopos.close(os.dup(reader))")],
    "closerange": [(EMPTY, "coopos.closerange(1000, 1003)")],
    "copy_file_range": [(FILE, "coopos.copy_file_range(fd, other, 2, 0, 0)")],
    "eventfd_read": [("fd = os.eventfd(5, os.EFD_SEMAPHORE)", "coopos.eventfd_read(fd); os.eventfd_write(fd, 1)")],
    "eventfd_write": [("fd = os.eventfd(0)", "coopos.eventfd_write(fd, 1)")],
    "fdatasync": [(FILE, "coopos.fdatasync(fd)")],
    "fdopen": [(FILE, "coopos.fdopen(fd, 'r+b', closefd=False).close()")],
    "flock": [(FILE, "coopos.flock(fd, fcntl.LOCK_EX)")],
    "fsync": [(FILE, "coopos.fsync(fd)")],
    "ftruncate": [(FILE, "coopos.ftruncate(fd, 8)")],
    "getrandom": [("", "coopos.getrandom(5)")],
    "lockf": [(FILE, "coopos.lockf(fd, os.F_LOCK, 1)")],
    "make_nonblocking": [(EMPTY, "coopos.make_nonblocking(reader)")],
    "nb_read": [(READY, "coopos.nb_read(reader, 1)"), (EMPTY, "coopos.nb_read(reader, 1)", FEED)],
    "nb_write": [(EMPTY, "coopos.nb_write(writer, b'x')")],
    "open": [(FILE, "os.close(coopos.open(path, os.O_RDONLY))")],
    "posix_fallocate": [(FILE, "coopos.posix_fallocate(fd, 0, 8)")],
    "posix_spawn": [("", "spawned(coopos.posix_spawn('/bin/true', ['true'], os.environ))")],
    "posix_spawnp": [("", "spawned(coopos.posix_spawnp('true', ['true'], os.environ))")],
    "pread": [(FILE, "coopos.pread(fd, 600, 0)")],
    "preadv": [(FILE, "coopos.preadv(fd, [bytearray(2)], 0)")],
    "pwrite": [(FILE, "coopos.pwrite(fd, b'x', 0)")],
    "pwritev": [(FILE, "coopos.pwritev(fd, [b'x', b'y'], 0)")],
    "read": [
        (READY, "coopos.read(reader, 2)"),
        (EMPTY, "coopos.read(reader, 600)", FEED),
        ("reader, writer = os.openpty(); tty.setraw(reader)", "coopos.read(reader, 600)", FEED),
    ],
    "read_exactly": [(READY, "coopos.read_exactly(reader, 2)"), (EMPTY, "coopos.read_exactly(reader, 1)", FEED)],
    "read_pty": [("writer, reader = os.openpty(); tty.setraw(reader)", "coopos.read_pty(reader, 600)", FEED)],
    "readinto": [(READY, "coopos.readinto(reader, bytearray(1))")],
    "readv": [(READY, "coopos.readv(reader, [bytearray(1), bytearray(1)])"), (EMPTY, "coopos.readv(reader, [bytearray(1)])", FEED)],
    "sendfile": [(FILE + ";" + EMPTY, "coopos.sendfile(writer, fd, 0, 2)")],
    "splice": [(FILE + ";" + EMPTY, "coopos.splice(fd, writer, 1, offset_src=0)")],
    "sync": [("", "coopos.sync()")],
    "tp_read": [(FILE, "coopos.tp_read(fd, 2)"), (EMPTY, "coopos.tp_read(reader, 1)", FEED)],
    "tp_write": [(FILE, "coopos.tp_write(fd, b'x')")],
    "truncate": [(FILE, "coopos.truncate(path, 8)")],
    "urandom": [("", "coopos.urandom(5)")],
    "wait_exit": [(CHILD, "coopos.wait_exit(pid)", KILL)],
    "waitid": [(ENDED, "coopos.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)")],
    "watch": [(CHILD, "coopos.watch(pid)", KILL)],
    "write": [(EMPTY, "coopos.write(writer, b'x')")],
    "write_all": [(EMPTY, "coopos.write_all(writer, b'x')")],
    "writev": [(EMPTY, "coopos.writev(writer, [b'x', b'y'])")],
}
for _name in ("spawnl", "spawnlp"):
    CALLS[_name] = [("", f"coopos.{_name}(os.P_WAIT, '/bin/true', 'true')")]
for _name in ("spawnle", "spawnlpe"):
    CALLS[_name] = [("", f"coopos.{_name}(os.P_WAIT, '/bin/true', 'true', os.environ)")]
for _name in ("spawnv", "spawnvp"):
    CALLS[_name] = [("", f"coopos.{_name}(os.P_WAIT, '/bin/true', ['true'])")]
for _name in ("spawnve", "spawnvpe"):
    CALLS[_name] = [("", f"coopos.{_name}(os.P_WAIT, '/bin/true', ['true'], os.environ)")]
for _name, _arguments in (("wait", ""), ("wait3", "0"), ("wait4", "pid, 0"), ("waitpid", "pid, 0")):
    CALLS[_name] = [(state, f"coopos.{_name}({_arguments})", *end) for state, *end in ((ENDED,), (CHILD, KILL))]

#: What the calls use: *path* is a file of ten bytes in a directory of its own.
CALLS_NEED = """
import fcntl, os, signal, tempfile, tty
import gevent, coopos

def alive():
    pid = os.fork()
    if pid == 0:
        try:
            signal.pause()
        finally:
            os._exit(1)
    return pid

path = os.path.join(tempfile.mkdtemp(), "file")
with open(path, "wb") as file:
    file.write(bytes(10))
"""
