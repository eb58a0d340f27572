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

Result = dict[str, Any]
Column = tuple[str, Callable[[Result], float | None], str]

COLUMNS: tuple[Column, ...] = (
    ("peak memory, MB", lambda row: row["peak_mb"], "{:,.0f}"),
    ("above the runtime, MB", lambda row: row["above_mb"], "{:,.0f}"),
    ("TFLOP", lambda row: row["flops"]["total"] / 1e12, "{:,.3g}"),
    ("MB up", lambda row: row["bytes_up"] / 1e6, "{:,.1f}"),
    ("MB down", lambda row: row["bytes_down"] / 1e6, "{:,.1f}"),
    ("CPU, s", lambda row: row["cpu_s"], "{:,.0f}"),
    ("run, s", lambda row: row["wall_s"], "{:,.0f}"),
    ("a round, s", lambda row: row["mean_round_s"], "{:,.1f}"),
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
    for row in rows.values():
        cells = []
        for _, value, _ in COLUMNS:
            mine = value(row)
            theirs = [value(rows[name]) for name in known]
            cells.append(" / ".join(f"{one / mine:.2f}" if mine and one else NONE for one in theirs))
        lines.append([row["title"], *cells])
    return markdown(head, lines)


def growth(rows: dict[str, Result]) -> str:
    """A round of the last stage beside one of the first: medians, without each stage's first round."""
    words = []
    for name in ("recompute", "cached"):
        medians = [statistics.median(stage[1:] or stage) for stage in rows[name]["round_s"]]
        words.append(f"{medians[-1] / medians[0]:.2f} times as long ({rows[name]['title']})")
    return f"A round of the last stage takes, next to one of the first, {' and '.join(words)}."


def beside(rows: dict[str, Result]) -> list[str]:
    """What the Flower client needs beside its row."""
    if FLOWER not in rows:
        return []
    row = rows[FLOWER]
    return [
        f"The SuperNode and SuperExec of a Flower client take {row['beside_mb']:,.0f} MB more than its row "
        f"says (the sum of their peaks). Of its {row['cpu_s']:,.0f} processor seconds, "
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
    head = ["`--memory-budget`, MB", "stages", "peak memory, MB", "by stage, MB", "a round, s"]
    lines = []
    for name, one in sorted(results.items(), key=lambda item: int(item[0])):
        peaks = [f"{peak:.0f}" for peak in one["peak_mb_by_stage"]]
        lines.append(
            [name, str(len(peaks)), f"{one['peak_mb']:.0f}", ", ".join(peaks), f"{one['mean_round_s']:.1f}"]
        )
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
