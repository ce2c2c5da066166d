"""coopos.subprocess beside the stdlib's."""

import subprocess as stdlib

from coopos import subprocess

PIPE, STDOUT, DEVNULL = stdlib.PIPE, stdlib.STDOUT, stdlib.DEVNULL
MUCH = b"".join(b"%09d\n" % n for n in range(200_000))


def sh(script, module=subprocess, **kwargs):
    return module.Popen(["sh", "-c", script], **kwargs)


def outcome_of(function, *args, **kwargs):
    """What it returns, or all that its exception says."""
    try:
        return function(*args, **kwargs)
    except Exception as ex:
        names = ("errno", "strerror", "filename", "returncode", "cmd", "output", "stderr")
        return type(ex), *[getattr(ex, name, None) for name in names], None if isinstance(ex, stdlib.SubprocessError) else str(ex)


def same(function):
    """What *function* makes of coopos.subprocess, which must be what it makes of the stdlib's."""
    expected, got = outcome_of(function, stdlib), outcome_of(function, subprocess)
    assert got == expected
    return got
