"""Models of several motion sensors that measure at the same time, such as a watch's, for both tasks.

Next: `models/registry.py`, the presets' sizes.
"""

from __future__ import annotations

from models.block import initialise
from models.heads import make_head
from models.model import Model
from models.series import series_encoder
from wire.errors import UserError
from wire.manifest import Task


def motion(
    *,
    sensors: dict[str, float],
    task: Task = "classification",
    classes: int = 0,
    length: int = 100,
    channels: int = 3,
    patch: int = 5,
    masked: bool = False,
    width: int = 96,
    heads: int = 4,
    blocks: int = 4,
    embedding: int = 96,
) -> Model:
    """A transformer over time for each sensor, under one head.

    sensors: modality -> the standard deviation of its values, in whatever unit the files have. length,
    patch: steps. channels: of each sensor. masked: whether recordings may be shorter than `length`.
    embedding: the shared width. classes: for classification only.
    Raises `UserError` for numbers that do not fit together.
    """
    if not sensors:
        raise UserError("a motion model without sensors", 'name some: --option sensors={"imu":1}')
    encoders = {
        name: series_encoder(
            length=length,
            channels=channels,
            patch=patch,
            width=width,
            heads=heads,
            blocks=blocks,
            masked=masked,
            std=std,
        )
        for name, std in sensors.items()
    }
    model = Model(encoders, make_head(task, dict.fromkeys(encoders, width), embedding, classes))
    initialise(model)
    return model
