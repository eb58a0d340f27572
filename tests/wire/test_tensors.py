"""Tensors as bytes: one encoding of one content, and a named refusal of everything else."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.numpy import save

from wire.errors import Malformed, ManifestMismatch, NotFinite, PeerError, TooLarge
from wire.tensors import Arrays, max_bytes, pack, unpack, unpack_file

SHAPES = {"z.weight": (2, 3), "a.bias": (4,), "m.absent": (0, 5), "a.one": (1, 1, 1), "h.scale": ()}
ONE = {"a": (2,)}
fuzz = settings(
    derandomize=True, max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def arrays_of(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}


def safetensors_of(header: Mapping[str, object] | bytes, data: bytes = b"") -> bytes:
    """The format by hand, for what no honest writer makes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], size_bytes: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size_bytes]}


def assert_same_bits(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == np.float32
        assert got[name].shape == array.shape
        assert got[name].tobytes() == array.astype(np.float32).tobytes()


def test_arrays_come_out_as_they_went_in_and_in_the_order_asked_for():
    arrays = arrays_of(SHAPES)
    assert_same_bits(unpack(pack(arrays), SHAPES), arrays)
    backwards = dict(reversed(SHAPES.items()))
    assert list(unpack(pack(arrays), backwards)) == list(backwards)


@settings(fuzz, max_examples=80)
@given(data=st.data())
def test_any_finite_arrays_come_out_as_they_went_in(data: st.DataObject):
    names = data.draw(st.lists(st.text(max_size=40), unique=True, max_size=5))
    arrays = {}
    for name in names:
        shape = data.draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3))
        finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
        arrays[name] = data.draw(npst.arrays(np.float32, shape, elements=finite))
    assert_same_bits(unpack(pack(arrays), {name: array.shape for name, array in arrays.items()}), arrays)


def test_signed_zeros_and_subnormals_keep_their_bits():
    arrays = {"a": np.array([-0.0, 0.0, 1e-45, -1e-45, np.finfo(np.float32).max], np.float32)}
    assert_same_bits(unpack(pack(arrays), {"a": (5,)}), arrays)


def test_equal_content_has_equal_bytes_whichever_order_it_was_put_in():
    arrays = arrays_of(SHAPES)
    rng = np.random.default_rng(1)
    names = list(arrays)
    orders = [[names[i] for i in rng.permutation(len(names))] for _ in range(10)]
    assert len({tuple(order) for order in orders}) > 3
    assert {pack({name: arrays[name] for name in order}) for order in orders} == {pack(arrays)}
    assert pack({name: array.copy() for name, array in arrays.items()}) == pack(arrays)


def test_other_content_has_other_bytes():
    arrays = arrays_of(SHAPES)
    changed = {**arrays, "a.bias": np.nextafter(arrays["a.bias"], np.float32(9))}
    renamed = {name.replace("a.one", "a.two"): array for name, array in arrays.items()}
    reshaped = {**arrays, "z.weight": arrays["z.weight"].reshape(3, 2)}
    packed = [pack(arrays), pack(changed), pack(renamed), pack(reshaped)]
    assert len(set(packed)) == len(packed)


def test_the_layout_in_memory_does_not_matter():
    array = arrays_of({"a": (4, 6)})["a"]
    expected = pack({"a": array})
    for other in [
        np.asfortranarray(array),
        array.T.copy().T,
        np.repeat(array, 2, axis=0)[::2],
        array[::-1].copy()[::-1],
        array.astype(">f4"),
    ]:
        assert pack({"a": other}) == expected
    column = array[:, 1]
    assert not column.flags.c_contiguous
    assert_same_bits(unpack(pack({"a": column}), {"a": (4,)}), {"a": column})


def test_packing_changes_nothing_it_was_given():
    arrays = arrays_of(SHAPES)
    before = {name: array.copy() for name, array in arrays.items()}
    pack(arrays)
    assert_same_bits(arrays, before)


def test_unpacked_arrays_do_not_share_memory_with_the_content():
    content = pack(arrays_of(ONE))
    before = bytes(bytearray(content))
    unpack(content, ONE)["a"][:] = 7
    assert content == before


def test_arrays_without_values_and_no_arrays_at_all():
    assert unpack(pack({}), {}) == {}
    assert unpack(pack({"a": np.zeros((0, 3), np.float32)}), {"a": (0, 3)})["a"].shape == (0, 3)
    with pytest.raises(ManifestMismatch):
        unpack(pack({"a": np.zeros((0, 3), np.float32)}), {"a": (3, 0)})


def test_a_single_value_without_dimensions_stays_one():
    content = safetensors_of({"a": entry("F32", [], 4)}, struct.pack("<f", 2.5))
    assert_same_bits(unpack(content, {"a": ()}), {"a": np.array(2.5, np.float32)})
    with pytest.raises(ManifestMismatch):
        unpack(content, {"a": (1,)})
    for value in (np.array(2.5, np.float32), np.float32(2.5), np.array([[2.5]], np.float32)[0, 0]):
        assert_same_bits(unpack(pack({"a": value}), {"a": ()}), {"a": np.array(2.5, np.float32)})
    with pytest.raises(ManifestMismatch, match=r"expected float32\(1,\)"):
        unpack(pack({"a": np.array(2.5, np.float32)}), {"a": (1,)})


@settings(fuzz, max_examples=80)
@given(
    shapes=st.dictionaries(
        st.text("abc.", max_size=200),
        st.lists(st.integers(0, 6), max_size=4).map(tuple),
        max_size=9,
    )
)
def test_what_is_packed_is_never_too_large(shapes: dict[str, tuple[int, ...]]):
    content = pack({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    values = sum(array.nbytes for array in unpack(content, shapes).values())
    assert values <= len(content) <= max_bytes(shapes)


def test_too_large_is_refused_before_parsing():
    limit = max_bytes(ONE)
    with pytest.raises(Malformed):  # not safetensors, so it was parsed
        unpack(b"\xff" * limit, ONE)
    with pytest.raises(TooLarge, match=f"{limit + 1} bytes, at most {limit}"):
        unpack(b"\xff" * (limit + 1), ONE)
    header = json.dumps({"a": entry("F32", [2], 8)}).encode()
    room = limit - 8 - 8  # the header's length and the values
    assert unpack(safetensors_of(header.ljust(room), bytes(8)), ONE)["a"].tolist() == [0, 0]
    with pytest.raises(TooLarge):
        unpack(safetensors_of(header.ljust(room + 1), bytes(8)), ONE)


def test_the_limit_follows_the_shapes():
    assert max_bytes({"a": (1000, 1000)}) - max_bytes({"a": (1000, 999)}) == 4 * 1000
    assert max_bytes({"a": (0,), "b": (0,)}) > max_bytes({"a": (0,)}) > max_bytes({}) > 0


def test_the_limit_of_the_largest_shapes_is_exact():
    for shape in [(2**31, 2**31), (2**31, 2**31, 2**31), (2**31, 2**31, 0)]:
        assert max_bytes({"a": shape}) - max_bytes({"a": (0,)}) == 4 * math.prod(shape)


def test_a_missing_tensor_is_refused():
    with pytest.raises(ManifestMismatch, match=r"3 tensors are missing, first a\.bias"):
        unpack(pack(arrays_of({"m.absent": (0, 5), "a.one": (1, 1, 1)})), SHAPES)
    with pytest.raises(ManifestMismatch, match="missing"):
        unpack(pack({}), ONE)


def test_a_tensor_of_another_stage_is_refused():
    with pytest.raises(ManifestMismatch, match=r"1 tensors are not of this stage, first image\.block\.2"):
        unpack(pack(arrays_of({**SHAPES, "image.block.2": (1,)})), SHAPES)
    with pytest.raises(ManifestMismatch, match="not of this stage"):
        unpack(pack(arrays_of(ONE)), {})


@pytest.mark.parametrize("shape", [(3,), (1,), (0,), (2, 1), (1, 2), (2, 2)])
def test_another_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ManifestMismatch, match=r"a is float32\(.*, expected float32\(2,\)"):
        unpack(pack(arrays_of({"a": shape})), ONE)


@pytest.mark.parametrize(
    "dtype",
    [
        "float16",
        "float64",
        "int8",
        "uint8",
        "int16",
        "int32",
        "uint32",
        "int64",
        "uint64",
        "bool",
        "complex64",
    ],
)
def test_another_dtype_is_refused(dtype: str):
    with pytest.raises(ManifestMismatch, match=f"a is {dtype}"):
        unpack(save({"a": np.ones(2, dtype)}), ONE)


def test_the_dtype_is_looked_at_before_the_values():
    with pytest.raises(ManifestMismatch):
        unpack(save({"a": np.full(2, np.nan)}), ONE)


@pytest.mark.parametrize(
    ("dtype", "size_bytes"),
    [("BF16", 4), ("F8_E4M3", 2), ("F8_E5M2", 2), ("F8_E8M0", 2), ("F4", 1), ("F6_E2M3", 2), ("F33", 8)],
)
def test_a_dtype_that_numpy_does_not_know_is_refused(dtype: str, size_bytes: int):
    with pytest.raises((Malformed, ManifestMismatch)):
        unpack(safetensors_of({"a": entry(dtype, [2], size_bytes)}, bytes(size_bytes)), ONE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 3, 5])
def test_what_is_not_finite_is_refused(value: float, place: int):
    arrays = arrays_of(SHAPES)
    arrays["z.weight"].flat[place] = value
    with pytest.raises(NotFinite, match=r"^z\.weight holds NaN or infinity"):
        unpack(pack(arrays), SHAPES)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        safetensors_of(b"[]"),
        safetensors_of(b"\xff\xff"),
        safetensors_of(b'{"a":' + b"[" * 500 + b"]" * 500 + b"}"),
        safetensors_of({"a": entry("F32", [2], 8)}, bytes(7)),
        safetensors_of({"a": entry("F32", [2], 8)}, bytes(9)),
        safetensors_of({"a": entry("F32", [3], 8)}, bytes(8)),
        safetensors_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)),
        safetensors_of({"a": entry("F32", [2**62, 0], 0)}),
        safetensors_of({"a": entry("F32", [2**64 - 1, 0], 0)}),
        safetensors_of({"a": entry("F32", [-1, 0], 0)}),
        safetensors_of({"a": entry("F32", [1] * 70, 4)}, bytes(4)),
        safetensors_of({"a": {"dtype": "F32"}}),
        pack(arrays_of(ONE)) + b"\x00",
        b"PK\x03\x04" + bytes(40),
        b"\x80\x04\x95" + bytes(40),  # a pickle
    ],
)
def test_what_is_not_safetensors_is_malformed(content: bytes):
    with pytest.raises(Malformed, match=r"^not safetensors: "):
        unpack(content, ONE)


def unpacks_or_is_refused(content: bytes, shapes: Mapping[str, tuple[int, ...]]) -> None:
    try:
        arrays = unpack(content, shapes)
    except PeerError:
        return
    assert {name: array.shape for name, array in arrays.items()} == shapes
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays.values())


@fuzz
@given(content=st.binary(max_size=200))
def test_any_bytes_are_malformed(content: bytes):
    with pytest.raises(Malformed):
        unpack(content, ONE)


@fuzz
@given(header=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), data=st.binary(max_size=8))
def test_any_header_is_refused(header: bytes, data: bytes):
    with pytest.raises((Malformed, ManifestMismatch)):
        unpack(safetensors_of(header, data), ONE)


DTYPES = ["F32", "F64", "F16", "BF16", "F8_E4M3", "F4", "F6_E3M2", "I64", "U8", "BOOL", "C64"]
EXTENTS = st.integers(0, 4) | st.sampled_from([-1, 2**31, 2**62, 2**63, 2**64 - 1, 2**64])


@fuzz
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(EXTENTS, max_size=4),
    offsets=st.lists(st.integers(0, 16) | EXTENTS, min_size=2, max_size=2),
    size=st.integers(0, 16),
)
def test_any_entry_unpacks_or_is_refused(dtype: str, shape: list[int], offsets: list[int], size: int):
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    unpacks_or_is_refused(safetensors_of(header, bytes(size)), ONE)


@fuzz
@given(data=st.data())
def test_damaged_tensors_unpack_or_are_refused(data: st.DataObject):
    content = bytearray(pack(arrays_of(SHAPES)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    unpacks_or_is_refused(bytes(content), SHAPES)


def test_a_file_is_unpacked_like_its_bytes(tmp_path: Path):
    arrays, path = arrays_of(SHAPES), tmp_path / "update.safetensors"
    path.write_bytes(pack(arrays))
    assert_same_bits(unpack_file(path, SHAPES), arrays)
    with pytest.raises(ManifestMismatch):
        unpack_file(path, ONE | SHAPES)
    path.write_bytes(b"no tensors")
    with pytest.raises(Malformed):
        unpack_file(path, SHAPES)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "update.safetensors"
    path.write_bytes(bytes(max_bytes(ONE) + 1))
    for name in ("open", "read_bytes"):
        monkeypatch.setattr(Path, name, lambda *_: pytest.fail("the file was read"))
    with pytest.raises(TooLarge, match=r"update\.safetensors"):
        unpack_file(path, ONE)
