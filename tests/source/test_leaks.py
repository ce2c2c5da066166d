"""Every public call, on every way out of it, many times: nothing grows with the number of calls."""

import ast
import ctypes
import re

import pytest

import coopos

from ..helpers.calls import CALLS, CALLS_NEED, CHILD, EMPTY, FEED, FILE, KILL
from ..helpers.support import run_script

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no mallinfo2(3), of glibc 2.33")

CLOGGED = "reader, writer = make_clogged_pipe()"
DRAIN = "os.read(reader, 4096)"
HELD = FILE + "; coopos._core.hold(True)"
LET_GO = "coopos._core.hold(False)"

#: More ways in CALLS' form: calls that wait, what that table leaves out, and what is public but has no name of its own.
WAYS = {
    "FileIO": [
        (EMPTY, "coopos.FileIO(reader, closefd=False).read(1)", FEED),
        (EMPTY, "coopos.FileIO(reader, closefd=False).readinto(bytearray(1))", FEED),
        (CLOGGED, "coopos.FileIO(writer, 'w', closefd=False).write(b'x')", DRAIN),
    ],
    "eventfd_read": [("fd = os.eventfd(0)", "coopos.eventfd_read(fd)", "os.eventfd_write(fd, 1)")],
    "fdopen": [(EMPTY, "coopos.fdopen(reader, closefd=False).readline()", "os.write(writer, b'x\\n')")],
    "flock": [
        (
            "fd, other = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR); fcntl.flock(other, fcntl.LOCK_EX)",
            "coopos.flock(fd, fcntl.LOCK_EX)",
            "fcntl.flock(other, fcntl.LOCK_UN)",
        )
    ],
    "fork": [
        ("", "ended(coopos.fork())"),
        ("", "ended(coopos.fork(keep_greenlets=False))"),
    ],
    "fork_and_watch": [("", "ended(coopos.fork_and_watch(print_nothing))")],
    "fork_gevent": [("", "ended(coopos.fork_gevent())")],
    "fork_policy": [("", "with coopos.fork_policy(keep_greenlets=False): pass")],
    "forkpty": [("", "ended(*coopos.forkpty(winsize=(2, 2)))")],
    "forkpty_and_watch": [("", "ended(*coopos.forkpty_and_watch(print_nothing))")],
    "forkpty_gevent": [("", "ended(*coopos.forkpty_gevent())")],
    "fsync": [(HELD, "coopos.fsync(fd)", LET_GO)],
    "getgrouplist": [("", "coopos.getgrouplist('root', 0)")],
    "getlogin": [("", "outcome_of(coopos.getlogin)")],
    "lockf": [("pid = make_lock_holder(); fd = os.open(path, os.O_RDWR)", "coopos.lockf(fd, os.F_LOCK, 0)", KILL)],
    "multiprocessing.Lock": [
        ("lock = coopos._core.Semaphore(Plain()); lock.acquire()", "lock.acquire(); lock.release()", "lock.release()")
    ],
    "nb_write": [(CLOGGED, "coopos.nb_write(writer, b'x')", DRAIN)],
    "open": [("", "os.close(coopos.open(fifo, os.O_RDONLY))", "opened.append(os.open(fifo, os.O_RDWR))")],
    "popen": [("", "coopos.popen('exit 0').close()")],
    "posix_fallocate": [(HELD, "coopos.posix_fallocate(fd, 0, 8)", LET_GO)],
    "read_exactly": [(EMPTY, "coopos.read_exactly(reader, 2)", "os.write(writer, b'xy')")],
    "readinto": [(EMPTY, "coopos.readinto(reader, bytearray(1))", FEED)],
    "counters": [("", "coopos.counters()")],
    "register_at_fork": [],
    "report": [("", "coopos.report()"), ("", "coopos.report(as_json=True)")],
    "sendfile": [(FILE + ";" + CLOGGED, "coopos.sendfile(writer, fd, 0, 2)", DRAIN)],
    "splice": [(FILE + ";" + EMPTY, "coopos.splice(reader, fd, 1)", FEED)],
    "subprocess.Popen": [
        ("", "coopos.subprocess.run(['/bin/true'], capture_output=True)"),
        ("", "outcome_of(lambda: coopos.subprocess.run(['/bin/nothing']))"),
        (EMPTY, "coopos.subprocess.run(['/bin/cat'], stdin=reader, capture_output=True)", "os.close(writer)"),
        (EMPTY, "outcome_of(lambda: coopos.subprocess.run(['/bin/cat'], stdin=reader, timeout=0.001))"),
    ],
    "system": [("", "coopos.system('exit 0')")],
    "thread": [("", "in_thread(coopos.sync)"), ("", "in_thread(with_hub)")],
    "tp_write": [(CLOGGED, "coopos.tp_write(writer, b'x')", DRAIN)],
    "unpatch": [("gevent.monkey.patch_all()", "coopos.patch(io=True); coopos.patched(); coopos.unpatch()")],
    "waitid": [(CHILD, "coopos.waitid(os.P_PID, pid, os.WEXITED)", KILL), (CHILD, "coopos.waitid(os.P_ALL, 0, os.WEXITED)", KILL)],
    "waitpid": [(CHILD, "coopos.waitpid(-1, 0)", KILL), (CHILD, "coopos.waitpid(pid, os.WUNTRACED)", KILL)],
    "write": [(CLOGGED, "coopos.write(writer, b'x')", DRAIN)],
    "write_all": [(CLOGGED, "coopos.write_all(writer, b'x')", DRAIN)],
    "writev": [(CLOGGED, "coopos.writev(writer, [b'x', b'y'])", DRAIN)],
}
#: What grows without coopos, too: gevent leaves some objects of a thread's hub, even if the hub is destroyed.
OF_OTHERS = {"in_thread(with_hub)": {"objects", "malloc", "references"}}
#: patch() and patched() are in unpatch's way; the doctor starts interpreters of its own; initgroups changes this process's groups.
LEFT_OUT = {"patch", "patched", "doctor", "initgroups"}

SCRIPT = """
import ctypes, errno, gc, itertools, multiprocessing, sys, threading
import gevent.monkey
import coopos.io, coopos.subprocess

# Small integers are shared objects. Of a higher number a reference that leaks is memory that leaks.
while os.dup(0) < 257:
    pass
fifo = path + ".fifo"
os.mkfifo(fifo)
opened = []
WRONG = object()

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info

def Plain():
    return multiprocessing.get_context("fork").Lock()._semlock

def make_clogged_pipe():
    reader, writer = os.pipe()
    fcntl.fcntl(writer, 1031, 4096)     # F_SETPIPE_SZ
    os.write(writer, bytes(4096))
    return reader, writer

def make_lock_holder():
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.lockf(os.open(path, os.O_RDWR), os.F_LOCK, 0)
            os.write(tell, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    os.read(told, 1)
    os.close(told)
    return pid

def print_nothing(child):
    pass

def ended(pid, fd=None):
    if pid == 0:
        os._exit(7)
    assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
    if fd is not None:
        os.close(fd)

def spawned(pid):
    assert coopos.waitpid(pid, 0) == (pid, 0)

def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    gevent.get_hub().threadpool.apply(thread.join)

def time_out():
    reader, writer = os.pipe()
    with gevent.Timeout(0, False):
        coopos.read(reader, 1)
    os.close(reader)
    os.close(writer)

def with_hub():
    time_out()
    gevent.get_hub().destroy(destroy_loop=True)

def lines(name):
    with open("/proc/self/" + name, "rb") as file:
        return file.read().count(b"\\n")

def held():
    '''What this process has, in units of which a leak adds one to a call at least.'''
    for _ in range(3):
        gevent.idle()
    gc.collect()
    info = libc.mallinfo2()
    found = {
        "objects": sys.getallocatedblocks(),
        "malloc": (info.uordblks + info.hblkhd) // 32,     # the smallest chunk of glibc
        "mappings": lines("maps"),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "timers": lines("timers") // 4,
    }
    if hasattr(sys, "gettotalrefcount"):
        found["references"] = sys.gettotalrefcount()
    return found

def grown(call, n=10, rounds=6):
    '''What grows with the number of calls: {what: how much in the last round, ...}. Noise doesn't grow when the rounds do.'''
    suspects = set(held())
    for n in [n << shift for shift in range(rounds)]:
        before = held()
        for _ in range(n):
            call()
        more = {what: count - before[what] for what, count in held().items()}
        suspects = {what for what in suspects if more[what] >= n * 0.7}
        if not suspects:
            break
    return {what: more[what] for what in suspects}

def outcome_of(call):
    try:
        call()
    except BaseException as ex:
        return type(ex), getattr(ex, "errno", None)
    return None

class Case:
    '''One call in a fresh state, in the way that HOW names. *end* is what it waits for; *fds* and *pid* are that state's.'''

    def __init__(self, call, end, fds, pid):
        self.call, self.end, self.fds, self.pid = call, end, fds, pid
        self.outcome = None
        getattr(self, HOW)()
        if self.fds or self.pid or opened:
            self.clean()

    def clean(self):
        gevent.idle()
        outcome_of(self.end)
        while opened:
            self.fds.append(opened.pop())
        for fd in self.fds:
            outcome_of(lambda: os.close(fd))
        if self.pid:
            outcome_of(lambda: os.kill(self.pid, signal.SIGKILL))
            outcome_of(lambda: coopos.waitpid(self.pid, 0))

    def run(self):
        self.outcome = outcome_of(self.call)

    def start(self):
        greenlet = gevent.spawn(self.run)
        gevent.idle()
        return greenlet

    def succeeds(self):
        greenlet = self.start()
        if not greenlet.dead:
            self.end()
        greenlet.join(20)
        assert greenlet.dead and (self.outcome is None or MAY_FAIL), self.outcome

    def wrong_argument(self):
        greenlet = self.start()
        if not greenlet.dead:
            self.end()
        greenlet.join(20)
        assert greenlet.dead

    def gone(self):
        '''Its descriptors are closed, its child is collected.'''
        for fd in self.fds:
            os.close(fd)
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.fds, self.pid = [], None
        self.run()
        assert self.outcome is not None

    def killed(self):
        greenlet = self.start()
        assert not greenlet.dead, self.outcome
        greenlet.kill()
        assert self.outcome[0] is gevent.GreenletExit, self.outcome

    def timeout(self):
        timeout = gevent.Timeout(0)
        def timed():
            with timeout:
                self.call()
        self.outcome = outcome_of(timed)
        assert self.outcome[0] is gevent.Timeout, self.outcome

    def closed(self):
        '''All its descriptors are closed while it waits.'''
        greenlet = self.start()
        for fd in self.fds:
            coopos.close(fd)
        self.fds = []
        if MAY_FAIL:
            outcome_of(self.end)
        greenlet.join(20)
        assert greenlet.dead and (MAY_FAIL or self.outcome[1] == errno.EBADF), self.outcome

    def in_hub(self):
        gevent.get_hub().loop.run_callback(self.run)
        gevent.idle()
        assert self.outcome is not None

gevent.get_hub().threadpool.apply(int)
# The free lists of CPython and gevent are full, and what is made once is made.
for _ in range(600):
    time_out()
gc.freeze()
"""


def body(setup, call, end):
    """A function case() of the script, which makes the state and the Case."""
    names = sorted(set(re.findall(r"\b(?:reader|writer|fd|other)\b", setup)))
    pid = "pid" if re.search(r"\bpid\b", setup) else "None"
    return f"""
def case():
    {setup or "pass"}
    def call():
        {call}
    def end():
        {end or "pass"}
    return Case(call, end, [{", ".join(names)}], {pid})
"""


class Wrong(ast.NodeTransformer):
    """Puts *text* in place of the n-th argument of the call of coopos."""

    def __init__(self, n, text):
        self.n, self.value, self.was_put = n, ast.parse(text, mode="eval").body, False

    def visit_Call(self, node):
        self.generic_visit(node)
        if ast.unparse(node.func).startswith("coopos.") and self.n < len(node.args):
            argument = node.args[self.n]
            if isinstance(argument, ast.List) and "WRONG" in ast.unparse(self.value):
                argument.elts[-1] = self.value
            else:
                node.args[self.n] = self.value
            self.was_put = True
        return node


def wrong_calls(call):
    """*call* with a wrong argument, each in its turn: none of that type, none so large."""
    for text in ("WRONG", "1 << 70"):
        for n in range(5):
            wrong = Wrong(n, text)
            changed = ast.unparse(wrong.visit(ast.parse(call))).replace("\n", "; ")
            if wrong.was_put:
                yield changed


def raises_in_hub(call):
    """A file object and a wait for a child stand still there: docs/reference/promises.rst."""
    return not re.search(r"FileIO|fdopen|pid|wait|lock\.", call)


def cases_of(name):
    """(how, setup, call, end, may_fail): every way to an end of this public name."""
    for setup, call, *rest in CALLS.get(name, []) + WAYS.get(name, []):
        end = rest[0] if rest else ""
        yield "succeeds", setup, call, end, False
        has_fds = re.search(r"\((?:reader|writer|fd)\b", call) is not None
        if (has_fds or "(pid" in call) and "hold(" not in setup and "run(" not in call:
            yield "gone", setup, call, end, False
        if rest and "run(" not in call and "watch(" not in call:
            for how in ("killed", "timeout", *(("closed",) if has_fds else ()), *(("in_hub",) if raises_in_hub(call) else ())):
                yield how, setup, call, end, "hold(" in setup
    for setup, call, *rest in CALLS.get(name, [])[:1] or WAYS.get(name, [])[:1]:
        # All of the spawn family refuse in one function.
        if "patch" not in name and (not name.startswith("spawn") or name == "spawnve"):
            for wrong in wrong_calls(call):
                yield "wrong_argument", setup, wrong, rest[0] if rest else "", True


def grown_in(path, cases):
    """What grows, by case, in an interpreter that runs them one after the other: lines of text."""
    script = CALLS_NEED + SCRIPT
    for how, setup, call, end, may_fail in cases:
        script += f"HOW, MAY_FAIL = {how!r}, {may_fail}\n{body(setup, call, end)}"
        script += f"""
# Twice, since others use this machine, too.
found = grown(case) and grown(case)
found = {{what: count for what, count in found.items() if what not in {OF_OTHERS.get(call, set())!r}}}
if found:
    print({how!r}, {call!r}, found)
"""
    # glibc counts what lies in a thread's cache as used: a leak that took from it would not be seen.
    return run_script(script, at=path, timeout_s=60, GLIBC_TUNABLES="glibc.malloc.tcache_count=0")


def test_every_public_name_is_tried():
    assert set(coopos.__all__) - LEFT_OUT == {name for name in {*CALLS, *WAYS} if "." not in name and name != "thread"}


@pytest.mark.parametrize("name", sorted({*CALLS, *WAYS}))
def test_call_leaves_nothing(tmp_path, name):
    """Success, wrong arguments, a descriptor that is gone, a kill, a timeout, a close, a call in the hub: whatever it comes to."""
    assert grown_in(tmp_path / "calls.py", list(cases_of(name))) == ""


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("objects", "ctypes.pythonapi.Py_IncRef(ctypes.py_object(bytes(100)))"),
        ("objects", "ctypes.pythonapi.Py_IncRef(ctypes.py_object(fd))"),
        ("malloc", "libc.malloc(1)"),
        ("mappings", "libc.mmap(None, 4096, next(protections), 34, -1, 0)"),
        ("descriptors", "os.dup(0)"),
        ("threads", "threading.Thread(target=signal.pause, daemon=True).start()"),
        ("timers", "libc.timer_create(1, None, ctypes.byref(ctypes.c_void_p()))"),
    ],
)
def test_planted_leak_is_seen(tmp_path, what, call):
    setup = "fd = os.dup(0)" if "fd" in call else ""
    prelude = "global protections; protections = globals().get('protections') or itertools.cycle([1, 3]); "
    if "protections" in call:
        setup = prelude + "libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]"
    assert what in grown_in(tmp_path / "calls.py", [("succeeds", setup, call, "", False)])
