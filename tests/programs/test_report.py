"""coopos.report() and coopos.counters(): who waits for what, as the kernel and the compiled core tell it."""

import json
import os
import socket
import sys

import gevent
import pytest
from gevent.hub import get_hub

import coopos
from coopos import _core, _report
from coopos.subprocess import Popen

from ..helpers.children import collected_child, living_child
from ..helpers.support import (
    IN_CHILD,
    HubThread,
    make_clogged_pipe,
    make_pipe,
    parked,
    result_of,
    run_script,
    turn_loop,
    until,
)  # fmt: skip

HAS_PROC = os.path.exists("/proc/self/fd")
needs_proc = pytest.mark.skipif(not HAS_PROC, reason="no /proc here")


def facts():
    return json.loads(coopos.report(as_json=True))


def row_of(table, **wanted):
    """The one row of a table of the report that has these values."""
    rows = facts()[table]
    [row] = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return row


def stand_in_read(fd):
    return coopos.nb_read(fd, 1)


def check_greenlet(row, greenlet, function):
    assert row["greenlet"] == f"Greenlet {id(greenlet):#x}"
    assert row["stack"][0].startswith(f"{__file__}:") and row["stack"][0].endswith(f" in {function}")


# ---- descriptors -------------------------------------------------------------------------------------------------------------


def test_report_of_a_greenlet_that_reads_a_pipe():
    """Its descriptor, what that is, and where the greenlet stands."""
    with make_pipe() as (reader, writer):
        greenlet = parked(stand_in_read, reader)
        row = row_of("waits", fd=reader)
        assert (row["for"], row["kind"]) == ("READ", "pipe")
        until(lambda: row_of("waits", fd=reader)["waited_s"] > 0)
        if HAS_PROC:
            assert row["target"] == os.readlink(f"/proc/self/fd/{reader}") and row["other_ends"] == [writer]
        assert row["runs"] == "stand_in_read"
        check_greenlet(row, greenlet, "stand_in_read")
        assert f"fd {reader} for READ: pipe " in coopos.report()
        os.write(writer, b"x")
        result_of(greenlet)
        assert facts()["waits"] == []


def test_report_of_a_greenlet_that_writes():
    with make_clogged_pipe() as (_reader, writer, _size):
        greenlet = parked(coopos.nb_write, writer, b"x")
        assert row_of("waits", fd=writer)["for"] == "WRITE"
        greenlet.kill()


@needs_proc
def test_report_of_a_fifo(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        greenlet = parked(stand_in_read, fd)
        row = row_of("waits", fd=fd)
        assert (row["kind"], row["target"]) == ("FIFO", str(path))
        greenlet.kill()
    finally:
        os.close(fd)


def test_report_of_a_tty():
    master, slave = os.openpty()
    try:
        name = os.ttyname(slave)
        greenlet = parked(coopos.read, slave, 1)
        row = row_of("waits", fd=slave)
        assert (row["kind"], row["target"]) == ("tty", name if HAS_PROC else "")
        greenlet.kill()
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX"])
def test_report_of_a_socket(tmp_path, family):
    """Both addresses; of a Unix socket, the peer's pid."""
    family = getattr(socket, family)
    if family == socket.AF_INET6 and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    address = {socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0), socket.AF_UNIX: str(tmp_path / "s")}[family]
    with socket.socket(family) as listener, socket.socket(family) as client:
        try:
            listener.bind(address)
        except OSError as ex:
            pytest.skip(f"can't bind: {ex}")
        listener.listen()
        client.connect(listener.getsockname())
        with listener.accept()[0] as server:
            server.setblocking(False)
            greenlet = parked(stand_in_read, server.fileno())
            row = row_of("waits", fd=server.fileno())
            assert row["kind"] == "socket"
            if family == socket.AF_UNIX:
                assert (row["address"], row["peer"]) == (address, "")
                assert row.get("peer_pid", os.getpid()) == os.getpid()
            else:
                host = address[0] if family == socket.AF_INET else f"[{address[0]}]"
                ports = [each.getsockname()[1] for each in (server, client)]
                assert [row["address"], row["peer"]] == [f"{host}:{port}" for port in ports]
            greenlet.kill()


def test_report_leaves_a_socket_as_it_is():
    """Also in a program with a default timeout, under which a new socket object would change the descriptor's mode."""
    ours, theirs = socket.socketpair()
    greenlet = parked(coopos.read, ours.fileno(), 1)
    was_blocking = os.get_blocking(ours.fileno())
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)
    try:
        assert row_of("waits", fd=ours.fileno())["kind"] == "socket"
    finally:
        socket.setdefaulttimeout(before)
    assert os.get_blocking(ours.fileno()) == was_blocking
    theirs.send(b"x")
    assert result_of(greenlet) == b"x"
    ours.close()
    theirs.close()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no pidfds here")
def test_report_of_a_pidfd():
    """It names the process."""
    with living_child() as (pid, end):
        greenlet = parked(coopos.wait_exit, pid)
        assert row_of("waits", kind="pidfd")["pid"] == pid
        end()
        result_of(greenlet)
        assert coopos.waitpid(pid, 0) == (pid, 7 << 8)


@needs_proc
@pytest.mark.skipif(not hasattr(os, "eventfd"), reason="no eventfds here")
def test_report_of_an_eventfd():
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        greenlet = parked(_core.wait_until_ready, fd, _core.READ, "eventfd_read")
        assert row_of("waits", fd=fd)["kind"] == "eventfd"
        greenlet.kill()
    finally:
        os.close(fd)


def test_report_calls_no_code_of_the_program():
    """No repr() of arguments, no property for a name, no attribute of a callable."""

    class Trap:
        def __call__(self, fd):
            return coopos.nb_read(fd, 1)

        def __repr__(self):
            raise AssertionError("called")

        def __getattr__(self, name):
            raise AssertionError(f"asked for {name}")

    class Named(gevent.Greenlet):
        @property
        def name(self):
            raise AssertionError("asked for a name")

        def __getattribute__(self, name):
            caller = sys._getframe().f_back
            if caller is not None and caller.f_globals["__name__"] == "coopos._report":
                raise AssertionError(f"asked for {name}")
            return super().__getattribute__(name)

    with make_pipe() as (reader, _writer):
        greenlet = Named(Trap.__call__, Trap(), reader)
        greenlet.start()
        turn_loop()
        row = row_of("waits", fd=reader)
        assert "name" not in row and row["greenlet"].startswith("Named ")
        gevent.kill(greenlet)


def test_report_shows_names_of_others_as_text():
    """A name that is no text, or that would look like a line of the report or command a terminal."""
    with make_pipe() as (reader, _writer):
        greenlet = parked(stand_in_read, reader)
        greenlet.name = "\x1b[2J\nchildren: 99 \udcff"
        try:
            text = coopos.report()
        finally:
            greenlet.kill()
    assert r"\x1b[2J\nchildren: 99 \udcff" in text.replace("\\\\", "\\")
    assert all(line.isprintable() for line in text.splitlines()) and "\nchildren: 99" not in text
    text.encode()


def test_report_says_a_name_that_was_given():
    with make_pipe() as (reader, _writer):
        greenlet = parked(stand_in_read, reader)
        greenlet.name = "the reader"
        assert row_of("waits", fd=reader)["name"] == "the reader"
        assert "'the reader'" in coopos.report()
        greenlet.kill()


def test_report_shows_a_stack_that_many_have_once():
    n = _report.MAX_ALIKE + 5
    with make_pipe() as (reader, _writer):
        greenlets = [gevent.spawn(stand_in_read, reader) for _ in range(n)]
        turn_loop()
        text = coopos.report()
        assert text.count(" in stand_in_read\n") == 1
        assert text.count(f"fd {reader} for READ") == _report.MAX_ALIKE and "and 5 more with the same stack" in text
        assert len(facts()["waits"]) == n
        gevent.killall(greenlets)


# ---- workers and closes ------------------------------------------------------------------------------------------------------


def test_report_of_an_open_that_waits(tmp_path):
    """The path, and that it waits for another process."""
    path = str(tmp_path / "fifo")
    os.mkfifo(path)

    def stand_in_open():
        return coopos.open(path, os.O_RDONLY)

    greenlet = gevent.spawn(stand_in_open)
    until(lambda: facts()["jobs"] and facts()["jobs"][0]["state"] == "in a worker")
    row = row_of("jobs", call=f"open({path!r})")
    assert row["waits_for"] == "another process" and row["thread"] == get_hub().thread_ident
    until(lambda: facts()["jobs"][0]["waited_s"] > 0)
    assert any(line.endswith("stand_in_open") for line in row["stack"])
    assert f"open({path!r}), in a worker, waits for another process" in coopos.report()
    greenlet.kill()
    until(lambda: not facts()["jobs"])


def test_report_of_a_queued_job_and_of_a_close_that_is_put_off(tmp_path):
    """No worker is free for the first; the second has begun, and keeps its descriptor open."""
    first, second = (os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in "ab")
    limit = _core.set_limit(1)
    _core.hold(True)
    try:
        begun = parked(coopos.fsync, first)
        until(lambda: _core.count_begun() == 1)
        queued = parked(coopos.fsync, second)
        assert row_of("jobs", call=f"fsync({first})")["state"] == "in a worker"
        row = row_of("jobs", call=f"fsync({second})")
        assert (row["state"], row["waits_for"]) == ("queued", "a disk")
        assert coopos.counters()["queued_jobs"] == 1 and coopos.counters()["busy_workers"] == 1
        coopos.close(first)
        assert row_of("put_off_closes", fd=first)["others"] == 1
        assert f"close({first}) is put off" in coopos.report() and coopos.counters()["put_off_closes"] == 1
    finally:
        _core.hold(False)
        _core.set_limit(limit)
    gevent.joinall([begun, queued])
    until(lambda: not facts()["put_off_closes"])
    assert coopos.counters()["put_off_closes"] == 0
    os.close(second)


def test_report_of_a_greenlet_that_waits_for_its_turn_at_a_buffer_of_a_patched_program():
    """It is listed until it has its turn. The report says what is patched."""
    run_script(
        """
        from gevent import monkey
        monkey.patch_all()
        import json, os
        import gevent
        import coopos

        def facts():
            return json.loads(coopos.report(as_json=True))

        for patch, mode, words in ((coopos.patch, "on", "; patch()"), (lambda: coopos.patch(io=True), "io", "; patch(io=True)")):
            assert (facts()["patched"], "; not patched" in coopos.report()) == ("off", True)
            patch()
            assert facts()["patched"] == mode and words in coopos.report()
            coopos.unpatch()
        coopos.patch(io=True)
        reader, writer = os.pipe()
        with open(reader, "rb") as source, open(writer, "wb", buffering=0) as sink:
            greenlets = [gevent.spawn(source.readline) for _ in range(3)]
            gevent.sleep(0.05)
            assert [row["fd"] for row in facts()["turns"]] == [reader] * 2 and min(row["waited_s"] for row in facts()["turns"]) > 0
            assert f"done with a file's buffer: 2\\n  fd {reader}, for 0." in coopos.report()
            greenlets[2].kill()
            assert len(facts()["turns"]) == 1
            sink.write(b"1\\n2\\n")
            gevent.joinall(greenlets)
            assert facts()["turns"] == []
        """
    )


# ---- children ----------------------------------------------------------------------------------------------------------------


def test_report_of_a_child_and_of_those_who_wait_for_it():
    with living_child(os.posix_spawn, watch={"callback": lambda child: None}) as (pid, end):

        def stand_in_waitpid():
            return coopos.waitpid(pid, 0)

        greenlet = parked(stand_in_waitpid)
        row = row_of("children", pid=pid)
        assert (row["state"], row["callbacks"]) == ("alive", 1) and row["watched_by"] in ("pidfd", "thread")
        if HAS_PROC:
            assert row["process"] in ("sleeping", "running") and row["age_s"] >= 0 and row["command"] == "sh"
        [waiter] = row["waiters"]
        assert waiter["stack"][0].endswith("stand_in_waitpid")
        assert (coopos.counters()["children"], coopos.counters()["statuses"]) == (1, 0)
        assert f"  {pid}: alive; " in coopos.report()
        end()
        assert result_of(greenlet) == (pid, 7 << 8)
        assert facts()["children"] == []


def test_report_of_a_status_that_nobody_has_asked_for():
    pid = collected_child()
    row = row_of("children", pid=pid)
    assert row["state"] == "ended" and "process" not in row  # the pid may be another process's by now
    assert (coopos.counters()["children"], coopos.counters()["statuses"]) == (0, 1)
    assert coopos.waitpid(pid, 0) == (pid, 7 << 8)


def test_report_of_a_wait_for_any_child():
    with living_child() as (pid, end):
        greenlet = parked(coopos.waitpid, -1, 0)
        row = row_of("questions", about="any child")
        assert row["waiters"][0]["greenlet"] == f"Greenlet {id(greenlet):#x}"
        assert coopos.counters()["questions"] >= 1
        end()
        assert result_of(greenlet) == (pid, 7 << 8)


def test_repr_of_a_child_says_what_is_known():
    with living_child(os.posix_spawn, watch={"callback": lambda child: None}) as (pid, end):
        [(child, *_)] = _core.records()
        assert repr(child) == f"<coopos child {pid} alive, watched by {child.mechanism}, callbacks: 1>"
        greenlet = parked(coopos.waitpid, pid, 0)
        assert repr(child) == f"<coopos child {pid} alive, watched by {child.mechanism}, waiting: 1, callbacks: 1>"
        end()
        result_of(greenlet)
        assert repr(child) == f"<coopos child {pid} waited for, status 0x700: exit 7>"


def test_repr_of_a_live_popen_says_what_its_child_does():
    with Popen(["sleep", "1000"]) as process:
        text = repr(process)
        assert text.startswith("<Popen: returncode: None args: ['sleep', '1000'] child: <coopos child ")
        assert f"child {process.pid} alive, watched by " in text
        process.kill()
    assert repr(process) == "<Popen: returncode: -9 args: ['sleep', '1000']>"


# ---- threads, forks ----------------------------------------------------------------------------------------------------------


def test_report_has_the_hubs_of_all_threads():
    with HubThread() as thread, make_pipe() as (ours, _), make_pipe() as (theirs, writer):
        here = parked(stand_in_read, ours)
        there = thread.parked(stand_in_read, theirs)
        rows = {row["fd"]: row["thread"] for row in facts()["waits"]}
        assert rows[ours] == get_hub().thread_ident != rows[theirs]
        threads = {row["thread"]: row for row in facts()["threads"]}
        assert threads[rows[theirs]]["loop"] == threads[rows[ours]]["loop"] == type(get_hub().loop).__module__
        assert threads[rows[ours]]["is_main"] and not threads[rows[theirs]]["is_main"]
        os.write(writer, b"x")
        assert thread.result_of(there) == b"x"
        here.kill()


def test_report_made_in_another_thread_shows_what_this_one_does():
    """A plain thread without a hub makes it, and gets none."""
    run_script("""
        import json, os, threading, gevent, coopos
        from gevent._hub_local import get_hub_if_exists
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        greenlet = gevent.spawn(coopos.nb_read, reader, 1)
        gevent.sleep(0)
        found = []

        def look():
            found.append(json.loads(coopos.report(as_json=True)))
            assert get_hub_if_exists() is None
            found.append(True)

        def stand_in_callback():
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()

        gevent.get_hub().loop.run_callback(stand_in_callback)
        gevent.sleep(0)
        report, is_without_hub = found
        [main] = [row for row in report["threads"] if row["is_main"]]
        assert any(line.endswith("stand_in_callback") for line in main["stack"]), main
        [row] = report["waits"]
        assert (row["fd"], row["thread"]) == (reader, main["thread"])
        greenlet.kill()
    """)


def test_report_while_all_changes():
    """A thread reports without pause while greenlets wait, are woken, killed and closed, and children come and go."""
    run_script(
        """
        import json, os, signal, tempfile, threading, gevent, coopos
        reports, over, file = [], threading.Event(), tempfile.TemporaryFile()

        def look():
            while not over.is_set():
                reports.append(json.loads(coopos.report(as_json=True)))
                coopos.report()

        def churn(number):
            for n in range(60):
                reader, writer = os.pipe()
                greenlets = [gevent.spawn(coopos.read, reader, 1) for _ in range(3)]
                gevent.sleep(0)
                pid = coopos.fork_and_watch(lambda child: None) if n % 10 == number else None
                if pid == 0:
                    os._exit(0)
                if pid:
                    greenlets.append(gevent.spawn(coopos.waitpid, pid, 0))
                os.write(writer, b"x")
                greenlets[1].kill()
                gevent.sleep(0.001)
                with gevent.Timeout(1, False):
                    coopos.fsync(file.fileno())
                for greenlet in greenlets[:3]:
                    greenlet.link_exception(lambda each: None)
                    greenlet.kill()
                coopos.close(reader)
                os.close(writer)
                gevent.joinall(greenlets)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            gevent.joinall([gevent.spawn(churn, number) for number in range(4)], raise_error=True)
        finally:
            over.set()
            thread.join()
        assert len(reports) > 2 and any(report["waits"] for report in reports)
        assert json.loads(coopos.report(as_json=True))["waits"] == []
    """,
        may_complain=True,
    )


@pytest.mark.parametrize("keeps", [True, False])
def test_report_in_a_forked_child_is_its_own(keeps):
    """It has the greenlets that go on in the child, and none of the parent's children."""
    run_script(
        "import os, sys, traceback, signal, json\nimport gevent, coopos\nfork = coopos.fork\n"
        + IN_CHILD
        + f"""
parent = os.getpid()
reader, writer = os.pipe()
os.set_blocking(reader, False)
other = gevent.spawn(coopos.nb_read, reader, 1)
sleeper = coopos.fork()
if sleeper == 0:
    signal.pause()
gevent.sleep(0)
def facts():
    return json.loads(coopos.report(as_json=True))
def check():
    report = facts()
    assert report["pid"] == os.getpid() != parent
    assert [row["fd"] for row in report["waits"]] == [reader] * {keeps}, report
    assert report["children"] == [] and report["questions"] == [] and report["jobs"] == []
in_child(check, lambda: coopos.fork(keep_greenlets={keeps}))
[row] = facts()["children"]
assert row["pid"] == sleeper
os.kill(sleeper, signal.SIGKILL)
coopos.waitpid(sleeper, 0)
other.kill()
"""
    )


# ---- counters ----------------------------------------------------------------------------------------------------------------


def test_counters_are_ints_that_the_docstring_names():
    counters = coopos.counters()
    assert {type(count) for count in counters.values()} == {int}
    assert [name for name in counters if f"``{name}``" not in coopos.counters.__doc__] == []
    assert facts()["counters"].keys() == counters.keys()


def test_counters_count_waits_and_calls_of_workers(tmp_path):
    before = coopos.counters()
    with make_pipe() as (reader, _writer):
        greenlet = parked(stand_in_read, reader)
        assert coopos.counters()["parked"] == before["parked"] + 1
        greenlet.kill()
    assert coopos.counters()["parked"] == before["parked"]
    with open(tmp_path / "file", "w") as file:
        coopos.fsync(file.fileno())
    assert coopos.counters()["worker_calls"] == before["worker_calls"] + 1


def test_report_is_imported_when_it_is_used():
    run_script(
        """
        import sys, coopos
        coopos.counters()
        assert not {"coopos._report", "coopos._on_demand"} & set(sys.modules)
        assert "report" in dir(coopos) and callable(coopos.report)
        assert "coopos._report" in sys.modules and "coopos._on_demand" not in sys.modules
    """,
        COOPOS_REPORT=None,
    )
