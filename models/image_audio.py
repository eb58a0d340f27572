"""Models of an image and a sound (a WAV file), for both tasks.

Next: `models/registry.py`, the presets' sizes.
"""

from __future__ import annotations

from models.audio import audio_encoder
from models.encoder import Stem
from models.image import image_encoder
from models.model import Model, joined
from wire.manifest import Task


def image_audio(
    *,
    task: Task = "contrastive",
    classes: int = 0,
    size: int = 32,
    patch: int = 8,
    stem: Stem = "conv",
    rate_hz: int = 16000,
    mels: int = 40,
    window_ms: float = 25.0,
    hop_ms: float = 10.0,
    length: int = 200,
    audio_patch: int = 5,
    width: int = 128,
    heads: int = 4,
    image_blocks: int = 4,
    audio_blocks: int = 4,
    embedding: int = 128,
) -> Model:
    """A ViT and a Keyword Transformer of equal width under one head.

    size, patch: pixels. stem: the image's. length, audio_patch: log-mel frames. embedding: the shared
    width. classes: for classification only. Raises `UserError` for numbers that do not fit together.
    """
    encoders = {
        "image": image_encoder(
            size=size, patch=patch, width=width, heads=heads, blocks=image_blocks, stem=stem
        ),
        "audio": audio_encoder(
            rate_hz=rate_hz,
            mels=mels,
            window_ms=window_ms,
            hop_ms=hop_ms,
            length=length,
            patch=audio_patch,
            width=width,
            heads=heads,
            blocks=audio_blocks,
        ),
    }
    return joined(encoders, task, width, embedding, classes)
