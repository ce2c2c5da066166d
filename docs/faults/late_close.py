"""Is a descriptor closed when close() has returned?"""

import sys

if sys.argv[1] == "gevent":
    from gevent import os
else:
    import coopos as os
import gevent

gevent.sleep(0)  # now there is a hub, as in every program of greenlets
reader, writer = os.pipe()
os.set_blocking(reader, False)
os.close(writer)
try:
    os.fstat(writer)
    print("after close() the descriptor is open")
except OSError:
    print("after close() the descriptor is closed")
try:
    print("the pipe's reader gets", os.readv(reader, [bytearray(1)]), "bytes: the end of the file")
except BlockingIOError:
    print("the pipe's reader gets nothing: in blocking mode it would wait for ever")
