"""A child that ends before anybody watches it."""

import sys

if sys.argv[1] == "gevent":
    from gevent import os
else:
    import coopos as os
import gevent

# The parent is slow: when it goes on, the child has ended. WNOWAIT looks, and leaves the child where it is.
os.register_at_fork(after_in_parent=lambda: os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT))

pid = os.fork()
if pid == 0:
    os._exit(7)
waiter = gevent.spawn(os.waitpid, pid, 0)
for _ in range(200):
    if not waiter.ready():
        gevent.sleep(0.01)
print("waitpid:", f"status {waiter.value[1] >> 8}" if waiter.ready() else "still waits, after 200 turns of the hub")
