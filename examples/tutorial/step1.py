import os

from gevent.server import StreamServer


def echo(sock, _address):
    while data := sock.recv(65536):
        sock.sendall(data)


server = StreamServer(("127.0.0.1", int(os.environ.get("PORT", "8007"))), echo)
server.init_socket()
print("listening on port", server.server_port, flush=True)
server.serve_forever()
