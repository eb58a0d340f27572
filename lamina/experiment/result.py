"""What a row has come to: from the aggregator's events to figures round by round, and to a file.

Rules: bytes, FLOPs, seconds are sums from the run's beginning to a round, so a figure over another is a
curve. Bytes and FLOPs are means over all clients, asked or not or left out. Memory is the first client's,
which is alone in its process. Clients that share a process tell its processor time each: it counts once,
and the sum over processes is divided among all clients. A round that a client was called off from counts
whole.

A result is there as a whole or not at all: `wire/files.py`. Next: `lamina/experiment/row.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aggregator.events import ClientCame, Event, RoundClosed, RunClosed, UsageTold
from export.flops import flops_by_round
from lamina.experiment.settings import Values, up_to_date
from wire.errors import LocalError, UserError
from wire.files import replacing
from wire.messages import RoundKey, Usage

if TYPE_CHECKING:
    from export.costs import StageCost


class RoundResult(msgspec.Struct, frozen=True):
    """After a round; `stage` and `round` count from 1, `round` over all stages.

    metrics: of the hold-out. loss: the clients' training loss. bytes_sent, bytes_received: at the MQTT
    socket, of a client. flops: of a client. peak_memory_mb: 10^6 bytes, of the first client, so far; None
    until it has told. seconds: of the rounds, evaluation included. cpu_s: of a client.
    """

    stage: int
    round: int
    metrics: dict[str, float]
    loss: float
    bytes_sent: float
    bytes_received: float
    flops: float
    peak_memory_mb: float | None
    seconds: float
    cpu_s: float


class Result(msgspec.Struct, frozen=True):
    """A row that is done.

    settings: all of them. engine: that ran. clients: their number, with those that are left out. examples:
    client -> examples, of those that took part. first: the client that was alone. missing: updates that
    were waited for in vain. holdout: the folder of the metrics' examples, seen from the experiment's, ""
    without. date: of the end, ISO 8601. version: of Lamina.
    """

    id: str
    settings: dict[str, Any]
    engine: str
    clients: int
    first: str
    examples: dict[str, int]
    rounds: tuple[RoundResult, ...]
    metrics: dict[str, float]
    peak_memory_mb_by_stage: tuple[float | None, ...]
    updates: int
    missing: int
    refusals: int
    holdout: str
    date: str
    version: str

    @property
    def last(self) -> RoundResult:
        """The totals."""
        return self.rounds[-1]


def rounds_of(
    events: Sequence[Event],
    groups: Sequence[Sequence[str]],
    costs: Mapping[str, Sequence[StageCost]],
    settings: Values,
    left_out: int = 0,
) -> tuple[RoundResult, ...]:
    """Round by round. groups: the clients of each process, the first client alone in the first.

    costs: of the stages, by client. left_out: the number of clients that are in no group.
    """
    usage = _usage(events)
    examples = examples_of(events)
    clients = [client for group in groups for client in group]
    everyone = len(clients) + left_out
    flops = {
        client: _flops(client, usage, examples[client], of_stages, settings)
        for client, of_stages in costs.items()
    }
    cpu_s = dict.fromkeys(clients, 0.0)
    sent = received = computed = seconds = 0.0
    peak: float | None = None
    found: list[RoundResult] = []
    for number, closed in enumerate((one for one in events if isinstance(one, RoundClosed)), 1):
        for client in clients:
            computed += flops.get(client, {}).get(closed.key, 0.0)
            for told in usage.get((closed.key, client), {}).values():
                sent += told.bytes_sent
                received += told.bytes_received
                cpu_s[client] += told.cpu_s
                if client == clients[0]:
                    peak = max(peak or 0.0, told.peak_rss_bytes / 1e6)
        seconds += closed.seconds
        found.append(
            RoundResult(
                stage=closed.key.stage + 1,
                round=number,
                metrics=closed.metrics,
                loss=closed.loss,
                bytes_sent=sent / everyone,
                bytes_received=received / everyone,
                flops=computed / everyone,
                peak_memory_mb=peak,
                seconds=seconds,
                cpu_s=sum(max(cpu_s[client] for client in group) for group in groups) / everyone,
            )
        )
    return tuple(found)


def examples_of(events: Sequence[Event]) -> dict[str, int]:
    """Client -> its examples, as it has said."""
    return {
        event.client: max(event.hello.num_examples.values(), default=0)
        for event in events
        if isinstance(event, ClientCame)
    }


def modalities_of(events: Sequence[Event]) -> dict[str, frozenset[str]]:
    """Client -> the modalities that its examples have."""
    return {
        event.client: frozenset(event.hello.num_examples)
        for event in events
        if isinstance(event, ClientCame)
    }


def by_stage(rounds: Sequence[RoundResult]) -> tuple[float | None, ...]:
    """The first client's peak memory so far at the end of each stage, MB."""
    return tuple({one.stage: one.peak_memory_mb for one in rounds}.values())


def closing(events: Sequence[Event]) -> RunClosed:
    """The last event."""
    if not isinstance(events[-1], RunClosed):
        raise LocalError("the run has not told its end")
    return events[-1]


def write_result(path: Path, result: Result) -> None:
    """Raises `UserError` where the disk does not take it."""
    try:
        with replacing(path, 0o644) as file:
            file.write(msgspec.json.format(msgspec.json.encode(result), indent=1))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", "free some space") from error


def read_result(path: Path) -> Result | None:
    """None where there is none. Raises `UserError` for one that cannot be read."""
    try:
        result = msgspec.json.decode(path.read_bytes(), type=Result)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", "remove it, and run its row again") from error
    return msgspec.structs.replace(result, settings=up_to_date(result.settings))


def _usage(events: Sequence[Event]) -> dict[tuple[RoundKey, str], dict[float, Usage]]:
    """By round and client, then by when the offer was made: told twice it counts once."""
    found: dict[tuple[RoundKey, str], dict[float, Usage]] = {}
    for event in events:
        if isinstance(event, UsageTold):
            found.setdefault((event.usage.key, event.client), {})[event.usage.opened_s] = event.usage
    return found


def _flops(
    client: str,
    usage: dict[tuple[RoundKey, str], dict[float, Usage]],
    examples: int,
    costs: Sequence[StageCost],
    settings: Values,
) -> dict[RoundKey, float]:
    keys = sorted(key for key, name in usage if name == client)
    each = flops_by_round(
        costs,
        [key.stage for key in keys],
        examples,
        settings["local_epochs"],
        cached=settings["feature_cache"],
        views=max(1, settings["augmentations"]),
    )
    return {key: flops.total for key, flops in zip(keys, each, strict=True)}
