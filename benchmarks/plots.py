"""The pictures of the resource benchmark.

Rules: every axis has its unit, every bar its value. Matplotlib is imported here only, without a display.

Next: `benchmarks/report.py`, the page that they are in.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tables import EXACT

try:
    import matplotlib
except ImportError:
    raise SystemExit('the report needs matplotlib: pip install "lamina[plot]"') from None

matplotlib.use("Agg")
from matplotlib import pyplot

Result = dict[str, Any]
GREY, BLUE, ORANGE, GREEN = "#b0b6bf", "#2f6db3", "#e08a1e", "#3b9a5f"
DPI = 150


def draw_rows(rows: dict[str, Result], path: Path, model: str) -> None:
    """Four panels of bars, a bar a row: memory, FLOPs, bytes, processor seconds."""
    panels = (
        (
            "peak memory of the client, MB",
            (("imports alone", GREY, _bare), ("above them", BLUE, lambda row: row["peak_mb"] - _bare(row))),
        ),
        (
            "computing, TFLOP",
            tuple(
                (label, colour, lambda row, key=key: row["flops"][key] / 1e12)
                for label, colour, key in (
                    ("train steps", BLUE, "train"),
                    ("prefix with every batch", ORANGE, "prefix"),
                    ("cache pass", GREEN, "cache"),
                )
            ),
        ),
        (
            "traffic, MB",
            (
                ("up", BLUE, lambda row: row["bytes_up"] / 1e6),
                ("down", ORANGE, lambda row: row["bytes_down"] / 1e6),
            ),
        ),
        ("processor time, s", (("", BLUE, lambda row: row["cpu_s"]),)),
    )
    figure, axes = pyplot.subplots(
        2, 2, figsize=(11, 3.4 + 0.6 * len(rows)), sharey=True, layout="constrained"
    )
    names = list(rows)
    for axis, (title, parts) in zip(axes.flat, panels, strict=True):
        left = [0.0] * len(names)
        for label, colour, value in parts:
            widths = [value(row) for row in rows.values()]
            axis.barh(names, widths, left=left, color=colour, label=label)
            left = [before + width for before, width in zip(left, widths, strict=True)]
        for place, total in enumerate(left):
            axis.text(
                total,
                place,
                f" {total:,.3g}" if total < 1000 else f" {total:,.0f}",
                va="center",
                fontsize=8,
            )
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlim(0, 1.18 * max(left))
        if len(parts) > 1:
            axis.legend(
                fontsize=8, frameon=False, ncols=len(parts), loc="upper left", bbox_to_anchor=(0, -0.1)
            )
        _plain(axis)
    axes[0, 0].invert_yaxis()
    figure.suptitle(f"{model}: one client, the whole run", fontsize=11)
    _save(figure, path)


def draw_rounds(rows: dict[str, Result], path: Path, model: str) -> None:
    """Seconds of a round by stage, cached and recomputed; the first, which fills the cache, apart."""
    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for name, colour in (("recompute", ORANGE), ("cached", BLUE)):
        stages = rows[name]["round_s"]
        places = range(1, len(stages) + 1)
        later = [statistics.median(seconds[1:] or seconds) for seconds in stages]
        axis.plot(places, later, "o-", color=colour, label=f"{name}: median of a stage's later rounds")
        first = [seconds[0] for seconds in stages]
        axis.plot(
            places, first, "o", color=colour, fillstyle="none", label=f"{name}: a stage's first round"
        )
    axis.set_xticks(list(places))
    axis.set_xlabel("stage (blocks of each encoder attached)")
    axis.set_ylabel("seconds of a round, slowest client")
    axis.set_ylim(0)
    axis.legend(fontsize=8, frameon=False)
    axis.set_title(f"{model}, layer-wise", fontsize=11)
    _plain(axis, grid="y")
    _save(figure, path)


def draw_curves(curves: dict[str, Result], path: Path, model: str) -> None:
    """Training loss of each round, and below how far it is from that with float32 features."""
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    exact = curves[EXACT]
    styles = {
        EXACT: (GREY, "-", 4.0),
        "float16 cache": (BLUE, "-", 1.6),
        "recomputed": (ORANGE, "--", 1.6),
    }
    for name, one in curves.items():
        colour, line, width = styles[name]
        rounds = range(1, len(one["losses"]) + 1)
        above.plot(rounds, one["losses"], line, color=colour, linewidth=width, label=name)
        if one is not exact:
            apart = [abs(a - b) for a, b in zip(one["losses"], exact["losses"], strict=True)]
            below.plot(rounds, apart, line, color=colour, linewidth=width, label=name)
    ends = 0.5
    for stage in next(iter(curves.values()))["round_s"][:-1]:
        ends += len(stage)
        for axis in (above, below):
            axis.axvline(ends, color=GREY, linewidth=0.8, linestyle=":")
    above.xaxis.get_major_locator().set_params(integer=True)
    above.set_ylabel("training loss of the round")
    above.legend(fontsize=8, frameon=False)
    above.set_title(f"{model}, layer-wise; dotted: a new stage", fontsize=11)
    if any(value > 0 for line in below.lines for value in _heights(line)):
        below.set_yscale("symlog", linthresh=1e-7)
        below.set_ylim(0)
    below.set_ylabel("difference from\nfloat32 cache")
    below.set_xlabel("round")
    for axis in (above, below):
        _plain(axis, grid="y")
    _save(figure, path)


def draw_breakdown(results: dict[str, Result], path: Path, model: str) -> None:
    """Resident memory step by step, and the peak so far, a panel for each stage."""
    figure, axes = pyplot.subplots(
        1, len(results), figsize=(5 * len(results), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, one) in zip(axes.flat, results.items(), strict=True):
        steps = one["steps"]
        resident = [one["resident_mb"] for one in steps.values()]
        peak = [one["peak_mb"] for one in steps.values()]
        axis.barh(list(steps), resident, color=BLUE, label="resident")
        axis.plot(
            peak,
            range(len(steps)),
            "|",
            color=ORANGE,
            markersize=14,
            markeredgewidth=2.5,
            label="peak so far",
        )
        for place, (now, most) in enumerate(zip(resident, peak, strict=True)):
            text = f"  {now:,.0f}" if round(now) == round(most) else f"  {now:,.0f}, peak {most:,.0f}"
            axis.text(max(now, most), place, text, va="center", fontsize=8)
        axis.set_xlim(0, 1.45 * max(peak))
        axis.set_xlabel("MB of the process")
        axis.set_title(name, fontsize=10, loc="left")
        axis.legend(fontsize=8, frameon=False, loc="upper right")
        _plain(axis)
    axes[0, 0].invert_yaxis()
    figure.suptitle(f"{model}: a client's memory as it goes along", fontsize=11)
    _save(figure, path)


def _bare(row: Result) -> float:
    return float(row["bare_mb"] or 0.0)


def _heights(line: Any) -> Sequence[float]:
    return [float(value) for value in line.get_ydata()]


def _plain(axis: Any, grid: str = "x") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="#e4e7eb")
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
