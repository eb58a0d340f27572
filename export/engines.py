"""The files of each engine for a stage's train step: one table, in the order of preference.

Rules: an engine is one function here: from the cut to role -> (name's ending, content). Stages of equal
structure have equal files, which are made once.

Next: `export/onnx_step.py`, `export/ort_training.py`, `export/executorch.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx

from export.graph import content, trace, weights_as_inputs
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
    segment_batch_size: int


@dataclass(frozen=True)
class Step:
    """What to make the files of.

    loss: the cut as ONNX, with its parameters as initializers.
    structure: the same with parameters as inputs, so it is equal for cuts that differ in their values only.
    """

    cut: TrainCut
    loss: bytes
    structure: bytes
    settings: Settings

    @property
    def parameters(self) -> list[str]:
        """The cut's own names."""
        return [name for name, _ in self.cut.named_parameters()]


def _onnx(step: Step) -> Files:
    from export.onnx_step import train_step

    train = train_step(step.cut, loss_and_gradients(step.cut, step.structure), step.settings.optimizer)
    return {"train": ("onnx", content(train)), "eval": ("onnx", step.structure)}


def _ort_training(step: Step) -> Files:
    from export.ort_training import training_files

    loss = onnx.load_from_string(step.loss)
    files = training_files(loss, step.parameters, step.settings.optimizer)
    return {role: ("ckpt" if role == "checkpoint" else "onnx", data) for role, data in files.items()}


def _executorch(step: Step) -> Files:
    from export.executorch import train_program

    graph = loss_and_gradients(step.cut, step.structure)
    program = train_program(step.cut, graph, step.settings.optimizer, step.settings.max_batch_size)
    return {"program": ("pte", program)}


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
    _steps: dict[bytes, dict[str, Files]] = field(default_factory=dict)
    _programs: dict[bytes, bytes] = field(default_factory=dict)

    def of_step(self, cut: TrainCut) -> dict[str, Files]:
        """Engine -> its files."""
        model = trace(cut)
        loss = content(model)
        weights_as_inputs(model, [name for name, _ in cut.named_parameters()])
        structure = content(model)
        if structure not in self._steps:
            step = Step(cut, loss, structure, self.settings)
            self._steps[structure] = {name: EXPORTERS[name](step) for name in self.engines}
        return self._steps[structure]

    def program(self, cut: Cut, graph: bytes) -> bytes | None:
        """The ExecuTorch program of an inference graph, where that engine is among those asked for.

        graph: the same as ONNX, which tells its structure.
        """
        if EXECUTORCH not in self.engines:
            return None
        if graph not in self._programs:
            from export.executorch import inference_program

            self._programs[graph] = inference_program(cut, self.settings.segment_batch_size)
        return self._programs[graph]
