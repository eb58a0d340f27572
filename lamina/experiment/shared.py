"""What several rows need is made once: prepared data, exported bundles, what a stage costs.

Rules: each is in a folder whose name follows from what decides it: settings, and for a bundle the clients'
tables and the model's program. It appears as a whole or not at all, so a folder that is there is ready.
One row at a time makes a thing, the others wait for it. A bundle is exported with a tokenizer of its own
data's texts; a centralised row has that of end-to-end ones.

    DIR/data/<data set>-<key>    with clients/ and holdout/
    DIR/bundles/<key>            exported, checked against torch

Next: `lamina/experiment/row.py`, which trains on them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge_client.device import version
from lamina.data.folder import INVENTORY_NAME, Inventory
from lamina.experiment.models import program_of
from lamina.experiment.settings import CENTRALISED, Values, data_settings
from lamina.local import LocalRun, clients_of, export_arguments
from lamina.processes import Processes
from wire.errors import UserError
from wire.manifest import BlobRef, Manifest, read_manifest
from wire.parts import steps_within

if TYPE_CHECKING:
    from export.costs import StageCost

_COUNTING = threading.Lock()  # torch's meta device is for one thread at a time


@dataclass(frozen=True)
class Data:
    """folder: with clients/ and holdout/. clients: that take part, those that have all modalities first.

    left_out: the number of the others.
    """

    folder: Path
    clients: tuple[str, ...]
    left_out: int = 0


class Shared:
    """What is in an experiment's folder for all rows. note: for what should be known."""

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self._folder = folder
        self._note = note
        self._locks: dict[Path, asyncio.Lock] = defaultdict(asyncio.Lock)

    def sweep(self) -> None:
        """Remove what was unfinished when we were killed; nobody else uses the folder."""
        for kind in ("data", "bundles"):
            for left in (self._folder / kind).glob(".*"):
                shutil.rmtree(left, ignore_errors=True)

    async def data(self, settings: Values) -> Data:
        """A row's data, prepared or found. Raises `UserError`, `ChildFailed`."""
        folder = Path(settings["data"]) if "data" in settings else await self._prepared(settings)
        everyone = clients_of(folder)
        incomplete = _lacking(folder, needed=settings["drop_incomplete"])
        whole = tuple(client for client in everyone if client not in incomplete)
        others = tuple(client for client in everyone if client in incomplete)
        if not settings["drop_incomplete"]:
            return Data(folder, whole + others)
        if not whole:
            raise UserError(f"every client of {folder} lacks a modality", "leave out drop_incomplete")
        return Data(folder, whole, len(others))

    async def bundle(self, run: LocalRun, settings: Values) -> Path:
        """A row's bundle, of the texts of all clients, exported or found. Raises `ChildFailed`."""
        wanted = replace(run, clients=clients_of(run.data), schedule=_schedule(settings))
        arguments = export_arguments(wanted, Path())[:-2]
        arguments += ["--weight-decay", str(settings["weight_decay"])]
        if isinstance(settings["rounds"], list):
            arguments += ["--rounds", ",".join(map(str, settings["rounds"]))]
        if wanted.schedule != "end_to_end":
            arguments += ["--blocks-per-stage", str(settings["blocks_per_stage"])]
        decide = [arguments, _texts(wanted), version(), program_of(wanted.model)]
        folder = self._folder / "bundles" / f"{wanted.schedule}-{_key(decide)}"
        async with self._locks[folder]:
            if not folder.exists():
                await self._run(folder, "export", *arguments, "--out", str(folder))
        return folder

    async def _prepared(self, settings: Values) -> Path:
        name = settings["data_set"]
        options, _ = data_settings(name, "")
        chosen = {option: settings[option] for option in options} | {"seed": settings["data_seed"]}
        folder = self._folder / "data" / f"{name}-{_key(chosen)}"
        arguments = []
        for option, value in chosen.items():
            word = f"--{option.replace('_', '-')}"
            if isinstance(value, bool):
                arguments += [word] if value else []
            else:
                arguments += [word, str(value)]
        async with self._locks[folder]:
            if not folder.exists():
                await self._run(folder, "data", "prepare", name, *arguments, "--out", str(folder))
        return folder

    async def _run(self, folder: Path, *arguments: str) -> None:
        async with Processes(self._folder / "logs", self._note) as processes:
            await processes.run(folder.name, *arguments)


def _lacking(data: Path, *, needed: bool) -> Collection[str]:
    """The clients that lack a modality. Raises `UserError` where that is needed and nothing tells it."""
    path = data / INVENTORY_NAME
    if not needed and not path.exists():
        return ()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Inventory).lacking
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(
            f"drop_incomplete needs {path}, which says who lacks what: {error}",
            "leave out the folders of those clients, or drop_incomplete",
        ) from error


def rounds_a_stage(bundle: Path, settings: Values) -> int | str:
    """As the aggregator takes it: 0 where the bundle says it. Raises `UserError`."""
    if settings["rounds"] == "auto":
        return "auto"
    if settings["total_rounds"] is None:
        return 0 if isinstance(settings["rounds"], list) else int(settings["rounds"])
    stages = len(read_manifest(bundle)[0].stages)
    rounds, rest = divmod(int(settings["total_rounds"]), stages)
    if rest or not rounds:
        raise UserError(
            f"total_rounds is {settings['total_rounds']}, and {settings['schedule']} has {stages} stages",
            f"take a multiple of {stages}, or give rounds a list",
        )
    return rounds


def client_costs(
    bundle: Path,
    settings: Values,
    engine: str,
    modalities: Mapping[str, frozenset[str]],
    memory: Mapping[str, int],
) -> dict[str, tuple[StageCost, ...]]:
    """What each stage of the row costs each client; takes seconds.

    modalities: of each client. memory: bytes that a client may use, where it may not use what it likes.
    """
    manifest, _ = read_manifest(bundle)
    of_part = {part: _stage_costs(manifest, settings, engine, part) for part in set(modalities.values())}
    found = {}
    for client, part in modalities.items():
        stages = of_part[part]
        steps = steps_within(manifest, memory[client]) if client in memory else range(len(stages))
        found[client] = tuple(
            replace(stage, train_flops=stages[step].train_flops)
            for stage, step in zip(stages, steps, strict=True)
        )
    return found


def _stage_costs(
    manifest: Manifest, settings: Values, engine: str, modalities: Collection[str]
) -> tuple[StageCost, ...]:
    """Of a client with these modalities, and memory enough."""
    from export.costs import Setting, schedule_cost
    from export.observe import skeleton
    from export.schedules import SCHEDULES

    whole = manifest.schedule == "end_to_end"
    extra = {} if whole else {"blocks_per_stage": settings["blocks_per_stage"]}
    with _COUNTING:
        model = skeleton(manifest.builder, manifest.builder_options)
        schedule = SCHEDULES[manifest.schedule](
            model.depths, [stage.rounds for stage in manifest.stages], **extra
        )
        setting = Setting(engine, settings["batch_size"], settings["local_epochs"], manifest.aligned)
        sizes = [stage.micro_batch_size for stage in manifest.stages]
        part = () if set(modalities) == manifest.modalities.keys() else modalities
        return schedule_cost(model, schedule, setting, sizes, part).stages


def _schedule(settings: Values) -> str:
    """Whose bundle it is."""
    name: str = settings["schedule"]
    return "end_to_end" if name == CENTRALISED else name


def _texts(run: LocalRun) -> list[str]:
    """Hashes of the tables that the bundle's tokenizer and classes are made of."""
    tables = [
        path for client in run.clients for path in sorted((run.data / "clients" / client).glob("table.*"))
    ]
    return [BlobRef.of_file(path).sha256 for path in tables]


def _key(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
