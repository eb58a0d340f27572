"""A run on this machine: a broker, an aggregator and clients, each a program in a process of its own.

Rules: nothing here is a shortcut. Bundle, broker, aggregator and clients are the commands that a person
types on three machines; this file only chooses their arguments. `lamina run` and the rows of `lamina
experiment` are such runs.

    FOLDER/bundle             the exported stages, unless they are elsewhere
    FOLDER/aggregator         books, blobs, and `model`, the final model
    FOLDER/clients/<client>   each client's state
    FOLDER/logs               what each of them logged

Next: `lamina/processes.py`, which keeps them; `aggregator/run.py`, `edge_client/session.py`, what they do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from wire.errors import LaminaError, UserError
from wire.tasks import beside
from wire.topics import check_name

if TYPE_CHECKING:
    from aggregator.events import Event, RunClosed
    from lamina.processes import Processes


class Watcher(Protocol):
    """Who is told how it goes, such as `lamina.view.View`."""

    def status(self, text: str) -> None:
        """What is being done now."""

    def note(self, text: str) -> None:
        """What should be known."""

    def show(self, event: Event) -> None:
        """An event of the aggregator's."""


@dataclass(frozen=True)
class LocalRun:
    """What the options say.

    folder: of this run. bundle: exported before, or None. broker: None for our own. engines: of the
    clients, in turn. features: client options. memory_budget: that the export fits, bytes. plan: aggregator
    options. client_processes: that the clients share, the first of them alone in its own; 0: one each.
    memory: client -> bytes that it may use, of those that may not use what they like.
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
    alignment: float
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
    client_processes: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The clients of each process."""
        others = self.client_processes - 1
        if not 0 < others < len(self.clients) - 1:
            return tuple((client,) for client in self.clients)
        return self.clients[:1], *(self.clients[1 + place :: others] for place in range(others))


async def conduct(run: LocalRun, view: Watcher) -> RunClosed:
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


async def _export(run: LocalRun, processes: Processes, view: Watcher) -> Path:
    view.status(f"exporting {run.model} for {run.schedule}, and checking it against torch")
    bundle = run.folder / "bundle"
    told = await processes.run("export", "export", *export_arguments(run, bundle))
    if run.memory_budget is not None:
        for line in told.splitlines():
            if "expected" in line:
                view.note(line)
    return bundle


async def _aggregate(
    run: LocalRun, processes: Processes, url: str, bundle: Path, view: Watcher
) -> RunClosed:
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


async def _keep_clients(run: LocalRun, processes: Processes, url: str, view: Watcher) -> None:
    """For ever. Raises a client's error when fewer are left than the aggregator waits for."""
    from lamina.processes import ChildFailed

    lost: set[str] = set()

    def lose(clients: Iterable[str], error: LaminaError) -> None:
        view.note(str(error))
        lost.update(clients)
        if len(run.clients) - len(lost) < run.plan["min_available_clients"]:
            raise error

    async def keep(number: int, group: tuple[str, ...]) -> None:
        alone = len(group) == 1
        command, name = ("client", group[0]) if alone else ("clients", f"clients-{number}")
        arguments = _client_arguments(run, url, name) if alone else _group_arguments(run, url, group)

        def one_of_them(line: str) -> None:
            client, _, error = line.partition(": ")
            lose((client,), UserError(f"{client}: {error}", f"see {processes.log(name)}"))

        try:
            await processes.keep(name, command, *arguments, told=None if alone else one_of_them)
        except ChildFailed as error:
            lose(group, error)

    await asyncio.gather(*(keep(number, group) for number, group in enumerate(run.groups, 1)))
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


def export_arguments(run: LocalRun, bundle: Path) -> list[str]:
    """Of the export that this run needs."""
    arguments = ["--model", run.model, "--schedule", run.schedule, "--warm-start", run.warm_start]
    arguments += ["--seed", str(run.plan["seed"])]
    arguments += ["--alignment", str(run.alignment)] if run.alignment else []
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
    arguments += ["--engine", _engine(run, client), "--threads", str(run.threads), *run.features]
    if client in run.memory:
        arguments += ["--memory-budget", f"{run.memory[client]}B"]
    return [*arguments, *_columns(run)]


def _group_arguments(run: LocalRun, url: str, group: Sequence[str]) -> list[str]:
    arguments = ["--broker", url, "--data", str(run.data / "clients"), "--run", run.name]
    arguments += ["--dir", str(run.folder / "clients"), "--threads", str(run.threads), *run.features]
    arguments += [word for client in group for word in ("--engine", _engine(run, client))]
    for client in group:
        if client in run.memory:
            arguments += ["--memory-budget", f"{client}={run.memory[client]}B"]
    return [*arguments, *_columns(run), *group]


def _engine(run: LocalRun, client: str) -> str:
    return run.engines[run.clients.index(client) % len(run.engines)]


def _columns(run: LocalRun) -> list[str]:
    return [word for column in run.columns for word in ("--column", column)]


def clients_of(data: Path) -> tuple[str, ...]:
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
