"""``python -m coopos``: the doctor, and programs run under it as they would run without."""

import json
import os
import re
import subprocess
import sys
import textwrap
import zipfile

import pytest

from ..helpers.support import DEADLINE_S, needs_libev, run_script, run_seccomp

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

#: All that the doctor looks at.
KINDS = ["set", "pipe", "socket", "pty", "blocking pipe", "regular file", "blocking socket", "FIFO", "close", "child", "any child"]
KINDS += ["program", "subprocess", "patching", "multiprocessing"] + ["any process"] * hasattr(os, "pidfd_open")


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
    for kind in KINDS:
        assert len([line for line in lines if re.match(rf"{kind}  *(ok|fallback)  *\S", line)]) == 1
    assert not any("FAILED" in line for line in lines)


@pytest.mark.parametrize(("children", "mechanism"), [("thread", "thread"), (None, "pidfd|thread")])
def test_doctor_says_how_children_are_watched(tmp_path, children, mechanism):
    """It is the mechanism that is really used: a thread where the environment asks for one."""
    done = python("-m", "coopos", "doctor", cwd=tmp_path, COOPOS_CHILDREN=children)
    assert done.returncode == 0
    assert re.search(rf"^child  *(ok|fallback)  *({mechanism})\b", done.stdout, re.MULTILINE), done.stdout


#: What stands in for something better: how to get there by a setting, by which system calls that are refused, and what is said.
FALLBACKS = {
    "child": ("COOPOS_CHILDREN=thread", ["pidfd_open"], "thread, and no SIGCHLD handler"),
    "regular file": ("COOPOS_NOWAIT=0", ["preadv2", "pwritev2"], "a worker thread"),
    "set": ("COOPOS_SETS=watchers", ["epoll_create1"], "a watcher of gevent's loop for each wait"),
}
needs_linux = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="there is nothing better on this system")


def check_fallback(report, kind, advice):
    """It works, and it is said what would be better."""
    state = {finding["name"]: finding["state"] for finding in report["checks"]}
    [finding] = [finding for finding in report["checks"] if finding["name"] == kind]
    assert (report["state"], finding["state"], finding["mechanism"]) == ("fallback", "fallback", FALLBACKS[kind][2])
    assert advice in finding["advice"]
    assert "failed" not in state.values() and set(state) == set(KINDS)


@needs_linux
@pytest.mark.parametrize("kind", FALLBACKS)
def test_doctor_tells_a_fallback_that_was_asked_for(tmp_path, kind):
    setting = FALLBACKS[kind][0]
    done = python("-m", "coopos", "doctor", "--json", cwd=tmp_path, **dict([setting.split("=")]))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    check_fallback(json.loads(done.stdout), kind, f"{setting} is set")
    done = python("-m", "coopos", "doctor", cwd=tmp_path, **dict([setting.split("=")]))
    assert done.returncode == 0 and f"{setting} is set" in re.sub(r"\s+", " ", done.stdout)
    assert re.search(r"^(\d+) of \1 are well, \d+ of them by a fallback", done.stdout, re.MULTILINE)


@needs_linux
@pytest.mark.parametrize("kind", FALLBACKS)
@pytest.mark.parametrize("err", ["EPERM", "ENOSYS"])
def test_doctor_tells_a_fallback_that_a_sandbox_forces(kind, err):
    """A seccomp filter refuses the better way. All works, the exit status is 0, and the advice names the call or says why."""
    out = run_seccomp(f"""
from contextlib import redirect_stdout
import io, json
for call in {FALLBACKS[kind][1]}:
    refuse(call, errno.{err})
import coopos
from coopos import _doctor
with redirect_stdout(io.StringIO()) as report:
    status = _doctor.main(["--json"])
print(status)
print(report.getvalue())
""", COOPOS_CHILDREN=None, COOPOS_NOWAIT=None, COOPOS_SETS=None, GEVENT_LOOP=None)
    status, report = out.split("\n", 1)
    assert status == "0", report
    check_fallback(json.loads(report), kind, "RWF_NOWAIT" if (kind, err) == ("regular file", "ENOSYS") else FALLBACKS[kind][1][0])


def test_doctor_json_is_all_that_is_printed(tmp_path):
    done = python("-m", "coopos", "doctor", "--json", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert [finding["name"] for finding in report["checks"]] == KINDS
    assert report["state"] in ("ok", "fallback") and report["pidfds_refused"] == {}
    assert set(report["patched"].values()) and report["coopos"] and report["gevent"] and report["loop"] and report["platform"]


@pytest.mark.parametrize(
    "broken",
    [
        "_core.nb_read = lambda fd, n: b'wrong'",
        "_core.nb_read = lambda fd, n: gevent.sleep(1000)",
        "_core.waitpid = lambda pid, options: (pid, 0)",
        "_core.close = lambda fd: None",
        "_doctor.PATCHING = 'assert False'",
        "_doctor.MULTIPROCESSING = 'gevent.sleep(1000)'",
        "import coopos.subprocess; coopos.subprocess.Popen.__init__ = None",
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
    assert re.search(r"^regular file  *(ok|fallback)", output, re.MULTILINE)


def test_doctor_says_what_multiprocessing_lacks_without_semaphores():
    """As in a container without /dev/shm: that is no fault of coopos, and the rest works."""
    output = run_script("""
        from coopos import _doctor
        broken = "import multiprocessing.synchronize as s\\ndef no(*_, **__): raise OSError(38, 'no')\\ns.Lock = no\\n"
        _doctor.MULTIPROCESSING = broken + _doctor.MULTIPROCESSING
        print(_doctor.check_multiprocessing(), "|", _doctor.check_multiprocessing().advice)
    """)
    assert output.startswith("pipes and processes, no locks") and "/dev/shm" in output


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


@pytest.mark.parametrize("kind", ["script", "module", "code"])
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
    program = {"script": ["program.py"], "module": ["-m", "program"], "code": ["-c", source]}[kind]
    done = python("-m", "coopos", *program, cwd=tmp_path)
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


# ---- code --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "-P"])
def test_code_sees_what_it_would_see(tmp_path, options):
    """The same for -c: argv, sys.path and all that is in ``__main__``, to the end."""
    if options and sys.version_info < (3, 11):
        pytest.skip("no -P here")
    code = SHOW.replace("__file__", "None")
    plain = python(*options.split(), "-c", code, "one", "-m", "-h", cwd=tmp_path, COOPOS_PATCH=None)
    under = python(*options.split(), "-m", "coopos", "-c", code, "one", "-m", "-h", cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert (under.stdout.splitlines(), under.stderr, under.returncode) == (plain.stdout.splitlines(), "", 0)
    tell = told("-m", "coopos", "-c", TELL, cwd=tmp_path)
    assert (tell["patched"], tell["monkey"], tell["argv"]) == (PATCHED, True, ["-c"])


@pytest.mark.parametrize("code", ["1/0", "def f():\n    raise ValueError\nf()", "  x = 1\n  print(x)", "x ="])
def test_code_that_fails_says_what_it_would_say(tmp_path, code):
    """The last lines of the traceback, with the source line where Python shows it; and indented code from Python 3.14 on."""
    plain = python("-c", code, cwd=tmp_path, COOPOS_PATCH=None)
    under = python("-m", "coopos", "-c", code, cwd=tmp_path)
    assert (under.returncode, under.stdout) == (plain.returncode, plain.stdout)
    last = plain.stderr.splitlines()[1:]
    assert under.stderr.splitlines()[-len(last):] == last if last else under.stderr == ""


# ---- words -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-m nothing_of_that_name", "nothing_of_that_name"),
        ("-m", "-m needs the name of a module"),
        ("-c", "-c needs code"),
        ("--no-io", "--no-io needs a program"),
        ("--no-io -m", "-m needs the name of a module"),
        ("-x", "unknown option -x: there are --no-io, -m, -c, --help and --version"),
        ("--no_io script.py", "unknown option --no_io: did you mean --no-io?"),
        ("--no-io --verison", "unknown option --verison: did you mean --version?"),
        ("docter", "'docter' is no command either: did you mean doctor?"),
        ("benchmark", "'benchmark' is no command either: did you mean bench?"),
        ("something", "'something' is no command either: there are doctor and bench"),
        ("doctor --jsn", "unrecognized arguments: --jsn"),
        ("doctor now", "usage: python -m coopos doctor [-h] [--json]"),
        ("", "usage: python -m coopos"),
    ],
)
def test_wrong_command_line(tmp_path, arguments, message):
    """The exit status isn't 0, nothing is printed, and the message names the right words."""
    done = python("-m", "coopos", *arguments.split(), cwd=tmp_path)
    assert done.returncode == (1 if "nothing" in arguments else 2) and not done.stdout
    assert message in done.stderr


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(tmp_path, option):
    """It is printed, it is no failure, and it names every command and option."""
    from coopos import __main__

    done = python("-m", "coopos", option, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, __main__.HELP, "")
    for word in __main__.COMMANDS + __main__.OPTIONS:
        assert re.search(rf"^  .*(?<!\S){word}\b", __main__.HELP, re.MULTILINE), word
    assert max(map(len, __main__.HELP.splitlines())) <= 90


@pytest.mark.parametrize("command", ["doctor", "bench"])
def test_help_of_a_command(tmp_path, command):
    done = python("-m", "coopos", command, "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m coopos {command}") and "--json" in done.stdout


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version(tmp_path, option):
    import gevent

    import coopos

    done = python("-m", "coopos", option, cwd=tmp_path)
    assert re.fullmatch(rf"coopos {re.escape(coopos.__version__)}, gevent {gevent.__version__}, CPython \S+\n", done.stdout)


def test_script_that_is_called_like_a_command(tmp_path):
    write(tmp_path / "doctor", "print('a script')")
    assert python("-m", "coopos", "./doctor", cwd=tmp_path).stdout == "a script\n"
