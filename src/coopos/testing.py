"""A plug-in for pytest: a test fails if it leaves a descriptor, a child, an active watcher or a parked greenlet behind.

``pytest -p coopos.testing`` switches it on; docs/recipes/testing.rst tells how to use it. It needs pytest and coopos alone. It
patches nothing: it looks before each test and after it.

- The kernel knows descriptors and children. Watchers and greenlets are found among the objects that the garbage collector knows.
  That is a walk over all of them. So there is one walk a test, at its end, and another at its start only if something that is no
  test's may have come: a fixture of a wider scope was set up or ended.
- What was there before the test is not the test's. pytest's own descriptors are older than any test.
- What is found is looked for again after a collection, because a reference cycle may have held it.
- Each thing is reported once: not the watcher too by which a reported greenlet waits, nor the pidfd of a reported child.

PYTEST_DONT_REWRITE: it asserts nothing, and a conftest.py may import it before pytest does. See
https://docs.pytest.org/en/stable/how-to/assert.html
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import posix
import signal
import stat
import subprocess
import sys
import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import gevent
import pytest
from gevent.hub import Hub, get_hub
from greenlet import getcurrent, greenlet

from coopos import _core, _report

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Iterable, Iterator

KINDS = ("descriptors", "children", "watchers", "greenlets")
PROC = "/proc"
MAX_TURN_S = 1.0  # the loop is never idle while a greenlet calls gevent.sleep(0) for ever
MAX_END_S = 5.0
MAX_FRAMES = 10


# ---- what there is -----------------------------------------------------------------------------------------------------------


def turn_loop() -> None:
    """Let the hub run until nothing is ready any more."""
    get_hub().loop.update_now()
    with at_most(MAX_TURN_S):
        for _ in range(2):
            gevent.idle()


def at_most(seconds: float) -> gevent.Timeout:
    """A context that a greenlet leaves then. It is not what keeps a loop running."""
    return gevent.Timeout(seconds, False, ref=False)  # type: ignore[arg-type]  # documented, but not in the stubs


def open_fds() -> dict[int, str]:
    """{fd: what it names} of this process."""
    fds = {}
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            fds[int(name)] = name_of(int(name))  # the listing's own descriptor is gone
    return fds


def name_of(fd: int) -> str:
    status = os.fstat(fd)
    try:
        return os.readlink(f"/dev/fd/{fd}")
    except OSError:  # macOS: these are no links
        return f"inode {status.st_ino} of device {status.st_dev}"


def children() -> dict[int, str]:
    """{pid: its state and its command} of this process's children, with the dead that nobody has waited for."""
    if hasattr(posix, "waitid"):  # not in os: coopos.patch(io=True) puts one there that knows of children already collected
        try:
            posix.waitid(posix.P_ALL, 0, posix.WEXITED | posix.WNOHANG | posix.WNOWAIT)
        except ChildProcessError:
            return {}
    rows = rows_of_proc() if os.path.exists(f"{PROC}/self/stat") else rows_of_ps()
    return {
        pid: f"{'a zombie' if state == 'Z' else 'running'}: {command}"
        for pid, parent, state, command in rows
        if parent == os.getpid()
    }


def rows_of_proc() -> Iterator[tuple[int, int, str, str]]:
    """(pid, parent's pid, state, command) of all processes."""
    for name in os.listdir(PROC):
        if name.isdigit():
            short, fields = _report.stat_of(int(name))
            if fields:  # else it has ended meanwhile
                command = " ".join(_report.text_of(f"{PROC}/{name}/cmdline").split("\0")).strip()
                yield int(name), int(fields[1]), fields[0], command or f"[{short}]"


def rows_of_ps() -> Iterator[tuple[int, int, str, str]]:
    """The same where there is no /proc. ps is a child, too."""
    command = ["ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "stat=", "-o", "command="]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as ps:
        out, _ = ps.communicate()
    for line in out.splitlines():
        pid, ppid, state, *words = line.split(None, 3)
        if int(pid) != ps.pid:
            yield int(pid), int(ppid), state[0], " ".join(words)


def active_watchers() -> list[Any]:
    """All active watchers of all loops that have not been destroyed."""
    name = type(get_hub().loop).__module__
    module = import_module(name if name == "gevent.libev.corecext" else "gevent._ffi.watcher")
    # libev's stay active when their loop is destroyed under them.
    return [watcher for watcher in objects_of(module.watcher) if watcher.active and (watcher.loop is None or watcher.loop.ptr)]


def parked_greenlets() -> list[greenlet]:
    """The greenlets of this thread that have begun, have not ended, and don't run. The hub is none of them."""
    running, top = ancestors(getcurrent())
    return [
        each
        for each in objects_of(greenlet)
        if each and each not in running and not isinstance(each, Hub) and ancestors(each)[1] is top
    ]


def ancestors(of: greenlet) -> tuple[list[greenlet], greenlet]:
    """A greenlet and its parents; and the last of these, which is its thread's main greenlet."""
    line = [of]
    while (parent := line[-1].parent) is not None:
        line.append(parent)
    return line, line[-1]


def classes_from(base: type) -> Iterator[type]:
    yield base
    below: list[type] = base.__subclasses__()
    for each in below:
        yield from classes_from(each)


def objects_of(base: type) -> list[Any]:
    """All objects of a class that the garbage collector knows; no Python code runs for each of the others."""
    classes = set(classes_from(base))
    objects = gc.get_objects()
    return list(itertools.compress(objects, map(classes.__contains__, map(type, objects))))


# ---- how it is told ----------------------------------------------------------------------------------------------------------


FILES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def describe_fd(fd: int, name: str) -> str:
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode) and (ends := addresses_of(fd)):
        name = f"socket {ends}"
    elif pid := pid_of(fd, name):
        name = f"{name} of process {pid}"
    elif ":[" not in name:  # Linux calls a pipe pipe:[inode]
        name = f"{FILES.get(stat.S_IFMT(mode), '')} {name}"
    return f"descriptor {fd}: {name}"


def addresses_of(fd: int) -> str:
    """The ends of a socket; "" if it has no addresses."""
    known = _report.socket_facts(fd)
    return " to ".join(filter(None, (known.get("address"), known.get("peer"))))


def pid_of(fd: int, name: str) -> int:
    """Whose pidfd it is, or 0."""
    return _report.pid_of(fd) if "pidfd" in name else 0


def describe_greenlet(parked: greenlet) -> str:
    """With its stack, and where it was spawned if gevent notes that."""
    frame = parked.gr_frame
    lines = traceback.format_stack(frame, MAX_FRAMES) if frame is not None else ["  in compiled code\n"]
    spawned = getattr(parked, "spawning_stack", None)
    if spawned is not None:
        lines.insert(0, f"  spawned by {spawned.f_code.co_name}, {spawned.f_code.co_filename}, line {spawned.f_lineno}\n")
    return f"greenlet {parked!r} waits:\n{''.join(lines)}".rstrip()


def belongs_to(watcher: Any, greenlets: Iterable[greenlet], pids: Collection[int]) -> bool:
    """Whether one of these greenlets waits by this watcher, it is there for one of these children, or the hub's threadpool has it.

    libuv has one watcher for all that wait for a descriptor, and its watcher of a child has another that tells it.
    https://github.com/gevent/gevent/blob/master/src/gevent/libuv/watcher.py
    """
    if parts := getattr(watcher, "_multiplex_watchers", ()):
        return all(belongs_to(part, greenlets, pids) for part in parts)
    owner = getattr(watcher.callback, "__self__", watcher.callback)
    if type(owner).__module__ == _core.__name__:  # one watcher for all that wait for something of coopos
        return bool(greenlets or pids)
    waiter = getattr(owner, "greenlet", owner)
    if any(each is waiter for each in greenlets) or owner is get_hub().threadpool:
        return True
    return any(getattr(each, "pid", None) in pids for each in (watcher, *(watcher.args or ())))


# ---- what stays, and is no test's --------------------------------------------------------------------------------------------


def make_what_stays() -> None:
    """Have the hub make now what it makes once and keeps: its own descriptors, its threadpool without a thread, coopos's set."""
    assert get_hub().threadpool is not None
    reader, writer = os.pipe()
    try:
        waiter = gevent.spawn(_core.nb_read, reader, 1)
        turn_loop()
        waiter.kill()
    finally:
        os.close(reader)
        os.close(writer)


def helpers_of_multiprocessing() -> tuple[set[int], set[int]]:
    """The pids and descriptors of its resource tracker and its fork server, which start when they are needed first, and stay:
    https://github.com/python/cpython/blob/main/Lib/multiprocessing/resource_tracker.py
    """
    tracker = getattr(sys.modules.get("multiprocessing.resource_tracker"), "_resource_tracker", None)
    server = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    pids: set[Any] = {getattr(tracker, "_pid", None), getattr(server, "_forkserver_pid", None)}
    fds: set[Any] = {getattr(tracker, "_fd", None), getattr(server, "_forkserver_alive_fd", None)}
    return pids, fds


def log_handlers() -> list[Any]:
    """Those of all loggers. One that has a delay opens its file when it has something to write."""
    import logging

    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    found = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]
    return found + [handler.target for handler in found if hasattr(handler, "target")]  # of a MemoryHandler


def fds_of(handlers: Iterable[Any]) -> Iterator[int]:
    for handler in handlers:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            yield handler.stream.fileno()


# ---- before a test, and after it ---------------------------------------------------------------------------------------------


class Before(NamedTuple):
    """What there was."""

    fds: dict[int, str]
    pids: Collection[int]
    handlers: list[Any]


class Leftover(NamedTuple):
    kind: str
    text: str
    thing: Any


class Watchman:
    """Knows, of one run of pytest, what is no test's."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self.allowed = checked(allowed, "coopos_leaves, in the configuration")
        self.hub: object = None
        self.is_outdated = True  # there may be greenlets and watchers that are neither known nor a test's
        self.watchers: set[int] = set()  # by id(): libev's can't be referred to weakly
        self.greenlets: WeakSet[greenlet] = WeakSet()
        self.strays: dict[int, str] = {}  # what earlier tests left open, and a collection may close at any time

    def look_before(self, allowed: Collection[str]) -> Before:
        if self.hub is not get_hub():
            self.hub = get_hub()
            self.is_outdated = True
            make_what_stays()
        if self.is_outdated and needs_walk(allowed):
            turn_loop()  # greenlets that a fixture has spawned begin now
            self.watchers = {id(watcher) for watcher in active_watchers()}
            self.greenlets = WeakSet(parked_greenlets())
            self.is_outdated = False
        return Before(open_fds(), children().keys(), log_handlers())

    def look_after(self, before: Before, allowed: Collection[str]) -> list[Leftover]:
        """What was left behind and is not allowed; from now on it is known, and is not the next test's."""
        turn_loop()
        found = self.look(before, allowed)
        if any(leftover.kind not in allowed for leftover in found):
            gc.collect()
            turn_loop()
            found = self.look(before, allowed)
        self.is_outdated |= bool(found)
        fds = {leftover.thing for leftover in found if leftover.kind == "descriptors"}
        self.strays = {fd: name for fd, name in open_fds().items() if fd in fds or self.strays.get(fd) == name}
        return [leftover for leftover in found if leftover.kind not in allowed]

    def look(self, before: Before, allowed: Collection[str]) -> list[Leftover]:
        """All that is new. Greenlets and watchers are not looked for if both are allowed."""
        helpers, _ = helpers_of_multiprocessing()
        pids = {pid: text for pid, text in children().items() if pid not in before.pids and pid not in helpers}
        found = [Leftover("children", f"child {pid}, {text}", pid) for pid, text in pids.items()]
        found += self.new_fds(before, pids)
        if not needs_walk(allowed):
            self.is_outdated = True
            return found
        watchers, greenlets = active_watchers(), parked_greenlets()
        new = [each for each in greenlets if each not in self.greenlets]
        found += [Leftover("greenlets", describe_greenlet(each), each) for each in new]
        for watcher in watchers:
            if id(watcher) not in self.watchers and not belongs_to(watcher, new, pids):
                found.append(Leftover("watchers", f"watcher {watcher!r}", watcher))
        return found

    def new_fds(self, before: Before, pids: Collection[int]) -> Iterator[Leftover]:
        _, stay = helpers_of_multiprocessing()
        stay |= set(fds_of(before.handlers))
        fds = open_fds()
        for fd, name in fds.items():
            if name not in (before.fds.get(fd), self.strays.get(fd)) and fd not in stay and pid_of(fd, name) not in pids:
                with contextlib.suppress(OSError):
                    yield Leftover("descriptors", describe_fd(fd, name), fd)
        for fd, name in before.fds.items():
            if fd not in fds and self.strays.get(fd) != name:
                yield Leftover("descriptors", f"descriptor {fd}, open before the test, was closed: {name}", fd)


def needs_walk(allowed: Collection[str]) -> bool:
    return not ("greenlets" in allowed and "watchers" in allowed)


def checked(kinds: Iterable[str], where: str) -> frozenset[str]:
    kinds = frozenset(kinds)
    if unknown := kinds - set(KINDS):
        raise pytest.UsageError(f"{where}: {', '.join(map(repr, sorted(unknown)))} is none of {', '.join(KINDS)}")
    return kinds


def end(found: Iterable[Leftover]) -> None:
    """Kill the greenlets, and kill and collect the children, so that the next test doesn't meet them."""
    with at_most(MAX_END_S):
        gevent.killall([leftover.thing for leftover in found if leftover.kind == "greenlets"])
        for pid in [leftover.thing for leftover in found if leftover.kind == "children"]:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                _core.waitpid(pid, 0)
    turn_loop()


# ---- pytest ------------------------------------------------------------------------------------------------------------------

WATCHMAN = pytest.StashKey[Watchman]()
HAS_FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("coopos_leaves", f"what every test may leave behind: {', '.join(KINDS)}", type="args", default=[])


def pytest_configure(config: pytest.Config) -> None:
    words = f"coopos_leaves(*kinds): the test may leave behind {', '.join(KINDS)}; all of them if none is named"
    config.addinivalue_line("markers", words)
    config.stash[WATCHMAN] = Watchman(config.getini("coopos_leaves"))


def pytest_itemcollected(item: pytest.Item) -> None:
    for mark in item.iter_markers("coopos_leaves"):
        checked(mark.args, f"{item.nodeid}: coopos_leaves")


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> None:
    if fixturedef.scope != "function":
        request.config.stash[WATCHMAN].is_outdated = True


def pytest_fixture_post_finalizer(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> None:
    if fixturedef.scope != "function":
        request.config.stash[WATCHMAN].is_outdated = True


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> None:
    if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
        item.stash[HAS_FAILED] = True


@pytest.fixture(autouse=True)
def _coopos_leaves_nothing(request: pytest.FixtureRequest) -> Generator[None]:
    """Fail a test that leaves something behind. One that has failed already is not accused: its traceback may hold what it made."""
    watchman = request.config.stash.get(WATCHMAN, None)
    if watchman is None:  # -p no:coopos.testing, after a -p in addopts: pytest then still has the fixtures of the module
        yield
        return
    allowed = watchman.allowed.union(*(mark.args or KINDS for mark in request.node.iter_markers("coopos_leaves")))
    before = watchman.look_before(allowed)
    yield
    found = watchman.look_after(before, allowed)
    end(found)
    if found and not request.node.stash.get(HAS_FAILED, False):
        pytest.fail("left behind:\n" + "\n".join(leftover.text for leftover in found), pytrace=False)
