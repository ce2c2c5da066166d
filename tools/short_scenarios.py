"""More scenarios for shorts.py, as those of fault_scenarios.py. What they return is the same however few bytes a call moves."""

import os

import gevent
from fault_states import END_S, SCENARIOS, coopos, helpers, kept, make_fifo, make_file, make_path, make_pipe, make_socket, scenario

DATA = b"".join(b"%07d\n" % number for number in range(2500))


def all_of(read, fd, size):
    """What repeated reads bring, until there are *size* bytes or the end."""
    data = b""
    while len(data) < size:
        piece = read(fd, size - len(data))
        if not piece:
            break
        data += piece
    return data


def into(fd, n):
    buffers = [bytearray(n // 2), bytearray(n - n // 2)]
    count = coopos.readv(fd, buffers)
    return b"".join(buffers)[:count]


def beside(function, *args):
    helpers.append(gevent.spawn(function, *args))
    return helpers[-1]


def carried(reader, writer, read=None, write=None):
    """A body: what goes in at *writer* comes out at *reader*; and what the write says."""

    def body():
        writing = beside(write or coopos.write, writer, DATA)
        data = all_of(read or coopos.read, reader, len(DATA))
        return data == DATA, writing.get(timeout=END_S)

    return body


@scenario
def whole_pipe(stack):
    return carried(*make_pipe(stack))


@scenario
def whole_pipe_nonblocking(stack):
    return carried(*make_pipe(stack, blocking=False), write=coopos.write_all, read=coopos.read_exactly)


@scenario
def whole_pipe_vectors(stack):
    def write(fd, data):
        return coopos.writev(fd, [data[:100], data[100:7000], data[7000:]])

    return carried(*make_pipe(stack), read=into, write=write)


@scenario
def whole_socket(stack):
    return carried(*make_socket(stack))


@scenario(COOPOS_NOWAIT="0")
def whole_socket_dontwait(stack):
    return carried(*make_socket(stack), read=into)


@scenario
def whole_fifo(stack):
    [fd] = kept(stack, os.open(make_fifo(stack), os.O_RDWR))
    return carried(fd, fd)


def written_and_read(stack):
    fd = make_file(stack)

    def body():
        told = [coopos.write(fd, DATA), coopos.pwrite(fd, DATA, 7), coopos.writev(fd, [DATA[:5], DATA[5:]])]
        told.append(coopos.pwritev(fd, [DATA[:9000], DATA[9000:]], len(DATA)))
        there = os.pread(fd, 1 << 20, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        came = [all_of(coopos.read, fd, 5000), all_of(into, fd, 5000), coopos.read_exactly(fd, 5000)]
        came.append(all_of(lambda fd, n: coopos.pread(fd, n, len(there) - n), fd, len(there))[:100])
        whole = DATA[:7] + DATA
        whole = whole[: len(DATA)] + DATA
        return told, there == whole, b"".join(came[:3]) == there[:15000]

    return body


scenario(written_and_read)


@scenario(COOPOS_NOWAIT="0")
def written_and_read_by_worker(stack):
    return written_and_read(stack)


@scenario
def whole_fileio(stack):
    path = make_path(stack, DATA)

    def body():
        with coopos.FileIO(path, "r+") as file:
            first = file.readall() == DATA
            file.seek(0)
            return first, file.read() == DATA

    return body


@scenario
def whole_lines(stack):
    reader, writer = kept(stack, *os.pipe())

    def write():
        with coopos.fdopen(writer, "wb", closefd=False) as file:
            file.write(DATA[:7])
            file.write(DATA[7:])

    def body():
        writing = beside(write)
        with coopos.fdopen(reader, "rb", closefd=False) as file:
            lines = [file.readline() for _ in range(2000)]
            rest = file.read(len(DATA) - sum(map(len, lines)))
        writing.get(timeout=END_S)
        return b"".join(lines) + rest == DATA

    return body


@scenario
def whole_sendfile(stack):
    source = make_file(stack, DATA)
    here, there = make_socket(stack)

    def body():
        sending = beside(coopos.sendfile, here, source, 5, len(DATA))
        return coopos.read_exactly(there, len(DATA) - 5) == DATA[5:], sending.get(timeout=END_S)

    return body


@scenario
def whole_copies(stack):
    source, target = make_file(stack, DATA), make_file(stack)
    reader, writer = make_pipe(stack)

    def body():
        while coopos.copy_file_range(source, target, len(DATA)):
            pass
        moved = b""
        os.lseek(source, 0, os.SEEK_SET)
        while count := coopos.splice(source, writer, 4000):
            moved += coopos.read_exactly(reader, count)
        return os.pread(target, 1 << 20, 0) == DATA, moved == DATA

    return body


@scenario
def whole_communicate(stack):
    def body():
        done = coopos.subprocess.run(["cat"], input=DATA, capture_output=True, timeout=END_S)
        return done.returncode, done.stdout == DATA, done.stderr

    return body


@scenario
def whole_random(stack):
    return lambda: (len(coopos.urandom(1000)), len(os.urandom(10)))


WHOLE = [name for name, function in SCENARIOS.items() if function.__module__ == __name__]
