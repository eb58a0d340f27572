"""Cutting the torch model by a plan: what trains, what the prefix computes, what the cut model gives.

Rules: a cut shares the model's parameters, it copies nothing. Inside a cut names are local (blocks count
from 0), so cuts of equal structure have equal names, and later equal files.

Next: `export/graph.py`, which turns a cut into ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from export.schedules import StagePlan
from models.encoder import Section
from models.heads import ClassificationHead, Head
from models.model import Model
from wire.errors import UserError
from wire.manifest import LABEL, TensorSpec, anchor_of


class Cut(nn.Module):
    """A part of the model with positional inputs, as an ONNX graph has them.

    inputs: name -> one example's tensor, in the order of `forward`'s arguments. outputs: names.
    """

    inputs: dict[str, TensorSpec]
    outputs: tuple[str, ...]

    def torch_names(self, model: Model) -> dict[str, str]:
        """Local parameter name -> the model's name of the same parameter."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return {name: names[id(parameter)] for name, parameter in self.named_parameters()}


class TrainCut(Cut):
    """This stage's sections and the head: its inputs -> the loss, float32 [].

    alignment: how much is added of the distance from the anchors: 1 minus the cosine, the mean over the
        modalities and the batch.
    """

    outputs: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        sections: Mapping[str, Section],
        head: Head,
        inputs: dict[str, TensorSpec],
        alignment: float = 0.0,
    ) -> None:
        super().__init__()
        self.alignment = alignment
        for name, section in sections.items():
            self.add_module(name, section)
        self.head = head
        self.sections, self.inputs = dict(sections), inputs

    def forward(self, *values: Tensor) -> Tensor:
        """`values`: batches [B, ...] of `inputs`."""
        batch = dict(zip(self.inputs, values, strict=True))
        return self.loss(self.embeddings(batch), batch)

    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The head's, and the anchors'."""
        loss = self.head.loss(embeddings, batch.get(LABEL))
        if self.alignment:
            for name, value in embeddings.items():
                distance = 1.0 - _cosine(value, batch[anchor_of(name)]).mean()
                loss = loss + self.alignment / len(embeddings) * distance
        return loss

    def embeddings(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Modality -> float32 [B, E]."""
        embeddings = {}
        for name, section in self.sections.items():
            mask = batch.get(f"{name}_mask")
            embeddings[name] = self.head.embed(name, section(batch[name], mask), mask)
        return embeddings


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    squares = (a * a).sum(dim=-1) * (b * b).sum(dim=-1)
    return (a * b).sum(dim=-1) / torch.sqrt(squares + 1e-12)


class SegmentCut(Cut):
    """One modality's part of the prefix: a stage's inputs -> the next stage's features [B, T, D]."""

    outputs = ("features",)

    def __init__(self, section: Section, inputs: dict[str, TensorSpec]) -> None:
        super().__init__()
        self.section, self.inputs = section, inputs

    def forward(self, *values: Tensor) -> Tensor:
        """The data, then its mask if there is one."""
        features: Tensor = self.section(*values)
        return features


class EncoderCut(Cut):
    """The model cut at a stage, one modality: raw inputs -> embedding float32 [B, E]."""

    outputs = ("embedding",)

    def __init__(self, name: str, section: Section, head: Head, inputs: dict[str, TensorSpec]) -> None:
        super().__init__()
        self.section = section
        self.projection = head.projections[name]
        self._embed = (head.embed, name)
        self.inputs = inputs

    def forward(self, *values: Tensor) -> Tensor:
        """The data, then its mask if there is one."""
        embed, name = self._embed
        mask = values[1] if len(values) > 1 else None
        return embed(name, self.section(*values), mask)


class ClassifierCut(Cut):
    """Embeddings float32 [B, E] of all modalities -> logits float32 [B, C]."""

    outputs = ("logits",)

    def __init__(self, head: ClassificationHead) -> None:
        super().__init__()
        self.fuse, self.bias, self.classify = head.fuse, head.bias, head.classify
        self._logits = head.logits
        self.inputs = {name: TensorSpec((head.embedding,), "float32") for name in head.modalities}

    def forward(self, *values: Tensor) -> Tensor:
        """One embedding per modality."""
        return self._logits(dict(zip(self.inputs, values, strict=True)))


@dataclass(frozen=True)
class StageCuts:
    """Everything a stage is made of; the fields are those of `wire.manifest.Stage`.

    partials: the modalities that a client has -> its train step.
    """

    plan: StagePlan
    train: TrainCut
    partials: dict[tuple[str, ...], TrainCut]
    segments: dict[str, SegmentCut]
    encoders: dict[str, EncoderCut]
    classifier: ClassifierCut | None
    anchors: dict[str, EncoderCut]


def cut_stages(
    model: Model,
    plans: tuple[StagePlan, ...],
    *,
    missing_modalities: bool = False,
    alignment: float = 0.0,
) -> list[StageCuts]:
    """The cuts of every stage.

    missing_modalities: also for clients that have only some modalities. alignment: as of `TrainCut`.
    """
    followers = [*plans[1:], None]
    parts = _parts(model) if missing_modalities else ()
    return [
        _cut(model, plan, after, parts, alignment) for plan, after in zip(plans, followers, strict=True)
    ]


def _parts(model: Model) -> tuple[tuple[str, ...], ...]:
    """What a client may have that lacks a modality, as far as there is a loss. Raises `UserError`."""
    names = model.head.modalities
    sizes = range(model.head.least, len(names))
    if not sizes:
        raise UserError(
            f"a {model.task} loss of {' and '.join(names)} needs all of them in every client",
            "leave out --missing-modalities, and the clients that lack one",
        )
    return tuple(part for size in sizes for part in combinations(names, size))


def _cut(
    model: Model,
    plan: StagePlan,
    after: StagePlan | None,
    parts: tuple[tuple[str, ...], ...],
    alignment: float,
) -> StageCuts:
    sections, segments, encoders, anchors = {}, {}, {}, {}
    inputs: dict[str, TensorSpec] = {}
    for name, encoder in model.encoders.items():
        start, depth = plan.starts[name], plan.depths[name]
        raw = encoder.modality(name).inputs
        fed = raw if start is None else raw | {name: encoder.source.features}
        sections[name] = encoder.section(start or 0, depth, stem=start is None)
        inputs |= fed
        if after is not None and after.starts[name] not in (None, start):
            segments[name] = SegmentCut(sections[name], fed)
        if alignment:
            anchors[name] = EncoderCut(name, sections[name], model.head, fed)
        encoders[name] = EncoderCut(name, encoder.section(0, depth, stem=True), model.head, raw)
    if LABEL in model.inputs:
        inputs[LABEL] = model.inputs[LABEL]
    head = model.head
    inputs |= {anchor_of(name): TensorSpec((head.embedding,), "float32") for name in anchors}
    train = TrainCut(sections, head, inputs, alignment)
    partials = {part: _partial(train, part) for part in parts}
    classifier = ClassifierCut(head) if isinstance(head, ClassificationHead) else None
    return StageCuts(plan, train, partials, segments, encoders, classifier, anchors)


def _partial(train: TrainCut, modalities: tuple[str, ...]) -> TrainCut:
    sections = {name: train.sections[name] for name in modalities}
    absent = train.sections.keys() - sections.keys()
    inputs = {name: spec for name, spec in train.inputs.items() if name.partition("_")[0] not in absent}
    return TrainCut(sections, train.head.part(modalities), inputs, train.alignment)


def example(
    inputs: Mapping[str, TensorSpec], batch_size: int, limits: Mapping[str, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Random inputs [B, ...]: normal floats, masks of 1 to T ones, integers below `limits[name]`.

    Each example's floats have a mean of its own: examples that pool to the same embedding would leave a
    contrastive loss with gradients of rounding noise.
    """
    batch = {}
    for name, spec in inputs.items():
        shape = (batch_size, *spec.shape)
        if spec.dtype == "int64":
            batch[name] = torch.randint(0, limits[name], shape, generator=generator)
        elif name.endswith("_mask"):
            lengths = torch.randint(1, spec.shape[0] + 1, (batch_size, 1), generator=generator)
            batch[name] = (torch.arange(spec.shape[0]) < lengths).float()
        else:
            offset = torch.randn(
                (batch_size, *[1] * (len(spec.shape) - 1), *spec.shape[-1:]), generator=generator
            )
            batch[name] = torch.randn(shape, generator=generator) + offset
    return batch
