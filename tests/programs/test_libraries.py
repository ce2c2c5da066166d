"""Libraries run on coopos as they are: pexpect, ptyprocess, plumbum, sh, GitPython, filelock, portalocker, watchdog, huey.

Each in a fresh interpreter, patched before the library is imported, as a program does it. A greenlet that ticks meanwhile shows
that the hub goes on; no child is left, and no SIGCHLD handler is there.
"""

import importlib.util
import shutil
import textwrap

import pytest

from ..helpers.support import run_script


def needs(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


PROGRAM = """
from gevent import monkey
monkey.patch_all()
import coopos
coopos.patch()
import os, signal, sys, tempfile, warnings
import gevent

turns = []


def turn():
    while True:
        turns.append(1)
        gevent.sleep(0.001)


gevent.spawn(turn)
warnings.simplefilter("ignore", DeprecationWarning)  # of the libraries'


def others_ran():
    '''Whether they did since this was asked last.'''
    count = len(turns)
    turns.clear()
    return count > 3


others_ran()
"""

END = """
assert monkey.get_original("signal", "getsignal")(signal.SIGCHLD) is signal.SIG_DFL
try:
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    raise AssertionError("a child is left")
except ChildProcessError:
    pass
"""


def run(script, io=False, monkey=""):
    program = PROGRAM.replace("coopos.patch()", f"coopos.patch(io={io})").replace("patch_all()", f"patch_all({monkey})")
    run_script(program + textwrap.dedent(script) + END)


@needs("pexpect")
def test_pexpect():
    """A dialogue with an interpreter, a timeout, an end, and exit statuses."""
    run("""
        import pexpect
        script = "sleep 0.05; printf 'name? '; read name; echo hello $name; read line; exit 7"
        child = pexpect.spawn("sh", ["-c", script], encoding="utf-8")
        child.expect_exact("name? ")
        assert others_ran()
        child.sendline("coopos")
        child.expect("hello (\\\\w+)")
        assert child.match.group(1) == "coopos"
        assert child.expect(["never", pexpect.TIMEOUT], timeout=0.05) == 1
        assert others_ran()
        child.sendline("")
        child.expect(pexpect.EOF)
        child.close()
        assert (child.exitstatus, child.signalstatus) == (7, None)
        output, status = pexpect.run("sh -c 'sleep 0.05; echo out; exit 3'", withexitstatus=True)
        assert (output, status) == (b"out\\r\\n", 3)
        assert others_ran()
        child = pexpect.spawn("sleep 100")
        assert child.isalive()
        child.terminate(force=True)
        assert not child.isalive()
    """)


@needs("ptyprocess")
def test_ptyprocess():
    """Its reads are those of a plain file, which nobody replaces and others wait for; its forks and waits are ours."""
    run("""
        from ptyprocess import PtyProcess
        script = "stty size; read line; echo got $line; read line; sleep 0.05; exit 7"
        process = PtyProcess.spawn(["sh", "-c", script], dimensions=(12, 34))
        assert process.readline() == b"12 34\\r\\n"
        process.write(b"data\\n")
        assert process.readline() == b"data\\r\\n"
        assert process.readline() == b"got data\\r\\n"
        others_ran()
        process.write(b"\\n")
        assert process.wait() == 7
        assert others_ran()
        process.close()
        try:
            PtyProcess.spawn(["/nonexistent/program"])
        except FileNotFoundError:
            pass
        else:
            raise AssertionError("it was started")
    """)


@needs("plumbum")
def test_plumbum():
    """A command, a pipeline, a failure, a timeout, and one in the background."""
    run("""
        from plumbum import BG, ProcessExecutionError, ProcessTimedOut, local
        sh = local["sh"]
        assert sh("-c", "sleep 0.05; echo out") == "out\\n"
        assert others_ran()
        assert (local["seq"]["1000"] | local["tail"]["-n", "1"])() == "1000\\n"
        try:
            sh("-c", "echo err >&2; exit 7")
        except ProcessExecutionError as ex:
            assert (ex.retcode, ex.stderr) == (7, "err\\n")
        else:
            raise AssertionError("no error")
        others_ran()
        try:
            sh("-c", "exec sleep 100", timeout=0.1)
        except ProcessTimedOut:
            pass
        else:
            raise AssertionError("no timeout")
        assert others_ran()
        future = sh["-c", "sleep 0.05; echo late; exit 3"] & BG(retcode=3)
        future.wait()
        assert future.stdout == "late\\n"
        assert others_ran()
    """)


@needs("sh")
def test_sh():
    """It forks by itself and waits in threads, which are greenlets here: a command, its input, a failure, a kill, lines."""
    run("""
        import sh
        assert str(sh.sh("-c", "sleep 0.05; echo out", _tty_out=False)) == "out\\n"
        assert others_ran()
        assert str(sh.cat(_in="x" * 200_000)) == "x" * 200_000
        try:
            sh.sh("-c", "exit 7")
        except sh.ErrorReturnCode_7:
            pass
        else:
            raise AssertionError("no error")
        lines = []
        running = sh.sh("-c", "echo one; sleep 0.05; echo two", _out=lines.append, _bg=True)
        running.wait()
        assert lines == ["one\\n", "two\\n"]
        running = sh.sleep("100", _bg=True, _bg_exc=False)
        running.kill()
        try:
            running.wait()
        except sh.SignalException_SIGKILL:
            pass
    """)


@needs("git")
@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_gitpython(tmp_path):
    """A repository is made, committed to, cloned and read, object by object through a git that keeps running."""
    run(f"""
        os.environ.update(
            GIT_AUTHOR_NAME="a", GIT_AUTHOR_EMAIL="a@example.com", GIT_COMMITTER_NAME="a", GIT_COMMITTER_EMAIL="a@example.com",
            GIT_CONFIG_GLOBAL=os.devnull,
        )
        import git
        repo = git.Repo.init({str(tmp_path / "repo")!r})
        for n in range(5):
            with open({str(tmp_path / "repo" / "file")!r}, "w") as file:
                file.write("x" * 100_000 + str(n))
            repo.index.add(["file"])
            repo.index.commit(f"commit {{n}}")
        assert [commit.message for commit in repo.iter_commits()] == [f"commit {{n}}" for n in reversed(range(5))]
        assert repo.head.commit.tree["file"].data_stream.read() == b"x" * 100_000 + b"4"
        clone = repo.clone({str(tmp_path / "clone")!r})
        assert clone.head.commit == repo.head.commit
        assert others_ran()
        try:
            repo.git.rev_parse("no-such-thing", verify=True)
        except git.GitCommandError as ex:
            assert ex.status == 128
        else:
            raise AssertionError("no error")
        repo.close()
        clone.close()
    """)


# ---- under patch(io=True) ----------------------------------------------------------------------------------------------------


@needs("pexpect")
def test_pexpect_popen_spawn():
    """Its thread reads a Popen's pipe by os.read."""
    run(
        """
        from pexpect.popen_spawn import PopenSpawn
        import pexpect
        child = PopenSpawn(["sh", "-c", "sleep 0.05; echo name; read name; echo hello $name"])
        child.expect_exact("name")
        assert others_ran()
        child.sendline("coopos")
        child.expect_exact("hello coopos")
        child.expect(pexpect.EOF)
        assert child.wait() == 0
        """,
        io=True,
    )


@needs("pexpect")
def test_pexpect_fdspawn():
    """It reads and writes a descriptor, a terminal here, by os.read and os.write."""
    run(
        """
        import pexpect.fdpexpect
        ours, theirs = os.openpty()
        session = pexpect.fdpexpect.fdspawn(ours, timeout=10)
        gevent.spawn_later(0.05, os.write, theirs, b"login: ")
        session.expect_exact("login: ")
        assert others_ran()
        session.sendline("me")
        assert os.read(theirs, 10) == b"me\\n"
        session.close()
        os.close(theirs)
        """,
        io=True,
    )


@needs("ptyprocess")
def test_ptyprocess_waits_to_read():
    """Its reads are those of a file that io.open makes of the terminal."""
    run(
        """
        from ptyprocess import PtyProcess
        process = PtyProcess.spawn(["sh", "-c", "sleep 0.1; echo hello; read line; exit 7"])
        others_ran()
        assert process.readline() == b"hello\\r\\n"
        assert others_ran()
        process.write(b"\\n")
        assert process.wait() == 7
        process.close()
        """,
        io=True,
    )


@pytest.mark.parametrize(
    ("library", "lock"),
    [
        pytest.param("filelock", "FileLock(path, timeout=10)", marks=needs("filelock")),
        pytest.param("portalocker", "Lock(path, flags=portalocker.LOCK_EX)", marks=needs("portalocker")),
    ],
)
def test_file_locks_between_processes(library, lock):
    """Two processes take turns: the counter in the file comes out right, and while one waits its other greenlets run."""
    run(
        f"""
        import subprocess, textwrap
        directory = tempfile.mkdtemp()
        path, counter, program = (os.path.join(directory, name) for name in ("lock", "counter", "program.py"))
        with open(counter, "w") as file:
            file.write("0")
        work = textwrap.dedent('''
            import gevent, {library}
            for _ in range(20):
                with {library}.{lock}:
                    with open(counter) as file:
                        number = int(file.read())
                    gevent.sleep(0.002)
                    with open(counter, "w") as file:
                        file.write(str(number + 1))
            ''')
        with open(program, "w") as file:
            file.write(f"path, counter = {{(path, counter)}}" + work)
        process = subprocess.Popen([sys.executable, "-m", "coopos", program])
        exec(work)
        assert others_ran()
        assert process.wait() == 0
        with open(counter) as file:
            assert file.read() == "40"
        """,
        io=True,
    )


@needs("watchdog")
def test_watchdog():
    """Its inotify observer waits and reads in a thread, which is a greenlet here.

    It asks a queue.Queue for its maxsize as a number. That of gevent's is None, so the stdlib's stays.
    """
    run(
        """
        from watchdog.events import FileSystemEventHandler
        from watchdog.observers import Observer

        seen = []


        class Handler(FileSystemEventHandler):
            def on_created(self, event):
                seen.append(event.src_path)


        directory = tempfile.mkdtemp()
        observer = Observer()
        observer.schedule(Handler(), directory)
        observer.start()
        for number in range(3):
            others_ran()
            path = os.path.join(directory, str(number))
            open(path, "w").close()
            with gevent.Timeout(20):
                while path not in seen:
                    gevent.sleep(0.01)
            assert others_ran()
        observer.stop()
        observer.join()
        """,
        io=True,
        monkey="queue=False",
    )


@needs("huey")
def test_huey_forks_a_worker():
    """A consumer of processes: it forks its worker and its scheduler, and other greenlets run while a task does."""
    run(
        """
        from huey import SqliteHuey
        from huey.consumer import Consumer

        directory = tempfile.mkdtemp()
        huey = SqliteHuey(filename=os.path.join(directory, "huey.db"))


        @huey.task()
        def work(number):
            gevent.sleep(0.05)
            return number * 2, os.getpid()


        consumer = Consumer(huey, workers=2, worker_type="process", initial_delay=0.01, max_delay=0.05)
        consumer.start()
        others_ran()
        results = [work(number) for number in range(10)]
        answers = [result.get(blocking=True, timeout=20, max_delay=0.05) for result in results]
        assert others_ran()
        assert [answer for answer, _ in answers] == [number * 2 for number in range(10)]
        assert os.getpid() not in {pid for _, pid in answers}
        consumer.stop(graceful=True)
        for worker, process in consumer.worker_threads:
            process.join()
        consumer.scheduler.join()
        """,
        io=True,
    )


def test_a_tailer_of_a_fifo_under_python_m_coopos(tmp_path):
    """A program that knows of no greenlets but in its ticking thread: open() and each read let that run."""
    program = tmp_path / "tailer.py"
    program.write_text(
        textwrap.dedent("""
            import sys, threading, time
            ticks = []

            def tick():
                while True:
                    ticks.append(1)
                    time.sleep(0.001)

            threading.Thread(target=tick, daemon=True).start()
            print("ready", flush=True)
            with open(sys.argv[1]) as fifo:
                print("opened", len(ticks) > 3, flush=True)
                while True:
                    before = len(ticks)
                    line = fifo.readline()
                    if not line:
                        break
                    print(line.strip(), len(ticks) > before + 3, flush=True)
        """)
    )
    fifo = tmp_path / "fifo"
    run_script(f"""
        import os, subprocess, sys, time
        os.mkfifo({str(fifo)!r})
        command = [sys.executable, "-m", "coopos", {str(program)!r}, {str(fifo)!r}]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
        with process.stdout:
            assert process.stdout.readline() == "ready\\n"
            time.sleep(0.2)
            with open({str(fifo)!r}, "w", buffering=1) as writer:
                assert process.stdout.readline() == "opened True\\n"
                for number in range(3):
                    time.sleep(0.2)
                    writer.write(f"line {{number}}\\n")
                    assert process.stdout.readline() == f"line {{number}} True\\n"
            assert process.wait() == 0
    """)
