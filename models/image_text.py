"""The image-text models of the presets, for both tasks.

Next: `models/registry.py`, the presets' sizes.
"""

from __future__ import annotations

from models.encoder import Stem
from models.image import image_encoder
from models.model import Model, joined
from models.text import text_encoder
from wire.manifest import Task


def image_text(
    *,
    task: Task = "contrastive",
    classes: int = 0,
    size: int = 32,
    patch: int = 4,
    stem: Stem = "patch",
    width: int = 128,
    heads: int = 4,
    image_blocks: int = 4,
    text_blocks: int = 4,
    vocabulary: int = 2048,
    length: int = 32,
    embedding: int = 128,
) -> Model:
    """A ViT and a text transformer of equal width under one head.

    size, patch: pixels. stem: the image's. vocabulary, length: of the tokens. embedding: the shared width.
    classes: for classification only. Raises `UserError` for numbers that do not fit together.
    """
    encoders = {
        "image": image_encoder(
            size=size, patch=patch, width=width, heads=heads, blocks=image_blocks, stem=stem
        ),
        "text": text_encoder(
            vocabulary=vocabulary, length=length, width=width, heads=heads, blocks=text_blocks
        ),
    }
    return joined(encoders, task, width, embedding, classes)
