"""The engine on any ONNX Runtime: the whole train step is one graph of standard operators.

Rules: parameters and AdamW's moments lie in numpy arrays that the graph reads and writes in place, so a
step copies nothing. Moments are written over themselves: the only operator that reads one comes before the
one that writes it. A parameter is still read when its new value is written, so there are two of each, and
steps go from one to the other. `load` starts anew.

Next: `export/onnx_step.py`, which makes the files and says what their inputs are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_client.engines import onnx_runtime
from wire.errors import LocalError
from wire.manifest import Manifest
from wire.tensors import Array, Arrays

_NAME = "onnx"


class Onnx:
    """See `edge_client.engines.Engine`; made by `open_engine`."""

    graph_file = staticmethod(onnx_runtime.graph_file)
    open_graph = staticmethod(onnx_runtime.open_graph)

    def __init__(self, file: Any, manifest: Manifest, stage: int, threads: int) -> None:
        entry = manifest.stages[stage]
        self._files: dict[str, Path] = {role: file(name) for role, name in entry.engines[_NAME].items()}
        self._names = dict(entry.parameters)
        self._inputs = entry.inputs
        self._threads = threads
        self._session: Any = None
        self._values: list[Arrays] = []  # now, and after the next step: graph name -> float32
        self._moments: Arrays = {}
        self._bindings: list[Any] = []  # from the first to the second, and back; they borrow memory only
        self._loss = np.zeros((), np.float32)
        self._step = np.zeros((), np.float32)
        self._learning_rate = np.zeros((), np.float32)

    @staticmethod
    def check() -> None:
        """Raises `UserError` where this engine cannot run."""
        onnx_runtime.onnxruntime()

    def load(self, parameters: Mapping[str, Array]) -> None:
        """As in `Engine`."""
        self.close()
        self._session = onnx_runtime.open_session(self._files["train"], self._threads)
        first = {
            name: np.array(parameters[torch_name], np.float32, order="C")
            for name, torch_name in self._names.items()
        }
        second = {name: np.empty_like(value) for name, value in first.items()}
        self._values = [first, second]
        self._moments = {
            f"{name}.{moment}": np.zeros_like(value)
            for name, value in first.items()
            for moment in ("exp_sum", "exp_sum_sq")
        }
        self._bindings = [self._bound(first, second), self._bound(second, first)]
        self._step[...] = 0

    def train_step(self, batch: Mapping[str, npt.NDArray[Any]], learning_rate: float) -> float:
        """As in `Engine`."""
        self._loaded()
        binding = self._bindings[0]
        arrays = self._feeds(batch)
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        self._step += 1
        self._learning_rate[...] = learning_rate
        self._session.run_with_iobinding(binding)
        self._values.reverse()
        self._bindings.reverse()
        return float(self._loss)

    def evaluate(self, batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, float]:
        """As in `Engine`. The graph is opened for this call: while training, its memory is better used."""
        self._loaded()
        session = onnx_runtime.open_session(self._files["eval"], self._threads)
        (loss,) = session.run(["loss"], self._feeds(batch) | self._values[0])
        return {"loss": float(loss)}

    def parameters(self) -> Arrays:
        """As in `Engine`."""
        self._loaded()
        return {torch_name: self._values[0][name].copy() for name, torch_name in self._names.items()}

    def close(self) -> None:
        """As in `Engine`."""
        self._bindings = []
        self._session = None
        self._values, self._moments = [], {}

    def __enter__(self) -> Onnx:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _loaded(self) -> None:
        if self._session is None:
            raise LocalError("an engine was used before it was loaded")

    def _feeds(self, batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        return {name: np.ascontiguousarray(batch[name], spec.dtype) for name, spec in self._inputs.items()}

    def _bound(self, before: Arrays, after: Arrays) -> Any:
        """A step from one set of parameters to the other."""
        value = onnx_runtime.onnxruntime().OrtValue.ortvalue_from_numpy
        binding = self._session.io_binding()
        for name, array in (before | self._moments).items():
            binding.bind_ortvalue_input(name, value(array))
        for name, array in (after | self._moments).items():
            binding.bind_ortvalue_output(f"{name}.next", value(array))
        binding.bind_ortvalue_input("step", value(self._step))
        binding.bind_ortvalue_input("learning_rate", value(self._learning_rate))
        binding.bind_ortvalue_output("loss", value(self._loss))
        return binding
