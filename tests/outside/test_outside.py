"""gevent's and CPython's own tests pass over coopos what they pass without it.

Each suite of the table runs twice, each time in a fresh interpreter and under a time limit: as it is (the
baseline: gevent's suites over gevent, CPython's over plain CPython) and under gevent.monkey plus coopos.patch().
What the baseline passes must pass over coopos; what fails in the baseline, on this machine, is not held against
coopos and is named in pytest's summary. The children inherit the environment, so GEVENT_LOOP and COOPOS_CHILDREN
choose what is tested. The suites of multiprocessing, which take long, run with --processes, and then alone.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLES = runpy.run_path(str(HERE / "suites.py"))
SUITES, PROCESS_SUITES = TABLES["SUITES"], TABLES["PROCESS_SUITES"]

#: The longest suite takes about 35 s. A guard against hangs; two of them end before the deadline of a whole test.
TIME_LIMIT_S = 150
#: Those of multiprocessing have a limit for each test, too.
PROCESS_TIME_LIMIT_S = 900

#: How long a hung interpreter has to print its traceback.
DUMP_GRACE_S = 1


def run_suite(module, patch, directory, *options):
    """Run *module* over *patch* in a fresh interpreter with *directory* as its own; the runner's report."""
    limit_s = PROCESS_TIME_LIMIT_S if module in PROCESS_SUITES else TIME_LIMIT_S
    # Files, not pipes: a grandchild that outlives the run would hold a pipe open.
    report_path, log_path = directory / f"{patch}.json", directory / f"{patch}.log"
    with open(report_path, "wb") as stdout, open(log_path, "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "run_suite.py"), "--patch", patch, *options, module],
            cwd=directory,
            # Not a terminal: test_pty changes the size of the one it finds, and expects less of itself then.
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            # A group of its own, to be ended with the children it started.
            start_new_session=True,
        )
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        # Ask where it hangs: the answer goes to the log.
        process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(DUMP_GRACE_S)
        pytest.fail(f"{module} over {patch}: hung for {limit_s} s\n{read_log(log_path)}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode != 0:
        pytest.fail(f"{module} over {patch}: exit status {process.returncode}\n{read_log(log_path)}")
    return json.loads(report_path.read_text())


def read_log(path):
    return path.read_text(errors="backslashreplace")


def skip_unavailable(report, record_property):
    """Skip, and say so in the summary, when the suite of *report* cannot be run here."""
    if report["unavailable"] is not None:
        reason = f"{report['module']} NOT RUN: {report['unavailable']}"
        record_property("outside suite", reason)
        pytest.skip(reason)


def test_suite_passes_what_it_passes_unpatched(module, tmp_path, record_property):
    """Whatever the suite passes by itself it passes over coopos, and it skips nothing more."""
    baseline = run_suite(module, "none", tmp_path)
    skip_unavailable(baseline, record_property)
    outcome = run_suite(module, "coopos", tmp_path)

    excused = sorted(baseline["failed"])
    record_property(
        "outside suite",
        f"{module}: {len(outcome['passed'])} passed over coopos, {len(outcome['failed'])} failed, "
        f"{len(outcome['skipped'])} skipped, {len(outcome['excluded'])} left out by name"
        + "".join(f"\n  fails without coopos, too, on this machine: {name}" for name in excused),
    )

    assert outcome["passed"], "no test ran"
    broken = sorted(outcome["failed"].keys() - baseline["failed"].keys())
    assert not broken, "\n".join(f"{name}: {outcome['failed'][name]}" for name in broken)
    assert outcome["skipped"].keys() <= baseline["skipped"].keys(), "skips that the suite does not make by itself"
    assert set(baseline["passed"]) <= set(outcome["passed"]), "the same tests, all of them"
    may_be_told = baseline["left_children"] or module in TABLES["STILL_TOLD"]
    assert outcome["left_children"] <= may_be_told, "waitpid(-1) still gives children that were waited for"


def test_left_out_tests_still_cannot_pass(module, tmp_path, record_property):
    """A left-out test that passes over coopos no longer belongs in the table."""
    outcome = run_suite(module, "coopos", tmp_path, "--excluded")
    skip_unavailable(outcome, record_property)
    left_out = (SUITES | PROCESS_SUITES)[module].keys()
    assert outcome["failed"].keys() | TABLES["MAY_PASS"] & left_out == left_out, "take out of the table what passes or is skipped"


#: Suites of gevent's that are programs: they run when they are imported, and raise.
SCRIPTS = ["gevent.tests.test__subprocess_poll", "gevent.tests.test__subprocess_interrupted"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_runs_to_its_end(script, request):
    if request.config.getoption("--processes"):
        pytest.skip("not one of multiprocessing's")
    patch = "from gevent import monkey; monkey.patch_all(); import coopos; coopos.patch()"
    done = subprocess.run([sys.executable, "-c", f"{patch}; import {script}"], capture_output=True, text=True, timeout=TIME_LIMIT_S)
    assert (done.returncode, done.stderr) == (0, "")
