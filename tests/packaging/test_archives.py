"""What is in the sdist and in the wheel, and that both work where they are unpacked and installed."""

import ast
import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement

from .conftest import ROOT, build, copy_of_the_repository, run, smoke, tracked_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib", reason="pyproject.toml is read with Python 3.11 or later")

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCE = (ROOT / "src" / "coopos" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', SOURCE, re.MULTILINE)[1]


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def text_in(wheel, name):
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name).decode("utf-8")


# ---- what is in them ---------------------------------------------------------------------------------------------------------


def test_sdist_has_what_git_has(sdist):
    """Nothing is missing; what is added is the metadata."""
    with tarfile.open(sdist) as archive:
        members = [member for member in archive if not member.isdir()]
    assert all(member.isfile() for member in members)
    tops, names = zip(*(member.name.split("/", 1) for member in members), strict=True)
    assert set(tops) == {f"coopos-{VERSION}"} and sdist.name == f"coopos-{VERSION}.tar.gz"
    metadata = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("src/coopos.egg-info/")}
    assert set(names) - metadata == tracked_files()


def test_wheel_has_the_package_and_no_sources_of_the_core(wheel, unpacked):
    """Each module below src/coopos: Python as it is, a .pyx compiled and with its stub; py.typed; the plug-in; and nothing else."""
    suffix = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))").strip()
    expected = {"_coopos_plugin.py"}
    source = unpacked / "src"
    for path in (source / "coopos").rglob("*"):
        if path.suffix in (".py", ".pyi", ".typed"):
            expected.add(path.relative_to(source).as_posix())
        elif path.suffix == ".pyx":
            expected |= {f"coopos/{path.stem}{suffix}", f"coopos/{path.stem}.pyi"}
    assert "coopos/py.typed" in expected
    assert {name for name in names_in(wheel) if ".dist-info/" not in name} == expected


def test_wheel_says_what_it_is(wheel):
    """The version is one, in the file's name, METADATA and the package; the rest is what pyproject.toml says."""
    metadata = email.message_from_string(text_in(wheel, f"coopos-{VERSION}.dist-info/METADATA"))
    assert wheel.name.startswith(f"coopos-{VERSION}-cp{sys.version_info.major}{sys.version_info.minor}-")
    assert f'__version__ = "{VERSION}"' in text_in(wheel, "coopos/__init__.py")
    assert (metadata["Name"], metadata["Version"], metadata["License-Expression"]) == ("coopos", VERSION, "MIT")
    assert metadata["Requires-Python"] == PYPROJECT["project"]["requires-python"]
    unconditional = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert unconditional == PYPROJECT["project"]["dependencies"]
    assert f"coopos-{VERSION}.dist-info/licenses/LICENSE" in names_in(wheel)
    assert "_coopos_plugin:on_did_patch_all" in text_in(wheel, f"coopos-{VERSION}.dist-info/entry_points.txt")


def test_stubs_in_the_wheel_are_python(wheel):
    """Each parses; stubtest compares them with the compiled modules, in the environment `typing`."""
    stubs = [name for name in names_in(wheel) if name.endswith(".pyi")]
    assert stubs
    for name in stubs:
        ast.parse(text_in(wheel, name))


def test_bill_of_materials_agrees_with_the_metadata(wheel):
    """It is valid CycloneDX, and names the package as METADATA does, and the tools pyproject.toml requires, in versions used."""
    text = text_in(wheel, f"coopos-{VERSION}.dist-info/sboms/coopos.cdx.json")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    metadata = email.message_from_string(text_in(wheel, f"coopos-{VERSION}.dist-info/METADATA"))
    package = bill["metadata"]["component"]
    assert (package["name"], package["version"]) == (metadata["Name"], metadata["Version"])
    assert package["licenses"] == [{"expression": metadata["License-Expression"]}]
    used = {component["name"].lower(): component["version"] for component in bill["components"]}
    requirements = map(Requirement, PYPROJECT["build-system"]["requires"])
    required = {each.name.lower(): each.specifier for each in requirements if each.marker is None or each.marker.evaluate()}
    assert used.keys() == required.keys()
    assert [name for name, version in used.items() if version not in required[name]] == []
    assert text_in(wheel, f"coopos-{VERSION}.dist-info/WHEEL").splitlines()[1] == f"Generator: setuptools ({used['setuptools']})"


def test_archives_pass_the_checks_of_the_index(sdist, wheel):
    """twine renders the description as PyPI would; check-wheel-contents knows what goes wrong in wheels."""
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    run(sys.executable, "-m", "check_wheel_contents", wheel)


# ---- they work, and are made again -------------------------------------------------------------------------------------------


def test_sdist_is_built_and_tried_where_it_was_unpacked(wheel, unpacked, tmp_path):
    """What is not in the sdist is not there: neither to build the wheel nor for the tests."""
    smoke(wheel, unpacked, tmp_path / "venv")


def test_archives_are_reproducible(sdist, wheel, tmp_path):
    """Built again in a directory of another name and depth, from files of other times and modes, they are the same to the byte."""
    elsewhere = copy_of_the_repository(tmp_path / "quite" / "another place")
    for path in elsewhere.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path, (1, 1_000_000_000))
    before = os.umask(0o077)
    try:
        again = [build("sdist", elsewhere), build("wheel", elsewhere)]
    finally:
        os.umask(before)
    assert [path.name for path in again] == [sdist.name, wheel.name]
    for ours, other in zip((sdist, wheel), again, strict=True):
        if ours.read_bytes() != other.read_bytes():
            pytest.fail(f"{ours.name} differs; `diffoscope {ours} {other}` would say how")


# ---- releases ----------------------------------------------------------------------------------------------------------------


def check_release(directory, *arguments):
    command = [sys.executable, directory / "tools" / "check_release.py", *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)


def test_changelog_and_version_are_right():
    """The version of the moment and CHANGELOG.md go together."""
    assert (check_release(ROOT).returncode, check_release(ROOT).stderr) == (0, "")


@pytest.mark.parametrize(
    ("version", "headings", "tag", "complaint"),
    [
        ("0.1.0.dev0", "## [Unreleased]\n\n### Added\n\n- A.\n", None, None),
        ("0.1.0", "## [0.1.0] - 2026-12-01\n\n### Added\n\n- A.\n", "v0.1.0", None),
        ("0.2.0.dev0", "## [Unreleased]\n\n## [0.1.0] - 2026-12-01\n\n### Added\n\n- A.\n", None, None),
        ("0.1.0", "## [0.1.0] - 2026-12-01\n\n### Added\n\n- A.\n", "v0.1.1", "tag"),
        ("0.1.0.dev0", "## [Unreleased]\n\n### Added\n\n- A.\n", "v0.1.0.dev0", "development"),
        ("0.1.0", "## [Unreleased]\n\n### Added\n\n- A.\n", None, "0.1.0"),
        ("0.2.0", "## [0.1.0] - 2026-12-01\n\n### Added\n\n- A.\n", None, "0.2.0"),
        ("0.1.0", "## [0.1.0]\n\n### Added\n\n- A.\n", None, "heading"),
        ("0.1.0", "## [0.1.0] - 2026-13-01\n\n### Added\n\n- A.\n", None, "date"),
        ("0.1.0", "## [0.1.0] - 2026-12-01\n\n### Novelties\n\n- A.\n", None, "Novelties"),
        ("0.1.0", "## [0.1.0] - 2026-12-01\n\n### Added\n\n", None, "nothing"),
        ("0.2.0", "## [0.2.0] - 2026-12-01\n\n### Added\n\n- A.\n\n## [0.3.0] - 2026-11-01\n\n### Added\n\n- A.\n", None, "order"),
    ],
)
def test_release_is_refused_when_something_does_not_agree(tmp_path, version, headings, tag, complaint):
    """Each kind of mistake is named; what is right passes."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "src" / "coopos").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "check_release.py", tmp_path / "tools")
    (tmp_path / "src" / "coopos" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{headings}")
    done = check_release(tmp_path, *([tag] if tag else []))
    assert (done.returncode == 0) == (complaint is None), done.stderr
    assert complaint is None or complaint in done.stderr


@pytest.mark.parametrize("group", ["sdist", "wheels"])
def test_tools_of_a_release_are_installed_by_hash(group):
    """The workflow installs nothing else, and the file has a hash and one version of everything, in the group's own version."""
    installs = re.findall(r"pip install .*", (ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    path = f".github/requirements/{group}.txt"
    assert f"pip install --require-hashes -r {path}" in installs and all("--require-hashes" in install for install in installs)
    versions = re.findall(r"^([\w.-]+)==(\S+)[^\\\n]*\\\n +--hash=sha256:", (ROOT / path).read_text(), re.MULTILINE)
    for wanted in PYPROJECT["dependency-groups"][group]:
        name, _, version = wanted.partition("==")
        assert dict(versions)[name].startswith(version), wanted
    assert len(versions) == len(re.findall(r"^\w", (ROOT / path).read_text(), re.MULTILINE))
