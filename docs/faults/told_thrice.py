"""Three greenlets wait for one child."""

import sys

if sys.argv[1] == "gevent":
    from gevent import os
else:
    import coopos as os
import gevent


def wait(pid, options):
    try:
        return os.waitpid(pid, options)
    except ChildProcessError:
        return None


reader, writer = os.pipe()
pid = os.fork()
if pid == 0:
    os.read(reader, 1)
    os._exit(7)
waiters = [gevent.spawn(wait, pid, 0) for _ in range(3)]
gevent.sleep(0)  # now they wait
os.write(writer, b"x")
gevent.joinall(waiters)
print("waiters that got the status:", sum(waiter.value == (pid, 7 << 8) for waiter in waiters))
print("waitpid(-1, WNOHANG) tells it again:", wait(-1, os.WNOHANG) == (pid, 7 << 8))
