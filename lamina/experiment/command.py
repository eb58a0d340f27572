"""`lamina experiment`: a grid of settings and seeds, run on this machine, gathered and reported.

Rules: whatever is wrong in the file is told before anything runs. Rows that are done are not run again, so
the same command goes on where it was stopped.

    DIR/data, DIR/bundles   what rows share         DIR/rows/<id>   each row, with its result
    DIR/report              the report at the end

Next: `lamina/experiment/grid.py`, the file; `lamina/experiment/conduct.py`, the rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lamina.options import run_until_stopped
from wire.errors import UserError
from wire.lock import locked
from wire.mqtt import Broker

if TYPE_CHECKING:
    from lamina.experiment.grid import Experiment, Row


@click.command("experiment", short_help="A grid of settings and seeds.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--list", "listing", is_flag=True, help="Print all rows, and whether they are done.")
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="Rows by id or by grid/name, such as 'methods/*'; may be repeated.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Rows at a time.")
@click.option("--again", is_flag=True, help="Run rows anew that are done.")
@click.option("--keep", is_flag=True, help="Keep each row's whole folder, not only its model.")
@click.option(
    "--report",
    type=click.Path(path_type=Path, file_okay=False),
    help="Run nothing; write the report of what is done into this folder.",
)
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where everything is.  [default: lamina-work/experiments/<name of FILE>]",
)
@click.option("--broker", metavar="URL", help="mqtt://host.  [default: one of our own for each row]")
@click.option("--json", "as_json", is_flag=True, help="Print rows as lines of JSON.")
def command(
    file: Path,
    listing: bool,
    only: tuple[str, ...],
    jobs: int,
    again: bool,
    keep: bool,
    report: Path | None,
    folder: Path | None,
    broker: str | None,
    as_json: bool,
) -> None:
    """Run every row of the experiment in FILE, a TOML file, that is not done yet, and report."""
    from lamina.experiment.grid import read_experiment

    experiment = read_experiment(file)
    rows = experiment.chosen(only)
    more = "" if folder is None else f" --dir {folder}"
    folder = folder or Path("lamina-work/experiments") / file.stem
    if listing:
        _list(experiment, rows, folder, as_json=as_json)
        return
    if report is not None:
        _report(experiment, folder, more, report)
        return
    if broker is not None:
        Broker.parse(broker)
    with locked(folder, "wait for it, or choose another --dir"):
        todo = _todo(experiment, rows, folder, again=again)
        try:
            if todo:
                _run(experiment, todo, folder, jobs, broker, keep=keep)
        finally:
            _report(experiment, folder, more, folder / "report")
    if as_json:
        _list(experiment, rows, folder, as_json=True)


def _todo(experiment: Experiment, rows: Mapping[str, Row], folder: Path, *, again: bool) -> list[Row]:
    """The rows to run. Raises `UserError` for what could be told later, when hours have gone by."""
    from lamina.experiment.row import result_of

    todo = [row for row in rows.values() if again or result_of(folder, row) is None]
    if todo:
        _check(todo, str(experiment.file))
    _note(f"{len(todo)} of {len(rows)} rows to run, in {folder}")
    return todo


def _check(todo: Sequence[Row], where: str) -> None:
    from lamina.experiment.report import tools_are_here

    tools_are_here()
    try:
        import amqtt  # noqa: F401
        import onnx  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(f"an experiment needs {error.name}", 'pip install "lamina[experiment]"') from error
    from edge_client.engines import ENGINES, choose
    from lamina.experiment.models import check_models

    check_models([row.settings for row in todo], where)
    for engine in {row.settings["engine"] for row in todo}:
        choose(engine, ENGINES)


def _run(
    experiment: Experiment, todo: Sequence[Row], folder: Path, jobs: int, broker: str | None, *, keep: bool
) -> None:
    from lamina.experiment.conduct import run_rows

    run_until_stopped(run_rows(todo, folder, jobs, broker, _note, metric=experiment.metric, keep=keep))


def _list(experiment: Experiment, rows: Mapping[str, Row], folder: Path, *, as_json: bool) -> None:
    from lamina.experiment.compare import metric_of
    from lamina.experiment.row import result_of
    from lamina.experiment.tables import brief

    names: dict[str, list[str]] = {}
    for grid in experiment.grids:
        for name, one in grid.rows.items():
            names.setdefault(one, []).append(name)
    for row in rows.values():
        result = result_of(folder, row)
        if as_json:
            found = {"id": row.id, "names": names[row.id], "done": result is not None}
            metrics = {} if result is None else {"metrics": result.metrics}
            click.echo(json.dumps(found | {"settings": row.settings} | metrics))
            continue
        state = "-" if result is None else brief(result, metric_of([result], experiment.metric))
        click.echo(f"{row.id}  {' '.join(names[row.id])}  {state}")


def _report(experiment: Experiment, folder: Path, more: str, out: Path) -> None:
    from lamina.experiment.report import write_report
    from lamina.experiment.row import result_of

    found = {row.id: result_of(folder, row) for row in experiment.rows.values()}
    results = {row: result for row, result in found.items() if result is not None}
    if results:
        click.echo(write_report(experiment, results, folder, more, out))
    elif out != folder / "report":
        raise UserError(
            f"no row of {experiment.file} is done in {folder}", "run it first, or name its --dir"
        )


def _note(text: str) -> None:
    click.echo(text, err=True)
