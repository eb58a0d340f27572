"""A folder of examples as arrays, on every device and on the aggregator.

Rules:
- An example has every modality that is asked for, and for classification a label. Rows with an empty cell
  there are left out and counted in the log. `fullest` says what can be asked for.
- Each cell is read once, into a file in `cache` whose rows are read from then on: memory holds a batch
  and the table's few columns, never the data. The cache may be deleted whenever nothing uses it.
- `fingerprint` names the content: cells, files, tokenizer, options. It changes when any of them does.

Next: `edge_client/cache.py`, which keeps the prefix's features under the same fingerprint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from inputs.readers import AnyArray, BundleFile, Reader, make_reader
from inputs.rows import Rows
from inputs.store import Cells, encoded, fingerprint, keep_only
from inputs.table import Table, read_table
from wire.errors import UserError
from wire.manifest import LABEL, Modality, Task

GROUP = "group"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """Examples 0 to N - 1, in the table's order.

    fingerprint: 64 hex digits.
    labels: int64 `[N]`, positions in the model's classes; None unless the task is classification.
    groups: the cells of the column `group`, by which an evaluation is broken down; None without one.
    num_left_out: rows that lack something.
    """

    fingerprint: str
    labels: npt.NDArray[np.int64] | None
    groups: tuple[str, ...] | None
    num_examples: int
    num_left_out: int
    _inputs: Mapping[str, frozenset[str]]
    _readers: Mapping[str, Reader]
    _encoded: Mapping[str, Rows]

    @classmethod
    def open(
        cls,
        folder: Path,
        modalities: Mapping[str, Modality],
        task: Task,
        classes: Sequence[str],
        file: BundleFile,
        *,
        cache: Path,
        columns: Mapping[str, str] | None = None,
    ) -> Dataset:
        """Read `folder`, or find in `cache` that it is read already.

        cache: a folder of its own; what other content has left there is removed.
        file: name of a bundle's file -> its path. columns: a modality's name, `label` or `group` -> what
        the table calls it, where that differs. Raises `UserError` with file and row for whatever is wrong
        in the data, `Malformed` for modalities that no reader can make.
        """
        readers = {name: make_reader(modality, file) for name, modality in modalities.items()}
        needed = [*modalities, *([LABEL] if task == "classification" else [])]
        table, cells = _columns(folder, needed, columns or {})
        rows = [row for row in range(len(table)) if all(cells[name][row] for name in needed)]
        if not rows:
            raise UserError(
                f"no row of {table.path} has {' and '.join(needed)}",
                "fill the empty cells, or export for clients that lack some: --missing-modalities",
            )
        if left_out := len(table) - len(rows):
            log.warning("%s: %d of %d rows lack a cell and are left out", table.path, left_out, len(table))

        labels = _labels(table, rows, cells[LABEL], classes) if task == "classification" else None
        chosen = [Cells(folder, table, rows, cells[name], readers[name]) for name in modalities]
        values = [[cells[name][row] for row in rows] for name in needed]
        key = msgspec.json.encode([*modalities.items(), task, *classes, values], order="deterministic")
        content = fingerprint(key, chosen)
        keep_only(cache, content)
        arrays = [encoded(one, cache / f"{content}.{place}.npy") for place, one in enumerate(chosen)]
        groups = tuple(cells[GROUP][row] for row in rows) if GROUP in cells else None
        arrays_of = dict(zip(modalities, arrays, strict=True))
        inputs = {name: frozenset(modality.inputs) for name, modality in modalities.items()}
        return cls(content, labels, groups, len(rows), left_out, inputs, readers, arrays_of)

    def __len__(self) -> int:
        return self.num_examples

    @property
    def augmented(self) -> frozenset[str]:
        """The modalities whose examples have several views."""
        return frozenset(name for name, reader in self._readers.items() if reader.augments)

    def batch(
        self,
        indices: npt.NDArray[np.integer] | Sequence[int],
        names: Set[str] | None = None,
        views: npt.NDArray[np.integer] | None = None,
    ) -> dict[str, AnyArray]:
        """Inputs by name, each `[B, *shape]` of its `TensorSpec`; `label` int64 `[B]` of classification.

        names: those wanted, None for all; what is not wanted is not read. views: `[B]`, counted from 0,
        which view of each example to take of the modalities in `augmented`; None: the example as it is.
        """
        chosen = np.asarray(indices, np.int64)
        arrays: dict[str, AnyArray] = {}
        for name, reader in self._readers.items():
            if names is None or not names.isdisjoint(self._inputs[name]):
                encoded = self._encoded[name].read(chosen)
                if views is not None and reader.augments:
                    for place, seed in enumerate(zip(views.tolist(), chosen.tolist(), strict=True)):
                        encoded[place] = reader.view(encoded[place], seed)
                arrays.update(reader.decode(encoded))
        if self.labels is not None:
            arrays[LABEL] = self.labels[chosen]
        return arrays if names is None else {name: arrays[name] for name in names}


def fullest(
    folder: Path, choices: Sequence[tuple[str, ...]], columns: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """The set of modalities, of `choices`, that most rows of the folder's table have; the first of equals.

    Raises `UserError`, also for a column that is said to be one of them and is not there.
    """
    if len(choices) == 1:  # what it lacks is told where it is read
        return choices[0]
    told = columns or {}
    names = dict.fromkeys(name for choice in choices for name in choice)
    table = read_table(folder, {told.get(name, name) for name in names})
    for name in names:
        if name in told and told[name] not in table.columns:
            raise _no_column(table, name, told[name])
    cells = {name: table.columns.get(told.get(name, name), [""] * len(table)) for name in names}

    def num_rows(choice: tuple[str, ...]) -> int:
        return sum(all(row) for row in zip(*(cells[name] for name in choice), strict=True))

    return max(choices, key=num_rows)


def _columns(
    folder: Path, needed: Sequence[str], columns: Mapping[str, str]
) -> tuple[Table, dict[str, list[str]]]:
    """The table, and the cells of all its rows by our names: those `needed`, and `group` if it is there."""
    theirs = {name: columns.get(name, name) for name in [*needed, GROUP]}
    table = read_table(folder, set(theirs.values()))
    for name in needed:
        if theirs[name] not in table.columns:
            raise _no_column(table, name, theirs[name])
    return table, {ours: table.columns[name] for ours, name in theirs.items() if name in table.columns}


def _no_column(table: Table, name: str, theirs: str) -> UserError:
    return UserError(
        f"{table.path} has no column {theirs!r}, only {', '.join(map(repr, table.header))}",
        f"say which it is: --column {name}=THEIR_NAME, or export with --missing-modalities",
    )


def _labels(
    table: Table, rows: Sequence[int], cells: Sequence[str], classes: Sequence[str]
) -> npt.NDArray[np.int64]:
    position = {name: place for place, name in enumerate(classes)}
    for row in rows:
        if cells[row] not in position:
            raise UserError(
                f"{table.where(row)}: label {cells[row]!r} is not a class of the model",
                f"its classes are {', '.join(classes)}",
            )
    return np.array([position[cells[row]] for row in rows], np.int64)
