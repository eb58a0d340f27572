"""The files of a Debian package, read without `dpkg`: an `ar` archive whose `data.tar.xz` holds them.

See deb(5) and ar(5).
Next: `lamina/data/registry.py`, which fetches one.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from wire.errors import LocalError, UserError

_MAGIC = b"!<arch>\n"
_HEADER = 60  # bytes before each member: its name in the first 16, its size from the 48th on


def files_of_deb(archive: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """Path in `folder`, one such as `./usr/share/name/`, and content of every file there, in order.

    Links are left out. Raises `LocalError` where it is no package, or not all of one, or compressed
    otherwise than by xz; `UserError` if this Python does not read that.
    """
    try:
        import lzma  # some builds of Python are without
    except ImportError as error:
        raise UserError(
            f"this Python has no lzma, and {archive.name} needs it", "use one that is built with liblzma"
        ) from error
    with archive.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise LocalError(f"{archive} is no Debian package")
        while (header := file.read(_HEADER))[:16].rstrip(b" /") != b"data.tar.xz":
            size = header[48:58].strip()
            if not size.isdigit():
                raise LocalError(f"{archive} has no data.tar.xz")
            file.seek(int(size) + int(size) % 2, 1)
        try:
            with lzma.open(file) as data, tarfile.open(fileobj=data, mode="r|") as tar:
                for member in tar:
                    content = tar.extractfile(member) if member.isfile() else None
                    if content is not None and member.name.startswith(folder):
                        yield member.name.removeprefix(folder), content.read()
        except (EOFError, lzma.LZMAError, tarfile.TarError) as error:
            raise LocalError(f"{archive} is damaged: {error}") from error
