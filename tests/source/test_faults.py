"""tools/faults.py: what it once found stays mended, and the table in the documentation is its own."""

import csv
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from ..helpers.support import LOOP

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "faults.py"
TABLE = ROOT / "docs" / "concepts" / "faults_table.csv"
pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="the tools are not beside the tests")
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="no strace here")


def load_tool():
    spec = importlib.util.spec_from_file_location("faults", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(TOOL.parent))    # it imports its tables from there
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOL.parent))
    return module


@needs_strace
@pytest.mark.parametrize(
    ("scenario", "call", "errno"),
    [
        pytest.param(
            "flock_contended", "epoll_ctl", "EPERM", id="a set that takes no bell",
            marks=pytest.mark.skipif(LOOP == "libuv", reason="libuv's own calls are the first, and gevent's faults aren't counted"),
        ),
        pytest.param("flock_contended", "write", "EIO", id="a bell that can't be rung"),
        pytest.param("read_fifo_guarded", "rt_sigprocmask", "EINVAL", id="the guard's signal can't be unblocked"),
        pytest.param("close_under_worker", "rt_sigprocmask", "EINVAL", id="a worker's signal can't be unblocked"),
        pytest.param("lockf_contended", "fcntl", "EINTR", id="a lock that is tried for is interrupted"),
    ],
)
def test_call_that_fails(scenario, call, errno):
    """The scenario comes to a right end: the call works, or raises this errno, and nothing is left."""
    command = [sys.executable, str(TOOL), "--jobs", "1", "--verbose", "--call", call, "--errno", errno, scenario]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    if "ptrace" in done.stderr:
        pytest.skip("strace doesn't work here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) cases, 0 wrong", done.stdout)[1]) > 0


@pytest.mark.skipif(not TABLE.exists(), reason="the documentation is not beside the tests")
def test_table_is_as_the_tool_writes_it(tmp_path):
    tool = load_tool()
    with TABLE.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert rows == sorted(rows)
    for call, names, _ in rows:
        assert set(names.split()) <= set(tool.ERRNOS[call].split()), call
    assert tuple(header) == tool.HEADER
    tool.write_table(tmp_path / "table.csv", rows)
    assert (tmp_path / "table.csv").read_text() == TABLE.read_text()
