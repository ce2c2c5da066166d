"""What tools/soak.py does for minutes on end: each part is a function that works until the round is over, and leaves nothing.

A part keeps account, in a Soak of soak_account.py. What was sent has come, each child's status has been told to one who asked, and
a call was ended by what the part did to it and by nothing else. What is not so is a problem.
"""

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import tempfile
import threading
import zlib

import gevent
import gevent.event
import gevent.socket
from gevent.hub import get_hub
from gevent.server import StreamServer
from soak_account import LIMIT_S

import coopos
from coopos import _core, subprocess

WORKERS, CLIENTS, USERS, THREADS = 3, 6, 10, 4
RECORD = 8  # bytes


def error_of(function, *args):
    """The errno that it raises, or what it returns."""
    try:
        return function(*args)
    except OSError as ex:
        return errno.errorcode[ex.errno]


# ---- a server whose workers are killed ---------------------------------------------------------------------------------------


def serve(listener):
    """In a forked worker: a length and that many bytes get their checksum."""
    for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGALRM):
        signal.signal(signum, signal.SIG_DFL)
    fd = listener.fileno()
    coopos.closerange(3, fd)
    coopos.closerange(fd + 1, 4096)

    def answer(connection, _address):
        with contextlib.suppress(ConnectionError):
            size = int.from_bytes(coopos.read_exactly(connection.fileno(), 4), "big")
            data = coopos.read_exactly(connection.fileno(), size)
            if size % 5 == 0:
                data = subprocess.run(["cat"], input=data, stdout=subprocess.PIPE).stdout
            coopos.write_all(connection.fileno(), zlib.crc32(data).to_bytes(4, "big"))

    StreamServer(gevent.socket.socket(fileno=fd), answer).serve_forever()


def ask(address, data):
    with gevent.socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        coopos.write_all(connection.fileno(), len(data).to_bytes(4, "big") + data)
        return int.from_bytes(coopos.read_exactly(connection.fileno(), 4), "big")


def prefork_server(soak):
    """Workers are killed at random, and forked again; a request is sent until it is answered."""
    alive = set()
    has_clients = True

    def keep_worker():
        while has_clients:
            pid = coopos.fork_and_watch(keep_greenlets=False)
            if pid == 0:
                try:
                    serve(listener)
                finally:
                    os._exit(99)
            alive.add(pid)
            status = soak.status_of(pid)
            alive.discard(pid)
            if status not in (signal.SIGKILL, signal.SIGTERM):
                soak.problem(f"a worker ended with {status}")

    def kill_workers():
        while has_clients:
            soak.nap(1)
            if alive:
                pid = soak.random.choice(list(alive))
                with contextlib.suppress(ProcessLookupError):  # the reaper was first
                    os.kill(pid, signal.SIGKILL)

    def send_requests():
        while soak.is_on:
            data = soak.data(300_000)
            while True:
                try:
                    answer = ask(listener.getsockname(), data)
                    break
                except (ConnectionError, EOFError):  # its worker was killed
                    soak.counts["requests sent again"] += 1
            soak.expect(answer, zlib.crc32(data), "the answer to a request")
            soak.counts["requests"] += 1
            soak.nap(0.02)

    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/socket")
        listener.listen(128)
        listener.setblocking(False)
        workers = [gevent.spawn(keep_worker) for _ in range(WORKERS)]
        killer = gevent.spawn(kill_workers)
        soak.all_of([gevent.spawn(send_requests) for _ in range(CLIENTS)])
        has_clients = False
        soak.all_of([killer])
        for pid in list(alive):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        soak.all_of(workers)


# ---- programs and terminals --------------------------------------------------------------------------------------------------


def run_cat(soak):
    data = soak.data(200_000)
    soak.expect(subprocess.run(["cat"], input=data, stdout=subprocess.PIPE).stdout, data, "what cat gave back")
    soak.counts["bytes"] += len(data)


def run_into_timeout(soak):
    try:
        subprocess.run(["sleep", "100"], timeout=soak.random.random() / 20)
        soak.problem("sleep has ended")
    except subprocess.TimeoutExpired:
        soak.counts["timeouts"] += 1


def run_deaf(soak):
    """A program that reads nothing of a large input."""
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as process:
        process.communicate(bytes(200_000))
        soak.end(process, 0)


def run_to_a_signal(soak):
    with subprocess.Popen(["sh", "-c", "kill -TERM $$"]) as process:
        soak.end(process, -signal.SIGTERM)


def kill_who_communicates(soak):
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        greenlet = gevent.spawn(process.communicate, soak.data(200_000))
        soak.nap(0.005)
        greenlet.kill()
        process.kill()
        soak.end(process, -signal.SIGKILL, 0)
    soak.counts["greenlets killed"] += 1


def run_shell(soak):
    status = coopos.system("exit 3")
    if status != -1 or not soak.reaped:  # -1: the reaper has it
        soak.expect(status, 3 << 8, "system")
    with coopos.popen("echo text") as output:
        soak.expect(output.read(), "text\n", "popen")


USES = [run_cat, run_into_timeout, run_deaf, run_to_a_signal, kill_who_communicates, run_shell]


def subprocess_users(soak):
    """Ten greenlets, each of which runs one program after the other."""

    def use():
        while soak.is_on:
            try:
                soak.random.choice(USES)(soak)
            except ChildProcessError as ex:
                pid = int(str(ex).partition("collected child ")[2].partition(",")[0] or 0)
                if soak.reaped.pop(pid, None) is None:
                    soak.problem(f"a status is lost: {ex}")
                soak.counts["statuses that only the reaper had"] += 1
            soak.counts["programs"] += 1

    soak.all_of([gevent.spawn(use) for _ in range(USERS)])


def terminals(soak):
    """Programs in terminals of their own: what they print comes whole, what is typed comes back, and a hang-up ends them."""
    printed = b"".join(b"%d\r\n" % number for number in range(1, 2001))
    while soak.is_on:
        pid, fd = coopos.forkpty(winsize=(24, 80))
        if pid == 0:
            os.execvp("seq", ["seq", "2000"])
        pieces = []
        while piece := coopos.read_pty(fd, 1000):
            pieces.append(piece)
        soak.expect(b"".join(pieces), printed, "what a terminal showed")
        coopos.close(fd)
        soak.expect(soak.status_of(pid), 0, "the status of seq")

        pid, fd = coopos.forkpty(keep_greenlets=False)
        if pid == 0:
            os.execvp("sh", ["sh", "-c", "stty raw -echo; echo ready; exec cat"])
        soak.expect(coopos.read_exactly(fd, 6), b"ready\n", "a raw terminal")
        typed = soak.data(20_000)
        writer = gevent.spawn(coopos.write_all, fd, typed)
        soak.expect(coopos.read_exactly(fd, len(typed)), typed, "what was typed")
        soak.all_of([writer])
        coopos.close(fd)
        soak.expect(soak.status_of(pid), signal.SIGHUP, "the status of a cat whose terminal has gone")
        soak.counts["terminals"] += 2


# ---- descriptors -------------------------------------------------------------------------------------------------------------


def write_stream(soak, fd, total):
    """Write that many bytes in various ways, and close; their checksum."""
    checksum = 0
    while total:
        data = soak.random.randbytes(min(total, soak.random.choice([1, 61, 4096, 100_000])))
        moved = soak.random.choice([coopos.write, lambda fd, data: coopos.writev(fd, [data[:7], data[7:]])])(fd, data)
        checksum = zlib.crc32(data[:moved], checksum)
        total -= moved
        if soak.random.random() < 0.01:
            soak.nap(0.001)
    coopos.close(fd)
    return checksum


def read_stream(soak, fd):
    checksum = size = 0
    buffer = bytearray(70_000)
    while True:
        if soak.random.random() < 0.5:
            data = coopos.read(fd, soak.random.choice([1, 1000, 65_536]))
        else:
            data = buffer[: coopos.readinto(fd, buffer)]
        if not data:
            coopos.close(fd)
            return checksum, size
        checksum = zlib.crc32(data, checksum)
        size += len(data)


def streams(soak):
    """Pipes, sockets and FIFOs, in blocking mode or not: each byte comes once, and in order."""
    with tempfile.TemporaryDirectory() as directory:
        while soak.is_on:
            total = soak.random.randrange(2_000_000)
            kind = soak.random.choice(["pipe", "socket", "FIFO"])
            if kind == "pipe":
                reader, writer = os.pipe()
            elif kind == "socket":
                reader, writer = (end.detach() for end in socket.socketpair())
            else:
                path = f"{directory}/fifo"
                os.mkfifo(path)
                opened = gevent.spawn(coopos.open, path, os.O_RDONLY)
                writer = coopos.open(path, os.O_WRONLY)
                reader = opened.get(timeout=LIMIT_S)
                os.unlink(path)
            for fd in (reader, writer):
                os.set_blocking(fd, soak.random.random() < 0.5)
            sent = gevent.spawn(write_stream, soak, writer, total)
            checksum, size = read_stream(soak, reader)
            soak.expect((size, checksum), (total, sent.get(timeout=LIMIT_S)), f"a {kind}")
            soak.counts["bytes"] += size


def files(soak):
    """Greenlets that write blocks of one file and read them back."""
    block = 4096

    def use(fd, number):
        while soak.is_on:
            data = soak.random.randbytes(block)
            soak.expect(coopos.pwrite(fd, data, number * block), block, "pwrite")
            if soak.random.random() < 0.1:
                coopos.fdatasync(fd)
            soak.nap(0.005)
            soak.expect(coopos.pread(fd, block, number * block), data, "pread")
            soak.counts["bytes"] += block

    with tempfile.TemporaryFile() as file:
        soak.all_of([gevent.spawn(use, file.fileno(), number) for number in range(4)])


def readers_that_are_killed(soak):
    """However often its reader is killed or timed out, a pipe's bytes come once, and in order."""
    reader, writer = os.pipe()
    got = []
    checksum = 0

    def read():
        while True:
            try:
                got.append(coopos.read_exactly(reader, 1000))
            except BaseException as ex:
                got.append(ex.partial)
                raise

    while soak.is_on:
        greenlet = gevent.spawn(read)
        data = soak.data(20_000)
        sender = gevent.spawn(coopos.write_all, writer, data)
        soak.nap(0.003)
        greenlet.kill()
        with contextlib.suppress(gevent.Timeout), gevent.Timeout(soak.random.random() / 200):
            read()
        while sum(map(len, got)) < len(data):
            got.append(coopos.read(reader, 65_536))
        soak.all_of([sender])
        checksum = zlib.crc32(data, checksum)
        soak.expect(b"".join(got), data, "what killed readers got")
        got.clear()
        soak.counts["greenlets killed"] += 1
        soak.counts["bytes"] += len(data)
    coopos.close(reader)
    coopos.close(writer)


def close_races(soak):
    """A descriptor is closed under its readers, and the number is another file's at once: they get EBADF, and not its bytes."""
    tag = 0
    while soak.is_on:
        is_pipe = soak.random.random() < 0.5
        reader, writer = os.pipe() if is_pipe else (end.detach() for end in socket.socketpair())
        os.set_blocking(reader, soak.random.random() < 0.5)
        calls = [(coopos.read, reader, RECORD), (coopos.readinto, reader, bytearray(RECORD)), (coopos.read_exactly, reader, RECORD)]
        greenlets = [gevent.spawn(error_of, *call) for call in calls]
        gevent.sleep(0)
        if soak.random.random() < 0.5:
            soak.nap(0.002)
        coopos.close(reader)
        again, other = os.pipe()
        if again < reader:
            lower, again = again, fcntl.fcntl(again, fcntl.F_DUPFD_CLOEXEC, reader)
            os.close(lower)
        # The same number, unless another thread was first.
        soak.counts["numbers used again"] += again == reader
        tag += 1
        os.write(other, tag.to_bytes(RECORD, "big"))
        soak.all_of(greenlets)
        soak.expect([greenlet.value for greenlet in greenlets], ["EBADF"] * len(calls), "reads of a closed descriptor")
        soak.expect(coopos.read(again, 100), tag.to_bytes(RECORD, "big"), "the next file")
        for fd in (again, other, writer):
            coopos.close(fd)
        soak.counts["closes under readers"] += 1
        soak.nap(0.002)


# ---- signals -----------------------------------------------------------------------------------------------------------------


def signal_handlers(soak):
    """A handler of the program's, a hundred times a second."""
    handled = []
    before = signal.signal(signal.SIGALRM, lambda *_: handled.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    while soak.is_on:
        gevent.sleep(0.1)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    if not handled:
        soak.problem("no signal was handled")
    soak.counts["signals"] += len(handled)


def foreign_reaper(soak):
    """Other code's handler, which comes and goes and collects every child there is."""

    def reap(_signum, _frame):
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                soak.reaped[pid] = status
                soak.counts["children reaped by others"] += 1

    before = signal.signal(signal.SIGCHLD, reap)
    while soak.is_on:
        soak.nap(0.5)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the default would make CPython warn of a signal that was just coming
        soak.nap(0.5)
        signal.signal(signal.SIGCHLD, reap)
    signal.signal(signal.SIGCHLD, before)


# ---- threads -----------------------------------------------------------------------------------------------------------------


def in_thread(function, *args):
    """Run it in a new thread, which may have a hub; a greenlet of this hub that brings what it returns."""
    done = gevent.event.AsyncResult()
    news = get_hub().loop.async_()  # its send() is all of a loop that other threads may use
    result = []
    news.start(lambda: result[0](result[1]))

    def run():
        try:
            result[:] = done.set, function(*args)
        except BaseException as ex:
            result[:] = done.set_exception, ex
        finally:
            get_hub().destroy(destroy_loop=True)
        news.send()

    thread = threading.Thread(target=run)
    thread.start()

    def finish():
        with gevent.Timeout(LIMIT_S):
            try:
                return done.get()
            finally:
                thread.join()
                news.stop()
                news.close()

    return gevent.spawn(finish)


def share(reader, pids):
    """In a thread: read records until the descriptor is closed, and wait for each child; (records, {pid: status})."""
    records = []
    told = {}

    def read():
        with contextlib.suppress(OSError):
            while True:
                records.append(coopos.read(reader, RECORD))

    def wait(pid):
        with contextlib.suppress(ChildProcessError):
            told[pid] = coopos.waitpid(pid, 0)[1]

    greenlets = [gevent.spawn(read)] + [gevent.spawn(wait, pid) for pid in pids]
    gevent.joinall(greenlets, timeout=LIMIT_S / 2)
    if not all(greenlet.ready() for greenlet in greenlets):
        raise RuntimeError(f"still waiting, with {records} and {told}\n{coopos.report()}")
    for greenlet in greenlets:
        greenlet.get(block=False)
    return records, told


def thread_round(soak):
    """Threads with a hub each, and this hub, share a pipe and two children: each record and each status goes to one of them."""
    reader, writer = os.pipe()
    os.set_blocking(reader, soak.random.random() < 0.5)
    pids = [coopos.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], os.environ), coopos.fork_and_watch(keep_greenlets=False)]
    if pids[1] == 0:
        os._exit(7)
    sharers = [in_thread(share, reader, pids) for _ in range(THREADS)] + [gevent.spawn(share, reader, pids)]
    sent = [number.to_bytes(RECORD, "big") for number in range(50)]
    for record in sent:
        os.write(writer, record)
        gevent.sleep(0)
    # Until it is empty and all of them wait: a read that began after the close would be of another file.
    with gevent.Timeout(LIMIT_S):
        while select.select([reader], [], [], 0)[0] or [fd for fd, *_ in _core.waits()].count(reader) <= THREADS:
            gevent.sleep(0.001)
    coopos.close(reader)
    soak.all_of(sharers)
    coopos.close(writer)
    results = [sharer.value for sharer in sharers if sharer.successful()]
    soak.expect(sorted(record for records, _ in results for record in records), sent, "what threads have read")
    told = [pair for _, statuses in results for pair in statuses.items()]
    for pid in pids:
        told += [(pid, status)] if (status := soak.reaped.pop(pid, None)) is not None and pid not in dict(told) else []
    soak.expect(sorted(told), sorted((pid, 7 << 8) for pid in pids), "the statuses that threads were told")
    soak.counts["thread rounds"] += 1
    soak.counts["threads with hubs"] += THREADS
    soak.counts["children"] += len(pids)


def threads(soak):
    while soak.is_on:
        thread_round(soak)


PARTS = [
    prefork_server, subprocess_users, terminals, streams, files, readers_that_are_killed, close_races, signal_handlers,
    foreign_reaper, threads,
]
