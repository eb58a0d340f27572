"""Engines: what runs a train step on the device. numpy in, numpy out, one protocol for all.

Rules: an engine is one file here and one line in `ENGINES`. It runs one stage of one bundle; a session of
it is `load`, then `train_step`s, then `parameters`. Its runtime also runs the graphs that only infer, by
`open_graph`, so a device installs one runtime. The contract test (`tests/test_engines.py`) runs on every
engine in the table.

Next: `edge_client/engines/onnx.py`, the plainest one; `edge_client/train.py`, which drives one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from edge_client.engines.onnx_runtime import Run
from wire.errors import UserError
from wire.manifest import Graph, Manifest, Stage
from wire.tensors import Array, Arrays

__all__ = [
    "AUTO",
    "ENGINES",
    "ONNX",
    "Batch",
    "BundleFile",
    "Engine",
    "Run",
    "available",
    "choose",
    "graph_file",
    "open_engine",
    "open_graph",
    "step_files",
]

AUTO = "auto"
ONNX = "onnx"
ENGINES: dict[str, str] = {  # in the order in which `auto` prefers them
    ONNX: "edge_client.engines.onnx:Onnx",
    "executorch": "edge_client.engines.executorch:ExecuTorch",
    "ort-training": "edge_client.engines.ort_training:OrtTraining",
}
"""Name -> `module:Class`; the class takes what `open_engine` takes, without the name."""

_EXTRAS = {ONNX: "client"}  # of the package, where it is not the engine's name

Batch = Mapping[str, npt.NDArray[Any]]
BundleFile = Callable[[str], Path]


class Engine(Protocol):
    """One stage, ready to train. Leaving its `with` block closes it."""

    def load(self, parameters: Mapping[str, Array]) -> None:
        """Take these values (torch name -> float32, at least all that train) and fresh moments."""
        ...

    def train_step(self, batch: Batch, learning_rate: float) -> float:
        """One AdamW step on `batch` (the stage's inputs, `[B, *shape]`, any B); the loss before it."""
        ...

    def pull(self, offered: Mapping[str, Array], rate: float) -> None:
        """Draw each value w that trains towards the offered v, by torch name: (w + rate v) / (1 + rate)."""
        ...

    def parameters(self) -> Arrays:
        """Copies of what trains, as it is now: torch name -> float32, in `Stage.parameters`' order."""
        ...

    def save(self, path: Path) -> None:
        """Write all that the next step depends on to a file. Raises `OSError`."""
        ...

    def resume(self, path: Path) -> None:
        """In place of `load`: take what `save` wrote, of this stage, engine and machine. The next steps
        give the same bits as if there had been no break.
        """
        ...

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """At least `loss`, the mean over the batch, without training."""
        ...

    def close(self) -> None:
        """Give back the memory. The engine is of no use afterwards."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *_exception: object) -> None: ...


def available(names: Iterable[str] = tuple(ENGINES)) -> list[str]:
    """Those of these engines whose runtime loads here."""
    return [name for name in names if name in ENGINES and _usable(name)]


def choose(name: str, exported: Collection[str]) -> str:
    """The engine that `name`, of `ENGINES` or `auto`, comes to for a bundle `exported` for these engines.

    Raises `UserError` for a name that is not an engine, a bundle that was not exported for it, or a
    runtime that is not installed.
    """
    if name == AUTO:
        for engine in ENGINES:
            if engine in exported and _usable(engine):
                return engine
        raise UserError(
            f"no engine runs here, of {', '.join(exported)}",
            f"install one: {', '.join(_install(engine) for engine in ENGINES if engine in exported)}",
        )
    if name not in ENGINES:
        raise UserError(f"there is no engine {name!r}", f"choose one of {AUTO}, {', '.join(ENGINES)}")
    if name not in exported:
        raise UserError(f"the bundle has no files for the engine {name}", f"choose {' or '.join(exported)}")
    _load(name)
    return name


def open_engine(name: str, file: BundleFile, manifest: Manifest, stage: int, threads: int = 1) -> Engine:
    """An engine for a stage. name: as for `choose`, whose errors it raises. file: name of a bundle's
    file -> its path.
    """
    chosen = choose(name, manifest.stages[stage].engines)
    engine: Engine = _load(chosen)(file, manifest, stage, threads)
    return engine


def graph_file(engine: str, graph: Graph) -> str:
    """The name of the bundle's file of an inference graph, as the engine's runtime reads it."""
    name: str = _class(engine).graph_file(graph)
    return name


def step_files(engine: str, stage: Stage) -> list[str]:
    """The names of the bundle's files that a client needs to train a stage."""
    return [*stage.engines[engine].values(), *(graph_file(engine, one) for one in stage.anchors.values())]


def open_graph(engine: str, file: BundleFile, graph: Graph, threads: int = 1) -> Run:
    """An inference graph, on the engine's runtime, as a function of (inputs by name, parameters by torch
    name), either of which may hold more than it needs, that returns output name -> array [B, ...].

    Raises `GraphError` for a file that is not a graph, `UserError` for a runtime that is not installed.
    """
    run: Run = _load(engine).open_graph(file(graph_file(engine, graph)), graph, threads)
    return run


def _class(name: str) -> Any:
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _load(name: str) -> Any:
    engine = _class(name)
    try:
        engine.check()
    except UserError as error:
        hint = error.hint or f"install it: {_install(name)}"
        raise UserError(f"the engine {name} cannot run here: {error}", hint) from error
    return engine


def _usable(name: str) -> bool:
    try:
        _load(name)
    except UserError:
        return False
    return True


def _install(name: str) -> str:
    return f"pip install 'lamina[{_EXTRAS.get(name, name)}]'"
