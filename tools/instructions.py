"""Count the instructions of the hot paths by a valgrind that knows pidfds: ``instructions.py DIRECTORY [ARGUMENTS]``.

Debian 12's valgrind (3.19) refuses pidfd_open(2), so coopos would watch children by threads. Where the valgrind on PATH is as old,
that of Debian 13 is fetched into DIRECTORY, as debian_pythons.py fetches Pythons, and runs from there. ARGUMENTS are those of
``python -m benchmarks --instructions``.
"""

import os
import re
import shutil
import sys
from pathlib import Path

from debian_packages import CommandFailed, Packages, find_mirror, run

ROOT = Path(__file__).resolve().parent.parent
#: The first that knows pidfd_open: https://valgrind.org/docs/manual/dist.news.html
OLDEST = (3, 22)


def environment(directory):
    """What tells `benchmarks` the valgrind to use."""
    found = shutil.which("valgrind")
    if found:
        version = re.search(r"(\d+)\.(\d+)", run(found, "--version", output=True))
        if version and tuple(map(int, version.groups())) >= OLDEST:
            return {"VALGRIND": found}
    release = Packages("trixie", directory.resolve(), find_mirror())
    [package] = release.fetch("download", "valgrind")
    root = release.directory / "root"
    run("dpkg-deb", "--extract", package, root)
    return {"VALGRIND": str(root / "usr/bin/valgrind"), "VALGRIND_LIB": str(root / "usr/libexec/valgrind")}


def main(directory, *arguments):
    command = [sys.executable, "-m", "benchmarks", "--instructions", *arguments]
    try:
        run(*command, cwd=ROOT, env={**os.environ, **environment(Path(directory))}, limit=1500)
    except CommandFailed as ex:
        print(ex, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
