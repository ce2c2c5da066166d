"""The model of the kernel's rules about children that test_children_model.py holds the wait family against.

It (class Kernel) is what waitpid(2) and waitid(2) say, and no more. Forked children leave by _exit() before they touch anything of
the test's.
"""

import contextlib
import functools
import os
import posix
import signal
from resource import struct_rusage

import psutil

import coopos

from .children import HAS_P_PIDFD, HAS_PIDFDS
from .support import closing


def pidfds_are_known():
    """Whether coopos knows, by a pidfd of somebody else's, a child that it has collected: by its own one's inode (Linux 6.9)."""
    if not (HAS_PIDFDS and HAS_P_PIDFD):
        return False
    with closing(os.pidfd_open(os.getpid()), os.pidfd_open(os.getppid())) as (ours, parents):
        return os.fstat(ours).st_ino != os.fstat(parents).st_ino


PIDFDS_ARE_KNOWN = pidfds_are_known()

# What a wait comes to, other than a report, which is (pid, raw wait status).
NOTHING = "nothing to report"  # under WNOHANG
NO_CHILD = "ChildProcessError"
AGAIN = "BlockingIOError"  # of a pidfd in non-blocking mode
KILLED = "killed"
TIMED_OUT = "timed out"
WAITED = "waited for what was there"

STOPPED = signal.SIGSTOP << 8 | 0x7F
CONTINUED = 0xFFFF


class Child:
    """A child as the kernel sees it."""

    def __init__(self, number, pid, group, way):
        self.number = number
        self.pid = pid
        self.group = group
        self.way = way
        self.pidfd = -1
        self.is_nonblocking = False  # the pidfd
        self.is_watched = False
        self.is_stopped = False
        self.is_dying = False  # told to end; whether it has is not known yet
        self.is_dead = False
        self.is_taken = False  # somebody has its exit status
        self.status = None  # what there is to be told: of its end, else of its last stop or continue

    def __repr__(self):
        return f"<child {self.number}, {self.way}>"

    @property
    def is_living(self):
        return not self.is_dead and not self.is_dying

    @property
    def report(self):
        return self.pid, self.status


class Question:
    """A wait: which call, for whom, with which options (in waitid's form)."""

    def __init__(self, call, idtype, whom, options):
        self.call = call
        self.idtype = idtype
        self.whom = whom  # a Child, the process group, or None for all
        self.options = options

    def __repr__(self):
        whom = self.whom
        idtype = {os.P_ALL: "all", os.P_PGID: "group", os.P_PID: ""}.get(self.idtype, "pidfd of")
        names = ("WEXITED", "WSTOPPED", "WCONTINUED", "WNOHANG", "WNOWAIT")
        options = "|".join(name for name in names if self.options & getattr(os, name))
        return f"{self.call}({idtype} {'' if whom is None else whom}, {options})"

    @property
    def takes(self):
        return not self.options & os.WNOWAIT

    @property
    def may_wait(self):
        return not self.options & os.WNOHANG and not self.is_nonblocking

    @property
    def is_nonblocking(self):
        return self.by_pidfd and self.whom.is_nonblocking

    @property
    def by_pidfd(self):
        return HAS_P_PIDFD and self.idtype == os.P_PIDFD

    def is_about(self, child):
        if self.idtype == os.P_ALL:
            return True
        if self.idtype == os.P_PGID:
            return child.group == (self.whom or os.getpgrp())
        return child is self.whom

    def hears(self, status):
        if status == CONTINUED:
            return bool(self.options & os.WCONTINUED)
        return bool(self.options & (os.WSTOPPED if os.WIFSTOPPED(status) else os.WEXITED))

    def put(self, family):
        """Ask *family*, coopos or os; returns what it comes to."""
        try:
            if self.call == "waitid":
                return self.put_to_waitid(family)
            flags = self.options & (os.WNOHANG | os.WCONTINUED) | (os.WUNTRACED if self.options & os.WSTOPPED else 0)
            if self.call == "wait":
                answer = family.wait()
            elif self.call == "wait3":
                answer = family.wait3(flags)
            else:
                answer = getattr(family, self.call)(self.pid, flags)
        except ChildProcessError:
            return NO_CHILD
        except BlockingIOError:
            return AGAIN
        if len(answer) == 3:
            assert type(answer[2]) is struct_rusage
            assert answer[2].ru_maxrss > 0 or not answer[0]
        return NOTHING if answer[:2] == (0, 0) else answer[:2]

    @property
    def pid(self):
        if self.idtype == os.P_ALL:
            return -1
        return -self.whom if self.idtype == os.P_PGID else self.whom.pid

    def put_to_waitid(self, family):
        if self.idtype == os.P_ALL:
            number = 0
        elif self.idtype == os.P_PGID:
            number = self.whom
        else:
            number = self.whom.pidfd if self.by_pidfd else self.whom.pid
        result = family.waitid(self.idtype, number, self.options)
        if result is None:
            return NOTHING
        assert type(result) is os.waitid_result
        assert result.si_uid == os.getuid()
        assert result.si_signo == signal.SIGCHLD
        if result.si_code == os.CLD_EXITED:
            status = result.si_status << 8
        elif result.si_code == os.CLD_KILLED:
            status = int(result.si_status)
        elif result.si_code == os.CLD_STOPPED:
            status = result.si_status << 8 | 0x7F
        else:
            assert (result.si_code, result.si_status) == (os.CLD_CONTINUED, signal.SIGCONT)
            status = CONTINUED
        return result.si_pid, status


class Kernel:
    """The kernel's books, as far as is certain; *taken* is what is known to have been told since."""

    def __init__(self):
        self.children = []

    def add(self, child):
        self.children.append(child)

    def candidates(self, question, taken):
        """The children that a wait could be for: without them it is ECHILD. The dead count only for those who ask for an end."""
        return [
            child
            for child in self.children
            if question.is_about(child)
            and not child.is_taken
            and (not child.is_dead or (question.options & os.WEXITED and child.report not in taken))
        ]

    def reports(self):
        """Everything there is to be told."""
        return {child.report for child in self.children if child.status is not None and not child.is_taken}

    def answers(self, question, taken):
        """The reports that a wait could return at once."""
        return [
            child.report
            for child in self.candidates(question, taken)
            if child.status is not None and child.report not in taken and question.hears(child.status)
        ]

    def take(self, reports):
        for child in self.children:
            if child.report in reports:
                child.is_taken = child.is_dead
                if not child.is_dead:
                    child.status = None

    def stop(self, child):
        child.is_stopped = True
        child.status = STOPPED  # a continue that nobody heard of is forgotten

    def resume(self, child):
        if child.is_stopped:
            child.is_stopped = False
            child.status = CONTINUED

    def end(self, child, status):
        child.is_dead = True
        child.is_dying = False
        child.status = status


class Waiter:
    """Somebody who puts a question, and what it comes to."""

    def __init__(self, question, place, times_out=False):
        self.question = question
        self.place = place
        self.times_out = times_out
        self.is_killed = False
        self.is_stranded = False  # its group was left by the last child without anybody's ending: the kernel need not tell
        self.outcome = None
        self.there = []  # the answers that were there when it asked
        self.seen_before = set()  # reports of earlier spells that it may have looked at

    def __repr__(self):
        return f"{self.question} in {self.place}: {self.outcome}"


class Callback:
    """A callback for a child that is watched."""

    def __init__(self, child=None):
        self.child = child
        self.calls = []
        self.is_void = False  # its loop is gone

    def __call__(self, watched):
        self.calls.append((watched.pid, watched.rpid, watched.rstatus))


def spawn_sh(spawn, reader, group):
    dup = (os.POSIX_SPAWN_DUP2, reader, 0)
    return spawn("/bin/sh", ["sh", "-c", "read code; exit $code"], {}, file_actions=[dup], setpgroup=group)


def fork_reader(fork, reader, group):
    pid = fork()
    if not pid:
        # posix's _exit: os's is replaced under coverage, to write a file for each of these thousands.
        try:
            os.closerange(3, reader)
            os.closerange(reader + 1, 1024)  # with the test, every writer is gone, and so are the children
            posix._exit(int(os.read(reader, 8)))
        finally:
            posix._exit(111)
    os.setpgid(pid, group)
    return pid


#: {how a child is made: (starter(reader, group, callback), whether that watches it, whether its group can be changed)}
WAYS = {
    "spawned": (lambda *where, callback: spawn_sh(os.posix_spawn, *where), False, False),
    "spawned and watched": (lambda *where, callback: spawn_sh(coopos.posix_spawn, *where), True, False),
    "spawned under fork_and_watch": (
        lambda *where, callback: coopos.fork_and_watch(callback, fork=lambda: spawn_sh(os.posix_spawn, *where)),
        True,
        False,
    ),
    "forked": (lambda *where, callback: fork_reader(coopos.fork_gevent, *where), False, True),
    "forked and watched": (
        lambda *where, callback: fork_reader(functools.partial(coopos.fork_and_watch, callback), *where),
        True,
        True,
    ),
}

HAS_CALLBACK = ("spawned under fork_and_watch", "forked and watched")


def until_dead(child):
    """Stand still until a child that was told to end is dead."""
    with contextlib.suppress(ChildProcessError):  # and collected already
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


def until_stopped(child):
    """Stand still until a child that was told to stop has. Others may have heard of it: waitid might wait for ever."""
    process = psutil.Process(child.pid)
    while process.status() != psutil.STATUS_STOPPED:
        pass
