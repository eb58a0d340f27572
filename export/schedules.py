"""Schedules: which parameter groups each stage trains. Pure decisions from the encoders' depths.

Rules: a schedule is a tuple of `StagePlan`s, made in one of three ways that share this type:
- `layerwise` (LW-FedMML): a stage attaches the next block of every modality and trains only that, on the
  frozen ones below. The stem trains in the first stage, the head in all of them.
- `progressive` (Prog-FedMML): attaches the same, and trains everything attached so far.
- `end_to_end` (FedMML): one stage, everything.
A modality that has run out of blocks stays as it is (under `layerwise` frozen); the head still trains.
A block that a later stage attaches starts as a copy of the block below it, or fresh.

Tun, Thwal, Nguyen, Hong, arXiv 2407.15426. Next: `export/stage.py`, which cuts the model by a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from wire.errors import UserError

WarmStart = Literal["copy", "fresh"]
Rounds = int | Sequence[int]


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    trainable, frozen: parameter groups, in module order.
    depths: modality -> blocks attached, counted from the stem.
    starts: modality -> frozen blocks below what trains; None where the stem trains (raw data comes in).
    warm_start: group -> group whose values it takes when the stage begins.
    """

    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    depths: Mapping[str, int]
    starts: Mapping[str, int | None]
    warm_start: Mapping[str, str]
    rounds: int

    def trainable_with(self, modalities: Collection[str]) -> tuple[str, ...]:
        """The groups that a client trains which has only these modalities."""
        kept = {*modalities, "head"}
        return tuple(group for group in self.trainable if group.removeprefix("head.").split(".")[0] in kept)


@dataclass(frozen=True)
class Schedule:
    """`name`: `layerwise`, `progressive` or `end_to_end`."""

    name: str
    stages: tuple[StagePlan, ...]


def layerwise(
    depths: Mapping[str, int],
    rounds: Rounds = 10,
    *,
    blocks_per_stage: int = 1,
    warm_start: WarmStart = "copy",
) -> Schedule:
    """LW-FedMML. depths: modality -> blocks. rounds: of every stage, or one number a stage."""
    attached = _attached(depths, blocks_per_stage)
    below: dict[str, int | None] = dict.fromkeys(depths)
    plans = []
    for stage, (depth, number) in enumerate(zip(attached, _rounds(rounds, len(attached)), strict=True)):
        plans.append(_plan(depth, below, _warm(attached, stage, warm_start), number))
        below = dict(depth)
    return Schedule("layerwise", tuple(plans))


def progressive(
    depths: Mapping[str, int],
    rounds: Rounds = 10,
    *,
    blocks_per_stage: int = 1,
    warm_start: WarmStart = "copy",
) -> Schedule:
    """Prog-FedMML; arguments as for `layerwise`."""
    attached = _attached(depths, blocks_per_stage)
    raw: dict[str, int | None] = dict.fromkeys(depths)
    plans = [
        _plan(depth, raw, _warm(attached, stage, warm_start), number)
        for stage, (depth, number) in enumerate(zip(attached, _rounds(rounds, len(attached)), strict=True))
    ]
    return Schedule("progressive", tuple(plans))


def end_to_end(depths: Mapping[str, int], rounds: Rounds = 10) -> Schedule:
    """FedMML: everything in one stage."""
    _check(depths, 1)
    return Schedule("end_to_end", (_plan(depths, dict.fromkeys(depths), {}, _rounds(rounds, 1)[0]),))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "layerwise": layerwise,
    "progressive": progressive,
    "end_to_end": end_to_end,
}


def _plan(
    depths: Mapping[str, int], starts: Mapping[str, int | None], warm_start: Mapping[str, str], rounds: int
) -> StagePlan:
    trainable: list[str] = []
    frozen: list[str] = []
    for name, depth in depths.items():
        start = starts[name]
        (trainable if start is None else frozen).append(f"{name}.stem")
        for block in range(depth):
            (trainable if start is None or block >= start else frozen).append(f"{name}.block.{block}")
    head = ("head", *(f"head.{name}" for name in depths))
    return StagePlan((*trainable, *head), tuple(frozen), dict(depths), dict(starts), warm_start, rounds)


def _attached(depths: Mapping[str, int], blocks_per_stage: int) -> list[dict[str, int]]:
    """For each stage, modality -> blocks attached."""
    _check(depths, blocks_per_stage)
    num_stages = -(-max(depths.values()) // blocks_per_stage)
    return [
        {name: min(depth, (stage + 1) * blocks_per_stage) for name, depth in depths.items()}
        for stage in range(num_stages)
    ]


def _check(depths: Mapping[str, int], blocks_per_stage: int) -> None:
    if not depths or min(depths.values()) < 1:
        raise UserError("a schedule needs at least one block in every encoder", "give each encoder blocks")
    if blocks_per_stage < 1:
        raise UserError(f"{blocks_per_stage} blocks per stage train nothing", "use 1 or more")


def _warm(attached: Sequence[Mapping[str, int]], stage: int, how: WarmStart) -> dict[str, str]:
    """Every block that `stage` attaches, from the last one that an earlier stage has trained."""
    if how not in ("copy", "fresh"):
        raise UserError(f"there is no warm start {how!r}", "choose copy or fresh")
    if how == "fresh" or stage == 0:
        return {}
    before = attached[stage - 1]
    return {
        f"{name}.block.{block}": f"{name}.block.{before[name] - 1}"
        for name, depth in attached[stage].items()
        for block in range(before[name], depth)
    }


def _rounds(rounds: Rounds, num_stages: int) -> list[int]:
    each = [rounds] * num_stages if isinstance(rounds, int) else list(rounds)
    if len(each) != num_stages:
        raise UserError(
            f"rounds for {len(each)} stages, the schedule has {num_stages}",
            "give one number for all, or one a stage",
        )
    if min(each) < 1:
        raise UserError(f"a stage of {min(each)} rounds trains nothing", "use 1 or more")
    return each
