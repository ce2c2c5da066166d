"""The operating-system functions of :mod:`os` for gevent programs: cooperative, compiled, and right.

Import it in place of ``gevent.os``, or call :func:`patch` under ``gevent.monkey`` and change nothing else. It has every documented
name and signature of ``gevent.os``, and the rest of :mod:`os`. The functions that are called most are the compiled core's own,
without a Python frame in between. Windows has only :func:`tp_read`, :func:`tp_write` and the names of :mod:`os`.

Environment variables, read when the module is imported, which raises ValueError if a value means nothing. On is 1, true, on or
yes, off is 0, false, off or no:

``GEVENT_NOWAITPID``
    As in gevent: :func:`fork` and :func:`forkpty` don't watch their children, and ``waitpid`` moves to ``__extensions__``.
``COOPOS_CHILDREN=thread``
    Wait for children with threads instead of pidfds, as on systems that have none.
``COOPOS_NOWAIT=0``
    Never ask the kernel with RWF_NOWAIT, as on systems that don't have it.
``COOPOS_THREADS``
    How many reads, writes and other calls may wait for disks at once, in threads: 64 by default.
``COOPOS_SETS=watchers``
    Wait for descriptors by watchers of gevent's loop, as on systems without epoll.
``COOPOS_FAIRNESS``
    0: reads and writes that don't have to wait never give the hub a turn. Another count: they do after so many in a row, and not
    only when the hub has not run for about 10 ms.
``COOPOS_KEEP_GREENLETS=0``
    A forked child has only the greenlet that forked, unless :func:`patch`, :func:`fork_policy` or an argument says otherwise.
``COOPOS_REPORT``
    The name of a signal, as SIGUSR1: the process prints :func:`report` to standard error when it gets that. ``socket``: it answers
    ``python -m coopos doctor --pid PID``. Both, with a comma in between.
``COOPOS_PATCH=1``
    ``gevent.monkey.patch_all()`` calls :func:`patch`. With ``COOPOS_PATCH=io`` it calls ``patch(io=True)``.
"""

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any as _Any

from coopos import _patch, _settings
from coopos._files import tp_read as tp_read, tp_write as tp_write
from coopos._patch import patch as patch, patched as patched, unpatch as unpatch

if TYPE_CHECKING:
    # The names whose types are not those of os come first: of two definitions mypy keeps the first, and pyright the last.
    from coopos._fork import fork as fork, forkpty as forkpty

    # isort: split
    from os import *  # type: ignore[assignment]  # noqa: F403

__version__ = "0.1.0.dev0"

#: The names that stand in for functions of :mod:`os`; what :func:`patch` puts there.
__implements__: list[str] = []
#: The names that :mod:`os` doesn't have.
__extensions__: list[str] = ["tp_read", "tp_write"]
#: Forms of functions of :mod:`os` that only ``patch(io=True)`` puts there.
_forms: list[str] = []

#: The names that are neither in :mod:`os` nor for it.
_diagnosis = ["doctor", "patch", "patched", "unpatch"]

#: The functions of :mod:`os` whose form of ours is imported when a program first asks for it, by module.
_later: dict[str, str] = {}

if TYPE_CHECKING:
    from coopos._copying import copy_file_range as copy_file_range, sendfile as sendfile, splice as splice
    from coopos._programs import (  # type: ignore[assignment]
        popen as popen,
        posix_spawn as posix_spawn,
        posix_spawnp as posix_spawnp,
        spawnl as spawnl,
        spawnle as spawnle,
        spawnlp as spawnlp,
        spawnlpe as spawnlpe,
        spawnv as spawnv,
        spawnve as spawnve,
        spawnvp as spawnvp,
        spawnvpe as spawnvpe,
        system as system,
    )
    from coopos._report import report as report
    from coopos.io import FileIO as FileIO, fdopen as fdopen  # type: ignore[no-redef]

if hasattr(_os, "fork"):
    from coopos._core import (
        as_builtin as _as_builtin,
        close as close,
        closerange as closerange,
        counters as counters,
        make_nonblocking as make_nonblocking,
        nb_read as nb_read,
        nb_write as nb_write,
        pread as pread,
        pwrite as pwrite,
        read as read,
        read_exactly as read_exactly,
        readinto as readinto,
        readv as readv,
        wait as wait,
        wait3 as wait3,
        wait4 as wait4,
        wait_exit as wait_exit,
        waitpid as waitpid,
        write as write,
        write_all as write_all,
        writev as writev,
    )
    from coopos._files import (
        eventfd_read as eventfd_read,
        eventfd_write as eventfd_write,
        fdatasync as fdatasync,
        flock as flock,
        fsync as fsync,
        ftruncate as ftruncate,
        getgrouplist as getgrouplist,
        getlogin as getlogin,
        getrandom as getrandom,
        initgroups as initgroups,
        lockf as lockf,
        open as open,
        posix_fallocate as posix_fallocate,
        sync as sync,
        truncate as truncate,
        urandom as urandom,
    )
    from coopos._fork import (
        fork as fork,
        fork_and_watch as fork_and_watch,
        fork_gevent as fork_gevent,
        fork_policy as fork_policy,
        register_at_fork as register_at_fork,
        watch as watch,
    )

    _forms += ["sendfile", "splice", "copy_file_range"]
    _later |= dict.fromkeys(_forms, "_copying")
    _forms += ["fsync", "fdatasync", "sync", "posix_fallocate", "truncate", "ftruncate", "open", "lockf"]
    _forms += ["eventfd_read", "eventfd_write", "getrandom", "urandom", "getlogin", "getgrouplist", "initgroups"]
    _forms += ["register_at_fork"]
    for _name in [name for name in _forms if not hasattr(_os, name)]:
        _forms.remove(_name)
        _later.pop(_name, None)
        globals().pop(_name, None)
    _wait_family = ["waitpid", "wait", "wait3", "wait4"]
    if hasattr(_os, "waitid"):
        from coopos._core import waitid as waitid

        _wait_family += ["waitid"]
    _forms += ["read", "write", "readv", "writev", "pread", "pwrite", "fdopen"]
    if hasattr(_os, "preadv"):
        from coopos._core import preadv as preadv, pwritev as pwritev

        _forms += ["preadv", "pwritev"]
    _starters = ["system", "popen"]
    _starters += ["spawnl", "spawnle", "spawnlp", "spawnlpe", "spawnv", "spawnve", "spawnvp", "spawnvpe"]
    if _settings.WATCHES_CHILDREN and hasattr(_os, "posix_spawn"):
        _starters += ["posix_spawn", "posix_spawnp"]
    _later |= dict.fromkeys(_starters, "_programs")
    _later |= dict.fromkeys(("FileIO", "fdopen"), "io")
    _later["report"] = "_report"
    _diagnosis += ["counters", "report"]
    __implements__ += ["fork", "close", "closerange", *_starters]
    __extensions__ += ["make_nonblocking", "nb_read", "nb_write", "fork_and_watch", "fork_gevent", "watch", "wait_exit"]
    __extensions__ += ["fork_policy", "read_exactly", "write_all", "FileIO", "flock"]
    (_forms if hasattr(_os, "readinto") else __extensions__).append("readinto")
    if hasattr(_os, "forkpty"):
        from coopos._files import read_pty as read_pty
        from coopos._fork import (
            forkpty as forkpty,
            forkpty_and_watch as forkpty_and_watch,
            forkpty_gevent as forkpty_gevent,
        )

        __implements__ += ["forkpty"]
        __extensions__ += ["forkpty_gevent", "forkpty_and_watch", "read_pty"]
    (__implements__ if _settings.WATCHES_CHILDREN else __extensions__).extend(_wait_family)

    # What is builtin in os is builtin here too: it doesn't become a method where it is an attribute of a class. What is compiled is
    # builtin already.
    _watch = "callback=None, loop=None, ref=False, {}=None, " if _settings.WATCHES_CHILDREN else ""
    _spawn = "path, argv, env, /, *, file_actions=(), setpgroup=..., resetids=False"
    _signatures = {
        "fork": f"({_watch.format('fork')}*, keep_greenlets=None)",
        "forkpty": f"({_watch.format('forkpty')}*, keep_greenlets=None, winsize=None)",
        "system": "(command)",
        **dict.fromkeys(
            ("posix_spawn", "posix_spawnp"), f"({_spawn}, setsid=False, setsigmask=(), setsigdef=(), scheduler=...)"
        ),
    }
    for _name in _signatures.keys() & globals().keys():
        globals()[_name] = _as_builtin(globals()[_name], _signatures[_name], __name__)


def __getattr__(name: str) -> _Any:
    """Import the name *name*, the first time that a program asks for it."""
    if name not in _later:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f"{__name__}.{_later[name]}"), name)
    if name in _signatures:
        value = _as_builtin(value, _signatures[name], __name__)
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *_later})


def doctor() -> int:
    """Say which mechanism serves what in this process, and prove each on a real pipe, file or child.

    Does what ``python -m coopos doctor`` does, in the process that calls it. It also counts how often the kernel has refused this
    process a pidfd, so that a thread watched the child.

    Returns:
        int: 0 if all are well, if only by a fallback, else 1. The report goes to standard output, a line for each.

    Keeps :ref:`what every function promises <promises>`. Forks, and starts a program.

    .. versionadded:: 0.1.0
    """
    from coopos._doctor import main

    return main()


def _functions(names: list[str]) -> dict[str, _Any]:
    return {name: globals()[name] if name in globals() else __getattr__(name) for name in names}


_patch.offer(lambda: _functions(__implements__ + __extensions__), lambda: _functions(_forms))

__all__ = sorted({*__implements__, *__extensions__, *_forms, *_diagnosis})

#: The functions of :mod:`os` that are here in a form of our own, for a program of greenlets: docs/concepts/census.rst says why.
__cooperative__: list[str] = sorted(name for name in __all__ if hasattr(_os, name))

_own = {*__all__}
#: The names taken from :mod:`os` as they are.
__imports__: list[str] = [name for name in vars(_os) if not name.startswith("__") and name not in _own]
for _name in __imports__:
    globals()[_name] = getattr(_os, _name)

if _settings.REPORT != "off" and hasattr(_os, "fork"):
    _import_module("coopos._on_demand").start(_settings.REPORT)
