"""``python -m coopos``: the doctor, and programs run under it as they would run without."""

import json
import os
import re
import subprocess
import sys
import textwrap
import zipfile

import pytest

from ..helpers.support import DEADLINE_S, needs_libev, run_script

#: What the program is told about itself, and whether coopos is under it.
TELL = """
import json, os, sys
import gevent.os
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "name": __name__,
    "file": globals().get("__file__"),
    "package": __package__,
    "main": sys.modules["__main__"].__dict__ is globals(),
    "patched": [os.fork.__module__.split(".")[0], os.waitpid.__module__.split(".")[0], gevent.os.nb_read.__module__.split(".")[0]],
    "monkey": gevent.monkey.is_module_patched("socket") if hasattr(gevent, "monkey") else False,
}))
"""
PATCHED = ["coopos"] * 3


def python(*arguments, cwd, stdin=None, **env):
    """Run the interpreter; the finished process, with both outputs."""
    environment = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    return subprocess.run(
        [sys.executable, *map(os.fspath, arguments)],
        cwd=cwd,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        env=environment,
        encoding="utf-8",
        timeout=DEADLINE_S * 2,
    )


def told(*arguments, **kwargs):
    done = python(*arguments, **kwargs)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


def write(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


# ---- doctor ------------------------------------------------------------------------------------------------------------------


def test_doctor_names_every_mechanism(tmp_path):
    """Exit status 0, and a line for each kind of thing that says what serves it."""
    done = python("-m", "coopos", "doctor", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for kind in ["pipe", "socket", "pty", "blocking pipe", "FIFO", "regular file", "close", "child", "any child", "program"]:
        [line] = [line for line in lines if re.match(rf"{kind}  *ok  *\S", line)]
        assert line.split("ok", 1)[1].strip(), line
    assert not any("FAILED" in line for line in lines)


@pytest.mark.parametrize(("children", "mechanism"), [("thread", "thread"), (None, "pidfd|thread")])
def test_doctor_says_how_children_are_watched(tmp_path, children, mechanism):
    """It is the mechanism that is really used: a thread where the environment asks for one."""
    done = python("-m", "coopos", "doctor", cwd=tmp_path, COOPOS_CHILDREN=children)
    assert done.returncode == 0
    assert re.search(rf"^child  *ok  *({mechanism})\b", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize(
    "broken",
    [
        "_core.nb_read = lambda fd, n: b'wrong'",
        "_core.nb_read = lambda fd, n: gevent.sleep(1000)",
        "_core.waitpid = lambda pid, options: (pid, 0)",
        "_core.close = lambda fd: None",
    ],
)
def test_doctor_finds_what_is_broken(broken):
    """A wrong answer and a hang are failures; the other checks are made all the same, and the exit status is 1."""
    output = run_script(f"""
        import gevent
        from coopos import _core, _doctor
        _doctor.CHECK_TIMEOUT_S = 0.3
        {broken}
        print("status", _doctor.main())
    """)
    assert output.endswith("status 1\n") and "FAILED" in output
    assert re.search(r"^regular file  *ok", output, re.MULTILINE)


def test_doctor_leaves_nothing_behind():
    """No descriptor is open afterwards, no child is left."""
    run_script("""
        import os, gevent, coopos
        from coopos import _doctor
        gevent.get_hub().threadpool.apply(int)
        before = sorted(os.listdir("/dev/fd"))
        assert _doctor.main() == 0
        gevent.idle()
        after = sorted(os.listdir("/dev/fd"))
        assert len(after) <= len(before) + 1, (before, after)  # the threadpool's own, where it wasn't used
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            pass
        else:
            raise AssertionError("a child is left")
    """)


# ---- scripts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe_path", [None, "1"], ids=["", "safe path"])
@pytest.mark.parametrize("arguments", [[], ["one", "--two", "-m", "three"]], ids=["no arguments", "arguments"])
@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_script_sees_what_it_would_see(tmp_path, safe_path, arguments, where):
    """argv, sys.path, __name__ and __file__ are those of a script that Python runs itself; and everything is patched."""
    if safe_path and sys.version_info < (3, 11):
        pytest.skip("PYTHONSAFEPATH came with Python 3.11")
    script = write(tmp_path / "there" / "script.py", TELL)
    cwd, name = (script.parent, "script.py") if where == "here" else (tmp_path, os.path.join("there", "script.py"))
    under = told("-m", "coopos", name, *arguments, cwd=cwd, PYTHONSAFEPATH=safe_path)
    plain = told(name, *arguments, cwd=cwd, PYTHONSAFEPATH=safe_path, COOPOS_PATCH=None)
    assert (under.pop("patched"), under.pop("monkey")) == (PATCHED, True)
    assert (plain.pop("patched") != PATCHED, plain.pop("monkey")) == (True, False)
    file, plain_file = under.pop("file"), plain.pop("file")
    assert os.path.samefile(os.path.join(cwd, file), os.path.join(cwd, plain_file))
    assert under.pop("package") in (plain.pop("package"), "")
    assert under == plain


def test_script_imports_its_neighbours(tmp_path):
    """A module beside the script is found, and one in the current directory isn't."""
    write(tmp_path / "there" / "neighbour.py", "value = 7")
    write(tmp_path / "stranger.py", "")
    script = write(
        tmp_path / "there" / "script.py",
        """
        import neighbour
        try:
            import stranger
        except ImportError:
            raise SystemExit(neighbour.value)
        """,
    )
    assert python("-m", "coopos", script, cwd=tmp_path).returncode == 7


@pytest.mark.parametrize("kind", ["script", "module"])
@pytest.mark.parametrize(
    ("source", "status", "message"),
    [
        ("", 0, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(7)", 7, ""),
        ("import sys; sys.exit('words')", 1, "^words\n$"),
        ("raise ValueError('words')", 1, "ValueError: words\n$"),
        ("import os; os._exit(9)", 9, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15, ""),
    ],
    ids=["end", "exit", "exit 7", "exit words", "exception", "_exit", "signal"],
)
def test_exit_status(tmp_path, kind, source, status, message):
    """The exit status is the program's, and so is what it says at its end."""
    write(tmp_path / "program.py", source)
    done = python("-m", "coopos", *(["program.py"] if kind == "script" else ["-m", "program"]), cwd=tmp_path)
    assert done.returncode == status
    assert re.search(message, done.stderr) if message else not done.stderr


def test_script_forks(tmp_path):
    """A program that knows nothing of coopos forks, waits and runs programs."""
    script = write(
        tmp_path / "script.py",
        """
        import os, subprocess
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        assert os.waitpid(pid, 0) == (pid, 7 << 8)
        print(subprocess.check_output(["echo", "hello"]))
        """,
    )
    done = python("-m", "coopos", script, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "b'hello\\n'\n", "")


def test_script_reads_its_input(tmp_path):
    """Standard input is the program's."""
    script = write(tmp_path / "script.py", "import sys; print(sys.stdin.read().upper())")
    assert python("-m", "coopos", script, cwd=tmp_path, stdin="hello").stdout == "HELLO\n"


def test_script_waits_for_its_threads(tmp_path):
    """Threads that the script leaves running, and what it registered with atexit, see its names to the end."""
    script = write(
        tmp_path / "script.py",
        """
        import atexit, threading, time
        value = 7
        atexit.register(lambda: print("atexit", value))
        def run():
            time.sleep(0)
            print("thread", value)
        threading.Thread(target=run).start()
        """,
    )
    done = python("-m", "coopos", script, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "thread 7\natexit 7\n", "")


#: Says all that is in __main__, while the program runs and after its last line, when nothing of it may be missing.
SHOW = '''
"""A program."""
import atexit, json, sys, threading
class Thing: pass
annotated: int = 1
def show():
    import pickle
    main = sys.modules["__main__"]
    assert vars(main) is globals() and isinstance(pickle.loads(pickle.dumps(Thing())), Thing)
    # What the interpreter takes from a script when it has ended isn't compared.
    names = sorted(name for name in vars(main) if not name.startswith("__") or name in ("__spec__", "__loader__", "__doc__"))
    return [sys.argv, sys.path, names, __name__, __doc__, __package__, type(__loader__).__name__, getattr(__spec__, "name", None)]
print(json.dumps([sorted(globals()), __file__, globals().get("__cached__"), type(__builtins__).__name__]))
print(show.__code__.co_filename)
print(json.dumps(show()))
atexit.register(lambda: print(json.dumps(show())))
threading.Timer(0.02, lambda: print(json.dumps(show()))).start()
'''


@pytest.mark.parametrize("arguments", [
    "script.py", "script.py one -m -h --two", "directory/link.py", "./directory/../script.py", "directory x", "directory/",
    "./file.zip", "-m script 1", "-m package -h", "-P script.py", "-P directory",
])
def test_main_is_what_it_is_without(tmp_path, arguments):
    """To the end: for threads, for atexit functions, for what is pickled there."""
    arguments = arguments.split()
    safe = ["-P"] if arguments[0] == "-P" else []
    if safe and sys.version_info < (3, 11):
        pytest.skip("no -P here")
    del arguments[: len(safe)]
    for name in ("script.py", "directory/__main__.py", "package/__init__.py", "package/__main__.py"):
        write(tmp_path / name, SHOW if "init" not in name else "")
    (tmp_path / "directory" / "link.py").symlink_to(tmp_path / "script.py")
    with zipfile.ZipFile(tmp_path / "file.zip", "w") as file:
        file.writestr("__main__.py", SHOW)
    plain = python(*safe, *arguments, cwd=tmp_path, COOPOS_PATCH=None)
    under = python(*safe, "-m", "coopos", *arguments, cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert (under.stdout.splitlines(), under.stderr, under.returncode) == (plain.stdout.splitlines(), "", 0)


@pytest.mark.parametrize("is_module", [False, True], ids=["script", "module"])
def test_processes_that_are_spawned_by_the_program(tmp_path, is_module):
    """They find what is pickled by name in ``__main__``, the script's or the module's, whatever it has of coopos."""
    write(tmp_path / "program.py", """
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        def double(number):
            return 2 * number

        if __name__ == "__main__":
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
                print(list(executor.map(double, [1, 2])))
    """)
    done = python("-m", "coopos", *(["-m", "program"] if is_module else ["program.py"]), cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("[2, 4]\n", "", 0)


# CPython forgets a KeyboardInterrupt if anything evaluates a string before its end, as gevent does with its libuv loop.
@pytest.mark.parametrize("end", [
    pytest.param("raise KeyboardInterrupt", marks=needs_libev),
    pytest.param("import signal; signal.raise_signal(signal.SIGINT)", marks=needs_libev),
    "sys.exit(7)",
    "1 / 0",
])
@pytest.mark.parametrize("is_module", [False, True], ids=["script", "module"])
def test_exit_status_is_what_it_is_without(tmp_path, end, is_module):
    write(tmp_path / "program.py", f"import sys; {end}")
    arguments = ["-m", "program"] if is_module else ["program.py"]
    plain, under = python(*arguments, cwd=tmp_path, COOPOS_PATCH=None), python("-m", "coopos", *arguments, cwd=tmp_path)
    assert under.returncode == plain.returncode
    assert under.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]


def test_script_that_is_not_there(tmp_path):
    """The exit status isn't 0, and the message names the file."""
    done = python("-m", "coopos", "nothing.py", cwd=tmp_path)
    assert done.returncode != 0 and "nothing.py" in done.stderr


@pytest.mark.parametrize("is_absolute", [True, False], ids=["absolute", "relative"])
def test_script_in_a_directory_that_was_removed(tmp_path, is_absolute):
    """An absolute path is found, and sys.path is what it would be; a relative one is a file that isn't there."""
    script = write(tmp_path / "script.py", "import sys; print(sys.path)")
    shell = ["sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$0" "$@"', sys.executable]
    plain, under = (
        subprocess.run([*shell, *options, script if is_absolute else script.name], cwd=tmp_path, capture_output=True, timeout=60)
        for options in ([], ["-m", "coopos"])
    )
    assert (under.returncode, under.stdout) == (plain.returncode, plain.stdout), under.stderr
    assert plain.returncode == (0 if is_absolute else 2)


@pytest.mark.parametrize("arguments", ["there/script.py", "-m there.script"])
def test_patching_imports_nothing_from_the_working_directory(tmp_path, arguments):
    write(tmp_path / "grp.py", "print('imported')")
    write(tmp_path / "queue.py", "print('imported')")
    write(tmp_path / "there" / "script.py", "print('done')")
    assert python("-m", "coopos", *arguments.split(), cwd=tmp_path).stdout == "done\n"


# ---- modules -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["program", "package.program", "package"])
@pytest.mark.parametrize("arguments", [[], ["one", "--two", "-m", "three"]], ids=["no arguments", "arguments"])
def test_module_sees_what_it_would_see(tmp_path, name, arguments):
    """The same for -m."""
    for file in ("program.py", "package/program.py", "package/__main__.py"):
        write(tmp_path / file, TELL)
    write(tmp_path / "package" / "__init__.py", "")
    under = told("-m", "coopos", "-m", name, *arguments, cwd=tmp_path)
    plain = told("-m", name, *arguments, cwd=tmp_path, COOPOS_PATCH=None)
    assert (under.pop("patched"), under.pop("monkey")) == (PATCHED, True)
    del plain["patched"], plain["monkey"]
    assert under == plain


@pytest.mark.parametrize("arguments", [["-m", "nothing_of_that_name"], ["-m"], ["-x"], []], ids=" ".join)
def test_wrong_command_line(tmp_path, arguments):
    """The exit status isn't 0, and something is said."""
    done = python("-m", "coopos", *arguments, cwd=tmp_path)
    assert done.returncode != 0 and done.stdout + done.stderr


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(tmp_path, option):
    """The usage is printed, and that is no failure."""
    done = python("-m", "coopos", option, cwd=tmp_path)
    assert done.returncode == 0 and "python -m coopos doctor" in done.stdout
