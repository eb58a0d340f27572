"""Emoji in seven drawing styles, each picture with its name and keywords: image-text pairs.

Rules:
- A picture that is identical to an earlier one, of any style, is dropped, and so is an empty one.
- `holdout`: a fifth of the *families*, whose concepts nobody trains on. A family is a label without man,
  woman, person and their like, so nobody has seen the man running who is asked for the woman running.
- `renderings`: a tenth of the other pictures, whose concept is trained on in another style in use.
- Both are chosen by a hash of the name and not by the seed: all runs are measured on the same.
- The styles in use are the first of `STYLES`, as many as clients, whatever the partition: partitions among
  as many clients share their examples and hold-outs, and can be compared.

Next: `lamina/data/partition.py` for the clients, `lamina/data/folder.py` for what is written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lamina.data.division import Division
from lamina.data.emoji_sources import NAMES, STYLES, Concept, Style, read_concepts, render
from lamina.data.folder import Prepared, Row, find, write
from lamina.data.partition import lot
from lamina.data.registry import Progress, counted, fetch
from wire.errors import UserError

MODALITIES = ("image", "text")
HELD_OUT_FAMILIES = 0.2
HELD_OUT_RENDERINGS = 0.1
_EMPTY_SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>'
_PEOPLE = re.compile(
    r"\b(man|woman|person|men|women|people|boy|girl|child|adult|old|older|and|mrs|mx|santa)\b|[^\w\s]"
)
_CHANGES = "Changed: drawn at {size_px} pixels on white; identical and empty pictures left out."


@dataclass(frozen=True)
class _Picture:
    style: str
    concept: Concept
    png: bytes

    def row(self) -> Row:
        image = f"images/{self.style}-{self.concept.hexcode.lower()}.png"
        cells = {
            "image": image,
            "text": self.concept.text,
            "label": self.concept.group,
            "group": self.style,
        }
        return Row(cells, {image: self.png})


def prepare_emoji(
    out: Path,
    division: Division,
    size_px: int = 64,
    progress: Progress = lambda _what, _done, _of: None,
) -> Prepared:
    """Write `out`, or find it ready. The columns are image, text, label and group (the style).

    division: `natural`, a style each, and for more clients than styles a style divided by Dir(alpha)
    over the labels; `iid`, at random; `dirichlet`, Dir(alpha) over the labels.
    Raises `UserError` for arguments out of range, `out` in use, or packages that cannot be had.
    """
    if division.clients < 1 or not 8 <= size_px <= 512:
        raise UserError(
            f"{division.clients} clients, {size_px} pixels", "take at least one client and 8 to 512 pixels"
        )
    packages = dict(list(STYLES.items())[: division.clients])
    sources = (*packages.values(), NAMES)
    arguments = division.arguments | {"size_px": size_px}
    if ready := find(out, "emoji", arguments, sources):
        return ready
    archives = fetch(sources, progress)
    concepts = read_concepts(archives[NAMES.name])
    styles = {name: Style(archives[package.name], concepts) for name, package in packages.items()}
    training, held_out = _split(_draw(styles, concepts, size_px, progress))
    clients, public = division.divide(training, lambda one: one.concept.group, lambda one: one.style)
    held_out |= public
    return write(
        out,
        "emoji",
        arguments,
        sources,
        {name: [picture.row() for picture in pictures] for name, pictures in clients.items()},
        {name: [picture.row() for picture in pictures] for name, pictures in held_out.items() if pictures},
        _CHANGES.format(size_px=size_px),
        division.lacking(list(clients), MODALITIES),
    )


def family(label: str) -> str:
    """A label without who it is: `woman walking: facing right` is of the family `walking`."""
    whole = re.sub(r"\bmer(man|maid|person)\b", "merperson", label.lower())
    for part in whole.split(":"):
        if words := " ".join(_PEOPLE.sub(" ", part).split()):
            return words
    return "person"


def _draw(
    styles: dict[str, Style], concepts: Sequence[Concept], size_px: int, progress: Progress
) -> list[_Picture]:
    """Every picture once, styles in order."""
    todo = [
        (name, concept)
        for name, style in styles.items()
        for concept in concepts
        if concept.hexcode in style.names
    ]
    seen = {render(_EMPTY_SVG, size_px)}
    pictures: list[_Picture] = []
    for name, concept in counted("drawing", todo, progress):
        png = styles[name].draw(concept.hexcode, size_px)
        if png not in seen:
            seen.add(png)
            pictures.append(_Picture(name, concept, png))
    return pictures


def _split(pictures: Sequence[_Picture]) -> tuple[list[_Picture], dict[str, list[_Picture]]]:
    """What clients train on, and the two held-out sets."""
    holdout: list[_Picture] = []
    known: list[_Picture] = []
    for picture in pictures:
        unseen = lot("family", family(picture.concept.label)) < HELD_OUT_FAMILIES
        (holdout if unseen else known).append(picture)
    left = Counter(p.concept.hexcode for p in known)
    training: list[_Picture] = []
    renderings: list[_Picture] = []
    for picture in known:
        hexcode = picture.concept.hexcode
        if left[hexcode] > 1 and lot(picture.style, hexcode) < HELD_OUT_RENDERINGS:
            left[hexcode] -= 1
            renderings.append(picture)
        else:
            training.append(picture)
    return training, {"holdout": holdout, "renderings": renderings}
