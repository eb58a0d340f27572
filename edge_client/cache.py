"""The feature cache: what the frozen prefix makes of each example, computed once per stage, kept on disk.

Rules:
- The prefix is a chain of segments, one for each earlier stage. A stage's features are its newest segment
  over the features of the stage before, so a pass holds one segment in memory, and a client that comes late
  walks the whole chain.
- A file is named after all that went into it: the data, its views, every graph and parameter below, the
  dtype. So it is never stale. A damaged one is computed again; one that nothing needs is removed.
- While a file is written, the one that it is made of is there too. Where there is no room for both, the
  same segments run over each batch instead: training goes on, slower, until the disk has room.

LW-FedMML, arXiv 2407.15426, Section III, where each batch runs the prefix.
Next: `edge_client/features.py`, how a batch is made; `edge_client/train.py`, which trains on it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import numpy as np

from edge_client.engines import Run, graph_file
from edge_client.features import AnyArray, Features, Prefix, Segment, every_row, saturated
from inputs.dataset import Dataset
from inputs.rows import Rows, file_bytes, write_rows
from wire.errors import UserError
from wire.manifest import Graph, Manifest
from wire.messages import Offer
from wire.tensors import Arrays

RESERVE_BYTES = 64 * 10**6
"""Of the disk, which stays free for updates and for others."""

_VERSION = "1"  # changes when the same names come to stand for other features
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One segment to run: `stage`'s, over one modality.

    file: of the bundle, with the graph in the form that the engine's runtime reads.
    source: the name of the features that go in; None where raw inputs do. target: of those that come out.
    num_views: of each example; 0: the examples as they are.
    """

    modality: str
    stage: int
    graph: Graph
    file: str
    source: Path | None
    target: Path
    num_views: int


class FeatureCache:
    """The features of one data set in a folder that nobody else uses. engine: whose runtime makes them.

    dtype: on disk. max_bytes: the most that they may take there; None: what is free.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        dataset: Dataset,
        engine: str,
        *,
        dtype: str = "float16",
        max_bytes: int | None = None,
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._manifest = manifest
        self._dataset = dataset
        self._dtype = np.dtype(dtype)
        self._max_bytes = max_bytes
        self._prefixes: dict[Path, Prefix] = {}
        """By the name of the features, whether there is a file of that name or not."""
        with self._telling():
            if max_bytes is not None and self._used() > max_bytes:  # it was more before
                self._keep(set())

    def steps(self, offer: Offer) -> list[Step]:
        """What has to run before the offer's stage can train, stage by stage."""
        chains = {modality: self._chain(modality, offer) for modality in self._manifest.modalities}
        with self._telling():
            self._keep({path for chain in chains.values() for path in chain if path is not None})
            missing = [
                step for modality, chain in chains.items() for step in self._missing(modality, chain, offer)
            ]
        return sorted(missing, key=lambda step: step.stage)

    def run(self, step: Step, run: Run, parameters: Arrays, stop: Event) -> None:
        """Run one step and keep what comes out; where there is no room for it, only how it is computed.

        run: of `by_own_names(step.graph)`. parameters: torch name -> float32, at least the graph's. Raises
        `Stopped`, or `UserError` where the disk takes nothing at all.
        """
        values = {name: parameters[torch_name] for name, torch_name in step.graph.parameters.items()}
        below = Prefix(None) if step.source is None else self._prefixes[step.source]
        prefix = Prefix(below.rows, (*below.segments, Segment(step.graph, run, values)))
        shape = self._shape(step.modality, step.stage + 1, step.num_views)
        with self._telling():
            if not self._is_written(step, prefix, shape, stop):
                self._prefixes[step.target] = prefix
                return
            if not self._is_known(step.target, shape):
                raise UserError(f"{step.target} was written and cannot be read back", "check the disk")
            if step.source is not None:
                del self._prefixes[step.source]
                step.source.unlink(missing_ok=True)

    def features(self, offer: Offer) -> Features:
        """The offer's stage's inputs; all `steps` have run. Older features are removed."""
        stage = self._manifest.stages[offer.key.stage]
        targets = {
            modality: path
            for modality in self._manifest.modalities
            if (path := self._chain(modality, offer)[-1]) is not None
        }
        prefixes = {self._input(modality): self._prefixes[path] for modality, path in targets.items()}
        self._prefixes = {path: self._prefixes[path] for path in targets.values()}
        with self._telling():
            self._keep({prefix.rows.path for prefix in prefixes.values() if prefix.rows is not None})
        names = frozenset(stage.example_inputs)
        return Features(self._dataset, names, prefixes, self._manifest.segment_batch_size)

    def _is_written(self, step: Step, prefix: Prefix, shape: tuple[int, ...], stop: Event) -> bool:
        """Write the features of a step; whether the disk had room for them."""
        needed = file_bytes(shape, self._dtype)
        if not self._has_room(step, needed):
            return False
        try:
            write_rows(step.target, shape, self._dtype, self._computed(step, prefix, stop))
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._warn(step, needed, 0, "free some space")
            return False
        return True

    def _computed(self, step: Step, prefix: Prefix, stop: Event) -> Iterator[AnyArray]:
        """The rows of a step's features as they go to the disk."""
        name = self._input(step.modality)
        features = Features(
            self._dataset, frozenset({name}), {name: prefix}, self._manifest.segment_batch_size
        )
        pieces = every_row(features, name, step.num_views, stop)
        return saturated(pieces, self._dtype, f"the {step.modality} features")

    def _input(self, modality: str) -> str:
        return next(iter(self._manifest.modalities[modality].inputs))

    def _num_views(self, modality: str, offer: Offer) -> int:
        """As in `Step`."""
        return offer.plan.augmentations if modality in self._dataset.augmented else 0

    def _chain(self, modality: str, offer: Offer) -> list[Path | None]:
        """The name of the modality's features at each stage up to the offer's; None: raw inputs."""
        files: list[Path | None] = [None]
        views = str(self._num_views(modality, offer))
        key = " ".join((_VERSION, self._dataset.fingerprint, modality, views, self._dtype.name))
        for number in range(offer.key.stage):
            graph = self._manifest.stages[number].segments.get(modality)
            if graph is None:
                files.append(files[-1])
                continue
            program = self._manifest.files[graph_file(self._engine, graph)].sha256
            parts = key, program, offer.frozen[number].sha256
            key = hashlib.sha256(" ".join(parts).encode()).hexdigest()
            files.append(self._folder / f"{modality}.{key}.npy")
        return files

    def _missing(self, modality: str, chain: list[Path | None], offer: Offer) -> list[Step]:
        num_views = self._num_views(modality, offer)
        steps: list[Step] = []
        for number in range(offer.key.stage, 0, -1):
            source, target = chain[number - 1], chain[number]
            if target is None or target == source:
                continue
            if self._is_known(target, self._shape(modality, number, num_views)):
                break
            graph = self._manifest.stages[number - 1].segments[modality]
            file = graph_file(self._engine, graph)
            steps.append(Step(modality, number - 1, graph, file, source, target, num_views))
        return steps[::-1]

    def _shape(self, modality: str, stage: int, num_views: int) -> tuple[int, ...]:
        """Of the features that the segments below `stage` give, on disk."""
        spec = self._manifest.stages[stage].inputs[self._input(modality)]
        return (len(self._dataset) * max(1, num_views), *spec.shape)

    def _is_known(self, path: Path, shape: tuple[int, ...]) -> bool:
        """Whether these features can be had; a file is read and proved once."""
        if path not in self._prefixes:
            rows = Rows.open(path, shape, self._dtype)
            if rows is None:
                if path.exists():
                    log.warning("%s is damaged: its features are computed again", path)
                    path.unlink(missing_ok=True)
                return False
            self._prefixes[path] = Prefix(rows)
        return True

    def _has_room(self, step: Step, needed: int) -> bool:
        """Whether `needed` more bytes fit beside what is here: a file and the one it is made of are both
        there while it is written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        used = self._used()
        free = shutil.disk_usage(self._folder).free - RESERVE_BYTES
        if needed > free:
            self._warn(step, needed, free, "free some space")
        elif self._max_bytes is not None and used + needed > self._max_bytes:
            self._warn(step, needed, self._max_bytes - used, "raise --max-feature-mb")
        else:
            return True
        return False

    def _used(self) -> int:
        files = self._folder.iterdir() if self._folder.is_dir() else ()
        return sum(path.stat().st_size for path in files)

    def _warn(self, step: Step, needed: int, room: int, remedy: str) -> None:
        log.warning(
            "the %s features of stage %d need %.1f MB of disk and have %.1f MB, so each batch computes its "
            "own, which is slower; to keep them, %s and start the client again",
            *(step.modality, step.stage + 2, needed / 1e6, max(0, room) / 1e6, remedy),
        )

    def _keep(self, wanted: set[Path]) -> None:
        """Remove what is not wanted, and what a process that was killed has left."""
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if path not in wanted:
                path.unlink(missing_ok=True)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"features cannot be written to {self._folder}: {error.strerror}",
                "mend the disk, or give the client another --dir",
            ) from error
