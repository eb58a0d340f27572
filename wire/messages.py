"""The messages of the protocol: msgpack structs, checked for size before and for types while decoding.

Rules: tensors never travel in a message, only as blobs (safetensors) named by a `BlobRef`. Unknown fields
are ignored, so a newer peer may add some. Every message may arrive twice, late, or not at all: state
that matters is announced again every few seconds (`Announcement`, `Offer`, `Hello`, `Report`) until it is
superseded or answered.

An aggregator announces a run, clients say hello, an offer opens a round, reports close it:

    Announcement -> Hello -> Offer -> (Want, chunks) -> Report -> (Want, chunks) -> Receipt -> Usage

Next: `wire/rounds.py`, which states these messages move each side through.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from wire.errors import Malformed, Refusal, TooLarge
from wire.manifest import BlobRef

MAX_MESSAGE_BYTES = 64 << 10
MAX_OFFER_BYTES = 256 << 10  # an offer names its cohort


class RoundKey(msgspec.Struct, frozen=True, order=True):
    """Which round of a run: with the client's name, the key of an update. All counted from 0."""

    stage: int
    round: int

    def __str__(self) -> str:
        return f"stage {self.stage + 1} round {self.round + 1}"


class Announcement(msgspec.Struct, frozen=True, tag=True):
    """A run exists. `open` is False once it is finished: clients then go home.

    started_s: Unix time of the run's start; of several open runs a client joins the newest.
    chunk_bytes: the size of a packet in this run's transfers, header included (`wire/transfer.py`).
    """

    run: str
    manifest: BlobRef
    started_s: float
    heartbeat_s: float
    chunk_bytes: int
    open: bool = True


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A client is there and what it has; repeated every `heartbeat_s`.

    num_examples: modality -> examples that have it. memory_mb: physical memory, in 10^6 bytes.
    """

    num_examples: dict[str, int]
    engine: str
    memory_mb: int
    version: str


class Bye(msgspec.Struct, frozen=True, tag=True):
    """A client is gone; also the last will that the broker publishes for it."""


class TrainPlan(msgspec.Struct, frozen=True):
    """How to train locally in this round. `seed` fixes the order of the examples."""

    learning_rate: Annotated[float, msgspec.Meta(gt=0)]
    batch_size: Annotated[int, msgspec.Meta(ge=1)]
    local_epochs: Annotated[int, msgspec.Meta(ge=1)]
    seed: Annotated[int, msgspec.Meta(ge=0)]


class Offer(msgspec.Struct, frozen=True, tag=True):
    """A round is open for `cohort`.

    opened_s: Unix time of its opening; an aggregator that was restarted opens a round once more.
    parameters: values of the stage's trainable groups now (safetensors).
    frozen: for each earlier stage, the values of the groups that were frozen after it.
    deadline_s: seconds left when this copy was published.
    """

    key: RoundKey
    opened_s: float
    cohort: tuple[str, ...]
    parameters: BlobRef
    frozen: tuple[BlobRef, ...]
    plan: TrainPlan
    deadline_s: float


class Want(msgspec.Struct, frozen=True, tag=True):
    """The receiver asks for chunks: half-open index ranges `[first, end)` of one blob."""

    blob: BlobRef
    ranges: tuple[tuple[int, int], ...]


class Report(msgspec.Struct, frozen=True, tag=True):
    """An update is ready to be fetched: the change of the trained groups, float32 (safetensors).

    groups: the parameter groups in it, all or some of the stage's trainable ones.
    loss: mean training loss over the last local epoch.
    """

    key: RoundKey
    update: BlobRef
    groups: tuple[str, ...]
    num_examples: int
    loss: float


class Receipt(msgspec.Struct, frozen=True, tag=True):
    """The aggregator's answer to a report; `refusal` is empty when the update is accepted."""

    key: RoundKey
    refusal: Refusal | None = None
    detail: str = ""


class Usage(msgspec.Struct, frozen=True, tag=True):
    """What a round has cost a client; sent once, after the receipt.

    bytes_sent, bytes_received: counted at the MQTT socket since the last `Usage`.
    peak_rss_bytes: the process's high-water mark so far. seconds: from the offer to the receipt.
    """

    key: RoundKey
    bytes_sent: int
    bytes_received: int
    peak_rss_bytes: int
    seconds: float


Message = Announcement | Hello | Bye | Offer | Want | Report | Receipt | Usage
M = TypeVar("M", Announcement, Hello, Bye, Offer, Want, Report, Receipt, Usage)

_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """Msgpack, with the struct's name as its tag."""
    return _encoder.encode(message)


def decode(payload: bytes, kind: type[M]) -> M:
    """The message in `payload`. Raises `TooLarge` before decoding, `Malformed` for any other content."""
    limit = MAX_OFFER_BYTES if kind is Offer else MAX_MESSAGE_BYTES
    if len(payload) > limit:
        raise TooLarge(f"{kind.__name__} of {len(payload)} bytes, the limit is {limit}")
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Malformed(f"not a {kind.__name__}: {error}") from error
