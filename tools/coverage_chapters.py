"""Cython's plug-in for coverage, as the core needs it. tox.ini has every interpreter find it.

The compiled core names its sources relative to the root, and Cython's plug-in fails in a program that runs in another directory. It
also counts lines of a chapter that are never traced: those that the import runs, since a code object has one file, and that is
`_core.pyx`. Here a chapter has only the lines in its functions.
https://github.com/cython/cython/blob/3.3.1/Cython/Coverage.py
"""

import os
import re
from pathlib import Path

from coverage import FileTracer
from Cython import Coverage

ROOT = Path(__file__).resolve().parent.parent
IS_HEAD = re.compile(r" *(cdef|cpdef|def)\b.*[:(,]$| *@").match
IS_OF_CORE = re.compile(r".*/src/coopos/_core(\.pyx|/\w+\.pxi)$").match


def lines_in_functions(source):
    """Their numbers. Of a class' methods the import runs the heads.

    The first line of a `finally` is left out: Cython traces it only if the `try` comes to its end, and not after a return.
    """
    found, is_inside, before = set(), False, ""
    for number, line in enumerate(source.splitlines(), 1):
        if line[:1] not in ("", " ", "#", ")"):
            is_inside = IS_HEAD(line) is not None
        elif is_inside and not IS_HEAD(line) and before.strip() != "finally:":
            found.add(number)
        before = line
    return found


class _Tracer(FileTracer):
    def has_dynamic_source_filename(self):
        return True

    def dynamic_source_filename(self, filename, frame):
        return os.path.join(ROOT, frame.f_code.co_filename)


class _Reporter(Coverage.CythonModuleReporter):
    def lines(self):
        lines = super().lines()
        if not self.filename.endswith(".pxi"):
            return lines
        return lines & lines_in_functions(Path(self.filename).read_text())


class Plugin(Coverage.Plugin):
    def file_tracer(self, filename):
        return _Tracer() if IS_OF_CORE(filename) else None

    def file_reporter(self, filename):
        found = super().file_reporter(filename)
        return found and _Reporter(found.c_file, found.filename, found.name, found._code, found._excluded_lines)


def coverage_init(registry, options):
    plugin = Plugin()
    registry.add_file_tracer(plugin)
    registry.add_configurer(plugin)
