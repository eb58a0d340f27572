"""Named float32 arrays as bytes: safetensors, checked against the names and shapes expected.

Rules: never pickle. The size is checked before the content is parsed, names and shapes before any array
is used, NaN and infinity last. One set of arrays has one encoding, so equal content has equal hashes.

Next: `wire/transfer.py`, which moves these bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from wire.errors import Malformed, ManifestMismatch, NotFinite, TooLarge

Array = npt.NDArray[np.float32]
Arrays = dict[str, Array]

_HEADER_BYTES_PER_TENSOR = 512
_HEADER_BYTES = 4096


def pack(arrays: Mapping[str, Array]) -> bytes:
    """Safetensors of float32 arrays, in an order that depends on their names only."""
    return pack_as_is({name: np.asarray(arrays[name], np.float32) for name in arrays})


def pack_as_is(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """`pack` of arrays that keep their dtypes."""
    return save({name: np.asarray(arrays[name], order="C") for name in sorted(arrays)})


def max_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The largest encoding of float32 arrays of these shapes that is still worth parsing."""
    values = sum(4 * math.prod(shape) for shape in shapes.values())
    return values + _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * len(shapes)


def unpack(content: bytes, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """The arrays in `content`, exactly those of `shapes` and in its order.

    Raises `TooLarge`, `Malformed`, `ManifestMismatch` (a name, shape or dtype differs) or `NotFinite`.
    """
    if len(content) > max_bytes(shapes):
        raise TooLarge(f"tensors of {len(content)} bytes, at most {max_bytes(shapes)} expected")
    arrays = load_exact(content, {name: (np.dtype(np.float32), shape) for name, shape in shapes.items()})
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise NotFinite(f"{name} holds NaN or infinity")
    return arrays


def load_exact(
    content: bytes, expected: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
) -> dict[str, npt.NDArray[Any]]:
    """The arrays in `content`, exactly those expected (name -> dtype, shape) and in their order; the caller
    has checked the size. Raises `Malformed` or `ManifestMismatch`.
    """
    try:
        arrays = load(content)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise Malformed(f"not safetensors: {error}") from error
    if missing := expected.keys() - arrays.keys():
        raise ManifestMismatch(f"{len(missing)} tensors are missing, first {min(missing)}")
    if extra := arrays.keys() - expected.keys():
        raise ManifestMismatch(f"{len(extra)} tensors are not of this stage, first {min(extra)}")
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != dtype:
            raise ManifestMismatch(f"{name} is {array.dtype}{array.shape}, expected {dtype}{shape}")
    return {name: arrays[name] for name in expected}


def unpack_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """`unpack` of a file; the size is checked before it is read."""
    if path.stat().st_size > max_bytes(shapes):
        raise TooLarge(f"{path.name}: {path.stat().st_size} bytes, at most {max_bytes(shapes)}")
    return unpack(path.read_bytes(), shapes)
