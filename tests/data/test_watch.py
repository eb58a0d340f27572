"""The watch, from ten people's short recordings: windows, who is held out, what is written and refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_registry import EXERCISES, PublishWheel, pickled, watch_recordings

from inputs.dataset import Dataset
from lamina.data.command import command
from lamina.data.division import Division
from lamina.data.folder import Prepared
from lamina.data.partition import Partition
from lamina.data.watch import prepare_watch
from lamina.data.watch_sources import read_recordings
from models.registry import build
from wire.errors import LocalError, UserError


@pytest.fixture
def out(watch_registry: None, tmp_path: Path) -> Path:
    return tmp_path / "watch"


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rows_of_clients(prepared: Prepared) -> list[dict[str, str]]:
    return [row for name in prepared.inventory.clients for row in read(prepared.client(name))]


def prepare(
    out: Path, clients: int = 8, partition: str = "natural", fold: int = 0, **more: Any
) -> Prepared:
    return prepare_watch(out, Division(clients, partition, **more), fold)  # type: ignore[arg-type]


def test_a_natural_client_is_a_person(out: Path) -> None:
    prepared = prepare(out)
    assert list(prepared.inventory.clients) == [f"person-{number:02}" for number in range(3, 11)]
    for client in prepared.inventory.clients:
        rows = read(prepared.client(client))
        assert {row["group"] for row in rows} == {client}
        assert {row["label"] for row in rows} == set(EXERCISES)
    assert prepared.inventory.classes == tuple(sorted(EXERCISES))


def test_windows_are_two_seconds_and_overlap_by_half(out: Path) -> None:
    prepared = prepare(out)
    seen: dict[tuple[float, ...], list[int]] = {}
    for client in prepared.inventory.clients:
        for row in read(prepared.client(client)):
            moved = np.load(prepared.client(client) / row["accelerometer"])
            turned = np.load(prepared.client(client) / row["gyroscope"])
            assert moved.shape == turned.shape == (100, 3)
            assert moved.dtype == turned.dtype == np.float32
            person, side, exercise = moved[0]
            assert (moved == moved[0]).all()
            assert row["group"] == f"person-{int(person):02}"
            assert row["label"] == EXERCISES[int(exercise)]
            assert (turned[:, 0] == 100 + person).all()
            assert np.array_equal(turned[:, 1], -turned[:, 2])
            assert (np.diff(turned[:, 2]) == 1).all()
            seen.setdefault((person, side, exercise), []).append(int(turned[0, 2]))
    assert len(seen) == 8 * 2 * len(EXERCISES)
    lengths = {
        (float(one[0, 0]), float(one[0, 1]), float(one[0, 2])): len(one) for one in watch_recordings()["X"]
    }  # type: ignore[attr-defined]
    for whose, starts in seen.items():
        assert starts == list(range(0, lengths[whose] - 99, 50))


def test_every_fold_holds_two_others_out(tmp_path: Path, out: Path) -> None:
    held_out: list[str] = []
    for fold in range(5):
        prepared = prepare(tmp_path / f"fold{fold}", fold=fold)
        people = {row["group"] for row in read(prepared.folder / "holdout")}
        assert people == set(prepared.inventory.held_out["holdout"])
        assert len(people) == 2
        assert people.isdisjoint(row["group"] for row in rows_of_clients(prepared))
        held_out += people
    assert len(set(held_out)) == 10


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_other_partitions_share_the_same_windows(tmp_path: Path, out: Path, partition: Partition) -> None:
    natural = prepare(out)
    other = prepare(tmp_path / partition, 4, partition, seed=3)
    assert list(other.inventory.clients) == [f"client-{number}" for number in range(1, 5)]
    key = "accelerometer"
    assert sorted(row[key] for row in rows_of_clients(natural)) == sorted(
        row[key] for row in rows_of_clients(other)
    )
    assert (out / "holdout/table.csv").read_bytes() == (other.folder / "holdout/table.csv").read_bytes()


def test_more_natural_clients_than_people(out: Path) -> None:
    prepared = prepare(out, 9, alpha=100)
    assert list(prepared.inventory.clients)[:3] == ["person-03-1", "person-03-2", "person-04"]


def test_a_client_that_lacks_a_sensor(out: Path) -> None:
    prepared = prepare(out, missing_modality=0.5)
    assert sorted(prepared.inventory.lacking.values()) == ["accelerometer"] * 2 + ["gyroscope"] * 2
    for client, sensor in prepared.inventory.lacking.items():
        assert {row[sensor] for row in read(prepared.client(client))} == {""}
        assert not (prepared.client(client) / sensor).exists()


def test_the_preset_reads_it(out: Path, tmp_path: Path) -> None:
    prepared = prepare(out)
    model = build("watch", classes=len(EXERCISES))
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
    assert dataset.groups is not None
    assert set(dataset.groups) == {"person-01", "person-02"}


def test_the_command(out: Path) -> None:
    options = ["prepare", "watch", "--fold", "2", "--out", str(out), "--json"]
    result = CliRunner().invoke(command, options, catch_exceptions=False)
    inventory = json.loads(result.stdout)
    assert inventory["arguments"]["fold"] == 2
    assert set(inventory["held_out"]["holdout"]) == {"person-05", "person-06"}
    assert CliRunner().invoke(command, ["prepare", "watch", "--fold", "5"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"clients": 4}, "4 clients cannot have 8 groups"),
        ({"fold": 5}, "fold 5"),
        ({"fold": -1}, "fold -1"),
        ({"missing_modality": -0.1}, "share of -0.1"),
        ({"clients": 100, "partition": "iid"}, "too few"),
    ],
)
def test_what_cannot_be_prepared(out: Path, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        prepare(out, **arguments)
    assert not out.exists()


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (Path("made-by-a-pickle"),)  # type: ignore[return-value]


def test_what_a_pickle_asks_for_is_not_run(
    publish_wheel: PublishWheel, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for evil in (_Evil(), np.float64):
        package = publish_wheel("evil", {"seglearn/data/watch_dataset.npy": pickled({"X": evil})})
        with pytest.raises(LocalError, match="no array"):
            read_recordings(archives / package.archive)
    assert not (tmp_path / "made-by-a-pickle").exists()
