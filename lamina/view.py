"""The live view of a run: stages above, clients below, and a short table at the end.

Rules: `Board` gathers what the events say and knows nothing of a screen; `View` draws it. On a terminal it
is redrawn in place; elsewhere a line is printed for each round. It writes to standard error: standard
output belongs to results.

Next: `aggregator/events.py`, what is drawn.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from aggregator.events import (
    ClientCame,
    ClientLeft,
    Event,
    Figures,
    RoundClosed,
    RoundOpened,
    RunClosed,
    RunOpened,
    UpdateAccepted,
    UpdateRefused,
    UsageTold,
    headline,
)

NEWS = 4


@dataclass
class ClientRow:
    """A client as the view shows it. `state`: a word or two."""

    engine: str = ""
    examples: int = 0
    state: str = "here"
    loss: float | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    peak_rss_mb: float = 0.0


@dataclass
class StageRow:
    """A stage. `metrics`: of its last round."""

    rounds: int
    parameters: int
    done: int = 0
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Board:
    """What is known of the run."""

    run: str = ""
    schedule: str = ""
    status: str = "preparing"
    stages: list[StageRow] = field(default_factory=list)
    clients: dict[str, ClientRow] = field(default_factory=dict)
    news: deque[str] = field(default_factory=lambda: deque(maxlen=NEWS))
    closed: RunClosed | None = None

    def take(self, event: Event) -> None:
        """Note an event."""
        match event:
            case RunOpened():
                self.run, self.schedule = event.run, event.schedule
                self.stages = [
                    StageRow(rounds, parameters)
                    for rounds, parameters in zip(event.rounds, event.parameters, strict=True)
                ]
                self.status = f"waiting for {_count(event.min_available_clients, 'client')}"
                if event.resumed is not None:
                    for stage in self.stages[: event.resumed.stage]:
                        stage.done = stage.rounds
                    self.stages[event.resumed.stage].done = event.resumed.round
            case ClientCame():
                row = self.clients.setdefault(event.client, ClientRow())
                row.engine, row.examples = (
                    event.hello.engine,
                    max(event.hello.num_examples.values(), default=0),
                )
                row.state = "here"
            case ClientLeft():
                self.clients.setdefault(event.client, ClientRow()).state = "gone"
                self.news.append(f"{event.client} is gone")
            case RoundOpened():
                self.status = str(event.key)
                for client in event.cohort:
                    row = self.clients.setdefault(client, ClientRow())
                    if not (event.extended and row.state == "done"):
                        row.state = "training"
                if event.extended:
                    self.news.append(f"{event.key} is offered again: too few updates at the deadline")
            case UpdateAccepted():
                row = self.clients.setdefault(event.client, ClientRow())
                row.state, row.loss = "done", event.loss
            case UpdateRefused():
                self.news.append(f"{event.client}: {event.refusal}, {event.detail}")
                if event.client in self.clients:
                    self.clients[event.client].state = event.refusal
            case RoundClosed():
                stage = self.stages[event.key.stage]
                stage.done, stage.loss, stage.metrics = event.key.round + 1, event.loss, event.metrics
                stage.seconds += event.seconds
                for client in event.missing:
                    row = self.clients.setdefault(client, ClientRow())
                    row.state = "missing" if row.state == "training" else row.state
                if event.missing:
                    self.news.append(f"{event.key} ended without {', '.join(event.missing)}")
            case UsageTold():
                row = self.clients.setdefault(event.client, ClientRow())
                row.bytes_sent += event.usage.bytes_sent
                row.bytes_received += event.usage.bytes_received
                row.peak_rss_mb = event.usage.peak_rss_bytes / 1e6
            case RunClosed():
                self.status, self.closed = "done", event


class View:
    """Draws a `Board` within `with`; `show` takes one event more."""

    def __init__(self, console: Console | None = None) -> None:
        # What peers send is shown as it is, never read as markup.
        self._console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
        self._board = Board()
        self._live = Live(console=self._console, refresh_per_second=4, get_renderable=self._draw)

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def status(self, text: str) -> None:
        """What happens before the run begins."""
        self._board.status = text
        if not self._console.is_terminal:
            self._console.print(text, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Something that a person should know."""
        self._board.news.append(text)
        if not self._console.is_terminal:
            self._console.print(text, markup=False, soft_wrap=True)

    def show(self, event: Event) -> None:
        """Take an event and draw."""
        self._board.take(event)
        if isinstance(event, RunClosed):
            self.__exit__()
            self._console.print(summary(event))
        elif not self._console.is_terminal and (line := as_line(event, self._board)):
            self._console.print(line, markup=False, soft_wrap=True)

    def _draw(self) -> Group:
        board = self._board
        title = Text.assemble(
            (f"{board.run or 'lamina'} ", "bold"), board.schedule, "  ", (board.status, "cyan")
        )
        parts: list[RenderableType] = [
            title,
            *([_stages(board)] if board.stages else []),
            *(Text(f"  {line}", style="yellow") for line in board.news),
            *([_clients(board)] if board.clients else []),
        ]
        return Group(*parts)


def as_line(event: Event, board: Board) -> str:
    """An event as a line of a log; empty for those that are too small."""
    match event:
        case RoundClosed():
            stage, updates = board.stages[event.key.stage], _count(len(event.accepted), "update")
            return (
                f"{event.key} of {stage.rounds}: {updates}, loss {event.loss:.3f}"
                f"{_headline(event.metrics, ', ')}, {event.seconds:.1f} s"
                + (f", without {', '.join(event.missing)}" if event.missing else "")
            )
        case ClientCame():
            examples = board.clients[event.client].examples
            return f"{event.client} is here: {examples} examples, {event.hello.engine}"
        case ClientLeft():
            return f"{event.client} is gone"
        case UpdateRefused():
            return f"refused an update of {event.client} for {event.key}: {event.refusal}, {event.detail}"
        case RunOpened():
            return f"run {event.run}: {event.schedule}, {len(event.rounds)} stages, {board.status}"
    return ""


def summary(closed: RunClosed) -> Group:
    """The short table at the end, and where the model lies."""
    metrics = closed.total.metrics
    names = [name for name in metrics if name.split("@")[0] in ("recall", "accuracy")]
    headers = [name.replace("recall", "R") for name in names]
    columns = ["", *headers, "loss", "sent", "received", "memory", "rounds", "time"]
    table = Table(
        *(Column(name, justify="right" if name else "left", no_wrap=True) for name in columns),
        box=None,
        padding=(0, 2, 0, 0),
    )

    def add(name: str, one: Figures) -> None:
        cells = [f"{100 * one.metrics[key]:.1f}%" if key in one.metrics else "" for key in names]
        sent, received = _size(one.bytes_sent_per_client), _size(one.bytes_received_per_client)
        memory, time = f"{one.peak_rss_mb_per_client:.0f} MB", _time(one.seconds)
        table.add_row(name, *cells, f"{one.loss:.3f}", sent, received, memory, str(one.rounds), time)

    for number, stage in enumerate(closed.stages, 1):
        add(f"stage {number}", stage)
    add("whole run", closed.total)
    if names:
        table.add_row("chance", *(f"{100 * metrics.get(_chance(name), 0):.1f}%" for name in names))
    notes = ["Bytes are the mean of the clients, memory is the largest peak of any."]
    total = closed.total
    if total.update_bytes_per_client < total.raw_update_bytes_per_client:
        before, after = _size(total.raw_update_bytes_per_client), _size(total.update_bytes_per_client)
        notes.append(f"A client's updates took {after}; uncompressed they would have taken {before}.")
    if directions := _directions(metrics):
        meaning = "R@k is the share of the hold-out whose partner is among the k best matches."
        notes = [meaning, *directions, *notes]
    if closed.total.refusals:
        notes.append(f"{closed.total.refusals} updates were refused.")
    return Group(
        table, *(Text(note, style="dim") for note in notes), Text(f"The final model is in {closed.model}")
    )


def _chance(metric: str) -> str:
    """The name of the metric that tells what guessing would give."""
    return metric.replace("recall", "chance") if "@" in metric else "chance"


def _directions(metrics: dict[str, float]) -> list[str]:
    """Each direction of retrieval as a line."""
    found: dict[str, list[str]] = {}
    for name, value in metrics.items():
        if "_to_" in name:
            direction, _, k = name.partition("@")
            found.setdefault(direction.replace("_", " "), []).append(f"R@{k} {100 * value:.1f}%")
    return [f"{direction}: {', '.join(values)}" for direction, values in found.items()]


def _stages(board: Board) -> Table:
    table = Table(
        "stage", "trains", "rounds", "", "loss", "hold-out", "time", box=None, padding=(0, 2, 0, 0)
    )
    for number, stage in enumerate(board.stages, 1):
        table.add_row(
            str(number),
            f"{stage.parameters:,}",
            f"{stage.done}/{stage.rounds}",
            ProgressBar(total=stage.rounds, completed=stage.done, width=20),
            "" if stage.loss is None else f"{stage.loss:.3f}",
            _headline(stage.metrics).partition(" (")[0],
            _time(stage.seconds) if stage.done else "",
        )
    return table


def _clients(board: Board) -> Table:
    words = [Column(name) for name in ("client", "engine", "state")]
    numbers = [Column(name, justify="right") for name in ("loss", "sent", "received", "memory")]
    table = Table(*words, *numbers, box=None, padding=(0, 2, 0, 0))
    for name, row in sorted(board.clients.items()):
        table.add_row(
            name,
            Text(row.engine),
            Text(row.state, style={"done": "green", "training": "cyan", "here": ""}.get(row.state, "red")),
            "" if row.loss is None else f"{row.loss:.3f}",
            _size(row.bytes_sent),
            _size(row.bytes_received),
            f"{row.peak_rss_mb:.0f} MB" if row.peak_rss_mb else "",
        )
    return table


def _headline(metrics: dict[str, float], before: str = "") -> str:
    name = headline(metrics)
    if name is None:
        return ""
    chance = metrics.get(_chance(name))
    told = f" (chance {100 * chance:.1f}%)" if chance is not None else ""
    return f"{before}{name} {100 * metrics[name]:.1f}%{told}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count else ""


def _time(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
