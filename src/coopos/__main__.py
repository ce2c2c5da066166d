"""``python -m coopos``: run a program under ``gevent.monkey.patch_all()`` and :func:`coopos.patch`, or look at this machine.

HELP below says what there is. The program sees the argv, sys.path and ``__main__`` that it would see without coopos. The commands
are imported by who asks for them.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

HELP = """\
usage: python -m coopos [--no-io] FILE [ARGUMENT ...]
       python -m coopos [--no-io] -m MODULE [ARGUMENT ...]
       python -m coopos [--no-io] -c CODE [ARGUMENT ...]
       python -m coopos doctor [--json] [--pid PID]
       python -m coopos bench [--json FILE] [--svg FILE] [--compare FILE]

Run a program as if it had called gevent.monkey.patch_all() and coopos.patch(io=True):
os.read, open(), the standard streams, input(), subprocess and multiprocessing let
other greenlets run while they wait.

the program:
  FILE           a script, or a directory or zip file that has a __main__.py
  -m MODULE      a module
  -c CODE        Python code
  ARGUMENT ...   what comes after these is the program's own
  --no-io        leave os.read, open(), the standard streams and input() alone

commands:
  doctor         say which mechanism serves what on this machine, and prove each;
                 with --pid: what a running process waits for
  bench          compare coopos, gevent and os on this machine, in about a minute
                 Each has a --help of its own. A script of that name is ./doctor.

options:
  -h, --help     print this
  -V, --version  print the versions of coopos, gevent and Python
"""
COMMANDS = ("doctor", "bench")
OPTIONS = ("--no-io", "-m", "-c", "--help", "--version")


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
        word = sys.argv[0]
        if isinstance(ex, FileNotFoundError) and word.isidentifier():
            _fail(f"{word!r} is no command either: {_right_words(word, COMMANDS)}")
        sys.exit(2)
    assert code is not None
    namespace = _clear_main()
    namespace.update(__file__=path, __loader__=loader)
    exec(code, namespace)


def _run_code(code: str) -> None:
    """What ``python -c code`` does."""
    import importlib.machinery
    import linecache
    import textwrap

    if sys.version_info >= (3, 14):
        code = textwrap.dedent(code)
    if sys.version_info >= (3, 13):
        linecache.cache["<string>"] = (len(code), None, code.splitlines(True), "<string>")  # for tracebacks
    compiled = compile(code, "<string>", "exec", dont_inherit=True)
    namespace = _clear_main()
    namespace.pop("__cached__", None)
    namespace.update(__loader__=importlib.machinery.BuiltinImporter)
    exec(compiled, namespace)


def _right_words(word: str, words: tuple[str, ...]) -> str:
    import difflib

    close = difflib.get_close_matches(word, words, 1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(words[:-1])} and {words[-1]}"


def _fail(message: str) -> NoReturn:
    print(f"python -m coopos: {message} (python -m coopos --help says more)", file=sys.stderr)
    sys.exit(2)


def _print_versions() -> None:
    import platform

    import gevent

    ours = sys.modules["coopos"].__version__
    print(f"coopos {ours}, gevent {gevent.__version__}, {platform.python_implementation()} {platform.python_version()}")


def _run_command(name: str, arguments: list[str]) -> int:
    if name == "doctor":
        from coopos import _doctor

        return _doctor.main(arguments)
    if not hasattr(os, "fork"):
        _fail("bench forks, and this system can't")
    from coopos import _bench

    return _bench.main(arguments)


def main() -> None:
    """Do what the command line says."""
    arguments = sys.argv[1:]
    if not arguments:
        print(HELP, end="", file=sys.stderr)
        sys.exit(2)
    if arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if arguments[0] in ("-V", "--version"):
        _print_versions()
        return
    if arguments[0] in COMMANDS:
        sys.exit(_run_command(arguments[0], arguments[1:]))
    import pkgutil

    io = arguments[0] != "--no-io"
    if not io:
        del arguments[0]
    if not arguments:
        _fail("--no-io needs a program")
    option = arguments[0]
    if option in ("-m", "-c"):
        if len(arguments) < 2:
            _fail("-m needs the name of a module" if option == "-m" else "-c needs code")
        working_directory = _take_working_directory()
        _patch(io)
        sys.argv[:] = [option, *arguments[2:]]
        if option == "-m":
            sys.path[:0] = working_directory
            _run_as_main(arguments[1], True)
        else:
            if not getattr(sys.flags, "safe_path", sys.flags.isolated):
                sys.path.insert(0, "")
            _run_code(arguments[1])
        return
    if option.startswith("-"):
        _fail(f"unknown option {option}: {_right_words(option, OPTIONS)}")
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
