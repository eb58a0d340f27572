"""The last update and its report on disk, so that no training is done twice.

A client that is killed after training, or whose aggregator forgets the round's updates, reports the same
update again when the same round is offered again.

Next: `edge_client/session.py`.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from wire.errors import UNDECODABLE, UserError
from wire.files import replacing
from wire.manifest import BlobRef
from wire.messages import Announcement, Offer, Report, RoundKey, TrainPlan


class Work(msgspec.Struct, frozen=True):
    """All that an update depends on. `started_s`: of the run. `data`: the data set's fingerprint."""

    run: str
    started_s: float
    data: str
    key: RoundKey
    parameters: BlobRef
    plan: TrainPlan

    @classmethod
    def of(cls, announcement: Announcement, data: str, offer: Offer) -> Work:
        """What an offer asks for, however often it is made."""
        run, started_s = announcement.run, announcement.started_s
        return cls(run, started_s, data, offer.key, offer.parameters, offer.plan)


class Pending(msgspec.Struct, frozen=True):
    """Done work and its report."""

    work: Work
    report: Report


def load(path: Path) -> Pending | None:
    """What was saved last, if it can be read."""
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=Pending)
    except (OSError, *UNDECODABLE):
        return None


def save(path: Path, pending: Pending) -> None:
    """Replace what was saved before, as a whole. Raises `UserError` where the disk does not take it."""
    try:
        with replacing(path) as file:
            file.write(msgspec.msgpack.encode(pending))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", "free some space") from error
