"""Clients that lack a modality, or memory, train what they can."""

from __future__ import annotations

import csv
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from programs import CLIENTS, Programs, Started, lamina

from aggregator.events import RunClosed
from export.bundle import export_bundle
from export.schedules import SCHEDULES
from models.registry import build

OPTIONS = {"task": "classification", "size": 16, "patch": 4, "width": 32, "heads": 2, "image_blocks": 2}
OPTIONS |= {"text_blocks": 2, "vocabulary": 60, "length": 8, "embedding": 16}
MODEL = [word for name, value in OPTIONS.items() for word in ("--option", f"{name}={value}")]
HAS = {"ann": ("image",), "bob": ("text",), "cy": ("image", "text")}


@pytest.fixture
def partly(tmp_path: Path, data: Path) -> Path:
    """The data, but ann's column of texts is empty and bob has no pictures."""
    folder = shutil.copytree(data, tmp_path / "data")
    for client, modalities in HAS.items():
        path = folder / "clients" / client / "table.csv"
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if "text" not in modalities:
            rows = [row | {"text": ""} for row in rows]
        names = [name for name in rows[0] if name != "image" or "image" in modalities]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    return folder


def test_clients_that_lack_a_modality_train_the_rest(tmp_path: Path, partly: Path) -> None:
    words = ("--data", str(partly), "--dir", str(tmp_path / "work"), "--name", "run", "--threads", "1")
    words += ("--alignment", "0.1", "--missing-modalities")
    done = lamina("run", "--json", *words, "--rounds", "2", *MODEL)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["total"]["updates"] == 2 * 2 * len(CLIENTS)
    assert result["total"]["metrics"]["accuracy"] > result["total"]["metrics"]["chance"]
    with sqlite3.connect(tmp_path / "work/runs/run/aggregator/books.sqlite") as books:
        updates = books.execute("SELECT stage, client, groups, size_bytes FROM updates").fetchall()
    sizes: dict[tuple[int, str], int] = {}
    for stage, client, groups, size in updates:
        sizes[stage, client] = size
        assert set(json.loads(groups)) == groups_of(stage, HAS[client])
    for stage in range(2):
        assert sizes[stage, "cy"] > sizes[stage, "ann"]
        assert sizes[stage, "cy"] > sizes[stage, "bob"]
    log = (tmp_path / "work/runs/run/logs/ann.log").read_text()
    assert "40 examples of image, engine onnx" in log


def groups_of(stage: int, modalities: tuple[str, ...]) -> set[str]:
    """What trains in a stage under `layerwise`."""
    groups = {"head"}
    for name in modalities:
        groups |= {f"head.{name}", f"{name}.block.{stage}"} | ({f"{name}.stem"} if stage == 0 else set())
    return groups


def test_without_such_an_export_they_are_told(tmp_path: Path, partly: Path) -> None:
    words = ("--data", str(partly), "--dir", str(tmp_path / "work"), "--threads", "1", "--rounds", "1")
    done = lamina("run", *words, *MODEL)
    assert done.returncode == 2
    assert "--missing-modalities" in done.stderr


def test_a_contrastive_loss_needs_them_all(tmp_path: Path, data: Path) -> None:
    words = ("--data", str(data), "--dir", str(tmp_path / "work"), "--missing-modalities", "--rounds", "1")
    done = lamina("run", *words)
    assert done.returncode == 2
    assert "a contrastive loss of image and text needs all of them in every client" in done.stderr


def test_a_client_of_little_memory_stays_at_the_depth_that_fits(
    programs: Programs, broker: Started, tmp_path: Path
) -> None:
    model = build("models.image_text:image_text", **{**OPTIONS, "classes": 3})
    schedule, folder = SCHEDULES["progressive"](model.depths, 1), tmp_path / "bundle"
    colours, peaks = ("blue", "green", "red"), (100_000_000, 200_000_000)
    texts = ["a dark red square number 1", "a pale green one", "a bright blue square"]
    export_bundle(model, schedule, folder, texts=texts, classes=colours, expected_peak_bytes=peaks)
    aggregator = programs.aggregator(broker.url, "run", "--bundle", str(folder))
    programs.client(broker.url, "ann", "run", "--memory-budget", "150MB")
    programs.client(broker.url, "bob")
    weak = programs.client(broker.url, "cy", "run", "--memory-budget", "90MB")
    assert weak.end() == 2
    assert "stage 1 needs 100 MB of memory, allowed are 90" in weak.text()
    aggregator.until_a(RunClosed)
    trained = {
        (stage, client): tuple(json.loads(groups))
        for stage, client, groups in aggregator.rows("SELECT stage, client, groups FROM updates")
    }
    first, second = (plan.trainable for plan in schedule.stages)
    assert trained == {
        (0, "ann"): first,
        (0, "bob"): first,
        (1, "ann"): first,
        (1, "bob"): second,
    }
