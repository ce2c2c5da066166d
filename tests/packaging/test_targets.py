"""Machines that aren't here: which wheels the workflow will build, and that the core compiles for each of them.

zig is a C compiler with the headers and C libraries of other systems. It proves that the code compiles and, for a wheel of this
machine's kind, how old a glibc it needs; nothing is run for another system.
"""

import os
import stat
import sys
import sysconfig
import zipfile

import greenlet
import pytest

from .conftest import ROOT, build, run, smoke

#: The header of macOS that zig doesn't bring, as far as it is used.
UTIL_H = """
#include <sys/ioctl.h>
#include <termios.h>
int login_tty(int);
"""
#: Those with wheels, but for this one's own kind, which test_wheel_for_an_old_glibc compiles for.
TARGETS = ["aarch64-linux-gnu.2.28", "x86_64-linux-musl", "aarch64-linux-musl", "aarch64-macos", "x86_64-macos"]
#: The quickest way to an object file.
PLAIN = ["-O0", "-g0", "-fno-sanitize=undefined"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]


@pytest.fixture(scope="session")
def zig():
    ziglang = pytest.importorskip("ziglang", reason="ziglang is not installed: nothing is compiled for other machines")
    return f"{ziglang.__path__[0]}/zig"


def test_workflow_builds_the_wheels_that_the_list_names():
    """cibuildwheel, asked for each system that there is a runner for, names those and no others."""
    found = []
    for platform, archs in [("linux", "x86_64,aarch64"), ("macos", "x86_64,arm64"), ("windows", "AMD64,ARM64")]:
        command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", platform, "--archs", archs]
        found += run(*command).split()
    assert found == (ROOT / "tests" / "packaging" / "identifiers.txt").read_text().split()


@pytest.mark.skipif(not sysconfig.get_config_var("SOABI").endswith("x86_64-linux-gnu"), reason="the wheel is for x86-64 and glibc")
def test_wheel_for_an_old_glibc(zig, unpacked, wheel, tmp_path):
    """Linked against glibc 2.28, and found by auditwheel to need no newer one, it is installed here and works."""
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec "{zig}" cc -target x86_64-linux-gnu.2.28 "$@" {" ".join(PLAIN)}\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    source = tmp_path / "source"
    source.symlink_to(unpacked)
    built = build("wheel", source, CC=str(compiler), LDSHARED=f"{compiler} -shared")
    run(sys.executable, "-m", "auditwheel", "repair", "--plat", "manylinux_2_28_x86_64", "-w", tmp_path / "repaired", built)
    [repaired] = (tmp_path / "repaired").iterdir()
    assert repaired.name.endswith("manylinux_2_28_x86_64.whl")
    with zipfile.ZipFile(repaired) as archive:
        assert any(name.endswith(".dist-info/sboms/coopos.cdx.json") for name in archive.namelist())
    smoke(repaired, unpacked, tmp_path / "venv")


@pytest.mark.parametrize("target", TARGETS)
def test_core_compiles_for_another_machine(zig, generated, target, tmp_path):
    """Every module becomes an object file, without a warning."""
    (tmp_path / "util.h").write_text(UTIL_H)
    headers = [sysconfig.get_path("include"), os.path.dirname(greenlet.__file__), ROOT / "src" / "coopos", tmp_path]
    includes = [option for directory in headers for option in ("-I", directory)]
    for source in generated:
        run(zig, "cc", "-target", target, *PLAIN, *WARNINGS, *includes, "-c", source, "-o", tmp_path / f"{source.stem}.o")
    formats = {path.read_bytes()[:4] for path in tmp_path.glob("*.o")}
    assert formats == {b"\xcf\xfa\xed\xfe" if "macos" in target else b"\x7fELF"}
