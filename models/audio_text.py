"""Models of a sound (a WAV file) and a text, for both tasks.

Next: `models/registry.py`, the presets' sizes.
"""

from __future__ import annotations

from models.audio import audio_encoder
from models.model import Model, joined
from models.text import text_encoder
from wire.manifest import Task


def audio_text(
    *,
    task: Task = "contrastive",
    classes: int = 0,
    rate_hz: int = 16000,
    mels: int = 40,
    window_ms: float = 25.0,
    hop_ms: float = 10.0,
    length: int = 200,
    audio_patch: int = 5,
    vocabulary: int = 2048,
    text_length: int = 32,
    width: int = 128,
    heads: int = 4,
    audio_blocks: int = 4,
    text_blocks: int = 4,
    embedding: int = 128,
) -> Model:
    """A Keyword Transformer and a text transformer of equal width under one head.

    length, audio_patch: log-mel frames. vocabulary, text_length: of the tokens. embedding: the shared
    width. classes: for classification only.
    Raises `UserError` for numbers that do not fit together.
    """
    encoders = {
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
        "text": text_encoder(
            vocabulary=vocabulary, length=text_length, width=width, heads=heads, blocks=text_blocks
        ),
    }
    return joined(encoders, task, width, embedding, classes)
