"""The tables and sentences of the resource benchmark's page, each from results alone.

Rules: a figure that was not measured is a dash. Ratios are how many times less a client needs than with
end-to-end training and than with Flower.

Next: `benchmarks/report.py`, which puts them together.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

FLOWER = "flower"
REFERENCES = ("end-to-end", FLOWER)
SEEDED = ("cached", "int8")
EXACT = "float32 cache"
NONE = "–"
CPU, RUN, ROUND = "CPU, s", "run, s", "a round, s"
TIMES = (CPU, RUN, ROUND)
"""Columns of which no ratio to Flower is told: its processes start anew in each round, and its clock is the
server's (see the page's notes).
"""

Result = dict[str, Any]
Column = tuple[str, Callable[[Result], float | None], str]

COLUMNS: tuple[Column, ...] = (
    ("peak memory, MB", lambda row: row["peak_mb"], "{:,.0f}"),
    ("above the runtime, MB", lambda row: row["above_mb"], "{:,.0f}"),
    ("TFLOP", lambda row: row["flops"]["total"] / 1e12, "{:,.3g}"),
    ("MB up", lambda row: row["bytes_up"] / 1e6, "{:,.1f}"),
    ("MB down", lambda row: row["bytes_down"] / 1e6, "{:,.1f}"),
    (CPU, lambda row: row["cpu_s"], "{:,.0f}"),
    (RUN, lambda row: row["wall_s"], "{:,.0f}"),
    (ROUND, lambda row: row["mean_round_s"], "{:,.1f}"),
)


def table(rows: dict[str, Result]) -> str:
    """Each row's figures."""
    head = ["", *(name for name, _, _ in COLUMNS), "recall@10"]
    lines = []
    for row in rows.values():
        figures = [shown(pattern, value(row)) for _, value, pattern in COLUMNS]
        lines.append([row["title"], *figures, percent(row["recall"])])
    chance = next(iter(rows.values()))["chance"]
    return markdown(head, lines) + f"\n\nrecall@10 of the hold-out; chance is {percent(chance)}."


def ratios(rows: dict[str, Result]) -> str:
    """How many times less than the references."""
    known = [name for name in REFERENCES if name in rows]
    if not known:
        return ""
    head = [
        "times less than " + " / ".join(known).replace(FLOWER, "Flower"),
        *(name for name, _, _ in COLUMNS),
    ]
    lines = []
    for key, row in rows.items():
        cells = []
        for column, value, _ in COLUMNS:
            mine = value(row)
            theirs = [
                None if column in TIMES and FLOWER in (name, key) else value(rows[name]) for name in known
            ]
            cells.append(" / ".join(f"{one / mine:.2f}" if mine and one else NONE for one in theirs))
        lines.append([row["title"], *cells])
    return markdown(head, lines)


def growth(rows: dict[str, Result]) -> str:
    """A round of the later stages beside an earlier one; the first, which trains more, is left out."""
    lines = []
    for name in ("recompute", "cached"):
        stages = rows[name]["round_s"][1:]
        half = (len(stages) + 1) // 2
        early, late = stages[:half], stages[-half:]
        ratios = [
            statistics.median(value for stage in late for value in stage[rounds])
            / statistics.median(value for stage in early for value in stage[rounds])
            for rounds in (slice(1), slice(1, None))
        ]
        lines.append([rows[name]["title"], *(f"{ratio:.2f}" for ratio in ratios)])
    head = [
        "a round in the second half of the stages, times as long as in the first",
        "a stage's first round, with the cache's pass",
        "its others",
    ]
    return markdown(head, lines) + "\n\nMedians of the rounds, without the first stage, which trains more."


def beside(rows: dict[str, Result]) -> list[str]:
    """What the Flower client needs beside its row."""
    if FLOWER not in rows:
        return []
    row = rows[FLOWER]
    few = ""
    if row["rounds_run"] < row["rounds"]:
        few = (
            f"Flower ran the first {row['rounds_run']} rounds, of which its bytes, seconds and FLOPs for "
            f"{row['rounds']} are made. "
        )
    return [
        f"{few}The SuperNode and SuperExec of a Flower client take {row['beside_mb']:,.0f} MB more than "
        f"its row says (the sum of their peaks). Of its {row['cpu_s']:,.0f} processor seconds, "
        f"{row['train_cpu_s']:,.0f} are spent within the training function, of the run's "
        f"{row['wall_s']:,.0f} s {row['train_s']:,.0f}. "
        f"flwr {row['packages']['flwr']}, torch {row['packages']['torch']}.",
        "",
    ]


def seeds(rows: dict[str, Result], others: dict[str, Result]) -> str:
    """Recall of exact and compressed updates: the rows', and those of other seeds by row and seed."""
    lines = []
    for kind in SEEDED:
        again = [one for name, one in others.items() if name.split()[0] == kind]
        recalls = [one["recall"] for one in (rows[kind], *again)]
        spread = statistics.stdev(recalls) if len(recalls) > 1 else 0.0
        figures = (", ".join(map(percent, recalls)), percent(statistics.mean(recalls)), percent(spread))
        lines.append([rows[kind]["title"], *figures])
    return markdown(["recall@10 by seed", "each", "mean", "standard deviation"], lines)


def differences(curves: dict[str, Result]) -> str:
    """How far training losses are from those with float32 features."""
    exact, lines = curves[EXACT]["losses"], []
    for name, one in curves.items():
        largest = max(abs(a - b) for a, b in zip(one["losses"], exact, strict=True))
        lines.append([name, f"{one['losses'][-1]:.4f}", f"{largest:.1g}", percent(one["recall"])])
    head = ["features", "last training loss", "largest difference of a round from float32", "recall@10"]
    return markdown(head, lines)


def budgets(results: dict[str, Result]) -> str:
    """What clients took that were given so much."""
    head = ["`--memory-budget`, MB", "stages", "peak memory, MB", "the peak so far by stage, MB"]
    lines = []
    for name, one in sorted(results.items(), key=lambda item: int(item[0])):
        peaks = [f"{peak:.0f}" for peak in one["peak_mb_by_stage"]]
        lines.append([name, str(len(peaks)), f"{one['peak_mb']:.0f}", ", ".join(peaks)])
    return markdown(head, lines)


def shown(pattern: str, value: float | None) -> str:
    """A figure, or a dash."""
    return NONE if value is None else pattern.format(value)


def percent(value: float | None) -> str:
    """A share."""
    return NONE if value is None else f"{100 * value:.1f}%"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))
