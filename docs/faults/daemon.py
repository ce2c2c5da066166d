"""A program that becomes a daemon closes all descriptors but the standard streams."""

import sys

if sys.argv[1] == "gevent":
    from gevent import os
else:
    import coopos as os
import gevent

gevent.sleep(0.01)
os.closerange(3, 256)
try:
    gevent.sleep(0.01)
    print("the program goes on")
except BaseException as ex:
    print(repr(ex), flush=True)
    os._exit(1)
