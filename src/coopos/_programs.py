"""Programs: posix_spawn, the spawn family, system, popen. POSIX only.

Each starts a child, watches it before any greenlet can switch, and waits for it as `waitpid` does. So nothing is polled, and a
killed greenlet leaves a child that is still watched. `system` and `popen` start their shells with `coopos.subprocess`, which is
imported by the first of them that is called.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from typing import TYPE_CHECKING, Any, Literal

from coopos import _core
from coopos._core import waitpid
from coopos._originals import get_original

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from _typeshed import StrOrBytesPath

    Arguments = Sequence[StrOrBytesPath]
    Environment = Mapping[str, str] | Mapping[bytes, bytes]


# ---- posix_spawn -------------------------------------------------------------------------------------------------------------


def _spawner(name: str) -> Callable[..., int]:
    raw: Callable[..., int] = get_original("os", name)

    def spawn(*args: Any, **kwargs: Any) -> int:
        pid = raw(*args, **kwargs)
        _core.watch_new(pid)
        return pid

    spawn.__name__ = spawn.__qualname__ = name
    spawn.__doc__ = f"""Start a program, and watch the child.

    The child's status is kept for :func:`waitpid`.

    Args:
        path, argv, env, file_actions, setpgroup, resetids, setsid, setsigmask, setsigdef, scheduler: as for :func:`os.{name}`.

    Returns:
        int: the child's pid.

    Raises:
        OSError: as :func:`os.{name}`.

    Keeps :ref:`what every function promises <promises>`. Doesn't switch greenlets: the parent stops for a vfork, which takes the
    same time however large the parent is.

    Source: posix_spawn(3); ``gevent.os.{name}``.

    .. versionadded:: 0.1.0
    """
    return spawn


if TYPE_CHECKING:
    from os import posix_spawn as posix_spawn, posix_spawnp as posix_spawnp
elif hasattr(os, "posix_spawn"):
    posix_spawn = _spawner("posix_spawn")
    posix_spawnp = _spawner("posix_spawnp")


# ---- the spawn family --------------------------------------------------------------------------------------------------------


def _spawn(mode: int, execute: Callable[..., object], file: StrOrBytesPath, args: Arguments, *env: Environment) -> int:
    if not isinstance(args, (tuple, list)):
        raise TypeError("argv must be a tuple or a list")
    if not args or not args[0]:
        raise ValueError("argv first element cannot be empty")
    notes: dict[int, Any] = {}
    run = functools.partial(execute, file, args, *env)
    pid = _core.fork_to_watch(_core.fork_process, notes, is_exec=True, run=run)
    _core.watch_new(pid, notes=notes)
    if mode == os.P_NOWAIT:
        return pid
    return os.waitstatus_to_exitcode(waitpid(pid, 0)[1])


def spawnv(mode: int, file: StrOrBytesPath, args: Arguments) -> int:
    """Run the program at path *file* with arguments *args* in a new process, letting other greenlets run while it does.

    Like :func:`os.spawnv`.

    Args:
        mode: os.P_WAIT or os.P_NOWAIT (os.P_NOWAITO is the same).
        file: path of the program.
        args: tuple or list, not empty: the program's name for itself, and its arguments.

    Returns:
        int: under P_NOWAIT the child's pid, which is watched; under P_WAIT its exit code, or minus the signal that ended it. 127
        stands for a program that could not be started too.

    Raises:
        TypeError, ValueError: *args* is not a tuple or list, or is empty, or its first element is.
        OSError: as fork(2).

    Keeps :ref:`what every function promises <promises>`. Switches greenlets only under P_WAIT; killed or timed out there, it leaves
    the child running, and watched.

    Source: fork(2), execve(2).

    .. versionadded:: 0.1.0
    """
    return _spawn(mode, os.execv, file, args)


def spawnve(mode: int, file: StrOrBytesPath, args: Arguments, env: Environment) -> int:
    """Run a program in a new process: :func:`spawnv` with the environment *env*.

    Like :func:`os.spawnve`.

    Args:
        mode, file, args: as for :func:`spawnv`.
        env: mapping of str to str, or of bytes to bytes: the whole environment.

    Returns:
        int: as :func:`spawnv`.

    Raises:
        TypeError, ValueError, OSError: as :func:`spawnv`.

    Keeps :ref:`what every function promises <promises>`. Switches greenlets as :func:`spawnv`.

    Source: fork(2), execve(2).

    .. versionadded:: 0.1.0
    """
    return _spawn(mode, os.execve, file, args, env)


def spawnvp(mode: int, file: StrOrBytesPath, args: Arguments) -> int:
    """Run a program in a new process: :func:`spawnv` with *file* looked for along $PATH.

    Like :func:`os.spawnvp`.

    Args:
        mode, file, args: as for :func:`spawnv`; a *file* with a slash in it is a path.

    Returns:
        int: as :func:`spawnv`.

    Raises:
        TypeError, ValueError, OSError: as :func:`spawnv`.

    Keeps :ref:`what every function promises <promises>`. Switches greenlets as :func:`spawnv`.

    Source: fork(2), execve(2).

    .. versionadded:: 0.1.0
    """
    return _spawn(mode, os.execvp, file, args)


def spawnvpe(mode: int, file: StrOrBytesPath, args: Arguments, env: Environment) -> int:
    """Run a program in a new process: :func:`spawnv` with *file* looked for along $PATH and the environment *env*.

    Like :func:`os.spawnvpe`.

    Args:
        mode, file, args, env: as for :func:`spawnvp` and :func:`spawnve`.

    Returns:
        int: as :func:`spawnv`.

    Raises:
        TypeError, ValueError, OSError: as :func:`spawnv`.

    Keeps :ref:`what every function promises <promises>`. Switches greenlets as :func:`spawnv`.

    Source: fork(2), execve(2).

    .. versionadded:: 0.1.0
    """
    return _spawn(mode, os.execvpe, file, args, env)


def spawnl(mode: int, file: StrOrBytesPath, *args: StrOrBytesPath) -> int:
    """Run a program in a new process: :func:`spawnv` with the arguments written out.

    Like :func:`os.spawnl`.

    Args:
        mode, file: as for :func:`spawnv`.
        args: the program's name for itself, and its arguments.

    Returns:
        int: as :func:`spawnv`.

    Raises:
        TypeError, ValueError, OSError: as :func:`spawnv`.

    Keeps :ref:`what every function promises <promises>`. Switches greenlets as :func:`spawnv`.

    Source: fork(2), execve(2).

    .. versionadded:: 0.1.0
    """
    return spawnv(mode, file, args)


def spawnle(mode: int, file: StrOrBytesPath, *args: Any) -> int:
    """Run a program in a new process: :func:`spawnv` with the arguments written out, the environment last.

    Like :func:`os.spawnle`.

    Args:
        mode, file: as for :func:`spawnv`.
        args: the program's name for itself, its arguments, and the environment, a mapping.

    Returns:
        int: as :func:`spawnv`.

    Raises:
        TypeError, ValueError, OSError: as :func:`spawnv`.

    Keeps :ref:`what every function promises <promises>`. Switches greenlets as :func:`spawnv`.

    Source: fork(2), execve(2).

    .. versionadded:: 0.1.0
    """
    return spawnve(mode, file, args[:-1], args[-1])


def spawnlp(mode: int, file: StrOrBytesPath, *args: StrOrBytesPath) -> int:
    """Run a program in a new process: :func:`spawnv` with *file* looked for along $PATH and the arguments written out.

    Like :func:`os.spawnlp`.

    Args:
        mode, file: as for :func:`spawnvp`.
        args: the program's name for itself, and its arguments.

    Returns:
        int: as :func:`spawnv`.

    Raises:
        TypeError, ValueError, OSError: as :func:`spawnv`.

    Keeps :ref:`what every function promises <promises>`. Switches greenlets as :func:`spawnv`.

    Source: fork(2), execve(2).

    .. versionadded:: 0.1.0
    """
    return spawnvp(mode, file, args)


def spawnlpe(mode: int, file: StrOrBytesPath, *args: Any) -> int:
    """Run a program in a new process: :func:`spawnvpe` with the arguments written out, the environment last.

    Like :func:`os.spawnlpe`.

    Args:
        mode, file: as for :func:`spawnvp`.
        args: the program's name for itself, its arguments, and the environment, a mapping.

    Returns:
        int: as :func:`spawnv`.

    Raises:
        TypeError, ValueError, OSError: as :func:`spawnv`.

    Keeps :ref:`what every function promises <promises>`. Switches greenlets as :func:`spawnv`.

    Source: fork(2), execve(2).

    .. versionadded:: 0.1.0
    """
    return spawnvpe(mode, file, args[:-1], args[-1])


# ---- shell commands ----------------------------------------------------------------------------------------------------------


@functools.cache
def _shells() -> tuple[Any, Any]:
    """The kinds of Popen that popen and system start.

    They are made at the first call. If the stdlib's Popen isn't as we know it, that call fails; the import of coopos doesn't.
    """
    from coopos.subprocess import Popen

    class Shell(Popen[Any]):
        """A shell. It gets the environment that C code sees, as from system(3): posix_spawn would hand on os.environ."""

        _may_posix_spawn = False

    class SystemShell(Shell):
        """A shell whose child is left to waitpid, whoever calls that."""

        def _watch(self, pid: int) -> None:
            _core.watch_new(pid)

    return Shell, SystemShell


def _is_of_the_start(ex: BaseException) -> bool:
    """Whether the code that starts programs has raised *ex*, and no signal's handler that ran there: such a one has a frame."""
    traceback = ex.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0] not in ("coopos", "subprocess"):
            return False
        traceback = traceback.tb_next
    return True


def system(command: StrOrBytesPath) -> int:
    """Run a shell command, letting other greenlets run until it has ended.

    Like :func:`os.system`. SIGINT and SIGQUIT are not ignored meanwhile: then the other greenlets, and the programs that they
    start, would ignore them too.

    Args:
        command: str, bytes or path-like, for ``/bin/sh -c``.

    Returns:
        int: the raw wait status, as of :func:`waitpid`; that of exit code 127 if there is no shell, -1 if nothing could be started.

    Raises:
        TypeError, ValueError: *command* is of another type, or has a null in it.

    Keeps :ref:`what every function promises <promises>`. Always switches greenlets. Killed or timed out, it leaves the command
    running, and watched.

    Source: system(3).

    .. versionadded:: 0.1.0
    """
    argument = os.fsencode(command)
    sys.audit("os.system", argument)
    _, shell = _shells()
    try:
        pid = shell(("sh", "-c", argument), executable="/bin/sh", close_fds=False, restore_signals=False).pid
    except OSError as ex:
        if not _is_of_the_start(ex):
            raise
        if ex.filename == "/bin/sh":
            return 127 << 8
        if ex.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
            return -1
        raise
    return _core.outright(_status_of, pid)


def _status_of(pid: int) -> int:
    try:
        return waitpid(pid, 0)[1]
    except ChildProcessError:
        return -1


class _PopenFile:
    """What popen returns: the text file of a pipe, whose close() waits for the command at the other end."""

    def __init__(self, stream: Any, shell: Any) -> None:
        self._stream = stream
        self._shell = shell

    def close(self) -> int | None:
        """Close the pipe and wait for the command. None if it succeeded, else its exit code, or minus its signal, times 256."""
        self._stream.close()
        return self._shell.wait() << 8 or None

    def __enter__(self) -> _PopenFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def popen(cmd: str, mode: Literal["r", "w"] = "r", buffering: int = -1) -> _PopenFile:
    """Start a shell command with a pipe to its standard output or input, as a text file that lets other greenlets run.

    Like :func:`os.popen`.

    Args:
        cmd: str, for ``/bin/sh -c``.
        mode: ``"r"`` to read what it writes, ``"w"`` to write what it reads.
        buffering: int, as of :func:`open`, but not 0.

    Returns:
        A text file and context manager, in the locale's encoding. Its ``close()`` waits for the command and returns None if it
        succeeded, else its exit code, or minus the signal that ended it, times 256.

    Raises:
        TypeError, ValueError, OverflowError: *cmd* is not str; *mode* or *buffering* is of another kind.
        OSError: EMFILE or ENFILE; EAGAIN or ENOMEM as fork(2).

    Its ``close()`` raises ChildProcessError if somebody else has collected the child and the kernel doesn't tell the status. While
    SIGCHLD is ignored it returns None then, as the ``close()`` of :func:`os.popen` does.

    Keeps :ref:`what every function promises <promises>`. Doesn't switch greenlets; reading, writing and closing the file do, where
    they have to wait. The child is watched. A ``close()`` that was killed or timed out may be called again.

    Source: popen(3).

    .. versionadded:: 0.1.0
    """
    if not isinstance(cmd, str):
        raise TypeError(f"invalid cmd type ({type(cmd)}, expected string)")
    if mode not in ("r", "w"):
        raise ValueError(f"invalid mode {mode!r}")
    if buffering == 0 or buffering is None:
        raise ValueError("popen() does not support unbuffered streams")
    if isinstance(buffering, int) and buffering.bit_length() > 31:
        raise OverflowError("Python int too large to convert to C int")  # before there is a pipe
    reads = mode == "r"
    start, _ = _shells()
    shell = start(cmd, shell=True, text=True, bufsize=buffering, **{"stdout" if reads else "stdin": -1})  # subprocess.PIPE
    return _PopenFile(shell.stdout if reads else shell.stdin, shell)
