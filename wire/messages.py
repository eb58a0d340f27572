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

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from wire.errors import UNDECODABLE, LocalError, Malformed, Refusal, TooLarge
from wire.manifest import BlobRef, Count
from wire.signature import SIGNATURE_BYTES
from wire.topics import NAME_PATTERN
from wire.transfer import MAX_CHUNK_BYTES, MIN_CHUNK_BYTES

MAX_LEARNING_RATE = 1e6
MAX_SECONDS = 1e9
MAX_AUGMENTATIONS = 1000
MAX_STALENESS = 1000
MAX_PROXIMAL_MU = 1e6
MAX_MESSAGE_BYTES = 64 << 10
MAX_OFFER_BYTES = 256 << 10  # an offer names its cohort

Compression = Literal["none", "float16", "int8"]

Name = Annotated[str, Meta(pattern=rf"^{NAME_PATTERN}\Z")]
Seconds = Annotated[float, Meta(ge=0, le=MAX_SECONDS)]
Instant = Annotated[float, Meta(ge=0, le=1e12)]
Signature = Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


class RoundKey(msgspec.Struct, frozen=True, order=True):
    """Which round of a run: with the client's name, the key of an update. All counted from 0."""

    stage: Count
    round: Count

    def __str__(self) -> str:
        return f"stage {self.stage + 1} round {self.round + 1}"


class Announcement(msgspec.Struct, frozen=True, tag=True):
    """A run exists. `open` is False once it is finished: clients then go home.

    started_s: Unix time of the run's start; of several open runs a client joins the newest.
    chunk_bytes: the size of a packet in this run's transfers, header included (`wire/transfer.py`).
    signature: the owner's, of the manifest (`wire/signature.py`); None: the bundle is not signed.
    """

    run: Name
    manifest: BlobRef
    started_s: Instant
    heartbeat_s: Seconds
    chunk_bytes: Annotated[int, Meta(ge=MIN_CHUNK_BYTES, le=MAX_CHUNK_BYTES)]
    open: bool = True
    signature: Signature | None = None


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A client is there and what it has; repeated every `heartbeat_s`.

    num_examples: modality -> examples that have it. memory_mb: physical memory, in 10^6 bytes.
    """

    num_examples: dict[str, Count]
    engine: Name
    memory_mb: Count
    version: Annotated[str, Meta(max_length=64)]


class Bye(msgspec.Struct, frozen=True, tag=True):
    """A client is gone; also the last will that the broker publishes for it."""


class TrainPlan(msgspec.Struct, frozen=True):
    """How to train locally in this round. `seed` fixes the order of the examples.

    compression: of the update and of `Change`. prefix_compression: of `Offer.frozen`.
    augmentations: views of each image to draw from, 0 for the image as it is.
    max_staleness: rounds by which the update may be late and still count; with 0, the next round calls
        training off.
    proximal_mu: FedProx's mu, how strongly parameters are held to the offered ones; 0: not at all.
    """

    learning_rate: Annotated[float, Meta(ge=0, le=MAX_LEARNING_RATE)]
    batch_size: Annotated[int, Meta(ge=1, le=2**31)]
    local_epochs: Annotated[int, Meta(ge=1, le=2**31)]
    seed: Count
    compression: Compression = "none"
    prefix_compression: Compression = "none"
    augmentations: Annotated[int, Meta(ge=0, le=MAX_AUGMENTATIONS)] = 0
    max_staleness: Annotated[int, Meta(ge=0, le=MAX_STALENESS)] = 0
    proximal_mu: Annotated[float, Meta(ge=0, le=MAX_PROXIMAL_MU)] = 0.0


class Change(msgspec.Struct, frozen=True):
    """A cheap way to parameters for who still has those of the round before: `base` + `change` = `result`.

    base, result: as blobs of trainable groups are (safetensors), of one stage; `result` is the offer's
    parameters, or, when a stage begins, what the one before ended with. change: `wire/compression.py`.
    """

    base: BlobRef
    change: BlobRef
    result: BlobRef


class Offer(msgspec.Struct, frozen=True, tag=True):
    """A round is open for `cohort`.

    opened_s: Unix time of its opening; a round that is offered for longer is opened once more.
    parameters: values of the stage's trainable groups now (safetensors).
    frozen: for each earlier stage, the values of the groups that were frozen after it (compressed).
    deadline_s: seconds left when this copy was published.
    change: None in the first round and without compression.
    """

    key: RoundKey
    opened_s: Instant
    cohort: tuple[Name, ...]
    parameters: BlobRef
    frozen: tuple[BlobRef, ...]
    plan: TrainPlan
    deadline_s: Seconds
    change: Change | None = None


class Want(msgspec.Struct, frozen=True, tag=True):
    """The receiver asks for chunks: half-open index ranges `[first, end)` of one blob."""

    blob: BlobRef
    ranges: tuple[tuple[int, int], ...]


class Report(msgspec.Struct, frozen=True, tag=True):
    """An update is ready to be fetched: the change of the trained groups (`wire/compression.py`).

    groups: the parameter groups in it, all or some of the stage's trainable ones.
    loss: mean training loss over the last local epoch.
    """

    key: RoundKey
    update: BlobRef
    groups: tuple[str, ...]
    num_examples: Count
    loss: float


class Receipt(msgspec.Struct, frozen=True, tag=True):
    """The aggregator's answer to a report; `refusal` is empty when the update is accepted."""

    key: RoundKey
    refusal: Refusal | None = None
    detail: str = ""


class Usage(msgspec.Struct, frozen=True, tag=True):
    """What a round has cost a client; sent once, after the receipt or when the round was given up.

    bytes_sent, bytes_received: counted at the MQTT socket since the last `Usage`.
    opened_s: the offer's, for a round may be offered more than once.
    peak_rss_bytes: the process's high-water mark so far. seconds: from the offer to its end.
    cpu_s: processor time of the process since the last `Usage`.
    """

    key: RoundKey
    bytes_sent: Count
    bytes_received: Count
    peak_rss_bytes: Count
    seconds: Seconds
    opened_s: Instant = 0.0
    cpu_s: Seconds = 0.0


Message = Announcement | Hello | Bye | Offer | Want | Report | Receipt | Usage
M = TypeVar("M", Announcement, Hello, Bye, Offer, Want, Report, Receipt, Usage)

_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """Msgpack, with the struct's name as its tag. Raises `LocalError` for what no peer would take."""
    payload = _encoder.encode(message)
    if len(payload) > _limit(type(message)):
        raise LocalError(f"{type(message).__name__} of {len(payload)} bytes is too large to be sent")
    return payload


def decode(payload: bytes, kind: type[M]) -> M:
    """The message in `payload`. Raises `TooLarge` before decoding, `Malformed` for any other content."""
    if len(payload) > _limit(kind):
        raise TooLarge(f"{kind.__name__} of {len(payload)} bytes, the limit is {_limit(kind)}")
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except UNDECODABLE as error:
        raise Malformed(f"not a {kind.__name__}: {error}") from error


def _limit(kind: type[Message]) -> int:
    return MAX_OFFER_BYTES if kind is Offer else MAX_MESSAGE_BYTES
