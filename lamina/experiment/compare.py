"""Which results belong together, and figures of several: the arithmetic of the report, no drawing.

Rules: the settings of the data say what the *problem* is, all others what the *method* is; results that
differ in their seed or fold alone are repeats of one. Only methods of one problem are compared. A setting
that rows of one schedule partly have no use for sets them apart, too. A method's label leaves out what is
at its default, or as in the first row where a setting has none, unless two would be called the same. A
curve between two rounds is a straight line; before its first round and after its last it has no value.

Next: `lamina/experiment/tables.py` and `lamina/experiment/pictures.py`, which show it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lamina.experiment.grid import shown
from lamina.experiment.result import Result, RoundResult
from lamina.experiment.settings import CENTRALISED, DEFAULTS, Values, data_settings, idle

REPEATS = ("seed", "data_seed", "fold")
"""What repeats of a method may differ in; the fold is the last."""

METRICS = ("accuracy", "recall@10")
"""The usual ones, where the file names none."""

_TITLES = {
    "end_to_end": "end-to-end",
    "progressive": "progressive",
    "layerwise": "layer-wise",
    CENTRALISED: "centralised",
}

_Key = tuple[str, str]  # a method's schedule, and all else that varies

Points = npt.NDArray[np.float64]
Of = Callable[[RoundResult], float]


@dataclass(frozen=True)
class Method:
    """The repeats of one method on one problem. varied: its settings that others of the grid have not.

    The schedule is not among these: it is the title.
    """

    label: str
    varied: Values
    results: tuple[Result, ...]

    @property
    def is_centralised(self) -> bool:
        """Whether nothing travels but for the sake of the same programs."""
        return bool(self.results[0].settings["schedule"] == CENTRALISED)

    @property
    def title(self) -> str:
        """Its schedule's name."""
        return _TITLES[self.results[0].settings["schedule"]]

    def curves(self, x: Of, metric: str) -> list[tuple[Points, Points]]:
        """Each repeat's metric over a figure."""
        found = []
        for result in self.results:
            rounds = [one for one in result.rounds if metric in one.metrics]
            found.append(
                (np.array([x(one) for one in rounds]), np.array([o.metrics[metric] for o in rounds]))
            )
        return [(xs, ys) for xs, ys in found if len(xs)]

    def totals(self, of: Of) -> list[float]:
        """A figure of each repeat's whole run."""
        return [of(result.last) for result in self.results]


@dataclass(frozen=True)
class Problem:
    """What is trained on. label: what sets it apart in its grid; may be empty."""

    label: str
    varied: Values
    methods: tuple[Method, ...]


def problems(results: Sequence[Result]) -> list[Problem]:
    """The results of a grid, sorted; in their order."""
    used = [_used(result.settings) for result in results]
    of_data = set().union(*(_data_names(result.settings) for result in results))
    varied = [
        name
        for name in dict.fromkeys(name for settings in used for name in settings)
        if name not in (*REPEATS, "schedule") and _varies(name, used)
    ]
    first = used[0] if used else {}
    usual = DEFAULTS | {name: value for name, value in first.items() if DEFAULTS.get(name) is None}
    groups: dict[str, dict[_Key, list[Result]]] = {}
    of_problem: dict[str, Values] = {}
    of_method: dict[_Key, Values] = {}
    for result, settings in zip(results, used, strict=True):
        problem = {name: settings[name] for name in varied if name in of_data and name in settings}
        method = {name: settings[name] for name in varied if name not in of_data and name in settings}
        label, key = _label(problem), (settings["schedule"], _label(method))
        of_problem[label], of_method[key] = problem, method
        groups.setdefault(label, {}).setdefault(key, []).append(result)
    labels = _short_labels(of_method, usual)
    return [
        Problem(
            label,
            of_problem[label],
            tuple(Method(labels[key], of_method[key], tuple(repeats)) for key, repeats in methods.items()),
        )
        for label, methods in groups.items()
    ]


def metric_of(results: Iterable[Result], wanted: str) -> str:
    """The metric to show: the one that is wanted, or the first of the usual ones."""
    have = {name for result in results for name in result.metrics}
    return wanted or next((name for name in METRICS if name in have), "")


def chance_of(results: Iterable[Result], metric: str) -> float | None:
    """What guessing would give, where the metrics say so."""
    name = "chance" + metric[metric.find("@") :] if "@" in metric else "chance"
    return next((result.metrics[name] for result in results if name in result.metrics), None)


def traffic(one: RoundResult) -> float:
    """Bytes that a client has sent and received."""
    return one.bytes_sent + one.bytes_received


def flop_unit(results: Iterable[Result]) -> tuple[float, str]:
    """What to count FLOPs in, so that the most of them is a number to read."""
    most = max((result.last.flops for result in results), default=0.0)
    return (1e12, "TFLOP") if most >= 1e11 else (1e9, "GFLOP")


def value_at(xs: Points, ys: Points, x: float) -> float | None:
    """A curve's value, by a straight line between two of its points. None: x is not within the curve."""
    if not len(xs) or x < xs[0] or x > xs[-1] * (1 + 1e-9):
        return None
    return float(np.interp(x, xs, ys))


def band(curves: Sequence[tuple[Points, Points]]) -> tuple[Points, Points, Points, Points]:
    """x, mean, least, most of several curves, where all of them have a value.

    Where there is no such x, as for one round each at unequal cost, it is one point: of their ends.
    """
    first, last = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    x = np.unique(np.concatenate([xs for xs, _ in curves]))
    x = x[(x >= first) & (x <= last)]
    values = np.array([np.interp(x, xs, ys) for xs, ys in curves])
    if not len(x):
        x = np.array([statistics.mean(float(xs[-1]) for xs, _ in curves)])
        values = np.array([ys[-1:] for _, ys in curves])
    return x, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def at_equal(problem: Problem, of: Of, metric: str) -> tuple[float, dict[str, list[float]]] | None:
    """What each method has reached when it has spent as little as the least of them does in all.

    The budget, and by label each repeat's metric; empty where a repeat has no round within the budget.
    None where there are not two to compare. A centralised model is not.
    """
    methods = [
        method for method in problem.methods if not method.is_centralised and method.curves(of, metric)
    ]
    if len(methods) < 2:
        return None
    budget = min(statistics.mean(method.totals(of)) for method in methods)
    reached: dict[str, list[float]] = {}
    for method in methods:
        values = [value_at(xs, ys, min(budget, float(xs[-1]))) for xs, ys in method.curves(of, metric)]
        reached[method.label] = [] if None in values else [value for value in values if value is not None]
    return budget, reached


def _used(settings: Values) -> Values:
    """Those that a row has a use for."""
    unused = idle(settings)
    return {name: value for name, value in settings.items() if name not in unused and value is not None}


def _varies(name: str, used: Sequence[Values]) -> bool:
    values = {shown(one[name]) for one in used if name in one}
    having = {one["schedule"] for one in used if name in one}
    lacking = {one["schedule"] for one in used if name not in one}
    return len(values) > 1 or bool(having & lacking)


def _data_names(settings: Values) -> set[str]:
    own = {"data", "data_set", "data_seed", "clients"}
    return own | set(data_settings(settings["data_set"], "")[0]) if "data_set" in settings else own


def _short_labels(methods: Mapping[_Key, Values], usual: Values) -> dict[_Key, str]:
    """Without what is usual, but for that by which methods of one such label differ."""
    told = {
        key: {name: value for name, value in varied.items() if value != usual.get(name)}
        for key, varied in methods.items()
    }
    found: dict[_Key, str] = {}
    for key, varied in methods.items():
        alike = [methods[other] for other in methods if (other[0], told[other]) == (key[0], told[key])]
        names = dict.fromkeys(name for one in alike for name in one)
        differing = [name for name in names if len({shown(one.get(name)) for one in alike}) > 1]
        label = _label(told[key] | {name: varied.get(name) for name in differing})
        found[key] = ", ".join(filter(None, (_TITLES[key[0]], label)))
    return found


def _label(varied: Values) -> str:
    return ", ".join(f"{name.removeprefix('option.')} {shown(value)}" for name, value in varied.items())
