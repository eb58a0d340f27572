"""A step in micro-batches: in which order an engine's passes give the gradients of the whole batch.

Rules: an engine supplies the passes, here is what all share. The network runs on one micro-batch at a time,
and what is kept of all is a row an example: embeddings and their gradients, which come to the second pass
as further inputs. A contrastive loss is that of all pairs in the batch, by GradCache (Gao et al.,
arXiv 2101.06983).

Next: `edge_client/engines/onnx.py`, which supplies the passes; `export/passes.py`, what they compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wire.errors import LocalError
from wire.manifest import Task
from wire.tensors import Arrays

_SHARE = "batch.share"  # input, float32 [b]: one over the size of the whole batch

Batch = Mapping[str, npt.NDArray[Any]]


class Passes(Protocol):
    """What an engine computes with the parameters that it holds, on b examples of a batch of B."""

    def embed(self, batch: Batch) -> Arrays:
        """Embeddings, float32 [b, E] each. Of a contrastive loss only."""
        ...

    def pairs(self, embeddings: Arrays) -> tuple[float, Arrays]:
        """Of all embeddings, [B, E] each: the loss, and further inputs of `gradients`, [B, ...] each."""
        ...

    def gradients(self, batch: Batch) -> float:
        """Add the gradients to their sums. For classification, the examples' part of the loss."""
        ...

    def part_of_loss(self, batch: Batch) -> float:
        """The same part without gradients. For classification only."""
        ...


def whole_gradients(passes: Passes, batch: Batch, size: int, task: Task) -> float:
    """Add the gradients of the batch's mean loss to the sums, at most `size` examples at a time; the loss.

    Raises `LocalError` for inputs of different sizes.
    """
    if task == "contrastive":
        loss, given = _pairs(passes, batch, size)
        for part in _split({**batch, **given}, size):
            passes.gradients(part)
        return loss
    return sum(passes.gradients(part) for part in _shares(batch, size))


def whole_loss(passes: Passes, batch: Batch, size: int, task: Task) -> float:
    """The batch's mean loss, at most `size` examples at a time. Raises as `whole_gradients` does."""
    if task == "contrastive":
        return _pairs(passes, batch, size)[0]
    return sum(passes.part_of_loss(part) for part in _shares(batch, size))


def _pairs(passes: Passes, batch: Batch, size: int) -> tuple[float, Arrays]:
    parts = [passes.embed(part) for part in _split(batch, size)]
    return passes.pairs({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _shares(batch: Batch, size: int) -> Iterator[Batch]:
    count = _count(batch)
    return _split({**batch, _SHARE: np.full(count, 1 / count, np.float32)}, size)


def _split(batch: Batch, size: int) -> Iterator[Batch]:
    for first in range(0, _count(batch), size):
        yield {name: value[first : first + size] for name, value in batch.items()}


def _count(batch: Batch) -> int:
    counts = {len(value) for value in batch.values()}
    if len(counts) != 1 or 0 in counts:
        raise LocalError("the inputs of a batch are of different sizes, or empty")
    return counts.pop()
