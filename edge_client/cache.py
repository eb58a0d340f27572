"""The feature cache: what the frozen prefix makes of each example, computed once per stage, kept on disk.

Rules:
- The prefix is a chain of segments, one for each earlier stage. A stage's features are its newest segment
  over the features of the stage before, so only one segment is ever in memory, and a client that comes late
  walks the whole chain.
- A file is named after all that went into it: the data, and every graph and parameter below. So it is
  never stale. It is written batch by batch under another name, synced and renamed; only the newest of a
  modality is kept.
- Features are float32 `[N, T, D]`, memory-mapped: memory holds a batch.

LW-FedMML, arXiv 2407.15426, Section III.
Next: `edge_client/train.py`, which reads them; `inputs/dataset.py`, what lies below.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_client.engines import Run, graph_file
from inputs.dataset import Dataset
from wire.errors import UserError
from wire.manifest import Graph, Manifest
from wire.messages import Offer
from wire.tensors import Arrays

BATCH = 32

AnyArray = npt.NDArray[Any]


class Stopped(Exception):
    """The round went on without us."""


@dataclass(frozen=True)
class Step:
    """One segment to run: `stage`'s, over one modality.

    file: of the bundle, with the graph in the form that the engine's runtime reads.
    source: the features that go in; None where raw inputs do. target: those that come out.
    """

    modality: str
    stage: int
    graph: Graph
    file: str
    source: Path | None
    target: Path


@dataclass(frozen=True)
class Features:
    """A stage's inputs, examples 0 to N - 1. cached: input name -> float32 `[N, T, D]`."""

    dataset: Dataset
    names: frozenset[str]
    cached: Mapping[str, AnyArray]

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int] | npt.NDArray[np.integer]) -> dict[str, AnyArray]:
        """The stage's inputs by name, each `[B, *shape]`."""
        arrays = self.dataset.batch(indices, self.names - self.cached.keys())
        for name, array in self.cached.items():
            arrays[name] = np.ascontiguousarray(array[np.asarray(indices)], np.float32)
        return arrays


class FeatureCache:
    """The features of one data set in a folder that nobody else uses. engine: whose runtime makes them."""

    def __init__(self, folder: Path, manifest: Manifest, dataset: Dataset, engine: str) -> None:
        self._folder = folder
        self._engine = engine
        self._manifest = manifest
        self._dataset = dataset

    def steps(self, offer: Offer) -> list[Step]:
        """What has to run before the offer's stage can train, stage by stage."""
        missing = [
            step for modality in self._manifest.modalities for step in self._missing(modality, offer)
        ]
        return sorted(missing, key=lambda step: step.stage)

    def run(self, step: Step, run: Run, parameters: Arrays, stop: Event) -> None:
        """Run one step. Raises `Stopped`, or `UserError` where the disk does not take it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(suffix=".partial", dir=self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    self._write(file, step, run, parameters, stop)
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(step.target)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"features cannot be written to {self._folder}: {error.strerror}",
                "free some space, or give the client another --dir",
            ) from error

    def features(self, offer: Offer) -> Features:
        """The offer's stage's inputs; all `steps` have run. Older features are removed."""
        stage = self._manifest.stages[offer.key.stage]
        files = {
            modality: path
            for modality in self._manifest.modalities
            if (path := self._chain(modality, offer)[-1]) is not None
        }
        for path in self._folder.glob("*") if self._folder.is_dir() else ():
            if path not in files.values():
                path.unlink(missing_ok=True)
        cached = {
            self._input(modality): np.load(path, mmap_mode="r", allow_pickle=False)
            for modality, path in files.items()
        }
        return Features(self._dataset, frozenset(stage.inputs), cached)

    def _input(self, modality: str) -> str:
        return next(iter(self._manifest.modalities[modality].inputs))

    def _chain(self, modality: str, offer: Offer) -> list[Path | None]:
        """The file of the modality's features at each stage up to the offer's; None: raw inputs."""
        files: list[Path | None] = [None]
        key = self._dataset.fingerprint
        for number in range(offer.key.stage):
            graph = self._manifest.stages[number].segments.get(modality)
            if graph is None:
                files.append(files[-1])
                continue
            program = self._manifest.files[graph_file(self._engine, graph)].sha256
            parts = key, modality, program, offer.frozen[number].sha256
            key = hashlib.sha256(" ".join(parts).encode()).hexdigest()
            files.append(self._folder / f"{modality}.{key}.npy")
        return files

    def _missing(self, modality: str, offer: Offer) -> list[Step]:
        files = self._chain(modality, offer)
        steps: list[Step] = []
        for number in range(offer.key.stage, 0, -1):
            source, target = files[number - 1], files[number]
            if target is None or target == source:
                continue
            if self._is_there(target, modality, number):
                break
            graph = self._manifest.stages[number - 1].segments[modality]
            file = graph_file(self._engine, graph)
            steps.append(Step(modality, number - 1, graph, file, source, target))
        return steps[::-1]

    def _shape(self, modality: str, stage: int) -> tuple[int, ...]:
        """Of the features that the segments below `stage` give."""
        spec = self._manifest.stages[stage].inputs[self._input(modality)]
        return (len(self._dataset), *spec.shape)

    def _is_there(self, path: Path, modality: str, stage: int) -> bool:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        return bool(array.shape == self._shape(modality, stage) and array.dtype == np.float32)

    def _write(self, file: Any, step: Step, run: Run, parameters: Arrays, stop: Event) -> None:
        shape = self._shape(step.modality, step.stage + 1)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        below = (
            {} if step.source is None else {self._input(step.modality): np.load(step.source, mmap_mode="r")}
        )
        source = Features(self._dataset, frozenset(step.graph.inputs), below)
        size = min(BATCH, self._manifest.max_batch_size)
        for first in range(0, len(source), size):
            if stop.is_set():
                raise Stopped
            batch = source.batch(range(first, min(first + size, len(source))))
            output = run(batch, parameters)[step.graph.outputs[0]]
            file.write(np.ascontiguousarray(output, np.float32).tobytes())
