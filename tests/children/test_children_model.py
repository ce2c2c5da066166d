"""The wait family against a plain model of the kernel's rules: random children, signals, waits, and deaths of those who wait.

Which of several who wait gets a status is up to the scheduler; so the machine lets things happen for a while (a *spell*), then lets
everybody finish who must, and judges all answers of the spell together: each report went to at most one who takes, nobody heard
what did not happen, nobody still waits for what is there, and ChildProcessError was told exactly to those who had no child left.
Within a spell children only become fewer, which makes that exact. The same machine with os's own functions, and nobody who has to
wait, checks the model.
"""

import collections
import contextlib
import functools
import gc
import os
import signal
import sys
import threading
import traceback

import gevent
import gevent.event
import psutil
from gevent.hub import get_hub
from hypothesis import HealthCheck, settings, stateful, strategies

import coopos

from ..helpers.children import has_no_child
from ..helpers.children_model import (
    AGAIN,
    CONTINUED,
    HAS_CALLBACK,
    HAS_P_PIDFD,
    KILLED,
    NO_CHILD,
    NOTHING,
    PIDFDS_ARE_KNOWN,
    STOPPED,
    TIMED_OUT,
    WAITED,
    WAYS,
    Callback,
    Child,
    Kernel,
    Question,
    Waiter,
    until_dead,
    until_stopped,
)
from ..helpers.support import DEADLINE_S, LOOP, HubThread, Inbox, active_watchers, open_fds, turn_loop

MAX_LIVING = 6
MAX_WAITING = 10


# Hypothesis must find the same choices whenever it repeats a run; so what there is to choose from depends on what was done, never
# on who was quicker. Where it would, a rule is given a number to choose by, and may find nothing to do.


def some(name):
    """A strategy: a member of the machine's list *name*, which a precondition says is not empty."""
    return strategies.runner().flatmap(lambda machine: strategies.sampled_from(getattr(machine, name)))


def with_some(*names):
    return stateful.precondition(lambda self: all(getattr(self, name) for name in names))


numbers = strategies.integers(0, 11)
homes = strategies.sampled_from(["the test's", "its own", "another's"])
hurries = strategies.booleans()  # whether what happens next happens in the same spell
places = strategies.sampled_from(["main", "main", "thread"])

wait_flags = strategies.sampled_from([0, 0, 0, os.WSTOPPED, os.WCONTINUED, os.WSTOPPED | os.WCONTINUED]).map(
    lambda flags: flags | os.WEXITED
)
waitid_flags = strategies.builds(
    lambda which, look: which | look,
    strategies.sampled_from(
        [
            os.WEXITED,
            os.WEXITED,
            os.WSTOPPED,
            os.WCONTINUED,
            os.WEXITED | os.WSTOPPED,
            os.WEXITED | os.WCONTINUED,
            os.WSTOPPED | os.WCONTINUED,
            os.WEXITED | os.WSTOPPED | os.WCONTINUED,
        ]
    ),
    strategies.sampled_from([0, 0, os.WNOWAIT]),
)
nohang = strategies.sampled_from([0, 0, os.WNOHANG])


def questions(idtype, *calls):
    """A strategy: Question without its *whom*, for one of the *calls*, with the options that it takes."""
    flags = {"waitid": waitid_flags, "wait": strategies.just(os.WEXITED)}
    return strategies.one_of(
        strategies.builds(
            lambda which, hang, call=call: functools.partial(Question, call, idtype, options=which | hang),
            flags.get(call, wait_flags),
            strategies.just(0) if call == "wait" else nohang,
        )
        for call in calls
    )


#: How a question is asked: in which hub, under a timeout or not, and whether the spell goes on.
ASKED_AS = {"place": places, "times_out": strategies.sampled_from([False] * 5 + [True]), "hurry": hurries}


class ChildrenOfCoopos(stateful.RuleBasedStateMachine):
    """coopos, waited for in two hubs."""

    family = coopos
    places = places
    steps = 0
    #: How long everybody is waited for who must have an answer: once somebody hangs, those who search for a smaller example hurry.
    patience_s = DEADLINE_S / 2

    def __init__(self):
        super().__init__()
        self.inbox = Inbox(ref=False)
        self.fds = open_fds()
        self.watchers = active_watchers()
        self.threads = psutil.Process().num_threads()
        self.hub = get_hub()
        self.complaints = []
        self.hub.print_exception = self.complain
        self.kernel = Kernel()
        self.groups = [0, os.getpgrp()]
        self.thread = None
        self.writers = {}  # {child: where it is told to end}
        self.callbacks = []
        self.kept_by_thread = set()  # children that keep its loop running
        self.waiting = []
        self.finished = collections.deque()
        self.news = gevent.event.Event()
        self.number = 0
        self.log = []
        self.begin_spell()

    def complain(self, *what):
        """Instead of a hub's print_exception(context, type, value, traceback)."""
        self.complaints.append("".join(traceback.format_exception(*what[1:])))

    # What strategies choose from

    @property
    def children(self):
        return self.kernel.children

    @property
    def living(self):
        return [child for child in self.children if child.is_living]

    @property
    def running(self):
        return [child for child in self.living if not child.is_stopped]

    @property
    def stopped(self):
        return [child for child in self.living if child.is_stopped]

    @property
    def movable(self):
        return [child for child in self.living if WAYS[child.way][2]]

    @property
    def with_pidfds(self):
        return [child for child in self.children if child.pidfd >= 0]

    @property
    def killable(self):
        return [waiter for waiter in self.waiting if not waiter.is_killed]

    def home(self, where, number):
        """A process group that a child can join: 0 stands for one of its own."""
        groups = sorted({child.group for child in self.living} - {os.getpgrp()})
        if where == "another's" and groups:
            return groups[number % len(groups)]
        return 0 if where == "its own" else os.getpgrp()

    # Where things run

    def call_in(self, place, function, *args):
        if place == "main":
            return function(*args)
        if self.thread is None:
            self.thread = HubThread().__enter__()
            self.thread.call(lambda: setattr(get_hub(), "print_exception", self.complain))
        return self.thread.call(function, *args)

    def kill_in_its_hub(self, waiter):
        """In its own hub's thread."""
        kill = functools.partial(waiter.greenlet.kill, block=False)
        if waiter.place == "main":
            self.hub.loop.run_callback(kill)
        elif self.thread is not None:
            self.thread.post(kill)

    def turn(self, place):
        """Let a hub run until nothing is ready any more."""
        self.call_in(place, turn_loop)

    def note(self, *what):
        type(self).steps += 1
        self.log.append(" ".join(map(str, what)))

    # Spells

    def begin_spell(self):
        self.answered = []
        self.told = self.kernel.reports()  # all that somebody may have heard in this spell
        self.is_quiet = True

    def happens(self, hurry):
        """Something has happened that others may have to hear of."""
        self.told |= self.kernel.reports()
        self.is_quiet = False
        if not hurry:
            self.settle()

    def gather(self):
        while self.finished:
            waiter = self.finished.popleft()
            if waiter in self.waiting:
                self.waiting.remove(waiter)
            self.answered.append(waiter)

    def taken(self):
        return [w.outcome for w in self.answered if isinstance(w.outcome, tuple) and w.question.takes]

    def must_end(self, waiter, taken):
        if waiter.is_killed or waiter.times_out or self.kernel.answers(waiter.question, taken):
            return True
        return not waiter.is_stranded and not self.kernel.candidates(waiter.question, taken)

    def settle(self):
        """End the spell: until everybody has an answer who must, then judge."""
        for child in self.children:
            if child.is_dying:
                until_dead(child)
                self.kernel.end(child, child.status)
        self.turn("main")
        while True:
            self.news.clear()
            self.gather()
            taken = self.taken()
            late = [waiter for waiter in self.waiting if self.must_end(waiter, taken)]
            if not late:
                break
            if not self.news.wait(self.patience_s) and not self.finished:
                type(self).patience_s = 0.5
                self.fail(f"still waiting: {late}")
        self.judge(taken)
        self.check(not self.complaints, "a hub had to report:", *self.complaints)
        self.kernel.take(taken)
        for waiter in self.waiting:
            if waiter.place == "thread" and not waiter.question.takes:
                waiter.seen_before |= self.told
        self.begin_spell()

    def judge(self, taken):
        for report in taken:
            self.check(taken.count(report) == 1, report, "was told more than once")
        for waiter in self.answered:
            question, outcome = waiter.question, waiter.outcome
            if isinstance(outcome, tuple):
                may_have_heard = self.told if question.takes else self.told | waiter.seen_before
                self.check(outcome in may_have_heard, "there is no such report:", waiter)
                about = [child for child in self.children if child.pid == outcome[0] and question.is_about(child)]
                self.check(about and question.hears(outcome[1]), "was not asked for:", waiter)
            elif outcome == NO_CHILD and question.by_pidfd and question.whom.is_watched and not PIDFDS_ARE_KNOWN:
                pass
            elif outcome == NO_CHILD:
                there = self.kernel.candidates(question, taken)
                self.check(waiter.is_stranded or not there, waiter, "but there is", there)
            elif outcome in (NOTHING, AGAIN):
                expected = NOTHING if question.options & os.WNOHANG else AGAIN
                self.check(outcome == expected and not question.may_wait, waiter)
                self.check(waiter.could_be, "there was no child:", waiter)
                untold = [report for report in waiter.there if report not in taken]
                self.check(not untold, waiter, "but there was", untold)
            elif outcome == KILLED:
                self.check(waiter.is_killed, waiter)
            else:
                self.check(outcome == TIMED_OUT and waiter.times_out, waiter)

    def check(self, holds, *what):
        if not holds:
            self.fail(*what)

    def fail(self, *what):
        steps = "\n".join(self.log)
        message = f"{' '.join(map(str, what))}\nanswers of this spell: {self.answered}\n{steps}"
        print(message)
        raise AssertionError(message)

    # Children

    @stateful.precondition(lambda self: len(self.living) < MAX_LIVING)
    @stateful.rule(
        way=strategies.sampled_from(["spawned", "spawned and watched", *WAYS]),
        place=places,
        where=homes,
        number=numbers,
        pidfd=strategies.sampled_from(["none", "blocking", "non-blocking"]),
    )
    def start(self, way, place, where, number, pidfd):
        if self.family is os:
            way = way.split()[0]  # coopos would collect those it watches
        self.settle()  # with it, children become more
        group = self.home(where, number)
        starter, is_watched, _ = WAYS[way]
        callback = Callback() if way in HAS_CALLBACK else None
        reader, writer = os.pipe()
        try:
            pid = self.call_in(place, functools.partial(starter, reader, group, callback=callback))
        finally:
            os.close(reader)
        child = Child(self.number, pid, group or pid, way)
        self.note("start", child, "in", place, "group", child.group, "pid", pid)
        self.number += 1
        self.writers[child] = writer
        child.is_watched = is_watched
        self.add_group(child.group)
        if callback is not None:
            self.add_callback(callback, child, place)
        if HAS_P_PIDFD and pidfd != "none":
            child.pidfd = os.pidfd_open(pid)
            child.is_nonblocking = pidfd == "non-blocking"
            os.set_blocking(child.pidfd, not child.is_nonblocking)
        self.kernel.add(child)

    def add_callback(self, callback, child, place):
        callback.child = child
        callback.place = place
        self.callbacks.append(callback)

    def told_to_end(self, child, status, is_sure, hurry):
        child.status = status
        child.is_dying = True
        # Until it has ended, that is to be told which may have been told before.
        if is_sure:
            until_dead(child)
            self.kernel.end(child, status)
        self.happens(hurry)
        self.told.add(child.report)

    @with_some("running")
    @stateful.rule(child=some("running"), code=strategies.integers(0, 255), is_sure=strategies.booleans(), hurry=hurries)
    def exit(self, child, code, is_sure, hurry):
        self.note("exit", child, code, is_sure, hurry)
        os.write(self.writers[child], b"%d\n" % code)
        self.told_to_end(child, code << 8, is_sure, hurry)

    @with_some("living")
    @stateful.rule(
        child=some("living"),
        signum=strategies.sampled_from([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1]),
        is_sure=strategies.booleans(),
        hurry=hurries,
    )
    def kill(self, child, signum, is_sure, hurry):
        signum = signal.SIGKILL if child.is_stopped else signum  # any other would wait for the child to be continued
        self.note("kill", child, signum, is_sure, hurry)
        os.kill(child.pid, signum)
        self.told_to_end(child, int(signum), is_sure, hurry)

    @with_some("running")
    @stateful.rule(child=some("running"), hurry=hurries)
    def stop(self, child, hurry):
        if (child.pid, STOPPED) in self.told:
            self.settle()  # two alike in one spell could not be told apart
        self.note("stop", child, hurry)
        os.kill(child.pid, signal.SIGSTOP)
        until_stopped(child)
        self.kernel.stop(child)
        self.happens(hurry)

    @with_some("living")
    @stateful.rule(child=some("living"), hurry=hurries)
    def resume(self, child, hurry):
        """Of a child that is not stopped nothing is to be told."""
        if (child.pid, CONTINUED) in self.told:
            self.settle()
        self.note("resume", child, hurry)
        os.kill(child.pid, signal.SIGCONT)
        self.kernel.resume(child)
        self.happens(hurry)

    @with_some("stopped")
    @stateful.rule(child=some("stopped"), hurry=hurries)
    def resume_a_stopped_one(self, child, hurry):
        self.resume(child, hurry)

    @with_some("movable")
    @stateful.rule(child=some("movable"), where=homes, number=numbers)
    def move(self, child, where, number):
        """Into another process group, while there is nothing to tell: nobody is woken for it."""
        self.settle()
        if child.status is not None:
            return
        group = self.home(where, number) or child.pid
        self.note("move", child, group)
        os.setpgid(child.pid, group)
        child.group = group
        self.add_group(group)
        for waiter in self.waiting:
            if not self.kernel.candidates(waiter.question, []):
                waiter.is_stranded = True

    def add_group(self, group):
        if group not in self.groups:
            self.groups.append(group)

    @with_some("children")
    @stateful.rule(child=some("children"), place=places, loop=places, has_callback=strategies.booleans(), ref=strategies.booleans())
    def watch(self, child, place, loop, has_callback, ref):
        """Once or several times, in several loops, before its end or after."""
        if self.family is os:
            return
        if any(waiter.place == "thread" for waiter in self.waiting) or any(child.is_dying for child in self.children):
            self.settle()
        self.gather()
        self.note("watch", child, "from", place, "in", loop)
        there = self.call_in(loop, get_hub).loop
        callback = Callback() if has_callback else None
        is_taken = child.is_taken or (child.is_dead and child.report in self.taken())
        try:
            watched = self.call_in(place, coopos.watch, child.pid, callback, there, ref)
        except ChildProcessError:
            self.check(is_taken, child, "could not be watched")
        else:
            self.check(not is_taken, child, "could be watched")
            self.check(watched.pid == child.pid, watched, "is not", child)
            child.is_watched = True
            if ref and loop == "thread":
                self.kept_by_thread.add(child)
            if callback is not None:
                self.add_callback(callback, child, loop)
        self.happens(True)

    # Waits

    def ask(self, question, place, times_out, hurry):
        """Put a question: at once where it can't come to waiting, else in a greenlet."""
        if self.is_quiet:
            can_wait = question.may_wait and not self.kernel.answers(question, []) and self.kernel.candidates(question, [])
        else:
            can_wait = question.may_wait
        if can_wait and (self.family is os or len(self.waiting) >= MAX_WAITING):
            return
        self.gather()
        waiter = Waiter(question, place, times_out)
        self.note("ask", question, "in", place, times_out, hurry)
        taken = self.taken()
        waiter.could_be = self.kernel.candidates(question, taken)
        waiter.there = [
            report
            for child in waiter.could_be
            if not child.is_dying and (report := child.report) in self.kernel.answers(question, taken)
        ]
        if not can_wait:
            waiter.times_out = False
            waiter.outcome = self.call_in(place, self.at_once, question)
            self.answered.append(waiter)
        else:
            self.waiting.append(waiter)
            self.call_in(place, self.begin, waiter, hurry)
        self.happens(hurry)

    def at_once(self, question):
        """Put a question that has an answer. No greenlet is switched for it."""
        turns = []
        turn = get_hub().loop.run_callback(turns.append, None)
        with gevent.Timeout(self.patience_s, False):  # which no hub runs to tell, unless this waits
            answer = question.put(self.family)
            turn.stop()
            assert not turns, "a greenlet was switched for an answer that is there"
            return answer
        return WAITED

    def begin(self, waiter, hurry):
        """In the waiter's hub: a greenlet that asks."""
        waiter.hub = get_hub()
        waiter.greenlet = gevent.spawn(self.wait, waiter)
        waiter.greenlet.rawlink(functools.partial(self.ended, waiter))
        if not hurry:
            turn_loop()

    def wait(self, waiter):
        try:
            if waiter.times_out:
                with gevent.Timeout(0):
                    outcome = waiter.question.put(self.family)
            else:
                outcome = waiter.question.put(self.family)
        except gevent.GreenletExit:
            outcome = KILLED
        except gevent.Timeout:
            outcome = TIMED_OUT
        except BaseException as ex:
            outcome = repr(ex)
        self.finish(waiter, outcome)

    def ended(self, waiter, greenlet):
        if waiter.outcome is None:  # killed before it began
            self.finish(waiter, KILLED if isinstance(greenlet.value, gevent.GreenletExit) else repr(greenlet.exception))

    def finish(self, waiter, outcome):
        waiter.outcome = outcome
        self.finished.append(waiter)
        self.inbox.post(self.news.set)

    @with_some("children")
    @stateful.rule(question=questions(os.P_PID, "waitpid", "wait4", "waitid"), child=some("children"), **ASKED_AS)
    def ask_for_a_child(self, question, child, **how):
        self.ask(question(whom=child), **how)

    @with_some("children")
    @stateful.rule(question=questions(os.P_PID, "waitpid", "wait4", "waitid"), number=numbers, **ASKED_AS)
    def ask_for_one_still_there(self, question, number, **how):
        there = [child for child in self.children if not child.is_taken]
        if there:
            self.ask(question(whom=there[number % len(there)]), **how)

    @with_some("with_pidfds")
    @stateful.rule(question=questions(getattr(os, "P_PIDFD", None), "waitid"), child=some("with_pidfds"), **ASKED_AS)
    def ask_for_a_pidfd(self, question, child, **how):
        self.ask(question(whom=child), **how)

    @stateful.rule(question=questions(os.P_ALL, "waitpid", "wait", "wait3", "wait4", "waitid"), **ASKED_AS)
    def ask_for_any(self, question, **how):
        self.ask(question(whom=None), **how)

    @stateful.rule(question=questions(os.P_PGID, "waitpid", "wait4", "waitid"), number=numbers, **ASKED_AS)
    def ask_for_a_group(self, question, number, **how):
        self.ask(question(whom=self.groups[number % len(self.groups)]), **how)

    @with_some("children")
    @stateful.rule(child=some("children"), hurry=hurries)
    def somebody_elses_wait(self, child, hurry):
        """A library waits for its own child by os.waitpid. Of a child that coopos was asked about, that would be theft."""
        about = [waiter for waiter in [*self.waiting, *self.answered] if waiter.question.whom is child]
        if child.is_watched or about:
            return
        self.gather()
        self.note("somebody else's wait for", child, hurry)
        question = Question("waitpid", os.P_PID, child, os.WEXITED | os.WNOHANG)
        waiter = Waiter(question, "main")
        taken = self.taken()
        waiter.could_be = self.kernel.candidates(question, taken)
        waiter.there = [] if child.is_dying else self.kernel.answers(question, taken)
        waiter.outcome = question.put(os)
        self.answered.append(waiter)
        self.happens(hurry)

    @stateful.rule(number=numbers, hurry=hurries)
    def kill_somebody(self, number, hurry):
        """A greenlet that waits."""
        if self.killable:
            self.kill_a_waiter(self.killable[number % len(self.killable)], hurry)

    def kill_a_waiter(self, waiter, hurry):
        self.note("kill the waiter", waiter)
        waiter.is_killed = True
        self.kill_in_its_hub(waiter)
        self.happens(hurry)

    @stateful.rule(place=places, goes_on=strategies.sampled_from([True, True, True, False]))
    def let_run(self, place, goes_on):
        """A hub; and the other thread may come to its end."""
        self.note("let run", place, goes_on)
        self.turn(place)
        self.settle()
        if not goes_on and self.thread is not None:
            self.end_the_thread()

    def end_the_thread(self):
        """Its hub goes, with those who wait there; what it watched is still watched."""
        if LOOP == "libuv" and any(child.is_living for child in self.kept_by_thread):
            return  # gevent's libuv loop can't be destroyed with a watcher that keeps it running
        for waiter in self.killable:
            if waiter.place == "thread":
                self.kill_a_waiter(waiter, True)
        self.settle()
        self.leave_thread()

    def leave_thread(self):
        thread, self.thread = self.thread, None
        self.kept_by_thread.clear()
        if thread is not None:
            thread.__exit__()
        for callback in self.callbacks:
            if callback.place == "thread":
                callback.is_void = True

    # At any time, and at the end

    @stateful.invariant()
    def callbacks_are_called_once(self):
        for callback in self.callbacks:
            child = callback.child
            if callback.calls:
                status = child.status
                self.check(child.is_dead or child.is_dying, "called back of the living", child)
                self.check(callback.calls == [(child.pid, child.pid, status)], "called back", callback.calls, child, status)

    def teardown(self):
        try:
            if sys.exc_info()[0] is None:
                self.finish_properly()
        finally:
            self.clean_up()

    def finish_properly(self):
        """All that is left is told to who asks, and nothing stays behind."""
        for child in self.living:
            self.kill(child, signal.SIGKILL, False, True)
        self.settle()
        while self.kernel.candidates(question := Question("waitpid", os.P_ALL, None, os.WEXITED), []):
            self.ask(question, "main", False, False)
        self.ask(question, "main", False, False)
        for waiter in self.killable:
            self.check(waiter.is_stranded, "still waits:", waiter)
            self.kill_a_waiter(waiter, True)
        self.settle()
        self.until(lambda: all(callback.calls or callback.is_void for callback in self.callbacks), "a callback was not called")
        self.callbacks_are_called_once()
        self.leave_thread()
        self.close()
        self.until(lambda: psutil.Process().num_threads() <= self.threads, "a thread is left")
        self.check(threading.active_count() == 1, "a thread is left:", threading.enumerate())
        gc.collect()
        self.check(open_fds() == self.fds, "descriptors are left:", open_fds(), "before:", self.fds)
        active = [watcher for watcher in active_watchers() if watcher not in self.watchers]
        self.check(not active, "watchers are left:", active)
        self.check(has_no_child(), "a child is left")

    def until(self, holds, what):
        """Let the hubs run until holds(); the main one sleeps, or the thread gets no GIL for many seconds."""
        with gevent.Timeout(self.patience_s, AssertionError(what)):
            while not holds():
                gevent.sleep(0.001)

    def close(self):
        while self.writers:
            child, writer = self.writers.popitem()
            os.close(writer)
            if child.pidfd >= 0:
                os.close(child.pidfd)

    def clean_up(self):
        """Whatever went wrong, it is not the next example's."""
        for waiter in self.waiting:
            self.kill_in_its_hub(waiter)
        turn_loop()
        for child in self.children:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # it is still ours
                os.kill(child.pid, signal.SIGKILL)
                until_dead(child)
            for family in (coopos, os):
                with contextlib.suppress(OSError):
                    family.waitpid(child.pid, os.WNOHANG)
        turn_loop()
        self.leave_thread()
        self.close()
        self.inbox.close()
        del self.hub.print_exception


class ChildrenOfTheKernel(ChildrenOfCoopos):
    """The kernel itself, by os's functions, where they don't have to wait: what is wrong here is the model."""

    family = os


def run(machine, max_examples):
    with_steps = settings(
        max_examples=max_examples,
        stateful_step_count=50,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    gc.freeze()  # each example collects, and looks for watchers, among its own objects alone
    stateful.run_state_machine_as_test(machine, settings=with_steps)


def test_model_is_the_kernels():
    """The model says of os's own wait family what it does."""
    run(ChildrenOfTheKernel, 20)


def test_wait_family_is_the_models(request):
    """Whatever happens, every report is told as the kernel would, once, to somebody who asked for it; and nothing is left.

    Forty runs of fifty steps, and a thousand with --soak.
    """
    run(ChildrenOfCoopos, 1000 if request.config.getoption("--soak") else 40)
    print(ChildrenOfCoopos.steps, "steps")
