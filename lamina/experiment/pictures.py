"""The report's pictures: what a metric costs, every method of a problem in one picture.

Rules: a method has one colour in all pictures of a report. A line is the mean of the repeats, the band
around it from the least to the most of them. A centralised model is a ceiling where its own cost has no
meaning beside a client's: a dashed line across. Every axis has its unit. Matplotlib is imported here only.

Next: `lamina/experiment/compare.py`, what is drawn.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lamina.experiment.compare import Method, Of, Problem, band, flop_unit, traffic
from wire.errors import UserError

COLOURS = {
    "end-to-end": "#7a7f87",
    "progressive": "#e69f00",
    "layer-wise": "#0072b2",
    "centralised": "#222222",
}
"""Of methods that are named by their schedule alone; as `lamina plan --plot` has them."""

OTHERS = ("#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6bb1", "#a6761d", "#b5bd00", "#e31a1c")
DPI = 150
_FAR_APART = 8.0  # times, from which an axis is logarithmic

Colours = dict[str, str]


def matplotlib_is_here() -> None:
    """Raises `UserError` where it is not."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"a report needs {error.name}", 'pip install "lamina[experiment]"') from error
    matplotlib.use("Agg")


def colours_of(labels: Sequence[str]) -> Colours:
    """Label -> colour, all different until there are more than colours."""
    found: Colours = {}
    for label in labels:
        if label not in found:
            free = [one for one in OTHERS if one not in found.values()] or OTHERS
            found[label] = COLOURS.get(label, free[len(found) % len(free)] if free is OTHERS else free[0])
    return found


def draw_costs(problem: Problem, metric: str, chance: float | None, colours: Colours, path: Path) -> None:
    """The metric over rounds, bytes, FLOPs and memory."""
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(10, 7.2), sharey=True, layout="constrained")
    rounds, sent, computed, memory = grid.flat
    _curves(rounds, problem, metric, colours, lambda one: float(one.round), 1.0, everyone=True)
    rounds.set_xlabel("rounds of the run")
    rounds.xaxis.get_major_locator().set_params(integer=True)
    _curves(sent, problem, metric, colours, traffic, 1e6)
    sent.set_xlabel("MB that a client has sent and received")
    unit, flop = flop_unit(result for method in problem.methods for result in method.results)
    _curves(computed, problem, metric, colours, lambda one: one.flops, unit)
    computed.set_xlabel(f"{flop} that a client has computed")
    _memory(memory, problem, metric, colours)
    for axes in grid.flat:
        if chance is not None:
            axes.axhline(100 * chance, color="#999999", linewidth=0.9, linestyle=":", label="chance")
        _plain(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"{metric} of the hold-out, %")
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    _legend(figure, handles)
    if problem.label:
        figure.suptitle(problem.label, fontsize=11)
    _save(figure, path)


def draw_summary(found: Sequence[Problem], metric: str, colours: Colours, path: Path) -> None:
    """The final metric on each problem, methods side by side."""
    from matplotlib import pyplot

    labels = list(dict.fromkeys(method.label for problem in found for method in problem.methods))
    width = max(6.0, 1.2 * len(found) + 2.5)
    figure, axes = pyplot.subplots(figsize=(width, 4.2), layout="constrained")
    for place, label in enumerate(labels):
        shift = (place - (len(labels) - 1) / 2) * min(0.12, 0.7 / len(labels))
        for number, problem in enumerate(found):
            values = [
                100 * result.metrics[metric]
                for method in problem.methods
                if method.label == label
                for result in method.results
                if metric in result.metrics
            ]
            if not values:
                continue
            mean = statistics.mean(values)
            axes.errorbar(
                number + shift,
                mean,
                [[mean - min(values)], [max(values) - mean]],
                fmt="o",
                color=colours[label],
                capsize=3,
                label=label,
            )
    axes.set_xticks(range(len(found)), [problem.label.replace(", ", "\n") for problem in found])
    axes.set_xlim(-0.6, len(found) - 0.4)
    axes.set_ylabel(f"{metric} of the hold-out, %")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    _legend(figure, handles)
    _plain(axes)
    _save(figure, path)


def _curves(
    axes: Any,
    problem: Problem,
    metric: str,
    colours: Colours,
    of: Of,
    unit: float,
    *,
    everyone: bool = False,
) -> None:
    """everyone: draw a centralised model's curve too, else it is a line across."""
    ends: list[float] = []
    for place, method in enumerate(problem.methods):
        curves = method.curves(of, metric)
        if not curves:
            continue
        colour = colours[method.label]
        if method.is_centralised and not everyone:
            _ceiling(axes, method, metric, colour)
            continue
        x, mean, least, most = band([(xs / unit, 100 * ys) for xs, ys in curves])
        ends.append(float(x[-1]))
        dash = "--" if method.is_centralised else "-"
        marker = "o" if len(x) <= 12 else ""
        axes.plot(
            x,
            mean,
            dash,
            color=colour,
            linewidth=_width(place, len(problem.methods)),
            marker=marker,
            markersize=3.5,
            label=method.label,
        )
        axes.fill_between(x, least, most, color=colour, alpha=0.16, linewidth=0)
    if ends and max(ends) > _FAR_APART * min(ends):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlim(left=0)


def _memory(axes: Any, problem: Problem, metric: str, colours: Colours) -> None:
    """The final metric at a client's peak memory."""
    largest = 0.0
    for place, method in enumerate(problem.methods):
        colour = colours[method.label]
        if method.is_centralised:
            _ceiling(axes, method, metric, colour)
            continue
        known = [
            (result.last.peak_memory_mb, 100 * result.metrics[metric])
            for result in method.results
            if result.last.peak_memory_mb is not None and metric in result.metrics
        ]
        if not known:
            continue
        values = np.array(known)
        mean, least, most = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
        axes.errorbar(
            *mean,
            xerr=[[mean[0] - least[0]], [most[0] - mean[0]]],
            yerr=[[mean[1] - least[1]], [most[1] - mean[1]]],
            fmt="o",
            color=colour,
            markersize=11 - 6 * place / max(1, len(problem.methods) - 1),
            capsize=3,
        )
        largest = max(largest, float(most[0]))
    axes.set_xlim(0, 1.15 * largest or 1.0)
    axes.set_xlabel("peak memory of a client, MB (metric at the end)")


def _width(place: int, methods: int) -> float:
    """Of a line, in points: the first is the widest, so lines that are equal are all seen."""
    return 3.2 - 1.8 * place / max(1, methods - 1)


def _ceiling(axes: Any, method: Method, metric: str, colour: str) -> None:
    values = [100 * result.metrics[metric] for result in method.results if metric in result.metrics]
    if values:
        axes.axhline(
            statistics.mean(values), color=colour, linewidth=1.4, linestyle="--", label=method.label
        )


def _legend(figure: Any, handles: dict[str, Any]) -> None:
    """Of all panels, below them. handles: by label."""
    longest = 0.7 + 0.075 * max(map(len, handles), default=0)  # inches
    columns = min(3, max(1, int(figure.get_figwidth() / longest)))
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", "choose another --report") from error
    finally:
        pyplot.close(figure)
