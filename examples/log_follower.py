"""Follow growing files, as ``tail -F`` does: several at once, through rotation and truncation, and FIFOs too.

It shows
  - ``coopos.tp_read`` on regular files: what is in the page cache is there at once, what is not is read in the thread pool while
    the other greenlets run;
  - ``coopos.nb_read`` on FIFOs: waiting for a writer takes no thread, so that a log beside fifty idle FIFOs still comes, and a
    read that is timed out has taken no byte.

    python examples/log_follower.py /var/log/syslog
    python examples/log_follower.py --from-start app.log worker.log events.fifo

Lines go to standard output, with "NAME: " before each if there are several files. What happens to the files goes to standard
error: ``following NAME``, ``rotated NAME`` (the name is another file's now; the old one was read to its end, the new one is
read from its start), ``truncated NAME`` (it became shorter than what was read; it is read from its start), ``waiting for
NAME: why``. A file cut and filled again beyond its old length between two looks can't be told from one that grew.
"""

import argparse
import os
import signal
import stat
import sys

import gevent

import coopos

CHUNK = 65536


def say(message):
    print(message, file=sys.stderr, flush=True)


class Follower:
    def __init__(self, path, prefix, interval_s):
        self.path = path
        self.prefix = prefix
        self.interval_s = interval_s
        self.fd = -1
        self.is_fifo = False
        self.unfinished = b""

    def run(self, from_start):
        self.open(from_start)
        while True:
            moved = self.has_moved()  # asked before the file is read to its end, so that nothing of it is lost
            while data := self.read():
                self.print_lines(data)
            if moved:
                self.finish_line()
                coopos.close(self.fd)
                say(f"rotated {self.path}")
                self.open(from_start=True)
            elif not self.is_fifo:
                if os.fstat(self.fd).st_size < os.lseek(self.fd, 0, os.SEEK_CUR):
                    self.finish_line()
                    os.lseek(self.fd, 0, os.SEEK_SET)
                    say(f"truncated {self.path}")
                gevent.sleep(self.interval_s)

    def open(self, from_start):
        why = None
        while True:
            try:
                self.is_fifo = stat.S_ISFIFO(os.stat(self.path).st_mode)
                # Open for reading alone a FIFO ends with its last writer. Open for both, it lets writers come and go.
                self.fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK if self.is_fifo else os.O_RDONLY)
                break
            except OSError as exc:
                if exc.strerror != why:
                    why = exc.strerror
                    say(f"waiting for {self.path}: {why}")
                from_start = True  # what comes later is all new
                gevent.sleep(self.interval_s)
        if not from_start and not self.is_fifo:
            os.lseek(self.fd, 0, os.SEEK_END)
        say(f"following {self.path}")

    def read(self):
        """Some bytes; none at the end of the file, or when a FIFO gave none for an interval."""
        if not self.is_fifo:
            return coopos.tp_read(self.fd, CHUNK)
        with gevent.Timeout(self.interval_s, False):
            return coopos.nb_read(self.fd, CHUNK)
        return b""

    def has_moved(self):
        """Is there another file of this name? While there is none the old one stays open: it may still be written to."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        except OSError:
            return False

    def print_lines(self, data):
        *lines, self.unfinished = (self.unfinished + data).split(b"\n")
        sys.stdout.buffer.writelines(self.prefix + line + b"\n" for line in lines)
        sys.stdout.buffer.flush()

    def finish_line(self):
        if self.unfinished:
            self.print_lines(b"\n")


def main():
    parser = argparse.ArgumentParser(description="Follow growing files, as tail -F does.")
    parser.add_argument("paths", nargs="+", metavar="FILE")
    parser.add_argument("--from-start", action="store_true", help="print what the files hold already")
    parser.add_argument("--interval", type=float, default=0.2, metavar="S", help="look every S seconds (default: %(default)s)")
    args = parser.parse_args()
    for signum in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(signum, signal.SIG_DFL)  # end without a word at Ctrl-C, or when nobody reads the lines, as tail does

    several = len(args.paths) > 1
    followers = [Follower(path, os.fsencode(path) + b": " if several else b"", args.interval) for path in args.paths]
    gevent.joinall([gevent.spawn(follower.run, args.from_start) for follower in followers], raise_error=True)


if __name__ == "__main__":
    main()
