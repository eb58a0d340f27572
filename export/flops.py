"""What a client has computed in a run: `export/costs.py`'s count of each stage, times what it trained.

Rules: a client pays for its examples x epochs in each round that it takes part in, and for the frozen
prefix: with every step, or, with the feature cache, each segment once. It catches up on the segments of
stages that it was not asked in. Micro-batches of a contrastive model compute the embeddings twice, which
`StageCost.train_flops` has in it already.

Next: `export/costs.py`, which counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.costs import StageCost


@dataclass(frozen=True)
class Flops:
    """train: of train steps. prefix: of the frozen part with every step. cache: of its run once a stage."""

    train: float = 0.0
    prefix: float = 0.0
    cache: float = 0.0

    @property
    def total(self) -> float:
        """Of all three."""
        return self.train + self.prefix + self.cache

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.train + other.train, self.prefix + other.prefix, self.cache + other.cache)


def flops_by_round(
    stages: Sequence[StageCost],
    took_part: Iterable[int],
    examples: float,
    local_epochs: int,
    *,
    cached: bool,
    views: int = 1,
) -> list[Flops]:
    """Of one client, for each round that it took part in.

    took_part: the rounds' stages, in order, from 0. examples: of the client. cached: whether it keeps
    features. views: of an example in the cache; those of all modalities count, so it is an upper bound for
    a model of which only some have several.
    """
    found: list[Flops] = []
    ready = 0  # the stage whose features are there
    for stage in took_part:
        cost = stages[stage]
        missing = sum(one.segment_flops for one in stages[ready + 1 : stage + 1])
        passes = examples * local_epochs
        found.append(
            Flops(
                train=cost.train_flops * passes,
                prefix=0.0 if cached else cost.prefix_flops * passes,
                cache=float(missing * views * examples) if cached else 0.0,
            )
        )
        ready = max(ready, stage)
    return found
