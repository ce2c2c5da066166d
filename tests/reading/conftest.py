"""Files for the tests of this folder, and the kinds of descriptors that can be waited for."""

import contextlib
import os

import pytest

from ..helpers.descriptors import frozen_hub_is_an_error, let_threads_end
from ..helpers.files import make_fifo, pipe, pty_pair, socket_pair
from ..helpers.support import closing, turn_loop


@pytest.fixture
def path(tmp_path):
    """A file of 30 bytes in three lines."""
    path = tmp_path / "file"
    path.write_bytes(b"012345678\n" * 3)
    return path


@pytest.fixture
def fd(path):
    with closing(os.open(path, os.O_RDWR)) as (fd,):
        yield fd


@pytest.fixture(params=["pipe", "socket", "pty", "fifo"])
def kind(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["blocking", "nonblocking"])
def ends(request, kind, tmp_path):
    """(reader, writer) of a file that can be waited for."""
    make = {"pipe": pipe, "socket": socket_pair, "pty": pty_pair}.get(kind)
    with make_fifo(tmp_path) if make is None else closing(*make()) as (reader, writer):
        os.set_blocking(reader, request.param)
        os.set_blocking(writer, request.param)
        flags = [os.get_blocking(reader), os.get_blocking(writer)]
        yield reader, writer
        for fd, is_blocking in zip((reader, writer), flags, strict=True):
            with contextlib.suppress(OSError):
                assert os.get_blocking(fd) == is_blocking, "a descriptor's flags were touched"


@pytest.fixture
def live_hub():
    """A hub that stands still is an error, and the workers have done all that they were given when the test has ended."""
    with frozen_hub_is_an_error():
        yield
        let_threads_end()
        turn_loop()
