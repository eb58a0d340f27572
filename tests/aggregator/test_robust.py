"""The rules that withstand malicious clients: against plain loops, against attacks, and what they hold."""

from __future__ import annotations

import errno
import math
import statistics
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator import robust, rows
from aggregator.combine import Update, combine
from aggregator.plan import RunPlan
from aggregator.robust import ROBUST
from wire.errors import UserError
from wire.tensors import Array, Arrays

SHAPES = {"text.w": (3, 2), "head.b": (4,), "image.w": (2, 1, 3), "absent": (0, 2), "head.scale": ()}
RULES = list(ROBUST)
CLIENTS = 10
MALICIOUS = 2  # of 10, by the default share

fuzz = settings(
    derandomize=True,
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def _as_if_new() -> None:
    robust._warn_of_few.cache_clear()


@pytest.fixture(params=[1, 7, rows.BLOCK_VALUES], ids=["a value", "7 values", "all"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much is read at a time."""
    monkeypatch.setattr(rows, "BLOCK_VALUES", request.param)


def update(seed: int, names: Iterable[str] = tuple(SHAPES), scale: float = 1.0) -> Update:
    rng = np.random.default_rng(seed)
    delta = {name: np.asarray(scale * rng.standard_normal(SHAPES[name]), np.float32) for name in names}
    return Update(f"c{seed}", delta, 1 + seed % 7)


def by(rule: str, updates: Iterable[Update], scratch: Path, **plan: Any) -> Arrays:
    return combine(RunPlan(aggregation=rule, **plan), SHAPES, updates, scratch)


def number_of(malicious_fraction: float, clients: int) -> int:
    """The least whole number that is not less than the share."""
    return next(one for one in range(clients + 1) if one >= malicious_fraction * clients - 1e-9)


def inner_mean(values: list[float], trim: int) -> float:
    left = sorted(values)
    for _ in range(trim):
        if len(left) > 2:
            left = left[1:-1]
    return math.fsum(left) / len(left)


def krum_order(vectors: list[list[float]], malicious: int) -> list[int]:
    """Best first: by the sum of squared distances to the n - f - 2 nearest others, then by place."""
    count = len(vectors)
    scores = []
    for one in range(count):
        distances = sorted(
            math.fsum((a - b) ** 2 for a, b in zip(vectors[one], vectors[other], strict=True))
            for other in range(count)
            if other != one
        )
        scores.append(math.fsum(distances[: count - malicious - 2]))
    return sorted(range(count), key=lambda place: (scores[place], place))


def plain_loops(rule: str, updates: list[Update], malicious_fraction: float) -> dict[str, list[float]]:
    """The same rule a number at a time."""
    result: dict[str, list[float]] = {}
    for name in SHAPES:
        senders = [place for place, one in enumerate(updates) if name in one.delta]
        if not senders:
            continue
        malicious = number_of(malicious_fraction, len(senders))
        if rule in ("krum", "multi_krum"):
            if len(senders) >= 3:
                alike = [
                    other
                    for other in SHAPES
                    if [place for place, one in enumerate(updates) if other in one.delta] == senders
                ]
                vectors = [
                    [number for other in alike for number in updates[place].delta[other].ravel().tolist()]
                    for place in senders
                ]
                order = krum_order(vectors, min(malicious, (len(senders) - 3) // 2))
                keep = 1 if rule == "krum" else len(senders) - malicious
                senders = [senders[place] for place in order[:keep]]
            columns = zip(*(updates[place].delta[name].ravel().tolist() for place in senders), strict=True)
            result[name] = [math.fsum(column) / len(column) for column in columns]
            continue
        columns = zip(*(updates[place].delta[name].ravel().tolist() for place in senders), strict=True)
        if rule == "median":
            result[name] = [statistics.median(column) for column in columns]
        else:
            result[name] = [inner_mean(list(column), malicious) for column in columns]
    return result


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("rule", RULES)
@fuzz
@given(
    seed=st.integers(0, 2**31),
    senders=st.lists(st.sets(st.sampled_from(list(SHAPES))), min_size=0, max_size=9),
    malicious_fraction=st.sampled_from([0.0, 0.07, 0.2, 0.25, 0.4, 0.49]),
)
def test_it_is_the_plain_loop(
    tmp_path: Path, rule: str, seed: int, senders: list[set[str]], malicious_fraction: float
):
    updates = [update(seed + place, sorted(names)) for place, names in enumerate(senders)]
    got = by(rule, iter(updates), tmp_path, malicious_fraction=malicious_fraction)
    expected = plain_loops(rule, updates, malicious_fraction)
    assert list(got) == [name for name in SHAPES if name in expected]
    for name, values in expected.items():
        assert (got[name].dtype, got[name].shape) == (np.float32, SHAPES[name])
        np.testing.assert_allclose(got[name].ravel(), values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_the_updates_is_of_no_matter(rule: str, tmp_path: Path):
    updates = [update(seed) for seed in range(CLIENTS)]
    bits = [value.tobytes() for value in by(rule, updates, tmp_path).values()]
    for seed in range(5):
        shuffled = [updates[place] for place in np.random.default_rng(seed).permutation(CLIENTS)]
        assert [value.tobytes() for value in by(rule, shuffled, tmp_path).values()] == bits


@pytest.mark.parametrize("rule", RULES)
def test_what_a_client_says_of_its_examples_is_of_no_matter(rule: str, tmp_path: Path):
    updates = [update(seed) for seed in range(CLIENTS)]
    boastful = [Update(one.client, one.delta, 2**63 - 1) for one in updates[:2]] + updates[2:]
    one, other = by(rule, updates, tmp_path), by(rule, boastful, tmp_path)
    assert all(np.array_equal(one[name], other[name]) for name in SHAPES)


@pytest.mark.parametrize("rule", RULES)
def test_long_and_stale_updates_are_cut_before_any_rule(rule: str, tmp_path: Path):
    updates = [update(seed) for seed in range(CLIENTS)]
    cut = [
        Update(one.client, {name: np.asarray(value / 2) for name, value in one.delta.items()}, 1)
        for one in updates
    ]
    stale = [Update(one.client, one.delta, 1, staleness=3) for one in updates]
    expected, got = by(rule, cut, tmp_path), by(rule, stale, tmp_path)
    assert all(np.array_equal(got[name], expected[name]) for name in SHAPES)
    scaled = [
        Update(one.client, {name: value * 1000 for name, value in one.delta.items()}, 1) for one in updates
    ]
    long, longer = (by(rule, these, tmp_path, max_update_norm=0.1) for these in (updates, scaled))
    for name in SHAPES:
        np.testing.assert_allclose(longer[name], long[name], rtol=1e-5, atol=1e-8)
        assert np.abs(long[name]).max(initial=0) <= 0.1


# Attacks.


def stacked(updates: Iterable[Update], name: str) -> Array:
    return np.stack([one.delta[name] for one in updates])


def attacks(honest: list[Update]) -> dict[str, list[Update]]:
    """What two of ten may send, alone or together."""

    def of(*scales: float) -> list[Update]:
        return [
            Update(f"m{place}", {n: np.asarray(v * scale) for n, v in honest[place].delta.items()}, 10**9)
            for place, scale in enumerate(scales)
        ]

    same = {name: np.full(shape, 1e30, np.float32) for name, shape in SHAPES.items()}
    return {
        "far": of(1e30, 1e3),
        "turned": of(-1e3, -1e30),
        "on both sides": of(1e30, -1e30),
        "together": [Update("m0", same, 1), Update("m1", same, 1)],
    }


@pytest.mark.parametrize("attack", ["far", "turned", "on both sides", "together"])
@pytest.mark.parametrize("rule", RULES)
def test_two_of_ten_move_no_coordinate_beyond_the_honest_ones(rule: str, attack: str, tmp_path: Path):
    honest = [update(seed) for seed in range(CLIENTS - MALICIOUS)]
    malicious = attacks(honest)[attack]
    for updates in (honest + malicious, malicious + honest):
        got = by(rule, updates, tmp_path)
        for name in SHAPES:
            values = stacked(honest, name)
            assert (values.min(axis=0, initial=9) <= got[name]).all()
            assert (got[name] <= values.max(axis=0, initial=-9)).all()


@pytest.mark.parametrize("attack", ["far", "turned", "together"])
def test_the_same_attacks_move_fedavg(attack: str, tmp_path: Path):
    honest = [update(seed) for seed in range(CLIENTS - MALICIOUS)]
    got = by("fedavg", honest + attacks(honest)[attack], tmp_path)
    assert np.abs(got["text.w"]).max() > 100


@pytest.mark.parametrize("attack", ["far", "turned", "on both sides", "together"])
def test_krum_takes_one_honest_update_whole_and_multi_krum_the_mean_of_all(attack: str, tmp_path: Path):
    honest = [update(seed) for seed in range(CLIENTS - MALICIOUS)]
    updates = honest + attacks(honest)[attack]
    one, all_of_them = by("krum", updates, tmp_path), by("multi_krum", updates, tmp_path)
    assert any(all(np.array_equal(one[name], of.delta[name]) for name in SHAPES) for of in honest)
    for name in SHAPES:
        np.testing.assert_allclose(
            all_of_them[name], stacked(honest, name).mean(axis=0), rtol=1e-4, atol=1e-6
        )


def test_krum_among_equals_takes_the_first(tmp_path: Path):
    updates = [
        Update(f"c{place}", {"head.b": np.array(values, np.float32)}, 1)
        for place, values in enumerate(([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]))
    ]
    assert by("krum", updates, tmp_path, malicious_fraction=0)["head.b"].tolist() == [1, 0, 0, 0]
    assert by("krum", updates[::-1], tmp_path, malicious_fraction=0)["head.b"].tolist() == [0, 0, 0, 1]


def test_groups_that_the_same_clients_sent_are_judged_as_one(tmp_path: Path):
    """The third is nearest in `head.scale` alone, and far in what is judged with it."""
    numbers = [(0.0, 1.0), (0.1, -1.0), (0.2, 9.0), (0.3, -9.0), (0.1, 0.0)]
    updates = [
        Update(f"c{place}", {"head.b": np.full(4, b, np.float32), "head.scale": np.float32(s)}, 1)
        for place, (s, b) in enumerate(numbers)
    ]
    got = by("krum", updates, tmp_path)
    assert (got["head.scale"], got["head.b"].tolist()) == (np.float32(0.1), [0] * 4)


# Too few.


@pytest.mark.parametrize("rule", ["trimmed_mean", "krum", "multi_krum"])
@pytest.mark.parametrize("clients", [1, 2])
def test_the_mean_of_one_or_two_is_told_once(
    rule: str, clients: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    updates = [update(seed) for seed in range(clients)]
    for _ in range(3):
        got = by(rule, updates, tmp_path)
        for name in SHAPES:
            np.testing.assert_allclose(got[name], stacked(updates, name).mean(axis=0), rtol=1e-6)
    (said,) = caplog.messages
    assert said.startswith(
        f"{rule} of {clients} updates: 1 malicious ones are expected, 0 can be withstood"
    )
    assert "min_updates" in said


@pytest.mark.parametrize("rule", RULES)
def test_enough_updates_are_nothing_to_tell(rule: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    by(rule, [update(seed) for seed in range(7)], tmp_path)  # 2 f + 3, for a fifth of 7, rounded up
    by(rule, [], tmp_path)
    assert not caplog.messages


@pytest.mark.parametrize("clients", [3, 4, 5, 6])
@pytest.mark.parametrize("rule", RULES)
def test_one_absurd_update_among_few_does_not_win(rule: str, clients: int, tmp_path: Path):
    honest = [update(seed) for seed in range(clients - 1)]
    got = by(rule, [update(99, scale=1e30), *honest], tmp_path)
    assert all(np.abs(value).max(initial=0) < 100 for value in got.values())


# What they hold, and where.


@pytest.mark.parametrize("rule", RULES)
def test_memory_does_not_grow_with_the_clients(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "BLOCK_VALUES", 1 << 11)
    shape = (50_000,)

    def peak(clients: int) -> int:
        made = (
            Update(f"c{n}", {"w": np.random.default_rng(n).random(shape, np.float32)}, 1)
            for n in range(clients)
        )
        tracemalloc.start()
        combine(RunPlan(aggregation=rule), {"w": shape}, made, tmp_path)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(4), peak(64)
    assert many < few + 200_000  # 60 more updates are 12 MB, of pairs there are 0.03 MB
    assert few < 6 * 4 * 50_000


def stream(scratch: Path, error: Exception | None = None) -> Iterator[Update]:
    for seed in range(3):
        assert not list(scratch.iterdir())  # it has no name even while it is filled
        yield update(seed)
    if error is not None:
        raise error


@pytest.mark.parametrize("rule", RULES)
def test_the_scratch_file_is_gone_afterwards(rule: str, tmp_path: Path):
    by(rule, stream(tmp_path), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rule", RULES)
def test_the_scratch_file_is_gone_after_an_error(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened: list[Any] = []
    make = rows.tempfile.TemporaryFile
    monkeypatch.setattr(
        rows.tempfile, "TemporaryFile", lambda **words: opened.append(make(**words)) or opened[-1]
    )
    with pytest.raises(ZeroDivisionError):
        by(rule, stream(tmp_path, ZeroDivisionError()), tmp_path)
    assert [file.closed for file in opened] == [True]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_the_users_to_mend(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere: No such file") as caught:
        by("median", [update(0)], tmp_path / "nowhere")
    assert "free some space" in caught.value.hint


def test_a_full_disk_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    full = Path("/dev/full")
    monkeypatch.setattr(rows.tempfile, "TemporaryFile", lambda **_words: full.open("r+b"))
    with pytest.raises(UserError, match="cannot be laid out") as caught:
        by("median", [update(seed) for seed in range(3)], tmp_path)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
