"""``coopos.report()``: what the greenlets, children and worker threads of this process wait for.

The compiled core tells who waits. What each descriptor is and how a child does is asked of the kernel when the report is made. A
report is made wherever somebody asks: in a signal handler, or in a thread of _on_demand without a hub, while the hub may stand in a
callback. So nothing here gives way to a hub, takes a lock, or calls code of the program, as the repr() of an argument would.
"""

from __future__ import annotations

import _socket
import errno
import json
import os
import posix
import stat
import sys
import time
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from gevent import __version__ as _gevent_version
from gevent.hub import MAIN_THREAD_IDENT  # type: ignore[attr-defined]

from coopos import _core

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType

#: So much of a stack, from its innermost frame.
MAX_FRAMES = 40
#: In the text, so many greenlets that have the same stack are listed.
MAX_ALIKE = 20
#: Frames of these modules are the report's own.
OWN_MODULES = (__name__, "coopos._on_demand")

#: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
STATES = {"R": "running", "S": "sleeping", "D": "waiting for a disk", "Z": "zombie", "T": "stopped", "t": "stopped by a tracer"}


# ---- what the kernel tells ----------------------------------------------------------------------------------------------------


def text_of(path: str) -> str:
    """A file of /proc, or "" if there is none. Not by open(), which patch(io=True) replaces."""
    try:
        fd = posix.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return posix.read(fd, 65536).decode(errors="replace")
    except OSError:
        return ""
    finally:
        posix.close(fd)


def _target_of(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _address(address: Any) -> str:
    if isinstance(address, bytes):  # of Linux' abstract namespace
        return "@" + address[1:].decode(errors="replace")
    if isinstance(address, tuple) and len(address) in (2, 4):
        host = str(address[0])
        return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
    return str(address or "")


def socket_facts(fd: int) -> dict[str, Any]:
    nonblocking = getattr(_socket, "SOCK_NONBLOCK", 0)
    if not nonblocking and _socket.getdefaulttimeout() is not None:
        return {"kind": "socket"}  # to look at it would change its mode
    options: list[tuple[int, ...]] = [(_socket.SOL_SOCKET, _socket.SO_TYPE)]
    if hasattr(_socket, "SO_DOMAIN"):
        options += [(_socket.SOL_SOCKET, _socket.SO_DOMAIN), (_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)]
    own, peer, kind, *others = _core.socket_facts(_socket.socket, fd, _socket.SOCK_STREAM | nonblocking, options)
    family, credentials = others or (None, None)
    names = {_socket.AF_UNIX: "Unix", _socket.AF_INET: "IPv4", _socket.AF_INET6: "IPv6", None: ""}
    types = {_socket.SOCK_STREAM: "stream", _socket.SOCK_DGRAM: "datagram"}
    label = " ".join((names.get(family, f"family {family}"), types.get(kind, f"type {kind}"), "socket")).strip()
    found: dict[str, Any] = {"kind": "socket", "type": label, "address": _address(own)}
    if peer is not None:
        found["peer"] = _address(peer)
        pid = int.from_bytes((credentials or b"")[:4], sys.byteorder)
        if family == _socket.AF_UNIX and pid:
            found["peer_pid"] = pid
    return found


def _describe(fd: int, ends: dict[str, list[int]]) -> dict[str, Any]:
    """What a descriptor is. *ends*: the descriptors of this process by what they lead to."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError as ex:
        return {"kind": "closed" if ex.errno == errno.EBADF else "unknown"}
    target = _target_of(fd)
    if stat.S_ISSOCK(mode):
        try:
            return socket_facts(fd)
        except OSError:
            return {"kind": "socket"}
    if stat.S_ISFIFO(mode):
        others = [each for each in ends.get(target, ()) if each != fd]
        return {"kind": "FIFO" if target.startswith("/") else "pipe", "target": target, "other_ends": others}
    if stat.S_ISCHR(mode):
        return {"kind": "tty" if posix.isatty(fd) else "device", "target": target}
    if stat.S_IFMT(mode):
        return {"kind": "file", "target": target}
    kind = target.removeprefix("anon_inode:").strip("[]") or "unknown"
    return {"kind": "pidfd", "pid": pid_of(fd) or None} if "pidfd" in kind else {"kind": kind}


def pid_of(fd: int) -> int:
    """Whose pidfd it is, or 0: https://man7.org/linux/man-pages/man2/pidfd_open.2.html"""
    lines = text_of(f"/proc/self/fdinfo/{fd}").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("Pid:")), 0)


def _ends() -> dict[str, list[int]]:
    """The descriptors of this process by what they lead to."""
    found: dict[str, list[int]] = {}
    try:
        for fd in map(int, os.listdir("/proc/self/fd")):
            found.setdefault(_target_of(fd), []).append(fd)
    except OSError:
        pass
    return found


def stat_of(pid: int) -> tuple[str, list[str]]:
    """(name, the fields after it) of a process in /proc: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html"""
    before, _, after = text_of(f"/proc/{pid}/stat").rpartition(")")
    return before.partition("(")[2], after.split()


def _process_of(pid: int) -> dict[str, Any]:
    """What /proc tells of a process: {} where it tells nothing."""
    name, fields = stat_of(pid)
    if len(fields) < 20:
        return {}
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    state = STATES.get(fields[0], fields[0])
    return {"process": state, "age_s": round(max(age_s, 0), 1), "command": name}


def has_ended(pid: int) -> bool:
    """Whether it is a zombie."""
    return _process_of(pid).get("process") == STATES["Z"]


# ---- what the interpreter tells -----------------------------------------------------------------------------------------------


def _stack(frame: FrameType | None) -> list[str]:
    """The innermost frame first; without source lines, which would have to be read from files."""
    found: list[str] = []
    while frame is not None and frame.f_globals.get("__name__") in OWN_MODULES:
        frame = frame.f_back
    while frame is not None and len(found) < MAX_FRAMES:
        code = frame.f_code
        found.append(f"{code.co_filename}:{frame.f_lineno} in {getattr(code, 'co_qualname', code.co_name)}")
        frame = frame.f_back
    return found


def _attribute(greenlet: Any, name: str) -> Any:
    """An attribute, or None. A class of the program may have its own ways to look them up."""
    try:
        return object.__getattribute__(greenlet, name)
    except Exception:
        return None


def _greenlet(greenlet: Any) -> dict[str, Any]:
    """Its address and stack; what it runs, and its name, if the program has given it one."""
    frame = _attribute(greenlet, "gr_frame")
    found = {"greenlet": f"{type(greenlet).__name__} {id(greenlet):#x}", "stack": _stack(frame)}
    run = _attribute(greenlet, "_run")
    if isinstance(run, (FunctionType, MethodType, BuiltinFunctionType)):  # of others the name could be code of the program
        found["runs"] = run.__qualname__
    name = (_attribute(greenlet, "__dict__") or {}).get("name")
    if isinstance(name, str):
        found["name"] = name
    return found


def _threads(hubs: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    found = [
        {"thread": ident, "is_main": ident == MAIN_THREAD_IDENT, **hubs.get(ident, {}), "stack": _stack(frame)}
        for ident, frame in sys._current_frames().items()
    ]
    return [row for row in found if row["stack"]]  # the thread that only makes this report has none


# ---- the report ---------------------------------------------------------------------------------------------------------------


def _thread_of(hub: Any) -> int | None:
    return None if hub is None else hub.thread_ident


def _patch_mode() -> str:
    """"off", "on" or "io". coopos.patched() has each name; it imports modules for that."""
    patch = sys.modules.get("coopos._patch")
    mode: str = "off" if patch is None else patch.mode()
    return mode


def facts() -> dict[str, Any]:
    """All that the report says, in the form of JSON."""
    waits = _core.waits()
    ends = _ends() if waits else {}
    hubs = {}
    threads_of_loops = {}
    for hub, loop, epoll, n in _core.sets():
        ident = _thread_of(hub)
        threads_of_loops[id(loop)] = ident
        if ident is not None:
            hubs[ident] = {"loop": type(loop).__module__, "set": "watchers" if epoll < 0 else f"epoll {epoll}", "waits": n}
    kinds = {os.P_PID: "child", os.P_PGID: "process group"}
    return {
        "pid": os.getpid(),
        "time": time.time(),
        # Not imported, as in the doctor; and gone at the interpreter's end.
        "coopos": getattr(sys.modules.get("coopos"), "__version__", None),
        "gevent": _gevent_version,
        "python": sys.version.split()[0],
        "patched": _patch_mode(),
        "counters": _core.counters(),
        "threads": _threads(hubs),
        "waits": [
            {"fd": fd, "for": "READ" if events == _core.READ else "WRITE" if events == _core.WRITE else "READ, WRITE"}
            | {"waited_s": round(waited_s, 2), "thread": _thread_of(hub), **_describe(fd, ends), **_greenlet(greenlet)}
            for fd, events, greenlet, hub, waited_s in waits
        ],
        "turns": [{"fd": fd, "waited_s": round(waited_s, 2), **_greenlet(greenlet)} for fd, greenlet, waited_s in _core.turns()],
        "jobs": [
            {"call": f"{call}({subject})", "state": "in a worker" if has_begun else "queued"}
            | {"waits_for": "another process" if waits_for_peer else "a disk", "waited_s": round(waited_s, 2)}
            | {"thread": threads_of_loops.get(id(loop))}
            | ({"greenlet": None, "stack": []} if greenlet is None else _greenlet(greenlet))
            for call, subject, has_begun, waits_for_peer, greenlet, loop, waited_s in _core.jobs()
        ],
        "children": [
            {"pid": child.pid, "state": child.state_word, "watched_by": child.mechanism, "callbacks": callbacks}
            | {"keeps_loop_alive": keeps_alive, **(_process_of(child.pid) if child.active else {})}
            | {"waiters": [_greenlet(greenlet) for greenlet in greenlets]}
            for child, greenlets, callbacks, keeps_alive in _core.records()
        ],
        "questions": [
            {"about": f"{kinds[idtype]} {id_}" if idtype in kinds else "any child", "threads": n, "options": options}
            | {"waiters": [_greenlet(greenlet) for greenlet in greenlets]}
            for idtype, id_, options, greenlets, n in _core.questions()
        ],
        "put_off_closes": [
            {"fd": fd, "waits_for_loop": waits_for_loop, "others": others} for fd, waits_for_loop, others in _core.put_off_closes()
        ],
    }


def _grouped(rows: Iterable[tuple[str, dict[str, Any]]], indent: str = "  ") -> list[str]:
    """A line for each (text, greenlet), and each stack once, under all that have it."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for text, greenlet in rows:
        label = greenlet["greenlet"] or "no greenlet waits any more"
        label += f" of {greenlet['runs']}()" if "runs" in greenlet else ""
        label += f", {greenlet['name']!r}" if "name" in greenlet else ""
        groups.setdefault(tuple(greenlet["stack"]), []).append(f"{indent}{text}{label}")
    lines = []
    for stack, labels in groups.items():
        lines += labels[:MAX_ALIKE]
        if len(labels) > MAX_ALIKE:
            lines.append(f"{indent}and {len(labels) - MAX_ALIKE} more with the same stack")
        lines += [f"{indent}    {line}" for line in stack]
    return lines


def _wait_line(row: dict[str, Any]) -> str:
    what = [row.get("type") or row["kind"]]
    what += [row["target"]] if row.get("target") else []
    what += [row["address"]] if row.get("address") else []
    what += [f"to {row['peer'] or 'an unnamed peer'}"] if "peer" in row else []
    what += [f"of process {row['peer_pid']}"] if "peer_pid" in row else []
    what += [f"of process {row['pid']}"] if "pid" in row else []
    what += [f"(also {', '.join(map(str, row['other_ends']))} in this process)"] if row.get("other_ends") else []
    return f"fd {row['fd']} for {row['for']}: {' '.join(what)}, {_time(row)}, by "


def _time(row: dict[str, Any]) -> str:
    return f"for {row['waited_s']:g} s"


def _child_lines(row: dict[str, Any]) -> list[str]:
    what = [row["state"]]
    what += [f"{row['command']}, {row['process']}, {row['age_s']} s old"] if "process" in row else []
    what += [f"watched by {row['watched_by']}"] if row["watched_by"] else []
    what += [f"callbacks: {row['callbacks']}"] if row["callbacks"] else []
    return [f"  {row['pid']}: {'; '.join(what)}", *_grouped((("waited for by ", each) for each in row["waiters"]), "    ")]


def as_text(known: dict[str, Any]) -> str:
    """The report, for people."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(known["time"]))
    versions = f"coopos {known['coopos']}, gevent {known['gevent']}, Python {known['python']}"
    counts = ", ".join(f"{name} {count}" for name, count in known["counters"].items() if count)
    patched = {"off": "not patched", "on": "patch()", "io": "patch(io=True)"}[known["patched"]]
    lines = [f"report of process {known['pid']} at {when}: {versions}; {patched}", f"counters: {counts or 'all 0'}"]
    for row in known["threads"]:
        what = "the main thread" if row["is_main"] else "thread"
        hub = f": a hub on {row['loop']}, {row['set']}, {row['waits']} waits" if "loop" in row else ""
        lines += [f"{what} {row['thread']:#x}{hub}", *(f"      {line}" for line in row["stack"])]
    if known["waits"]:
        lines += [f"waits for descriptors: {len(known['waits'])}"]
        lines += _grouped((_wait_line(row), row) for row in known["waits"])
    if known["jobs"]:
        lines += [f"calls that worker threads make: {len(known['jobs'])}"]
        lines += _grouped(
            (f"{row['call']}, {row['state']}, waits for {row['waits_for']} {_time(row)}, by ", row) for row in known["jobs"]
        )
    if known["turns"]:
        lines += [f"waits until another greenlet is done with a file's buffer: {len(known['turns'])}"]
        lines += _grouped((f"fd {row['fd']}, {_time(row)}, by ", row) for row in known["turns"])
    if known["children"]:
        lines += [f"children: {len(known['children'])}"]
        lines += [line for row in known["children"] for line in _child_lines(row)]
    if known["questions"]:
        lines += [f"waits for children that a worker thread makes: {len(known['questions'])}"]
        for row in known["questions"]:
            lines += [f"  {row['about']}" + (f", for {row['threads']} threads without a hub" if row["threads"] else "")]
            lines += _grouped((("waited for by ", each) for each in row["waiters"]), "    ")
    for row in known["put_off_closes"]:
        waits_for = ["a turn of the loop"] * row["waits_for_loop"] + [f"{row['others']} calls"] * bool(row["others"])
        lines += [f"close({row['fd']}) is put off, until the end of {' and '.join(waits_for) or 'a call'}"]
    return "".join(f"{_printable(line)}\n" for line in lines)


def _printable(line: str) -> str:
    """What others have named may hold terminals' commands, ends of lines, and bytes that are no text."""
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def report(as_json: bool = False) -> str:
    """Tell what the greenlets, children and worker threads of this process wait for, in all its threads.

    For each greenlet that waits in coopos it has the stack, and what the greenlet waits for: a descriptor (what it is, its path or
    peer, READ or WRITE, for how long), a child, a call of a worker, or its turn at a file's buffer. For each thread it says what
    the thread does now. Then come the children that are watched or waited for, the closes that are put off, and :func:`counters`.
    A greenlet that waits for something else, as a lock of gevent's, is not there; ``gevent.util.print_run_info()`` shows all of
    them.

    What can be asked of the kernel is asked when the report is made, so a program that never asks pays nothing for it.
    ``COOPOS_REPORT`` has a signal or ``python -m coopos doctor --pid`` bring a report (:ref:`operations-report`).

    Args:
        as_json: bool, whether to return JSON for programs, and not text for people.

    Returns:
        str, of many lines; or one JSON object.

    Doesn't switch greenlets. Safe in any thread, in the hub, in signal handlers and after a fork.

    .. versionadded:: 0.1.0
    """
    known = facts()
    return json.dumps(known) if as_json else as_text(known)
