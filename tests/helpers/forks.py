"""What scripts that fork begin with.

Each test is a script in an interpreter of its own, since a fork copies whatever else is going on.
"""

import textwrap

from .support import HAS_WAITED, IN_CHILD, run_script

PRELUDE = """
import fcntl, gc, os, signal, sys, threading, traceback
import gevent, psutil, coopos
from gevent.hub import get_hub

STATUS = 7 << 8
fork = coopos.fork


def fork_living(fork=coopos.fork, **kwargs):
    '''(pid, end): a child that ends with STATUS once end() is called.'''
    reader, writer = os.pipe()
    pid = fork(**kwargs)
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(7)
    os.close(reader)

    def end():
        os.write(writer, b"x")  # other children have the other end too: closing it would not do
        os.close(writer)

    return pid, end


def fork_dead(fork=coopos.fork, **kwargs):
    '''The pid of a child that is dead, and of which the hub knows nothing yet.'''
    pid = fork(**kwargs)
    if pid == 0:
        os._exit(7)
    until_dead(pid)
    return pid


def until_dead(pid):
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def until(holds):
    while not holds():
        gevent.sleep(0.001)  # not 0: a hub that never sleeps leaves other threads no GIL


def fd_names():
    names = []
    for fd in os.listdir("/dev/fd"):
        try:
            names.append(os.readlink(f"/dev/fd/{fd}"))
        except OSError:
            pass
    return names


def active_watchers():
    if type(get_hub().loop).__module__ == "gevent.libev.corecext":
        from gevent.libev.corecext import watcher as base
    else:
        from gevent._ffi.watcher import watcher as base
    return [thing for thing in gc.get_objects() if isinstance(thing, base) and thing.active]


def belongings():
    '''What this process has: descriptors, threads, children, active watchers.'''
    me = psutil.Process()
    return len(os.listdir("/dev/fd")), me.num_threads(), len(me.children()), len(active_watchers())


gevent.sleep(0)
"""


def run(source, **kwargs):
    return run_script(PRELUDE + HAS_WAITED + IN_CHILD + textwrap.dedent(source), **kwargs)
