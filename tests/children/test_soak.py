"""Very many children, one batch after the other: what there is of descriptors, threads, zombies and bytes stays what it was.

Only with ``--soak``: ``pytest tests/children/test_soak.py --soak -s -o faulthandler_timeout=0`` shows a line for every 10,000
children while it runs.
"""

import gc
import os
import threading

import gevent
import psutil
import pytest
from gevent.hub import get_hub

import coopos

from ..helpers.support import DEADLINE_S, HubThread

BATCH = 50
STEP = 10_000  # children between two looks, and before the first that counts
GROWTH_BYTES = 8 * 2**20  # the allocator's own ups and downs


def counts():
    gc.collect()
    process = psutil.Process()
    return {
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children()),
        "objects": len(gc.get_objects()),
        "bytes": process.memory_info().rss,
    }


def fork_one(fork):
    pid = fork()
    if pid == 0:
        os._exit(7)
    return pid


def watched_by_us():
    pid = fork_one(os.fork)
    coopos.watch(pid)
    return pid


def by_pid(pid):
    return coopos.waitpid(pid, 0)


def by_pid_with_usage(pid):
    return coopos.wait4(pid, 0)[:2]


def by_waitid(pid):
    report = coopos.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED)
    return report.si_pid, report.si_status << 8


MAKERS = [
    lambda: fork_one(coopos.fork_and_watch),
    lambda: fork_one(coopos.fork_gevent),
    lambda: fork_one(os.fork),
    watched_by_us,
    lambda: coopos.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], {}),
]
WAITS = [by_pid, by_pid_with_usage, by_waitid]


def waited_one_by_one(number):
    """A batch, a greenlet for each child; a second one that comes too late, and one that is killed."""
    pids = [MAKERS[(number + index) % len(MAKERS)]() for index in range(BATCH)]
    killed = [gevent.spawn(by_pid, pid) for pid in pids[:2]]
    gevent.sleep(0)
    gevent.killall(killed)
    told = [greenlet.value for greenlet in killed if isinstance(greenlet.value, tuple)]
    left = [pid for pid in pids if (pid, 7 << 8) not in told]
    waiters = [gevent.spawn(WAITS[(number + index) % len(WAITS)], pid) for index, pid in enumerate(left)]
    answers = told + [waiter.get(timeout=DEADLINE_S) for waiter in waiters]
    assert sorted(answers) == sorted((pid, 7 << 8) for pid in pids)
    with pytest.raises(ChildProcessError):
        coopos.waitpid(pids[0], 0)


def waited_as_any(number):
    """A batch, collected by whoever is next."""
    pids = [MAKERS[(number + index) % len(MAKERS)]() for index in range(BATCH)]
    answers = [coopos.wait() for _ in pids]
    assert sorted(answers) == sorted((pid, 7 << 8) for pid in pids)
    with pytest.raises(ChildProcessError):
        coopos.waitpid(-1, 0)


def test_soak_of_children(request):
    """From the 10,000th child on nothing grows."""
    if not request.config.getoption("--soak"):
        pytest.skip("only with --soak")
    total = request.config.getoption("--soak-children")
    get_hub().threadpool.apply(threading.get_ident)
    first = None
    with HubThread() as thread:
        for done in range(0, total, BATCH):
            if done and done % STEP == 0:
                now = counts()
                print(f"{done:>8} children: " + ", ".join(f"{name} {count}" for name, count in now.items()), flush=True)
                first = first or now
            number = done // BATCH
            if number % 3 == 0:
                waited_as_any(number)
            elif number % 3 == 1:
                waited_one_by_one(number)
            else:
                thread.call(waited_one_by_one, number)
        gevent.idle()
        now = counts()
    print(f"{total:>8} children: " + ", ".join(f"{name} {count}" for name, count in now.items()), flush=True)
    assert first, f"fewer than {STEP} children show nothing"
    grown = {name: count - first[name] for name, count in now.items()}
    assert grown["bytes"] < GROWTH_BYTES, grown
    assert grown["objects"] < 1000, grown
    assert {grown[name] for name in ("descriptors", "threads", "children")} == {0}, grown
