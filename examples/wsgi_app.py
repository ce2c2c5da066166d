"""A WSGI application whose requests run a program, and share work among processes. No line of it knows gevent or coopos.

    COOPOS_PATCH=1 COOPOS_KEEP_GREENLETS=0 gunicorn -k gevent wsgi_app

    curl http://127.0.0.1:8000/            hello
    curl http://127.0.0.1:8000/program     the output of a program
    curl http://127.0.0.1:8000/pool        lengths that two processes have counted; hangs under gevent alone
"""

import multiprocessing
import subprocess


def application(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/program":
        body = subprocess.run(["echo", "from a program"], capture_output=True, check=True).stdout
    elif path == "/pool":
        with multiprocessing.Pool(2) as pool:
            body = f"{pool.map(len, ['one', 'three'])}\n".encode()
    else:
        body = b"hello\n"
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
