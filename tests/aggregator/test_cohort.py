"""Who is there after what was heard and when, and who is drawn for a round."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.cohort import MISSED_HEARTBEATS, Clients, select, wanted
from wire.messages import Hello, RoundKey

HEARTBEAT_S = 8.0  # a power of two, so that times add up exactly
SILENCE_S = HEARTBEAT_S * MISSED_HEARTBEATS
KEY = RoundKey(0, 0)
NAMES = [f"client-{number:03}" for number in range(40)]


def hello(**changes: Any) -> Hello:
    fields = {"num_examples": {"image": 5}, "engine": "onnx", "memory_mb": 4096, "version": "0.1"}
    return Hello(**{**fields, **changes})


def test_nobody_is_there_at_first():
    assert Clients(HEARTBEAT_S).available(0.0) == []


def test_a_client_is_there_from_its_hello_to_its_bye():
    clients = Clients(HEARTBEAT_S)
    assert clients.hello("ben", hello(), 1.0)
    assert clients.hello("ada", hello(), 2.0)
    assert clients.available(2.0) == ["ada", "ben"]  # sorted
    assert clients.bye("ben")
    assert clients.available(2.0) == ["ada"]
    assert not clients.bye("ben")
    assert not clients.bye("nobody")
    assert clients.hello("ben", hello(), 3.0)
    assert clients.available(3.0) == ["ada", "ben"]


def test_a_hello_is_news_when_it_says_something_new():
    clients = Clients(HEARTBEAT_S)
    assert clients.hello("ada", hello(), 0.0)
    assert not clients.hello("ada", hello(), 1.0)
    assert clients.hello("ada", hello(num_examples={"image": 6}), 2.0)
    assert not clients.hello("ada", hello(num_examples={"image": 6}), 3.0)
    assert clients.hello("ada", hello(), 4.0)
    assert clients.hello("ben", hello(), 4.0)  # another client's, though it says the same


def test_silence_counts_from_the_last_hello():
    clients = Clients(HEARTBEAT_S)
    clients.hello("ada", hello(), 100.0)
    clients.hello("ben", hello(), 100.0)
    clients.hello("ada", hello(), 100.0 + HEARTBEAT_S)
    assert clients.available(100.0 + SILENCE_S) == ["ada", "ben"]
    assert clients.available(100.0 + math.nextafter(SILENCE_S, math.inf) + 1e-9) == ["ada"]
    assert clients.available(100.0 + HEARTBEAT_S + SILENCE_S) == ["ada"]
    assert clients.available(100.0 + HEARTBEAT_S + SILENCE_S + 0.25) == []


def test_three_lost_heartbeats_are_forgiven():
    clients = Clients(HEARTBEAT_S)
    clients.hello("ada", hello(), 0.0)
    assert clients.available(3 * HEARTBEAT_S) == ["ada"]
    assert clients.available(4 * HEARTBEAT_S) == []


def test_who_was_silent_too_long_is_forgotten_and_may_come_back():
    clients = Clients(HEARTBEAT_S)
    clients.hello("ada", hello(), 0.0)
    assert clients.available(1000.0) == []
    assert clients.available(0.0) == []  # forgotten, not only left out
    assert not clients.bye("ada")
    assert clients.hello("ada", hello(), 1001.0)
    assert clients.available(1001.0) == ["ada"]


def test_a_hello_after_too_long_a_silence_is_news_though_nobody_asked_meanwhile():
    clients = Clients(HEARTBEAT_S)
    clients.hello("ada", hello(), 0.0)
    assert not clients.hello("ada", hello(), SILENCE_S)
    assert clients.hello("ada", hello(), 2 * SILENCE_S + 0.25)
    assert not clients.hello("ada", hello(), 2 * SILENCE_S + 0.5)
    assert clients.available(2 * SILENCE_S + 0.5) == ["ada"]


def test_the_list_of_clients_is_the_callers_own():
    clients = Clients(HEARTBEAT_S)
    clients.hello("ada", hello(), 0.0)
    clients.available(0.0).clear()
    assert clients.available(0.0) == ["ada"]


@pytest.mark.parametrize(
    ("available", "fraction_train", "count"),
    [
        (30, 0.1, 3),  # 0.1 * 30 is a little more than 3 in floating point
        (100, 0.07, 7),
        (100, 0.29, 29),
        (35, 0.2, 7),
        (10, 0.7, 7),
        (3, 1 / 3, 1),
        (3, 2 / 3, 2),
        (10, 0.55, 6),
        (10, 0.11, 2),
        (10, 0.1001, 2),
        (40, 1.0, 40),
        (1, 0.5, 1),
        (40, 1e-12, 1),
        (1, 1e-12, 1),
        (0, 1.0, 0),
        (0, 0.1, 0),
    ],
)
def test_a_cohort_is_the_fraction_rounded_up(available: int, fraction_train: float, count: int):
    names = [f"client-{number:03}" for number in range(available)]
    cohort = select(names, fraction_train, 0, KEY)
    assert len(cohort) == count
    assert len(set(cohort)) == count
    assert set(cohort) <= set(names)
    assert list(cohort) == sorted(cohort)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(available=st.integers(1, 200), percent=st.integers(1, 100), seed=st.integers(0, 2**40))
def test_any_percentage_is_counted_as_on_paper(available: int, percent: int, seed: int):
    cohort = select(map(str, range(available)), percent / 100, seed, KEY)
    assert len(cohort) == math.ceil(Fraction(percent, 100) * available)


def test_a_draw_is_the_same_every_time_and_in_whichever_order_names_come():
    expected = select(NAMES, 0.3, 7, RoundKey(1, 2))
    assert select(NAMES, 0.3, 7, RoundKey(1, 2)) == expected
    rng = random.Random(0)
    for _ in range(10):
        assert select(rng.sample(NAMES, len(NAMES)), 0.3, 7, RoundKey(1, 2)) == expected
    assert select(set(NAMES), 0.3, 7, RoundKey(1, 2)) == expected
    assert select(iter(NAMES), 0.3, 7, RoundKey(1, 2)) == expected


def test_a_name_that_comes_twice_is_drawn_once():
    assert select([*NAMES, *NAMES[:20]], 1.0, 7, KEY) == tuple(NAMES)
    assert select(NAMES * 3, 0.3, 7, KEY) == select(NAMES, 0.3, 7, KEY)
    assert select(["ada", "ada", "ada"], 0.5, 7, KEY) == ("ada",)


def test_a_draw_leaves_the_names_and_the_global_generator_alone():
    names, state = NAMES[::-1], random.getstate()
    select(names, 0.3, 0, KEY)
    assert names == NAMES[::-1]
    assert random.getstate() == state


def test_a_draw_is_the_same_in_another_process():
    code = (
        "from aggregator.cohort import select; from wire.messages import RoundKey; "
        "print(*select([f'client-{n:03}' for n in range(40)], 0.3, 7, RoundKey(1, 2)))"
    )
    drawn = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    ).stdout
    assert tuple(drawn.split()) == select(NAMES, 0.3, 7, RoundKey(1, 2))


def test_draws_vary_with_the_round_the_stage_and_the_seed():
    cohorts = [
        select(NAMES, 0.3, seed, RoundKey(stage, round_))
        for seed in range(3)
        for stage in range(3)
        for round_ in range(12)
    ]
    assert len(set(cohorts)) == len(cohorts)


def test_everybody_is_drawn_about_as_often():
    rounds = 400
    drawn = Counter(name for n in range(rounds) for name in select(NAMES, 0.25, 0, RoundKey(0, n)))
    assert drawn.keys() == set(NAMES)
    assert all(0.6 < count / (0.25 * rounds) < 1.4 for count in drawn.values())


@pytest.mark.parametrize(
    ("available", "fraction_train", "over_selection", "asked", "waited_for"),
    [
        (10, 0.5, 0.0, 5, 5),
        (10, 0.5, 0.3, 7, 5),
        (10, 1.0, 0.3, 10, 10),
        (3, 0.1, 1.0, 2, 1),
        (0, 1.0, 1.0, 0, 0),
    ],
)
def test_more_are_asked_than_are_waited_for(
    available: int, fraction_train: float, over_selection: float, asked: int, waited_for: int
):
    cohort = select(map(str, range(available)), fraction_train, 0, KEY, over_selection)
    assert len(cohort) == asked
    assert wanted(available, fraction_train) == waited_for
