"""``python -m coopos``: run a program under ``gevent.monkey.patch_all()`` and :func:`coopos.patch`, or look at this machine.

    python -m coopos script.py [argument ...]
    python -m coopos -m module [argument ...]
    python -m coopos doctor

The program sees the argv, sys.path and ``__main__`` it would see without coopos. What it runs is given to :mod:`runpy`, so that a
directory or zip file with a ``__main__.py`` runs too.
"""

from __future__ import annotations

import sys


def _patch() -> None:
    import gevent.monkey

    gevent.monkey.patch_all()
    import coopos

    coopos.patch()


def main() -> int | None:
    """Do what the command line says; the exit status, where there is one to tell."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    if arguments == ["doctor"]:
        from coopos import _doctor

        return _doctor.main()
    import os
    import runpy

    _patch()
    if arguments[0] == "-m":
        if len(arguments) < 2:
            print("python -m coopos: -m needs the name of a module", file=sys.stderr)
            return 2
        sys.argv[:] = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return None
    if arguments[0].startswith("-"):
        print(f"python -m coopos: unknown option {arguments[0]}", file=sys.stderr)
        return 2
    sys.argv[:] = arguments
    if not os.path.isdir(arguments[0]) and not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")
    return None


if __name__ == "__main__":
    sys.exit(main())
