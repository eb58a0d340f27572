"""A run's settings: which are refused, and what a client is told in each round."""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgspec
import pytest

from aggregator.plan import AGGREGATIONS, SERVER_OPTIMIZERS, RunPlan
from wire.errors import UserError
from wire.messages import (
    MAX_AUGMENTATIONS,
    MAX_LEARNING_RATE,
    MAX_PROXIMAL_MU,
    MAX_STALENESS,
    RoundKey,
    TrainPlan,
)

NAN, INF = math.nan, math.inf
KEY = RoundKey(2, 1)
REFUSED: list[tuple[str, Any]] = [
    *(("fraction_train", value) for value in (0, -0.5, 1.0001, 2, INF, -INF, NAN)),
    *(("min_available_clients", value) for value in (0, -1)),
    *(("min_updates", value) for value in (0, -1)),
    *(("over_selection", value) for value in (-0.1, 10.1, INF, -INF, NAN)),
    *(("buffer_size", value) for value in (-1, -10)),
    *(("max_staleness", value) for value in (-1, MAX_STALENESS + 1)),
    *(("round_deadline_s", value) for value in (0, -1.0, INF, -INF, NAN)),
    *(("rounds", value) for value in (-1, -10)),
    ("patience", 0),
    ("calibration_epochs", 0),
    *(("local_epochs", value) for value in (0, -1)),
    *(("batch_size", value) for value in (0, -32)),
    *(("learning_rate", value) for value in (0, -1e-3, 1.1 * MAX_LEARNING_RATE, INF, -INF, NAN)),
    *(("final_learning_rate_share", value) for value in (-0.1, 1.0001, INF, -INF, NAN)),
    *(("augmentations", value) for value in (-1, MAX_AUGMENTATIONS + 1)),
    *(("proximal_mu", value) for value in (-0.1, 1.1 * MAX_PROXIMAL_MU, INF, -INF, NAN)),
    *(("malicious_fraction", value) for value in (-0.1, 0.5, 1.0, INF, -INF, NAN)),
    *(("max_update_norm", value) for value in (-1.0, INF, -INF, NAN)),
    *(("max_examples", value) for value in (-1, 2**63)),
    *(("server_learning_rate", value) for value in (-0.1, 1.1 * MAX_LEARNING_RATE, INF, -INF, NAN)),
    *((name, value) for name in ("server_momentum", "server_beta_2") for value in (-0.1, 1.0, INF, NAN)),
    *(("server_tau", value) for value in (0, -1e-3, 1.1 * MAX_LEARNING_RATE, INF, -INF, NAN)),
    *(("seed", value) for value in (-1, 2**31, 2**64)),
    *(("announce_s", value) for value in (0, -5.0, INF, -INF, NAN)),
    *(("heartbeat_s", value) for value in (0, -10.0, INF, -INF, NAN)),
]
TAKEN: list[tuple[str, Any]] = [
    ("fraction_train", 1),
    ("fraction_train", 1e-9),
    ("min_available_clients", 1),
    ("min_updates", 1),
    ("over_selection", 0),
    ("over_selection", 10),
    ("buffer_size", 0),
    ("buffer_size", 1),
    ("max_staleness", 0),
    ("max_staleness", MAX_STALENESS),
    ("round_deadline_s", 0.001),
    ("rounds", 0),
    ("rounds", "auto"),
    ("patience", 1),
    ("calibration_epochs", 1),
    ("local_epochs", 1),
    ("batch_size", 1),
    ("learning_rate", 1e-12),
    ("learning_rate", MAX_LEARNING_RATE),
    ("final_learning_rate_share", 0),
    ("final_learning_rate_share", 1e-9),
    ("final_learning_rate_share", 1),
    ("augmentations", 0),
    ("augmentations", MAX_AUGMENTATIONS),
    *(
        (name, value)
        for name in ("compression", "prefix_compression")
        for value in ("none", "float16", "int8")
    ),
    *(("aggregation", value) for value in AGGREGATIONS),
    *(("server_optimizer", value) for value in SERVER_OPTIMIZERS),
    *(("proximal_mu", value) for value in (0, 0.001, MAX_PROXIMAL_MU)),
    *(("malicious_fraction", value) for value in (0, 0.499)),
    *(("max_update_norm", value) for value in (0, 1e-9, 1e300)),
    *(("max_examples", value) for value in (0, 1, 2**63 - 1)),
    *(("server_learning_rate", value) for value in (0, 1e-9, MAX_LEARNING_RATE)),
    *((name, value) for name in ("server_momentum", "server_beta_2") for value in (0, 0.999)),
    *(("server_tau", value) for value in (1e-9, MAX_LEARNING_RATE)),
    ("announce_s", 0.001),
    ("heartbeat_s", 0.001),
    ("seed", 0),
    ("seed", 2**31 - 1),
]


def learning_rates(rounds: int, **settings: Any) -> list[float]:
    plan = RunPlan(**settings)
    return [plan.train_plan(RoundKey(0, number), rounds).learning_rate for number in range(rounds)]


def test_the_defaults_are_usable():
    assert RunPlan() == msgspec.convert({}, RunPlan)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: Any):
    for make in (lambda: RunPlan(**{name: value}), lambda: msgspec.convert({name: value}, RunPlan)):
        with pytest.raises(UserError) as caught:
            make()
        assert str(caught.value).startswith(f"{name} is {value}")
        assert caught.value.hint.startswith("it must be ")


WORDS = ["compression", "prefix_compression", "aggregation", "server_optimizer"]


@pytest.mark.parametrize("name", WORDS)
def test_an_unknown_word_is_refused_by_name(name: str):
    with pytest.raises(UserError, match=f"{name} is zip"):
        RunPlan(**{name: "zip"})
    with pytest.raises((UserError, msgspec.ValidationError), match=name):
        msgspec.convert({name: "zip"}, RunPlan)


def test_every_setting_with_a_range_is_tried():
    # Of words, msgspec knows all that there are.
    assert {name for name, _ in REFUSED} | set(WORDS) == set(RunPlan.__struct_fields__)
    floats = {field.name for field in msgspec.structs.fields(RunPlan) if isinstance(field.default, float)}
    assert {name for name, value in REFUSED if value != value} == floats


@pytest.mark.parametrize(("name", "value"), TAKEN)
def test_a_setting_at_its_limit_is_taken(name: str, value: Any):
    assert getattr(msgspec.convert({name: value}, RunPlan), name) == value


def test_an_unknown_setting_is_refused_by_name():
    with pytest.raises(msgspec.ValidationError, match="batch-size"):
        msgspec.convert({"batch-size": 8}, RunPlan)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 2.5), ("seed", "7"), ("learning_rate", "1e-3")])
def test_a_setting_of_another_type_is_refused_by_name(name: str, value: Any):
    with pytest.raises(msgspec.ValidationError, match=name):
        msgspec.convert({name: value}, RunPlan)


def test_a_client_is_told_the_settings():
    told = RunPlan(batch_size=8, local_epochs=3, max_staleness=4, proximal_mu=0.25).train_plan(KEY, 5)
    assert (told.batch_size, told.local_epochs) == (8, 3)
    assert (told.max_staleness, told.proximal_mu) == (4, 0.25)
    assert RunPlan().train_plan(KEY, 5).proximal_mu == 0


def test_a_buffer_smaller_than_what_a_round_needs_is_refused():
    assert RunPlan(buffer_size=2, min_updates=2).buffer_size == 2
    with pytest.raises(UserError, match="buffer_size is 1, and min_updates 2") as caught:
        RunPlan(buffer_size=1, min_updates=2)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("values", "settled"),
    [
        ([], False),
        ([0.5], False),
        ([0.5, 0.4], False),
        ([0.5, 0.4, 0.5], True),  # as good as before is no better
        ([0.5, 0.4, 0.6], False),
        ([0.5, 0.4, 0.6, 0.3, 0.55], True),
        ([-2.0, -1.5, -1.4, -1.3], False),
    ],
)
def test_a_stage_is_settled_when_its_metric_no_longer_improves(values: list[float], settled: bool):
    assert RunPlan(rounds="auto", patience=2).is_settled(values) == settled
    assert not RunPlan(rounds=9, patience=2).is_settled(values)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.75, 1.0])
@pytest.mark.parametrize("rounds", [2, 3, 50])
def test_the_learning_rate_falls_from_the_whole_to_its_share(rounds: int, share: float):
    rates = learning_rates(rounds, learning_rate=0.02, final_learning_rate_share=share)
    assert rates[0] == pytest.approx(0.02, rel=1e-12)
    assert rates[-1] == pytest.approx(0.02 * share, rel=1e-12, abs=1e-15)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert all(0 <= rate <= 0.02 * (1 + 1e-12) for rate in rates)


def test_the_learning_rate_falls_along_a_half_cosine():
    rates = learning_rates(5, learning_rate=1.0, final_learning_rate_share=0.5)
    half = [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0]
    assert rates == pytest.approx([0.5 + 0.5 * share for share in half], abs=1e-12)
    rates = learning_rates(5, learning_rate=0.1, final_learning_rate_share=0.2)
    assert rates[2] == pytest.approx(0.1 * (1 + 0.2) / 2)


def test_a_stage_of_one_round_has_the_whole_learning_rate():
    assert learning_rates(1, learning_rate=0.02) == [0.02]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_a_round_beyond_the_last_has_the_last_ones_learning_rate(rounds: int, share: float):
    plan = RunPlan(learning_rate=0.5, final_learning_rate_share=share)
    rates = [plan.train_plan(RoundKey(0, number), rounds).learning_rate for number in range(rounds + 3)]
    last = max(1, rounds - 1)
    assert rates[last:] == [rates[last]] * (rounds + 3 - last)
    assert rates[last] == pytest.approx(0.5 * share)


@pytest.mark.parametrize("share", [0.0, 1e-12, 1.0])
@pytest.mark.parametrize("learning_rate", [1e-300, 1e-3, MAX_LEARNING_RATE])
def test_every_rounds_plan_travels(learning_rate: float, share: float):
    plan = RunPlan(learning_rate=learning_rate, final_learning_rate_share=share)
    for number in range(6):
        told = plan.train_plan(RoundKey(0, number), 4)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=TrainPlan) == told


def test_every_stage_starts_again():
    plan = RunPlan()
    first, second = (plan.train_plan(RoundKey(stage, 0), 4).learning_rate for stage in (0, 1))
    assert first == second == plan.learning_rate


def seed_of(seed: int, stage: int, round_: int) -> int:
    return RunPlan(seed=seed).train_plan(RoundKey(stage, round_), 10).seed


def test_seeds_differ_between_rounds_stages_and_runs():
    seeds = [
        seed_of(seed, stage, round_)
        for seed in (0, 1, 2, 20_260_101)
        for stage in range(24)
        for round_ in range(60)
    ]
    assert len(set(seeds)) == len(seeds)


def test_equal_rounds_have_equal_seeds_whatever_else_is_set():
    key = RoundKey(3, 4)
    plans = [RunPlan(seed=9), RunPlan(seed=9), RunPlan(seed=9, batch_size=1, learning_rate=0.5)]
    assert len({plan.train_plan(key, rounds).seed for plan in plans for rounds in (5, 50)}) == 1


@pytest.mark.parametrize("seed", [0, 1, 20_260_101, 2**31 - 1])
def test_seeds_fit_in_64_bits_and_travel(seed: int):
    for stage, round_ in [(0, 0), (63, 0), (63, 99_999)]:
        told = RunPlan(seed=seed).train_plan(RoundKey(stage, round_), 100_000)
        assert 0 <= told.seed < 2**63
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=TrainPlan) == told
