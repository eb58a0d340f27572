"""An experiment's results as two Parquet files, for whoever wants to compute something else of them.

    rounds.parquet   a line for each row of the experiment and round: sums from the run's beginning
    rows.parquet     a line for each row of the experiment: what it has come to

    id               string   the row; in both files
    grids            list of strings: where it is
    setting.<name>   bool, int64, double or string: every setting, or null where a row has it not. One that
                     has lists, or values of several kinds, is a string of JSON
    metric.<name>    double: of the hold-out, a share of 1, after this round or the last
    stage, round     int32, from 1; `round` counts over all stages
    loss             double: the clients' training loss
    bytes_sent, bytes_received   double: at the MQTT socket, mean of the clients
    flops            double: mean of the clients
    peak_memory_mb   double: 10^6 bytes, of the first client, so far; null if it was not told
    seconds          double: of the rounds, evaluation included
    cpu_s            double: mean of the clients
    rows.parquet besides: engine, first_client, date, version (string), clients, examples, updates, missing,
    refusals (int64; examples of all clients together), peak_memory_mb_by_stage (list of double)

Next: `lamina/experiment/result.py`, where the figures come from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lamina.experiment.result import Result, RoundResult
from wire.errors import UserError
from wire.files import replacing

ROUNDS, ROWS = "rounds.parquet", "rows.parquet"

_OF_ROUND = {
    "stage": "int32",
    "round": "int32",
    "loss": "float64",
    "bytes_sent": "float64",
    "bytes_received": "float64",
    "flops": "float64",
    "peak_memory_mb": "float64",
    "seconds": "float64",
    "cpu_s": "float64",
}
_OF_ROW = {
    "engine": "string",
    "first_client": "string",
    "date": "string",
    "version": "string",
    "clients": "int64",
    "examples": "int64",
    "updates": "int64",
    "missing": "int64",
    "refusals": "int64",
}

Line = dict[str, Any]


def pyarrow_is_here() -> None:
    """Raises `UserError` where it is not."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(f"Parquet files need {error.name}", 'pip install "lamina[experiment]"') from error


def write_tables(results: Sequence[Result], grids: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Both files. grids: a row's id -> the grids that it is in. Raises `UserError`."""
    rounds = [
        _about(result, grids) | _figures(one) | _metrics(one.metrics)
        for result in results
        for one in result.rounds
    ]
    rows = [
        _about(result, grids) | _figures(result.last) | _whole(result) | _metrics(result.metrics)
        for result in results
    ]
    _write(rounds, _OF_ROUND, folder / ROUNDS)
    _write(rows, _OF_ROUND | _OF_ROW, folder / ROWS)


def _about(result: Result, grids: Mapping[str, Sequence[str]]) -> Line:
    settings = {f"setting.{name}": value for name, value in result.settings.items()}
    return {"id": result.id, "grids": list(grids.get(result.id, ()))} | settings


def _figures(one: RoundResult) -> Line:
    return {name: getattr(one, name) for name in _OF_ROUND}


def _whole(result: Result) -> Line:
    return {
        "engine": result.engine,
        "first_client": result.first,
        "date": result.date,
        "version": result.version,
        "clients": result.clients,
        "examples": sum(result.examples.values()),
        "updates": result.updates,
        "missing": result.missing,
        "refusals": result.refusals,
        "peak_memory_mb_by_stage": list(result.peak_memory_mb_by_stage),
    }


def _metrics(metrics: Mapping[str, float]) -> Line:
    return {f"metric.{name}": value for name, value in metrics.items()}


def _write(lines: Sequence[Line], types: Mapping[str, str], path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    arrays: dict[str, Any] = {}
    for name in dict.fromkeys(name for line in lines for name in line):
        values = [line.get(name) for line in lines]
        if name == "grids":
            arrays[name] = pa.array(values, pa.list_(pa.string()))
        elif name == "peak_memory_mb_by_stage":
            arrays[name] = pa.array(values, pa.list_(pa.float64()))
        elif name.startswith("setting."):
            arrays[name] = _settings(values)
        else:
            kind = "string" if name == "id" else types.get(name, "float64")
            arrays[name] = pa.array(values, pa.type_for_alias(kind))
    try:
        with replacing(path, 0o644) as file:
            parquet.write_table(pa.table(arrays), file)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}", "choose another --report") from error


def _settings(values: Sequence[Any]) -> Any:
    """One setting of all lines, in the narrowest type that holds its values."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    for fitting, kind in (
        ({bool}, pa.bool_()),
        ({int}, pa.int64()),
        ({int, float}, pa.float64()),
        ({str}, pa.string()),
    ):
        if kinds <= fitting:
            return pa.array(values, kind)
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
