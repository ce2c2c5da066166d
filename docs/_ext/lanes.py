"""The directive ``lanes``: a drawing of who does what, one after the other, from a few lines of text.

    .. lanes:: What the drawing shows
       :of: your greenlet | coopos | the kernel

       1 > 2: nb_read(fd, 100)
       2: into the table of those who wait
       2 > 3: epoll_ctl

``1 > 2: words`` is an arrow from the first lane to the second, ``2: words`` a note in the second. It is drawn as SVG, in the
colours of the page, light or dark. Builders other than HTML show the text.
"""

from __future__ import annotations

import re
from html import escape

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

LANE, STEP, TOP = 200, 36, 44  # pixels


def draw(title: str, lanes: list[str], steps: list[tuple[int, int, str]]) -> str:
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


class Lanes(SphinxDirective):
    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"of": directives.unchanged_required}  # noqa: RUF012
    has_content = True

    def run(self) -> list[nodes.Node]:
        lanes = [lane.strip() for lane in self.options["of"].split("|")]
        steps = []
        for line in filter(None, map(str.strip, self.content)):
            found = re.fullmatch(r"(\d)(?: > (\d))?: (.+)", line)
            if not found or not all(1 <= int(lane) <= len(lanes) for lane in found.group(1, 2) if lane):
                raise self.error(f"lanes: not a step: {line!r}")
            steps.append((int(found[1]), int(found[2] or found[1]), found[3]))
        if self.env.app.builder.format != "html":
            return [nodes.literal_block("", "\n".join([" | ".join(lanes), *self.content]))]
        picture = nodes.raw("", draw(self.arguments[0], lanes, steps), format="html")
        words = nodes.paragraph("", self.arguments[0], classes=["lanes-title"])
        return [picture, words]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("lanes", Lanes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
