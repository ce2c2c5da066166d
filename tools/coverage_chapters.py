"""Cython's plug-in for coverage, as the core needs it. tox.ini puts its directory into PYTHONPATH.

The compiled core names its sources relative to the root, and Cython's plug-in fails in a program that runs in another directory. It
also counts the lines of a chapter that the import runs, though they are never traced as such: a code object has one file, and that
is `_core.pyx`. Here a chapter has only the lines in its functions.
https://github.com/cython/cython/blob/3.3.1/Cython/Coverage.py
"""

import os
import re
from pathlib import Path

from coverage import FileTracer
from Cython import Coverage

ROOT = Path(__file__).resolve().parent.parent
#: A line that the import runs: of the module, a decorator, or the head of a function, of those of a class, too.
IS_OF_IMPORT = re.compile(r"\S| *@| *(cdef|cpdef|def)\b.*:$").match
IS_OF_CORE = re.compile(r".*/src/coopos/_core(\.pyx|/\w+\.pxi)$").match


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
        source = Path(self.filename).read_text().splitlines()
        return {line for line in lines if not IS_OF_IMPORT(source[line - 1])}


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
