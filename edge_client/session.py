"""A client's whole story: find a run, then for each offer fetch, cache features, train, report.

Rules: one offer at a time; a newer one calls off the work on the one before. What goes wrong with one
round (`PeerError`) is logged and the next offer is waited for; what the user has to mend ends the program.
Killed at any instant, it begins again with the newest offer and with what is in its folder.

Next: `edge_client/link.py` (messages), `edge_client/cache.py` (the frozen prefix), `edge_client/train.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import zlib
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Event as StopEvent
from typing import TypeVar
from weakref import WeakValueDictionary

from edge_client import pending
from edge_client.anchors import anchored
from edge_client.cache import FeatureCache, Step
from edge_client.checkpoint import Checkpoint
from edge_client.device import Device, memory_mb, peak_rss_bytes, version
from edge_client.engines import Run, choose, open_engine, open_graph, step_files
from edge_client.features import Features, by_own_names
from edge_client.gate import Gate
from edge_client.link import Link, find_run
from edge_client.parameters import Parameters
from edge_client.pending import Pending, Work
from edge_client.train import Trained, train
from inputs.dataset import Dataset, fullest
from wire.compression import compress
from wire.errors import Malformed, PeerError
from wire.manifest import BlobRef, Manifest
from wire.messages import Hello, Offer, Receipt, Report, Usage
from wire.mqtt import Broker
from wire.parts import modality_sets, with_modalities, within
from wire.rounds import Event, Role, RoundMachine, State
from wire.store import Store
from wire.tasks import beside
from wire.tensors import Arrays

PENDING = "pending"
JOIN_AGAIN_S = 30.0  # after a run that cannot be joined
ROUNDING = 1  # seeds what is drawn for an update's rounding
TOLERANCE = 1.15  # of what export expects, to what it comes to

T = TypeVar("T")

log = logging.getLogger(__name__)


async def take_part(broker: Broker, device: Device, run: str | None = None) -> None:
    """Train in the run called `run`, or the newest open one, until it is over.

    Raises `TransportError` where no broker takes us, `UserError` for what the user has to mend.
    """
    with device.opened() as store:
        gate, patient = Gate(device.owner), False
        while True:
            announcement = await find_run(broker, device.name, run, gate, patient=patient)
            patient = True  # the broker has been there: it comes back
            of_run = {"run": announcement.run}
            log.info("joining run %s as %s", announcement.run, device.name, extra=of_run)
            try:
                async with Link.open(broker, announcement, device.name, store, gate) as link:
                    await beside(_take_part(link, device, store), link.pump())
            except PeerError as error:
                log.warning("run %s cannot be joined: %s", announcement.run, error, extra=of_run)
                await asyncio.sleep(JOIN_AGAIN_S)
                continue
            end = "has begun anew" if link.replaced else "is over"
            log.info("run %s %s", announcement.run, end, extra=of_run)
            if not link.replaced:
                return


async def _take_part(link: Link, device: Device, store: Store) -> None:
    joined = await link.unless_over(_join(link, device, store))
    if joined is not None:
        session, hello = joined
        await beside(session.rounds(), link.heartbeat(hello))


async def _join(link: Link, device: Device, store: Store) -> tuple[Session, Hello]:
    """What is needed before anyone can be told that we are here."""
    whole = await link.manifest()
    fitting = whole if device.max_memory_bytes is None else within(whole, device.max_memory_bytes)
    if device.max_memory_bytes is not None and not any(one.expected_peak_bytes for one in whole.stages):
        log.warning("the bundle does not say what memory it takes: --memory-budget has no effect")
    choices = modality_sets(whole)
    chosen = await asyncio.to_thread(fullest, device.data, choices, device.columns)
    manifest = with_modalities(fitting, chosen)
    bundle = Bundle(manifest, link, store)
    engine = choose(device.engine, manifest.stages[0].engines)
    await bundle.need(*bundle.tokenizers())
    dataset = await asyncio.to_thread(
        Dataset.open,
        device.data,
        manifest.modalities,
        manifest.task,
        manifest.classes,
        bundle.file,
        cache=device.folder / "inputs",
        columns=device.columns,
    )
    log.info("%d examples of %s, engine %s", len(dataset), " and ".join(manifest.modalities), engine)
    hello = Hello(dict.fromkeys(manifest.modalities, len(dataset)), engine, memory_mb(), version())
    parameters = Parameters(whole, link, store)
    return Session(link, device, store, bundle, parameters, dataset, engine), hello


class Bundle:
    """The bundle's files, fetched when they are needed. manifest: as far as it is about this client."""

    def __init__(self, manifest: Manifest, link: Link, store: Store) -> None:
        self.manifest = manifest
        self._link = link
        self._store = store

    async def need(self, *names: str) -> None:
        """Return once these files are there. Raises `PeerError`."""
        for name in names:
            ref = self.manifest.files[name]
            await self._link.fetch(ref, ref.size_bytes)

    def file(self, name: str) -> Path:
        """Where a file is that has been fetched."""
        return self._store.path(self.manifest.files[name])

    def tokenizers(self) -> list[str]:
        """Files that the readers of `inputs/` name."""
        options = [modality.options.get("tokenizer") for modality in self.manifest.modalities.values()]
        return [name for name in options if isinstance(name, str)]


class Session:
    """The rounds of a run, for one client."""

    def __init__(
        self,
        link: Link,
        device: Device,
        store: Store,
        bundle: Bundle,
        parameters: Parameters,
        dataset: Dataset,
        engine: str,
    ) -> None:
        self._link = link
        self._device = device
        self._store = store
        self._bundle = bundle
        self._manifest = bundle.manifest
        self._engine = engine
        self._dataset = dataset
        self._cache = FeatureCache(
            device.folder / "features",
            bundle.manifest,
            dataset,
            engine,
            dtype=device.feature_dtype,
            max_bytes=device.max_feature_bytes,
        )
        self._parameters = parameters
        # While in use. Segments of one file share it where they take the same inputs.
        self._graphs: WeakValueDictionary[tuple[str, ...], Run] = WeakValueDictionary()
        self._machine = RoundMachine(Role.CLIENT)
        self._told = (0, 0)  # bytes sent and received that have been reported
        self._told_cpu_s = 0.0
        self._warned_bytes = 0

    async def rounds(self) -> None:
        """Take every offer that selects us, until the run is over."""
        offer: Offer | None = None
        while (offer := await self._link.next_offer(offer)) is not None:
            if self._device.name not in offer.cohort:
                continue
            begin, receipt = time.monotonic(), None
            self._machine.move(Event.OFFER)
            try:
                receipt = await self._link.unless_superseded(offer, self._round(offer), self._may_lag)
            except PeerError as error:
                log.warning("%s cannot be trained: %s", offer.key, error)
            if receipt is None:
                self._machine.move(Event.WITHDRAWN)
            await self._tell_usage(offer, time.monotonic() - begin)
        self._machine.move(Event.FINISH)

    def _may_lag(self, offer: Offer) -> int:
        """By how many rounds work on this offer may be late and is still of use."""
        return 0 if self._machine.state is State.FETCHING else offer.plan.max_staleness

    async def _round(self, offer: Offer) -> Receipt:
        known = offer.key.stage < len(self._manifest.stages) and offer.key.stage <= len(offer.frozen)
        if not known or offer.plan.batch_size > self._manifest.max_batch_size:
            raise Malformed(f"the offer of {offer.key} does not fit the manifest")
        self._store.keep(self._needed(offer))
        report = self._done_before(offer)
        if report is None:
            stage = self._manifest.stages[offer.key.stage]
            await self._bundle.need(*step_files(self._engine, stage))
            await self._parameters.prepare(offer)
            offered = await self._parameters.trainable(offer)
            names = stage.parameters.values()
            parameters = {name: offered.pop(name) for name in names}
            del offered  # what others train
            features = await self._features(offer)
            self._machine.move(Event.FETCHED)
            trained = await _in_thread(partial(self._train, offer, parameters, features))
            report = self._save(offer, trained)
        else:
            self._machine.move(Event.FETCHED)
        self._machine.move(Event.TRAINED)
        receipt = await self._link.report(report, self._store.path(report.update))
        self._machine.move(Event.RECEIPT)
        if receipt.refusal is None:
            loss, count = report.loss, report.num_examples
            extra = {"loss": loss, "num_examples": count}
            log.info("%s: loss %.4f over %d examples", offer.key, loss, count, extra=extra)
        else:
            refused = {"refusal": receipt.refusal}
            detail = receipt.detail
            log.warning("%s refused: %s, %s", offer.key, receipt.refusal, detail, extra=refused)
        return receipt

    async def _features(self, offer: Offer) -> Features:
        missing = await _in_thread(lambda _stop: self._cache.steps(offer))
        for stage, steps in groupby(missing, key=lambda step: step.stage):
            values = await self._parameters.frozen(offer, stage)
            for step in steps:
                await self._bundle.need(step.file)
                await _in_thread(partial(self._run, step, values))
        return self._cache.features(offer)

    def _run(self, step: Step, values: Arrays, stop: StopEvent) -> None:
        key = (step.file, *step.graph.inputs)
        run = self._graphs.get(key)
        if run is None:
            graph = by_own_names(step.graph)
            run = open_graph(self._engine, self._bundle.file, graph, self._device.threads)
            self._graphs[key] = run
        self._cache.run(step, run, values, stop)

    def _train(self, offer: Offer, parameters: Arrays, features: Features, stop: StopEvent) -> Trained:
        device, checkpoint = self._device, self._checkpoint(offer)
        opening = self._bundle.file, self._manifest, offer.key.stage, device.threads
        examples = anchored(features, parameters, self._engine, *opening)
        with open_engine(self._engine, *opening) as engine:
            return train(engine, parameters, examples, offer.plan, device.name, stop, checkpoint)

    def _checkpoint(self, offer: Offer) -> Checkpoint:
        folder, every_s = self._device.folder / "training", self._device.checkpoint_s
        files = self._manifest.stages[offer.key.stage].engines[self._engine].values()
        step = " ".join([self._engine, *(self._manifest.files[name].sha256 for name in files)])
        return Checkpoint(folder, self._work(offer), step, every_s)

    def _needed(self, offer: Offer) -> set[BlobRef]:
        """Of what is in the store; the rest is of earlier offers and other runs."""
        known = pending.load(self._device.folder / PENDING)
        done = (known.report.update,) if known else ()
        files = (*self._manifest.files.values(), self._link.announcement.manifest)
        return {*files, *done, *self._parameters.needed(offer)}

    def _done_before(self, offer: Offer) -> Report | None:
        """The report of this very round, if its update is still here."""
        known = pending.load(self._device.folder / PENDING)
        if known is None or known.work != self._work(offer):
            return None
        return known.report if self._store.has(known.report.update) else None

    def _work(self, offer: Offer) -> Work:
        return Work.of(self._link.announcement, self._dataset.fingerprint, offer)

    def _save(self, offer: Offer, trained: Trained) -> Report:
        path = self._device.folder / PENDING
        before = pending.load(path)
        report = Report(
            key=offer.key,
            update=self._store.put(compress(trained.delta, offer.plan.compression, self._seed(offer))),
            groups=self._manifest.stages[offer.key.stage].trainable,
            num_examples=trained.num_examples,
            loss=trained.loss,
        )
        pending.save(path, Pending(self._work(offer), report))
        self._checkpoint(offer).clear()
        if before is not None and before.report.update != report.update:
            self._store.remove(before.report.update)
        return report

    def _seed(self, offer: Offer) -> list[int]:
        """Of the update's rounding: every client's own, the same whenever the round is trained, and another
        than that of the examples' order.
        """
        return [offer.plan.seed, zlib.crc32(self._device.name.encode()), ROUNDING]

    async def _tell_usage(self, offer: Offer, seconds: float) -> None:
        sent, received = self._link.traffic
        usage = Usage(
            key=offer.key,
            bytes_sent=sent - self._told[0],
            bytes_received=received - self._told[1],
            peak_rss_bytes=peak_rss_bytes(),
            seconds=seconds,
            opened_s=offer.opened_s,
            cpu_s=(cpu_s := time.process_time()) - self._told_cpu_s,
        )
        self._told_cpu_s = cpu_s
        self._told = (sent, received)
        await self._link.usage(usage)
        planned = self._planned_bytes(offer.key.stage)
        if planned and usage.peak_rss_bytes > TOLERANCE * max(planned, self._warned_bytes):
            self._warned_bytes = peak = usage.peak_rss_bytes
            log.warning(
                "%s: %.0f MB of memory, %.0f MB were expected: does the run take larger batches than the "
                "bundle was exported for?",
                *(offer.key, peak / 1e6, planned / 1e6),
            )

    def _planned_bytes(self, stage: int) -> int:
        """Of memory, up to this stage; 0: nothing was planned."""
        return max((one.expected_peak_bytes for one in self._manifest.stages[: stage + 1]), default=0)


async def _in_thread(work: Callable[[StopEvent], T]) -> T:
    """Run `work` in a thread; when this is cancelled, tell it to stop and wait until it has."""
    stop = StopEvent()
    running = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):  # told again: it is on its way
                await asyncio.wait({running})
        running.exception()
        raise
