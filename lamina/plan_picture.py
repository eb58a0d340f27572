"""A plan as a picture: FLOPs, bytes and memory over the stages, for the three schedules side by side.

Rules: one panel a figure, one colour a schedule, in every panel the same. The x axis is the rounds of the
run, so a stage is as wide as it is long, and a schedule of one stage spans the run. Needs matplotlib.

Next: `lamina/plan_command.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from export.costs import ScheduleCost, Setting, StageCost
from wire.errors import UserError

COLOURS = {"layerwise": "#0072b2", "progressive": "#e69f00", "end_to_end": "#555555"}
PANELS: tuple[tuple[str, str, float, Callable[[StageCost], int]], ...] = (
    ("train step, with feature cache", "MFLOPs per example", 1e6, lambda stage: stage.train_flops),
    (
        "train step and whole prefix, without",
        "MFLOPs per example",
        1e6,
        lambda stage: stage.train_flops + stage.prefix_flops,
    ),
    (
        "update, each way, float32",
        "MB per round",
        1e6,
        lambda stage: stage.round_bytes["none"],
    ),
    ("expected peak memory of a client", "MB", 1e6, lambda stage: stage.peak_bytes),
)


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
    scale: float,
    of: Callable[[StageCost], int],
) -> None:
    for cost in costs:
        ends = [0]
        for stage in cost.stages:
            ends.append(ends[-1] + stage.rounds)
        heights = [of(stage) / scale for stage in cost.stages]
        axes.stairs(
            heights, ends, baseline=None, color=COLOURS[cost.schedule], linewidth=2.2, label=cost.schedule
        )
        axes.plot(
            [(begin + end) / 2 for begin, end in pairwise(ends)],
            heights,
            "o",
            color=COLOURS[cost.schedule],
            markersize=4,
        )
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
