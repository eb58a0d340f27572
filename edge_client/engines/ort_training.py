"""The engine on ONNX Runtime Training's C bindings, without its Python API, which imports torch.

Rules: the checkpoint holds names only, so every value comes through `load`, in the order of
`Stage.parameters` in one flat buffer. `load` starts anew: sessions, gradients and AdamW's moments. The
bindings keep nothing alive: a value borrows numpy's memory, a module points into its checkpoint.

https://onnxruntime.ai/docs/api/python/on_device_training/training_artifacts.html
Next: `export/ort_training.py`, which makes the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_client.engines import onnx_runtime
from wire.errors import LocalError, UserError
from wire.manifest import Manifest
from wire.tensors import Array, Arrays

_NAME = "ort-training"
_ALL = False  # the bindings' `trainable_only`; a checkpoint of names can only be filled as a whole


class OrtTraining:
    """See `edge_client.engines.Engine`; made by `open_engine`."""

    graph_file = staticmethod(onnx_runtime.graph_file)
    open_graph = staticmethod(onnx_runtime.open_graph)

    def __init__(self, file: Any, manifest: Manifest, stage: int, threads: int) -> None:
        entry = manifest.stages[stage]
        self._files = {role: str(file(name)) for role, name in entry.engines[_NAME].items()}
        self._names = list(entry.parameters.values())
        self._shapes = [manifest.parameters[name].shape for name in self._names]
        self._inputs = entry.inputs
        self._threads = threads
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
        self.close()
        bindings = _bindings()
        device = _cpu(bindings)
        options = onnx_runtime.session_options(self._threads, arena=False)
        self._state = state = bindings.load_checkpoint(self._files["checkpoint"])
        self._module = module = bindings.Module(
            self._files["train"], state, self._files["eval"], device, options
        )
        flat = np.concatenate(
            [np.asarray(parameters[name], np.float32).reshape(-1) for name in self._names]
        )
        if flat.size != module.get_parameters_size(_ALL):
            raise LocalError(f"{flat.size} values for {module.get_parameters_size(_ALL)}")
        module.copy_buffer_to_parameters(bindings.OrtValue.ortvalue_from_numpy(flat, device), _ALL)
        self._optimizer = bindings.Optimizer(self._files["optimizer"], state, device, options)

    def train_step(self, batch: Mapping[str, npt.NDArray[Any]], learning_rate: float) -> float:
        """As in `Engine`."""
        module = self._loaded()
        fetches = _bindings().OrtValueVector()
        self._optimizer.set_learning_rate(learning_rate)
        arrays, feeds = self._feeds(batch, training=True)
        module.train_step_with_ort_values(feeds, fetches)
        del arrays
        self._optimizer.optimizer_step()
        module.lazy_reset_grad()
        return float(fetches[0].numpy())

    def evaluate(self, batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, float]:
        """As in `Engine`."""
        module = self._loaded()
        fetches = _bindings().OrtValueVector()
        arrays, feeds = self._feeds(batch, training=False)
        module.eval_step_with_ort_values(feeds, fetches)
        del arrays
        return {"loss": float(fetches[0].numpy())}

    def parameters(self) -> Arrays:
        """As in `Engine`."""
        bindings, module = _bindings(), self._loaded()
        flat = np.empty(module.get_parameters_size(_ALL), np.float32)
        module.copy_parameters_to_buffer(bindings.OrtValue.ortvalue_from_numpy(flat, _cpu(bindings)), _ALL)
        arrays, first = {}, 0
        for name, shape in zip(self._names, self._shapes, strict=True):
            end = first + int(np.prod(shape, dtype=np.int64))
            arrays[name] = flat[first:end].reshape(shape)
            first = end
        return arrays

    def close(self) -> None:
        """As in `Engine`."""
        self._optimizer = self._module = None
        self._state = None  # last: the other two point into it

    def __enter__(self) -> OrtTraining:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _loaded(self) -> Any:
        if self._module is None:
            raise LocalError("an engine was used before it was loaded")
        return self._module

    def _feeds(self, batch: Mapping[str, npt.NDArray[Any]], *, training: bool) -> tuple[list[Any], Any]:
        """The batch in the graph's order: arrays, which have to outlive the step, and values on them."""
        bindings = _bindings()
        names = self._loaded().input_names(training)
        arrays = [np.ascontiguousarray(batch[name], self._inputs[name].dtype) for name in names]
        feeds = bindings.OrtValueVector()
        for array in arrays:
            feeds.push_back(bindings.OrtValue.ortvalue_from_numpy(array, _cpu(bindings)))
        return arrays, feeds


def _bindings() -> Any:
    onnx_runtime.onnxruntime()
    from onnxruntime.capi import _pybind_state

    return _pybind_state


def _cpu(bindings: Any) -> Any:
    return bindings.OrtDevice(bindings.OrtDevice.cpu(), bindings.OrtDevice.default_memory(), 0)
