"""From a model and a schedule to a bundle: everything that devices and the aggregator need, in one folder.

Rules: equal content is one file, whichever stages use it. The bundle is checked against torch before it
takes its name; one that fails is not left behind. Exporting twice gives the same bytes.

Next: `wire/manifest.py`, the bundle's table of contents; `export/parity.py`, the check.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from export.folder import new_folder
from export.graph import content, trace, weights_as_inputs
from export.ort_training import parameter_order, training_files
from export.parity import Engines, Parity, check
from export.schedules import Schedule
from export.stage import Cut, StageCuts, cut_stages
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
    Stage,
    encode_manifest,
)
from wire.tensors import Arrays, pack

INITIAL = "initial.safetensors"


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
    engines: Engines | None = None,
    seed: int = 0,
    force: bool = False,
) -> Exported:
    """Write the bundle of `model`, as `models.registry.build` made it, to the folder `out`.

    texts: what the tokenizer is trained on, for a model that reads text.
    classes: label names of a classification model, in the order of its logits.
    engines: the package `edge_client.engines`, which the check runs the bundle on; None: no check.
    seed: of the check's random inputs.
    Raises `UserError` where arguments do not fit, `ParityError` where the bundle does not follow torch.
    """
    _check_model(model, classes)
    optimizer = optimizer or AdamW()
    with new_folder(out, MANIFEST_NAME, force=force) as folder:
        files = _Files()
        for name, size in _tokenizers(model).items():
            files.add(name, train_tokenizer(texts, size))
        values = parameter_values(model)
        files.add(INITIAL, pack(values))
        cuts = cut_stages(model, schedule.stages)
        stages = tuple(_stage(number, cut, model, optimizer, files) for number, cut in enumerate(cuts))
        manifest = Manifest(
            format=FORMAT,
            builder=model.builder,
            builder_options=model.builder_options,
            task=model.task,
            schedule=schedule.name,
            modalities=model.modalities,
            classes=tuple(classes),
            optimizer=optimizer,
            parameters={name: Parameter(group_of(name), value.shape) for name, value in values.items()},
            stages=stages,
            initial=INITIAL,
            files={name: BlobRef.of(content) for name, content in sorted(files.contents.items())},
        )
        for name, data in files.contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
        parity = check(folder, manifest, model, cuts, engines, seed=seed) if engines else None
    return Exported(manifest, parity)


def parameter_values(model: Model) -> Arrays:
    """The model's parameters now, torch name -> float32, in module order."""
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def _stage(number: int, cuts: StageCuts, model: Model, optimizer: AdamW, files: _Files) -> Stage:
    names = cuts.train.torch_names(model)
    roles = training_files(trace(cuts.train), list(names), optimizer)
    engine = {
        role: files.add(f"ort-training/stage{number}.{role}{'' if role == 'checkpoint' else '.onnx'}", data)
        for role, data in roles.items()
    }

    def graph(kind: str, cut: Cut) -> Graph:
        return _graph(f"graphs/stage{number}.{kind}.onnx", cut, model, files)

    plan = cuts.plan
    return Stage(
        trainable=plan.trainable,
        frozen=plan.frozen,
        rounds=plan.rounds,
        warm_start=dict(plan.warm_start),
        inputs=cuts.train.inputs,
        parameters={name: names[name] for name in parameter_order(roles["train"], list(names))},
        engines={"ort-training": engine},
        segments={name: graph(f"{name}.segment", cut) for name, cut in cuts.segments.items()},
        encoders={name: graph(f"{name}.encoder", cut) for name, cut in cuts.encoders.items()},
        classifier=graph("classifier", cuts.classifier) if cuts.classifier else None,
    )


def _graph(file: str, cut: Cut, model: Model, files: _Files) -> Graph:
    names = cut.torch_names(model)
    onnx_model = trace(cut)
    weights_as_inputs(onnx_model, list(names))
    return Graph(files.add(file, content(onnx_model)), tuple(cut.inputs), cut.outputs, names)


def _tokenizers(model: Model) -> dict[str, int]:
    """Tokenizer file -> vocabulary that every text encoder using it has room for."""
    sizes: dict[str, int] = {}
    for modality in model.modalities.values():
        name, size = modality.options.get("tokenizer"), modality.options.get("vocabulary")
        if isinstance(name, str) and isinstance(size, int):
            sizes[name] = min(size, sizes.get(name, size))
    return sizes


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
