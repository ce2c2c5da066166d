"""The operating-system functions of :mod:`os` for gevent programs: cooperative, compiled, and right.

Import it in place of ``gevent.os``, or call :func:`patch` under ``gevent.monkey`` and change nothing else. It has every documented
name and signature of ``gevent.os``, and the rest of :mod:`os`. Hot functions are the compiled core's own, without a Python frame
in between. On Windows only :func:`tp_read`, :func:`tp_write` and the names of :mod:`os` are there.

Environment variables, read when the module is imported:

``GEVENT_NOWAITPID``
    As in gevent: :func:`fork` and :func:`forkpty` don't watch their children, and ``waitpid`` moves to ``__extensions__``.
``COOPOS_CHILDREN=thread``
    Wait for children with threads instead of pidfds, as on systems that have none.
``COOPOS_PATCH=1``
    ``gevent.monkey.patch_all()`` calls :func:`patch`.
"""

import os as _os
from typing import TYPE_CHECKING

from gevent._config import config as _config

from coopos._patch import patch, unpatch
from coopos._threadpool import tp_read, tp_write

if TYPE_CHECKING:
    from os import *  # noqa: F403

__version__ = "0.1.0.dev0"

#: The names that stand in for functions of :mod:`os`; what :func:`patch` puts there.
__implements__: list[str] = []
#: The names that :mod:`os` hasn't.
__extensions__: list[str] = ["tp_read", "tp_write"]

if hasattr(_os, "fork"):
    from coopos._core import close, make_nonblocking, nb_read, nb_write, waitpid
    from coopos._fork import (
        fork,
        fork_and_watch,
        fork_gevent,
        forkpty,
        forkpty_and_watch,
        forkpty_gevent,
        posix_spawn,
        posix_spawnp,
    )

    __implements__ += ["fork", "close", "forkpty"]
    __extensions__ += ["make_nonblocking", "nb_read", "nb_write", "forkpty_gevent"]
    __extensions__ += ["fork_and_watch", "fork_gevent", "forkpty_and_watch"]
    if _config.disable_watch_children:
        __extensions__ += ["waitpid"]
        posix_spawn, posix_spawnp = _os.posix_spawn, _os.posix_spawnp
    else:
        __implements__ += ["waitpid", "posix_spawn", "posix_spawnp"]

#: The names taken from :mod:`os` as they are.
__imports__: list[str] = [
    name for name in vars(_os) if not name.startswith("__") and name not in __implements__ + __extensions__
]
for _name in __imports__:
    globals()[_name] = getattr(_os, _name)
del _name

__all__ = [*__implements__, *__extensions__, "patch", "unpatch"]
