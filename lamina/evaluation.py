"""Metrics of a model on held-out examples, from the same ONNX graphs that devices run. No torch.

Rules: retrieval asks each example of one modality for its partner among all examples of its group; ties
count against the model. Recalls are means over the examples of a group, then over groups (a drawing style,
say), so each group weighs the same. `recall@k` is the mean over both directions and all pairs.

Next: `lamina/evaluate_command.py`; `aggregator/run.py`, which evaluates every round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_client.engines import ONNX, open_graph
from inputs.dataset import Dataset
from models.saved import CLASSIFIER_NAME, SavedModel
from wire.manifest import LABEL, Graph, Manifest
from wire.tensors import Array

AT = (1, 5, 10)
BATCH = 64
_ROUNDING = 1e-6  # equal embeddings have scores that differ by so much at most

Parameters = Mapping[str, Array]
Encode = Callable[[Mapping[str, npt.NDArray[Any]]], Array]
"""Inputs or embeddings by name -> embedding float32 [B, E] or logits float32 [B, C]."""


def evaluate_stage(
    bundle: Path, manifest: Manifest, dataset: Dataset, threads: int, stage: int, parameters: Parameters
) -> dict[str, float]:
    """Metrics of the model cut at a stage. parameters: torch name -> float32, at least those it has."""
    entry = manifest.stages[stage]

    def opened(graph: Graph) -> Encode:
        run = open_graph(ONNX, bundle.joinpath, graph, threads)
        return lambda inputs: run(inputs, parameters)[graph.outputs[0]]

    encoders = {name: opened(graph) for name, graph in entry.encoders.items()}
    return metrics(dataset, encoders, opened(entry.classifier) if entry.classifier else None)


def evaluate_model(folder: Path, saved: SavedModel, dataset: Dataset, threads: int) -> dict[str, float]:
    """Metrics of a final model's folder."""

    def opened(file: str, inputs: tuple[str, ...], output: str) -> Encode:
        run = open_graph(ONNX, folder.joinpath, Graph(file, inputs, (output,), {}), threads)
        return lambda arrays: run(arrays, {})[output]

    encoders = {
        name: opened(f"{name}.onnx", tuple(modality.inputs), "embedding")
        for name, modality in saved.modalities.items()
    }
    classifier = (
        opened(CLASSIFIER_NAME, tuple(encoders), "logits") if saved.task == "classification" else None
    )
    return metrics(dataset, encoders, classifier)


def metrics(
    dataset: Dataset, encoders: Mapping[str, Encode], classifier: Encode | None = None
) -> dict[str, float]:
    """`recall@k`, each direction's (`image_to_text@k`), `chance@k`; a classifier's `accuracy`, `chance`."""
    embeddings: dict[str, list[Array]] = {name: [] for name in encoders}
    hits: list[npt.NDArray[np.bool_]] = []
    for first in range(0, len(dataset), BATCH):
        batch = dataset.batch(range(first, min(first + BATCH, len(dataset))))
        embedded = {name: encode(batch) for name, encode in encoders.items()}
        if classifier is not None:
            hits.append(classifier(embedded).argmax(axis=1) == batch[LABEL])
        for name, values in embedded.items():
            embeddings[name].append(values)
    if classifier is not None:
        assert dataset.labels is not None
        most_frequent = np.bincount(dataset.labels).max() / len(dataset)
        return {"accuracy": float(np.concatenate(hits).mean()), "chance": float(most_frequent)}
    whole = {name: np.concatenate(parts) for name, parts in embeddings.items()}
    return retrieval(whole, dataset.groups)


def retrieval(embeddings: Mapping[str, Array], groups: tuple[str, ...] | None = None) -> dict[str, float]:
    """Recalls among the examples of each group. embeddings: modality -> float32 [N, E], rows as pairs."""
    names = np.array(groups if groups is not None else [""] * len(next(iter(embeddings.values()))))
    recalls: dict[str, list[float]] = {}
    for group in np.unique(names):
        members = np.flatnonzero(names == group)
        for source, target in permutations(embeddings, 2):
            ranks = _ranks(embeddings[source][members], embeddings[target][members])
            for k in AT:
                recalls.setdefault(f"{source}_to_{target}@{k}", []).append(float((ranks < k).mean()))
        for k in AT:
            recalls.setdefault(f"chance@{k}", []).append(min(1.0, k / len(members)))
    means = {name: float(np.mean(values)) for name, values in recalls.items()}
    directions = [f"{source}_to_{target}" for source, target in permutations(embeddings, 2)]
    overall = {f"recall@{k}": float(np.mean([means[f"{one}@{k}"] for one in directions])) for k in AT}
    return overall | means


def _ranks(queries: Array, candidates: Array) -> npt.NDArray[np.int64]:
    """For each query, how many wrong candidates do not score less than the right one (NaN never does)."""
    scores = queries @ candidates.T
    right = np.diagonal(scores)[:, None]
    return np.asarray((~(scores < right - _ROUNDING)).sum(axis=1) - 1, np.int64)
