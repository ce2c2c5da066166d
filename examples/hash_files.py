"""Print the SHA-256 of many files, as ``sha256sum`` does, while the program does other things.

It shows ``coopos.read`` on regular files: what is in memory is there at once, and what is not is read by worker threads, many at a
time.

    python examples/hash_files.py DIRECTORY ...
    python examples/hash_files.py --at-once 64 --status DIRECTORY

With --status it counts its ticks of 10 ms on standard error at the end: so often another greenlet has run meanwhile.
"""

import argparse
import hashlib
import os
import stat
import sys

import gevent
from gevent.pool import Pool

import coopos

# While a piece is hashed no other greenlet runs: for some 0.2 ms.
PIECE = 256 * 1024


def paths_in(tops):
    for top in tops:
        if not os.path.isdir(top):
            yield top
        for directory, _, names in os.walk(top):
            yield from (os.path.join(directory, name) for name in sorted(names))


def hash_file(path):
    """(path, digest, None), or (path, None, what is wrong)."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return path, None, "not a regular file"  # a FIFO would wait for somebody who writes
        fd = coopos.open(path, os.O_RDONLY)
        try:
            digest = hashlib.sha256()
            while data := coopos.read(fd, PIECE):
                digest.update(data)
            return path, digest.hexdigest(), None
        finally:
            coopos.close(fd)
    except OSError as exc:
        return path, None, exc.strerror


def main():
    parser = argparse.ArgumentParser(description="Print the SHA-256 of many files.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a file, or a directory with all that is below it")
    parser.add_argument("--at-once", type=int, default=64, metavar="N", help="how many files at a time (default: %(default)s)")
    parser.add_argument("--status", action="store_true", help="tell how often another greenlet ran")
    args = parser.parse_args()

    ticks = 0

    def tick():
        nonlocal ticks
        while True:
            gevent.sleep(0.01)
            ticks += 1

    ticker = gevent.spawn(tick)
    failed = False
    for path, digest, error in Pool(args.at_once).imap(hash_file, paths_in(args.paths)):
        if error:
            failed = True
            print(f"{path}: {error}", file=sys.stderr)
        else:
            print(f"{digest}  {path}")
    ticker.kill()
    if args.status:
        print(f"{ticks} ticks", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
