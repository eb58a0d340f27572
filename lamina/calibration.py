"""Calibration: after each round the aggregator trains what it has combined on a few public examples.

Rules: it trains what the stage trains, on top of the frozen prefix, as a client does and by a client's own
code, so clients keep their features; a run that is killed calibrates again to the same bits.

Server-side calibration of LW-FedSSL, Tun et al., arXiv 2401.11647, which trains the layers below as well.
Next: `edge_client/train.py`; `aggregator/run.py`, which calls it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Event

from msgspec.structs import replace

from edge_client.anchors import anchored
from edge_client.cache import FeatureCache
from edge_client.engines import AUTO, choose, open_engine, open_graph
from edge_client.features import by_own_names
from edge_client.train import train
from inputs.dataset import Dataset
from wire.manifest import Manifest
from wire.messages import Offer
from wire.tensors import Array, Arrays

NAME = "calibration"  # in place of a client's, which decides over the order of the examples


class Calibration:
    """An `aggregator.run.Calibrate`. folder: where features may lie.

    Raises `UserError` where no engine of the bundle's runs here.
    """

    def __init__(
        self, bundle: Path, manifest: Manifest, dataset: Dataset, folder: Path, epochs: int, threads: int
    ) -> None:
        self._bundle, self._manifest = bundle, manifest
        self._engine = choose(AUTO, manifest.stages[0].engines)
        self._cache = FeatureCache(folder, manifest, dataset, self._engine, dtype="float32")
        self._epochs, self._threads = epochs, threads

    def __call__(self, offer: Offer, values: Mapping[str, Array], combined: Arrays) -> Arrays:
        """See `aggregator.run.Calibrate`."""
        never = Event()
        for step in self._cache.steps(offer):
            graph = by_own_names(step.graph)
            run = open_graph(self._engine, self._bundle.joinpath, graph, self._threads)
            self._cache.run(step, run, dict(values), never)
        plan = replace(offer.plan, local_epochs=self._epochs, proximal_mu=0.0)
        opening = self._bundle.joinpath, self._manifest, offer.key.stage, self._threads
        examples = anchored(self._cache.features(offer), combined, self._engine, *opening)
        with open_engine(self._engine, *opening) as engine:
            trained = train(engine, combined, examples, plan, NAME, never)
        return {name: combined[name] + change for name, change in trained.delta.items()}
