"""From a folder to arrays: values, rows that do not take part, the cache and its fingerprint."""

from __future__ import annotations

import importlib
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from example_folder import CLASSES, LENGTH, ROWS, SIZE, Open, write_csv

from inputs.dataset import fullest
from inputs.readers import READERS, make_reader
from wire.errors import Malformed, UserError
from wire.manifest import Modality, TensorSpec

_buffer = io.BytesIO()
np.save(_buffer, np.zeros((5, 2), np.uint8))
OTHER_ARRAY = _buffer.getvalue()


def test_a_batch_holds_every_declared_input(open_dataset: Open, modalities: dict[str, Modality]) -> None:
    batch = open_dataset().batch([2, 0, 3])
    specs = {name: spec for modality in modalities.values() for name, spec in modality.inputs.items()}
    assert batch.keys() == {*specs, "label"}
    for name, spec in specs.items():
        assert batch[name].shape == (3, *spec.shape)
        assert batch[name].dtype == np.dtype(spec.dtype)
    assert batch["label"].dtype == np.int64
    assert batch["label"].tolist() == [0, 0, 1]


def test_images_are_normalised_in_units_of_one(open_dataset: Open) -> None:
    red, brown = open_dataset().batch([0, 3])["image"]
    assert np.allclose(red[:, 0, 0], [1, -2, -1])
    assert np.allclose(brown[:, 3, 5], [(0.4 - 0.5) / 0.5, (0.2 - 0.5) / 0.25, -1], atol=1e-6)


def test_text_is_cut_and_padded(open_dataset: Open) -> None:
    batch = open_dataset().batch([0, 1, 2, 3])
    used = batch["text_mask"].sum(1)
    assert used[2] == LENGTH
    assert used.min() >= 1
    assert set(np.unique(batch["text_mask"])) <= {0.0, 1.0}
    assert (batch["text"][batch["text_mask"] == 0] == 0).all()
    assert len({tuple(row) for row in batch["text"].tolist()}) == 4


def test_a_short_text_is_padded_with_a_zero_mask(folder: Path, open_dataset: Open) -> None:
    write_csv(folder, [{**ROWS[0], "text": "a"}])
    batch = open_dataset().batch([0])
    used = int(batch["text_mask"].sum())
    assert 0 < used < LENGTH
    assert batch["text_mask"][0].tolist() == [1.0] * used + [0.0] * (LENGTH - used)
    assert not batch["text"][0, used:].any()


def test_contrastive_data_needs_no_labels(folder: Path, open_dataset: Open) -> None:
    write_csv(folder, [{"image": row["image"], "text": row["text"]} for row in ROWS])
    dataset = open_dataset("contrastive")
    assert dataset.labels is None
    assert dataset.groups is None
    assert dataset.batch([1]).keys() == {"image", "text", "text_mask"}


def test_groups_are_those_of_the_examples(open_dataset: Open) -> None:
    assert open_dataset().groups == ("x", "y", "x", "y")


def test_rows_with_an_empty_cell_are_left_out_and_counted(
    folder: Path, open_dataset: Open, caplog: pytest.LogCaptureFixture
) -> None:
    write_csv(folder, [ROWS[0], {**ROWS[1], "text": "  "}, ROWS[2], {**ROWS[3], "label": ""}])
    dataset = open_dataset()
    assert (len(dataset), dataset.num_examples, dataset.num_left_out) == (2, 2, 2)
    assert dataset.groups == ("x", "x")
    assert "2 of 4 rows" in caplog.text
    assert len(open_dataset("contrastive")) == 3


def test_columns_may_have_other_names(folder: Path, open_dataset: Open) -> None:
    names = {"image": "photo", "text": "caption", "label": "kind", "group": "place"}
    direct = open_dataset()
    write_csv(folder, [{names[key]: cell for key, cell in row.items()} for row in ROWS])
    mapped = open_dataset(columns=names)
    for name, array in direct.batch([0, 1, 2, 3]).items():
        assert np.array_equal(mapped.batch([0, 1, 2, 3])[name], array)
    assert mapped.groups == direct.groups


def test_parquet_gives_the_same_arrays(folder: Path, open_dataset: Open) -> None:
    from_csv = open_dataset()
    (folder / "table.csv").unlink()
    table = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    pyarrow.parquet.write_table(pa.table(table), folder / "table.parquet")
    from_parquet = open_dataset()
    assert from_parquet.fingerprint == from_csv.fingerprint
    assert np.array_equal(from_parquet.batch([0, 3])["image"], from_csv.batch([0, 3])["image"])


def test_parquet_without_pyarrow_says_what_to_install(
    folder: Path, open_dataset: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "table.csv").rename(folder / "table.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError) as caught:
        open_dataset()
    assert "lamina[parquet]" in caught.value.hint


def test_opening_again_reads_no_image(
    folder: Path, open_dataset: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_dataset()
    monkeypatch.setattr("inputs.image.Image.open", lambda path: pytest.fail(f"opened {path}"))
    again = open_dataset()
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.batch([0, 1])["image"], first.batch([0, 1])["image"])


def test_a_moved_folder_keeps_its_fingerprint(folder: Path, open_dataset: Open, tmp_path: Path) -> None:
    before = open_dataset().fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)
    assert open_dataset().fingerprint == before


def test_the_fingerprint_follows_every_change(
    folder: Path, open_dataset: Open, modalities: dict[str, Modality], tokenizer: Path
) -> None:
    seen = [open_dataset().fingerprint, open_dataset("contrastive").fingerprint]
    options = {**modalities["image"].options, "std": 0.5}
    changed = {**modalities, "image": msgspec.structs.replace(modalities["image"], options=options)}
    seen.append(open_dataset(modalities=changed).fingerprint)
    content = (folder / "images/0.png").read_bytes()
    (folder / "images/0.png").write_bytes((folder / "images/1.png").read_bytes())
    seen.append(open_dataset().fingerprint)
    (folder / "images/0.png").write_bytes(content)
    write_csv(folder, [*ROWS[:3], {**ROWS[3], "text": "an old fern"}])
    seen.append(open_dataset().fingerprint)
    write_csv(folder, ROWS[::-1])
    seen.append(open_dataset().fingerprint)
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-7], lambda whole: b"", lambda whole: OTHER_ARRAY])
def test_a_broken_cache_file_is_made_again(
    open_dataset: Open, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    expected = open_dataset().batch([0, 1, 2, 3])
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(damage(path.read_bytes()))
    for name, array in open_dataset().batch([0, 1, 2, 3]).items():
        assert np.array_equal(array, expected[name])


def test_nothing_half_written_stays(folder: Path, open_dataset: Open, tmp_path: Path) -> None:
    (folder / "images/3.png").write_bytes(b"not a picture")
    with pytest.raises(UserError):
        open_dataset()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written(open_dataset: Open, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        open_dataset(cache=tmp_path / "file" / "cache")


def test_a_kind_nobody_reads(open_dataset: Open) -> None:
    motion = {"motion": Modality("motion", {"motion": TensorSpec((6,), "float32")})}
    with pytest.raises(UserError, match="motion"):
        open_dataset(modalities=motion)


@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        ("image", (3, SIZE, SIZE), {"size": SIZE + 1}),
        ("image", (3, SIZE, SIZE), {}),
        ("image", (3, SIZE, SIZE), {"size": SIZE, "std": 0}),
        ("image", (3, SIZE, SIZE), {"size": SIZE, "mean": [0.5, 0.5]}),
        ("image", (3, SIZE, SIZE), {"size": SIZE, "mean": "dark"}),
        ("text", (LENGTH,), {"length": LENGTH}),
        ("text", (LENGTH,), {"length": "long", "tokenizer": "words.model"}),
    ],
)
def test_modalities_that_contradict_themselves(
    open_dataset: Open, kind: str, shape: tuple[int, ...], options: dict[str, object]
) -> None:
    modality = Modality(kind, {kind: TensorSpec(shape, "float32")}, options)  # type: ignore[arg-type]
    with pytest.raises(Malformed):
        open_dataset(modalities={kind: modality})


def test_a_tokenizer_that_is_none(
    open_dataset: Open, modalities: dict[str, Modality], tmp_path: Path
) -> None:
    (tmp_path / "words.model").write_bytes(b"no tokenizer")
    with pytest.raises(Malformed):
        make_reader(modalities["text"], lambda name: tmp_path / name)


def test_a_text_model_needs_no_pillow() -> None:
    code = "import sys, inputs.dataset, inputs.text; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"PIL", "torch", "pandas", "pyarrow"} & set(loaded.split())


def test_every_reader_of_the_table_is_there() -> None:
    for entry in READERS.values():
        module, name = entry.split(":")
        assert hasattr(importlib.import_module(module), name)


def test_the_classes_decide_the_labels(open_dataset: Open) -> None:
    labels = open_dataset().labels
    assert labels is not None
    assert [CLASSES[label] for label in labels] == [row["label"] for row in ROWS]


BOTH, IMAGE, TEXT = ("image", "text"), ("image",), ("text",)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("a.png", "a fox")] * 3, BOTH),
        ([("a.png", "")] * 3, IMAGE),
        ([("", "a fox")] * 3, TEXT),
        ([("a.png", "a fox")] + [("", "a fox")] * 9, TEXT),  # one cell does not decide over the rest
        ([("a.png", "a fox")] * 2 + [("a.png", "")], IMAGE),
        ([("a.png", "")] * 3 + [("", "a fox")] * 2, IMAGE),
        ([("", "")], BOTH),  # which the data set then refuses
    ],
)
def test_the_modalities_that_most_rows_have(
    tmp_path: Path, rows: list[tuple[str, str]], expected: tuple[str, ...]
) -> None:
    lines = ["image,caption", *(f"{image},{text}" for image, text in rows)]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    columns = {"text": "caption"}
    assert fullest(tmp_path, [BOTH, IMAGE, TEXT], columns) == expected
    assert fullest(tmp_path, [BOTH], columns) == BOTH


def test_a_column_that_is_not_there_is_a_modality_that_is_not_there_unless_it_was_named(
    tmp_path: Path,
) -> None:
    (tmp_path / "table.csv").write_text("image,caption\na.png,a fox\n")
    assert fullest(tmp_path, [BOTH, IMAGE, TEXT]) == IMAGE
    with pytest.raises(UserError, match="no column 'captoin', only 'image', 'caption'"):
        fullest(tmp_path, [BOTH, IMAGE, TEXT], {"text": "captoin"})
