"""Draw a summary as SVG, by hand: lines over the cases if there are several, else bars. Readable in light and in dark, and on a
phone: a screen of 390 pixels shows a picture at four fifths of its size.

What is drawn is the least of all samples: whatever else a machine does only adds to them. The table has the medians.

Both axes are logarithmic: a constant cost is a level line, and twice the cost has the same distance everywhere. Cases that are
numbers from zero on stand at even distances.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Any

from benchmarks._model import GEVENT, OS, OURS

WIDTH, MARGIN, LINE = 480, 16, 20
LEFT, PLOT = 72, 240  # of the lines: where they begin, and how high they are
TITLE, WORDS, SIZE = 16, 13, 14  # sizes of the text
OTHERS = (("#6d4fc4", "#b39ddb"), ("#a8791a", "#e3b341"), ("#1f6feb", "#79b8ff"), ("#9a3b7c", "#e69ac8"), ("#4b6b2a", "#a5c777"))
KNOWN = {OURS: ("#0b7a5c", "#3ecf9f"), GEVENT: ("#b4532a", "#f0936b"), OS: ("#6b7280", "#9ca3af")}

Point = tuple[int, float]  # a case, and its figure


def draw_all(summary: dict[str, Any], directory: Path) -> list[Path]:
    """A picture of each metric. Returns the paths."""
    paths = []
    for number, metric in enumerate(summary["cases"][0]["metrics"]):
        lines: dict[str, list[Point]] = {}
        numbers = set()
        for case in summary["cases"]:
            for name, row in case["metrics"][number]["implementations"].items():
                samples = row[f"samples_{summary['unit']}"]
                numbers.add(len(samples))
                lines.setdefault(name, []).append((case["case"], min(samples)))
        if lines:
            title = f"{summary['name']}: {metric['operation']}"
            label = summary["cases"][0]["label"].replace(str(summary["cases"][0]["case"]), "", 1).strip()
            paths.append(directory / f"{summary['name']}-{metric['metric']}.svg")
            words = f"{summary['summary']}; the least of {' or '.join(map(str, sorted(numbers)))} samples"
            paths[-1].write_text(draw(title, words, label, lines, summary["unit"]), encoding="utf-8")
    return paths


def draw(title: str, words: str, label: str, lines: dict[str, list[Point]], unit: str) -> str:
    cases = sorted({case for points in lines.values() for case, _ in points})
    y = MARGIN
    head = []
    for line in wrap(title, 52):
        y += LINE
        head.append(f'<text x="{MARGIN}" y="{y - 4}" font-size="{TITLE}" font-weight="600">{escape(line)}</text>')
    for line in wrap(words, 66):
        y += LINE - 2
        head.append(f'<text class="small" x="{MARGIN}" y="{y - 4}" font-size="{WORDS}">{escape(line)}</text>')
    body, height = bars(lines, unit, y + 8) if len(cases) == 1 else plot(lines, cases, label, unit, y + 16)
    colors = color_names(lines).values()
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="{SIZE}">',
            "<style>.page{fill:#fff}text{fill:#1f2328}.small{fill:#59636e}.grid{stroke:#d1d9e0}polyline{fill:none;stroke-width:2}",
            *(f".{of}{{fill:{light}}}polyline.{of}{{fill:none;stroke:{light}}}" for of, (light, _) in colors),
            "@media (prefers-color-scheme: dark){.page{fill:#0d1117}text{fill:#e6edf3}.small{fill:#9198a1}.grid{stroke:#3d444d}",
            *(f".{of}{{fill:{dark}}}polyline.{of}{{fill:none;stroke:{dark}}}" for of, (_, dark) in colors),
            "}</style>",
            f'<rect class="page" width="{WIDTH}" height="{height}"/>',
            *head,
            *body,
            "</svg>",
            "",
        ]
    )


def color_names(lines: dict[str, list[Point]]) -> dict[str, tuple[str, tuple[str, str]]]:
    """{implementation: (its class, (its color in light, in dark))}: the same in every picture for those that are in most."""
    others = iter(OTHERS * (1 + len(lines) // len(OTHERS)))
    roots = [name.partition(".")[0] for name in lines]

    def colors_of(name: str) -> tuple[str, str]:
        root = name.partition(".")[0]
        if name in KNOWN:
            return KNOWN[name]
        if roots.count(root) == 1 and root in (OURS, "gevent"):  # coopos.subprocess, where it is the only one of coopos
            return KNOWN[OURS if root == OURS else GEVENT]
        return next(others)

    return {name: (f"c{number}", colors_of(name)) for number, name in enumerate(lines)}


def amount(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.0f} {unit}"
    scale, name = (1, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
    return f"{value * scale:.3g} {name}"


def bars(lines: dict[str, list[Point]], unit: str, top: int) -> tuple[list[str], int]:
    """The picture, and how high it is."""
    longest = max(points[0][1] for points in lines.values()) or 1.0
    out = []
    for number, (name, (of, _)) in enumerate(color_names(lines).items()):
        value = lines[name][0][1]
        y, length = top + number * 2 * LINE, max(1.0, value / longest * (WIDTH - 2 * MARGIN))
        out.append(f'<text x="{MARGIN}" y="{y + SIZE}">{escape(name)}, {escape(amount(value, unit))}</text>')
        out.append(f'<rect class="{of}" x="{MARGIN}" y="{y + LINE}" width="{length:.1f}" height="10" rx="2"/>')
    return out, top + len(lines) * 2 * LINE + 4


def plot(lines: dict[str, list[Point]], cases: list[int], label: str, unit: str, top: int) -> tuple[list[str], int]:
    values = [value for points in lines.values() for _, value in points if value > 0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    right, bottom = WIDTH - 2 * MARGIN, top + PLOT
    out = []

    def x_of(case: int) -> float:
        if cases[0] <= 0:
            return LEFT + cases.index(case) / (len(cases) - 1) * (right - LEFT)
        return LEFT + math.log(case / cases[0]) / math.log(cases[-1] / cases[0]) * (right - LEFT)

    def y_of(value: float) -> float:
        return bottom - (math.log10(max(value, 10.0**low)) - low) / max(high - low, 1) * PLOT

    for power in range(low, high + 1):
        y = y_of(10.0**power)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        words = escape(amount(10.0**power, unit))
        out.append(f'<text class="small" x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{words}</text>')
    for case in cases:
        out.append(f'<text class="small" x="{x_of(case):.1f}" y="{bottom + LINE}" text-anchor="middle">{case}</text>')
    out.append(f'<text x="{(LEFT + right) / 2}" y="{bottom + 2 * LINE}" text-anchor="middle">{escape(label)}</text>')
    y = bottom + 2 * LINE + 6
    # In the order in which the lines end on the right, from the top down.
    for name, (of, _) in sorted(color_names(lines).items(), key=lambda item: -lines[item[0]][-1][1]):
        points = " ".join(f"{x_of(case):.1f},{y_of(value):.1f}" for case, value in lines[name])
        out.append(f'<polyline class="{of}" points="{points}"/>')
        for case, value in lines[name]:
            out.append(f'<circle class="{of}" cx="{x_of(case):.1f}" cy="{y_of(value):.1f}" r="4"/>')
        y += LINE
        ends = ", ".join(f"{amount(value, unit)} at {case}" for case, value in (lines[name][0], lines[name][-1]))
        out.append(f'<rect class="{of}" x="{MARGIN}" y="{y - 11}" width="12" height="12" rx="2"/>')
        out.append(f'<text x="{MARGIN + 20}" y="{y}">{escape(name)}: {escape(ends)}</text>')
    return out, y + MARGIN
