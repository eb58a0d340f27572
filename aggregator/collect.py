"""One round's updates: every report is answered, every update checked before it counts.

Rules: a report is accepted once, or refused by name. What is refused is told to the client and counted,
never silently dropped. The same report again gets the same answer, also after its round. Only whole, finite
tensors of the stage's trained groups come as far as the average.

An update is named by its client and the round it was trained for. That is this round, or, as far as the
plan's `max_staleness` goes, an earlier one of the stage (FedBuff, Nguyen et al., arXiv 2106.06639).

Next: `aggregator/combine.py`, which averages what was accepted; `aggregator/run.py`, the caller.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Protocol

from aggregator.combine import Update, norm
from wire.compression import decompress_file, max_compressed_bytes
from wire.errors import PeerError, Refusal, Silent
from wire.manifest import BlobRef, Manifest
from wire.messages import Offer, Report, RoundKey

Fetch = Callable[[str, BlobRef], Awaitable[Path]]
Sender = tuple[str, int]
"""A client and the number of the round it has trained for."""
Accepted = tuple[Report, Path]
"""A report and its update's file."""


class Refused(PeerError):
    """A report that does not count. `reason`: its name on the wire."""

    def __init__(self, reason: Refusal, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Taken(Enum):
    """What became of a report that was not refused."""

    COUNTS = auto()  # from now on
    COUNTED = auto()  # before: it comes once more
    COMING = auto()  # its update is being fetched


class Past(Protocol):
    """What is known of earlier rounds, for reports that come late: `aggregator.books.Books`."""

    def cohort(self, key: RoundKey) -> tuple[str, ...]:
        """Who was asked in a round that is over; nobody, if there was none."""
        ...

    def counted(self, client: str, key: RoundKey) -> BlobRef | None:
        """The client's update for a round, if it has counted."""
        ...


class Collection:
    """The updates of one offer. fetch: (client, blob) -> the update's file.

    goal: so many updates complete it; in any case an answer to every client of the cohort does.
    before: what was accepted before a restart, and its files.
    """

    def __init__(
        self,
        manifest: Manifest,
        offer: Offer,
        fetch: Fetch,
        past: Past,
        goal: int | None = None,
        before: Mapping[Sender, Accepted] | None = None,
    ) -> None:
        self.offer = offer
        self.accepted: dict[Sender, Report] = {}
        self.norms: dict[Sender, float] = {}  # L2, of those accepted since the start
        self._manifest = manifest
        self._fetch = fetch
        self._goal = goal
        self._past = past
        self._fetching: dict[Sender, BlobRef] = {}
        self._fetches: dict[Sender, asyncio.Future[Path]] = {}
        self._files: dict[Sender, Path] = {}
        self._refused: set[str] = set()
        self._open = True
        self._complete = asyncio.Event()
        for sender, (report, path) in (before or {}).items():
            self.accepted[sender], self._files[sender] = report, path
        self._look()

    async def take(self, client: str, report: Report) -> Taken:
        """Check a report and fetch its update.

        Raises `PeerError` for a report that is refused, `Silent` for one that has to come again.
        """
        sender = client, report.key.round
        try:
            if (known := self._known(sender, report)) is not None:
                return known
            await self._accept(sender, report)
        except PeerError as error:
            if self._is_answer(sender, report, error):
                self._refused.add(client)
            raise
        finally:
            self._look()
        return Taken.COUNTS

    def again(self, offer: Offer, goal: int | None = None) -> None:
        """The round is offered once more; what was accepted stays, who was refused may try again."""
        self.offer, self._goal = offer, goal
        self._refused.clear()
        self._complete.clear()
        self._look()

    def close(self) -> set[BlobRef]:
        """From now on every report is late; what was being uploaded makes room for the next round's."""
        self._open = False
        for fetch in self._fetches.values():
            fetch.cancel()
        return set(self._fetching.values())

    async def until_complete(self) -> bool:
        """True, once as many are accepted as were wanted, or all of the cohort have been answered."""
        return await self._complete.wait()

    @property
    def clients(self) -> tuple[str, ...]:
        """Clients with an accepted update, sorted."""
        return tuple(sorted({client for client, _ in self.accepted}))

    @property
    def missing(self) -> tuple[str, ...]:
        """Clients of the cohort without an accepted update."""
        return tuple(sorted(set(self.offer.cohort) - set(self.clients)))

    @property
    def loss(self) -> float:
        """Mean of the clients' losses, weighted by their examples."""
        reports = [report for _, report in self._sorted()]  # the same sum, whoever came first
        weight = sum(report.num_examples for report in reports)
        return sum(report.loss * (report.num_examples / weight) for report in reports)

    def updates(self) -> Iterator[Update]:
        """What was accepted, sorted by client and round, read from disk one at a time."""
        for sender, report in self._sorted():
            shapes = self._manifest.shapes_of(report.groups)
            delta = decompress_file(self._files[sender], shapes, self.offer.plan.compression)
            yield Update(sender[0], delta, report.num_examples, self.staleness(report.key))

    def _sorted(self) -> list[tuple[Sender, Report]]:
        """What was accepted, by client and round."""
        return sorted(self.accepted.items(), key=lambda item: item[0])

    def staleness(self, key: RoundKey) -> int:
        """How many rounds ago an update's round was this one."""
        return self.offer.key.round - key.round

    def _look(self) -> None:
        ours = {client for client, number in self.accepted if number == self.offer.key.round}
        enough = self._goal is not None and len(self.accepted) >= self._goal
        if enough or set(self.offer.cohort) <= ours | self._refused:
            self._complete.set()

    def _is_answer(self, sender: Sender, report: Report, error: PeerError) -> bool:
        """Whether the client, whose report raised `error`, has had its say in this round."""
        settled = sender in self.accepted or sender in self._fetching
        return report.key == self.offer.key and not settled and not isinstance(error, Silent)

    def _known(self, sender: Sender, report: Report) -> Taken | None:
        """What has become of this very report, None if it is new. Raises `PeerError`."""
        client, ours = sender[0], self.offer.key
        if report.key.stage > ours.stage:
            raise Refused("wrong_stage", f"{report.key} has not begun, this is {ours}")
        if report.key > ours:
            raise Refused("wrong_round", f"{report.key} has not begun, this is {ours}")
        is_here = report.key.stage == ours.stage
        for taken, known in (
            (Taken.COUNTED, self.accepted[sender].update if is_here and sender in self.accepted else None),
            (Taken.COMING, self._fetching.get(sender) if is_here and self._open else None),
            (Taken.COUNTED, self._past.counted(client, report.key) if report.key < ours else None),
        ):
            if known is not None and known != report.update:
                raise Refused("duplicate", f"another update of {client} for {report.key} came before")
            if known is not None:
                return taken
        if not is_here or self.staleness(report.key) > self.offer.plan.max_staleness:
            raise Refused("late", f"{report.key} is over")
        if not self._open:
            raise self._closed(report)
        asked = self.offer.cohort if report.key == ours else self._past.cohort(report.key)
        if client not in asked:
            raise Refused("not_selected", f"{client} is not in the cohort of {report.key}")
        return None

    def _closed(self, report: Report) -> PeerError:
        """For who comes while the round is combined: too late, or early for a round that takes it late."""
        if self.offer.plan.max_staleness:
            return Silent("the round is being combined, and the next one takes late updates")
        return Refused("late", f"{report.key} is over")

    async def _accept(self, sender: Sender, report: Report) -> None:
        if report.num_examples < 1:
            raise Refused("zero_examples", f"an update over {report.num_examples} examples has no weight")
        if not math.isfinite(report.loss):
            raise Refused("not_finite", f"the loss is {report.loss}")
        trainable = self._manifest.stages[self.offer.key.stage].trainable
        if not report.groups or len(set(report.groups)) != len(report.groups):
            raise Refused("wrong_shape", "the update names no group, or one twice")
        if other := sorted(set(report.groups) - set(trainable)):
            raise Refused("wrong_shape", f"{other[0]} does not train in stage {self.offer.key.stage + 1}")
        shapes = self._manifest.shapes_of(report.groups)
        compression = self.offer.plan.compression
        if report.update.size_bytes > (limit := max_compressed_bytes(shapes, compression)):
            raise Refused("too_large", f"{report.update.size_bytes} bytes, at most {limit} expected")
        client = sender[0]
        self._refused.discard(client)  # its last word is this one
        self._fetching[sender] = report.update
        fetch = self._fetches[sender] = asyncio.ensure_future(self._fetch(client, report.update))
        try:
            path = await fetch
            length = norm(decompress_file(path, shapes, compression))
        except asyncio.CancelledError:
            if self._open:
                raise
        finally:
            del self._fetching[sender], self._fetches[sender]
            fetch.cancel()
        if not self._open:
            raise self._closed(report)
        self._files[sender], self.norms[sender] = path, length
        self.accepted[sender] = report
