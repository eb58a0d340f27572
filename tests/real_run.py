"""A data set and a bundle that train in seconds, and the fixtures with which real programs start on them.

Next: `programs.py`, the programs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from programs import CLIENTS, Mosquitto, Programs, Started, free_port, mosquitto, start

from export.bundle import export_bundle
from export.schedules import SCHEDULES
from models.registry import build

EXAMPLES = 40


def write_data(folder: Path) -> Path:
    """clients/<name>/ and holdout/: coloured squares and their descriptions."""
    shades = {"dark": 60, "bright": 140, "pale": 220}
    colours = {"red": 0, "green": 1, "blue": 2}
    for place, name in enumerate((*(f"clients/{client}" for client in CLIENTS), "holdout")):
        (folder / name / "images").mkdir(parents=True)
        rows = ["image,text,label"]
        for i in range(EXAMPLES):
            shade, colour = list(shades)[(i + place) % 3], list(colours)[(i // 3) % 3]
            pixel = [20 + i % 5] * 3
            pixel[colours[colour]] = shades[shade] + place
            Image.new("RGB", (16, 16), tuple(pixel)).save(folder / name / "images" / f"{i}.png")
            rows.append(f"images/{i}.png,a {shade} {colour} square number {i},{colour}")
        (folder / name / "table.csv").write_text("\n".join(rows))
    return folder


def write_bundle(out: Path, data: Path) -> Path:
    """Two layer-wise stages of a small contrastive model."""
    torch.manual_seed(0)
    model = build(
        "models.image_text:image_text",
        size=16,
        patch=4,
        width=32,
        heads=2,
        image_blocks=2,
        text_blocks=2,
        vocabulary=60,
        length=8,
        embedding=16,
    )
    texts = (data / "clients" / CLIENTS[0] / "table.csv").read_text().splitlines()
    export_bundle(model, SCHEDULES["layerwise"](model.depths, 2), out, texts=texts)
    return out


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "layerwise", data)


@pytest.fixture
def programs(tmp_path: Path, data: Path, bundle: Path) -> Iterator[Programs]:
    """Starts programs; none is left at the end."""
    with contextlib.ExitStack() as stack:
        yield Programs(tmp_path, data, bundle, stack)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Started]:
    """The embedded broker on a free port, which it takes again when it is started again."""
    with start(tmp_path / "broker.log", "broker", "--port", str(free_port())) as broker:
        broker.url = broker.stdout().split()[-1]
        yield broker


@pytest.fixture
def real_broker(tmp_path: Path) -> Iterator[Mosquitto]:
    """A real mosquitto."""
    if mosquitto() is None:
        pytest.skip("mosquitto is not installed; .ci/run installs it")
    broker = Mosquitto.plain(tmp_path)
    yield broker
    broker.kill()
