"""The compiled modules, and what the package is where there are none. All that can be said without code is in pyproject.toml.

Three switches in the environment, each "1" or unset:

COOPOS_DEBUG      no optimisation, debug information, assertions on
COOPOS_LINETRACE  line tracing, for coverage of the .pyx; the generated C stays beside its source, where Cython's coverage
                  plugin looks for it
COOPOS_WERROR     every warning of Cython and of the C compiler is an error
"""

import os
import sys
import sysconfig
import tempfile

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools"))
from archives import BdistWheel, Sdist

DEBUG, LINETRACE, WERROR = (os.environ.get(f"COOPOS_{name}") == "1" for name in ("DEBUG", "LINETRACE", "WERROR"))

# The -O and -g of the interpreter's own build come first on the command line, and often say -g -O3: four times as slow to compile.
compile_args = ["-O0", "-g3", "-UNDEBUG"] if DEBUG else ["-O2", "-g0"]
# Only the module's init function is for others, and that one Python marks itself.
compile_args += ["-fvisibility=hidden", "-pthread"]
macros = []

directives = {
    "language_level": 3,
    # Functions are builtins, as those of os: no methods of a class that they are attributes of.
    "binding": False,
    # inspect.signature() reads it from the docstring, and help() shows it without.
    "embedsignature": True,
    "embedsignature.format": "clinic",
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

try:
    import greenlet
except ImportError:  # where nothing is compiled: Windows, and whoever only asks for metadata
    greenlet_header = []
else:
    greenlet_header = [os.path.dirname(greenlet.__file__)]

core = Extension(
    "coopos._core",
    ["src/coopos/_core.pyx"],
    include_dirs=["src/coopos", *greenlet_header],
    define_macros=macros,
    extra_compile_args=compile_args,
    extra_link_args=["-pthread"],
    libraries=LIBRARIES.get(sys.platform, ["util"]),
)
# setuptools hands these to Cython when it builds the extension, and only then: asking for metadata compiles nothing.
core.cython_directives = directives
core.cython_c_in_temp = not LINETRACE

NO_COMPILER = """{}

coopos is compiled when it is installed from source, and that needs a C compiler and the headers of libc and of Python. Install
them, and try again:

    Debian, Ubuntu   apt-get install gcc libc6-dev python3-dev
    Fedora           dnf install gcc python3-devel
    Alpine           apk add gcc musl-dev python3-dev
    macOS            xcode-select --install

None of them is needed where there is a wheel, which an up-to-date pip finds by itself: for CPython 3.10 to 3.15 on x86-64 and
ARM64, on Linux (glibc 2.28, musl 1.2, or later) and macOS."""


class BuildExt(build_ext):
    def build_extensions(self):
        """Before Cython's part, which takes its time: is there anything to compile with?"""
        with tempfile.TemporaryDirectory() as directory:
            source = os.path.join(directory, "headers.c")
            with open(source, "w") as file:
                file.write("#include <Python.h>\n")
            try:
                self.compiler.compile([source], output_dir=directory, include_dirs=self.include_dirs)
            except CompileError as ex:
                raise CompileError(NO_COMPILER.format(ex)) from None
        super().build_extensions()


class BuildPyWithoutCore(build_py):
    """The modules that don't need the compiled ones, which call POSIX directly."""

    def find_package_modules(self, package, package_dir):
        kept = {
            "coopos": {"__init__", "__main__", "_doctor", "_files", "_originals", "_settings"},
            "coopos._patch": {"__init__", "_os"},
        }[package]
        return [found for found in super().find_package_modules(package, package_dir) if found[1] in kept]


# Always anew: the switches above are not among what setuptools compares timestamps of.
options = {"build_ext": {"force": True}}
archives = {"sdist": Sdist, "bdist_wheel": BdistWheel}
if os.name == "posix":
    setup(ext_modules=[core], cmdclass={**archives, "build_ext": BuildExt}, options=options)
else:
    # py3-none-win_amd64, one wheel for every Python there: were it tagged `any`, pip elsewhere would prefer it to the sdist.
    options["bdist_wheel"] = {"plat_name": sysconfig.get_platform()}
    setup(cmdclass={**archives, "build_py": BuildPyWithoutCore}, exclude_package_data={"coopos": ["*.pyi"]}, options=options)
