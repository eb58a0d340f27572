"""What is in the tests' registries: the script that serves one as `npm`, and wheels that pip finds."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from lamina.data.registry import Package
from wire.manifest import BlobRef

NUM_CONCEPTS = 120
LABELS = [f"thing {place}" for place in range(NUM_CONCEPTS)]
PLACE = {label: place for place, label in enumerate(LABELS)}

# Hands out $ARCHIVES/<archive> for `npm pack NAME@VERSION` and notes the call.
NPM = """#!{python}
import os, pathlib, shutil, sys
archives = pathlib.Path(os.environ["ARCHIVES"])
assert sys.argv[1] == "pack"
name, _, version = sys.argv[2].rpartition("@")
archive = name.removeprefix("@").replace("/", "-") + "-" + version + ".tgz"
with open(archives / "calls", "a") as calls:
    print(sys.argv[2], file=calls)
if not (archives / archive).exists():
    sys.exit("npm error code E404\\nnpm error 404 no such package")
shutil.copy(archives / archive, archive)
"""

# The same for `apt-get download -qq NAME=VERSION`.
APT = """#!{python}
import os, pathlib, shutil, sys
archives = pathlib.Path(os.environ["ARCHIVES"])
assert sys.argv[1:3] == ["download", "-qq"]
archive = sys.argv[3].replace("=", "_") + "_all.deb"
if not (archives / archive).exists():
    sys.exit("W: something else\\nE: Unable to locate package")
shutil.copy(archives / archive, archive)
"""

Publish = Callable[[str, dict[str, object]], Package]
PublishWheel = Callable[[str, dict[str, bytes]], Package]

NUM_OF_DIGIT = 18
NUM_STAMPS = 40
EXERCISES = ["PEN", "ABD", "ROW"]
NUM_PEOPLE = 10


def calls(archives: Path) -> list[str]:
    path = archives / "calls"
    return path.read_text().split() if path.exists() else []


def icon(place: int, corner: int) -> dict[str, object]:
    """A coloured square: the colour says which concept, the round corner which style."""
    return {
        "body": f'<rect width="8" height="8" rx="{corner}" fill="#{place * 2 + 1:02x}40{255 - place:02x}"/>'
    }


def npm_archive(name: str, files: dict[str, object]) -> tuple[Package, bytes]:
    """An archive of version 1.0.0 whose files are JSON."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for member, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{member}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return Package(name, "1.0.0", BlobRef.of(buffer.getvalue()), "CC0-1.0", "nobody"), buffer.getvalue()


def wheel(name: str, files: dict[str, bytes]) -> tuple[Package, bytes]:
    """A wheel of version 1.0.0 that pip takes for one, for a Python that nobody has."""
    meta = f"{name}-1.0.0.dist-info"
    more = {
        f"{meta}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\nRequires-Python: >=99\n",
        f"{meta}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{meta}/RECORD": "",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, content in {**files, **{name: text.encode() for name, text in more.items()}}.items():
            archive.writestr(zipfile.ZipInfo(member), content)
    content = buffer.getvalue()
    return Package(name, "1.0.0", BlobRef.of(content), "CC0-1.0", "nobody", "pypi"), content


def deb(name: str, files: dict[str, bytes]) -> tuple[Package, bytes]:
    """A Debian package of version 1.0.0 of these files, beside a link to the first of them."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz", preset=0) as tar:
        for path, content in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo(next(iter(files)) + ".link")
        link.type, link.linkname = tarfile.SYMTYPE, next(iter(files))
        tar.addfile(link)
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    content = b"!<arch>\n"
    for member, part in members.items():
        content += f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode()
        content += part + b"\n" * (len(part) % 2)
    return Package(name, "1.0.0", BlobRef.of(content), "CC0-1.0", "nobody", "debian"), content


def spoken_stamps() -> dict[str, bytes]:
    """Stamps that are spoken of in Greek and French: a tone each, of its own height and length.

    In French two are called alike and sound alike, in files that differ. Of the last two one has no French
    name, one no names.
    """
    root = "./usr/share/tuxpaint/stamps"
    files: dict[str, bytes] = {f"{root}/readme.md": b"no stamp"}
    for place in range(NUM_STAMPS):
        stamp = f"{root}/{('animals', 'food')[place % 2]}/thing{place:02}"
        names = f"Thing {place}.\nde.utf8=Ding {place}\nel.utf8=Πράγμα {place}.\n"
        if place < NUM_STAMPS - 2:
            names += f"fr.utf8=Chose {max(place, 1)}.\n"
        if place < NUM_STAMPS - 1:
            files[f"{stamp}.txt"] = names.encode()
        for language, hz in (("el", 300 + 20 * place), ("fr", 400 + 20 * max(place, 1)), ("de", 500)):
            files[f"{stamp}_desc_{language}.ogg"] = tone(hz, 0.1 + 0.01 * max(place, 1))
    return files


def tone(hz: float, seconds: float) -> bytes:
    """An Ogg Vorbis file: two channels at 44.1 kHz, the right one silent."""
    left = np.sin(2 * np.pi * hz * np.arange(int(44100 * seconds)) / 44100)
    file = io.BytesIO()
    soundfile.write(
        file, np.stack([left, np.zeros_like(left)], axis=1), 44100, format="OGG", subtype="VORBIS"
    )
    return file.getvalue()


def digit_pictures() -> dict[str, object]:
    """No two are equal; a few more than there are recordings."""
    generator = np.random.default_rng(0)
    return {
        f"src/digits/{digit}.json": {
            "data": (generator.integers(0, 9, (NUM_OF_DIGIT + 2) * 784) / 8).tolist()
        }
        for digit in range(10)
    }


def spoken_digits() -> dict[str, npt.NDArray[Any]]:
    """`X`, `y` and `lengths`, in no order of the digits: the louder, the higher the digit."""
    generator = np.random.default_rng(1)
    y = generator.permutation(np.repeat(np.arange(10), NUM_OF_DIGIT))
    lengths = generator.integers(6, 50, len(y))
    x = np.repeat(y, lengths)[:, None] + 0.1 * generator.standard_normal((lengths.sum(), 13))
    return {"X": x.astype(np.float32), "y": y, "lengths": lengths}


def watch_recordings() -> dict[str, object]:
    """Of each person, arm and exercise one, 5 to 6 s long; a sample tells whose it is, and when."""
    generator = np.random.default_rng(2)
    found = [(p, s, e) for p in range(1, NUM_PEOPLE + 1) for s in (0.0, 1.0) for e in range(len(EXERCISES))]
    found = [found[place] for place in generator.permutation(len(found))]
    recordings = []
    for person, side, exercise in found:
        times = np.arange(int(generator.integers(250, 300)))
        values = [person, side, exercise, 100 + person, -times, times]
        recordings.append(np.stack(np.broadcast_arrays(*values), axis=1).astype(np.float64))
    people, sides, exercises = (np.array(column) for column in zip(*found, strict=True))
    return {
        "X": recordings,
        "y": exercises,
        "side": sides,
        "subject": people,
        "y_labels": EXERCISES,
        "X_labels": ["ax", "ay", "az", "wx", "wy", "wz"],
    }


def as_bytes(**arrays: npt.NDArray[Any]) -> bytes:
    """A `.npz` file."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def pickled(content: object) -> bytes:
    """A `.npy` file of one pickled object, as numpy writes it."""
    file = io.BytesIO()
    np.save(file, np.array(content), allow_pickle=True)
    return file.getvalue()
