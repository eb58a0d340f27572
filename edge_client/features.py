"""A stage's inputs, batch by batch: raw, from the disk, or computed by the frozen prefix when needed.

Rules: memory holds a batch, whichever way it comes. What a segment takes at once is `segment_batch_size`
examples, far fewer than a train step, so that a pass needs less than training does. View v of example i is
the same picture everywhere: raw, in a pass, and in row `i * views + v` of features on disk.

Next: `edge_client/cache.py`, which decides how each modality's features are had; `edge_client/train.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from edge_client.engines import Run
from inputs.dataset import Dataset
from inputs.rows import Rows
from wire.manifest import Graph
from wire.tensors import Array, Arrays

AnyArray = npt.NDArray[Any]
Indices = npt.NDArray[np.integer]

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The round went on without us."""


def by_own_names(graph: Graph) -> Graph:
    """The graph with parameters called as in its file, so that segments of that file can share it."""
    return msgspec.structs.replace(graph, parameters={name: name for name in graph.parameters})


@dataclass(frozen=True)
class Segment:
    """A segment and its frozen values.

    run: of `by_own_names(graph)`. parameters: by the same names, float32.
    """

    graph: Graph
    run: Run
    parameters: Arrays


@dataclass(frozen=True)
class Prefix:
    """How one modality's features are had: `segments`, in turn, over what `rows` holds.

    rows: features of this stage or of an earlier one, `[N * views, T, D]`; None: raw inputs.
    """

    rows: Rows | None
    segments: tuple[Segment, ...] = ()


class Examples(Protocol):
    """What a stage trains on, examples 0 to N - 1."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | Indices, views: Indices | None = None) -> dict[str, AnyArray]:
        """A stage's inputs by name, each `[B, *shape]`. views: as of `Features.batch`."""
        ...


@dataclass(frozen=True)
class Features:
    """A stage's inputs but anchors, examples 0 to N - 1.

    names: of the inputs. prefixes: of those that are features, by input name.
    segment_batch_size: the most examples that a segment takes at once.
    """

    dataset: Dataset
    names: frozenset[str]
    prefixes: Mapping[str, Prefix]
    segment_batch_size: int

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int] | Indices, views: Indices | None = None) -> dict[str, AnyArray]:
        """The stage's inputs by name, each `[B, *shape]`; features are float32.

        views: `[B]`, which view of each example, as in `Dataset.batch`; None where there are none.
        """
        examples = np.asarray(indices, np.int64)
        arrays = self.dataset.batch(examples, self.names - self.prefixes.keys(), views)
        for name, prefix in self.prefixes.items():
            arrays[name] = (
                self._computed(name, prefix, examples, views)
                if prefix.segments
                else self._stored(prefix.rows, examples, views)
            )
        return arrays

    def _stored(self, rows: Rows | None, examples: Indices, views: Indices | None) -> Array:
        assert rows is not None
        num_views = len(rows) // len(self)
        if num_views > 1:
            assert views is not None
            examples = examples * num_views + views
        return rows.read(examples, np.float32)

    def _computed(self, name: str, prefix: Prefix, examples: Indices, views: Indices | None) -> Array:
        return in_pieces(
            len(examples),
            self.segment_batch_size,
            lambda piece: self._piece(
                name, prefix, examples[piece], None if views is None else views[piece]
            ),
        )

    def _piece(self, name: str, prefix: Prefix, examples: Indices, views: Indices | None) -> Array:
        wanted = {one for segment in prefix.segments for one in segment.graph.inputs}
        if prefix.rows is None:
            arrays = self.dataset.batch(examples, wanted, views)
        else:
            arrays = self.dataset.batch(examples, wanted - {name}, views)
            arrays[name] = self._stored(prefix.rows, examples, views)
        for segment in prefix.segments:
            arrays[name] = segment.run(arrays, segment.parameters)[segment.graph.outputs[0]]
        features: Array = arrays[name]
        return features


def in_pieces(num_rows: int, at_once: int, make: Callable[[slice], Array]) -> Array:
    """What `make` makes of each piece of so many rows, in one array float32 `[num_rows, ...]`."""
    made: Array | None = None
    for first in range(0, num_rows, at_once):
        piece = slice(first, first + at_once)
        part = make(piece)
        if made is None:
            made = np.empty((num_rows, *part.shape[1:]), np.float32)
        made[piece] = part
    assert made is not None
    return made


def every_row(features: Features, name: str, num_views: int, stop: Event) -> Iterator[Array]:
    """The features `name` of all examples in pieces float32 `[B, T, D]`, in the order of `Prefix.rows`.

    num_views: of each example, 0 for the examples as they are. Raises `Stopped`.
    """
    num_rows = len(features) * max(1, num_views)
    for first in range(0, num_rows, features.segment_batch_size):
        if stop.is_set():
            raise Stopped
        rows = np.arange(first, min(first + features.segment_batch_size, num_rows))
        if num_views:
            yield features.batch(rows // num_views, rows % num_views)[name]
        else:
            yield features.batch(rows)[name]


def saturated(pieces: Iterable[Array], dtype: np.dtype[Any], what: str) -> Iterator[AnyArray]:
    """The pieces as `dtype`, float16 or float32. What is beyond its range becomes its largest number, which
    is logged: an infinity would make the block above NaN, while a very large value only counts as one.
    """
    largest = np.finfo(dtype).max
    num_beyond = 0
    for piece in pieces:
        num_beyond += int(np.count_nonzero(np.abs(piece) > largest))
        yield np.clip(piece, -largest, largest).astype(dtype)
    if num_beyond:
        log.warning(
            "%d values of %s are beyond %s and were cut; --feature-dtype float32 keeps them",
            *(num_beyond, what, dtype.name),
        )
