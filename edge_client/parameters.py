"""The parameters that an offer names, fetched as cheaply as what is here already allows.

Rules: where updates travel compressed, the trained groups of the last offer stay in the store. The next
offer then brings a change to them, and a new stage's first values follow from the result
(`wire/stages.py`). What was made so counts only if it has the hash that the offer names, so nobody computes
with other values than the rest. Whatever cannot be made is fetched whole.

Next: `aggregator/state.py`, which does the same on the other side; `wire/compression.py`.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Protocol

from wire.compression import added, decompress_file, max_compressed_bytes, max_rounded_bytes, restore_file
from wire.errors import Malformed, PeerError
from wire.manifest import BlobRef, Manifest
from wire.messages import Offer
from wire.stages import advance
from wire.store import Store
from wire.tensors import Arrays, max_bytes, pack, unpack_file

SILENCE_S = 20.0
"""How long to wait for a change of which nothing comes: an aggregator that was killed has it no more."""

log = logging.getLogger(__name__)


class Fetcher(Protocol):
    """What is needed of `edge_client.link.Link`."""

    async def fetch(self, ref: BlobRef, max_bytes: int, silence_s: float = math.inf) -> Path:
        """A blob's file, from the store or the aggregator. Raises `Silent`, a `PeerError`."""
        ...


class Parameters:
    """Values by torch name, float32. All raise `PeerError` for what the offer names and cannot be had."""

    def __init__(self, manifest: Manifest, link: Fetcher, store: Store) -> None:
        self._manifest = manifest
        self._link = link
        self._store = store

    def needed(self, offer: Offer) -> set[BlobRef]:
        """What may still be of use of what earlier offers have left."""
        change = offer.change
        return {offer.parameters, *((change.base, change.change) if change else ())}

    async def prepare(self, offer: Offer) -> None:
        """Make what can be made from what is here; to be called first."""
        change = offer.change
        if change is None or self._store.has(offer.parameters) or not self._store.has(change.base):
            return
        begins = change.result != offer.parameters  # and the change is the stage before's
        if begins and offer.key.stage == 0:
            raise Malformed(f"the change of {offer.key} leads to other parameters")
        shapes = self._shapes(offer.key.stage - begins)
        limit = max_compressed_bytes(shapes, offer.plan.compression)
        try:
            path = await self._link.fetch(change.change, limit, SILENCE_S)
            delta = decompress_file(path, shapes, offer.plan.compression)
            values = added(unpack_file(self._store.path(change.base), shapes), delta)
        except PeerError as error:
            log.warning("%s: the change cannot be used: %s", offer.key, error)
            return
        finally:
            self._forget(change.change)
        if begins:
            self._advance(offer, values)
        else:
            self._put(pack(values), offer.parameters)

    async def trainable(self, offer: Offer) -> Arrays:
        """All that trains in the offer's stage."""
        shapes = self._shapes(offer.key.stage)
        path = await self._link.fetch(offer.parameters, max_bytes(shapes))
        values = unpack_file(path, shapes)
        if offer.change is not None and offer.change.base != offer.parameters:
            self._forget(offer.change.base)
        return values

    async def frozen(self, offer: Offer, stage: int) -> Arrays:
        """What was frozen after an earlier stage. It is not kept: it is needed once a stage."""
        shapes = self._manifest.shapes_of(self._manifest.groups_frozen_after(stage))
        ref, compression = offer.frozen[stage], offer.plan.prefix_compression
        path = await self._link.fetch(ref, max_rounded_bytes(shapes, compression))
        try:
            return restore_file(path, shapes, compression)
        finally:
            self._forget(ref)

    def _advance(self, offer: Offer, values: Arrays) -> None:
        """values: what the stage before ended with."""
        frozen = advance(self._manifest, offer.key.stage - 1, values, offer.plan.prefix_compression)
        self._put(frozen, offer.frozen[offer.key.stage - 1])
        names = self._shapes(offer.key.stage)
        if names.keys() <= values.keys():
            self._put(pack({name: values[name] for name in names}), offer.parameters)

    def _put(self, content: bytes, expected: BlobRef) -> None:
        if BlobRef.of(content) == expected:
            self._store.put(content)
        else:
            log.warning("%s is not what a change leads to: fetching it whole", expected.sha256[:16])

    def _forget(self, ref: BlobRef) -> None:
        """An offer decides this: it cannot take the bundle's own files away."""
        if ref not in self._manifest.files.values():
            self._store.remove(ref)

    def _shapes(self, stage: int) -> dict[str, tuple[int, ...]]:
        return self._manifest.shapes_of(self._manifest.stages[stage].trainable)
