"""The table of a folder of examples: `table.csv` or `table.parquet`, one row an example.

Rules: every cell is text without surrounding blanks; an empty one says that the example lacks this
modality. CSV is UTF-8 with a header row and is read with the standard library, so a small device needs no
table library; Parquet needs pyarrow. Whatever is wrong is a `UserError` that names the file and the row.

Next: `inputs/dataset.py`, which picks the columns that a model needs.
"""

from __future__ import annotations

import csv
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from wire.errors import UserError

CSV_NAME = "table.csv"
PARQUET_NAME = "table.parquet"


@dataclass(frozen=True)
class Table:
    """Some columns of a table.

    header: the names of all its columns. columns: name -> cells, of the columns asked for that are there.
    lines: for each row, its last line in a CSV file, or its number from 1 in a Parquet file.
    """

    path: Path
    header: tuple[str, ...]
    columns: dict[str, list[str]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        """The place of a row (from 0), as an editor or a Parquet viewer counts it."""
        return f"{self.path} {'line' if self.path.suffix == '.csv' else 'row'} {self.lines[row]}"


def read_table(folder: Path, names: Collection[str]) -> Table:
    """The columns `names` of the folder's table, those that it has.

    Raises `UserError`: no such folder, no table or two, one that cannot be read, or one without rows.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", "check the path of your data")
    found = [folder / name for name in (CSV_NAME, PARQUET_NAME) if (folder / name).is_file()]
    if not found:
        raise UserError(
            f"{folder} holds neither {CSV_NAME} nor {PARQUET_NAME}",
            "write a table with one row an example and a column for each modality",
        )
    if len(found) > 1:
        raise UserError(f"{folder} holds both {CSV_NAME} and {PARQUET_NAME}", "remove one of them")
    table = (_read_csv if found[0].name == CSV_NAME else _read_parquet)(found[0], names)
    if not len(table):
        raise UserError(f"{found[0]} has no rows", "write one row an example below the column names")
    return table


def _read_csv(path: Path, names: Collection[str]) -> Table:
    lines: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            reader = csv.reader(file, strict=True)
            header = tuple(name.strip() for name in next(reader, ()))
            _check_header(path, header)
            places = {name: header.index(name) for name in header if name in names}
            columns: dict[str, list[str]] = {name: [] for name in places}
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{path} line {reader.line_num} has {len(cells)} cells, the header {len(header)}",
                        "put double quotes around a text that holds commas",
                    )
                for name, place in places.items():
                    columns[name].append(cells[place].strip())
                lines.append(reader.line_num)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}", "save the table as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not CSV: {error}", "mend that line") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}", "check the file's permissions"
        ) from error
    return Table(path, header, columns, lines)


def _read_parquet(path: Path, names: Collection[str]) -> Table:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(
            f"reading {path} needs pyarrow",
            f'pip install "lamina[parquet]", or save the table as {CSV_NAME}',
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            header = tuple(str(name) for name in file.schema_arrow.names)
            _check_header(path, header)
            content = file.read(columns=[name for name in header if name in names])
            num_rows = file.metadata.num_rows
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a Parquet file: {reason}", "write the table again") from error
    columns = {
        name: ["" if cell is None else str(cell).strip() for cell in content[name].to_pylist()]
        for name in content.column_names
    }
    return Table(path, header, columns, list(range(1, num_rows + 1)))


def _check_header(path: Path, header: tuple[str, ...]) -> None:
    for name in header:
        if name and header.count(name) > 1:
            raise UserError(f"{path} has two columns named {name!r}", "rename one of them")
