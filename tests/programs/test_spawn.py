"""The spawn family: what os does with the same program, while other greenlets run."""

import json
import os
import signal

import pytest

import coopos

from ..helpers.children import has_no_child
from ..helpers.support import error_of, run_script

FAMILY = ["spawnl", "spawnle", "spawnlp", "spawnlpe", "spawnv", "spawnve", "spawnvp", "spawnvpe"]
every_spawn = pytest.mark.parametrize("name", FAMILY)

CALL = """
import os, warnings, pathlib, gevent, coopos
NOTHING = object()

def call(module, name, mode, file, args, env=NOTHING):
    env = os.environ if env is NOTHING else env
    args = args if "v" in name else [*args] if isinstance(args, (list, tuple)) else [args]
    if "v" in name:
        return getattr(module, name)(mode, file, args, *[env][: "e" in name])
    return getattr(module, name)(mode, file, *args, *[env][: "e" in name])
"""


def against_os():
    """{name of the function: [(case, what os does, what coopos does)]}, found out in one interpreter."""
    return json.loads(
        run_script(
            CALL
            + """
import json

def outcome(module, name, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # os.fork's, where there are threads
        try:
            result = call(module, name, os.P_WAIT, *args)
        except Exception as ex:
            return type(ex).__name__, getattr(ex, "errno", None), None
        if result in (7, 127) or result < 0:
            for mode in (os.P_NOWAIT, os.P_NOWAITO):
                pid = call(module, name, mode, *args)
                assert module.waitpid(pid, 0) == (pid, -result if result < 0 else result << 8)
        return None, None, result

os.environ["COOPOS_X"] = "5"
here = dict(os.environ)
CASES = {
    "exit 0": ("/bin/sh", ["sh", "-c", "exit 0"]),
    "exit 7": ("/bin/sh", ["sh", "-c", "exit 7"]),
    "exit 255": ("/bin/sh", ["sh", "-c", "exit 255"]),
    "a tuple": ("/bin/sh", ("sh", "-c", "exit 7")),
    "bytes": (b"/bin/sh", [b"sh", b"-c", b"exit 7"]),
    "a path": (pathlib.Path("/bin/sh"), ["sh", "-c", "exit 7"]),
    "signal": ("/bin/sh", ["sh", "-c", "kill -TERM $$"]),
    "name": ("/bin/sh", ["another", "-c", "test $0 = another"]),
    "missing": ("/nonexistent/program", ["program"]),
    "missing on $PATH": ("nonexistent-program", ["program"]),
    "not executable": ("/etc/passwd", ["passwd"]),
    "a directory": ("/", ["x"]),
    "on $PATH": ("sh", ["sh", "-c", "exit 7"]),
    "environment": ("/bin/sh", ["sh", "-c", "exit ${COOPOS_X:-0}"]),
    "other environment": ("/bin/sh", ["sh", "-c", "exit ${COOPOS_X:-0}"], {**here, "COOPOS_X": "6"}),
    "empty environment": ("/bin/sh", ["sh", "-c", "exit ${COOPOS_X:-0}"], {}),
    "environment of bytes": ("/bin/sh", ["sh", "-c", "exit ${COOPOS_X:-0}"], {b"COOPOS_X": b"9"}),
    "other $PATH": ("sh", ["sh", "-c", "exit 7"], {"PATH": "/nonexistent"}),
    "no mapping": ("/bin/sh", ["sh", "-c", "exit 7"], 5),
    "wrong environment": ("/bin/sh", ["sh", "-c", "exit 7"], {"X": 5}),
    "no arguments": ("/bin/sh", []),
    "empty first argument": ("/bin/sh", ["", "-c", "exit 7"]),
    "None for an argument": ("/bin/sh", [None]),
    "number for an argument": ("/bin/sh", ["sh", 5]),
    "null in an argument": ("/bin/sh", ["sh", "-c", "exit 7\\0"]),
    "null in the file": ("/bin/sh\\0", ["sh", "-c", "exit 7"]),
    "number for a file": (5, ["sh", "-c", "exit 7"]),
    "a string of arguments": ("/bin/sh", "sh"),
    "None for arguments": ("/bin/sh", None),
    "an iterator of arguments": ("/bin/sh", iter(["sh", "-c", "exit 7"])),
    "a file of surrogates": ("/bin/\\ud800", ["sh"]),
}
NAMES = [name for name in coopos.__implements__ if name.startswith("spawn")]
print(json.dumps({
    name: [(case, outcome(os, name, *args), outcome(coopos, name, *args)) for case, args in CASES.items()] for name in NAMES
}))
"""
        )
    )


@pytest.fixture(scope="module")
def answers():
    return against_os()


@every_spawn
def test_spawn_against_os(answers, name):
    """Exit codes, signals, 127 for what can't be started, and exceptions are those of os, waited for or not."""
    wrong = {case: {"os": of_os, "coopos": of_coopos} for case, of_os, of_coopos in answers[name] if of_os != of_coopos}
    assert not wrong
    results = {case: result for case, _, (_, _, result) in answers[name]}
    assert (results["exit 7"], results["signal"], results["missing"]) == (7, -signal.SIGTERM, 127)
    assert results["on $PATH"] == (7 if "p" in name.removeprefix("sp") else 127)
    assert results["other environment"] == (6 if name.endswith("e") else 5)


@pytest.mark.parametrize(("name", "arguments"), [(name, each) for name in FAMILY for each in ((), (0,), (0, "/bin/true"))])
def test_spawn_missing_arguments(name, arguments):
    """The same exception as that of os, and nothing is started."""
    error = error_of(getattr(coopos, name), *arguments)
    assert error[0] is not None
    assert error == error_of(getattr(os, name), *arguments)
    assert has_no_child()


@pytest.mark.smoke
def test_spawn_lets_others_run():
    """Under P_WAIT other greenlets run until the program has ended; several are waited for at once, in any thread."""
    run_script(
        CALL
        + f"""
for name in {FAMILY}:
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    argv = ["sh", "-c", f"read line < /dev/fd/{{reader}}; exit 7"]
    waiters = [gevent.spawn(call, coopos, name, os.P_WAIT, "/bin/sh", argv) for _ in range(3)]
    turns = 0
    while turns < 10:
        turns += 1
        gevent.sleep(0)
        assert not any(waiter.ready() for waiter in waiters)
    os.write(writer, b"\\n" * 3)
    assert [waiter.get(timeout=30) for waiter in waiters] == [7] * 3
    os.close(reader)
    os.close(writer)
"""
    )


def test_spawn_no_wait_is_watched():
    """Under P_NOWAIT the child is collected when it ends, though nobody asks, and its status kept; nothing is waited for."""
    run_script(
        CALL
        + f"""
for name in {FAMILY}:
    other = gevent.spawn(int)
    pid = call(coopos, name, os.P_NOWAIT, "/bin/sh", ["sh", "-c", "exit 7"])
    assert not other.ready()
    while True:
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:
            break
        gevent.sleep(0)
    assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
"""
    )


def test_spawn_killed():
    """The program goes on, leaves no zombie when it ends, and its status is waitable."""
    run_script(
        CALL
        + f"""
def has_no_child():
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True

for name in {FAMILY}:
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    argv = ["sh", "-c", f"read line < /dev/fd/{{reader}}; exit 7"]
    waiter = gevent.spawn(call, coopos, name, os.P_WAIT, "/bin/sh", argv)
    gevent.sleep(0)
    assert not waiter.ready()
    waiter.kill()
    os.write(writer, b"\\n")
    while not has_no_child():
        gevent.sleep(0)
    assert coopos.waitpid(-1, 0)[1] == 7 << 8
    os.close(reader)
    os.close(writer)
"""
    )


def test_spawn_stop_is_no_end():
    """Under P_WAIT a program that is stopped and continued has not ended."""
    run_script(
        CALL
        + """
import signal, psutil
waiter = gevent.spawn(coopos.spawnl, os.P_WAIT, "/bin/sh", "sh", "-c", "kill -STOP $$; exit 7")
gevent.sleep(0)
(child,) = psutil.Process().children()
os.waitid(os.P_PID, child.pid, os.WSTOPPED)
gevent.idle()
assert not waiter.ready()
child.send_signal(signal.SIGCONT)
assert waiter.get(timeout=30) == 7
"""
    )
