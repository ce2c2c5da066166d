"""Forking: what happens in the parent, what in the child, and what neither may notice of the other.

Each test is a script in an interpreter of its own, since a fork copies whatever else is going on.
"""

import os
import textwrap

import pytest

import coopos

from ..helpers.children import needs_pidfds
from ..helpers.support import HAS_WAITED, IN_CHILD, LOOP, error_of, run_script

PRELUDE = """
import fcntl, gc, os, signal, sys, threading, traceback
import gevent, psutil, coopos
from gevent.hub import get_hub

STATUS = 7 << 8
fork = coopos.fork


def fork_living(fork=coopos.fork, **kwargs):
    '''(pid, end): a child that ends with STATUS once end() is called.'''
    reader, writer = os.pipe()
    pid = fork(**kwargs)
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(7)
    os.close(reader)

    def end():
        os.write(writer, b"x")  # other children have the other end too: closing it would not do
        os.close(writer)

    return pid, end


def fork_dead(fork=coopos.fork, **kwargs):
    '''The pid of a child that is dead, and of which the hub knows nothing yet.'''
    pid = fork(**kwargs)
    if pid == 0:
        os._exit(7)
    until_dead(pid)
    return pid


def until_dead(pid):
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def until(holds):
    while not holds():
        gevent.sleep(0.001)  # not 0: a hub that never sleeps leaves other threads no GIL


def fd_names():
    names = []
    for fd in os.listdir("/dev/fd"):
        try:
            names.append(os.readlink(f"/dev/fd/{fd}"))
        except OSError:
            pass
    return names


def active_watchers():
    if type(get_hub().loop).__module__ == "gevent.libev.corecext":
        from gevent.libev.corecext import watcher as base
    else:
        from gevent._ffi.watcher import watcher as base
    return [thing for thing in gc.get_objects() if isinstance(thing, base) and thing.active]


def belongings():
    '''What this process has: descriptors, threads, children, active watchers.'''
    me = psutil.Process()
    return len(os.listdir("/dev/fd")), me.num_threads(), len(me.children()), len(active_watchers())


gevent.sleep(0)
"""


def run(source, **kwargs):
    return run_script(PRELUDE + HAS_WAITED + IN_CHILD + textwrap.dedent(source), **kwargs)


# ---- in the parent -----------------------------------------------------------------------------------------------------------


def test_fork_first_in_a_process():
    """The first fork of a process that has no hub yet, waited for at once, returns its status: ten times out of ten."""
    for _ in range(10):
        run_script("""
            import os, coopos
            pid = coopos.fork()
            if pid == 0:
                os._exit(7)
            assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
        """)


@pytest.mark.smoke
@pytest.mark.parametrize("start", ["coopos.fork_gevent()", "coopos.forkpty()[0]", "coopos.fork_and_watch()"])
def test_fork_family_first_in_a_process(start):
    """The same for each function that forks."""
    run_script(f"""
        import os, coopos
        pid = {start}
        if pid == 0:
            os._exit(7)
        assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
    """)


@pytest.mark.parametrize("name", ["posix_spawn", "posix_spawnp"])
def test_posix_spawn_first_in_a_process(name):
    """The same for a program."""
    run_script(f"""
        import os, coopos
        pid = coopos.{name}("/bin/sh", ["sh", "-c", "exit 7"], os.environ)
        assert coopos.waitpid(pid, 0) == (pid, 7 << 8)
    """)


def test_fork_without_a_hub_has_none_in_the_child():
    """A fork makes no hub in a child that had none, and one made there works."""
    run_script("""
        import os, coopos
        from gevent.hub import _get_hub
        pid = coopos.fork_gevent()
        if pid == 0:
            ok = _get_hub() is None
            grandchild = coopos.fork()
            if grandchild == 0:
                os._exit(7)
            os._exit(0 if ok and coopos.waitpid(grandchild, 0) == (grandchild, 7 << 8) else 1)
        assert coopos.waitpid(pid, 0) == (pid, 0)
    """)


@pytest.mark.parametrize("fork", ["coopos.fork", "coopos.fork_gevent", "lambda: coopos.forkpty()[0]"])
@pytest.mark.parametrize("has_hub", [True, False], ids=["with a hub", "without a hub"])
def test_fork_in_a_thread(fork, has_hub):
    """Every thread may fork and wait; it needs no hub beforehand, and its child has a working one."""
    run(f"""
        results = []

        def run():
            if {has_hub}:
                gevent.sleep(0)
            pid, end = fork_living({fork})
            waiter = gevent.spawn(coopos.waitpid, pid, 0)
            gevent.sleep(0)
            results.append(waiter.ready())
            end()
            results.append(waiter.get() == (pid, STATUS))
            in_child(lambda: in_child(lambda: gevent.sleep(0), {fork}))
            results.append(True)
            get_hub().destroy(destroy_loop=True)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert results == [False, True, True], results
    """)


@pytest.mark.parametrize("name", ["posix_spawn", "posix_spawnp"])
def test_posix_spawn_in_a_thread(name):
    """So may a thread start programs."""
    run(f"""
        results = []

        def run():
            pid = coopos.{name}("/bin/sh", ["sh", "-c", "exit 7"], os.environ)
            results.append(coopos.waitpid(pid, 0) == (pid, STATUS))
            get_hub().destroy(destroy_loop=True)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert results == [True], results
    """)


def test_fork_in_threads_at_once():
    """Several threads fork and wait at the same time, while the main thread waits for children of its own."""
    run("""
        def run(number):
            for _ in range(25):
                pid = coopos.fork()
                if pid == 0:
                    os._exit(number)
                assert coopos.waitpid(pid, 0) == (pid, number << 8)
            done.append(number)
            get_hub().destroy(destroy_loop=True)

        done = []
        threads = [threading.Thread(target=run, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for _ in range(25):
            pid = coopos.fork()
            if pid == 0:
                os._exit(9)
            assert coopos.waitpid(pid, 0) == (pid, 9 << 8)
        for thread in threads:
            thread.join()
        assert sorted(done) == [1, 2, 3, 4]
    """)


@pytest.mark.parametrize(
    ("fork", "question", "count"),
    [
        ("coopos.fork", "pid", 1000),
        ("coopos.fork", "-1", 250),
        ("coopos.fork_gevent", "pid", 250),
        ("coopos.fork_gevent", "-1", 250),
    ],
)
def test_fork_and_wait_a_thousand_times(fork, question, count):
    """No descriptor, thread, zombie or active watcher is left after as many children."""
    run(f"""
        def fork_and_wait():
            pid = {fork}()
            if pid == 0:
                os._exit(7)
            assert coopos.waitpid({question}, 0) == (pid, STATUS)

        fork_and_wait()
        gevent.sleep(0)
        gc.collect()
        gc.freeze()
        until(lambda: psutil.Process().num_threads() == 1)  # a worker lingers where a thread has waited for the child
        before = belongings()
        for _ in range({count}):
            fork_and_wait()
        gevent.idle()
        until(lambda: psutil.Process().num_threads() <= before[1])  # a worker lingers here, too
        gc.collect()
        assert belongings() == before, (before, belongings(), fd_names(), active_watchers())
    """)


def test_fork_with_callbacks_a_thousand_times():
    """The same for children whose callbacks are run by the hub; their statuses are then told without a wait."""
    run("""
        ended = []
        pids = set()
        gevent.idle()
        before = belongings()
        for _ in range(10):
            for _ in range(100):
                pid = coopos.fork(ended.append)
                if pid == 0:
                    os._exit(7)
                pids.add(pid)
            until(lambda: len(ended) == len(pids))
        assert {child.pid for child in ended} == pids and {child.rstatus for child in ended} == {STATUS}
        ended.clear()
        for pid in pids:
            assert coopos.waitpid(pid, 0) == (pid, STATUS)
        gevent.idle()
        until(lambda: psutil.Process().num_threads() <= before[1])
        assert belongings() == before, (before, belongings(), fd_names(), active_watchers())
    """)


def test_fork_while_threads_wait():
    """Forking while waiter threads come and go locks nobody out, and leaves their questions intact."""
    run(
        """
        pid, end = fork_living()
        waiters = [gevent.spawn(coopos.waitpid, pid, os.WUNTRACED), gevent.spawn(coopos.waitpid, -pid, 0)]
        gevent.sleep(0)
        for _ in range(200):
            other = coopos.fork()
            if other == 0:
                os._exit(7)
            any_child = gevent.spawn(coopos.waitpid, -1, 0)
            gevent.sleep(0)
            assert any_child.get() == (other, STATUS)
        end()
        assert waiters[0].get() == (pid, STATUS)
        waiters[1].join()
    """,
        may_complain=True,
    )


def test_fork_gives_no_warning():
    """No DeprecationWarning about the threads that run, and the warning filters are not touched, not even for a moment."""
    run("""
        import warnings
        ready, leave = threading.Event(), threading.Event()
        thread = threading.Thread(target=lambda: (ready.set(), leave.wait()))
        thread.start()
        ready.wait()
        get_hub().threadpool.apply(int)

        class Watched(list):
            '''Filters that nobody may change or replace.'''
            def change(self, *args, **kwargs):
                raise AssertionError("the warning filters are touched")
            insert = append = remove = pop = clear = __setitem__ = __delitem__ = extend = change

        filters = warnings.filters = Watched(warnings.filters)
        seen = []
        os.register_at_fork(
            before=lambda: seen.append(warnings.filters is filters),
            after_in_child=lambda: seen.append(warnings.filters is filters),
            after_in_parent=lambda: seen.append(warnings.filters is filters),
        )
        for fork in (coopos.fork, coopos.fork_gevent, lambda: coopos.forkpty()[0]):
            in_child(lambda: None, fork)
        assert seen == [True] * 6, seen
        assert warnings.filters is filters
        leave.set()
        thread.join()
    """)


@pytest.mark.parametrize("fork", ["coopos.fork", "coopos.fork_gevent", "coopos.fork_and_watch", "lambda: coopos.forkpty()[0]"])
def test_fork_runs_the_hooks_in_order(fork):
    """before last-registered first, then parent and child hooks in order; the loop and the hub are those of the forker."""
    run(f"""
        events = []
        for number in (1, 2):
            os.register_at_fork(
                before=lambda number=number: events.append(("before", number)),
                after_in_parent=lambda number=number: events.append(("parent", number)),
                after_in_child=lambda number=number: events.append(("child", number)),
            )
        start = [("before", 2), ("before", 1)]

        def check():
            assert events == [*start, ("child", 1), ("child", 2)], events

        in_child(check, {fork})
        assert events == [*start, ("parent", 1), ("parent", 2)], events
    """)


@pytest.mark.parametrize(
    ("fork", "event"),
    [("coopos.fork", "os.fork"), ("coopos.fork_gevent", "os.fork"), ("lambda: coopos.forkpty()[0]", "os.forkpty")],
)
def test_fork_raises_an_audit_event(fork, event):
    """The event is the one that os raises, once; a hook that objects prevents the fork."""
    run(f"""
        events = []
        objections = []

        def hook(event, args):
            if event.startswith(("os.fork", "os.forkpty")):
                events.append((event, args))
                if objections:
                    raise objections[0]

        sys.addaudithook(hook)
        in_child(lambda: None, {fork})
        assert events == [({event!r}, ())], events
        objections.append(PermissionError("no"))
        assert raises(PermissionError, {fork})
        objections.clear()
        assert raises(ChildProcessError, coopos.waitpid, -1, 0)
    """)


def test_fork_that_fails():
    """EAGAIN comes out as os gives it; the hooks of the parent have run, nothing is watched, and the next fork works."""
    output = run("""
        import errno, resource
        events = []
        os.register_at_fork(before=lambda: events.append("before"), after_in_parent=lambda: events.append("parent"))
        in_child(lambda: None)  # whatever is imported on first use
        events.clear()
        if os.getuid() == 0:
            os.setuid(54321)  # a limit doesn't bind root
        soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
        try:
            os.kill(os.fork() or os.getpid(), signal.SIGKILL)
            os.wait()
        except BlockingIOError:
            pass
        else:
            print("skip: the limit of processes doesn't bind")
            raise SystemExit
        events.clear()
        before = belongings()
        for fork in (coopos.fork, coopos.fork_gevent, coopos.forkpty, coopos.forkpty_gevent):
            try:
                fork()
            except OSError as ex:
                assert ex.errno == errno.EAGAIN and "fork" in str(ex), ex
            else:
                raise AssertionError("it didn't fail")
        assert events == ["before", "parent"] * 4, events
        assert belongings() == before
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
        in_child(lambda: gevent.sleep(0))
    """)
    if output.startswith("skip: "):
        pytest.skip(output[6:].strip())


@pytest.mark.parametrize("name", ["posix_spawn", "posix_spawnp"])
def test_posix_spawn_of_a_program_that_is_not_there(name):
    """The error is the one that os gives, and there is no child."""
    arguments = ("/nowhere/nothing", ["nothing"], os.environ)
    assert error_of(getattr(coopos, name), *arguments) == error_of(getattr(os, name), *arguments)
    assert error_of(getattr(coopos, name), *arguments)[0] is FileNotFoundError
    assert error_of(coopos.waitpid, -1, 0)[0] is ChildProcessError


@pytest.mark.parametrize("name", ["posix_spawn", "posix_spawnp"])
def test_posix_spawn_arguments(name):
    """Positional, keyword and wrong arguments are treated as os treats them."""
    run(f"""
        spawn = coopos.{name}
        reader, writer = os.pipe()
        pid = spawn("/bin/sh", ["sh", "-c", "echo hello; exit 7"], {{}}, setsigmask=[signal.SIGUSR1],
                    file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)])
        os.close(writer)
        assert os.read(reader, 100) == b"hello\\n"
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
        for wrong in [(), ("/bin/sh",), ("/bin/sh", "sh", {{}}), ("/bin/sh", [], {{}}), ("/bin/sh", ["sh"], 5)]:
            errors = []
            for call in (spawn, os.{name}):
                try:
                    call(*wrong)
                except Exception as ex:
                    errors.append(type(ex))
            assert len(errors) == 2 and errors[0] is errors[1], (wrong, errors)
    """)


# ---- watching ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fork", ["coopos.fork", "coopos.fork_and_watch"])
def test_fork_ref_keeps_the_loop_running(fork):
    """With ref=True the loop runs until the child has ended and its callback was called."""
    run(f"""
        calls = []
        pid, end = fork_living({fork}, callback=calls.append, ref=True)
        get_hub().loop.run_callback(end)
        assert get_hub().join()
        assert len(calls) == 1
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
    """)


@pytest.mark.parametrize("arguments", ["", "callback=calls.append", "callback=calls.append, ref=False"])
def test_fork_without_ref_lets_the_loop_end(arguments):
    """By default a watched child doesn't keep the loop running."""
    run(f"""
        calls = []
        pid, end = fork_living(**dict({arguments}))
        assert get_hub().join()
        assert not calls
        end()
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
    """)


def test_fork_ref_of_several():
    """The loop ends when the last child with ref=True has ended, however many without live on."""
    run("""
        calls = []
        children = [fork_living(callback=calls.append, ref=ref) for ref in (True, False, True, False)]
        get_hub().loop.run_callback(children[0][1])
        get_hub().loop.run_callback(children[2][1])
        assert get_hub().join()
        assert sorted(child.pid for child in calls) == sorted(children[i][0] for i in (0, 2))
        for pid, end in children[1::2]:
            end()
        for pid, _ in children:
            assert coopos.waitpid(pid, 0) == (pid, STATUS)
    """)


def test_waitpid_keeps_the_loop_running():
    """A greenlet in waitpid keeps the loop running whatever the child's ref is, and only as long as it waits."""
    run("""
        for fork in (coopos.fork, coopos.fork_gevent):
            pid, end = fork_living(fork)
            waiter = gevent.spawn(coopos.waitpid, pid, 0)
            get_hub().loop.run_callback(end)
            gevent.wait()
            assert waiter.value == (pid, STATUS)

            pid, end = fork_living(fork)
            waiter = gevent.spawn(coopos.waitpid, pid, 0)
            gevent.sleep(0)
            waiter.kill()
            assert gevent.wait()
            end()
            assert coopos.waitpid(pid, 0) == (pid, STATUS)
    """)


@pytest.mark.parametrize("question", ["-1", "0"])
def test_waitpid_any_keeps_the_loop_running(question):
    """So does one that waits for any child."""
    run(f"""
        pid, end = fork_living()
        waiter = gevent.spawn(coopos.waitpid, {question}, 0)
        get_hub().loop.run_callback(end)
        gevent.wait()
        assert waiter.value == (pid, STATUS)
    """)


def test_fork_in_a_callback_of_the_hub():
    """A supervisor's callback may fork; the child runs on in its own hub."""
    run("""
        pids = []

        def restart(child=None):
            if len(pids) < 3:
                pid = coopos.fork(restart)
                if pid == 0:
                    os._exit(7)
                pids.append(pid)
            else:
                pids.append(None)

        restart()
        until(lambda: pids[-1] is None)
        assert [coopos.waitpid(pid, 0) for pid in pids[:-1]] == [(pid, STATUS) for pid in pids[:-1]]
    """)


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
        ("('a', 'b')", TypeError),
        ("(65536, 1)", OverflowError),
        ("(1, -1)", OverflowError),
    ],
)
def test_forkpty_winsize_that_is_none(winsize, error):
    """Nothing is forked."""
    run(f"""
        for name in ("forkpty", "forkpty_gevent", "forkpty_and_watch"):
            assert raises({error.__name__}, lambda: getattr(coopos, name)(winsize={winsize}))
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


# ---- GEVENT_NOWAITPID --------------------------------------------------------------------------------------------------------


def test_nowaitpid():
    """With GEVENT_NOWAITPID nothing is watched unasked, and waitpid is an extension; it still waits for any child."""
    run(
        """
        assert "waitpid" in coopos.__extensions__ and "waitpid" not in coopos.__implements__
        assert "posix_spawn" not in coopos.__implements__ and coopos.posix_spawn is os.posix_spawn
        assert "fork" in coopos.__implements__ and "forkpty" in coopos.__implements__
        for fork in (coopos.fork, lambda: coopos.forkpty()[0]):
            before = belongings()
            pid, end = fork_living(fork)
            assert belongings()[0] - before[0] in (1, 2) and belongings()[1:2] + belongings()[3:] == before[1:2] + before[3:]
            waiter = gevent.spawn(coopos.waitpid, pid, 0)
            gevent.sleep(0)
            assert not waiter.ready()
            end()
            assert waiter.get() == (pid, STATUS)
            assert raises(TypeError, coopos.fork, print) and raises(TypeError, coopos.forkpty, print)
        calls = []
        pid = coopos.fork_and_watch(calls.append)
        if pid == 0:
            os._exit(7)
        until(lambda: calls)
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
        """,
        GEVENT_NOWAITPID="1",
    )


def test_watching_is_the_default():
    """Without GEVENT_NOWAITPID the four functions watch, and are among those that patch() puts into os."""
    run(
        """
        assert {"fork", "forkpty", "waitpid", "posix_spawn", "posix_spawnp", "close"} <= set(coopos.__implements__)
        pid = fork_dead()
        gevent.idle()
        until(lambda: not psutil.Process().children())  # collected, without being asked for
        assert coopos.waitpid(pid, 0) == (pid, STATUS)
        """,
        GEVENT_NOWAITPID=None,
    )


# ---- other libraries that fork -----------------------------------------------------------------------------------------------


def test_child_of_a_c_library():
    """A child that C code forked is waited for cooperatively, and is left to that code if it waits itself."""
    run("""
        import ctypes
        libc = ctypes.CDLL(None)
        reader, writer = os.pipe()

        def c_fork():
            pid = libc.fork()
            if pid == 0:
                libc.close(writer)
                buffer = ctypes.create_string_buffer(1)
                libc.read(reader, buffer, 1)
                libc._exit(7)
            return pid

        for mine in (True, False):
            pid = c_fork()
            for _ in range(20):
                other = fork_dead()
                assert coopos.waitpid(other, 0) == (other, STATUS)
            if mine:
                waiter = gevent.spawn(coopos.waitpid, pid, 0)
                gevent.sleep(0)
                os.write(writer, b"x")
                assert waiter.get() == (pid, STATUS)
            else:
                os.write(writer, b"x")
                until_dead(pid)
                gevent.idle()
                status = ctypes.c_int()
                assert libc.waitpid(pid, ctypes.byref(status), 0) == pid
                assert status.value == STATUS
    """)


def test_child_of_multiprocessing():
    """multiprocessing's own children are waited for by their pid, and by multiprocessing while coopos waits for others."""
    run("""
        import multiprocessing
        context = multiprocessing.get_context("fork")
        process = context.Process(target=os._exit, args=(7,))
        process.start()
        assert coopos.waitpid(process.pid, 0) == (process.pid, STATUS)
        process = context.Process(target=os._exit, args=(7,))
        process.start()
        for _ in range(20):
            other = fork_dead()
            assert coopos.waitpid(other, 0) == (other, STATUS)
        process.join()
        assert process.exitcode == 7
    """)
