"""What scripts begin with that use multiprocessing under patch().

A script waits for what comes only when another of its greenlets has run some times: where the hub stood still it would hang.
Children that are spawned import the script, and are patched like it; where it says so they are not.
"""

import textwrap

import pytest

from .support import run_script

METHODS = ["fork", "forkserver", "spawn"]
each_method = pytest.mark.parametrize("method", METHODS)
PATCHES = """
from gevent import monkey
monkey.patch_all()
import coopos
coopos.patch()
"""

PATCHED = (
    PATCHES
    + """
import fcntl, io, os, signal, sys, threading, time
import gevent, gevent.event
import multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, shared_memory


class After:
    '''Have *function* called when another greenlet has run a few times; at the end it must have been.'''

    has_begun = False

    def __init__(self, function, *args):
        self.greenlet = gevent.spawn(self.run, function, args)

    def run(self, function, args):
        for _ in range(5):
            gevent.sleep(0.001)
        self.has_begun = True
        function(*args)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        assert self.has_begun, "nobody else ran"
        self.greenlet.get()


def parked(function, *args):
    greenlet = gevent.spawn(function, *args)
    for _ in range(3):
        gevent.sleep(0.001)
    assert not greenlet.ready(), (greenlet.value, greenlet.exception)
    return greenlet


def raises(error, function, *args, **kwargs):
    try:
        result = function(*args, **kwargs)
    except error as ex:
        return ex
    raise AssertionError(f"no {error.__name__}, but {result!r}")
"""
)


def run(source, **kwargs):
    return run_script(PATCHED + textwrap.dedent(source), **kwargs)


def run_with(method, source, path, **kwargs):
    """*source* has functions, and a main(ctx); what it spawns imports it from *path*."""
    source = textwrap.dedent(source) + f"\n\nif __name__ == '__main__':\n    main(mp.get_context({method!r}))\n    print('done')\n"
    assert run_script(PATCHED + source, at=path / "program.py", **kwargs) == "done\n"


#: Classes that some code on the way might take for its own: a descriptor's, a child's, the end of a file.
THROWN = "(TimeoutError, EOFError, OSError, ChildProcessError, ConnectionResetError, ValueError, gevent.GreenletExit)"

THROW = f"""
THROWN = {THROWN}


def throw(error, greenlet):
    '''Throw *error* into a greenlet that waits in raises(error, ...), where it comes out.'''
    greenlet.kill(error, block=False)
    assert type(greenlet.get()) is error


def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    coopos.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
"""


def run_throwing(source, **kwargs):
    return run_script(PATCHED + THROW + textwrap.dedent(source), **kwargs)
