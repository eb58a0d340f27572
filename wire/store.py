"""Blobs on disk by their SHA-256: what was fetched, and what others may ask for.

Rules: a file under its hash is whole and synced, or it is not there: it is written under another name and
renamed. `has` reads it again, for flash cards forget. Nothing in the store has a name from the network.

Next: `wire/exchange.py`, which fills it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from wire.errors import HashMismatch, UserError
from wire.manifest import BlobRef

_PARTIAL = ".partial"


class Store:
    """A folder of blobs, made if need be. Raises `UserError` where it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with self._telling():
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*{_PARTIAL}"):  # of a process that was killed
                left.unlink(missing_ok=True)

    def path(self, ref: BlobRef) -> Path:
        """Where the blob is, if it is there."""
        return self._folder / ref.sha256

    def has(self, ref: BlobRef) -> bool:
        """Whether the blob is there and undamaged; a damaged one is removed."""
        path = self.path(ref)
        if not path.is_file():
            return False
        if BlobRef.of_file(path) != ref:
            path.unlink(missing_ok=True)
            return False
        return True

    def put(self, content: bytes) -> BlobRef:
        """Keep these bytes."""
        ref = BlobRef.of(content)
        with self.receive(ref) as file:
            file.write(content)
        return ref

    def remove(self, ref: BlobRef) -> None:
        """Forget a blob, if it is there."""
        self.path(ref).unlink(missing_ok=True)

    def keep(self, refs: Collection[BlobRef]) -> None:
        """Forget everything else."""
        names = {ref.sha256 for ref in refs}
        for path in self._folder.iterdir():
            if path.name not in names and path.suffix != _PARTIAL:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all that nobody receives right now."""
        self.keep(())

    @contextlib.contextmanager
    def receive(self, ref: BlobRef) -> Iterator[BinaryIO]:
        """A file to fill with the blob, in any order; it is kept if the block ends well.

        Raises `HashMismatch` where the content is another, `UserError` where the disk does not take it.
        """
        with self._telling():
            handle, name = tempfile.mkstemp(prefix=ref.sha256[:16], suffix=_PARTIAL, dir=self._folder)
            partial = Path(name)
            try:
                with os.fdopen(handle, "w+b") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                if BlobRef.of_file(partial) != ref:
                    raise HashMismatch(f"the content is not {ref.sha256[:16]} of {ref.size_bytes} bytes")
                partial.replace(self.path(ref))
            finally:
                partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._folder} cannot be written: {error.strerror or error}",
                "free some space or choose another folder",
            ) from error
