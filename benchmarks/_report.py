"""Turn samples into medians, ratios, a plain table and JSON.

A ratio is the median of the ratios within each round, not the ratio of two medians:
what slowed one round down slowed both. Times inside are seconds; only the table
prints microseconds. Where a benchmark is about bytes, they stand in place of times.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks._model import OS, OURS, Benchmark, Growth
from benchmarks._run import CaseResult
from coopos._bench import ratio

LEGEND = "times in us per operation; gevent/it: times faster than gevent's row; it/os: times the cost of os"


def summarize(benchmark: Benchmark, results: list[CaseResult]) -> dict[str, Any]:
    """Everything the table prints and the JSON holds about one benchmark."""
    summary: dict[str, Any] = {
        "name": benchmark.name,
        "summary": benchmark.summary,
        "note": benchmark.note() if benchmark.note else None,
        "unit": benchmark.unit,
        "cases": [
            {
                "case": result.case,
                "label": benchmark.case_label.format(result.case),
                "missing": result.missing,
                "failed": result.failed,
                "metrics": [summarize_metric(benchmark, result, metric) for metric in benchmark.metrics],
            }
            for result in results
        ],
    }
    if benchmark.growth:
        summary["growth"] = summarize_growth(benchmark.growth, results)
    return summary


def summarize_metric(benchmark: Benchmark, result: CaseResult, metric: str) -> dict[str, Any]:
    columns = {name: [sample[metric] for sample in samples if metric in sample] for name, samples in result.samples.items()}
    columns = {name: values for name, values in columns.items() if values}
    rows = {}
    unit = benchmark.unit
    for name, values in columns.items():
        lower, median, upper = quartiles(values)
        rows[name] = {
            f"median_{unit}": median,
            f"lower_quartile_{unit}": lower,
            f"upper_quartile_{unit}": upper,
            "times_faster_than_gevent": ratio(columns.get(benchmark.gevent), values),
            "times_cost_of_os": ratio(values, columns.get(OS)),
            f"samples_{unit}": values,
        }
    targets = []
    for target in benchmark.targets:
        if target.applies_to(metric, result.case):
            cost = ratio(columns.get(target.of), columns.get(target.against))
            targets.append(
                {
                    "of": target.of,
                    "against": target.against,
                    "target": str(target),
                    "met": None if cost is None else target.is_met(cost),
                }
            )
    return {
        "metric": metric,
        "operation": benchmark.metrics[metric],
        "implementations": rows,
        "targets": targets,
    }


def summarize_growth(growth: Growth, results: list[CaseResult]) -> dict[str, Any]:
    by_case = {result.case: result for result in results}
    summary: dict[str, Any] = {
        "metric": growth.metric,
        "first": growth.first,
        "last": growth.last,
        "target": f"flat, <= {growth.at_most:g}",
        "implementations": {},
    }
    if growth.first not in by_case or growth.last not in by_case:
        return summary
    first, last = by_case[growth.first].samples, by_case[growth.last].samples
    for name in first:
        before, after = (
            [sample[growth.metric] for sample in samples.get(name, []) if growth.metric in sample] for samples in (first, last)
        )
        if before and after:
            summary["implementations"][name] = statistics.median(after) / statistics.median(before)
    if OURS in summary["implementations"]:
        summary["met"] = summary["implementations"][OURS] <= growth.at_most
    return summary


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def table(summary: dict[str, Any]) -> Iterator[str]:
    """The lines of the plain table of one benchmark."""
    yield f"{summary['name']}: {summary['summary']}"
    if summary["note"]:
        yield f"  ({summary['note']})"
    for case in summary["cases"]:
        for metric in case["metrics"]:
            yield ""
            yield from metric_table(case["label"], metric, summary["unit"])
        for word in ("missing", "failed"):
            for name, reason in case[word].items():
                yield f"    {word}: {name}: {reason}"
    if "growth" in summary:
        yield ""
        yield from growth_lines(summary["growth"])


def metric_table(label: str, metric: dict[str, Any], unit: str) -> Iterator[str]:
    yield f"  {label}: {metric['operation']}"
    yield (f"    {'':<20}{'median':>10}{'quartiles':>21}{'gevent/it':>12}{'it/os':>9}  target")
    for name, row in metric["implementations"].items():
        lower, median, upper = (amount(row[f"{word}_{unit}"], unit) for word in ("lower_quartile", "median", "upper_quartile"))
        spread = f"{lower} - {upper}"
        line = (
            f"    {name:<20}{median:>10}{spread:>21}{times(row['times_faster_than_gevent']):>12}{times(row['times_cost_of_os']):>9}"
        )
        if targets := [target for target in metric["targets"] if target["of"] == name]:
            line += "  " + "; ".join(map(target_words, targets))
        yield line.rstrip()


def target_words(target: dict[str, Any]) -> str:
    verdict = {True: "met", False: "missed", None: "nothing to compare with"}
    return f"{target['target']}: {verdict[target['met']]}"


def growth_lines(growth: dict[str, Any]) -> Iterator[str]:
    head = f"  growth of {growth['metric']} from {growth['first']} to {growth['last']}"
    if not growth["implementations"]:
        yield f"{head}: not measured (target for {OURS}: {growth['target']})"
        return
    yield f"{head}:"
    for name, value in growth["implementations"].items():
        line = f"    {name:<20}{times(value):>10}"
        if name == OURS:
            verdict = "met" if growth["met"] else "missed"
            line += f"  {growth['target']}: {verdict}"
        yield line


def amount(value: float, unit: str) -> str:
    return us(value) if unit == "s" else f"{value:.0f}"


def us(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def times(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}x" if value < 10 else f"{value:.1f}x"
