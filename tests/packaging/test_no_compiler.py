"""Installing the sdist where there is nothing to compile it with: what is missing is said, and how to get it."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap

import pytest

SOURCE = pathlib.Path(__file__).resolve().parents[2]
DEADLINE_S = 300

#: A C compiler that doesn't find Python's headers, as where Python's development package is not installed.
WITHOUT_HEADERS = """\
    #!/bin/sh
    for argument; do
        shift
        case $argument in -I*/include/python3*) ;; *) set -- "$@" "$argument" ;; esac
    done
    exec {compiler} "$@"
"""


def run(*command, **env):
    """(exit status, all output) of a command."""
    environment = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    done = subprocess.run(
        [os.fspath(part) for part in command],
        cwd=SOURCE,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=DEADLINE_S,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a venv that has what pyproject.toml says a build needs, so that pip doesn't install it anew each time."""
    directory = tmp_path_factory.mktemp("venv")
    python = directory / "bin" / "python"
    for command in (sys.executable, "-m", "venv", directory), (python, "-m", "pip", "install", "setuptools>=80", "Cython>=3.2"):
        status, output = run(*command)
        assert not status, output
    return python


def pip_install(python, sdist, **env):
    """pip's output, which must have failed; the package's requirements are left out."""
    status, output = run(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", sdist, **env)
    assert status, output
    return output


def check_advice(output):
    """It says what to install on each system, once, and ends there: Cython was not run."""
    assert re.search(r"^ *error: (?s:.*?)\n *\n *coopos is compiled when", output, re.MULTILINE), output
    for advice in (
        "that needs a C compiler and the headers of libc and of Python",
        "apt-get install gcc libc6-dev python3-dev",
        "dnf install gcc python3-devel",
        "apk add gcc musl-dev python3-dev",
        "xcode-select --install",
        "CPython 3.10 to 3.15",
    ):
        assert output.count(advice) == 1, output
    assert "Traceback" not in output and "Cythonizing" not in output


def test_install_compiler_that_is_not_there(python, sdist):
    """CC names no program: it is named, and the advice is given."""
    output = pip_install(python, sdist, CC="/nonexistent/cc")
    assert re.search("error: .*'/nonexistent/cc'", output)
    check_advice(output)


def test_install_no_compiler_on_path(python, sdist):
    """The compiler that Python was built with is not on PATH."""
    output = pip_install(python, sdist, CC=None, PATH=os.fspath(python.parent))
    compiler = sysconfig.get_config_var("CC").split()[0]
    assert re.search(f"error: .*'{compiler}'", output)
    check_advice(output)


def test_install_without_headers_of_python(python, sdist, tmp_path):
    """The compiler's own words about Python.h are shown, and the advice is given."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    script = tmp_path / "cc"
    script.write_text(textwrap.dedent(WITHOUT_HEADERS).format(compiler=compiler), encoding="utf-8")
    script.chmod(0o755)
    output = pip_install(python, sdist, CC=os.fspath(script))
    assert "Python.h" in output.partition("coopos is compiled")[0]
    check_advice(output)
