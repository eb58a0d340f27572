"""How the digits are spoilt, as AV-MNIST does it, so that a model needs both to read one.

Rules: what is fitted is fitted on training examples. Noise is drawn by the example's name with numpy's
legacy generator, whose numbers never change. A noisy pixel may leave 0 to 1: `as_png` maps `LOWEST` to
`HIGHEST`, which noise does not leave, onto 0 to 255 by one linear function for all pictures. Nothing is
clipped, and a model gets the value back as `byte / 255 * (HIGHEST - LOWEST) + LOWEST`.

Next: `lamina/data/digits.py`.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

KEPT_VARIANCE = 0.25
PICTURE_NOISE = 0.3
RECORDING_NOISE = 1.5
LOWEST, HIGHEST = -2.0, 3.0

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Damage:
    """mean: [784]. components: [K, 784], orthonormal. frame_mean, frame_std: [13], of an MFCC frame."""

    mean: Array
    components: Array
    frame_mean: Array
    frame_std: Array

    @classmethod
    def fit(cls, pictures: Sequence[Array], recordings: Sequence[Array]) -> Damage:
        """The fewest principal components that hold `KEPT_VARIANCE`, and the frames' mean and deviation."""
        stacked = np.stack(pictures)
        mean = stacked.mean(axis=0)
        _, values, components = np.linalg.svd(stacked - mean, full_matrices=False)
        held = np.cumsum(values**2) / np.sum(values**2)
        kept = int(np.searchsorted(held, KEPT_VARIANCE)) + 1
        frames = np.concatenate(recordings)
        return cls(mean, components[:kept], frames.mean(axis=0), frames.std(axis=0))

    def picture(self, pixels: Array, name: str) -> Array:
        """Pixels, float [784] from 0 to 1, to the same, beyond these."""
        reduced: Array = self.mean + (pixels - self.mean) @ self.components.T @ self.components
        return reduced + PICTURE_NOISE * _noise(f"picture/{name}", pixels.shape)

    def recording(self, frames: Array, name: str) -> Array:
        """MFCCs, float [frames, 13], to the same, of mean 0 and variance 1 + `RECORDING_NOISE`²."""
        standard = (frames - self.frame_mean) / self.frame_std
        return standard + RECORDING_NOISE * _noise(f"recording/{name}", frames.shape)


def as_png(pixels: Array) -> bytes:
    """A square picture of 8 bits a pixel. pixels: float [784] from `LOWEST` to `HIGHEST`."""
    assert pixels.min() >= LOWEST
    assert pixels.max() <= HIGHEST
    levels = np.rint(255 * (pixels - LOWEST) / (HIGHEST - LOWEST)).astype(np.uint8)
    side = int(np.sqrt(pixels.size))
    file = io.BytesIO()
    Image.fromarray(levels.reshape(side, side)).save(file, "PNG")
    return file.getvalue()


def _noise(name: str, shape: tuple[int, ...]) -> Array:
    """From N(0, 1)."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
