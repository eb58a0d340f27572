"""Series: a cell is a path in the folder, an example float16 `[length, channels]`, NaN where it is shorter.

Rules: a file is `.npy` (numbers, `[T, C]`; nothing pickled is read) or `.csv` (a row a step, a column a
channel; a first row that is no numbers names the columns). What is longer than `length` is cut, what is
shorter padded with zeros after normalising. All is measured at one rate, which nothing here knows.

Options: `length`, steps of an example; `channels`; `mean` and `std`, a number or one a channel; `patch`,
steps of a token, which only the mask needs.
Next: `inputs/audio.py`, which fills the same kind of array.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from inputs.readers import AnyArray, BundleFile, Unreadable, check_inputs, in_folder
from wire.errors import Malformed
from wire.manifest import Modality

MAX_OPTION = 1_000_000  # of steps, channels, hertz: a manifest must not ask for any amount of memory
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Frames:
    """What the readers of anything that lasts have in common (`inputs.readers.Reader` but for `encode`).

    The first input, float32 `[B, length, channels]`: values, 0 where the example is shorter. The second, if
    declared, float32 `[B, length / patch]`: 1 at a token that has a step in it, 0 elsewhere.
    """

    augments = False

    def __init__(self, modality: Modality, channels: str) -> None:
        """`channels`: the option that says how many."""
        length, self.channels, patch = (
            whole(modality, option, default)
            for option, default in (("length", None), (channels, None), ("patch", 1))
        )
        if length % patch:
            raise Malformed(f"option patch of {modality.kind} is {patch}, the length {length}")
        self._names = tuple(modality.inputs)
        self._patch = patch
        self._mean, self._std = (
            _per_channel(modality, option, self.channels, default)
            for option, default in (("mean", 0.0), ("std", 1.0))
        )
        if not self._std.all():
            raise Malformed(f"option std of {modality.kind} is zero")
        self.shape: tuple[int, ...] = (length, self.channels)
        self.dtype: npt.DTypeLike = np.float16
        self.files: tuple[Path, ...] = ()
        made = zip(self._names, (self.shape, (length // patch,)), strict=False)
        check_inputs(modality, {name: (shape, np.float32) for name, shape in made})

    def source(self, folder: Path, cell: str) -> Path:
        """The file's path."""
        return in_folder(folder, cell)

    def view(self, encoded: AnyArray, _seed: Sequence[int]) -> AnyArray:
        """There are no other views."""
        return encoded

    def decode(self, encoded: AnyArray) -> dict[str, AnyArray]:
        """Values and mask."""
        absent = np.isnan(encoded[:, :, 0])
        values: AnyArray = np.where(absent[:, :, None], 0, encoded).astype(np.float32)
        present = ~absent.reshape(len(encoded), -1, self._patch).all(axis=2)
        tokens: AnyArray = np.asarray(present, np.float32)
        return dict(zip(self._names, (values, tokens), strict=False))

    def filled(self, cell: str, steps: AnyArray) -> AnyArray:
        """`[T, channels]`, cut, normalised and padded. Raises `Unreadable` for what is no finite number."""
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of that is not finite
            exact = np.asarray(steps[: self.shape[0]], np.float64)
            normal = ((exact - self._mean) / self._std).astype(np.float16)
        if not np.isfinite(normal).all():
            step = int(np.flatnonzero(~np.isfinite(normal).all(axis=1))[0])
            raise Unreadable(
                f"{cell} has no usable number at step {step + 1}", "mend the file, or remove the row"
            )
        encoded = np.full(self.shape, np.nan, np.float16)
        encoded[: len(normal)] = normal
        return encoded


class SeriesReader(Frames):
    """Reads `.npy` and `.csv` files."""

    def __init__(self, modality: Modality, _file: BundleFile) -> None:
        super().__init__(modality, "channels")

    def encode(self, folder: Path, cell: str) -> AnyArray:
        """Raises `Unreadable`: missing, damaged, of other channels, empty, or with what is no number."""
        path = self.source(folder, cell)
        try:
            steps = (_read_csv if path.suffix.lower() == ".csv" else _read_npy)(path, self.shape[0])
        except FileNotFoundError:
            raise Unreadable(f"{cell} is missing", "copy it there, or remove the row") from None
        except Exception as error:  # of a damaged header numpy raises anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Unreadable(
                f"{cell} cannot be read: {reason}", "write numbers as .npy or .csv, or remove the row"
            ) from error
        if not len(steps):
            raise Unreadable(f"{cell} is empty", "replace it, or remove the row")
        if steps.shape[1] != self.channels:
            raise Unreadable(
                f"{cell} has {steps.shape[1]} channels, the model {self.channels}",
                f"write a row a step and {self.channels} columns",
            )
        return self.filled(cell, steps)


def whole(modality: Modality, option: str, default: int | None = None) -> int:
    """An option that is a number of things. Raises `Malformed`."""
    value = modality.options.get(option, default)
    if not isinstance(value, int) or not 1 <= value <= MAX_OPTION:
        raise Malformed(f"option {option} of {modality.kind} is {value!r}, not from 1 to {MAX_OPTION}")
    return value


def _per_channel(modality: Modality, option: str, channels: int, default: float) -> npt.NDArray[np.float64]:
    value = modality.options.get(option, default)
    try:
        numbers = np.broadcast_to(np.asarray(value, np.float64), (channels,))
    except ValueError as error:
        raise Malformed(f"option {option} of {modality.kind} is {value!r}") from error
    if not np.isfinite(numbers).all():
        raise Malformed(f"option {option} of {modality.kind} is {value!r}")
    return numbers


def _read_npy(path: Path, length: int) -> AnyArray:
    """The first `length` steps, so that memory does not hold a long recording, nor what a header claims."""
    with path.open("rb") as file:
        header = _HEADERS.get(np.lib.format.read_magic(file))
        if header is None:
            raise ValueError("it is of another version of the format")
        shape, by_column, dtype = header(file)
        if dtype.kind not in "iuf" or len(shape) != 2 or min(shape) < 0:
            raise ValueError(f"it holds {dtype} of the shape {shape}")
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        if os.fstat(file.fileno()).st_size - file.tell() < num_bytes:
            raise ValueError("it is cut short")
        rows = shape[0] if by_column else min(length, shape[0])
        content: AnyArray = np.frombuffer(file.read(rows * shape[1] * dtype.itemsize), dtype)
        return content.reshape(shape[::-1]).T if by_column else content.reshape(rows, shape[1])


def _read_csv(path: Path, length: int) -> npt.NDArray[np.float64]:
    """The first `length` rows."""
    rows: list[list[float]] = []
    named = False
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        for cells in reader:
            if not cells:
                continue
            try:
                rows.append([float(cell) for cell in cells])
            except ValueError:
                if rows or named:
                    raise ValueError(f"line {reader.line_num} is not numbers") from None
                named = True  # the columns
                continue
            if len(rows[-1]) != len(rows[0]):
                raise ValueError(f"line {reader.line_num} has {len(rows[-1])} cells, not {len(rows[0])}")
            if len(rows) == length:
                break
    return np.array(rows, np.float64).reshape(len(rows), len(rows[0]) if rows else 0)
