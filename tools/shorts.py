"""Have system calls move fewer bytes than asked, and see that coopos loses nothing: ``shorts.py [OPTIONS] [SCENARIO ...]``.

strace makes calls fail (faults.py), but can't make them short. shorts.c does, a library that is compiled here and loaded before
libc. The scenarios are those of faults.py and those of short_scenarios.py. Each call that a scenario makes moves one byte, or half
of them, once or always. Then the latter must return what they return otherwise. The former may return less. None may raise
anything, hang, or leave anything behind. ``--plant`` has the core's short writes pass for whole ones, which has to be found.
"""

import argparse
import ast
import collections
import fnmatch
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faults

HERE = Path(__file__).resolve().parent
CALLS = re.search(r"names\[\] = \{(.*?)\}", (HERE / "shorts.c").read_text(), re.DOTALL)[1].replace('"', "").split(",")
CALLS = [call.strip() for call in CALLS if call.strip()]
ALWAYS = 1 << 30
#: How long a case may take: one byte at a time takes its time.
LIMIT_S = 60


class Case(collections.namedtuple("Case", "scenario call size first last")):
    """The calls from the *first* to the *last* move *size* bytes; 0: half of them."""

    def __str__(self):
        return f"{self.scenario} {self.call} {self.size or 'half'} {'always' if self.last == ALWAYS else f'at {self.first}'}"


def build(directory, plant):
    library = os.path.join(directory, "shorts.so")
    options = ["-DPLANT"] if plant else []
    subprocess.run(["cc", "-O1", "-fPIC", "-shared", *options, "-o", library, str(HERE / "shorts.c"), "-ldl"], check=True)
    return library


def run_case(server, case):
    """(result or None, status or "hang", what it printed)."""
    server.number += 1
    path = os.path.join(server.directory, str(server.number))
    pid = int(server.ask("run", case.scenario, path, ",".join(CALLS), case.call, case.size, case.first, case.last))
    until = time.monotonic() + LIMIT_S
    for _ in range(2):                 # before the body and after it
        while not faults.is_waiting(pid) and time.monotonic() < until:
            time.sleep(0.001)
        faults.send(pid, faults.signal.SIGUSR1)
        while faults.is_waiting(pid) and not faults.is_zombie(pid) and time.monotonic() < until:
            time.sleep(0.0002)
    while not faults.is_zombie(pid) and time.monotonic() < until:
        time.sleep(0.001)
    is_hanging = not faults.is_zombie(pid)
    if is_hanging:
        faults.send(pid, faults.signal.SIGUSR2)    # faulthandler answers with the stacks
        time.sleep(0.5)
        faults.send(pid, faults.signal.SIGKILL)
    status = server.ask("status", pid)
    result, log = server.take(path)
    return result, "hang" if is_hanging else status, log


def is_part(value, expected):
    """Whether *value* is what *expected* may come to if calls are short."""
    if isinstance(expected, (tuple, list)) and type(value) is type(expected):
        return len(value) == len(expected) and all(map(is_part, value, expected))
    if isinstance(expected, (bytes, str)) and type(value) is type(expected):
        return bool(value) == bool(expected) and len(value) <= len(expected)
    if type(expected) is int and type(value) is int:
        return value == expected or 0 < value < expected
    return value == expected


def judge(case, outcome, expected):
    """What is wrong, or None."""
    result, status, log = outcome
    if result is None:
        return f"{status}\n{log[-1500:]}"
    for name in ("raised", "check"):
        if name in result:
            return f"{name} {result[name]['class']} {result[name]['message']}\n{result[name]['where']}"
    for name in ("stuck", "left", "errors"):
        if result.get(name):
            return f"{name}: {result[name]}"
    value = result["value"]
    if value == expected:
        return None
    try:
        if not case.scenario.startswith(("whole_", "written_")) and is_part(ast.literal_eval(value), ast.literal_eval(expected)):
            return None
    except ValueError:
        pass
    return f"{value:.100} and not {expected:.100}"


def cases_of(scenario, counts):
    for call in CALLS:
        if counts[call]:
            for size in (1, 0):
                yield Case(scenario, call, size, 1, 1)
                if counts[call] > 1:
                    yield Case(scenario, call, size, 2, 2)
                    yield Case(scenario, call, size, 1, ALWAYS)


def scenarios():
    names = re.findall(r"^(?:@scenario.*\ndef |scenario\()(\w+)", (HERE / "short_scenarios.py").read_text(), re.MULTILINE)
    return [*names, *faults.scenarios()]


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scenarios", nargs="*", help="patterns; all of them by default")
    parser.add_argument("--call", action="append", choices=CALLS, help="only this call")
    parser.add_argument("--plant", action="store_true", help="a fault to be found")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    began, number, shortened, wrong = time.monotonic(), 0, 0, 0
    by_call = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        server = faults.Server({"LD_PRELOAD": build(directory, options.plant)})
        try:
            for scenario in scenarios():
                if not any(fnmatch.fnmatch(scenario, pattern) for pattern in options.scenarios or ["*"]):
                    continue
                plain = Case(scenario, "none", 0, 0, 0)
                outcome = run_case(server, plain)
                found = judge(plain, outcome, outcome[0] and outcome[0].get("value"))
                if found:
                    print(f"FAILED without a short call: {scenario}: {found}", flush=True)
                    wrong += 1
                    continue
                for case in cases_of(scenario, outcome[0]["counts"]):
                    if options.call and case.call not in options.call:
                        continue
                    came = run_case(server, case)
                    found = judge(case, came, outcome[0]["value"])
                    hits = came[0]["counts"][""] if came[0] and "counts" in came[0] else 0
                    number, shortened = number + 1, shortened + hits
                    by_call[case.call] += hits
                    if found:
                        wrong += 1
                        print(f"FAILED {case}: {found}", flush=True)
        finally:
            server.close()
    print(*(f"{call} {count}" for call, count in by_call.most_common()), sep=", ")
    print(f"{number} cases, {shortened} short calls, {wrong} wrong, in {time.monotonic() - began:.0f} s")
    return (0 if wrong else 1) if options.plant else (1 if wrong else 0)


if __name__ == "__main__":
    sys.exit(main())
