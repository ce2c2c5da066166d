"""Forking: what happens in the parent, who watches the child, and other libraries that fork."""

import os

import pytest

import coopos

from ..helpers.children import needs_pidfds
from ..helpers.forks import run
from ..helpers.support import error_of, run_script

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
        get_hub()  # on libuv, two threads that make their first hubs at once harm each other
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


@needs_pidfds
@pytest.mark.skipif(os.environ.get("COOPOS_SETS") == "watchers", reason="each wait has a watcher, which is stopped in the child")
def test_fork_among_a_thousand_children_copies_no_page_for_each():
    """What the parent knows of its children stays unwritten in a new child, so that the kernel copies no page of it."""
    run_script("""
        import os, resource
        import coopos
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 5000), hard))
        reader, writer = os.pipe()
        def start():
            pid = coopos.fork_and_watch()
            if not pid:
                os.close(writer)
                os.read(reader, 1)
                os._exit(0)
            return pid
        def copied():
            'Page faults of a child that ends at once; the least of some.'
            faults = []
            for _ in range(5):
                pid = coopos.fork()
                if not pid:
                    os._exit(0)
                faults.append(coopos.wait4(pid, 0)[2].ru_minflt)
            return min(faults)
        pids = [start()]
        alone = copied()
        pids += [start() for _ in range(1000)]
        among = copied()
        os.close(writer)
        for pid in pids:
            assert coopos.waitpid(pid, 0) == (pid, 0)
        assert among <= alone + 20, (alone, among)
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


@pytest.mark.parametrize("call", ["coopos.read(reader, 1)", "coopos.nb_read(reader, 1)"])
def test_child_of_a_callback_that_would_wait_is_told_what_to_do(call):
    """It is in a callback of its hub, as its parent is."""
    run(f"""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)

        def restart(child):
            pids.append(coopos.fork())
            if pids[-1] == 0:
                try:
                    {call}
                except gevent.exceptions.BlockingSwitchOutError as ex:
                    os._exit(7 if "gevent.spawn()" in str(ex) else 1)
                finally:
                    os._exit(2)

        pids = []
        if coopos.fork(restart) == 0:
            os._exit(0)
        until(lambda: pids)
        assert coopos.waitpid(pids[0], 0) == (pids[0], STATUS)
    """)


def test_fork_in_a_callback_that_leaves_the_greenlets_says_what_to_do():
    """And what it says works: a greenlet that the callback starts may do so, and its child may wait."""
    run("""
        def fork():
            pid = coopos.fork(keep_greenlets=False)
            if pid == 0:
                gevent.sleep(0.001)
                os._exit(7)
            results.append(coopos.waitpid(pid, 0)[1])

        def restart(child):
            try:
                fork()
            except RuntimeError as ex:
                results.append(str(ex))
            gevent.spawn(fork)

        results = []
        if coopos.fork(restart) == 0:
            os._exit(0)
        until(lambda: len(results) == 2)
        assert "gevent.spawn()" in results[0] and results[1] == STATUS
    """)


@pytest.mark.parametrize("ref", [True, False])
def test_wait_for_what_a_callback_brings(ref):
    """With ref=False the loop ends, and gevent raises LoopExit; with ref=True it runs until the callback was called."""
    run(f"""
        import signal
        ended = gevent.event.Event()
        pid = coopos.fork(lambda child: ended.set(), ref={ref})
        if pid == 0:
            {"gevent.sleep(0.05)" if ref else "signal.pause()"}
            os._exit(7)
        try:
            ended.wait()
        except gevent.exceptions.LoopExit as ex:
            assert not {ref} and "would block forever" in str(ex)
            os.kill(pid, signal.SIGKILL)
            assert coopos.waitpid(pid, 0) == (pid, signal.SIGKILL)
        else:
            assert {ref} and coopos.waitpid(pid, 0) == (pid, STATUS)
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
