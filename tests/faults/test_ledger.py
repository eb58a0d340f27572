"""The check of the books: it is content with books that agree, and names whatever does not."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from ledger import disagreements, main

SCHEMA = """
CREATE TABLE rounds(stage INTEGER, round INTEGER);
CREATE TABLE updates(
  stage INTEGER, round INTEGER, client TEXT, sha256 TEXT, num_examples INTEGER, counted_in INTEGER);
"""
CLIENTS = ("ann", "bob")
Row = tuple[int, int, str, str, int]
ROUNDS = [(0, 0), (0, 1), (1, 0)]
UPDATES: list[Row] = [
    (stage, number, client, f"{client}-{stage}-{number}".ljust(64, "0"), 40)
    for stage, number in ROUNDS
    for client in CLIENTS
]


def record(event: str, row: Row, **more: Any) -> str:
    stage, number, client, sha256, num_examples = row
    fields = {"stage": stage, "round": number, "client": client, "sha256": sha256}
    return json.dumps({"event": event, **fields, "num_examples": num_examples, **more})


def lines_of(rows: list[Row]) -> list[str]:
    return [
        line
        for row in rows
        for line in (
            json.dumps({"message": "joining run r"}),
            record("report", row),
            record("receipt", row, refusal=None),
        )
    ]


def check(
    folder: Path,
    *,
    rounds: list[tuple[int, int]] = ROUNDS,
    updates: list[Row] = UPDATES,
    logged: list[str] | None = None,
) -> list[str]:
    folder.mkdir(exist_ok=True)
    database = sqlite3.connect(folder / "books.sqlite")
    database.executescript(SCHEMA)
    database.executemany("INSERT INTO rounds VALUES (?, ?)", rounds)
    database.executemany("INSERT INTO updates VALUES (?1, ?2, ?3, ?4, ?5, ?2)", updates)
    database.commit()
    database.close()
    log = folder / "clients.log"
    log.write_text("\n".join(lines_of(UPDATES) if logged is None else logged))
    return list(disagreements(folder, [log], CLIENTS))


def test_books_that_agree(tmp_path: Path) -> None:
    assert check(tmp_path) == []


def test_reports_without_a_receipt_and_refused_ones_are_no_disagreement(tmp_path: Path) -> None:
    other: Row = (0, 1, "ann", "f" * 64, 40)
    logged = [*lines_of(UPDATES), record("report", other), record("receipt", other, refusal="duplicate")]
    logged += ["", '{"event": "report", "sta', "lamina: no broker"]
    assert check(tmp_path, logged=logged) == []


def test_an_update_that_nobody_sent(tmp_path: Path) -> None:
    logged = [line for line in lines_of(UPDATES) if "bob-1-0" not in line]
    (found,) = check(tmp_path, logged=logged)
    assert found.startswith("in the books and never sent: stage 2 round 1 of bob, bob-1-0")


def test_an_update_that_was_sent_with_another_weight(tmp_path: Path) -> None:
    updates = [(*row[:4], 41) if row is UPDATES[0] else row for row in UPDATES]
    found = check(tmp_path, updates=updates)
    assert [line.split(":")[0] for line in found] == [
        "in the books and never sent",
        "told accepted and not in the books",
    ]


def test_an_accepted_update_that_is_lost(tmp_path: Path) -> None:
    found = check(tmp_path, updates=UPDATES[1:])
    assert found[0].startswith("told accepted and not in the books: stage 1 round 1 of ann")
    assert found[1:] == ["combined without ann: stage 1 round 1"]


def test_an_update_in_two_rounds(tmp_path: Path) -> None:
    first = UPDATES[0]
    twice = [(0, 1, *first[2:]) if row[:3] == (0, 1, "ann") else row for row in UPDATES]
    assert check(tmp_path, updates=twice, logged=lines_of(twice)) == [
        f"counted twice: {first[3][:16]} of ann in stage 1 round 1, stage 1 round 2"
    ]


def test_an_update_twice_in_the_books(tmp_path: Path) -> None:
    (found,) = check(tmp_path, updates=[*UPDATES, UPDATES[0]])
    assert found.startswith("counted twice: stage 1 round 1 of ann, ann-0-0")


def test_a_late_update_counts_in_the_round_that_the_books_say(tmp_path: Path) -> None:
    check(tmp_path)
    books = sqlite3.connect(tmp_path / "books.sqlite")
    books.execute("UPDATE updates SET counted_in = 1 WHERE (stage, round, client) = (0, 0, 'bob')")
    books.commit()
    books.close()
    logs = [tmp_path / "clients.log"]
    assert list(disagreements(tmp_path, logs)) == []
    assert list(disagreements(tmp_path, logs, CLIENTS)) == ["combined without bob: stage 1 round 1"]


def test_a_round_without_updates(tmp_path: Path) -> None:
    found = check(tmp_path, rounds=[*ROUNDS, (1, 1)])
    assert found == ["combined without ann, bob: stage 2 round 2"]
    assert list(disagreements(tmp_path, [tmp_path / "clients.log"])) == [
        "combined without any update: stage 2 round 2"
    ]


def test_a_round_that_was_passed_over(tmp_path: Path) -> None:
    assert check(tmp_path, rounds=[(0, 0), (1, 0)]) == ["accepted and passed over: stage 1 round 2"]


def test_a_round_that_is_still_open_is_none(tmp_path: Path) -> None:
    assert check(tmp_path, rounds=ROUNDS[:2]) == []


@pytest.mark.parametrize(("rounds", "code"), [(ROUNDS, 0), (ROUNDS[:1] + ROUNDS[2:], 1)])
def test_the_script(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rounds: list[tuple[int, int]],
    code: int,
) -> None:
    check(tmp_path, rounds=rounds)
    monkeypatch.setattr("sys.argv", ["ledger.py", str(tmp_path), str(tmp_path / "clients.log")])
    assert main() == code
    told = capsys.readouterr().out
    expected = "the books agree: 3 rounds, 6 updates\n", "accepted and passed over: stage 1 round 2\n"
    assert told == expected[code]
