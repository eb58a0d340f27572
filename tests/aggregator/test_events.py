"""Events: each goes through JSON on one line and comes out as it was."""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import msgspec
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
    from_json,
    to_json,
)
from wire.messages import Hello, RoundKey, Usage

KEY = RoundKey(2, 11)
AWKWARD = 'a\nb\r\u2028\u2029\x00"\\ ä \U0001f600'
FIGURES = Figures(
    metrics={"recall@1": 0.1 + 0.2, "chance@1": 1e-300},
    loss=1.5,
    bytes_sent_per_client=2**40,
    bytes_received_per_client=1,
    update_bytes_per_client=0,
    raw_update_bytes_per_client=0,
    peak_rss_mb_per_client=61.4,
    cpu_s_per_client=0.5,
    rounds=3,
    updates=6,
    refusals=1,
    seconds=2.88,
)


def closed(**changes: Any) -> RoundClosed:
    fields = {
        "key": KEY,
        "accepted": ("ada", "ben"),
        "missing": ("cyd",),
        "loss": 0.1 + 0.2,
        "metrics": {"accuracy": 0.25},
        "seconds": 1e-9,
    }
    return RoundClosed(**{**fields, **changes})


def finished(**changes: Any) -> RunClosed:
    fields = {
        "schedule": "layerwise",
        "engine": "onnx",
        "seed": 2**31 - 1,
        "stages": (FIGURES, FIGURES),
        "total": FIGURES,
        "model": "runs/r1/model",
    }
    return RunClosed(**{**fields, **changes})


EXAMPLES: list[Event] = [
    RunOpened("r1", "layerwise", (2, 3), (640, 2**40), 2),
    RunOpened("r1", "end_to_end", (2,), (640,), 2, resumed=KEY),
    ClientCame("ada", Hello({"text": 7, "image": 5}, "onnx", 4096, "0.1")),
    ClientCame("ada", Hello({}, "onnx", 0, AWKWARD[:64])),
    ClientLeft("ada"),
    RoundOpened(KEY, ("ada", "ben")),
    RoundOpened(KEY, (), extended=True),
    UpdateAccepted(KEY, "ada", 2**63 - 1, 0.1 + 0.2, 2**63 - 1),
    UpdateRefused(KEY, "ben", "late", "stage 3 round 12 is over"),
    UpdateRefused(KEY, "ben", "malformed", AWKWARD),
    closed(),
    closed(accepted=(), missing=(), metrics={}),
    UsageTold("ada", Usage(KEY, 2**40, 0, 2**33, 12.25)),
    finished(),
    finished(stages=(), model=AWKWARD),
]


def name_of(value: object) -> str:
    return type(value).__name__


def test_every_event_has_an_example():
    assert {type(event) for event in EXAMPLES} == set(get_args(Event))


@pytest.mark.parametrize("event", EXAMPLES, ids=name_of)
def test_an_event_comes_out_as_it_went_in(event: Event):
    line = to_json(event)
    again = from_json(line)
    assert type(again) is type(event)
    assert again == event
    assert from_json(line.encode()) == event
    assert to_json(again) == line


@pytest.mark.parametrize("event", EXAMPLES, ids=name_of)
def test_an_event_is_one_line_that_other_programs_read(event: Event):
    line = to_json(event)
    assert not set(line) & {"\n", "\r", "\0"}
    fields = json.loads(line)
    assert fields["type"] == name_of(event)
    assert list(fields) == ["type", *type(event).__struct_fields__]


def test_many_events_are_read_again_line_by_line():
    log = "".join(to_json(event) + "\n" for event in EXAMPLES)
    assert [from_json(line) for line in log.encode().splitlines()] == EXAMPLES


def test_the_order_of_names_is_kept():
    came = from_json(to_json(EXAMPLES[2]))
    assert isinstance(came, ClientCame)
    assert list(came.hello.num_examples) == ["text", "image"]


@pytest.mark.parametrize("event", EXAMPLES, ids=name_of)
def test_fields_of_a_newer_version_are_ignored(event: Event):
    newer = json.loads(to_json(event)) | {"news": [1, {"deep": None}]}
    assert from_json(json.dumps(newer)) == event


@pytest.mark.parametrize(
    "line", ["", "{}", "[]", "null", '{"type":"Nonsense"}', '{"type":"ClientLeft"}', '{"client":"ada"}']
)
def test_what_is_no_event_is_refused(line: str):
    with pytest.raises(msgspec.MsgspecError):
        from_json(line)


NOT_FINITE: list[Event] = [
    closed(loss=value, metrics={"accuracy": value}) for value in (math.nan, math.inf, -math.inf)
] + [
    finished(total=msgspec.structs.replace(FIGURES, loss=math.nan)),
]
