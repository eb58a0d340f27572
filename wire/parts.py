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
        segments = {name: graph for name, graph in stage.segments.items() if name in modalities}
        encoders = {name: graph for name, graph in stage.encoders.items() if name in modalities}
        stages.append(_training(stage, step, segments=segments, encoders=encoders, partials=()))
    return msgspec.structs.replace(
        manifest,
        modalities={name: entry for name, entry in manifest.modalities.items() if name in modalities},
        stages=tuple(stages),
    )


def within(manifest: Manifest, max_bytes: int) -> Manifest:
    """For a client that may use so much memory.

    A stage that needs more trains as the deepest earlier one that does not, if all that trains there trains
    here too. Raises `UserError` where there is none.
    """
    numbers = range(len(manifest.stages))
    return msgspec.structs.replace(
        manifest, stages=tuple(_within(manifest.stages[: number + 1], max_bytes) for number in numbers)
    )


def _within(stages: tuple[Stage, ...], max_bytes: int) -> Stage:
    """The last of these."""
    stage = stages[-1]
    usable = [one for one in stages if set(one.trainable) <= set(stage.trainable)]
    fitting = [one for one in usable if one.expected_peak_bytes <= max_bytes]
    if not fitting:
        least = min(one.expected_peak_bytes for one in usable)
        raise UserError(
            f"stage {len(stages)} needs {least / 1e6:.0f} MB of memory, allowed are {max_bytes / 1e6:.0f}",
            "allow more, or export for a smaller --memory-budget",
        )
    step = fitting[-1]
    return _training(
        stage,
        step,
        micro_batch_size=step.micro_batch_size,
        expected_peak_bytes=step.expected_peak_bytes,
        partials=step.partials,
    )


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
