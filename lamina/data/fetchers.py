"""The registries' own clients: how npm and pip are told to fetch one archive into the current folder.

Rules: scripts of a package are off and nothing is installed; pip takes wheels only, for an archive of
source would run its setup. What an error says is kept short: the client's own code or last line.

Next: `lamina/data/registry.py`, which calls them.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass

from wire.errors import UserError


@dataclass(frozen=True)
class Fetcher:
    """A registry's client, found on this machine.

    command: before the name. wanted: name, version -> the words for a package. reason: standard error ->
    why it failed, or nothing. try_it, whence: what a person types to look for the fault.
    """

    name: str
    command: list[str]
    wanted: Callable[[str, str], list[str]]
    reason: Callable[[str], str]
    try_it: str
    whence: str


def npm(package: str) -> Fetcher:
    """The npm on PATH, else the one that the `data` extra installs beside this Python."""
    found = shutil.which("npm") or shutil.which("npm", path=sysconfig.get_path("scripts"))
    if found is None:
        raise UserError(
            f"there is no npm to download {package} with",
            'pip install "lamina[data]", which brings one, or install Node.js',
        )
    options = ["--ignore-scripts", "--no-update-notifier"]
    options += ["--fetch-retries=2", "--fetch-retry-mintimeout=500", "--fetch-retry-maxtimeout=4000"]
    return Fetcher(
        name="npm",
        command=[found, "pack"],
        wanted=lambda name, version: [f"{name}@{version}", *options],
        reason=_code,
        try_it="npm ping",
        whence="npm config get registry",
    )


def pip(package: str) -> Fetcher:
    """This Python's pip, else the one on PATH."""
    found = shutil.which("pip")
    try:
        importlib.metadata.distribution("pip")
        command = [sys.executable, "-m", "pip"]
    except importlib.metadata.PackageNotFoundError as error:
        if found is None:
            raise UserError(
                f"there is no pip to download {package} with", "python -m ensurepip, or install pip"
            ) from error
        command = [found]
    # What the package would need to run is of no matter: only its data are read.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    options += ["--disable-pip-version-check", "--no-input", "--retries=2"]
    return Fetcher(
        name="pip",
        command=[*command, "download"],
        wanted=lambda name, version: [f"{name}=={version}", *options],
        reason=_last_error,
        try_it="pip index versions pip",
        whence="pip config list",
    )


FETCHERS: dict[str, Callable[[str], Fetcher]] = {"npm": npm, "pypi": pip}
"""Registry -> its client, to be called with the package that is wanted. Each raises `UserError`."""


def _code(errors: str) -> str:
    found = re.search(r"code (\w+)", errors)
    return found[1] if found else ""


def _last_error(errors: str) -> str:
    lines = [line.removeprefix("ERROR: ") for line in errors.splitlines() if line.startswith("ERROR: ")]
    return lines[-1] if lines else ""
