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

from lamina.data.division import Division
from lamina.data.folder import Prepared, Row, as_npy, find, write
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
    division: Division,
    fold: int = 0,
    progress: Progress = lambda _what, _done, _of: None,
) -> Prepared:
    """Write `out`, or find it ready. The columns: accelerometer, gyroscope, label, group (the person).

    division: `natural`, a person each, and for more clients than people a person's windows divided by
    Dir(alpha) over the exercises; `iid`, at random; `dirichlet`, Dir(alpha) over the exercises.
    fold: 0 to 4, who is held out.
    Raises `UserError` for arguments out of range, `out` in use, or a package that cannot be had.
    """
    if not 0 <= fold < NUM_FOLDS:
        raise UserError(f"fold {fold}", f"choose 0 to {NUM_FOLDS - 1}")
    arguments = division.arguments | {"fold": fold}
    if ready := find(out, "watch", arguments, _SOURCES):
        return ready
    recordings = read_recordings(fetch(_SOURCES, progress)[RECORDINGS.name])
    people = sorted({recording.person for recording in recordings})
    held_out = people[fold * PEOPLE_IN_FOLD : (fold + 1) * PEOPLE_IN_FOLD]
    rows = list(_rows(recordings))
    training = [row for row in rows if row.cells["group"] not in held_out]
    clients, public = division.divide(
        training, lambda row: row.cells["label"], lambda row: row.cells["group"]
    )
    return write(
        out,
        "watch",
        arguments,
        _SOURCES,
        clients,
        {"holdout": [row for row in rows if row.cells["group"] in held_out], **public},
        _CHANGES,
        division.lacking(list(clients), MODALITIES),
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
