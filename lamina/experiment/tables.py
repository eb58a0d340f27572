"""The report's tables, as Markdown.

Rules: a figure is the mean of the repeats, then their standard deviation where there are several. Bytes,
FLOPs and processor seconds are a client's; what a centralised model sends has no meaning and is a dash.

Next: `lamina/experiment/report.py`, the page that they are on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lamina.experiment.compare import REPEATS, Method, Of, Problem, at_equal, flop_unit, traffic
from lamina.experiment.grid import NONE, shown
from lamina.experiment.result import Result, RoundResult

TRAVELS = ("MB sent", "MB received")

Column = tuple[str, Callable[[RoundResult], float | None], str]


def columns(unit: float, flop: str) -> tuple[Column, ...]:
    """Name, figure and how it is written. unit: what FLOPs are counted in, called `flop`."""
    return (
        ("MB sent", lambda one: one.bytes_sent / 1e6, "{:,.2f}"),
        ("MB received", lambda one: one.bytes_received / 1e6, "{:,.2f}"),
        (flop, lambda one: one.flops / unit, "{:,.3g}"),
        ("peak memory, MB", lambda one: one.peak_memory_mb, "{:,.0f}"),
        ("seconds", lambda one: one.seconds, "{:,.0f}"),
        ("CPU, s", lambda one: one.cpu_s, "{:,.1f}"),
    )


def figures(found: Sequence[Problem], metric: str) -> str:
    """Every method of every problem of a grid, a line each."""
    methods = [(problem, method) for problem in found for method in problem.methods]
    named = list(dict.fromkeys(name for problem in found for name in problem.varied))
    named += list(dict.fromkeys(name for _, method in methods for name in method.varied))
    shown_columns = columns(*flop_unit(result for _, method in methods for result in method.results))
    head = ["", *named, "runs", *([metric] if metric else []), *(name for name, _, _ in shown_columns)]
    lines = []
    for problem, method in methods:
        varied = problem.varied | method.varied
        cells = [method.title, *(shown(varied.get(name)) for name in named)]
        cells.append(str(len(method.results)))
        if metric:
            cells.append(percent([one.metrics.get(metric) for one in method.results]))
        for name, of, pattern in shown_columns:
            hidden = method.is_centralised and name in TRAVELS
            cells.append(NONE if hidden else spread([of(one.last) for one in method.results], pattern))
        lines.append(cells)
    return markdown(head, lines, 1 + len(named))


def equal(found: Sequence[Problem], metric: str) -> str:
    """What methods have reached at the bytes and FLOPs of the one that spends least; empty without."""
    unit, flop = flop_unit(_results(found))
    budgets: tuple[tuple[str, Of, float, str], ...] = (
        ("bytes", traffic, 1e6, "{:,.2f} MB"),
        ("FLOPs", lambda one: one.flops, unit, "{:,.3g} " + flop),
    )
    lines = []
    for problem in found:
        for name, of, one_unit, pattern in budgets:
            compared = at_equal(problem, of, metric)
            if compared is None:
                continue
            budget, reached = compared
            amount = f"{name}: {pattern.format(budget / one_unit)}"
            lines += [[problem.label, amount, label, percent(values)] for label, values in reached.items()]
    return _of_problems(["at equal", "method", metric], lines, 2) if lines else ""


def by_fold(found: Sequence[Problem], metric: str) -> str:
    """What methods reach on each fold, and how far each is from its problem's first, pair by pair.

    A pair is of the same seeds and fold. Empty unless there are several folds.
    """
    folds = sorted({result.settings["fold"] for result in _results(found) if "fold" in result.settings})
    if len(folds) < 2:
        return ""
    lines = []
    for problem in found:
        first = _by_repeat(problem.methods[0], metric)
        for method in problem.methods:
            values = _by_repeat(method, metric)
            of_fold = [[value for repeat, value in values.items() if repeat[-1] == fold] for fold in folds]
            apart = [100 * (values[pair] - first[pair]) for pair in values if pair in first]
            against = spread(apart, "{:+.1f}") if method is not problem.methods[0] else NONE
            lines.append([problem.label, method.label, *map(percent, of_fold), against])
    head = ["method", *(f"fold {fold}" for fold in folds), "points above the first"]
    return _of_problems(head, lines, 1)


def commands(methods: Iterable[Method], experiment: str, folder: Path) -> str:
    """What runs each row again. experiment: FILE and what else is needed."""
    results = [result for method in methods for result in method.results]
    head = ["row", "run it again", "the metrics of its model"]
    lines = [
        [
            result.id,
            f"`lamina experiment {experiment} --only {result.id} --again`",
            _evaluation(result, folder),
        ]
        for result in results
    ]
    return markdown(head, lines, 3)


def brief(result: Result, metric: str) -> str:
    """A result in half a line."""
    last = result.last
    words = [f"{metric} {percent([result.metrics[metric]])}"] if metric in result.metrics else []
    unit, flop = flop_unit([result])
    words += [f"{traffic(last) / 1e6:,.1f} MB of traffic", f"{last.flops / unit:,.3g} {flop}"]
    words += [] if last.peak_memory_mb is None else [f"{last.peak_memory_mb:,.0f} MB of memory"]
    return ", ".join([*words, f"{last.seconds:,.0f} s"])


def percent(values: Sequence[float | None]) -> str:
    """Of shares."""
    return spread([None if value is None else 100 * value for value in values], "{:.1f}", "%")


def spread(values: Sequence[float | None], pattern: str, unit: str = "") -> str:
    """Mean and standard deviation; a dash where one is not known."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return NONE
    mean = pattern.format(statistics.mean(known)) + unit
    unsigned = pattern.replace("+", "")
    return mean if len(known) < 2 else f"{mean} ± {unsigned.format(statistics.stdev(known))}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], words: int) -> str:
    """A table. words: so many columns from the left are words, the others numbers."""
    rule = ["---" if place < words else "---:" for place in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def _results(found: Sequence[Problem]) -> list[Result]:
    return [result for problem in found for method in problem.methods for result in method.results]


def _of_problems(head: Sequence[str], lines: Sequence[Sequence[str]], words: int) -> str:
    """A table of `head`, its lines begun with their problem; without that where it says nothing."""
    if any(line[0] for line in lines):
        return markdown(["", *head], lines, 1 + words)
    return markdown(head, [line[1:] for line in lines], words)


def _by_repeat(method: Method, metric: str) -> dict[tuple[int, ...], float]:
    """Seeds and, at the end, the fold -> what a method has reached."""
    return {
        tuple(result.settings.get(name, 0) for name in REPEATS): result.metrics[metric]
        for result in method.results
        if metric in result.metrics
    }


def _evaluation(result: Result, folder: Path) -> str:
    if not result.holdout:
        return NONE
    return f"`lamina evaluate {folder / 'rows' / result.id / 'model'} --data {folder / result.holdout}`"
