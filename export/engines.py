"""The files of each engine for a stage's train step: one table, in the order of preference.

Rules: an engine is one function here: from the cut to role -> (name's ending, content), of the roles in
`wire.manifest.ROLES`. Stages of equal structure have equal files, which are made once.

Next: `export/onnx_step.py`, `export/ort_training.py`, `export/executorch.py`; `export/passes.py`, of which
a step in micro-batches is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx
from torch import fx

from export.graph import content, trace, weights_as_inputs
from export.passes import Passes, passes
from export.stage import Cut, TrainCut
from export.step import loss_and_gradients
from wire.errors import UserError
from wire.manifest import AdamW
from wire.packages import installed

Files = dict[str, tuple[str, bytes]]


@dataclass(frozen=True)
class Settings:
    """What is baked into the files, besides the model."""

    optimizer: AdamW
    max_batch_size: int


@dataclass(frozen=True)
class Step:
    """What to make the files of.

    cut: the whole step; with micro-batches, the pass that gives gradients.
    loss: the cut as ONNX, with its parameters as initializers.
    structure: the same with parameters as inputs, so it is equal for cuts that differ in their values only.
    passes: of a step in micro-batches.
    """

    cut: TrainCut
    loss: bytes
    structure: bytes
    settings: Settings
    passes: Passes | None = None

    @property
    def parameters(self) -> list[str]:
        """The cut's own names."""
        return [name for name, _ in self.cut.named_parameters()]

    def traced(self) -> fx.GraphModule:
        """The cut's loss and gradients."""
        return loss_and_gradients(self.cut, self.structure)


def _onnx(step: Step) -> Files:
    from export.onnx_step import train_step

    if step.passes is None:
        train = train_step(step.cut, step.traced(), step.settings.optimizer)
        return {"train": ("onnx", content(train)), "eval": ("onnx", step.structure)}
    from export import onnx_passes

    cut = step.passes.gradients
    gradients = onnx_passes.gradients(cut, step.traced())
    update = onnx_passes.update(cut, step.settings.optimizer)
    files = {"gradients": ("onnx", content(gradients)), "update": ("onnx", content(update))}
    return files | (_onnx_pairs(step.passes) or {"eval": ("onnx", step.structure)})


def _onnx_pairs(passes: Passes) -> Files:
    """The files that a contrastive loss needs besides, on every ONNX Runtime."""
    from export import onnx_passes

    if passes.embed is None or passes.pairs is None:
        return {}
    graph = loss_and_gradients(passes.pairs, structure_of(passes.pairs), of_inputs=True)
    pairs = onnx_passes.pairs(passes.pairs, passes.gradients.given, graph)
    return {"embed": ("onnx", structure_of(passes.embed)), "pairs": ("onnx", content(pairs))}


def _ort_training(step: Step) -> Files:
    from export.ort_training import training_files

    loss = onnx.load_from_string(step.loss)
    made = training_files(loss, step.parameters, step.settings.optimizer)
    files = {role: ("ckpt" if role == "checkpoint" else "onnx", data) for role, data in made.items()}
    if step.passes is None:
        return files
    files["gradients"] = files.pop("train")
    if pairs := _onnx_pairs(step.passes):
        del files["eval"]
    return files | pairs


def _executorch(step: Step) -> Files:
    from export.executorch import passes_program, train_program

    settings = step.settings
    if step.passes is None:
        program = train_program(step.cut, step.traced(), settings.optimizer, settings.max_batch_size)
        return {"program": ("pte", program)}
    pairs = step.passes.pairs
    graph = pairs and loss_and_gradients(pairs, structure_of(pairs), of_inputs=True)
    program = passes_program(step.passes, step.traced(), graph, settings.optimizer, settings.max_batch_size)
    return {"program": ("pte", program)}


def structure_of(cut: Cut) -> bytes:
    """The cut as ONNX, its parameters among the inputs."""
    model = trace(cut)
    weights_as_inputs(model, [name for name, _ in cut.named_parameters()])
    return content(model)


EXECUTORCH = "executorch"
EXPORTERS: dict[str, Callable[[Step], Files]] = {
    "onnx": _onnx,
    EXECUTORCH: _executorch,
    "ort-training": _ort_training,
}
_NEEDS = {
    EXECUTORCH: ("executorch",),
    "ort-training": ("onnxruntime-training-cpu", "onnxruntime-training"),
}
"""Engine -> distributions any of which makes its files."""


def exportable() -> tuple[str, ...]:
    """The engines whose files can be made here."""
    return tuple(name for name in EXPORTERS if name not in _NEEDS or any(map(installed, _NEEDS[name])))


def check_engines(names: Sequence[str]) -> tuple[str, ...]:
    """The engines to export for. Raises `UserError` for one that is unknown or cannot be made here."""
    possible = exportable()
    for name in names:
        if name not in EXPORTERS:
            raise UserError(f"there is no engine {name!r}", f"choose of {', '.join(EXPORTERS)}")
        if name not in possible:
            raise UserError(
                f"files for {name} need {_NEEDS[name][0]}",
                f"pip install 'lamina[export]', or export for {' and '.join(possible)} only",
            )
    return tuple(name for name in EXPORTERS if name in names)


@dataclass
class EngineFiles:
    """Makes the files of every engine in `engines`; cuts of equal structure share them."""

    engines: tuple[str, ...]
    settings: Settings
    _steps: dict[tuple[bytes, int], dict[str, Files]] = field(default_factory=dict)
    _programs: dict[bytes, bytes] = field(default_factory=dict)

    def of_step(self, cut: TrainCut, micro_batch_size: int = 0) -> dict[str, Files]:
        """Engine -> its files."""
        made = passes(cut, micro_batch_size) if micro_batch_size else None
        cut = made.gradients if made else cut
        model = trace(cut)
        loss = content(model)
        weights_as_inputs(model, [name for name, _ in cut.named_parameters()])
        structure = content(model)
        key = (structure, micro_batch_size)
        if key not in self._steps:
            step = Step(cut, loss, structure, self.settings, made)
            self._steps[key] = {name: EXPORTERS[name](step) for name in self.engines}
        return self._steps[key]

    def program(self, cut: Cut, graph: bytes) -> bytes | None:
        """The ExecuTorch program of an inference graph, where that engine is among those asked for.

        graph: the same as ONNX, which tells its structure.
        """
        if EXECUTORCH not in self.engines:
            return None
        if graph not in self._programs:
            from export.executorch import inference_program

            self._programs[graph] = inference_program(cut, self.settings.max_batch_size)
        return self._programs[graph]
