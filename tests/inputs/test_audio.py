"""WAV files: every encoding gives the same samples, any rate the same frames, and mels are as defined."""

from __future__ import annotations

import math
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from inputs.audio import FLOOR, AudioReader, mel_bank
from inputs.readers import Unreadable
from inputs.wav import read_wav, resampled
from models.audio import audio_encoder
from wire.errors import Malformed
from wire.manifest import Modality, TensorSpec

RATE, MELS, LENGTH, PATCH = 8000, 12, 20, 5
WINDOW, HOP = 200, 80  # samples

Array = npt.NDArray[np.float64]


def sine(hz: float, seconds: float = 0.5, rate: int = RATE, amplitude: float = 0.5) -> Array:
    return amplitude * np.sin(2 * math.pi * hz * np.arange(round(seconds * rate)) / rate)


def pcm(samples: Array, width: int) -> bytes:
    """Little-endian; unsigned where a sample is one byte."""
    whole = np.rint(samples * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    if width == 1:
        return (whole + 128).astype(np.uint8).tobytes()
    return b"".join(int(value).to_bytes(width, "little", signed=True) for value in whole.ravel())


def write(path: Path, samples: Array, width: int = 2, rate: int = RATE) -> Path:
    """By the standard library; samples: `[N]` or `[N, channels]`."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(pcm(samples, width))
    return path


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(name + struct.pack("<I", len(c)) + c + b"\0" * (len(c) % 2) for name, c in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def form(kind: int = 1, channels: int = 1, rate: int = RATE, width: int = 2, more: bytes = b"") -> bytes:
    align = channels * width
    return struct.pack("<HHIIHH", kind, channels, rate, rate * align, align, 8 * width) + more


def modality(**options: Any) -> Modality:
    inputs = {
        "audio": TensorSpec((LENGTH, MELS), "float32"),
        "audio_mask": TensorSpec((LENGTH // PATCH,), "float32"),
    }
    given = {"rate_hz": RATE, "mels": MELS, "window_ms": 25.0, "hop_ms": 10.0, "length": LENGTH}
    given |= {"patch": PATCH} | options
    return Modality("audio", inputs, {name: value for name, value in given.items() if value is not None})


def read(path: Path, **options: Any) -> dict[str, npt.NDArray[Any]]:
    reader = AudioReader(modality(**options), Path)
    return reader.decode(reader.encode(path.parent, path.name)[None])


def complaint(path: Path) -> str:
    with pytest.raises(Unreadable) as caught:
        read(path)
    assert caught.value.hint
    assert "\n" not in f"{caught.value}{caught.value.hint}"
    return str(caught.value)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_samples_of_every_width(tmp_path: Path, width: int, channels: int) -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, (300, channels))
    found, rate = read_wav(write(tmp_path / "a.wav", samples, width, 44100), 1)
    assert rate == 44100
    assert found.shape == (300,)
    assert np.abs(found - samples.mean(axis=1)).max() < 2.0 ** (2 - 8 * width)


def test_headers_that_the_standard_library_does_not_write(tmp_path: Path) -> None:
    samples, path = sine(440), tmp_path / "a.wav"
    extensible = struct.pack("<HHI", 22, 24, 4) + struct.pack("<H", 1) + bytes(14)
    files = {
        "extensible": riff((b"fmt ", form(0xFFFE, width=3, more=extensible)), (b"data", pcm(samples, 3))),
        "float": riff((b"fmt ", form(3, width=4)), (b"data", samples.astype("<f4").tobytes())),
        "double": riff((b"fmt ", form(3, width=8)), (b"data", samples.astype("<f8").tobytes())),
        "more": riff(
            (b"LIST", b"odd"),
            (b"fmt ", form()),
            (b"fact", b"1234"),
            (b"data", pcm(samples, 2)),
            (b"id3 ", b"x"),
        ),
    }
    for name, content in files.items():
        path.write_bytes(content)
        assert np.abs(read_wav(path, 1)[0] - samples).max() < 1e-4, name


def test_only_the_beginning_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", sine(440, 3))
    assert len(read_wav(path, 0.5)[0]) == RATE // 2
    assert len(read_wav(path, 60)[0]) == 3 * RATE


@pytest.mark.parametrize("rate", [4000, 11025, 16000, 44100, 48000])
@pytest.mark.parametrize("to", [8000, 16000])
def test_a_sine_is_the_same_at_another_rate(rate: int, to: int) -> None:
    hz, edge = 0.35 * min(rate, to), 0.01
    found = resampled(sine(hz, 0.3, rate), rate, to)
    assert len(found) == math.ceil(round(0.3 * rate) * to / rate)
    inside = slice(round(edge * to), -round(edge * to))
    assert np.abs(found - sine(hz, len(found) / to, to))[inside].max() < 1e-3


def test_what_the_new_rate_cannot_hold_does_not_fold_back() -> None:
    for hz in (4600, 6000, 15000):
        found = resampled(sine(hz, 0.3, 44100), 44100, 8000)
        assert np.abs(found[100:-100]).max() < 1e-3, hz


def test_the_same_sound_at_another_rate_gives_the_same_frames(tmp_path: Path) -> None:
    """Of tones in the lower part of the band, which every rate holds."""

    def chord(rate: int) -> Array:
        return sum((sine(hz, 0.5, rate, 0.2) for hz in (300, 750, 1900)), np.zeros(rate // 2))

    one = read(write(tmp_path / "a.wav", chord(RATE), 4))["audio"][0]
    for rate in (16000, 22050, 48000):
        other = read(write(tmp_path / "b.wav", chord(rate), 4, rate))["audio"][0]
        loud = one > one.max() - 8  # quieter mels hold what leaks from the window, and the edges
        assert np.abs(other - one)[loud].max() < 0.05


def hz_to_mel(hz: float) -> float:
    return 2595 * math.log10(1 + hz / 700)


def plain_filter(mel: int, mels: int, hz: float, rate: int) -> float:
    """The height of a triangular filter at a frequency, from the definition."""
    step = hz_to_mel(rate / 2) / (mels + 1)
    low, middle, high = (700 * (10 ** (step * (mel + corner) / 2595) - 1) for corner in (0, 1, 2))
    if low < hz <= middle:
        return (hz - low) / (middle - low)
    return (high - hz) / (high - middle) if middle < hz < high else 0.0


def plain_log_mel(samples: Array) -> Array:
    """Frames by the definition: a discrete Fourier transform written out, filters one by one."""
    size = 256
    hann = np.array([0.5 - 0.5 * math.cos(2 * math.pi * n / WINDOW) for n in range(WINDOW)])
    places = np.arange(WINDOW)
    frames: list[list[float]] = []
    for first in range(0, len(samples) - WINDOW + 1, HOP):
        windowed = samples[first : first + WINDOW] * hann
        power = []
        for number in range(size // 2 + 1):
            wave_ = np.exp(-2j * math.pi * number * places / size)
            power.append(abs(complex((windowed * wave_).sum())) ** 2 / hann.sum() ** 2)
        frames.append([])
        for mel in range(MELS):
            heights = [plain_filter(mel, MELS, number * RATE / size, RATE) for number in range(len(power))]
            passed = sum(value * height for value, height in zip(power, heights, strict=True))
            frames[-1].append(math.log(max(FLOOR, passed)))
    return np.array(frames)


def test_frames_are_as_defined() -> None:
    generator = np.random.default_rng(0)
    samples = sine(700, 0.15) + 0.01 * generator.standard_normal(round(0.15 * RATE))
    found = AudioReader(modality(), Path).frames(samples)
    expected = plain_log_mel(samples)
    assert found.shape == expected.shape == (1 + (len(samples) - WINDOW) // HOP, MELS)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_the_filters_are_htks() -> None:
    """1000 Hz is 1000 mel; neighbours cross at half their height in between, and no bin counts twice."""
    assert abs(hz_to_mel(1000) - 1000) < 0.1
    bank = mel_bank(40, 512, 16000)
    for mel in (0, 7, 20, 39):
        plain = [plain_filter(mel, 40, number * 16000 / 512, 16000) for number in range(257)]
        np.testing.assert_allclose(bank[:, mel], plain, atol=1e-9)
    middle = bank.sum(axis=1)[5:230]
    np.testing.assert_allclose(middle, 1, atol=1e-9)


@pytest.mark.parametrize("hz", [250, 900, 2500])
def test_a_tone_is_in_its_mel(tmp_path: Path, hz: float) -> None:
    frames = read(write(tmp_path / "a.wav", sine(hz)))["audio"][0]
    step = hz_to_mel(RATE / 2) / (MELS + 1)
    below = math.floor(hz_to_mel(hz) / step) - 1
    assert set(frames.argmax(axis=1)) <= {below, below + 1}


def test_the_value_of_a_loud_tone() -> None:
    """Power 1/4 at the peak of a filter, and what the window spreads to the bins beside it."""
    value = AudioReader(modality(), Path).frames(sine(1000, amplitude=1.0)).max()
    assert math.log(0.25 * 0.5) < value < math.log(0.25 * 3)


def test_values_are_normalised_cut_padded_and_masked(tmp_path: Path) -> None:
    samples = sine(700, 0.1)  # 7 whole windows of 25 ms every 10 ms are 85 ms; the 8th is whole too
    batch = read(write(tmp_path / "a.wav", samples, 4), mean=-10.0, std=2.0)
    expected = (plain_log_mel(samples) + 10) / 2
    assert len(expected) == 8
    np.testing.assert_allclose(batch["audio"][0, :8], expected, rtol=1e-2, atol=1e-2)
    assert not batch["audio"][0, 8:].any()
    assert batch["audio_mask"].tolist() == [[1, 1, 0, 0]]
    long = read(write(tmp_path / "b.wav", sine(700, 2.0)))
    assert long["audio_mask"].tolist() == [[1, 1, 1, 1]]
    np.testing.assert_allclose(long["audio"][0, -1], long["audio"][0, 0], atol=0.5)


def test_the_last_frame_of_a_longer_file_is_whole(tmp_path: Path) -> None:
    """Only the beginning is read, and the window ends in zeros: no frame hears where reading stopped."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(44100)
    found = read(write(tmp_path / "a.wav", noise, rate=44100))["audio"][0, -1]
    whole = resampled(read_wav(tmp_path / "a.wav", 9)[0], 44100, RATE)
    everything = AudioReader(modality(), Path).frames(whole)
    np.testing.assert_allclose(found, everything[LENGTH - 1], rtol=1e-3)


def test_a_sound_shorter_than_a_window_is_one_frame(tmp_path: Path) -> None:
    batch = read(write(tmp_path / "a.wav", sine(700, 0.005)))
    assert batch["audio_mask"].tolist() == [[1, 0, 0, 0]]
    assert batch["audio"][0, 0].any()
    assert not batch["audio"][0, 1:].any()


def test_silence_is_the_floor(tmp_path: Path) -> None:
    frames = read(write(tmp_path / "a.wav", np.zeros(RATE)))["audio"]
    np.testing.assert_allclose(frames, math.log(FLOOR), rtol=1e-3)


def test_bad_files(tmp_path: Path) -> None:
    good, path = riff((b"fmt ", form()), (b"data", pcm(sine(440), 2))), tmp_path / "a.wav"
    not_numbers = np.full(100, np.nan, "<f4").tobytes()
    for content, told in (
        (b"", "cut short"),
        (b"ID3\x04 not a wave file at all", "no WAV file"),
        (good[:3], "cut short"),
        (good[:20], "cut short"),
        (good[:40], "cut short"),
        (good[:-1], "cut short"),
        (riff((b"fmt ", form())), "cut short"),
        (riff((b"data", b"1234")), "before their format"),
        (riff((b"fmt ", form()[:10]), (b"data", b"")), "format is cut short"),
        (riff((b"fmt ", form()), (b"data", b"")), "holds no sound"),
        (riff((b"fmt ", form(85)), (b"data", b"1234")), "neither PCM nor float"),
        (riff((b"fmt ", form(channels=0)), (b"data", b"1234")), "0 channels"),
        (riff((b"fmt ", form(rate=0)), (b"data", b"1234")), "0 Hz"),
        (riff((b"fmt ", form(width=5)), (b"data", b"12345")), "neither PCM nor float"),
        (riff((b"fmt ", form(3, width=4)), (b"data", not_numbers)), "are no sound"),
        (riff((b"fmt ", form(3, width=8)), (b"data", np.full(9, 1e300).tobytes())), "are no sound"),
    ):
        path.write_bytes(content)
        assert told in complaint(path), content[:60]
    path.unlink()
    assert complaint(path) == "a.wav is missing"
    path.mkdir()
    assert "cannot be read" in complaint(path)


@pytest.mark.parametrize("cell", ["../a.wav", "/etc/hostname", "x/../../a.wav"])
def test_a_path_that_leaves_the_folder(tmp_path: Path, cell: str) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "a.wav", sine(440))
    with pytest.raises(Unreadable, match="outside the folder"):
        AudioReader(modality(), Path).encode(tmp_path / "in", cell)


@pytest.mark.parametrize(
    "options",
    [
        {"rate_hz": 0},
        {"mels": None},
        {"mels": MELS + 1},
        {"window_ms": None},
        {"window_ms": 0},
        {"window_ms": 0.1},
        {"hop_ms": "short"},
        {"hop_ms": 0.01},
        {"length": LENGTH - 1},
        {"patch": 3},
        {"std": 0.0},
        {"window_ms": 2.0},  # 16 samples do not tell 12 mels apart
    ],
)
def test_options_that_contradict_themselves(options: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        AudioReader(modality(**options), Path)


def test_the_encoder_asks_for_what_the_reader_makes(tmp_path: Path) -> None:
    encoder = audio_encoder(
        rate_hz=RATE, mels=MELS, window_ms=25, hop_ms=10, length=10, patch=2, width=8, heads=2, blocks=1
    )
    asked = encoder.modality("audio")
    reader = AudioReader(asked, Path)
    write(tmp_path / "a.wav", sine(440, 0.055))
    batch = reader.decode(reader.encode(tmp_path, "a.wav")[None])
    assert {name: array.shape[1:] for name, array in batch.items()} == {
        name: spec.shape for name, spec in asked.inputs.items()
    }
    assert batch["audio_mask"].tolist() == [[1, 1, 0, 0, 0]]
