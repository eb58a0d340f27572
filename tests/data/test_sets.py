"""A local run's data sets: each by its name, with its own model unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lamina import run
from lamina.data.sets import DATA_SETS
from lamina.run import LocalRun
from models.registry import PRESETS
from wire.errors import UserError

PEOPLE = tuple(f"person-{number:02}" for number in range(3, 11))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[LocalRun]:
    """What would have been run."""
    runs: list[LocalRun] = []

    async def conduct(local: LocalRun, _view: Any) -> None:
        runs.append(local)

    monkeypatch.setattr(run, "conduct", conduct)
    return runs


def start(folder: Path, *options: str) -> None:
    words = ["--dir", str(folder), "--engine", "onnx", *options]
    CliRunner().invoke(run.command, words, catch_exceptions=False)


def test_a_data_set_trains_the_model_of_its_name(
    tmp_path: Path, watch_registry: None, started: list[LocalRun]
) -> None:
    start(tmp_path, "--data-set", "watch")
    assert started[0].model == "watch"
    assert started[0].clients == PEOPLE
    assert started[0].data == tmp_path / "data/watch-8"
    start(tmp_path, "--data-set", "watch", "--model", "tiny", "--name", "other", "--clients", "9")
    assert started[1].model == "tiny"
    assert started[1].data == tmp_path / "data/watch-9"


def test_the_default_is_the_emoji_among_four_clients(
    tmp_path: Path, registry: Path, started: list[LocalRun]
) -> None:
    start(tmp_path)
    assert started[0].model == "tiny"
    assert started[0].data == tmp_path / "data/emoji-4"
    assert len(started[0].clients) == 4


def test_data_of_ones_own_have_no_data_set(tmp_path: Path, started: list[LocalRun]) -> None:
    (tmp_path / "clients/ann").mkdir(parents=True)
    start(tmp_path, "--data", str(tmp_path))
    assert (started[0].model, started[0].clients) == ("tiny", ("ann",))
    with pytest.raises(UserError, match="--data and --data-set"):
        start(tmp_path, "--data", str(tmp_path), "--data-set", "emoji")


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_model_is_a_preset(name: str) -> None:
    assert DATA_SETS[name].model in PRESETS
