"""multiprocessing in a program that gevent has patched."""

import os
import signal
import sys

from gevent import monkey

monkey.patch_all()
if sys.argv[1] == "coopos":
    import coopos

    coopos.patch()
import multiprocessing


def give_up(signum, frame):
    print(f"no result in {PATIENCE_S} s", flush=True)
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(1)


PATIENCE_S = int(os.environ.get("PATIENCE_S", 5))
if __name__ == "__main__":
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE_S)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map(abs, [-1, -2]))
