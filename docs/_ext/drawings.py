"""Drawings from a few lines of text: ``lanes`` draws who does what, one after the other, and ``bars`` compares figures.

    .. lanes:: What the drawing shows
       :of: your greenlet | coopos | the kernel

       1 > 2: nb_read(fd, 100)
       2: into the table of those who wait
       2 > 3: epoll_ctl

``1 > 2: words`` is an arrow from the first lane to the second, ``2: words`` a note in the second.

    .. bars:: What is compared
       :unit: µs

       with 10 children: coopos 24.7, gevent 41.4
       with 100 children: coopos 13.4, gevent 30.2

Both are SVG, in the colours of the page, light or dark. Builders other than HTML show the text.
"""

from __future__ import annotations

import re
from html import escape

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

LANE, STEP, TOP = 200, 36, 44  # pixels
LONGEST_BAR = 280


def draw_lanes(title: str, lanes: list[str], steps: list[tuple[int, int, str]]) -> str:
    width, height = LANE * len(lanes), TOP + STEP * len(steps) + 16

    def middle(lane: int) -> int:
        return LANE * (lane - 1) + LANE // 2

    out = [f'<div class="lanes"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for number, lane in enumerate(lanes, 1):
        x = middle(number)
        out.append(f'<line class="life" x1="{x}" y1="34" x2="{x}" y2="{height}"/>')
        out.append(f'<rect class="head" x="{x - 86}" y="4" width="172" height="30" rx="6"/>')
        out.append(f'<text class="name" x="{x}" y="24">{escape(lane)}</text>')
    for number, (start, end, words) in enumerate(steps):
        y = TOP + STEP * number + 24
        if start == end:
            out.append(f'<rect class="note" x="{middle(start) - 94}" y="{y - 17}" width="188" height="24" rx="4"/>')
            out.append(f'<text x="{middle(start)}" y="{y}">{escape(words)}</text>')
            continue
        x1, x2 = middle(start), middle(end)
        back = 1 if x1 > x2 else -1
        out.append(f'<line class="arrow" x1="{x1}" y1="{y}" x2="{x2}" y2="{y}"/>')
        out.append(f'<path class="tip" d="M{x2} {y} l{9 * back} -4 v8 z"/>')
        # Beside its start, so that a long arrow's words don't lie on another lane's line.
        x = (x1 + x2) // 2 if abs(start - end) == 1 else x1 - back * LANE // 2
        out.append(f'<text x="{x}" y="{y - 6}">{escape(words)}</text>')
    return "\n".join([*out, "</svg></div>"])


def draw_bars(title: str, unit: str, groups: list[tuple[str, list[tuple[str, str]]]]) -> str:
    """One scale for all bars."""
    longest = max(float(value) for _, bars in groups for _, value in bars)
    out, y = [], 6
    for label, bars in groups:
        out.append(f'<text class="name" x="0" y="{y + 13}">{escape(label)}</text>')
        y += 20
        for name, value in bars:
            width = max(2, LONGEST_BAR * float(value) / longest)
            kind = name if name in ("coopos", "gevent") else "other"
            out.append(f'<text class="of" x="116" y="{y + 12}">{escape(name)}</text>')
            out.append(f'<rect class="bar {kind}" x="124" y="{y}" width="{width:.1f}" height="15"/>')
            out.append(f'<text x="{130 + width:.1f}" y="{y + 12}">{value} {escape(unit)}</text>')
            y += 19
        y += 8
    head = f'<div class="bars"><svg viewBox="0 0 {LONGEST_BAR + 210} {y}" role="img" aria-label="{escape(title)}">'
    return "\n".join([head, *out, "</svg></div>"])


class Drawing(SphinxDirective):
    required_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def lines(self) -> list[str]:
        return list(filter(None, map(str.strip, self.content)))

    def draw(self) -> str:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        picture = self.draw()
        words = nodes.paragraph("", self.arguments[0], classes=["drawing-title"])
        if self.env.app.builder.format != "html":
            return [words, nodes.literal_block("", "\n".join(self.lines()))]
        return [words, nodes.raw("", picture, format="html")]


class Lanes(Drawing):
    option_spec = {"of": directives.unchanged_required}  # noqa: RUF012

    def draw(self) -> str:
        lanes = [lane.strip() for lane in self.options["of"].split("|")]
        steps = []
        for line in self.lines():
            found = re.fullmatch(r"(\d)(?: > (\d))?: (.+)", line)
            if not found or not all(1 <= int(lane) <= len(lanes) for lane in found.group(1, 2) if lane):
                raise self.error(f"lanes: not a step: {line!r}")
            steps.append((int(found[1]), int(found[2] or found[1]), found[3]))
        return draw_lanes(self.arguments[0], lanes, steps)


class Bars(Drawing):
    option_spec = {"unit": directives.unchanged_required}  # noqa: RUF012

    def draw(self) -> str:
        groups = []
        for line in self.lines():
            label, _, rest = line.partition(": ")
            bars = re.findall(r"([^,]+) ([\d.]+)(?:, |$)", rest)
            if not bars:
                raise self.error(f"bars: no figures: {line!r}")
            groups.append((label, bars))
        return draw_bars(self.arguments[0], self.options["unit"], groups)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("lanes", Lanes)
    app.add_directive("bars", Bars)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
