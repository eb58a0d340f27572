"""Files and folders that only their owner can read, whole or not at all.

Rules: a file has its mode from the first instant, whatever the umask is; it is written under another name,
synced and renamed. A key is never written over.

Next: `lamina/identity/federation.py`, what is in them.
"""

from __future__ import annotations

from pathlib import Path

from wire.errors import LocalError
from wire.files import replacing, sweep

PRIVATE, PUBLIC = 0o600, 0o644
_FOLDER = 0o700


def make_folder(path: Path) -> None:
    """Make the folder, if it is not there; those above it as usual."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(_FOLDER)
    path.chmod(_FOLDER)  # of which a strange umask may have taken something


def write(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Write the file, or replace it."""
    sweep(path.parent, f"{path.name}.*")
    with replacing(path, mode) as file:
        file.write(content)


def write_key(path: Path, content: bytes) -> None:
    """Write a key's file, of which there is none yet. Raises `LocalError` if there is."""
    if path.exists():
        raise LocalError(f"{path} was about to be written over")
    write(path, content)
