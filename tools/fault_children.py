"""More scenarios, as those of fault_scenarios.py: children, programs and multiprocessing."""

import multiprocessing
import os
import signal
import threading

import gevent
import gevent.event
import gevent.monkey
from fault_states import END_S, beside, coopos, exits, forked, helped, helpers, killed, make_sleeper, parked, scenario, surely

# ---- children ----------------------------------------------------------------------------------------------------------------


@scenario
def fork_and_wait(stack):
    return lambda: coopos.waitpid(forked(), 0)[1]


@scenario(COOPOS_CHILDREN="thread")
def fork_and_wait_by_thread(stack):
    return lambda: coopos.waitpid(forked(), 0)[1]


@scenario
def fork_and_watch(stack):
    def body():
        told = gevent.event.Event()
        pid = coopos.fork_and_watch(lambda child: told.set())
        if pid == 0:
            exits(7)
        told.wait(END_S)
        return coopos.waitpid(pid, 0)[1], told.is_set()

    return body


@scenario
def fork_without_greenlets(stack):
    waiting = gevent.spawn(gevent.sleep, 1000)
    stack.callback(waiting.kill)

    def body():
        pid = coopos.fork(keep_greenlets=False)
        if pid == 0:
            gevent.sleep(0)
            exits(7)
        return coopos.waitpid(pid, 0)[1]

    return body


@scenario
def wait_for_killed(stack):
    pid = make_sleeper(stack)
    return helped(lambda: coopos.waitpid(pid, 0)[1], os.kill, pid, signal.SIGKILL)


@scenario
def wait_for_any(stack):
    pid = make_sleeper(stack)
    return helped(lambda: (coopos.wait()[1], forked() > 0, coopos.wait3(0)[1]), os.kill, pid, signal.SIGKILL)


@scenario
def wait_family(stack):
    def body():
        pid = forked()
        found = coopos.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT).si_status
        return found, coopos.wait4(pid, 0)[1]

    return body


@scenario
def wait_for_stop(stack):
    pid = make_sleeper(stack)

    def body():
        beside(os.kill, pid, signal.SIGSTOP)
        stopped = coopos.waitpid(pid, os.WUNTRACED)[1]
        surely(os.kill, pid, signal.SIGCONT)
        return stopped, coopos.waitpid(pid, os.WCONTINUED)[1]

    return body


@scenario
def wait_killed(stack):
    pid = make_sleeper(stack)
    return lambda: killed(parked(coopos.waitpid, pid, 0))


@scenario
def wait_without_hub(stack):
    pid = make_sleeper(stack)
    result = []

    def wait():
        try:
            result.append(coopos.waitpid(pid, 0)[1])
        except BaseException as ex:
            result.append(ex)

    def body():
        thread = threading.Thread(target=wait, daemon=True)
        surely(thread.start)
        surely(os.kill, pid, signal.SIGKILL)
        thread.join(END_S)
        [status] = result
        if isinstance(status, BaseException):
            raise status
        return status

    return body


@scenario
def wait_for_foreign(stack):
    pid = make_sleeper(stack)
    return helped(lambda: coopos.wait_exit(pid), os.kill, pid, signal.SIGKILL)


@scenario
def spawn(stack):
    return lambda: coopos.spawnv(os.P_WAIT, "/bin/true", ["true"])


class SystemFailed(Exception):
    """system(3) returns -1 for any error."""


@scenario
def system(stack):
    def body():
        status = coopos.system("exit 3")
        if status == -1:
            raise SystemFailed
        return status

    return body


@scenario
def posix_spawn(stack):
    return lambda: coopos.waitpid(coopos.posix_spawn("/bin/true", ["true"], os.environ), 0)[1]


@scenario
def popen_function(stack):
    def body():
        with coopos.popen("echo x") as file:
            return file.read()

    return body


@scenario
def run_program(stack):
    def body():
        done = coopos.subprocess.run(["cat"], input=b"abc", capture_output=True, timeout=END_S)
        return done.returncode, done.stdout, done.stderr

    return body


@scenario
def popen_killed(stack):
    def body():
        with coopos.subprocess.Popen(["sleep", "60"]) as process:
            try:
                process.wait(0.01)
            except coopos.subprocess.TimeoutExpired:
                pass
            finally:
                surely(process.kill)
        return process.returncode

    return body


@scenario
def popen_preexec(stack):
    return lambda: coopos.subprocess.call(["/bin/true"], preexec_fn=os.getpid)


@scenario
def popen_terminal(stack):
    def body():
        with coopos.subprocess.Popen(["echo", "x"], pty=True) as process:
            result = coopos.read_pty(process.pty.fileno() if hasattr(process.pty, "fileno") else process.pty, 100)
            process.wait()  # before the terminal is closed, which ends it
        return result, process.returncode

    return body


@scenario
def forkpty(stack):
    def body():
        pid, fd = coopos.forkpty()
        if pid == 0:
            surely(os.write, 1, b"x")
            exits(7)
        try:
            return coopos.read_pty(fd, 100), coopos.waitpid(pid, 0)[1]
        finally:
            surely(os.close, fd)

    return body


def patched():
    gevent.monkey.patch_all()
    coopos.patch()


@scenario
def multiprocessing_lock(stack):
    patched()
    context = multiprocessing.get_context("fork")
    lock = context.Lock()

    def body():
        lock.acquire()
        waiting = gevent.spawn(lock.acquire)
        helpers.append(waiting)
        gevent.sleep(0.005)
        surely(lock.release)
        return waiting.get(timeout=END_S)

    return body


@scenario
def multiprocessing_pipe(stack):
    patched()
    here, there = multiprocessing.Pipe()
    stack.callback(here.close)
    stack.callback(there.close)

    def body():
        helpers.append(gevent.spawn(here.recv))
        gevent.sleep(0)
        there.send("x" * 100)
        return len(helpers[-1].get(timeout=END_S))

    return body


@scenario
def multiprocessing_process(stack):
    patched()
    context = multiprocessing.get_context("fork")

    def body():
        process = context.Process(target=exits, args=(7,))
        try:
            process.start()
            process.join(END_S)
            return process.exitcode
        finally:
            if process.pid:
                surely(process.join, END_S)
            surely(process.close)

    return body
