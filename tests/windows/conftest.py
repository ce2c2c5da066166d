"""The package without its compiled core, as it is on Windows: what these tests need, on any system.

Run them by themselves, `pytest --confcutdir=tests/windows tests/windows`: what the other tests share is for POSIX. Where there is a
core it is hidden here, before coopos is imported, and os loses fork, by which coopos tells.
"""

import contextlib
import os
import subprocess
import sys
import textwrap

import gevent
import pytest

#: What hides the core from an interpreter that has not imported coopos yet, and makes gevent.os what it is on Windows.
HIDE = """
import os, sys
import gevent.os, gevent.subprocess
if hasattr(os, "fork"):
    del os.fork
    sys.modules["coopos._core"] = None
    gevent.os.__implements__[:] = []
    gevent.os.__extensions__[:] = gevent.os.__all__[:] = ["tp_read", "tp_write"]
"""
assert "coopos" not in sys.modules
exec(HIDE)

DEADLINE_S = 60


@pytest.fixture
def python():
    """A function that runs a script in a fresh interpreter, warnings being errors, and returns its outputs and exit status."""

    def run(script, *arguments):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", HIDE + textwrap.dedent(script), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=DEADLINE_S,
        )
        return done.stdout, done.stderr, done.returncode

    return run


@pytest.fixture(autouse=True)
def _ends():
    """No greenlet is waited for for ever."""
    with gevent.Timeout(DEADLINE_S):
        yield


@pytest.fixture
def pipe():
    """(reader, writer), closed at the end if they are still open."""
    fds = os.pipe()
    yield fds
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
