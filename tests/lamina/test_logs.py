"""Logs for people and for machines, and that neither tells a password."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregator.events import (
    ClientCame,
    ClientLeft,
    Event,
    Figures,
    RoundClosed,
    RoundOpened,
    RunClosed,
    RunOpened,
    UpdateAccepted,
    UpdateRefused,
    UsageTold,
)
from lamina.event_log import note
from lamina.logs import JsonLines, Text, without_logins
from wire.errors import TooLarge
from wire.messages import Hello, RoundKey, Usage

ROOT = Path(__file__).parents[2]
KEY = RoundKey(1, 4)


def record(message: str, *arguments: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("wire.mqtt", logging.WARNING, __file__, 1, message, arguments, None)
    made.created, made.msecs = 1_700_000_000.25, 250.0
    vars(made).update(fields)
    return made


def parsed(made: logging.LogRecord, **constant: object) -> dict[str, object]:
    line = JsonLines(constant).format(made)
    assert "\n" not in line
    fields: dict[str, object] = json.loads(line)
    return fields


def test_a_record_as_json() -> None:
    made = record("%s: refused, %s", KEY, "late", stage=1, round=4, refusal="late")
    assert parsed(made, client="ann") == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "WARNING",
        "logger": "wire.mqtt",
        "message": "stage 2 round 5: refused, late",
        "client": "ann",
        "stage": 1,
        "round": 4,
        "refusal": "late",
    }


def test_what_json_does_not_know_is_told_all_the_same() -> None:
    made = record("a\nb \udcff", loss=float("nan"), key=KEY, path=Path("x"), lost="\udcff")
    told = parsed(made)
    assert told["message"] == "a\nb \udcff"
    assert told["lost"] == "\udcff"
    told = parsed(record("", loss=float("nan"), key=KEY, path=Path("x")))
    assert (told["loss"], told["key"], told["path"]) == (None, {"stage": 1, "round": 4}, "x")


def test_a_traceback_is_a_field() -> None:
    made = record("a defect")
    try:
        raise KeyError("x")
    except KeyError:
        made.exc_info = sys.exc_info()
    traceback = parsed(made)["traceback"]
    assert isinstance(traceback, str)
    assert traceback.endswith("KeyError: 'x'")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no broker at mqtt://ann:secret@pi:1883", "no broker at mqtt://pi:1883"),
        ("mqtts://ann:s%40@ec@pi and http://b:x@y", "mqtts://pi and http://y"),
        ("ann@example.org wrote // something", "ann@example.org wrote // something"),
        ("'mqtt://a' 'b@c'", "'mqtt://a' 'b@c'"),
    ],
)
def test_logins_are_taken_out(text: str, expected: str) -> None:
    assert without_logins(text) == expected
    assert parsed(record("%s", text, address=text))["message"] == expected
    assert parsed(record("", address=text))["address"] == expected
    assert Text().format(record("%s", text)).endswith(expected)


def test_a_round_and_an_error_in_a_message_are_fields_too() -> None:
    """So nobody has to name them twice."""
    message = "%s of %s: %s", KEY, "ann", TooLarge("x")
    told = parsed(record(*message))
    assert (told["stage"], told["round"], told["error"]) == (1, 4, "TooLarge")
    assert parsed(record(*message, error="given"))["error"] == "given"


FIGURES = Figures({"recall@1": 0.5}, 1.5, 10, 11, 12, 13, 61.4, 0.5, 3, 6, 1, 2.88)
EVENTS: list[tuple[Event, int, dict[str, object]]] = [
    (RunOpened("r", "layerwise", (2,), (9,), 3), logging.INFO, {"schedule": "layerwise"}),
    (RunOpened("r", "layerwise", (2,), (9,), 3, KEY), logging.INFO, {"resumed": {"stage": 1, "round": 4}}),
    (ClientCame("ann", Hello({"text": 7}, "onnx", 4096, "0.1")), logging.INFO, {"client": "ann"}),
    (ClientLeft("ann"), logging.WARNING, {"client": "ann"}),
    (RoundOpened(KEY, ("ann", "bob")), logging.INFO, {"cohort": ["ann", "bob"], "extended": False}),
    (RoundOpened(KEY, ("ann",), True), logging.WARNING, {"extended": True}),
    (UpdateAccepted(KEY, "ann", 40, 0.5, 1000), logging.INFO, {"bytes": 1000, "num_examples": 40}),
    (UpdateRefused(KEY, "ann", "late", "it is over"), logging.WARNING, {"refusal": "late"}),
    (RoundClosed(KEY, ("ann",), (), 0.5, {"recall@1": 0.25}, 1.5), logging.INFO, {"loss": 0.5}),
    (RoundClosed(KEY, ("ann",), ("bob",), 0.5, {}, 1.5), logging.WARNING, {"missing": ["bob"]}),
    (UsageTold("ann", Usage(KEY, 1, 2, 3, 4.5)), logging.DEBUG, {"bytes_sent": 1, "client": "ann"}),
    (RunClosed("layerwise", "onnx", 0, (FIGURES,), FIGURES, "run/model"), logging.INFO, {"seed": 0}),
]


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, "lamina.event_log"):
        yield caplog


@pytest.mark.parametrize(("event", "level", "fields"), EVENTS, ids=lambda value: type(value).__name__)
def test_an_event_is_a_record(
    notes: pytest.LogCaptureFixture, event: Event, level: int, fields: dict[str, object]
) -> None:
    note(event)
    (made,) = notes.records
    assert made.levelno == level
    told = parsed(made)
    assert told["event"] == type(event).__name__
    assert told.items() >= fields.items()
    of_a_round = not isinstance(event, RunOpened | RunClosed | ClientCame | ClientLeft)
    assert (told.get("stage"), told.get("round")) == ((1, 4) if of_a_round else (None, None))
    assert "key" not in told


def lamina(folder: Path, *words: str) -> tuple[list[dict[str, object]], int]:
    """The command's records, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "lamina", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == ""
    assert "secret" not in done.stderr
    return [json.loads(line) for line in done.stderr.splitlines()], done.returncode


@pytest.mark.parametrize(
    ("words", "code", "fields"),
    [
        (
            ("--broker", "mqtt://ann:secret@127.0.0.1:1", "--data", "."),
            69,
            {"error": "TransportError", "client": "ann"},
        ),
        (("--broker", "ann:secret@127.0.0.1", "--data", "."), 2, {"error": "UserError"}),
        (("--broker", "mqtt://ann:secret@127.0.0.1:1"), 2, {"error": "MissingParameter", "hint": ""}),
    ],
)
def test_the_last_words_of_a_program_are_a_record_too(
    tmp_path: Path, words: tuple[str, ...], code: int, fields: dict[str, object]
) -> None:
    (tmp_path / "table.csv").write_text("image,text\na.png,a fox\n")
    state = ("--name", "ann", "--dir", str(tmp_path / "state"))
    (last,), returned = lamina(tmp_path, "client", "--log-format", "json", *words, *state)
    assert (last["level"], last["exit_code"], returned) == ("CRITICAL", code, code)
    assert last.items() >= fields.items()
    assert last["message"]


def test_a_config_file_may_choose_the_format(tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text(
        "log-format = 'json'\nbroker = 'mqtt://ann:secret@127.0.0.1:1'\n"
    )
    (tmp_path / "table.csv").write_text("image,text\na.png,a fox\n")
    words = ("client", "--config", "options.toml", "--data", ".", "--dir", "state")
    (last,), code = lamina(tmp_path, *words)
    assert (code, last["error"]) == (69, "TransportError")
    assert last["message"] == "no broker at mqtt://127.0.0.1:1: Connection refused"
