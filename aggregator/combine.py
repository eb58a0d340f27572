"""FedAvg per parameter group (McMahan et al., arXiv 1602.05629, Algorithm 1).

Rules: a pure function of the global parameters and a stream of updates. Each group is averaged over the
clients that trained it, weighted by `num_examples`; a group that nobody trained keeps its value. One
update is held at a time, and sums are float64, so memory does not grow with the number of clients. The
order of the stream is the order of the sum: feed it sorted, and equal updates give equal bits.

Next: `aggregator/run.py`, which feeds it from disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wire.errors import LocalError
from wire.tensors import Array, Arrays


@dataclass(frozen=True)
class Update:
    """One client's contribution.

    delta: torch name -> float32 array, client minus global, of whole parameter groups.
    num_examples: examples trained on, at least 1.
    """

    client: str
    delta: Mapping[str, Array]
    num_examples: int


def fedavg(parameters: Mapping[str, Array], updates: Iterable[Update]) -> Arrays:
    """`parameters` plus the weighted mean of the updates' deltas, float32, same names and order.

    Raises `LocalError` for an update that should never have been accepted: no examples, an unknown name
    or another shape.
    """
    total: dict[str, npt.NDArray[np.float64]] = {}
    weight: dict[str, int] = dict.fromkeys(parameters, 0)

    def add(update: Update) -> None:
        if update.num_examples < 1:
            raise LocalError(f"update of {update.client} has no examples")
        for name, delta in update.delta.items():
            if name not in parameters or parameters[name].shape != delta.shape:
                raise LocalError(f"update of {update.client}: {name} does not fit")
            if name not in total:
                total[name] = np.zeros(delta.shape, np.float64)
            total[name] += delta.astype(np.float64) * update.num_examples
            weight[name] += update.num_examples

    deque(map(add, updates), maxlen=0)  # unlike a loop variable, it lets go of each update before the next
    return {
        name: np.asarray(value + total[name] / weight[name], np.float32) if weight[name] else value.copy()
        for name, value in parameters.items()
    }
