"""Spoken stamps: the name of a picture in one of nine languages, written and spoken: audio-text pairs.

Rules:
- A recording that is identical to an earlier one is dropped.
- `holdout`: a fifth of the English names, in all languages, by a hash of the name and not by the seed. Of
  these, what a language calls like something that is trained on is left out, and a name is asked for once.
  Names are compared as words: without punctuation, and letter case folded.

Next: `lamina/data/stamps_sources.py`, the package; `lamina/data/partition.py` for the clients.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from lamina.data.division import Division
from lamina.data.folder import Prepared, Row, find, write
from lamina.data.partition import lot
from lamina.data.registry import Progress, fetch
from lamina.data.stamps_sources import STAMPS, Recording, check_soundfile, read_recordings

MODALITIES = ("audio", "text")
HELD_OUT_NAMES = 0.2
_SOURCES = (STAMPS,)
_CHANGES = "Changed: sound mixed to mono and brought to 16 kHz; identical recordings left out."


def prepare_stamps(
    out: Path,
    division: Division,
    progress: Progress = lambda _what, _done, _of: None,
) -> Prepared:
    """Write `out`, or find it ready. The columns: audio, text, label (the category), group (the language).

    division: `natural`, a language each, and for more clients than languages a language divided by
    Dir(alpha) over the categories; `iid`, at random; `dirichlet`, Dir(alpha) over the categories.
    Raises `UserError` for arguments out of range, `out` in use, no soundfile, or a package that cannot be
    had.
    """
    if ready := find(out, "stamps", division.arguments, _SOURCES):
        return ready
    check_soundfile()  # before there is much to download
    training, held_out = split(read_recordings(fetch(_SOURCES, progress)[STAMPS.name], progress))
    clients, public = division.divide(training, lambda one: one.category, lambda one: one.language)
    return write(
        out,
        "stamps",
        division.arguments,
        _SOURCES,
        {name: [_row(one) for one in recordings] for name, recordings in clients.items()},
        {
            name: [_row(one) for one in recordings]
            for name, recordings in {"holdout": held_out, **public}.items()
        },
        _CHANGES,
        division.lacking(list(clients), MODALITIES),
    )


def split(recordings: Sequence[Recording]) -> tuple[list[Recording], list[Recording]]:
    """What clients train on, and the hold-out, in the same order."""
    first: dict[tuple[str, bytes], Recording] = {}
    for one in recordings:
        first.setdefault((one.language, one.wav), one)
    training = [one for one in first.values() if not _is_held_out(one)]
    known = {_name(one) for one in training}
    asked: dict[tuple[str, str], Recording] = {}
    for one in first.values():
        if _is_held_out(one) and _name(one) not in known:
            asked.setdefault(_name(one), one)
    return training, list(asked.values())


def _is_held_out(one: Recording) -> bool:
    return lot("name", _folded(one.english)) < HELD_OUT_NAMES


def _name(one: Recording) -> tuple[str, str]:
    return one.language, _folded(one.text)


def _folded(name: str) -> str:
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", name).casefold()))


def _row(one: Recording) -> Row:
    audio = f"audio/{one.language}-{one.stamp.replace('/', '-')}.wav"
    cells = {"audio": audio, "text": one.text, "label": one.category, "group": one.language}
    return Row(cells, {audio: one.wav})
