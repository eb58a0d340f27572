"""Audio: a cell is a WAV file in the folder, an example is its log-mel frames, kept as a series' steps are.

Rules: frames are windows of `window_ms` (Hann) every `hop_ms`, none beyond the end; a sound shorter than a
window is filled up with silence. A mel's value is the logarithm of the power that its filter passes, in
units in which a sine of amplitude 1 peaks at 1/4, and of `FLOOR` at least. What is longer than `length`
frames is cut.

The mel scale and its triangular filters of height 1 are HTK's: 2595 log10(1 + f / 700), Young et al., "The
HTK Book", 5.4 and 5.6; from 0 to half the rate.
Options: `rate_hz`, to which a file is brought; `mels`; `window_ms`; `hop_ms`; `length`, frames; `mean` and
`std` of the logarithms; `patch`, frames of a token.
Next: `inputs/wav.py`, which reads the file; `inputs/series.py`, how frames are kept.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from inputs.readers import AnyArray, BundleFile, Unreadable
from inputs.series import Frames, whole
from inputs.wav import Samples, read_wav, resampled
from wire.errors import Malformed
from wire.manifest import Modality

FLOOR = 1e-10

Bank = npt.NDArray[np.float64]


class AudioReader(Frames):
    """Reads WAV files."""

    def __init__(self, modality: Modality, _file: BundleFile) -> None:
        super().__init__(modality, "mels")
        self._rate_hz = whole(modality, "rate_hz")
        self._window, self._hop = (
            _samples(modality, option, self._rate_hz) for option in ("window_ms", "hop_ms")
        )
        if self._window < 2:
            raise Malformed(f"a window of {self._window} sample has no spectrum")
        self._taper = np.hanning(self._window + 1)[:-1]
        self._size = 1 << (self._window - 1).bit_length()
        self._bank = mel_bank(self.channels, self._size, self._rate_hz) / self._taper.sum() ** 2
        if not self._bank.any(axis=0).all():
            raise Malformed(
                f"{self.channels} mels at {self._rate_hz} Hz are narrower than what a window of "
                f"{self._window} samples tells apart"
            )
        self._max_s = ((self.shape[0] - 1) * self._hop + self._window) / self._rate_hz

    def encode(self, folder: Path, cell: str) -> AnyArray:
        """Raises `Unreadable`: missing, not a WAV file, of another encoding, cut short or empty."""
        path = self.source(folder, cell)
        try:
            samples, rate_hz = read_wav(path, self._max_s)
        except FileNotFoundError:
            raise Unreadable(f"{cell} is missing", "copy it there, or remove the row") from None
        except (OSError, ValueError) as error:
            raise Unreadable(
                f"{cell} cannot be read: {error}", "save it as WAV (PCM), or remove the row"
            ) from error
        if not len(samples):
            raise Unreadable(f"{cell} holds no sound", "replace it, or remove the row")
        return self.filled(cell, self.frames(resampled(samples, rate_hz, self._rate_hz)))

    def frames(self, samples: Samples) -> Bank:
        """Log-mel values `[T, mels]` of samples `[N]` at `rate_hz`, not normalised."""
        if len(samples) < self._window:
            samples = np.pad(samples, (0, self._window - len(samples)))
        windows = np.lib.stride_tricks.sliding_window_view(samples, self._window)[:: self._hop]
        spectrum = np.fft.rfft(windows[: self.shape[0]] * self._taper, self._size)
        power = (spectrum.real**2 + spectrum.imag**2) @ self._bank
        logarithms: Bank = np.log(np.maximum(power, FLOOR))
        return logarithms


def mel_bank(mels: int, size: int, rate_hz: int) -> Bank:
    """Filters as columns, float64 `[size // 2 + 1, mels]`, for the power spectrum of `size` samples."""
    top = 2595 * np.log10(1 + rate_hz / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    bins = np.linspace(0, rate_hz / 2, size // 2 + 1)[:, None]
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    bank: Bank = np.maximum(0, np.minimum(rising, falling))
    return bank


def _samples(modality: Modality, option: str, rate_hz: int) -> int:
    """A duration in samples. Raises `Malformed`."""
    value = modality.options.get(option)
    if not isinstance(value, int | float) or not 0 < value <= 10_000 or round(value * rate_hz / 1000) < 1:
        raise Malformed(f"option {option} of {modality.kind} is {value!r}, not a duration in ms")
    return round(value * rate_hz / 1000)
