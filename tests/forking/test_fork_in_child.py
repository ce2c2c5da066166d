"""Forking: what happens in the child, and what it may not notice of its parent."""

import textwrap

import pytest

from ..helpers.children import needs_pidfds
from ..helpers.forks import run
from ..helpers.support import LOOP

# ---- in the child ------------------------------------------------------------------------------------------------------------

FAMILY = """
living, end_living = fork_living()
dead = fork_dead()
unwatched, end_unwatched = fork_living(coopos.fork_gevent)
ended = []
collected = coopos.fork(ended.append)
if collected == 0:
    os._exit(7)
until(lambda: ended)
asked = [gevent.spawn(coopos.waitpid, *question) for question in [(living, 0), (unwatched, 0), (living, os.WUNTRACED)]]
gevent.sleep(0)

def family_is_whole():
    '''In the parent: everything it watched and waited for goes on as if nothing had been forked.'''
    assert not any(waiter.ready() for waiter in asked)
    assert coopos.waitpid(collected, 0) == (collected, STATUS)
    assert coopos.waitpid(dead, 0) == (dead, STATUS)
    end_living()
    end_unwatched()
    assert asked[1].get() == (unwatched, STATUS)
    gevent.joinall(asked)
    assert sorted(waiter.value for waiter in asked if waiter.value) == sorted([(living, STATUS), (unwatched, STATUS)])
    assert raises(ChildProcessError, coopos.waitpid, -1, os.WNOHANG)
"""


def run_family(source, **kwargs):
    """A parent with children in every state, and greenlets that wait for them."""
    return run(FAMILY + textwrap.dedent(source), may_complain=True, **kwargs)


forks = pytest.mark.parametrize("fork", ["coopos.fork", "coopos.fork_gevent", "lambda: coopos.forkpty()[0]"])


@forks
def test_child_has_no_children(fork):
    """The parent's children are not the child's: ChildProcessError at once, whatever the parent knew of them."""
    run_family(f"""
        def check():
            for pid in (living, dead, unwatched, collected, -1, 0, -os.getpgrp()):
                for options in (0, os.WNOHANG, os.WUNTRACED):
                    assert raises(ChildProcessError, coopos.waitpid, pid, options)

        in_child(check, {fork})
        family_is_whole()
    """)


@needs_pidfds
@forks
def test_child_has_no_pidfds(fork):
    """The pidfds and the set they are in are closed in the child, and not in the parent."""
    run_family(f"""
        def ours():
            return [name for name in fd_names() if "pidfd" in name or "eventpoll" in name]

        before = ours()
        assert sum("pidfd" in name for name in before) == 2, before  # the dead child was collected with the other

        def check():
            assert sum("pidfd" in name for name in ours()) == 0, ours()
            assert sum("eventpoll" in name for name in ours()) == 1, ours()  # the loop's own

        in_child(check, {fork})
        assert sorted(ours()) == sorted(before)
        family_is_whole()
    """)


@forks
def test_child_has_one_thread(fork):
    """Waiter threads don't go along into the child, and are not missed there."""
    run_family(f"""
        def check():
            assert psutil.Process().num_threads() == 1
            gevent.killall(asked)  # they have nothing to take back
            assert psutil.Process().num_threads() == 1
            in_child(lambda: None)

        in_child(check, {fork})
        family_is_whole()
    """)


CHILD_ACTIONS = {
    "nothing": "pass",
    "loop": "gevent.sleep(0.001); gevent.idle()",
    "reinit": "gevent.reinit(); gevent.sleep(0.001)",
    "kill": "gevent.killall(asked); gevent.sleep(0.001)",
    "destroy": "get_hub().destroy(destroy_loop=True)",
    "grandchildren": "in_child(lambda: in_child(lambda: gevent.sleep(0.001)))",
    "any": "pids = [fork_dead() for _ in range(3)]; assert {coopos.waitpid(-1, 0)[0] for _ in pids} == set(pids)",
    "own": "pid, end = fork_living(); get_hub().loop.run_callback(end); assert coopos.waitpid(pid, 0) == (pid, STATUS)",
    "thread": "get_hub().threadpool.apply(int)",
    "gc": "del asked[:]; gc.collect(); gevent.sleep(0.001)",
}


@pytest.mark.parametrize(
    ("fork", "action"),
    [
        pytest.param(
            "coopos.fork",
            action,
            marks=pytest.mark.skipif(LOOP == "libuv" and action == "destroy", reason="gevent's own libuv loop hangs in that"),
        )
        for action in CHILD_ACTIONS
    ]
    + [
        (fork, action)
        for fork in ("coopos.fork_gevent", "lambda: coopos.forkpty()[0]")
        for action in ("nothing", "loop", "kill", "grandchildren")
    ],
)
def test_child_leaves_the_parents_watch_alone(fork, action):
    """Whatever the child does with its loop and its copies of the greenlets, the parent hears of its own children."""
    run_family(f"""
        def check():
            {CHILD_ACTIONS[action]}

        in_child(check, {fork})
        family_is_whole()
    """)


@pytest.mark.parametrize("fork", ["coopos.fork", "coopos.fork_gevent"])
def test_child_leaves_by_the_interpreters_end(fork):
    """A child that ends as a script ends, with all that the interpreter then does, does the parent no harm."""
    run_family(f"""
        pid = {fork}()
        if pid == 0:
            gevent.sleep(0)
            sys.exit(5)
        assert coopos.waitpid(pid, 0) == (pid, 5 << 8)
        family_is_whole()
    """)


@pytest.mark.parametrize(
    "reinit",
    [
        pytest.param(True, id="reinit"),
        pytest.param(False, id="as it is", marks=pytest.mark.skipif(LOOP == "libuv", reason="libuv must be told of a fork")),
    ],
)
def test_child_of_a_raw_fork(reinit):
    """A child that was forked behind our back runs no callback of the parent's and takes nothing from it."""
    run(
        f"""
        calls = []
        pid, end = fork_living(callback=lambda child: calls.append((os.getpid(), child.rstatus)))
        reader, writer = os.pipe()
        other = os.fork()
        if other == 0:
            def check():
                if {reinit}:
                    gevent.reinit()
                os.read(reader, 1)
                for _ in range(5):
                    gevent.sleep(0.001)  # time for the loop to look, should it still have the parent's child in it
                assert not calls, calls
                assert raises(ChildProcessError, coopos.waitpid, pid, 0)
                in_child(lambda: None)
            run_and_exit(check)
        end()
        until_dead(pid)
        os.write(writer, b"x")
        until_dead(other)
        until(lambda: calls)
        assert calls == [(os.getpid(), STATUS)]
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
        assert coopos.waitpid(other, 0) == (other, 0)
        """
    )


def test_child_runs_no_callback_of_the_parents():
    """Nor does one that was forked by us, although it has a copy of everything."""
    run("""
        calls = []
        pid, end = fork_living(callback=lambda child: calls.append(os.getpid()))
        reader, writer = os.pipe()

        def check():
            os.read(reader, 1)
            gevent.sleep(0.001)
            gevent.idle()
            assert not calls

        other = coopos.fork()
        if other == 0:
            run_and_exit(check)
        end()
        until_dead(pid)
        os.write(writer, b"x")
        assert coopos.waitpid(other, 0) == (other, 0)
        until(lambda: calls)
        assert calls == [os.getpid()]
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
    """)


def test_child_of_another_threads_watches():
    """A child forked while several threads watch children is free of all their watches; the threads lose nothing."""
    run("""
        ready, leave, results = [threading.Event() for _ in range(3)], threading.Event(), []

        def run(number):
            pid, end = fork_living()
            waiter = gevent.spawn(coopos.waitpid, pid, 0)
            gevent.sleep(0)
            ready[number].set()
            leave.wait()
            end()
            results.append(waiter.get() == (pid, STATUS))
            get_hub().destroy(destroy_loop=True)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for event in ready:
            event.wait()

        def check():
            assert not [name for name in fd_names() if "pidfd" in name]
            assert raises(ChildProcessError, coopos.waitpid, -1, 0)
            gevent.sleep(0.001)
            in_child(lambda: None)

        for _ in range(3):
            in_child(check)
        leave.set()
        for thread in threads:
            thread.join()
        assert results == [True] * 3
    """)


def test_child_goes_on_with_all_greenlets():
    """The child has the parent's greenlets, as gevent documents: they run in both."""
    run("""
        ran = []
        gevent.spawn(lambda: ran.append(os.getpid()))

        def check():
            gevent.sleep(0)
            assert ran == [os.getpid()]

        in_child(check)
        until(lambda: ran)
        assert ran == [os.getpid()]
    """)


def test_child_of_a_child():
    """Each generation watches and waits for its own, and is waited for by the one before."""
    run("""
        def descend(generations):
            if generations:
                in_child(lambda: descend(generations - 1))
            sibling = fork_dead()
            assert coopos.waitpid(-1, 0) == (sibling, STATUS)
            assert raises(ChildProcessError, coopos.waitpid, -1, 0)

        descend(5)
    """)


def test_child_takes_the_place_of_its_parents_children():
    """A pid that the parent watched may be a child of the child's later on: the records are not mixed up."""
    run("""
        pid = fork_dead()

        def check():
            own = fork_dead()
            assert coopos.waitpid(own, 0) == (own, STATUS)
            assert raises(ChildProcessError, coopos.waitpid, pid, 0)

        in_child(check)
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
    """)


def test_fork_with_many_living_children():
    """A hundred watched children, and a child forked among them, disturb each other in nothing."""
    run("""
        children = [fork_living() for _ in range(100)]
        in_child(lambda: in_child(lambda: gevent.sleep(0)))
        in_child(lambda: gevent.sleep(0.001))
        for _, end in children:
            end()
        for pid, _ in children:
            assert coopos.waitpid(pid, 0) == (pid, STATUS)
    """)


# ---- terminals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["forkpty", "forkpty_gevent", "forkpty_and_watch"])
def test_forkpty(name):
    """The child leads a session of its own on a terminal whose other end the parent has."""
    run(f"""
        pid, fd = coopos.{name}()
        if pid == 0:
            assert fd == -1
            assert [os.isatty(number) for number in (0, 1, 2)] == [True] * 3
            assert os.getsid(0) == os.getpid() == os.tcgetpgrp(0)
            os.write(1, b"hello " + os.read(0, 100))
            os._exit(7)
        assert os.isatty(fd)
        os.write(fd, b"world\\n")
        waiter = gevent.spawn(coopos.waitpid, pid, 0)
        seen = b""
        coopos.make_nonblocking(fd)
        try:
            while True:
                seen += coopos.nb_read(fd, 1000)
        except OSError:
            pass  # EIO: Linux's end-of-file
        assert seen.split() == [b"world", b"hello", b"world"], seen
        assert waiter.get() == (pid, STATUS)
        os.close(fd)
    """)


def test_forkpty_and_watch_callback():
    """The callback is called as fork_and_watch's is, and the forking function may be another."""
    run("""
        calls, pids = [], []

        def forkpty():
            pids.append(coopos.forkpty_gevent())
            return pids[-1]

        pid, fd = coopos.forkpty_and_watch(calls.append, None, False, forkpty)
        if pid == 0:
            os._exit(7)
        assert (pid, fd) == pids[0]
        until(lambda: calls)
        assert (calls[0].pid, calls[0].rpid, calls[0].rstatus) == (pid, pid, STATUS)
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
        os.close(fd)
    """)


@pytest.mark.parametrize("name", ["forkpty", "forkpty_gevent", "forkpty_and_watch"])
def test_forkpty_winsize(name):
    """The child's terminal has the window that was asked for; by default one of no size."""
    run(f"""
        import fcntl, struct, termios
        for kwargs, size in ({{}}, (0, 0)), ({{"winsize": (24, 80)}}, (24, 80)), ({{"winsize": [65535, 0]}}, (65535, 0)):
            pid, fd = coopos.{name}(**kwargs)
            if pid == 0:
                os._exit(0 if tuple(os.get_terminal_size(0))[::-1] == size else 1)
            assert struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))) == (*size, 0, 0)
            assert coopos.waitpid(pid, 0) == (pid, 0)
            os.close(fd)
    """)


@pytest.mark.parametrize(
    ("winsize", "error"),
    [
        ("(1,)", ValueError),
        ("(1, 2, 3)", ValueError),
        ("80", TypeError),
        ("'80'", TypeError),
        ("b'ab'", TypeError),
        ("('a', 'b')", TypeError),
        ("(1.5, 1)", TypeError),
        ("(65536, 1)", OverflowError),
        ("(1, -1)", OverflowError),
    ],
)
def test_forkpty_winsize_that_is_none(winsize, error):
    """Nothing is forked, and the error says what it must be, and what it is. Popen says the same."""
    run(f"""
        from coopos.subprocess import Popen
        forks = [getattr(coopos, name) for name in ("forkpty", "forkpty_gevent", "forkpty_and_watch")]
        for start in [*forks, lambda winsize: Popen(["true"], winsize=winsize)]:
            try:
                start(winsize={winsize})
            except {error.__name__} as ex:
                assert str(ex).startswith("winsize must be ") and str(ex).endswith(", not " + repr({winsize})), ex
            else:
                raise AssertionError(start)
        assert raises(ChildProcessError, os.waitpid, -1, os.WNOHANG)
    """)


def test_error_names_the_wrong_argument():
    """Of what forks and watches; before anything is forked, but for a function that forks and doesn't say what."""
    run("""
        def error_of(function, *args, **kwargs):
            try:
                function(*args, **kwargs)
            except TypeError as ex:
                return str(ex)

        for name in ("fork", "forkpty"):
            for function in (getattr(coopos, name), getattr(coopos, f"{name}_and_watch")):
                assert error_of(function, 5) == "callback must be callable or None, not 5"
                assert error_of(function, loop=5) == "loop must be an event loop of gevent or None, not 5"
                assert error_of(function, **{name: 5}) == f"{name} must be callable, not 5"
                assert f"{function.__name__}() got an unexpected keyword argument 'reff'" in error_of(function, reff=True)
        assert error_of(coopos.fork, fork=lambda: None) == "fork must return the pid of a child, or 0 in it, not None"
        for result in (None, 5, (1, 2, 3)):
            assert error_of(coopos.forkpty, forkpty=lambda: result) == f"forkpty must return (pid, fd), not {result!r}"
        for name in ("before", "after_in_child", "after_in_parent"):
            assert error_of(coopos.register_at_fork, **{name: 5}) == f"{name} must be callable, not 5"
        assert raises(ChildProcessError, os.waitpid, -1, os.WNOHANG)
    """)


def test_read_pty_ends_when_all_was_read():
    """However much the child has written before it ended, and whether or not its end is in the kernel by then."""
    run("""
        for size in (0, 1, 100, 4096, 100_000):
            pid, fd = coopos.forkpty(winsize=(24, 80))
            if pid == 0:
                coopos.write_all(1, b"x" * size)
                os._exit(7)
            seen = bytearray()
            while data := coopos.read_pty(fd, 1000):
                seen += data
            assert bytes(seen) == b"x" * size, (size, len(seen))
            assert coopos.read_pty(fd, 1000) == b""
            assert coopos.waitpid(pid, 0) == (pid, STATUS)
            os.close(fd)
            assert raises(OSError, coopos.read_pty, fd, 1)
    """)


def test_read_pty_waits_in_the_hub():
    run("""
        pid, fd = coopos.forkpty()
        if pid == 0:
            os.read(0, 1)
            os._exit(7)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        reading = gevent.spawn(coopos.read_pty, fd, 1000)
        for _ in range(10):
            gevent.sleep(0.001)
        assert not reading.dead and fcntl.fcntl(fd, fcntl.F_GETFL) == flags
        coopos.write(fd, b"\\n")
        assert reading.get() == b"\\r\\n"
        assert coopos.read_pty(fd, 1000) == b""
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
        os.close(fd)
    """)
