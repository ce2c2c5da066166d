"""The command line: ``python -m benchmarks``; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import benchmarks
from benchmarks import _drawing, _instructions, _report, _system
from benchmarks._model import load_all
from benchmarks._run import run_benchmark


def main(arguments: list[str]) -> int:
    registry = load_all()
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.list:
        for benchmark in registry.values():
            print(f"{benchmark.name:<17}{benchmark.summary}")
        return 0
    if options.instructions:
        return _instructions.main(options.names, options.record, options.check)
    names = list(dict.fromkeys(options.names)) or list(registry)
    if unknown := [name for name in names if name not in registry]:
        parser.error(f"no such benchmark: {', '.join(unknown)} (try --list)")

    try:
        system = _system.describe()
    except ImportError as exc:  # libuv needs cffi
        parser.error(f"gevent's loop can't be had: {exc}")
    report: dict[str, Any] = {
        "command": ["python", "-m", "benchmarks", *arguments],
        "system": system,
        "benchmarks": [],
    }
    if options.svg:
        Path(options.svg).mkdir(parents=True, exist_ok=True)
    print_head(system)
    for name in names:
        benchmark = registry[name]
        results = run_benchmark(benchmark, options.repeat, options.quick, progress)
        summary = _report.summarize(benchmark, results)
        report["benchmarks"].append(summary)
        print("\n".join(_report.table(summary)), end="\n\n", flush=True)
        if options.json:  # after each, so that an interrupted run leaves its part
            write_json(options.json, report)
        if options.svg:
            _drawing.draw_all(summary, Path(options.svg))
    has_failed = any(case["failed"] for summary in report["benchmarks"] for case in summary["cases"])
    return 1 if has_failed else 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=benchmarks.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--json", metavar="FILE", help="write every sample there")
    parser.add_argument("--svg", metavar="DIR", help="draw a picture of each metric there")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--repeat", type=positive, metavar="N", help="rounds per case")
    parser.add_argument("--list", action="store_true", help="list what there is")
    parser.add_argument("--instructions", action="store_true", help="count instructions of the hot paths, by valgrind")
    parser.add_argument("--check", action="store_true", help="with --instructions: fail if one has grown by more than 5 %%")
    parser.add_argument("--record", metavar="WHY", help="with --instructions: keep the counts, and why they have grown")
    return parser


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def print_head(system: dict[str, Any]) -> None:
    for name, value in system.items():
        print(f"{name:<16}{'missing' if value is None else value}")
    print(f"\n{_report.LEGEND}\n", flush=True)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_json(path: str, report: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
