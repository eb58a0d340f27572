"""The global parameters and where the run stands: made, moved on stage by stage, found again after a crash.

Rules: memory holds all parameters once. On disk are the bundle's initial values and, in the store, each
stage's trained groups after its last round so far, and the groups that each stage froze. Walking the
stages again over these gives the same parameters, bit for bit. Where changes travel compressed, the
parameters are what the compressed change leads to, so that everyone has the same; likewise what is frozen.

Next: `aggregator/run.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from aggregator.books import Books, Checkpoint
from aggregator.plan import RunPlan
from aggregator.server_optimizer import ServerOptimizer
from wire.compression import Seed, Shapes, added, compress, decompress
from wire.errors import UserError
from wire.manifest import BlobRef, Manifest
from wire.messages import Change, RoundKey
from wire.stages import advance
from wire.store import Store
from wire.tensors import Array, Arrays, pack, unpack_file

log = logging.getLogger(__name__)


class State:
    """values: torch name -> float32, every parameter. stage: the one that trains, from 0.

    frozen: for each stage before it, the values of the groups that it froze.
    change: how the last round's parameters became what they are, if that was compressed.
    """

    def __init__(self, bundle: Path, manifest: Manifest, store: Store, plan: RunPlan) -> None:
        self._plan = plan
        self._manifest = manifest
        self._store = store
        everything = {name: parameter.shape for name, parameter in manifest.parameters.items()}
        initial = bundle / manifest.initial
        if not initial.is_file() or BlobRef.of_file(initial) != manifest.files[manifest.initial]:
            raise UserError(f"{initial} is missing or damaged", "export the bundle once more")
        self.values: Arrays = unpack_file(initial, everything)
        self.stage = 0
        self.frozen: tuple[BlobRef, ...] = ()
        self.change: Change | None = None
        self.parameters = self._put(manifest.stages[0].trainable)
        """The stage's trainable groups as they are now, in the store."""
        self._optimizer = ServerOptimizer(plan, self.shapes)
        self._moments: BlobRef | None = None

    def resume(self, books: Books) -> RoundKey | None:
        """Go to where the books end. The last round that is done, None for none."""
        last: RoundKey | None = None
        ends: set[BlobRef] = set()
        done = books.rounds()
        for stage in range(len(self._manifest.stages)):
            rounds = [key for key in done if key.stage == stage]
            if not rounds:
                break
            if stage > self.stage:
                self.next_stage()
            last = max(rounds)
            self._load(done[last].parameters)
            ends.add(self.parameters)
        if last is not None:
            self._go_on(done[last])
        self._store.keep({*ends, *self.frozen, *self._blobs()})  # a killed process left what it was at
        return last

    def checkpoint(self) -> Checkpoint:
        """What `resume` needs of this round."""
        return Checkpoint(self.parameters, self.change, self._moments)

    def next_stage(self) -> None:
        """Freeze what the next stage does not train, and attach the next blocks, warm where so planned."""
        frozen = advance(self._manifest, self.stage, self.values, self._plan.prefix_compression)
        self.frozen = (*self.frozen, self._store.put(frozen))
        self.stage += 1
        self.parameters = self._put(self._trainable)
        self._optimizer = ServerOptimizer(self._plan, self.shapes)

    @property
    def shapes(self) -> Shapes:
        """Of what the stage trains."""
        return self._manifest.shapes_of(self._trainable)

    def trainable(self) -> Arrays:
        """The stage's trainable groups: torch name -> float32."""
        return {name: self.values[name] for name in self._manifest.names_of(self._trainable)}

    def update(
        self,
        delta: Mapping[str, Array],
        seed: Seed,
        calibrate: Callable[[Arrays], Arrays] | None = None,
    ) -> set[BlobRef]:
        """Take a round's combined update into the store. The blobs it replaces, to be removed after the
        checkpoint.

        seed: of the rounding of a compressed change. calibrate: the trained groups -> the same, better.
        Where it would leave float32, nothing changes.
        """
        before, now, moments = self._blobs(), self.trainable(), self._optimizer.state()
        values = self._optimizer.step(now, delta)
        if calibrate is not None:
            values = calibrate(values)
        change = self._change(now, values)
        new = (*values.items(), *change.items(), *self._optimizer.state().items())
        if bad := [name for name, value in new if not np.isfinite(value).all()]:
            log.warning(
                "the updates together lead beyond float32 in %s: this round changes nothing", bad[0]
            )
            values, change = now, self._change(now, now)
            self._optimizer.load(moments)
        if moments:
            self._moments = self._store.put(pack(self._optimizer.state()))
        if change:
            self._take(now, change, seed)
        else:
            self.values.update(values)
            self.parameters = self._put(self._trainable)
        return before - self._blobs()

    def _change(self, now: Arrays, values: Arrays) -> Arrays:
        """What would travel; nothing where parameters travel whole."""
        if self._plan.compression == "none":
            return {}
        with np.errstate(over="ignore", invalid="ignore"):
            return {name: values[name] - value for name, value in now.items()}

    def _take(self, now: Arrays, change: Arrays, seed: Seed) -> None:
        content = compress(change, self._plan.compression, seed)
        self.values.update(added(now, decompress(content, self.shapes, self._plan.compression)))
        base, self.parameters = self.parameters, self._put(self._trainable)
        self.change = Change(base, self._store.put(content), self.parameters)

    def _blobs(self) -> set[BlobRef]:
        change = self.change.change if self.change else None
        return {blob for blob in (self.parameters, change, self._moments) if blob is not None}

    @property
    def _trainable(self) -> tuple[str, ...]:
        return self._manifest.stages[self.stage].trainable

    def _put(self, groups: tuple[str, ...]) -> BlobRef:
        return self._store.put(pack({name: self.values[name] for name in self._manifest.names_of(groups)}))

    def _load(self, parameters: BlobRef) -> None:
        if not self._store.has(parameters):
            path = self._store.path(parameters)
            raise UserError(f"{path} is missing or damaged", "the run cannot go on: start it anew")
        self.values.update(unpack_file(self._store.path(parameters), self.shapes))
        self.parameters = parameters

    def _go_on(self, checkpoint: Checkpoint) -> None:
        """Take up what only the round after the last one needs."""
        change = checkpoint.change  # only a short cut: without it clients fetch the parameters whole
        if change is not None and self._store.has(change.change):
            self.change = change
        self._moments = moments = checkpoint.moments
        if moments is not None and self._store.has(moments):
            self._optimizer.load(unpack_file(self._store.path(moments), self._optimizer.shapes))
        elif moments is not None:
            log.warning("the server optimizer's moments are missing or damaged: it begins anew")
