"""Record a terminal session: run a command on a pseudo-terminal and write down what it prints and when.

It shows
  - ``coopos.forkpty`` and ``coopos.waitpid``: a child with a terminal of its own and of the right size, and its exit status;
  - ``coopos.read_pty``: what the child prints, up to its end, whatever errno the system gives there;
  - ``coopos.read`` and ``coopos.write_all`` on standard input and output, whose flags belong to others as well, and stay as they
    are: made non-blocking, they would be so for the shell that started this program;
  - that greenlets run meanwhile: ``--status`` counts ticks on standard error.

    python examples/pty_recorder.py -o session.cast                       # $SHELL, until it exits
    python examples/pty_recorder.py -o build.cast --status -- make -j4    # a command; exits with its exit status

The recording is asciicast v2, which ``asciinema play`` shows: the first line is a JSON object with the version (2), width,
height, time of start and command; each line after it is a JSON array [seconds since the start, "o", text printed].
Killed by a signal, the command counts as exit status 128 + signal, as in a shell.
"""

import argparse
import codecs
import json
import os
import shutil
import signal
import sys
import termios
import time
import tty

import gevent

import coopos

CTRL_D = b"\x04"
TICK_S = 0.1


class Recorder:
    def __init__(self, recording, command):
        self.recording = recording
        self.started = time.monotonic()
        self.ticks = self.events = 0
        size = shutil.get_terminal_size()
        self.pid, self.terminal = coopos.forkpty(winsize=(size.lines, size.columns))
        if self.pid == 0:
            try:
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it; the command should not
                os.execvp(command[0], command)
            except OSError as exc:
                os.write(2, f"{command[0]}: {exc.strerror}\n".encode())
            finally:
                os._exit(127)
        header = {"version": 2, "width": size.columns, "height": size.lines, "timestamp": int(time.time())}
        self.write_line({**header, "command": " ".join(command)})

    def write_line(self, value):
        coopos.write_all(self.recording, json.dumps(value).encode() + b"\n")

    def copy_output(self):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come in two pieces
        data = True
        while data:
            data = coopos.read_pty(self.terminal, 65536)
            if text := decoder.decode(data, final=not data):
                self.events += 1
                self.write_line([round(time.monotonic() - self.started, 6), "o", text])
            coopos.write_all(1, data)

    def copy_input(self):
        while data := coopos.read(0, 65536):
            coopos.write_all(self.terminal, data)
        # A terminal has no end-of-file that lasts, only a key that ends one read. Who reads on gets it again.
        while True:
            coopos.write_all(self.terminal, CTRL_D)
            gevent.sleep(1)

    def tick(self):
        # On a terminal the line is written over and over; in a pipe or file each one stays.
        start, end = ("\r", "\x1b[K") if os.isatty(2) else ("", "\n")
        while True:
            print(f"{start}ticks: {self.ticks} events: {self.events}", end=end, file=sys.stderr, flush=True)
            gevent.sleep(TICK_S)
            self.ticks += 1

    def run(self, show_status):
        greenlets = [gevent.spawn(self.tick)] if show_status else []
        if sys.stdin is not None:
            greenlets.append(gevent.spawn(self.copy_input))
        try:
            self.copy_output()
            _, status = coopos.waitpid(self.pid, 0)
        finally:
            gevent.killall(greenlets)
            coopos.close(self.terminal)  # not before the wait: a command that is still there gets SIGHUP
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code


def main():
    parser = argparse.ArgumentParser(description="Record a terminal session.")
    parser.add_argument("-o", "--output", default="session.cast", help="the recording (default: %(default)s)")
    parser.add_argument("--status", action="store_true", help="count ticks and events on standard error")
    parser.add_argument("command", nargs="*", help="command and arguments (default: $SHELL)")
    args = parser.parse_args()
    command = args.command or [os.environ.get("SHELL", "/bin/sh")]

    saved = termios.tcgetattr(0) if sys.stdin is not None and os.isatty(0) else None
    with open(args.output, "wb", buffering=0) as recording:
        recorder = Recorder(recording.fileno(), command)
        try:
            if saved:
                tty.setraw(0)  # Ctrl-C and the like are for the command
            sys.exit(recorder.run(args.status))
        except BrokenPipeError:
            sys.exit("standard output is gone")
        finally:
            if saved:
                termios.tcsetattr(0, termios.TCSADRAIN, saved)


if __name__ == "__main__":
    main()
