"""Signal handlers under patch(). gevent's hub runs them if the signal comes while it sleeps. It can switch to nobody there."""

import textwrap

import pytest

from ..helpers.support import run_script

BEGIN = """
from gevent import monkey
monkey.patch_all()
import coopos
coopos.patch()
import os, signal, subprocess, sys, threading, time
import gevent, gevent.event


def signal_from_outside():
    '''Have another process send SIGUSR1, once our hub sleeps and has nothing else to do.'''
    sender = '''
import os, signal, sys, time
import psutil
parent = psutil.Process(int(sys.argv[1]))
while parent.status() != psutil.STATUS_SLEEPING:
    time.sleep(0.01)
parent.send_signal(signal.SIGUSR1)
'''
    return subprocess.Popen([sys.executable, "-c", sender, str(os.getpid())])


reader, writer = os.pipe()
"""

WAITS = {
    "subprocess.run": "subprocess.run(['sh', '-c', 'echo x; exit 3'], capture_output=True).stdout == b'x\\n'",
    "check_output with a timeout": "raises(subprocess.TimeoutExpired, subprocess.check_output, ['sleep', '1000'], timeout=0.01)",
    "Popen.wait": "subprocess.Popen(['sh', '-c', 'exit 3']).wait() == 3",
    "Popen.wait of a child that was there before": "child.wait(60) == 3",
    "os.system": "os.waitstatus_to_exitcode(os.system('exit 3')) == 3",
    "os.popen": "[(file.read(), file.close()) for file in [os.popen('echo x')]] == [('x\\n', None)]",
    "os.spawnlp": "os.spawnlp(os.P_WAIT, 'sh', 'sh', '-c', 'exit 3') == 3",
    "coopos.waitpid": "os.waitstatus_to_exitcode(coopos.waitpid(fork_and_exit(3), 0)[1]) == 3",
    "time.sleep": "time.sleep(0.01) is None",
}


@pytest.mark.parametrize("by", ["signal.signal", "gevent.signal_handler"])
@pytest.mark.parametrize("wait", WAITS)
def test_handler_that_waits_goes_on_to_its_end(wait, by):
    """Plainly in the hub, as a greenlet does in a handler of gevent's."""
    source = f"""
        child = subprocess.Popen(["sh", "-c", "read line; exit 3"], stdin=subprocess.PIPE)


        def raises(error, function, *args, **kwargs):
            try:
                function(*args, **kwargs)
            except error:
                return True


        def fork_and_exit(code):
            pid = os.fork()
            if pid == 0:
                os._exit(code)
            return pid


        def handle(*_):
            child.stdin.close()
            in_hub.append(gevent.getcurrent() is gevent.get_hub())
            assert {WAITS[wait]}
            os.write(writer, b"x")


        in_hub = []
        {by}(signal.SIGUSR1, handle)
        sender = signal_from_outside()
        assert coopos.read(reader, 1) == b"x"
        assert in_hub == [{by == "signal.signal"}]
        assert (sender.wait(), child.wait()) == (0, 3)
    """
    run_script(BEGIN + textwrap.dedent(source))


WAKES = {
    "Event": ("gevent.event.Event()", "thing.set()", "thing.wait()"),
    "AsyncResult": ("gevent.event.AsyncResult()", "thing.set(True)", "thing.get()"),
    "threading.Event": ("threading.Event()", "thing.set()", "thing.wait()"),
}


@pytest.mark.parametrize("by", ["signal.signal", "gevent.signal_handler"])
@pytest.mark.parametrize("thing", WAKES)
def test_handler_that_sets_an_event_wakes_who_waits_for_it(thing, by):
    """The hub sleeps, and has no timer: only the signal ends its sleep."""
    make, wake, wait = WAKES[thing]
    source = f"""
        thing = {make}
        parked = gevent.spawn(coopos.read, reader, 1)      # keeps the loop running
        {by}(signal.SIGUSR1, lambda *_: {wake})
        sender = signal_from_outside()
        assert {wait}
        assert sender.wait() == 0 and not parked.dead
    """
    run_script(BEGIN + textwrap.dedent(source))


def test_sleep_is_a_greenlets_elsewhere():
    """Other greenlets run meanwhile; it takes what gevent's takes; unpatch() gives gevent's back."""
    source = """
        ran = []
        gevent.spawn(ran.append, 1)
        time.sleep(0)
        time.sleep(0.001)
        assert ran == [1]
        gevent.spawn(ran.append, 2)
        time.sleep(seconds=0.001, ref=True)
        assert ran == [1, 2]
        coopos.unpatch()
        assert time.sleep is gevent.sleep
    """
    run_script(BEGIN + textwrap.dedent(source))
