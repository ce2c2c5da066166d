"""A supervisor: it keeps workers running, and starts a new one in the place of each that ends.

It shows the plainest way: one greenlet for each worker, which forks, waits and forks again. There is no callback, so nothing runs
in the hub, and ``waitpid`` keeps the loop running. With ``keep_greenlets=False`` a worker has that greenlet alone, and ends when
its ``work`` returns. See prefork_echo.py for workers that share a socket, and that end with a supervisor that is killed.

Run it, kill a worker and see another take its place, stop it with Ctrl-C or SIGTERM:

    python examples/supervisor.py
"""

import contextlib
import os
import signal

import gevent
from gevent.event import Event

import coopos

WORKERS = 2
RESTART_DELAY_S = 0.1  # so that a worker that can't live doesn't keep a processor busy


def work(number):
    """What a worker does; it may use gevent as it likes."""
    print(f"worker {number} runs: {os.getpid()}", flush=True)
    while True:
        gevent.sleep(60)


def supervise(number):
    while True:
        pid = coopos.fork(keep_greenlets=False)
        if pid == 0:
            return work(number)
        try:
            status = os.waitstatus_to_exitcode(coopos.waitpid(pid, 0)[1])
        except gevent.GreenletExit:  # killed: the supervisor stops
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            coopos.waitpid(pid, 0)
            raise
        print(f"worker {number} ended: {status}", flush=True)
        gevent.sleep(RESTART_DELAY_S)


def main():
    stop = Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(signum, stop.set)
    supervisors = [gevent.spawn(supervise, number) for number in range(WORKERS)]
    stop.wait()
    gevent.killall(supervisors)
    print("stopped", flush=True)


if __name__ == "__main__":
    main()
