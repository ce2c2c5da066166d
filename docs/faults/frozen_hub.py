"""One greenlet waits for a child, and another one has something to do."""

import sys

if sys.argv[1] == "gevent":
    from gevent import os
else:
    import coopos as os
import gevent

# The child exits with 7 as soon as the other greenlet writes to it, and with 1 if nobody does for two seconds.
CHILD = "import select, sys; sys.exit(7 if select.select([int(sys.argv[1])], [], [], 2)[0] else 1)"


def start(reader):
    return os.posix_spawn(sys.executable, [sys.executable, "-c", CHILD, str(reader)], os.environ)


def try_out(name, wait):
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    gevent.spawn(os.write, writer, b"x")
    status = wait(reader)
    print(f"{name}: the other greenlet", "ran" if status == 7 << 8 else "stood still")
    os.close(reader)
    os.close(writer)


try_out("waitpid(0, 0)", lambda reader: start(reader) and os.waitpid(0, 0)[1])
try_out("wait4(pid, 0)", lambda reader: os.wait4(start(reader), 0)[1])
try_out("system()", lambda reader: os.system(f"{sys.executable} -c '{CHILD}' {reader}"))
