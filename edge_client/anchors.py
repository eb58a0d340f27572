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
from edge_client.features import AnyArray, Examples, Indices
from wire.errors import GraphError
from wire.manifest import Graph, Manifest, anchor_of
from wire.tensors import Array, Arrays


@dataclass(frozen=True)
class Anchored:
    """Examples, and the anchors of every batch.

    runs: an input's name -> the graph that makes it, and what runs that. parameters: torch name -> float32.
    at_once: the most examples that a graph takes.
    """

    examples: Examples
    runs: Mapping[str, tuple[Graph, Run]]
    parameters: Mapping[str, Array]
    at_once: int

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int] | Indices, views: Indices | None = None) -> dict[str, AnyArray]:
        """As the examples', with the anchors float32 `[B, E]`. Raises `GraphError`."""
        arrays = self.examples.batch(indices, views)
        made: Arrays = {}
        for name, (graph, run) in self.runs.items():
            pieces = []
            for first in range(0, len(indices), self.at_once):
                inputs = {one: arrays[one][first : first + self.at_once] for one in graph.inputs}
                pieces.append(run(inputs, self.parameters)[graph.outputs[0]])
            if any(piece.ndim != 2 for piece in pieces) or sum(map(len, pieces)) != len(indices):
                raise GraphError(f"{name} is not one embedding an example", "export the bundle once more")
            made[name] = np.concatenate(pieces)
        return arrays | made


def anchored(
    examples: Examples,
    parameters: Mapping[str, Array],
    engine: str,
    file: BundleFile,
    manifest: Manifest,
    stage: int,
    threads: int = 1,
) -> Examples:
    """The examples, with anchors where a stage has them. parameters: offered; the rest as `open_engine`."""
    runs = {
        anchor_of(name): (graph, open_graph(engine, file, graph, threads))
        for name, graph in manifest.stages[stage].anchors.items()
    }
    return Anchored(examples, runs, parameters, manifest.segment_batch_size) if runs else examples
