"""A prepared data set on disk: every client's folder, the held-out folders, and where it all comes from.

    OUT/clients/<client>/table.csv, images/...    what one client trains on
    OUT/<held out>/table.csv, images/...          what nobody trains on
    OUT/dataset.json                              arguments, counts, classes, sources: an `Inventory`
    OUT/LICENSES.md

Rules: the folder appears whole or not at all: it is written beside its place and renamed. Preparing it
again with the same arguments finds it ready; a folder of anything else is never touched.

Next: `inputs/table.py`, which says how a table is read.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from inputs.dataset import GROUP
from inputs.table import CSV_NAME
from lamina.data.registry import Package
from wire.errors import UserError

INVENTORY_NAME = "dataset.json"


@dataclass(frozen=True)
class Row:
    """An example. cells: column -> cell. files: the files that the cells name, path -> content."""

    cells: dict[str, str]
    files: dict[str, bytes]

    def without(self, column: str) -> Row:
        """The same example with an empty cell there, and not the file that it named."""
        kept = {path: content for path, content in self.files.items() if path != self.cells[column]}
        return Row(self.cells | {column: ""}, kept)


class Inventory(msgspec.Struct, frozen=True):
    """What a prepared data set is.

    arguments: of the preparation. classes: the labels, in the order to give a model.
    clients: client -> number of examples. held_out: folder -> group -> number of examples.
    lacking: client -> the modality that none of its examples has, of those that lack one.
    """

    name: str
    arguments: dict[str, int | float | str]
    classes: tuple[str, ...]
    clients: dict[str, int]
    held_out: dict[str, dict[str, int]]
    sources: tuple[Package, ...]
    lacking: dict[str, str] = {}


@dataclass(frozen=True)
class Prepared:
    """A data set that is ready."""

    folder: Path
    inventory: Inventory

    def client(self, name: str) -> Path:
        """A client's folder of examples."""
        return self.folder / "clients" / name


def find(
    out: Path, name: str, arguments: Mapping[str, int | float | str], sources: Sequence[Package]
) -> Prepared | None:
    """The data set in `out`, if it is this one. Raises `UserError` if something else is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        inventory = msgspec.json.decode((out / INVENTORY_NAME).read_bytes(), type=Inventory)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        raise UserError(f"{out} is there and holds no prepared data set", "choose another --out") from None
    if (inventory.name, inventory.arguments, inventory.sources) != (name, dict(arguments), tuple(sources)):
        theirs = " ".join(f"{key}={value}" for key, value in inventory.arguments.items())
        raise UserError(
            f"{out} holds {inventory.name} of other arguments or sources ({theirs})",
            "choose another --out, or remove that folder",
        )
    return Prepared(out, inventory)


def write(
    out: Path,
    name: str,
    arguments: Mapping[str, int | float | str],
    sources: Sequence[Package],
    clients: Mapping[str, Sequence[Row]],
    held_out: Mapping[str, Sequence[Row]],
    changes: str,
    lacking: Mapping[str, str],
) -> Prepared:
    """Write it all.

    changes: what was done to the sources' works, which some licenses want told. lacking: client -> the
    modality whose cells are left empty.
    """
    everyone = [row for rows in (*clients.values(), *held_out.values()) for row in rows]
    inventory = Inventory(
        name=name,
        arguments=dict(arguments),
        classes=tuple(sorted({row.cells["label"] for row in everyone})),
        clients={client: len(rows) for client, rows in clients.items()},
        held_out={
            folder: dict(Counter(row.cells[GROUP] for row in rows)) for folder, rows in held_out.items()
        },
        sources=tuple(sources),
        lacking=dict(lacking),
    )
    with _appearing(out) as folder:
        for client, rows in clients.items():
            left = [row.without(lacking[client]) for row in rows] if client in lacking else rows
            _write_rows(folder / "clients" / client, left)
        for place, rows in held_out.items():
            _write_rows(folder / place, rows)
        (folder / "LICENSES.md").write_text(_licenses(name, sources, changes), encoding="utf-8")
        content = msgspec.json.format(msgspec.json.encode(inventory), indent=1)
        (folder / INVENTORY_NAME).write_bytes(content)
    return Prepared(out, inventory)


def _write_rows(folder: Path, rows: Sequence[Row]) -> None:
    folder.mkdir(parents=True)
    with (folder / CSV_NAME).open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0].cells))
        table.writeheader()
        table.writerows(row.cells for row in rows)
    for place in {(folder / path).parent for row in rows for path in row.files}:
        place.mkdir(parents=True, exist_ok=True)
    for row in rows:
        for path, content in row.files.items():
            (folder / path).write_bytes(content)


def _licenses(name: str, sources: Sequence[Package], changes: str) -> str:
    lines = [f"# Sources of the data set `{name}`", "", "| package | license | by |", "|---|---|---|"]
    lines += [f"| {package} | {package.license} | {package.credit} |" for package in sources]
    return "\n".join([*lines, "", changes, ""])


def as_npy(values: npt.NDArray[Any]) -> bytes:
    """The content of a `.npy` file of float32."""
    file = io.BytesIO()
    np.save(file, values.astype(np.float32), allow_pickle=False)
    return file.getvalue()


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A new folder that becomes `out` at the end, or is removed if that is not reached."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}", "choose another --out") from error
    try:
        partial.chmod(0o755)  # a temporary folder is private
        yield partial
        os.sync()  # one for thousands of small files
        partial.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}", "choose another --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
