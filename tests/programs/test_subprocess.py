"""coopos.subprocess: the stdlib's subprocess in all that it is and takes, while other greenlets run."""

import functools
import gc
import inspect
import os
import subprocess as stdlib
import sys

import gevent
import gevent.subprocess
import pytest

import coopos
from coopos import subprocess

from ..helpers.children import has_no_child, needs_proc
from ..helpers.programs import PIPE, STDOUT, same, sh
from ..helpers.support import closing, open_fds, parked, result_of, run_script, until

is_root = os.geteuid() == 0
PATCHED = """
from gevent import monkey
monkey.patch_all()
import coopos
coopos.patch()
import signal, subprocess, gevent, gevent.subprocess
"""


# ---- names -------------------------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_stdlib():
    assert set(subprocess.__all__) == set(stdlib.__all__)
    assert [name for name in subprocess.__all__ if not hasattr(subprocess, name)] == []


def test_exceptions_and_constants_are_the_stdlibs_own():
    """So that whoever catches or compares them need not know where they come from."""
    names = ["SubprocessError", "CalledProcessError", "TimeoutExpired", "CompletedProcess", "PIPE", "STDOUT", "DEVNULL"]
    assert [name for name in names if getattr(subprocess, name) is not getattr(stdlib, name)] == []


def test_popen_is_a_kind_of_the_stdlibs():
    with sh("exit 0") as process:
        assert isinstance(process, stdlib.Popen)
        assert type(process).__name__ == "Popen"
        plain = "<Popen: returncode: None args: ['sh', '-c', 'exit 0']"
        assert stdlib.Popen.__repr__(process) == f"{plain}>" and repr(process).startswith(f"{plain} child: <coopos child ")


def test_popen_signature_is_the_stdlibs_with_a_terminal():
    ours, theirs = (list(inspect.signature(module.Popen).parameters.values()) for module in (subprocess, stdlib))
    assert ours[: len(theirs)] == theirs
    assert [(each.name, each.kind) for each in ours[len(theirs) :]] == [
        ("pty", inspect.Parameter.KEYWORD_ONLY),
        ("winsize", inspect.Parameter.KEYWORD_ONLY),
        ("threadpool", inspect.Parameter.KEYWORD_ONLY),
    ]


def test_popen_threadpool():
    """gevent's Popen has it; here nothing is done with it."""
    with subprocess.Popen(["sh", "-c", "exit 7"], threadpool=gevent.get_hub().threadpool) as process:
        pass
    assert process.returncode == 7


def test_popen_can_be_subscripted():
    assert subprocess.Popen[bytes]


# ---- where nothing can switch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [
    'subprocess.run(["sh", "-c", "cat; exit 7"], input=b"out", capture_output=True).stdout == b"out"',
    'subprocess.run(["sh", "-c", "cat; exit 7"], input=b"out", capture_output=True, timeout=30).stdout == b"out"',
    'subprocess.run(["sh", "-c", "sleep 0.01; exit 7"], timeout=30).returncode == 7',
    'subprocess.run(["sh", "-c", "exit 7"], preexec_fn=os.getpid).returncode == 7',
    'subprocess.Popen(["sh", "-c", "exit 7"], pty=True).wait() == 7',
    'subprocess.check_output(["sh", "-c", "sleep 0.01; echo out"]) == b"out\\n"',
    'gevent.subprocess.check_output(["sh", "-c", "sleep 0.01; echo out"]) == b"out\\n"',
    'os.system("sleep 0.01; exit 7") == 7 << 8',
    'os.popen("sleep 0.01; echo out").read() == "out\\n"',
    'os.popen("sleep 0.01; exit 7").close() == 7 << 8',
    'os.waitpid(os.posix_spawn("/bin/sh", ["sh", "-c", "sleep 0.01; exit 7"], os.environ), 0)[1] == 7 << 8',
    'os.spawnlp(os.P_WAIT, "sh", "sh", "-c", "sleep 0.01; exit 7") == 7',
])
def test_program_in_a_signal_handler(call):
    """It runs in the hub, where it waits as in any program; other programs' ends are told afterwards."""
    run_script(PATCHED + f"""
import os
outcome = []
def handle(signum, frame):
    if gevent.getcurrent() is not gevent.get_hub():
        return signal.setitimer(signal.ITIMER_REAL, 0.005)
    try:
        outcome.append({call})
    except BaseException as ex:
        outcome.append(ex)
signal.signal(signal.SIGALRM, handle)
other = gevent.spawn(subprocess.run, ["sleep", "0.02"])
gevent.sleep(0)
signal.setitimer(signal.ITIMER_REAL, 0.005)
while not outcome:
    gevent.sleep(0.01)
assert outcome == [True], outcome
assert other.get(timeout=30).returncode == 0
""", may_complain=True)


@pytest.mark.parametrize("call", [
    'subprocess.run(["true"], capture_output=True)',
    'subprocess.run(["cat"], input=b"in", capture_output=True, timeout=30)',
    'subprocess.run(["true"], timeout=30)',
    'os.system("true")',
    'os.popen("true").close()',
    'os.waitpid(os.posix_spawn("/bin/true", ["true"], os.environ), 0)',
])
def test_programs_in_threads_without_a_hub(call):
    """They wait as threads do, and leave no hub behind, whose descriptors nobody would close."""
    run_script(PATCHED + f"""
import os
from gevent.hub import _get_hub
from gevent.monkey import get_original
start, Lock = get_original("_thread", "start_new_thread"), get_original("_thread", "allocate_lock")
outcome = []
def use(lock):
    try:
        {call}
        outcome.append(_get_hub())
    except BaseException as ex:
        outcome.append(ex)
    lock.release()
def in_thread():
    lock = Lock()
    lock.acquire()
    start(use, (lock,))
    lock.acquire()
in_thread()
before = os.listdir("/dev/fd")
for _ in range(200):
    in_thread()
assert outcome == [None] * 201, outcome[:3]
assert os.listdir("/dev/fd") == before
""", may_complain=True)


# ---- run and its kin ---------------------------------------------------------------------------------------------------------

CALLS = {
    "run": lambda module: vars(module.run(["sh", "-c", "echo out; echo err >&2; exit 7"], capture_output=True)),
    "run input": lambda module: vars(module.run(["cat"], input=b"in", stdout=PIPE)),
    "run text": lambda module: vars(module.run("echo $0", shell=True, stdout=PIPE, text=True)),
    "run check": lambda module: module.run(["sh", "-c", "echo out; exit 7"], stdout=PIPE, check=True),
    "run timeout": lambda module: module.run(["sh", "-c", "echo out; exec sleep 30"], stdout=PIPE, timeout=0.5),
    "run input and stdin": lambda module: module.run(["cat"], input=b"in", stdin=PIPE),
    "run capture and stdout": lambda module: module.run(["cat"], capture_output=True, stdout=PIPE),
    "call": lambda module: module.call(["sh", "-c", "exit 7"]),
    "call timeout": lambda module: module.call(["sleep", "30"], timeout=0.01),
    "check_call": lambda module: module.check_call(["true"]),
    "check_call fails": lambda module: module.check_call(["sh", "-c", "kill -KILL $$"]),
    "check_output": lambda module: module.check_output(["echo", "out"]),
    "check_output fails": lambda module: module.check_output(["sh", "-c", "echo out; echo err >&2; exit 7"], stderr=PIPE),
    "check_output input": lambda module: module.check_output(["cat"], input=b"in"),
    "check_output stdout": lambda module: module.check_output(["cat"], stdout=PIPE),
    "check_output timeout": lambda module: module.check_output(["sh", "-c", "echo out; exec sleep 30"], timeout=0.5),
    "getoutput": lambda module: module.getoutput("echo out; echo err >&2; exit 7"),
    "getstatusoutput": lambda module: module.getstatusoutput("echo out; exit 7"),
    "getstatusoutput signal": lambda module: module.getstatusoutput("kill -TERM $$"),
    "list2cmdline": lambda module: module.list2cmdline(["a b", 'c"d']),
}


@pytest.mark.parametrize("call", CALLS)
def test_call_is_the_stdlibs(call):
    same(CALLS[call])


def test_run_lets_others_run(gate):
    runner = parked(functools.partial(subprocess.run, f"echo one; {gate.wait}; echo two; exit 7", shell=True, capture_output=True))
    gate.open()
    done = result_of(runner)
    assert (done.stdout, done.stderr, done.returncode) == (b"one\ntwo\n", b"", 7)


def test_run_killed(gate):
    """As the stdlib's when it is interrupted: the child is killed and collected."""
    runner = parked(functools.partial(subprocess.run, ["sleep", "100"], stdout=PIPE))
    runner.kill()
    assert has_no_child()


# ---- arguments ---------------------------------------------------------------------------------------------------------------

REPORT = """
    pwd -P
    umask
    ps -o pid=,pgid=,sid= -p $$ | tr -s ' ' | sed s/$$/PID/g
    id
    env | grep ^COOPOS_T
    for fd in /proc/$$/fd/*; do echo ${fd##*/}; done
"""
ARGUMENTS = {
    "nothing": {},
    "cwd": {"cwd": "/tmp"},
    "env": {"env": {"COOPOS_TEST": "x", "PATH": os.environ["PATH"]}},
    "umask": {"umask": 0o27},
    "start_new_session": {"start_new_session": True},
    "close_fds": {"close_fds": False},
    "restore_signals": {"restore_signals": False},
    "executable": {"executable": "/bin/sh"},
    "preexec_fn": {"preexec_fn": lambda: os.chdir("/usr")},
}
if sys.version_info >= (3, 11):
    ARGUMENTS["process_group"] = {"process_group": 0}
if is_root:
    ARGUMENTS |= {
        "user": {"user": 65534},
        "group": {"group": 65534},
        "extra_groups": {"extra_groups": [65534, 1]},
    }


@needs_proc
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_do_what_they_do_for_the_stdlib(arguments):
    def report(module):
        return module.run(["sh", "-c", REPORT], capture_output=True, text=True, **ARGUMENTS[arguments]).stdout

    assert len(same(report)) > 20


def test_pass_fds():
    reader, writer = os.pipe()
    with closing(reader, writer):
        os.write(writer, b"data")
        assert subprocess.run(["sh", "-c", f"head -c 4 < /dev/fd/{reader}"], pass_fds=[reader], stdout=PIPE).stdout == b"data"
        assert subprocess.run(["sh", "-c", f"test -e /dev/fd/{reader}"]).returncode == 1


WRONG = {
    "no such program": (["/nonexistent/program"], {}),
    "no such program on the path": (["nonexistent-program"], {}),
    "no program": (["/etc/passwd"], {}),
    "directory": (["/tmp"], {}),
    "cwd": (["true"], {"cwd": "/nonexistent"}),
    "null": (["true\0"], {}),
    "null in an argument": (["true", "a\0b"], {}),
    "environment": (["true"], {"env": {"a=b": "c"}}),
    "empty": ([], {}),
    "argument of another type": (["true", 1], {}),
    "args of another type": (1, {}),
    "bufsize": (["true"], {"bufsize": "1"}),
    "pipesize": (["true"], {"pipesize": "1"}),
    "stdout": (["true"], {"stdout": STDOUT}),
    "stdin of another type": (["true"], {"stdin": "file"}),
    "user": (["true"], {"user": -5}),
    "user of another type": (["true"], {"user": 1.5}),
    "user that is none": (["true"], {"user": "no-such-user-here"}),
    "extra_groups": (["true"], {"extra_groups": "str"}),
    "encoding": (["true"], {"encoding": "no-such-encoding", "stdout": PIPE}),
    "text and universal_newlines": (["true"], {"text": True, "universal_newlines": False}),
    "too long": (["true", "x" * 200_000], {}),
    "preexec_fn": (["true"], {"preexec_fn": lambda: 1 / 0}),
    "preexec_fn that is none": (["true"], {"preexec_fn": 1}),
    "keyword": (["true"], {"no_such_argument": 1}),
    "path-like in a shell": (functools.partial, {"shell": True}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    """The stdlib's exception, and no child and no descriptor is left."""
    args, kwargs = WRONG[wrong]

    def start(module):
        with module.Popen(args, **kwargs) as process:
            return process.wait()

    result = same(start)
    assert not isinstance(result, int)


@pytest.mark.smoke
def test_preexec_fn_that_takes_its_time(gate):
    """It runs in a fork, for which others need not wait."""
    fifo = os.open(gate.wait.split()[-1], os.O_RDWR)
    with closing(fifo):
        starter = parked(functools.partial(sh, "exit 7", preexec_fn=lambda: os.read(fifo, 1)))
        gate.open()
        assert result_of(starter).wait() == 7


def test_preexec_fn_killed(gate):
    """No child is left of a greenlet that was killed before it had its Popen."""
    fifo = os.open(gate.wait.split()[-1], os.O_RDWR)
    before = open_fds()
    with closing(fifo):
        parked(functools.partial(sh, "exec sleep 100", preexec_fn=lambda: os.read(fifo, 1), stdout=PIPE)).kill()
        until(has_no_child)
        gc.collect()
        assert open_fds() == before


def test_popen_does_not_switch():
    """A child is no sooner there than its Popen: nobody can be killed in between."""
    turns = []

    def turn():
        while True:
            turns.append(1)
            gevent.sleep(0)

    ticker = gevent.spawn(turn)
    gevent.sleep(0)
    turns.clear()
    processes = [sh("exit 0", close_fds=n % 2, stdin=PIPE if n % 3 else None) for n in range(50)]
    assert not turns
    ticker.kill()
    for process in processes:
        with process:
            assert process.wait() == 0


def test_popen_in_a_forked_child():
    """A child of a fork has subprocesses of its own, and none of its parent's."""
    run_script("""
        import os, gevent, coopos
        from coopos import subprocess
        theirs = subprocess.Popen(["sh", "-c", "read line; exit 7"], stdin=subprocess.PIPE)
        for keeps in (True, False):
            pid = coopos.fork_gevent(keep_greenlets=keeps)
            if pid == 0:
                assert subprocess.check_output(["echo", "out"]) == b"out\\n"
                theirs.kill()         # is not sent, and no error
                process = subprocess.Popen(["sh", "-c", "exit 3"])
                assert gevent.wait([process]) == [process] and process.returncode == 3
                os._exit(5)
            assert coopos.waitpid(pid, 0) == (pid, 5 << 8)
        theirs.stdin.close()
        assert theirs.wait() == 7
    """)


# ---- under patch() -----------------------------------------------------------------------------------------------------------

def test_patched_subprocess():
    """It is ours under both names, and nothing installs a SIGCHLD handler."""
    run_script(PATCHED + """
from coopos import subprocess as ours
assert subprocess.Popen is gevent.subprocess.Popen is ours.Popen
assert subprocess.run(["sh", "-c", "echo out; exit 7"], stdout=subprocess.PIPE).returncode == 7
assert type(subprocess.run(["true"])) is subprocess.CompletedProcess
assert gevent.subprocess.check_output(["echo", "out"]) == b"out\\n"
assert isinstance(subprocess.Popen(["true"]), subprocess.Popen)
assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
with open("/proc/self/status") as file:
    assert not any(int(line.split()[1], 16) & 1 << signal.SIGCHLD - 1 for line in file if line.startswith("SigCgt"))
""", may_complain=True)


def test_patched_run_uses_what_stands_for_popen():
    """A test that puts a mock there sees what run() and its kin do."""
    run_script(PATCHED + """
from unittest import mock
with mock.patch("subprocess.Popen") as popen:
    popen.return_value.__enter__.return_value.communicate.return_value = b"mocked", None
    popen.return_value.__enter__.return_value.poll.return_value = 0
    assert subprocess.check_output(["nothing"]) == b"mocked"
with mock.patch("subprocess._fork_exec" if hasattr(subprocess, "_fork_exec") else "_posixsubprocess.fork_exec") as fork_exec:
    fork_exec.side_effect = RuntimeError("mocked")
    try:
        subprocess.run(["true"])
    except RuntimeError:
        pass
    else:
        raise AssertionError("it was not called")
""")


def test_patched_popen_of_gevents_that_was_imported_before():
    run_script("""
from gevent import monkey
monkey.patch_all()
from subprocess import Popen, run, check_output
import coopos, signal
coopos.patch()
assert Popen(["sh", "-c", "exit 7"]).wait() == 7
assert run(["sh", "-c", "exit 7"]).returncode == 7
assert check_output(["echo", "out"]) == b"out\\n"
assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
""", may_complain=True)


def test_a_program_catches_its_own_timeout_inside_communicate():
    """In a method that overrides one of Popen's, and which communicate() calls."""

    class Patient(subprocess.Popen):
        timeouts = 0

        def wait(self, timeout=None):
            reader, writer = os.pipe()
            with closing(reader, writer):
                try:
                    with gevent.Timeout(0.001, TimeoutError):
                        coopos.read(reader, 1)
                except TimeoutError:
                    self.timeouts += 1
            return super().wait(timeout)

    with Patient(["echo", "out"], stdout=PIPE) as popen:
        assert popen.communicate() == (b"out\n", None)
    assert popen.timeouts
