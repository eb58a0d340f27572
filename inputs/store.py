"""Encoded examples on disk: each cell is read once, its row from then on.

Rules: an array's file is named after the fingerprint of all that went into it, so it is never stale. It is
written example by example: memory holds one.

Next: `inputs/rows.py`, the file; `inputs/dataset.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inputs.readers import AnyArray, Reader, Unreadable
from inputs.rows import Rows, write_rows
from inputs.table import Table
from wire.errors import UserError
from wire.files import PARTIAL

_ENCODING = b"1"  # changes when a reader encodes the same cell differently
_WHOLE_BYTES = 64 << 10


@dataclass(frozen=True)
class Cells:
    """One modality's cells, those of the rows that take part, and what reads them."""

    folder: Path
    table: Table
    rows: list[int]
    column: list[str]
    reader: Reader

    def __iter__(self) -> Iterator[AnyArray]:
        """Encoded examples. Raises `UserError` that names the row."""
        for row in self.rows:
            with self._telling_where(row):
                yield self.reader.encode(self.folder, self.column[row])

    def files(self) -> Iterator[Path]:
        """Every file that the reader or a cell names."""
        yield from self.reader.files
        for row in self.rows:
            with self._telling_where(row):
                path = self.reader.source(self.folder, self.column[row])
            if path is not None:
                yield path

    @contextmanager
    def _telling_where(self, row: int) -> Iterator[None]:
        try:
            yield
        except Unreadable as error:
            raise UserError(f"{self.table.where(row)}: {error}", error.hint) from error


def fingerprint(key: bytes, modalities: list[Cells]) -> str:
    """SHA-256, 64 hex digits, over `key` and the content of every file that the cells need.

    Of a file over 64 KiB only the beginning, size and time of change are taken: a folder of large photos
    would take minutes to read. A missing file counts as such; reading it is what complains.
    """
    digest = hashlib.sha256(_ENCODING + key)
    for cells in modalities:
        for path in cells.files():
            digest.update(_content(path))
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            start, status = file.read(_WHOLE_BYTES), os.fstat(file.fileno())
    except (OSError, ValueError):  # a name with a NUL is a ValueError
        return b"missing"
    if len(start) == _WHOLE_BYTES:
        start += f"{status.st_size} {status.st_mtime_ns}".encode()
    return hashlib.sha256(start).digest()


def keep_only(cache: Path, content: str) -> None:
    """Remove what `encoded` has written for other fingerprints than `content`, or has not finished."""
    for path in cache.iterdir() if cache.is_dir() else ():
        if not path.name.startswith(content) or path.suffix == PARTIAL:
            path.unlink(missing_ok=True)


def encoded(cells: Cells, path: Path) -> Rows:
    """All examples as an array `[N, *reader.shape]` in the file `path`, made if need be."""
    shape, dtype = (len(cells.rows), *cells.reader.shape), np.dtype(cells.reader.dtype)
    rows = Rows.open(path, shape, dtype)
    if rows is None:
        try:
            write_rows(path, shape, dtype, cells)
        except OSError as error:
            hint = "free some space, or choose another cache folder"
            raise UserError(f"{path} cannot be written: {error.strerror}", hint) from error
        rows = Rows.open(path, shape, dtype)
    if rows is None:
        raise UserError(f"{path} was written and cannot be read back", "check the disk")
    return rows
