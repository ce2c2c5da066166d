"""What holds for every test: it ends, and leaves no descriptor, child or active watcher behind."""

import contextlib
import gc
import resource

import pytest

from .helpers.children import Gate
from .helpers.support import TEST_DEADLINE_S, deadline, end_what_runs, forget_the_past, leftovers, open_fds, turn_loop


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="also run what takes an hour: 200,000 children, a thousand forks")
    parser.addoption("--processes", action="store_true", help="of the outside suites, those of multiprocessing: half an hour")
    parser.addoption("--soak-children", type=int, default=200_000, metavar="N", help="that many instead")


@pytest.fixture(scope="session", autouse=True)
def _past():
    # Some tests have 1,400 descriptors open, and most systems give 1,024 to who asks for no more.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    forget_the_past()


@pytest.fixture(autouse=True)
def _clean(_past, request):
    """Fail a test that waits for ever, or leaks a descriptor, a child or an active watcher."""
    before = open_fds()
    # Whole suites have limits of their own.
    is_long = request.config.getoption("--soak") or "outside" in request.path.parts
    with deadline(None if is_long else TEST_DEADLINE_S):
        yield
        turn_loop()
    gc.collect()
    found = leftovers(before)
    if found:
        end_what_runs()
    # What is left is not the next test's; and the next collection need not go through all that pytest remembers of those before.
    gc.freeze()
    if found:
        pytest.fail("left behind: " + "; ".join(found), pytrace=False)


@pytest.fixture
def gate(tmp_path):
    with contextlib.closing(Gate(tmp_path / "gate")) as gate:
        yield gate
