"""The global parameters from stage to stage, and the same ones again after a crash at any round."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_models import bundle, small

from aggregator.books import Books, Checkpoint
from aggregator.plan import RunPlan
from aggregator.state import State
from wire.compression import decompress_file, restore_file
from wire.errors import UserError
from wire.manifest import BlobRef, Manifest
from wire.messages import Change, Compression, RoundKey
from wire.store import Store
from wire.tensors import Arrays, pack, unpack_file

SCHEDULES = ("layerwise", "progressive", "end_to_end")
NUM_ROUNDS = {"layerwise": 6, "progressive": 6, "end_to_end": 2}
ROUNDS = [(schedule, count) for schedule in SCHEDULES for count in range(NUM_ROUNDS[schedule] + 1)]

Bits = dict[str, tuple[tuple[int, ...], str, bytes]]


@dataclass(frozen=True)
class Bundle:
    folder: Path
    manifest: Manifest

    @property
    def keys(self) -> list[RoundKey]:
        """Every round of a run."""
        stages = enumerate(self.manifest.stages)
        return [RoundKey(number, round_) for number, stage in stages for round_ in range(stage.rounds)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    made = {}
    for schedule in SCHEDULES:
        folder = tmp_path_factory.mktemp(schedule) / "bundle"
        made[schedule] = Bundle(folder, bundle(small(), folder, schedule).manifest)
    return made


@dataclass(frozen=True)
class Standing:
    """Where a run stands."""

    stage: int
    values: Bits
    parameters: BlobRef
    frozen: tuple[BlobRef, ...]
    change: Change | None

    @classmethod
    def of(cls, state: State) -> Standing:
        return cls(state.stage, bits(state.values), state.parameters, state.frozen, state.change)


def bits(arrays: Arrays) -> Bits:
    return {name: (array.shape, array.dtype.name, array.tobytes()) for name, array in arrays.items()}


class Run:
    """A run without clients: random updates, and the same ones in every run."""

    def __init__(
        self, bundle_: Bundle, folder: Path, compression: Compression = "none", **settings: Any
    ) -> None:
        self.bundle, self.manifest = bundle_, bundle_.manifest
        self.store = Store(folder / "blobs")
        self.books = Books(folder)
        plan = RunPlan(compression=compression, prefix_compression=compression, **settings)
        self.state = State(bundle_.folder, bundle_.manifest, self.store, plan)
        self.last = self.state.resume(self.books)

    def delta(self, key: RoundKey) -> Arrays:
        """What the updates of a round come to."""
        rng = np.random.default_rng([key.stage, key.round])
        return {
            name: np.asarray(rng.standard_normal(value.shape), np.float32)
            for name, value in self.state.trainable().items()
        }

    def result(self, key: RoundKey) -> Arrays:
        """The trained groups after a round."""
        delta = self.delta(key)
        return {
            name: np.asarray(value + delta[name].astype(np.float64), np.float32)
            for name, value in self.state.trainable().items()
        }

    def to_stage(self, stage: int) -> None:
        while self.state.stage < stage:
            self.state.next_stage()

    def round(self, key: RoundKey) -> Standing:
        self.to_stage(key.stage)
        replaced = self.state.update(self.delta(key), [key.stage, key.round])
        self.books.checkpoint(key, self.state.checkpoint(), (), 0.5, {}, 1.0)
        for ref in replaced:
            self.store.remove(ref)
        return Standing.of(self.state)

    def rounds(self, count: int) -> list[Standing]:
        """The next `count` rounds, and where the run stands after each."""
        done = len(self.books.rounds())
        return [self.round(key) for key in self.bundle.keys[done : done + count]]

    def ends(self) -> list[Checkpoint]:
        """Of each stage so far, its last round's."""
        return list({key.stage: done for key, done in self.books.rounds().items()}.values())

    def trained(self, ref: BlobRef, groups: tuple[str, ...]) -> Bits:
        """What the store holds."""
        return bits(unpack_file(self.store.path(ref), self.manifest.shapes_of(groups)))

    def now(self, groups: tuple[str, ...]) -> Bits:
        return bits({name: self.state.values[name] for name in self.manifest.names_of(groups)})

    def close(self) -> None:
        self.books.close()


Begin = Callable[..., Run]


@pytest.fixture
def begin(bundles: dict[str, Bundle], tmp_path: Path) -> Iterator[Begin]:
    """A run in a folder, or the one that is there already, as after a crash."""
    runs: list[Run] = []

    def begin(schedule: str, name: str = "run", compression: Compression = "none", **settings: Any) -> Run:
        runs.append(Run(bundles[schedule], tmp_path / name, compression, **settings))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def groups_of(manifest: Manifest) -> set[str]:
    return {parameter.group for parameter in manifest.parameters.values()}


# From stage to stage.


def test_a_run_starts_with_the_bundles_values(begin: Begin, schedule: str):
    run = begin(schedule)
    everything = {name: parameter.shape for name, parameter in run.manifest.parameters.items()}
    initial = bits(unpack_file(run.bundle.folder / run.manifest.initial, everything))
    assert Standing.of(run.state) == Standing(0, initial, run.state.parameters, (), None)
    assert list(run.state.values) == list(run.manifest.parameters)
    assert run.last is None


def test_the_trainable_groups_are_in_the_store_after_every_step(begin: Begin, schedule: str):
    run = begin(schedule)
    for key in run.bundle.keys:
        run.to_stage(key.stage)
        for step in (lambda: None, lambda key=key: run.round(key)):
            step()
            trainable = run.manifest.stages[key.stage].trainable
            assert bits(run.state.trainable()) == run.now(trainable)
            assert run.store.has(run.state.parameters)
            assert run.trained(run.state.parameters, trainable) == run.now(trainable)
            assert run.state.parameters == BlobRef.of(pack(run.state.trainable()))


def test_a_round_changes_the_trainable_groups_and_no_others(begin: Begin, schedule: str):
    run = begin(schedule)
    for key in run.bundle.keys:
        run.to_stage(key.stage)
        before, result = dict(bits(run.state.values)), bits(run.result(key))
        run.round(key)
        assert list(run.state.values) == list(run.manifest.parameters)
        assert bits(run.state.values) == {**before, **result}
        assert all(before[name] != after for name, after in result.items())


def test_the_blob_that_a_round_replaces_stays_until_it_is_removed(begin: Begin):
    run = begin("layerwise")
    before = run.state.parameters
    (replaced,) = run.state.update(run.delta(RoundKey(0, 0)), 0)
    assert replaced == before != run.state.parameters
    assert run.store.has(before)
    assert run.store.has(run.state.parameters)


def test_a_round_that_changes_nothing_keeps_its_blob(begin: Begin):
    run = begin("layerwise")
    still = {name: np.zeros_like(value) for name, value in run.state.trainable().items()}
    replaced = run.state.update(still, 0)  # at a learning rate of 0
    assert not replaced
    assert run.store.has(run.state.parameters)


@pytest.mark.parametrize("schedule", ["layerwise", "progressive"])
def test_new_blocks_start_as_copies_of_those_below(begin: Begin, schedule: str):
    run = begin(schedule)
    started = 0
    for stage in range(1, len(run.manifest.stages)):
        run.rounds(2)
        before = run.now(tuple(groups_of(run.manifest)))
        run.to_stage(stage)
        warm = run.manifest.stages[stage].warm_start
        copied = set()
        for group, source in warm.items():
            pairs = zip(run.manifest.names_of((group,)), run.manifest.names_of((source,)), strict=True)
            for name, below in pairs:
                copied.add(name)
                assert bits(run.state.values)[name] == before[below]
                assert not np.shares_memory(run.state.values[name], run.state.values[below])
        after = bits(run.state.values)
        assert {name for name in after if after[name] != before[name]} == copied
        started += len(warm)
    assert started == 3  # image has three blocks, text two


def test_a_copy_goes_its_own_way(begin: Begin):
    run = begin("progressive")
    run.rounds(2)
    run.to_stage(1)
    below = run.manifest.names_of(("image.block.0",))
    own = run.manifest.names_of(("image.block.1",))
    before = bits(run.state.values)
    run.state.update({name: np.ones_like(run.state.values[name]) for name in own}, 0)
    after = bits(run.state.values)
    assert all(after[name] == before[name] for name in below)
    run.state.values[own[0]][...] = 7  # even if it were changed in place
    assert bits(run.state.values)[below[0]] == before[below[0]]


def test_what_is_frozen_never_changes_again(begin: Begin):
    run = begin("layerwise")
    first = ("image.stem", "image.block.0", "text.stem", "text.block.0")
    run.rounds(2)
    done = run.now(first)
    run.rounds(2)
    second = run.now(("image.block.1", "text.block.1"))
    run.rounds(2)
    assert run.now(first) == done
    assert run.now(("image.block.1", "text.block.1")) == second


def test_frozen_holds_for_each_stage_what_it_froze(begin: Begin):
    run = begin("layerwise")
    for stage, groups in enumerate(
        [("image.stem", "image.block.0", "text.stem", "text.block.0"), ("image.block.1", "text.block.1")]
    ):
        assert len(run.state.frozen) == stage
        run.rounds(2)
        before = run.state.frozen
        run.to_stage(stage + 1)
        assert run.state.frozen[:-1] == before
        assert run.store.has(run.state.frozen[-1])
        assert run.trained(run.state.frozen[-1], groups) == run.now(groups)
    run.rounds(2)
    assert len(run.state.frozen) == 2
    assert all(run.store.has(ref) for ref in run.state.frozen)


def test_a_progressive_run_freezes_nothing(begin: Begin):
    run = begin("progressive")
    run.rounds(6)
    assert [run.trained(ref, ()) for ref in run.state.frozen] == [{}, {}]


def test_an_end_to_end_run_has_one_stage(begin: Begin):
    run = begin("end_to_end")
    run.rounds(2)
    assert (run.state.stage, run.state.frozen) == (0, ())
    assert set(run.manifest.stages[0].trainable) == groups_of(run.manifest)


def test_every_parameter_has_trained_in_the_end(begin: Begin, schedule: str):
    run = begin(schedule)
    before = bits(run.state.values)
    run.rounds(NUM_ROUNDS[schedule])
    after = bits(run.state.values)
    assert all(after[name] != before[name] for name in before)


# After a crash.


@pytest.mark.parametrize(("schedule", "count"), ROUNDS)
def test_a_run_that_was_killed_after_any_round_goes_on_as_if_it_had_not(
    begin: Begin, schedule: str, count: int
):
    whole = begin(schedule, "whole")
    expected = [Standing.of(whole.state), *whole.rounds(NUM_ROUNDS[schedule])]
    assert len({standing.parameters for standing in expected}) == len(expected)

    begin(schedule).rounds(count)
    resumed = begin(schedule)
    assert resumed.last == ([None, *resumed.bundle.keys][count])
    assert Standing.of(resumed.state) == expected[count]
    assert list(resumed.state.values) == list(resumed.manifest.parameters)
    assert resumed.store.has(resumed.state.parameters)
    assert all(resumed.store.has(ref) for ref in resumed.state.frozen)
    assert resumed.rounds(NUM_ROUNDS[schedule]) == expected[count + 1 :]


@pytest.mark.parametrize("schedule", ["layerwise", "progressive"])
@pytest.mark.parametrize("count", [2, 4])
def test_a_run_that_was_killed_when_a_stage_had_begun_goes_on(begin: Begin, schedule: str, count: int):
    whole = begin(schedule, "whole")
    expected = whole.rounds(6)

    killed = begin(schedule)
    killed.rounds(count)
    killed.state.next_stage()
    begun = Standing.of(killed.state)

    resumed = begin(schedule)
    assert Standing.of(resumed.state) == expected[count - 1]  # the books end with the stage before
    resumed.state.next_stage()
    assert Standing.of(resumed.state) == begun
    assert resumed.rounds(6) == expected[count:]


@pytest.mark.parametrize(("schedule", "count"), [(s, c) for s, c in ROUNDS if c < NUM_ROUNDS[s]])
def test_a_round_that_was_not_written_down_does_not_count(begin: Begin, schedule: str, count: int):
    killed = begin(schedule)
    killed.rounds(count)
    key = killed.bundle.keys[count]
    before = Standing.of(killed.state)
    killed.to_stage(key.stage)
    killed.state.update(killed.delta(key), 0)  # killed before the checkpoint

    resumed = begin(schedule)
    assert Standing.of(resumed.state) == before
    (again,) = resumed.rounds(1)
    assert again == Standing.of(killed.state)


def test_a_replaced_blob_that_was_not_removed_is_so_by_the_next_process(begin: Begin):
    killed = begin("layerwise")
    killed.rounds(1)
    (replaced,) = killed.state.update(killed.delta(RoundKey(0, 1)), 0)
    killed.books.checkpoint(RoundKey(0, 1), killed.state.checkpoint(), (), 0.5, {}, 1.0)
    resumed = begin("layerwise")
    assert not resumed.store.has(replaced)
    assert Standing.of(resumed.state) == Standing.of(killed.state)


def test_a_run_may_be_killed_again_and_again(begin: Begin, schedule: str):
    expected = begin(schedule, "whole").rounds(NUM_ROUNDS[schedule])
    got = [begin(schedule).rounds(1) for _ in range(NUM_ROUNDS[schedule])]
    assert [standing for one in got for standing in one] == expected


def test_what_was_frozen_is_made_again_where_it_is_lost(begin: Begin):
    killed = begin("layerwise")
    killed.rounds(6)
    frozen = killed.state.frozen
    killed.store.remove(frozen[0])
    killed.store.path(frozen[1]).write_bytes(b"damaged")
    resumed = begin("layerwise")
    assert resumed.state.frozen == frozen
    assert all(resumed.store.has(ref) for ref in frozen)


def lose(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


HARM = pytest.mark.parametrize("harm", [lose, empty, cut, flip])


@HARM
@pytest.mark.parametrize(("schedule", "stage"), [("layerwise", 0), ("layerwise", 2), ("progressive", 1)])
def test_a_lost_or_damaged_round_ends_the_run(
    begin: Begin, schedule: str, stage: int, harm: Callable[[Path], None]
):
    run = begin(schedule)
    run.rounds(6)
    path = run.store.path(run.books.rounds()[RoundKey(stage, 1)].parameters)
    harm(path)
    with pytest.raises(UserError, match=f"{path.name} is missing or damaged") as caught:
        begin(schedule)
    assert caught.value.hint


@HARM
def test_a_lost_or_damaged_bundle_is_the_users_to_mend(
    bundles: dict[str, Bundle], tmp_path: Path, harm: Callable[[Path], None]
):
    manifest = bundles["end_to_end"].manifest
    content = (bundles["end_to_end"].folder / manifest.initial).read_bytes()
    (tmp_path / manifest.initial).write_bytes(content)
    harm(tmp_path / manifest.initial)
    with pytest.raises(UserError):
        State(tmp_path, manifest, Store(tmp_path / "blobs"), RunPlan())


def test_the_store_holds_no_more_than_what_is_needed_to_go_on(begin: Begin):
    run = begin("layerwise")
    run.rounds(6)
    needed = {
        *(made.parameters.sha256 for key, made in run.books.rounds().items() if key.round == 1),
        *(ref.sha256 for ref in run.state.frozen),
    }
    on_disk = {path.name for path in run.store.path(run.state.parameters).parent.iterdir()}
    assert needed <= on_disk
    assert len(on_disk - needed) == 0


COMPRESSED: tuple[Compression, ...] = ("float16", "int8")


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("schedule", ["layerwise", "progressive"])
def test_a_compressed_run_goes_on_where_it_was_killed(
    begin: Begin, schedule: str, compression: Compression
):
    expected = begin(schedule, "whole", compression).rounds(NUM_ROUNDS[schedule])
    got = [begin(schedule, "run", compression).rounds(1)[0] for _ in range(NUM_ROUNDS[schedule])]
    assert got == expected


@pytest.mark.parametrize("compression", COMPRESSED)
def test_parameters_are_what_the_change_leads_to(begin: Begin, compression: Compression):
    run = begin("layerwise", "run", compression)
    assert run.state.change is None
    before, base = run.state.trainable(), run.state.parameters
    result = run.result(RoundKey(0, 0))
    run.state.update(run.delta(RoundKey(0, 0)), 0)
    change = run.state.change
    assert change is not None
    assert (change.base, change.result) == (base, run.state.parameters)
    shapes = run.manifest.shapes_of(run.manifest.stages[0].trainable)
    delta = decompress_file(run.store.path(change.change), shapes, compression)
    after = run.state.trainable()
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[name] + delta[name])
        step = np.abs(result[name] - before[name]).max() / {"float16": 2**10, "int8": 126}[compression]
        assert np.abs(value - result[name]).max() <= step
    replaced = run.state.update(run.delta(RoundKey(0, 1)), 1)
    assert replaced == {change.change, change.result}


@pytest.mark.parametrize("compression", COMPRESSED)
def test_a_change_that_is_lost_is_only_a_longer_way(begin: Begin, compression: Compression):
    killed = begin("layerwise", "run", compression)
    killed.rounds(1)
    assert killed.state.change is not None
    killed.store.remove(killed.state.change.change)
    resumed = begin("layerwise", "run", compression)
    assert resumed.state.change is None
    assert resumed.state.parameters == killed.state.parameters


@pytest.mark.parametrize("server_optimizer", ["none", "momentum", "adam"])
@pytest.mark.parametrize("compression", ["none", *COMPRESSED])
def test_a_round_that_leads_beyond_float32_changes_nothing(
    begin: Begin, compression: Compression, server_optimizer: str
):
    """However often, and what comes after is as if it had not been."""
    largest = float(np.finfo(np.float32).max)
    settings = {"server_optimizer": server_optimizer, "server_learning_rate": 2.0, "server_tau": 1e-6}
    run = begin("layerwise", "run", compression, **settings)
    other = begin("layerwise", "other", compression, **settings)
    for value in (largest, -largest):
        before = run.state.trainable()
        run.state.update({name: np.full_like(array, value) for name, array in before.items()}, 0)
        assert bits(run.state.trainable()) == bits(before)
    for one in (run, other):
        one.state.update(one.delta(RoundKey(0, 0)), 0)
    assert bits(run.state.trainable()) == bits(other.state.trainable())


@pytest.mark.parametrize("server_optimizer", ["momentum", "adagrad", "adam", "yogi"])
@pytest.mark.parametrize("compression", ["none", "int8"])
def test_moments_go_on_where_a_run_was_killed_and_end_with_their_stage(
    begin: Begin, compression: Compression, server_optimizer: str
):
    settings = {"server_optimizer": server_optimizer}
    expected = begin("progressive", "whole", compression, **settings).rounds(6)
    got = [begin("progressive", "run", compression, **settings).rounds(1)[0] for _ in range(6)]
    assert got == expected
    assert got != begin("progressive", "plain", compression).rounds(6)


def test_moments_that_are_lost_begin_anew(begin: Begin, caplog: pytest.LogCaptureFixture):
    killed = begin("layerwise", server_optimizer="momentum")
    killed.rounds(1)
    moments = killed.state.checkpoint().moments
    assert moments is not None
    killed.store.remove(moments)
    resumed = begin("layerwise", server_optimizer="momentum")
    assert "it begins anew" in caplog.text
    assert bits(resumed.state.values) == bits(killed.state.values)
    resumed.rounds(1)


@pytest.mark.parametrize("schedule", ["layerwise", "progressive"])
def test_moments_of_earlier_stages_are_neither_missed_nor_kept(
    begin: Begin, schedule: str, caplog: pytest.LogCaptureFixture
):
    for _ in range(3):
        run = begin(schedule, server_optimizer="momentum")
        run.rounds(2)
        checkpoint = run.state.checkpoint()
        assert checkpoint.moments is not None
        blobs = {path.name for path in (run.store.path(checkpoint.parameters).parent).iterdir()}
        kept = {done.parameters for done in run.ends()} | {checkpoint.moments, *run.state.frozen}
        assert blobs == {ref.sha256 for ref in kept}
    assert caplog.text == ""


@pytest.mark.parametrize("compression", COMPRESSED)
def test_what_is_frozen_is_what_travels(begin: Begin, compression: Compression):
    run = begin("layerwise", "run", compression)
    run.rounds(2)
    before = {name: value.copy() for name, value in run.state.values.items()}
    run.to_stage(1)
    shapes = run.manifest.shapes_of(run.manifest.groups_frozen_after(0))
    travelled = restore_file(run.store.path(run.state.frozen[0]), shapes, compression)
    assert bits(travelled) == {name: bits(run.state.values)[name] for name in travelled}
    errors = [np.abs(travelled[name] - before[name]).max() for name in travelled]
    largest = max(np.abs(before[name]).max() for name in travelled)
    assert 0 < max(errors) <= largest / 127
