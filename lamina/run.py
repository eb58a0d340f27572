"""`lamina run`: the whole thing on one machine, each program in a process of its own.

Rules: this file turns options into a `LocalRun`, and draws what the aggregator tells.

    DIR/data/...      the prepared data set, for the next run too
    DIR/runs/<run>    the run: `lamina/local.py` says what is in it

Next: `lamina/local.py`, which conducts it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lamina.data.sets import DATA_SETS, prepare_with_defaults
from lamina.local import LocalRun, clients_of, conduct
from lamina.options import (
    FOR_EXPORT,
    broker_option,
    calibration_option,
    column_option,
    config_option,
    engine_option,
    feature_options,
    memory_budget_option,
    model_options,
    pairs,
    plan_options,
    run_until_stopped,
)
from wire.errors import UserError
from wire.mqtt import Broker
from wire.topics import check_name

if TYPE_CHECKING:
    from aggregator.events import RunClosed
    from wire.manifest import Manifest


EXPORTED = (
    *("schedule", "model", "options", "warm_start"),
    *("alignment", "missing_modalities", "micro_batch_size", "memory_budget"),
)
"""Parameters that only an export heeds."""


@click.command("run", short_help="All of it on this machine.")
@model_options
@click.option(
    "--clients",
    type=click.IntRange(min=1),
    help="Client processes, for a downloaded data set.  "
    f"[default: {', '.join(f'{one.clients} of {name}' for name, one in DATA_SETS.items())}]",
)
@click.option(
    "--data-set",
    type=click.Choice(list(DATA_SETS)),
    default="emoji",
    show_default=True,
    help="What is downloaded. Without --model, all but emoji train the model of their name.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="A folder with clients/<name>/ and, for metrics, holdout/.  [default: a data set, downloaded]",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, file_okay=False),
    help="Train what `lamina export` has written there.  [default: exported for this run]",
)
@broker_option()
@calibration_option
@column_option
@engine_option(
    multiple=True,
    default=["auto"],
    show_default=False,
    help="What runs the clients' train steps; may be repeated: the clients take turns.  [default: auto]",
)
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    help="Threads of each client's train step.  [default: its share of the cores]",
)
@click.option(
    "--micro-batch-size",
    default="0",
    show_default=True,
    help="The most examples that a client computes at a time, or one number a stage; see `lamina export`.",
)
@feature_options
@memory_budget_option(FOR_EXPORT)
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("lamina-work"),
    show_default=True,
    help="Where data, runs and models are kept.",
)
@click.option("--name", help="The run's.  [default: schedule, seed and time]")
@plan_options(rounds=8, min_available_clients=None, round_deadline_s=120.0)
@click.option("--json", "as_json", is_flag=True, help="Print the result as the last line, in JSON.")
@config_option
@click.pass_context
def command(
    context: click.Context,
    /,
    schedule: str,
    model: str,
    options: tuple[str, ...],
    warm_start: str,
    alignment: float,
    missing_modalities: bool,
    clients: int | None,
    data_set: str,
    data: Path | None,
    bundle: Path | None,
    broker: str | None,
    calibration: Path | None,
    columns: tuple[str, ...],
    engine: tuple[str, ...],
    threads: int,
    micro_batch_size: str,
    feature_dtype: str,
    max_feature_mb: int | None,
    memory_budget: int | None,
    folder: Path,
    name: str | None,
    as_json: bool,
    **plan: Any,
) -> None:
    """Prepare data, export, and train with a broker, an aggregator and clients on this machine."""
    try:
        from lamina.view import View
    except ImportError as error:
        raise UserError(f"a local run needs {error.name}", 'pip install "lamina[all]"') from error
    from aggregator.plan import RunPlan

    exported: Collection[str] | None = None
    if bundle is not None:
        manifest = _manifest(bundle, context)
        schedule, exported = manifest.schedule, manifest.stages[0].engines
    engines = tuple(engines_of(engine, exported))
    if broker is not None:
        Broker.parse(broker)
    pairs(columns, "--column")
    name = check_name(
        name or f"{schedule}-s{plan['seed']}-{time.strftime('%Y%m%d-%H%M%S')}", "the run's name"
    )
    if data is None:
        model = DATA_SETS[data_set].model if _is_default(context, "model") else model
        data = prepare_with_defaults(data_set, folder / "data", clients or DATA_SETS[data_set].clients)
    elif not _is_default(context, "data_set"):
        raise UserError("--data and --data-set both say what is trained on", "give one of them")
    names = clients_of(data)
    if plan["min_available_clients"] is None:
        plan["min_available_clients"] = len(names)
    RunPlan(**plan)
    run = LocalRun(
        name=name,
        folder=folder / "runs" / name,
        data=data,
        clients=names,
        bundle=bundle,
        schedule=schedule,
        model=model,
        options=options,
        warm_start=warm_start,
        alignment=alignment,
        missing_modalities=missing_modalities,
        columns=columns,
        engines=engines,
        threads=threads or max(1, (os.cpu_count() or 1) // len(names)),
        micro_batch_size=micro_batch_size,
        features=(
            *("--feature-dtype", feature_dtype),
            *(() if max_feature_mb is None else ("--max-feature-mb", str(max_feature_mb))),
        ),
        memory_budget=memory_budget,
        broker=broker,
        calibration=calibration,
        plan=plan,
    )
    if run.folder.exists():
        raise UserError(f"{run.folder} exists", "choose another --name")
    with View() as view:
        closed = run_until_stopped(conduct(run, view))
    if as_json:
        click.echo(json.dumps(as_result(closed)))


def engines_of(names: tuple[str, ...], exported: Collection[str] | None) -> Iterator[str]:
    """The engines that these names mean here, for a bundle `exported` for these; None: for any.

    Raises `UserError`.
    """
    from edge_client.engines import ENGINES, choose

    for name in names:
        yield choose(name, ENGINES if exported is None else exported)


def _manifest(bundle: Path, context: click.Context) -> Manifest:
    """The bundle's. Raises `UserError`, also for an option that only an export heeds."""
    from wire.manifest import read_manifest

    for option in context.command.params:
        if option.name in EXPORTED and not _is_default(context, option.name):
            raise UserError(
                f"{option.opts[0]} was decided when {bundle} was exported",
                "leave it out, or leave out --bundle to export anew",
            )
    return read_manifest(bundle)[0]


def _is_default(context: click.Context, option: str) -> bool:
    """Whether nobody has said anything of it."""
    return context.get_parameter_source(option) == ParameterSource.DEFAULT


def as_result(closed: RunClosed) -> dict[str, Any]:
    """The result as plain values."""
    import msgspec

    result: dict[str, Any] = msgspec.to_builtins(closed)
    del result["type"]
    return result
