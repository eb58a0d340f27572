"""Models of several motion sensors that measure at the same time, such as a watch's, for both tasks.

Next: `models/registry.py`, the presets' sizes.
"""

from __future__ import annotations

from models.encoder import Stem
from models.model import Model, joined
from models.series import series_encoder
from wire.errors import UserError
from wire.manifest import Task


def motion(
    *,
    sensors: list[str],
    stds: list[float] | None = None,
    task: Task = "classification",
    classes: int = 0,
    length: int = 100,
    channels: int = 3,
    patch: int = 5,
    stem: Stem = "patch",
    masked: bool = False,
    width: int = 96,
    heads: int = 4,
    blocks: int = 4,
    embedding: int = 96,
) -> Model:
    """A transformer over time for each sensor, under one head.

    sensors: what the modalities are called. stds: the standard deviation of each one's values, in whatever
    unit the files have; None: 1. length, patch: steps. channels: of each sensor. masked: whether recordings
    may be shorter than `length`. embedding: the shared width. classes: for classification only.
    Raises `UserError` for numbers that do not fit together.
    """
    if not sensors or len(set(sensors)) != len(sensors):
        raise UserError(f"a motion model of the sensors {sensors}", 'name some: --option sensors=["imu"]')
    if stds is not None and len(stds) != len(sensors):
        raise UserError(f"{len(stds)} stds of {len(sensors)} sensors", "give one a sensor")
    encoders = {
        name: series_encoder(
            length=length,
            channels=channels,
            patch=patch,
            stem=stem,
            width=width,
            heads=heads,
            blocks=blocks,
            masked=masked,
            std=std,
        )
        for name, std in zip(sensors, stds or [1.0] * len(sensors), strict=True)
    }
    return joined(encoders, task, width, embedding, classes)
