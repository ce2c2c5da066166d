"""A child whose status nobody asks for within a minute."""

import sys
import time

if sys.argv[1] == "gevent":
    from gevent import os
else:
    import coopos as os
import gevent


def run(status):
    """A child, once the hub has noted its end."""
    ended = []
    reader, writer = os.pipe()
    pid = os.fork_and_watch(ended.append)
    if pid == 0:
        os.read(reader, 1)
        os._exit(status)
    os.write(writer, b"x")
    while not ended:
        gevent.sleep(0.01)
    return pid


first = run(7)
now = time.time()
time.time = lambda: now + 61  # so that you need not wait for a minute
run(0)  # another child ends
try:
    print("the first child's status:", os.waitpid(first, 0)[1] >> 8)
except ChildProcessError as ex:
    print("the first child's status:", repr(ex))
