"""What holds for every test: it ends, and leaves nothing behind."""

import contextlib
import gc
import os
import resource

import pytest

import coopos

from .helpers.children import Gate
from .helpers.support import TEST_DEADLINE_S, deadline, turn_loop

pytest_plugins = ["coopos.testing"]


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="also run what takes an hour: 200,000 children, a thousand forks")
    parser.addoption("--processes", action="store_true", help="of the outside suites, those of multiprocessing: half an hour")
    parser.addoption("--soak-children", type=int, default=200_000, metavar="N", help="that many instead")


@pytest.fixture(scope="session", autouse=True)
def _collected():
    """Ten thousand tests are a million objects of pytest's. No collection and no walk goes through them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _may_open_many():
    # Some tests have 1,400 descriptors open, and most systems give 1,024 to who asks for no more.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@pytest.fixture(autouse=True)
def _ends(request):
    """Fail a test that waits for ever, or leaves a status of a child that nobody has asked for."""
    # Whole suites have limits of their own.
    is_long = request.config.getoption("--soak") or "outside" in request.path.parts
    with deadline(None if is_long else TEST_DEADLINE_S):
        yield
        turn_loop()
    # coopos keeps it until somebody asks. It is nothing to coopos.testing: a callback may have had it.
    with contextlib.suppress(ChildProcessError):
        pid, _status = coopos.waitpid(-1, os.WNOHANG)
        assert not pid, f"nobody asked for the status of child {pid}"


@pytest.fixture
def gate(tmp_path):
    with contextlib.closing(Gate(tmp_path / "gate")) as gate:
        yield gate
