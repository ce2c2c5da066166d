"""README.md and docs/: every example that they show is run, each page in an interpreter of its own."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from ..helpers.support import DEADLINE_S
from .test_facade import PUBLIC

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
pytestmark = [
    pytest.mark.skipif(not DOCS.is_dir(), reason="the documentation is not beside the tests"),
    pytest.mark.skipif(sys.platform != "linux", reason="the examples use what Linux has"),
]

PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.rst") if ">>> " in path.read_text())
#: Examples can't show what they do: they need privileges, wait for all disks, or change the interpreter that runs the page.
NOT_RUN = {"initgroups", "sync"}


def run(*arguments, cwd=ROOT):
    environment = {name: value for name, value in os.environ.items() if name not in ("COOPOS_PATCH", "COOPOS_KEEP_GREENLETS")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=DEADLINE_S
    )


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_a_page(page):
    done = run("-W", "error", "-m", "doctest", DOCS / page)
    assert done.returncode == 0, done.stdout


def examples():
    """{name: the example below its directive}, of all functions and classes in the reference."""
    found = {}
    for page in (DOCS / "reference").glob("*.rst"):
        entries = re.findall(r"^\.\. auto(?:function|class):: coopos\.(\w+)\n((?:\n|[ ]{3}.*\n)*)", page.read_text(), re.MULTILINE)
        found.update(entries)
    return found


def test_every_function_has_an_example():
    code = {name: "".join(re.findall(r"^ {3,}(?:>>>|\.\.\.) (.*)", text, re.MULTILINE)) for name, text in examples().items()}
    assert not [name for name in PUBLIC if not re.search(rf"coopos\.{name}\b", code[name])]


def test_examples_that_are_not_run():
    """doctest: +SKIP is for those that no test can run."""
    skipped = {name for name, text in examples().items() if "+SKIP" in text}
    assert skipped == NOT_RUN
    assert not [page for page in PAGES if "+SKIP" in DOCS.joinpath(page).read_text() and not page.startswith("reference/")]


def test_program_of_the_readme(tmp_path):
    [program] = re.findall(r"^```python\n(.*?)^```", ROOT.joinpath("README.md").read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path / "program.py"
    path.write_text(program)
    done = run("-W", "error", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\nTrue\n[1, 2, 3]\n", "")


def test_links_of_the_readme():
    text = ROOT.joinpath("README.md").read_text()
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("https://")]
    assert len(targets) > 5
    assert not [target for target in targets if not ROOT.joinpath(target).exists()]


def test_programs_that_pages_show():
    """Each is a file that a test runs: one of examples/, or of docs/faults/, all of which test_why_not.py runs."""
    shown = set()
    for page in DOCS.rglob("*.rst"):
        for name in re.findall(r"^\.\. literalinclude:: (\S+)", page.read_text(), re.MULTILINE):
            path = page.parent.joinpath(name).resolve()
            assert path.exists(), (page, name)
            shown.add(path)
    tests = "".join(ROOT.joinpath("tests", name).read_text() for name in ("source/test_examples.py", "programs/test_servers.py"))
    programs = set(ROOT.joinpath("examples").rglob("*.py"))
    assert {path for path in shown if path.suffix == ".py"} <= programs | set(DOCS.joinpath("faults").glob("*.py"))
    assert not [path.name for path in programs if path.name not in tests]
