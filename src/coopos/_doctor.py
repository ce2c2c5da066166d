"""``python -m coopos doctor``: which mechanism serves what on this machine, each proved on a real one.

A check makes the thing, has coopos wait for it while another greenlet runs, and compares what came out. It returns the name of the
mechanism that did it; or a Fallback, if that one stands in for a better one which this machine refuses. A fallback is no failure. A
check that hangs is ended by a timeout, and has failed. What patch() changes is checked in a fresh interpreter. Where there is no
compiled core only the threadpool is checked. Asks the modules that do the work, and doesn't know the façade.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import socket
import sys
import tempfile
import textwrap
from typing import TYPE_CHECKING, Any

import gevent
from gevent.hub import get_hub

from coopos import _files, _patch, _settings

HAS_CORE = hasattr(os, "fork")
if HAS_CORE:
    from coopos import _core, _fork, _programs

if TYPE_CHECKING:
    from collections.abc import Callable

CHECK_TIMEOUT_S = 30.0
MESSAGE = b"coopos"
#: errnos by which a kernel or a sandbox says that it has no such call.
REFUSALS = (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EMFILE, errno.ENFILE)


class Fallback(str):
    """A mechanism that serves in the place of a better one; *advice* says why, and how to get the other."""

    advice: str

    def __new__(cls, mechanism: str, advice: str) -> Fallback:
        self = super().__new__(cls, mechanism)
        self.advice = advice
        return self


def _expect(got: object, wanted: object) -> None:
    if got != wanted:
        raise AssertionError(f"got {got!r}, expected {wanted!r}")


def _waits(read: Callable[[], bytes], write: Callable[[], object]) -> None:
    """*read* must wait, let *write* happen meanwhile, and bring what was written."""
    reader = gevent.spawn(read)
    try:
        gevent.sleep(0)
        if reader.ready():
            raise AssertionError(f"read did not wait: {reader.value!r}, {reader.exception!r}")
        write()
        _expect(reader.get(), MESSAGE)
    finally:
        reader.kill()


def _close(fd: int) -> None:
    """Without a core nobody waits for a descriptor, and os.close is enough."""
    (_core.close if HAS_CORE else os.close)(fd)


def _nonblocking(read_fd: int, write_fd: int) -> str:
    """nb_read and nb_write on the two ends of something; closes them."""
    try:
        _core.make_nonblocking(read_fd)
        _core.make_nonblocking(write_fd)
        _waits(lambda: _core.nb_read(read_fd, 100), lambda: _core.nb_write(write_fd, MESSAGE))
    finally:
        _close(read_fd)
        _close(write_fd)
    return "read(2), write(2), and the hub while they would block"


def _counts() -> list[int]:
    return [_core.count_calls(), _core.count_guarded_calls(), _core.count_dontwait_calls()]


def _mechanism(call: Callable[[], object], wanted: object) -> str:
    """What serves a call that has nothing to wait for: which kinds of files know RWF_NOWAIT differs from kernel to kernel."""
    before = _counts()
    _expect(call(), wanted)
    for name, count, now in zip(("a worker thread", "poll(2), and a guard", "MSG_DONTWAIT"), before, _counts(), strict=True):
        if now > count:
            return name
    return "RWF_NOWAIT"


def _any_mode(read_fd: int, write_fd: int = -1) -> str:
    """What serves read on a descriptor that has data, whatever its mode, and write on its other end."""
    if not HAS_CORE:
        _expect(_files.tp_read(read_fd, 100), MESSAGE)
        return "the threadpool"
    reads = _mechanism(lambda: _core.read(read_fd, len(MESSAGE)), MESSAGE)
    writes = reads if write_fd < 0 else _mechanism(lambda: _core.write(write_fd, MESSAGE), len(MESSAGE))
    return reads if reads == writes else f"{reads} for reads, {writes} for writes"


def check_pipe() -> str:
    return _nonblocking(*os.pipe())


def check_socket() -> str:
    ours, theirs = socket.socketpair()
    return _nonblocking(ours.detach(), theirs.detach())


def check_pty() -> str:
    import termios

    master, slave = os.openpty()
    attributes = termios.tcgetattr(slave)
    attributes[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    return _nonblocking(slave, master)


def _blocking(read_fd: int, write_fd: int) -> str:
    """tp_read and tp_write on the two ends of something; closes them."""
    try:
        _waits(lambda: _files.tp_read(read_fd, 100), lambda: _files.tp_write(write_fd, MESSAGE))
        _files.tp_write(write_fd, MESSAGE)
        return _any_mode(read_fd, write_fd)
    finally:
        _close(read_fd)
        _close(write_fd)


def check_blocking_pipe() -> str:
    return _blocking(*os.pipe())


def check_blocking_socket() -> str:
    ours, theirs = socket.socketpair()
    return _blocking(ours.detach(), theirs.detach())


def check_fifo() -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "fifo")
        os.mkfifo(path)
        fd = os.open(path, os.O_RDWR)
        try:
            _waits(lambda: _files.tp_read(fd, 100), lambda: os.write(fd, MESSAGE))
            os.write(fd, MESSAGE)
            return _any_mode(fd)
        finally:
            _core.close(fd)


def check_file() -> str:
    with tempfile.TemporaryFile() as file:
        file.write(MESSAGE)
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        mechanism = _any_mode(file.fileno(), file.fileno())
        if mechanism == "a worker thread" and hasattr(os, "RWF_NOWAIT"):
            return Fallback(mechanism, _why_no_nowait(file.fileno()))
        return mechanism


def _why_no_nowait(fd: int) -> str:
    if not _settings.NOWAIT:
        return "COOPOS_NOWAIT=0 is set. Without it, coopos reads a file in the page cache without a thread."
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError as ex:
        if ex.errno in (errno.EPERM, errno.EACCES):
            return "A sandbox refuses preadv2(2). Allow preadv2 and pwritev2 in its profile: then cached files need no thread."
    return f"The kernel, or the file system of {tempfile.gettempdir()}, has no RWF_NOWAIT. Linux has it since 4.14."


def check_set() -> str:
    err = _core.set_error(get_hub().loop)
    if not err:
        return "one epoll(7) set for all waits of the loop"
    mechanism = "a watcher of gevent's loop for each wait"
    if _settings.SETS == "watchers":
        return Fallback(mechanism, "COOPOS_SETS=watchers is set. Without it, one epoll set serves all waits, faster.")
    if err in (errno.EMFILE, errno.ENFILE):
        return Fallback(mechanism, "No descriptor is left for a set: raise the limit of open files (ulimit -n).")
    if not sys.platform.startswith("linux"):
        return mechanism
    refusal = errno.errorcode.get(err, err)
    return Fallback(mechanism, f"epoll_create1(2) fails with {refusal}. Allow it in the seccomp profile: a wait then costs less.")


def check_close() -> str:
    read_fd, write_fd = os.pipe()
    _core.make_nonblocking(read_fd)
    outcome: list[int | None] = []

    def read() -> None:
        try:
            _core.nb_read(read_fd, 1)
        except OSError as ex:
            outcome.append(ex.errno)

    reader = gevent.spawn(read)
    gevent.sleep(0)
    _core.close(read_fd)
    try:
        again = os.dup(write_fd)
        os.close(again)
        _expect(again, read_fd)  # the number is free at once
        reader.join()
        _expect(outcome, [errno.EBADF])
    finally:
        _core.close(write_fd)
    return "close(2) at once, EBADF for whoever waits"


def _why_no_pidfd(err: int) -> str:
    if _settings.CHILDREN == "thread":
        return "COOPOS_CHILDREN=thread is set. Without it, pidfds watch the children."
    if err in (errno.EMFILE, errno.ENFILE):
        return "No descriptor was left for a pidfd: raise the limit of open files (ulimit -n)."
    return (
        f"pidfd_open(2) fails with {errno.errorcode.get(err, err)}. Linux has it since 5.3; a container may refuse it. Allow "
        "pidfd_open, pidfd_send_signal and waitid in the seccomp profile: children then cost less, and no signal hits a wrong one."
    )


def check_child() -> str:
    ended: list[_core.Child] = []
    pid = _fork.fork_and_watch(ended.append)
    if pid == 0:
        os._exit(7)
    _expect(_core.waitpid(pid, 0), (pid, 7 << 8))
    while not ended:
        gevent.sleep(0)
    mechanism = f"{ended[0].mechanism}, and no SIGCHLD handler"
    if ended[0].mechanism == "thread" and hasattr(os, "pidfd_open"):
        return Fallback(mechanism, _why_no_pidfd(next(iter(_core.count_refusals()), 0)))
    return mechanism


def check_any_child() -> str:
    pid = _fork.fork()
    if pid == 0:
        os._exit(7)
    _expect(_core.waitpid(-1, 0), (pid, 7 << 8))
    return "waitid(2) in a thread that only looks"


def check_any_process() -> str:
    pid = _fork.fork_gevent()
    if pid == 0:
        os._exit(7)
    refusal = None
    try:
        _core.wait_exit(pid)
    except OSError as ex:
        if ex.errno not in REFUSALS:
            raise
        refusal = ex
    _expect(_core.waitpid(pid, 0 if refusal else os.WNOHANG), (pid, 7 << 8))
    if refusal is not None:
        name = errno.errorcode.get(refusal.errno or 0)
        return Fallback("none: wait_exit() fails", f"It needs pidfd_open(2), which fails with {name}. No other function does.")
    return "a pidfd; its status is left to its parent"


def check_program() -> str:
    pid = _programs.posix_spawn(sys.executable, [sys.executable, "-c", "raise SystemExit(7)"], dict(os.environ))
    _expect(_core.waitpid(pid, 0), (pid, 7 << 8))
    return "posix_spawn(3), watched"


def check_subprocess() -> str:
    from coopos.subprocess import PIPE, Popen

    copy = [sys.executable, "-I", "-S", "-c", "import os; os.write(1, os.read(0, 100))"]
    with Popen(copy, stdin=PIPE, stdout=PIPE) as process:
        stdin = process.stdin
        assert stdin is not None and process.stdout is not None
        _waits(process.stdout.read, lambda: (stdin.write(MESSAGE), stdin.close()))
        _expect(process.wait(), 0)
    return "the stdlib's code, over coopos' reads, writes and waits"


#: Begins every program that is run in a fresh interpreter. -I keeps files beside the program out.
PATCHED = """
import sys
sys.path[:] = sys.argv[1:]
from gevent import monkey
monkey.patch_all()
import os, subprocess
import coopos, gevent
coopos.patch(io=True)
"""

PATCHING = """
reader, writer = os.pipe()
gevent.spawn(os.write, writer, b"coopos")
assert os.read(reader, 100) == b"coopos"
pid = os.fork()
if pid == 0:
    os._exit(7)
assert os.waitpid(pid, 0) == (pid, 7 << 8)
assert subprocess.call([sys.executable, "-I", "-S", "-c", "raise SystemExit(7)"]) == 7
print(list(coopos.patched().values()).count("coopos"))
"""

MULTIPROCESSING = """
import multiprocessing
def answer(connection):
    connection.send(connection.recv())
context = multiprocessing.get_context("fork")
ours, theirs = context.Pipe()
process = context.Process(target=answer, args=(theirs,))
process.start()
gevent.spawn(ours.send, "coopos")
assert ours.recv() == "coopos"
process.join()
assert process.exitcode == 0
try:
    lock = context.Lock()
except (ImportError, OSError) as ex:
    print(f"{type(ex).__name__}: {ex}")
    raise SystemExit
lock.acquire()
waiter = gevent.spawn(lock.acquire)
gevent.sleep(0)
assert not waiter.ready()
lock.release()
assert waiter.get()
with context.Pool(1) as pool:
    assert pool.map(abs, [-7]) == [7]
"""


def _run_patched(source: str) -> str:
    from coopos.subprocess import DEVNULL, run

    command = [sys.executable, "-I", "-W", "ignore", "-c", PATCHED + source, *sys.path]
    done = run(command, stdin=DEVNULL, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise AssertionError("".join(done.stderr.strip().splitlines()[-1:]) or f"ended with {done.returncode}")
    return done.stdout.strip()


def check_patching() -> str:
    return f"patch(io=True) replaces {_run_patched(PATCHING)} names in a fresh interpreter"


def check_multiprocessing() -> str:
    refusal = _run_patched(MULTIPROCESSING)
    if refusal:
        return Fallback("pipes and processes, no locks, queues and pools", f"There are no semaphores ({refusal}). Mount /dev/shm.")
    return "connections wait in the hub, locks in a worker thread"


CHECKS: list[tuple[str, Callable[[], str]]] = [("blocking pipe", check_blocking_pipe), ("regular file", check_file)]
if HAS_CORE:
    CHECKS = [
        ("set", check_set),
        ("pipe", check_pipe),
        ("socket", check_socket),
        ("pty", check_pty),
        *CHECKS,
        ("blocking socket", check_blocking_socket),
        ("FIFO", check_fifo),
        ("close", check_close),
        ("child", check_child),
        ("any child", check_any_child),
        ("program", check_program),
        ("subprocess", check_subprocess),
        ("patching", check_patching),
        ("multiprocessing", check_multiprocessing),
    ]
    if hasattr(os, "pidfd_open"):
        CHECKS.append(("any process", check_any_process))


def examine(tell: Callable[[dict[str, str]], object]) -> list[dict[str, str]]:
    """Make every check, and *tell* what was found: a check may crash the process."""
    findings = []
    for name, check in CHECKS:
        findings.append(_finding(name, check))
        tell(findings[-1])
    return findings


def _finding(name: str, check: Callable[[], str]) -> dict[str, str]:
    try:
        with gevent.Timeout(CHECK_TIMEOUT_S, AssertionError("hung")):
            mechanism = check()
    except Exception as ex:
        return {"name": name, "state": "failed", "mechanism": f"{type(ex).__name__}: {ex}"}
    if isinstance(mechanism, Fallback):
        return {"name": name, "state": "fallback", "mechanism": str(mechanism), "advice": mechanism.advice}
    return {"name": name, "state": "ok", "mechanism": mechanism}


def facts() -> dict[str, Any]:
    return {
        "coopos": sys.modules["coopos"].__version__,  # not imported: the façade knows the doctor, and not the other way about
        "gevent": gevent.__version__,
        "loop": type(get_hub().loop).__module__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "patched": _patch.patched(),
    }


def pidfds_refused() -> dict[str, int]:
    return {errno.errorcode.get(code, str(code)): count for code, count in _core.count_refusals().items()} if HAS_CORE else {}


def print_facts(known: dict[str, Any]) -> None:
    print(f"coopos {known['coopos']} with gevent {known['gevent']} on {known['loop']}")
    print(f"Python {known['python']} on {known['platform']}")
    names: dict[str, list[str]] = {}
    for name, state in known["patched"].items():
        names.setdefault(state, []).append(name)
    if "coopos" not in names:
        print("not patched: this process. In a program coopos.patched() says what is replaced, and why the rest is not")
        return
    print(f"replaced by coopos in this process: {len(names.pop('coopos'))} names")
    for state, left in names.items():
        print(f"not replaced, since {state}: {len(left) if len(left) > 9 else ', '.join(left)}")


def print_finding(finding: dict[str, str]) -> None:
    state = finding["state"]
    print(f"{finding['name']:15} {'FAILED' if state == 'failed' else state:8} {finding['mechanism']}", flush=True)
    if "advice" in finding:
        print(textwrap.fill(finding["advice"], 100, initial_indent=" " * 25, subsequent_indent=" " * 25))


def print_sum(states: list[str]) -> None:
    if HAS_CORE:
        counts = ", ".join(f"{name} {count} times" for name, count in pidfds_refused().items())
        print(f"pidfds refused in this process: {counts or 'none'}")
    fallen = states.count("fallback")
    words = f", {fallen} of them by a fallback: it works, but something better is refused" if fallen else ""
    print(f"{len(states) - states.count('failed')} of {len(states)} are well{words}")


def print_report_of(parser: argparse.ArgumentParser, pid: int, is_json: bool) -> int:
    if not HAS_CORE:
        parser.error("this system has no reports")
    if pid <= 0:
        parser.error(f"{pid} is no process")
    from coopos import _on_demand

    try:
        print(_on_demand.ask(pid, is_json).rstrip("\n"))
    except _on_demand.NoAnswerError as ex:
        print(f"{parser.prog}: {ex}", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Make every check and print a line for each. 0 if all are well, be it by a fallback; else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m coopos doctor",
        description="Say which mechanism of this machine serves what, and prove each on a real pipe, file or child.",
        epilog="A fallback works: this machine refuses something better, and the lines below it say how to get that. "
        "The exit status is 1 if a check has failed, else 0.",
    )
    parser.add_argument("--json", action="store_true", help="print all of it as one JSON object")
    parser.add_argument("--pid", type=int, metavar="PID", help="print the report of that process, which has COOPOS_REPORT=socket")
    options = parser.parse_args(arguments or [])
    is_json = options.json
    if options.pid is not None:
        return print_report_of(parser, options.pid, is_json)
    known = facts()
    if not is_json:
        print_facts(known)
    findings = examine((lambda finding: None) if is_json else print_finding)
    states = [finding["state"] for finding in findings]
    if is_json:
        state = next((state for state in ("failed", "fallback") if state in states), "ok")
        print(json.dumps({"state": state, **known, "checks": findings, "pidfds_refused": pidfds_refused()}, indent=1))
    else:
        print_sum(states)
    return 1 if "failed" in states else 0
