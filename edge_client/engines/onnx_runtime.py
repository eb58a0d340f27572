"""ONNX Runtime on a device: imported lean, opened lean, whichever of its packages is installed.

Rules: everything here that needs the runtime imports it through `onnxruntime()`. The training package's
import looks for its torch bridge, and with it loads torch and onnx wherever they happen to be installed:
250 MB. Hiding `onnxruntime.training` during that import prevents it. A session's memory patterns are off:
they keep a block of the size of a whole step beside what the first step has left behind. All sessions take
their memory from one arena of the process: they run one after the other, and an arena keeps the most that
it ever had, so with one each the passes of a step would hold their memory side by side. What a block of it
has over a request is split off for others; by default up to 128 MB go to waste.

Next: `edge_client/engines/onnx.py` and `ort_training.py`; `edge_client/cache.py` runs segments.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wire.errors import GraphError, UserError
from wire.manifest import Graph
from wire.packages import installed
from wire.tensors import Array

Inputs = Mapping[str, npt.NDArray[Any]]
Run = Callable[[Inputs, Mapping[str, Array]], dict[str, Array]]

_TRAINING = "onnxruntime.training"
_PACKAGES = ("onnxruntime", "onnxruntime-training-cpu")


def onnxruntime() -> Any:
    """The package. Raises `UserError` where it is missing or does not load."""
    if "onnxruntime" in sys.modules:
        return sys.modules["onnxruntime"]
    if all(map(installed, _PACKAGES)):
        raise UserError(
            f"{' and '.join(_PACKAGES)} are both installed, and overwrite each other",
            f"pip uninstall {' '.join(_PACKAGES)}, then install the one that is meant",
        )
    sys.modules[_TRAINING] = None  # type: ignore[assignment]  # importing it raises ImportError
    try:
        import onnxruntime as package
    except ImportError as error:
        raise UserError(f"ONNX Runtime cannot be used here: {error}") from error
    finally:
        del sys.modules[_TRAINING]
    return package


_ARENA = {"max_dead_bytes_per_chunk": 1 << 18}


@functools.cache
def _register_arena() -> None:
    """Once in a process: the runtime refuses a second."""
    package = onnxruntime()
    kind, use = package.OrtAllocatorType.ORT_ARENA_ALLOCATOR, package.OrtMemType.DEFAULT
    place = package.OrtMemoryInfo("Cpu", kind, 0, use)
    package.create_and_register_allocator(place, package.OrtArenaCfg(_ARENA))


def session_options(threads: int, *, arena: bool = True) -> Any:
    """Options for a small device: `threads` within an operator, one operator at a time.

    arena: take memory from the process's arena, whose blocks are used again by whatever runs next.
    """
    package = onnxruntime()
    options = package.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = arena
    if arena:
        _register_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    options.enable_mem_pattern = False
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors
    return options


def open_session(path: Path, threads: int) -> Any:
    """An inference session. Raises `GraphError` for a file that is not a graph."""
    package, options = onnxruntime(), session_options(threads)
    with trying(f"{path} cannot be loaded"):
        return package.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def trying(what: str) -> Iterator[None]:
    """Nothing but a call of the runtime. Raises `GraphError`, which begins with `what`."""
    try:
        yield
    except Exception as error:  # the runtime's errors share no class below this one
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GraphError(f"{what}: {reason}", "export the bundle once more") from error


def infer(session: Any, inputs: Inputs, parameters: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs of a session by name. Inputs and parameters, by the graph's own names, are all that it
    needs, or more.
    """
    names = [value.name for value in session.get_inputs()]
    feeds = {name: inputs[name] if name in inputs else parameters[name] for name in names}
    outputs = [value.name for value in session.get_outputs()]
    with trying("a graph fails"):
        return dict(zip(outputs, session.run(outputs, feeds), strict=True))


def graph_file(graph: Graph) -> str:
    """The name of the file that `open_graph` reads."""
    return graph.file


def open_graph(path: Path, graph: Graph, threads: int) -> Run:
    """An inference graph of the bundle as a function of (inputs by name, parameters by torch name).

    Raises `GraphError` for a file that is not a graph, and later if it fails. Both may hold more than the
    graph needs. The result: output name -> array [B, ...]. Parameters are read in place at every call, none
    is copied or kept.
    """
    session = open_session(path, threads)

    def run(inputs: Inputs, parameters: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {name: np.ascontiguousarray(inputs[name]) for name in graph.inputs}
        feeds |= {name: parameters[torch_name] for name, torch_name in graph.parameters.items()}
        with trying(f"{path} fails"):
            outputs = session.run(list(graph.outputs), feeds)
        return dict(zip(graph.outputs, outputs, strict=True))

    return run
