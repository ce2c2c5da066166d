"""select.epoll and selectors.EpollSelector, which gevent removes, under patch(io=True)."""

import inspect
import select

import pytest

from ..helpers.support import run_script
from .test_patch_io import run

plain = getattr(select, "epoll", None)
pytestmark = pytest.mark.skipif(plain is None, reason="there is no epoll")


@pytest.mark.smoke
def test_poll_waits():
    """With and without a timeout, for a pipe and for a socket; a timeout ends in time, and a closed peer is told."""
    run("""
        import select
        reader, writer = os.pipe()
        ours, theirs = socket.socketpair()
        with select.epoll() as poller:
            poller.register(reader, select.EPOLLIN)
            poller.register(ours, select.EPOLLIN)
            for arguments in [(), (None,), (-1,), (20,), (20.5, 1)]:
                ready = waits(poller.poll, *arguments, until=lambda: os.write(writer, b"x"))
                assert ready == [(reader, select.EPOLLIN)]
                assert os.read(reader, 10) == b"x"
            assert waits(poller.poll, until=lambda: theirs.send(b"x")) == [(ours.fileno(), select.EPOLLIN)]
            poller.unregister(ours)
            before = len(ticks)
            assert poller.poll(0.05) == [] and len(ticks) > before + 3
            poller.modify(reader, select.EPOLLIN | select.EPOLLONESHOT)
            assert waits(poller.poll, until=lambda: os.close(writer)) == [(reader, select.EPOLLHUP)]
            assert poller.poll(0) == []
        assert poller.closed
    """)


def test_polls_without_end_let_others_run():
    """Of a member that is always ready, and with a timeout of 0."""
    run("""
        import select
        writer = os.pipe()[1]
        for events, timeout in [(select.EPOLLOUT, None), (0, 0)]:
            with select.epoll() as poller:
                poller.register(writer, events)
                before = len(ticks)
                while len(ticks) < before + 3:
                    poller.poll(timeout)
    """)


def test_greenlets_share_an_epoll():
    """Each event is one greenlet's; who waits when it is closed gets EBADF."""
    run("""
        import select
        poller = select.epoll()
        reader, writer = os.pipe()
        poller.register(reader, select.EPOLLIN | select.EPOLLET)
        jobs = [gevent.spawn(poller.poll) for _ in range(3)]
        gevent.sleep(0.01)
        for number in range(2):
            os.write(writer, b"x")
            gevent.sleep(0.01)
            assert sum(job.ready() for job in jobs) == number + 1
        assert sorted(job.value or [] for job in jobs) == [[], [(reader, 1)], [(reader, 1)]]
        [last] = [job for job in jobs if not job.ready()]
        errors = []
        waiter = gevent.spawn(lambda: errors.append(raises(OSError, poller.poll)))
        last.kill()
        gevent.sleep(0.01)
        poller.close()
        waiter.get()
        assert errors == [True]
    """)


def test_errors_are_those_of_the_plain_one():
    """Of each method, and before anything waits."""
    run("""
        import select
        plain = monkey.get_original("select", "epoll")

        def error_of(function):
            try:
                return function()
            except Exception as ex:
                return type(ex), ex.args

        def each(kind):
            yield error_of(lambda: kind(-5))
            yield error_of(lambda: kind(flags=7))
            poller = kind()
            for arguments in [("x",), (float("nan"),), (2**40,), (0, 0), (0, -5), (0, "x"), (None, 0), (1, 2, 3)]:
                yield error_of(lambda: poller.poll(*arguments))
            for method in poller.register, poller.unregister:
                for fd in -1, 10**6, "x":
                    yield error_of(lambda: method(fd))
            yield error_of(lambda: poller.modify(0, 1))
            yield error_of(lambda: kind.fromfd("x"))
            number = poller.fileno()
            again = kind.fromfd(os.dup(number))
            yield again.closed, again.poll(0)
            again.close()
            poller.close()
            poller.close()
            yield poller.closed
            for function in (poller.poll, poller.fileno, lambda: poller.register(0), poller.__enter__):
                yield error_of(function)

        assert select.epoll is not plain
        for ours, theirs in zip(each(select.epoll), each(plain), strict=True):
            assert ours == theirs or (TypeError in (ours[0], theirs[0]) and ours[0] is theirs[0]), (ours, theirs)
    """)


def test_it_has_all_that_the_plain_one_has():
    """Its public attributes and its documentation. unpatch() takes it away, and so gevent's state is back."""
    names = {name for name in dir(plain) if not name.startswith("_")}
    documented = {name for name in names if inspect.getdoc(getattr(plain, name))}
    run(f"""
        import select, selectors
        assert {{name for name in dir(select.epoll) if not name.startswith("_")}} == {names!r}
        assert all(getattr(select.epoll, name).__doc__ for name in {documented!r})
        states = coopos.patched()
        assert states["select.epoll"] == states["selectors.EpollSelector"] == "coopos"
        assert selectors.DefaultSelector.__module__ == "gevent.selectors"
        coopos.unpatch()
        assert not hasattr(select, "epoll") and not hasattr(selectors, "EpollSelector")
        assert coopos.patched()["select.epoll"] == "patch(io=True) was not called"
    """)


def test_in_the_hub_and_in_a_child():
    """In the hub it is the plain one; a child may go on with its parent's, which is the same epoll."""
    run("""
        import select
        reader, writer = os.pipe()
        poller = select.epoll()
        poller.register(reader, select.EPOLLIN)
        assert in_hub(poller.poll, 0.01) == []
        pid = os.fork()
        if pid == 0:
            gevent.spawn_later(0.01, os.write, writer, b"x")
            os._exit(poller.poll() != [(reader, select.EPOLLIN)])
        assert os.waitpid(pid, 0)[1] == 0
        assert poller.poll() == [(reader, select.EPOLLIN)]
    """)


def test_asyncio_over_an_epoll_selector():
    """A loop of asyncio in one greenlet, with a server, clients and a timer, beside others."""
    run("""
        import asyncio, selectors

        async def main():
            async def answer(reader, writer):
                while line := await reader.readline():
                    writer.write(line.upper())
                    await writer.drain()
                writer.close()
                await writer.wait_closed()

            async def ask(number):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                for _ in range(20):
                    writer.write(b"line %d\\n" % number)
                    assert await reader.readline() == b"LINE %d\\n" % number
                    await asyncio.sleep(0.001)
                writer.close()
                await writer.wait_closed()

            server = await asyncio.start_server(answer, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            await asyncio.gather(*map(ask, range(5)))
            server.close()
            return len(ticks)

        loop = asyncio.SelectorEventLoop(selectors.EpollSelector())
        asyncio.set_event_loop(loop)
        before = len(ticks)
        assert loop.run_until_complete(main()) > before + 3
        loop.close()
    """)


def test_nobody_else_gets_it():
    """Without io=True, and where gevent left select alone, the names are as they were."""
    run_script("""
        from gevent import monkey
        monkey.patch_all(select=False)
        import select, selectors
        plain = select.epoll, selectors.EpollSelector
        import coopos
        coopos.patch(io=True)
        assert (select.epoll, selectors.EpollSelector) == plain
        coopos.unpatch()
        assert (select.epoll, selectors.EpollSelector) == plain
        monkey.patch_select()
        coopos.patch()
        assert not hasattr(select, "epoll")
    """)
