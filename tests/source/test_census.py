"""docs/concepts/census.rst against os and against coopos."""

import inspect
import os
import pathlib
import re
import sys

import pytest

import coopos

from ..helpers.support import run_script

CENSUS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "concepts" / "census.rst"
needs_census = pytest.mark.skipif(not CENSUS.exists(), reason="the documentation is not beside the tests")


#: The names that came to os after Python 3.10, or that one of the two systems has not.
SINCE = {
    (3, 11): "login_tty",
    (3, 12): "setns unshare",
    (3, 13): "grantpt posix_openpt process_cpu_count ptsname unlockpt "
    "timerfd_create timerfd_gettime timerfd_gettime_ns timerfd_settime timerfd_settime_ns",
    (3, 14): "readinto reload_environ",
    (3, 15): "statx _clearenv",
}
NOT_ON = {
    "linux": "chflags lchflags lchmod",
    "darwin": "copy_file_range eventfd eventfd_read eventfd_write fdatasync getrandom getresgid getresuid getxattr listxattr "
    "memfd_create pidfd_open pipe2 posix_fadvise posix_fallocate removexattr sched_getaffinity sched_getparam sched_getscheduler "
    "sched_rr_get_interval sched_setaffinity sched_setparam sched_setscheduler setns setresgid setresuid setxattr splice statx "
    "timerfd_create timerfd_gettime timerfd_gettime_ns timerfd_settime timerfd_settime_ns unshare waitid",
}


def census():
    """[(names, can it block, here), ...], a row of the table each."""
    rows = re.findall(r"^   \* - (.*?)\n     - (.*?)\n     - (.*?)(?=\n   \*|\n\n)", CENSUS.read_text(), re.MULTILINE | re.DOTALL)
    return [(re.findall(r"``(\w+)``", names), block, " ".join(here.split())) for names, block, here in rows[1:]]


def functions_of_os():
    return {name for name in dir(os) if inspect.isroutine(getattr(os, name)) and (not name.startswith("_") or name in os.__all__)}


@needs_census
def test_census_has_every_function_of_os():
    """A function that comes to os in a new Python has to be looked at, and put there."""
    assert functions_of_os() - {name for names, _, _ in census() for name in names} == set()


@needs_census
def test_census_has_functions_of_os_only():
    later = {name for version, names in SINCE.items() if version > sys.version_info for name in names.split()}
    elsewhere = later | set(NOT_ON.get(sys.platform, "").split())
    assert {name for names, _, _ in census() for name in names} - functions_of_os() - elsewhere == set()


@needs_census
def test_census_has_a_function_once():
    names = [name for names, _, _ in census() for name in names]
    assert sorted(names) == sorted(set(names))


@needs_census
def test_census_gives_one_of_a_few_answers():
    for names, block, here in census():
        assert block in ("no", "for a disk", "for another party"), names
        assert re.match("cooperative: |that of os: |cannot be: ", here), names


@needs_census
def test_cooperative_is_what_the_census_says():
    said = {name for names, _, here in census() if here.startswith("cooperative") for name in names}
    said = {name for name in said if hasattr(os, name)}
    assert not set(coopos.__cooperative__) - said, "cooperative, but docs/concepts/census.rst says otherwise"
    assert not said - set(coopos.__cooperative__), "docs/census.rst says cooperative, but coopos has it from os"


def test_cooperative_is_sorted_and_our_own():
    assert coopos.__cooperative__ == sorted(set(coopos.__cooperative__))
    assert [name for name in coopos.__cooperative__ if getattr(coopos, name) is getattr(os, name)] == []
    assert set(coopos.__cooperative__) <= set(coopos.__all__)


FORMS = sorted(name for name in coopos.__cooperative__ if getattr(coopos, name).__module__ == "coopos._files")


@pytest.mark.parametrize("name", FORMS)
def test_signature_is_that_of_os(name):
    def shape(function):
        return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]

    assert shape(getattr(coopos, name)) == shape(getattr(os, name))


def test_patch_leaves_the_forms_out():
    run_script("""
        from gevent import monkey; monkey.patch_all()
        import os
        before = dict(vars(os))
        import coopos
        coopos.patch()
        forms = set(coopos.__cooperative__) - set(coopos.__implements__)
        assert forms and all(getattr(os, name) is before[name] for name in forms)
    """)
