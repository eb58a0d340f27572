"""The registries' own clients: how each is told to fetch one archive into the current folder.

Rules: scripts of a package are off and nothing is installed; pip takes wheels only, for an archive of
source would run its setup. What an error says is kept short: the client's own code or last line.

Next: `lamina/data/registry.py`, which calls them.
"""

from __future__ import annotations

import functools
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
    why it failed, or nothing. check: what a person should do about that. whence: what tells its source.
    """

    name: str
    command: list[str]
    wanted: Callable[[str, str], list[str]]
    reason: Callable[[str], str]
    check: str
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
        check="check the network with `npm ping`",
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
        reason=functools.partial(_last_error, "ERROR: "),
        check="check the network with `pip index versions pip`",
        whence="pip config list",
    )


def apt(package: str) -> Fetcher:
    """The apt-get of this machine, if it is a Debian."""
    found = shutil.which("apt-get")
    if found is None:
        raise UserError(
            f"there is no apt-get to download {package} with",
            "prepare it on Debian 12, and copy the folder here",
        )
    return Fetcher(
        name="apt-get",
        command=[found, "download", "-qq"],
        wanted=lambda name, version: [f"{name}={version}"],
        reason=functools.partial(_last_error, "E: "),
        check="see that this is Debian 12, `apt-get update`",
        whence="apt-cache policy",
    )


FETCHERS: dict[str, Callable[[str], Fetcher]] = {"npm": npm, "pypi": pip, "debian": apt}
"""Registry -> its client, to be called with the package that is wanted. Each raises `UserError`."""


def _code(errors: str) -> str:
    found = re.search(r"code (\w+)", errors)
    return found[1] if found else ""


def _last_error(mark: str, errors: str) -> str:
    lines = [line.removeprefix(mark) for line in errors.splitlines() if line.startswith(mark)]
    return lines[-1] if lines else ""
