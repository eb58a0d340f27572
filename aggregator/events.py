"""What a run tells while it goes on, for a live view, a log or another program.

Rules: an event is a fact, never a command; each is one line of JSON by `to_json`. `RunClosed` is the last.

Next: `lamina/view.py`, which draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from wire.messages import Hello, RoundKey, Usage


class RunOpened(msgspec.Struct, frozen=True, tag=True):
    """rounds: of each stage. parameters: number of scalar parameters that each stage trains.

    resumed: the first round that is not done yet, for a run that goes on.
    """

    run: str
    schedule: str
    rounds: tuple[int, ...]
    parameters: tuple[int, ...]
    min_available_clients: int
    resumed: RoundKey | None = None


class ClientCame(msgspec.Struct, frozen=True, tag=True):
    """A client said hello, for the first time or with other values."""

    client: str
    hello: Hello


class ClientLeft(msgspec.Struct, frozen=True, tag=True):
    """A client, or the broker for it, said goodbye."""

    client: str


class RoundOpened(msgspec.Struct, frozen=True, tag=True):
    """The offer is out. `extended`: for one more time, as too few updates came until the deadline."""

    key: RoundKey
    cohort: tuple[str, ...]
    extended: bool = False


class UpdateAccepted(msgspec.Struct, frozen=True, tag=True):
    """It takes part, `staleness` rounds after the one it was trained for. norm: L2, of all its values."""

    key: RoundKey
    client: str
    num_examples: int
    loss: float
    size_bytes: int
    staleness: int = 0
    norm: float = 0.0


class UpdateRefused(msgspec.Struct, frozen=True, tag=True):
    """It does not, and the client was told so. `key`: what the client said it was for."""

    key: RoundKey
    client: str
    refusal: str
    detail: str


class RoundClosed(msgspec.Struct, frozen=True, tag=True):
    """The round's result is on disk.

    loss: the clients' training losses, weighted by their examples. metrics: of the hold-out, if any.
    """

    key: RoundKey
    accepted: tuple[str, ...]
    missing: tuple[str, ...]
    loss: float
    metrics: dict[str, float]
    seconds: float


class UsageTold(msgspec.Struct, frozen=True, tag=True):
    """What a round has cost a client."""

    client: str
    usage: Usage


class Figures(msgspec.Struct, frozen=True):
    """Of a stage or a whole run.

    metrics: of the hold-out after its last round. loss: of its last round.
    bytes_sent_per_client, bytes_received_per_client: at the MQTT socket, mean over the clients.
    update_bytes_per_client: the size of the accepted updates, mean over the clients that sent any.
    raw_update_bytes_per_client: the same before compression, as float32.
    peak_rss_mb_per_client: in 10^6 bytes, the largest of any client so far.
    cpu_s_per_client: processor seconds, mean over the clients.
    """

    metrics: dict[str, float]
    loss: float
    bytes_sent_per_client: int
    bytes_received_per_client: int
    update_bytes_per_client: int
    raw_update_bytes_per_client: int
    peak_rss_mb_per_client: float
    cpu_s_per_client: float
    rounds: int
    updates: int
    refusals: int
    seconds: float


class RunClosed(msgspec.Struct, frozen=True, tag=True):
    """The run is over. `model`: the folder of the final model."""

    schedule: str
    engine: str
    seed: int
    stages: tuple[Figures, ...]
    total: Figures
    model: str


Event = (
    RunOpened
    | ClientCame
    | ClientLeft
    | RoundOpened
    | UpdateAccepted
    | UpdateRefused
    | RoundClosed
    | UsageTold
    | RunClosed
)
Tell = Callable[[Event], None]


def headline(metrics: Mapping[str, float]) -> str | None:
    """The metric that stands for all of them, the larger the better; None without a hold-out."""
    return next((name for name in ("recall@10", "accuracy") if name in metrics), None)


def to_json(event: Event) -> str:
    """One line."""
    return msgspec.json.encode(event).decode()


def from_json(line: str | bytes) -> Event:
    """Raises `msgspec.MsgspecError` for anything else."""
    event: Event = msgspec.json.decode(line, type=Event)
    return event
