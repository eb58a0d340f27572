"""Shoulder exercises told by a watch's accelerometer and gyroscope: classification of two kinds of motion.

Rules:
- An example is a window of two seconds; windows overlap by half. Ten people, both arms, seven exercises.
- `holdout` has all windows of two people, of whom nobody trains on any: `fold` says which. Windows of one
  recording are so alike that a model tested on people it has trained on looks far better than it is.
- What is told of this data set is the mean over all five folds.

Burns et al., "Shoulder Physiotherapy Exercise Recognition", arXiv 1802.01489, who recorded it.
Next: `lamina/data/watch_sources.py`, the package; `lamina/data/partition.py` for the clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lamina.data.folder import Prepared, Row, as_npy, find, write
from lamina.data.missing import lacking, missing_argument
from lamina.data.partition import Partition, deal, set_aside
from lamina.data.registry import Progress, fetch
from lamina.data.watch_sources import RECORDINGS, Recording, read_recordings
from wire.errors import UserError

MODALITIES = ("accelerometer", "gyroscope")
NUM_FOLDS = 5
PEOPLE_IN_FOLD = 2
WINDOW, HOP = 100, 50  # samples at 50 Hz
_SOURCES = (RECORDINGS,)
_CHANGES = "Changed: cut into windows of 2 seconds, accelerometer and gyroscope apart."


def prepare_watch(
    out: Path,
    clients: int = 8,
    partition: Partition = "natural",
    alpha: float = 0.5,
    seed: int = 0,
    fold: int = 0,
    missing_modality: float = 0.0,
    public: float = 0.0,
    progress: Progress = lambda _what, _done, _of: None,
) -> Prepared:
    """Write `out`, or find it ready. The columns: accelerometer, gyroscope, label, group (the person).

    partition: `natural`, a person each, and for more clients than people a person's windows divided by
    Dir(alpha) over the exercises; `iid`, at random; `dirichlet`, Dir(alpha) over the exercises.
    fold: 0 to 4, who is held out. missing_modality: the share of clients that lack one of the sensors.
    Raises `UserError` for arguments out of range, `out` in use, or a package that cannot be had.
    """
    if not 0 <= fold < NUM_FOLDS:
        raise UserError(f"fold {fold}", f"choose 0 to {NUM_FOLDS - 1}")
    arguments: dict[str, int | float | str] = {
        "clients": clients,
        "partition": partition,
        "alpha": float(alpha),
        "seed": seed,
        "fold": fold,
        **missing_argument(missing_modality),
        **({"public": float(public)} if public else {}),
    }
    if ready := find(out, "watch", arguments, _SOURCES):
        return ready
    recordings = read_recordings(fetch(_SOURCES, progress)[RECORDINGS.name])
    people = sorted({recording.person for recording in recordings})
    held_out = people[fold * PEOPLE_IN_FOLD : (fold + 1) * PEOPLE_IN_FOLD]
    rows = list(_rows(recordings))
    training = [row for row in rows if row.cells["group"] not in held_out]
    aside, private = set_aside([row.cells["label"] for row in training], public, seed)
    shared = {"public": [training[index] for index in aside]} if aside else {}
    training = [training[index] for index in private]
    dealt = deal(
        [row.cells["label"] for row in training],
        [row.cells["group"] for row in training],
        clients,
        partition,
        alpha,
        np.random.default_rng(seed),
    )
    return write(
        out,
        "watch",
        arguments,
        _SOURCES,
        {name: [training[index] for index in indices] for name, indices in dealt.items()},
        {"holdout": [row for row in rows if row.cells["group"] in held_out], **shared},
        _CHANGES,
        lacking(list(dealt), MODALITIES, missing_modality, seed),
    )


def _rows(recordings: Sequence[Recording]) -> Iterator[Row]:
    """Every window: people in order, so clients of the natural partition are too."""
    for recording in sorted(recordings, key=lambda one: (one.person, one.arm, one.exercise)):
        for number, first in enumerate(range(0, len(recording.samples) - WINDOW + 1, HOP)):
            window = recording.samples[first : first + WINDOW]
            name = f"{recording.person}-{recording.arm}-{recording.exercise}-{number:02}.npy"
            paths = {sensor: f"{sensor}/{name}" for sensor in MODALITIES}
            yield Row(
                {**paths, "label": recording.exercise, "group": recording.person},
                {
                    paths["accelerometer"]: as_npy(window[:, :3]),
                    paths["gyroscope"]: as_npy(window[:, 3:]),
                },
            )
