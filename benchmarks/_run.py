"""Run benchmarks: who goes next, in which interpreter, and what became of it.

Implementations take turns so that drift of the machine meets all alike. A row that
is missing or crashes is dropped from later rounds and named in the result; it never
stops the others. Samples of one round stand at the same index in every row: the
ratios rely on it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._model import Benchmark, Sample
from coopos._bench import describe_end, in_turns

ROOT = Path(__file__).resolve().parent.parent
WORKER_TIMEOUT_S = 300
QUICK_REPEAT = 2


class WorkerFailed(Exception):
    """A worker ended badly; the message is the last line it left, or how it ended."""


@dataclass
class CaseResult:
    """The samples of one case of one benchmark."""

    case: int
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run_benchmark(
    benchmark: Benchmark,
    repeat: int | None,
    quick: bool,
    progress: Callable[[str], None],
) -> list[CaseResult]:
    cases = benchmark.cases
    if quick and benchmark.quick_cases is not None:
        cases = benchmark.quick_cases
    if repeat is None:
        repeat = min(QUICK_REPEAT, benchmark.repeat) if quick else benchmark.repeat
    results = []
    for case in cases:
        label = benchmark.case_label.format(case)
        result = CaseResult(case, {name: [] for name in benchmark.implementations})
        for number in range(repeat):
            progress(f"{benchmark.name}, {label}: round {number + 1} of {repeat}")
            run_round(benchmark, result, number, quick)
        results.append(result)
    return results


def run_round(benchmark: Benchmark, result: CaseResult, number: int, quick: bool) -> None:
    """Give each implementation that is left its turn, starting with another each."""
    names = in_turns(list(result.samples), number)
    if not names:
        return
    for group in [names] if benchmark.is_shared else [[name] for name in names]:
        try:
            answer = ask_worker(
                benchmark.name,
                case=result.case,
                implementations=group,
                turns=benchmark.turns,
                quick=quick,
            )
        except WorkerFailed as exc:
            answer = {"failed": dict.fromkeys(group, str(exc))}
        result.missing.update(answer.get("missing", {}))
        result.failed.update(answer.get("failed", {}))
        for name in group:
            if name in result.missing or name in result.failed:
                del result.samples[name]
        for name, samples in answer.get("samples", {}).items():
            result.samples[name].extend(samples)


def ask_worker(benchmark: str, **arguments: Any) -> dict[str, Any]:
    request = json.dumps({"benchmark": benchmark, "arguments": arguments})
    command = [sys.executable, "-m", "benchmarks._worker", request]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WORKER_TIMEOUT_S,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
    except subprocess.TimeoutExpired:
        raise WorkerFailed(f"no answer in {WORKER_TIMEOUT_S} s") from None
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        raise WorkerFailed(describe_end(done.returncode, done.stderr))
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
