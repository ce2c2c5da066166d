"""Every public call, with an allocation that fails: a MemoryError that is clean, nothing left behind, and the next call works."""

import sys

import pytest

import coopos

from ..helpers.calls import CALLS, CALLS_NEED
from ..helpers.support import needs_libev, run_script

#: Tried elsewhere: test_fork_anyhow.py has those that fork.
ELSEWHERE = {name for name in coopos.__all__ if "fork" in name}
#: Not tried: once a process or for people; what gevent's threadpool does, whose threads have no memory either; and Popen, which in
#: the stdlib, too, leaves its pipe open if memory runs out before it has a child.
LEFT_OUT = {"counters", "doctor", "patch", "patched", "report", "unpatch"}
LEFT_OUT |= {"getgrouplist", "getlogin", "initgroups", "popen", "system"}
#: Unless the hub is due a turn.
ALLOCATING_NOTHING = {"close", "make_nonblocking", "nb_write", "write", "write_all"}
#: CPython 3.12 and 3.13 crash if there is no memory to call a generator expression, in _PyEvalFramePushAndInit of
#: https://github.com/python/cpython/blob/3.13/Python/ceval.c: `sum(kind in mode for kind in "rwxa")` in a function with **keywords.
CRASHING = {"copy_file_range", "fdopen", "sendfile", "splice"} if sys.version_info[:2] in ((3, 12), (3, 13)) else set()

SCRIPT = """
import _testcapi, gc, greenlet, socket

PARENT = os.getpid()
# A child that hangs ends, too.
os.register_at_fork(after_in_child=lambda: signal.alarm(20))

def end_child():
    if os.getpid() != PARENT:
        os.close(os.open(path + ".back", os.O_CREAT))
        os._exit(99)

class Caller(gevent.Greenlet):
    def switch_out(self):
        _testcapi.remove_mem_hooks()     # what others allocate while it waits is theirs

def spawned(pid):
    _testcapi.remove_mem_hooks()
    assert coopos.waitpid(pid, 0) == (pid, 0)

def attempt(call, n, outcome):
    if n is not None:
        _testcapi.set_nomemory(n, n + 1)
    try:
        call()
        _testcapi.remove_mem_hooks()
        end_child()
        outcome.append(None)
    except BaseException as ex:
        _testcapi.remove_mem_hooks()
        end_child()
        # CPython says so of a lock that it has no memory for.
        is_clean = isinstance(ex, MemoryError) or str(ex).startswith("can't allocate")
        outcome.append(MemoryError if is_clean else repr(ex))

def fds():
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + name)}

def state():
    gevent.idle()
    gevent.idle()
    gc.collect()
    greenlets = [each for each in gc.get_objects() if isinstance(each, greenlet.greenlet) and not each.dead]
    with open("/proc/self/timers") as timers:
        return sorted(fds()), timers.read(), len(greenlets), signal.pthread_sigmask(signal.SIG_BLOCK, ())

def make(call, end, n):
    outcome = []
    caller = Caller.spawn(attempt, call, n, outcome)
    gevent.idle()
    if not outcome:
        end()
    caller.join(20)
    end_child()
    assert outcome, ("hangs", n)
    return outcome[0]

def reap():
    while True:
        try:
            coopos.waitpid(-1, 0)
        except ChildProcessError:
            break

def try_out(setup, call, end):
    failed = since = 0
    gc.freeze()
    coopos.fsync(own)
    for n in (None, None, *range(1000)):
        kept = fds()
        places = {}
        exec(setup, globals(), places)
        globals().update(places)
        before = state()
        outcome = make(call, end, n)
        try:
            end()
        except OSError:
            pass
        reap()
        # The next call works; and it takes what a worker has left to it, once that has ended.
        for _ in range(500):
            coopos.fsync(own)
            after = state()
            if before == after:
                break
            gevent.sleep(0.01)
        if n is not None:
            assert outcome in (None, MemoryError), (n, outcome)
            assert before == after, (n, outcome, before, after)
        else:
            assert outcome is None, outcome
            kept |= {fd for fd in fds() if "eventpoll" in os.readlink(f"/proc/self/fd/{fd}")}
        for fd in fds() - kept:
            os.close(fd)
        since = 0 if outcome else since + 1
        failed += outcome is not None
        if since > 30:
            break
    assert not os.path.exists(path + ".back"), "a child went on with its parent's program"
    return failed

own = os.open(path, os.O_RDWR)
with gevent.Timeout(0.001, False):
    coopos.read(os.pipe()[0], 1)
"""


def test_every_public_call_is_tried():
    assert {*CALLS, *ELSEWHERE, *LEFT_OUT} == set(coopos.__all__)


@needs_libev  # gevent's libuv loop is Python, and loses what is raised while it makes a watcher
@pytest.mark.parametrize("name", sorted(CALLS))
def test_call_without_memory(name):
    """Wherever an allocation fails: MemoryError, nothing is left behind, and the next call works."""
    pytest.importorskip("_testcapi", reason="this Python has no _testcapi, which makes allocations fail")
    if name in CRASHING:
        pytest.skip("CPython itself crashes")
    tries = "".join(
        f"""
def call():
    {call}
def end():
    {end[0] if end else "pass"}
print(try_out({setup!r}, call, end))
"""
        for setup, call, *end in CALLS[name]
    )
    # What CPython can't raise it prints.
    failed = run_script(CALLS_NEED + SCRIPT + tries, may_complain=True)
    assert name in ALLOCATING_NOTHING or sum(map(int, failed.split()))
