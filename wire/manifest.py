"""The bundle's table of contents: what export writes, both programs read and nobody guesses.

A bundle is a folder of files and `manifest.json`. The manifest names every parameter once, in one
order, and says for each stage which parameter groups train, which are frozen, and which graph files
run them. Graphs never hold weights: every parameter is a graph input (or, for the `ort-training`
engine, a checkpoint entry) under a name of the graph's own, and a `Graph` or `Stage` maps that name to
the parameter's torch name. ExecuTorch knows its inputs by their order: that of these maps. So two blocks
of one shape share one graph file, and a device fetches it once.

A modality's first input (`image`, `text`) is raw data at stage 0 and the frozen prefix's features from
then on; its other inputs, such as `text_mask`, pass through every stage unchanged.

Next: `wire/messages.py`, which carries `BlobRef`s of these files to the clients.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from wire.errors import UNDECODABLE, Malformed, PeerError, TooLarge, UserError

FORMAT = 5
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Shape = tuple[Annotated[int, msgspec.Meta(ge=0, le=2**31)], ...]
WHOLE = "whole"
ROLES: dict[str, dict[str, frozenset[str]]] = {
    "onnx": {
        WHOLE: frozenset({"train", "eval"}),
        "contrastive": frozenset({"embed", "pairs", "gradients", "update"}),
        "classification": frozenset({"gradients", "update", "eval"}),
    },
    "executorch": dict.fromkeys((WHOLE, "contrastive", "classification"), frozenset({"program"})),
    "ort-training": {
        WHOLE: frozenset({"train", "eval", "optimizer", "checkpoint"}),
        "contrastive": frozenset({"embed", "pairs", "gradients", "optimizer", "checkpoint"}),
        "classification": frozenset({"gradients", "eval", "optimizer", "checkpoint"}),
    },
}
"""Engine -> the roles of its files in a stage: of one that steps on whole batches, or of one that steps in
micro-batches, by task. `embed` gives the embeddings of a micro-batch, `pairs` the loss of all embeddings
and its gradients, `gradients` adds those of a micro-batch to their sums, `update` or `optimizer` is AdamW.
"""
_MAX_VALUES = 2**33  # of one parameter; no device holds as many
_FILE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_MODALITY = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")

Task = Literal["contrastive", "classification"]
Dtype = Literal["float32", "int64"]


class BlobRef(msgspec.Struct, frozen=True):
    """Content by its hash. `sha256`: 64 lowercase hex digits; `size_bytes`: its exact length."""

    sha256: str
    size_bytes: Count

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError("sha256 is not 64 lowercase hex digits")

    @classmethod
    def of(cls, content: bytes) -> BlobRef:
        """The reference of bytes in memory."""
        return cls(hashlib.sha256(content).hexdigest(), len(content))

    @classmethod
    def of_file(cls, path: Path) -> BlobRef:
        """The reference of a file, read in pieces of 1 MiB."""
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
                size += len(piece)
        return cls(digest.hexdigest(), size)


class TensorSpec(msgspec.Struct, frozen=True):
    """One example's tensor: `shape` leaves out the batch dimension."""

    shape: Shape
    dtype: Dtype


class Modality(msgspec.Struct, frozen=True):
    """One kind of input and how a device makes its arrays.

    kind: the reader in `inputs/` that turns a table cell into arrays (`image`, `text`).
    inputs: raw arrays by name, the one that the prefix replaces first.
    options: the reader's settings, such as `size` in pixels or `tokenizer`, a file of the bundle.
    """

    kind: str
    inputs: dict[str, TensorSpec]
    options: dict[str, int | float | str | list[float]] = {}


class Parameter(msgspec.Struct, frozen=True):
    """A float32 parameter of the model. `group`: the parameter group it belongs to."""

    group: str
    shape: Shape

    def __post_init__(self) -> None:
        if math.prod(self.shape) > _MAX_VALUES:
            raise ValueError(f"a parameter of shape {self.shape} is too large")


class Graph(msgspec.Struct, frozen=True):
    """An inference graph whose weights are inputs.

    file: name of the ONNX file in the bundle.
    inputs: data inputs, each `[B, *shape]`.
    outputs: output names in the graph's order.
    parameters: graph input name -> torch name.
    program: name of the ExecuTorch file of the same graph, where the bundle has one; it takes the
        inputs, then the parameters, in these orders.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: dict[str, str]
    program: str | None = None


class PartialStep(msgspec.Struct, frozen=True):
    """A stage's train step for a client that has only these `modalities`; other fields as of `Stage`."""

    modalities: tuple[str, ...]
    trainable: tuple[str, ...]
    inputs: dict[str, TensorSpec]
    parameters: dict[str, str]
    engines: dict[str, dict[str, str]]


LABEL = "label"
"""The input of a class's number, int64 [B]."""


def anchor_of(modality: str) -> str:
    """The name of the input that a modality's embedding is kept close to."""
    return f"{modality}_anchor"


class Stage(msgspec.Struct, frozen=True):
    """One entry of the schedule.

    trainable, frozen: parameter groups. Groups of blocks not yet attached are in neither.
    warm_start: group -> group whose values it takes when the stage begins (same shapes).
    inputs: everything the train step is fed, without the batch dimension.
    parameters: the train step's parameter name -> torch name, in the train step's own order.
    engines: engine -> role, of `ROLES`, -> file name.
    segments: modality -> the graph that turns this stage's inputs of that modality into the next
        stage's, once the groups trained here are frozen. A modality whose blocks are all trained by an
        earlier stage has none.
    encoders: modality -> the model cut at this stage, raw inputs -> embeddings float32 [B, E].
    classifier: for classification, embeddings of all modalities -> `logits` float32 [B, C].
    micro_batch_size: the most examples that a train step runs the network on at a time; the step is that
        of the whole batch all the same. 0: all of the batch.
    expected_peak_bytes: what a client's process is expected to need with the engine that needs most; 0:
        unknown.
    partials: for clients that lack a modality; empty: a client has to have them all.
    anchors: modality -> the graph that turns the stage's inputs of that modality into what the input
        `anchor_of(modality)` is to be, an embedding float32 [B, E]; empty: there are no such inputs.
    """

    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    rounds: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    warm_start: dict[str, str]
    inputs: dict[str, TensorSpec]
    parameters: dict[str, str]
    engines: dict[str, dict[str, str]]
    segments: dict[str, Graph]
    encoders: dict[str, Graph]
    classifier: Graph | None = None
    micro_batch_size: Annotated[int, msgspec.Meta(ge=0, le=2**16)] = 0
    expected_peak_bytes: Count = 0
    partials: tuple[PartialStep, ...] = ()
    anchors: dict[str, Graph] = {}

    @property
    def example_inputs(self) -> dict[str, TensorSpec]:
        """Those of `inputs` that come from examples: all but the anchors, which the device makes."""
        made = set(map(anchor_of, self.anchors))
        return {name: spec for name, spec in self.inputs.items() if name not in made}

    @property
    def steps(self) -> tuple[Stage | PartialStep, ...]:
        """The train step, and those of parts of it."""
        return (self, *self.partials)

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """All inference graphs of the stage."""
        classifier = (self.classifier,) if self.classifier is not None else ()
        return (*self.on_device, *self.encoders.values(), *classifier)

    @property
    def on_device(self) -> tuple[Graph, ...]:
        """Those that clients run."""
        return (*self.segments.values(), *self.anchors.values())


class AdamW(msgspec.Struct, frozen=True):
    """Optimizer settings baked into the graphs; torch's defaults. Each offer brings its learning rate."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01


class Manifest(msgspec.Struct, frozen=True):
    """The whole bundle.

    builder: `package.module:builder` that makes the torch module, with `builder_options` as keywords.
    classes: label names of a classification model, in the order of its logits.
    max_batch_size: the most examples that a train step takes at once; ExecuTorch plans its memory for so
        many, the other engines take more.
    parameters: torch name -> parameter, in the one order used everywhere.
    initial: file with every parameter's initial value (safetensors, torch names).
    files: file name -> content; names are relative, with forward slashes.
    segment_batch_size: the most examples that a segment takes at once, few enough that the frozen prefix
        needs less memory than a train step.
    """

    format: int
    builder: str
    builder_options: dict[str, Any]
    task: Task
    schedule: str
    modalities: dict[str, Modality]
    classes: tuple[str, ...]
    optimizer: AdamW
    max_batch_size: Annotated[int, msgspec.Meta(ge=1, le=2**16)]
    parameters: dict[str, Parameter]
    stages: tuple[Stage, ...]
    initial: str
    files: dict[str, BlobRef]
    segment_batch_size: Annotated[int, msgspec.Meta(ge=1, le=2**16)] = 8

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a manifest needs at least one stage")
        for name in self.files:
            if name == MANIFEST_NAME or not all(map(_FILE_PART.fullmatch, name.split("/"))):
                raise ValueError(f"{name!r} cannot name a file of a bundle")
        for name in self.modalities:
            if not _MODALITY.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a modality")
        if missing := sorted(set(self._named_files()) - self.files.keys()):
            raise ValueError(f"{missing[0]!r} is named and not listed among the files")
        if missing := sorted(set(self._named_parameters()) - self.parameters.keys()):
            raise ValueError(f"{missing[0]!r} is named and not listed among the parameters")
        for stage in self.stages:
            named = [*stage.trainable, *stage.frozen]
            if len(set(named)) != len(named):
                raise ValueError("a stage names a group twice")
            if stage.micro_batch_size > self.max_batch_size:
                raise ValueError("a micro-batch is larger than the largest batch")
            steps = self.task if stage.micro_batch_size else WHOLE
            for step in stage.steps:
                for engine, files in step.engines.items():
                    if engine in ROLES and files.keys() != ROLES[engine][steps]:
                        raise ValueError(f"a stage has not the files of an engine {engine!r}")
                if step.engines.keys() != self.stages[0].engines.keys():
                    raise ValueError("a stage has files for other engines than the first")
            for partial in stage.partials:
                if not set(partial.modalities) < self.modalities.keys():
                    raise ValueError(f"{partial.modalities} are not some of the modalities")
                if not set(partial.trainable) <= set(stage.trainable):
                    raise ValueError("a part of a stage trains what the stage does not")
            for step in stage.steps:
                self._check_inputs(stage, step)
            if "executorch" in stage.engines and not all(one.program for one in stage.on_device):
                raise ValueError("a graph has no program for the engine executorch")
            for group, source in stage.warm_start.items():
                if list(self.shapes_of((group,)).values()) != list(self.shapes_of((source,)).values()):
                    raise ValueError(f"{group!r} cannot start from {source!r}, which has other shapes")

    def _check_inputs(self, stage: Stage, step: Stage | PartialStep) -> None:
        names = step.modalities if isinstance(step, PartialStep) else tuple(self.modalities)
        data = {one for name in names for one in self.modalities[name].inputs}
        anchors = {anchor_of(name): graph for name, graph in stage.anchors.items() if name in names}
        if unknown := sorted(step.inputs.keys() - data - anchors.keys() - {LABEL}):
            raise ValueError(f"a stage has an input {unknown[0]!r}, which is no modality's")
        if missing := sorted(anchors.keys() - step.inputs.keys()):
            raise ValueError(f"a stage has no input {missing[0]!r}")
        for name, graph in anchors.items():
            trained = set(graph.parameters.values()) <= set(step.parameters.values())
            if not (trained and data.issuperset(graph.inputs) and len(graph.outputs) == 1):
                raise ValueError(f"{name!r} is not made of what its stage trains on")

    @property
    def aligned(self) -> bool:
        """Whether clients keep their embeddings to anchors."""
        return bool(self.stages[0].anchors)

    def _named_files(self) -> Iterator[str]:
        yield self.initial
        for modality in self.modalities.values():
            tokenizer = modality.options.get("tokenizer")
            if isinstance(tokenizer, str):
                yield tokenizer
        for stage in self.stages:
            for step in stage.steps:
                for roles in step.engines.values():
                    yield from roles.values()
            for graph in stage.graphs:
                yield graph.file
                if graph.program is not None:
                    yield graph.program

    def _named_parameters(self) -> Iterator[str]:
        for stage in self.stages:
            for step in stage.steps:
                yield from step.parameters.values()
            for graph in stage.graphs:
                yield from graph.parameters.values()

    def groups_frozen_after(self, stage: int) -> tuple[str, ...]:
        """Groups that train in `stage` (counted from 0) and are frozen in the next."""
        if stage + 1 >= len(self.stages):
            return ()
        return tuple(
            group for group in self.stages[stage].trainable if group in self.stages[stage + 1].frozen
        )

    def names_of(self, groups: tuple[str, ...]) -> list[str]:
        """Torch names of the parameters of these groups, in manifest order."""
        wanted = set(groups)
        return [name for name, parameter in self.parameters.items() if parameter.group in wanted]

    def shapes_of(self, groups: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        """Torch name -> shape of the parameters of these groups, in manifest order."""
        return {name: self.parameters[name].shape for name in self.names_of(groups)}


class _Format(msgspec.Struct, frozen=True):
    format: int


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical JSON (sorted keys would lose the order that `parameters` carries; they stay as given)."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)


def decode_manifest(content: bytes) -> Manifest:
    """Raises `TooLarge` over 4 MiB, `Malformed` for anything that is not a manifest of this format."""
    if len(content) > MAX_MANIFEST_BYTES:
        raise TooLarge(f"manifest of {len(content)} bytes, the limit is {MAX_MANIFEST_BYTES}")
    try:
        found = msgspec.json.decode(content, type=_Format).format
        if found != FORMAT:
            raise Malformed(f"manifest format {found}, this Lamina reads {FORMAT}")
        return msgspec.json.decode(content, type=Manifest)
    except UNDECODABLE as error:
        raise Malformed(f"not a manifest: {error}") from error


def read_manifest(bundle: Path) -> tuple[Manifest, bytes]:
    """A bundle's manifest and its bytes. Raises `UserError` where there is none that can be read."""
    try:
        content = (bundle / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise UserError(
            f"{bundle} holds no bundle: {error.strerror}", "make one with `lamina export`"
        ) from error
    try:
        return decode_manifest(content), content
    except PeerError as error:
        raise UserError(f"{bundle / MANIFEST_NAME}: {error}", "export the bundle once more") from error


def check_files(bundle: Path, manifest: Manifest) -> None:
    """Return if the bundle's files are those of its manifest. Raises `UserError` for one that is not."""
    for name, ref in manifest.files.items():
        path = bundle / name
        if not path.is_file() or BlobRef.of_file(path) != ref:
            raise UserError(
                f"{path} is not the file that the manifest names", "export the bundle once more, or copy it"
            )


def parameter_counts(manifest: Manifest) -> Mapping[str, int]:
    """Group -> number of scalar parameters."""
    counts: dict[str, int] = {}
    for parameter in manifest.parameters.values():
        counts[parameter.group] = counts.get(parameter.group, 0) + math.prod(parameter.shape)
    return counts
