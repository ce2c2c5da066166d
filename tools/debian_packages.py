"""Packages of Debian's releases, which apt fetches with lists of its own, for the other tools here.

Nothing is installed, and root is not needed. apt checks Debian's signatures.
"""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class CommandFailed(Exception):
    """A command could not be started, took too long, or ended with another status than 0."""


def run(*command, limit=600, output=False, **kwargs):
    """Run *command* for at most *limit* seconds, then end what it has started. Return its standard output, if *output* is true."""
    shown = " ".join(map(str, command)).partition("\n")[0]
    sys.stdout.flush()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if output else None,
            text=True,
            start_new_session=True,
            **kwargs,
        )
    except OSError as ex:
        raise CommandFailed(f"{ex}: {shown}") from None
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"still running after {limit} s: {shown}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        raise CommandFailed(f"exit status {process.returncode}: {shown}")
    return out


def find_mirror():
    """The mirror of Debian that this machine's apt uses."""
    targets = ["Origin: Debian", "Label: Debian", "Identifier: Packages"]
    mirrors = run("apt-get", "indextargets", "--format", "$(REPO_URI)", *targets, output=True).split()
    if not mirrors:
        raise CommandFailed("apt knows no mirror of Debian here; --mirror gives one")
    return mirrors[0]


# ---- command lines -----------------------------------------------------------------------------------------------------------


def split_arguments(arguments, default):
    """The options, and what goes to pytest: what stands behind a --, or *default*."""
    if "--" not in arguments:
        return arguments, default
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def make_parser(description, size):
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] DIRECTORY [-- what goes to pytest ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help=f"for all that is downloaded and made: {size}")
    parser.add_argument("--mirror", metavar="URL", help="Debian's mirror, if apt has none")
    return parser


def check_programs(parser, *programs):
    for program in ("apt-get", "dpkg-deb", "uv", *programs):
        if not shutil.which(program):
            parser.error(f"there is no {program}")
    if not KEYRING.exists():
        parser.error(f"there is no {KEYRING}: apt-get install debian-archive-keyring")


def try_each(names, attempt):
    """Print what comes of each: attempt(name) returns its exit status and a line. Returns 1 if one has failed, else 0."""
    has_failed = False
    width = max(map(len, names))
    for name in names:
        started = time.monotonic()
        try:
            status, outcome = attempt(name)
        except (CommandFailed, subprocess.TimeoutExpired, ValueError) as ex:
            status, outcome = 1, f"FAILED: {ex}"
        has_failed |= status != 0
        print(f"{name:{width}} {time.monotonic() - started:5.0f} s  {outcome}", flush=True)
    return int(has_failed)


# ---- packages ----------------------------------------------------------------------------------------------------------------

APT_CONF = """
Dir::State "{here}";
Dir::State::status "{here}/status";
Dir::Cache "{here}";
Dir::Etc::sourcelist "{here}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::main "/dev/null";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
// No success with old lists where the mirror gives none.
APT::Update::Error-Mode "any";
// A mirror may stand still for weeks.
Acquire::Check-Valid-Until "false";
// The kind of checksum that --print-uris shows.
Acquire::ForceHash "sha256";
"""


class Packages:
    """The packages of a release of Debian: apt's lists of them, and those that were fetched, below *directory*."""

    def __init__(self, name, directory, mirror, architecture=None):
        """*architecture*: Debian's name of the processor, by default that of this machine's."""
        self.name = name
        self.directory = directory / name
        self.archives = self.directory / "archives"
        self.nothing = self.directory / "nothing"
        for needed in (self.directory / "lists", self.archives, self.nothing):
            (needed / "partial").mkdir(parents=True, exist_ok=True)
        (self.directory / "status").touch()  # no package is installed
        (self.directory / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {name} main\n")
        # The machine's proxies are needed, its sources and hooks are not.
        proxies = re.findall(r"^Acquire::https?\b.*\n", run("apt-config", "dump", output=True), re.MULTILINE)
        others = f'APT::Architecture "{architecture}"; APT::Architectures {{ "{architecture}"; }};' if architecture else ""
        (self.directory / "apt.conf").write_text(APT_CONF.format(here=self.directory) + "".join(proxies) + others)
        self.apt("apt-get", "update")

    def apt(self, program, *arguments, **kwargs):
        return run(program, "-qq", *arguments, env={**os.environ, "APT_CONFIG": str(self.directory / "apt.conf")}, **kwargs)

    def fetch(self, *command):
        """Have apt-get's *command* download its packages; {path: SHA256}, as the signed index has them."""
        # apt-get names no package that it has. So it is shown an empty cache.
        listed = self.apt("apt-get", "-o", f"Dir::Cache::archives={self.nothing}", "--print-uris", *command, output=True)
        digests = {
            self.archives / name: digest
            for name, digest in re.findall(r"^'\S+' (\S+\.deb) \d+ SHA256:(\w+)$", listed, re.MULTILINE)
        }
        is_complete = True
        for package, digest in digests.items():
            if not package.exists():
                is_complete = False
            # apt looks only at the size of what is there.
            elif hashlib.sha256(package.read_bytes()).hexdigest() != digest:
                package.unlink()
                is_complete = False
        if not is_complete:
            self.apt("apt-get", *command, cwd=self.archives, limit=300)
        return digests
