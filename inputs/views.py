"""Views: the same picture a little moved, scaled and coloured, to train on in its place.

Rules: a view is a function of the picture and of a seed of whole numbers, the same on every machine; so it
need not be kept, and features that were made of it belong to it. White stays white, inside the picture and
where it is moved away: readers pad with it. Nothing is mirrored: arrows and letters have a direction.

Random resized crops and colour jitter as in SimCLR, arXiv 2002.05709, Appendix A, milder.
Next: `inputs/image.py`, whose pictures these are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

ZOOM = 0.2  # a side becomes so much larger or smaller at most
STRETCH = 0.06  # one side against the other
SHIFT = 0.08  # of a side
TINT = 0.15  # of a channel's distance from white

_WHITE = (255, 255, 255)

Picture = npt.NDArray[np.uint8]


def view(picture: Picture, seed: Sequence[int]) -> Picture:
    """uint8 `[3, H, W]` to the same."""
    # Of a generator's methods this one gives the same numbers in every version of numpy.
    drawn = 2 * np.random.default_rng(seed).random(7) - 1
    zoom, stretch = (1 + ZOOM) ** drawn[0], (1 + STRETCH) ** drawn[1]
    return _tinted(_moved(picture, (zoom * stretch, zoom / stretch), SHIFT * drawn[2:4]), TINT * drawn[4:7])


def _moved(picture: Picture, scale: tuple[float, float], shift: npt.NDArray[np.float64]) -> Picture:
    """Scaled about its middle, then shifted by shares of a side: (across, down)."""
    height, width = picture.shape[1:]
    # Where each pixel comes from: x' = a x + b y + c, y' = d x + e y + f.
    a, e = 1 / scale[0], 1 / scale[1]
    c = width * (1 - a * (1 + 2 * shift[0])) / 2
    f = height * (1 - e * (1 + 2 * shift[1])) / 2
    image = Image.fromarray(picture.transpose(1, 2, 0))
    moved = image.transform(
        (width, height),
        Image.Transform.AFFINE,
        (a, 0.0, c, 0.0, e, f),
        Image.Resampling.BILINEAR,
        fillcolor=_WHITE,
    )
    pixels: Picture = np.asarray(moved).transpose(2, 0, 1)
    return pixels


def _tinted(picture: Picture, change: npt.NDArray[np.float64]) -> Picture:
    """Each channel's distance from white, made larger or smaller by its share of `change`."""
    ink = (255 - picture).astype(np.float32) * (1 + change.astype(np.float32)).reshape(3, 1, 1)
    tinted: Picture = 255 - np.rint(ink).clip(0, 255).astype(np.uint8)
    return tinted
