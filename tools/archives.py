"""The sdist and the wheel: the same files give the same bytes, and the wheel says what it was built with.

Two builds of one commit differ in who built, when and with which umask; that goes into archives as owners, times and permission
bits, and is evened out here. Times are those of SOURCE_DATE_EPOCH, if it is set; setuptools sees to it for the wheel. What the
compiler makes is the same in every directory already: Cython and setup.py put no absolute path into it.

The bill of materials is CycloneDX, where PEP 770 wants it, and without the serial number and the time that would make it another
file in every build. Used by setup.py; must not need anything but what builds the package.
"""

import gzip
import json
import os
import pathlib
import tarfile
from importlib.metadata import version

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist


class Sdist(sdist):
    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        """A .tar.gz, whatever *format* asks for: an sdist has no other (PEP 625)."""
        epoch = os.environ.get("SOURCE_DATE_EPOCH")

        def even_out(member):
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.mtime = int(epoch or member.mtime)
            return member

        name = f"{base_name}.tar.gz"
        with (
            open(name, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=int(epoch) if epoch else None) as compressed,
            tarfile.open(mode="w", fileobj=compressed, format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=even_out)  # in the order of names
        return name


class BdistWheel(bdist_wheel):
    def write_wheelfile(self, wheelfile_base, *args, **kwargs):
        """The last file of the wheel; add the bill of materials, and even out the modes before all is packed."""
        super().write_wheelfile(wheelfile_base, *args, **kwargs)
        sboms = pathlib.Path(wheelfile_base, "sboms")
        sboms.mkdir(exist_ok=True)
        text = json.dumps(bill_of_materials(self.distribution), indent=2) + "\n"
        (sboms / f"{self.distribution.get_name()}.cdx.json").write_text(text, encoding="utf-8")
        for path in pathlib.Path(self.bdist_dir).rglob("*"):
            path.chmod(0o755 if path.is_dir() or path.suffix == ".so" else 0o644)


def bill_of_materials(distribution):
    """The package and, as what it was built with but doesn't contain, the tools that pyproject.toml requires."""
    package = component(distribution.get_name(), distribution.get_version())
    package["licenses"] = [{"expression": distribution.metadata.license_expression}]
    names = ["setuptools", "cython", "greenlet"] if distribution.ext_modules else ["setuptools"]
    tools = [{**component(name, version(name)), "scope": "excluded"} for name in names]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"lifecycles": [{"phase": "build"}], "component": package},
        "components": tools,
        "dependencies": [{"ref": package["bom-ref"], "dependsOn": [tool["bom-ref"] for tool in tools]}],
    }


def component(name, version):
    url = f"pkg:pypi/{name}@{version}"
    return {"type": "library", "bom-ref": url, "name": name, "version": version, "purl": url}
