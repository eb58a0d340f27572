"""Anchors: what the offered model makes of each example, which training keeps its own embeddings close to.

Rules: a batch's anchors are computed when the batch is, from the same inputs and views, by the offered
parameters; they are inputs of the train step like any other. Memory holds one batch of them.

Representation alignment of LW-FedSSL, Tun et al., arXiv 2401.11647. Next: `edge_client/train.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_client.engines import BundleFile, Run, open_graph
from edge_client.features import AnyArray, Features, Indices
from wire.manifest import Graph, Stage, anchor_of
from wire.tensors import Array, Arrays


@dataclass(frozen=True)
class Anchored:
    """Features, and the anchors of every batch.

    runs: an input's name -> the graph that makes it, and what runs that. parameters: torch name -> float32.
    """

    features: Features
    runs: Mapping[str, tuple[Graph, Run]]
    parameters: Mapping[str, Array]

    def __len__(self) -> int:
        return len(self.features)

    def batch(self, indices: Sequence[int] | Indices, views: Indices | None = None) -> dict[str, AnyArray]:
        """As of `Features`, with the anchors float32 `[B, E]`."""
        arrays = self.features.batch(indices, views)
        size = self.features.segment_batch_size
        made: Arrays = {}
        for name, (graph, run) in self.runs.items():
            pieces = []
            for first in range(0, len(indices), size):
                inputs = {one: arrays[one][first : first + size] for one in graph.inputs}
                pieces.append(run(inputs, self.parameters)[graph.outputs[0]])
            made[name] = np.concatenate(pieces)
        return arrays | made


def anchored(
    features: Features,
    stage: Stage,
    parameters: Mapping[str, Array],
    engine: str,
    file: BundleFile,
    threads: int,
) -> Features | Anchored:
    """The features with what the stage wants besides. engine, file: as for `open_graph`."""
    runs = {
        anchor_of(name): (graph, open_graph(engine, file, graph, threads))
        for name, graph in stage.anchors.items()
    }
    return Anchored(features, runs, parameters) if runs else features
