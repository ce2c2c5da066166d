"""A prefork echo server: one listening socket, several worker processes.

It shows
  - ``coopos.fork_and_watch``: each worker is a fork that can go on using gevent, and a callback says when it has ended;
  - ``coopos.waitpid``: the exit status, collected while the other greenlets run;
  - ``coopos.nb_read`` and ``coopos.close``: the workers stop when the master's end of a pipe closes. It closes with the
    master however that ends, by ``kill -9`` too, so no worker is ever left behind.

Run it, talk to it, kill a worker and see another take its place, stop it with Ctrl-C or SIGTERM:

    python examples/prefork_echo.py --port 8007 --workers 4
    nc 127.0.0.1 8007

Standard output has one line for each event: ``listening on HOST:PORT``, ``worker PID started``, ``worker PID ended: why``,
``stopping``, ``stopped``. Port 0 takes any free port.
"""

import argparse
import os
import signal
import sys
import traceback

import gevent
from gevent.queue import Queue
from gevent.server import StreamServer

import coopos

RESTART_DELAY_S = 0.1  # so that a worker that can't live doesn't keep a processor busy
GRACE_S = 5.0  # what a worker has to stop in before it is killed
SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOP = object()  # among the events: someone asked the master to stop


def echo(sock, _address):
    try:
        while data := sock.recv(65536):
            sock.sendall(data)
    except ConnectionError:
        pass  # the client went away


class Master:
    def __init__(self, server):
        self.server = server
        self.workers = set()
        # All that happens goes through one queue to the one greenlet that forks. A fork copies every greenlet, so the
        # fewer there are in the master, the fewer there are in a worker that must not wake there.
        self.events = Queue()
        self.handlers = [gevent.signal_handler(signum, self.events.put, STOP) for signum in SIGNALS]
        self.lifeline, self.masters_end = os.pipe()
        coopos.make_nonblocking(self.lifeline)

    def run(self, count):
        while True:
            while len(self.workers) < count:
                self.start_worker()
            event = self.events.get()
            if event is STOP:
                break
            self.collect(event)
            gevent.sleep(RESTART_DELAY_S)
        self.stop()

    def start_worker(self):
        # A signal that reaches the new process before it is a worker has to wait: the handlers it has are the master's.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        # ref=True: a watched child keeps the master's loop running, for nothing else does while it waits for events.
        pid = coopos.fork_and_watch(lambda child: self.events.put(child.pid), ref=True)
        if pid == 0:
            self.be_worker()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self.workers.add(pid)
        print(f"worker {pid} started", flush=True)

    def be_worker(self):
        """Serve until the lifeline closes. Never returns: the master's code must not run on in a worker."""
        try:
            coopos.close(self.masters_end)
            for handler in self.handlers:
                handler.cancel()
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the master will see to it
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            self.server.start()
            coopos.nb_read(self.lifeline, 1)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def collect(self, pid):
        _, status = coopos.waitpid(pid, 0)
        self.workers.remove(pid)
        code = os.waitstatus_to_exitcode(status)
        why = f"exit status {code}" if code >= 0 else f"signal {-code}"
        print(f"worker {pid} ended: {why}", flush=True)

    def stop(self):
        print("stopping", flush=True)
        coopos.close(self.masters_end)
        with gevent.Timeout(GRACE_S, False):
            for pid in list(self.workers):
                self.collect(pid)
        for pid in list(self.workers):  # those that did not stop in time
            os.kill(pid, signal.SIGKILL)
            self.collect(pid)
        print("stopped", flush=True)


def main():
    parser = argparse.ArgumentParser(description="A prefork echo server.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8007, help="port, 0 for any free one (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="number of processes (default: %(default)s)")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error("--workers: at least one")

    server = StreamServer((args.host, args.port), echo)
    try:
        server.init_socket()  # bound and listening; only the workers accept
    except OSError as exc:
        sys.exit(f"{args.host}:{args.port}: {exc.strerror}")
    print(f"listening on {args.host}:{server.server_port}", flush=True)
    Master(server).run(args.workers)


if __name__ == "__main__":
    main()
