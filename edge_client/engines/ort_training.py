"""The engine on ONNX Runtime Training's C bindings, without its Python API, which imports torch.

Rules: the checkpoint holds names only, so every value comes through `load`, in the order of
`Stage.parameters` in one flat buffer. `load` starts anew: sessions, gradients and AdamW's moments. The
bindings keep nothing alive: a value borrows numpy's memory, a module points into its checkpoint.

A step in micro-batches adds up gradients where the module keeps them: they are reset once a step. The
passes over embeddings are graphs that only infer, on a copy of the parameters.

https://onnxruntime.ai/docs/api/python/on_device_training/training_artifacts.html
Next: `export/ort_training.py`, which makes the files; `edge_client/engines/micro_batches.py`, the order of
the passes.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.engines import micro_batches, onnx_runtime, proximal
from edge_client.engines.micro_batches import Batch
from wire.errors import LocalError, UserError
from wire.manifest import Manifest
from wire.tensors import Array, Arrays

_NAME = "ort-training"
_WITH_MOMENTS = True
_ALL = False  # the bindings' `trainable_only`; a checkpoint of names can only be filled as a whole


class OrtTraining:
    """See `edge_client.engines.Engine`; made by `open_engine`."""

    graph_file = staticmethod(onnx_runtime.graph_file)
    open_graph = staticmethod(onnx_runtime.open_graph)

    def __init__(self, file: Any, manifest: Manifest, stage: int, threads: int) -> None:
        entry = manifest.stages[stage]
        self._files = {role: str(file(name)) for role, name in entry.engines[_NAME].items()}
        self._names = dict(entry.parameters)
        self._shapes = [manifest.parameters[name].shape for name in self._names.values()]
        self._inputs = entry.inputs
        self._task, self._size = manifest.task, entry.micro_batch_size
        self._threads = threads
        self._sessions: dict[str, Any] = {}  # of graphs that only infer, by role
        self._copied: Arrays = {}  # graph name -> value, as far as they need it
        self._state: Any = None
        self._module: Any = None
        self._optimizer: Any = None

    @staticmethod
    def check() -> None:
        """Raises `UserError` where this engine cannot run."""
        if not hasattr(_bindings(), "Module"):
            raise UserError(
                "the onnxruntime installed here cannot train",
                "pip uninstall onnxruntime, then pip install 'lamina[ort-training]'",
            )

    def load(self, parameters: Mapping[str, Array]) -> None:
        """As in `Engine`."""
        self._open(self._files["checkpoint"])
        module = self._module
        flat = np.concatenate(
            [np.asarray(parameters[name], np.float32).reshape(-1) for name in self._names.values()]
        )
        if flat.size != module.get_parameters_size(_ALL):
            raise LocalError(f"{flat.size} values for {module.get_parameters_size(_ALL)}")
        self._put(flat)
        self._optimize()

    def save(self, path: Path) -> None:
        """As in `Engine`."""
        self._loaded()
        try:
            _bindings().save_checkpoint(self._state, str(path), _WITH_MOMENTS)
        except Exception as error:  # the bindings' errors share no class below this one
            raise OSError(errno.EIO, str(error).partition("\n")[0]) from error

    def resume(self, path: Path) -> None:
        """As in `Engine`."""
        self._open(str(path))
        self._optimize()

    def _open(self, checkpoint: str) -> None:
        self.close()
        bindings = _bindings()
        options = onnx_runtime.session_options(self._threads, arena=False)
        train = self._files["gradients" if self._size else "train"]
        evaluate = self._files.get("eval")
        with onnx_runtime.trying(f"{train} cannot be loaded"):
            self._state = bindings.load_checkpoint(checkpoint)
            self._module = bindings.Module(train, self._state, evaluate, _cpu(bindings), options)
        self._sessions = {
            role: onnx_runtime.open_session(Path(self._files[role]), self._threads)
            for role in ("embed", "pairs")
            if role in self._files
        }

    def _optimize(self) -> None:
        """Open the optimizer, which takes its moments from the checkpoint or begins anew."""
        bindings = _bindings()
        options = onnx_runtime.session_options(self._threads, arena=False)
        path = self._files["optimizer"]
        with onnx_runtime.trying(f"{path} cannot be loaded"):
            self._optimizer = bindings.Optimizer(path, self._state, _cpu(bindings), options)

    def train_step(self, batch: Batch, learning_rate: float) -> float:
        """As in `Engine`."""
        module, fed = self._loaded(), self._fed(batch)
        self._optimizer.set_learning_rate(learning_rate)
        if self._size:
            self._copy()
            loss = micro_batches.whole_gradients(self, fed, self._size, self._task)
        else:
            loss = self.gradients(fed)
        with onnx_runtime.trying("the optimizer fails"):
            self._optimizer.optimizer_step()
        module.lazy_reset_grad()
        return loss

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """As in `Engine`."""
        self._loaded()
        fed = self._fed(batch)
        if not self._size:
            return {"loss": self.part_of_loss(fed)}
        self._copy()
        return {"loss": micro_batches.whole_loss(self, fed, self._size, self._task)}

    def pull(self, offered: Mapping[str, Array], rate: float) -> None:
        """As in `Engine`."""
        self._loaded()
        flat = self._flat()
        proximal.draw(zip(self._names.values(), self._parts(flat), strict=True), offered, rate)
        self._put(flat)

    def parameters(self) -> Arrays:
        """As in `Engine`."""
        self._loaded()
        return dict(zip(self._names.values(), self._parts(self._flat()), strict=True))

    def embed(self, batch: Batch) -> Arrays:
        """As in `micro_batches.Passes`."""
        return onnx_runtime.infer(self._sessions["embed"], batch, self._copied)

    def pairs(self, embeddings: Arrays) -> tuple[float, Arrays]:
        """As in `micro_batches.Passes`."""
        given = onnx_runtime.infer(self._sessions["pairs"], embeddings, self._copied)
        return float(given.pop("loss")), given

    def gradients(self, batch: Batch) -> float:
        """As in `micro_batches.Passes`."""
        fetches = _bindings().OrtValueVector()
        arrays, feeds = self._feeds(batch, training=True)
        with onnx_runtime.trying("the train step fails"):
            self._module.train_step_with_ort_values(feeds, fetches)
        del arrays
        return float(fetches[0].numpy())

    def part_of_loss(self, batch: Batch) -> float:
        """As in `micro_batches.Passes`."""
        fetches = _bindings().OrtValueVector()
        arrays, feeds = self._feeds(batch, training=False)
        with onnx_runtime.trying("the evaluation fails"):
            self._module.eval_step_with_ort_values(feeds, fetches)
        del arrays
        return float(fetches[0].numpy())

    def _copy(self) -> None:
        """Bring the copy of the parameters up to date, where there are graphs that need it."""
        if self._sessions:
            self._copied = {}  # the one before goes first
            self._copied = dict(zip(self._names, self._parts(self._flat()), strict=True))

    def _flat(self) -> Array:
        """A copy of the parameters, in order."""
        flat = np.empty(self._module.get_parameters_size(_ALL), np.float32)
        self._module.copy_parameters_to_buffer(_borrowed(flat), _ALL)
        return flat

    def _put(self, flat: Array) -> None:
        self._module.copy_buffer_to_parameters(_borrowed(flat), _ALL)

    def _parts(self, flat: Array) -> list[Array]:
        """Views of it, a parameter each."""
        ends = np.cumsum([int(np.prod(shape, dtype=np.int64)) for shape in self._shapes])
        parts = np.split(flat, ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def close(self) -> None:
        """As in `Engine`."""
        self._optimizer = self._module = None
        self._state = None  # last: the other two point into it
        self._sessions, self._copied = {}, {}

    def __enter__(self) -> OrtTraining:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _loaded(self) -> Any:
        if self._module is None:
            raise LocalError("an engine was used before it was loaded")
        return self._module

    def _fed(self, batch: Batch) -> Batch:
        return {name: np.ascontiguousarray(batch[name], spec.dtype) for name, spec in self._inputs.items()}

    def _feeds(self, batch: Batch, *, training: bool) -> tuple[list[Any], Any]:
        """The batch in the graph's order: arrays, which have to outlive the step, and values on them."""
        bindings = _bindings()
        names = self._loaded().input_names(training)
        arrays = [batch[name] for name in names]
        feeds = bindings.OrtValueVector()
        for array in arrays:
            feeds.push_back(bindings.OrtValue.ortvalue_from_numpy(array, _cpu(bindings)))
        return arrays, feeds


def _bindings() -> Any:
    onnx_runtime.onnxruntime()
    from onnxruntime.capi import _pybind_state

    return _pybind_state


def _borrowed(flat: Array) -> Any:
    """A value on the array's own memory."""
    bindings = _bindings()
    return bindings.OrtValue.ortvalue_from_numpy(flat, _cpu(bindings))


def _cpu(bindings: Any) -> Any:
    return bindings.OrtDevice(bindings.OrtDevice.cpu(), bindings.OrtDevice.default_memory(), 0)
