"""A tp_read that was given up, and the next one."""

import sys

if sys.argv[1] == "gevent":
    from gevent import os
else:
    import coopos as os
import gevent

reader, writer = os.pipe()
with gevent.Timeout(0.1, False):
    os.tp_read(reader, 100)
os.write(writer, b"hello")
for _ in range(20):
    gevent.sleep(0.01)
os.close(writer)
gevent.sleep(0.01)  # gevent closes it now
print("the next read returns", os.tp_read(reader, 100))
