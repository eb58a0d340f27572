"""What every stage of a schedule costs a client, before it runs: parameters, FLOPs, bytes, memory.

Rules: everything follows from the model's structure. FLOPs are as `export/observe.py` counts them; bytes
are those of the values, before zstd and without the messages around them; memory is as `export/memory.py`
expects it. Per example and epoch a client pays for the train step, forward and backward (forward twice in
a contrastive stage with micro-batches: the embeddings come first, GradCache, arXiv 2101.06983; and once
more for anchors), and besides

    without the feature cache  for the whole prefix
    with it                    for nothing; the newest segment runs once per example and stage

LW-FedMML, arXiv 2407.15426, compares schedules so. Next: `lamina/plan_command.py`, which shows them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from export.bundle import SEGMENT_BATCH_SIZE
from export.memory import Footprint, peak_bytes
from export.observe import observe_forward, observe_step
from export.schedules import SCHEDULES, Schedule, StagePlan
from export.stage import SegmentCut, StageCuts, cut_stages
from models.model import Model, parameter_groups
from wire.manifest import Manifest

COMPRESSIONS = ("none", "float16", "int8")

Shape = Sequence[int]


@dataclass(frozen=True)
class StageCost:
    """One stage, for one client.

    trainable_parameters, frozen_parameters: of the model attached, numbers of scalars.
    train_flops: of a train step with its anchors, per example. prefix_flops: of all that is frozen,
    forward, per example. segment_flops: of what was frozen last, forward, per example and once per stage.
    round_bytes: compression -> bytes of the trained groups, down each round and as many up.
    frozen_bytes: of the groups frozen last, down once per stage, where changes are not compressed.
    peak_bytes: expected of the client's process.
    """

    rounds: int
    micro_batch_size: int
    trainable_parameters: int
    frozen_parameters: int
    train_flops: int
    prefix_flops: int
    segment_flops: int
    round_bytes: dict[str, int]
    frozen_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class ScheduleCost:
    """A whole run by one schedule, for one client that takes part in every round."""

    schedule: str
    local_epochs: int
    stages: tuple[StageCost, ...]

    @property
    def flops(self) -> int:
        """Per example, over all rounds and epochs, with the feature cache and its own passes."""
        return sum(
            stage.segment_flops + stage.rounds * self.local_epochs * stage.train_flops
            for stage in self.stages
        )

    @property
    def flops_without_cache(self) -> int:
        """Per example, over all rounds and epochs, with the whole prefix at each step."""
        return sum(
            stage.rounds * self.local_epochs * (stage.train_flops + stage.prefix_flops)
            for stage in self.stages
        )

    def bytes_down(self, compression: str) -> int:
        """What the client receives: all parameters of each round and what is frozen, or if compressed, all
        once and then each round's change, from which the rest follows.
        """
        if compression == "none":
            return self.bytes_up("none") + sum(stage.frozen_bytes for stage in self.stages)
        first, last = self.stages[0].round_bytes["none"], self.stages[-1].round_bytes[compression]
        return first + self.bytes_up(compression) - last

    def bytes_up(self, compression: str) -> int:
        """What the client sends."""
        return sum(stage.rounds * stage.round_bytes[compression] for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Of the largest stage."""
        return max(stage.peak_bytes for stage in self.stages)


@dataclass(frozen=True)
class Setting:
    """How a client trains. engine: of `export.engines.EXPORTERS`. aligned: whether it keeps to anchors."""

    engine: str
    batch_size: int = 32
    local_epochs: int = 1
    aligned: bool = False


def schedule_cost(
    model: Model,
    schedule: Schedule,
    setting: Setting,
    micro_batch_sizes: Sequence[int] = (),
    modalities: Collection[str] = (),
) -> ScheduleCost:
    """model: an `export.observe.skeleton`. micro_batch_sizes: one a stage, 0 for none; empty: no stage.

    modalities: those that the client has, if it lacks some; then only its FLOPs are a client's.
    """
    cuts = cut_stages(
        model,
        schedule.stages,
        missing_modalities=bool(modalities),
        alignment=float(setting.aligned),
    )
    if modalities:
        cuts = [_of_part(cut, modalities) for cut in cuts]
    sizes = micro_batch_sizes or [0] * len(cuts)
    stages = [
        _stage_cost(model, cuts[number - 1] if number else None, cut, setting, size)
        for number, (cut, size) in enumerate(zip(cuts, sizes, strict=True))
    ]
    return ScheduleCost(schedule.name, setting.local_epochs, tuple(stages))


def every_schedule(
    model: Model, manifest: Manifest, setting: Setting, rounds: int = 0
) -> list[ScheduleCost]:
    """The bundle's own schedule, then the others, each of as many rounds in all.

    The others attach as many blocks a stage as the bundle's first stage does, and have no micro-batches.
    rounds: of each of the bundle's stages; 0: as the manifest says.
    """
    own = [rounds or stage.rounds for stage in manifest.stages]
    blocks = 1 if manifest.schedule == "end_to_end" else _most_blocks(manifest.stages[0].trainable)
    costs = []
    for name in sorted(SCHEDULES, key=lambda name: name != manifest.schedule):
        extra = {} if name == "end_to_end" else {"blocks_per_stage": blocks}
        count = len(SCHEDULES[name](model.depths, 1, **extra).stages)
        schedule = SCHEDULES[name](model.depths, spread(own, count), **extra)
        sizes = [stage.micro_batch_size for stage in manifest.stages] if name == manifest.schedule else ()
        costs.append(schedule_cost(model, schedule, setting, sizes))
    return costs


def spread(rounds: Sequence[int], stages: int) -> list[int]:
    """As many rounds for `stages` stages, evenly unless there are as many stages; at least 1 each."""
    if len(rounds) == stages:
        return list(rounds)
    whole, rest = divmod(sum(rounds), stages)
    return [max(1, whole + (number < rest)) for number in range(stages)]


def value_bytes(shapes: Iterable[Shape], compression: str) -> int:
    """Bytes of parameters of these shapes on the way.

    4 bytes a value, float16 2, int8 1; either with a float32 scale for each row of a tensor of two axes or
    more, and one for any other tensor.
    """
    width = {"none": 4, "float16": 2, "int8": 1}[compression]
    total = 0
    for shape in shapes:
        total += width * math.prod(shape)
        if compression != "none":
            total += 4 * (shape[0] if len(shape) > 1 else 1)
    return total


def footprint(before: StageCuts | None, cut: StageCuts) -> Footprint:
    """What decides over a stage's memory. before: the stage before."""
    segments = list(before.segments.values()) if before else []
    return Footprint(
        parameter_bytes=4 * _count(cut.train),
        step=lambda size: observe_step(cut.train, size).peak_bytes,
        example_bytes=sum(
            np.dtype(spec.dtype).itemsize * math.prod(spec.shape) for spec in cut.train.inputs.values()
        ),
        anchor_bytes=sum(
            4 * _count(one) + observe_forward(one, SEGMENT_BATCH_SIZE).peak_bytes
            for one in cut.anchors.values()
        ),
        segment_parameter_bytes=sum(4 * _count(one) for one in segments),
        segment_bytes=max(
            [observe_forward(one, SEGMENT_BATCH_SIZE).peak_bytes for one in segments], default=0
        ),
    )


def _stage_cost(
    model: Model, before: StageCuts | None, cut: StageCuts, setting: Setting, micro_batch_size: int
) -> StageCost:
    batch_size = setting.batch_size
    step = observe_step(cut.train, batch_size)
    train = step.flops
    if micro_batch_size and model.task == "contrastive":
        train += observe_forward(cut.train, batch_size).flops
    train += sum(observe_forward(anchor, batch_size).flops for anchor in cut.anchors.values())
    trainable, frozen = (_shapes(model, groups) for groups in (cut.plan.trainable, cut.plan.frozen))
    fetched = () if before is None else set(before.plan.trainable) & set(cut.plan.frozen)
    segments = before.segments.values() if before else ()
    return StageCost(
        rounds=cut.plan.rounds,
        micro_batch_size=micro_batch_size,
        trainable_parameters=sum(map(math.prod, trainable)),
        frozen_parameters=sum(map(math.prod, frozen)),
        train_flops=round(train / batch_size),
        prefix_flops=sum(observe_forward(one, 1).flops for one in _prefix(model, cut.plan)),
        segment_flops=sum(observe_forward(one, 1).flops for one in segments),
        round_bytes={one: value_bytes(trainable, one) for one in COMPRESSIONS},
        frozen_bytes=value_bytes(_shapes(model, fetched), "none"),
        peak_bytes=peak_bytes(setting.engine, footprint(before, cut), batch_size, micro_batch_size),
    )


def _of_part(cut: StageCuts, modalities: Collection[str]) -> StageCuts:
    """What a client computes that has only these modalities."""
    part = next(one for one in cut.partials if set(one) == set(modalities))
    starts = {name: start if name in part else None for name, start in cut.plan.starts.items()}
    segments = {name: one for name, one in cut.segments.items() if name in part}
    anchors = {name: one for name, one in cut.anchors.items() if name in part}
    plan, train = replace(cut.plan, starts=starts), cut.partials[part]
    return replace(cut, plan=plan, train=train, segments=segments, anchors=anchors)


def _prefix(model: Model, plan: StagePlan) -> list[SegmentCut]:
    """Everything frozen, one modality each, from the raw inputs on."""
    return [
        SegmentCut(encoder.section(0, start, stem=True), encoder.modality(name).inputs)
        for name, encoder in model.encoders.items()
        if (start := plan.starts[name]) is not None
    ]


def _shapes(model: Model, groups: Iterable[str]) -> list[torch.Size]:
    members, parameters = parameter_groups(model), dict(model.named_parameters())
    return [parameters[name].shape for group in groups for name in members[group]]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _most_blocks(groups: Iterable[str]) -> int:
    """Of any modality."""
    modalities = [group.partition(".block.")[0] for group in groups if ".block." in group]
    return max(map(modalities.count, modalities))
