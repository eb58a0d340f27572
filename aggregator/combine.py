"""How a round's updates become one change of the parameters.

Rules: a pure function of a plan and a stream of updates. Each parameter group is combined over the clients
that trained it; one that nobody trained is left out. Before any rule, an update's L2 norm is clipped to
`max_update_norm` (Sun et al., arXiv 1911.07963), what it says of its examples is capped at `max_examples`,
and an update that started from older parameters is discounted (FedBuff, Nguyen et al., arXiv 2106.06639).
One update is held at a time, so memory does not grow with the number of clients. The order of the stream is
the order of the sums: feed it sorted, and equal updates give equal bits.

FedAvg is here (McMahan et al., arXiv 1602.05629, Algorithm 1). Next: `aggregator/robust.py`, the rules that
withstand malicious clients; `aggregator/server_optimizer.py`, which takes the step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from aggregator.plan import RunPlan
from aggregator.robust import ROBUST, combined
from aggregator.rows import Rows
from wire.compression import Shapes
from wire.errors import LocalError
from wire.tensors import Array, Arrays

FEDAVG = "fedavg"
RULES = (FEDAVG, *ROBUST)
"""What `RunPlan.aggregation` may be."""


@dataclass(frozen=True)
class Update:
    """One client's contribution.

    delta: torch name -> float32 array, client minus global, of whole parameter groups.
    num_examples: examples trained on, at least 1.
    staleness: rounds that have ended since the parameters it started from were offered; 0 for this round's.
    """

    client: str
    delta: Mapping[str, Array]
    num_examples: int
    staleness: int = 0


def combine(plan: RunPlan, shapes: Shapes, updates: Iterable[Update], scratch: Path) -> Arrays:
    """What the updates come to by `plan.aggregation`: torch name -> float32, in the order of `shapes`.

    A name that no update has is not in it. shapes: of all that the stage trains. scratch: a folder that
    holds the updates as float32 while a robust rule works. Raises `LocalError` for an update that should
    never have been accepted: no examples, an unknown name or another shape; `UserError` where `scratch` is
    full.
    """
    limited = map(partial(_limited, plan, shapes), updates)
    if plan.aggregation == FEDAVG:
        return _mean(shapes, limited)
    with Rows(scratch, shapes) as rows:
        _each(lambda update: rows.add(update.delta), limited)
        return combined(rows, plan.aggregation, plan.malicious_fraction)


def norm(delta: Mapping[str, Array]) -> float:
    """The L2 norm over all tensors, summed in float64."""
    return math.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in delta.values()))


def _limited(plan: RunPlan, shapes: Shapes, update: Update) -> Update:
    """The update as far as it counts: clipped, discounted, with the examples that it may weigh."""
    if update.num_examples < 1:
        raise LocalError(f"update of {update.client} has no examples")
    if update.staleness < 0:
        raise LocalError(f"update of {update.client} is from a later round")
    for name, value in update.delta.items():
        if name not in shapes or shapes[name] != value.shape:
            raise LocalError(f"update of {update.client}: {name} does not fit")
    factor = (1 + update.staleness) ** -0.5
    if plan.max_update_norm and (length := norm(update.delta)) > plan.max_update_norm:
        factor *= plan.max_update_norm / length
    delta = update.delta
    if factor != 1:  # it may be less than float32 holds
        wide = {name: np.multiply(value, factor, dtype=np.float64) for name, value in delta.items()}
        delta = {name: np.asarray(value, np.float32) for name, value in wide.items()}
    weight = min(update.num_examples, plan.max_examples or update.num_examples)
    return replace(update, delta=delta, num_examples=weight)


def _mean(shapes: Shapes, updates: Iterable[Update]) -> Arrays:
    """Weighted by `num_examples`; a discounted update still has its whole weight below the line."""
    total: dict[str, npt.NDArray[np.float64]] = {}
    weight: dict[str, int] = dict.fromkeys(shapes, 0)

    def add(update: Update) -> None:
        for name, value in update.delta.items():
            if name not in total:
                total[name] = np.zeros(value.shape, np.float64)
            total[name] += value.astype(np.float64) * update.num_examples
            weight[name] += update.num_examples

    _each(add, updates)
    return {name: np.asarray(total[name] / weight[name], np.float32) for name in shapes if name in total}


def _each(work: Callable[[Update], None], updates: Iterable[Update]) -> None:
    """Unlike a loop's variable, it lets go of each update before the next is read."""
    deque(map(work, updates), maxlen=0)
