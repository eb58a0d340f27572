"""Who takes part in a row, and when a model's program is another one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from lamina.data.folder import INVENTORY_NAME, Inventory
from lamina.experiment.models import program_of
from lamina.experiment.settings import complete
from lamina.experiment.shared import Shared
from wire.errors import UserError


def clients(folder: Path, **settings: object) -> tuple[str, ...]:
    values = complete({"data": str(folder / "mine"), **settings}, 0, "test")
    return asyncio.run(Shared(folder / "work", print).data(values)).clients


def test_clients_that_lack_a_modality_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    for name in ("ann", "bob", "cy"):
        (tmp_path / "mine" / "clients" / name).mkdir(parents=True)
    assert clients(tmp_path) == ("ann", "bob", "cy")
    with pytest.raises(UserError, match="which says who lacks what"):
        clients(tmp_path, drop_incomplete=True)
    inventory = Inventory("mine", {}, (), {}, {}, (), lacking={"ann": "text", "cy": "image"})
    (tmp_path / "mine" / INVENTORY_NAME).write_bytes(msgspec.json.encode(inventory))
    assert clients(tmp_path, drop_incomplete=True) == ("bob",)
    assert clients(tmp_path) == ("bob", "ann", "cy")  # the first, whose memory is told, has everything
    alone = msgspec.structs.replace(inventory, lacking=dict.fromkeys(("ann", "bob", "cy"), "text"))
    (tmp_path / "mine" / INVENTORY_NAME).write_bytes(msgspec.json.encode(alone))
    with pytest.raises(UserError, match=r"every client of .* lacks a modality"):
        clients(tmp_path, drop_incomplete=True)
    assert clients(tmp_path, drop_incomplete=False) == ("ann", "bob", "cy")


def test_an_edited_builder_is_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_model.py").write_text("def build(): ...\n")
    before = program_of("own_model:build")
    assert before == program_of("own_model:other")
    (tmp_path / "own_model.py").write_text("def build(width=3): ...\n")
    assert program_of("own_model:build") not in ("", before)
    assert program_of("tiny") == program_of("models.image_text:image_text") != ""
    assert program_of("nowhere:build") == program_of("no.such.module:build") == ""
