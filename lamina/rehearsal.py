"""A stage's training on random examples in a process of its own: what a client's memory comes to.

Rules: the process imports what a client imports and holds what a client holds: the offered parameters, the
engine, the graphs of anchors, the trained copy and the update. It runs the prefix's newest segment first,
then `ROUNDS` times `STEPS` steps, for memory that one round has given back need not fit the next. What it
lacks of a client is the broker's connection, messages and the reading of examples.

Next: `export/budget.py`, which lowers a micro-batch where this finds more than the budget.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wire.errors import LaminaError
from wire.manifest import Manifest, TensorSpec, read_manifest

ROUNDS, STEPS = 2, 2

Arrays = dict[str, npt.NDArray[Any]]


class RehearsalFailed(LaminaError):
    """The process of a rehearsal ended with an error."""

    exit_code = 70


def rehearse(bundle: Path, engine: str, stage: int, batch_size: int) -> int:
    """Peak resident memory in bytes of a process that trains `stage` (from 0). Raises `RehearsalFailed`."""
    work = json.dumps({"bundle": str(bundle), "engine": engine, "stage": stage, "batch_size": batch_size})
    done = subprocess.run(
        [sys.executable, "-m", "lamina.rehearsal", work], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RehearsalFailed(f"stage {stage + 1} cannot be trained with {engine}: {reason}")
    return int(done.stdout.splitlines()[-1])


def train_at_random(bundle: str, engine: str, stage: int, batch_size: int) -> int:
    """What `rehearse` runs; the peak of this process."""
    import edge_client.session  # noqa: F401 - with all that a client imports
    from edge_client.anchors import anchored
    from edge_client.device import peak_rss_bytes
    from edge_client.engines import open_engine

    manifest, _ = read_manifest(Path(bundle))
    generator = np.random.default_rng(0)
    _run_segments(Path(bundle), manifest, engine, stage, generator)
    entry = manifest.stages[stage]
    offered = _parameters(manifest, manifest.names_of(entry.trainable), generator)
    opening = engine, Path(bundle).joinpath, manifest, stage
    for _ in range(ROUNDS):
        examples = anchored(_Random(entry.example_inputs, generator), offered, *opening)
        with open_engine(*opening) as opened:
            opened.load(offered)
            for _ in range(STEPS):
                opened.train_step(examples.batch(range(batch_size)), 1e-3)
            trained = opened.parameters()
            delta = {name: trained[name] - offered[name] for name in trained}
        del trained, delta
    return peak_rss_bytes()


@dataclass(frozen=True)
class _Random:
    """Examples without end: others each time."""

    inputs: dict[str, TensorSpec]
    generator: np.random.Generator

    def __len__(self) -> int:
        return sys.maxsize

    def batch(self, indices: Sequence[int] | npt.NDArray[np.integer], views: object = None) -> Arrays:
        """As many as there are indices, whichever, of no view."""
        del views
        return _batch(self.inputs, len(indices), self.generator)


def _run_segments(
    bundle: Path, manifest: Manifest, engine: str, stage: int, generator: np.random.Generator
) -> None:
    """The segments that lie between the stage before and this one."""
    from edge_client.engines import open_graph

    if stage == 0:
        return
    before = manifest.stages[stage - 1]
    for graph in before.segments.values():
        inputs = {name: before.inputs[name] for name in graph.inputs}
        run = open_graph(engine, bundle.joinpath, graph)
        parameters = _parameters(manifest, list(graph.parameters.values()), generator)
        for _ in range(STEPS):
            run(_batch(inputs, manifest.segment_batch_size, generator), parameters)


def _parameters(manifest: Manifest, names: list[str], generator: np.random.Generator) -> Arrays:
    return {
        name: 0.05 * generator.standard_normal(manifest.parameters[name].shape, np.float32)
        for name in names
    }


def _batch(inputs: dict[str, TensorSpec], size: int, generator: np.random.Generator) -> Arrays:
    """Normal floats, masks of ones, integers that every vocabulary has."""
    batch: Arrays = {}
    for name, spec in inputs.items():
        shape = (size, *spec.shape)
        if name.endswith("_mask"):
            batch[name] = np.ones(shape, np.float32)
        elif spec.dtype == "int64":
            batch[name] = generator.integers(0, 2, shape)
        else:
            batch[name] = generator.standard_normal(shape, np.float32)
    return batch


if __name__ == "__main__":
    print(train_at_random(**json.loads(sys.argv[1])))  # noqa: T201 - read by the parent
