"""A plan as a picture: FLOPs, bytes and memory over the stages, for the three schedules side by side.

Rules: one panel a figure, one colour a schedule, in every panel the same. The x axis is the rounds of the
run, so a stage is as wide as it is long, and a schedule of one stage spans the run. Needs matplotlib.

Next: `lamina/plan_command.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from export.costs import ScheduleCost, Setting, StageCost
from wire.errors import UserError

LINES = {"end_to_end": ("#aaaaaa", 7), "progressive": ("#e69f00", 4), "layerwise": ("#0072b2", 1.8)}
"""Schedule -> colour and width in points, the widest first, so equal lines are all seen."""
PANELS: tuple[tuple[str, str, Callable[[StageCost, int], float]], ...] = (
    (
        "Train step, and its share of the feature cache's pass",
        "MFLOP per example",
        lambda stage, epochs: stage.train_flops + stage.segment_flops / (stage.rounds * epochs),
    ),
    (
        "Train step and whole prefix, without the cache",
        "MFLOP per example",
        lambda stage, _epochs: stage.train_flops + stage.prefix_flops,
    ),
    (
        "Bytes down and as many up, float32",
        "MB per round",
        lambda stage, _epochs: stage.round_bytes["none"],
    ),
    ("Expected peak memory of a client", "MB", lambda stage, _epochs: stage.peak_bytes),
)
"""Title, unit, and a stage's height in it over 10^6, by the local epochs of a round."""


def draw(costs: list[ScheduleCost], setting: Setting, path: Path) -> None:
    """Write the picture to `path`; its ending says the format. Raises `UserError`."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"a picture needs {error.name}", 'pip install "lamina[plot]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(10, 6.4), sharex=True, layout="constrained")
    try:
        for axes, panel in zip(grid.flat, PANELS, strict=True):
            _panel(axes, costs, *panel)
        for axes in grid[-1]:
            axes.set_xlabel("rounds of the run")
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.suptitle(f"engine {setting.engine}, batches of {setting.batch_size}", fontsize=11)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {error}", "name a file such as plan.png") from error
    finally:
        pyplot.close(figure)


def _panel(
    axes: Any,
    costs: list[ScheduleCost],
    title: str,
    unit: str,
    of: Callable[[StageCost, int], float],
) -> None:
    ordered = sorted(costs, key=lambda cost: list(LINES).index(cost.schedule))
    for cost in ordered:
        colour, width = LINES[cost.schedule]
        ends = [0, *accumulate(stage.rounds for stage in cost.stages)]
        heights = [of(stage, cost.local_epochs) / 1e6 for stage in cost.stages]
        axes.stairs(heights, ends, baseline=None, color=colour, linewidth=width, label=cost.schedule)
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
