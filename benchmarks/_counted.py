"""The hot paths whose instructions are counted: ``python -m benchmarks._counted PATH IMPLEMENTATION N`` goes N times along one.

Each path sets up the same for every N, so that the difference between two runs is that of N.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

MODULES = {"coopos": "coopos", "gevent": "gevent.os", "os": "os"}


def ready(module: Any, n: int) -> None:
    reader, writer = os.pipe()
    read, write = (module.read, module.write) if module is os else (module.nb_read, module.nb_write)
    if module is not os:
        module.make_nonblocking(reader)
        module.make_nonblocking(writer)
    for _ in range(n):
        write(writer, b"x")
        read(reader, 1)


def parked(module: Any, n: int) -> None:
    import gevent

    pipes = [os.pipe(), os.pipe()]
    for fd in (*pipes[0], *pipes[1]):
        module.make_nonblocking(fd)

    def echo(reader: int, writer: int) -> None:
        for _ in range(n):
            module.nb_read(reader, 1)
            module.nb_write(writer, b"x")

    other = gevent.spawn(echo, pipes[0][0], pipes[1][1])
    for _ in range(n):
        module.nb_write(pipes[0][1], b"x")
        module.nb_read(pipes[1][0], 1)
    other.join()


def lines(module: Any, n: int) -> None:
    import gevent

    reader, writer = os.pipe()
    if module is sys.modules.get("gevent.os"):
        from gevent.fileobject import FileObjectPosix

        source, sink = FileObjectPosix(reader, "rb"), FileObjectPosix(writer, "wb")
    else:
        source, sink = module.fdopen(reader, "rb"), module.fdopen(writer, "wb")

    def fill() -> None:
        with sink:
            for _ in range(n * 100):
                sink.write(b"x" * 60 + b"\n")

    gevent.spawn(fill)
    for _ in source:
        pass


def fork(module: Any, n: int) -> None:
    for _ in range(n):
        pid = module.fork()
        if not pid:
            os._exit(0)
        module.waitpid(pid, 0)


def waitpid(module: Any, n: int) -> None:
    """Children of posix.fork, each of which ends when it is waited for."""
    for _ in range(n):
        reader, writer = os.pipe()
        pid = (module if module.__name__ == "gevent.os" else os).fork()
        if not pid:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        os.close(reader)
        os.close(writer)
        module.waitpid(pid, 0)


def popen(module: Any, n: int) -> None:
    name = {"os": "subprocess", "gevent.os": "gevent.subprocess"}.get(module.__name__, "coopos.subprocess")
    start = importlib.import_module(name).Popen
    for _ in range(n):
        start(["/bin/true"]).wait()


def importing(module: Any, n: int) -> None:
    """The import itself: main() has made it, or hasn't."""


#: {path: (function, how many rounds)}
PATHS: dict[str, tuple[Callable[[Any, int], None], int]] = {
    "ready": (ready, 2000),
    "parked": (parked, 1000),
    "lines": (lines, 50),
    "fork": (fork, 20),
    "waitpid": (waitpid, 20),
    "popen": (popen, 10),
    "import": (importing, 1),
}


def main(path: str, implementation: str, n: int) -> None:
    function = PATHS[path][0]
    if function is importing:
        if n:
            importlib.import_module(MODULES[implementation])
        os._exit(0)
    module = importlib.import_module(MODULES[implementation])
    if module is not os:
        import gevent

        gevent.sleep(0)
    function(module, n)
    sys.stdout.flush()
    os._exit(0)  # what an exit costs grows with what was made


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
