"""Named arrays in a file, for the engines that hold their state in numpy.

Rules: one array at a time is in memory twice. The file is numpy's `.npz`; nothing in it is ever unpickled.

Next: `edge_client/engines/onnx.py`; `edge_client/checkpoint.py`, which says when.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from wire.tensors import Array, Arrays


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Raises `OSError`."""
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes them for `allow_pickle`


def read_arrays(path: Path) -> Arrays:
    """What `write_arrays` wrote, as arrays of their own. Raises `OSError`."""
    with np.load(path, allow_pickle=False) as saved:
        return {name: saved[name] for name in saved.files}
