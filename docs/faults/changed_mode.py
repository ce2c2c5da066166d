"""Another process puts a pipe that we share into blocking mode. Then one greenlet reads, and another one writes."""

import signal
import subprocess
import sys

if sys.argv[1] == "gevent":
    from gevent import os
else:
    import coopos as os
import gevent


def give_up(signum, frame):
    print(f"nothing was read in {PATIENCE_S} s: the hub stands still", flush=True)
    os._exit(1)


PATIENCE_S = int(os.environ.get("PATIENCE_S", 5))
signal.signal(signal.SIGALRM, give_up)

reader, writer = os.pipe()
os.make_nonblocking(reader)
subprocess.run([sys.executable, "-c", "import os; os.set_blocking(0, True)"], stdin=reader)
gevent.spawn(os.write, writer, b"hello")
signal.alarm(PATIENCE_S)
print("read", os.nb_read(reader, 100))
