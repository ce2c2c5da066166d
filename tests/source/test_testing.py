"""coopos.testing, the plug-in for pytest: run by pytest, in an interpreter of its own, on files of small tests."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from coopos import testing

from ..helpers.children import living_child
from ..helpers.support import DEADLINE_S, kill_group, run_script

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "recipes" / "testing.rst"
PRELUDE = """
import gc, logging, os, signal, socket, subprocess, sys, time
import gevent, gevent.event, gevent.socket, gevent.subprocess, pytest
import coopos

kept = []

def serve(seconds):
    gevent.sleep(seconds)

def spawn(name, *arguments):
    return os.posix_spawnp(name, [name, *arguments], os.environ)
"""


class Run:
    """What a run of pytest said of each test."""

    def __init__(self, returncode, out, err):
        self.returncode, self.output = returncode, out + err
        sections = re.split(r"^_+ (?:ERROR at \w+ of )?(\w+) _+$|^=+ .* =+$", out, flags=re.MULTILINE)
        self.said = {}
        for name, text in zip(sections[1::2], sections[2::2], strict=True):
            if name:
                self.said[name] = self.said.get(name, "") + text
        outcomes = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED|XFAIL) \S*?::(\w+)", out, re.MULTILINE)
        self.outcomes = {}
        for outcome, name in outcomes:
            self.outcomes.setdefault(name, set()).add(outcome)

    @property
    def accused(self):
        return {name for name, text in self.said.items() if "left behind" in text}


def run_pytest(directory, source, *arguments, conftest="", ini="", **env):
    """Run *source* as a file of tests, with the plug-in, warnings being errors."""
    directory.joinpath("test_it.py").write_text(textwrap.dedent(PRELUDE) + textwrap.dedent(source))
    directory.joinpath("conftest.py").write_text(textwrap.dedent(conftest))
    directory.joinpath("pytest.ini").write_text("[pytest]\n" + ini)
    command = [sys.executable, "-W", "error", "-m", "pytest", "-p", "coopos.testing", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [*command, "-rA", "--strict-markers", *arguments],
        cwd=directory,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    with process:
        try:
            out, err = process.communicate(timeout=DEADLINE_S * 2)
        finally:
            kill_group(process.pid)
    return Run(process.returncode, out, err)


# ---- what is found -----------------------------------------------------------------------------------------------------------

#: {name: (a test that leaves something behind, what is said of it)}; nothing else is said.
LEAKS = {
    "pipe": ("kept.append(os.pipe())", r"descriptor \d+: pipe:\[\d+\]\ndescriptor \d+: pipe:\[\d+\]"),
    "file": ("kept.append(open(os.devnull))", r"descriptor \d+: device /dev/null"),
    "socket": ("kept.append(socket.create_server(('127.0.0.1', 0)))", r"descriptor \d+: socket 127\.0\.0\.1:\d+"),
    "closed": ("os.close(wide)", r"descriptor \d+, open before the test, was closed: pipe:\[\d+\]"),
    "zombie": ("os.waitid(os.P_PID, spawn('true'), os.WEXITED | os.WNOWAIT)", r"child \d+, a zombie: \[true\]"),
    "running": ("spawn('sleep', '1000')", r"child \d+, running: sleep 1000"),
    "watched": ("coopos.posix_spawnp('sleep', ['sleep', '1000'], os.environ)", r"child \d+, running: sleep 1000"),
    "popen": ("kept.append(gevent.subprocess.Popen(['sleep', '1000']))", r"child \d+, running: sleep 1000"),
    "sleeping": (
        "gevent.spawn(serve, 1000)",
        r"greenlet <Greenlet at \w+: serve\(1000\)> waits:\n  spawned by test_sleeping, \S+test_it.py, line \d+\n"
        r"  File \"\S+test_it.py\", line \d+, in serve\n    gevent\.sleep\(seconds\)\n(  .*\n?)*",
    ),
    "raw": ("gevent.spawn_raw(serve, 1000)", r"greenlet <.*> waits:\n  File \"\S+test_it.py\", line \d+, in serve\n(  .*\n?)*"),
    "waiting": (
        "gevent.spawn(gevent.event.Event().wait)",
        r"greenlet <Greenlet .*> waits:\n  spawned by test_waiting.*\n(  .*\n?)*",
    ),
    "busy": ("gevent.spawn(lambda: [gevent.sleep(0) for _ in iter(int, 1)])", r"greenlet <Greenlet .*> waits:\n(  .*\n?)*"),
    "reading": ("gevent.spawn(coopos.nb_read, wide, 1)", r"greenlet <Greenlet at \w+: nb_read\(\d+, 1\)> waits:\n(  .*\n?)*"),
    "timer": ("kept.append(gevent.get_hub().loop.timer(1000)); kept[-1].start(print)", r"watcher <timer at .*>"),
    "io": ("kept.append(gevent.get_hub().loop.io(wide, 1)); kept[-1].start(print)", r"watcher <io at .*>"),
    "signal": ("kept.append(gevent.get_hub().loop.signal(signal.SIGUSR1)); kept[-1].start(print)", r"watcher <signal at .*>"),
}
LEAKING = """
@pytest.fixture(scope="module")
def wide():
    reader, writer = os.pipe()
    yield reader
    os.close(writer)
""" + "".join(
    f"\ndef test_{name}({'wide' if 'wide' in source else ''}):\n    {source}\n"
    for name, (source, _said) in sorted(LEAKS.items(), key=lambda item: item[0] == "closed")
)
# What is Linux's: the names of what has no path.
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc")


@pytest.fixture(scope="module")
def leaking(tmp_path_factory):
    return run_pytest(tmp_path_factory.mktemp("leaking"), LEAKING)


@needs_proc
@pytest.mark.parametrize("name", sorted(LEAKS))
def test_leftover_is_named(leaking, name):
    """The test fails, and the message names what it left, and nothing else."""
    assert leaking.outcomes[f"test_{name}"] >= {"ERROR"}, leaking.output
    said = leaking.said[f"test_{name}"].strip()
    assert re.fullmatch(f"left behind:\n{LEAKS[name][1]}", said), said


def test_leftover_is_ended_before_the_next_test(tmp_path):
    """A child is killed and collected, a greenlet killed; none of it is the next test's."""
    run = run_pytest(
        tmp_path,
        """
        def test_leaks():
            kept.extend([spawn("sleep", "1000"), gevent.spawn(serve, 1000)])

        def test_next():
            with pytest.raises(ProcessLookupError):
                os.kill(kept[0], 0)
            assert kept[1].dead
        """,
    )
    assert run.accused == {"test_leaks"}, run.output
    assert run.outcomes["test_next"] == {"PASSED"}, run.output


def test_failed_test_is_not_accused(tmp_path):
    """Its traceback keeps what it made; nor is the test accused in which that is closed at last."""
    run = run_pytest(
        tmp_path,
        """
        class Pipe:
            def __init__(self):
                self.fds = os.pipe()

            def __del__(self):
                for fd in self.fds:
                    os.close(fd)

        def test_fails():
            pipe = Pipe()
            assert not pipe

        def test_next():
            gc.collect()

        @pytest.mark.xfail(strict=True)
        def test_fails_as_expected():
            pipe = Pipe()
            assert not pipe
        """,
    )
    assert run.outcomes == {"test_fails": {"FAILED"}, "test_next": {"PASSED"}, "test_fails_as_expected": {"XFAIL"}}, run.output


def test_cycle_that_a_collection_frees_is_nothing(tmp_path):
    run = run_pytest(
        tmp_path,
        """
        class Pipe:
            def __init__(self):
                self.fds, self.itself = os.pipe(), self

            def __del__(self):
                for fd in self.fds:
                    os.close(fd)

        def test_cycle():
            Pipe()
        """,
    )
    assert run.outcomes == {"test_cycle": {"PASSED"}}, run.output


# ---- what is not a test's ----------------------------------------------------------------------------------------------------

CLEAN = """
@pytest.fixture(scope="session")
def service():
    reader, writer = os.pipe()
    child, greenlet = spawn("sleep", "1000"), gevent.spawn(serve, 1000)
    timer = gevent.get_hub().loop.timer(1000)
    timer.start(print)
    yield reader
    timer.stop()
    timer.close()
    greenlet.kill()
    os.kill(child, 9)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)

@pytest.fixture(scope="module", params=[1, 2])
def stream(request):
    with open(os.devnull) as file:
        yield file

def test_first():
    pass

def test_service(service):
    with gevent.Timeout(0.001, False):
        coopos.nb_read(service, 1)

def test_service_again(service):
    pass

def test_stream(stream):
    assert stream.read() == ""

def test_programs():
    subprocess.run(["true"], check=True)
    coopos.waitpid(coopos.posix_spawnp("true", ["true"], os.environ), 0)
    spawned = gevent.spawn(gevent.subprocess.call, ["true"])
    assert spawned.get() == 0

def test_fork_with_a_callback():
    ended = gevent.event.Event()
    pid = coopos.fork_and_watch(lambda child: ended.set())
    if pid == 0:
        os._exit(0)
    assert ended.wait(30)

def test_files(tmp_path, capfd, caplog):
    with open(tmp_path / "file", "w") as file:
        coopos.fsync(file)
    print("captured")
    logging.getLogger("a.b").warning("logged")

def test_log_that_is_opened_late(late_log):
    logging.getLogger("late").warning("something")

def test_threadpool():
    gevent.get_hub().threadpool.map(time.sleep, [0.01] * 5)
    gevent.socket.getaddrinfo("127.0.0.1", 80)

def test_helpers_of_multiprocessing():
    from multiprocessing import get_context
    process = get_context("forkserver").Process(target=print)
    process.start()
    process.join()
    process.close()

def test_greenlet_that_has_only_to_go_on():
    event = gevent.event.Event()
    gevent.spawn(event.wait)
    gevent.sleep(0)
    event.set()
"""
LATE_LOG = """
import logging, logging.handlers, os, pytest

@pytest.fixture
def late_log():
    assert logging.getLogger("late").handlers

logging.getLogger("late").addHandler(logging.FileHandler(os.devnull, delay=True))
kept = logging.handlers.MemoryHandler(1, target=logging.FileHandler(os.devnull, delay=True))
logging.getLogger("late").addHandler(kept)
"""


@pytest.mark.parametrize("argument", ["--log-file=log", "--capture=no"])
def test_clean_test_passes(tmp_path, argument):
    """Fixtures of a wider scope, pytest's own descriptors and what is made once and kept are no test's."""
    run = run_pytest(tmp_path, CLEAN, argument, conftest=LATE_LOG, COOPOS_KEEP_GREENLETS="0")
    assert run.returncode == 0 and run.outcomes.keys() == set(re.findall(r"def (test_\w+)", CLEAN)), run.output


def test_clean_test_passes_in_a_patched_program(tmp_path):
    """The plug-in is imported first, and patch_all() and patch(io=True) find nothing changed."""
    conftest = "from gevent import monkey; monkey.patch_all()\nimport coopos; coopos.patch(io=True)\n" + LATE_LOG
    run = run_pytest(tmp_path, CLEAN, "-W", "ignore::DeprecationWarning", conftest=conftest, COOPOS_KEEP_GREENLETS="0")
    assert run.returncode == 0, run.output


def test_leftover_is_found_by_the_workers_of_xdist(tmp_path):
    pytest.importorskip("xdist")
    run = run_pytest(
        tmp_path,
        """
        @pytest.mark.parametrize("number", range(4))
        def test_leaks(number):
            os.pipe()

        @pytest.mark.parametrize("number", range(4))
        def test_clean(number):
            subprocess.run(["true"], check=True)
        """,
        "-n2",
    )
    assert run.outcomes["test_clean"] == {"PASSED"} and "4 errors" in run.output, run.output


# ---- what a test may leave ---------------------------------------------------------------------------------------------------

LEAVES_ALL = """
def leave():
    kept.extend([os.pipe(), spawn("sleep", "1000"), gevent.spawn(serve, 1000), gevent.get_hub().loop.timer(1000)])
    kept[-1].start(print)

@pytest.fixture(scope="module", autouse=True)
def end():
    yield
    for thing in kept:
        if isinstance(thing, int):
            os.kill(thing, 9)
            os.waitpid(thing, 0)
"""


def test_mark_allows_leftovers(tmp_path):
    """All of them, or those it names. What is allowed is not ended."""
    run = run_pytest(
        tmp_path,
        LEAVES_ALL
        + """
@pytest.mark.coopos_leaves
def test_all():
    leave()

def test_still_there():
    os.kill(kept[1], 0)
    assert not kept[2].dead and kept[3].active

@pytest.mark.coopos_leaves("greenlets", "children")
@pytest.mark.coopos_leaves("watchers")
def test_some():
    leave()
""",
    )
    assert run.outcomes["test_all"] == run.outcomes["test_still_there"] == {"PASSED"}, run.output
    assert run.accused == {"test_some"}, run.output
    assert re.fullmatch(r"left behind:\n(descriptor .*\n?){2}", run.said["test_some"].strip()), run.output


def test_setting_allows_leftovers(tmp_path):
    ini = "coopos_leaves = descriptors children greenlets\n"
    run = run_pytest(tmp_path, LEAVES_ALL + "def test_all():\n    leave()\n", ini=ini)
    assert re.fullmatch(r"left behind:\nwatcher <timer at .*>", run.said["test_all"].strip()), run.output


@pytest.mark.parametrize(
    ("source", "ini"), [("@pytest.mark.coopos_leaves('files')", ""), ("", "coopos_leaves = files\n")], ids=["mark", "setting"]
)
def test_unknown_kind_is_refused(tmp_path, source, ini):
    run = run_pytest(tmp_path, f"{source}\ndef test_it():\n    pass\n", ini=ini)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "'files' is none of descriptors, children, watchers, greenlets" in run.output
    assert ("::test_it: coopos_leaves: " if source else "coopos_leaves, in the configuration: ") in run.output


# ---- how it looks ------------------------------------------------------------------------------------------------------------


def test_children_where_there_is_no_proc(monkeypatch):
    """ps(1) says the same, and is itself no child."""
    if shutil.which("ps") is None:
        pytest.skip("no ps")
    with living_child(os.posix_spawn, script="read line; exit 7; :") as (pid, end):
        expected = testing.children()
        assert list(expected) == [pid]
        monkeypatch.setattr(testing, "PROC", "/nowhere")
        assert testing.children() == expected
        end()
        os.waitpid(pid, 0)
    assert testing.children() == {}


def test_watcher_is_seen_while_it_is_active():
    """Not after stop(), nor when its loop was destroyed under it."""
    run_script("""
        import gevent
        from coopos.testing import active_watchers
        timer = gevent.get_hub().loop.timer(1000)
        assert timer not in active_watchers()
        timer.start(print)
        assert timer in active_watchers()
        gevent.get_hub().destroy(destroy_loop=True)
        assert timer not in active_watchers()
        """)


def test_import_of_coopos_does_not_import_it():
    """Nor pytest; and the plug-in needs nothing else that is not the standard library's."""
    run_script("""
        import sys, coopos
        assert not {"coopos.testing", "pytest"} & set(sys.modules)
        import coopos.testing
        assert "psutil" not in sys.modules
        """)


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside the tests")
@needs_proc
def test_example_of_the_page(tmp_path):
    """docs/recipes/testing.rst: its tests pass without the plug-in, and are accused of what it says, but for the numbers."""
    source, said = re.findall(r"code-block:: (?:python|text)\n\n((?:   .*\n|\n)+)", PAGE.read_text())[:2]
    source, said = textwrap.dedent(source), textwrap.dedent(said)
    without = run_pytest(tmp_path, source, "-p", "no:coopos.testing", "-W", "ignore")
    assert without.outcomes == {"test_answer": {"PASSED"}, "test_program": {"PASSED"}}, without.output
    run = run_pytest(tmp_path, source, "-W", "ignore::ResourceWarning")

    def without_numbers(text):
        return re.sub(r"0x\w+|\d+|\S*/test_\w+\.py", "N", text).strip()

    for name, text in re.findall(r"ERROR at teardown of (\w+) _+\n((?:[^_].*\n?)+)", said):
        assert without_numbers(run.said[name]).startswith(without_numbers(text)), run.said[name]
