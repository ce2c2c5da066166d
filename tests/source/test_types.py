"""What type checkers say of a program that uses coopos: nothing, if it is right; and what is misspelt they find.

mypy and pyright are not among the tests' requirements. `tox -e typing` has them; elsewhere these tests are skipped.
"""

import ast
import importlib.util
import inspect
import pathlib
import subprocess
import sys

import pytest

import coopos

PROGRAM = pathlib.Path(__file__).with_name("user_program.py")
#: A checker starts an interpreter or a node of its own, and reads the stdlib's types.
CHECK_TIMEOUT_S = 110

#: What is right, and the same with a word or a type that is wrong.
MISTAKES = {
    "fork": ("coopos.fork(keep_greenlets=False)", "coopos.fork(keep_greenlet=False)"),
    "fork_gevent": ("coopos.fork_gevent(keep_greenlets=False)", "coopos.fork_gevent(keep_greenlets='no')"),
    "fork_and_watch": ("coopos.fork_and_watch(callback=print)", "coopos.fork_and_watch(calback=print)"),
    "fork_policy": ("coopos.fork_policy(keep_greenlets=False)", "coopos.fork_policy(False)"),
    "forkpty": ("coopos.forkpty(winsize=(24, 80))", "coopos.forkpty(winsiz=(24, 80))"),
    "forkpty_gevent": ("coopos.forkpty_gevent(winsize=(24, 80))", "coopos.forkpty_gevent(winsize=(24,))"),
    "forkpty_and_watch": ("coopos.forkpty_and_watch(ref=True)", "coopos.forkpty_and_watch(reff=True)"),
    "watch": ("coopos.watch(1, ref=True)", "coopos.watch(1, callback=5)"),
    "wait_exit": ("coopos.wait_exit(1)", "coopos.wait_exit('1')"),
    "waitpid": ("coopos.waitpid(1, 0)", "coopos.waitpid(1)"),
    "posix_spawn": ("coopos.posix_spawn('a', ['a'], {}, setsid=True)", "coopos.posix_spawn('a', ['a'], {}, setsidd=True)"),
    "register_at_fork": ("coopos.register_at_fork(before=print)", "coopos.register_at_fork(befor=print)"),
    "patch": ("coopos.patch(io=True)", "coopos.patch(oi=True)"),
    "FileIO": ("coopos.FileIO(1, mode='r')", "coopos.FileIO(1, moed='r')"),
    "fdopen": ("coopos.fdopen(1, encoding='utf-8')", "coopos.fdopen(1, encodin='utf-8')"),
    "read": ("coopos.read(0, 1)", "coopos.read('0', 1)"),
    "Popen": ("subprocess.Popen(['true'], pty=True)", "subprocess.Popen(['true'], ptty=True)"),
    "winsize": ("subprocess.Popen(['true'], winsize=(24, 80))", "subprocess.Popen(['true'], winsize=24)"),
}
LINES = [("import coopos", "import coopos"), ("from coopos import subprocess",) * 2, *MISTAKES.values()]

CHECKERS = {"mypy": ["mypy", "--strict", "--no-error-summary"], "pyright": ["pyright", "--pythonpath", sys.executable]}
each_checker = pytest.mark.parametrize(
    "checker",
    [
        pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed"))
        for name in CHECKERS
    ],
)


def check(checker, path, cwd):
    """The finished process, run where no configuration of ours is."""
    arguments = [sys.executable, "-m", *CHECKERS[checker], path]
    return subprocess.run(arguments, cwd=cwd, capture_output=True, encoding="utf-8", timeout=CHECK_TIMEOUT_S)


def calls_in(path):
    """{name: keywords} of what the program calls as ``coopos.name(...)``."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "coopos":
            found.setdefault(node.func.attr, set()).update(keyword.arg for keyword in node.keywords)
    return found


def test_program_calls_every_function():
    assert set(coopos.__all__) - set(calls_in(PROGRAM)) == set()


def test_program_uses_every_keyword_of_ours():
    """Those that can be given by keyword alone, and those of the functions that watch."""
    calls = calls_in(PROGRAM)
    for name in coopos.__cooperative__ + coopos.__extensions__ + ["patch"]:
        parameters = inspect.signature(getattr(coopos, name)).parameters.values()
        keywords = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        if name not in ("posix_spawn", "posix_spawnp"):
            assert keywords <= calls[name], name
    assert {"callback", "loop", "ref"} <= calls["fork_and_watch"] & calls["watch"] & calls["forkpty"]


@pytest.mark.skipif(sys.platform != "linux", reason="the program uses what only Linux has")
@each_checker
def test_program_is_right(checker, tmp_path):
    done = check(checker, PROGRAM, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@each_checker
def test_mistakes_are_found(checker, tmp_path):
    """Each line that is wrong is, and none of those that are right."""
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    for path, lines in zip((right, wrong), zip(*LINES, strict=True), strict=True):
        path.write_text("\n".join(lines) + "\n")
    done = check(checker, right, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    output = check(checker, wrong, tmp_path).stdout
    assert [line for number, (_, line) in enumerate(LINES[2:], 3) if f"wrong.py:{number}:" not in output] == [], output
