"""The data sets by name, and what a local run does with each.

Next: `lamina/run.py`; `lamina/data/command.py`, which offers all that each can be asked.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.data.division import Division
    from lamina.data.folder import Prepared
    from lamina.data.partition import Partition


@dataclass(frozen=True)
class DataSet:
    """prepare: a function of the folder, a division and progress. clients: by default. model: a preset."""

    prepare: str
    clients: int
    partition: Partition
    model: str


DATA_SETS = {
    "emoji": DataSet("lamina.data.emoji:prepare_emoji", 4, "natural", "tiny"),
    "digits": DataSet("lamina.data.digits:prepare_digits", 10, "dirichlet", "digits"),
    "watch": DataSet("lamina.data.watch:prepare_watch", 8, "natural", "watch"),
    "stamps": DataSet("lamina.data.stamps:prepare_stamps", 9, "natural", "stamps"),
}


def prepared(name: str, out: Path, division: Division, **options: Any) -> Prepared:
    """The data set in `out`, prepared or found ready; meanwhile bars tell what is being done.

    options: what this one can be asked beside its division. Raises `UserError`.
    """
    from lamina.data.command import progress_bar

    module, _, function = DATA_SETS[name].prepare.partition(":")
    with progress_bar() as progress:
        ready: Prepared = getattr(importlib.import_module(module), function)(
            out, division, **options, progress=progress
        )
    return ready


def prepare_with_defaults(name: str, folder: Path, clients: int) -> Path:
    """The data set among so many clients, under `folder`, prepared or found ready."""
    from lamina.data.division import Division

    division = Division(clients, DATA_SETS[name].partition)
    return prepared(name, folder / f"{name}-{clients}", division).folder
