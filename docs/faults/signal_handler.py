"""A signal handler that runs a program. The hub sleeps when the signal comes, so the handler runs in the hub."""

import signal
import sys

if sys.argv[1] == "gevent":
    from gevent import os
else:
    import coopos as os
import gevent

done = []


def on_signal(signum, frame):
    try:
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], os.environ)
        print("status", os.waitpid(pid, 0)[1] >> 8)
    except Exception as ex:
        print(type(ex).__name__)
    done.append(signum)


signal.signal(signal.SIGALRM, on_signal)
signal.setitimer(signal.ITIMER_REAL, 0.5)
while not done:
    gevent.sleep(2)
