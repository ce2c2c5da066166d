"""Run coopos' tests on other kernels: those that Debian's releases have, each in a virtual machine.

Each machine boots a kernel of Debian's. Its ext4 disk has Debian 13's Python, coopos and its tests. It runs ``python3 -m coopos
doctor``, then pytest: the smoke part of the suite, or what comes after ``--``. Without ``--kvm`` qemu emulates the processor. That
makes everything 10 to 30 times slower: the smoke part takes some minutes, the whole suite hours.

This needs a Debian (apt-get, dpkg-deb, debian-archive-keyring) with qemu-system-x86, busybox-static, e2fsprogs, kmod, cpio and
xz-utils; uv, which is on PyPI; and a python3.13 with headers on PATH, which builds the wheel. Root is not needed.
"""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from debian_packages import CommandFailed, Packages, check_programs, find_mirror, make_parser, run, split_arguments, try_each

ROOT = Path(__file__).resolve().parent.parent
#: The kernels of these releases: 5.10, 6.1, 6.12 and the newest.
RELEASES = ("bullseye", "bookworm", "trixie", "sid")
PYTHON = "3.13"
#: What the tests use, and what these need.
PROGRAMS = "base-files bash coreutils dash findutils grep hostname libstdc++6 mount procps sed util-linux".split()
#: What a kernel of Debian's needs before it can read the disk.
MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
DISK_MB = 1500
SMOKE_S, LONG_S = 1800, 4 * 3600

INIT_OF_MEMORY = """
    #!/bin/busybox sh
    /bin/busybox mkdir -p /proc /sys /dev /disk
    /bin/busybox mount -t proc proc /proc
    /bin/busybox mount -t devtmpfs dev /dev
    for module in {modules}; do /bin/busybox modprobe -q $module; done
    /bin/busybox mount -t ext4 /dev/vda /disk
    exec /bin/busybox switch_root /disk /init
"""
INIT_OF_DISK = """
    #!/bin/bash
    export PATH=/usr/local/bin:/usr/bin:/usr/sbin HOME=/root LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    mount -t devtmpfs dev /dev
    mkdir -p /dev/pts /dev/shm
    ln -s /proc/self/fd /dev/fd
    ln -s /proc/self/fd/0 /dev/stdin; ln -s /proc/self/fd/1 /dev/stdout; ln -s /proc/self/fd/2 /dev/stderr
    mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
    mount -t tmpfs shm /dev/shm
    /bin/busybox ifconfig lo up
    hostname kernel
    cd /coopos
    echo
    echo "@kernel $(uname -r)"
    echo "@doctor $(python3 -m coopos doctor --json | tr -d '\\n')"
    setsid python3 -m pytest -p no:cacheprovider --color=no {arguments} </dev/null 2>&1
    echo "@status $?"
    /bin/busybox poweroff -f
"""


def write(path, text, **names):
    path.write_text(textwrap.dedent(text).lstrip().format(**names))
    path.chmod(0o755)


class Disk:
    """The root file system that all kernels boot: Debian 13's Python with coopos, and this directory's tests."""

    def __init__(self, directory, mirror):
        self.directory = directory
        self.root = directory / "root"
        self.packages = Packages("trixie", directory, mirror)

    def make(self, arguments):
        packages = self.packages.fetch("install", "--yes", "--download-only", *PROGRAMS, "python3", f"python{PYTHON}")
        shutil.rmtree(self.root, ignore_errors=True)
        for package in packages:
            run("dpkg-deb", "--extract", package, self.root)
        wheels = self.directory / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        run("uv", "build", "--quiet", "--wheel", "--python", PYTHON, "--out-dir", wheels, ROOT)
        [wheel] = wheels.glob("*.whl")
        target = self.root / f"usr/local/lib/python{PYTHON}/dist-packages"
        run("uv", "pip", "install", "--quiet", "--python", PYTHON, "--target", target, "--no-build", f"{wheel}[test]")
        for name in run("git", "-C", ROOT, "ls-files", output=True).splitlines():
            copy = self.root / "coopos" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy)
        shutil.rmtree(self.root / "coopos/src")     # what is tested is what is installed
        for name in ("dev", "proc", "sys", "tmp", "root"):
            (self.root / name).mkdir(exist_ok=True)
        (self.root / "tmp").chmod(0o1777)
        (self.root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n")
        (self.root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost kernel\n::1 localhost\n")
        shutil.copy2(shutil.which("busybox"), self.root / "usr/bin/busybox")
        write(self.root / "init", INIT_OF_DISK, arguments=" ".join(arguments))

    def image(self, path):
        """A disk of it, at *path*: each machine writes to its own. All files belong to root, whoever makes it."""
        path.unlink(missing_ok=True)
        run("mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", self.root, path, f"{DISK_MB}M", output=True)


class Kernel:
    """A kernel of a release of Debian, and what it boots from."""

    def __init__(self, release, directory, mirror):
        self.release = release
        self.packages = Packages(release, directory, mirror)
        self.directory = self.packages.directory / "kernel"

    def unpack(self):
        """Unpack it; the paths of the kernel and of the file system that is in memory at first."""
        depends = self.packages.apt("apt-cache", "depends", "linux-image-amd64", output=True)
        [name] = re.findall(r"Depends: (linux-image-\S+)", depends)
        # Newer ones have the kernel and its modules in packages of their own.
        depends = self.packages.apt("apt-cache", "depends", name, output=True)
        names = [name, *re.findall(r"Depends: (linux-(?:binary|modules)-\S+)", depends)]
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        for package in self.packages.fetch("download", *names):
            run("dpkg-deb", "--extract", package, self.directory / "package")
        [kernel] = self.directory.glob("package/**/vmlinuz*")
        [modules] = (path for path in self.directory.glob("package/**/modules/*") if path.is_dir())
        return kernel, self.memory(modules)

    def memory(self, modules):
        """An archive with busybox and the modules that the disk needs."""
        root = self.directory / "memory"
        here = root / "lib/modules" / modules.name
        for part in ("drivers/virtio", "drivers/block", "fs", "lib", "crypto", "arch/x86/crypto"):
            if (modules / "kernel" / part).exists():
                shutil.copytree(modules / "kernel" / part, here / "kernel" / part)
        for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
            if (modules / name).exists():
                shutil.copy2(modules / name, here)
        packed = [str(path) for path in here.rglob("*.ko.xz")]  # busybox may not know how to unpack them
        if packed:
            run("xz", "--decompress", *packed)
        run("depmod", "-b", root, modules.name, stderr=subprocess.DEVNULL)
        (root / "bin").mkdir()
        shutil.copy2(shutil.which("busybox"), root / "bin/busybox")
        write(root / "init", INIT_OF_MEMORY, modules=" ".join(MODULES))
        path = self.directory / "memory.cpio"
        names = "\n".join(str(found.relative_to(root)) for found in sorted(root.rglob("*")))
        with open(path, "wb") as archive:
            subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), stdout=archive, cwd=root, check=True)
        return path

    def test(self, disk, log, limit_s, has_kvm):
        """Boot it on *disk*; (kernel's version, what the doctor said, pytest's exit status, its last line)."""
        kernel, memory = self.unpack()
        image = self.directory / "disk"
        disk.image(image)
        processor = ["kvm", "-cpu", "host"] if has_kvm else ["tcg", "-cpu", "max"]
        command = ["qemu-system-x86_64", "-accel", *processor, "-smp", "2", "-m", "2048", "-nic", "none"]
        command += ["-kernel", kernel, "-initrd", memory, "-append", "console=ttyS0 panic=-1 quiet", "-nographic", "-no-reboot"]
        command += ["-drive", f"file={image},format=raw,if=virtio"]
        with open(log, "wb") as output:
            try:
                subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=limit_s)
            except subprocess.TimeoutExpired:
                raise CommandFailed(f"still running after {limit_s} s: {log}") from None
            finally:
                image.unlink()
        return self.result(log)

    @staticmethod
    def result(log):
        text = log.read_text(errors="replace").replace("\r", "")
        told = dict(re.findall(r"^@(\w+) (.*)$", text, re.MULTILINE))
        if not told.keys() >= {"kernel", "doctor", "status"}:
            raise CommandFailed(f"the machine did not come to its end: {log}")
        last = [line for line in text.partition("@status")[0].splitlines() if line.strip()][-1]
        try:
            doctor = json.loads(told["doctor"])
        except ValueError:
            raise CommandFailed(f"the doctor said no JSON: {log}") from None
        return told["kernel"], doctor, int(told["status"]), last


def main(arguments):
    arguments, pytest_arguments = split_arguments(arguments, ["-m", "smoke", "-q"])
    parser = make_parser(__doc__, "3 GB")
    parser.add_argument("--only", metavar="NAMES", default=",".join(RELEASES), help="the kernels of these only: bullseye,sid")
    parser.add_argument("--kvm", action="store_true", help="use this machine's processor (/dev/kvm) and don't emulate one")
    options = parser.parse_args(arguments)
    directory, names = options.directory.resolve(), options.only.split(",")
    if unknown := set(names) - set(RELEASES):
        parser.error(f"--only: not among {', '.join(RELEASES)}: {', '.join(sorted(unknown))}")
    check_programs(parser, "qemu-system-x86_64", "busybox", "mke2fs", "depmod", "xz", "cpio")
    mirror = options.mirror or find_mirror()
    disk = Disk(directory / "disk", mirror)
    disk.make(pytest_arguments)
    limit_s = SMOKE_S if "smoke" in pytest_arguments else LONG_S

    def attempt(name):
        log = directory / f"{name}.log"
        kernel, doctor, status, last = Kernel(name, directory, mirror).test(disk, log, limit_s, options.kvm)
        (directory / f"{name}.json").write_text(json.dumps({"kernel": kernel, "doctor": doctor, "tests": last}, indent=1))
        return status, f"{kernel:20} {last}"

    return try_each(names, attempt)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
