"""Every bundle is checked against torch as it is written: what is checked is what the device runs.

Rules: for each stage and engine, `STEPS` AdamW steps on the same random batches, the last one smaller, and
the others larger than a micro-batch, where a stage has those; then each inference graph. They start near
the initial values and not at them: a block that starts as the identity would hide what its branches
compute. Losses and outputs are compared by relative L2.
A parameter is compared as a whole, by the L2 norm of the difference over the norm of the tensor, or over
one Adam step of every element (learning rate times sqrt(n)) where that is larger: what has barely left
zero is known no better, for Adam turns rounding noise into steps of full size.

Next: `export/bundle.py`, the caller; `edge_client/engines/__init__.py`, what it runs on.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.stage import Cut, StageCuts, TrainCut, example
from models.model import Model
from wire.errors import LaminaError
from wire.manifest import LABEL, AdamW, Graph, Manifest, Stage
from wire.parts import with_modalities
from wire.tensors import Array, Arrays

STEPS = 5
BATCH_SIZES = (6, 6, 6, 6, 3)
LEARNING_RATE = 1e-3
MAX_ERROR = 1e-3
NOISE = 0.05
ONNX = "onnx"

AnyArray = npt.NDArray[Any]


class ParityError(LaminaError):
    """A bundle that does not compute what torch does."""

    exit_code = 70


class Engine(Protocol):
    """What the check needs of an engine; `edge_client.engines.Engine` is one."""

    def load(self, parameters: Mapping[str, Array]) -> None: ...  # noqa: D102
    def train_step(self, batch: Mapping[str, AnyArray], learning_rate: float) -> float: ...  # noqa: D102
    def parameters(self) -> Arrays: ...  # noqa: D102
    def evaluate(self, batch: Mapping[str, AnyArray]) -> dict[str, float]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Engines(Protocol):
    """The package `edge_client.engines`, which export does not import."""

    def available(self, names: Iterable[str] = ...) -> list[str]: ...  # noqa: D102
    def open_engine(  # noqa: D102
        self, name: str, file: Callable[[str], Path], manifest: Manifest, stage: int, threads: int = 1
    ) -> Engine: ...
    def graph_file(self, engine: str, graph: Graph) -> str: ...  # noqa: D102
    def open_graph(  # noqa: D102
        self, engine: str, file: Callable[[str], Path], graph: Graph, threads: int = 1
    ) -> Callable[[Mapping[str, AnyArray], Mapping[str, Array]], dict[str, Array]]: ...


@dataclass(frozen=True)
class Parity:
    """The largest relative errors found, and the tensor of the largest one of parameters."""

    engines: tuple[str, ...]
    unchecked: tuple[str, ...]
    num_graphs: int
    loss_error: float
    parameter_error: float
    parameter: str
    output_error: float
    seconds: float

    def __str__(self) -> str:
        missing = f"; NOT CHECKED, for it does not run here: {', '.join(self.unchecked)}"
        return (
            f"follows torch on {', '.join(self.engines) or 'no engine'}: losses of {STEPS} steps a stage "
            f"within {self.loss_error:.1e}, parameters {self.parameter_error:.1e}; "
            f"{self.num_graphs} graphs within {self.output_error:.1e} ({self.seconds:.0f} s)"
            f"{missing if self.unchecked else ''}"
        )


@dataclass
class _Worst:
    """The largest error so far of each kind, with the place where it was. Raises at one over the limit."""

    errors: dict[str, tuple[float, str]]

    def add(self, kind: str, where: str, error: float) -> None:
        if not error <= MAX_ERROR:  # also true for NaN
            raise ParityError(
                f"{where} differs from torch by {error:.1e}, at most {MAX_ERROR:.0e} is allowed"
            )
        self.errors[kind] = max(self.errors.get(kind, (0.0, "")), (error, where))

    def of(self, kind: str) -> tuple[float, str]:
        return self.errors.get(kind, (0.0, ""))


def check(
    folder: Path,
    manifest: Manifest,
    model: Model,
    cuts: Sequence[StageCuts],
    engines: Engines,
    *,
    seed: int,
) -> Parity:
    """Run everything in the bundle against the torch cuts it was made from.

    Raises `ParityError`, naming the first graph or tensor that is off by more than `MAX_ERROR`.
    """
    with _shaken(model, seed) as values:
        return _check(folder, manifest, model, cuts, engines, values, seed)


@contextmanager
def _shaken(model: Model, seed: int) -> Iterator[Arrays]:
    """Within the block every parameter is off its value by a little noise: torch name -> what it is."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=NOISE)
    try:
        yield {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])


def _check(
    folder: Path,
    manifest: Manifest,
    model: Model,
    cuts: Sequence[StageCuts],
    engines: Engines,
    values: Arrays,
    seed: int,
) -> Parity:
    begin = time.monotonic()
    worst = _Worst({})
    limits = input_limits(model)
    usable = engines.available(manifest.stages[0].engines)
    encoders = bool(engines.available([ONNX]))
    num_graphs = 0
    for number, (stage, cut) in enumerate(zip(manifest.stages, cuts, strict=True)):
        generator = torch.Generator().manual_seed(seed + number)
        sizes = [min(size, manifest.max_batch_size) for size in _batch_sizes(stage.micro_batch_size)]
        for part, step in {tuple(manifest.modalities): cut.train, **cut.partials}.items():
            seen = with_modalities(manifest, part)
            batches = [example(step.inputs, size, limits, generator) for size in sizes]
            losses, after = reference(step, model, batches, manifest.optimizer, LEARNING_RATE)
            of = f" of {', '.join(part)}" if part in cut.partials else ""
            for name in usable:
                engine = engines.open_engine(name, folder.joinpath, seen, number)
                where = f"stage {number + 1}{of} on {name}"
                _check_engine(where, engine, values, batches, losses, after, worst)
                engine.close()
        for name, one, graph in _graphs(cut, stage, usable, encoders=encoders):
            inputs = example(one.inputs, sizes[-1], limits, generator)
            run = engines.open_graph(name, folder.joinpath, graph)
            got = run(to_numpy(inputs), values)[graph.outputs[0]]
            with torch.no_grad():
                expected = one(*inputs.values()).numpy()
            file = engines.graph_file(name, graph)
            worst.add("output", f"stage {number + 1}, {file}", relative_l2(got, expected))
            num_graphs += 1
    parameter_error, parameter = worst.of("parameter")
    return Parity(
        engines=tuple(usable),
        unchecked=tuple(name for name in manifest.stages[0].engines if name not in usable),
        num_graphs=num_graphs,
        loss_error=worst.of("loss")[0],
        parameter_error=parameter_error,
        parameter=parameter,
        output_error=worst.of("output")[0],
        seconds=time.monotonic() - begin,
    )


def _batch_sizes(micro_batch_size: int) -> list[int]:
    """`BATCH_SIZES`, but of one and a half micro-batches where that is more."""
    large = max(*BATCH_SIZES, micro_batch_size + (micro_batch_size + 1) // 2)
    return [large if size == max(BATCH_SIZES) else size for size in BATCH_SIZES]


def _graphs(
    cuts: StageCuts, stage: Stage, usable: Sequence[str], *, encoders: bool
) -> Iterator[tuple[str, Cut, Graph]]:
    """Each inference graph with an engine that runs it: segments on all, the others on an ONNX Runtime.

    encoders: whether there is one.
    """
    for name, graph in stage.segments.items():
        yield from ((engine, cuts.segments[name], graph) for engine in usable)
    for name, graph in stage.anchors.items():
        yield from ((engine, cuts.anchors[name], graph) for engine in usable)
    if encoders:
        yield from ((ONNX, cuts.encoders[name], graph) for name, graph in stage.encoders.items())
        if cuts.classifier is not None and stage.classifier is not None:
            yield ONNX, cuts.classifier, stage.classifier


def reference(
    cut: TrainCut,
    model: Model,
    batches: Sequence[Mapping[str, Tensor]],
    settings: AdamW,
    learning_rate: float,
) -> tuple[list[float], Arrays]:
    """What torch does, on a copy: the loss before each step, and the parameters after the last."""
    names = cut.torch_names(model)
    cut = copy.deepcopy(cut)
    optimizer = torch.optim.AdamW(
        cut.parameters(),
        lr=learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = cut(*batch.values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {names[name]: value.detach().numpy() for name, value in cut.named_parameters()}


def input_limits(model: Model) -> dict[str, int]:
    """Integer input -> the number of values it may take."""
    limits = {LABEL: getattr(model.head, "classes", 0)}
    for name, modality in model.modalities.items():
        vocabulary = modality.options.get("vocabulary")
        if isinstance(vocabulary, int):
            limits[name] = vocabulary
    return limits


def parameter_error(got: AnyArray, expected: AnyArray, learning_rate: float) -> float:
    """Relative L2 of one tensor, no finer than one Adam step of every element."""
    return relative_l2(got, expected, floor=learning_rate * math.sqrt(expected.size))


def relative_l2(got: AnyArray, expected: AnyArray, floor: float = 1e-12) -> float:
    """The difference's L2 norm over the expected one's, or over `floor` if that is larger."""
    difference = np.linalg.norm(got.astype(np.float64) - expected)
    return float(difference / max(float(np.linalg.norm(expected.astype(np.float64))), floor))


def to_numpy(batch: Mapping[str, Tensor]) -> dict[str, AnyArray]:
    """Tensors as arrays."""
    return {name: value.numpy() for name, value in batch.items()}


def _check_engine(
    where: str,
    engine: Engine,
    values: Arrays,
    batches: Sequence[Mapping[str, Tensor]],
    losses: Sequence[float],
    after: Arrays,
    worst: _Worst,
) -> None:
    engine.load(values)
    first = engine.evaluate(to_numpy(batches[0]))["loss"]
    worst.add("loss", f"{where}, evaluation", _loss_error(first, losses[0]))
    for step, (batch, expected) in enumerate(zip(batches, losses, strict=True)):
        loss = engine.train_step(to_numpy(batch), LEARNING_RATE)
        worst.add("loss", f"{where}, loss of step {step + 1}", _loss_error(loss, expected))
    trained = engine.parameters()
    for name, expected_value in after.items():
        error = parameter_error(trained[name], expected_value, LEARNING_RATE)
        worst.add("parameter", f"{where}, {name}", error)


def _loss_error(got: float, expected: float) -> float:
    return abs(got - expected) / max(abs(expected), 1e-2)
