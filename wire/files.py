"""Files that are there as a whole or not at all, also after a loss of power.

Next: `wire/store.py`, blobs; `edge_client/pending.py` and `edge_client/checkpoint.py`, a client's progress.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""How a file ends that is not whole yet; whoever owns the folder calls `sweep`."""


@contextmanager
def replacing(path: Path, mode: int = 0o600) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends, and is gone if the block raises.

    mode: the file's, whatever the umask is; it is its owner's alone before. Raises `OSError` where the disk
    does not take it; what was there before stays then.
    """
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=PARTIAL, dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "w+b") as file:
            os.fchmod(handle, mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what killed processes have left unfinished. name: of the files to be, may be a pattern."""
    for left in folder.glob(f"{name}{PARTIAL}"):
        left.unlink(missing_ok=True)


def rename(partial: Path, path: Path) -> None:
    """Give a file that is whole and synced its name; the name, too, has to survive."""
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Return once a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
