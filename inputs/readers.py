"""Readers: what turns a table's cell into arrays, one for each modality kind.

Rules: a reader works in two steps. `encode` is slow and runs once for an example: its result, a small
array of one shape, is kept on disk. `decode` is quick and runs for every batch: it gives the arrays that
the model is fed. In between, a reader that augments may put a `view` of an example in its place. A new kind
is one file and one line in `READERS`.

Next: `inputs/image.py`, `text.py`, `series.py` and `audio.py`; `inputs/store.py` keeps what they encode.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from wire.errors import Malformed, UserError
from wire.manifest import Modality

AnyArray = npt.NDArray[Any]
BundleFile = Callable[[str], Path]

READERS = {
    "image": "inputs.image:ImageReader",
    "text": "inputs.text:TextReader",
    "series": "inputs.series:SeriesReader",
    "audio": "inputs.audio:AudioReader",
}


class Unreadable(Exception):
    """A cell that gives no arrays; the data set makes it a `UserError` with the row. `hint`: what to do."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


class Reader(Protocol):
    """One modality's reader, made by `Class(modality, file)`.

    shape, dtype: of one encoded example. files: files of the bundle that the encoding depends on.
    augments: whether an example has other views than itself.
    """

    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    files: tuple[Path, ...]
    augments: bool

    def source(self, folder: Path, cell: str) -> Path | None:
        """The file that the cell names, if it names one. Raises `Unreadable` for one not in the folder."""
        ...

    def encode(self, folder: Path, cell: str) -> AnyArray:
        """One example as an array `[*shape]` of `dtype`. Raises `Unreadable`."""
        ...

    def view(self, encoded: AnyArray, seed: Sequence[int]) -> AnyArray:
        """An augmented example in place of one `[*shape]`: the same for the same seed, on every machine."""
        ...

    def decode(self, encoded: AnyArray) -> dict[str, AnyArray]:
        """`[B, *shape]` to the modality's inputs, each `[B, *shape]` of its `TensorSpec`."""
        ...


def make_reader(modality: Modality, file: BundleFile) -> Reader:
    """The reader of a modality. `file`: name of a bundle's file -> its path.

    Raises `UserError` for a kind that this version does not know, `Malformed` for inputs or options that
    the kind's reader cannot make.
    """
    if modality.kind not in READERS:
        raise UserError(
            f"this Lamina reads {', '.join(sorted(READERS))}, the model wants {modality.kind!r}",
            "install a newer Lamina here",
        )
    module, _, name = READERS[modality.kind].partition(":")
    return cast("Reader", getattr(importlib.import_module(module), name)(modality, file))


def in_folder(folder: Path, cell: str) -> Path:
    """The path that a cell names. Links inside the folder may lead anywhere: the user has put them there.

    Raises `Unreadable` for one that leaves the folder.
    """
    path = PurePosixPath(cell)
    if path.is_absolute() or ".." in path.parts:
        raise Unreadable(f"{cell} is outside the folder", "write paths relative to the table's folder")
    return folder / path


def check_inputs(modality: Modality, made: dict[str, tuple[tuple[int, ...], npt.DTypeLike]]) -> None:
    """Raises `Malformed` where the arrays that a reader makes are not those that the manifest declares."""
    for name, spec in modality.inputs.items():
        shape, dtype = made.get(name, ((), None))
        if shape != spec.shape or dtype is None or np.dtype(dtype) != np.dtype(spec.dtype):
            raise Malformed(f"the {modality.kind} reader makes no input {name} {spec.dtype}{spec.shape}")
