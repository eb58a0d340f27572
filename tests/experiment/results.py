"""Results of rows that never ran, for what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lamina.experiment.result import Result, RoundResult
from lamina.experiment.settings import complete

METRIC = "recall@10"


def round_result(number: int, metric: float, **more: Any) -> RoundResult:
    """One of round `number`, which has cost `number` of everything."""
    values: dict[str, Any] = {
        "stage": 1,
        "round": number,
        "metrics": {METRIC: metric, "chance@10": 0.1},
        "loss": 1.0,
        "bytes_sent": 1e6 * number,
        "bytes_received": 1e6 * number,
        "flops": 1e12 * number,
        "peak_memory_mb": 100.0,
        "seconds": 1.0 * number,
        "cpu_s": 0.5 * number,
    }
    return RoundResult(**(values | more))


def result(name: str, seed: int, done: Sequence[RoundResult], /, **settings: Any) -> Result:
    """A row's, of these settings over the defaults."""
    return Result(
        id=name,
        settings=complete(settings, seed, "test"),
        engine="onnx",
        clients=2,
        first="ann",
        examples={"ann": 10, "bob": 20},
        rounds=tuple(done),
        metrics=done[-1].metrics,
        peak_memory_mb_by_stage=(100.0,),
        updates=4,
        missing=0,
        refusals=0,
        holdout="data/holdout",
        date="2026-01-02T03:04:05+0000",
        version="0",
    )
