"""The file of an experiment: what its rows are.

    seeds = [0, 1, 2]                  # every row with each of them; a grid may have its own
    [base]                             # settings of every row
    data_set = "emoji"
    [[grid]]                           # a product: every value of every list with every other
    name = "methods"
    schedule = ["end_to_end", "layerwise"]

Rules: in `[base]` a value is the setting's, a list only where the setting takes one (`rounds = [4, 8]` is
one number a stage). In a `[[grid]]` a list is always one of choices, so such a setting has a list of lists.
Tables of one name are one grid. A row's id follows from its settings alone, those at their defaults left
out: it stays what it is when the file grows, and rows of two grids that are the same are run once.

Next: `lamina/experiment/settings.py`, what can be set; `lamina/experiment/conduct.py`, which runs them.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.experiment.settings import Values, complete, did_you_mean, flat, telling
from wire.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

MAX_ROWS = 10_000
NONE = "–"
_TOP = ("base", "grid", "seeds", "metric")
_OWN = ("name", "seeds")  # of a grid's table


@dataclass(frozen=True)
class Row:
    """One run. id: 1 to 64 letters, digits and dashes. settings: all of them, `seed` among them."""

    id: str
    settings: Values


@dataclass(frozen=True)
class Grid:
    """rows: what a row is called in this grid, `methods/schedule=layerwise/s0`, -> the row's id."""

    name: str
    rows: dict[str, str]


@dataclass(frozen=True)
class Experiment:
    """What a file says. rows: by id, in the file's order. metric: its name; empty: the usual one."""

    file: Path
    grids: tuple[Grid, ...]
    rows: dict[str, Row]
    metric: str

    def chosen(self, patterns: Sequence[str]) -> dict[str, Row]:
        """The rows whose id, name or grid is, or matches, one of the patterns; all without any.

        Raises `UserError` for a pattern that nothing matches.
        """
        if not patterns:
            return self.rows
        names = [(name, row) for grid in self.grids for name, row in grid.rows.items()]
        names += [(row, row) for row in self.rows]
        names += [(grid.name, row) for grid in self.grids for row in grid.rows.values()]
        found: set[str] = set()
        for pattern in patterns:
            matching = {row for name, row in names if name == pattern or fnmatch.fnmatchcase(name, pattern)}
            if not matching:
                known = list(dict.fromkeys(name for name, _ in names))
                hint = did_you_mean(pattern, known, "see them with --list")
                raise UserError(f"no row of {self.file} is {pattern!r}", hint)
            found |= matching
        return {row: self.rows[row] for row in self.rows if row in found}


def read_experiment(file: Path) -> Experiment:
    """Raises `UserError` for whatever is wrong in the file."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(
            f"{file} cannot be read: {error}", "write a TOML file, see docs/experiments.md"
        ) from error
    for name in content:
        if name not in _TOP:
            raise UserError(f"{file}: there is no {name!r} at the top", did_you_mean(name, _TOP))
    base, tables = content.get("base", {}), content.get("grid", [])
    if not isinstance(base, dict):
        raise UserError(f"{file}: base is {base!r}", "write [base] and settings below it")
    if not tables or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(
            f"{file} has no [[grid]]", "write [[grid]], name = ..., and lists of values below it"
        )
    metric = content.get("metric", "")
    if not isinstance(metric, str):
        raise UserError(f"{file}: metric is {metric!r}", "write a name such as recall@10")
    seeds = _seeds(content.get("seeds", [0]), str(file))
    rows: dict[str, Row] = {}
    grids: dict[str, dict[str, str]] = {}
    for table in tables:
        name = _name(table, file)
        for called, row in _product(flat(base), table, seeds, f"{file}, grid {name}").items():
            rows.setdefault(row.id, row)
            grids.setdefault(name, {})[f"{name}/{called}"] = row.id
            if len(rows) > MAX_ROWS:
                raise UserError(f"{file} has more than {MAX_ROWS} rows", "give fewer values")
    beside = {row: _relative(one, file.parent) for row, one in rows.items()}
    return Experiment(file, tuple(Grid(name, found) for name, found in grids.items()), beside, metric)


def _product(base: Values, table: Mapping[str, Any], seeds: Sequence[int], where: str) -> dict[str, Row]:
    """What a row is called -> the row."""
    own = flat({name: value for name, value in table.items() if name not in _OWN})
    for name, value in own.items():
        if value == []:
            raise UserError(f"{where}: {name} has no values", "give it some, or leave it out")
    choices = [value if isinstance(value, list) else [value] for value in own.values()]
    seeds = _seeds(table["seeds"], where) if "seeds" in table else seeds
    found: dict[str, Row] = {}
    for values in itertools.product(*choices):
        chosen = dict(zip(own, values, strict=True))
        parts = ",".join(f"{name}={shown(value)}" for name, value in chosen.items()) or "base"
        for seed in seeds:
            settings = complete(_over(base, chosen), seed, where)
            found[f"{parts}/s{seed}"] = Row(_id(settings), settings)
    return found


def shown(value: Any) -> str:
    """A setting's value in a name or a table; a dash where there is none."""
    if value is None:
        return NONE
    if isinstance(value, list):
        return "-".join(map(shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _over(base: Values, chosen: Values) -> Values:
    """What a grid chooses takes the place of what it is an alternative to."""
    kept = dict(base)
    for one, other in (("rounds", "total_rounds"), ("data", "data_set")):
        for name, instead in ((one, other), (other, one)):
            if name in chosen:
                kept.pop(instead, None)
    return kept | chosen


def _id(settings: Values) -> str:
    content = json.dumps(telling(settings), sort_keys=True).encode()
    schedule = settings["schedule"].replace("_", "-")
    return f"{schedule}-s{settings['seed']}-{hashlib.sha256(content).hexdigest()[:8]}"


def _relative(row: Row, folder: Path) -> Row:
    """With its data, a path that starts at the file's folder, where it is."""
    if "data" not in row.settings:
        return row
    return Row(row.id, row.settings | {"data": str((folder / row.settings["data"]).resolve())})


def _name(table: Mapping[str, Any], file: Path) -> str:
    name = table.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise UserError(
            f"{file}: a [[grid]] has the name {name!r}",
            "give each a name of letters, digits, dashes or underscores",
        )
    return name


def _seeds(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(one) is int and one >= 0 for one in value):
        raise UserError(f"{where}: seeds is {value!r}", "write a list of whole numbers such as [0, 1, 2]")
    return list(dict.fromkeys(value))
