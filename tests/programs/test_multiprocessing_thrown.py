"""What is thrown into a greenlet that waits in multiprocessing, under patch(): nothing is lost."""

import textwrap

from ..helpers.multiprocess import METHODS, THROW, run, run_throwing, run_with


def test_recv_loses_nothing_whatever_is_thrown_in():
    """Neither between two messages nor in the middle of one, of its length or of its bytes."""
    run_throwing("""
    reader, writer = mp.Pipe(duplex=False)
    data = bytes(range(256)) * 2000
    message = len(data).to_bytes(4, "big") + data
    for error in THROWN:
        throw(error, parked(raises, error, reader.recv))
        for first in (2, 4, 1000, 70_000):
            sender = gevent.spawn(coopos.write_all, writer.fileno(), message[:first])
            receiver = parked(raises, error, reader.recv_bytes)
            sender.get()
            throw(error, receiver)
            sender = gevent.spawn(coopos.write_all, writer.fileno(), message[first:])
            assert reader.recv_bytes() == data
            sender.get()
    """)


def test_recv_of_a_long_message_that_is_broken_off(tmp_path):
    """Its length comes in 12 bytes; here it is a small one, which no stdlib would send that way."""
    run_throwing("""
    reader, writer = mp.Pipe(duplex=False)
    message = (-1).to_bytes(4, "big", signed=True) + (5).to_bytes(8, "big") + b"hello"
    for first in range(1, len(message)):
        os.write(writer.fileno(), message[:first])
        throw(OSError, parked(raises, OSError, reader.recv_bytes))
        os.write(writer.fileno(), message[first:])
        assert reader.recv_bytes() == b"hello"
    os.write(writer.fileno(), message)
    assert str(raises(OSError, reader.recv_bytes, 4)) == "bad message length"
    """)


def test_send_that_is_broken_off_is_ended_by_the_next():
    """A part of the message is in the pipe: what follows would be taken for the rest of it."""
    run_throwing("""
    for error in THROWN:
        reader, writer = mp.Pipe(duplex=False)
        data = bytearray(bytes(range(256)) * 1000)
        expected = bytes(data)
        throw(error, parked(raises, error, writer.send_bytes, data))
        data[:] = b"y" * len(data)
        throw(error, parked(raises, error, writer.send, "not sent"))     # still at the rest of the first
        sender = gevent.spawn(lambda: [writer.send("next"), writer.send_bytes(b"")])
        assert reader.recv_bytes() == expected
        assert reader.recv() == "next" and reader.recv_bytes() == b""
        sender.get()

        full = os.write(writer.fileno(), bytes(65_536))
        throw(error, parked(raises, error, writer.send, "not sent"))
        throw(error, parked(raises, error, writer.send_bytes, expected))
        assert os.read(reader.fileno(), full) == bytes(full)
        writer.send("next")
        assert reader.recv() == "next"
        reader.close()
        raises(BrokenPipeError, writer.send, "to nobody")
    """)


def test_connection_loses_nothing_to_an_exception_that_refuses_attributes():
    run("""
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Frozen(Exception):
        why: str

    class Refusing(Exception):
        def __setattr__(self, name, value):
            raise LookupError(name)

    for error in (Frozen("thrown in"), Refusing("thrown in")):
        reader, writer = mp.Pipe(duplex=False)
        os.write(writer.fileno(), (5).to_bytes(4, "big") + b"he")
        receiver = parked(raises, type(error), reader.recv_bytes)
        receiver.kill(error, block=False)
        assert receiver.get() is error
        os.write(writer.fileno(), b"llo")
        assert reader.recv_bytes() == b"hello"

        data = bytes(range(250)) * 800
        sender = parked(raises, type(error), writer.send_bytes, data)
        sender.kill(error, block=False)
        assert sender.get() is error
        sender = gevent.spawn(writer.send_bytes, b"next")
        assert reader.recv_bytes() == data and reader.recv_bytes() == b"next"
        sender.get()
    """)


def test_join_close_and_wait_let_out_whatever_is_thrown_in(tmp_path):
    """And the process is waited for afterwards, by several greenlets at once."""
    source = """
    def main(ctx):
        process = ctx.Process(target=sleep)
        process.start()
        for error in THROWN:
            for timeout in (None, 1000):
                throw(error, parked(raises, error, process.join, timeout))
            throw(error, parked(raises, error, connection.wait, [process.sentinel]))
        assert process.is_alive() and process.exitcode is None
        raises(ValueError, process.close)
        joining = [parked(process.join) for _ in range(3)] + [parked(process.join, 1000)]
        process.kill()
        gevent.joinall(joining, raise_error=True)
        assert process.exitcode == -9 and not process.is_alive()
        process.close()

    def sleep():
        time.sleep(1000)
    """
    for method in METHODS:
        run_with(method, THROW + textwrap.dedent(source), tmp_path)


def test_pool_and_manager_let_out_whatever_is_thrown_in():
    """While they end, too; the manager's process ends all the same."""
    run_throwing("""
    ctx = mp.get_context("fork")
    for error in THROWN:
        pool = ctx.Pool(1)
        pid = pool.apply(os.getpid)
        throw(error, parked(raises, error, pool.apply, time.sleep, (1000,)))
        raises(ValueError, pool.join)
        stop(pid)
        throw(error, parked(raises, error, pool.terminate))
        os.kill(pid, signal.SIGKILL)

        manager = ctx.Manager()
        process = manager._process
        stop(process.pid)
        throw(error, parked(raises, error, manager.list))
        throw(error, parked(raises, error, manager.shutdown))
        os.kill(process.pid, signal.SIGCONT)
        process.join()
        assert process.exitcode == 0
    """)


def test_manager_call_that_is_broken_off_does_not_answer_the_next():
    """Neither while its answer is waited for nor while it is sent."""
    run_throwing("""
    with mp.get_context("fork").Manager() as manager:
        numbers, pid = manager.dict(a=1), manager._process.pid
        for error in THROWN:
            queue = manager.Queue()
            throw(error, parked(raises, error, queue.get))
            gevent.spawn(queue.put, "late").join()
            assert [numbers["a"], numbers["a"]] == [1, 1]

            def call():
                assert numbers["a"] == 1
                stop(pid)
                stopped.append(pid)
                raised = raises(error, numbers.update, {"b": b"x" * 3_000_000})
                os.kill(pid, signal.SIGCONT)
                assert numbers.copy() == {"a": 1}
                return raised

            stopped, calling = [], gevent.spawn(call)
            while not stopped:
                gevent.sleep(0.001)
            throw(error, calling)
    """)


def test_kill_while_a_proxy_is_dropped_comes_out():
    """A weakref's callback would swallow it. The manager is told all the same, at the latest when the program ends."""
    run_throwing("""
    with mp.get_context("fork").Manager() as manager:
        pid, before = manager._process.pid, manager._number_of_objects()
        for error in THROWN:
            def drop():
                proxy = manager.dict(a=1)
                assert proxy["a"] == 1
                tls = proxy._tls
                stop(pid)
                del proxy
                assert not hasattr(tls, "connection")
                dropped.append(pid)
                return raises(error, gevent.sleep, 1000)

            dropped, dropping = [], gevent.spawn(drop)
            with gevent.Timeout(60):
                while not dropped:
                    gevent.sleep(0.001)
            throw(error, dropping)
            os.kill(pid, signal.SIGCONT)
        while manager._number_of_objects() > before:
            gevent.sleep(0.001)

        def drop_and_end():
            manager.dict()

        process = mp.get_context("fork").Process(target=drop_and_end)
        process.start()
        process.join()
        assert process.exitcode == 0 and manager._number_of_objects() == before
    """)


def test_manager_call_that_fails_keeps_its_connection():
    """A lock of the manager's belongs to the connection that has acquired it."""
    run("""
    import queue
    with mp.get_context("fork").Manager() as manager:
        lock, items = manager.RLock(), manager.Queue()
        lock.acquire()
        raises(queue.Empty, items.get_nowait)
        raises(Exception, items.put, lambda: None)      # can't be pickled
        lock.release()
        raises(Exception, lock.release)
    """)


def test_proxy_of_xmlrpc_works():
    run("""
    from multiprocessing import managers
    manager = managers.SyncManager(serializer="xmlrpclib", ctx=mp.get_context("fork"))
    manager.start()
    numbers = manager.dict()
    numbers["a"] = 1
    assert [numbers["a"], len(numbers)] == [1, 1]
    manager.shutdown()
    """)
