"""Parameters from changes: the same as whole ones, which a client fetches where changes are of no use."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from small_world import PLAN, World

from aggregator.plan import RunPlan
from aggregator.state import State
from edge_client.parameters import Parameters
from wire.errors import Malformed, PeerError, Silent, TooLarge
from wire.manifest import BlobRef
from wire.messages import Change, Compression, Offer, RoundKey
from wire.store import Store
from wire.tensors import Arrays

COMPRESSED: tuple[Compression, ...] = ("float16", "int8")


class Side:
    """An aggregator that trains by itself, and one client: what it asks for goes into `fetched`."""

    def __init__(self, world: World, folder: Path, compression: Compression) -> None:
        self.world = world
        self.manifest = world.manifest
        self.plan = replace(PLAN, compression=compression, prefix_compression=compression)
        run = RunPlan(compression=compression, prefix_compression=compression)
        self.served = Store(folder / "aggregator")
        self.state = State(world.folder, world.manifest, self.served, run)
        self.store = Store(folder / "client")
        self.fetched: list[BlobRef] = []
        self.parameters = Parameters(world.manifest, self, self.store)
        self.key = RoundKey(0, 0)

    async def fetch(self, ref: BlobRef, max_bytes: int, silence_s: float = math.inf) -> Path:
        if ref.size_bytes > max_bytes:
            raise TooLarge("too large")
        if not self.store.has(ref) and not self.served.has(ref):
            assert silence_s < 60, "nobody has it, and we wait for ever"
            raise Silent("nothing comes")
        if not self.store.has(ref):
            self.fetched.append(ref)
            self.store.put(self.served.path(ref).read_bytes())
        return self.store.path(ref)

    def train(self) -> None:
        """A round of the aggregator's."""
        generator = np.random.default_rng([self.key.stage, self.key.round])
        delta = {
            name: generator.normal(0, 1e-3, value.shape).astype(np.float32)
            for name, value in self.state.trainable().items()
        }
        self.state.update(delta, [self.key.stage, self.key.round])
        self.key = RoundKey(self.key.stage, self.key.round + 1)

    def next_stage(self) -> None:
        self.state.next_stage()
        self.key = RoundKey(self.key.stage + 1, 0)

    def offer(self) -> Offer:
        state = self.state
        return Offer(
            self.key, 0.0, ("ann",), state.parameters, state.frozen, self.plan, 60.0, change=state.change
        )

    def take(self, offer: Offer | None = None, *, frozen: bool = True) -> set[BlobRef]:
        """Take an offer as a client does, see that all of it is right; what has been fetched for it."""
        offer = offer or self.offer()
        self.fetched.clear()

        self.store.keep(self.parameters.needed(offer))  # as a session does

        async def take() -> Arrays:
            await self.parameters.prepare(offer)
            values = await self.parameters.trainable(offer)
            for stage in range(offer.key.stage) if frozen else ():
                values |= await self.parameters.frozen(offer, stage)
            return values

        values = asyncio.run(take())
        for name, value in values.items():
            np.testing.assert_array_equal(value, self.state.values[name], err_msg=name)
        return set(self.fetched)

    def stored(self) -> set[str]:
        return {path.name for path in (self.store.path(self.state.parameters).parent).iterdir()}


Make = Callable[..., Side]


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Make:
    def make(compression: Compression, schedule: str = "layerwise") -> Side:
        world = World.of(tmp_path_factory, schedule=schedule, image_blocks=3, text_blocks=2)
        return Side(world, tmp_path, compression)

    return make


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("schedule", ["layerwise", "progressive"])
def test_after_the_first_offer_only_changes_travel(make: Make, schedule: str, compression: Compression):
    side = make(compression, schedule)
    assert side.take() == {side.state.parameters}
    for stage in range(3):
        for _ in range(2):
            side.train()
            assert side.take(frozen=False) == {side.state.change.change}
        if stage < 2:
            side.train()
            side.next_stage()
            # What is frozen, and where the new blocks start, follow from the last change.
            fetched = side.take(frozen=False)
            assert fetched == {side.state.change.change}
            assert side.stored() >= {side.state.parameters.sha256}


@pytest.mark.parametrize("compression", COMPRESSED)
def test_the_newest_frozen_groups_are_made_and_older_ones_fetched(make: Make, compression: Compression):
    side = make(compression)
    side.take()
    for _ in range(2):
        side.train()
        side.take(frozen=False)
        side.train()
        side.next_stage()
        last = side.take()
    assert last == {side.state.change.change, side.state.frozen[0]}
    assert side.stored() == {side.state.parameters.sha256}


def test_without_compression_all_is_fetched_and_only_the_newest_kept(make: Make):
    side = make("none")
    for _ in range(2):
        assert side.take() == {side.state.parameters}
        assert side.take() == set(), "the same offer, to a client that was killed"
        assert side.stored() == {side.state.parameters.sha256}
        side.train()
    side.next_stage()
    assert side.take() == {side.state.parameters, *side.state.frozen}
    assert side.stored() == {side.state.parameters.sha256}


def test_only_the_newest_parameters_are_kept(make: Make):
    side = make("int8")
    for _ in range(3):
        side.take()
        assert side.stored() == {side.state.parameters.sha256}
        side.train()


def test_who_was_away_for_a_round_fetches_whole_ones(make: Make):
    side = make("int8")
    side.take()
    side.train()
    side.train()
    assert side.take() == {side.state.parameters}
    side.train()
    assert side.take() == {side.state.change.change}


def test_a_restarted_client_goes_on_with_changes(make: Make):
    side = make("int8")
    side.take()
    side.train()
    side.parameters = Parameters(side.manifest, side, side.store)
    assert side.take() == {side.state.change.change}
    side.train()
    side.take()
    assert side.stored() == {side.state.parameters.sha256}


def test_the_same_offer_again_costs_nothing(make: Make):
    side = make("int8")
    side.take()
    side.train()
    side.take()
    assert side.take() == set()


def test_a_change_that_leads_elsewhere_does_not_count(make: Make, caplog: pytest.LogCaptureFixture):
    side = make("int8")
    side.take()
    side.train()
    honest = side.offer()
    side.train()
    other = side.state.change
    side.state.change = None
    lie = replace(honest, change=Change(honest.change.base, other.change, honest.change.result))
    side.fetched.clear()

    async def take() -> Arrays:
        await side.parameters.prepare(lie)
        return await side.parameters.trainable(replace(lie, parameters=side.state.parameters))

    values = asyncio.run(take())
    assert "fetching it whole" in caplog.text
    assert side.state.parameters in side.fetched
    assert all(np.array_equal(value, side.state.values[name]) for name, value in values.items())


@pytest.mark.parametrize("content", [b"", b"no change", bytes(1000)])
def test_a_damaged_change_is_fetched_whole(make: Make, content: bytes, caplog: pytest.LogCaptureFixture):
    side = make("int8")
    side.take()
    side.train()
    change = replace(side.state.change, change=side.served.put(content))
    assert side.take(replace(side.offer(), change=change)) == {change.change, side.state.parameters}
    assert "the change cannot be used" in caplog.text


def test_a_change_that_nobody_has_any_more_is_not_waited_for(make: Make, caplog: pytest.LogCaptureFixture):
    side = make("int8")
    side.take()
    side.train()
    offer = side.offer()
    side.served.remove(side.state.change.change)
    assert side.take(offer) == {side.state.parameters}
    assert "the change cannot be used: nothing comes" in caplog.text


def test_a_client_killed_while_it_trains_goes_on_with_changes(make: Make):
    side = make("int8")
    side.take()
    side.train()
    side.take()  # and is killed before there is a report
    side.parameters = Parameters(side.manifest, side, side.store)
    assert side.take() == set()
    side.train()
    assert side.take() == {side.state.change.change}


def test_an_offer_cannot_take_the_bundles_files_away(make: Make):
    side = make("int8")
    side.take()
    side.train()
    graph = side.manifest.files[side.manifest.initial]
    side.store.put((side.world.folder / side.manifest.initial).read_bytes())
    forged = replace(side.offer(), change=Change(graph, graph, side.state.parameters), frozen=(graph,))

    async def take() -> None:
        await side.parameters.prepare(forged)
        await side.parameters.trainable(forged)
        with pytest.raises(PeerError):
            await side.parameters.frozen(forged, 0)

    asyncio.run(take())
    assert side.store.has(graph)


def test_a_first_stage_that_follows_from_another_is_malformed(make: Make):
    side = make("int8")
    side.take()
    side.train()
    change = replace(side.state.change, result=BlobRef.of(b"other"))
    offer = replace(side.offer(), change=change)
    with pytest.raises(Malformed, match="leads to other"):
        asyncio.run(side.parameters.prepare(offer))


def test_blocks_that_start_fresh_are_fetched(tmp_path_factory: pytest.TempPathFactory, make: Make):
    side = make("int8")
    stages = tuple(replace(stage, warm_start={}) for stage in side.manifest.stages)
    side.manifest = replace(side.manifest, stages=stages)
    side.state._manifest = side.manifest
    side.parameters = Parameters(side.manifest, side, side.store)
    side.take()
    side.train()
    side.next_stage()
    assert side.take() == {side.state.change.change, side.state.parameters}
