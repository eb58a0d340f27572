"""The engine on ExecuTorch's C++ runtime: the whole train step is one method of a program.

Rules: parameters and AdamW's moments lie in numpy arrays that a step writes over: the program updates a
parameter only after the last operation that reads it. `load` starts anew. A program takes batches up to
the size that it was exported for. A step in micro-batches is a method for each pass, which share the memory
that they compute in.

Next: `edge_client/engines/executorch_runtime.py`; `export/executorch.py`, which makes the programs;
`edge_client/engines/micro_batches.py`, the order of the passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.engines import executorch_runtime, micro_batches, proximal
from edge_client.engines.executorch_runtime import Program, Spec
from edge_client.engines.micro_batches import Batch
from edge_client.engines.saved import read_arrays, write_arrays
from wire.errors import GraphError, LocalError, UserError
from wire.manifest import Graph, Manifest
from wire.tensors import Array, Arrays

_NAME = "executorch"
_TRAIN, _EVALUATE = "train", "evaluate"
_EMBED, _PAIRS, _GRADIENTS, _UPDATE = "embed", "pairs", "gradients", "update"
_STATE = "parameter", "exp_avg", "exp_avg_sq"
_SCALAR = Spec(np.dtype(np.float32), ())


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
        self._task, self._size = manifest.task, entry.micro_batch_size
        self._threads = threads
        self._program: Program | None = None
        self._state: list[list[Array]] = []  # as `_STATE` names them
        self._sums: list[Array] = []  # of gradients, for a step in micro-batches
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
        values = [np.array(parameters[name], np.float32, order="C") for name in self._names]
        if [value.shape for value in values] != self._shapes:
            raise LocalError("an engine was loaded with parameters of other shapes")
        self._begin([values, *([np.zeros_like(one) for one in values] for _ in range(2))], 0)

    def save(self, path: Path) -> None:
        """As in `Engine`."""
        self._loaded()
        arrays = {
            f"{kind}.{name}": value
            for kind, values in zip(_STATE, self._state, strict=True)
            for name, value in zip(self._names, values, strict=True)
        }
        write_arrays(path, {**arrays, "step": self._step})

    def resume(self, path: Path) -> None:
        """As in `Engine`."""
        arrays = read_arrays(path)
        state = [[arrays[f"{kind}.{name}"] for name in self._names] for kind in _STATE]
        self._begin(state, arrays["step"])

    def _begin(self, state: list[list[Array]], step: float | Array) -> None:
        """Open the program; these arrays are the engine's from now on."""
        self.close()
        program = Program(self._path, self._threads)
        if not self._fits(program):
            raise GraphError(
                f"{self._path} is not the program of this stage", "export the bundle once more"
            )
        self._state = state
        self._sums = [np.zeros_like(one) for one in state[0]] if self._size else []
        self._step[...] = step
        self._program = program

    def train_step(self, batch: Batch, learning_rate: float) -> float:
        """As in `Engine`."""
        program = self._loaded()
        state = [value for values in self._state for value in values]
        scalars = [self._step, self._learning_rate]
        self._learning_rate[...] = learning_rate
        if not self._size:
            fed = self._feeds(_TRAIN, self._taken(batch))
            self._step += 1
            program.run(_TRAIN, [*state, *scalars, *fed], [self._loss, *state])
            return float(self._loss)
        for one in self._sums:
            one.fill(0)
        loss = micro_batches.whole_gradients(self, self._taken(batch), self._size, self._task)
        self._step += 1
        program.run(_UPDATE, [*state, *scalars, *self._sums], state)
        return loss

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """As in `Engine`."""
        self._loaded()
        if self._size:
            return {"loss": micro_batches.whole_loss(self, self._taken(batch), self._size, self._task)}
        return {"loss": self.part_of_loss(self._taken(batch))}

    def pull(self, offered: Mapping[str, Array], rate: float) -> None:
        """As in `Engine`."""
        self._loaded()
        proximal.draw(zip(self._names, self._state[0], strict=True), offered, rate)

    def parameters(self) -> Arrays:
        """As in `Engine`."""
        self._loaded()
        return {name: value.copy() for name, value in zip(self._names, self._state[0], strict=True)}

    def close(self) -> None:
        """As in `Engine`."""
        if self._program is not None:
            self._program.close()
        self._program, self._state, self._sums = None, [], []

    def __enter__(self) -> ExecuTorch:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def embed(self, batch: Batch) -> Arrays:
        """As in `micro_batches.Passes`."""
        return self._rows(_EMBED, batch, [])

    def pairs(self, embeddings: Arrays) -> tuple[float, Arrays]:
        """As in `micro_batches.Passes`."""
        given = self._rows(_PAIRS, embeddings, [self._loss])
        return float(self._loss), given

    def gradients(self, batch: Batch) -> float:
        """As in `micro_batches.Passes`."""
        fed = [*self._state[0], *self._sums, *self._feeds(_GRADIENTS, batch)]
        self._loaded().run(_GRADIENTS, fed, [self._loss, *self._sums])
        return float(self._loss)

    def part_of_loss(self, batch: Batch) -> float:
        """As in `micro_batches.Passes`."""
        self._loaded().run(_EVALUATE, [*self._state[0], *self._feeds(_EVALUATE, batch)], [self._loss])
        return float(self._loss)

    def _rows(self, method: str, batch: Batch, before: list[Array]) -> Arrays:
        """What a method gives after `before`, a row an example; named by its place."""
        program, fed = self._loaded(), self._feeds(method, batch)
        specs = program.gives(method)[len(before) :]
        made = [np.empty(spec.shape, spec.dtype) for spec in specs]
        program.run(method, [*self._state[0], *fed], [*before, *made])
        return {f"{method}.{place}": value[: len(fed[0])] for place, value in enumerate(made)}

    def _loaded(self) -> Program:
        if self._program is None:
            raise LocalError("an engine was used before it was loaded")
        return self._program

    def _fits(self, program: Program) -> bool:
        """Whether the program is that of the stage."""
        state = [Spec(np.dtype(np.float32), shape) for shape in self._shapes]
        most = self._size or self._max_batch_size
        batch = [Spec(np.dtype(spec.dtype), (most, *spec.shape)) for spec in self._inputs.values()]
        after = [_SCALAR, *state]
        if not self._size:
            methods = {
                _TRAIN: ([*state * 3, _SCALAR, _SCALAR, *batch], [_SCALAR, *state * 3]),
                _EVALUATE: ([*state, *batch], [_SCALAR]),
            }
        elif self._task == "classification":
            batch.append(Spec(np.dtype(np.float32), (most,)))
            methods = {
                _GRADIENTS: ([*state * 2, *batch], after),
                _EVALUATE: ([*state, *batch], [_SCALAR]),
            }
        else:
            embeddings = program.gives(_EMBED)
            given = program.gives(_PAIRS)[1:]
            wide = [Spec(one.dtype, (self._max_batch_size, *one.shape[1:])) for one in embeddings]
            parts = [Spec(one.dtype, (most, *one.shape[1:])) for one in given]
            methods = {
                _EMBED: ([*state, *batch], embeddings),
                _PAIRS: ([*state, *wide], [_SCALAR, *given]),
                _GRADIENTS: ([*state * 2, *batch, *parts], after),
            }
        if self._size:
            methods[_UPDATE] = ([*state * 3, _SCALAR, _SCALAR, *state], state * 3)
        return all(
            (program.takes(name), program.gives(name)) == expected for name, expected in methods.items()
        )

    def _taken(self, batch: Batch) -> Batch:
        """What the stage takes of a batch, in its order."""
        return {name: batch[name] for name in self._inputs}

    def _feeds(self, method: str, batch: Batch) -> list[executorch_runtime.AnyArray]:
        """The last inputs of a method, in their order."""
        specs = self._loaded().takes(method)[-len(batch) :]
        fed = [
            executorch_runtime.as_fed(name, value, spec)
            for (name, value), spec in zip(batch.items(), specs, strict=True)
        ]
        if len({len(one) for one in fed}) > 1:
            raise LocalError("the inputs of a batch are of different sizes")
        return fed
