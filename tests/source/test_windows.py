"""The package without its compiled core, as Windows has it: tests/windows, in an interpreter that hides the core."""

import pathlib
import re
import subprocess
import sys

from ..helpers.support import DEADLINE_S

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_threadpool_only():
    """All of tests/windows passes; but for what only a wheel for Windows can show, none of it is skipped."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--confcutdir=tests/windows", "tests/windows"]
    done = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=DEADLINE_S * 3
    )
    assert done.returncode == 0 and re.search(r"\d+ passed, 2 skipped", done.stdout), done.stdout + done.stderr
