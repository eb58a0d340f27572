"""From a model and a schedule to a bundle: everything that devices and the aggregator need, in one folder.

Rules: equal content is one file, whichever stages use it. The bundle is checked against torch before it
takes its name; one that fails is not left behind. Exporting twice gives the same bytes.

Next: `wire/manifest.py`, the bundle's table of contents; `export/parity.py`, the check.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch

from export.engines import EngineFiles, Settings, check_engines, exportable
from export.folder import new_folder
from export.graph import content, trace, weights_as_inputs
from export.parity import Engines, Parity, check
from export.schedules import Schedule
from export.stage import Cut, StageCuts, TrainCut, cut_stages
from export.tokenizer import train_tokenizer
from models.model import Model, group_of
from wire.errors import UserError
from wire.manifest import (
    FORMAT,
    MANIFEST_NAME,
    AdamW,
    BlobRef,
    Graph,
    Manifest,
    Parameter,
    PartialStep,
    Stage,
    encode_manifest,
)
from wire.tensors import Arrays, pack

INITIAL = "initial.safetensors"
MAX_BATCH_SIZE = 64
SEGMENT_BATCH_SIZE = 8


@dataclass(frozen=True)
class Exported:
    """`parity` is None where no engines were given to check with."""

    manifest: Manifest
    parity: Parity | None


@dataclass
class _Files:
    """Files by name, each content once."""

    contents: dict[str, bytes] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, content: bytes) -> str:
        """The name to find `content` under: `name`, or that of an equal file added before."""
        known = self._names.setdefault(BlobRef.of(content).sha256, name)
        self.contents.setdefault(known, content)
        return known


def export_bundle(
    model: Model,
    schedule: Schedule,
    out: Path,
    *,
    texts: Iterable[str] = (),
    classes: Sequence[str] = (),
    optimizer: AdamW | None = None,
    engines: Sequence[str] | None = None,
    max_batch_size: int = MAX_BATCH_SIZE,
    micro_batch_sizes: Sequence[int] | None = None,
    expected_peak_bytes: Sequence[int] = (),
    missing_modalities: bool = False,
    alignment: float = 0.0,
    runtimes: Engines | None = None,
    seed: int = 0,
    force: bool = False,
) -> Exported:
    """Write the bundle of `model`, as `models.registry.build` made it, to the folder `out`.

    texts: what the tokenizer is trained on, for a model that reads text.
    classes: label names of a classification model, in the order of its logits.
    engines: those to export for; None: all whose files can be made here.
    max_batch_size: the largest batch to train with.
    micro_batch_sizes: of each stage, `Stage.micro_batch_size`; None: 0 of all.
    expected_peak_bytes: of a client, one a stage (`export/budget.py`); empty: unknown.
    missing_modalities: also write train steps for clients that have only some modalities.
    alignment: how strongly clients keep their embeddings to those of the offered model; 0: not at all.
    runtimes: the package `edge_client.engines`, which the check runs the bundle on; None: no check.
    seed: of the check's random inputs.
    Raises `UserError` where arguments do not fit, `ParityError` where the bundle does not follow torch.
    """
    _check_model(model, classes)
    micro = tuple(micro_batch_sizes or [0] * len(schedule.stages))
    check_micro_batches(micro, len(schedule.stages), max_batch_size)
    if alignment and any(micro) and model.task == "contrastive":
        raise UserError(
            "a contrastive loss with alignment is not computed in micro-batches", "leave out one of them"
        )
    optimizer = optimizer or AdamW()
    makers = EngineFiles(
        check_engines(exportable() if engines is None else engines),
        Settings(optimizer, max_batch_size, SEGMENT_BATCH_SIZE),
    )
    with new_folder(out, MANIFEST_NAME, force=force) as folder:
        files = _Files()
        for name, size in _tokenizers(model).items():
            files.add(name, train_tokenizer(texts, size))
        values = parameter_values(model)
        files.add(INITIAL, pack(values))
        cuts = cut_stages(
            model, schedule.stages, missing_modalities=missing_modalities, alignment=alignment
        )
        stages = tuple(
            _stage(number, cut, model, makers, files, size)
            for number, (cut, size) in enumerate(zip(cuts, micro, strict=True))
        )
        peaks = expected_peak_bytes or [0] * len(stages)
        manifest = Manifest(
            format=FORMAT,
            builder=model.builder,
            builder_options=model.builder_options,
            task=model.task,
            schedule=schedule.name,
            modalities=model.modalities,
            classes=tuple(classes),
            optimizer=optimizer,
            max_batch_size=max_batch_size,
            parameters={
                name: Parameter(group_of(name, model.encoders), value.shape)
                for name, value in values.items()
            },
            stages=tuple(
                msgspec.structs.replace(stage, expected_peak_bytes=peak)
                for stage, peak in zip(stages, peaks, strict=True)
            ),
            initial=INITIAL,
            files={name: BlobRef.of(content) for name, content in sorted(files.contents.items())},
            segment_batch_size=SEGMENT_BATCH_SIZE,
        )
        for name, data in files.contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
        parity = check(folder, manifest, model, cuts, runtimes, seed=seed) if runtimes else None
    return Exported(manifest, parity)


def parameter_values(model: Model) -> Arrays:
    """The model's parameters now, torch name -> float32, in module order."""
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def _stage(
    number: int,
    cuts: StageCuts,
    model: Model,
    makers: EngineFiles,
    files: _Files,
    micro_batch_size: int,
) -> Stage:
    def graph(kind: str, cut: Cut, *, on_device: bool = False) -> Graph:
        return _graph(f"stage{number}.{kind}", cut, model, files, makers if on_device else None)

    def engines(cut: TrainCut, part: str = "") -> dict[str, dict[str, str]]:
        return {
            engine: {
                role: files.add(f"{engine}/stage{number}.{part}{role}.{ending}", data)
                for role, (ending, data) in made.items()
            }
            for engine, made in makers.of_step(cut, micro_batch_size).items()
        }

    plan = cuts.plan
    return Stage(
        trainable=plan.trainable,
        frozen=plan.frozen,
        rounds=plan.rounds,
        warm_start=dict(plan.warm_start),
        inputs=cuts.train.inputs,
        parameters=cuts.train.torch_names(model),
        engines=engines(cuts.train),
        segments={
            name: graph(f"{name}.segment", cut, on_device=True) for name, cut in cuts.segments.items()
        },
        encoders={name: graph(f"{name}.encoder", cut) for name, cut in cuts.encoders.items()},
        classifier=graph("classifier", cuts.classifier) if cuts.classifier else None,
        micro_batch_size=micro_batch_size,
        anchors={name: graph(f"{name}.anchor", cut, on_device=True) for name, cut in cuts.anchors.items()},
        partials=tuple(
            PartialStep(
                modalities=part,
                trainable=plan.trainable_with(part),
                inputs=cut.inputs,
                parameters=cut.torch_names(model),
                engines=engines(cut, f"{'-'.join(part)}."),
            )
            for part, cut in cuts.partials.items()
        ),
    )


def _graph(name: str, cut: Cut, model: Model, files: _Files, makers: EngineFiles | None) -> Graph:
    """makers: of a graph that devices run, too."""
    names = cut.torch_names(model)
    onnx_model = trace(cut)
    weights_as_inputs(onnx_model, list(names))
    data = content(onnx_model)
    program = makers.program(cut, data) if makers else None
    return Graph(
        file=files.add(f"graphs/{name}.onnx", data),
        inputs=tuple(cut.inputs),
        outputs=cut.outputs,
        parameters=names,
        program=None if program is None else files.add(f"graphs/{name}.pte", program),
    )


def _tokenizers(model: Model) -> dict[str, int]:
    """Tokenizer file -> vocabulary that every text encoder using it has room for."""
    sizes: dict[str, int] = {}
    for modality in model.modalities.values():
        name, size = modality.options.get("tokenizer"), modality.options.get("vocabulary")
        if isinstance(name, str) and isinstance(size, int):
            sizes[name] = min(size, sizes.get(name, size))
    return sizes


def check_micro_batches(sizes: Sequence[int], num_stages: int, max_batch_size: int) -> None:
    """Raises `UserError` for sizes that are not one a stage, or out of range."""
    if len(sizes) != num_stages:
        raise UserError(
            f"{len(sizes)} sizes of micro-batches for {num_stages} stages",
            "give one number, or one a stage",
        )
    if not all(0 <= size <= max_batch_size for size in sizes):
        raise UserError(
            f"micro-batches of {', '.join(map(str, sizes))}, and the largest batch has {max_batch_size}",
            "choose numbers from 0, which is none, to that of the largest batch",
        )


def _check_model(model: Model, classes: Sequence[str]) -> None:
    if not model.builder:
        raise UserError(
            "a model that names no builder cannot be exported", "make it by models.registry.build"
        )
    if buffers := list(model.state_dict().keys() - dict(model.named_parameters()).keys()):
        raise UserError(
            f"{buffers[0]} is a saved buffer, and only parameters are trained and averaged",
            "register it with persistent=False, or use a norm without running statistics",
        )
    if other := [name for name, value in model.named_parameters() if value.dtype is not torch.float32]:
        raise UserError(f"{other[0]} is not float32", "build the model in float32")
    num_classes = getattr(model.head, "classes", 0)
    if len(classes) != num_classes:
        raise UserError(
            f"{len(classes)} class names for a model of {num_classes} classes",
            "set the model's option classes to the number of labels",
        )
