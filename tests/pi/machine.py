"""The two machines of the check, this one and the emulated Pi, and the client that is installed on them.

Rules: a machine is told by what starts a program on it and where its files are; all else is the same. The
client comes from the built wheel with the dependencies of its extra, as a person would install it. What is
installed is used again until the wheel changes.

Next: `runs.py`, the runs in which these clients train.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import userland

from wire.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
FORBIDDEN = ("torch", "onnx")

_FACTS = """
import importlib.metadata, importlib.util, json, os, platform, struct, sys
names = NAMES
with open("/proc/self/auxv", "rb") as file:
    pairs = dict(struct.iter_unpack("@QQ", file.read()))
print(json.dumps({
    "machine": platform.machine(),
    "python": platform.python_version(),
    "libc": " ".join(platform.libc_ver()),
    "cpus": os.cpu_count(),
    "hwcap": pairs[16],
    "found": [name for name in names if importlib.util.find_spec(name) is not None],
    "packages": {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()},
}))
"""


@dataclass(frozen=True)
class Machine:
    """Where a client runs. root: where its `/` is on this machine. starter: what starts a program there.

    venv, home: folders of the client's program and its files, as seen there. python: what makes the venv.
    """

    name: str
    root: Path
    starter: tuple[str, ...]
    variables: Mapping[str, str]
    python: str
    venv: str
    home: str

    def here(self, path: str) -> Path:
        """A path of the machine, as seen from this one."""
        return self.root / path.lstrip("/")

    def command(self, program: str, *arguments: str) -> list[str]:
        """What to run here, so that a program of the venv runs there."""
        return [*self.starter, f"{self.venv}/bin/{program}", *arguments]

    def output(self, program: str, *arguments: str) -> str:
        """Run a program of the venv to its end; what it printed. Raises `UserError`."""
        command = self.command(program, *arguments)
        result = subprocess.run(
            command, capture_output=True, text=True, env=self.variables, cwd="/", check=False
        )
        if result.returncode:
            last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
            raise UserError(f"{program} on {self.name}: {last}", "run the check with a new --dir")
        return result.stdout


def this_machine(folder: Path, extra: str) -> Machine:
    """The one that the check runs on, with venvs of its own in `folder`, one for each extra."""
    return Machine(
        name="x86-64",
        root=Path("/"),
        starter=(),
        variables=dict(os.environ),
        python=sys.executable,
        venv=str(folder / f"venv-{extra}"),
        home=str(folder / "home"),
    )


def emulated_pi(root: Path, extra: str) -> Machine:
    """The userland at `root`."""
    return Machine(
        name="arm64",
        root=root,
        starter=("chroot", str(root)),
        variables=userland.environment(),
        python="/usr/bin/python3",
        venv=f"/opt/lamina-{extra}",
        home="/srv/lamina",
    )


def build_wheel(folder: Path, log: Path) -> Path:
    """Lamina's wheel as it is in the working tree."""
    shutil.rmtree(folder, ignore_errors=True)
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(REPOSITORY)]
    userland.logged(log, build, os.environ)
    return next(folder.glob("*.whl"))


def install(machine: Machine, wheel: Path, extra: str, log: Path) -> None:
    """A venv with the wheel and what its extra needs, unless this very one is there."""
    wanted = f"{hashlib.sha256(wheel.read_bytes()).hexdigest()} {extra}\n"
    note = machine.here(machine.venv) / "installed"
    before = note.read_text() if note.exists() else ""
    if before == wanted:
        return
    click.echo(f"installing lamina[{extra}] on {machine.name}")
    note.unlink(missing_ok=True)
    copy = f"{machine.home}/{wheel.name}"
    machine.here(machine.home).mkdir(parents=True, exist_ok=True)
    shutil.copy(wheel, machine.here(copy))
    if not before:
        venv = [*machine.starter, machine.python, "-m", "venv", "--clear", machine.venv]
        userland.logged(log, venv, machine.variables)
    pip = machine.command("python", "-m", "pip", "install", "--quiet")
    if before:  # pip takes a wheel of the same version for the same
        userland.logged(log, [*pip, "--force-reinstall", "--no-deps", copy], machine.variables)
    userland.logged(log, [*pip, f"{copy}[{extra}]"], machine.variables)
    note.write_text(wanted)


def facts(machine: Machine) -> dict[str, Any]:
    """What the client's Python says of the machine. Raises `UserError` if it could import torch or onnx."""
    code = _FACTS.replace("NAMES", repr(FORBIDDEN))
    told: dict[str, Any] = json.loads(machine.output("python", "-c", code))
    if told["found"]:
        raise UserError(
            f"the client on {machine.name} has {' and '.join(told['found'])}", "see its dependencies"
        )
    told["venv_bytes"] = _size(machine.here(machine.venv))
    return told


def _size(folder: Path) -> int:
    """On disk, as du counts it."""
    du = subprocess.run(["du", "-sk", str(folder)], capture_output=True, text=True, check=True)
    return int(du.stdout.split()[0]) * 1024
