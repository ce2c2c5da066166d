"""Run one outside suite in this interpreter and print what became of it, as one JSON object, on standard output.

    python run_suite.py [--patch none|gevent|coopos] [--excluded] MODULE

`--patch` says what lies under the tests: `none` is the plain interpreter, the baseline; `gevent` is
`gevent.monkey.patch_all()` alone, to see what gevent does by itself (it may hang: run it under a timeout);
`coopos`, the default, is that plus `coopos.patch()`, for some suites with the arguments that the table gives.
`--excluded` runs only the tests that the table leaves out.
GEVENT_LOOP and COOPOS_CHILDREN work as everywhere.

Invariants: nothing is imported before the patches that a monkey-patched program would import after them, so the
standard library's modules that are bound at import time (pty, unittest, tempfile) see the patched names;
whatever the tests print goes to standard error; the exit status is 0 when the suite ran to its end, whether or
not its tests passed: the judgement is the caller's.
"""

import argparse
import sys

from suites import PATCH_ARGUMENTS, PROCESS_SUITES, PROCESS_TEST_LIMIT_S, SUITES

#: {top-level package: what to do where a suite is not installed}
HOW_TO_INSTALL = {
    "gevent": "gevent's wheels bring its tests: install gevent from PyPI",
    "test": "install CPython's tests (Debian: libpython3.N-testsuite; Fedora: python3-test; Alpine: python3-tests)",
}


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", metavar="MODULE", help="a module named in suites.py")
    parser.add_argument("--patch", choices=["none", "gevent", "coopos"], default="coopos")
    parser.add_argument("--excluded", action="store_true", help="run only the tests that the table leaves out")
    return parser.parse_args(argv)


def install_patches(patch, arguments):
    """Put *patch* under this interpreter; with coopos, *arguments* are its own, and make sure that it really lies there."""
    if patch == "none":
        return
    import os

    if patch == "gevent":
        # Set, it would bring coopos in with patch_all(), and this mode shows gevent without it.
        os.environ.pop("COOPOS_PATCH", None)

    from gevent import monkey

    monkey.patch_all()
    if patch == "coopos":
        import gevent.os

        import coopos

        coopos.patch(**arguments)
        # A patch() that did nothing would leave gevent's own suites green.
        for name in coopos.__implements__:
            assert getattr(os, name) is getattr(coopos, name), f"os.{name} is not coopos's"
            assert getattr(gevent.os, name) is getattr(coopos, name), f"gevent.os.{name} is not coopos's"
        assert gevent.os.nb_read is coopos.nb_read, "gevent.os.nb_read is not coopos's"


def fill_holes():
    """Leave no free descriptor below those of the hub: CPython's test_os looks for two free ones in a row, or skips tests."""
    import os

    import gevent

    gevent.sleep(0)
    highest = max(map(int, os.listdir("/dev/fd")))
    while os.open(os.devnull, os.O_RDONLY) < highest:
        pass


def substitute_files():
    """Have gevent's tests of its file object make coopos.fdopen's files instead."""
    import io
    import os

    import gevent
    import gevent.fileobject
    from gevent.tests.test__fileobject import TestFileObjectPosix

    import coopos

    def make_file(file, mode="r", bufsize=-1, close=True, **kwargs):
        """With the arguments of gevent's, which takes paths and file objects, too."""
        kwargs.setdefault("buffering", bufsize)
        if isinstance(file, (str, bytes)):
            flags = []
            io.FileIO(file, mode.replace("t", ""), opener=lambda _path, bits: flags.append(bits) or os.dup(1)).close()
            return coopos.fdopen(coopos.open(file, flags[0], 0o666), mode, **kwargs)
        # A file object closes its own descriptor.
        fd = file if isinstance(file, int) else os.dup(file.fileno())
        return coopos.fdopen(fd, mode, closefd=close or fd != file, **kwargs)

    gevent.fileobject.FileObjectPosix = make_file
    TestFileObjectPosix.WORKS_WITH_REGULAR_FILES = True  # with libuv, gevent's doesn't
    # These tests close descriptors again that their file objects have closed. Made in between, as it would be by the first file
    # that has to wait, the hub would find its own among them.
    gevent.sleep(0)


def lengthen_guard():
    """Give each test of gevent's the time that gevent gives it on a busy machine: 15 s, not 2, until it counts as hung."""
    from gevent.testing import params
    from gevent.testing.testcase import TestCase

    # Not by pretending to be one of gevent's CI services: there a test that fails is skipped instead.
    TestCase.__timeout__ = params.CI_TIMEOUT


def test_name(test, module):
    """The id of *test* without its module; of a subtest, that of the test it belongs to."""
    return getattr(test, "test_case", test).id().removeprefix(module + ".")


def each_test(suite):
    """The single tests of *suite*, however deep they are nested."""
    import unittest

    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from each_test(test)
        else:
            yield test


def pick_tests(module, excluded_names, only_excluded):
    """The tests of *module* to be run, as a TestSuite. LookupError: a left-out name that the suite does not have."""
    import importlib
    import unittest

    if module.startswith("gevent."):
        lengthen_guard()
    all_tests = unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module(module))
    by_name = {test_name(test, module): test for test in each_test(all_tests)}
    unknown = sorted(excluded_names - by_name.keys())
    if unknown:
        raise LookupError(f"{module} has no {', '.join(unknown)}: correct the table")
    # The suite's order is kept: TestSuite calls class and module fixtures between neighbours.
    return unittest.TestSuite(test for name, test in by_name.items() if (name in excluded_names) == only_excluded)


def collect_warnings():
    """The warnings that CPython's test.support prints from now on, a list that grows.

    Its flag environment_altered says less: on Python 3.10 any monkey-patched thread sets it, too.
    """
    collected = []
    support = sys.modules.get("test.support")
    if support is not None:
        print_warning = support.print_warning

        def collect(message):
            collected.append(message)
            print_warning(message)

        support.print_warning = collect
        vars(collect).update(vars(print_warning))  # newer ones keep the stream in an attribute of the function
    return collected


class TookTooLong(BaseException):
    """A test that would hang for ever has failed."""


class TestAlarm:
    """Ends a test that runs for longer than *limit_s*, so that its suite goes on: one that waits, or one that never does."""

    def __init__(self, limit_s):
        import signal

        self.limit_s = limit_s
        self.set_timer = lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
        self.has_rung = False
        self.main = None
        if "gevent" in sys.modules:
            import greenlet

            self.main = greenlet.getcurrent()
        signal.signal(signal.SIGALRM, self.ring)

    def start(self):
        self.has_rung = False
        self.set_timer(self.limit_s)

    def stop(self):
        self.set_timer(0)

    def ring(self, _signal, _frame):
        import faulthandler

        self.has_rung = True
        faulthandler.dump_traceback(all_threads=True)
        self.set_timer(5)  # again, should it go on all the same
        error = TookTooLong(f"after {self.limit_s} s")
        if self.main is not None:
            import gevent.hub
            import greenlet

            if greenlet.getcurrent() is gevent.hub.get_hub():
                gevent.hub.get_hub().loop.run_callback(self.main.throw, error)
                return
        raise error


def run_tests(tests, module, limit_s=None):
    """Run *tests*, each for *limit_s* at most, if it is given.

    The outcome is {"passed": [name …], "failed": {name: traceback}, "skipped": {name: reason}}.
    """
    import unittest

    started = []

    class Result(unittest.TextTestResult):
        def startTest(self, test):  # noqa: N802 (unittest's name)
            started.append(test_name(test, module))
            super().startTest(test)
            if limit_s:
                alarm.start()

        def stopTest(self, test):  # noqa: N802
            if limit_s:
                alarm.stop()
                if alarm.has_rung and not any(test is failed for failed, _ in self.failures + self.errors):
                    self.failures.append((test, f"took longer than {limit_s} s"))
            super().stopTest(test)

    alarm = TestAlarm(limit_s) if limit_s else None

    # Verbose, so that after a hang the last line of standard error names the test.
    runner = unittest.TextTestRunner(stream=sys.stderr, verbosity=2, resultclass=Result)
    result = runner.run(tests)

    failed = {test_name(test, module): text for test, text in result.failures + result.errors}
    for test in result.unexpectedSuccesses:
        failed[test_name(test, module)] = "unexpected success"
    skipped = {test_name(test, module): reason for test, reason in result.skipped}
    passed = [name for name in started if name not in failed and name not in skipped]
    return {"passed": passed, "failed": failed, "skipped": skipped}


def describe_environment():
    """What the outcome depends on: versions, the loop and how children are watched."""
    import os
    import platform

    about = {"python": platform.python_version(), "children": os.environ.get("COOPOS_CHILDREN", "")}
    if "gevent" in sys.modules:
        import gevent

        about["gevent"] = gevent.__version__
        about["loop"] = gevent.config.loop.__module__
    return about


def main(argv):
    args = parse_args(argv)
    install_patches(args.patch, PATCH_ARGUMENTS.get(args.module, {}))
    if args.patch == "coopos" and args.module == "gevent.tests.test__fileobject":
        substitute_files()
    if args.patch == "coopos" and args.module == "test.test_os":
        fill_holes()

    # Only from here on: see the invariants above.
    import faulthandler
    import json
    import os
    import signal
    import unittest

    # The caller of a hung run asks where it hangs before ending it. A watchdog thread here would be one more
    # thread for every fork in the suite.
    faulthandler.register(signal.SIGUSR1, all_threads=True)

    report_fd = os.dup(1)
    os.dup2(2, 1)

    excluded = (SUITES | PROCESS_SUITES)[args.module]
    report = {"module": args.module, "patch": args.patch, "unavailable": None, "excluded": excluded}
    report |= {"passed": [], "failed": {}, "skipped": {}, "left_children": False}
    try:
        tests = pick_tests(args.module, excluded.keys(), args.excluded)
    except ModuleNotFoundError as exc:
        report["unavailable"] = f"{exc}; {HOW_TO_INSTALL[args.module.partition('.')[0]]}"
    except unittest.SkipTest as exc:
        report["unavailable"] = f"it skips itself: {exc}"
    else:
        warnings = collect_warnings()
        report.update(run_tests(tests, args.module, PROCESS_TEST_LIMIT_S if args.module in PROCESS_SUITES else None))
        # Whether a waitpid(-1) found children that nobody had waited for; regrtest, too, holds that against a suite.
        report["left_children"] = any("reap_children" in warning for warning in warnings)
    report.update(describe_environment())

    sys.stdout.flush()
    with open(report_fd, "w") as stream:
        json.dump(report, stream, indent=1)
        stream.write("\n")


if __name__ == "__main__":
    main(sys.argv[1:])
