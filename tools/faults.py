"""Make system calls fail, one after another, and see what coopos makes of it: ``faults.py [OPTIONS] [SCENARIO ...]``.

strace injects the faults (https://man7.org/linux/man-pages/man1/strace.1.html). Each scenario runs once without a fault. Then each
system call that it makes fails, in a process of its own, at its first, second and third occurrence in a thread, with each errno of
its manual page. What came of a case is judged by a few general rules, below. What they don't allow is a failure: exit status 1.

The scenarios are in fault_scenarios.py and fault_children.py, what they use is in fault_states.py, and fault_server.py runs them.
"""

import argparse
import collections
import concurrent.futures
import csv
import errno
import fnmatch
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fault_errnos import ERRNOS, FCNTL, LEFT_OUT

HERE = Path(__file__).resolve().parent
#: How long a body may take, and what comes after it.
LIMIT_S = 6
OCCURRENCES = 3
#: How often in a row a call is interrupted in a storm.
STORM = 12

PATTERN = re.compile(r"(\d+) +(?:<\.\.\. )?(\w+)(?: resumed>|\()")


# ---- the rules ---------------------------------------------------------------------------------------------------------------

#: What must work all the same: (calls, errnos), as patterns.
MUST_WORK = [
    ("*", "EINTR"),
    ("pidfd_open", "EINVAL EMFILE ENFILE ENODEV ENOMEM ENOSYS EPERM"),
    ("pidfd_send_signal", "ENOSYS EPERM"),
    ("preadv2", "ENOSYS EPERM EOPNOTSUPP"),
    ("pwritev2", "ENOSYS EOPNOTSUPP"),
    ("epoll_create1", "*"),
    ("timer_*", "*"),
    ("close_range", "*"),
    ("clone3", "ENOSYS"),
    ("process_vm_*", "ENOSYS EPERM"),
    ("rt_sigaction", "*"),
    ("futex", "*"),
    ("getpgid", "*"),
    ("fstatfs", "*"),
]
#: Exceptions that are not an OSError with the errno injected: (call, errno, class).
ALSO = [
    ("mmap", "*", "MemoryError"),
    ("clone*", "*", "RuntimeError"),
    ("mmap", "*", "RuntimeError"),
    ("rt_sigprocmask", "*", "RuntimeError"),
    ("*", "*", "SystemFailed"),
]
#: What comes out wrong all the same, and why that stays: (scenario, call, errnos, why), the first three as patterns.
KNOWN = [
    ("sendfile_to_clogged", "fcntl", "EBADF", "sendfile() asks os of descriptors that aren't open, and this one is: os waits"),
    ("wait_without_hub", "rt_sigprocmask", "*", "pthread_create(3) restores a mask that it could not save"),
    ("popen_*", "newfstatat", "*", "the stdlib's Popen leaves its pipe open if io.open() of it fails"),
    ("run_program", "newfstatat", "*", "the stdlib's Popen leaves its pipe open if io.open() of it fails"),
    ("*", "waitid", "ECHILD", "the child is there all the same, and left"),
    ("*", "pidfd_open", "ESRCH", "the child is there all the same, and counts as lost"),
    ("popen_terminal", "*read*", "EIO", "read_pty() takes it for the end"),
    ("posix_spawn", "rt_sigprocmask", "*", "posix_spawn(3) restores a mask that it could not save"),
    ("run_program", "pwritev2", "EPIPE", "communicate() takes it for a program that doesn't read, as the stdlib's does"),
    ("popen_killed", "pidfd_send_signal", "ESRCH", "the child is there all the same, and not killed"),
    ("multiprocessing_process", "clone*", "*", "the stdlib's popen_fork leaves its pipes open if fork() fails"),
    ("multiprocessing_process", "pipe2", "*", "the stdlib's popen_fork leaves its first pipe open"),
    ("multiprocessing_process", "close", "*", "the stdlib's popen_fork closes none of the other ends then"),
    ("forkpty", "*read*", "EIO", "read_pty() takes it for the end"),
    ("forkpty", "setsid", "*", "the child of forkpty(3) ends then"),
    ("forkpty", "dup2", "*", "login_tty(3) ignores it"),
    ("popen_terminal", "openat", "EINTR", "os.openpty() doesn't try again"),
    ("forkpty", "openat", "EINTR", "forkpty(3) doesn't try again"),
    ("popen_terminal", "ioctl", "ENOTTY", "ptsname(3) makes it EINVAL"),
    ("forkpty", "ioctl", "ENOTTY", "ptsname(3) makes it EINVAL"),
    ("wait_for_foreign", "pidfd_open", "*", "wait_exit() has no other way to wait"),
]
#: What the hub reports of libev, which is not coopos's.
OF_OTHERS = "(libev) "


#: What is left if the call that ends it fails, by the begin of its description.
KEPT = {"close": "descriptor", "close_range": "descriptor", "timer_delete": "timer", "rt_sigprocmask": "signal mask"}


def must_work(call, name):
    if call in ("close", "dup2", "ftruncate"):
        return False    # https://peps.python.org/pep-0475/ leaves the first two out, and io.FileIO.truncate() the last
    return any(
        fnmatch.fnmatch(call, calls) and any(fnmatch.fnmatch(name, each) for each in names.split()) for calls, names in MUST_WORK
    )


class Case(collections.namedtuple("Case", "scenario call errno when")):
    """*call* fails with *errno* at its occurrences *when*, as strace writes them."""

    def __str__(self):
        return f"{self.scenario} {self.call} {self.errno} when={self.when}"

    @property
    def inject(self):
        return f"inject={self.call}:error={self.errno}:when={self.when}"


class Outcome(collections.namedtuple("Outcome", "case is_right what details")):
    """*what*: in a few words, as the table has it."""


def judge(case, seen, result, status, log, expected):
    """The Outcome of a case. *seen*: strace's lines with "(INJECTED)". *expected*: what the scenario returns without a fault."""

    def outcome(is_right, what, details=""):
        return Outcome(case, is_right, what, f"{details}\n{''.join(seen[:4])}{log[-1500:]}".strip())

    if case is not None and case.call == "futex" and ("futex facility" in log or any("FUTEX_WAKE" in line for line in seen)):
        return outcome(True, "not a fault that there is")
    for *patterns, why in KNOWN if case is not None else ():
        if all(map(fnmatch.fnmatch, case, patterns)):
            return outcome(True, f"known: {why}")
    if result is None:
        if status == "hang":
            return outcome(False, "hangs")
        return outcome(False, f"ends: {describe_status(status)}")
    if case is not None and not seen:
        return outcome(True, "not reached")
    problems = []
    if "check" in result:
        problems.append("hub dead: " + result["check"]["class"])
    if "value" in result:       # else nobody has done what they wait for
        problems += [f"stuck: {each}" for each in result.get("stuck", ())]
    left = result.get("left", [])
    if case is not None and case.call in KEPT:
        # strace makes no system call: that descriptor is open, that timer is there.
        for _ in seen:
            victim = next((each for each in left if each.startswith(KEPT[case.call])), None)
            if victim is not None:
                left.remove(victim)
    problems += [f"left: {each}" for each in left]
    raised = result.get("raised")
    complaints = [each for each in result["errors"] if not is_allowed(case, each) and not each["message"].startswith(OF_OTHERS)]
    problems += [f"the hub reports {each['class']}: {each['message']}" for each in complaints]
    details = "\n".join([*problems, raised["where"] if raised else "", json.dumps(result["errors"][:2])])
    if raised is None and result["value"] == expected:
        what, is_right = "works", True
    elif raised is None and is_short(result["value"], expected):
        what, is_right = "a part", True
    elif raised is None:
        what, is_right = f"result {result['value'][:60]}", False
    else:
        is_right = is_allowed(case, raised) and not must_work(case.call, case.errno)
        what = raised["class"] if raised["errno"] is None else f"OSError {errno.errorcode.get(raised['errno'], raised['errno'])}"
    if problems:
        kinds = sorted({re.sub(r"[\d:].*", "", each[:40]) for each in problems})
        return outcome(False, what + "; " + ", ".join(kinds), details)
    return outcome(is_right, what, details)


def is_short(value, expected):
    """Whether a write that failed half-way has said how much it wrote."""
    return value.isdigit() and expected.isdigit() and 0 < int(value) < int(expected)


def is_allowed(case, raised):
    """Whether an exception is one that the fault explains."""
    if case is None:
        return False
    if raised["errno"] is not None:
        return raised["errno"] == getattr(errno, case.errno)
    return any(
        fnmatch.fnmatch(case.call, calls) and fnmatch.fnmatch(case.errno, names) and raised["class"] == kind
        for calls, names, kind in ALSO
    )


def describe_status(status):
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit status {os.WEXITSTATUS(status)}"


# ---- running one case --------------------------------------------------------------------------------------------------------


class Server:
    """A process of fault_server.py, which forks the cases."""

    def __init__(self, environment):
        self.directory = tempfile.mkdtemp(prefix="faults")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "fault_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env={**os.environ, **environment}, bufsize=1,
            cwd=self.directory,
        )
        self.number = 0

    def ask(self, *words):
        print(*words, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def run(self, scenario, options, limit=LIMIT_S):
        """Run a scenario under strace with *options*: its result or None, its status or "hang", strace's lines, what it printed."""
        self.number += 1
        path = os.path.join(self.directory, f"{self.number}")
        pid = int(self.ask("run", scenario, path))
        wait_until(lambda: is_waiting(pid))
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        under = subprocess.Popen(
            ["strace", "-f", "-q", "-b", "execve", "-o", f"/dev/fd/{writer}", *options, "-p", str(pid)],
            pass_fds=[writer], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )
        os.close(writer)
        lines = []
        try:
            is_hanging = self.follow(pid, under, reader, lines, limit)
        finally:
            os.close(reader)
            under.stderr.close()
        log = ""
        if is_hanging:
            send(pid, signal.SIGUSR2)  # faulthandler answers with the stacks
            time.sleep(0.3)
            lines += [f"(state {state_of(pid)})"]
            under.kill()
            under.wait()
            send(pid, signal.SIGKILL)
            status = "hang"
            self.ask("status", pid)
        else:
            status = int(self.ask("status", pid))
        result, log = self.take(path)
        return result, status, lines, log

    @staticmethod
    def take(path):
        """(what a process has written at its end or None, what it has printed); the files go."""
        with open(path + ".err", errors="replace") as file:
            log = file.read()
        result = None
        if os.path.exists(path):
            with open(path) as file:
                result = json.load(file)
        for suffix in ("", ".err", ".probe", ".new"):
            Path(path + suffix).unlink(missing_ok=True)
        return result, log

    def follow(self, pid, under, reader, lines, limit):
        """Let the body run, under strace, and then what comes after it, without. Whether that takes too long."""
        until = time.monotonic() + limit
        rest, marks, is_attached = "", 0, True
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        while time.monotonic() < until:
            if is_attached and poll.poll(200):
                data = os.read(reader, 1 << 16).decode(errors="replace")
                if not data:
                    is_attached = False
                    under.wait()
                    if not marks:
                        raise RuntimeError(under.stderr.read().decode())
                    continue
                *complete, rest = (rest + data).split("\n")
                lines += complete
                mark = re.compile(rf"{pid} +rt_sigtimedwait\(")
                entered = sum(mark.match(line) is not None for line in [*lines, rest])
                if entered > marks:
                    marks = entered
                    if marks == 2:
                        under.terminate()
                        is_attached = False
                        under.wait(10)
                        until = time.monotonic() + LIMIT_S
                    send(pid, signal.SIGUSR1)
            elif not is_attached:
                if is_zombie(pid):
                    return False
                time.sleep(0.001)
        return True


def send(pid, signum):
    try:
        os.kill(pid, signum)
    except OSError:
        pass


def wait_until(holds):
    until = time.monotonic() + 10 * LIMIT_S
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError(holds)
        time.sleep(0.0005)


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def is_zombie(pid):
    return state_of(pid) in "ZX"


def is_waiting(pid):
    """Whether it waits for its mark; or has ended."""
    try:
        return Path(f"/proc/{pid}/syscall").read_text().split()[0] == "128" or is_zombie(pid)
    except OSError:
        return True


# ---- all of it ---------------------------------------------------------------------------------------------------------------


class Made(collections.namedtuple("Made", "tid call line owners")):
    """A system call that a scenario made without a fault. *owners*: who made it, the first of the stack, once that is known."""


#: Who makes a system call, by the object file of the first frame that is not libc's.
OWNERS = {"coopos/_core": "coopos", "/gevent/": "gevent", "/greenlet/": "greenlet", "python": "python"}


def calls_of(lines):
    """The system calls of strace's *lines*, after the scenario's mark, each with its owner."""
    made, latest, latest_tid = [], {}, None
    for line in lines:
        if line.startswith(" > "):
            here = latest.get(latest_tid)
            if here is not None and not here.owners and not re.match(r" > \S*/(libc|ld-)[^/]*\(", line):
                here.owners.append(next((name for path, name in OWNERS.items() if path in line), "others"))
            continue
        match = PATTERN.match(line)
        latest_tid = match and match[1]
        if match and " resumed>" not in line[:60]:
            latest[match[1]] = Made(match[1], match[2], line, [])
            made.append(latest[match[1]])
    begin = next(index for index, each in enumerate(made) if each.call == "rt_sigtimedwait")
    return [each for each in made[begin:] if each.call != "rt_sigtimedwait"]


def is_possible(name, made):
    """Whether the kernel can give errno *name* for this call, by its arguments; and whether the call is one for this tool."""
    call, line = made.call, made.line
    if made.owners[:1] in (["gevent"], ["greenlet"]) or (call == "mmap" and made.owners != ["coopos"]):
        return False
    if call == "fcntl":
        command = re.search(r"fcntl\(\d+, (F_\w+)", line)
        return name in FCNTL.get(command and command[1], "EBADF").split()
    if call == "epoll_ctl":
        return name in ("EEXIST ELOOP ENOMEM ENOSPC EBADF EPERM" if "_ADD" in line else "ENOENT EBADF EPERM").split()
    if call == "futex":
        return "FUTEX_WAIT" in line
    if call == "flock":
        return name != "EAGAIN" or "LOCK_NB" in line
    if call == "newfstatat" and "AT_EMPTY_PATH" in line:
        return name in ERRNOS["fstat"].split()
    if call == "write" and "\\1\\0\\0\\0\\0\\0\\0\\0" in line:
        return name != "EAGAIN"     # an eventfd's, which is not full
    return True


def dry_run(server, scenario):
    """The Outcome without a fault, what the scenario returns, and its cases."""
    result, status, lines, log = server.run(scenario, ["-k"], 10 * LIMIT_S)
    outcome = judge(None, [], result, status, log, result and result.get("value"))
    return outcome, result and result.get("value"), list(cases_of(scenario, calls_of(lines))) if outcome.is_right else []


def cases_of(scenario, made):
    by_when = collections.defaultdict(list)
    counts = collections.Counter()
    for each in made:
        counts[each.tid, each.call] += 1
        when = counts[each.tid, each.call]
        if when <= OCCURRENCES and each.call not in LEFT_OUT:
            by_when[each.call, when].append(each)
    # A storm hits every call, so each must be one that a signal can interrupt.
    storms = {each.call for each in made if not is_possible("EINTR", each)}
    for (call, when), each in sorted(by_when.items()):
        for name in ERRNOS.get(call, "UNKNOWN").split():
            if any(is_possible(name, one) for one in each):
                yield Case(scenario, call, name, str(when))
                if name == "EINTR" and call not in storms:
                    storms.add(call)
                    yield Case(scenario, call, name, f"1..{STORM}")


def run_case(server, case, expected):
    trace = f"trace=rt_sigtimedwait,{case.call}"
    result, status, lines, log = server.run(case.scenario, ["-e", trace, "-e", case.inject])
    seen = [line + "\n" for line in lines if "(INJECTED)" in line]
    return judge(case, seen, result, status, log, expected)


# ---- the table ---------------------------------------------------------------------------------------------------------------

HEADER = ("system call", "errno", "outcome")
#: What an outcome is called there, by the beginning of its words.
WORDS = {"works": "the call works all the same", "a part": "the call says how much it wrote", "OSError": "OSError with this errno"}


def rows_of(outcomes):
    """The table's rows: for each call, which errnos came to what, in any scenario."""
    found = collections.defaultdict(set)
    for each in outcomes:
        if each.case is not None and not each.what.startswith("not "):
            words = next((words for begin, words in WORDS.items() if each.what.startswith(begin) and each.is_right), each.what)
            found[each.case.call, each.case.errno].add(words)
    by_what = collections.defaultdict(list)
    for (call, name), words in sorted(found.items()):
        by_what[call, "; or ".join(sorted(words))].append(name)
    return sorted((call, " ".join(names), what) for (call, what), names in by_what.items())


def write_table(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])


# ---- the command line --------------------------------------------------------------------------------------------------------


def scenarios():
    sources = [(HERE / f"{name}.py").read_text() for name in ("fault_scenarios", "fault_children")]
    return re.findall(r"^@scenario.*\ndef (\w+)", "".join(sources), re.MULTILINE)


class Run:
    """The cases of all scenarios, by as many servers as wanted."""

    def __init__(self, options):
        self.options = options
        self.local = threading.local()
        self.servers = []
        self.outcomes = []
        self.unknown = set()

    @property
    def server(self):
        if not hasattr(self.local, "server"):
            self.local.server = Server(dict(each.split("=", 1) for each in self.options.env))
            self.servers.append(self.local.server)
        return self.local.server

    def dry(self, scenario):
        return scenario, *dry_run(self.server, scenario)

    def one(self, case, expected):
        outcome = run_case(self.server, case, expected)
        if not outcome.is_right and not self.options.once:
            outcome = run_case(self.server, case, expected)     # others use this machine, too
        return outcome

    def run(self, scenarios):
        jobs = concurrent.futures.ThreadPoolExecutor(self.options.jobs)
        try:
            found = list(jobs.map(self.dry, scenarios))
            cases = []
            for scenario, outcome, expected, made in found:
                if not outcome.is_right:
                    print(f"FAILED without a fault: {scenario}: {outcome.what}\n{outcome.details}")
                    self.outcomes.append(outcome)
                    continue
                self.unknown |= {case.call for case in made if case.errno == "UNKNOWN"}
                cases += [(case, expected) for case in made if self.wants(case)]
            if self.options.list:
                for field in ("scenario", "call"):
                    print(*collections.Counter(getattr(case, field) for case, _ in cases).most_common(), sep="\n")
                cases = []
            part, parts = map(int, self.options.part.split("/"))
            cases = cases[part - 1 :: parts]
            for outcome in jobs.map(lambda each: self.one(*each), cases):
                self.outcomes.append(outcome)
                if not outcome.is_right:
                    print(f"FAILED {outcome.case}: {outcome.what}", flush=True)
                    if self.options.verbose:
                        print("    " + outcome.details.replace("\n", "\n    "), flush=True)
        finally:
            jobs.shutdown(cancel_futures=True)
            for server in self.servers:
                server.close()

    def wants(self, case):
        calls, names, when = self.options.call, self.options.errno, self.options.when
        is_wanted = (not calls or case.call in calls) and (not names or case.errno in names) and when in (None, case.when)
        return is_wanted and case.errno != "UNKNOWN"


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scenarios", nargs="*", help="patterns; all of them by default")
    parser.add_argument("--call", action="append", help="only this system call")
    parser.add_argument("--errno", action="append", help="only this errno")
    parser.add_argument("--when", help="only these occurrences")
    parser.add_argument("--part", default="1/1", metavar="N/M", help="every M-th case, from the N-th on")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the scenarios")
    parser.add_argument("--once", action="store_true", help="don't run a case that failed a second time")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--list", action="store_true", help="only count the cases, by scenario and by call")
    parser.add_argument("--table", type=Path, help="write the table system call, errno, outcome there, as CSV")
    parser.add_argument("--save", type=Path, help="write all outcomes there, as JSON lines")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    if shutil.which("strace") is None:
        sys.exit("strace is needed: apt-get install strace")
    began = time.monotonic()
    wanted = options.scenarios or ["*"]
    run = Run(options)
    run.run([each for each in scenarios() if any(fnmatch.fnmatch(each, pattern) for pattern in wanted)])
    if options.save:
        with options.save.open("w") as file:
            for each in run.outcomes:
                json.dump([each.case, each.is_right, each.what, each.details], file)
                file.write("\n")
    if options.table:
        write_table(options.table, rows_of(run.outcomes))
    wrong = [each for each in run.outcomes if not each.is_right]
    if run.unknown:
        print("no errnos known of:", *sorted(run.unknown))
    print(f"{len(run.outcomes)} cases, {len(wrong)} wrong, in {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
