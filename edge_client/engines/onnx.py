"""The engine on any ONNX Runtime: the whole train step is one graph of standard operators.

Rules: parameters and AdamW's moments lie in numpy arrays that the graph reads and writes in place, so a
step copies nothing. Moments are written over themselves: the only operator that reads one comes before the
one that writes it. A parameter is still read when its new value is written, so there are two of each, and
steps go from one to the other. `load` starts anew.

A step in micro-batches is a graph for each pass. Gradients add up in arrays of their own, and AdamW, which
then is alone, writes parameters over themselves.

Next: `export/onnx_step.py` and `export/onnx_passes.py`, which make the files and say what their inputs are
called; `edge_client/engines/micro_batches.py`, the order of the passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_client.engines import micro_batches, onnx_runtime, proximal
from edge_client.engines.micro_batches import Batch
from edge_client.engines.saved import read_arrays, write_arrays
from wire.errors import LocalError
from wire.manifest import Manifest
from wire.tensors import Array, Arrays

_NAME = "onnx"
_MOMENTS = ("exp_sum", "exp_sum_sq")
_SUM = "gradient_sum"


class Onnx:
    """See `edge_client.engines.Engine`; made by `open_engine`."""

    graph_file = staticmethod(onnx_runtime.graph_file)
    open_graph = staticmethod(onnx_runtime.open_graph)

    def __init__(self, file: Any, manifest: Manifest, stage: int, threads: int) -> None:
        entry = manifest.stages[stage]
        self._files: dict[str, Path] = {role: file(name) for role, name in entry.engines[_NAME].items()}
        self._names = dict(entry.parameters)
        self._inputs = entry.inputs
        self._task, self._size = manifest.task, entry.micro_batch_size
        self._threads = threads
        self._sessions: dict[str, Any] = {}  # by role
        self._values: Arrays = {}  # graph name -> float32
        self._moments: Arrays = {}
        self._following: Arrays = {}  # of a step on whole batches: what `_values` is after the next one
        self._sums: Arrays = {}  # of a step in micro-batches
        self._bindings: list[Any] = []  # of the graphs that train, in turn; they borrow memory only
        self._loss = np.zeros((), np.float32)
        self._step = np.zeros((), np.float32)
        self._learning_rate = np.zeros((), np.float32)

    @staticmethod
    def check() -> None:
        """Raises `UserError` where this engine cannot run."""
        onnx_runtime.onnxruntime()

    def load(self, parameters: Mapping[str, Array]) -> None:
        """As in `Engine`."""
        values = {
            name: np.array(parameters[torch_name], np.float32, order="C")
            for name, torch_name in self._names.items()
        }
        moments = {
            f"{name}.{moment}": np.zeros_like(value)
            for name, value in values.items()
            for moment in _MOMENTS
        }
        self._begin(values, moments, 0)

    def save(self, path: Path) -> None:
        """As in `Engine`."""
        self._loaded()
        write_arrays(path, {**self._values, **self._moments, "step": self._step})

    def resume(self, path: Path) -> None:
        """As in `Engine`."""
        arrays = read_arrays(path)
        step = arrays.pop("step")
        values = {name: arrays.pop(name) for name in self._names}
        self._begin(values, arrays, step)

    def _begin(self, values: Arrays, moments: Arrays, step: float | Array) -> None:
        """Open the graphs and bind them to these arrays, which are the engine's from now on."""
        self.close()
        for role in self._files.keys() - {"eval"}:
            self._open(role)
        self._values, self._moments = values, moments
        scalars = {"step": self._step, "learning_rate": self._learning_rate}
        loss = {"loss": self._loss}
        if self._size:
            sums = self._sums = {f"{name}.{_SUM}": np.zeros_like(value) for name, value in values.items()}
            self._bindings = [
                self._bound("gradients", values | sums, loss | _next(sums)),
                self._bound("update", values | sums | moments | scalars, _next(values | moments)),
            ]
        else:
            after = self._following = {name: np.empty_like(value) for name, value in values.items()}
            self._bindings = [
                self._bound("train", now | moments | scalars, loss | _next(then | moments))
                for now, then in ((values, after), (after, values))
            ]
        self._step[...] = step

    def train_step(self, batch: Batch, learning_rate: float) -> float:
        """As in `Engine`."""
        self._loaded()
        fed = self._feeds(batch)
        self._learning_rate[...] = learning_rate
        if not self._size:
            self._step += 1
            loss = self._train("train", fed)
            self._values, self._following = self._following, self._values
            self._bindings.reverse()
            return loss
        for total in self._sums.values():
            total.fill(0)
        loss = micro_batches.whole_gradients(self, fed, self._size, self._task)
        self._step += 1
        self._run("update", self._bindings[1])
        return loss

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """As in `Engine`. A graph for it alone is opened for this call only."""
        self._loaded()
        fed = self._feeds(batch)
        if "eval" in self._files:
            self._open("eval")
        whole = micro_batches.whole_loss
        loss = whole(self, fed, self._size, self._task) if self._size else self.part_of_loss(fed)
        self._sessions.pop("eval", None)
        return {"loss": loss}

    def pull(self, offered: Mapping[str, Array], rate: float) -> None:
        """As in `Engine`."""
        self._loaded()
        proximal.draw(((self._names[name], value) for name, value in self._values.items()), offered, rate)

    def parameters(self) -> Arrays:
        """As in `Engine`."""
        self._loaded()
        return {torch_name: self._values[name].copy() for name, torch_name in self._names.items()}

    def close(self) -> None:
        """As in `Engine`."""
        self._bindings = []
        self._sessions = {}
        self._values, self._moments, self._following, self._sums = {}, {}, {}, {}

    def __enter__(self) -> Onnx:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def embed(self, batch: Batch) -> Arrays:
        """As in `micro_batches.Passes`."""
        return self._infer("embed", batch)

    def pairs(self, embeddings: Arrays) -> tuple[float, Arrays]:
        """As in `micro_batches.Passes`."""
        given = self._infer("pairs", embeddings)
        return float(given.pop("loss")), given

    def gradients(self, batch: Batch) -> float:
        """As in `micro_batches.Passes`."""
        return self._train("gradients", batch)

    def part_of_loss(self, batch: Batch) -> float:
        """As in `micro_batches.Passes`."""
        return float(self._infer("eval", batch)["loss"])

    def _open(self, role: str) -> None:
        self._sessions[role] = onnx_runtime.open_session(self._files[role], self._threads)

    def _loaded(self) -> None:
        if not self._sessions:
            raise LocalError("an engine was used before it was loaded")

    def _feeds(self, batch: Batch) -> dict[str, npt.NDArray[Any]]:
        return {name: np.ascontiguousarray(batch[name], spec.dtype) for name, spec in self._inputs.items()}

    def _infer(self, role: str, batch: Batch) -> Arrays:
        return onnx_runtime.infer(self._sessions[role], batch, self._values)

    def _train(self, role: str, batch: Batch) -> float:
        """The loss; all else is written where it is bound."""
        binding = self._bindings[0]
        for name, array in batch.items():
            binding.bind_cpu_input(name, array)
        self._run(role, binding)
        return float(self._loss)

    def _run(self, role: str, binding: Any) -> None:
        with onnx_runtime.trying(f"{self._files[role].name} fails"):
            self._sessions[role].run_with_iobinding(binding)

    def _bound(self, role: str, before: Arrays, after: Arrays) -> Any:
        """A run of a graph on these arrays: what it reads, and what it writes."""
        value = onnx_runtime.onnxruntime().OrtValue.ortvalue_from_numpy
        binding = self._sessions[role].io_binding()
        for name, array in before.items():
            binding.bind_ortvalue_input(name, value(array))
        for name, array in after.items():
            binding.bind_ortvalue_output(name, value(array))
        return binding


def _next(arrays: Arrays) -> Arrays:
    """Under the names that a graph gives to new values."""
    return {f"{name}.next": array for name, array in arrays.items()}
