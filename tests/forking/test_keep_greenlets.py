"""A child without the parent's greenlets: what doesn't happen there, and what works at once."""

import pytest

from ..helpers.keep_greenlets import each_place, main_thread_places, run
from ..helpers.support import LOOP, needs_libev, run_script

# ---- what doesn't happen there -----------------------------------------------------------------------------------------------

BUSY = """
class Local:
    def __del__(self):
        trace.add("freed")

def work(wait):
    local = Local()
    try:
        while True:
            trace.add()
            wait()
    finally:
        trace.add("finally")

class Busy:
    '''Greenlets of this thread that wait for all sorts of things.'''

    def __init__(self):
        self.event, self.semaphore = gevent.event.Event(), gevent.lock.Semaphore(0)
        self.queue = gevent.queue.Queue()
        reader, self.writer = os.pipe()
        waits = [lambda: gevent.sleep(0.001), lambda: self.event.wait(1), self.queue.get,
                 self.semaphore.acquire, lambda: coopos.read(reader, 1), lambda: gevent.socket.wait_read(reader),
                 gevent.spawn(gevent.sleep, 9).join]
        self.workers = [gevent.spawn(work, wait) for wait in waits]
        raw = greenlet.greenlet(work)
        raw.switch(greenlet.getcurrent().switch)
        self.workers.append(raw)
        self.refs = [weakref.ref(worker, lambda ref: trace.add("weakref callback")) for worker in self.workers]
        gevent.sleep(0.005)

    def let_go_on(self):
        self.event.set()
        self.semaphore.release()
        self.queue.put(1)
        os.write(self.writer, b"x")

mains = Busy()
"""


@pytest.mark.smoke
@each_place
def test_no_greenlet_of_the_parent_runs_in_the_child(place):
    """Whatever it waits for, whoever tells it to go on or to end, and when nobody refers to it any more; nor while a hook waits."""
    run(
        BUSY,
        """
        os.register_at_fork(after_in_child=lambda: gevent.sleep(0.001))

        def child(own):
            gevent.sleep(0.002)
            own.let_go_on()
            gevent.sleep(0.002)
            for busy in {own, mains}:
                assert all(worker.dead for worker in busy.workers)
                gevents = [worker for worker in busy.workers if isinstance(worker, gevent.Greenlet)]
                gevent.joinall(gevents)
                gevent.killall(gevents)
                busy.workers.clear()
            worker = gevents = None
            gc.collect()
            gevent.sleep(0.002)

        def parent():
            own = Busy() if "thread" in PLACE else mains
            for _ in range(10):
                gevent.spawn(trace.add, "queued spawn")
                gevent.spawn_later(0.001, trace.add, "spawned later")
                get_hub().loop.run_callback(trace.add, "callback")
                timer = get_hub().loop.timer(0.001)
                timer.start(trace.add, "timer")
                in_child(lambda: child(own))
                gevent.sleep(0.001)
                timer.close()

        try:
            at_place(parent)
            assert trace.of_children() == []
            assert not any(worker.dead for worker in mains.workers)
        finally:
            os._exit(bool(sys.exc_info()[0] and not traceback.print_exc()))
        """,
        place=place,
    )


@each_place
def test_no_timer_of_the_parent_that_has_expired_is_called_in_the_child(place):
    """Nor of those that expired with the one by which the greenlet that forks was woken."""
    run(
        """
        import time

        def parent():
            loop = get_hub().loop
            for _ in range(5):
                timers = [loop.timer(0.001) for _ in range(20)]
                for timer in timers[:10]:
                    timer.start(trace.add, "timer")
                gevent.spawn(gevent.sleep, 0.001)
                gevent.spawn_later(0.001, trace.add, "spawned later")
                forked = gevent.spawn_later(0.001, in_child, lambda: gevent.sleep(0.005))
                for timer in timers[10:]:
                    timer.start(trace.add, "timer")
                gevent.sleep(0)
                time.sleep(0.005)     # all of them expire in one turn of the loop
                forked.get()
                for timer in timers:
                    timer.close()

        at_place(parent)
        assert trace.of_children() == []
        """,
        place=place,
    )


@each_place
def test_watchers_of_the_parent_that_nobody_has_are_not_freed_in_the_child(place):
    """libuv still points to them: their memory must not become another object's."""
    run(
        """
        import time

        def child():
            others = [b"x" * size for size in range(500) for _ in range(50)]
            gevent.sleep(0.005)
            assert all(each.strip(b"x") == b"" for each in others)

        def end(watcher):
            trace.add("watcher")
            watcher.close()

        def parent():
            for _ in range(10):
                forked = gevent.spawn_later(0.001, in_child, child)
                for _ in range(50):
                    for watcher in (get_hub().loop.timer(0.001), get_hub().loop.check()):
                        watcher.start(end, watcher)
                watcher = None
                time.sleep(0.005)
                forked.get()

        at_place(parent)
        assert trace.of_children() == []
        """,
        place=place,
    )


@each_place
def test_no_line_that_greenlets_write_is_a_childs(place, request):
    """However often the process forks: a hundred times, and a thousand with --soak."""
    run(
        f"""
        def write():
            while True:
                trace.add()
                gevent.sleep(0.001)

        def parent():
            writers = [gevent.spawn(write) for _ in range(4)]
            gevent.sleep(0)
            for _ in range({1000 if request.config.getoption("--soak") else 100}):
                pid = fork()
                if pid == 0:
                    gevent.sleep(0)
                    os._exit(7)
                assert exit_code(pid) == 7
            gevent.killall(writers)

        os.register_at_fork(after_in_child=lambda: gevent.sleep(0))
        at_place(parent)
        assert trace.of_children() == [] and trace.parents > 100
        """,
        place=place,
    )


@each_place
def test_no_greenlet_of_the_parent_runs_at_the_childs_exit(place):
    run(
        BUSY,
        """
        def parent():
            pid = fork()
            if pid == 0:
                sys.exit()
            exit_code(pid)

        at_place(parent)
        assert trace.of_children() == []
        """,
        place=place,
    )


@pytest.mark.parametrize("place", ["spawned", "raw", "spawned in a thread"])
def test_the_main_greenlet_of_the_parent_does_not_go_on_in_the_child(place):
    """It waits for what forks, and for an event that the child sets."""
    run(
        """
        event = gevent.event.Event()

        def parent():
            pid = fork()
            if pid == 0:
                event.set()
                gevent.sleep(0.01)
                return
            exit_code(pid)
            event.set()

        def wait_for_event():
            try:
                if PLACE == "raw":
                    greenlet.greenlet(parent).switch()
                else:
                    gevent.spawn(parent)
                event.wait()
            finally:
                trace.add("went on")

        at_place(wait_for_event, "thread" if "thread" in PLACE else "main")
        assert trace.of_children() == []
        """,
        place=place,
    )


@pytest.mark.skipif(LOOP == "libuv", reason="libuv's loop of another thread keeps what is not its epoll descriptor")
def test_the_loops_of_other_threads_are_closed():
    run(
        """
        get_hub().threadpool.apply(int)
        before = len(os.listdir("/proc/self/fd"))

        def parent():
            gevent.sleep(0)
            def child():
                assert len(os.listdir("/proc/self/fd")) < before + 2, os.listdir("/proc/self/fd")
            in_child(child)

        at_place(parent, "thread")
        """
    )


def test_a_signal_watcher_of_the_parent_is_not_called_in_the_child():
    """The signal does there what it does by default."""
    run(
        """
        gevent.signal_handler(signal.SIGTERM, trace.add, "signal")
        gevent.sleep(0)
        pid = fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            gevent.sleep(1)
            os._exit(0)
        assert exit_code(pid) == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        while not trace.parents:
            gevent.sleep(0.001)
        assert trace.of_children() == [] and trace.parents == 1
        """
    )


def test_a_signal_sent_to_a_child_that_was_just_forked_is_not_its_parents():
    run(
        """
        def parent():
            for _ in range(100):
                pid = coopos.fork()
                if pid == 0:
                    while True:
                        gevent.sleep(1)
                os.kill(pid, signal.SIGTERM)
                assert exit_code(pid) == 3

        gevent.signal_handler(signal.SIGTERM, lambda: os._exit(3))
        gevent.sleep(0)
        parent()
        """
    )


def test_a_greenlet_that_the_child_has_started_does_not_run_in_a_child_of_its_own():
    """The parent has made it; the fork that follows leaves it behind."""
    run(
        """
        event = gevent.event.Event()
        made = gevent.Greenlet(lambda: (event.wait(), trace.add("ran")))

        def child():
            made.start()
            gevent.sleep(0)

            def grandchild():
                event.set()
                gevent.sleep(0.001)
                assert made.dead

            in_child(grandchild)

        in_child(child)
        assert trace.of_children() == []
        """
    )


@each_place
def test_what_a_hook_makes_before_the_fork_does_not_run_in_the_child(place):
    """Even if it is the first in its thread to use the hub."""
    run(
        """
        def work():
            while True:
                trace.add()
                gevent.sleep(0)

        def before():
            gevent.spawn(work)
            gevent.sleep(0)

        os.register_at_fork(before=before)
        try:
            at_place(lambda: in_child(lambda: gevent.sleep(0.001)))
            assert trace.of_children() == []
        finally:
            os._exit(bool(sys.exc_info()[0] and not traceback.print_exc()))
        """,
        place=place,
    )


def test_who_waits_for_the_end_of_the_greenlet_that_forks_is_not_told_in_the_child():
    """Its links are the parent's callbacks."""
    run(
        """
        def parent():
            pid = fork()
            if pid:
                assert exit_code(pid) == 0

        forker = gevent.spawn(parent)
        forker.rawlink(lambda ended: trace.add("rawlink"))
        forker.link(lambda ended: trace.add("link"))
        forker.get()
        gevent.sleep(0.001)
        assert trace.of_children() == [] and trace.parents == 2
        """
    )


def test_a_descriptor_of_the_child_is_not_taken_for_that_of_a_loop_it_has_closed():
    """When the child forks in its turn, and the number is another file's."""
    run(
        """
        waiting, done = threading.Event(), threading.Event()

        def stay():
            gevent.sleep(0)
            waiting.set()
            done.wait()

        thread = threading.Thread(target=stay)
        thread.start()
        waiting.wait()
        gevent.sleep(0)

        def child():
            fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
            in_child(lambda: [os.fstat(fd) for fd in fds])

        try:
            in_child(child)
        finally:
            done.set()
        """
    )


@needs_libev
def test_a_timer_of_a_hub_that_was_destroyed_does_not_run_in_the_child():
    """gevent keeps that hub's loop for the next one."""
    run(
        """
        timer = get_hub().loop.timer(0.001)
        timer.start(trace.add, "timer")
        get_hub().destroy()
        in_child(lambda: (gevent.sleep(0.005), get_hub().threadpool.apply(int)))
        assert trace.of_children() == []
        """
    )


def test_the_loops_of_other_threads_are_closed_by_a_thread_that_has_no_hub():
    run(
        """
        get_hub().threadpool.apply(int)
        before = len(os.listdir("/proc/self/fd"))
        at_place(lambda: in_child(lambda: len(os.listdir("/proc/self/fd")) < before or 1 / 0), "thread")
        """
    )


# ---- with the greenlets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fork", ["coopos.fork", "coopos.fork_gevent", "gevent.os.fork", "gevent.os.fork_gevent"])
def test_a_child_that_keeps_the_greenlets_has_all_that_gevent_gives_it(fork):
    """Greenlets that wait, that are queued and that come later, callbacks, timers, signal watchers; the main greenlet too."""
    run(
        f"""
        import gevent.os

        seen = []

        def add(what):
            seen.append(what)
            trace.add(what)

        def until_seen(count):
            with gevent.Timeout(30, False):
                while len(seen) < count:
                    gevent.sleep(0.001)

        def wait():
            event.wait()
            add("event")

        def child():
            event.set()
            has_forked.set()
            os.kill(os.getpid(), signal.SIGUSR1)
            until_seen(7)
            os._exit(7)

        def parent():
            gevent.spawn(add, "queued spawn")
            get_hub().loop.run_callback(add, "callback")
            gevent.spawn_later(0.01, add, "spawned later")
            timer.start(add, "timer")
            pid = {fork}()
            if pid == 0:
                child()
            has_forked.set()
            until_seen(5)
            assert {fork.rpartition(".")[0]}.waitpid(pid, 0) == (pid, 7 << 8)

        event, has_forked = gevent.event.Event(), gevent.event.Event()
        waiting = gevent.spawn(wait)
        gevent.signal_handler(signal.SIGUSR1, add, "signal")
        gevent.sleep(0)
        timer = get_hub().loop.timer(0.01)
        forking = gevent.spawn(parent)
        has_forked.wait()
        add("main")
        forking.get()
        assert [line.split(None, 1)[1] for line in sorted(trace.of_children())] == [
            "callback", "event", "main", "queued spawn", "signal", "spawned later", "timer",
        ]
        assert trace.parents == 5
        waiting.kill()
        timer.close()
        """
    )


# ---- what works there --------------------------------------------------------------------------------------------------------


@each_place
def test_the_childs_hub_works(place):
    run(
        """
        import socket
        pool = gevent.threadpool.ThreadPool(2)
        left, right = gevent.socket.socketpair()
        waiting = gevent.spawn(right.recv, 1)
        get_hub().threadpool.apply(int)
        gevent.sleep(0)

        def child():
            gevent.sleep(0.001)
            assert gevent.spawn(os.getpid).get() == os.getpid()
            assert get_hub().threadpool.apply(os.getpid) == os.getpid()
            assert gevent.socket.getaddrinfo("localhost", 80)
            one, other = gevent.socket.socketpair()
            reading = gevent.spawn(other.recv, 10)
            gevent.sleep(0)
            one.send(b"hello")
            assert reading.get(timeout=10) == b"hello"
            reader, writer = os.pipe()
            reading = gevent.spawn(coopos.read, reader, 10)
            gevent.sleep(0)
            coopos.write(writer, b"x")
            assert reading.get(timeout=10) == b"x"
            got = gevent.event.Event()
            handler = gevent.signal_handler(signal.SIGUSR1, got.set)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert got.wait(10)
            handler.cancel()
            one.close()
            other.close()
            assert coopos.system("exit 3") == 3 << 8
            pid = coopos.fork(keep_greenlets=True)
            if pid == 0:
                os._exit(7)
            assert exit_code(pid) == 7
            in_child(lambda: gevent.sleep(0.001))

        def parent():
            in_child(child)
            in_child(child)

        at_place(parent)
        assert gevent.spawn(pool.apply, os.getpid).get() == PARENT
        left.send(b"x")
        assert waiting.get(timeout=10) == b"x"
        left.close()
        right.close()
        """,
        place=place,
    )


def test_a_socket_that_a_greenlet_of_the_parent_waits_for_is_free_in_the_child():
    """gevent lets one greenlet wait for it at a time."""
    run(
        """
        left, right = gevent.socket.socketpair()
        receiving = gevent.spawn(right.recv, 1)
        gevent.sleep(0)

        def child():
            right.settimeout(0.001)
            try:
                right.recv(1)
            except TimeoutError:
                pass

        in_child(child)
        left.send(b"x")
        assert receiving.get() == b"x"
        left.close()
        right.close()
        """
    )


def test_descriptors_that_the_parent_waits_for_are_free_in_the_child():
    """Those that greenlets are parked on can be closed, and a file whose watcher has stayed on reads."""
    run(
        """
        reader, writer = os.pipe()
        readers = [gevent.spawn(coopos.read, reader, 1) for _ in range(2)]
        from_file, to_file = os.pipe()
        with coopos.FileIO(from_file) as file:
            reading = gevent.spawn(file.read, 1)
            gevent.sleep(0)
            os.write(to_file, b"a")
            assert reading.get() == b"a"

            def child():
                os.write(to_file, b"b")
                assert file.read(1) == b"b"
                reading = gevent.spawn(file.read, 1)
                gevent.sleep(0)
                os.write(to_file, b"c")
                assert reading.get() == b"c"
                file.close()
                coopos.close(reader)
                gevent.sleep(0)

            in_child(child)
        os.write(writer, b"de")
        assert sorted(reader.get() for reader in readers) == [b"d", b"e"]
        """
    )


def test_a_pool_thread_of_the_parent_does_not_hold_the_child_up():
    """A task that the parent has in its threadpool is nobody's there; a threadpool of the program's own works again, too."""
    run(
        """
        reader, writer = os.pipe()
        pool = gevent.threadpool.ThreadPool(1)
        has_begun = threading.Semaphore(0)

        def read():
            has_begun.release()
            return os.read(reader, 1)

        tasks = [each.spawn(read) for each in (pool, get_hub().threadpool)]
        for _ in tasks:
            has_begun.acquire()

        def child():
            assert get_hub().threadpool.apply(os.getpid) == os.getpid()
            gevent.sleep(0.001)
            gevent.sleep(0.001)
            assert pool.apply(os.getpid) == os.getpid()

        in_child(child)
        os.write(writer, b"xx")
        assert [task.get() for task in tasks] == [b"x", b"x"]
        """
    )


# ---- how it ends -------------------------------------------------------------------------------------------------------------


@main_thread_places
@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("return", 0),
        ("sys.exit()", 0),
        ("sys.exit(5)", 5),
        ("sys.exit('why')", 1),
        ("raise ValueError('why')", 1),
        ("gevent.spawn(sys.exit, 6); gevent.sleep(60)", 6),
        ("gevent.event.Event().wait()", 1),
        ("gevent.spawn_later(60, int); return", 0),
    ],
)
def test_the_child_ends_when_the_greenlet_does_that_forked(place, end, code):
    """With its exit status, what it has printed, and its atexit handlers: it has the place of the main greenlet."""
    if place == "main":
        end = end.replace("return", "sys.exit()")  # the main program would go on after the function
    printed = run(
        f"""
        import atexit
        def parent():
            pid = fork()
            if pid == 0:
                atexit.register(print, "at exit")
                print("in the child")
                try:
                    gevent.sleep(0.001)
                    {end}
                finally:
                    print("finally")
            assert exit_code(pid) == {code}

        at_place(parent)
        """,
        place=place,
        may_complain=True,
    )
    assert printed.splitlines()[:3] == ["in the child", "finally", "at exit"]


def test_the_hub_can_not_fork_a_child_without_greenlets():
    run(
        """
        def callback():
            try:
                fork()
            except RuntimeError as ex:
                result.set(ex)

        result = gevent.event.AsyncResult()
        get_hub().loop.run_callback(callback)
        assert "hub" in str(result.get())
        """
    )


# ---- who says so -------------------------------------------------------------------------------------------------------------

KEPT = """
def forked_keeps(fork=os.fork):
    '''Whether a child that was forked has the parent's greenlets.'''
    other = gevent.spawn(gevent.sleep, 60)
    gevent.sleep(0)
    pid = fork()
    if pid in (0, (0, -1)):
        os._exit(0 if other.dead else 1)
    pid, *master = pid if isinstance(pid, tuple) else (pid,)
    code = exit_code(pid)
    for fd in master:
        os.close(fd)
    other.kill()
    assert code in (0, 1)
    return bool(code)
"""


@pytest.mark.parametrize("name", ["fork", "fork_gevent", "fork_and_watch", "forkpty", "forkpty_gevent", "forkpty_and_watch"])
def test_every_fork_function_takes_keep_greenlets(name):
    run(
        KEPT,
        f"""
        function = coopos.{name}
        assert forked_keeps(function)
        assert forked_keeps(lambda: function(keep_greenlets=True))
        assert not forked_keeps(lambda: function(keep_greenlets=False))
        with coopos.fork_policy(keep_greenlets=False):
            assert not forked_keeps(function)
            assert forked_keeps(lambda: function(keep_greenlets=True))
        assert forked_keeps(function)
        """,
    )


def test_patch_says_what_os_fork_does():
    run(
        KEPT,
        """
        from gevent import monkey
        monkey.patch_all()
        coopos.patch(keep_greenlets=False)
        assert not forked_keeps(os.fork) and not forked_keeps(lambda: os.fork())
        coopos.patch()
        assert not forked_keeps(os.fork)
        with coopos.fork_policy(keep_greenlets=True):
            assert forked_keeps(os.fork)
        coopos.patch(keep_greenlets=True)
        assert forked_keeps(os.fork)
        """,
    )


def test_the_environment_says_what_a_fork_does():
    run(KEPT, "assert not forked_keeps(coopos.fork)", COOPOS_KEEP_GREENLETS="0")


def test_a_fork_policy_is_of_its_greenlet_and_thread():
    run(
        KEPT,
        """
        inside, outside = gevent.event.Event(), gevent.event.Event()

        def hold():
            with coopos.fork_policy(keep_greenlets=False):
                inside.set()
                outside.wait()
                assert not forked_keeps(coopos.fork)
            assert forked_keeps(coopos.fork)

        holder = gevent.spawn(hold)
        inside.wait()
        assert forked_keeps(coopos.fork)
        at_place(lambda: forked_keeps(coopos.fork) or 1 / 0, "thread")
        with coopos.fork_policy(keep_greenlets=False), coopos.fork_policy(keep_greenlets=True):
            assert forked_keeps(coopos.fork)
        outside.set()
        holder.get()
        """,
    )


# ---- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fork_and_watch", "forkpty_and_watch"])
def test_a_child_that_can_not_be_watched_is_told_of(name):
    """The exception carries its pid, and it can be waited for; its terminal is closed."""
    run(
        f"""
        loop = get_hub().loop

        class FullLoop:
            def __getattr__(self, name):
                if name in ("io", "async_"):
                    raise MemoryError("no room")
                return getattr(loop, name)

        get_hub().loop = FullLoop()
        try:
            pid = coopos.{name}()
            if pid in (0, (0, -1)):
                os._exit(4)
        except MemoryError as ex:
            get_hub().loop = loop
            status = exit_code(ex.pid)
            assert status in (4, 1, -signal.SIGHUP), status  # 1: its terminal was gone before it had it
            assert not any(os.path.realpath(f"/proc/self/fd/{{fd}}").endswith("ptmx") for fd in os.listdir("/proc/self/fd"))
        else:
            raise AssertionError("no error")
        """
    )


def test_forks_of_several_threads_at_once():
    """Whatever the others were doing in their loops: each child works, and ends as it is told to."""
    run_script("""
        import os, threading, gevent, coopos

        def fork_and_wait():
            gevent.sleep(0)
            for n in range(20):
                pid = coopos.fork_gevent(keep_greenlets=False)
                if pid == 0:
                    gevent.sleep(0.001)
                    os._exit(n)
                statuses.append(coopos.waitpid(pid, 0)[1] == n << 8)

        statuses = []
        threads = [threading.Thread(target=fork_and_wait) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [True] * 80, statuses
    """)
