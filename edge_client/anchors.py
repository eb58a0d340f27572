"""Anchors: what the offered model makes of each example, which training keeps its own embeddings close to.

Rules: a batch's anchors are computed when the batch is, from the same inputs and views, by the offered
parameters; they are inputs of the train step like any other. Memory holds one batch of them.

Representation alignment of LW-FedSSL, Tun et al., arXiv 2401.11647. Next: `edge_client/train.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from edge_client.engines import BundleFile, Run, open_graph
from edge_client.features import AnyArray, Examples, Indices, in_pieces
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
        for name in self.runs:
            made[name] = in_pieces(len(indices), self.at_once, partial(self._piece, name, arrays))
        return arrays | made

    def _piece(self, name: str, arrays: Mapping[str, AnyArray], piece: slice) -> Array:
        graph, run = self.runs[name]
        inputs = {one: arrays[one][piece] for one in graph.inputs}
        embeddings = run(inputs, self.parameters)[graph.outputs[0]]
        if embeddings.ndim != 2 or any(len(embeddings) != len(value) for value in inputs.values()):
            raise GraphError(f"{name} is not one embedding an example", "export the bundle once more")
        return embeddings


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
