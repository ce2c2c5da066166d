"""docs/why_not_gevent_os.rst: every program on that page, run with gevent and with coopos, prints what the page says.

A program that hangs says so itself. When this fails for a new gevent because a fault is mended there, the page has to change.
"""

import os
import pathlib
import re
import subprocess
import sys

import gevent
import pytest

from ..helpers.support import DEADLINE_S, kill_group

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "why_not_gevent_os.rst"
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
#: What the page says of gevent, from which version on; the others it says of all versions.
SINCE = {"late_close.py": (25, 8, 1), "closed_under_reader.py": (25, 8, 1)}
#: Arguments of the page that are too much for every machine, and what stands for them here.
LESS = {"2000": "10"}

RUN = re.compile(r"^    \$ python docs/faults/(\w+\.py) (gevent|coopos)(.*)\n((?:    [^$\s].*\n)+)", re.MULTILINE)
RUNS = [(name, of, arguments.split(), re.sub("(?m)^    ", "", out)) for name, of, arguments, out in RUN.findall(TEXT)]

pytestmark = pytest.mark.skipif(not TEXT, reason="the documentation is not beside the tests")


def without_times(text):
    return re.sub(r"\d+\.\d ms", "… ms", text)


def version():
    return tuple(map(int, re.findall(r"\d+", gevent.__version__)[:3]))


def test_every_program_is_on_the_page_with_both_outcomes():
    programs = sorted(path.name for path in (ROOT / "docs" / "faults").iterdir() if path.suffix == ".py")
    assert [name for name, _, _, _ in RUNS] == [name for name in re.findall(r"literalinclude:: faults/(.+)", TEXT) for _ in "12"]
    assert sorted((name, of) for name, of, _, _ in RUNS) == [(name, of) for name in programs for of in ("coopos", "gevent")]
    assert TEXT.count("$ python ") == len(RUNS)


def test_outcomes_differ():
    """A fault that both have is none of gevent's."""
    outcomes = {(name, library): without_times(out) for name, library, _, out in RUNS}
    assert [name for name, _ in outcomes if outcomes[name, "gevent"] == outcomes[name, "coopos"]] == []


@pytest.mark.parametrize(("name", "library", "arguments", "expected"), RUNS, ids=[f"{name} {of}" for name, of, _, _ in RUNS])
def test_outcome_is_that_of_the_page(name, library, arguments, expected):
    if library == "gevent" and version() < SINCE.get(name, ()):
        pytest.skip("this gevent is older than the fault")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    if library == "gevent":
        environment.pop("GEVENT_LOOP", None)  # the page is about its default
        environment.pop("COOPOS_PATCH", None)
    else:
        environment["PATIENCE_S"] = str(DEADLINE_S)
    process = subprocess.Popen(
        [sys.executable, f"docs/faults/{name}", library, *(LESS.get(argument, argument) for argument in arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=DEADLINE_S * 2)
    finally:
        kill_group(process.pid)
        process.communicate()
    assert without_times(out) == without_times(expected), err
    if library == "coopos":
        assert (process.returncode, err) == (0, "")
    else:
        assert process.returncode in (0, 1), err
