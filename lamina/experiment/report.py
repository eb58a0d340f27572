"""The report of what is done: a page with tables, its pictures, and the figures as Parquet.

    OUT/report.md       a section for each grid
    OUT/<grid>*.png     its pictures
    OUT/*.parquet       all figures: `lamina/experiment/parquet.py` says what is in them

Rules: no figure is typed in. A row that is not done is left out, and the page says how many are.

Next: `lamina/experiment/tables.py`, `lamina/experiment/pictures.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lamina.experiment.compare import Problem, chance_of, metric_of, problems
from lamina.experiment.grid import Experiment, Grid
from lamina.experiment.parquet import pyarrow_is_here, write_tables
from lamina.experiment.pictures import (
    Colours,
    colours_of,
    draw_costs,
    draw_summary,
    matplotlib_is_here,
)
from lamina.experiment.result import Result
from lamina.experiment.tables import by_fold, commands, equal, figures, percent
from wire.errors import UserError
from wire.files import replacing

NAME = "report.md"

NOTES = """## How to read it
- A figure is the mean of the runs that differ in their seed (or fold) alone, ± their standard deviation. A
  picture's band reaches from the least to the most of them; curves of several are means by straight lines.
- Bytes are counted at the MQTT socket and, like FLOPs and processor seconds, are a client's: the mean of
  all clients, asked or not or left out, from the run's beginning. FLOPs are of what the clients really
  trained: their examples, epochs and rounds, and the passes that fill the feature cache.
- Memory is the high-water mark of the first client, which is always alone in its process, in 10^6 bytes.
- Seconds are those of the rounds, evaluation included, on the machine that ran them, busy or not.
- *centralised* is a model trained end to end by one client that has the examples of all: a ceiling. Its
  bytes have no meaning, its FLOPs are those of one machine that does all the work.
- *At equal bytes* (or FLOPs): what each method had reached when it had spent what the least of them spends
  in all, on a straight line between the two rounds of its own curve around that; a dash if that is before
  its first round. Where the learning rate decays, a run that is cut there had not come to the small steps
  that one of that length ends with.
- *Points above the first*: the difference of two runs of the same seeds and fold, as mean and standard
  deviation.
"""


def tools_are_here() -> None:
    """Raises `UserError` where a package is missing that a report needs."""
    pyarrow_is_here()
    matplotlib_is_here()


def write_report(
    experiment: Experiment, results: Mapping[str, Result], folder: Path, more: str, out: Path
) -> Path:
    """Write it; the page. results: by row, of those that are done. folder: where their models are.

    more: options that the command of a row needs. Raises `UserError`.
    """
    tools_are_here()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}", "choose another --report") from error
    found = {grid.name: problems(_of_grid(grid, results)) for grid in experiment.grids}
    labels = [method.label for grid in found.values() for problem in grid for method in problem.methods]
    colours = colours_of(labels)
    page = [f"# {experiment.file.stem}", "", _done(experiment, results), ""]
    for grid in experiment.grids:
        page += _section(grid, found[grid.name], experiment.metric, colours, out)
        rows = [method for problem in found[grid.name] for method in problem.methods]
        page += ["<details><summary>Each row's commands</summary>", ""]
        page += [commands(rows, f"{experiment.file}{more}", folder), "", "</details>", ""]
    page.append(NOTES.strip())
    path = out / NAME
    try:
        with replacing(path, 0o644) as file:
            file.write(("\n".join(page) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", "choose another --report") from error
    of_row = {row: [grid.name for grid in experiment.grids if row in grid.rows.values()] for row in results}
    write_tables(list(results.values()), of_row, out)
    return path


def _of_grid(grid: Grid, results: Mapping[str, Result]) -> list[Result]:
    return [results[row] for row in dict.fromkeys(grid.rows.values()) if row in results]


def _done(experiment: Experiment, results: Mapping[str, Result]) -> str:
    dates = sorted(result.date[:10] for result in results.values())
    when = f", {' to '.join(dict.fromkeys((dates[0], dates[-1])))}" if dates else ""
    return (
        f"{len(results)} of {len(experiment.rows)} rows of `{experiment.file}`{when}. "
        f"All figures are in [rows.parquet](rows.parquet) and [rounds.parquet](rounds.parquet)."
    )


def _section(grid: Grid, found: Sequence[Problem], wanted: str, colours: Colours, out: Path) -> list[str]:
    methods = [method for problem in found for method in problem.methods]
    results = [result for method in methods for result in method.results]
    page = [f"## {grid.name}", ""]
    if not results:
        return [*page, "No row is done.", ""]
    metric = metric_of(results, wanted)
    page += [figures(found, metric), ""]
    if not metric:
        page += ["Without a hold-out there is no metric.", ""]
    else:
        chance = chance_of(results, metric)
        if chance is not None:
            page += [f"{metric} of the hold-out; by chance it is {percent([chance])}.", ""]
        if compared := equal(found, metric):
            page += [compared, ""]
        if folds := by_fold(found, metric):
            page += [folds, ""]
        if len(found) > 1:
            page += [_summary(grid, found, metric, colours, out), ""]
        for number, problem in enumerate(found, 1):
            name = f"{grid.name}.png" if len(found) == 1 else f"{grid.name}-{number}.png"
            draw_costs(problem, metric, chance_of_problem(problem, metric), colours, out / name)
            page += [f"![{problem.label or grid.name}]({name})", ""]
    return page


def _summary(grid: Grid, found: Sequence[Problem], metric: str, colours: Colours, out: Path) -> str:
    name = f"{grid.name}-all.png"
    draw_summary(found, metric, colours, out / name)
    return f"![{metric} of all]({name})"


def chance_of_problem(problem: Problem, metric: str) -> float | None:
    """By chance, on this problem."""
    return chance_of([result for method in problem.methods for result in method.results], metric)
