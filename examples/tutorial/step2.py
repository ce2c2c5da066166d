import os

from gevent.server import StreamServer

import coopos

WORKERS = 2


def echo(sock, _address):
    while data := sock.recv(65536):
        sock.sendall(data)


server = StreamServer(("127.0.0.1", int(os.environ.get("PORT", "8007"))), echo)
server.init_socket()  # it is bound and listens, and all workers share it
print("listening on port", server.server_port, flush=True)
for _ in range(WORKERS):
    pid = coopos.fork(keep_greenlets=False)
    if pid == 0:
        server.serve_forever()  # a worker stays here
    print("worker", pid, "started", flush=True)
for _ in range(WORKERS):
    pid, status = coopos.wait()
    print("worker", pid, "ended:", os.waitstatus_to_exitcode(status), flush=True)
