"""Count the instructions of the hot paths, which are the same in each run: ``python -m benchmarks --instructions``.

valgrind's callgrind counts what a process executes in user mode; the kernel's part is not in it. A path is gone N and 2 N times in
two runs, and the difference is that of N, so that what starts the interpreter isn't counted. A child that is forked isn't either.
tools/instructions.py finds a valgrind that knows the system calls of coopos, and calls this.

``instructions.json`` beside this file has the counts of one build of Python, gevent and coopos. With ``--check`` a count of
coopos that has grown by more than 5 % is an error. With ``--record WHY`` the counts are written there, and for each that has grown,
WHY. Neither counts the others.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks._counted import PATHS

RECORDS = Path(__file__).with_name("instructions.json")
ROOT = Path(__file__).resolve().parent.parent
VALGRIND = os.environ.get("VALGRIND", "valgrind")
MAX_GROWTH = 1.05
TIMEOUT_S = 300
#: Turns by time come at other moments in each run. A ready call that counts costs some 10 instructions more.
SETTINGS = {"PYTHONHASHSEED": "0", "COOPOS_FAIRNESS": "0", "PYTHONDONTWRITEBYTECODE": "", "GEVENT_LOOP": "libev-cext"}
IMPLEMENTATIONS = ("coopos", "gevent", "os")


def build() -> dict[str, str]:
    """What the counts depend on."""
    names = ("gevent", "greenlet")
    return {
        "python": f"{platform.python_version()} ({platform.python_compiler()})",
        "machine": f"{platform.machine()}, {' '.join(platform.libc_ver())}",
        **{name: version(name) for name in names},
    }


def run(path: str, implementation: str, n: int, *under: str) -> subprocess.CompletedProcess[str]:
    command = [*under, sys.executable, "-W", "ignore", "-m", "benchmarks._counted", path, implementation, str(n)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **SETTINGS}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        timeout=TIMEOUT_S,
    )  # fmt: skip


def count(path: str, implementation: str, n: int) -> int:
    """Instructions of a process that goes *n* times along *path*."""
    with tempfile.TemporaryDirectory() as directory:
        done = run(path, implementation, n, VALGRIND, "--tool=callgrind", f"--callgrind-out-file={directory}/%p")
    first = done.stderr.partition(" ")[0]  # "==pid==", of the process and not of its children
    found = [line.split()[-1] for line in done.stderr.splitlines() if line.startswith(f"{first} Collected")]
    if done.returncode or not found or "unhandled" in done.stderr:
        raise RuntimeError(f"{path} of {implementation}, by {VALGRIND}: {done.stderr[-2000:]}")
    return int(found[0])


def per_round(path: str, implementation: str) -> int:
    n = PATHS[path][1]
    run(path, implementation, 1)  # which compiles what has no bytecode yet
    if path == "import":
        return count(path, implementation, 1) - count(path, implementation, 0)
    return round((count(path, implementation, 2 * n) - count(path, implementation, n)) / n)


def has(path: str, implementation: str) -> bool:
    """Whether there is such a path: os has no waits of greenlets, and is imported already."""
    return implementation != "os" or path not in ("parked", "lines", "import")


def main(names: list[str], record: str | None, checks: bool) -> int:
    if shutil.which(VALGRIND) is None:
        print(f"There is no {VALGRIND}.", file=sys.stderr)
        return 1
    if unknown := [name for name in names if name not in PATHS]:
        print(f"no such path: {', '.join(unknown)} (there are {', '.join(PATHS)})", file=sys.stderr)
        return 2
    known: dict[str, Any] = json.loads(RECORDS.read_text()) if RECORDS.exists() else {"build": {}, "coopos": {}, "grown": []}
    is_same = known["build"] == build()
    for name, value in build().items():
        print(f"{name:<10}{value}")
    print(f"\n{'path':<10}{'coopos':>12}{'gevent':>12}{'os':>12}{'recorded':>12}")
    found: dict[str, int] = {}
    grown = []
    implementations = IMPLEMENTATIONS[:1] if checks or record is not None else IMPLEMENTATIONS
    for path in names or PATHS:
        counts = {one: per_round(path, one) for one in implementations if has(path, one)}
        found[path] = counts["coopos"]
        before = known["coopos"].get(path) if is_same else None
        if before and counts["coopos"] > before * MAX_GROWTH:
            # Where others use the machine a child ends earlier or later, and the way through the code is another one.
            counts["coopos"] = min(counts["coopos"], per_round(path, "coopos"))
        texts = [f"{counts[one]:,}" if one in counts else "-" for one in IMPLEMENTATIONS]
        print(f"{path:<10}" + "".join(f"{text:>12}" for text in [*texts, f"{before:,}" if before else "-"]), flush=True)
        if before and counts["coopos"] > before * MAX_GROWTH:
            grown.append(f"{path}: {before:,} -> {counts['coopos']:,}")
    if record is not None:
        known["coopos"] = {**known["coopos"], **found} if is_same else found
        known["build"] = build()
        known["grown"] += [f"{line}: {record}" for line in grown]
        RECORDS.write_text(json.dumps(known, indent=1) + "\n")
    elif not is_same:
        print(f"\nNot compared: {RECORDS.name} has the counts of another build: {known['build']}")
    elif grown and checks:
        print("\nMore instructions than recorded:\n  " + "\n  ".join(grown) + "\nIf that is meant: --instructions --record WHY")
        return 1
    return 0
