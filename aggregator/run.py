"""The aggregator's whole story: for each stage and round cohort, offer, collect, combine, checkpoint.

Rules: a round ends when as many updates are in as are wanted or all of its cohort have been answered, or at
its deadline with those that have; with fewer than `min_updates` it is offered once more. Its offer, each
update that it accepts and its result are on disk before anyone is told: killed at any instant, the run goes
on in the same round with what it has accepted.

`ServerExecutes` of McMahan et al., arXiv 1602.05629, over the stages of LW-FedMML, arXiv 2407.15426.
Next: `aggregator/collect.py` (updates), `aggregator/combine.py`, `aggregator/state.py` (parameters).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from aggregator.books import Books, RunRecord
from aggregator.cohort import Clients, select, wanted
from aggregator.collect import Accepted, Collection, Sender, Taken
from aggregator.combine import combine
from aggregator.events import (
    RoundClosed,
    RoundOpened,
    RunOpened,
    Tell,
    UpdateAccepted,
    UpdateRefused,
    UsageTold,
    headline,
)
from aggregator.link import Link
from aggregator.plan import RunPlan
from aggregator.state import State
from wire.compression import raw_bytes
from wire.errors import PeerError, Silent, UserError
from wire.manifest import MANIFEST_NAME, BlobRef, Manifest, parameter_counts, read_manifest
from wire.messages import Announcement, Offer, Receipt, Report, RoundKey, Usage
from wire.mqtt import Broker, Connection
from wire.rounds import Event, Role, RoundMachine
from wire.store import Store
from wire.tasks import Tasks, beside, within
from wire.tensors import Array, Arrays

USAGE_WAIT_S = 3.0

Evaluate = Callable[[int, Mapping[str, Array]], dict[str, float]]
"""(stage, all parameters) -> metrics of the hold-out, from a thread."""

Calibrate = Callable[[Offer, Mapping[str, Array], Arrays], Arrays]
"""(the round's offer, all parameters before it, its trained groups combined) -> the trained groups, from a
thread."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """name: of the run. bundle: the exported folder. folder: where the run keeps its books and blobs.

    evaluate: None without a hold-out. calibrate: None without public examples, of the fingerprint
    `calibration`.
    resume: go on with the run whose books are in `folder`.
    signature: the owner's, of the bundle's manifest, for clients to check.
    """

    name: str
    bundle: Path
    folder: Path
    plan: RunPlan
    chunk_bytes: int
    evaluate: Evaluate | None = None
    calibrate: Calibrate | None = None
    calibration: str = ""
    resume: bool = False
    signature: bytes | None = None


async def conduct(broker: Broker, settings: Settings, books: Books, tell: Tell) -> Arrays:
    """Conduct the run to its end. The final parameters: torch name -> float32, every one.

    Raises `TransportError` where no broker takes us, `UserError` for a folder that holds another run.
    """
    manifest, content = read_manifest(settings.bundle)
    async with Connection(broker, f"lamina-{settings.name}") as connection:
        record = _record(settings, BlobRef.of(content), books)
        run = Run(settings, record, manifest, content, books, connection, tell)
        return await beside(run.stages(), run.link.pump(settings.plan.announce_s), run.answers.watch())


def _record(settings: Settings, manifest: BlobRef, books: Books) -> RunRecord:
    """The run in the books, begun now or before."""
    decided = msgspec.to_builtins(settings.plan) | {"calibration": settings.calibration}
    plan = msgspec.json.encode(decided).decode()
    known = books.run()
    if known is None:
        record = RunRecord(settings.name, manifest.sha256, plan, time.time())
        books.begin(record)
        return record
    if not settings.resume:
        raise UserError(
            f"{settings.folder} holds the run {known.name}",
            "go on with it by --resume, or choose another --dir",
        )
    if (known.name, known.manifest, known.plan) != (settings.name, manifest.sha256, plan):
        raise UserError(
            f"{settings.folder} holds the run {known.name} of another bundle or other settings",
            "resume it with those it began with, or choose another --dir",
        )
    return known


class Run:
    """A run in progress."""

    def __init__(
        self,
        settings: Settings,
        record: RunRecord,
        manifest: Manifest,
        manifest_content: bytes,
        books: Books,
        connection: Connection,
        tell: Tell,
    ) -> None:
        self._settings = settings
        self._plan = settings.plan
        self._manifest = manifest
        self._books = books
        self._tell = tell
        self._machine = RoundMachine(Role.AGGREGATOR)
        self._collection: Collection | None = None
        self._told = asyncio.Event()  # a client has told its usage
        self.answers = Tasks()
        self._store = Store(settings.folder / "blobs")
        self._updates = Store(settings.folder / "updates")  # clients', so apart from what we count on
        self._state = State(settings.bundle, manifest, self._store, self._plan)
        announcement = Announcement(
            run=record.name,
            manifest=BlobRef.of(manifest_content),
            started_s=record.started_s,
            heartbeat_s=self._plan.heartbeat_s,
            chunk_bytes=settings.chunk_bytes,
            signature=settings.signature,
        )
        self.link = Link(
            connection,
            announcement,
            self._updates,
            Clients(self._plan.heartbeat_s),
            tell,
            self._take_report,
            self._take_usage,
        )
        self.link.serve_file(announcement.manifest, settings.bundle / MANIFEST_NAME)
        for name, ref in manifest.files.items():
            self.link.serve_file(ref, settings.bundle / name)

    async def stages(self) -> Arrays:
        """Go through every stage; the final parameters."""
        last = self._state.resume(self._books)
        if self._books.opened() is None:
            self._updates.keep(())  # else an open round goes on with what has come, in part too
        self._tell_opened(last)
        for stage in range(self._state.stage, len(self._manifest.stages)):
            if stage > self._state.stage:
                self._state.next_stage()
            for ref in self._state.frozen:
                self.link.serve_file(ref, self._store.path(ref))
            first = last.round + 1 if last is not None and last.stage == stage else 0
            for number in range(first, self._rounds(stage)):
                if self._is_settled(stage):
                    break
                await self._round(RoundKey(stage, number))
        self._machine.move(Event.FINISH)
        await self._last_usages()
        await self.link.close()
        return self._state.values

    async def _round(self, key: RoundKey) -> None:
        begin = time.monotonic()
        collection = await self._open(key)
        await self._collect(collection)
        self._machine.move(Event.CLOSE)
        broken_off = collection.close()
        delta = await asyncio.to_thread(
            combine, self._plan, self._state.shapes, collection.updates(), self._settings.folder
        )
        seed, calibrate = [self._plan.seed, key.stage, key.round], self._settings.calibrate
        better = partial(calibrate, collection.offer, self._state.values) if calibrate else None
        replaced = await asyncio.to_thread(self._state.update, delta, seed, better)
        metrics = await self._evaluate(key.stage)
        seconds = time.monotonic() - begin
        cohort, loss = collection.offer.cohort, collection.loss
        self._books.checkpoint(key, self._state.checkpoint(), cohort, loss, metrics, seconds)
        self._machine.move(Event.CHECKPOINT)
        self._tell(RoundClosed(key, collection.clients, collection.missing, loss, metrics, seconds))
        for ref in replaced:
            self.link.withdraw_file(ref)
            self._store.remove(ref)
        self._updates.keep(broken_off)

    async def _open(self, key: RoundKey) -> Collection:
        """A new round, or the one that was open when we were killed, with what was accepted."""
        opened = self._books.opened()
        if opened is None:
            available = await self.link.until_available(self._plan.min_available_clients)
            offer, goal = self._offer(key, self._select(available, key)), self._goal(available)
            before: dict[Sender, Accepted] = {}
            self._books.open(offer, goal)
        else:
            offer, goal = opened
            before = self._accepted(key)
        self._collection = collection = Collection(
            self._manifest, offer, self.link.fetch, self._books, goal, before
        )
        for ref in (offer.parameters, *([offer.change.change] if offer.change else [])):
            self.link.serve_file(ref, self._store.path(ref))
        self._machine.move(Event.OFFER)
        self._tell(RoundOpened(key, offer.cohort))
        await self.link.offer(offer)
        return collection

    def _accepted(self, key: RoundKey) -> dict[Sender, Accepted]:
        """What was accepted for a round before we were killed, and is still whole."""
        found: dict[Sender, Accepted] = {}
        for client, report in self._books.accepted(key):
            if self._updates.has(report.update):
                found[client, report.key.round] = report, self._updates.path(report.update)
            else:
                extra = {"client": client}
                log.warning("%s: the update of %s is lost or damaged", key, client, extra=extra)
                self._books.drop(client, report.key)
        return found

    async def _collect(self, collection: Collection) -> None:
        """Return when the round may close."""
        key, deadline_s = collection.offer.key, self._plan.round_deadline_s
        clock = asyncio.get_running_loop().time
        while True:
            end_s = clock() + deadline_s
            if not await within(deadline_s, collection.until_complete()):
                missing = collection.missing
                extra = {"missing": missing}
                log.info("%s: the deadline is there, missing: %s", key, ", ".join(missing), extra=extra)
            if len(collection.accepted) >= self._plan.min_updates:
                return
            # Not before its time, even if all have been refused: they would send the same again.
            await asyncio.sleep(max(0.0, end_s - clock()))
            self._machine.move(Event.DEADLINE)
            available = await self.link.until_available(self._plan.min_available_clients)
            if len(collection.accepted) >= self._plan.min_updates:
                return
            still_training = set(collection.offer.cohort) & set(available)
            cohort = {*self._select(available, key), *still_training, *collection.clients}
            offer = self._offer(key, tuple(sorted(cohort)))
            goal = self._goal(available)
            self._books.open(offer, goal)
            collection.again(offer, goal)
            self._machine.move(Event.EXTEND)
            self._tell(RoundOpened(key, offer.cohort, extended=True))
            await self.link.offer(offer)

    def _select(self, available: list[str], key: RoundKey) -> tuple[str, ...]:
        plan = self._plan
        return select(available, plan.fraction_train, plan.seed, key, plan.over_selection)

    def _goal(self, available: list[str]) -> int | None:
        """As in `Collection`."""
        if self._plan.buffer_size:
            return self._plan.buffer_size
        return wanted(len(available), self._plan.fraction_train) if self._plan.over_selection else None

    def _offer(self, key: RoundKey, cohort: tuple[str, ...]) -> Offer:
        return Offer(
            key=key,
            opened_s=time.time(),
            cohort=cohort,
            parameters=self._state.parameters,
            frozen=self._state.frozen,
            plan=self._plan.train_plan(key, self._rounds(key.stage)),
            deadline_s=self._plan.round_deadline_s,
            change=self._state.change,
        )

    def _rounds(self, stage: int) -> int:
        """At most."""
        chosen = 0 if self._plan.rounds == "auto" else self._plan.rounds
        return chosen or self._manifest.stages[stage].rounds

    def _is_settled(self, stage: int) -> bool:
        """Whether it needs no more rounds, by its metric, or by the loss where there is no hold-out."""
        rounds = self._books.metrics(stage)
        names = {headline(metrics) for _, metrics in rounds}
        name = names.pop() if len(names) == 1 else None  # a hold-out may have come or gone meanwhile
        return self._plan.is_settled([-loss if name is None else m[name] for loss, m in rounds])

    async def _evaluate(self, stage: int) -> dict[str, float]:
        if self._settings.evaluate is None:
            return {}
        return await asyncio.to_thread(self._settings.evaluate, stage, self._state.values)

    def _take_report(self, client: str, report: Report) -> None:
        self.answers.start(self._answer(client, report))  # fetching an update takes its time

    async def _answer(self, client: str, report: Report) -> None:
        collection = self._collection
        if collection is None:  # no round is open yet: the client will say it again
            return
        try:
            taken = await collection.take(client, report)
        except Silent as error:
            log.warning("%s of %s: %s", report.key, client, error, extra={"client": client})
            return
        except PeerError as error:
            self._books.refuse(client, collection.offer.key, error.reason, str(error))
            self._tell(UpdateRefused(report.key, client, error.reason, str(error)))
            await self.link.receipt(client, Receipt(report.key, error.reason, str(error)))
            return
        if taken is Taken.COUNTS:
            raw = raw_bytes(self._manifest.shapes_of(report.groups))
            norm = collection.norms[client, report.key.round]
            self._books.accept(client, report, raw, norm, collection.offer.key.round)
            self._machine.move(Event.UPDATE)
            self._tell(
                UpdateAccepted(
                    key=report.key,
                    client=client,
                    num_examples=report.num_examples,
                    loss=report.loss,
                    size_bytes=report.update.size_bytes,
                    staleness=collection.staleness(report.key),
                    norm=norm,
                )
            )
        if taken is not Taken.COMING:
            await self.link.receipt(client, Receipt(report.key))

    def _take_usage(self, client: str, usage: Usage) -> None:
        self._books.spend(client, usage)
        self._told.set()
        self._tell(UsageTold(client, usage))

    async def _last_usages(self) -> None:
        """Clients tell what the last round has cost only after their receipt."""
        if self._collection is None:
            return
        key, expected = self._collection.offer.key, set(self._collection.clients)
        clock = asyncio.get_running_loop().time
        end_s = clock() + USAGE_WAIT_S
        while not expected <= self._books.clients_told(key):
            self._told.clear()
            if not await within(end_s - clock(), self._told.wait()):
                return

    def _tell_opened(self, last: RoundKey | None) -> None:
        stages = range(len(self._manifest.stages))
        counts = parameter_counts(self._manifest)
        opened = self._books.opened()
        next_round = opened[0].key if opened else last and RoundKey(last.stage, last.round + 1)
        self._tell(
            RunOpened(
                run=self.link.run,
                schedule=self._manifest.schedule,
                rounds=tuple(self._rounds(stage) for stage in stages),
                parameters=tuple(
                    sum(counts[group] for group in self._manifest.stages[stage].trainable)
                    for stage in stages
                ),
                min_available_clients=self._plan.min_available_clients,
                resumed=next_round,
            )
        )
