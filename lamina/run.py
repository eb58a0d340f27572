"""`lamina run`: the whole thing on one machine, each program in a process of its own.

Rules: nothing here is a shortcut. Data, bundle, broker, aggregator and clients are the commands that a
person types on three machines; this file only chooses their arguments and draws what the aggregator tells.

    DIR/data/...                      the prepared data set, for the next run too
    DIR/runs/<run>/bundle             the exported stages, unless --bundle says where they are
    DIR/runs/<run>/aggregator         books, blobs, and `model`, the final model
    DIR/runs/<run>/clients/<client>   each client's state
    DIR/runs/<run>/logs               what each of them logged

Next: `lamina/processes.py`, which keeps them; `aggregator/run.py`, `edge_client/session.py`, what they do.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Collection, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lamina.data.sets import DATA_SETS, prepare_with_defaults
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
from wire.errors import LaminaError, UserError
from wire.mqtt import Broker
from wire.tasks import beside
from wire.topics import check_name

if TYPE_CHECKING:
    from aggregator.events import RunClosed
    from lamina.processes import Processes
    from lamina.view import View
    from wire.manifest import Manifest


EXPORTED = (
    *("schedule", "model", "options", "warm_start"),
    *("missing_modalities", "micro_batch_size", "memory_budget"),
)
"""Parameters that only an export heeds."""


@dataclass(frozen=True)
class LocalRun:
    """What the options say.

    folder: of this run. bundle: exported before, or None. broker: None for our own. engines: of the
    clients, in turn. features: client options. memory_budget: of a client, bytes. plan: aggregator options.
    """

    name: str
    folder: Path
    data: Path
    clients: tuple[str, ...]
    bundle: Path | None
    schedule: str
    model: str
    options: tuple[str, ...]
    warm_start: str
    missing_modalities: bool
    columns: tuple[str, ...]
    engines: tuple[str, ...]
    threads: int
    micro_batch_size: str
    features: tuple[str, ...]
    memory_budget: int | None
    broker: str | None
    calibration: Path | None
    plan: dict[str, Any]


@click.command("run", short_help="All of it on this machine.")
@model_options
@click.option(
    "--clients",
    type=click.IntRange(min=1),
    help="Client processes, for a downloaded data set.  [default: 4 of emoji, 10 of digits, 8 of watch]",
)
@click.option(
    "--data-set",
    type=click.Choice(list(DATA_SETS)),
    default="emoji",
    show_default=True,
    help="What is downloaded. Without --model, digits and watch train the model of their name.",
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
    names = _clients(data)
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


async def conduct(run: LocalRun, view: View) -> RunClosed:
    """Start everything, draw what happens, stop everything."""
    from lamina.processes import Processes

    async with Processes(run.folder / "logs", view.note) as processes:
        bundle = run.bundle or await _export(run, processes, view)
        broker_ends: Coroutine[Any, Any, Any]
        if run.broker is None:
            url, broker_ends = await _start_broker(processes)
        else:
            url, broker_ends = run.broker, asyncio.Event().wait()
        view.status(f"starting the clients on {url}")
        return await beside(
            _aggregate(run, processes, url, bundle, view),
            _keep_clients(run, processes, url, view),
            broker_ends,
        )


async def _export(run: LocalRun, processes: Processes, view: View) -> Path:
    view.status(f"exporting {run.model} for {run.schedule}, and checking it against torch")
    bundle = run.folder / "bundle"
    told = await processes.run("export", "export", *_export_arguments(run, bundle))
    if run.memory_budget is not None:
        for line in told.splitlines():
            if "expected" in line:
                view.note(line)
    return bundle


async def _aggregate(run: LocalRun, processes: Processes, url: str, bundle: Path, view: View) -> RunClosed:
    from aggregator.events import RunClosed, from_json
    from lamina.processes import ChildFailed

    child = await processes.start("aggregator", "aggregator", *_aggregator_arguments(run, url, bundle))
    assert child.stdout is not None
    closed: RunClosed | None = None
    async for line in child.stdout:
        event = from_json(line)
        view.show(event)
        if isinstance(event, RunClosed):
            closed = event
    code = await child.wait()
    if closed is None:
        raise ChildFailed("aggregator", code, processes.log("aggregator"))
    return closed


async def _keep_clients(run: LocalRun, processes: Processes, url: str, view: View) -> None:
    """For ever. Raises a client's error when fewer are left than the aggregator waits for."""
    errors: list[LaminaError] = []

    async def keep(client: str) -> None:
        try:
            await processes.keep(client, "client", *_client_arguments(run, url, client))
        except LaminaError as error:
            view.note(str(error))
            errors.append(error)
            if len(run.clients) - len(errors) < run.plan["min_available_clients"]:
                raise

    await asyncio.gather(*(keep(client) for client in run.clients))
    await asyncio.Event().wait()  # the aggregator has the last word


async def _start_broker(processes: Processes) -> tuple[str, Coroutine[Any, Any, None]]:
    """Its address, and what raises once it has ended."""
    from lamina.processes import ChildFailed

    child = await processes.start("broker", "broker", "--port", "0")
    assert child.stdout is not None
    line = (await child.stdout.readline()).decode().strip()

    async def ends() -> None:
        raise ChildFailed("broker", await child.wait(), processes.log("broker"))

    if not line:
        await ends()
    return line.split()[-1], ends()


def _export_arguments(run: LocalRun, bundle: Path) -> list[str]:
    arguments = ["--model", run.model, "--schedule", run.schedule, "--warm-start", run.warm_start]
    arguments += ["--seed", str(run.plan["seed"])]
    arguments += ["--missing-modalities"] if run.missing_modalities else []
    arguments += [word for option in run.options for word in ("--option", option)]
    arguments += [word for engine in dict.fromkeys(run.engines) for word in ("--engine", engine)]
    arguments += ["--max-batch-size", str(max(64, run.plan["batch_size"]))]
    arguments += ["--micro-batch-size", run.micro_batch_size]
    arguments += ["--batch-size", str(run.plan["batch_size"])]
    if run.memory_budget is not None:
        arguments += ["--memory-budget", f"{run.memory_budget}B"]
    arguments += [word for client in run.clients for word in ("--data", str(run.data / "clients" / client))]
    return [*arguments, *_columns(run), "--out", str(bundle)]


def _aggregator_arguments(run: LocalRun, url: str, bundle: Path) -> list[str]:
    arguments = ["--broker", url, "--bundle", str(bundle), "--name", run.name]
    arguments += ["--dir", str(run.folder / "aggregator"), "--json", *_columns(run)]
    if (run.data / "holdout").is_dir():
        arguments += ["--holdout", str(run.data / "holdout")]
    if run.calibration is not None:
        arguments += ["--calibration", str(run.calibration)]
    return arguments + [
        word for name, value in run.plan.items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def _client_arguments(run: LocalRun, url: str, client: str) -> list[str]:
    arguments = ["--broker", url, "--data", str(run.data / "clients" / client), "--name", client]
    arguments += ["--run", run.name, "--dir", str(run.folder / "clients" / client)]
    engine = run.engines[run.clients.index(client) % len(run.engines)]
    arguments += ["--engine", engine, "--threads", str(run.threads), *run.features]
    return [*arguments, *_columns(run)]


def _columns(run: LocalRun) -> list[str]:
    return [word for column in run.columns for word in ("--column", column)]


def _clients(data: Path) -> tuple[str, ...]:
    """The clients that the data is divided among. Raises `UserError`."""
    folder = data / "clients"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not names:
        raise UserError(
            f"{data} has no clients/<name>/ with examples",
            "see `lamina data prepare`, or divide your own data so",
        )
    for name in names:
        check_name(name, "the client's name")
    return tuple(names)
