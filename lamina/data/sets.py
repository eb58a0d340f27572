"""The data sets by name, and what a local run does with each.

Next: `lamina/run.py`; `lamina/data/command.py`, which offers all that each can be asked.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def prepare_with_defaults(name: str, folder: Path, clients: int) -> Path:
    """The data set among so many clients, under `folder`, prepared or found ready."""
    from lamina.data.command import progress_bar
    from lamina.data.division import Division

    chosen = DATA_SETS[name]
    module, _, function = chosen.prepare.partition(":")
    with progress_bar() as progress:
        prepared = getattr(importlib.import_module(module), function)(
            folder / f"{name}-{clients}", Division(clients, chosen.partition), progress=progress
        )
    path: Path = prepared.folder
    return path
