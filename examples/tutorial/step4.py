import os
import signal

import gevent
from gevent.event import Event
from gevent.pool import Pool
from gevent.server import StreamServer

import coopos

WORKERS = 2
RESTART_DELAY_S = 0.1  # so that a worker that can't live doesn't keep a processor busy
GRACE_S = 5  # what a worker has to finish its connections in
SIGNALS = (signal.SIGTERM, signal.SIGINT)

stop = Event()
lifeline, supervisors_end = os.pipe()  # nobody ever writes to it: it ends when the supervisor ends


def echo(sock, _address):
    while data := sock.recv(65536):
        sock.sendall(data)


def work(server):
    for signum in SIGNALS:  # Ctrl-C and systemd signal all processes; the supervisor will see to it
        signal.signal(signum, signal.SIG_IGN)
    coopos.close(supervisors_end)
    server.start()
    coopos.read(lifeline, 1)  # the server runs meanwhile
    server.stop(timeout=GRACE_S)


def supervise(server):
    while not stop.is_set():
        pid = coopos.fork(keep_greenlets=False)
        if pid == 0:
            return work(server)
        print("worker", pid, "started", flush=True)
        try:
            _, status = coopos.waitpid(pid, 0)
        except gevent.GreenletExit:  # it was told to stop, and didn't
            os.kill(pid, signal.SIGKILL)
            _, status = coopos.waitpid(pid, 0)
        print("worker", pid, "ended:", os.waitstatus_to_exitcode(status), flush=True)
        stop.wait(RESTART_DELAY_S)


def main():
    for signum in SIGNALS:
        gevent.signal_handler(signum, stop.set)
    address = ("127.0.0.1", int(os.environ.get("PORT", "8007")))
    server = StreamServer(address, echo, spawn=Pool())  # the pool: server.stop() waits for the connections in it
    server.init_socket()
    print("listening on port", server.server_port, flush=True)
    supervisors = [gevent.spawn(supervise, server) for _ in range(WORKERS)]
    stop.wait()
    coopos.close(supervisors_end)
    gevent.joinall(supervisors, timeout=2 * GRACE_S)
    gevent.killall(supervisors)  # those whose worker is still there
    server.close()
    print("stopped", flush=True)


if __name__ == "__main__":
    main()
