"""patch() and unpatch(): what they replace, that they put it back, and that the programs under them work."""

import os
import pathlib
import re
import sys
import textwrap
import warnings

import gevent.os
import pytest

import coopos

from ..helpers.support import run_script

# Before 25.8 gevent had no close and posix_spawn of its own, and left those of os alone.
GEVENTS_OWN = [name for name in ("close", "posix_spawn", "posix_spawnp") if name in gevent.os.__implements__]
OURS_ALONE = [
    *("closerange", "wait", "wait3", "wait4", "waitid", "system", "popen"),
    *("spawnl", "spawnle", "spawnlp", "spawnlpe", "spawnv", "spawnve", "spawnvp", "spawnvpe"),
]
REPLACED_IN_OS = ["fork", "forkpty", "waitpid", *GEVENTS_OWN, *OURS_ALONE]
REPLACED_IN_GEVENT_OS = [
    *("close", "fork", "forkpty", "posix_spawn", "posix_spawnp", "waitpid"),
    *["fork_and_watch", "fork_gevent", "forkpty_and_watch", "forkpty_gevent"],
    *["make_nonblocking", "nb_read", "nb_write", "tp_read", "tp_write"],
    *OURS_ALONE,
]
IN_GEVENT_SUBPROCESS = [
    *("CompletedProcess", "Popen", "call", "check_call", "check_output", "run", "getoutput", "getstatusoutput")
]
SUBPROCESS = [*IN_GEVENT_SUBPROCESS[:6], "_USE_POSIX_SPAWN", "_use_posix_spawn"]

#: gevent.monkey first, as programs do. Whatever is imported after it sees the patched modules.
PATCHED = """
from gevent import monkey
monkey.patch_all()
import os, signal, sys, threading, warnings
import gevent, gevent.os, gevent.subprocess
from gevent.hub import get_hub
import coopos
coopos.patch()
STATUS = 7 << 8
warnings.filterwarnings("ignore", "libuv only supports millisecond")  # by gevent.subprocess's poll()


def sigchld_is_default():
    handler = monkey.get_original("signal", "getsignal")(signal.SIGCHLD)
    if handler is not signal.SIG_DFL:
        return False
    if not os.path.exists("/proc/self/status"):
        return True
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return not any(int(fields[name], 16) & 1 << signal.SIGCHLD - 1 for name in ("SigCgt", "SigIgn"))


def ticks_while(function, *args):
    '''What function returns; other greenlets must have run meanwhile.'''
    ticks = []
    ticker = gevent.spawn(lambda: [(ticks.append(1), gevent.sleep(0)) for _ in iter(int, 1)])
    try:
        result = function(*args)
    finally:
        ticker.kill()
    assert ticks, "nobody else ran"
    return result
"""


def run(source, **kwargs):
    return run_script(PATCHED + textwrap.dedent(source), **kwargs)


# ---- names -------------------------------------------------------------------------------------------------------------------

NAMES = f"""
import os, sys, warnings
warnings.filterwarnings("ignore", "coopos.patch")  # before gevent.monkey
before = {{}}

def snapshot():
    import gevent, gevent.os, gevent.subprocess, subprocess
    modules = [gevent, gevent.os, gevent.subprocess, os, subprocess]
    found = [(module, name, value) for module in modules for name, value in vars(module).items()]
    return {{(module.__name__, name): value for module, name, value in found if type(value) is not type(os)}}

def changed(one, other):
    return sorted(key for key in one.keys() | other.keys() if one.get(key) is not other.get(key))

IN_GEVENT_OS = [("gevent.os", name) for name in {sorted(REPLACED_IN_GEVENT_OS)}]
IN_OS = [("os", name) for name in {sorted(REPLACED_IN_OS)}]
IN_SUBPROCESS = [("subprocess", name) for name in {SUBPROCESS}]
if hasattr(__import__("subprocess"), "_fork_exec"):
    IN_SUBPROCESS.append(("subprocess", "_fork_exec"))  # from Python 3.11 on, and before it is a module's, which isn't looked at
ELSEWHERE = [("gevent", "fork"), ("gevent.subprocess", "fork_and_watch")]
ELSEWHERE += [("gevent.subprocess", name) for name in {IN_GEVENT_SUBPROCESS}]
"""


def run_names(source, **kwargs):
    kwargs.setdefault("GEVENT_NOWAITPID", None)
    kwargs.setdefault("COOPOS_PATCH", None)
    return run_script(NAMES + textwrap.dedent(source), **kwargs)


@pytest.mark.smoke
def test_patch_under_monkey():
    """It replaces what gevent.os and gevent.subprocess have and what gevent.monkey has put into os and subprocess; nothing else."""
    run_names("""
        from gevent import monkey
        monkey.patch_all()
        before = snapshot()
        import coopos
        assert changed(before, snapshot()) == []
        coopos.patch()
        after = snapshot()
        assert changed(before, after) == sorted(IN_GEVENT_OS + IN_OS + IN_SUBPROCESS + ELSEWHERE), changed(before, after)
        for module, name in IN_GEVENT_OS + IN_OS + [("gevent", "fork")]:
            assert after[module, name] is getattr(coopos, name), (module, name)
    """)


def test_patch_before_monkey_warns_once():
    """And says what to call. With gevent.monkey it doesn't."""
    run_names("""
        import coopos
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            coopos.patch()
            coopos.patch()
        assert [warning.category for warning in caught] == [RuntimeWarning]
        assert str(caught[0].message).endswith(": call gevent.monkey.patch_all() first") and caught[0].filename == "<string>"
    """)
    run_names("""
        warnings.simplefilter("error")
        from gevent import monkey
        monkey.patch_all()
        import coopos
        coopos.patch()
    """)


def test_patch_after_any_part_of_monkey_warns_not():
    """Whichever module gevent.monkey has patched, the program has called it."""
    run_names("""
        from gevent import monkey
        import coopos
        warnings.simplefilter("error")
        for module in ("subprocess", "socket", "time", "thread", "threading", "select", "signal", "ssl", "queue", "os"):
            monkey.saved.clear()
            monkey.saved[module] = {}
            coopos.patch()
    """)


@pytest.mark.parametrize("calls", ["", "p", "i", "iu", "iup"])
def test_patched_says_what_is_replaced(calls):
    """A line for each name that may be replaced: coopos, if its value is ours, or the reason. It replaces nothing."""
    run_names(f"""
        import functools
        from gevent import monkey
        monkey.patch_all()
        import coopos, gevent.os
        for call in {calls!r}:
            {{"p": coopos.patch, "i": functools.partial(coopos.patch, io=True), "u": coopos.unpatch}}[call]()
        before = snapshot()
        states = coopos.patched()
        assert changed(before, snapshot()) == []
        for name in [f"os.{{name}}" for _, name in IN_OS] + ["gevent.fork", "subprocess.Popen", "fcntl.flock"]:
            expected = "coopos" if {calls!r} in ("p", "i", "iup") else "patch() was not called"
            assert states[name] == expected, (name, states[name])
        if "close" not in gevent.os.__implements__:
            assert states["os.close"] == "gevent.monkey leaves it alone"
        others = {{"close", "fdopen", "register_at_fork", *(name for _, name in IN_OS)}}
        ios = ["os." + name for name in set(coopos.__cooperative__) - others]
        for name in [*ios, "io.open", "builtins.open", "builtins.input"]:
            assert states[name] == ("coopos" if {calls!r} == "i" else "patch(io=True) was not called"), (name, states[name])
        assert states["os.fdopen"] == "it calls io.open"
        streams = [states["sys." + name] for name in ("stdin", "stdout", "stderr")]
        never = "it is not the interpreter's, or never makes anybody wait"  # /dev/null
        assert streams == ([never, "coopos", "coopos"] if {calls!r} == "i" else ["patch(io=True) was not called"] * 3), streams
        os.forkpty = lambda: None
        assert coopos.patched()["os.forkpty"] == "somebody else has replaced it"
    """)


def test_patched_without_monkey():
    """What is gevent's own waits for patch() alone."""
    run_names("""
        import coopos
        states = coopos.patched()
        assert states["os.wait"] == "gevent.monkey has not patched os" and states["gevent.os.tp_read"] == "patch() was not called"
        coopos.patch()
        states = coopos.patched()
        assert states["os.wait"] == "gevent.monkey has not patched os" and states["gevent.os.tp_read"] == "coopos"
    """)


def test_patching_is_documented():
    """The page names all that patch() may replace, but the functions of os and gevent.os, which have their own lists."""
    page = pathlib.Path(__file__).resolve().parents[2] / "docs" / "patching.rst"
    if not page.exists():
        pytest.skip("the documentation is not beside the tests")
    named = set(re.findall(r"``([\w.]+)``", page.read_text()))
    assert {"coopos.__cooperative__", "gevent.os"} <= named
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {name for name in coopos.patched() if not name.startswith("gevent.os.")}
    assert names - {f"os.{name}" for name in coopos.__cooperative__} - named == set()


def test_patch_without_monkey():
    """os and subprocess are left alone where gevent.monkey has not patched them."""
    run_names("""
        before = snapshot()
        import coopos
        coopos.patch()
        assert changed(before, snapshot()) == sorted(IN_GEVENT_OS + ELSEWHERE), changed(before, snapshot())
    """)


def test_patch_before_monkey():
    """patch() first and monkey.patch_all() afterwards come to the same."""
    run_names("""
        before = snapshot()
        import coopos
        coopos.patch()
        from gevent import monkey
        monkey.patch_all()
        for name in {name for _, name in IN_OS}:
            assert getattr(os, name) is getattr(coopos, name), name
        assert os.read is before["os", "read"] and os.write is before["os", "write"]
        coopos.unpatch()
        import gevent.os
        for name in {name for _, name in IN_OS}:
            assert getattr(os, name) is getattr(gevent.os, name) is before["gevent.os", name], name
    """)


def test_import_of_coopos_before_monkey_patches_nothing():
    """The program hasn't asked for patch()."""
    run_names("""
        import coopos
        from gevent import monkey
        monkey.patch_all()
        assert set(coopos.patched().values()).isdisjoint({"coopos"})
    """)


def test_patched_lockf_is_a_builtin_of_its_module():
    """It has the signature of the one that it replaces, and can be pickled."""
    run_names("""
        from gevent import monkey
        monkey.patch_all()
        import coopos, fcntl, inspect, pickle
        plain = inspect.signature(fcntl.lockf)
        coopos.patch()
        assert fcntl.lockf.__module__ == "fcntl" and inspect.signature(fcntl.lockf) == plain
        assert pickle.loads(pickle.dumps(fcntl.lockf)) is fcntl.lockf
    """)


def test_patch_leaves_alone_what_an_older_gevent_does():
    """Before 25.8 gevent.os.close was the plain one of os, and so was os.close under gevent.monkey."""
    run_names("""
        import gevent.os
        plain = gevent.os.close = os.close
        from gevent import monkey
        monkey.patch_all()
        import coopos
        coopos.patch()
        assert os.close is plain and coopos.patched()["os.close"] == "gevent.monkey leaves it alone"
        assert gevent.os.close is coopos.close
        coopos.unpatch()
        assert os.close is gevent.os.close is plain
    """)


def test_patch_leaves_read_and_write_alone():
    """Signal handlers and servers rely on os.read and os.write being the plain ones."""
    run_names("""
        plain = os.read, os.write, os.open, os.dup, os.pipe
        from gevent import monkey
        monkey.patch_all()
        import coopos
        coopos.patch()
        assert (os.read, os.write, os.open, os.dup, os.pipe) == plain
        coopos.unpatch()
        assert (os.read, os.write, os.open, os.dup, os.pipe) == plain
    """)


@pytest.mark.parametrize("calls", ["p", "pp", "pu", "puu", "ppu", "ppuu", "pupu", "u", "uu", "upu"])
@pytest.mark.parametrize("monkey", [True, False], ids=["monkey", "no monkey"])
def test_patch_and_unpatch_any_number_of_times(calls, monkey):
    """The last call counts: everything is replaced, or everything is what it was, to the identity."""
    run_names(f"""
        import gevent.subprocess
        if {monkey}:
            from gevent import monkey
            monkey.patch_all()
        before = snapshot()
        attributes = dict(vars(gevent.subprocess.Popen))
        import coopos
        for call in {calls!r}:
            {{"p": coopos.patch, "u": coopos.unpatch}}[call]()
        expected = IN_GEVENT_OS + ELSEWHERE + (IN_OS + IN_SUBPROCESS if {monkey} else [])
        assert changed(before, snapshot()) == (sorted(expected) if {calls[-1]!r} == "p" else [])
        assert (dict(vars(gevent.subprocess.Popen)) == attributes) is ({calls[-1]!r} == "u")
    """)


def test_unpatch_leaves_what_others_replaced():
    """A name that somebody else replaced in between is not ours to put back."""
    run_names("""
        from gevent import monkey
        monkey.patch_all()
        import coopos, gevent.os
        coopos.patch()
        def others(*args): pass
        os.close = others
        gevent.os.tp_read = others
        coopos.unpatch()
        assert os.close is others and gevent.os.tp_read is others
        assert os.fork is gevent.os.fork and os.fork is not coopos.fork
    """)


def test_unpatch_after_gevent_has_patched_subprocess_in_between():
    """gevent.monkey takes what stands in gevent.subprocess by then, which is ours."""
    run_names("""
        from gevent import monkey
        monkey.patch_all()
        import subprocess, coopos
        names = ("Popen", "run", "call", "check_call", "check_output")
        before = [getattr(subprocess, name) for name in names]
        coopos.patch()
        monkey.patch_subprocess()
        coopos.unpatch()
        assert [getattr(subprocess, name) for name in names] == before
    """)


def test_patch_some_of_monkey():
    """gevent.monkey may have left os alone and patched others: then os stays as it is."""
    run_names("""
        plain = {name: getattr(os, name) for _, name in IN_OS}
        from gevent import monkey
        monkey.patch_all(os=False, signal=False, subprocess=False)
        import coopos
        coopos.patch()
        assert {name: getattr(os, name) for name in plain} == plain
    """)


def test_patch_with_nowaitpid():
    """With GEVENT_NOWAITPID gevent.monkey doesn't replace os.waitpid and posix_spawn: nor does patch()."""
    run_names(
        """
        plain = os.waitpid, os.posix_spawn, os.posix_spawnp
        before_close = os.close
        from gevent import monkey
        monkey.patch_all()
        import coopos, gevent.os
        coopos.patch()
        assert (os.waitpid, os.posix_spawn, os.posix_spawnp) == plain
        assert os.fork is coopos.fork and os.close is (coopos.close if ("os", "close") in IN_OS else before_close)
        assert gevent.os.waitpid is coopos.waitpid
        assert coopos.patched()["os.waitpid"] == "gevent.monkey leaves it alone"
        coopos.unpatch()
        assert (os.waitpid, os.posix_spawn, os.posix_spawnp) == plain
        """,
        GEVENT_NOWAITPID="1",
    )


def test_names_imported_before_patch():
    """What a module has taken from os before keeps working, and its children are no trouble to those who use ours."""
    run_script("""
        from gevent import monkey
        monkey.patch_all()
        from os import fork, waitpid
        import os, coopos
        coopos.patch()
        for _ in range(3):
            pid = fork()
            if pid == 0:
                os._exit(7)
            assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
    """)


# ---- by the environment ------------------------------------------------------------------------------------------------------

BY_ENVIRONMENT = """
    import os, sys
    from gevent import monkey
    monkey.patch_all()
    import gevent.os
    is_patched = gevent.os.nb_read.__module__.startswith("coopos") and os.waitpid.__module__.startswith("coopos")
    assert is_patched is {expected}, (gevent.os.nb_read, os.waitpid)
    {more}
"""


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_coopos_patch_in_the_environment(value):
    """With COOPOS_PATCH=1 gevent.monkey.patch_all() alone brings coopos in, by the entry point of the installed package."""
    more = "import coopos; coopos.unpatch(); assert gevent.os.nb_read is not coopos.nb_read"
    run_script(BY_ENVIRONMENT.format(expected=True, more=more), COOPOS_PATCH=value)


@pytest.mark.parametrize("value", [None, "", "0", "no", "off"])
def test_coopos_patch_not_in_the_environment(value):
    """Without it, nothing is replaced."""
    run_script(BY_ENVIRONMENT.format(expected=False, more=""), COOPOS_PATCH=value)


def test_coopos_patch_for_a_program_that_forks():
    """A program that knows nothing of coopos forks, waits and is told, under the variable alone."""
    run_script(
        """
        from gevent import monkey
        monkey.patch_all()
        import os, signal, subprocess
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        assert os.waitpid(pid, 0) == (pid, 7 << 8)
        assert subprocess.check_output(["echo", "hello"]) == b"hello\\n"
        assert monkey.get_original("signal", "getsignal")(signal.SIGCHLD) is signal.SIG_DFL
        """,
        COOPOS_PATCH="1",
    )


# ---- programs under it -------------------------------------------------------------------------------------------------------


def test_os_fork_and_waitpid():
    """The functions of os are cooperative and leave SIGCHLD alone."""
    run("""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(7)
        gevent.spawn(os.close, writer)
        assert ticks_while(os.waitpid, pid, 0) == (pid, STATUS)
        assert sigchld_is_default()
    """)


@pytest.mark.parametrize("io", [False, True])
def test_os_read_of_a_pipe_of_popen(io):
    """Without io=True it raises BlockingIOError, as over gevent's pipes, and never stops the process; with it, it waits."""
    run(f"""
        import subprocess
        coopos.patch(io={io})
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
            fd = process.stdout.fileno()
            assert os.get_blocking(fd) is {io}
            if {io}:
                gevent.spawn_later(0.01, process.stdin.write, b"hello")
                assert ticks_while(os.read, fd, 5) == b"hello"
            else:
                try:
                    os.read(fd, 1)
                    raise AssertionError("there was nothing")
                except BlockingIOError:
                    pass
            gevent.spawn(lambda: (process.stdin.write(bytes(200000)), process.stdin.close()))
            assert len(ticks_while(process.stdout.read)) == 200000  # one write() writes all, whatever the mode
        # A child gets its streams in blocking mode.
        with subprocess.Popen(["sh", "-c", "sleep 0.05; echo hello"], stdout=subprocess.PIPE) as first:
            code = "import os; assert os.get_blocking(0); print(os.read(0, 10))"
            assert subprocess.check_output([sys.executable, "-c", code], stdin=first.stdout) == b"b'hello\\\\n'\\n"
        # unpatch() gives os.read back, and coopos.subprocess its own pipes.
        coopos.unpatch()
        with coopos.subprocess.Popen(["true"], stdout=subprocess.PIPE, bufsize=0) as process:
            assert os.get_blocking(process.stdout.fileno())
    """)


SUBPROCESS = """
import subprocess
assert subprocess.Popen is gevent.subprocess.Popen
"""


@pytest.mark.parametrize("state", ["patched", "unpatched again"])
def test_subprocess(state):
    """Popen, run and check_output work, cooperatively; while patched no SIGCHLD handler is installed."""
    run(f"""
        {SUBPROCESS.strip().replace(chr(10), chr(10) + "        ")}
        if {state == "unpatched again"}:
            coopos.unpatch()
        assert ticks_while(subprocess.check_output, ["/bin/sh", "-c", "echo hello"]) == b"hello\\n"
        assert subprocess.call(["/bin/sh", "-c", "exit 7"]) == 7
        done = subprocess.run(["cat"], input=b"x" * 200000, stdout=subprocess.PIPE, check=True)
        assert done.stdout == b"x" * 200000
        try:
            subprocess.check_call(["/bin/sh", "-c", "kill -9 $$"])
        except subprocess.CalledProcessError as ex:
            assert ex.returncode == -9
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
            assert process.poll() is None
            process.stdin.close()
            assert ticks_while(process.wait) == 0
            assert process.poll() == 0
        try:
            subprocess.Popen(["/nowhere/nothing"])
        except FileNotFoundError:
            pass
        else:
            raise AssertionError("it was there")
        assert sigchld_is_default() is {state == "patched"}
    """)


def test_subprocess_timeout():
    """A timeout is kept, and the process can be killed and waited for."""
    run("""
        import subprocess
        with subprocess.Popen(["sleep", "1000"], stdout=subprocess.PIPE) as process:
            for wait in (process.wait, process.communicate):
                try:
                    wait(timeout=0.001)
                except subprocess.TimeoutExpired:
                    pass
                else:
                    raise AssertionError("no timeout")
            process.kill()
            assert process.wait() == -9
    """)


def test_subprocess_many_at_once():
    """Fifty processes run at the same time; each gets its own status."""
    run("""
        import subprocess
        def run(number):
            return subprocess.call(["/bin/sh", "-c", f"exit {number}"])
        jobs = [gevent.spawn(run, number) for number in range(50)]
        gevent.joinall(jobs)
        assert [job.value for job in jobs] == list(range(50))
        assert sigchld_is_default()
    """)


def test_subprocess_beside_forks():
    """Whoever waits for any child doesn't leave Popen without its status, nor a fork without its own."""
    run("""
        import subprocess
        process = subprocess.Popen(["/bin/sh", "-c", "exit 3"])
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        assert process.wait() == 3
        assert os.waitpid(-1, 0) == (pid, STATUS)
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            pass
        else:
            raise AssertionError("there was a child")
    """)


def test_subprocess_and_a_wait_for_any_child():
    """Even a wait for any child that is under way takes nothing away from Popen."""
    run("""
        import subprocess

        def wait_for_any():
            try:
                return os.waitpid(-1, 0)
            except ChildProcessError:
                return None

        for _ in range(20):
            with subprocess.Popen(["/bin/sh", "-c", "read line; exit 3"], stdin=subprocess.PIPE) as process:
                waiter = gevent.spawn(wait_for_any)
                gevent.sleep(0)
                process.stdin.close()
                assert process.wait() == 3
                assert waiter.get() in [None, (process.pid, 3 << 8)]
    """)


def test_subprocess_that_nobody_has_waited_for():
    """A Popen's child is a child like any other until the Popen has told the returncode, and then no more."""
    run("""
        import subprocess

        def ended_process():
            process = subprocess.Popen(["/bin/sh", "-c", "exit 3"])
            while not process.result.ready():
                gevent.sleep(0)
            return process

        process = ended_process()
        assert os.waitpid(-1, 0) == (process.pid, 3 << 8)
        assert process.wait() == 3
        for wait in ("wait", "poll", "communicate"):
            process = ended_process()
            getattr(process, wait)()
            assert process.returncode == 3
            for pid in (-1, process.pid):
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    pass
                else:
                    raise AssertionError("told twice")
    """)


def test_subprocess_in_a_native_thread():
    """A Popen in a thread that is none of gevent's works, where gevent's own can't."""
    run("""
        import subprocess
        results = []
        start, allocate = monkey.get_original("_thread", ["start_new_thread", "allocate_lock"])

        def native():
            try:
                results.append(subprocess.check_output(["/bin/sh", "-c", "echo hello"]))
                results.append(subprocess.call(["/bin/sh", "-c", "exit 7"]))
                results.append(sigchld_is_default())
            finally:
                get_hub().destroy(destroy_loop=True)
                done.release()

        done = allocate()
        done.acquire()
        start(native, ())
        done.acquire()
        assert results == [b"hello\\n", 7, True], results
    """)


def test_subprocess_preexec_fn():
    """The child of a Popen runs its preexec_fn, and has none of our descriptors."""
    run("""
        import subprocess
        script = "ls -l /proc/self/fd 2>/dev/null | grep -c pidfd; exit 0"
        assert int(subprocess.check_output(["/bin/sh", "-c", script], preexec_fn=os.setsid, close_fds=False) or 0) == 0
        assert subprocess.call(["/bin/sh", "-c", "exit 7"], preexec_fn=lambda: None) == 7
        try:
            subprocess.call(["true"], preexec_fn=lambda: 1 / 0)
        except (subprocess.SubprocessError, ZeroDivisionError):
            pass  # gevent raises the child's own exception
        else:
            raise AssertionError("no error")
    """)


def test_os_popen_and_system():
    """os.popen and os.system bring their statuses back."""
    run("""
        with os.popen("echo hello") as pipe:
            assert pipe.read() == "hello\\n"
        assert os.popen("exit 7").close() == STATUS
        assert os.system("exit 7") == STATUS
        assert sigchld_is_default()
    """)


@pytest.mark.smoke
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method):
    """A process of multiprocessing is started and joined, and its exit code comes back."""
    if method == "forkserver" and sys.version_info < (3, 12):
        pytest.skip("it hangs under gevent.monkey alone as well")
    if method == "forkserver" and sys.version_info >= (3, 14):
        pytest.skip("it raises BlockingIOError under gevent.monkey alone as well")
    run(f"""
        import multiprocessing
        context = multiprocessing.get_context({method!r})
        if __name__ == "__main__":
            processes = [context.Process(target=os._exit, args=(number,)) for number in (0, 7)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            assert [process.exitcode for process in processes] == [0, 7]
            assert sigchld_is_default()
    """)


def test_multiprocessing_result_by_a_pipe():
    """Data comes back through a pipe from a forked process."""
    run("""
        import multiprocessing
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)

        def work():
            gevent.sleep(0)
            theirs.send(list(range(1000)))
            theirs.close()

        process = context.Process(target=work)
        process.start()
        assert ours.recv() == list(range(1000))
        process.join()
        assert process.exitcode == 0
    """)


def test_signal_handlers_under_monkey():
    """A SIGCHLD handler that the program sets through the patched signal module runs for its children."""
    run("""
        calls = []
        signal.signal(signal.SIGCHLD, lambda number, frame: calls.append(number))
        assert callable(signal.getsignal(signal.SIGCHLD))
        for count in range(1, 4):
            pid = os.fork()
            if pid == 0:
                os._exit(7)
            assert os.waitpid(pid, 0) == (pid, STATUS)
            while len(calls) < count:
                gevent.sleep(0)
        assert calls == [signal.SIGCHLD] * 3, calls
        assert sigchld_is_default()
    """)


def test_reaper_in_a_signal_handler():
    """The classic handler that collects all children with waitpid(-1, WNOHANG) gets each of them once."""
    run("""
        collected = []

        def reap(number, frame):
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    return
                if not pid:
                    return
                collected.append((pid, status))

        signal.signal(signal.SIGCHLD, reap)
        pids = []
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                os._exit(7)
            pids.append(pid)
        while len(collected) < len(pids):
            gevent.sleep(0)
        gevent.idle()
        assert sorted(collected) == sorted((pid, STATUS) for pid in pids)
    """)


def test_gevent_fork():
    """gevent.fork() and gevent.os.fork_and_watch(), called by their modules, are ours."""
    run("""
        calls = []
        for fork in (gevent.fork, lambda: gevent.os.fork_and_watch(calls.append), gevent.os.fork_gevent):
            pid = fork()
            if pid == 0:
                gevent.sleep(0)
                os._exit(7)
            assert gevent.os.waitpid(pid, 0) == (pid, STATUS)
        while not calls:
            gevent.sleep(0)
        assert calls[0].rstatus == STATUS and sigchld_is_default()
    """)


def test_pty_spawn():
    """pty.fork() comes back with a terminal."""
    run("""
        import pty
        pid, fd = pty.fork()
        if pid == 0:
            os.write(1, b"hello")
            os._exit(7)
        assert os.read(fd, 5) == b"hello"
        assert os.waitpid(pid, 0) == (pid, STATUS)
        os.close(fd)
    """)


def test_unpatch_with_children():
    """Children that were started before unpatch() are still waited for by coopos's function."""
    run("""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(7)
        coopos.unpatch()
        os.write(writer, b"x")
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
        reader, writer = os.pipe()
        other = os.fork()
        if other == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(5)
        # It ends once gevent's own waitpid waits for it, whose signal handler may miss an earlier end.
        gevent.spawn(os.write, writer, b"x")
        assert os.waitpid(other, 0) == (other, 5 << 8)
    """)


def test_subprocess_child_that_somebody_else_collects():
    """A plain waitpid(-1) elsewhere takes Popen's child away: its status, or an error; never a hang and never a success."""
    run(
        """
        import subprocess
        steal = monkey.get_original("os", "waitpid")
        reader, writer = os.pipe()
        process = subprocess.Popen(["/bin/sh", "-c", "read line; exit 3"], stdin=reader)
        monkey.get_original("os", "close")(writer)  # it ends while the hub doesn't run
        assert steal(-1, 0) == (process.pid, 3 << 8)
        try:
            returncode = process.wait()
        except ChildProcessError:
            pass
        else:
            assert returncode == 3, returncode
        gevent.spawn(steal, -1, 0)
        try:
            subprocess.check_call(["/bin/sh", "-c", "exit 3"])
        except (subprocess.CalledProcessError, ChildProcessError):
            pass
        else:
            raise AssertionError("a success was made up")
        """,
        may_complain=True,
    )


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc")
def test_subprocess_a_thousand_times():
    """No descriptor, zombie or thread is left after many processes."""
    run("""
        import subprocess
        def belongings():
            return len(os.listdir("/proc/self/fd"))
        subprocess.call(["true"])
        gevent.idle()
        before = belongings()
        for _ in range(30):
            jobs = [gevent.spawn(subprocess.call, ["true"]) for _ in range(10)]
            gevent.joinall(jobs)
            assert [job.value for job in jobs] == [0] * 10
        gevent.idle()
        assert belongings() == before
        try:
            monkey.get_original("os", "waitpid")(-1, os.WNOHANG)
        except ChildProcessError:
            pass
        else:
            raise AssertionError("a child is left")
    """)
