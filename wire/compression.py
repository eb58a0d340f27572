"""Changes of parameters in few bytes: fewer bits a value, then zstd.

Rules:
- A channel is a row along the first axis, or the whole of a tensor with fewer than two axes. Each has a
  float32 scale for its largest magnitude, so one that moves little keeps its digits beside others.
- int8 rounds up or down at random, in proportion to what is left over: the expected value is the value
  itself, and the mean of many updates is unbiased (QSGD, Alistarh et al., arXiv 1610.02132). The seed makes
  it the same each time. float16 rounds to nearest.
- A channel with NaN or infinity travels as NaN, for the receiver to refuse as it does any other.
- What comes in is untrusted: its size is checked before it is unpacked, names and shapes before any use.

What is rounded is safetensors, for each tensor `name` (the values) and `name.scale`: the same bytes on any
machine. A compressed change is a zstd frame of it, whose bytes depend on zstd's version.
Next: `wire/tensors.py`, uncompressed arrays; `aggregator/state.py` and `edge_client/parameters.py`, which
send changes down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from wire.errors import Malformed, NotFinite, TooLarge
from wire.messages import Compression
from wire.tensors import Array, Arrays, load_exact, max_bytes, pack, pack_as_is, unpack

Shapes = Mapping[str, tuple[int, ...]]
Seed = int | list[int]

_SCALE = ".scale"
_LARGEST: dict[Compression, int] = {"float16": 1, "int8": 127}  # what a channel's largest magnitude becomes
_DTYPES: dict[Compression, np.dtype[Any]] = {"float16": np.dtype(np.float16), "int8": np.dtype(np.int8)}


def round_off(arrays: Mapping[str, Array], compression: Compression, seed: Seed | None = None) -> bytes:
    """float32 arrays as bytes. seed: of int8's rounding; None: to nearest, for what is no mean of many."""
    if compression == "none":
        return pack(arrays)
    generator = None if seed is None else np.random.default_rng(seed)
    packed: dict[str, npt.NDArray[Any]] = {}
    for name in sorted(arrays):
        rows = _rows(np.asarray(arrays[name], np.float32))
        scale = np.abs(rows).max(axis=1, initial=0.0, keepdims=True) / np.float32(_LARGEST[compression])
        scale[~np.isfinite(scale)] = np.nan
        scaled = np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)
        if compression == "int8":
            scaled = np.rint(scaled) if generator is None else _rounded_at_random(scaled, generator)
            scaled = scaled.clip(-127, 127)  # a quotient may be off by its last bit
        packed[name] = scaled.astype(_DTYPES[compression]).reshape(arrays[name].shape)
        packed[name + _SCALE] = scale[:, 0]
    return pack_as_is(packed)


def restore(content: bytes, shapes: Shapes, compression: Compression) -> Arrays:
    """What `round_off` made of arrays of these shapes, in their order: the same on every machine.

    Raises `TooLarge`, `Malformed`, `ManifestMismatch` or `NotFinite`.
    """
    if compression == "none":
        return unpack(content, shapes)
    if len(content) > (limit := max_rounded_bytes(shapes, compression)):
        raise TooLarge(f"tensors of {len(content)} bytes, at most {limit} expected")
    packed = load_exact(content, _expected(shapes, compression))
    return {name: _restored(name, packed[name], packed[name + _SCALE]) for name in shapes}


def restore_file(path: Path, shapes: Shapes, compression: Compression) -> Arrays:
    """`restore` of a file; the size is checked before it is read."""
    return restore(_read(path, max_rounded_bytes(shapes, compression)), shapes, compression)


def max_rounded_bytes(shapes: Shapes, compression: Compression) -> int:
    """The largest result of `round_off` for arrays of these shapes."""
    if compression == "none":
        return max_bytes(shapes)
    size = _DTYPES[compression].itemsize
    scales = {name + _SCALE: (_channels(shape),) for name, shape in shapes.items()}
    values = sum(size * math.prod(shape) for shape in shapes.values())
    return values + max_bytes(scales) + max_bytes(dict.fromkeys(shapes, ()))


def compress(arrays: Mapping[str, Array], compression: Compression, seed: Seed | None = None) -> bytes:
    """`round_off` within a zstd frame; float32 arrays as they are where nothing is rounded."""
    rounded = round_off(arrays, compression, seed)
    return rounded if compression == "none" else zstandard.compress(rounded)


def decompress(content: bytes, shapes: Shapes, compression: Compression) -> Arrays:
    """What `compress` made of arrays of these shapes. Raises as `restore` does."""
    if compression == "none":
        return unpack(content, shapes)
    if len(content) > (limit := max_compressed_bytes(shapes, compression)):
        raise TooLarge(f"a change of {len(content)} bytes, at most {limit} expected")
    return restore(_inflate(content, max_rounded_bytes(shapes, compression)), shapes, compression)


def decompress_file(path: Path, shapes: Shapes, compression: Compression) -> Arrays:
    """`decompress` of a file; the size is checked before it is read."""
    return decompress(_read(path, max_compressed_bytes(shapes, compression)), shapes, compression)


def max_compressed_bytes(shapes: Shapes, compression: Compression) -> int:
    """The largest result of `compress` for arrays of these shapes; zstd may add a little."""
    largest = max_rounded_bytes(shapes, compression)
    return largest if compression == "none" else largest + largest // 128 + 512


def raw_bytes(shapes: Shapes) -> int:
    """Of the same arrays as float32."""
    return sum(4 * math.prod(shape) for shape in shapes.values())


def added(parameters: Mapping[str, Array], change: Mapping[str, Array]) -> Arrays:
    """Parameters after a change: float32 sums, so both sides get the same bits."""
    return {name: value + change[name] for name, value in parameters.items()}


def _rounded_at_random(values: Array, generator: np.random.Generator) -> Array:
    below: Array = np.floor(values + generator.random(values.shape, np.float32))
    return below


def _rows(array: Array) -> Array:
    """[channels, values of one]."""
    channels = _channels(array.shape)
    return array.reshape(channels, array.size // max(channels, 1))


def _channels(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


def _expected(shapes: Shapes, compression: Compression) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    values = {name: (_DTYPES[compression], shape) for name, shape in shapes.items()}
    scales = {name + _SCALE: (np.dtype(np.float32), (_channels(shape),)) for name, shape in shapes.items()}
    return values | scales


def _read(path: Path, limit: int) -> bytes:
    if path.stat().st_size > limit:
        raise TooLarge(f"{path.name}: {path.stat().st_size} bytes, at most {limit} expected")
    return path.read_bytes()


def _inflate(content: bytes, limit: int) -> bytes:
    """Not before the frame has said how much it holds: a few bytes may become gigabytes."""
    try:
        size = zstandard.frame_content_size(content)
        if not 0 <= size <= limit:
            raise TooLarge(f"a change unpacks to {size} bytes, at most {limit} expected")
        return zstandard.decompress(content)
    except zstandard.ZstdError as error:
        raise Malformed(f"not a zstd frame: {error}") from error


def _restored(name: str, values: npt.NDArray[Any], scale: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of that is looked at next
        restored = _rows(values.astype(np.float32)) * scale[:, None]
    if not np.isfinite(restored).all():
        raise NotFinite(f"{name} holds NaN or infinity")
    return restored.reshape(values.shape)
