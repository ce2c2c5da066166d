"""Whether the version, CHANGELOG.md and, if one is named, a release's tag go together: `python tools/check_release.py [v1.2.3]`.

The version stands in coopos.__version__ and nowhere else. CHANGELOG.md has the form of Keep a Changelog; unless the version is one
of development, its newest released section is that version's. Exit status 1, and what is wrong on standard error, if not.
"""

import datetime
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def problems(version, changelog, tag):
    is_development = ".dev" in version
    if tag and is_development:
        yield f"{version} is a development version: it is not released"
    if tag and tag != f"v{version}":
        yield f"the tag {tag} is not that of version {version}, v{version}"
    title, *sections = re.split(r"^## ", changelog, flags=re.MULTILINE)
    if not title.startswith("# Changelog\n"):
        yield "the changelog has no title"
    released = []
    for number, section in enumerate(sections):
        heading, _, body = section.partition("\n")
        if number == 0 and heading == "[Unreleased]":
            is_empty_by_right = True
        elif match := re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading):
            is_empty_by_right = False
            released.append(match[1])
            try:
                datetime.date.fromisoformat(match[2])
            except ValueError:
                yield f"{match[2]} is no date"
        else:
            yield f"a heading is neither [Unreleased], the first, nor [version] - date: {heading}"
            continue
        for kind in re.findall(r"^### (.*)$", body, flags=re.MULTILINE):
            if kind.partition(",")[0] not in KINDS:
                yield f"{heading} has a part that Keep a Changelog doesn't know: {kind}"
        for kind, text in re.findall(r"^### (.*)\n((?:(?!### ).*\n?)*)", body, flags=re.MULTILINE):
            if not re.search(r"^- ", text, flags=re.MULTILINE):
                yield f"{heading} has nothing under {kind}"
        if not is_empty_by_right and "### " not in body:
            yield f"{heading} says nothing"
    if released != sorted(released, key=lambda name: [int(part) for part in name.split(".")], reverse=True):
        yield f"versions are not in order, the newest first: {', '.join(released)}"
    if not is_development and released[:1] != [version]:
        yield f"the newest released section is not that of version {version}"


def main(tag=None):
    source = (ROOT / "src" / "coopos" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]
    found = list(problems(version, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), tag))
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
