"""The table of outside suites: whose tests coopos runs, and which single tests it leaves out.

A suite is a module of gevent's or CPython's own tests, run as it is installed, never copied or edited. A test
that cannot pass over coopos is named here with the reason, and only here; the runner leaves out nothing else.
Two things keep the table honest: `run_suite.py` refuses a name that the suite does not have, and
`test_outside.py` runs the left-out tests by themselves and fails when one of them passes.
"""

import sys

_MOCKS_PRIVATE_NAMES = (
    "puts mocks in place of gevent.os's private _read, _write and get_hub and counts the calls made to them; "
    "a compiled nb_read and nb_write call read(2) and write(2)"
)

_NAMELESS = (
    "makes a file object over a Python object that has no name, and expects it to have none; a file that coopos.fdopen "
    "makes has its descriptor's number for a name, as os.fdopen's"
)

#: {module: {test id, without the module: why it is left out}}
SUITES = {
    "gevent.tests.test__os": {
        "TestOS_nb.test_event_closed_on_read": _MOCKS_PRIVATE_NAMES,
        "TestOS_nb.test_event_closed_on_read_error": _MOCKS_PRIVATE_NAMES,
        "TestOS_nb.test_event_closed_on_write": _MOCKS_PRIVATE_NAMES,
        "TestOS_nb.test_event_closed_on_write_error": _MOCKS_PRIVATE_NAMES,
    },
    "gevent.tests.test__fileobject": {
        "TestFileObjectPosix.test_seek_raises_ioerror": "asks for gevent's private attribute fileio",
        "TestFileObjectPosix.test_name_after_close": _NAMELESS,
    },
    "gevent.tests.test__subprocess": {
        "TestPopen.test_subprocess_in_native_thread": (
            "asserts gevent's own limit, that a native thread cannot start a child process; over coopos it can"
        ),
    },
    "test.test_pty": {},
    "test.test_popen": {},
    "test.test_fork1": {},
    "test.test_wait3": {},
    "test.test_wait4": {},
}

_NEVER_WAITS = "one of its threads never waits, and is a greenlet here: nobody else runs, and it isn't told to end"

_GEVENTS_QUEUE = "multiprocessing.dummy polls a queue.Queue by its not_empty, which gevent's queue.Queue doesn't have"
_GEVENTS_LOCK = "wants None of the release() of threading.Lock; gevent's, which is there, returns a number"
_GEVENTS_SLEEP = "wants time.sleep not to be marshalled by XML-RPC; gevent's, which is there, is a function of Python and is"

#: {test id, without the module: why it is left out}; in brackets, with which start method alone. With the others a manager's server
#: is a fresh interpreter, which isn't patched.
_LEFT_OUT_OF_MULTIPROCESSING = {
    "WithProcessesTestFinalize.test_thread_safety": _NEVER_WAITS,
    "WithThreadsTestConnection.test_connection": _GEVENTS_QUEUE,
    "WithThreadsTestPoll.test_dont_merge": _GEVENTS_QUEUE,
    "WithThreadsTestPoll.test_strings": _GEVENTS_QUEUE,
    "WithThreadsTestLock.test_lock": _GEVENTS_LOCK,
    "WithManagerTestLock.test_lock[fork]": _GEVENTS_LOCK,
    "WithManagerTestRemoteManager.test_remote": _GEVENTS_SLEEP,
}


def _process_suites():
    is_split = sys.version_info >= (3, 12)      # a module for each part
    for method in ("fork", "forkserver", "spawn"):
        for part in [".test_manager", ".test_misc", ".test_processes", ".test_threads"] if is_split else [""]:
            kind = f"With{part.removeprefix('.test_').title()}"
            left_out = {
                name.removesuffix(f"[{method}]"): reason
                for name, reason in _LEFT_OUT_OF_MULTIPROCESSING.items()
                if not part or name.startswith(kind)
            }
            yield f"test.test_multiprocessing_{method}{part}", {name: why for name, why in left_out.items() if "[" not in name}
    yield "test.test_multiprocessing_main_handling", {}
    parts = ["as_completed", "deadlock", "init", "process_pool", "shutdown", "wait"]
    for part in [f".test_{name}" for name in parts] if is_split else [""]:
        yield f"test.test_concurrent_futures{part}", {}


#: CPython's tests of what starts processes. They take minutes, and a run of their own: `tox run -e processes`.
PROCESS_SUITES = dict(_process_suites())

#: A test of theirs that takes longer has failed.
PROCESS_TEST_LIMIT_S = 40

#: {module: what coopos.patch() is told for it}
PATCH_ARGUMENTS = {
    # Their threads, greenlets here, must not go on in a forked child. Over gevent alone they do, and 3 of the 4 tests of test_fork1
    # fail (or hang), 2 of the 3 of test_wait3, 2 of the 2 of test_wait4.
    "test.test_fork1": {"keep_greenlets": False},
    "test.test_wait3": {"keep_greenlets": False},
    "test.test_wait4": {"keep_greenlets": False},
}
