"""Ten reads of pipes that are silent for now, and one of a file."""

import sys

if sys.argv[1] == "gevent":
    from gevent import os
else:
    import coopos as os
import gevent

pipes = [os.pipe() for _ in range(10)]
readers = [gevent.spawn(os.tp_read, reader, 1) for reader, _writer in pipes]
gevent.sleep(0)
file = gevent.spawn(os.tp_read, os.open(__file__, os.O_RDONLY), 10)
for _ in range(200):
    if not file.ready():
        gevent.sleep(0.01)
print("the file:", "was read" if file.ready() else "not read, after 200 turns of the hub")

for _reader, writer in pipes:
    os.write(writer, b"x")
gevent.joinall(readers)
