"""Models of an image and a series, such as the frames of a sound, for both tasks.

Next: `models/registry.py`, the presets' sizes.
"""

from __future__ import annotations

from models.encoder import Stem
from models.image import image_encoder
from models.model import Model, joined
from models.series import series_encoder
from wire.manifest import Task


def image_series(
    *,
    task: Task = "classification",
    classes: int = 0,
    size: int = 28,
    patch: int = 7,
    stem: Stem = "patch",
    image_mean: float = 0.5,
    image_std: float = 0.5,
    series: str = "audio",
    length: int = 32,
    channels: int = 13,
    series_patch: int = 2,
    series_stem: Stem = "patch",
    series_mean: float | list[float] = 0.0,
    series_std: float | list[float] = 1.0,
    width: int = 96,
    heads: int = 4,
    image_blocks: int = 4,
    series_blocks: int = 4,
    embedding: int = 96,
) -> Model:
    """A ViT and a transformer over time of equal width under one head.

    size, patch: pixels. stem, image_mean, image_std: the image's, of values from 0 to 1. series: what the
    modality is called. length, series_patch: steps. series_stem, series_mean, series_std: the series'.
    embedding: the shared width. classes: for classification only.
    Raises `UserError` for numbers that do not fit together.
    """
    encoders = {
        "image": image_encoder(
            size=size,
            patch=patch,
            width=width,
            heads=heads,
            blocks=image_blocks,
            stem=stem,
            mean=image_mean,
            std=image_std,
        ),
        series: series_encoder(
            length=length,
            channels=channels,
            patch=series_patch,
            stem=series_stem,
            width=width,
            heads=heads,
            blocks=series_blocks,
            mean=series_mean,
            std=series_std,
        ),
    }
    return joined(encoders, task, width, embedding, classes)
