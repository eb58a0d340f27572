"""The data sets by name, and what a local run does with each.

Next: `lamina/run.py`; `lamina/data/command.py`, which offers all that each can be asked.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataSet:
    """prepare: a function of the folder, clients and progress. clients: by default. model: a preset."""

    prepare: str
    clients: int
    model: str


DATA_SETS = {
    "emoji": DataSet("lamina.data.emoji:prepare_emoji", clients=4, model="tiny"),
    "digits": DataSet("lamina.data.digits:prepare_digits", clients=10, model="digits"),
    "watch": DataSet("lamina.data.watch:prepare_watch", clients=8, model="watch"),
}


def prepare_with_defaults(name: str, folder: Path, clients: int) -> Path:
    """The data set among so many clients, under `folder`, prepared or found ready."""
    from lamina.data.command import progress_bar

    module, _, function = DATA_SETS[name].prepare.partition(":")
    with progress_bar() as progress:
        prepared = getattr(importlib.import_module(module), function)(
            folder / f"{name}-{clients}", clients, progress=progress
        )
    path: Path = prepared.folder
    return path
