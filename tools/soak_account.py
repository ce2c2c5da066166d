"""The account of tools/soak.py: what its parts have counted, and what went wrong."""

import collections
import random

import gevent

import coopos
from coopos import subprocess

LIMIT_S = 60  # more than anything takes that a part waits for


class Soak:
    """A run: whether the round goes on, what was counted, what went wrong."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.counts = collections.Counter()
        self.problems = []
        self.is_on = False
        self.reaped = {}  # {pid: status}: what the foreign reaper has collected, until somebody asks

    def problem(self, text):
        self.problems.append(text)
        print(f"PROBLEM: {text}", flush=True)

    def expect(self, got, wanted, what):
        if got != wanted:
            self.problem(f"{what}: {shown(got)} in place of {shown(wanted)}")

    def nap(self, most_s):
        gevent.sleep(self.random.random() * most_s)

    def data(self, most):
        return self.random.randbytes(self.random.choice([1, 100, most // 10, most]))

    def all_of(self, greenlets):
        """Wait for their ends; what one raised is a problem."""
        for greenlet in greenlets:
            try:
                greenlet.get(timeout=LIMIT_S)
            except (Exception, gevent.Timeout) as ex:
                self.problem(f"{greenlet!r}: {ex!r}")
                greenlet.kill()

    def status_of(self, pid):
        """Its status, told by coopos; or by the reaper, if that was first and the kernel tells nothing."""
        try:
            told, status = coopos.waitpid(pid, 0)
            self.expect(told, pid, "waitpid")
        except ChildProcessError:
            status = self.reaped.get(pid)
            if status is None:
                self.problem(f"the status of child {pid} is lost")
            self.counts["statuses that only the reaper had"] += 1
        self.reaped.pop(pid, None)
        self.counts["children"] += 1
        return status

    def end(self, process, *wanted):
        """Wait for a Popen, and see how it has ended."""
        try:
            code = process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            self.problem(f"{process!r} has not ended")
            process.kill()
            return
        self.reaped.pop(process.pid, None)
        self.counts["children"] += 1
        if code not in wanted:
            self.problem(f"{process!r}: {code} in place of {wanted}")


def shown(value):
    return f"{len(value)} bytes, {value[:20]!r}" if isinstance(value, bytes) else repr(value)[:500]
