"""``python -m coopos``: run a program under ``gevent.monkey.patch_all()`` and :func:`coopos.patch`, or look at this machine.

    python -m coopos [--no-io] script.py [argument ...]
    python -m coopos [--no-io] -m module [argument ...]
    python -m coopos doctor

It calls ``patch(io=True)``: os.read, open(), the standard streams and input() let other greenlets run. With --no-io it doesn't.

A directory or zip file with a ``__main__.py`` runs too. What comes after the script or module is its own. The program sees the
argv, sys.path and ``__main__`` that it would see without coopos.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def _take_working_directory() -> list[str]:
    """Take out of sys.path what the interpreter has put there for -m, so that no file beside the program is imported by us.

    In a directory that was removed it puts nothing there.
    https://github.com/python/cpython/blob/main/Modules/main.c (pymain_run_python)
    """
    if getattr(sys.flags, "safe_path", sys.flags.isolated):
        return []
    try:
        os.getcwd()
    except OSError:
        return []
    return [sys.path.pop(0)]


def _absolute(path: str) -> str:
    """As the interpreter does it: without a working directory the path stays as it is."""
    try:
        return os.path.join(os.getcwd(), path)
    except OSError:
        return path


def _patch(io: bool) -> None:
    import gevent.monkey

    gevent.monkey.patch_all()
    from coopos._patch import patch

    patch(io=io)


def _clear_main() -> dict[str, Any]:
    """The namespace that the interpreter has made for ``__main__``, with nothing in it of this file.

    The program runs there, and has it to its end: its threads, its atexit functions and what is pickled for other processes look
    for names in ``__main__`` after the program's last line.
    """
    namespace = vars(sys.modules["__main__"])
    for name in namespace.keys() - {"__name__", "__builtins__", "__annotations__"}:
        namespace[name] = None
        if not name.startswith("__") or name == "__file__":
            del namespace[name]
    return namespace


def _run_as_main(module: str, alter_argv: bool) -> None:
    """What ``python -m module`` does, and, with ``__main__`` and False, ``python directory``: the interpreter calls this, too.

    https://github.com/python/cpython/blob/main/Modules/main.c (pymain_run_module)
    """
    import runpy

    run = getattr(runpy, "_run_module_as_main", None)
    if run is None:
        raise NotImplementedError(f"the runpy of Python {sys.version.split()[0]} has no _run_module_as_main")
    _clear_main()
    run(module, alter_argv)


def _run_script(path: str) -> None:
    """What ``python script.py`` does."""
    import importlib.machinery

    kind = importlib.machinery.SourcelessFileLoader if path.endswith(".pyc") else importlib.machinery.SourceFileLoader
    loader = kind("__main__", path)
    try:
        if path.endswith(".pyc"):
            code = loader.get_code("__main__")
        else:
            code = compile(loader.get_data(path), path, "exec", dont_inherit=True)
    except OSError as ex:
        print(f"{sys.executable}: can't open file {path!r}: [Errno {ex.errno}] {ex.strerror}", file=sys.stderr)
        sys.exit(2)
    assert code is not None
    namespace = _clear_main()
    namespace.update(__file__=path, __loader__=loader)
    exec(code, namespace)


def main() -> None:
    """Do what the command line says."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    if arguments == ["doctor"]:
        from coopos import _doctor

        sys.exit(_doctor.main())
    import pkgutil

    io = arguments[0] != "--no-io"
    if not io:
        del arguments[0]
    if not arguments:
        print("python -m coopos: --no-io needs a program", file=sys.stderr)
        sys.exit(2)
    if arguments[0] == "-m":
        if len(arguments) < 2:
            print("python -m coopos: -m needs the name of a module", file=sys.stderr)
            sys.exit(2)
        working_directory = _take_working_directory()
        _patch(io)
        sys.path[:0] = working_directory
        sys.argv[:] = ["-m", *arguments[2:]]
        _run_as_main(arguments[1], True)
        return
    if arguments[0].startswith("-"):
        print(f"python -m coopos: unknown option {arguments[0]}", file=sys.stderr)
        sys.exit(2)
    _take_working_directory()
    _patch(io)
    sys.argv[:] = arguments
    path = _absolute(arguments[0])
    if pkgutil.get_importer(path) is not None:
        sys.path.insert(0, path)
        _run_as_main("__main__", False)
    else:
        if not getattr(sys.flags, "safe_path", sys.flags.isolated):
            sys.path.insert(0, os.path.dirname(os.path.realpath(path) if os.path.isabs(path) else path))
        _run_script(path)


# _clear_main() takes all names out of this copy of the file. So a second copy, an ordinary module, does the work.
if __name__ == "__main__":
    from coopos.__main__ import main as main_of_the_copy

    main_of_the_copy()
