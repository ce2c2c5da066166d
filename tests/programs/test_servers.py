"""gunicorn's workers and Celery's gevent pool, each run as a user runs it, over coopos; and the programs of the recipes.

Their workers fork: the master its workers, a request handler or a task a multiprocessing.Process. What a forked child must not do
is go on with the greenlets of its parent, which accept connections, take tasks and look whether the master is still there: over
gevent alone they do, requests are answered and tasks done by processes that were started for something else.

Nothing here sleeps to let something happen: a test waits for an answer, for a line in a log or for a process to end.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from ..helpers.support import DEADLINE_S, kill_group


def needs(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


#: So many ticks of 10 ms come after a gunicorn worker has looked for its parent twice, which it does every second.
MANY_TICKS = 120

# What the processes do, for gunicorn's application and for Celery's tasks.
WORK = """
import functools, json, multiprocessing, os, signal, subprocess, sys, time
from concurrent.futures import ProcessPoolExecutor
import gevent


def tell(name, *words):
    with open(name, "a") as file:
        file.write(json.dumps([os.getpid(), *words]) + "\\n")  # in one write()


def tick():
    while True:
        tell("ticks")
        gevent.sleep(0.01)


ticker = None


def start_ticker():
    global ticker
    if ticker is None:
        ticker = gevent.spawn(tick)


def in_process(code):
    tell("started", code)
    while not os.path.exists("go"):
        time.sleep(0.01)
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


def run_process(code):
    '''The exit code of a process that ends with *code*, once there is a file "go".'''
    start_ticker()
    process = multiprocessing.get_context("fork").Process(target=in_process, args=(code,))
    process.start()
    process.join()
    return process.exitcode


def run_program(code):
    return subprocess.call(["sh", "-c", f"exit {code}"])


def wait(code):
    '''*code*, once there is a file "go".'''
    tell("started", code)
    while not os.path.exists("go"):
        time.sleep(0.01)
    return code


def pass_on(code):
    return code


def put(queue, code):
    queue.put(code)


def use_pools(method, code):
    '''*code*, by each way to have it from another process.'''
    ctx = multiprocessing.get_context(method)
    answers = []
    with ctx.Pool(4) as pool:
        answers += pool.map(pass_on, [code] * 50)
    pool = ctx.Pool(2, maxtasksperchild=1)
    answers += pool.map(pass_on, [code] * 4, 1)
    pool.close()
    pool.join()
    with ProcessPoolExecutor(2, mp_context=ctx) as executor:
        answers += executor.map(pass_on, [code] * 10)
    queue = ctx.Queue()
    process = ctx.Process(target=put, args=(queue, code))
    process.start()
    answers.append(queue.get())
    process.join()
    with ctx.Manager() as manager:
        answers.append(manager.Value("i", code).value)
    [answer] = set(answers)
    return answer


def leave_task(code):
    '''*code*, from a pool in which another task isn't over, and never will be.'''
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.apply_async(time.sleep, (1000,))
        return pool.apply(pass_on, (code,))


WORKS = {"process": run_process, "program": run_program, "wait": wait, "pass": pass_on, "leave": leave_task}
WORKS.update({method: functools.partial(use_pools, method) for method in ("fork", "spawn", "forkserver")})
"""

APPLICATION = (
    WORK
    + """

def application(environ, start_response):
    _, name, code = environ["PATH_INFO"].split("/")
    body = json.dumps([os.getpid(), WORKS[name](int(code))]).encode()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [body]
"""
)

TASKS = (
    WORK
    + """
import celery

app = celery.Celery("tasks", broker="filesystem://", set_as_current=False)
app.conf.broker_transport_options = dict(
    data_folder_in="queue", data_folder_out="out", control_folder="control", polling_interval=0.05)
app.conf.broker_connection_retry_on_startup = False
app.conf.task_ignore_result = True


@app.task
def work(name, code):
    tell("done", name, code, WORKS[name](code))


if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        app.send_task("tasks.work", arguments)
"""
)


def wait_until(claim, what):
    """Wait for ``claim()`` to be true, and return what it returns."""
    end = time.monotonic() + DEADLINE_S
    while not (result := claim()):
        assert time.monotonic() < end, f"still not true: {what}"
        time.sleep(0.01)
    return result


def is_there(pid):
    """Whether there is such a process, a zombie or not."""
    return psutil.pid_exists(pid)


def is_listening(pid):
    return any(connection.status == psutil.CONN_LISTEN for connection in psutil.Process(pid).net_connections("inet"))


class Server:
    """A running server: `python *arguments* in *directory*`. A context manager, which kills what is left of it."""

    def __init__(self, directory, *arguments, **env):
        self.directory = directory
        self.pids = set()  # of all its processes that were seen
        environment = {**os.environ, "COOPOS_KEEP_GREENLETS": "0", **env}
        with open(directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc_info):
        kill_group(self.process.pid)
        self.process.wait(DEADLINE_S)
        if kind is not None:
            print(self.log())

    def log(self):
        return (self.directory / "log").read_text(errors="replace")

    def in_log(self, pattern, count=1):
        """The first *count* matches of *pattern* in the log; waits until there are that many."""

        def found():
            matches = list(re.finditer(pattern, self.log()))
            if len(matches) < count:
                assert self.process.poll() is None, f"ended with {self.process.returncode} without {pattern!r}:\n{self.log()}"
            return matches[:count] if len(matches) >= count else None

        return wait_until(found, f"{count} times {pattern!r} in the log")

    def told(self, name, *words):
        """The pids of the processes that have told *words* in the file *name*, of all for no words."""
        with contextlib.suppress(FileNotFoundError):
            lines = [json.loads(line) for line in (self.directory / name).read_text().splitlines(True) if line.endswith("\n")]
            return [pid for pid, *told in lines if told == list(words) or not words]
        return []

    def wait_started(self, code):
        """The process that a work with *code* has begun in."""
        return wait_until(lambda: self.told("started", code), f"work {code} has begun")[0]

    def wait_ticks(self, pid, count=MANY_TICKS):
        """Wait until the ticker of *pid* has ticked *count* times more."""
        count += self.told("ticks").count(pid)
        wait_until(lambda: self.told("ticks").count(pid) >= count, f"{count} ticks of {pid}")

    def let_go_on(self):
        (self.directory / "go").touch()

    def descendants(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def check_no_zombie(self):
        """Wait until none of its processes is a zombie: nobody collects the children of a worker that has just been killed."""

        def has_none():
            with contextlib.suppress(psutil.NoSuchProcess):
                return all(process.status() != psutil.STATUS_ZOMBIE for process in self.descendants())
            return False

        wait_until(has_none, "no zombie is left")

    def stop(self):
        """End it as its supervisor does. It ends well, and so do all of its processes."""
        processes = self.descendants()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(DEADLINE_S) == 0, self.log()
        _, alive = psutil.wait_procs(processes, DEADLINE_S)
        assert not alive
        assert "Traceback" not in self.log()
        assert "Exception" not in self.log()


# ---- gunicorn ----------------------------------------------------------------------------------------------------------------

OVER_COOPOS = ["-m", "coopos", "-m", "gunicorn"]
each_way = pytest.mark.parametrize("options", [OVER_COOPOS, [*OVER_COOPOS, "--preload"]], ids=["plain", "preload"])


class Gunicorn(Server):
    """gunicorn with *count* workers of a *kind*, which have booted."""

    def __init__(self, directory, options, count, kind="gevent", **env):
        (directory / "application.py").write_text(APPLICATION)
        more = ["-w", str(count), "-b", "127.0.0.1:0", "--control-socket", str(directory / "control"), "-t", "100"]
        more += ["-k", kind, *(["--threads", "20"] if kind == "gthread" else [])]
        super().__init__(directory, *options, *more, "application", **env)
        try:
            [listening] = self.in_log(r"Listening at: (http://\S+)")
            self.url = listening[1]
            self.wait_booted(count)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def wait_booted(self, count):
        """The pids of the first *count* workers, in the order of their starts."""
        return [int(match[1]) for match in self.in_log(r"Booting worker with pid: (\d+)", count)]

    def ask(self, path):
        """[pid of the worker, what it has answered]."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=DEADLINE_S) as response:
            return json.load(response)

    def served_by(self, requests=10):
        """Which workers answer *requests* requests, in order."""
        answers = [self.ask(f"pass/{number}") for number in range(requests)]
        assert [answer for _, answer in answers] == list(range(requests))
        return {pid for pid, _ in answers}


@needs("gunicorn")
@each_way
def test_gunicorn_replaces_workers_that_were_killed(options, tmp_path):
    """The master learns of the end of each, and of how it has ended; requests are answered by the new ones alone."""
    with Gunicorn(tmp_path, options, 2) as server:
        killed = []
        for round_number in range(2):
            workers = server.wait_booted(2 + 2 * round_number)[-2:]
            assert server.served_by() <= set(workers)
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
            killed += workers
        new = set(server.wait_booted(6)[-2:])
        assert server.served_by() <= new
        sent = {int(match[1]) for match in server.in_log(r"Worker \(pid:(\d+)\) was sent SIGKILL!", 4)}
        assert sent == set(killed)
        server.check_no_zombie()
        assert not any(is_there(worker) for worker in killed)
        server.stop()
        assert {int(match[1]) for match in server.in_log(r"Worker exiting \(pid: (\d+)\)", 2)} == new


@needs("gunicorn")
@each_way
def test_gunicorn_reloads_while_a_request_waits(options, tmp_path):
    """The new workers serve at once, the old one ends when it has answered."""
    with Gunicorn(tmp_path, options, 1) as server, ThreadPoolExecutor() as pool:
        [old] = server.wait_booted(1)
        waiting = pool.submit(server.ask, "wait/5")
        assert server.wait_started(5) == old
        server.process.send_signal(signal.SIGHUP)
        new = server.wait_booted(2)[1]
        # What gunicorn has accepted in the moment in which it closes its listener it drops.
        wait_until(lambda: not is_listening(old), "the old worker accepts no more")
        assert server.served_by() == {new}
        assert not waiting.done()
        server.let_go_on()
        assert waiting.result(DEADLINE_S) == [old, 5]
        wait_until(lambda: not is_there(old), "the old worker has ended and was collected")
        assert server.served_by() == {new}
        assert "was sent" not in server.log()  # it has ended by itself
        assert "exited with code" not in server.log()
        server.stop()


@needs("gunicorn")
@pytest.mark.parametrize(
    ("options", "env"),
    [(OVER_COOPOS, {}), ([*OVER_COOPOS, "--preload"], {}), (["-m", "gunicorn"], {"COOPOS_PATCH": "1"})],
    ids=["plain", "preload", "by COOPOS_PATCH"],
)
def test_gunicorn_handler_starts_a_process(options, env, tmp_path):
    """The handler waits for it cooperatively and learns how it has ended; nothing of the worker's goes on in the process."""
    with Gunicorn(tmp_path, options, 1, **env) as server, ThreadPoolExecutor() as pool:
        [worker] = server.wait_booted(1)
        codes = [0, 7, -signal.SIGKILL]
        waiting = [pool.submit(server.ask, f"process/{code}") for code in codes]
        processes = [server.wait_started(code) for code in codes]
        assert worker not in processes
        assert server.served_by(30) == {worker}
        assert [server.ask(f"program/{code}") for code in (0, 3)] == [[worker, 0], [worker, 3]]
        server.wait_ticks(worker)
        assert server.served_by(30) == {worker}
        assert all(is_there(process) for process in processes)
        server.let_go_on()
        assert [answer.result(DEADLINE_S) for answer in waiting] == [[worker, code] for code in codes]
        assert not any(is_there(process) for process in processes)
        server.check_no_zombie()
        assert set(server.told("ticks")) == {worker}
        server.stop()
        assert "Parent changed" not in server.log()
        assert server.log().count("Worker exiting") == 1


each_kind = pytest.mark.parametrize("kind", ["gevent", "gthread", "sync"])


@needs("gunicorn")
@each_kind
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_gunicorn_handler_uses_pools(kind, method, tmp_path):
    """They inherit the worker's SIGTERM handler, or nothing; all of them end, and so does the server."""
    with Gunicorn(tmp_path, OVER_COOPOS, 1, kind) as server:
        [worker] = server.wait_booted(1)
        assert [server.ask(f"{method}/{code}") for code in (1, 2)] == [[worker, 1], [worker, 2]]
        server.stop()


@needs("gunicorn")
@each_kind
def test_gunicorn_answers_many_requests_that_use_pools(kind, tmp_path):
    """20 at once, some of which leave a pool whose worker is in the middle of a task."""
    with Gunicorn(tmp_path, OVER_COOPOS, 1, kind) as server, ThreadPoolExecutor(20) as pool:
        [worker] = server.wait_booted(1)
        works = [("leave" if (kind != "sync" and code % 4 == 0) or code == 0 else "fork", code) for code in range(20)]
        answers = list(pool.map(server.ask, [f"{name}/{code}" for name, code in works]))
        assert answers == [[worker, code] for code in range(20)]
        wait_until(lambda: {process.pid for process in server.descendants()} == {worker}, "all processes of the pools have ended")
        server.stop()


@needs("gunicorn")
@each_kind
def test_gunicorn_worker_ends_by_its_own_handler(kind, tmp_path):
    """That of SIGQUIT sleeps and exits; it runs in the hub if the worker waits for requests."""
    with Gunicorn(tmp_path, OVER_COOPOS, 1, kind) as server:
        [worker] = server.wait_booted(1)
        assert server.ask("pass/1") == [worker, 1]
        wait_until(lambda: psutil.Process(worker).status() == psutil.STATUS_SLEEPING, "the worker waits for requests")
        os.kill(worker, signal.SIGQUIT)
        new = server.wait_booted(2)[1]
        assert server.ask("pass/2") == [new, 2]
        assert not is_there(worker)
        assert "BlockingSwitchOutError" not in server.log()


# ---- Celery ------------------------------------------------------------------------------------------------------------------


class Celery(Server):
    """A Celery worker with a gevent pool that is ready; its broker is a directory."""

    def __init__(self, directory, *options, **env):
        (directory / "tasks.py").write_text(TASKS)
        for name in ("queue", "out", "control"):
            (directory / name).mkdir(exist_ok=True)
        (directory / "log").write_text("")
        more = ["-A", "tasks", "worker", "-P", "gevent", "-c", "10", "-l", "INFO"]
        super().__init__(directory, *options, *more, **env)
        try:
            self.wait_ready(1)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def wait_ready(self, count):
        self.in_log(r"celery@\S+ ready", count)

    def send(self, *works):
        """Put (name, code) of each work into the queue, as whole files: the broker takes one that is not written yet, too."""
        command = [sys.executable, "tasks.py", json.dumps(works)]
        subprocess.run(command, cwd=self.directory, check=True, timeout=DEADLINE_S)
        for path in sorted((self.directory / "out").iterdir()):
            path.rename(self.directory / "queue" / path.name)

    def wait_done(self, name, code):
        """Who has done such a work with success: [its pid], or more if that was done more than once."""
        return wait_until(lambda: self.told("done", name, code, code), f"{name} {code} is done")


PASSES = [("pass", code) for code in range(30, 50)]


def check_passes(server):
    """Each is done once, by the worker."""
    assert [server.wait_done(*work) for work in PASSES] == [[server.process.pid]] * len(PASSES)


@needs("celery")
def test_celery_task_starts_a_process(tmp_path):
    """The task waits for it cooperatively and learns how it has ended; nothing of the worker's goes on in the process."""
    with Celery(tmp_path, "-m", "coopos", "-m", "celery") as server:
        codes = [0, 7, -signal.SIGKILL]
        server.send(*[("process", code) for code in codes])
        processes = [server.wait_started(code) for code in codes]
        server.wait_ticks(server.process.pid, 20)
        server.send(*PASSES, ("program", 0), ("program", 3))
        check_passes(server)
        assert [server.wait_done("program", code) for code in (0, 3)] == [[server.process.pid]] * 2
        assert all(is_there(process) for process in processes)
        assert not any(server.told("done", "process", code, code) for code in codes)
        server.let_go_on()
        assert [server.wait_done("process", code) for code in codes] == [[server.process.pid]] * 3
        assert not any(is_there(process) for process in processes)
        server.check_no_zombie()
        assert set(server.told("ticks")) == {server.process.pid}
        server.stop()
        assert "ForkProcess" not in server.log()


@needs("celery")
def test_celery_worker_is_killed_and_started_again(tmp_path):
    """What the killed one has started takes none of the tasks that the next one is there for."""
    with Celery(tmp_path, "-m", "coopos", "-m", "celery") as killed:
        killed.send(("process", 7))
        process = killed.wait_started(7)
        killed.process.kill()
        killed.process.wait(DEADLINE_S)
        with Celery(tmp_path, "-m", "coopos", "-m", "celery") as server:
            assert is_there(process)
            server.send(*PASSES)
            check_passes(server)
            server.let_go_on()
            wait_until(lambda: not is_there(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE, "it ends")
            server.stop()


@needs("celery")
def test_celery_worker_restarts_itself(tmp_path):
    """On SIGHUP it waits for what runs, and executes itself again, which COOPOS_PATCH has coopos in again."""
    script = pathlib.Path(sys.executable).with_name("celery")
    with Celery(tmp_path, "-m", "coopos", str(script), COOPOS_PATCH="1") as server:
        server.send(("process", 7))
        server.wait_started(7)
        server.process.send_signal(signal.SIGHUP)
        server.in_log("Restarting celery worker")
        server.let_go_on()
        assert server.wait_done("process", 7) == [server.process.pid]
        server.wait_ready(2)
        (tmp_path / "go").unlink()
        server.send(("process", 8))
        process = server.wait_started(8)
        server.wait_ticks(server.process.pid, 20)
        server.send(*PASSES)
        check_passes(server)
        server.let_go_on()
        assert server.wait_done("process", 8) == [server.process.pid]
        assert not is_there(process)
        assert set(server.told("ticks")) == {server.process.pid}
        server.stop()


@needs("celery")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_celery_tasks_use_pools(method, tmp_path):
    """Ten at once, while another leaves a pool whose worker is in the middle of a task."""
    with Celery(tmp_path, "-m", "coopos", "-m", "celery") as server:
        works = [(method, code) for code in range(10 if method == "fork" else 2)]
        server.send(*works, ("leave", 100))
        assert [server.wait_done(*work) for work in [*works, ("leave", 100)]] == [[server.process.pid]] * (len(works) + 1)
        server.stop()


# ---- the programs of the recipes, in examples/, started by their pages' commands ------------------------------------------------

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = pathlib.Path(sys.executable).parent
#: As the pages have it: nothing but the environment switches coopos on.
FROM_OUTSIDE = {"COOPOS_PATCH": "1", "COOPOS_KEEP_GREENLETS": "0"}


class Recipe(Server):
    """A script of this environment, run by its name beside an example."""

    def __init__(self, directory, example, script, *arguments):
        if not SCRIPTS.joinpath(script).exists():
            pytest.skip(f"{script} is not installed")
        if not EXAMPLES.is_dir():
            pytest.skip("the examples are not beside the tests")
        (directory / example).write_text(EXAMPLES.joinpath(example).read_text())
        program = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
        super().__init__(directory, "-c", program, str(SCRIPTS / script), *arguments, **FROM_OUTSIDE)


def check_wsgi_app(url):
    for path, answer in (("", b"hello\n"), ("program", b"from a program\n"), ("pool", b"[3, 5]\n")):
        with urllib.request.urlopen(f"{url}/{path}", timeout=DEADLINE_S) as response:
            assert response.read() == answer


def test_recipe_gunicorn(tmp_path):
    arguments = ("-k", "gevent", "-b", "127.0.0.1:0", "--control-socket", str(tmp_path / "control"), "wsgi_app")
    with Recipe(tmp_path, "wsgi_app.py", "gunicorn", *arguments) as server:
        [listening] = server.in_log(r"Listening at: (http://\S+)")
        check_wsgi_app(listening[1])
        server.stop()


def test_recipe_uwsgi(tmp_path):
    arguments = "--http-socket 127.0.0.1:0 --master --processes 2 --gevent 100 --gevent-monkey-patch --die-on-term"
    with Recipe(tmp_path, "wsgi_app.py", "uwsgi", *arguments.split(), "--module", "wsgi_app") as server:
        worker = int(server.in_log(r"spawned uWSGI worker 1 \(pid: (\d+)")[0][1])

        def addresses():
            return {connection.laddr for connection in psutil.Process(worker).net_connections("inet")}

        [address] = wait_until(addresses, "the worker listens")
        url = f"http://{address.ip}:{address.port}"
        check_wsgi_app(url)
        os.kill(worker, signal.SIGKILL)
        server.in_log(r"Respawned uWSGI worker 1")
        check_wsgi_app(url)
        server.stop()


def test_recipe_celery(tmp_path):
    for name in ("queue", "control"):
        (tmp_path / name).mkdir()
    arguments = ("-A", "celery_tasks", "worker", "-P", "gevent", "-c", "100", "-l", "INFO")
    with Recipe(tmp_path, "celery_tasks.py", "celery", *arguments) as server:
        server.in_log(r"celery@\S+ ready")
        subprocess.run([sys.executable, "celery_tasks.py"], cwd=tmp_path, check=True, timeout=DEADLINE_S)
        server.in_log(r"count\[\S+\] succeeded in \S+: \[3, 5\]")
        server.in_log(r"run_program\[\S+\] succeeded", 2)
        assert "Warm shutdown" not in server.log()
        server.stop()


def test_recipe_locust(tmp_path):
    arguments = ("-f", "locustfile.py", "--headless", "-u", "20", "-r", "20", "-t", "3s", "--processes", "2")
    with Recipe(tmp_path, "locustfile.py", "locust", *arguments) as server:
        assert server.process.wait(DEADLINE_S) == 0, server.log()
        ran = [int(match[1]) for match in server.in_log(r"program +true +(\d+) +0\(0\.00%\)")]
        assert ran[-1] > 0
