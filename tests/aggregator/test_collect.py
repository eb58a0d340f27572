"""One round's updates without a network: what counts, what is refused and by which name, when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from msgspec.structs import replace

from aggregator.collect import Collection, Taken
from aggregator.combine import Update
from wire.errors import HashMismatch, PeerError, Silent, UserError
from wire.manifest import FORMAT, AdamW, BlobRef, Manifest, Parameter, Stage
from wire.messages import Offer, Report, RoundKey, TrainPlan
from wire.tensors import Arrays, max_bytes, pack

T = TypeVar("T")

PARAMETERS = {
    "image.stem.w": Parameter("image.stem", (4, 2)),
    "image.block.0.w": Parameter("image.block.0", (2, 3)),
    "image.block.0.b": Parameter("image.block.0", (3,)),
    "image.block.1.w": Parameter("image.block.1", (2, 3)),
    "image.block.1.b": Parameter("image.block.1", (3,)),
    "text.block.1.w": Parameter("text.block.1", (5,)),
    "head.scale": Parameter("head", ()),
}
KEY = RoundKey(1, 2)
GROUPS = ("image.block.1", "text.block.1", "head")
COHORT = ("ada", "ben", "cyd")
LARGEST = float(np.finfo(np.float32).max)


def stage(trainable: tuple[str, ...], frozen: tuple[str, ...] = ()) -> Stage:
    return Stage(trainable, frozen, 3, {}, {}, {}, {}, {}, {})


MANIFEST = Manifest(
    format=FORMAT,
    builder="models.presets:tiny",
    builder_options={},
    task="contrastive",
    schedule="layerwise",
    modalities={},
    classes=(),
    optimizer=AdamW(),
    max_batch_size=64,
    parameters=PARAMETERS,
    stages=(
        stage(("image.stem", "image.block.0", "head")),
        stage(GROUPS, ("image.stem", "image.block.0")),
        stage(("head",), ("image.stem", "image.block.0", "image.block.1", "text.block.1")),
    ),
    initial="initial.safetensors",
    files={"initial.safetensors": BlobRef.of(b"")},
)
SHAPES = MANIFEST.shapes_of(GROUPS)
START: Arrays = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


def offer(**changes: Any) -> Offer:
    fields = {
        "key": KEY,
        "opened_s": 1.7e9,
        "cohort": COHORT,
        "parameters": BlobRef.of(pack(START)),
        "frozen": (BlobRef.of(b"frozen"),),
        "plan": TrainPlan(learning_rate=1e-3, batch_size=32, local_epochs=1, seed=0),
        "deadline_s": 60.0,
    }
    return Offer(**{**fields, **changes})


def delta(seed: int = 0, groups: tuple[str, ...] = GROUPS) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = MANIFEST.shapes_of(groups)
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}


class Past:
    """Earlier rounds."""

    def __init__(self) -> None:
        self.cohorts: dict[RoundKey, tuple[str, ...]] = {}
        self.updates: dict[tuple[str, RoundKey], BlobRef] = {}

    def cohort(self, key: RoundKey) -> tuple[str, ...]:
        return self.cohorts.get(key, ())

    def counted(self, client: str, key: RoundKey) -> BlobRef | None:
        return self.updates.get((client, key))


class Round:
    """A collection and the uploads it fetches."""

    def __init__(self, folder: Path, goal: int | None = None, **changes: Any) -> None:
        self._folder = folder
        self._uploads: dict[BlobRef, bytes | Exception] = {}
        self.held: dict[str, asyncio.Event] = {}
        self.fetched: list[tuple[str, BlobRef]] = []
        self.past = Past()
        self.collection = Collection(MANIFEST, offer(**changes), self._fetch, self.past, goal)

    async def _fetch(self, client: str, ref: BlobRef) -> Path:
        self.fetched.append((client, ref))
        if client in self.held:
            await self.held[client].wait()
        upload = self._uploads[ref]
        if isinstance(upload, Exception):
            raise upload
        path = self._folder / f"{client}-{ref.sha256[:16]}"
        path.write_bytes(upload)
        return path

    def report(self, arrays: Mapping[str, Any] | bytes | None = None, **changes: Any) -> Report:
        """A report of an update that can be fetched."""
        content = arrays if isinstance(arrays, bytes) else pack(delta() if arrays is None else arrays)
        update = BlobRef.of(content)
        self._uploads.setdefault(update, content)
        fields = {"key": KEY, "update": update, "groups": GROUPS, "num_examples": 10, "loss": 0.5}
        return Report(**{**fields, **changes})

    def failing(self, error: Exception, seed: int = 0) -> Report:
        """A report of an update whose fetch ends in `error`."""
        report = self.report(delta(seed))
        self._uploads[report.update] = error
        return report

    def mended(self, report: Report, seed: int = 0) -> None:
        """From now on the update of a `failing` report can be fetched."""
        self._uploads[report.update] = pack(delta(seed))

    def hold(self, client: str) -> None:
        """The client's uploads wait until `release`."""
        self.held[client] = asyncio.Event()

    def release(self, client: str) -> None:
        self.held.pop(client).set()

    async def refused(self, client: str, report: Report, reason: str, match: str | None = None) -> None:
        before = dict(self.collection.accepted)
        with pytest.raises(PeerError, match=match) as caught:
            await self.collection.take(client, report)
        assert caught.value.reason == reason
        assert self.collection.accepted == before


def run(story: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(story, 20)

    return asyncio.run(bounded())


async def settle() -> None:
    """Let everything go on that does not wait."""
    for _ in range(10):
        await asyncio.sleep(0)


async def answered(collection: Collection) -> bool:
    """Whether `until_complete` returns now."""
    waiting = asyncio.ensure_future(collection.until_complete())
    await settle()
    done = waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    return done


def bits(updates: list[Update]) -> list[Any]:
    return [
        (update.client, update.num_examples, [(name, a.tobytes()) for name, a in update.delta.items()])
        for update in updates
    ]


@pytest.fixture
def round_(tmp_path: Path) -> Round:
    return Round(tmp_path)


# What counts.


def test_a_report_is_accepted_once(round_: Round):
    async def story() -> None:
        report = round_.report()
        assert await round_.collection.take("ben", report) is Taken.COUNTS
        assert round_.collection.accepted == {("ben", 2): report}
        for _ in range(2):
            assert await round_.collection.take("ben", report) is Taken.COUNTED
        assert round_.collection.accepted == {("ben", 2): report}
        assert round_.fetched == [("ben", report.update)]

    run(story())


def test_a_report_that_comes_again_while_its_update_is_fetched_is_no_other(round_: Round):
    async def story() -> None:
        report = round_.report()
        round_.hold("ben")
        first = asyncio.ensure_future(round_.collection.take("ben", report))
        await settle()
        assert await round_.collection.take("ben", report) is Taken.COMING
        assert round_.collection.accepted == {}
        round_.release("ben")
        assert await first is Taken.COUNTS
        assert round_.collection.accepted == {("ben", 2): report}
        assert round_.fetched == [("ben", report.update)]

    run(story())


def test_clients_are_fetched_side_by_side(round_: Round):
    async def story() -> None:
        round_.hold("ada")
        first = asyncio.ensure_future(round_.collection.take("ada", round_.report(delta(1))))
        await settle()
        assert await round_.collection.take("ben", round_.report(delta(2)))
        assert list(round_.collection.accepted) == [("ben", 2)]
        round_.release("ada")
        assert await first
        assert list(round_.collection.accepted) == [("ben", 2), ("ada", 2)]

    run(story())


def test_two_clients_may_have_equal_updates(round_: Round):
    async def story() -> None:
        report = round_.report()
        assert await round_.collection.take("ada", report)
        assert await round_.collection.take("ben", report)
        assert [update.client for update in round_.collection.updates()] == ["ada", "ben"]

    run(story())


@pytest.mark.parametrize("num_examples", [1, 2**63 - 1])
@pytest.mark.parametrize("loss", [0.0, -3.5, 1e30])
def test_any_weight_and_any_finite_loss_count(round_: Round, num_examples: int, loss: float):
    report = round_.report(num_examples=num_examples, loss=loss)
    assert run(round_.collection.take("ada", report))
    assert round_.collection.loss == pytest.approx(loss)


def test_updates_are_sorted_by_client_whichever_came_first(round_: Round):
    async def story() -> None:
        for number, client in enumerate(("cyd", "ada", "ben")):
            await round_.collection.take(client, round_.report(delta(number), num_examples=number + 1))

    run(story())
    expected = [Update("ada", delta(1), 2), Update("ben", delta(2), 3), Update("cyd", delta(0), 1)]
    assert bits(list(round_.collection.updates())) == bits(expected)
    assert bits(list(round_.collection.updates())) == bits(expected)  # as often as one likes


def test_an_update_of_some_groups_has_those_and_in_manifest_order(round_: Round):
    async def story() -> None:
        for client, groups in [("ada", ("head", "image.block.1")), ("ben", ("text.block.1",))]:
            await round_.collection.take(client, round_.report(delta(0, groups), groups=groups))

    run(story())
    ada, ben = round_.collection.updates()
    assert list(ada.delta) == ["image.block.1.w", "image.block.1.b", "head.scale"]
    assert list(ben.delta) == ["text.block.1.w"]
    assert ada.delta["head.scale"].shape == ()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_loss_is_the_same_bit_for_bit_whoever_comes_first(round_: Round, order: tuple[int, ...]):
    async def story() -> None:
        for place in order:
            report = round_.report(delta(place), num_examples=3, loss=(0.1, 0.7, 1e-9)[place])
            await round_.collection.take(("ada", "ben", "cyd")[place], report)

    run(story())
    third = 3 / 9
    assert round_.collection.loss == 0.1 * third + 0.7 * third + 1e-9 * third


def test_the_loss_is_weighted_by_examples(round_: Round):
    async def story() -> None:
        for client, loss, num_examples in [("ada", 1.0, 1), ("ben", 3.0, 3), ("cyd", -2.0, 4)]:
            await round_.collection.take(client, round_.report(loss=loss, num_examples=num_examples))

    run(story())
    assert round_.collection.loss == (1.0 * 1 + 3.0 * 3 - 2.0 * 4) / 8


@pytest.mark.parametrize("losses", [(1e290, 1e290), (1e290, -1e290)])
def test_the_mean_of_wild_losses_is_finite(round_: Round, losses: tuple[float, float]):
    async def story() -> None:
        for client, loss in zip(("ada", "ben"), losses, strict=True):
            await round_.collection.take(client, round_.report(loss=loss, num_examples=2**62))

    run(story())
    assert np.isfinite(round_.collection.loss)


def test_missing_are_those_of_the_cohort_that_have_not_been_accepted(round_: Round):
    async def story() -> None:
        assert round_.collection.missing == COHORT
        await round_.collection.take("ben", round_.report())
        await round_.refused("ada", round_.report(num_examples=0), "zero_examples")
        assert round_.collection.missing == ("ada", "cyd")
        await round_.collection.take("ada", round_.report())
        await round_.collection.take("cyd", round_.report())
        assert round_.collection.missing == ()

    run(story())


# What is refused.


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (RoundKey(1, 1), "late"),
        (RoundKey(1, 0), "late"),
        (RoundKey(0, 2), "late"),
        (RoundKey(0, 9), "late"),
        (RoundKey(2, 0), "wrong_stage"),
        (RoundKey(2, 2), "wrong_stage"),
        (RoundKey(99, 0), "wrong_stage"),
        (RoundKey(2**63 - 1, 2**63 - 1), "wrong_stage"),
        (RoundKey(1, 3), "wrong_round"),
        (RoundKey(1, 2**63 - 1), "wrong_round"),
    ],
)
def test_a_report_about_another_round_is_refused(round_: Round, key: RoundKey, reason: str):
    async def story() -> None:
        await round_.refused("ada", round_.report(key=key), reason, f"^{key} ")
        assert await round_.collection.take("ada", round_.report())
        await round_.refused("ada", round_.report(key=key), reason)  # though ada has been accepted

    run(story())
    assert len(round_.fetched) == 1


def test_a_report_after_the_end_is_late_unless_it_has_been_accepted(round_: Round):
    async def story() -> None:
        report = round_.report()
        await round_.collection.take("ada", report)
        round_.collection.close()
        await round_.refused("ben", report, "late", "is over")
        await round_.refused("dan", report, "late", "is over")
        assert await round_.collection.take("ada", report) is Taken.COUNTED
        await round_.refused("ada", round_.report(delta(1)), "duplicate")
        assert [update.client for update in round_.collection.updates()] == ["ada"]

    run(story())
    assert len(round_.fetched) == 1


def test_a_report_whose_update_comes_in_after_the_end_is_late(round_: Round):
    async def story() -> None:
        round_.hold("ben")
        await round_.collection.take("ada", round_.report(delta(1)))
        late = asyncio.ensure_future(round_.refused("ben", round_.report(), "late", "is over"))
        await settle()
        assert len(round_.fetched) == 2
        round_.collection.close()
        assert await round_.collection.take("ada", round_.report(delta(1))) is Taken.COUNTED
        await round_.refused("ben", round_.report(), "late", "is over")
        round_.release("ben")
        await late
        assert list(round_.collection.accepted) == [("ada", 2)]
        assert [update.client for update in round_.collection.updates()] == ["ada"]

    run(story())


@pytest.mark.parametrize("client", ["dan", "", "Ada", "ada "])
def test_a_client_that_was_not_asked_is_refused(round_: Round, client: str):
    run(round_.refused(client, round_.report(), "not_selected"))
    assert round_.fetched == []


def test_another_update_while_the_first_is_fetched_is_a_duplicate(round_: Round):
    async def story() -> None:
        round_.hold("ada")
        first = asyncio.ensure_future(round_.collection.take("ada", round_.report(delta(1))))
        await settle()
        await round_.refused("ada", round_.report(delta(2)), "duplicate")
        round_.release("ada")
        assert await first is Taken.COUNTS
        assert bits(list(round_.collection.updates())) == bits([Update("ada", delta(1), 10)])

    run(story())
    assert len(round_.fetched) == 1


def test_another_update_after_the_first_was_accepted_is_a_duplicate(round_: Round):
    async def story() -> None:
        first = round_.report(delta(1))
        await round_.collection.take("ada", first)
        await round_.refused("ada", round_.report(delta(2)), "duplicate", "another update of ada")
        assert round_.collection.accepted == {("ada", 2): first}
        assert bits(list(round_.collection.updates())) == bits([Update("ada", delta(1), 10)])

    run(story())
    assert len(round_.fetched) == 1


@pytest.mark.parametrize(
    ("changes", "reason", "match"),
    [
        ({"num_examples": 0}, "zero_examples", "no weight"),
        ({"num_examples": -1}, "zero_examples", "no weight"),
        ({"loss": float("nan")}, "not_finite", "the loss is nan"),
        ({"loss": float("inf")}, "not_finite", "the loss is inf"),
        ({"loss": float("-inf")}, "not_finite", "the loss is -inf"),
        ({"groups": ()}, "wrong_shape", "no group"),
        ({"groups": ("head", "head")}, "wrong_shape", "one twice"),
        ({"groups": (*GROUPS, "image.block.1")}, "wrong_shape", "one twice"),
        ({"groups": (*GROUPS, "image.block.0")}, "wrong_shape", "image.block.0 does not train in stage 2"),
        ({"groups": ("image.stem",)}, "wrong_shape", "image.stem does not train in stage 2"),
        ({"groups": ("nonsense", "head")}, "wrong_shape", "nonsense does not train"),
        ({"groups": ("image.block",)}, "wrong_shape", "image.block does not train"),
        ({"groups": ("",)}, "wrong_shape", "does not train"),
    ],
)
def test_a_report_that_cannot_count_is_refused_before_anything_is_fetched(
    round_: Round, changes: dict[str, Any], reason: str, match: str
):
    async def story() -> None:
        await round_.refused("ada", round_.report(**changes), reason, match)
        assert round_.fetched == []
        assert await round_.collection.take("ada", round_.report())  # it may try again

    run(story())


def test_an_update_that_says_it_is_too_large_is_not_fetched(round_: Round):
    limit = max_bytes(SHAPES)

    async def story() -> None:
        for size in (limit + 1, 2**63 - 1):
            too_large = replace(round_.report(), update=BlobRef("0" * 64, size))
            await round_.refused("ada", too_large, "too_large", f"^{size} bytes, at most {limit}")
        part = round_.report(delta(), groups=("head",))
        fits = replace(part, update=BlobRef("0" * 64, limit))
        await round_.refused("ada", fits, "too_large")  # the limit is that of the groups it names
        assert round_.fetched == []
        await round_.refused("ada", round_.report(b"?" * limit), "malformed")
        assert len(round_.fetched) == 1

    run(story())


def without(name: str) -> Arrays:
    return {other: value for other, value in delta().items() if other != name}


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        without("head.scale"),
        {**delta(), "image.block.0.b": np.zeros(3, np.float32)},
        {**without("head.scale"), "head.scal": np.zeros((), np.float32)},
        {**delta(), "head.scale": np.zeros(1, np.float32)},
        {**delta(), "image.block.1.w": np.zeros((3, 2), np.float32)},
        {**delta(), "image.block.1.w": np.zeros(6, np.float32)},
        {**delta(), "text.block.1.w": np.zeros(0, np.float32)},
    ],
    ids=["none", "missing", "extra", "renamed", "dimension", "transposed", "flat", "empty"],
)
def test_other_tensors_than_those_of_the_groups_are_refused(round_: Round, arrays: Arrays):
    run(round_.refused("ada", round_.report(arrays), "wrong_shape"))


def test_fewer_and_more_groups_than_named_are_refused(round_: Round):
    async def story() -> None:
        await round_.refused("ada", round_.report(delta(0, ("head",))), "wrong_shape", "missing")
        more = round_.report(delta(0, ("head", "text.block.1")), groups=("head",))
        await round_.refused("ada", more, "wrong_shape", "not of this stage")

    run(story())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["image.block.1.w", "head.scale"])
def test_tensors_that_are_not_finite_are_refused(round_: Round, name: str, value: float):
    arrays = delta()
    arrays[name][...] = np.where(np.arange(arrays[name].size).reshape(arrays[name].shape) == 0, value, 1)
    run(round_.refused("ada", round_.report(arrays), "not_finite", f"^{name} holds NaN or infinity"))


@pytest.mark.parametrize(
    "content", [b"", b"no tensors", b"\x80\x04\x95" + bytes(40), pack(delta())[:-1], pack(delta()) + b"\0"]
)
def test_what_is_not_safetensors_is_refused(round_: Round, content: bytes):
    run(round_.refused("ada", round_.report(content), "malformed"))


def test_content_that_is_not_what_was_announced_is_refused(round_: Round):
    async def story() -> None:
        report = round_.failing(HashMismatch("the content is another"))
        await round_.refused("ada", report, "hash_mismatch")
        round_.mended(report)
        assert await round_.collection.take("ada", report) is Taken.COUNTS

    run(story())
    assert len(round_.fetched) == 2


def test_whoever_was_refused_may_try_again_at_once(round_: Round):
    async def story() -> None:
        await round_.refused("ada", round_.report(b"no tensors"), "malformed")
        await round_.refused("ada", round_.report(b"no tensors"), "malformed")
        assert await round_.collection.take("ada", round_.report()) is Taken.COUNTS

    run(story())


def test_a_full_disk_is_not_the_clients_fault(round_: Round):
    async def story() -> None:
        report = round_.failing(UserError("no space left"))
        with pytest.raises(UserError):
            await round_.collection.take("ada", report)
        round_.mended(report)
        assert await round_.collection.take("ada", report) is Taken.COUNTS

    run(story())


# When it ends.


def test_a_round_is_answered_when_each_client_has_been_accepted_or_refused(round_: Round):
    async def story() -> None:
        waiting = asyncio.ensure_future(round_.collection.until_complete())
        await settle()
        await round_.collection.take("ben", round_.report())
        await round_.collection.take("ben", round_.report())
        await round_.refused("ada", round_.report(num_examples=0), "zero_examples")
        await round_.refused("dan", round_.report(), "not_selected")
        round_.hold("cyd")
        last = asyncio.ensure_future(round_.collection.take("cyd", round_.report()))
        await settle()
        assert not waiting.done()
        round_.release("cyd")
        await last
        await settle()
        assert waiting.done()
        assert await answered(round_.collection)

    run(story())


def test_a_round_in_which_all_are_refused_is_answered(round_: Round):
    async def story() -> None:
        for number, client in enumerate(COHORT):
            assert not await answered(round_.collection)
            await round_.refused(client, round_.report(b"%d" % number), "malformed")
        assert await answered(round_.collection)
        assert round_.collection.missing == COHORT

    run(story())


@pytest.mark.parametrize("key", [RoundKey(1, 1), RoundKey(0, 2), RoundKey(1, 3), RoundKey(2, 2)])
def test_reports_about_other_rounds_answer_nothing(round_: Round, key: RoundKey):
    async def story() -> None:
        await round_.collection.take("ada", round_.report())
        for client in COHORT:
            with pytest.raises(PeerError):
                await round_.collection.take(client, round_.report(key=key))
        assert not await answered(round_.collection)
        assert round_.collection.missing == ("ben", "cyd")

    run(story())


def test_a_duplicate_of_an_accepted_client_answers_for_nobody_else(round_: Round):
    async def story() -> None:
        await round_.collection.take("ada", round_.report(delta(1)))
        await round_.refused("ada", round_.report(delta(2)), "duplicate")
        await round_.collection.take("ben", round_.report())
        assert not await answered(round_.collection)

    run(story())


def test_silence_leaves_no_trace(round_: Round):
    async def story() -> None:
        silent = round_.failing(Silent("ada has sent nothing for 20 s"), seed=1)
        with pytest.raises(Silent):
            await round_.collection.take("ada", silent)
        assert round_.collection.accepted == {}
        assert round_.collection.missing == COHORT
        assert (
            await round_.collection.take("ada", round_.report(delta(2))) is Taken.COUNTS
        )  # not a duplicate

    run(story())


def test_a_silent_client_may_report_the_same_again(round_: Round):
    async def story() -> None:
        report = round_.failing(Silent("ada has sent nothing for 20 s"))
        for _ in range(2):
            with pytest.raises(Silent):
                await round_.collection.take("ada", report)
        round_.mended(report)
        assert await round_.collection.take("ada", report) is Taken.COUNTS

    run(story())
    assert len(round_.fetched) == 3


def test_a_silent_client_has_not_been_answered(round_: Round):
    async def story() -> None:
        report = round_.failing(Silent("ada has sent nothing for 20 s"), seed=1)
        with pytest.raises(Silent):
            await round_.collection.take("ada", report)
        await round_.collection.take("ben", round_.report())
        await round_.collection.take("cyd", round_.report())
        assert not await answered(round_.collection)
        round_.mended(report, seed=1)
        await round_.collection.take("ada", report)
        assert await answered(round_.collection)

    run(story())


def test_a_duplicate_does_not_end_the_round_while_the_first_is_fetched(round_: Round):
    async def story() -> None:
        round_.hold("ada")
        first = asyncio.ensure_future(round_.collection.take("ada", round_.report(delta(1))))
        await settle()
        await round_.collection.take("ben", round_.report())
        await round_.collection.take("cyd", round_.report())
        await round_.refused("ada", round_.report(delta(2)), "duplicate")
        assert not await answered(round_.collection)
        round_.release("ada")
        assert await first
        assert await answered(round_.collection)

    run(story())


def test_a_refused_client_that_tries_again_is_waited_for(round_: Round):
    async def story() -> None:
        await round_.refused("ada", round_.report(b"no tensors"), "malformed")
        await round_.collection.take("ben", round_.report())
        round_.hold("ada")
        again = asyncio.ensure_future(round_.collection.take("ada", round_.report(delta(1))))
        await settle()
        await round_.collection.take("cyd", round_.report())
        assert not await answered(round_.collection)
        round_.release("ada")
        assert await again
        assert await answered(round_.collection)

    run(story())


def test_a_round_that_is_offered_again_keeps_the_accepted_and_lets_the_refused_try(round_: Round):
    async def story() -> None:
        kept = round_.report(delta(1))
        await round_.collection.take("ada", kept)
        await round_.refused("ben", round_.report(b"no tensors"), "malformed")
        await round_.refused("cyd", round_.report(b"no tensors"), "malformed")
        assert await answered(round_.collection)

        round_.collection.again(offer(cohort=("ada", "ben", "dan"), opened_s=1.8e9))
        assert round_.collection.offer.cohort == ("ada", "ben", "dan")
        assert round_.collection.missing == ("ben", "dan")
        assert round_.collection.accepted == {("ada", 2): kept}
        assert not await answered(round_.collection)

        await round_.refused("cyd", round_.report(delta(3)), "not_selected")
        assert await round_.collection.take("ada", kept) is Taken.COUNTED
        assert await round_.collection.take("dan", round_.report(delta(4))) is Taken.COUNTS
        assert not await answered(round_.collection)  # that ben was refused is forgotten
        assert await round_.collection.take("ben", round_.report(delta(2))) is Taken.COUNTS
        assert await answered(round_.collection)
        assert [update.client for update in round_.collection.updates()] == ["ada", "ben", "dan"]

    run(story())


def test_an_update_that_is_fetched_while_the_round_is_offered_again_counts(round_: Round):
    async def story() -> None:
        round_.hold("ada")
        first = asyncio.ensure_future(round_.collection.take("ada", round_.report(delta(1))))
        await settle()
        round_.collection.again(offer(cohort=("ada", "ben")))
        assert await round_.collection.take("ben", round_.report(delta(2)))
        assert not await answered(round_.collection)
        round_.release("ada")
        assert await first is Taken.COUNTS
        assert await answered(round_.collection)

    run(story())


def test_a_fetch_that_is_broken_off_leaves_no_trace(round_: Round):
    async def story() -> None:
        round_.hold("ada")
        fetching = asyncio.ensure_future(round_.collection.take("ada", round_.report(delta(1))))
        await settle()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        assert round_.collection.missing == COHORT
        round_.release("ada")
        assert await round_.collection.take("ada", round_.report(delta(2))) is Taken.COUNTS

    run(story())


# Enough is enough.


def test_a_round_is_complete_with_as_many_as_are_wanted(tmp_path: Path):
    round_ = Round(tmp_path, goal=2)

    async def story() -> None:
        await round_.collection.take("cyd", round_.report(delta(1)))
        assert not await answered(round_.collection)
        await round_.collection.take("ada", round_.report(delta(2)))
        assert await answered(round_.collection)
        assert round_.collection.missing == ("ben",)
        await round_.collection.take("ben", round_.report(delta(3)))  # still open, so it counts
        assert round_.collection.clients == COHORT

    run(story())


def test_a_round_whose_clients_have_all_been_answered_waits_for_no_more(tmp_path: Path):
    round_ = Round(tmp_path, goal=5)

    async def story() -> None:
        for client in COHORT:
            assert not await answered(round_.collection)
            await round_.collection.take(client, round_.report())
        assert await answered(round_.collection)

    run(story())


# After a restart.


def test_what_was_accepted_before_a_restart_counts_and_is_not_fetched_again(tmp_path: Path):
    killed = Round(tmp_path)
    reports = {"ada": killed.report(delta(1)), "ben": killed.report(delta(2), num_examples=3)}

    async def story() -> None:
        for client, report in reports.items():
            await killed.collection.take(client, report)
        updates = bits(list(killed.collection.updates()))
        before = {
            (client, 2): (report, tmp_path / f"{client}-{report.update.sha256[:16]}")
            for client, report in reports.items()
        }
        round_ = Round(tmp_path)
        round_.collection = Collection(MANIFEST, offer(), round_._fetch, round_.past, None, before)
        assert (round_.collection.clients, round_.collection.missing) == (("ada", "ben"), ("cyd",))
        assert bits(list(round_.collection.updates())) == updates
        assert round_.collection.loss == killed.collection.loss
        assert await round_.collection.take("ada", reports["ada"]) is Taken.COUNTED
        await round_.refused("ben", round_.report(delta(3)), "duplicate")
        assert round_.fetched == []
        assert not await answered(round_.collection)
        await round_.collection.take("cyd", round_.report())
        assert await answered(round_.collection)

    run(story())


def test_a_round_that_had_everything_is_complete_at_once(tmp_path: Path):
    round_ = Round(tmp_path)
    before = {(client, 2): (round_.report(delta(n)), tmp_path / client) for n, client in enumerate(COHORT)}
    round_.collection = Collection(MANIFEST, offer(), round_._fetch, round_.past, None, before)
    assert run(answered(round_.collection))


@pytest.mark.parametrize("key", [RoundKey(1, 1), RoundKey(0, 9)])
def test_an_update_that_has_counted_in_an_earlier_round_is_told_so_again(round_: Round, key: RoundKey):
    async def story() -> None:
        report = round_.report(key=key)
        round_.past.updates["ada", key] = report.update
        assert await round_.collection.take("ada", report) is Taken.COUNTED
        await round_.refused("ada", round_.report(delta(1), key=key), "duplicate")
        await round_.refused("ben", report, "late")
        assert round_.collection.accepted == {}

    run(story())


# Updates that come late and may.


def stale(folder: Path, max_staleness: int = 2) -> Round:
    plan = replace(offer().plan, max_staleness=max_staleness)
    round_ = Round(folder, plan=plan)
    for number in range(3):
        round_.past.cohorts[RoundKey(1, number)] = COHORT
        round_.past.cohorts[RoundKey(0, number)] = COHORT
    return round_


def test_an_update_of_an_earlier_round_counts_with_its_staleness(tmp_path: Path):
    round_ = stale(tmp_path)

    async def story() -> None:
        for number, client in enumerate(COHORT):
            report = round_.report(delta(number), key=RoundKey(1, number))
            assert await round_.collection.take(client, report) is Taken.COUNTS
            assert await round_.collection.take(client, report) is Taken.COUNTED
        assert {update.client: update.staleness for update in round_.collection.updates()} == {
            "ada": 2,
            "ben": 1,
            "cyd": 0,
        }
        assert not await answered(round_.collection)  # ada and ben may train for this one too
        await round_.collection.take("ada", round_.report(delta(4)))
        assert [update.client for update in round_.collection.updates()] == ["ada", "ada", "ben", "cyd"]
        await round_.refused("ada", round_.report(delta(5), key=RoundKey(1, 0)), "duplicate")

    run(story())


def test_what_is_too_stale_is_late(tmp_path: Path):
    round_ = stale(tmp_path, max_staleness=1)

    async def story() -> None:
        await round_.refused("ada", round_.report(key=RoundKey(1, 0)), "late")
        await round_.refused("ada", round_.report(key=RoundKey(0, 2)), "late")  # of another stage
        await round_.refused("ada", round_.report(key=RoundKey(1, 3)), "wrong_round")
        await round_.refused("dan", round_.report(key=RoundKey(1, 1)), "not_selected")
        assert await round_.collection.take("ada", round_.report(key=RoundKey(1, 1))) is Taken.COUNTS

    run(story())


def test_what_comes_while_the_round_is_combined_has_to_come_again(tmp_path: Path):
    round_ = stale(tmp_path)

    async def story() -> None:
        early, under_way = round_.report(delta(1)), round_.report(delta(2))
        await round_.collection.take("ada", early)
        round_.hold("ben")
        fetching = asyncio.ensure_future(round_.collection.take("ben", under_way))
        await settle()
        assert round_.collection.close() == {under_way.update}
        for client, task in (("ben", fetching), ("cyd", round_.collection.take("cyd", round_.report()))):
            with pytest.raises(Silent):
                await task
            assert client not in round_.collection.clients
        assert await round_.collection.take("ada", early) is Taken.COUNTED

    run(story())
