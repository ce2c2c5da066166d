import os

import gevent
from gevent.server import StreamServer

import coopos

WORKERS = 2
RESTART_DELAY_S = 0.1  # so that a worker that can't live doesn't keep a processor busy


def echo(sock, _address):
    while data := sock.recv(65536):
        sock.sendall(data)


def supervise(server):
    while True:
        pid = coopos.fork(keep_greenlets=False)
        if pid == 0:
            return server.serve_forever()  # a worker has this greenlet alone, and ends with it
        print("worker", pid, "started", flush=True)
        _, status = coopos.waitpid(pid, 0)  # the other greenlets run meanwhile
        print("worker", pid, "ended:", os.waitstatus_to_exitcode(status), flush=True)
        gevent.sleep(RESTART_DELAY_S)


server = StreamServer(("127.0.0.1", int(os.environ.get("PORT", "8007"))), echo)
server.init_socket()
print("listening on port", server.server_port, flush=True)
gevent.joinall([gevent.spawn(supervise, server) for _ in range(WORKERS)])
