"""A greenlet that never has to wait gives the hub its turns. Each script would never end if it didn't."""

import os

import pytest

from ..helpers.support import run_script

PREPARED = """
    import os, threading, time, gevent, coopos
    reader, writer = os.pipe()
    raw_reader, raw_writer = coopos.FileIO(reader, "r", closefd=False), coopos.FileIO(writer, "w", closefd=False)
    def ready_pair():
        coopos.write(writer, b"x")
        coopos.read(reader, 1)
    polls = set()
    def count_polls():
        '''From now on *polls* has each *n* at which the loop polled.'''
        global watcher
        ready, peer = os.pipe()
        os.write(peer, b"x")
        watcher = gevent.get_hub().loop.io(ready, 1)
        watcher.start(lambda: polls.add(n))
"""


def script(text):
    """PREPARED and *text*, which is indented as a function's docstring."""
    return "\n".join(line[4:] for line in PREPARED.splitlines()) + "\n" + "\n".join(line[8:] for line in text.splitlines())


@pytest.mark.parametrize(("fairness", "turns"), [("0", 0), ("1", 9), ("5", 1)])
def test_turn_after_so_many_ready_calls(fairness, turns):
    out = run_script(
        script("""
        for _ in range(20):  # until no turn by time has come as well: the machine may have stood still
            os.write(writer, b"x" * 10)
            gevent.sleep(0.01)
            polls.clear()
            count_polls()
            for n in range(10):
                coopos.read(reader, 1)
            watcher.close()
            if len(polls) == TURNS:
                break
        print(len(polls))
        """).replace("TURNS", str(turns)),
        COOPOS_FAIRNESS=fairness,
    )
    assert int(out) == turns


@pytest.mark.parametrize("is_blocking", [True, False], ids=["blocking", "nonblocking"])
@pytest.mark.parametrize("call", ["raw_reader.read(1)", "raw_reader.readinto(bytearray(1))", "raw_writer.write(b'x')"])
def test_turn_after_so_many_ready_calls_of_a_file(call, is_blocking):
    """After every tenth call in a row the others have their turn; a call that had to wait begins a new row."""
    run_script(
        script(f"""
        for fd in (reader, writer):
            os.set_blocking(fd, {is_blocking})
        raw_writer.write(b"x" * 1000)
        count_polls()
        since = time.monotonic()
        for n in range(100):
            {call}
        by_time = (time.monotonic() - since) / 0.007  # the machine may be slow, or have stood still
        assert 9 <= len(polls) <= 11 + by_time, (len(polls), by_time)
        watcher.stop()
        """),
        COOPOS_FAIRNESS="10",
    )


PAIRS = {
    "read write": "ready_pair()",
    "nb_read nb_write": "coopos.nb_write(writer, b'x'); coopos.nb_read(reader, 1)",
    "readinto writev": "coopos.writev(writer, [b'x']); coopos.readinto(reader, bytearray(1))",
    "FileIO": "raw_writer.write(b'x'); raw_reader.read(1)",
    "read_exactly write_all": "coopos.write_all(writer, b'x'); coopos.read_exactly(reader, 1)",
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_timers_and_reads_of_others_run(pair):
    run_script(
        script(f"""
        others, theirs = os.pipe()
        def other():
            gevent.sleep(0.01)
            gevent.spawn_later(0.01, os.write, theirs, b"y")
            assert coopos.read(others, 1) == b"y"
            gevent.sleep(0.01)
        waiting = gevent.spawn(other)
        while not waiting.ready():
            {pair}
        waiting.get()
        """)
    )


def test_each_thread_has_its_own_turns():
    run_script(
        script("""
        def run():
            reader, writer = os.pipe()
            waiting = gevent.spawn(gevent.sleep, 0.05)
            while not waiting.ready():
                coopos.write(writer, b"x")
                coopos.read(reader, 1)
            done.append(1)
        done = []
        gevent.get_hub()  # on libuv, two threads that make their first hubs at once harm each other
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        run()
        for thread in threads:
            thread.join()
        assert len(done) == 4
        """)
    )


def test_a_hub_that_had_its_turn_gets_none():
    run_script(
        script("""
        for _ in range(20):
            ran = []
            gevent.sleep(0.005)
            other = gevent.spawn(ran.append, 1)
            since = time.monotonic()
            ready_pair()
            assert not ran or time.monotonic() > since + 0.004  # the machine stood still
            other.kill()
        """)
    )


def test_none_where_nothing_could_run():
    """In the hub, and in a thread that has none, ready calls go on."""
    run_script(
        script("""
        def spin():
            end = time.monotonic() + 0.05
            while time.monotonic() < end:
                ready_pair()
            done.append(1)
        done = []
        thread = threading.Thread(target=spin)
        thread.start()
        thread.join()
        gevent.get_hub().loop.run_callback(spin)
        gevent.sleep(0)
        assert len(done) == 2
        """)
    )


def test_child_of_a_greenlet_that_was_due():
    """A child's hub gets its turns, whatever was queued at the parent's."""
    run_script(
        script("""
        for keep in (True, False):
            ready_pair()
            time.sleep(0.02)
            ready_pair()
            pid = coopos.fork(keep_greenlets=keep)
            if pid == 0:
                waiting = gevent.spawn(gevent.sleep, 0.05)
                while not waiting.ready():
                    ready_pair()
                os._exit(7)
            assert os.waitstatus_to_exitcode(coopos.waitpid(pid, 0)[1]) == 7
        """)
    )


def test_ready_calls_with_work_in_between():
    """The first call that finds the hub late gives it its turn."""
    run_script(
        script("""
        gevent.sleep(0.01)
        count_polls()
        for n in range(1, 11):
            end = time.monotonic() + 0.02
            while time.monotonic() < end:
                pass
            ready_pair()
            assert len(polls) >= n - 1, (n, len(polls))
        """)
    )


@pytest.mark.skipif(not hasattr(os, "splice"), reason="this system or Python has no os.splice")
def test_splice_that_is_always_ready():
    run_script(
        script("""
        other_reader, other_writer = os.pipe()
        os.write(writer, b"x")
        with gevent.Timeout(0.05, False):
            while True:
                coopos.splice(reader, other_writer, 1)
                coopos.splice(other_reader, writer, 1)
        """)
    )


@pytest.mark.parametrize("kind", ["kill", "timeout"])
def test_greenlet_that_is_ended_in_its_turn_has_moved_no_byte(kind):
    run_script(
        script(f"""
        n_read = n_written = 0
        class Ended(OSError):
            pass
        def spin():
            global n_read, n_written
            try:
                with gevent.Timeout(0.02, Ended) if {kind!r} == "timeout" else gevent.Timeout(None):
                    while True:
                        n_written += coopos.write(writer, b"xx")
                        n_read += len(coopos.read(reader, 1))
            except Ended:
                pass
        for _ in range(5):
            greenlet = gevent.spawn(spin)
            if {kind!r} == "kill":
                gevent.sleep(0.02)
                greenlet.kill()
            greenlet.get()
            n_read += len(os.read(reader, 1 << 20)) if n_read < n_written else 0
            assert n_read == n_written
        """)
    )
