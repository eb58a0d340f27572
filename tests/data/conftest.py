"""A registry of two tiny icon sets: `npm` on PATH is a script that hands out archives made here."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from tiny_registry import LABELS, NPM, NUM_CONCEPTS, Publish, icon

from lamina.data import emoji
from lamina.data.registry import Package
from wire.manifest import BlobRef


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "network: downloads from the real registry")


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The registry's archives; its npm is the only one on PATH, and the download cache is empty."""
    folder, programs = tmp_path / "archives", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    npm = programs / "npm"
    npm.write_text(NPM.format(python=sys.executable))
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("ARCHIVES", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def publish(archives: Path) -> Publish:
    """Put a package of these files into the registry."""

    def publish(name: str, files: dict[str, object]) -> Package:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for member, content in files.items():
                data = json.dumps(content).encode()
                info = tarfile.TarInfo(f"package/{member}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        package = Package(name, "1.0.0", BlobRef.of(buffer.getvalue()), "CC0-1.0", "nobody")
        (archives / package.archive).write_bytes(buffer.getvalue())
        return package

    return publish


@pytest.fixture
def registry(publish: Publish, archives: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`square` knows code points, `round` only names, and draws the first hundred."""
    places = range(NUM_CONCEPTS)
    names = {
        "en/data.json": [
            {
                "hexcode": f"{0x1F600 + i:X}",
                "label": LABELS[i],
                "tags": ["thing", f"number{i}"],
                "group": i % 3,
            }
            for i in places
        ]
        + [{"hexcode": "1F3F3", "label": "a flag", "group": 9}, {"hexcode": "1F1E6", "label": "letter A"}],
        "meta/groups.json": {"groups": {"0": "faces", "1": "food", "2": "places", "9": "flags"}},
    }
    square = {
        "icons.json": {
            "width": 8,
            "height": 8,
            "icons": {f"s{i}": icon(i, 0) for i in places} | {"flag": icon(125, 2)},
        },
        "chars.json": {f"{0x1F600 + i:x}": f"s{i}" for i in places} | {"1f3f3": "flag", "1f1e6": "flag"},
    }
    # thing 7 looks like thing 8, thing 9 is empty
    drawn = {LABELS[i].replace(" ", "-"): icon(8 if i == 7 else i, 3) for i in range(100)}
    drawn["thing-9"] = {"body": ""}
    rounded = {"icons.json": {"width": 8, "height": 8, "icons": drawn}, "chars.json": {}}
    styles = {"square": publish("@icons/square", square), "round": publish("@icons/round", rounded)}
    monkeypatch.setattr(emoji, "STYLES", styles)
    monkeypatch.setattr(emoji, "NAMES", publish("names", names))
    return archives
