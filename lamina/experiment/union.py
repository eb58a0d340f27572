"""The data of all clients as one client's: what a centralised model is trained on.

Rules: every example of every client, in the order of their names, and the same hold-out. Nothing is
decoded: a table's cells are copied, and a column whose cells are files gets the client's name before them.
Files are linked, not copied, where the disk can. An example that lacks a modality has an empty cell, and a
client that has others leaves it out (`inputs/dataset.py`).

Next: `lamina/experiment/row.py`, which trains on it.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from inputs.table import CSV_NAME, Table, read_table
from wire.errors import UserError

ALL = "all"
"""The one client's name."""


def unite(data: Path, clients: Sequence[str], out: Path) -> None:
    """Write `out`, with clients/all/ and holdout/, from `data`. Raises `UserError`."""
    folder = out / "clients" / ALL
    folder.mkdir(parents=True)
    tables = {client: _whole(data / "clients" / client) for client in clients}
    header = list(dict.fromkeys(name for table in tables.values() for name in table.header if name))
    with (folder / CSV_NAME).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for client, table in tables.items():
            columns = [_cells(table, name, client, folder) for name in header]
            writer.writerows(zip(*columns, strict=True))
    if (data / "holdout").is_dir():
        shutil.copytree(data / "holdout", out / "holdout", copy_function=_link)


def _whole(folder: Path) -> Table:
    return read_table(folder, set(read_table(folder, ()).header))


def _cells(table: Table, name: str, client: str, folder: Path) -> list[str]:
    """A column's cells; the files that they name are linked below `folder/client`."""
    cells = table.columns.get(name, [""] * len(table))
    named = [cell for cell in cells if cell]
    source = table.path.parent
    if not named or not all(_is_file(source, cell) for cell in named):
        return cells
    for cell in set(named):
        target = folder / client / cell
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            _link(str(source / cell), str(target))
    return [f"{client}/{cell}" if cell else "" for cell in cells]


def _is_file(folder: Path, cell: str) -> bool:
    try:
        return (folder / cell).is_file()
    except OSError:  # a text too long for a name
        return False


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise UserError(f"{target} cannot be written: {error.strerror}", "free some space") from error
    return target
