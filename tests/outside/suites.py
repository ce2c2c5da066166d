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

_CODE_OF_GEVENTS_POPEN = "tests a private static method of gevent's Popen, which closes descriptors after a fork in Python"

_PRIVATE_GREENLETS = (
    "looks at the private list of greenlets in which gevent's Popen communicates; tests/programs/ has what it is about: "
    "to leave the with block while another greenlet reads raises nothing and leaves nobody waiting"
)

_NOBODY_HAS_TO_ASK = (
    "expects returncode to be None although the child has ended, since nobody has polled; the hub has seen the end and set it, as "
    "with gevent's Popen"
)

_LIST_OF_THE_DROPPED = (
    "looks for a Popen that was dropped in the private list subprocess._active, where the next Popen finds and collects it; here a "
    "child is collected when it ends, whoever has its Popen"
)

_GEVENTS_POLL = "polls more descriptors than gevent's select.poll tells of in one call"

_GEVENTS_SELECTOR = "skips itself if the default selector has no epoll or poll inside; gevent's, which stays, has neither"

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
        "TestPopen.test_exit_stops_communicating_greenlets_before_closing": _PRIVATE_GREENLETS,
        "TestPopen.test_exit_ignores_reentrant_call_from_foreign_greenlet": _PRIVATE_GREENLETS,
        "TestFDs.test_close_fds_brute_force": _CODE_OF_GEVENTS_POPEN,
        "TestFDs.test_close_fds_from_path": _CODE_OF_GEVENTS_POPEN,
        "TestFDs.test_close_fds_from_path_bad_values": _CODE_OF_GEVENTS_POPEN,
        "TestFDs.test_close_fds_no_dir": _CODE_OF_GEVENTS_POPEN,
        "TestFDs.test_close_fds_with_dir": _CODE_OF_GEVENTS_POPEN,
    },
    "test.test_subprocess": {
        "POSIXProcessTestCase.test_stopped": "has a mock of os.waitpid say what became of the child; a pidfd tells it here",
        "POSIXProcessTestCase.test_send_signal_race": _NOBODY_HAS_TO_ASK,
        "POSIXProcessTestCase.test_zombie_fast_process_del": _LIST_OF_THE_DROPPED,
        "POSIXProcessTestCase.test_leak_fast_process_del_killed": _LIST_OF_THE_DROPPED,
    },
    "test.test_posix": {},
    "test.test_os": {},
    "test.test_pty": {},
    "test.test_popen": {},
    "test.test_fork1": {},
    "test.test_wait3": {},
    "test.test_wait4": {},
    "test.test_builtin": {},
    "test.test_epoll": {},
    "test.test_file": {},
    "test.test_fileio": {},
    "test.test_selectors": {
        "PollSelectorTestCase.test_above_fd_setsize": _GEVENTS_POLL,
        "DefaultSelectorTestCase.test_modify_unregister": _GEVENTS_SELECTOR,
    },
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
    "test.test_builtin": {"io": True},
    "test.test_epoll": {"io": True},
    "test.test_file": {"io": True},
    "test.test_fileio": {"io": True},
    "test.test_selectors": {"io": True},
}

#: {module: why waitpid(-1) still tells of a child that it has waited for}
STILL_TOLD = {
    "test.test_posix": (
        "test_waitid collects a child of os.fork() behind coopos's back, by posix.waitid, which nothing replaces; its status, "
        "which the kernel tells by the pidfd, is there for whoever asks as after any other who collects children"
    ),
}

#: Left-out tests that pass where the child is quicker than the hub, or where few descriptors may be open; or that skip themselves.
MAY_PASS = {
    "POSIXProcessTestCase.test_send_signal_race",
    "PollSelectorTestCase.test_above_fd_setsize",
    "DefaultSelectorTestCase.test_modify_unregister",
}
