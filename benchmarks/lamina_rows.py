"""The benchmark's rows of Lamina: each a plain `lamina run` in its own processes, and what its books say.

Rules: nothing is measured here that a person could not read after a run of theirs: bytes are counted at the
MQTT socket, memory is the client's high-water mark, both as clients have told the aggregator. A round lasts
from its offer until its last client is done; the aggregator's evaluation after it is not a client's time.

Next: `benchmarks/flower_row.py`, the row beside them.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flops import client_flops
from scale import SEED, Scale, run_python

INT8 = ("--compression", "int8")
LEAN = (*INT8, "--prefix-compression", "float16")


@dataclass(frozen=True)
class Row:
    """options: of `lamina run`, beside the scale's. micro_batch_size: 0 for none.

    cached: whether the prefix runs once a stage.
    """

    title: str
    schedule: str
    options: tuple[str, ...] = ()
    engine: str = "onnx"
    cached: bool = True
    micro_batch_size: int = 0

    def arguments(self) -> list[str]:
        """What sets it apart, for `lamina run`."""
        micro = ("--micro-batch-size", str(self.micro_batch_size)) if self.micro_batch_size else ()
        return [*self.options, *micro]


ROWS = {
    "end-to-end": Row("end-to-end (FedMML)", "end_to_end"),
    "progressive": Row("progressive (Prog-FedMML)", "progressive"),
    "recompute": Row(
        "layer-wise, prefix with every batch (LW-FedMML)",
        "layerwise",
        ("--max-feature-mb", "0"),
        cached=False,
    ),
    "cached": Row("layer-wise, feature cache", "layerwise"),
    "int8": Row("layer-wise, cache, int8 updates", "layerwise", INT8),
    "lean": Row(
        "layer-wise, all of it: cache, int8, prefix float16, micro-batches of 8",
        "layerwise",
        LEAN,
        micro_batch_size=8,
    ),
    "lean-executorch": Row("the same on ExecuTorch", "layerwise", LEAN, "executorch", micro_batch_size=8),
}


def measure_row(
    row: Row, scale: Scale, data: Path, out: Path, name: str, extra: Sequence[str] = (), seed: int = SEED
) -> dict[str, Any]:
    """A run of this row. extra: more options. Raises RuntimeError with what `lamina run` said."""
    options = [*row.arguments(), *extra]
    known = run_python("-m", "lamina", "run", "--help")
    missing = [word for word in options if word.startswith("--") and word not in known]
    if missing:
        raise RuntimeError(f"this lamina run has no {' and '.join(missing)}")
    folder = out / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["--model", scale.model, "--schedule", row.schedule]
    arguments += ["--rounds", str(scale.rounds_of(row.schedule))]
    arguments += ["--local-epochs", str(scale.local_epochs), "--batch-size", str(scale.batch_size)]
    arguments += ["--learning-rate", str(scale.learning_rate), "--seed", str(seed)]
    arguments += ["--engine", row.engine, "--threads", str(scale.threads), "--round-deadline-s", "7200"]
    arguments += [word for option in scale.options for word in ("--option", option)]
    arguments += ["--data", str(data), "--dir", str(out), "--name", name, "--json", *options]
    log = folder.with_name(f"{name}.log")
    answer = json.loads(run_python("-m", "lamina", "run", *arguments, log=log).splitlines()[-1])
    result = from_books(folder / "aggregator" / "books.sqlite")
    total, metrics = answer["total"], answer["total"]["metrics"]
    if total["refusals"] or total["updates"] != result["clients"] * total["rounds"]:
        raise RuntimeError(f"updates were refused or missing, see {folder / 'logs'}")
    flops = client_flops(
        scale,
        row.schedule,
        result["examples"],
        cached=row.cached,
        micro_batch_size=row.micro_batch_size,
    )
    return result | {
        "title": row.title,
        "options": options,
        "engine": row.engine,
        "rounds": total["rounds"],
        "peak_mb": total["peak_rss_mb_per_client"],
        "bytes_up": total["bytes_sent_per_client"],
        "bytes_down": total["bytes_received_per_client"],
        "flops": flops,
        "recall": metrics.get("recall@10"),
        "chance": metrics.get("chance@10"),
        "metrics": metrics,
        "loss": total["loss"],
        "with_evaluation_s": total["seconds"],
    }


def from_books(path: Path) -> dict[str, Any]:
    """What a run has cost its clients, from the aggregator's database.

    losses: of each round. round_s: [stage][round], until the last client was done. cpu_s, examples: of a
    client, the mean.
    """
    with sqlite3.connect(path) as books:
        books.row_factory = sqlite3.Row
        usage = [dict(row) for row in books.execute("SELECT * FROM usage ORDER BY stage, round, client")]
        losses = [row["loss"] for row in books.execute("SELECT loss FROM rounds ORDER BY stage, round")]
        counts = dict(books.execute("SELECT client, MAX(num_examples) FROM updates GROUP BY client"))
    slowest: dict[int, dict[int, float]] = {}
    for row in usage:
        rounds = slowest.setdefault(row["stage"], {})
        rounds[row["round"]] = max(rounds.get(row["round"], 0.0), row["seconds"])
    round_s = [[rounds[number] for number in sorted(rounds)] for _, rounds in sorted(slowest.items())]
    peaks = [
        max(row["peak_rss_bytes"] for row in usage if row["stage"] <= stage) / 1e6
        for stage in sorted(slowest)
    ]
    return {
        "clients": len(counts),
        "examples": statistics.mean(counts.values()),
        "losses": losses,
        "round_s": round_s,
        "mean_round_s": statistics.mean(value for stage in round_s for value in stage),
        "wall_s": sum(value for stage in round_s for value in stage),
        "peak_mb_by_stage": peaks,
        "cpu_s": sum(row["cpu_s"] for row in usage) / len(counts),
    }
