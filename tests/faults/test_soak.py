"""The soak's report: it is read again after a crash, and its summary names what went wrong."""

from __future__ import annotations

import json
from pathlib import Path

from soak import as_line, read_report, summary

GOOD = {
    "seed": 0,
    "wrong": "",
    "seconds": 90.0,
    "kills": {"kills": 12, "aggregator": 5, "broker": 4, "client": 6, "two at once": 3},
    "proxied": {"pass": 5000, "drop": 20, "drop in silence": 2, "hold": 30},
}
WRONG = {"seed": 1, "wrong": "ann ended with exit code 70: a defect of Lamina", "seconds": 30.0}


def test_a_report_is_read_up_to_where_a_soak_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "report.jsonl"
    assert read_report(path) == []
    path.write_text(f'{json.dumps(GOOD)}\n{json.dumps(WRONG)}\n{{"seed": 2, "wro')
    assert read_report(path) == [GOOD, WRONG]


def test_a_run_is_a_line() -> None:
    assert as_line(GOOD) == "seed 0: 90 s, 12 kills, 50 packets spoilt of 5050, equal"
    assert as_line(WRONG) == "seed 1: 30 s, ann ended with exit code 70: a defect of Lamina"


def test_the_summary_adds_up_and_names_what_went_wrong() -> None:
    lines = list(summary([GOOD, WRONG, {**GOOD, "seed": 2}]))
    assert lines[0] == "3 runs in 4 minutes, 1 went wrong"
    assert lines[1] == "kills: kills 24, aggregator 10, broker 8, client 12, two at once 6"
    assert lines[2] == "packets: pass 10000, drop 40, drop in silence 4, hold 60"
    assert lines[3:] == [f"seed 1: {WRONG['wrong']}"]
