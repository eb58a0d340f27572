"""Within a budget of memory: how many blocks a stage attaches, and its micro-batches. Pure decisions.

Rules: as many blocks a stage as fit, for fewer stages train better and shorter; but not for the price of
micro-batches under `COMFORTABLE`, which cost time. A stage's micro-batch is the whole batch where it fits,
else the largest power of two that does. So a larger budget never gives fewer blocks a stage, nor a smaller
micro-batch to the same stage. Every engine of the bundle has to fit.

Next: `export/memory.py`, what is expected; `lamina/within_budget.py`, which tries whether it is so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from export.costs import footprint
from export.memory import Footprint, peak_bytes
from export.schedules import SCHEDULES, Rounds, Schedule, WarmStart
from export.stage import cut_stages
from models.model import Model
from wire.errors import UserError

COMFORTABLE = 8  # examples


@dataclass(frozen=True)
class Fitted:
    """What a schedule comes to. micro_batch_sizes: one a stage, 0 for the whole batch; as are peaks."""

    schedule: Schedule
    micro_batch_sizes: tuple[int, ...]
    expected_peak_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Budget:
    """What a client may use.

    max_bytes: of its process. engines: those that the bundle is exported for. correction: what expectations
    are multiplied by, after something was measured. aligned: whether it keeps to anchors. whole_batches:
    whether there cannot be micro-batches.
    """

    max_bytes: int
    batch_size: int
    engines: tuple[str, ...]
    correction: float = 1.0
    aligned: bool = False
    whole_batches: bool = False

    def peak(self, stage: Footprint, micro_batch_size: int) -> int:
        """Of the engine that needs most."""
        peaks = (peak_bytes(engine, stage, self.batch_size, micro_batch_size) for engine in self.engines)
        return round(self.correction * max(peaks))

    def micro_batch_size(self, stage: Footprint) -> int | None:
        """0 where the whole batch fits, None where not even one example does."""
        return next((size for size in self.sizes if self.peak(stage, size) <= self.max_bytes), None)

    def is_comfortable(self, stage: Footprint) -> bool:
        """Whether it fits with the whole batch, or micro-batches that are not too small."""
        sizes = [size for size in (0, COMFORTABLE) if size in self.sizes]
        return any(self.peak(stage, size) <= self.max_bytes for size in sizes)

    @property
    def sizes(self) -> list[int]:
        """Of micro-batches, the largest first: 0, the whole batch, then the powers of two below it."""
        if self.whole_batches:
            return [0]
        return [0, *(2**power for power in reversed(range((self.batch_size - 1).bit_length())))]


def expected_peaks(
    model: Model, schedule: Schedule, budget: Budget, micro_batch_sizes: Sequence[int]
) -> list[int]:
    """Bytes that a client is expected to need in each stage. model: an `export.observe.skeleton`."""
    stages = zip(_footprints(model, schedule, budget), micro_batch_sizes, strict=True)
    return [budget.peak(stage, size) for stage, size in stages]


def fit(
    model: Model,
    budget: Budget,
    *,
    name: str,
    rounds: Rounds,
    blocks_per_stage: int | None = None,
    warm_start: WarmStart = "copy",
) -> Fitted:
    """The schedule `name` within the budget. Raises `UserError` where nothing fits.

    model: an `export.observe.skeleton`. blocks_per_stage: the most that a stage may attach; None: no limit.
    Only `layerwise` needs less memory with fewer; the others attach 1 unless told. rounds: one number a
    stage leaves no choice but that of as many stages.
    """

    def made(blocks: int) -> tuple[Schedule, list[Footprint]]:
        settings = {} if name == "end_to_end" else {"blocks_per_stage": blocks, "warm_start": warm_start}
        schedule = SCHEDULES[name](model.depths, rounds, **settings)
        return schedule, _footprints(model, schedule, budget)

    candidates = [blocks_per_stage or 1]
    if name == "layerwise":
        depth = max(model.depths.values())
        candidates = blocks_to_try(depth, blocks_per_stage)
        if not isinstance(rounds, int) and len(rounds) > 1:
            fitting = [blocks for blocks in candidates if -(-depth // blocks) == len(rounds)]
            candidates = fitting or candidates[-1:]
    return choose(budget, candidates, made)


def _footprints(model: Model, schedule: Schedule, budget: Budget) -> list[Footprint]:
    cuts = cut_stages(model, schedule.stages, alignment=float(budget.aligned))
    return [footprint(*pair) for pair in zip([None, *cuts[:-1]], cuts, strict=True)]


def choose(
    budget: Budget, candidates: Sequence[int], made: Callable[[int], tuple[Schedule, list[Footprint]]]
) -> Fitted:
    """The first of these numbers of blocks whose stages all fit in comfort, or else the last.

    Raises `UserError`, which tells the least that the last one needs.
    """
    for blocks in candidates[:-1]:
        schedule, stages = made(blocks)
        if all(map(budget.is_comfortable, stages)):
            return _fitted(budget, schedule, stages)
    return _fitted(budget, *made(candidates[-1]))


def blocks_to_try(depth: int, most: int | None) -> list[int]:
    """Numbers of blocks a stage, the largest first; of those that give as many stages the smallest."""
    numbers = {-(-depth // stages) for stages in range(1, depth + 1)}
    return sorted({min(most or depth, number) for number in numbers}, reverse=True)


def _fitted(budget: Budget, schedule: Schedule, stages: Iterable[Footprint]) -> Fitted:
    sizes, peaks = [], []
    for number, stage in enumerate(stages, 1):
        size = budget.micro_batch_size(stage)
        if size is None:
            least = budget.peak(stage, budget.sizes[-1])
            how = "" if budget.whole_batches else " even one example at a time"
            raise UserError(
                f"stage {number} needs {least / 1e6:.0f} MB{how}, the budget is "
                f"{budget.max_bytes / 1e6:.0f} MB",
                "take a smaller model, fewer tokens or pixels, or a larger --memory-budget",
            )
        sizes.append(size)
        peaks.append(budget.peak(stage, size))
    return Fitted(schedule, tuple(sizes), tuple(peaks))
