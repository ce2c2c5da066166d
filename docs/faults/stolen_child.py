"""A child of other code: here of the plain subprocess module. A child of a C library has the same fate."""

import subprocess
import sys

if sys.argv[1] == "gevent":
    from gevent import os
else:
    import coopos as os
import gevent

# One child of our own, which goes on running.
pid = os.fork()
if pid == 0:
    gevent.sleep(60)
    os._exit(0)

process = subprocess.Popen(["sh", "-c", "exit 7"])
os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still there
gevent.sleep(0.01)
print("the program exited with 7; its Popen says", process.wait())
os.kill(pid, 9)
