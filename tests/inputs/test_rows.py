"""An array's file: whole or not there, proved when opened, read row by row in little memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from inputs.rows import Rows, file_bytes, write_rows
from wire.errors import UserError

ARRAY = np.random.default_rng(0).integers(0, 1000, (50, 3, 4)).astype(np.float16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "array.npy"
    write_rows(path, ARRAY.shape, ARRAY.dtype, [ARRAY[:20], ARRAY[20:21], ARRAY[21:]])
    return path


def opened(path: Path, shape: tuple[int, ...] = ARRAY.shape, dtype: npt.DTypeLike = np.float16) -> Rows:
    rows = Rows.open(path, shape, dtype)
    assert rows is not None
    return rows


def test_what_was_written_is_read(path: Path) -> None:
    rows = opened(path)
    assert len(rows) == 50
    asked = [7, 49, 0, 7]
    assert np.array_equal(rows.read(asked), ARRAY[asked])
    assert rows.read(asked).dtype == np.float16
    assert np.array_equal(rows.read(np.array(asked), np.float32), ARRAY[asked].astype(np.float32))
    assert rows.read([]).shape == (0, 3, 4)
    assert np.array_equal(np.load(path), ARRAY)
    assert path.stat().st_size == file_bytes(ARRAY.shape, ARRAY.dtype)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("row", [-1, 50])
def test_a_row_that_is_not_there(path: Path, row: int) -> None:
    with pytest.raises(IndexError):
        opened(path).read([row])


def test_another_array_is_not_opened(path: Path) -> None:
    assert Rows.open(path, (50, 4, 3), np.float16) is None
    assert Rows.open(path, (49, 3, 4), np.float16) is None
    assert Rows.open(path, ARRAY.shape, np.int16) is None
    assert Rows.open(path.with_name("other"), ARRAY.shape, np.float16) is None
    assert Rows.open(path.parent, ARRAY.shape, np.float16) is None


def test_every_damaged_byte_is_found(path: Path) -> None:
    whole = path.read_bytes()
    for place in range(0, len(whole), 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert Rows.open(path, ARRAY.shape, np.float16) is None, place
    for length in (0, 1, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert Rows.open(path, ARRAY.shape, np.float16) is None, length
    path.write_bytes(whole + b"\0")
    assert Rows.open(path, ARRAY.shape, np.float16) is None
    path.write_bytes(whole)
    assert np.array_equal(opened(path).read(range(50)), ARRAY)


def test_a_file_that_is_removed_is_read_on(path: Path) -> None:
    rows = opened(path)
    path.unlink()
    assert np.array_equal(rows.read([3]), ARRAY[[3]])


def test_a_file_that_becomes_shorter_is_told(path: Path) -> None:
    rows = opened(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="shorter"):
        rows.read([49])


def test_what_fails_in_mid_write_leaves_what_was_there(path: Path) -> None:
    def pieces() -> Iterator[npt.NDArray[np.float16]]:
        yield ARRAY[:10]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_rows(path, ARRAY.shape, ARRAY.dtype, pieces())
    assert list(path.parent.iterdir()) == [path]
    assert np.array_equal(opened(path).read(range(50)), ARRAY)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells what is in memory")
def test_rows_that_were_read_do_not_stay_in_memory(tmp_path: Path) -> None:
    shape = (64, 1 << 20)
    write_rows(tmp_path / "a.npy", shape, np.uint8, (np.full((1, 1 << 20), i, np.uint8) for i in range(64)))
    before = _resident_kb()
    rows = opened(tmp_path / "a.npy", shape, np.uint8)
    for i in range(64):
        assert rows.read([i])[0, -1] == i
    assert _resident_kb() - before < 16 << 10


def _resident_kb() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Rss:")).split()[1])
