"""WAV files: the beginning of one as mono samples, and samples at another rate.

Rules: PCM of 8 to 32 bits and 32-bit or 64-bit floats, of any number of channels, whose mean is taken; the
extensible header too, which 24-bit files have and Python's `wave` reads from 3.12 on only. A file that ends
before its header says is refused, for a recording that was cut off is not what its label says. Only the
samples asked for are read.

Resampling: J. O. Smith, "Digital Audio Resampling", ccrma.stanford.edu/~jos/resample: a sinc under a Kaiser
window, as wide as the lower of the two rates wants it, so nothing folds back.
Next: `inputs/audio.py`, which makes log-mel frames of them.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float64]

CROSSINGS = 16  # of the sinc to each side
_ROLL_OFF = 0.945  # of the lower rate's band: the filter has to fall somewhere
_BETA = 9.0  # of the Kaiser window: 90 dB
_AT_ONCE = 1 << 18  # weights: bounds memory
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_MAX_CHANNELS = 64
_LOUDEST = 1e6  # of a float; 1 is full scale
_MAX_RATE_HZ = 1_000_000


def read_wav(path: Path, max_s: float) -> tuple[Samples, int]:
    """The first `max_s` seconds, float64 `[N]` from -1 to 1, and their rate in Hz.

    Raises `OSError`, and `ValueError` for what is no WAV file or one of another encoding.
    """
    with path.open("rb") as file:
        riff, _, wave = struct.unpack("<4sI4s", _exactly(file, 12))
        if (riff, wave) != (b"RIFF", b"WAVE"):
            raise ValueError("it is no WAV file")
        encoding = None
        while True:
            name, size = struct.unpack("<4sI", _exactly(file, 8))
            if name == b"data":
                break
            body = _exactly(file, min(size, 40)) if name == b"fmt " else b""
            if name == b"fmt ":
                encoding = _encoding(body)
            file.seek(size + size % 2 - len(body), os.SEEK_CUR)
        if encoding is None:
            raise ValueError("its samples come before their format")
        kind, channels, rate_hz, width = encoding
        if os.fstat(file.fileno()).st_size - file.tell() < size:
            raise ValueError("it is cut short")
        frames = min(size // (channels * width), math.ceil(max_s * rate_hz))
        content = _exactly(file, frames * channels * width)
    return _decoded(content, kind, width).reshape(frames, channels).mean(axis=1), rate_hz


def resampled(samples: Samples, rate_hz: int, to_hz: int) -> Samples:
    """Samples float64 `[N]` to `[ceil(N to_hz / rate_hz)]`, with silence beyond the ends."""
    if rate_hz == to_hz:
        return samples
    band = _ROLL_OFF * min(1.0, to_hz / rate_hz)
    reach = math.ceil(CROSSINGS / band)
    padded = np.concatenate([np.zeros(reach), samples, np.zeros(reach + 1)])
    taps = np.arange(1 - reach, reach + 1)
    made = np.empty(math.ceil(len(samples) * to_hz / rate_hz))
    step = max(1, _AT_ONCE // len(taps))
    for first in range(0, len(made), step):
        numbers = np.arange(first, min(first + step, len(made)))
        whole, part = np.divmod(numbers * rate_hz, to_hz)
        parts, which = np.unique(part, return_inverse=True)  # few, where the rates have much in common
        distance = parts[:, None] / to_hz - taps
        inside = np.clip(1 - (distance / reach) ** 2, 0, None)
        window = np.i0(_BETA * np.sqrt(inside)) / np.i0(_BETA)
        weights = band * np.sinc(band * distance) * window
        made[numbers] = (weights[which] * padded[whole[:, None] + taps + reach]).sum(axis=1)
    return made


def _exactly(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise ValueError("it is cut short")
    return content


def _encoding(chunk: bytes) -> tuple[int, int, int, int]:
    """PCM or float, channels, rate in Hz, bytes of a sample."""
    if len(chunk) < 16:
        raise ValueError("its format is cut short")
    kind, channels, rate_hz, _, align, bits = struct.unpack("<HHIIHH", chunk[:16])
    if kind == _EXTENSIBLE and len(chunk) >= 26:
        (kind,) = struct.unpack("<H", chunk[24:26])
    if not 1 <= channels <= _MAX_CHANNELS or not 1 <= rate_hz <= _MAX_RATE_HZ:
        raise ValueError(f"{channels} channels at {rate_hz} Hz")
    width = align // channels
    known = {_PCM: (1, 2, 3, 4), _FLOAT: (4, 8)}.get(kind, ())
    if width not in known or width * channels != align or not 0 < bits <= 8 * width:
        raise ValueError(f"its encoding {kind} with {bits} bits is neither PCM nor float")
    return kind, channels, rate_hz, width


def _decoded(content: bytes, kind: int, width: int) -> Samples:
    """Little-endian samples, from -1 to 1."""
    if kind == _FLOAT:
        samples = np.frombuffer(content, f"<f{width}")
        if not (np.abs(samples) < _LOUDEST).all():  # also of what is no number
            raise ValueError("it has samples that are no sound")
        return samples.astype(np.float64)
    if width == 1:
        return (np.frombuffer(content, np.uint8) - 128.0) / 128
    parts = np.frombuffer(content, np.uint8).reshape(-1, width)
    whole = np.zeros((len(parts), 4), np.uint8)
    whole[:, 4 - width :] = parts  # to the high bytes: the scale is the same for all widths
    return whole.view("<i4")[:, 0] / 2.0**31
