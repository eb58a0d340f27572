"""Series: values are normalised, cut and padded, with a mask a token; what a file cannot hold is told."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from inputs.readers import Unreadable
from inputs.series import SeriesReader
from models.series import series_encoder
from wire.errors import Malformed
from wire.manifest import Modality, TensorSpec

LENGTH, CHANNELS, PATCH = 8, 3, 4
SERIES = np.random.default_rng(0).normal(size=(LENGTH, CHANNELS)).astype(np.float32)


def modality(masked: bool = True, **options: Any) -> Modality:
    inputs = {"motion": TensorSpec((LENGTH, CHANNELS), "float32")}
    if masked:
        inputs["motion_mask"] = TensorSpec((LENGTH // PATCH,), "float32")
    given = {"length": LENGTH, "channels": CHANNELS, "patch": PATCH} | options
    return Modality("series", inputs, {name: value for name, value in given.items() if value is not None})


def read(folder: Path, cell: str, **options: Any) -> dict[str, npt.NDArray[Any]]:
    reader = SeriesReader(modality(**options), Path)
    encoded = reader.encode(folder, cell)
    assert (encoded.shape, encoded.dtype) == (reader.shape, np.float16)
    return reader.decode(encoded[None])


def saved(folder: Path, array: npt.NDArray[Any], name: str = "a.npy") -> str:
    np.save(folder / name, array)
    return name


def complaint(folder: Path, cell: str, **options: Any) -> str:
    with pytest.raises(Unreadable) as caught:
        read(folder, cell, **options)
    assert caught.value.hint
    assert "\n" not in f"{caught.value}{caught.value.hint}"
    return str(caught.value)


def test_values_are_kept_to_three_digits(tmp_path: Path) -> None:
    batch = read(tmp_path, saved(tmp_path, SERIES))
    assert batch.keys() == {"motion", "motion_mask"}
    assert all(array.dtype == np.float32 for array in batch.values())
    np.testing.assert_allclose(batch["motion"][0], SERIES, rtol=1e-3, atol=1e-6)
    assert batch["motion_mask"].tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("dtype", [np.float64, ">f4", np.int16, np.uint8])
def test_any_kind_of_number(tmp_path: Path, dtype: str) -> None:
    whole = np.arange(LENGTH * CHANNELS).reshape(LENGTH, CHANNELS).astype(dtype)
    assert np.array_equal(read(tmp_path, saved(tmp_path, whole))["motion"][0], whole)
    by_column = saved(tmp_path, np.asfortranarray(whole))
    assert np.array_equal(read(tmp_path, by_column)["motion"][0], whole)


@pytest.mark.parametrize(("steps", "mask"), [(1, [1, 0]), (4, [1, 0]), (5, [1, 1]), (8, [1, 1])])
def test_a_shorter_series_is_padded_and_masked_by_token(
    tmp_path: Path, steps: int, mask: list[float]
) -> None:
    batch = read(tmp_path, saved(tmp_path, SERIES[:steps]), mean=5.0)
    assert not batch["motion"][0, steps:].any()
    np.testing.assert_allclose(batch["motion"][0, :steps], SERIES[:steps] - 5, rtol=1e-3)
    assert batch["motion_mask"].tolist() == [mask]


def test_a_longer_series_is_cut(tmp_path: Path) -> None:
    long = np.arange(1000 * CHANNELS, dtype=np.float64).reshape(1000, CHANNELS)
    for array in (long, np.asfortranarray(long)):
        assert np.array_equal(read(tmp_path, saved(tmp_path, array))["motion"][0], long[:LENGTH])


def test_without_a_mask_there_is_none(tmp_path: Path) -> None:
    assert read(tmp_path, saved(tmp_path, SERIES[:2]), masked=False).keys() == {"motion"}


def test_each_channel_is_normalised(tmp_path: Path) -> None:
    mean, std = [1.0, -2.0, 1000.0], [0.5, 4.0, 0.25]
    series = SERIES * std + mean
    batch = read(tmp_path, saved(tmp_path, series), mean=mean, std=std)
    np.testing.assert_allclose(batch["motion"][0], SERIES, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("header", ["", "ax, ay ,az\n", "\ufeffax,ay,az\n\n"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_csv(tmp_path: Path, header: str, ending: str) -> None:
    lines = [",".join(repr(float(value)) for value in row) for row in SERIES[:6]]
    text = header.replace("\n", ending) + ending.join(lines)
    (tmp_path / "a.CSV").write_bytes(text.encode())
    batch = read(tmp_path, "a.CSV")
    np.testing.assert_allclose(batch["motion"][0, :6], SERIES[:6], rtol=1e-3, atol=1e-6)
    assert not batch["motion"][0, 6:].any()


def test_of_a_long_csv_only_the_beginning_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2,3\n" * LENGTH + "no numbers\n")
    assert (read(tmp_path, "a.csv")["motion"][0] == [1, 2, 3]).all()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty"),
        ("ax,ay,az\n", "is empty"),
        ("1,2\n3,4\n", "has 2 channels, the model 3"),
        ("1,2,3\n4,5\n", "line 2 has 2 cells, not 3"),
        ("1,2,3\n4,five,6\n", "line 2 is not numbers"),
        ("1,2,3\nnan,5,6\n", "no usable number at step 2"),
        ("1,2,3\n4,inf,6\n", "no usable number at step 2"),
        ("1,2,1e30\n", "no usable number at step 1"),
        ("1,2,3\n\xff\xfe", "cannot be read"),
    ],
)
def test_a_csv_file_that_will_not_do(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "a.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(Unreadable, match=told):
        read(tmp_path, "a.csv")
    complaint(tmp_path, "a.csv")


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((0, 3)), "is empty"),
        (np.zeros((5, 2)), "has 2 channels"),
        (np.zeros(15), "shape (15,)"),
        (np.zeros((5, 3, 1)), "shape (5, 3, 1)"),
        (np.full((5, 3), np.nan), "at step 1"),
        (np.zeros((5, 3), complex), "complex128"),
        (np.zeros((5, 3), bool), "bool"),
        (np.full((5, 3), "a"), "<U1"),
        (np.zeros((5, 3), [("x", float)]), "[('x'"),
    ],
)
def test_an_array_that_will_not_do(tmp_path: Path, array: npt.NDArray[Any], told: str) -> None:
    assert told in complaint(tmp_path, saved(tmp_path, array))


def test_nothing_pickled_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((5, 3), None), allow_pickle=True)
    assert "object" in complaint(tmp_path, "a.npy")
    (tmp_path / "b.npy").write_bytes(pickle.dumps(SERIES))
    assert "cannot be read" in complaint(tmp_path, "b.npy")


def test_a_damaged_array(tmp_path: Path) -> None:
    whole = (tmp_path / saved(tmp_path, np.tile(SERIES, (5, 1)))).read_bytes()
    for length in (0, 5, 9, 60, 127, 128, len(whole) - 1):
        (tmp_path / "a.npy").write_bytes(whole[:length])
        assert "cannot be read" in complaint(tmp_path, "a.npy"), length
    (tmp_path / "a.npy").write_bytes(whole.replace(b"(40, 3)", b"(4e, 3)"))
    assert "cannot be read" in complaint(tmp_path, "a.npy")
    (tmp_path / "a.npy").write_bytes(whole.replace(b"(40, 3), }     ", b"(4000000000, 3)"))
    assert "cannot be read" in complaint(tmp_path, "a.npy")
    (tmp_path / "a.npy").write_bytes(whole.replace(b"(40, 3), }        ", b"(4000000000, 3), }"))
    assert "is cut short" in complaint(tmp_path, "a.npy")  # and its size is not believed


@pytest.mark.parametrize("cell", ["../a.npy", "/etc/hostname", "x/../../a.npy"])
def test_a_path_that_leaves_the_folder(tmp_path: Path, cell: str) -> None:
    (tmp_path / "in").mkdir()
    saved(tmp_path, SERIES)
    assert "outside the folder" in complaint(tmp_path / "in", cell)


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    assert complaint(tmp_path, "a.npy") == "a.npy is missing"
    (tmp_path / "b.npy").mkdir()
    assert "cannot be read" in complaint(tmp_path, "b.npy")


@pytest.mark.parametrize(
    "options",
    [
        {"length": 0},
        {"length": None},
        {"length": LENGTH + 1},
        {"channels": None},
        {"channels": 2},
        {"patch": 3},
        {"patch": 2},
        {"patch": "all"},
        {"mean": [0.0, 0.0]},
        {"std": 0},
        {"std": [1.0, 0.0, 1.0]},
        {"std": "wide"},
        {"mean": float("nan")},
    ],
)
def test_options_that_contradict_themselves(options: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        SeriesReader(modality(**options), Path)


def test_the_encoder_asks_for_what_the_reader_makes(tmp_path: Path) -> None:
    encoder = series_encoder(
        length=12, channels=CHANNELS, patch=3, width=8, heads=2, blocks=1, mean=[0.0, 1.0, 2.0], std=2
    )
    asked = encoder.modality("imu")
    reader = SeriesReader(asked, Path)
    batch = reader.decode(reader.encode(tmp_path, saved(tmp_path, SERIES))[None])
    assert {name: array.shape[1:] for name, array in batch.items()} == {
        name: spec.shape for name, spec in asked.inputs.items()
    }
    assert batch["imu_mask"].tolist() == [[1.0, 1.0, 1.0, 0.0]]
