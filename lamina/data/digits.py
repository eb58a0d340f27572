"""Spoken and written digits, both spoilt so that each alone is not enough: image-audio classification.

Rules:
- An example is a recording and a picture of the same digit. They were never made together: they are paired
  by class, as in AV-MNIST (Vielzeuf et al., "CentralNet", arXiv 1808.07275). No recording and no picture is
  in two examples.
- Clean, a model reads the digit off either. The pictures keep a quarter of their variance and get noise;
  the recordings, MFCC frames, are standardised and get more noise. `Damage` is fitted on all that may be
  trained on, whatever `examples` says, and its noise does not follow the seed.
- `holdout`: a third of the recordings of each digit, chosen by a hash of the name and not by the seed: all
  runs are measured on the same.
- The packages do not say who speaks, so no client can be a speaker.

Next: `lamina/data/digits_sources.py`, the packages; `lamina/data/damage.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lamina.data.damage import Array, Damage, as_png
from lamina.data.digits_sources import PICTURES, RECORDINGS, read_pictures, read_recordings
from lamina.data.division import Division
from lamina.data.folder import Prepared, Row, as_npy, find, write
from lamina.data.partition import lot
from lamina.data.registry import Progress, fetch
from wire.errors import UserError

MODALITIES = ("image", "audio")
HELD_OUT = 1 / 3
NUM_TRAINING = 2000
_SOURCES = (PICTURES, RECORDINGS)
_CHANGES = (
    "Changed: pictures and recordings of the same digit put together; pictures reduced to their principal "
    "components, with noise; MFCC frames standardised, with noise."
)


@dataclass(frozen=True)
class _Pair:
    """picture: float [784], from 0 to 1. recording: float [frames, 13]. name: of both files."""

    digit: str
    name: str
    picture: Array
    recording: Array


def prepare_digits(
    out: Path,
    division: Division,
    examples: int = NUM_TRAINING,
    progress: Progress = lambda _what, _done, _of: None,
) -> Prepared:
    """Write `out`, or find it ready. The columns are image, audio, label (the digit) and group (all).

    division: `iid`, at random; `dirichlet`, Dir(alpha) over the digits. examples: to train on, a tenth of
    them of each digit.
    Raises `UserError` for arguments out of range, `out` in use, or packages that cannot be had.
    """
    if division.partition == "natural":
        raise UserError("the digits do not tell who speaks", "choose --partition iid or dirichlet")
    if examples < 10 or examples % 10:
        raise UserError(f"{examples} examples of ten digits", "take a multiple of 10")
    arguments = division.arguments | {"examples": examples}
    if ready := find(out, "digits", arguments, _SOURCES):
        return ready
    archives = fetch(_SOURCES, progress)
    training, held_out = _pairs(
        read_pictures(archives[PICTURES.name]), read_recordings(archives[RECORDINGS.name])
    )
    damage = Damage.fit([pair.picture for pair in training], [pair.recording for pair in training])
    chosen = _first_of_each(training, examples)
    clients, public = division.divide(chosen, lambda pair: pair.digit, lambda pair: pair.digit)
    return write(
        out,
        "digits",
        arguments,
        _SOURCES,
        _rows(clients, damage),
        _rows({"holdout": held_out, **public}, damage),
        _CHANGES,
        division.lacking(list(clients), MODALITIES),
    )


def _pairs(
    pictures: Sequence[Sequence[Array]], recordings: Sequence[Sequence[Array]]
) -> tuple[list[_Pair], list[_Pair]]:
    """What may be trained on, in the order in which it comes into use, and the hold-out.

    Both are put in an order by the hash of their names, each kind its own, and then joined one to one.
    """
    training: list[_Pair] = []
    held_out: list[_Pair] = []
    for digit in range(10):
        spoken = _shuffled(f"recording/{digit}", recordings[digit])
        drawn = _shuffled(f"picture/{digit}", pictures[digit])
        pairs = [
            _Pair(str(digit), f"{digit}-{place:03}", picture, recording)
            for place, (picture, recording) in enumerate(zip(drawn, spoken, strict=False))
        ]
        cut = round(HELD_OUT * len(pairs))
        held_out += pairs[:cut]
        training += pairs[cut:]
    return training, held_out


def _shuffled(kind: str, items: Sequence[Array]) -> list[Array]:
    order = sorted(range(len(items)), key=lambda place: lot(kind, str(place)))
    return [items[place] for place in order]


def _first_of_each(training: Sequence[_Pair], examples: int) -> list[_Pair]:
    """`examples / 10` of each digit. Raises `UserError` where there are not as many."""
    chosen: list[_Pair] = []
    for digit in range(10):
        of_digit = [pair for pair in training if pair.digit == str(digit)]
        if len(of_digit) < examples // 10:
            raise UserError(f"{examples} examples, of {len(training)} there are", "take fewer")
        chosen += of_digit[: examples // 10]
    return chosen


def _rows(pairs: Mapping[str, Sequence[_Pair]], damage: Damage) -> dict[str, list[Row]]:
    return {name: [_row(pair, damage) for pair in some] for name, some in pairs.items()}


def _row(pair: _Pair, damage: Damage) -> Row:
    image, audio = f"images/{pair.name}.png", f"audio/{pair.name}.npy"
    files = {
        image: as_png(damage.picture(pair.picture, pair.name)),
        audio: as_npy(damage.recording(pair.recording, pair.name)),
    }
    return Row({"image": image, "audio": audio, "label": pair.digit, "group": "all"}, files)
