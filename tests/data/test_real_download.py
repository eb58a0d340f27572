"""The only test that needs the network: two real styles, about 10 MB, through the real npm."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lamina.data.emoji import prepare_emoji


@pytest.mark.network
def test_the_pinned_packages_give_the_known_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepared = prepare_emoji(tmp_path / "emoji", clients=2, size_px=32)
    inventory = prepared.inventory
    assert inventory.clients.keys() == {"openmoji", "twemoji"}
    assert all(1000 < count < 1300 for count in inventory.clients.values())
    assert all(300 < count < 360 for count in inventory.held_out["holdout"].values())
    assert len(inventory.classes) == 8
    with (prepared.client("twemoji") / "table.csv").open(encoding="utf-8", newline="") as file:
        texts = {row["image"]: row["text"] for row in csv.DictReader(file)}
    assert texts["images/twemoji-1f44b.png"].startswith("waving hand: bye, cya")
