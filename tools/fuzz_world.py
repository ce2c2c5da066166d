"""What fuzz.py runs: any bytes are a program of calls by greenlets of two threads, judged by os on twins.

Each descriptor has a twin of the same kind, in non-blocking mode. After each step all greenlets run until none can go on. Then
the calls that have come to an end are made by os on the twins, in the same order. Those that still wait must have to wait there
too. So a lost byte, a wrong error, a waiter that nobody wakes and a call on a number that is another file's by now are all seen.

The first byte says whether there is a second thread. A step is six bytes; see Program.step(). Closing a number and using it again,
while greenlets or a worker are at it, has most of them.
"""

import contextlib
import errno
import fcntl
import os
import time

import gevent
from fuzz_calls import CALLS, PLAIN_NAMES, WRITES, Attempt, Never, Outcome, filled, outcome_of, size_of
from fuzz_ends import (
    ALWAYS_READY,
    KINDS,
    LIMIT_S,
    TWINS,
    End,
    Here,
    There,
    content_of,
    make_ends,
    rest_of,
    run_until_idle,
)

import coopos
from coopos import _core

#: How long a call may still wait that os says is over.
WAIT_S = 2
SLOTS = 6
STEP_BYTES = 6
MAX_STEPS = 60
MAX_PENDING = 5


class Difference(AssertionError):
    """coopos did what os does not, or the other way round."""


# ---- calls -------------------------------------------------------------------------------------------------------------------


def is_polled(end):
    """Whether coopos asks poll(2) before it writes. That calls a pipe full that has room in its last page."""
    return end.is_blocking and (end.kind == "FIFO" or ("pipe" in end.kind and os.environ.get("COOPOS_NOWAIT") == "0"))


class Call:
    """A call that a greenlet of coopos's side makes, and the same on the twins, which is asked how far it would be."""

    def __init__(self, program, thread, name, ends, numbers, args, twin_args):
        self.program, self.thread, self.name, self.ends = program, thread, name, ends
        self.numbers, self.args, self.twin_args = numbers, args, twin_args
        out = next((end for end in ends if end), None)
        goes_on = out is not None and out.kind not in ("eventfd", *ALWAYS_READY) and out.is_blocking
        if name == "sendfile" and goes_on:
            goes_on = ends[1] is not None and ends[1].is_regular
        self.twins = [
            fcntl.fcntl(end.theirs, fcntl.F_DUPFD_CLOEXEC, TWINS) if end else number
            for end, number in zip(ends, numbers, strict=True)
        ]
        self.kinds = [end and f"{end.kind}{'' if end.is_blocking else ' (non-blocking)'}" for end in ends]
        self.attempt = Attempt(name, self.twins, twin_args, goes_on, bool(out) and is_polled(out))
        self.outcome = self.error = self.greenlet = None
        self.was_closed_under_worker = self.is_killed = self.is_released = False

    def __repr__(self):
        return f"{self.name}({self.numbers} {self.kinds}, {self.args!r:.60}){' closed' if self.error else ''}"

    def start(self):
        self.greenlet = gevent.spawn(self.run)

    def run(self):
        function = self.program.session.functions[self.name]
        outcome = outcome_of(function, *self.numbers, *self.args)
        self.outcome = outcome
        self.program.finished.append(self)

    @property
    def may_be_at_worker(self):
        if self.name in ("fsync", "fdatasync", "ftruncate", "posix_fallocate", "copy_file_range", "sendfile", "splice"):
            return True
        return any(end and end.kind in ALWAYS_READY for end in self.ends)

    def release(self):
        if not self.is_released:
            self.is_released = True
            for end, fd in zip(self.ends, self.twins, strict=True):
                if end:
                    os.close(fd)

    def has_begun(self):
        """Whether its first system call is made."""
        return self.outcome is not None or self.may_be_at_worker or any(row[2] is self.greenlet for row in _core.waits())

    def expected(self):
        """The Outcome by os; Never."""
        if self.was_closed_under_worker and self.outcome and self.outcome.errno == errno.EBADF:
            if self.outcome.moved:     # a worker has moved that much
                self.attempt.look()
                return Outcome(*self.outcome.key()[:4], self.attempt.outcome and self.attempt.outcome.value)
            return self.outcome        # no worker had begun; the files will tell
        kind = self.outcome and self.outcome.kind
        if self.is_killed and kind is gevent.GreenletExit:
            if self.outcome.moved > self.attempt.moved:
                self.attempt.look()    # something came just before
            return Outcome(kind, moved=self.attempt.moved)
        if self.error and (self.outcome is None or self.outcome.errno == self.error):     # else something else came just before
            return Outcome(OSError, self.error, os.strerror(self.error), moved=self.attempt.moved)
        return self.attempt.ask()


# ---- a program ---------------------------------------------------------------------------------------------------------------


class Session:
    """What programs share: the other thread, and the functions that they call."""

    def __init__(self, functions=None):
        self.functions = {name: getattr(coopos, name) for name in [*CALLS, "close"] if hasattr(coopos, name)}
        self.functions.update(functions or {})
        self.names = [name for name in CALLS if name in self.functions and hasattr(os, PLAIN_NAMES.get(name, name))]
        self.names += [name for name in ("readinto", "read_exactly", "write_all") if name not in self.names]
        # What parks has most.
        parking = ("read", "write", "write_all", "read_exactly", "splice", "readinto")
        self.names += [name for name in self.names if name in parking] * 2
        self.there = There()
        self.threads = [Here(), self.there]
        self.fds = None

    def end(self):
        self.there.end()

    def run(self, data):
        """Raises Difference."""
        program = Program(self, data)
        try:
            program.run()
        finally:
            program.clear()
        count = len(os.listdir("/proc/self/fd"))
        # What the workers and the hubs keep comes and goes.
        if self.fds is not None and count > self.fds + 12:
            raise Difference(f"{count} descriptors are open, and {self.fds} before")
        self.fds = count if self.fds is None else min(count, self.fds)


class Program:
    def __init__(self, session, data):
        self.session, self.data = session, data
        # Half a millisecond for each switch to the other thread and back: not every program has one.
        self.threads = session.threads if data[:1] > b"\xbf" else session.threads[:1] * 2
        self.slots = [None] * SLOTS
        self.last = [None] * SLOTS     # the numbers that slots had
        self.open = {}                 # {number: End}
        self.pending, self.finished, self.started, self.calls = [], [], [], []
        self.stale = set()             # Ends whose content is to be taken over from ours
        self.spliced = set()           # open files that splice(2) may have seen
        self.is_held = False
        self.log = []

    # -- what the steps do --

    def run(self):
        for index in range(1, min(len(self.data), MAX_STEPS * STEP_BYTES) - STEP_BYTES + 1, STEP_BYTES):
            self.step(*self.data[index : index + STEP_BYTES])
        self.let_go()
        self.settle()
        self.check_files()

    def step(self, op, where, a, b, c, flags):
        slot, other = where % SLOTS, where // SLOTS % SLOTS
        actions = [
            (40, self.make), (110, self.make_call), (116, self.two_calls), (186, self.close), (206, self.kill), (222, self.hold),
            (230, self.let_go_step), (238, self.duplicate), (246, self.change), (256, self.close_plainly),
        ]
        action = next(action for limit, action in actions if op < limit)
        self.catch_up()
        action(slot, other, a, b, c, flags)
        if not flags & 0x80:           # else the next step comes before anybody has run
            self.settle()

    def make(self, slot, other, a, b, c, flags):
        kind = KINDS[a % len(KINDS)]
        if self.slots[slot] is None or not self.is_busy(self.slots[slot]):
            self.drop(slot)
            self.put(slot, make_ends(kind, bool(flags & 1)))

    def put(self, slot, ends):
        """Ends go into *slot*, and the second into a free one, or it is closed."""
        self.log.append(f"slot {slot} is {ends[0].kind}: {[end.ours for end in ends]}")
        if len(ends) > 1 and slot % 2:
            ends.reverse()
        self.set(slot, ends[0])
        for end in ends[1:]:
            free = next((index for index in range(SLOTS) if self.slots[index] is None), None)
            if free is None:
                os.close(end.ours)
                os.close(end.theirs)
            else:
                self.set(free, end)

    def set(self, slot, end):
        self.slots[slot] = end
        self.last[slot] = end.ours
        self.open[end.ours] = end

    def target(self, slot):
        """(number, End or None) of a slot: if it was closed, its number, which may be another slot's by now."""
        end = self.slots[slot]
        number = end.ours if end else self.last[slot]
        end = self.open.get(number)
        if end is None:                # else a worker's bell may have the number by the time of the call
            number = -1 if number is None else TWINS - 1
        return number, end

    def make_call(self, slot, other, a, b, c, flags):
        self.enter([self.begin(slot, other, a, b, c, flags)], flags)

    def two_calls(self, slot, other, a, b, c, flags):
        """Two greenlets of one thread, before either has run."""
        self.enter([self.begin(slot, other, a, b, c, flags), self.begin(slot, other, a, c, b, flags)], flags)

    def enter(self, calls, flags):
        """Let calls run until they wait. If the byte says so, they may still have their turn of fairness before them."""
        calls = list(filter(None, calls))
        for call in calls:
            call.thread.call(gevent.sleep, 0)
            if not flags & 0x20:
                for _ in range(10):
                    if call.has_begun():
                        break
                    call.thread.call(gevent.sleep, 0)
        self.catch_up()
        for call in calls:
            if call.outcome is None and call.has_begun() and not call.may_be_at_worker:
                call.attempt.look()

    def begin(self, slot, other, a, b, c, flags):
        name = self.session.names[(flags & 0x3F) * 7 % len(self.session.names) if flags & 2 else b % len(self.session.names)]
        thread = self.threads[bool(flags & 0x40)]
        args, twin_args = CALLS[name](a, b, c), CALLS[name](a, b, c)
        targets = [self.target(slot)]
        if args[:1] == ["there"]:
            targets.append(self.target(other))
            del args[0], twin_args[0]
        if len(self.pending) >= MAX_PENDING:
            return
        ends = [end for _, end in targets]
        if any(end and not self.is_free(end, thread) for end in ends):
            return
        if name in ("splice", "sendfile"):
            if name == "sendfile" and ends[0] and is_polled(ends[0]):
                return
            self.spliced.update(end.open_file for end in ends if end)
        if ends[0] and ends[0].open_file in self.spliced and ends[0].is_blocking and name in (*WRITES, "sendfile"):
            return                     # a pipe may have lost RWF_NOWAIT, so that it may be polled or not: pipe_clear_nowait
        if any(self.is_mixed(name, end) for end in ends if end):
            return
        is_polled_first = ends[0] and ends[0].is_blocking and os.environ.get("COOPOS_NOWAIT") == "0"
        if is_polled_first and ends[0].kind == "eventfd" and size_of(args) < 8:
            return                     # EINVAL, which coopos hears of when there is something to read
        if "zero" in [end and end.kind for end in ends] and size_of(args) > 4096:
            return                     # asked not to wait, the kernel stops between pages if others are to run: read_iter_zero
        if name.startswith("eventfd") and ends[0] and ends[0].kind != "eventfd":
            return                     # eventfd_read(3) sets no errno
        if name in ("nb_read", "nb_write") and ends[0] and ends[0].is_blocking:
            name = PLAIN_NAMES[name]
        if "zero" in [end and end.kind for end in ends] and name in ("sendfile", "splice", "copy_file_range"):
            return
        call = Call(self, thread, name, ends, [number for number, _ in targets], args, twin_args)
        self.log.append(repr(call))
        self.pending.append(call)
        self.started.append(call)
        self.calls.append(call)
        thread.call(call.start)
        return call

    def is_free(self, end, thread):
        """Whether a call may use *end* now. If a worker is at the file, or another thread waits, chance would decide."""
        for call in self.pending:
            if any(each and each.file is end.file for each in call.ends):
                is_at_work = (self.is_held and call.may_be_at_worker) or (end.is_regular and call in self.started)
                if call.thread is not thread or is_at_work:
                    return False
        return not (self.is_held and end in self.stale)

    def is_mixed(self, name, end):
        """Whether the call and another one would take turns with the parts of what they move, in an order left to chance."""
        others = [call.name for call in self.pending if any(each and each.open_file is end.open_file for each in call.ends)]
        return any(each == "read_exactly" or each in WRITES for each in others) or (
            bool(others) and (name == "read_exactly" or name in WRITES))

    def is_busy(self, end):
        return any(each is end for call in self.pending for each in call.ends)

    def close(self, slot, other, a, b, c, flags):
        """Close by coopos, and use the number again at once if the byte says so."""
        number, end = self.target(slot)
        self.log.append(f"close({number} {end and end.kind})")
        thread = self.threads[bool(flags & 0x40)]
        ours = thread.call(outcome_of, self.session.functions["close"], number)
        theirs = outcome_of(os.close, end.theirs if end else number)
        if ours != theirs:
            raise Difference(f"close({number}): {ours} instead of {theirs}")
        if end:
            self.forget(end)
            for call in self.pending:
                if end in call.ends:
                    if call.may_be_at_worker:
                        call.was_closed_under_worker = True
                        # After a second it would no longer wait for the worker's answer.
                        if call.name in ("splice", "sendfile", "copy_file_range"):
                            self.let_go()
                    else:
                        call.error = errno.EBADF
        if flags & 1:
            self.put(slot, make_ends(KINDS[a % len(KINDS)], bool(flags & 2)))
            new = self.slots[slot]
            if flags & 4 and new.kind not in ("zero", "directory"):
                # Something for those who would read what is not theirs.
                for fd in (new.ours, new.theirs):
                    with contextlib.suppress(OSError):
                        os.write(fd, b"new file")

    def forget(self, end):
        del self.open[end.ours]
        for index, each in enumerate(self.slots):
            if each is end:
                self.slots[index] = None

    def drop(self, slot):
        end = self.slots[slot]
        if end:
            self.forget(end)
            os.close(end.ours)
            os.close(end.theirs)

    def close_plainly(self, slot, other, a, b, c, flags):
        """Close by os, which coopos doesn't hear of: nobody may be at it."""
        end = self.slots[slot]
        if end and not self.is_busy(end):
            self.log.append(f"os.close({end.ours} {end.kind})")
            self.drop(slot)
            if flags & 1:
                self.put(slot, make_ends(KINDS[a % len(KINDS)], bool(flags & 2)))

    def kill(self, slot, other, a, b, c, flags):
        if self.pending:
            call = self.pending[slot % len(self.pending)]
            if call in self.started or call.is_killed or call.error or call.was_closed_under_worker:
                return
            if call.name in ("splice", "sendfile", "copy_file_range") and not all(end and end.is_regular for end in call.ends):
                return                 # the worker goes on, and the twin can't take over what is in a stream
            self.log.append(f"kill {call}")
            if call.may_be_at_worker:
                # It may be done or undone.
                call.was_closed_under_worker = True
                self.stale.update(end for end in call.ends if end)
                call.is_stale = True
            call.is_killed = True
            call.thread.call(call.greenlet.kill, gevent.GreenletExit, False)
            if self.is_held:
                self.let_go()

    def hold(self, slot, other, a, b, c, flags):
        """From now on workers stop just before their system calls."""
        if not self.started:
            self.is_held = True
            _core.hold(True)

    def let_go_step(self, *args):
        self.let_go()

    def let_go(self):
        if self.is_held:
            self.is_held = False
            _core.hold(False)

    def duplicate(self, slot, other, a, b, c, flags):
        """Another number for the same open file."""
        end = self.slots[slot]
        if end and slot != other and not (self.slots[other] and self.is_busy(self.slots[other])):
            self.drop(other)
            theirs = fcntl.fcntl(end.theirs, fcntl.F_DUPFD_CLOEXEC, TWINS)
            self.set(other, End(end.kind, os.dup(end.ours), theirs, end.file, end.open_file))
            self.log.append(f"slot {other} is a copy of slot {slot}: {self.slots[other].ours}")

    def change(self, slot, other, a, b, c, flags):
        """Seek, or change the mode."""
        end = self.slots[slot]
        if end is None or any(each and each.file is end.file for call in self.pending for each in call.ends):
            return
        if end.is_regular:
            for fd in (end.ours, end.theirs):
                os.lseek(fd, a * 50, os.SEEK_SET)
        else:
            os.set_blocking(end.ours, bool(flags & 1))

    # -- what comes of them --

    def settle(self):
        """Let all greenlets run until none can go on, and compare."""
        until = time.monotonic() + LIMIT_S
        while True:
            self.run_until_idle(until)
            self.started.clear()
            self.catch_up()
            try:
                return self.check_waiting()
            except Difference:
                # An eventfd's writer looks at it now and then, and a turn of fairness comes after the loop has polled.
                if time.monotonic() > until - LIMIT_S + WAIT_S:
                    raise
                gevent.sleep(0.005)

    def run_until_idle(self, until):
        """Of a worker's calls, those that can be made are over then."""
        while True:
            seen = len(self.finished)
            for thread in dict.fromkeys(self.threads):
                if any(call.thread is thread for call in self.pending):
                    thread.call(run_until_idle)
            waiting = [call for call in self.pending if call.outcome is None]
            if seen != len(self.finished):
                continue
            at_worker = [call for call in waiting if call.may_be_at_worker]
            if not at_worker or self.are_parked(waiting) or (self.is_held and _core.count_begun()):
                return
            if time.monotonic() > until:
                raise Difference(f"still not over: {waiting}")
            gevent.sleep(0.001)

    def are_parked(self, calls):
        return not _core.count_begun() and coopos.counters()["parked"] == len(calls)

    def catch_up(self):
        """Have os make the calls that have come to an end."""
        over, self.finished = self.finished, []
        self.pending = waiting = [call for call in self.pending if call not in over]
        for call in over:
            if call.was_closed_under_worker and call.outcome.errno == errno.EBADF and not call.outcome.moved:
                call.release()
        left = list(over)
        while left:
            before = sum(call.attempt.moved for call in left)
            for call in left:
                try:
                    expected = self.right(call)
                except Never:
                    continue
                self.compare(call, expected)
                left.remove(call)
                break
            else:
                # One may have moved a part, for which another one waits.
                if sum(call.attempt.moved for call in left) == before and not self.go_on(waiting):
                    raise Difference(f"{left[0]} came to {left[0].outcome}, and os waits")

    def check_waiting(self):
        """Those that wait must have to."""
        if self.stale and not self.is_held and not any(call.is_killed for call in self.pending):
            self.take_over()
        for call in self.pending:
            if not (self.is_held and call.may_be_at_worker):
                with contextlib.suppress(Never):
                    expected = call.expected()
                    # A call that waits for one descriptor doesn't look at the other one meanwhile.
                    if len(call.ends) == 1 or expected.kind is None or call.error:
                        raise Difference(f"{call} still waits, and os comes to {expected}")

    @staticmethod
    def right(call):
        if getattr(call, "is_stale", False):
            return call.outcome
        return call.expected()

    @staticmethod
    def compare(call, expected):
        ours = call.outcome
        if ours != expected:
            raise Difference(f"{call}: {ours} instead of {expected}")
        if ours.kind is None and filled(call.args) != filled(call.twin_args):
            raise Difference(f"{call}: other bytes in the buffers")
        call.release()

    @staticmethod
    def go_on(waiting):
        """Have the calls that wait move what they can. Whether one did."""
        for call in waiting:
            if (call.attempt.goes_on or call.name == "read_exactly") and not call.error and not call.is_killed:
                before = call.attempt.moved
                call.attempt.look()
                if call.attempt.moved > before:
                    return True
        return False

    def take_over(self):
        """A worker's call was killed: whether it was made is left open. The twin gets what is there."""
        for end in self.stale:
            if end.is_regular and end in self.open.values() and end.kind != "read-only":
                data = content_of(end.ours)
                os.ftruncate(end.theirs, 0)
                os.pwrite(end.theirs, data, 0)
            if end.is_regular and end in self.open.values():
                os.lseek(end.theirs, os.lseek(end.ours, 0, os.SEEK_CUR), os.SEEK_SET)
        self.stale.clear()

    def check_files(self):
        """Everything in every stream and file, and every position."""
        for end in list(self.open.values()):
            if any(each and each.file is end.file for call in self.pending for each in call.ends):
                continue
            ours, theirs = (rest_of(end, fd) for fd in (end.ours, end.theirs))
            if ours != theirs:
                raise Difference(f"{end.kind} {end.ours} has {ours} and not {theirs}")

    def clear(self):
        """Whatever came: nothing is left."""
        self.let_go()
        for call in self.pending:
            call.thread.call(call.greenlet.kill, gevent.GreenletExit, False)
        for end in list(self.open.values()):
            with contextlib.suppress(OSError):
                self.session.functions["close"](end.ours)
            os.close(end.theirs)
        until = time.monotonic() + LIMIT_S
        for thread in dict.fromkeys(self.threads):
            thread.call(run_until_idle)
        while any(not call.greenlet.dead for call in self.pending if call.greenlet) or self.is_left():
            for thread in dict.fromkeys(self.threads):
                thread.call(run_until_idle)
            if time.monotonic() > until:
                raise Difference(f"left: {self.pending}, {coopos.counters()}")
            gevent.sleep(0.001)
        for call in self.calls:
            call.release()

    @staticmethod
    def is_left():
        counters = coopos.counters()
        return _core.count_begun() or counters["parked"] or counters["put_off_closes"]
