"""The processes that faults.py runs the scenarios in: one each.

``python fault_server.py`` is a server. It has imported gevent and the standard library, and forks a process for each case, which
imports coopos then: a fresh interpreter for each would take ten times as long. faults.py tells it what to run, line by line.
"""

import asyncio  # noqa: F401  multiprocessing and gevent ask for it when it is there
import concurrent.futures  # noqa: F401
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import multiprocessing.context
import multiprocessing.popen_fork
import multiprocessing.popen_spawn_posix
import multiprocessing.queues
import multiprocessing.synchronize  # noqa: F401
import os
import pty  # noqa: F401
import resource  # noqa: F401
import signal
import subprocess  # noqa: F401
import sys
import time
import traceback

import fault_children  # noqa: F401  it, the next and short_scenarios register their scenarios
import fault_scenarios  # noqa: F401
import gevent
import gevent.monkey
import gevent.subprocess
import greenlet
import short_scenarios  # noqa: F401
from fault_states import END_S, SCENARIOS, SETTINGS, coopos, drains, forked, forks, helpers

#: The process waits for it before and after the body. No other code sends it.
MARK = signal.SIGUSR1


# ---- one case ----------------------------------------------------------------------------------------------------------------


def mark():
    """Wait until faults.py has let strace in, or out."""
    signal.sigwait({MARK})


def open_fds():
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return {fd: target for fd, target in found.items() if not (target.startswith("/proc/") and target.endswith("/fd"))}


def timers():
    with contextlib.suppress(OSError), open("/proc/self/timers") as file:
        return sum(line.startswith("ID:") for line in file)
    return 0


def greenlets():
    return {id(each): each for each in gc.get_objects() if isinstance(each, greenlet.greenlet) and not each.dead}


def state():
    return {
        "fds": open_fds(),
        "timers": timers(),
        "threads": set(os.listdir("/proc/self/task")),
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "greenlets": greenlets(),
    }


def described(ex):
    return {
        "class": type(ex).__name__,
        "errno": getattr(ex, "errno", None),
        "message": str(ex),
        "where": "".join(traceback.format_exception(type(ex), ex, ex.__traceback__))[-3000:],
    }


def leftovers(before):
    """What there is now that was not there *before*: a list of sentences."""
    left = []
    deadline = time.monotonic() + END_S
    coopos._core.end_workers()
    gevent.idle()
    gevent.idle()
    while set(os.listdir("/proc/self/task")) - before["threads"] and time.monotonic() < deadline:
        gevent.sleep(0.002)
    gc.collect()
    now = state()
    # The set of the hub, which stays until the thread ends.
    sets = [fd for fd, target in now["fds"].items() if target == "anon_inode:[eventpoll]" and fd not in before["fds"]]
    for fd, target in now["fds"].items():
        # /dev/urandom is the interpreter's, which keeps it open.
        if before["fds"].get(fd) != target and fd not in sets[:1] and target != "/dev/urandom":
            left.append(f"descriptor {target.split(':')[0]} {target}")
    left += [f"closed {target}" for fd, target in before["fds"].items() if fd not in now["fds"]]
    left += ["timer"] * (now["timers"] - before["timers"])
    left += ["thread"] * len(now["threads"] - before["threads"])
    if now["mask"] != before["mask"]:
        left.append(f"signal mask {sorted(now['mask'] ^ before['mask'])}")
    hub = gevent.get_hub()
    for each in set(now["greenlets"]) - set(before["greenlets"]):
        if now["greenlets"][each] not in (hub, hub.parent, greenlet.getcurrent()):
            left.append(f"greenlet {now['greenlets'][each]!r}"[:200])
    while True:
        try:
            pid, _status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        left.append(f"child {'zombie' if pid else 'running'}")
        if not pid:
            break
    return left


def probe():
    """Whether the hub is alive: a parked read, a worker and a child come to their ends."""
    with gevent.Timeout(END_S):
        reader, writer = os.pipe()
        helper = gevent.spawn(os.write, writer, b"x")
        assert coopos.read(reader, 1) == b"x"
        helper.join()
        coopos.posix_fallocate(multiprobe, 0, 1)
        assert coopos.waitpid(forked(), 0)[1] == 7 << 8
        os.close(reader)
        os.close(writer)


def shorten(call, size, first, last):
    """For shorts.py: from now on such calls of the core move fewer bytes. Its library is loaded before libc then."""
    ctypes.CDLL(os.environ["LD_PRELOAD"]).shorts_begin(call.encode(), int(size), int(first), int(last))


def count_shortened(calls):
    """{call: how many there were that could be shortened; "": how many were}."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    return {call: library.shorts_count(call.encode()) for call in [*calls.split(","), ""]}


multiprobe = None


def run_case(scenario_name, result_path, calls="", *how):
    global multiprobe
    errors = []
    hub = gevent.get_hub()
    hub.handle_error = lambda context, type, value, tb: errors.append(described(value))
    hub.loop.run_callback_threadsafe(lambda: None)
    gevent.sleep(0.001)
    os.environ.update(SETTINGS[scenario_name])
    # All of it now: an import is the interpreter's.
    for name in ("_copying", "_programs", "io", "subprocess"):
        importlib.import_module(f"coopos.{name}")
    for name in coopos.__all__:
        getattr(coopos, name)

    multiprobe = os.open(result_path + ".probe", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    parent = os.getpid()
    stack = contextlib.ExitStack()
    gc.freeze()  # what is there already is not gone through again
    gc.enable()
    before = state()
    body = SCENARIOS[scenario_name](stack)
    mark()
    result = {}
    if how:
        shorten(*how)
    try:
        result["value"] = repr(body())
    except BaseException as ex:
        if os.getpid() != parent:
            traceback.print_exc()
            os._exit(99)
        result["raised"] = described(ex)
    if os.getpid() != parent:
        os._exit(98)
    if how:
        result["counts"] = count_shortened(calls)
        shorten("", 0, 0, 0)
    mark()
    began = time.monotonic()
    try:
        gevent.killall(drains)
        drains.clear()
        gevent.joinall(helpers, timeout=2)
        result["stuck"] = [repr(each) for each in helpers if not each.dead]
        gevent.killall(helpers)
        helpers.clear()
        stack.close()
        if "value" not in result:
            for pid in filter(None, forks):
                with contextlib.suppress(OSError):
                    coopos.waitpid(pid, 0)
        body = stack = None
        gevent.idle()
        probe()
        result["alive"] = True
        result["left"] = leftovers(before)
    except BaseException as ex:
        result["check"] = described(ex)
    result["errors"] = errors
    result["took"] = time.monotonic() - began
    with open(result_path + ".new", "w") as file:
        json.dump(result, file)
    os.rename(result_path + ".new", result_path)


def child(name, result_path, *how):
    os.setsid()
    libc = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    libc.prctl(0x59616D61, -1, 0, 0, 0)  # PR_SET_PTRACER: anybody
    signal.pthread_sigmask(signal.SIG_BLOCK, {MARK})
    log = os.open(result_path + ".err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    status = 1
    try:
        run_case(name, result_path, *how)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


# ---- the server --------------------------------------------------------------------------------------------------------------


def children_of_this():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def end_all():
    """Kill and collect all that is left of a case, also what has left its session: it becomes this process's child."""
    statuses = {}
    while True:
        for pid in children_of_this():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return statuses
        statuses[pid] = status


def serve():
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    gc.disable()
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "run":
            pid = os.fork()
            if pid == 0:
                child(*arguments)
            print(pid, flush=True)
        elif command == "status":
            pid, status = os.waitpid(int(arguments[0]), 0)
            end_all()
            print(status, flush=True)
        else:
            end_all()
            print(flush=True)


if __name__ == "__main__":
    serve()
