"""The report's tables, as Markdown.

Rules: a figure is the mean of the repeats, then their standard deviation where there are several. Bytes,
FLOPs and processor seconds are a client's; what a centralised model sends has no meaning and is a dash.

Next: `lamina/experiment/report.py`, the page that they are on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from lamina.experiment.compare import Method, Of, Problem, at_equal, traffic
from lamina.experiment.grid import shown
from lamina.experiment.result import Result, RoundResult

NONE = "–"

Column = tuple[str, Callable[[RoundResult], float | None], str]

TRAVELS = ("MB sent", "MB received")
COLUMNS: tuple[Column, ...] = (
    ("MB sent", lambda one: one.bytes_sent / 1e6, "{:,.2f}"),
    ("MB received", lambda one: one.bytes_received / 1e6, "{:,.2f}"),
    ("TFLOP", lambda one: one.flops / 1e12, "{:,.3g}"),
    ("peak memory, MB", lambda one: one.peak_memory_mb, "{:,.0f}"),
    ("seconds", lambda one: one.seconds, "{:,.0f}"),
    ("CPU, s", lambda one: one.cpu_s, "{:,.0f}"),
)
BUDGETS: tuple[tuple[str, Of, str], ...] = (
    ("bytes", traffic, "{:,.2f} MB"),
    ("FLOPs", lambda one: one.flops, "{:,.3g} TFLOP"),
)


def figures(found: Sequence[Problem], metric: str) -> str:
    """Every method of every problem of a grid, a line each."""
    of_problem = list(dict.fromkeys(name for problem in found for name in problem.varied))
    of_method = list(
        dict.fromkeys(name for problem in found for method in problem.methods for name in method.varied)
    )
    named = [name for name in (*of_problem, *of_method) if name != "schedule"]
    head = ["", *named, "runs", *([metric] if metric else []), *(name for name, _, _ in COLUMNS)]
    lines = []
    for problem in found:
        for method in problem.methods:
            settings = method.results[0].settings
            cells = [method.label.partition(",")[0], *(_setting(settings.get(name)) for name in named)]
            cells.append(str(len(method.results)))
            if metric:
                cells.append(percent([one.metrics.get(metric) for one in method.results]))
            for name, of, pattern in COLUMNS:
                known = [of(result.last) for result in method.results]
                hidden = method.is_centralised and name in TRAVELS
                cells.append(NONE if hidden else spread(known, pattern))
            lines.append(cells)
    return markdown(head, lines, 1 + len(named))


def equal(found: Sequence[Problem], metric: str) -> str:
    """What methods have reached at the bytes and FLOPs of the one that spends least; empty without."""
    lines = []
    for problem in found:
        for name, of, pattern in BUDGETS:
            compared = at_equal(problem, of, metric)
            if compared is None:
                continue
            budget, reached = compared
            amount = pattern.format(budget / (1e6 if name == "bytes" else 1e12))
            lines += [
                [problem.label, f"{name}: {amount}", label, percent(values)]
                for label, values in reached.items()
            ]
    apart = any(line[0] for line in lines)
    head = ["", "at equal", "method", metric]
    if not apart:
        head, lines = head[1:], [line[1:] for line in lines]
    return markdown(head, lines, len(head) - 1) if lines else ""


def commands(methods: Iterable[Method], file: str) -> str:
    """What runs each row again."""
    results = [result for method in methods for result in method.results]
    head = ["row", "run it again", "its model's metrics"]
    lines = [
        [result.id, f"`lamina experiment {file} --only {result.id} --again`", _evaluation(result)]
        for result in results
    ]
    return markdown(head, lines, 3)


def brief(result: Result, metric: str) -> str:
    """A result in half a line."""
    last = result.last
    words = [f"{metric} {percent([result.metrics[metric]])}"] if metric in result.metrics else []
    words += [f"{traffic(last) / 1e6:,.1f} MB", f"{last.flops / 1e12:,.3g} TFLOP"]
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
    return mean if len(known) < 2 else f"{mean} ± {pattern.format(statistics.stdev(known))}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], words: int) -> str:
    """A table. words: so many columns from the left are words, the others numbers."""
    rule = ["---" if place < words else "---:" for place in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def _setting(value: object) -> str:
    return NONE if value is None else shown(value)


def _evaluation(result: Result) -> str:
    if not result.holdout:
        return NONE
    return f"`lamina evaluate rows/{result.id}/model --data {result.holdout}`"
