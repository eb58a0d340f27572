"""One round's updates: every report is answered, every update checked before it counts.

Rules: a report is accepted once, or refused by name. What is refused is told to the client and counted,
never silently dropped. The same report again gets the same answer. Only whole, finite tensors of the
stage's trained groups come as far as the average.

Next: `aggregator/combine.py`, which averages what was accepted.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from aggregator.combine import Update
from wire.compression import decompress_file, max_compressed_bytes
from wire.errors import PeerError, Refusal, Silent
from wire.manifest import BlobRef, Manifest
from wire.messages import Offer, Report

Fetch = Callable[[str, BlobRef], Awaitable[Path]]


class Refused(PeerError):
    """A report that does not count. `reason`: its name on the wire."""

    def __init__(self, reason: Refusal, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Collection:
    """The updates of one offer, by client. fetch: (client, blob) -> the update's file."""

    def __init__(self, manifest: Manifest, offer: Offer, fetch: Fetch) -> None:
        self.offer = offer
        self.accepted: dict[str, Report] = {}
        self._manifest = manifest
        self._fetch = fetch
        self._fetching: dict[str, BlobRef] = {}
        self._fetches: dict[str, asyncio.Future[Path]] = {}
        self._files: dict[str, Path] = {}
        self._refused: set[str] = set()
        self._open = True
        self._answered = asyncio.Event()

    async def take(self, client: str, report: Report) -> bool:
        """Check a report and fetch its update. True if it counts from now on, False if it did before.

        Raises `PeerError` for a report that is refused.
        """
        try:
            if self._known(client, report):
                return False
            await self._accept(client, report)
        except PeerError as error:
            if self._is_answer(client, report, error):
                self._refused.add(client)
            raise
        finally:
            if set(self.offer.cohort) <= self.accepted.keys() | self._refused:
                self._answered.set()
        return True

    def again(self, offer: Offer) -> None:
        """The round is offered once more; what was accepted stays, who was refused may try again."""
        self.offer = offer
        self._refused.clear()
        self._answered.clear()

    def close(self) -> None:
        """From now on every report is late; uploads that are under way make room for the next round's."""
        self._open = False
        for fetch in self._fetches.values():
            fetch.cancel()

    async def until_answered(self) -> bool:
        """True, once every client of the cohort has been accepted or refused."""
        return await self._answered.wait()

    @property
    def missing(self) -> tuple[str, ...]:
        """Clients of the cohort without an accepted update."""
        return tuple(client for client in self.offer.cohort if client not in self.accepted)

    @property
    def loss(self) -> float:
        """Mean of the clients' losses, weighted by their examples."""
        weight = sum(report.num_examples for report in self.accepted.values())
        return sum(report.loss * (report.num_examples / weight) for report in self.accepted.values())

    def updates(self) -> Iterator[Update]:
        """What was accepted, sorted by client, read from disk one at a time."""
        for client, report in sorted(self.accepted.items()):
            shapes = self._manifest.shapes_of(report.groups)
            delta = decompress_file(self._files[client], shapes, self.offer.plan.compression)
            yield Update(client, delta, report.num_examples)

    def _is_answer(self, client: str, report: Report, error: PeerError) -> bool:
        """Whether the client, whose report raised `error`, has had its say in this round."""
        settled = client in self.accepted or client in self._fetching
        return report.key == self.offer.key and not settled and not isinstance(error, Silent)

    def _known(self, client: str, report: Report) -> bool:
        """Whether this very report has been accepted or is being fetched. Raises `Refused`."""
        ours = self.offer.key
        if report.key < ours or (report.key == ours and not self._open and client not in self.accepted):
            raise Refused("late", f"{report.key} is over")
        if report.key.stage != ours.stage:
            raise Refused("wrong_stage", f"{report.key} has not begun, this is {ours}")
        if report.key != ours:
            raise Refused("wrong_round", f"{report.key} has not begun, this is {ours}")
        if client not in self.offer.cohort:
            raise Refused("not_selected", f"{client} is not in the cohort of {ours}")
        known = self._fetching.get(client)
        if client in self.accepted:
            known = self.accepted[client].update
        if known is not None and known != report.update:
            raise Refused("duplicate", f"another update of {client} for {ours} came before")
        return known is not None

    async def _accept(self, client: str, report: Report) -> None:
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
        self._refused.discard(client)  # its last word is this one
        self._fetching[client] = report.update
        fetch = self._fetches[client] = asyncio.ensure_future(self._fetch(client, report.update))
        try:
            path = await fetch
            decompress_file(path, shapes, compression)
        except asyncio.CancelledError:
            if self._open:
                raise
        finally:
            del self._fetching[client], self._fetches[client]
            fetch.cancel()
        if not self._open:
            raise Refused("late", f"{report.key} was closed while the update came in")
        self._files[client] = path
        self.accepted[client] = report
