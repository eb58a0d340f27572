"""FedAvg against a plain loop, what it refuses, and how many updates it holds."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator.combine import Update, fedavg
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


def arrays_of(names: Iterable[str], seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.uniform(-10, 10, SHAPES[name]), np.float32) for name in names}


def update(client: str, num_examples: int, seed: int, names: Iterable[str] = tuple(SHAPES)) -> Update:
    return Update(client, arrays_of(names, seed), num_examples)


def one(values: list[float], num_examples: int = 1, client: str = "ada") -> Update:
    return Update(client, {"w": np.array(values, np.float32)}, num_examples)


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
        np.testing.assert_allclose(combined[name].ravel(), expected, rtol=1e-6, atol=1e-9)


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
