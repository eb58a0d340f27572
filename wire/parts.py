"""What one client sees of a run's manifest: only what it has the data and the memory to train.

Rules: the result is a manifest like any other, of fewer modalities or of shallower train steps, so whoever
trains by it need not know. The groups that are left are groups of the whole; each is averaged over those
who trained it. Pure functions.

Clients of unequal depth: DepthFL, Kim et al., ICLR 2023. Next: `edge_client/session.py`, which uses both.
"""

from __future__ import annotations

import msgspec

from wire.errors import UserError
from wire.manifest import Manifest, PartialStep, Stage


def modality_sets(manifest: Manifest) -> list[tuple[str, ...]]:
    """The sets of modalities that a client may train with, all of them first."""
    return [tuple(manifest.modalities), *(one.modalities for one in manifest.stages[0].partials)]


def with_modalities(manifest: Manifest, modalities: tuple[str, ...]) -> Manifest:
    """For a client that has only these modalities, of `modality_sets`."""
    if modalities == tuple(manifest.modalities):
        return manifest
    stages = []
    for stage in manifest.stages:
        step = next(one for one in stage.partials if one.modalities == modalities)
        graphs = {
            kind: {name: graph for name, graph in getattr(stage, kind).items() if name in modalities}
            for kind in ("segments", "encoders", "anchors")
        }
        stages.append(_training(stage, step, **graphs, partials=()))
    return msgspec.structs.replace(
        manifest,
        modalities={name: entry for name, entry in manifest.modalities.items() if name in modalities},
        stages=tuple(stages),
    )


def within(manifest: Manifest, max_bytes: int) -> Manifest:
    """For a client that may use so much memory.

    Raises `UserError` as `steps_within` does.
    """
    stages = []
    for stage, number in zip(manifest.stages, steps_within(manifest, max_bytes), strict=True):
        step = manifest.stages[number]
        kept = ("micro_batch_size", "expected_peak_bytes", "partials", "anchors")
        stages.append(_training(stage, step, **{name: getattr(step, name) for name in kept}))
    return msgspec.structs.replace(manifest, stages=tuple(stages))


def steps_within(manifest: Manifest, max_bytes: int) -> list[int]:
    """For each stage the one, from 0, whose train step a client takes that may use so much memory.

    It is the deepest up to the stage itself that fits and trains nothing that the stage does not. Raises
    `UserError` where there is none.
    """
    found = []
    for number, stage in enumerate(manifest.stages, 1):
        usable = {
            earlier: one.expected_peak_bytes
            for earlier, one in enumerate(manifest.stages[:number])
            if set(one.trainable) <= set(stage.trainable)
        }
        fitting = [earlier for earlier, needed in usable.items() if needed <= max_bytes]
        if not fitting:
            least = min(usable.values()) / 1e6
            raise UserError(
                f"stage {number} needs {least:.0f} MB of memory, allowed are {max_bytes / 1e6:.0f}",
                "allow more, or export for a smaller --memory-budget",
            )
        found.append(fitting[-1])
    return found


def _training(stage: Stage, step: Stage | PartialStep, **changes: object) -> Stage:
    """The stage with another train step."""
    return msgspec.structs.replace(
        stage,
        trainable=step.trainable,
        inputs=step.inputs,
        parameters=step.parameters,
        engines=step.engines,
        **changes,
    )
