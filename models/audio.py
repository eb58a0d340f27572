"""The audio encoder: log-mel frames in patches of time over the full band.

Berg, O'Connor, Cruz: "Keyword Transformer", arXiv 2104.00769, with mean pooling in the head instead of a
class token.
Next: `models/series.py`, the stem; `inputs/audio.py` makes the frames of a WAV file.
"""

from __future__ import annotations

from models.encoder import Encoder, Stem
from models.series import encoder_over_time
from wire.errors import UserError


def audio_encoder(
    *,
    rate_hz: int,
    mels: int,
    window_ms: float,
    hop_ms: float,
    length: int,
    patch: int,
    width: int,
    heads: int,
    blocks: int,
    stem: Stem = "patch",
    mean: float = -12.0,
    std: float = 4.0,
) -> Encoder:
    """A transformer over `length` log-mel frames, `patch` frames a token.

    mean, std: of the log-mel values; these are speech's at a usual loudness. Raises `UserError` for sizes
    that do not fit.
    """
    if rate_hz < 1 or not 0 < hop_ms <= window_ms:
        raise UserError(
            f"windows of {window_ms} ms every {hop_ms} ms at {rate_hz} Hz",
            "choose a hop of at most a window, such as 10 and 25 ms at 16000 Hz",
        )
    options = {
        "rate_hz": rate_hz,
        "mels": mels,
        "window_ms": float(window_ms),
        "hop_ms": float(hop_ms),
        "length": length,
        "patch": patch,
        "mean": mean,
        "std": std,
    }
    return encoder_over_time("audio", length, mels, patch, width, heads, blocks, stem, options)
