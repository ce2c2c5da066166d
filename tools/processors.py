"""Run coopos' tests on other processors, which qemu-user emulates: arm64, and s390x, whose numbers are big-endian.

apt fetches Debian's Python for that processor into DIRECTORY, and it is unpacked there. zig, a C compiler that is on PyPI, makes
coopos' wheel with that Python's headers. gevent and greenlet are PyPI's wheels for that processor. Then Python runs under qemu: the
doctor, and pytest: the smoke part of the suite with the tests of children and descriptors, or what comes after ``--``.

Python alone is emulated. The kernel is this machine's, but qemu hands it only the system calls that it knows; what it doesn't know
fails with ENOSYS, and coopos does without. The other programs that the tests start are this machine's, too. So no chroot is
needed, and no binfmt_misc.

This needs a Debian (apt-get, dpkg-deb, debian-archive-keyring) with qemu-user-static, and a Python 3.13 with pip, ziglang and what
builds coopos: setuptools, Cython, greenlet. Root is not needed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from debian_packages import Packages, check_programs, find_mirror, make_parser, run, split_arguments, try_each

ROOT = Path(__file__).resolve().parent.parent
#: {Debian's name: (that of GNU and of qemu, the release of Debian)}. Not every mirror has all of Debian 13 for s390x.
PROCESSORS = {"arm64": ("aarch64", "trixie"), "s390x": ("s390x", "sid")}
PYTHON = "3.13"
#: PyPI has no wheel of some of these for every processor, and Debian has.
DEBIAN = ["base-files", "libstdc++6", "python3", f"python{PYTHON}", "python3-psutil", "python3-zope.interface"]
PYPI = ["gevent", "greenlet", "zope.event", "pytest", "iniconfig", "packaging", "pluggy", "pygments", "pytest-xdist", "execnet"]
PYPI += ["hypothesis", "sortedcontainers"]
GLIBC = "2.28"
TESTS = ["-m", "smoke", "tests"]
MORE_TESTS = ["tests/children/test_waitpid.py", "tests/children/test_wait.py", "tests/reading/test_descriptors.py"]
LIMIT_S = 3600

PYTHON_SCRIPT = """
    #!/bin/sh
    export PYTHONHOME={root}/usr
    exec qemu-{machine}-static -L {root} -0 "$0" {root}/usr/bin/python{python} "$@"
"""
COMPILER_SCRIPT = """
    #!/bin/sh
    exec {python} -m ziglang cc -target {machine}-linux-gnu.{glibc} -fno-sanitize=undefined -I{root}/usr/include/python{version} \\
        -I{root}/usr/include "$@"
"""


def write_program(path, text, **names):
    path.write_text(textwrap.dedent(text).lstrip().format(**names))
    path.chmod(0o755)
    return path


class Processor:
    """Debian's Python for one processor, and coopos for it, below a directory."""

    def __init__(self, name, directory, mirror):
        self.machine, release = PROCESSORS[name]
        self.directory = directory / name
        self.root = self.directory / "root"
        self.site = self.root / f"usr/local/lib/python{PYTHON}/dist-packages"
        self.packages = Packages(release, self.directory, mirror, name)

    def make(self):
        """Unpack the packages, build the wheel, and install it with what the tests need."""
        packages = self.packages.fetch("install", "--yes", "--download-only", *DEBIAN)
        packages |= self.packages.fetch("download", f"libpython{PYTHON}-dev")
        shutil.rmtree(self.root, ignore_errors=True)
        for package in packages:
            run("dpkg-deb", "--extract", package, self.root)
        wheel = self.build()
        tags = [f"--platform=manylinux_{version}_{self.machine}" for version in ("2_28", "2_24", "2_17")]
        # pip, since uv does not know all of these processors.
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--target", self.site, *tags,
            f"--platform=linux_{self.machine}", f"--python-version={PYTHON}", wheel, *PYPI)
        self.python = write_program(self.directory / "python3", PYTHON_SCRIPT, root=self.root, machine=self.machine, python=PYTHON)

    def build(self):
        wheels = self.directory / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        compiler = write_program(
            self.directory / "cc", COMPILER_SCRIPT, python=sys.executable, machine=self.machine, glibc=GLIBC, root=self.root,
            version=PYTHON)
        environment = {
            **os.environ,
            "CC": str(compiler),
            "LDSHARED": f"{compiler} -shared",
            "CFLAGS": "-O2 -g0",
            "SETUPTOOLS_EXT_SUFFIX": f".cpython-{PYTHON.replace('.', '')}-{self.machine}-linux-gnu.so",
            "_PYTHON_HOST_PLATFORM": f"linux-{self.machine}",  # https://github.com/python/cpython/blob/3.13/Lib/sysconfig/__init__.py
        }
        # Without an environment of its own: an installer would put the other processor's greenlet into that.
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, ROOT,
            env=environment)
        [wheel] = wheels.glob("*.whl")
        return wheel

    def test(self, arguments, log):
        """(what the doctor said, pytest's exit status, its last line)"""
        copy = self.directory / "coopos"
        shutil.rmtree(copy, ignore_errors=True)
        for name in run("git", "-C", ROOT, "ls-files", output=True).splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        shutil.rmtree(copy / "src")  # what is tested is what is installed
        # It fails where emulation is too slow for its time limits; what it says is kept, and the tests decide.
        said = subprocess.run(
            [self.python, "-m", "coopos", "doctor", "--json"], cwd=copy, stdin=subprocess.DEVNULL, capture_output=True, timeout=900)
        doctor = json.loads(said.stdout)
        command = [self.python, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-q", *arguments]
        with open(log, "w") as output:
            status = subprocess.run(
                ["timeout", "--kill-after=10", str(LIMIT_S), *command], cwd=copy, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT).returncode
        lines = [line for line in log.read_text(errors="replace").splitlines() if re.search(r"\d (passed|failed|error)", line)]
        return doctor, status, lines[-1] if lines else f"no result: {log}"


def main(arguments):
    arguments, pytest_arguments = split_arguments(arguments, None)
    parser = make_parser(__doc__, "600 MB")
    parser.add_argument("--only", metavar="NAMES", default=",".join(PROCESSORS), help="these processors only: arm64")
    options = parser.parse_args(arguments)
    directory, names = options.directory.resolve(), options.only.split(",")
    if unknown := set(names) - set(PROCESSORS):
        parser.error(f"--only: not among {', '.join(PROCESSORS)}: {', '.join(sorted(unknown))}")
    if sys.version_info[:2] != tuple(map(int, PYTHON.split("."))):
        parser.error(f"this is not Python {PYTHON}")
    check_programs(parser, "timeout", *(f"qemu-{PROCESSORS[name][0]}-static" for name in names))
    mirror = options.mirror or find_mirror()

    def attempt(name):
        processor = Processor(name, directory, mirror)
        processor.make()
        log = directory / f"{name}.log"
        doctor, status, last = processor.test(pytest_arguments or [*TESTS, *MORE_TESTS], log)
        (directory / f"{name}.json").write_text(json.dumps({"doctor": doctor, "tests": last}, indent=1))
        unwell = [f"{check['name']}: {check['mechanism']}" for check in doctor["checks"] if check["state"] == "failed"]
        return status, f"{last}; the doctor: {'; '.join(unwell) or 'all works'}"

    return try_each(names, attempt)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
