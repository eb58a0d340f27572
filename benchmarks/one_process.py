"""A whole run in one process, without a broker: for benchmarks that need many runs and no clock.

Rules: what trains, checks, combines and evaluates is the code of real clients and of a real aggregator;
left out is what carries messages. Clients train in threads, as many at a time as there are cores, which
changes nothing. Between its training and its report a client may tamper with its update, as a program of
its own could.

Next: `benchmarks/attacks.py`, which tampers.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from aggregator.collect import Collection
from aggregator.combine import combine, norm
from aggregator.plan import RunPlan
from aggregator.state import State
from edge_client.cache import FeatureCache
from edge_client.engines import ONNX, open_engine, open_graph
from edge_client.features import by_own_names
from edge_client.train import Trained, train
from inputs.dataset import Dataset
from lamina.evaluation import evaluate_stage
from wire.compression import compress, restore_file
from wire.errors import PeerError
from wire.manifest import BlobRef, Manifest, read_manifest
from wire.messages import Offer, Report, RoundKey
from wire.store import Store
from wire.tensors import Arrays

Tamper = Callable[[Arrays], Arrays]
"""What a malicious client makes of its delta."""


def dataset_of(folder: Path, bundle: Path, manifest: Manifest, cache: Path) -> Dataset:
    """Examples as the bundle's model takes them."""
    kinds = manifest.modalities, manifest.task, manifest.classes
    return Dataset.open(folder, *kinds, bundle.joinpath, cache=cache)


class NoPast:
    """Nobody is ever late."""

    def cohort(self, _key: RoundKey) -> tuple[str, ...]:
        """As in `aggregator.collect.Past`."""
        return ()

    def counted(self, _client: str, _key: RoundKey) -> BlobRef | None:
        """As in `aggregator.collect.Past`."""
        return None


class Client:
    """Trains on its examples; the aggregator's store is at hand."""

    def __init__(self, name: str, dataset: Dataset, bundle: Path, folder: Path, store: Store) -> None:
        self._name, self._bundle, self._store = name, bundle, store
        self._manifest, _ = read_manifest(bundle)
        self._cache = FeatureCache(folder, self._manifest, dataset, ONNX)

    def train(self, offer: Offer, parameters: Arrays) -> Trained:
        """As `edge_client/session.py` does."""
        for step in self._cache.steps(offer):
            shapes = self._manifest.shapes_of(self._manifest.groups_frozen_after(step.stage))
            frozen = self._store.path(offer.frozen[step.stage])
            values = restore_file(frozen, shapes, offer.plan.prefix_compression)
            graph = by_own_names(step.graph)
            run = open_graph(ONNX, self._bundle.joinpath, graph)
            self._cache.run(step, run, values, Event())
        stage, features = offer.key.stage, self._cache.features(offer)
        with open_engine(ONNX, self._bundle.joinpath, self._manifest, stage) as engine:
            return train(engine, parameters, features, offer.plan, self._name, Event())


class OneProcess:
    """A run.

    data: has `clients/<name>/`. inputs: where their arrays are kept, for other runs too. folder: of this
    run. tampering: client -> what it does to every update.
    """

    def __init__(
        self,
        plan: RunPlan,
        bundle: Path,
        data: Path,
        inputs: Path,
        folder: Path,
        tampering: Mapping[str, Tamper],
    ) -> None:
        self._plan, self._bundle, self._folder = plan, bundle, folder
        self._tampering = tampering
        self._manifest, _ = read_manifest(bundle)
        self._store, self._updates = Store(folder / "blobs"), Store(folder / "updates")
        self._state = State(bundle, self._manifest, self._store, plan)
        first = next(iter(self._manifest.stages[0].encoders.values()))
        open_graph(ONNX, bundle.joinpath, first)  # sets up the runtime, which threads cannot do at once
        self._clients = {}
        for path in sorted((data / "clients").iterdir()):
            dataset = dataset_of(path, bundle, self._manifest, inputs / path.name)
            features = folder / "features" / path.name
            self._clients[path.name] = Client(path.name, dataset, bundle, features, self._store)
        self.refusals: Counter[str] = Counter()
        self._norms: dict[int, list[float]] = {}

    def train(self) -> None:
        """Every stage, to the end."""
        for number, stage in enumerate(self._manifest.stages):
            if number:
                self._state.next_stage()
            for key in (RoundKey(number, one) for one in range(stage.rounds)):
                collection = asyncio.run(self._collect(key))
                delta = combine(self._plan, self._state.shapes, collection.updates(), self._folder)
                for ref in self._state.update(delta, [self._plan.seed, key.stage, key.round]):
                    self._store.remove(ref)
                self._updates.keep(())

    def evaluate(self, holdout: Dataset) -> dict[str, float]:
        """Metrics of the model as it is."""
        stage, values = self._state.stage, self._state.values
        return evaluate_stage(self._bundle, self._manifest, holdout, os.cpu_count() or 1, stage, values)

    def norms(self) -> dict[int, float]:
        """Stage, from 1 -> the median over honest clients and rounds of their updates' L2 norms."""
        return {stage + 1: statistics.median(values) for stage, values in self._norms.items()}

    async def _collect(self, key: RoundKey) -> Collection:
        offer = self._offer(key)
        collection = Collection(self._manifest, offer, self._fetch, NoPast())
        parameters = self._state.trainable()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(lambda client: client.train(offer, parameters), self._clients.values()))
        for name, trained in zip(self._clients, done, strict=True):
            delta, seed = trained.delta, [offer.plan.seed, zlib.crc32(name.encode())]
            if name in self._tampering:
                delta = self._tampering[name](delta)
            else:
                self._norms.setdefault(key.stage, []).append(norm(delta))
            report = Report(
                key=key,
                update=self._updates.put(compress(delta, offer.plan.compression, seed)),
                groups=self._manifest.stages[key.stage].trainable,
                num_examples=trained.num_examples,
                loss=trained.loss,
            )
            try:
                await collection.take(name, report)
            except PeerError as error:
                self.refusals[error.reason] += 1
        collection.close()
        return collection

    async def _fetch(self, _client: str, ref: BlobRef) -> Path:
        return self._updates.path(ref)

    def _offer(self, key: RoundKey) -> Offer:
        return Offer(
            key=key,
            opened_s=0.0,
            cohort=tuple(self._clients),
            parameters=self._state.parameters,
            frozen=self._state.frozen,
            plan=self._plan.train_plan(key, self._manifest.stages[key.stage].rounds),
            deadline_s=0.0,
        )


def as_result(run: OneProcess, metrics: Mapping[str, float]) -> dict[str, Any]:
    """What a finished run says, as plain values."""
    norms = {str(stage): round(value, 4) for stage, value in run.norms().items()}
    recall, chance = metrics.get("recall@10"), metrics.get("chance@10")
    return {
        "recall": recall,
        "chance": chance,
        "metrics": dict(metrics),
        "refusals": dict(run.refusals),
        "norms": norms,
    }
