"""Blobs on disk by their SHA-256: what was fetched, and what others may ask for.

Rules: a file under its hash is whole and synced, or it is not there. `has` reads it again, for flash cards
forget. What has come of a blob in chunks is kept in a file of its own, so a transfer goes on where a killed
process left it; of each peer there is one such file at most. Nothing here has a name from the network but
the peer's, which is a topic level.

Next: `wire/exchange.py`, which fills it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from wire.errors import HashMismatch, UserError
from wire.files import rename, replacing, sweep
from wire.manifest import BlobRef

_HERE = b"\1"
_COMING = ".coming"  # how a blob's file ends that comes in chunks


class Partial:
    """A blob that comes in chunk by chunk: its bytes, then one for each chunk that says whether it is here.

    have: the chunks that are here.
    """

    def __init__(self, path: Path, ref: BlobRef, num_chunks: int) -> None:
        self.path = path
        self._size = ref.size_bytes
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        whole = self._size + num_chunks
        if self._file.seek(0, os.SEEK_END) != whole:
            self._file.truncate(0)
            self._file.truncate(whole)
        self._file.seek(self._size)
        self.have = {index for index, mark in enumerate(self._file.read()) if mark == _HERE[0]}

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Keep a chunk's data. Raises `OSError`."""
        for place, content in ((offset, data), (self._size + index, _HERE)):  # said once it is so
            self._file.seek(place)
            self._file.write(content)
            self._file.flush()

    def finish(self) -> None:
        """Leave the blob alone in the file, synced."""
        self._file.truncate(self._size)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """What is here stays."""
        self._file.close()


class Store:
    """A folder of blobs, made if need be. Raises `UserError` where it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._receiving: set[Path] = set()
        with self._telling():
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)

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
        with self._telling(), replacing(self.path(ref)) as file:
            file.write(content)
        return ref

    def remove(self, ref: BlobRef) -> None:
        """Forget a blob, if it is there."""
        self.path(ref).unlink(missing_ok=True)

    def keep(self, refs: Collection[BlobRef]) -> None:
        """Forget everything else, but what is received right now."""
        hashes = {ref.sha256 for ref in refs}
        for path in self._folder.iterdir():
            if path.name.partition(".")[0] not in hashes and path not in self._receiving:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def receive(self, ref: BlobRef, num_chunks: int, peer: str = "") -> Iterator[Partial]:
        """A blob to fill in any order, begun anew or gone on with; in the store if the block ends well.

        num_chunks: that it comes in; another number is another transfer. Raises `HashMismatch`, and
        forgets it, where the content is another, `UserError` where the disk does not take it.
        """
        with self._telling():
            path = self._folder / f"{ref.sha256}.{num_chunks}@{peer}{_COMING}"
            for other in self._folder.glob(f"*@{peer}{_COMING}"):
                if other != path and other not in self._receiving:
                    other.unlink(missing_ok=True)
            self._receiving.add(path)
            partial = Partial(path, ref, num_chunks)
            try:
                yield partial
                partial.finish()
                if BlobRef.of_file(path) != ref:
                    path.unlink(missing_ok=True)
                    raise HashMismatch(f"the content is not {ref.sha256[:16]} of {ref.size_bytes} bytes")
                rename(path, self.path(ref))
            finally:
                partial.close()
                self._receiving.discard(path)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._folder} cannot be written: {error.strerror or error}",
                "free some space or choose another folder",
            ) from error
