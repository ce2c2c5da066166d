"""The same input to waitpid of coopos, os and gevent.os: the same result, or an exception of the same type with the same errno."""

import os

import gevent
import gevent.os
import pytest

import coopos

from ..helpers.support import INT_MAX, Broken, Index, Int, error_of, outcomes

PIDS = {
    "-1": -1,
    "0": 0,
    "own": os.getpid(),
    "parent": os.getppid(),
    "own group": -os.getpgrp(),
    "1": 1,
    "none": 2**22 + 1,  # above Linux's highest pid_max
    "no group": -(2**22) - 1,
    "highest": INT_MAX,
    "lowest": -INT_MAX - 1,
    "lowest but one": -INT_MAX,
    "too high": INT_MAX + 1,
    "huge": 2**70,
    "float": 1.0,
    "Int": Int(1),
    "Index": Index(2**22 + 1),
    "Broken": Broken(),
    "None": None,
    "str": "1",
    "True": True,
    "False": False,
}
OPTIONS = {
    "0": 0,
    "WNOHANG": os.WNOHANG,
    "WUNTRACED": os.WUNTRACED,
    "all": os.WNOHANG | os.WUNTRACED | os.WCONTINUED,
    "unknown": 0x10000,
    "unknown and WNOHANG": 0x10000 | os.WNOHANG,
    "waitid's WEXITED": os.WEXITED,
    "waitid's WNOWAIT": os.WNOWAIT,
    "__WALL": 0x40000000,
    "__WCLONE": -0x80000000,
    "-1": -1,
    "too high": INT_MAX + 1,
    "huge": 2**70,
    "float": 0.0,
    "Int": Int(0),
    "None": None,
    "str": "",
    "False": False,
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_waitpid_without_children(options):
    """At once, whatever pid is asked for: there is nothing to wait for."""
    different = {}
    for name, pid in PIDS.items():
        functions = [coopos.waitpid, os.waitpid]
        if type(pid) is int and pid != -1:
            functions.append(gevent.os.waitpid)  # which compares pids of any type, and waits for ever for -1
        ours, *others = outcomes(functions, pid, options)
        if [ours] * len(others) != others or ours[0] is None:
            different[name] = ours, *others
    assert not different


@pytest.mark.parametrize("options", [0, os.WNOHANG, 0x10000, 0.0], ids=["0", "WNOHANG", "unknown", "float"])
def test_waitpid_for_a_child_that_ended(options):
    """A child of each, forked and ended the same way; what is wrong with the options is said before the child is looked at."""
    found = []
    for waitpid in (coopos.waitpid, os.waitpid):
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], {})
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        kind, result = error_of(waitpid, pid, options)
        if kind is None:
            assert result == (pid, 7 << 8)
            result = "waited for"
        else:
            assert os.waitpid(pid, 0) == (pid, 7 << 8)
        found.append((kind, result))
    assert found[0] == found[1]
