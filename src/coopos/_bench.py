"""``python -m coopos bench``: what coopos, gevent and plain os cost on this machine, in about a minute. Needs gevent alone.

Each row has one operation, and a measurement of it takes a fresh interpreter that imports only what it measures. There this file
runs as a script, so that gevent is not measured with coopos beside it. Implementations take turns, and ratios are taken within a
round: what slowed one down slowed all. An interpreter that hangs or dies is ended, and the table says so. The repository's
``benchmarks`` measures more; its runner takes in_turns(), ratio() and describe_end() from here.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Run = Callable[[int], float]  # so many operations, and how many seconds they took

OURS, GEVENT, OS = IMPLEMENTATIONS = ("coopos", "gevent", "os")
MODULES = {OURS: "coopos", GEVENT: "gevent.os", OS: "os"}
PROGRAMS = {OURS: "coopos.subprocess", GEVENT: "gevent.subprocess", OS: "subprocess"}
PATIENCE_S = 30.0  # then a measurement hangs
MB = 1 << 20
CHUNK_B, CHUNKS = 4096, 256


class Size(NamedTuple):
    """How much is measured."""

    budget_s: float = 0.1  # the least time that a measurement must have taken, or it is repeated with twice as much
    children: int = 1000
    memory_mb: int = 1000
    rounds: int = 3


QUICK = Size(0.0, 3, 1, 1)


# ---- what is measured, in an interpreter of its own --------------------------------------------------------------------------


def make_pipe(is_blocking: bool) -> tuple[int, int]:
    fds = os.pipe()
    for fd in fds:
        os.set_blocking(fd, is_blocking)
    return fds


def repeat(run: Run, size: Size) -> float:
    """Seconds per operation, from a *run* of so many operations that it takes long enough."""
    count = 1
    run(count)  # what is made once is made now
    while (seconds := run(count)) < size.budget_s:
        count *= round(min(max(1.2 * size.budget_s / seconds, 2), 100))
    return seconds / count


def passing(write: Callable[[int, bytes], object], writer: int, read: Callable[[int, int], object], reader: int) -> Run:
    """A run of so many bytes that are written, and one read for each."""

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            write(writer, b"x")
            read(reader, 1)
        return time.perf_counter() - start

    return run


def start_beside(of: str, function: Callable[[], object]) -> Any:
    """The other side of what is measured: a greenlet, or for os a thread, as threads are imported there alone."""
    if of != OS:
        return importlib.import_module("gevent").spawn(function)
    import threading

    thread = threading.Thread(target=function)
    thread.start()
    return thread


def moves_of(of: str) -> tuple[Callable[[int, int], bytes], Callable[[int, bytes], int]]:
    if of == OS:
        return os.read, os.write
    module = importlib.import_module(MODULES[of])
    return module.nb_read, module.nb_write


def measure_parked(of: str, size: Size) -> float:
    (reader, their_writer), (their_reader, writer) = (make_pipe(of == OS) for _ in range(2))
    read, write = moves_of(of)

    def answer() -> None:
        while read(their_reader, 1) == b"x":
            write(their_writer, b"x")

    other = start_beside(of, answer)
    result = repeat(passing(write, writer, read, reader), size)
    write(writer, b".")
    other.join()
    return result


def measure_ready(of: str, size: Size) -> float:
    reader, writer = make_pipe(False)
    read, write = moves_of(of)
    return repeat(passing(write, writer, read, reader), size)


def measure_lines(of: str, size: Size) -> float:
    open_file: Callable[..., Any]
    if of == GEVENT:
        open_file = importlib.import_module("gevent.fileobject").FileObject
    else:
        open_file = importlib.import_module(MODULES[of]).fdopen

    def run(count: int) -> float:
        reader, writer = os.pipe()
        count *= 100

        def fill() -> None:
            with open_file(writer, "wb") as sink:
                for _ in range(count):
                    sink.write(line)

        line = b"x" * 60 + b"\n"
        start = time.perf_counter()
        other = start_beside(of, fill)
        with open_file(reader, "rb") as source:
            if sum(1 for _ in source) != count:
                raise RuntimeError("lines were lost")
        seconds = time.perf_counter() - start
        other.join()
        return seconds

    return repeat(run, size) / 100


def measure_cached(of: str, size: Size) -> float:
    module = importlib.import_module(MODULES[of])
    read = os.read if of == OS else module.tp_read
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(b"x" * CHUNK_B * CHUNKS)
        fd = file.fileno()

        def run(count: int) -> float:
            start = time.perf_counter()
            for number in range(count):
                if number % CHUNKS == 0:
                    os.lseek(fd, 0, os.SEEK_SET)
                if len(read(fd, CHUNK_B)) != CHUNK_B:
                    raise RuntimeError("bytes were lost")
            return time.perf_counter() - start

        return repeat(run, size)


def measure_fork(of: str, size: Size) -> float:
    module = importlib.import_module(MODULES[of])

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            pid = module.fork()
            if pid == 0:
                os._exit(0)
            if module.waitpid(pid, 0) != (pid, 0):
                raise RuntimeError("a wrong status")
        return time.perf_counter() - start

    return repeat(run, size)


def measure_children(of: str, size: Size) -> float:
    """CPU time of the parent for each child, from the moment when all may end to the last status."""
    import resource

    import gevent

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = size.children + 100
    if soft != resource.RLIM_INFINITY and soft < wanted and (hard == resource.RLIM_INFINITY or hard >= wanted):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    module = importlib.import_module(MODULES[of])
    gate, opener = os.pipe()
    arrivals, arrival = os.pipe()
    pids = []
    for _ in range(size.children):
        pid = module.fork()
        if pid == 0:
            try:
                os.close(opener)
                os.write(arrival, b"x")
                os.read(gate, 1)  # until the parent closes its opener, or ends
            finally:
                os._exit(0)
        pids.append(pid)
    missing = size.children
    while missing:
        missing -= len(os.read(arrivals, missing))
    waiters = [] if of == OS else [gevent.spawn(module.waitpid, pid, 0) for pid in pids]
    gevent.sleep(0)  # now they wait
    start = time.process_time()
    os.close(opener)
    statuses = [os.waitpid(pid, 0) for pid in pids] if of == OS else [waiter.get() for waiter in waiters]
    seconds = time.process_time() - start
    if statuses != [(pid, 0) for pid in pids]:
        raise RuntimeError("a wrong status")
    return seconds / size.children


def measure_popen(of: str, size: Size) -> float:
    popen = importlib.import_module(PROGRAMS[of]).Popen

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            if popen(["true"]).wait():
                raise RuntimeError("a wrong status")
        return time.perf_counter() - start

    return repeat(run, size)


def reside(size_mb: int) -> bytearray:
    """So much memory, all of it touched, and private: pages that are shared anyway fork has not to copy the tables of."""
    memory = bytearray(size_mb * MB)
    step = 4096  # on systems with larger pages, each page several times
    memory[::step] = b"x" * len(memory[::step])
    return memory


def measure_large_popen(of: str, size: Size) -> float:
    memory = reside(size.memory_mb)
    result = measure_popen(of, size)
    del memory
    return result


class Row(NamedTuple):
    words: str
    measure: Callable[[str, Size], float]
    os_words: str  # what stands in the column "os"


ROWS = {
    "parked": Row("a byte there and back, two greenlets", measure_parked, "two threads"),
    "ready": Row("write and read a pipe that is ready", measure_ready, "os.write, os.read"),
    "lines": Row("a line of 61 bytes through a pipe", measure_lines, "os.fdopen, two threads"),
    "cached": Row("tp_read 4 KiB of a cached file", measure_cached, "os.read"),
    "fork": Row("fork, and wait for the child", measure_fork, "os.fork, os.waitpid"),
    "children": Row("CPU per child, 1,000 at once", measure_children, "os.waitpid, one after the other"),
    "popen": Row("Popen(['true']).wait()", measure_popen, "subprocess"),
    "large_popen": Row("the same, with 1 GB of memory", measure_large_popen, "subprocess"),
}


def work(request: dict[str, Any]) -> None:
    """The interpreter of one measurement: print the seconds."""
    import gevent

    gevent.sleep(0)  # now there is a hub, as in every program of greenlets
    seconds = ROWS[request["row"]].measure(request["of"], Size(*request["size"]))
    print(json.dumps(seconds), flush=True)
    os._exit(0)  # what an exit costs grows with what was made


# ---- who goes next -----------------------------------------------------------------------------------------------------------


def in_turns(names: Sequence[str], number: int) -> list[str]:
    """The *names* in their order in round *number*: each round begins with another one."""
    first = number % len(names) if names else 0
    return [*names[first:], *names[:first]]


def ratio(above: Iterable[float] | None, below: Iterable[float] | None) -> float | None:
    """The median of the ratios within each round, which stand at the same index; None if there are none."""
    pairs = list(zip(above or (), below or (), strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def describe_end(returncode: int, err: str) -> str:
    """The last line that a process left, or how it ended."""
    lines = err.strip().splitlines()
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return lines[-1] if lines else f"ended with {returncode}"


def measure(row: str, of: str, size: Size) -> float | str:
    """Seconds; or what went wrong."""
    if row == "large_popen" and not has_memory(size.memory_mb * 3 // 2):
        return f"needs {size.memory_mb * 3 // 2} MB of free memory"
    request = json.dumps({"row": row, "of": of, "size": size, "path": sys.path})
    process = subprocess.Popen(
        [sys.executable, "-I", "-W", "ignore", __file__, request],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    with process:
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            return f"hangs: nothing in {PATIENCE_S:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # what it has left behind, too
            except (ProcessLookupError, PermissionError):
                pass
    if process.returncode:
        return describe_end(process.returncode, err)
    return float(json.loads(out))


def has_memory(size_mb: int) -> bool:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            [free_kb] = [int(line.split()[1]) for line in file if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        return True
    return free_kb >= size_mb * 1024


class Result(NamedTuple):
    """Of one row: {implementation: seconds of each round}, {implementation: what went wrong, after which it is left out}."""

    samples: dict[str, list[float]]
    failed: dict[str, str]


def run_row(row: str, size: Size, tell: Callable[[str], object]) -> Result:
    result = Result({of: [] for of in IMPLEMENTATIONS}, {})
    for number in range(size.rounds):
        for of in in_turns([of for of in IMPLEMENTATIONS if of not in result.failed], number):
            which = f"round {number + 1} of {size.rounds}"
            tell(f"{row}, {which}: {of}")
            seconds = measure(row, of, size)
            if isinstance(seconds, str):
                result.failed[of] = f"{seconds}, in {which}"
            else:
                result.samples[of].append(seconds)
    return result


# ---- what is printed ---------------------------------------------------------------------------------------------------------


def amount(seconds: float) -> str:
    """In three digits."""
    rounded = float(f"{seconds:.3g}")
    factor, unit = next((pair for pair in ((1, "s"), (1e3, "ms")) if rounded * pair[0] >= 1), (1e6, "µs"))
    return f"{rounded * factor:#.3g}".rstrip(".") + f" {unit}"


def median_of(summary: dict[str, Any], of: str) -> float | None:
    samples = summary["samples"].get(of)
    return statistics.median(samples) if samples else None


def cell(summary: dict[str, Any], of: str) -> str:
    median = median_of(summary, of)
    if median is not None:
        return amount(median)
    return str(summary["failed"].get(of, "-")).partition(":")[0]


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ×" if value >= 10 else f"{value:#.2g} ×"


HEAD = f"{'':38}{'coopos':>10}{'gevent':>10}{'os':>10}  {'gevent/coopos':>14}"


def table_line(summary: dict[str, Any]) -> str:
    cells = [cell(summary, of) for of in IMPLEMENTATIONS]
    said = [f"{'' if len(words) > 9 else words:>10}" for words in cells]
    against = ratio(summary["samples"].get(GEVENT), summary["samples"].get(OURS))
    return f"{summary['words']:38}{''.join(said)}  {times(against):>14}"


def failures(summary: dict[str, Any]) -> Iterator[str]:
    for of, reason in summary["failed"].items():
        yield f"    {of}: {reason}"


def bars(summary: dict[str, Any], width: int) -> Iterator[str]:
    """For a terminal: the implementations of one row, the longest over the whole width."""
    medians = {of: median for of in IMPLEMENTATIONS if (median := median_of(summary, of)) is not None}
    longest = max(medians.values(), default=1.0)
    yield summary["words"]
    for of in IMPLEMENTATIONS:
        bar = "█" * max(1, round(medians[of] / longest * width)) + " " if of in medians else ""
        yield f"  {of:7}{bar}{cell(summary, of)}"


def comparison(earlier: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Each row of both reports. What the machine has changed it has changed for os, too."""
    yield f"coopos {earlier['coopos']} then, {now['coopos']} now; the last column takes out what os has changed by"
    yield f"{'':38}{'then':>10}{'now':>10}{'now/then':>11}{'os':>11}{'without it':>12}"
    then_rows = {summary["name"]: summary for summary in earlier["rows"]}
    for summary in now["rows"]:
        then = then_rows.get(summary["name"])
        if then is None:
            continue
        grown = {}
        for of in (OURS, OS):
            before, after = median_of(then, of), median_of(summary, of)
            grown[of] = after / before if before and after else None
        ours, others = grown[OURS], grown[OS]
        without = ours / others if ours and others else None
        cells = f"{cell(then, OURS):>10}{cell(summary, OURS):>10}{times(ours):>11}{times(others):>11}{times(without):>12}"
        yield f"{summary['words']:38}{cells}"


COLORS = {OURS: ("#0b7a5c", "#3ecf9f"), GEVENT: ("#b4532a", "#f0936b"), OS: ("#6b7280", "#9ca3af")}


def svg(report: dict[str, Any]) -> str:
    """The bars as a picture. It follows the reader's choice of light or dark."""
    row_height, top, left, width = 84, 80, 24, 760
    rows = report["rows"]
    height = top + row_height * len(rows) + 20
    light = "".join(f".{of}{{fill:{COLORS[of][0]}}}" for of in IMPLEMENTATIONS)
    dark = "".join(f".{of}{{fill:{COLORS[of][1]}}}" for of in IMPLEMENTATIONS)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f"<style>.page{{fill:#fff}}text{{fill:#1f2328}}.small{{font-size:11px;fill:#59636e}}{light}",
        "@media (prefers-color-scheme: dark){.page{fill:#0d1117}text{fill:#e6edf3}.small{fill:#9198a1}" + dark + "}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
        f'<text x="{left}" y="28" font-size="16" font-weight="600">What it costs: shorter is better</text>',
        f'<text class="small" x="{left}" y="47">{_escaped(_versions(report))}</text>',
        f'<text class="small" x="{left}" y="62">{_escaped(_machine(report))}</text>',
    ]
    for number, summary in enumerate(rows):
        y = top + number * row_height
        medians = [median_of(summary, of) or 0.0 for of in IMPLEMENTATIONS]
        longest = max(medians) or 1.0
        against = ratio(summary["samples"].get(GEVENT), summary["samples"].get(OURS))
        said = summary["words"] + (f": {times(against).replace(' ×', '')} times gevent's speed" if against else "")
        lines.append(f'<text x="{left}" y="{y + 14}" font-weight="600">{_escaped(said)}</text>')
        for place, (of, median) in enumerate(zip(IMPLEMENTATIONS, medians, strict=True)):
            at = y + 22 + place * 17
            length = max(1.0, median / longest * 540) if median else 0.0
            lines.append(f'<text class="small" x="{left}" y="{at + 11}">{of}</text>')
            lines.append(f'<rect class="{of}" x="{left + 52}" y="{at}" width="{length:.1f}" height="13" rx="2"/>')
            lines.append(f'<text class="small" x="{left + 60 + length:.1f}" y="{at + 11}">{_escaped(cell(summary, of))}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _versions(report: dict[str, Any]) -> str:
    return f"coopos {report['coopos']}, gevent {report['gevent']} on {report['loop']}, Python {report['python']}"


def _machine(report: dict[str, Any]) -> str:
    return f"{report['platform']}, {report['cpus']} CPUs"


# ---- the command -------------------------------------------------------------------------------------------------------------


def load(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        report: dict[str, Any] = json.load(file)
    if not isinstance(report, dict) or "rows" not in report or "coopos" not in report:
        raise ValueError("it is no report of python -m coopos bench --json")
    return report


def main(arguments: list[str]) -> int:
    """Measure, print the table, and write what was asked for; 1 if a measurement of coopos has failed, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m coopos bench",
        description="Compare coopos, gevent and plain os on this machine, in about a minute. Leave the machine alone meanwhile. "
        "Each number is the median of three rounds.",
    )
    parser.add_argument("--json", metavar="FILE", help="write every sample there")
    parser.add_argument("--svg", metavar="FILE", help="draw a picture there")
    parser.add_argument("--compare", metavar="FILE", help="compare with an earlier --json")
    parser.add_argument("--quick", action="store_true", help="one round of nearly nothing: it shows that all works")
    options = parser.parse_args(arguments)
    earlier = None
    if options.compare:
        try:
            earlier = load(options.compare)
        except (OSError, ValueError) as ex:
            parser.error(f"--compare {options.compare}: {ex}")
    from coopos import _doctor

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no × gets a ?
    size = QUICK if options.quick else Size()
    report: dict[str, Any] = {**_doctor.facts(), "cpus": os.cpu_count(), "size": size._asdict(), "rows": []}
    del report["patched"]
    print(f"{_versions(report)}\n{_machine(report)}\n\n{HEAD}", flush=True)
    is_terminal = sys.stderr.isatty()
    for name, row in ROWS.items():
        result = run_row(name, size, lambda words: is_terminal and print(f"{words:60}", end="\r", file=sys.stderr, flush=True))
        if is_terminal:
            print(f"{'':60}", end="\r", file=sys.stderr, flush=True)
        summary = {"name": name, "words": row.words, "os": row.os_words, **result._asdict()}
        report["rows"].append(summary)
        print("\n".join([table_line(summary), *failures(summary)]), flush=True)
    if sys.stdout.isatty() and "█".encode(sys.stdout.encoding, "ignore"):
        for summary in report["rows"]:
            print("\n" + "\n".join(bars(summary, 50)))
    if earlier is not None:
        print("\n" + "\n".join(comparison(earlier, report)))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    if options.svg:
        with open(options.svg, "w", encoding="utf-8") as file:
            file.write(svg(report))
    return 1 if any(OURS in summary["failed"] for summary in report["rows"]) else 0


if __name__ == "__main__":
    _request = json.loads(sys.argv[1])
    sys.path[:] = _request["path"]
    work(_request)
