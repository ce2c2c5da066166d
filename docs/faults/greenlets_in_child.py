"""A greenlet of the parent's, after a fork."""

import sys

if sys.argv[1] == "gevent":
    from gevent import os

    arguments = {}
else:
    import coopos as os

    arguments = {"keep_greenlets": False}
import gevent

worked_in = []


def work():
    while True:
        worked_in.append(os.getpid())
        gevent.sleep(0.01)


gevent.spawn(work)
gevent.sleep(0)
reader, writer = os.pipe()
pid = os.fork(**arguments)
if pid == 0:
    for _ in range(20):
        gevent.sleep(0.01)
    os.write(writer, b"it works there too" if os.getpid() in worked_in else b"it isn't there")
    os._exit(0)
print("the parent's greenlet, in the child:", os.tp_read(reader, 100).decode())
