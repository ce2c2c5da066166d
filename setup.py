"""The compiled modules. Everything that can be said without code is in pyproject.toml.

Three switches in the environment, each "1" or unset:

COOPOS_DEBUG      no optimisation, debug information, assertions on
COOPOS_LINETRACE  line tracing, for coverage of the .pyx; the generated C stays beside its source, where Cython's coverage
                  plugin looks for it
COOPOS_WERROR     every warning of Cython and of the C compiler is an error
"""

import os
import sys

from setuptools import Extension, setup

DEBUG, LINETRACE, WERROR = (os.environ.get(f"COOPOS_{name}") == "1" for name in ("DEBUG", "LINETRACE", "WERROR"))

# The -O and -g of the interpreter's own build come first on the command line, and often say -g -O3: four times as slow to compile.
compile_args = ["-O0", "-g3", "-UNDEBUG"] if DEBUG else ["-O2", "-g0"]
# Only the module's init function is for others, and that one Python marks itself.
compile_args += ["-fvisibility=hidden", "-pthread"]
macros = []

directives = {
    "language_level": 3,
    # Functions that inspect.signature() can read and that bind as methods, like those of Python.
    "binding": True,
    # Docstrings reach help() as they were written; the signature is in __signature__ already.
    "embedsignature": False,
    # The only indexing in C is of arrays whose length stands beside the loop.
    "boundscheck": False,
    "wraparound": False,
    # Not claimed: gevent has no build for the free-threaded interpreter.
    "freethreading_compatible": False,
    # What Cython would add by itself and the stub would have to declare: a table of doctests, and methods that refuse to pickle.
    "autotestdict": False,
    "auto_pickle": False,
}

if LINETRACE:
    directives["linetrace"] = True
    # coverage's C tracer sees no events that go through sys.monitoring, Cython's choice from Python 3.13 on.
    macros += [("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")]

if WERROR:
    from Cython.Compiler import Options

    Options.warning_errors = True
    # Of the warnings that are off otherwise; maybe_uninitialized is left to the C compiler, which understands loops.
    directives["warn.unused"] = True
    compile_args += ["-Wall", "-Wextra", "-Werror"]
    # What the C that Cython writes always does: callbacks that ignore an argument, and tables filled from the front.
    compile_args += ["-Wno-unused-parameter", "-Wno-missing-field-initializers"]

# forkpty(3), and on Linux timer_create(2): in libc on macOS and from glibc 2.34 on, where both libraries are still there, empty.
LIBRARIES = {"darwin": [], "linux": ["util", "rt"]}

extensions = [
    Extension(
        f"coopos.{name}",
        [f"src/coopos/{name}.pyx"],
        include_dirs=["src/coopos"],  # _compat.h
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=["-pthread"],
        libraries=LIBRARIES.get(sys.platform, ["util"]),
    )
    for name in ("_parking", "_blocking", "_core", "_owned", "_semaphores", "_children", "_wait", "_forking")
]
for extension in extensions:
    # setuptools hands these to Cython when it builds the extension, and only then: asking for metadata compiles nothing.
    extension.cython_directives = directives
    extension.cython_c_in_temp = not LINETRACE

setup(
    # The compiled modules call POSIX directly; elsewhere the package is Python alone.
    ext_modules=extensions if os.name == "posix" else [],
    # Always anew: the switches above are not among what setuptools compares timestamps of.
    options={"build_ext": {"force": True}},
)
