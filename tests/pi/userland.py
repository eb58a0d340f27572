"""A Debian 12 arm64 userland, that of Raspberry Pi OS Bookworm, whose programs qemu runs on x86-64.

Rules: `private_mounts` comes first. It gives this process and its children a mount namespace of their
own, so no mount is left behind however the process ends. A root is built under another name and renamed
when it is whole; a whole one is used again. The CPU is a Pi 4's Cortex-A72: with qemu's default, which can
do more, an instruction that a Pi lacks would pass. The host's /sys is kept out, as ONNX Runtime
counts cores there and crashes on those of another machine; a made-up one has four.

Next: `machine.py`, which installs the client in it.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import ssl
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from wire.errors import UserError

SUITE = "bookworm"
DEFAULT_MIRROR = "http://deb.debian.org/debian"
INCLUDE = "ca-certificates,python3,python3-venv"
QEMU_CPU = "cortex-a72"
NUM_CPUS = 4
TOOLS = {  # program -> the package that brings it
    "debootstrap": "debootstrap",
    "qemu-aarch64-static": "qemu-user-static",
    "update-binfmts": "binfmt-support",
}
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"

_INSIDE = "LAMINA_PI_PRIVATE_MOUNTS"
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_FEATURES = "fp asimd evtstrm crc32 cpuid"
_CPU = f"""\
processor\t: {{}}
BogoMIPS\t: 108.00
Features\t: {_FEATURES}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
_MODEL = "Hardware\t: BCM2835\nRevision\t: c03114\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n"


def private_mounts(program: list[str]) -> None:
    """Go on as `program`, this one's command line, in a mount namespace of its own; at once if it is one.

    Raises `UserError` where that is not possible.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise UserError("this check emulates a Pi on x86-64 Linux only", "on a Pi, run the client itself")
    if os.geteuid() != 0:
        raise UserError("chroot and mount need root", "sudo make pi-check")
    if os.environ.pop(_INSIDE, "") == str(os.getpid()):
        return
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        raise UserError(
            "this system does not let root mount anything",
            "run it on a machine, or in a container started with --privileged",
        )
    os.environ[_INSIDE] = str(os.getpid())  # which exec keeps
    os.execvp("unshare", ["unshare", "--mount", *program])


def prepare_host() -> None:
    """Have debootstrap, qemu and its registration with the kernel. Raises `UserError`."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [package for program, package in TOOLS.items() if shutil.which(program) is None]
    if missing:
        packages = " ".join(missing)
        if shutil.which("apt-get") is None:
            raise UserError(f"this needs {packages}", "install them with your package manager")
        click.echo(f"installing {packages}")
        install = f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {packages}"
        failed = subprocess.run(["sh", "-c", install], capture_output=True, text=True, check=False)
        if failed.returncode:
            raise UserError(f"cannot install {packages}", f"apt-get install {packages}")
    if not (_BINFMT / "register").exists():
        mounted = _quiet("mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT))
        if not mounted:
            raise UserError("the kernel has no binfmt_misc, which starts qemu", "modprobe binfmt_misc")
    entry = _BINFMT / "qemu-aarch64"
    if not entry.exists():
        _quiet("update-binfmts", "--enable", "qemu-aarch64")
    if not entry.exists() or "enabled" not in entry.read_text().split():
        raise UserError(
            "the kernel does not start qemu for arm64 programs", "update-binfmts --enable qemu-aarch64"
        )


def build(root: Path, mirror: str | None, log: Path) -> None:
    """A root with Python at `root`, unless it is there. mirror: None for that of the host's apt."""
    if root.exists():
        return
    partial = root.with_name(f"{root.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    mirror = mirror or _mirror()
    click.echo(f"building Debian {SUITE} for arm64 from {mirror}, which takes minutes")
    options = ["--arch=arm64", "--variant=minbase", "--foreign", f"--include={INCLUDE}"]
    logged(log, ["debootstrap", *options, SUITE, str(partial), mirror])
    with mounted(partial):
        second = ["chroot", str(partial), "/debootstrap/debootstrap", "--second-stage"]
        logged(log, second, environment())
    for archive in (partial / "var/cache/apt/archives").glob("*.deb"):
        archive.unlink()
    partial.rename(root)


def add(root: Path, packages: Sequence[str], log: Path) -> None:
    """Debian packages that the root has not yet; within `mounted`. Raises `UserError`."""
    missing = [name for name in packages if not (root / f"var/lib/dpkg/info/{name}.list").exists()]
    if missing:
        click.echo(f"installing {' '.join(missing)} on arm64")
        apt = ["chroot", str(root), "apt-get", "-qq"]
        logged(log, [*apt, "update"], environment())
        logged(log, [*apt, "install", "-y", "--no-install-recommends", *missing], environment())
        logged(log, [*apt, "clean"], environment())


@contextmanager
def mounted(root: Path) -> Iterator[None]:
    """Within the block `root` has /proc, a Pi's CPU, and the host's way into the network."""
    _copy_network(root)
    (root / "proc").mkdir(parents=True, exist_ok=True)
    cpuinfo = root.parent / "cpuinfo"
    cpuinfo.write_text("".join(_CPU.format(number) for number in range(NUM_CPUS)) + _MODEL)
    if not _quiet("mount", "-t", "proc", "proc", str(root / "proc")):
        raise UserError(f"cannot mount {root / 'proc'}", "choose another --dir, on a local disk")
    try:
        if not _quiet("mount", "--bind", str(cpuinfo), str(root / "proc/cpuinfo")):
            raise UserError("cannot mount over /proc/cpuinfo", "choose another --dir, on a local disk")
        yield
    finally:
        _quiet("umount", str(root / "sys"))  # debootstrap's, if it left one
        _quiet("umount", str(root / "proc/cpuinfo"))
        _quiet("umount", str(root / "proc"))
        _make_sys(root)


def environment() -> dict[str, str]:
    """Of a program in the userland: a plain one, and how pip and TLS get out, as on the host."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PIP_") or name.lower() in ("http_proxy", "https_proxy", "no_proxy")
    }
    return {
        **passed,
        "PIP_CERT": CERTIFICATES,
        "SSL_CERT_FILE": CERTIFICATES,
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
        "QEMU_CPU": QEMU_CPU,
    }


def logged(log: Path, command: list[str], variables: Mapping[str, str] | None = None) -> None:
    """Run a command to its end. Raises `UserError` with its last line, and where all of them are."""
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=variables,
            start_new_session=True,  # a group, which ends as a whole
        )
    try:
        code = child.wait()
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise UserError(f"{Path(command[0]).name} failed: {lines[-1]}", f"see {log}")


def _mirror() -> str:
    """The Debian mirror of the host's apt, or the default one."""
    targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    try:
        found = subprocess.run(targets, capture_output=True, text=True, check=False).stdout.split()
    except OSError:
        return DEFAULT_MIRROR
    mirrors = [url.rstrip("/") for url in found if url.startswith("http")]
    return next((url for url in mirrors if url.endswith("/debian")), DEFAULT_MIRROR)


def _copy_network(root: Path) -> None:
    """Name resolution, certificates and pip's settings, as on the host."""
    bundles = [os.environ.get(name) for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")]
    bundles.append(ssl.get_default_verify_paths().cafile)
    bundle = next((path for path in bundles if path and Path(path).is_file()), CERTIFICATES)
    copies = {
        "/etc/resolv.conf": "/etc/resolv.conf",
        "/etc/hosts": "/etc/hosts",
        "/etc/pip.conf": "/etc/pip.conf",
        str(Path("~/.config/pip/pip.conf").expanduser()): "/root/.config/pip/pip.conf",
        bundle: CERTIFICATES,
    }
    for source, target in copies.items():
        if Path(source).is_file():
            to = root / target.lstrip("/")
            to.parent.mkdir(parents=True, exist_ok=True)
            to.unlink(missing_ok=True)
            shutil.copy(source, to)


def _make_sys(root: Path) -> None:
    """A /sys that holds the CPUs and nothing else."""
    cpus = root / "sys/devices/system/cpu"
    if cpus.exists():
        return
    files = dict.fromkeys(("possible", "present", "online"), f"0-{NUM_CPUS - 1}")
    for number in range(NUM_CPUS):
        files |= {
            f"cpu{number}/topology/physical_package_id": "0",
            f"cpu{number}/topology/core_id": str(number),
            f"cpu{number}/topology/core_siblings_list": f"0-{NUM_CPUS - 1}",
            f"cpu{number}/topology/thread_siblings_list": str(number),
            f"cpu{number}/regs/identification/midr_el1": "0x00000000410fd083",
        }
    for name, value in files.items():
        path = cpus / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


def _quiet(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
