"""FedAvg against a plain loop, what is done to updates before any rule, and how many of them are held."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator.combine import RULES, Update, combine, norm
from aggregator.plan import AGGREGATIONS, RunPlan
from wire.errors import LocalError
from wire.tensors import Array, Arrays

SHAPES = {
    "text.w": (3, 2),
    "head.b": (4,),
    "image.w": (2, 1, 3),
    "another": (1,),
    "absent": (0, 2),
    "head.scale": (),
}


NOWHERE = Path("/nowhere")  # FedAvg needs no scratch


def change(updates: Iterable[Update], shapes: Any = None, **plan: Any) -> Arrays:
    """Of FedAvg."""
    return combine(RunPlan(**plan), SHAPES if shapes is None else shapes, updates, NOWHERE)


def fedavg(parameters: Arrays, updates: Iterable[Update], **plan: Any) -> Arrays:
    """The parameters after its step."""
    changes = change(updates, {name: value.shape for name, value in parameters.items()}, **plan)
    return {
        name: np.asarray(value + changes[name]) if name in changes else value.copy()
        for name, value in parameters.items()
    }


def arrays_of(names: Iterable[str], seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.uniform(-10, 10, SHAPES[name]), np.float32) for name in names}


def update(client: str, num_examples: int, seed: int, names: Iterable[str] = tuple(SHAPES)) -> Update:
    return Update(client, arrays_of(names, seed), num_examples)


def one(values: list[float], num_examples: int = 1, client: str = "ada") -> Update:
    return Update(client, {"w": np.array(values, np.float32)}, num_examples)


def share(update: Update, max_norm: float) -> float:
    """What is left of an update: min(1, M / |d|) / sqrt(1 + tau)."""
    squares = [number**2 for value in update.delta.values() for number in value.ravel().tolist()]
    length = math.sqrt(math.fsum(squares))
    return (min(1.0, max_norm / length) if max_norm and length else 1.0) / math.sqrt(1 + update.staleness)


def plain_loop(parameters: Arrays, updates: list[Update]) -> dict[str, list[float]]:
    """The same average a number at a time: `w + sum(n_k * d_k) / sum(n_k)`, over those that have it."""
    result: dict[str, list[float]] = {}
    for name, value in parameters.items():
        having = [update for update in updates if name in update.delta]
        examples = sum(update.num_examples for update in having)
        result[name] = []
        for place, number in enumerate(value.ravel().tolist()):
            change = 0.0
            for update in having:
                change += update.delta[name].ravel().tolist()[place] * (update.num_examples / examples)
            result[name].append(number + change)
    return result


def bits(arrays: dict[str, Array]) -> list[tuple[str, tuple[int, ...], str, bytes]]:
    return [(name, array.shape, array.dtype.name, array.tobytes()) for name, array in arrays.items()]


@settings(derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    clients=st.lists(
        st.tuples(st.integers(1, 10_000), st.sets(st.sampled_from(list(SHAPES)))), min_size=0, max_size=7
    ),
)
def test_it_is_the_plain_loop(seed: int, clients: list[tuple[int, set[str]]]):
    parameters = arrays_of(SHAPES, seed)
    updates = [
        update(f"c{number}", num_examples, seed + 1 + number, sorted(names))
        for number, (num_examples, names) in enumerate(clients)
    ]
    combined = fedavg(parameters, updates)
    for name, expected in plain_loop(parameters, updates).items():
        assert combined[name].dtype == np.float32
        assert combined[name].shape == SHAPES[name]
        np.testing.assert_allclose(combined[name].ravel(), expected, rtol=1e-6, atol=2e-6)  # of sums to 20


@settings(derandomize=True, max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    clients=st.lists(
        st.tuples(st.integers(1, 1000), st.integers(0, 5), st.sets(st.sampled_from(list(SHAPES)))),
        min_size=1,
        max_size=7,
    ),
    max_norm=st.sampled_from([0.0, 1e-3, 5.0, 15.0, 1e6]),
    max_examples=st.sampled_from([0, 1, 50, 10**9]),
)
def test_stale_long_and_boastful_updates_count_for_less(
    seed: int, clients: list[tuple[int, int, set[str]]], max_norm: float, max_examples: int
):
    updates = [
        replace(update(f"c{number}", num_examples, seed + number, sorted(names)), staleness=staleness)
        for number, (num_examples, staleness, names) in enumerate(clients)
    ]
    changes = change(updates, max_update_norm=max_norm, max_examples=max_examples)
    assert set(changes) == {name for one_of in updates for name in one_of.delta}
    for name, got in changes.items():
        having = [one_of for one_of in updates if name in one_of.delta]
        weights = [min(one_of.num_examples, max_examples or one_of.num_examples) for one_of in having]
        expected = sum(
            one_of.delta[name].astype(np.float64) * share(one_of, max_norm) * weight
            for one_of, weight in zip(having, weights, strict=True)
        ) / sum(weights)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_only_what_somebody_trained_is_in_the_change_and_in_order():
    updates = [update("ada", 1, 1, ["head.b"]), update("ben", 1, 2, ["text.w"])]
    assert list(change(updates)) == ["text.w", "head.b"]
    assert change([]) == change([Update("ben", {}, 5)]) == {}


def test_the_norm_is_over_all_tensors_and_in_float64():
    delta = {"w": np.array([[3e30, 0]], np.float32), "b": np.array(4e30, np.float32)}
    assert norm(delta) == pytest.approx(5e30)
    assert norm({}) == norm({"w": np.zeros((0, 2), np.float32)}) == 0
    many = {"w": np.full(2**24 + 1000, 1, np.float32)}  # float32 sums of ones end at 2**24
    assert norm(many) == math.sqrt(2**24 + 1000)


def test_an_update_is_clipped_as_a_whole_and_keeps_its_direction():
    long = Update("ada", {"text.w": np.full((3, 2), 30, np.float32), "head.scale": np.float32(40)}, 1)
    clipped = change([long], max_update_norm=2.0)
    assert norm(clipped) == pytest.approx(2, rel=1e-6)
    np.testing.assert_allclose(clipped["head.scale"] / clipped["text.w"], 40 / 30, rtol=1e-6)


def test_the_longest_update_there_can_be_is_clipped_too():
    shapes = {"w": (500, 500)}
    longest = Update("ada", {"w": np.full((500, 500), np.finfo(np.float32).max)}, 1)
    assert norm(change([longest], shapes, max_update_norm=1e-3)) == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, 5.0, 5.1, 1e30])
def test_an_update_that_is_short_enough_keeps_every_bit(max_norm: float):
    assert change([one([3, 4])], {"w": (2,)}, max_update_norm=max_norm)["w"].tolist() == [3, 4]


def test_a_boastful_client_weighs_what_the_cap_allows():
    updates = [one([0], 100), one([1], 2**63 - 1)]
    assert change(updates, {"w": (1,)}, max_examples=100)["w"].tolist() == [0.5]
    assert change(updates, {"w": (1,)}, max_examples=300)["w"].tolist() == [0.75]
    assert change(updates, {"w": (1,)})["w"].tolist() == [1]


def test_staleness_is_discounted_by_its_root_and_keeps_its_weight():
    stale = replace(one([6], 3), staleness=3)
    assert change([stale], {"w": (1,)})["w"].tolist() == [3]  # 6 / sqrt(4), of which nothing is made good
    assert change([one([1], 1), stale], {"w": (1,)})["w"].tolist() == [2.5]  # (1 * 1 + 3 * 3) / 4


def test_an_update_from_the_future_is_our_defect():
    with pytest.raises(LocalError, match="update of ben is from a later round"):
        change([replace(one([1], 1, "ben"), staleness=-1)], {"w": (1,)})


def test_a_plan_may_name_every_rule():
    assert set(RULES) == set(AGGREGATIONS)
    assert len(RULES) == len(AGGREGATIONS)


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_changes_what_it_was_given(rule: str, tmp_path: Path):
    updates = [update(f"c{number}", 2, number) for number in range(5)]
    before = [bits(dict(one_of.delta)) for one_of in updates]
    combine(RunPlan(aggregation=rule, max_update_norm=1.0), SHAPES, updates, tmp_path)
    assert [bits(dict(one_of.delta)) for one_of in updates] == before


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_refuses_what_should_never_have_been_accepted(rule: str, tmp_path: Path):
    plan = RunPlan(aggregation=rule)
    for wrong in (
        one([1], 0, "ben"),
        one([1, 2], 1, "ben"),
        Update("ben", {"v": np.ones(1, np.float32)}, 1),
    ):
        with pytest.raises(LocalError, match="update of ben"):
            combine(plan, {"w": (1,)}, [one([1]), wrong], tmp_path)


def test_the_average_is_weighted_by_examples():
    combined = fedavg({"w": np.array([10, 0], np.float32)}, [one([4, 1], 1), one([0, -1], 3)])
    assert combined["w"].tolist() == [11, -0.5]


def test_one_client_moves_everything_to_where_it_stands():
    combined = fedavg({"w": np.array([1, 2], np.float32)}, [one([0.5, -2], 7)])
    assert combined["w"].tolist() == [1.5, 0]


def test_equal_changes_stay_what_they_are_whatever_the_weights():
    updates = [one([0.25], n) for n in (1, 17, 300)]
    assert fedavg({"w": np.ones(1, np.float32)}, updates)["w"].tolist() == [1.25]


def test_a_group_is_averaged_over_those_that_trained_it():
    parameters = arrays_of(SHAPES, 0)
    image, both = update("ada", 1, 1, ["image.w"]), update("ben", 3, 2, ["image.w", "text.w"])
    combined = fedavg(parameters, [image, both])
    np.testing.assert_allclose(combined["text.w"], parameters["text.w"] + both.delta["text.w"], rtol=1e-6)
    expected = parameters["image.w"] + (image.delta["image.w"] + 3 * both.delta["image.w"]) / 4
    np.testing.assert_allclose(combined["image.w"], expected, rtol=1e-5, atol=1e-6)


def test_what_nobody_trained_keeps_every_bit():
    odd = np.array([-0.0, 1e-45, np.nan, np.inf, 16777217, 0.1], np.float32)
    parameters = {"w": np.ones(2, np.float32), "odd": odd, "last": np.zeros((0, 3), np.float32)}
    for updates in [[], [one([1, 1])], [Update("ben", {}, 5)]]:
        combined = fedavg(parameters, updates)
        assert bits({"odd": combined["odd"]}) == bits({"odd": odd})
        assert combined["last"].shape == (0, 3)
    assert bits(fedavg(parameters, [])) == bits(parameters)


def test_a_change_of_nothing_keeps_every_bit():
    parameters = arrays_of(SHAPES, 0)
    still = Update("ada", {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, 3)
    assert bits(fedavg(parameters, [still])) == bits(parameters)


def test_names_keep_the_order_of_the_parameters():
    parameters = arrays_of(SHAPES, 0)
    updates = [update("ada", 1, 1, sorted(SHAPES)), update("ben", 1, 2, sorted(SHAPES, reverse=True))]
    assert list(fedavg(parameters, updates)) == list(SHAPES) != sorted(SHAPES)
    assert list(fedavg(dict(reversed(parameters.items())), updates)) == list(reversed(SHAPES))


def test_sorted_updates_give_equal_bits():
    parameters = arrays_of(SHAPES, 0)
    updates = {name: update(name, 1 + 97 * number, number) for number, name in enumerate("gbfadce")}
    first = fedavg(parameters, [updates[name] for name in sorted(updates)])
    late_first = dict(reversed(updates.items()))
    again = fedavg(parameters, (late_first[name] for name in sorted(late_first)))
    assert bits(first) == bits(again)


def test_sums_are_exact_enough_for_many_clients():
    many = [one([1], client=f"c{number}") for number in range(1000)]
    combined = fedavg({"w": np.zeros(1, np.float32)}, [one([2**24]), *many])
    assert combined["w"].tolist() == [np.float32((2**24 + 1000) / 1001)]


def test_large_weights_do_not_overflow():
    for large in (2**62, 2**63 - 1):
        updates = [one([2], large), one([4], large), one([6], large)]
        assert fedavg({"w": np.zeros(1, np.float32)}, updates)["w"].tolist() == [4]


def test_a_single_value_without_dimensions_stays_an_array():
    deltas = [Update(str(count), {"scale": np.array(count, np.float32)}, count) for count in (1, 3)]
    combined = fedavg({"scale": np.array(1, np.float32)}, deltas)["scale"]
    assert isinstance(combined, np.ndarray)
    assert (combined.shape, combined.dtype, combined.item()) == ((), np.float32, 3.5)


def test_nothing_it_was_given_is_changed_or_shared():
    parameters = arrays_of(SHAPES, 0)
    updates = [update("ada", 2, 1, ["text.w", "head.b"]), update("ben", 1, 2, ["text.w"])]
    before = [bits(parameters), *(bits(dict(given_.delta)) for given_ in updates)]
    combined = fedavg(parameters, updates)
    for array in combined.values():
        array.fill(7)
    assert [bits(parameters), *(bits(dict(given_.delta)) for given_ in updates)] == before


@pytest.mark.parametrize("num_examples", [0, -1])
def test_an_update_without_examples_is_our_defect(num_examples: int):
    with pytest.raises(LocalError, match="update of ben has no examples"):
        fedavg({"w": np.zeros(1, np.float32)}, [one([1]), one([1], num_examples, "ben")])


def test_an_unknown_name_is_our_defect():
    stray = Update("ben", {"w": np.ones(1, np.float32), "v": np.ones(1, np.float32)}, 1)
    with pytest.raises(LocalError, match="update of ben: v does not fit"):
        fedavg({"w": np.zeros(1, np.float32)}, [one([1]), stray])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 1), (1, 3), (3, 2), (6,), (0,)])
def test_another_shape_is_our_defect_even_if_it_would_broadcast(shape: tuple[int, ...]):
    with pytest.raises(LocalError, match="update of ben: w does not fit"):
        fedavg({"w": np.zeros((2, 3), np.float32)}, [Update("ben", {"w": np.ones(shape, np.float32)}, 1)])


def test_it_does_not_hold_updates_it_has_added():
    held: list[int] = []
    deltas: list[weakref.ref[Array]] = []

    def stream() -> Iterator[Update]:
        for number in range(20):
            held.append(sum(delta() is not None for delta in deltas))
            current = one([number, 1], number + 1)
            deltas.append(weakref.ref(current.delta["w"]))
            yield current
            del current

    combined = fedavg({"w": np.zeros(2, np.float32)}, stream())
    assert combined["w"].tolist() == [np.float32(sum(n * (n + 1) for n in range(20)) / 210), 1]
    assert len(held) == 20
    assert max(held) == 0  # the one that was handed over last is gone before the next is read
    assert not any(delta() is not None for delta in deltas)
