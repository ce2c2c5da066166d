"""Draw a summary as SVG, by hand: lines over the cases if there are several, else bars. Readable in light and in dark.

Both axes are logarithmic: a constant cost is a level line, and twice the cost has the same distance everywhere. Cases that are
numbers from zero on stand at even distances.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from benchmarks._model import GEVENT, OS, OURS

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 76, 200, 62, 52
OTHERS = (("#6d4fc4", "#b39ddb"), ("#a8791a", "#e3b341"), ("#1f6feb", "#79b8ff"), ("#9a3b7c", "#e69ac8"), ("#4b6b2a", "#a5c777"))
KNOWN = {OURS: ("#0b7a5c", "#3ecf9f"), GEVENT: ("#b4532a", "#f0936b"), OS: ("#6b7280", "#9ca3af")}

Point = tuple[int, float]  # a case, and the median


def draw_all(summary: dict[str, Any], directory: Path) -> list[Path]:
    """A picture of each metric. Returns the paths."""
    paths = []
    for number, metric in enumerate(summary["cases"][0]["metrics"]):
        lines: dict[str, list[Point]] = {}
        for case in summary["cases"]:
            for name, row in case["metrics"][number]["implementations"].items():
                lines.setdefault(name, []).append((case["case"], row[f"median_{summary['unit']}"]))
        if lines:
            title = f"{summary['name']}: {metric['operation']}"
            label = summary["cases"][0]["label"].replace(str(summary["cases"][0]["case"]), "", 1).strip()
            paths.append(directory / f"{summary['name']}-{metric['metric']}.svg")
            paths[-1].write_text(draw(title, summary["summary"], label, lines, summary["unit"]), encoding="utf-8")
    return paths


def draw(title: str, words: str, label: str, lines: dict[str, list[Point]], unit: str) -> str:
    cases = sorted({case for points in lines.values() for case, _ in points})
    body = bars(lines, unit) if len(cases) == 1 else plot(lines, cases, label, unit)
    colors = color_names(lines)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
            "<style>.page{fill:#fff}text{fill:#1f2328}.small{fill:#59636e}.grid{stroke:#d1d9e0}polyline{fill:none;stroke-width:2}",
            *(f".{of}{{fill:{light}}}polyline.{of}{{fill:none;stroke:{light}}}" for of, (light, _) in colors.values()),
            "@media (prefers-color-scheme: dark){.page{fill:#0d1117}text{fill:#e6edf3}.small{fill:#9198a1}.grid{stroke:#3d444d}",
            *(f".{of}{{fill:{dark}}}polyline.{of}{{fill:none;stroke:{dark}}}" for of, (_, dark) in colors.values()),
            "}</style>",
            f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
            f'<text x="20" y="26" font-size="15" font-weight="600">{escape(title)}</text>',
            f'<text class="small" x="20" y="45">{escape(words)}</text>',
            *body,
            "</svg>",
            "",
        ]
    )


def color_names(lines: dict[str, list[Point]]) -> dict[str, tuple[str, tuple[str, str]]]:
    """{implementation: (its class, (its color in light, in dark))}: the same in every picture for those that are in most."""
    others = iter(OTHERS * (1 + len(lines) // len(OTHERS)))
    return {name: (f"c{number}", KNOWN.get(name) or next(others)) for number, name in enumerate(lines)}


def amount(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.0f} {unit}"
    scale, name = (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
    return f"{value * scale:.3g} {name}"


def bars(lines: dict[str, list[Point]], unit: str) -> Iterator[str]:
    longest = max(points[0][1] for points in lines.values()) or 1.0
    step = min(34, (HEIGHT - TOP - 10) // len(lines))
    for number, (name, (of, _)) in enumerate(color_names(lines).items()):
        value = lines[name][0][1]
        y, length = TOP + number * step, max(1.0, value / longest * 400)
        yield f'<text x="20" y="{y + 14}">{escape(name)}</text>'
        yield f'<rect class="{of}" x="240" y="{y}" width="{length:.1f}" height="{step - 12}" rx="2"/>'
        yield f'<text class="small" x="{248 + length:.1f}" y="{y + 14}">{escape(amount(value, unit))}</text>'


def plot(lines: dict[str, list[Point]], cases: list[int], label: str, unit: str) -> Iterator[str]:
    values = [value for points in lines.values() for _, value in points if value > 0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x_of(case: int) -> float:
        if cases[0] <= 0:
            return LEFT + cases.index(case) / (len(cases) - 1) * (right - LEFT)
        return LEFT + math.log(case / cases[0]) / math.log(cases[-1] / cases[0]) * (right - LEFT)

    def y_of(value: float) -> float:
        return bottom - (math.log10(max(value, 10.0**low)) - low) / max(high - low, 1) * (bottom - TOP)

    for power in range(low, high + 1):
        y = y_of(10.0**power)
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="small" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(amount(10.0**power, unit))}</text>'
    for case in cases:
        yield f'<text class="small" x="{x_of(case):.1f}" y="{bottom + 18}" text-anchor="middle">{case}</text>'
    yield f'<text x="{(LEFT + right) / 2}" y="{bottom + 38}" text-anchor="middle">{escape(label)}</text>'
    heights: list[float] = []
    for name, (of, _) in sorted(color_names(lines).items(), key=lambda item: -lines[item[0]][-1][1]):
        points = " ".join(f"{x_of(case):.1f},{y_of(value):.1f}" for case, value in lines[name])
        yield f'<polyline class="{of}" points="{points}"/>'
        for case, value in lines[name]:
            yield f'<circle class="{of}" cx="{x_of(case):.1f}" cy="{y_of(value):.1f}" r="3.5"/>'
        heights.append(max(y_of(lines[name][-1][1]), heights[-1] + 15 if heights else 0.0))  # from the top down, none over another
        last = escape(f"{name}, {amount(lines[name][-1][1], unit)}")
        yield f'<text class="{of}" x="{right + 10}" y="{heights[-1] + 4:.1f}">{last}</text>'
