"""An array on disk, row by row: written once, whole or not at all, proved when it is opened.

Rules: a file is numpy's `.npy` with the SHA-256 of all that is before at its end, for flash cards forget.
It is written under another name, synced and renamed. Rows are read, not mapped: the pages of a map count as
the process's memory, and where the disk fails a map kills the process.

Next: `inputs/store.py`, which keeps examples so; `edge_client/cache.py`, which keeps features so.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wire.errors import UserError
from wire.files import replacing

AnyArray = npt.NDArray[Any]

_PIECE_BYTES = 1 << 20
_DIGEST_BYTES = hashlib.sha256().digest_size


class Rows:
    """An array `[N, ...]` in a file. It can be read as long as this exists, even if the file is removed."""

    def __init__(self, path: Path, handle: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.path = path
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._handle = handle
        self._first = len(_header(shape, dtype))
        weakref.finalize(self, os.close, handle)

    @classmethod
    def open(cls, path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Rows | None:
        """None where the file is not there, is another array or is damaged. Reads all of it once."""
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        rows = cls(path, handle, shape, dtype)
        return rows if rows._is_whole() else None

    def __len__(self) -> int:
        return self.shape[0]

    def read(
        self, indices: Sequence[int] | npt.NDArray[np.integer], dtype: npt.DTypeLike | None = None
    ) -> AnyArray:
        """`[B, ...]`, as `dtype` if one is given. Raises `UserError` where the disk fails."""
        row = np.empty(self.shape[1:], self.dtype)
        rows = np.empty((len(indices), *row.shape), dtype or self.dtype)
        for place, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            try:
                size = os.preadv(self._handle, [row.data], self._first + int(index) * row.nbytes)
            except OSError as error:
                raise UserError(
                    f"{self.path} cannot be read: {error.strerror}", "check the disk"
                ) from error
            if size != row.nbytes:
                raise UserError(f"{self.path} has become shorter", "check the disk, and start again")
            rows[place] = row
        return rows

    def _is_whole(self) -> bool:
        """Read in pieces: memory holds one."""
        header = _header(self.shape, self.dtype)
        left = file_bytes(self.shape, self.dtype) - _DIGEST_BYTES
        digest, place = hashlib.sha256(), 0
        try:
            if os.fstat(self._handle).st_size != left + _DIGEST_BYTES:
                return False
            while left:
                piece = os.pread(self._handle, min(_PIECE_BYTES, left), place)
                if not piece or (place == 0 and not piece.startswith(header)):
                    return False
                digest.update(piece)
                place, left = place + len(piece), left - len(piece)
            return os.pread(self._handle, _DIGEST_BYTES, place) == digest.digest()
        except OSError:
            return False


def file_bytes(shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    """The length of the file of such an array."""
    return len(_header(shape, dtype)) + math.prod(shape) * np.dtype(dtype).itemsize + _DIGEST_BYTES


def write_rows(
    path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike, pieces: Iterable[AnyArray]
) -> None:
    """Write the file of an array `[N, ...]`, given in `pieces` that follow each other, of `dtype`.

    Raises `OSError` where the disk does not take it; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        digest = hashlib.sha256()
        _add(file, digest, _header(shape, dtype))
        for piece in pieces:
            _add(file, digest, np.ascontiguousarray(piece, dtype).data)
        file.write(digest.digest())


def _add(file: Any, digest: Any, content: bytes | memoryview) -> None:
    file.write(content)
    digest.update(content)


def _header(shape: tuple[int, ...], dtype: npt.DTypeLike) -> bytes:
    file = io.BytesIO()
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()
