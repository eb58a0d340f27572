"""The engine on ExecuTorch's C++ runtime: the whole train step is one method of a program.

Rules: parameters and AdamW's moments lie in numpy arrays that a step writes over: the program updates a
parameter only after the last operation that reads it. `load` starts anew. A program takes batches up to
the size that it was exported for.

Next: `edge_client/engines/executorch_runtime.py`; `export/executorch.py`, which makes the programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_client.engines import executorch_runtime
from edge_client.engines.executorch_runtime import Program, Spec
from wire.errors import LocalError, UserError
from wire.manifest import Graph, Manifest
from wire.tensors import Array, Arrays

_NAME = "executorch"
_TRAIN, _EVALUATE = "train", "evaluate"


class ExecuTorch:
    """See `edge_client.engines.Engine`; made by `open_engine`."""

    open_graph = staticmethod(executorch_runtime.open_graph)

    def __init__(self, file: Any, manifest: Manifest, stage: int, threads: int) -> None:
        entry = manifest.stages[stage]
        self._path: Path = file(entry.engines[_NAME]["program"])
        self._names = list(entry.parameters.values())
        self._shapes = [manifest.parameters[name].shape for name in self._names]
        self._inputs = entry.inputs
        self._max_batch_size = manifest.max_batch_size
        self._threads = threads
        self._program: Program | None = None
        self._state: list[list[Array]] = []  # parameters, exp_avg, exp_avg_sq
        self._loss = np.zeros((), np.float32)
        self._step = np.zeros((), np.float32)
        self._learning_rate = np.zeros((), np.float32)

    @staticmethod
    def check() -> None:
        """Raises `UserError` where this engine cannot run. Builds the library if it is not there yet."""
        executorch_runtime.library()

    @staticmethod
    def graph_file(graph: Graph) -> str:
        """The name of the file that `open_graph` reads. Raises `UserError` where the bundle has none."""
        if graph.program is None:
            raise UserError(
                "the bundle has no graphs for the engine executorch", "export it for this engine"
            )
        return graph.program

    def load(self, parameters: Mapping[str, Array]) -> None:
        """As in `Engine`."""
        self.close()
        program = Program(self._path, self._threads)
        state = [Spec(np.dtype(np.float32), shape) for shape in self._shapes]
        scalar = Spec(np.dtype(np.float32), ())
        batch = [
            Spec(np.dtype(spec.dtype), (self._max_batch_size, *spec.shape))
            for spec in self._inputs.values()
        ]
        if (
            program.takes(_TRAIN) != [*state * 3, scalar, scalar, *batch]
            or program.gives(_TRAIN) != [scalar, *state * 3]
            or program.takes(_EVALUATE) != [*state, *batch]
            or program.gives(_EVALUATE) != [scalar]
        ):
            raise UserError(f"{self._path} is not the program of this stage", "export the bundle once more")
        values = [np.array(parameters[name], np.float32, order="C") for name in self._names]
        if [value.shape for value in values] != self._shapes:
            raise LocalError("an engine was loaded with parameters of other shapes")
        self._state = [
            values,
            [np.zeros_like(one) for one in values],
            [np.zeros_like(one) for one in values],
        ]
        self._batch_specs = dict(zip(self._inputs, batch, strict=True))
        self._step[...] = 0
        self._program = program

    def train_step(self, batch: Mapping[str, npt.NDArray[Any]], learning_rate: float) -> float:
        """As in `Engine`."""
        program, fed = self._loaded(), self._feeds(batch)
        self._step += 1
        self._learning_rate[...] = learning_rate
        state = [value for values in self._state for value in values]
        program.run(_TRAIN, [*state, self._step, self._learning_rate, *fed], [self._loss, *state])
        return float(self._loss)

    def evaluate(self, batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, float]:
        """As in `Engine`."""
        self._loaded().run(_EVALUATE, [*self._state[0], *self._feeds(batch)], [self._loss])
        return {"loss": float(self._loss)}

    def parameters(self) -> Arrays:
        """As in `Engine`."""
        self._loaded()
        return {name: value.copy() for name, value in zip(self._names, self._state[0], strict=True)}

    def close(self) -> None:
        """As in `Engine`."""
        if self._program is not None:
            self._program.close()
        self._program, self._state = None, []

    def __enter__(self) -> ExecuTorch:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _loaded(self) -> Program:
        if self._program is None:
            raise LocalError("an engine was used before it was loaded")
        return self._program

    def _feeds(self, batch: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        fed = [
            executorch_runtime.as_fed(name, batch[name], spec) for name, spec in self._batch_specs.items()
        ]
        if len({len(one) for one in fed}) > 1:
            raise LocalError("the inputs of a batch are of different sizes")
        return fed
