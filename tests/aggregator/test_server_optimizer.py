"""Server optimizers: a number at a time from their papers, and the same bits after a restart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from aggregator.plan import SERVER_OPTIMIZERS, RunPlan
from aggregator.server_optimizer import OPTIMIZERS, ServerOptimizer
from wire.errors import LocalError
from wire.tensors import Arrays, pack, unpack

SHAPES = {"text.w": (3, 2), "head.scale": (), "absent": (0, 2), "image.w": (2, 1, 3)}
ROUNDS = 5
LARGEST = float(np.finfo(np.float32).max)


def arrays_of(seed: int, scale: float = 0.01) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(scale * rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()
    }


def plan_of(name: str, **settings: Any) -> RunPlan:
    return RunPlan(server_optimizer=name, **settings)


def made(name: str, **settings: Any) -> ServerOptimizer:
    return ServerOptimizer(plan_of(name, **settings), SHAPES)


class Scalar:
    """One parameter, after Hsu et al. and Algorithm 2 of Reddi et al."""

    def __init__(self, name: str, value: float, rate: float, beta_1: float, beta_2: float, tau: float):
        self.name, self.x, self.rate = name, value, rate
        self.beta_1, self.beta_2, self.tau = beta_1, beta_2, tau
        self.m, self.v = 0.0, tau**2

    def step(self, d: float) -> None:
        if self.name == "none":
            self.x += self.rate * d
            return
        if self.name == "momentum":
            self.m = self.beta_1 * self.m + d
            self.x += self.rate * self.m
            return
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * d
        if self.name == "adagrad":
            self.v = self.v + d**2
        elif self.name == "adam":
            self.v = self.beta_2 * self.v + (1 - self.beta_2) * d**2
        else:
            sign = (self.v > d**2) - (self.v < d**2)
            self.v = self.v - (1 - self.beta_2) * d**2 * sign
        self.x += self.rate * self.m / (math.sqrt(self.v) + self.tau)


@pytest.mark.parametrize(
    ("rate", "beta_1", "beta_2", "tau"),
    [(1.0, 0.9, 0.99, 1e-3), (0.1, 0.0, 0.5, 1e-2), (0.03, 0.5, 0.0, 1.0)],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_papers_a_number_at_a_time(
    name: str, rate: float, beta_1: float, beta_2: float, tau: float
):
    optimizer = made(
        name, server_learning_rate=rate, server_momentum=beta_1, server_beta_2=beta_2, server_tau=tau
    )
    values = arrays_of(0, scale=1.0)
    scalars = {
        key: [Scalar(name, number, rate, beta_1, beta_2, tau) for number in value.ravel().tolist()]
        for key, value in values.items()
    }
    for number in range(1, 1 + ROUNDS):
        delta = arrays_of(number)
        values = optimizer.step(values, delta)
        for key, ones in scalars.items():
            for one, change in zip(ones, delta[key].ravel().tolist(), strict=True):
                one.step(change)
            assert (values[key].dtype, values[key].shape) == (np.float32, SHAPES[key])
            np.testing.assert_allclose(values[key].ravel(), [one.x for one in ones], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_restart_goes_on_bit_for_bit(name: str, after: int):
    whole, broken = made(name), made(name)
    one = other = arrays_of(0, scale=1.0)
    for number in range(ROUNDS):
        if number == after:
            content = pack(broken.state())
            broken = made(name)
            broken.load(unpack(content, broken.shapes))
        one, other = whole.step(one, arrays_of(number)), broken.step(other, arrays_of(number))
        assert all(one[key].tobytes() == other[key].tobytes() for key in SHAPES)
    assert {key: value.tobytes() for key, value in whole.state().items()} == {
        key: value.tobytes() for key, value in broken.state().items()
    }


@pytest.mark.parametrize(("name", "moments"), [("none", 0), ("momentum", 1), ("adam", 2), ("yogi", 2)])
def test_what_is_kept_has_as_many_values_as_there_are_moments(name: str, moments: int):
    state = made(name).state()
    assert len(state) == moments * len(SHAPES)
    assert sum(value.size for value in state.values()) == moments * (6 + 1 + 0 + 6)


def test_none_adds_the_change_and_nothing_else():
    values, delta = arrays_of(0), arrays_of(1)
    got = made("none").step(values, delta)
    assert list(got) == list(values)
    assert all(got[name].tobytes() == np.asarray(values[name] + delta[name]).tobytes() for name in SHAPES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_nobody_trained_stays_and_so_do_its_moments(name: str):
    optimizer = made(name)
    values = optimizer.step(arrays_of(0), arrays_of(1))
    before = optimizer.state()
    part = {key: value for key, value in arrays_of(2).items() if key != "text.w"}
    got = optimizer.step(values, part)
    assert got["text.w"].tobytes() == values["text.w"].tobytes()
    after = optimizer.state()
    for key, value in before.items():
        assert (after[key].tobytes() == value.tobytes()) == (key.endswith(("text.w", "absent")))
    assert all(np.array_equal(got[key], values[key]) for key in SHAPES - part.keys())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_given_or_taken_is_shared(name: str):
    optimizer = made(name)
    values, delta = arrays_of(0), arrays_of(1)
    got = optimizer.step(values, {key: delta[key] for key in ("text.w", "absent")})
    state = optimizer.state()
    other = made(name)
    other.load(state)
    for arrays in (got, state):
        for value in arrays.values():
            value.fill(7)
    assert all(np.array_equal(values[key], arrays_of(0)[key]) for key in SHAPES)
    assert all(np.array_equal(delta[key], arrays_of(1)[key]) for key in SHAPES)
    for one in (optimizer, other):
        assert not any((value == 7).any() for value in one.state().values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_beyond_float32_is_infinite_and_no_error(name: str):
    optimizer, values = made(name), arrays_of(0)
    for _ in range(3):
        absurd = {key: np.full(shape, LARGEST, np.float32) for key, shape in SHAPES.items()}
        values = optimizer.step(absurd, absurd)
    after = (*values.values(), *optimizer.state().values())
    assert not all(np.isfinite(value).all() for value in after)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_the_moments_of_another_stage_are_our_defect(name: str):
    other = ServerOptimizer(plan_of(name), {**SHAPES, "text.w": (2, 3)})
    fewer = ServerOptimizer(plan_of(name), {"text.w": (3, 2)})
    for wrong in (other.state(), fewer.state(), {}, made("yogi" if name == "momentum" else "none").state()):
        with pytest.raises(LocalError, match="not the moments of this stage"):
            made(name).load(wrong)


@pytest.mark.parametrize(
    ("name", "rate"), [("none", 1), ("momentum", 1), ("adagrad", 0.01), ("adam", 0.01), ("yogi", 0.01)]
)
def test_every_optimizer_has_a_learning_rate_of_its_own(name: str, rate: float):
    assert plan_of(name).effective_server_learning_rate == rate
    assert plan_of(name, server_learning_rate=0.5).effective_server_learning_rate == 0.5


def test_a_plan_may_name_every_optimizer():
    assert sorted(OPTIMIZERS) == sorted(SERVER_OPTIMIZERS)
