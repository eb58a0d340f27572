"""Who takes part in a row."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from lamina.data.folder import INVENTORY_NAME, Inventory
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
    alone = msgspec.structs.replace(inventory, lacking=dict.fromkeys(("ann", "bob", "cy"), "text"))
    (tmp_path / "mine" / INVENTORY_NAME).write_bytes(msgspec.json.encode(alone))
    with pytest.raises(UserError, match=r"every client of .* lacks a modality"):
        clients(tmp_path, drop_incomplete=True)
    assert clients(tmp_path, drop_incomplete=False) == ("ann", "bob", "cy")
