"""Compressed changes: how exact they are, that their mean is unbiased, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import zstandard

from wire.compression import (
    added,
    compress,
    decompress,
    decompress_file,
    max_compressed_bytes,
    max_rounded_bytes,
    raw_bytes,
    restore,
    restore_file,
    round_off,
)
from wire.errors import Malformed, ManifestMismatch, NotFinite, PeerError, TooLarge
from wire.messages import Compression
from wire.tensors import Arrays, pack_as_is

SHAPES = {"w": (6, 5), "b": (7,), "conv": (3, 2, 4, 4), "scale": (), "none": (0, 4)}
LOSSY: tuple[Compression, ...] = ("float16", "int8")
BITS = {"float16": 2.0**-11, "int8": 1 / 127}  # the largest error over a channel's largest magnitude


def arrays(seed: int = 0, size: float = 1e-3) -> Arrays:
    generator = np.random.default_rng(seed)
    made = {}
    for name, shape in SHAPES.items():
        rows = np.float32(10.0) ** generator.integers(-4, 2, shape[:1]).reshape(
            [-1] + [1] * (len(shape) - 1)
        )
        made[name] = np.asarray(
            size * rows.reshape(rows.shape[: len(shape)]) * generator.normal(size=shape)
        )
    made["w"][2] = 0
    return {name: value.astype(np.float32).reshape(SHAPES[name]) for name, value in made.items()}


def channels(value: np.ndarray) -> np.ndarray:
    count = len(value) if value.ndim > 1 else 1
    return value.reshape(count, value.size // max(count, 1))


@pytest.mark.parametrize("compression", LOSSY)
@pytest.mark.parametrize("seed", [None, 3])
def test_each_channel_keeps_its_own_digits(compression: Compression, seed: int | None):
    given = arrays()
    got = decompress(compress(given, compression, seed), SHAPES, compression)
    assert list(got) == list(SHAPES)
    for name, value in given.items():
        assert (got[name].shape, got[name].dtype) == (value.shape, np.float32)
        largest = np.abs(channels(value)).max(axis=1, initial=0, keepdims=True)
        share = 0.5 if seed is None or compression == "float16" else 1.0
        error = np.abs(channels(got[name]) - channels(value))
        assert (error <= largest * BITS[compression] * share * 1.01).all(), name


def test_without_compression_nothing_is_lost():
    given = arrays()
    got = decompress(compress(given, "none", 0), SHAPES, "none")
    assert all(np.array_equal(got[name], given[name]) for name in SHAPES)


def test_the_mean_of_many_int8_changes_is_unbiased():
    value = {"w": np.linspace(-1, 1, 1000, dtype=np.float32)[None]}
    shapes, count = {"w": (1, 1000)}, 400
    decoded = [decompress(compress(value, "int8", seed), shapes, "int8")["w"] for seed in range(count)]
    bias = np.mean(decoded, axis=0) - value["w"]
    # Rounding at random has a standard deviation of at most half a step.
    assert np.abs(bias).max() < 5 * 0.5 / 127 / np.sqrt(count)
    assert abs(bias.mean()) < 5 * 0.5 / 127 / np.sqrt(count * 1000)
    nearest = decompress(compress(value, "int8"), shapes, "int8")["w"] - value["w"]
    assert np.abs(nearest).max() > np.abs(bias).max()  # what the mean of equal roundings keeps


@pytest.mark.parametrize("compression", LOSSY)
def test_the_same_seed_gives_the_same_bytes_in_every_process(compression: Compression):
    code = (
        "import sys, numpy as np; from wire.compression import compress\n"
        "value = {'w': np.random.default_rng(0).normal(size=(9, 9)).astype(np.float32)}\n"
        f"sys.stdout.write(compress(value, {compression!r}, [1, 2]).hex())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    value = {"w": np.random.default_rng(0).normal(size=(9, 9)).astype(np.float32)}
    assert compress(value, compression, [1, 2]).hex() == there.stdout
    if compression == "int8":
        assert compress(value, compression, [1, 3]).hex() != there.stdout


def test_int8_takes_a_quarter_and_float16_half():
    value = {"w": np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)}
    sizes = {c: len(compress(value, c, 0)) / raw_bytes({"w": (256, 256)}) for c in LOSSY}
    assert sizes["int8"] < 0.26
    assert 0.4 < sizes["float16"] < 0.52


@pytest.mark.parametrize("compression", ["none", *LOSSY])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_no_change_is_larger_than_the_limit(compression: Compression, size: float):
    content = compress(arrays(size=size), compression, 0)
    assert len(content) <= max_compressed_bytes(SHAPES, compression)
    assert decompress(content, SHAPES, compression).keys() == SHAPES.keys()
    rounded = round_off(arrays(size=size), compression, 0)
    assert len(rounded) <= max_rounded_bytes(SHAPES, compression)
    both = decompress(content, SHAPES, compression), restore(rounded, SHAPES, compression)
    assert all(np.array_equal(both[0][name], both[1][name]) for name in SHAPES)


@pytest.mark.parametrize("compression", LOSSY)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_who_gets_it(compression: Compression, bad: float):
    content = compress({"b": np.array([0, bad], np.float32)}, compression, 0)
    with pytest.raises(NotFinite, match="b holds NaN or infinity"):
        decompress(content, {"b": (2,)}, compression)


def packed(compression: Compression, **changes: np.ndarray) -> bytes:
    dtype = {"float16": np.float16, "int8": np.int8}[compression]
    values = {"b": np.ones(3, dtype), "b.scale": np.ones(1, np.float32)}
    return zstandard.compress(pack_as_is({**values, **changes}))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"b": np.ones(3, np.float32)}, ManifestMismatch),
        ({"b": np.ones(4, np.int8)}, ManifestMismatch),
        ({"b.scale": np.ones(2, np.float32)}, ManifestMismatch),
        ({"c": np.ones(2, np.float32)}, ManifestMismatch),
        ({"b.scale": np.full(1, np.nan, np.float32)}, NotFinite),
        ({"b.scale": np.full(1, np.inf, np.float32)}, NotFinite),
        ({"b.scale": np.full(1, 3e38, np.float32), "b": np.full(3, 127, np.int8)}, NotFinite),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, np.ndarray], error: type[PeerError]):
    with pytest.raises(error):
        decompress(packed("int8", **changes), {"b": (3,)}, "int8")


def test_a_bomb_is_refused_before_it_is_unpacked():
    bomb = zstandard.compress(bytes(10_000_000))
    assert len(bomb) < max_compressed_bytes({"b": (3,)}, "int8")
    with pytest.raises(TooLarge, match="10000000"):
        decompress(bomb, {"b": (3,)}, "int8")


def test_a_frame_that_hides_its_size_is_refused():
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10_000_000))
    with pytest.raises(PeerError):
        decompress(hidden, {"b": (3,)}, "int8")


@pytest.mark.parametrize("content", [b"", b"x", b"\x28\xb5\x2f\xfd", packed("int8")[:-3]])
def test_what_is_no_frame_is_malformed(content: bytes):
    with pytest.raises((Malformed, TooLarge)):
        decompress(content, {"b": (3,)}, "int8")


def test_a_file_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "change"
    with path.open("wb") as file:
        file.truncate(10**9)
    for read in (decompress_file, restore_file):
        with pytest.raises(TooLarge):
            read(path, {"b": (3,)}, "int8")


def test_parameters_after_a_change():
    before, change = {"b": np.float32([1, 2])}, {"b": np.float32([0.5, -1])}
    assert added(before, change)["b"].tolist() == [1.5, 1.0]
    assert added(before, change)["b"].dtype == np.float32
