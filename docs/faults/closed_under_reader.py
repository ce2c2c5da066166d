"""A greenlet waits for a descriptor, and another one closes it."""

import sys

if sys.argv[1] == "gevent":
    from gevent import os
else:
    import coopos as os
import gevent


def read(fd):
    try:
        return os.nb_read(fd, 1)
    except OSError as ex:
        return ex.strerror


reader, writer = os.pipe()
os.make_nonblocking(reader)
waiter = gevent.spawn(read, reader)
gevent.sleep(0)  # now it waits
os.close(reader)
for _ in range(200):
    if not waiter.ready():
        gevent.sleep(0.01)
print("the reader:", waiter.value if waiter.ready() else "still waits, after 200 turns of the hub")
