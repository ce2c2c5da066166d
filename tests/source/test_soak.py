"""tools/soak.py, for some seconds: all parts together, and threads alone. It first proves that it sees what is planted."""

import pathlib
import subprocess
import sys

import pytest

from ..helpers.support import TEST_DEADLINE_S

TOOL = pathlib.Path(__file__).resolve().parents[2] / "tools" / "soak.py"
pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="the tools are not beside the tests")


@pytest.mark.parametrize(
    ("arguments", "counted"),
    [
        (["--minutes", "0.05"], [" requests", " programs", " terminals", " closes under readers", " signals"]),
        (["--thread-rounds", "20"], [" 20 thread rounds"]),
    ],
    ids=["parts", "threads"],
)
def test_soak_finds_nothing(arguments, counted):
    """Nothing is lost, and after each round there is what there was before."""
    done = subprocess.run(
        [sys.executable, TOOL, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=TEST_DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "planted: 8 of 8 seen" in done.stdout
    assert ", 0 problems" in done.stdout
    assert all(what in done.stdout for what in counted), done.stdout
