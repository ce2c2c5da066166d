"""COOPOS_REPORT: a signal that has a process print its report, and the socket that answers ``doctor --pid``."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import warnings

import psutil
import pytest

from coopos import _on_demand

from ..helpers.support import DEADLINE_S, run_script, until

#: Begins each program here: one greenlet parked on a pipe, and say(), which tells the test.
PRELUDE = """
import os, sys, gevent, coopos
reader, writer = os.pipe()
os.set_blocking(reader, False)

def stand_in_read():
    coopos.nb_read(reader, 1)

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

parked = gevent.spawn(stand_in_read)
gevent.sleep(0)
"""
SLEEPS = "say('ready')\ngevent.sleep(1000)"


@pytest.fixture
def runtime():
    """A directory for sockets, of which no other test knows. A socket's name is short."""
    directory = tempfile.mkdtemp(prefix="coopos", dir="/tmp")
    yield directory
    shutil.rmtree(directory)


@contextlib.contextmanager
def running(source, way, **env):
    """A process that runs *source* under COOPOS_REPORT=*way* and has said "ready"; it is killed at the end."""
    environment = {name: value for name, value in {**os.environ, "COOPOS_REPORT": way, **env}.items() if value is not None}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PRELUDE + textwrap.dedent(source)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            process.said = read_until(process.stdout, "ready\n")
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def read_until(file, *words):
    """What a process has written, once all of *words* are in it."""
    text = ""
    while not all(word in text for word in words):
        assert select.select([file], [], [], DEADLINE_S)[0], f"nothing more after {text!r}"
        piece = os.read(file.fileno(), 65536)
        assert piece, f"ended after {text!r}"
        text += piece.decode()
    return text


def doctor(*arguments, **env):
    """The finished ``python -m coopos doctor ARGUMENTS``."""
    return subprocess.run(
        [sys.executable, "-m", "coopos", "doctor", *map(str, arguments)],
        env={**os.environ, **env}, capture_output=True, encoding="utf-8", timeout=DEADLINE_S,
    )  # fmt: skip


def refusal_of(*arguments, **env):
    """What the doctor says when there is no answer."""
    done = doctor(*arguments, **env)
    assert done.returncode == 1 and not done.stdout
    return done.stderr.removeprefix("python -m coopos doctor: ").strip()


# ---- by a signal -------------------------------------------------------------------------------------------------------------

WHOLE = ("waits for descriptors: 1\n", " in stand_in_read\n")


def test_signal_while_the_hub_sleeps():
    """First comes the main thread's stack by faulthandler, then the whole report; and again at the next signal."""
    with running(SLEEPS, "SIGUSR1") as process:
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            text = read_until(process.stderr, *WHOLE)
            until(lambda: psutil.Process(process.pid).status() == "sleeping")  # the handler is over
            assert text.index("most recent call first") < text.index(f"report of process {process.pid} ")
            assert re.search(r"for READ: pipe .*, by Greenlet 0x\w+ of stand_in_read\(\)", text)


def test_signal_that_does_not_wake_the_hub():
    """As one that comes just before the hub falls asleep: here another thread gets it."""
    source = """
        import signal, threading, time
        thread = threading.Thread(target=time.sleep, args=(1000,), daemon=True)
        thread.start()
        gevent.spawn_later(0.01, lambda: None).join()
        say("ready")
        threading.Thread(target=lambda: (time.sleep(0.1), signal.pthread_kill(thread.ident, signal.SIGUSR1)), daemon=True).start()
        gevent.sleep(1000)
    """
    with running(source, "SIGUSR1") as process:
        read_until(process.stderr, *WHOLE)


@pytest.mark.parametrize("way", ["SIGUSR2,socket", "sigusr2, socket"])
def test_signal_beside_a_socket(runtime, way):
    with running(SLEEPS, way, XDG_RUNTIME_DIR=runtime) as process:
        process.send_signal(signal.SIGUSR2)
        read_until(process.stderr, *WHOLE)
        assert doctor("--pid", process.pid, XDG_RUNTIME_DIR=runtime).returncode == 0


@pytest.mark.parametrize(
    "body",
    ["import time; say('ready'); time.sleep(1000)", "say('ready')\n    while True: pass"],
    ids=["a call that releases the GIL", "Python code"],
)
def test_signal_while_the_hub_stands_in_a_callback(body):
    """The report shows that callback, and what waits for the hub."""
    source = f"def stand_in_callback():\n    {body}\ngevent.get_hub().loop.run_callback(stand_in_callback)\ngevent.sleep(1000)"
    with running(source, "SIGUSR1") as process:
        process.send_signal(signal.SIGUSR1)
        text = read_until(process.stderr, *WHOLE)
        assert " in stand_in_callback\n" in text.partition("report of process")[2]


def test_signal_while_a_call_holds_the_gil():
    """faulthandler answers, and names the function. A locked mutex that its thread locks again waits for ever."""
    source = """
        import ctypes
        libc = ctypes.PyDLL(None)
        mutex = ctypes.create_string_buffer(256)
        libc.pthread_mutex_lock(mutex)

        def stand_in_callback():
            say("ready")
            libc.pthread_mutex_lock(mutex)

        gevent.get_hub().loop.run_callback(stand_in_callback)
        gevent.sleep(1000)
    """
    with running(source, "SIGUSR1") as process:
        until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)
        process.send_signal(signal.SIGUSR1)
        text = read_until(process.stderr, " in stand_in_callback\n")
        assert "report of process" not in text


def test_signal_to_a_forked_child():
    source = """
        pid = coopos.fork()
        if pid == 0:
            say("child", os.getpid())
        gevent.sleep(0.1)
        say("ready")
        gevent.sleep(1000)
    """
    with running(source, "SIGUSR1") as process:
        said = process.said
        while "child" not in said or said.count("ready") < 2:
            said += read_until(process.stdout, "\n")
        child = int(re.search(r"child (\d+)", said)[1])
        os.kill(child, signal.SIGUSR1)
        assert f"report of process {child} " in read_until(process.stderr, *WHOLE)


def test_signal_runs_the_handler_that_was_there_before():
    """SIGINT still interrupts."""
    with running(SLEEPS, "SIGINT") as process:
        process.send_signal(signal.SIGINT)
        read_until(process.stderr, *WHOLE, "KeyboardInterrupt")
        assert process.wait(DEADLINE_S) == -signal.SIGINT


def test_signals_faster_than_their_reports():
    """A signal during a report begins no other, and the program goes on."""
    source = """
        import signal
        others = [gevent.spawn(stand_in_read) for _ in range(100)]
        gevent.sleep(0)
        heard = []
        signal.signal(signal.SIGUSR2, lambda *_: heard.append(1))
        say("ready")
        while not heard:
            gevent.sleep(0.001)
        say("on")
        gevent.sleep(1000)
    """
    with running(source, "SIGUSR1") as process:
        with tempfile.TemporaryFile() as printed:
            pump = subprocess.Popen(["cat"], stdin=process.stderr, stdout=printed)
            try:
                for _ in range(2000):
                    process.send_signal(signal.SIGUSR1)
                process.send_signal(signal.SIGUSR2)
                read_until(process.stdout, "on\n")
            finally:
                process.kill()
                pump.wait(DEADLINE_S)  # it copies what the process has printed
            printed.seek(0)
            text = printed.read().decode()
            assert "report of process" in text and "Error" not in text


def test_signal_to_a_program_that_is_deep_in_calls():
    """There may be no room for a report. The program doesn't hear of that."""
    out = run_script(
        """
        import signal, sys, coopos
        def deep(n):
            if n:
                return deep(n - 1)
            signal.raise_signal(signal.SIGUSR1)
            return "on"
        def room(n=0):
            try:
                return room(n + 1)
            except RecursionError:
                return n
        print([deep(room() - left) for left in range(3, 40)] == ["on"] * 37)
        """,
        COOPOS_REPORT="SIGUSR1",
        may_complain=True,
    )
    assert out == "True\n"


def test_signal_while_threads_come_and_go():
    """Their stacks change while faulthandler prints, so it must not read them: that would crash the process."""
    run_script("""
        import os, signal, threading, time
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        import coopos

        def churn():
            while not is_over:
                thread = threading.Thread(target=sum, args=([],))
                thread.start()

        is_over = False
        sleeper = threading.Thread(target=time.sleep, args=(1000,), daemon=True)
        sleeper.start()
        churner = threading.Thread(target=churn)
        churner.start()
        for _ in range(500):
            signal.pthread_kill(sleeper.ident, signal.SIGUSR1)
            time.sleep(0.0005)
        is_over = True
        churner.join()
    """, COOPOS_REPORT="SIGUSR1")


def test_signal_that_is_sent_while_standard_error_is_full():
    """In non-blocking mode, with nobody who reads: what fits is written, and the program goes on."""
    run_script(
        """
        import os, signal, gevent
        reader, writer = os.pipe()
        real = os.dup(2)
        os.dup2(writer, 2)
        os.set_blocking(2, False)
        import coopos
        from coopos import _on_demand
        _on_demand.TIMEOUT_S = 0.01
        try:
            while True:
                os.write(2, b"x" * 4096)
        except BlockingIOError:
            pass
        os.read(reader, 8192)
        os.kill(os.getpid(), signal.SIGUSR1)
        gevent.sleep(0)
        os.dup2(real, 2)
    """,
        COOPOS_REPORT="SIGUSR1",
    )


def test_signal_when_coopos_is_imported_in_another_thread():
    """Python lets only the main thread set a handler: the signal brings a stack, and a warning says so."""
    out = run_script(
        """
        import os, signal, threading, warnings
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        warnings.simplefilter("always")
        found = []
        def load():
            with warnings.catch_warnings(record=True) as caught:
                import coopos
            found.extend(str(each.message) for each in caught)
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGUSR1)
        print(found, os.read(reader, 4096))
    """,
        COOPOS_REPORT="SIGUSR1",
    )
    assert "outside the main thread" in out and "most recent call first" in out


# ---- by the socket -----------------------------------------------------------------------------------------------------------


def test_socket_answers_the_doctor(runtime):
    """As text and as JSON. The socket is the user's alone, and gone after the process's end."""
    stay = os.path.join(runtime, "stay")
    open(stay, "w").close()
    with running(f"say('ready')\nwhile os.path.exists({stay!r}): gevent.sleep(0.01)", "socket", XDG_RUNTIME_DIR=runtime) as process:
        path = f"{runtime}/coopos/{process.pid}.sock"
        assert os.stat(path).st_mode & 0o777 == 0o600 and os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
        done = doctor("--pid", process.pid, XDG_RUNTIME_DIR=runtime)
        assert (done.returncode, done.stderr) == (0, "") and all(words in done.stdout for words in WHOLE)
        done = doctor("--pid", process.pid, "--json", XDG_RUNTIME_DIR=runtime)
        report = json.loads(done.stdout)
        assert report["pid"] == process.pid and report["waits"][0]["kind"] == "pipe"
        os.unlink(stay)
        assert process.wait(DEADLINE_S) == 0
    assert os.listdir(os.path.dirname(path)) == []


def test_socket_answers_while_the_hub_stands_in_a_callback(runtime):
    """Python code that never gives way. The doctor shows where it is."""
    source = """
        def stand_in_callback():
            say("ready")
            while True:
                pass

        gevent.get_hub().loop.run_callback(stand_in_callback)
        gevent.sleep(1000)
    """
    with running(source, "socket", XDG_RUNTIME_DIR=runtime) as process:
        done = doctor("--pid", process.pid, XDG_RUNTIME_DIR=runtime)
        assert " in stand_in_callback\n" in done.stdout and all(words in done.stdout for words in WHOLE)


def test_socket_under_a_patched_program(runtime):
    """The thread's calls are the stdlib's own, whatever gevent and coopos have replaced."""
    source = "from gevent import monkey; monkey.patch_all()\ncoopos.patch(io=True)\n" + SLEEPS
    with running("import warnings; warnings.simplefilter('ignore')\n" + source, "socket", XDG_RUNTIME_DIR=runtime) as process:
        assert all(words in doctor("--pid", process.pid, XDG_RUNTIME_DIR=runtime).stdout for words in WHOLE)
    source = "import os\nos.environ.pop('COOPOS_REPORT')\nfrom gevent import monkey; monkey.patch_all()\n"
    source += "os.environ['COOPOS_REPORT'] = 'socket'\nimport coopos, gevent\ncoopos.patch(io=True)\n"
    source += "import coopos._on_demand as m\nassert m._socket_class.__module__ == 'socket', m._socket_class\n"
    run_script(source, COOPOS_REPORT="socket", XDG_RUNTIME_DIR=runtime)


@pytest.mark.parametrize("keeps", [True, False])
def test_socket_of_a_forked_child_is_its_own(runtime, keeps):
    """And a grandchild's, that was forked before the child's hub ran."""
    source = f"""
        pid = coopos.fork(keep_greenlets={keeps})
        if pid == 0:
            again = coopos.fork(keep_greenlets={keeps})
            gevent.sleep(0)
            say("child" if again else "grandchild", os.getpid(), "told")
            gevent.sleep(1000)
        say("ready")
        gevent.sleep(1000)
    """
    with running(source, "socket", XDG_RUNTIME_DIR=runtime) as process:
        said = process.said
        while said.count("told") < 2:
            said += read_until(process.stdout, "told\n")
        children = [int(pid) for pid in re.findall(r"child (\d+) told", said)]
        for pid, n in ((process.pid, 1), *((child, int(keeps)) for child in children)):
            done = doctor("--pid", pid, "--json", XDG_RUNTIME_DIR=runtime)
            assert done.returncode == 0, done.stderr
            report = json.loads(done.stdout)
            assert report["pid"] == pid and len(report["waits"]) == n


def test_socket_of_a_child_waits_until_the_hub_runs(runtime):
    """A child that ends or executes a program before that has no second thread. Without a hub it gets both at once."""
    count = "len(os.listdir('/proc/self/task'))"
    run_script(
        f"""
        import os, subprocess, sys, coopos
        if not os.path.exists("/proc/self/task"):
            raise SystemExit
        directory = os.environ["XDG_RUNTIME_DIR"] + "/coopos"

        def in_child(expected, function):
            pid = coopos.fork()
            if pid == 0:
                function()
                has_socket = f"{{os.getpid()}}.sock" in os.listdir(directory)
                os._exit(0 if ({count} - 1, has_socket) == (expected, bool(expected)) else 1)
            assert coopos.waitpid(pid, 0) == (pid, 0)

        in_child(1, int)           # no hub yet; the first wait makes one
        import gevent
        in_child(0, int)
        in_child(1, lambda: gevent.sleep(0))
        subprocess.run([sys.executable, "-c", ""], preexec_fn=lambda: os.listdir("/proc/self/task")[1:] and os._exit(1), check=True)
    """,
        COOPOS_REPORT="socket",
        XDG_RUNTIME_DIR=runtime,
    )


def test_socket_of_a_child_that_has_died_is_removed_by_the_next(runtime):
    """Most forked children end by _exit(), without atexit functions. Two processes at once leave each other's alone."""
    with running(SLEEPS, "socket", XDG_RUNTIME_DIR=runtime) as first:
        source = """
            for _ in range(5):
                pid = coopos.fork()
                if pid == 0:
                    gevent.sleep(0)
                    os._exit(0)
                coopos.waitpid(pid, 0)
            say("ready")
            gevent.sleep(1000)
        """
        with running(source, "socket", XDG_RUNTIME_DIR=runtime) as second:
            names = set(os.listdir(f"{runtime}/coopos"))
            assert names >= {f"{first.pid}.sock", f"{second.pid}.sock"} and len(names) <= 3
            assert doctor("--pid", first.pid, XDG_RUNTIME_DIR=runtime).returncode == 0


def test_socket_that_a_daemon_has_closed(runtime):
    """A program that closes all descriptors is still asked, and its thread takes no connection from another socket."""
    source = """
        import socket
        parked.kill()
        coopos.closerange(3, 1000)  # it spares the hub's own
        others = [socket.create_server(("127.0.0.1", 0)) for _ in range(8)]
        say("port", *[other.getsockname()[1] for other in others])
        say("ready")
        while True:
            gevent.sleep(0.01)
    """
    with running(source, "socket", XDG_RUNTIME_DIR=runtime) as process:
        for _ in range(3):
            done = doctor("--pid", process.pid, XDG_RUNTIME_DIR=runtime)
            assert done.returncode == 0, done.stderr
        for port in process.said.split("port ")[1].split("\n")[0].split():
            with socket.create_connection(("127.0.0.1", int(port))) as client:
                client.settimeout(0.05)
                with pytest.raises(TimeoutError):
                    client.recv(1)


def test_doctor_says_why_there_is_no_answer(runtime):
    """No such process, no such socket, a stopped process."""
    with running(SLEEPS, None, XDG_RUNTIME_DIR=runtime) as process:
        assert refusal_of("--pid", process.pid, XDG_RUNTIME_DIR=runtime) == (
            f"process {process.pid} has no socket for reports: "
            "it has not imported coopos (of gunicorn, ask a worker), or had no COOPOS_REPORT=socket when it did"
        )
    assert refusal_of("--pid", process.pid) == f"there is no process {process.pid}"
    assert refusal_of("--pid", 1 << 70) == f"there is no process {1 << 70}"
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    assert refusal_of("--pid", zombie.pid) == f"process {zombie.pid} has ended, and its parent has not waited for it yet"
    zombie.wait()
    assert "0 is no process" in doctor("--pid", 0).stderr
    with running(SLEEPS, "socket", XDG_RUNTIME_DIR=runtime) as process:
        process.send_signal(signal.SIGSTOP)
        assert "doesn't answer within" in refusal_of("--pid", process.pid, XDG_RUNTIME_DIR=runtime)


def test_doctor_believes_no_other_process(runtime):
    """One that listens under the name of another."""
    if not hasattr(_on_demand._socket, "SO_PEERCRED"):
        pytest.skip("the system doesn't tell who listens")
    with running(SLEEPS, None) as other, running(SLEEPS, "socket", XDG_RUNTIME_DIR=runtime) as process:
        os.rename(f"{runtime}/coopos/{process.pid}.sock", f"{runtime}/coopos/{other.pid}.sock")
        message = refusal_of("--pid", other.pid, XDG_RUNTIME_DIR=runtime)
        assert message.startswith(f"process {process.pid} listens at ")


@pytest.mark.parametrize("there", ["link", "file", "open to others", "of another user"])
def test_directory_that_is_not_safe_is_refused(runtime, monkeypatch, there):
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    path = os.path.join(runtime, "coopos")
    if there == "link":
        os.mkdir(os.path.join(runtime, "elsewhere"), 0o700)
        os.symlink("elsewhere", path)
    elif there == "file":
        open(path, "w").close()
    elif there == "open to others":
        os.mkdir(path)
        os.chmod(path, 0o750)
    else:
        if os.geteuid():
            pytest.skip("only root can make one")
        os.mkdir(path, 0o700)
        os.chown(path, 12345, -1)
    with pytest.raises(PermissionError, match="no directory that belongs to user"):
        _on_demand._make_directory()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monkeypatch.setattr(_on_demand.atexit, "register", lambda function: None)
        monkeypatch.setattr(_on_demand.os, "register_at_fork", lambda **hooks: None)
        _on_demand.start("socket")
    [warning] = caught
    assert "there is no socket for reports" in str(warning.message) and _on_demand._door is None


def test_directory_is_in_tmp_unless_the_user_has_one(monkeypatch, runtime):
    """Not in one that belongs to somebody else, as after sudo, nor in one whose name is too long for a socket."""
    tmp = f"/tmp/coopos-{os.geteuid()}"
    assert tmp in _on_demand._directories(os.geteuid())
    long = os.path.join(runtime, "x" * 80)
    os.mkdir(long)
    for value in ("", "relative", "/nonexistent", long):
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        assert _on_demand._make_directory() == tmp
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    assert _on_demand._make_directory() == f"{runtime}/coopos" == _on_demand._directories(os.geteuid())[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_socket_answers_no_other_user(runtime):
    """Even if the modes of the directory and the socket let him in."""
    with running(SLEEPS, "socket", XDG_RUNTIME_DIR=runtime) as process:
        path = f"{runtime}/coopos/{process.pid}.sock"
        os.chmod(runtime, 0o755)
        os.chmod(os.path.dirname(path), 0o755)
        os.chmod(path, 0o666)
        source = f"""
            import os, socket
            client = socket.socket(socket.AF_UNIX)
            os.setuid({{uid}})
            client.connect({path!r})
            try:
                client.sendall(b"text\\n")
            except BrokenPipeError:
                pass
            try:
                print(len(client.recv(100)))
            except ConnectionResetError:
                print(0)
            client.close()
        """
        assert run_script(source.format(uid=12345)) == "0\n"
        assert run_script(source.format(uid=0)) == "100\n"


def test_socket_that_nobody_answers_is_replaced(runtime):
    """What a process with the same pid has left."""
    run_script(
        """
        import os, socket
        os.mkdir(os.environ["XDG_RUNTIME_DIR"] + "/coopos", 0o700)
        path = f"{os.environ['XDG_RUNTIME_DIR']}/coopos/{os.getpid()}.sock"
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path)
        import coopos
        from coopos import _on_demand
        assert _on_demand._is_answered(path)
        assert f'"pid": {os.getpid()}' in _on_demand.ask(os.getpid(), True)
    """,
        COOPOS_REPORT="socket",
        XDG_RUNTIME_DIR=runtime,
    )


def test_socket_beside_what_others_have_left(runtime):
    """Names that are no numbers, a socket that died before it had its name, an umask that takes everything away."""
    with running(SLEEPS, "socket", XDG_RUNTIME_DIR=runtime) as dead:
        pass
    directory = f"{runtime}/coopos"
    for name in ("²³.sock", f"{dead.pid}.sock.early", f"{1 << 70}.sock", "12a.sock"):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(f"{directory}/{name}")
    with running(SLEEPS, "socket", XDG_RUNTIME_DIR=runtime) as process:
        assert {*os.listdir(directory)} == {"²³.sock", "12a.sock", f"{process.pid}.sock"}
    shutil.rmtree(directory)
    before = os.umask(0o777)
    try:
        with running(SLEEPS, "socket", XDG_RUNTIME_DIR=runtime):
            assert os.stat(directory).st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_socket_is_not_there_unless_it_is_asked_for(runtime):
    run_script(
        """
        import sys, threading, coopos
        assert "coopos._on_demand" not in sys.modules and threading.active_count() == len(sys._current_frames()) == 1
    """,
        COOPOS_REPORT="off",
        XDG_RUNTIME_DIR=runtime,
    )
    assert os.listdir(runtime) == []
