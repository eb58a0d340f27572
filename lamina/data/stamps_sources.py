"""Where the spoken stamps come from: the package, and the recordings of a stamp's name in it.

Rules: a stamp is a picture with `<stamp>.txt`, its name in English and then in other languages, and
recordings of some of these, `<stamp>_desc_<language>.ogg`. A recording counts if its language is one of
`LANGUAGES` and the stamp has a name in it. It becomes a WAV file: mono, 16 bits, at `RATE_HZ`. Files that
sound the same are the same then; in the package they have serial numbers.

Next: `lamina/data/stamps.py`, which makes a data set of them.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

from inputs.wav import resampled
from lamina.data.deb import files_of_deb
from lamina.data.registry import Package, Progress, counted
from wire.errors import UserError
from wire.manifest import BlobRef

STAMPS = Package(
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    BlobRef("6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34", 160880444),
    "GPL-2.0-or-later",
    "Bill Kendrick and others, tuxpaint.org",
    "debian",
)
LANGUAGES = ("be", "bg", "ca", "da", "el", "es", "fr", "ro", "ru")
"""Those with recordings of more than a hundred stamps, as ISO 639-1 codes."""

RATE_HZ = 16_000

_ROOT = "./usr/share/tuxpaint/stamps/"
_SOUND = re.compile(r"(.+)_desc_(\w+)\.ogg")


@dataclass(frozen=True)
class Recording:
    """A spoken name. stamp: a path, from its category on. english, text: the name. wav: the sound."""

    stamp: str
    language: str
    english: str
    text: str
    wav: bytes

    @property
    def category(self) -> str:
        """Such as animals."""
        return self.stamp.partition("/")[0]


def read_recordings(archive: Path, progress: Progress) -> list[Recording]:
    """All that count, by language and then by stamp; `check_soundfile` first."""
    names: dict[str, dict[str, str]] = {}
    sounds: dict[tuple[str, str], bytes] = {}
    for path, content in files_of_deb(archive, _ROOT):
        if path.endswith(".txt"):
            names[path.removesuffix(".txt")] = _names(content.decode())
        elif (sound := _SOUND.fullmatch(path)) and sound[2] in LANGUAGES:
            sounds[sound[2], sound[1]] = content
    known = [(place, ogg) for place, ogg in sorted(sounds.items()) if place[0] in names.get(place[1], {})]
    return [
        Recording(stamp, language, names[stamp]["en"], names[stamp][language], as_wav(ogg))
        for (language, stamp), ogg in counted("decoding", known, progress)
    ]


def check_soundfile() -> None:
    """Raises `UserError` where the library is missing, or the one that it is a door to."""
    try:
        import soundfile  # noqa: F401
    except (ImportError, OSError) as error:
        raise UserError(
            f"preparing stamps needs soundfile ({error})",
            'pip install "lamina[data]", or prepare it on another machine and copy the folder here',
        ) from error


def as_wav(ogg: bytes) -> bytes:
    """The content of a WAV file, mono, 16 bits and at `RATE_HZ`, of one that is Ogg Vorbis."""
    import soundfile

    samples, rate_hz = soundfile.read(io.BytesIO(ogg), dtype="float64", always_2d=True)
    file = io.BytesIO()
    sound = resampled(samples.mean(axis=1), rate_hz, RATE_HZ)
    soundfile.write(file, sound, RATE_HZ, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _names(text: str) -> dict[str, str]:
    """Language -> the stamp's name."""
    first, *others = text.splitlines()
    found = {"en": first.strip()}
    for line in others:
        language, told, name = line.partition(".utf8=")
        if told and name.strip():
            found[language] = name.strip()
    return found
