"""One row: the commands that a person types, as `lamina run` gives them, and what came of it.

Rules: a row begins in a clean `run` folder, whatever a killed one has left there. What it had come to
before stays until it is there anew: then the model gets its place, and last the result is written. Only
with a result is a row done.

    DIR/rows/<id>/result.json   what it has come to
    DIR/rows/<id>/model         the final model
    DIR/rows/<id>/run           while it runs or with --keep, and after a failure: see `lamina/local.py`;
                                of a centralised row with data/, the examples of all as one client's

Next: `lamina/local.py`, which conducts the run; `lamina/experiment/result.py`, which adds it up.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aggregator.events import RoundClosed
from edge_client.device import version
from edge_client.engines import ENGINES, choose
from lamina.experiment.grid import Row
from lamina.experiment.models import model_options
from lamina.experiment.result import (
    Result,
    RoundResult,
    by_stage,
    closing,
    examples_of,
    modalities_of,
    read_result,
    rounds_of,
    write_result,
)
from lamina.experiment.settings import CENTRALISED, PLAN, Values
from lamina.experiment.shared import Data, Shared, client_costs, rounds_a_stage
from lamina.experiment.union import ALL, unite
from lamina.local import LocalRun, clients_of, conduct
from wire.errors import UserError

if TYPE_CHECKING:
    from aggregator.events import Event

MODEL, RESULT = "model", "result.json"


def home(folder: Path, row: str) -> Path:
    """A row's own folder."""
    return folder / "rows" / row


def result_of(folder: Path, row: Row) -> Result | None:
    """What a row has come to, if it is done. Raises `UserError`."""
    result = read_result(home(folder, row.id) / RESULT)
    if result is not None and result.settings.get("data") != row.settings.get("data"):
        raise UserError(
            f"{row.id} in {folder} is of other data: {result.settings.get('data')}",
            "choose another --dir, or run it --again",
        )
    return result


async def run_row(
    row: Row, folder: Path, shared: Shared, broker: str | None, note: Callable[[str], None], *, keep: bool
) -> Result:
    """Run it anew, to its result. Raises `LaminaError`, whatever of its programs failed."""
    own = home(folder, row.id)
    await asyncio.to_thread(shutil.rmtree, own / "run", ignore_errors=True)
    data = await shared.data(row.settings)
    run = _local_run(row, own / "run", data, broker)
    run.folder.mkdir(parents=True)
    bundle = await shared.bundle(run, row.settings)
    if row.settings["schedule"] == CENTRALISED:
        run = await asyncio.to_thread(_united, run)
    run = _with_bundle(run, bundle, row.settings)
    record = _Record(note)
    await conduct(run, record)
    costs = await asyncio.to_thread(
        client_costs, bundle, row.settings, run.engines[0], modalities_of(record.events), run.memory
    )
    rounds = rounds_of(record.events, run.groups, costs, row.settings, data.left_out)
    result = _result(row, run, data, folder, record.events, rounds)
    await asyncio.to_thread(_put_in_place, run, result, own)
    if not keep:
        await asyncio.to_thread(shutil.rmtree, run.folder, ignore_errors=True)
    return result


def _put_in_place(run: LocalRun, result: Result, own: Path) -> None:
    """The model and the result, in place of those before."""
    (own / RESULT).unlink(missing_ok=True)
    shutil.rmtree(own / MODEL, ignore_errors=True)
    (run.folder / "aggregator" / MODEL).rename(own / MODEL)
    write_result(own / RESULT, result)


class _Record:
    """Keeps the aggregator's events; what should be known goes to `note`."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.events: list[Event] = []
        self.note = note

    def status(self, text: str) -> None:
        """Nobody watches one row of many."""

    def show(self, event: Event) -> None:
        """Keep it."""
        self.events.append(event)


def _local_run(row: Row, folder: Path, data: Data, broker: str | None) -> LocalRun:
    settings = row.settings
    plan = {name: settings[name] for name in PLAN} | {"seed": settings["seed"]}
    plan["min_available_clients"] = plan["min_available_clients"] or len(data.clients)
    if (least := plan["min_available_clients"]) > (there := len(data.clients)):
        raise UserError(
            f"min_available_clients is {least}, and {there} clients take part", "wait for fewer"
        )
    limit = () if settings["feature_cache"] else ("--max-feature-mb", "0")
    return LocalRun(
        name=row.id,
        folder=folder,
        data=data.folder,
        clients=data.clients,
        bundle=None,
        schedule=settings["schedule"],
        model=settings["model"],
        options=tuple(f"{name}={json.dumps(value)}" for name, value in model_options(settings).items()),
        warm_start=settings["warm_start"],
        alignment=settings["alignment"],
        missing_modalities=settings["missing_modalities"],
        columns=tuple(
            f"{name.removeprefix('column.')}={value}"
            for name, value in settings.items()
            if name.startswith("column.")
        ),
        engines=(choose(settings["engine"], ENGINES),),
        threads=settings["threads"],
        micro_batch_size=_numbers(settings["micro_batch_size"]),
        features=("--feature-dtype", settings["feature_dtype"], *limit),
        memory_budget=None,
        broker=broker,
        calibration=data.folder / "public" if settings["calibration"] else None,
        plan=plan,
        client_processes=settings["client_processes"],
        memory=_memory(settings, data.clients),
    )


def _united(run: LocalRun) -> LocalRun:
    """With the examples of all clients as one client's."""
    folder = run.folder / "data"
    unite(run.data, clients_of(run.data), folder)
    return replace(run, data=folder, clients=(ALL,), plan=run.plan | {"min_available_clients": 1})


def _memory(settings: Values, clients: tuple[str, ...]) -> dict[str, int]:
    """Bytes of the clients that have little; the first, whose memory is told, is never one of them.

    Raises `UserError` where all would be, or a share that is not 0 comes to none.
    """
    if not settings["small_clients"]:
        return {}
    number = round(settings["small_clients"] * len(clients))
    if not 0 < number < len(clients):
        raise UserError(
            f"small_clients is {settings['small_clients']}: {number} of {len(clients)} clients",
            "take a share between; the first client always has the memory it wants",
        )
    chosen = random.Random(f"small {settings['seed']}").sample(clients[1:], number)
    return dict.fromkeys(chosen, settings["small_client_mb"] * 10**6)


def _with_bundle(run: LocalRun, bundle: Path, settings: Values) -> LocalRun:
    return replace(run, bundle=bundle, plan=run.plan | {"rounds": rounds_a_stage(bundle, settings)})


def _result(
    row: Row,
    run: LocalRun,
    data: Data,
    folder: Path,
    events: list[Event],
    rounds: tuple[RoundResult, ...],
) -> Result:
    closed = closing(events)
    holdout = data.folder / "holdout"
    ours = holdout.is_relative_to(folder)
    return Result(
        id=row.id,
        settings=row.settings,
        engine=closed.engine,
        clients=len(run.clients) + data.left_out,
        first=run.clients[0],
        examples=examples_of(events),
        rounds=rounds,
        metrics=closed.total.metrics,
        peak_memory_mb_by_stage=by_stage(rounds),
        updates=closed.total.updates,
        missing=sum(len(one.missing) for one in events if isinstance(one, RoundClosed)),
        refusals=closed.total.refusals,
        holdout=str(holdout.relative_to(folder) if ours else holdout.absolute())
        if holdout.is_dir()
        else "",
        date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        version=version(),
    )


def _numbers(value: int | list[int]) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
