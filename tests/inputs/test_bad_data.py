"""Whatever is wrong with the data is one line with the file and the row, and a next step."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from example_folder import ROWS, Open, write_csv
from PIL import Image

from wire.errors import UserError


def complaint(open_dataset: Open, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(**options)
    assert caught.value.hint
    assert "\n" not in f"{caught.value}{caught.value.hint}"
    return str(caught.value)


def test_no_folder(folder: Path, open_dataset: Open) -> None:
    shutil.rmtree(folder)
    assert str(folder) in complaint(open_dataset)


def test_no_table(folder: Path, open_dataset: Open) -> None:
    (folder / "table.csv").unlink()
    assert "table.csv nor table.parquet" in complaint(open_dataset)


def test_two_tables(folder: Path, open_dataset: Open) -> None:
    pyarrow.parquet.write_table(pa.table({"image": ["a.png"]}), folder / "table.parquet")
    assert "both" in complaint(open_dataset)


@pytest.mark.parametrize("content", ["", "image,text,label\n", "image,text,label\n\n\n"])
def test_no_rows(folder: Path, open_dataset: Open, content: str) -> None:
    (folder / "table.csv").write_text(content)
    assert "no rows" in complaint(open_dataset)


def test_only_incomplete_rows(folder: Path, open_dataset: Open) -> None:
    write_csv(folder, [{**row, "image": ""} for row in ROWS])
    assert "no row" in complaint(open_dataset)


def test_a_missing_column_names_those_there(folder: Path, open_dataset: Open) -> None:
    write_csv(folder, [{"photo": row["image"], "text": row["text"], "label": row["label"]} for row in ROWS])
    with pytest.raises(UserError, match=r"no column 'image', only 'photo', 'text', 'label'") as caught:
        open_dataset()
    assert "--column image=" in caught.value.hint
    assert "no column 'snap'" in complaint(open_dataset, columns={"image": "snap"})


def test_two_columns_of_one_name(folder: Path, open_dataset: Open) -> None:
    (folder / "table.csv").write_text("image,text,text,label\na,b,c,d\n")
    assert "two columns named 'text'" in complaint(open_dataset)


def test_a_comma_without_quotes(folder: Path, open_dataset: Open) -> None:
    (folder / "table.csv").write_text("image,text,label\nimages/0.png,a fox, red,animal\n")
    assert "table.csv line 2 has 4 cells" in complaint(open_dataset)


def test_a_table_that_is_not_utf8(folder: Path, open_dataset: Open) -> None:
    (folder / "table.csv").write_bytes("image,text,label\nimages/0.png,été,animal\n".encode("latin-1"))
    assert "not UTF-8" in complaint(open_dataset)


def test_quotes_that_never_close(folder: Path, open_dataset: Open) -> None:
    (folder / "table.csv").write_text('image,text,label\nimages/0.png,"a fox,animal\n')
    assert "is not CSV" in complaint(open_dataset)


def test_a_spreadsheets_byte_order_mark_is_no_part_of_a_name(folder: Path, open_dataset: Open) -> None:
    path = folder / "table.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(open_dataset()) == len(ROWS)


def test_a_broken_parquet_file(folder: Path, open_dataset: Open) -> None:
    (folder / "table.csv").unlink()
    (folder / "table.parquet").write_bytes(b"PAR1 no PAR1")
    assert "not a Parquet file" in complaint(open_dataset)


def test_a_missing_image(folder: Path, open_dataset: Open) -> None:
    (folder / "images/2.png").unlink()
    assert complaint(open_dataset).endswith("table.csv line 4: image images/2.png is missing")


def test_the_line_counts_texts_of_several_lines(folder: Path, open_dataset: Open) -> None:
    write_csv(folder, [{**ROWS[0], "text": "a red\nfox"}, {**ROWS[1], "image": "images/none.png"}])
    assert "line 4" in complaint(open_dataset)


def test_a_row_of_a_parquet_file(folder: Path, open_dataset: Open) -> None:
    (folder / "table.csv").unlink()
    table = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    pyarrow.parquet.write_table(pa.table(table), folder / "table.parquet")
    (folder / "images/2.png").unlink()
    assert "table.parquet row 3" in complaint(open_dataset)


@pytest.mark.parametrize("kept", [0, 1, 20, 0.5, 0.8])
def test_a_truncated_image(folder: Path, open_dataset: Open, kept: float) -> None:
    path = folder / "images/1.png"
    Image.frombytes("RGB", (40, 40), os.urandom(4800)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert "line 3: image images/1.png cannot be read" in complaint(open_dataset)


def test_a_folder_for_an_image(folder: Path, open_dataset: Open) -> None:
    write_csv(folder, [{**ROWS[0], "image": "images"}])
    assert "line 2: image images cannot be read" in complaint(open_dataset)


def test_a_decompression_bomb(folder: Path, open_dataset: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert "too many pixels" in complaint(open_dataset)  # 64 pixels: Pillow only warns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert "too many pixels" in complaint(open_dataset)


@pytest.mark.parametrize("cell", ["../secret.png", "images/../../secret.png", "/etc/hostname"])
def test_a_path_that_leaves_the_folder(folder: Path, open_dataset: Open, cell: str) -> None:
    Image.new("RGB", (8, 8)).save(folder.parent / "secret.png")
    write_csv(folder, [ROWS[0], {**ROWS[1], "image": cell}])
    assert f"line 3: {cell} is outside the folder" in complaint(open_dataset)


def test_an_unknown_label(folder: Path, open_dataset: Open) -> None:
    write_csv(folder, [ROWS[0], {**ROWS[1], "label": "stone"}])
    assert "line 3: label 'stone' is not a class" in complaint(open_dataset)


def test_a_text_without_tokens(folder: Path, open_dataset: Open) -> None:
    write_csv(folder, [ROWS[0], {**ROWS[1], "text": "\u200b"}])
    assert "line 3: the text" in complaint(open_dataset)
