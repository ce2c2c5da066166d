"""What scripts begin with that fork without the greenlets.

Each test is a script in an interpreter of its own. It forks in its main greenlet, in a spawned one, and in a thread.
"""

import textwrap

import pytest

from .support import IN_CHILD, run_script

PRELUDE = """
import gc, os, signal, sys, threading, traceback, weakref
import gevent, gevent.event, gevent.lock, gevent.pool, gevent.queue, gevent.socket, gevent.threadpool, coopos
from gevent.hub import get_hub
import greenlet

PARENT = os.getpid()
PLACE = {place!r}


def fork(**kwargs):
    return coopos.fork(keep_greenlets=False, **kwargs)


def exit_code(pid):
    return os.waitstatus_to_exitcode(coopos.waitpid(pid, 0)[1])


def at_place(function, place=PLACE):
    if place == "main":
        function()
    elif place == "spawned":
        gevent.spawn(function).get()
    elif place == "raw":
        greenlet.greenlet(function).switch()
    elif place == "thread":
        get_hub()  # on libuv, two threads that make their first hubs at once harm each other
        failures = []
        def run():
            try:
                function()
            except BaseException as ex:
                failures.append(ex)
        thread = threading.Thread(target=run)
        thread.start()
        while thread.is_alive():
            gevent.sleep(0.001)
        if failures:
            raise failures[0]
    else:
        at_place(lambda: gevent.spawn(function).get(), "thread")


class Trace:
    '''What children have done, in lines, and how often the parent has done something.'''

    def __init__(self):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.parents = 0

    def add(self, what="ran"):
        if os.getpid() == PARENT:
            self.parents += 1
        else:
            os.write(self.writer, f"{{os.getpid()}} {{what}}\\n".encode())

    def of_children(self):
        found = b""
        try:
            while True:
                found += os.read(self.reader, 65536)
        except BlockingIOError:
            return found.decode().splitlines()


trace = Trace()
"""

PLACES = ["main", "spawned", "raw", "thread", "spawned in a thread"]
each_place = pytest.mark.parametrize("place", PLACES)
main_thread_places = pytest.mark.parametrize("place", ["main", "spawned", "raw"])


def run(*sources, place="main", **kwargs):
    return run_script(PRELUDE.format(place=place) + IN_CHILD + "".join(map(textwrap.dedent, sources)), **kwargs)
