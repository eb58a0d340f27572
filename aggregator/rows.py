"""A round's updates side by side: a row each in a scratch file that is read in blocks of coordinates.

Rules: memory holds one block, whatever the number of clients. The file has no name, so it is gone with the
process, however that ends. It takes as much disk as the updates do as float32; what an update lacks is a
hole in its row.

Next: `aggregator/robust.py`, the rules that need all updates at once.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wire.compression import Shapes
from wire.errors import LocalError, UserError
from wire.tensors import Array, Arrays

BLOCK_VALUES = 1 << 20
"""Of all clients together: 4 MB, and 8 MB more where a rule computes in float64."""

Wide = npt.NDArray[np.float64]

_ITEM = np.dtype(np.float32).itemsize


class Rows:
    """One row an update, with the tensors of `shapes` in their order. Leaving the `with` block removes it.

    folder: where the file is. Raises `UserError` where the disk does not take it.
    """

    def __init__(self, folder: Path, shapes: Shapes) -> None:
        self.shapes = shapes
        sizes = [math.prod(shape) for shape in shapes.values()]
        *starts, self._row_size = accumulate(sizes, initial=0)
        self._starts = dict(zip(shapes, starts, strict=True))
        self._senders: dict[str, list[int]] = {name: [] for name in shapes}
        self._count = 0
        self._folder = folder
        with self._telling():
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `__exit__`

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_exception: object) -> None:
        with suppress(OSError):  # a full disk does not take the rest either, and nobody wants it
            self._file.close()

    def add(self, delta: Mapping[str, Array]) -> None:
        """One more row."""
        with self._telling():
            for name, value in delta.items():
                self._file.seek(self._place(self._count, name))
                self._file.write(np.asarray(value, np.float32).tobytes())
                self._senders[name].append(self._count)
        self._count += 1

    def parts(self) -> list[Part]:
        """All that was sent, by who sent it."""
        together: dict[tuple[int, ...], list[str]] = {}
        for name, senders in self._senders.items():
            if senders:
                together.setdefault(tuple(senders), []).append(name)
        return [Part(self, senders, tuple(names)) for senders, names in together.items()]

    def blocks(self, senders: tuple[int, ...], name: str) -> Iterator[tuple[slice, Array]]:
        """Of one tensor, laid out flat: a slice of its coordinates, and float32 [senders, its width]."""
        size = math.prod(self.shapes[name])
        width = max(1, BLOCK_VALUES // len(senders))
        for first in range(0, size, width):
            block = np.empty((len(senders), min(width, size - first)), np.float32)
            with self._telling():
                for row, values in zip(senders, block, strict=True):
                    self._file.seek(self._place(row, name) + first * _ITEM)
                    if self._file.readinto(values.data) != values.nbytes:
                        raise LocalError("an update is not on disk as it was written")
            yield slice(first, first + block.shape[1]), block

    def _place(self, row: int, name: str) -> int:
        return (row * self._row_size + self._starts[name]) * _ITEM

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"updates cannot be laid out in {self._folder}: {error.strerror or error}",
                "free some space: a robust rule needs as much as all updates take as float32",
            ) from error


@dataclass(frozen=True)
class Part:
    """The tensors that the same clients sent: one vector of each. senders: their rows, ascending."""

    rows: Rows
    senders: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.senders)

    def blocks(self) -> Iterator[Array]:
        """All values, float32 [senders, width]."""
        for name in self.names:
            yield from (block for _, block in self.rows.blocks(self.senders, name))

    def reduced(self, reduce: Callable[[Array], Wide]) -> Arrays:
        """reduce: a block, float32 [senders, width], which it may change -> [width]."""
        result: Arrays = {}
        for name in self.names:
            shape = self.rows.shapes[name]
            flat = np.empty(math.prod(shape), np.float32)
            for piece, block in self.rows.blocks(self.senders, name):
                flat[piece] = reduce(block)
            result[name] = flat.reshape(shape)
        return result
