"""The archives, built once for all tests that look at them.

Everything is built from copies of the files that git knows, in directories of their own, never in the work tree. `tox run -e dist`
brings what it takes; nothing of coopos is installed there, and the conftest.py above isn't read.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
EPOCH = "1750000000"
TIMEOUT_S = 300


def run(*command, cwd=ROOT, **env):
    """Run a command; what it printed on standard output. If it fails, so does the test, with all it said."""
    done = subprocess.run(
        [os.fspath(argument) for argument in command],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        pytest.fail(f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


def tracked_files():
    """What git knows, and is still there."""
    names = run("git", "ls-files", "-z").split("\0")
    return {name for name in names if name and (ROOT / name).exists()}


def copy_of_the_repository(directory):
    for name in tracked_files():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, directory / name)
    return directory


def build(kind, source, **env):
    """The sdist or wheel of a directory; the generated C stays in its build/."""
    out = source.parent / f"{kind}-of-{source.name}"
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, cwd=source, SOURCE_DATE_EPOCH=EPOCH, **env)
    [archive] = out.iterdir()
    return archive


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    return build("sdist", copy_of_the_repository(tmp_path_factory.mktemp("here")))


@pytest.fixture(scope="session")
def unpacked(sdist, tmp_path_factory):
    """The directory of an unpacked sdist."""
    directory = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    [top] = directory.iterdir()
    return top


@pytest.fixture(scope="session")
def wheel(unpacked):
    """The wheel, built from the sdist."""
    return build("wheel", unpacked)


@pytest.fixture(scope="session")
def generated(unpacked, wheel):
    """The C files that the wheel was compiled from."""
    files = sorted((unpacked / "build").glob("temp*/src/coopos/*.c"))
    assert len(files) == len(list((unpacked / "src" / "coopos").glob("*.pyx"))) > 0
    return files


def smoke(wheel, tests, directory):
    """Install a wheel into a clean environment, and try it there with the smoke part of the tests in another place."""
    python = directory / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", directory)
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", f"{wheel}[test]")
    assert "passed" in run(python, "-m", "pytest", "-m", "smoke", "-p", "no:cacheprovider", cwd=tests)
    run(python, "-m", "coopos", "doctor", cwd=directory)
    where = run(python, "-c", "import coopos; print(coopos.__file__)", cwd=tests)
    assert pathlib.Path(where.strip()).is_relative_to(directory)
