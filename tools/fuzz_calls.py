"""What fuzz.py makes of bytes: calls with their arguments, and what os makes of them on a twin in non-blocking mode.

A call of coopos waits where that of os raises BlockingIOError, and in blocking mode a write goes on until all is written. Attempt
says how far a call would be by now: it goes on each time that it is asked.
"""

import array
import contextlib
import fcntl
import io
import os
import select

#: Around the limits of the code: a small read's own buffer, what is moved with the GIL held, PIPE_BUF, a pipe, a worker's write.
SIZES = [0, 1, 2, 3, 8, 9, 100, 511, 512, 513, 4095, 4096, 4097, 5000, 8192, 10_000, 65_536, 65_537, 131_073]
BAD_NUMBERS = [-1, -(2**31) - 1, 2**31, 2**63, 2**64, 1.5, None, "1", b"1", True]
OFFSETS = [0, 1, 5, 100, 511, 4096, 5000, 10_000, 70_000, -1, -2]
FLAGS = [0, os.RWF_NOWAIT, os.RWF_DSYNC, 1 << 20]
#: Offset arguments that a call may be without.
MAYBE_OFFSETS = [None, None, 0, 3, 4096, 9000, -1]


class Never(Exception):
    """The call would wait."""


class Outcome:
    """What a call has come to: *kind* is the class of its exception or None."""

    def __init__(self, kind=None, errno=None, text="", value=None, moved=None):
        self.kind, self.errno, self.text, self.value, self.moved = kind, errno, text, value, moved

    def __eq__(self, other):
        return self.key() == other.key()

    def key(self):
        return self.kind, self.errno, self.text, self.value, self.moved

    def __repr__(self):
        kind = self.kind and self.kind.__name__
        value = repr(self.value)
        value = value if len(value) < 90 else value[:60] + f"... {len(value)}"
        return f"({kind}, {self.errno}, {self.text!r}, {value}, {self.moved})"


def outcome_of(function, *args):
    try:
        return Outcome(value=function(*args))
    except BaseException as ex:
        return outcome_of_error(ex)


def outcome_of_error(ex):
    moved = len(ex.partial) if hasattr(ex, "partial") else getattr(ex, "characters_written", 0)
    # The message of coopos names the call and the descriptor behind this.
    text = ex.strerror.split(":")[0] if isinstance(ex, OSError) and ex.strerror else ""
    return Outcome(type(ex), getattr(ex, "errno", None), text, moved=moved)


# ---- arguments ---------------------------------------------------------------------------------------------------------------

_pattern = bytes(range(256)) * 600


def data_of(size, salt):
    """Bytes that tell where they come from."""
    return _pattern[salt : salt + size]


def number_of(value):
    return SIZES[value % len(SIZES)] if value < 240 else BAD_NUMBERS[value % len(BAD_NUMBERS)]


def source_of(value, salt):
    """Something to write."""
    data = data_of(SIZES[value % len(SIZES)], salt)
    kinds = [
        bytes, bytearray, memoryview, lambda data: memoryview(data * 2)[: len(data)], lambda data: array.array("B", data),
        lambda data: memoryview(data)[::2], lambda data: "text", lambda data: None, lambda data: (8).to_bytes(8, "little"),
        lambda data: len(data),
    ]
    return (bytes if value < 180 else kinds[value % len(kinds)])(data)


def buffer_of(value):
    """Something to read into."""
    size = SIZES[value % len(SIZES)]
    kinds = [
        bytearray, lambda size: memoryview(bytearray(size)), lambda size: array.array("H", bytes(2 * size)), bytes,
        lambda size: memoryview(bytearray(size))[::2], lambda size: memoryview(bytes(size)), lambda size: "text", lambda size: None,
    ]
    return (bytearray if value < 180 else kinds[value % len(kinds)])(size)


def pieces_of(make, value, *more):
    """A sequence of buffers."""
    count = value % 5
    pieces = [make((value * 7 + index * 13) % 180, *more) for index in range(count)]
    if value < 220:
        return pieces
    kinds = [
        tuple, iter, set, lambda pieces: [*pieces, None], lambda pieces: [make(1, *more)] * 1025, lambda pieces: make(5, *more),
    ]
    return kinds[value % len(kinds)](list(map(bytes, pieces)) if value % 6 == 2 else pieces)


# How each call is made of three bytes; "there" stands for a second descriptor.
CALLS = {
    "read": lambda a, b, c: [number_of(a)],
    "nb_read": lambda a, b, c: [number_of(a)],
    "tp_read": lambda a, b, c: [number_of(a)],
    "readinto": lambda a, b, c: [buffer_of(a)],
    "readv": lambda a, b, c: [pieces_of(buffer_of, a)],
    "read_exactly": lambda a, b, c: [number_of(a)],
    "pread": lambda a, b, c: [number_of(a), OFFSETS[b % len(OFFSETS)]],
    "preadv": lambda a, b, c: [pieces_of(buffer_of, a), OFFSETS[b % len(OFFSETS)], *([FLAGS[c % 4]] if c > 246 else [])],
    "write": lambda a, b, c: [source_of(a, c)],
    "nb_write": lambda a, b, c: [source_of(a, c)],
    "tp_write": lambda a, b, c: [source_of(a, c)],
    "writev": lambda a, b, c: [pieces_of(source_of, a, c)],
    "write_all": lambda a, b, c: [source_of(a, c)],
    "pwrite": lambda a, b, c: [source_of(a, c), OFFSETS[b % len(OFFSETS)]],
    "pwritev": lambda a, b, c: [pieces_of(source_of, a, c), OFFSETS[b % len(OFFSETS)], *([FLAGS[c % 4]] if c > 246 else [])],
    "ftruncate": lambda a, b, c: [number_of(a)],
    "fsync": lambda a, b, c: [],
    "fdatasync": lambda a, b, c: [],
    "posix_fallocate": lambda a, b, c: [OFFSETS[b % len(OFFSETS)], number_of(a)],
    "eventfd_read": lambda a, b, c: [],
    "eventfd_write": lambda a, b, c: [number_of(a) if a < 250 else 2**64 - 2],
    "sendfile": lambda a, b, c: ["there", MAYBE_OFFSETS[b % len(MAYBE_OFFSETS)], number_of(a)],
    "splice": lambda a, b, c: [
        "there", number_of(a), MAYBE_OFFSETS[b % len(MAYBE_OFFSETS)] if b > 127 else None,
        MAYBE_OFFSETS[c % len(MAYBE_OFFSETS)] if c > 127 else None,
    ],
    "copy_file_range": lambda a, b, c: [
        "there", number_of(a), MAYBE_OFFSETS[b % len(MAYBE_OFFSETS)], MAYBE_OFFSETS[c % len(MAYBE_OFFSETS)],
    ],
}
WRITES = ("write", "nb_write", "tp_write", "write_all", "writev", "pwritev")
PLAIN_NAMES = {"nb_read": "read", "tp_read": "read", "nb_write": "write", "tp_write": "write"}


def filled(args):
    """What a call has put into the buffers among *args*."""
    found = []
    for arg in args:
        if isinstance(arg, (bytearray, array.array, memoryview)):
            found.append(bytes(arg))
        elif isinstance(arg, (list, tuple)):
            found += filled(arg)
    return found


def size_of(args):
    """How much a call is to move, at most."""
    return sum(arg for arg in args[:1] if isinstance(arg, int)) + sum(map(len, filled(args)))


def readinto_by_os(fd, buffer):
    """os.readinto, which came with Python 3.14; it reads nothing by read(2), where readv(2) would not ask the file at all."""
    io.BytesIO().readinto(buffer)      # which refuses the same buffers
    return os.readv(fd, [buffer]) if memoryview(buffer).nbytes else len(os.read(fd, 0))


def joined(source):
    sources = source if isinstance(source, (list, tuple)) else [source]
    return b"".join(bytes(memoryview(piece).cast("B")) for piece in sources)


def is_writable(name, fds, args):
    """Whether the call would write to this pipe."""
    if name not in WRITES or (name == "pwritev" and args[1:] != [-1]):
        return False
    if fcntl.fcntl(fds[0], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        return False
    with open(os.devnull, "wb") as null, contextlib.suppress(Exception):
        name = PLAIN_NAMES.get(name, name).replace("pwritev", "writev").replace("write_all", "write")
        return getattr(os, name)(null.fileno(), args[0]) > 0
    return False


# ---- what os makes of it -----------------------------------------------------------------------------------------------------


class Attempt:
    """A call by os on descriptors in non-blocking mode. *goes_on*: a short write is not its end."""

    def __init__(self, name, fds, args, goes_on, is_polled):
        self.is_polled = is_polled and goes_on and is_writable(name, fds, args)
        self.is_nowait = name in ("preadv", "pwritev") and len(args) > 2 and args[2] & os.RWF_NOWAIT
        self.name, self.fds, self.args = name, fds, args
        self.goes_on = goes_on or name == "write_all"
        self.outcome, self.was_asked = None, False
        self.done = 0
        self.parts = b""

    def ask(self):
        """The Outcome, or Never: not yet."""
        self.look()
        if self.outcome is None:
            raise Never
        return self.outcome

    def look(self):
        """Move what can be moved by now."""
        if self.outcome is None and self.is_woken():
            self.was_asked = True
            try:
                self.outcome = Outcome(value=self.step())
            except BlockingIOError as ex:
                if self.is_nowait:
                    self.outcome = outcome_of_error(ex)
            except BaseException as ex:
                self.outcome = outcome_of_error(ex)

    def is_woken(self):
        """Whether to ask again: who has waited for room goes on when poll(2) says so, and that may be later than there is some."""
        places = {"splice": 1, "sendfile": 0} | dict.fromkeys(WRITES, 0)
        return not self.was_asked or self.name not in places or bool(select.select([], [self.fds[places[self.name]]], [], 0)[1])

    def step(self):
        if self.name == "read_exactly":
            return self.read_exactly()
        if self.goes_on and self.name in WRITES:
            return self.write_on()
        if self.goes_on and self.name == "sendfile":
            return self.send_on()
        name = PLAIN_NAMES.get(self.name, self.name)
        return (readinto_by_os if name == "readinto" else getattr(os, name))(*self.fds, *self.args)

    def read_exactly(self):
        n = self.args[0]
        if not self.parts:
            self.parts = os.read(self.fds[0], n)
            if n == 0:
                return self.parts
            self.is_over = not self.parts
        try:
            while len(self.parts) < n:
                piece = b"" if self.is_over else os.read(self.fds[0], n - len(self.parts))
                if not piece:
                    raise EOFError
                self.parts += piece
        except (OSError, EOFError) as ex:
            ex.partial = self.parts
            raise
        return self.parts

    def write_on(self):
        if self.is_polled:
            return self.write_when_polled()
        if not self.done:          # a wrong argument, and a write of nothing, are what os makes of them
            name = PLAIN_NAMES.get(self.name, self.name)
            written = getattr(os, "write" if name == "write_all" else name)(*self.fds, *self.args)
            self.parts = joined(self.args[0])
            self.done = written
        try:
            while self.done < len(self.parts):
                self.done += os.write(self.fds[0], self.parts[self.done :])
        except BlockingIOError:
            raise
        except OSError as ex:
            if self.name == "write_all":
                ex.characters_written = self.done
                raise
        return None if self.name == "write_all" else self.done

    def write_when_polled(self):
        """To a pipe in blocking mode that coopos polls: not before poll(2) calls it ready, and PIPE_BUF at a time."""
        self.parts = joined(self.args[0])
        while True:
            if not select.select([], self.fds, [], 0)[1]:
                raise BlockingIOError
            try:
                self.done += os.write(self.fds[0], self.parts[self.done : self.done + select.PIPE_BUF])
            except BrokenPipeError as ex:
                if self.name == "write_all" or not self.done:
                    ex.characters_written = self.done
                    raise
                return self.done
            if self.done == len(self.parts):
                return None if self.name == "write_all" else self.done

    def send_on(self):
        out_fd, in_fd, offset, count = *self.fds, *self.args
        if not self.done:
            try:
                self.done = os.sendfile(out_fd, in_fd, offset, count)
            except BrokenPipeError:
                # To a pipe the kernel looks at the other end first; coopos reads first, as the kernel does for sockets.
                if os.pread(in_fd, 1, os.lseek(in_fd, 0, os.SEEK_CUR) if offset is None else offset):
                    raise
            if not self.done:
                return 0
        while self.done < count:
            sent = os.sendfile(out_fd, in_fd, None if offset is None else offset + self.done, count - self.done)
            if not sent:
                break
            self.done += sent
        return self.done

    @property
    def moved(self):
        """What an exception that ends the call tells of bytes moved."""
        return len(self.parts) if self.name == "read_exactly" else self.done

