"""`lamina client`: the program on the device. Nothing here or below imports torch or onnx.

Rules: `lamina client` with options trains. `lamina client list` and `lamina client revoke` are about the
clients that `lamina provision` has made, and are for the machine that has done so.

Next: `edge_client/session.py`, the training; `lamina/identity/command.py`, the others.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import click
import platformdirs

from lamina.identity.command import list_command, revoke_command
from lamina.logs import always, log_format_option
from lamina.options import (
    broker_option,
    column_option,
    config_option,
    engine_option,
    feature_options,
    memory_budget_option,
    owner_option,
    pairs,
    run_until_stopped,
    tls_options,
)
from wire.mqtt import Broker
from wire.signature import Owner
from wire.tls import Credentials
from wire.topics import check_name

MORE = """\b
Of the clients that `lamina provision` has made:
  lamina client list    who they are, and until when they are let in
  lamina client revoke  shut one out
"""


@click.command("client", epilog=MORE)
@broker_option(required=True)
@tls_options
@owner_option("The public key of the run's owner; other bundles than those it has signed are not run.")
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
@memory_budget_option("What training here may use, such as 150MB: deep stages train as far as that goes.")
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
def train(
    broker: str,
    credentials: Credentials,
    owner: Path | None,
    data: Path,
    name: str | None,
    run: str | None,
    engine: str,
    threads: int,
    feature_dtype: str,
    max_feature_mb: int | None,
    memory_budget: int | None,
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
    address = Broker.parse(broker, credentials)
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
        max_memory_bytes=memory_budget,
        checkpoint_s=checkpoint_s,
        owner=None if owner is None else Owner.read(owner),
    )
    run_until_stopped(take_part(address, device, run))


class _Client(click.Group):
    """The subcommand that the first word names; without one, the training."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0] in self.commands:
            return super().make_context(info_name, args, parent, **extra)
        return train.make_context(info_name, args, parent, **extra)


command = _Client("client", [list_command, revoke_command], short_help="Train on this device's data.")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", platform.node()).lstrip("._-")[:64] or "client"
