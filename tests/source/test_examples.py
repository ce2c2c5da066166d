"""The programs in examples/, each run as a user runs it: a process of its own.

Nothing here sleeps to let something happen. A test waits for a line that the program prints, for its output to end or for
its exit, and fails when a deadline passes.
"""

import hashlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

termios = pytest.importorskip("termios")  # the examples fork, follow FIFOs and talk to terminals

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
DEADLINE_S = 30


class Output:
    """The lines of a stream as they come, collected by a thread."""

    def __init__(self, stream):
        self.lines = []
        self.at_end = False
        self.changed = threading.Condition()
        self.stream = stream
        self.thread = threading.Thread(target=self._collect, daemon=True)
        self.thread.start()

    def _collect(self):
        for line in self.stream:
            with self.changed:
                self.lines.append(line.rstrip("\n"))
                self.changed.notify_all()
        with self.changed:
            self.at_end = True
            self.changed.notify_all()

    def wait(self, pattern, count=1):
        """The first `count` matches of `pattern`, each a whole line; waits until there are that many."""

        def found():
            return [match for line in self.lines if (match := re.fullmatch(pattern, line))]

        with self.changed:
            self.changed.wait_for(lambda: self.at_end or len(found()) >= count, DEADLINE_S)
            assert len(found()) >= count, f"no {count} lines like {pattern!r} among {self.lines}"
            return found()[:count]

    def wait_end(self):
        """All the lines, once nobody has the other end of the stream open."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.at_end, DEADLINE_S), f"still open after {self.lines}"
            return self.lines


class Example:
    """A running example, with its input and both outputs in our hands; killed at the end of the test if still there."""

    def __init__(self, name, *args, stdin=subprocess.PIPE, **env):
        self.process = subprocess.Popen(
            [sys.executable, EXAMPLES / name, *map(os.fspath, args)],
            env={**os.environ, **env},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        self.out = Output(self.process.stdout)
        self.err = Output(self.process.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)
        if self.process.stdin is not None:
            self.process.stdin.close()
        for output in (self.out, self.err):
            output.thread.join(DEADLINE_S)
            output.stream.close()

    def type(self, text):
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def wait_exit(self):
        return self.process.wait(DEADLINE_S)


# --- prefork_echo.py


def start_echo(workers):
    """The server, its address and the process ids of its workers."""
    server = Example("prefork_echo.py", "--port", "0", "--workers", str(workers))
    [listening] = server.out.wait(r"listening on (.+):(\d+)")
    return server, (listening[1], int(listening[2])), worker_pids(server, workers)


def worker_pids(server, count):
    return [int(match[1]) for match in server.out.wait(r"worker (\d+) started", count)]


def connect(address):
    return socket.create_connection(address, timeout=DEADLINE_S)


def check_echo(client, data):
    """What is sent comes back, however much of it."""
    sender = threading.Thread(target=client.sendall, args=(data,))
    sender.start()
    received = bytearray()
    while len(received) < len(data):
        piece = client.recv(65536)
        assert piece, "the server hung up"
        received += piece
    sender.join(DEADLINE_S)
    assert received == data


def check_clients(address, count):
    clients = [connect(address) for _ in range(count)]
    try:
        for number, client in enumerate(clients):
            check_echo(client, b"client %d " % number * 20_000)
        for number, client in enumerate(clients):
            check_echo(client, b"again %d" % number)
    finally:
        for client in clients:
            client.close()


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_prefork_echo_replaces_a_killed_worker_and_stops_clean():
    server, address, pids = start_echo(workers=2)
    with server:
        assert len(set(pids)) == 2
        check_clients(address, 6)

        os.kill(pids[0], signal.SIGKILL)
        server.out.wait(rf"worker {pids[0]} ended: signal 9")
        new_pid = worker_pids(server, 3)[-1]
        assert new_pid not in pids
        check_clients(address, 6)

        # The new worker serves too: it is the only one left once the other is stopped in its tracks.
        os.kill(pids[1], signal.SIGSTOP)
        try:
            with connect(address) as client:
                check_echo(client, b"to the new worker")
        finally:
            os.kill(pids[1], signal.SIGCONT)

        server.process.send_signal(signal.SIGTERM)
        assert server.wait_exit() == 0
        assert not any(is_alive(pid) for pid in (*pids, new_pid))
        with pytest.raises(ConnectionRefusedError):
            connect(address)
        lines = server.out.wait_end()
        assert lines[-1] == "stopped"
        assert set(lines[-3:-1]) == {f"worker {pid} ended: exit status 0" for pid in (pids[1], new_pid)}
        assert server.err.wait_end() == []


def test_prefork_echo_restarts_as_often_as_workers_die():
    server, address, pids = start_echo(workers=1)
    with server:
        for died in range(1, 5):
            os.kill(pids[-1], signal.SIGTERM)
            server.out.wait(rf"worker {pids[-1]} ended: signal 15")
            pids = worker_pids(server, died + 1)
        assert len(set(pids)) == 5
        check_clients(address, 2)
        server.process.send_signal(signal.SIGINT)
        assert server.wait_exit() == 0
        assert not any(is_alive(pid) for pid in pids)


def test_prefork_echo_workers_end_with_a_killed_master():
    server, address, _pids = start_echo(workers=2)
    with server, connect(address) as client:
        check_echo(client, b"hello")
        server.process.kill()
        server.wait_exit()
        server.out.wait_end()  # the workers have it open as well, so this is the end of them all
        with pytest.raises(ConnectionRefusedError):
            connect(address)


# --- tutorial/


def start_step(name):
    """The server of a step, its address and the process ids of its workers."""
    server = Example(f"tutorial/{name}", PORT="0")
    [listening] = server.out.wait(r"listening on port (\d+)")
    return server, ("127.0.0.1", int(listening[1])), worker_pids(server, 0 if name == "step1.py" else 2)


def test_tutorial_step1():
    server, address, _ = start_step("step1.py")
    with server:
        check_clients(address, 3)


def test_tutorial_step2_goes_on_with_one_worker():
    server, address, pids = start_step("step2.py")
    with server:
        check_clients(address, 6)
        os.kill(pids[0], signal.SIGKILL)
        server.out.wait(f"worker {pids[0]} ended: -9")
        check_clients(address, 3)
        os.kill(pids[1], signal.SIGKILL)
        server.out.wait(f"worker {pids[1]} ended: -9")
        assert server.wait_exit() == 0


def test_tutorial_step3_replaces_killed_workers():
    server, address, pids = start_step("step3.py")
    with server:
        for killed in range(4):
            os.kill(pids[-1], signal.SIGKILL)
            server.out.wait(f"worker {pids[-1]} ended: -9")
            pids = worker_pids(server, 3 + killed)
            check_clients(address, 3)
        server.process.kill()
        server.wait_exit()
        with connect(address) as client:
            check_echo(client, b"nobody looks after them any more")
        for pid in {pids[0], pids[-1]}:
            os.kill(pid, signal.SIGKILL)
        server.out.wait_end()


def test_tutorial_step4_replaces_killed_workers_and_stops_clean():
    """A connection that is open when the server is told to stop, as by systemd or Ctrl-C, is served to its end."""
    server, address, pids = start_step("step4.py")
    with server:
        os.kill(pids[-1], signal.SIGKILL)
        server.out.wait(f"worker {pids[-1]} ended: -9")
        new = worker_pids(server, 3)[-1]
        check_clients(address, 6)
        with connect(address) as client:
            check_echo(client, b"before")
            os.killpg(server.process.pid, signal.SIGTERM)
            server.out.wait(r"worker \d+ ended: 0")  # the one without a connection
            check_echo(client, b"after")
        assert server.wait_exit() == 0
        lines = server.out.wait_end()
        assert lines[-1] == "stopped" and set(lines[-3:-1]) == {f"worker {pid} ended: 0" for pid in (pids[0], new)}
        assert server.err.wait_end() == []


def test_tutorial_step4_leaves_nothing_behind_a_killed_supervisor():
    server, address, _ = start_step("step4.py")
    with server:
        check_clients(address, 3)
        server.process.kill()
        server.wait_exit()
        server.out.wait_end()  # the workers have it open as well, so this is the end of them all
        with pytest.raises(ConnectionRefusedError):
            connect(address)


# --- supervisor.py


def test_supervisor_restarts_what_ends_and_stops_clean():
    with Example("supervisor.py") as supervisor:
        pids = [int(match[2]) for match in supervisor.out.wait(r"worker (\d) runs: (\d+)", 2)]
        for restarts, signum in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), 1):
            os.kill(pids[-1], signum)
            supervisor.out.wait(rf"worker (\d) ended: -{int(signum)}")
            pids = [int(match[2]) for match in supervisor.out.wait(r"worker (\d) runs: (\d+)", 2 + restarts)]
        assert len(set(pids)) == 5
        numbers = [match[1] for match in supervisor.out.wait(r"worker (\d) runs: (\d+)", 5)]
        assert set(numbers[:2]) == {"0", "1"} and numbers[2:] == [numbers[1]] * 3  # each in the place of the one that ended
        supervisor.process.send_signal(signal.SIGTERM)
        assert supervisor.wait_exit() == 0
        assert supervisor.out.wait_end()[-1] == "stopped"
        assert supervisor.err.wait_end() == []
        assert not any(is_alive(pid) for pid in pids)


# --- pty_recorder.py


def read_cast(path):
    """Header and text of a recording, its format checked on the way."""
    header, *events = map(json.loads, path.read_text().splitlines())
    assert header["version"] == 2 and header["width"] > 0 and header["height"] > 0
    times = [event[0] for event in events]
    assert times == sorted(times)
    assert {event[1] for event in events} <= {"o"}
    return header, "".join(event[2] for event in events)


def test_pty_recorder_records_a_shell_session(tmp_path):
    cast = tmp_path / "session.cast"
    script = "test -t 0 && test -t 1 && echo on a terminal; echo grüße; echo to stderr >&2; exit 7"
    with Example("pty_recorder.py", "-o", cast, "--", "/bin/sh", "-c", script) as recorder:
        assert recorder.wait_exit() == 7
        assert recorder.out.wait_end() == ["on a terminal", "grüße", "to stderr"]
        assert recorder.err.wait_end() == []
    header, text = read_cast(cast)
    assert header["command"] == f"/bin/sh -c {script}"
    assert text == "on a terminal\r\ngrüße\r\nto stderr\r\n"


def test_pty_recorder_passes_input_on_while_greenlets_run(tmp_path):
    cast = tmp_path / "session.cast"
    with Example("pty_recorder.py", "-o", cast, "--status", "--", "/bin/sh") as recorder:
        # The shell now waits in `read` for as long as it takes the recorder to tick five times more.
        recorder.type("stty -echo; echo rea''dy; read answer\n")
        recorder.out.wait(".*ready")
        ticks = int(recorder.err.wait(r"ticks: (\d+) events: \d+")[-1][1])
        recorder.err.wait(rf"ticks: {ticks + 5} events: \d+")
        recorder.type("forty-two\n")
        recorder.type('echo "<$answer>"; exit 7\n')
        recorder.out.wait(".*<forty-two>")
        assert recorder.wait_exit() == 7
    assert "<forty-two>\r\n" in read_cast(cast)[1]


def test_pty_recorder_loses_no_output_of_a_talkative_command(tmp_path):
    cast = tmp_path / "session.cast"
    script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done"
    with Example("pty_recorder.py", "-o", cast, "--", "/bin/sh", "-c", script) as recorder:
        assert recorder.wait_exit() == 0
        assert recorder.out.wait_end() == [f"line {number}" for number in range(20_000)]
    assert read_cast(cast)[1] == "".join(f"line {number}\r\n" for number in range(20_000))


def test_pty_recorder_passes_end_of_input_on(tmp_path):
    with Example("pty_recorder.py", "-o", tmp_path / "session.cast", "cat") as recorder:
        recorder.type("a line\n")
        recorder.out.wait("a line", count=2)  # the terminal's echo and cat's
        recorder.process.stdin.close()
        assert recorder.wait_exit() == 0


@pytest.mark.parametrize(
    ("command", "status"),
    [(["/bin/sh", "-c", "kill -9 $$"], 128 + 9), (["/no/such/command"], 127)],
    ids=["killed", "missing"],
)
def test_pty_recorder_exits_as_a_shell_would(tmp_path, command, status):
    with Example("pty_recorder.py", "-o", tmp_path / "session.cast", "--", *command) as recorder:
        assert recorder.wait_exit() == status


def test_pty_recorder_leaves_its_own_terminal_as_it_was(tmp_path):
    ours, its_terminal = os.openpty()
    try:
        before = termios.tcgetattr(its_terminal)
        script = "trap 'echo interrupted; exit 3' INT; echo ready; while :; do read line; done"
        args = ("-o", tmp_path / "session.cast", "--", "/bin/sh", "-c", script)
        with Example("pty_recorder.py", *args, stdin=its_terminal) as recorder:
            recorder.out.wait("ready")
            os.write(ours, b"\x03")  # Ctrl-C interrupts the command, not the recorder
            recorder.out.wait(".*interrupted")
            assert recorder.wait_exit() == 3
        assert termios.tcgetattr(its_terminal) == before
    finally:
        os.close(ours)
        os.close(its_terminal)


# --- log_follower.py


def append(path, text):
    with open(path, "a") as file:
        file.write(text)


def start_follower(*paths, interval_s=0.02):
    """The follower, once it has all its files open."""
    follower = Example("log_follower.py", "--interval", str(interval_s), *paths)
    for path in paths:
        follower.err.wait(re.escape(f"following {path}"))
    return follower


def test_log_follower_prints_what_is_appended(tmp_path):
    log = tmp_path / "app.log"
    append(log, "old\n")
    with start_follower(log) as follower:
        append(log, "one\ntw")
        follower.out.wait("one")
        append(log, "o\n\n")
        follower.out.wait("")
        assert follower.out.lines == ["one", "two", ""]


def test_log_follower_survives_rotation(tmp_path):
    log = tmp_path / "app.log"
    log.touch()
    with start_follower(log) as follower, open(log, "a") as old_file:
        for turn in range(3):
            append(log, f"before {turn}\n")
            follower.out.wait(f"before {turn}")
            log.rename(tmp_path / f"app.log.{turn}")
            if turn == 0:  # a writer that has not noticed yet
                print("late", file=old_file, flush=True)
                follower.out.wait("late")
            append(log, f"after {turn}\n")
            follower.out.wait(f"after {turn}")
        assert len(follower.err.wait(re.escape(f"rotated {log}"), count=3)) == 3
        assert follower.out.lines == [
            *["before 0", "late", "after 0"],
            *["before 1", "after 1"],
            *["before 2", "after 2"],
        ]


def test_log_follower_survives_truncation(tmp_path):
    log = tmp_path / "app.log"
    log.touch()
    with start_follower(log) as follower:
        append(log, "a long line before\n")
        follower.out.wait("a long line before")
        os.truncate(log, 0)
        follower.err.wait(re.escape(f"truncated {log}"))
        append(log, "after\n")
        follower.out.wait("after")
        assert follower.out.lines == ["a long line before", "after"]


def test_log_follower_waits_for_a_file_and_follows_two(tmp_path):
    one, two = tmp_path / "one.log", tmp_path / "two.log"
    append(one, "already there\n")
    with Example("log_follower.py", "--interval", "0.02", "--from-start", one, two) as follower:
        follower.out.wait(re.escape(f"{one}: already there"))
        follower.err.wait(re.escape(f"waiting for {two}: ") + ".*")
        append(two, "first\n")
        follower.out.wait(re.escape(f"{two}: first"))
        append(one, "more\n")
        follower.out.wait(re.escape(f"{one}: more"))
        assert len(follower.out.lines) == 3

        follower.process.send_signal(signal.SIGINT)
        assert follower.wait_exit() == -signal.SIGINT
        assert len(follower.err.wait_end()) == 3


def test_log_follower_reads_a_log_beside_many_idle_fifos(tmp_path):
    log, fifos = tmp_path / "app.log", [tmp_path / f"fifo{number}" for number in range(20)]
    log.touch()
    for fifo in fifos:
        os.mkfifo(fifo)
    with start_follower(*fifos, log) as follower:
        append(log, "in the log\n")
        follower.out.wait(re.escape(f"{log}: in the log"))
        for writer in ("first", "second"):  # each opens the FIFO anew
            append(fifos[7], f"{writer} writer\n")
            follower.out.wait(re.escape(f"{fifos[7]}: {writer} writer"))
        assert len(follower.out.lines) == 3


def test_log_follower_loses_nothing_of_a_fifo_to_its_timeouts(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    expected = [f"line {number}" for number in range(5_000)]
    with start_follower(fifo, interval_s=0.001) as follower, open(fifo, "w", buffering=1) as writer:
        for number, line in enumerate(expected):
            print(line, file=writer)
            if number % 50 == 49:  # now it runs dry, and the next line meets a read at any point of its life
                follower.out.wait(line)
        assert follower.out.lines == expected


# --- hash_files.py


def test_hash_files_prints_what_sha256sum_prints(tmp_path):
    below = tmp_path / "directory"
    below.mkdir()
    contents = {below / "empty": b"", below / "large": os.urandom(1_000_003), tmp_path / "small": b"small\n"}
    for path, content in contents.items():
        path.write_bytes(content)
    os.mkfifo(below / "fifo")
    with Example("hash_files.py", "--at-once", "2", "--status", below, tmp_path / "small", tmp_path / "missing") as hashing:
        assert hashing.wait_exit() == 1
        assert hashing.out.wait_end() == [f"{hashlib.sha256(content).hexdigest()}  {path}" for path, content in contents.items()]
        *errors, ticks = hashing.err.wait_end()
        assert errors == [f"{below / 'fifo'}: not a regular file", f"{tmp_path / 'missing'}: No such file or directory"]
        assert re.fullmatch(r"\d+ ticks", ticks)
