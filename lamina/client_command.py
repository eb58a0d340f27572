"""`lamina client`: the program on the device. Nothing here or below imports torch or onnx.

Next: `edge_client/session.py`.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import click
import platformdirs

from lamina.logs import always, log_format_option
from lamina.options import (
    broker_option,
    column_option,
    config_option,
    engine_option,
    feature_options,
    pairs,
    run_until_stopped,
)
from wire.mqtt import Broker
from wire.topics import check_name


@click.command("client", short_help="Train on this device's data.")
@broker_option(required=True)
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="The folder of examples: table.csv or .parquet, and its files.",
)
@click.option("--name", help="Unique in the run.  [default: the host's name]")
@click.option("--run", help="The run to join.  [default: the newest open one]")
@engine_option()
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    help="Threads of a train step.  [default: all cores]",
)
@feature_options
@click.option(
    "--checkpoint-s",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Seconds of training that may be lost when the device dies.",
)
@column_option
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the client keeps its state.  [default: the user's cache folder]",
)
@log_format_option
@config_option
def command(
    broker: str,
    data: Path,
    name: str | None,
    run: str | None,
    engine: str,
    threads: int,
    feature_dtype: str,
    max_feature_mb: int | None,
    checkpoint_s: float,
    columns: tuple[str, ...],
    folder: Path | None,
) -> None:
    """Train on this device's data in a run on the broker, until the run is over."""
    from edge_client.device import Device, share_heap
    from edge_client.engines import ENGINES, choose
    from edge_client.session import take_part
    from inputs.table import read_table

    share_heap()
    address = Broker.parse(broker)
    name = check_name(name or _host(), "the client's name")
    always(client=name)
    if run is not None:
        check_name(run, "the run's name")
    # What cannot be used is told before anything is waited for.
    read_table(data, ())
    choose(engine, ENGINES)
    device = Device(
        name=name,
        data=data,
        folder=folder or platformdirs.user_cache_path("lamina") / "clients" / name,
        engine=engine,
        threads=threads or os.cpu_count() or 1,
        columns=pairs(columns, "--column"),
        feature_dtype=feature_dtype,
        max_feature_bytes=None if max_feature_mb is None else max_feature_mb * 10**6,
        checkpoint_s=checkpoint_s,
    )
    run_until_stopped(take_part(address, device, run))


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", platform.node()).lstrip("._-")[:64] or "client"
