"""A thread that has a hub of its own starts a program, and waits for it."""

import sys
import threading

if sys.argv[1] == "gevent":
    from gevent import os
else:
    import coopos as os
import gevent


def run():
    gevent.sleep(0)  # now the thread has a hub
    try:
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], os.environ)
        print("status", os.waitpid(pid, 0)[1] >> 8)
    except Exception as ex:
        print(repr(ex))
    gevent.get_hub().destroy()


thread = threading.Thread(target=run)
thread.start()
thread.join()
