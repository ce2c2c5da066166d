"""One fresh interpreter's worth of samples: ``python -m benchmarks._worker JSON``.

The request names a benchmark, a case and the implementations to take turns. The
answer is one line of JSON on stdout: the samples of each implementation, in turn
order, and by name those that are not to be had here (`missing`) or that raised
(`failed`, with the traceback on stderr).
"""

from __future__ import annotations

import json
import sys
import traceback
from contextlib import ExitStack
from typing import Any

from benchmarks._model import Benchmark, Sample, Sampler, Unavailable, load_all


def main() -> None:
    request = json.loads(sys.argv[1])
    benchmark = load_all()[request["benchmark"]]
    answer = take_samples(benchmark, **request["arguments"])
    print(json.dumps(answer), flush=True)


def take_samples(
    benchmark: Benchmark,
    case: int,
    implementations: list[str],
    turns: int,
    quick: bool,
) -> dict[str, Any]:
    samplers: dict[str, Sampler] = {}
    samples: dict[str, list[Sample]] = {}
    missing: dict[str, str] = {}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        for name in implementations:
            factory = benchmark.implementations[name]
            try:
                samplers[name] = stack.enter_context(factory(case, quick))
                if benchmark.is_shared:
                    samplers[name]()  # warm up; the others do it themselves
            except (ImportError, Unavailable) as exc:
                missing[name] = str(exc)
            except Exception as exc:
                failed[name] = describe_failure(exc)
            else:
                samples[name] = []
        for turn in range(turns):
            names = list(samples)
            first = turn % len(names) if names else 0
            for name in names[first:] + names[:first]:
                try:
                    samples[name].append(samplers[name]())
                except Exception as exc:
                    failed[name] = describe_failure(exc)
                    del samples[name]
    return {"samples": samples, "missing": missing, "failed": failed}


def describe_failure(exc: Exception) -> str:
    traceback.print_exc()
    return f"{type(exc).__name__}: {exc}"


if __name__ == "__main__":
    main()
