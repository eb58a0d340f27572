"""Programs killed at random instants, in small: `kills.py` with fifty kills is for a longer day."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kills import BROKER, CLIENTS, Kill, conduct, equal, plan_kills
from programs import mosquitto

ROUNDS = 6


def test_kills_follow_from_the_seed_and_spread_over_the_run() -> None:
    kills = plan_kills(0, 1000, 50)
    assert kills == plan_kills(0, 1000, 50) != plan_kills(1, 1000, 50)
    assert [kill.at for kill in kills] == sorted(kill.at for kill in kills)
    assert kills[0].at < 1
    assert kills[-1].at > 49
    victims = [victim for kill in kills for victim in kill.victims]
    assert {victim: victims.count(victim) for victim in ("aggregator", BROKER)} == {
        "aggregator": pytest.approx(400, abs=50),
        BROKER: pytest.approx(400, abs=50),
    }
    assert all(victims.count(client) > 100 for client in CLIENTS)
    assert sum(len(kill.victims) == 2 for kill in kills) == pytest.approx(200, abs=40)
    assert all(len(set(kill.victims)) == len(kill.victims) == len(kill.pauses_s) for kill in kills)


@pytest.mark.skipif(mosquitto() is None, reason="mosquitto is not installed; .ci/run installs it")
def test_killed_programs_go_on_and_the_books_agree(tmp_path: Path, data: Path, bundle: Path) -> None:
    undisturbed = conduct(tmp_path / "undisturbed", data, bundle, rounds=ROUNDS)
    assert undisturbed.rounds == ROUNDS
    assert undisturbed.disagreements == []
    kills = [
        Kill(0.4, ("aggregator",), (0.3,)),
        Kill(1.2, ("ann",), (0.2,)),
        Kill(2.5, (BROKER, "aggregator"), (0.8, 0.1)),
        Kill(3.6, ("bob", "aggregator"), (0.0, 0.5)),
        Kill(4.3, (BROKER,), (0.4,)),
        Kill(5.7, ("aggregator",), (0.0,)),
    ]
    outcome = conduct(
        tmp_path / "killed", data, bundle, rounds=ROUNDS, kills=kills, round_s=undisturbed.round_s
    )
    assert outcome.kills == {"kills": 6, "two at once": 2, "aggregator": 4, BROKER: 2, "client": 2}
    assert (outcome.rounds, outcome.updates) == (ROUNDS, ROUNDS * len(CLIENTS))
    assert outcome.disagreements == []
    assert equal(outcome.final, undisturbed.final)

    told = [
        json.loads(line) for line in (tmp_path / "killed/aggregator.log").read_text().splitlines() if line
    ]
    events = [record["event"] for record in told if "event" in record]
    assert events.count("RunOpened") >= 5, "the first, and one after each of four kills"
    assert events.count("RoundClosed") >= ROUNDS
    assert {record["run"] for record in told} == {"run"}
