"""`lamina clients`: several clients in one process, for an experiment with many on one machine.

Rules: each is what `lamina client` runs, with a connection, a folder and a store of its own. They share the
process's memory and processor time, so what they tell of these is the process's. As many train at a time as
the cores have room for. It is started by our own programs, and is not in the list of commands.

Next: `edge_client/session.py`, the training; `lamina/local.py`, which starts it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lamina.options import (
    broker_option,
    column_option,
    engine_option,
    feature_options,
    memory_bytes,
    pairs,
    run_until_stopped,
)
from wire.errors import LaminaError, UserError
from wire.mqtt import Broker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_client.device import Device

log = logging.getLogger(__name__)


@click.command("clients", hidden=True)
@click.argument("names", nargs=-1, required=True)
@broker_option(required=True)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="A folder of clients' data.")
@click.option("--run", required=True, help="The run to join.")
@engine_option(multiple=True, required=True, default=None, show_default=False)
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Threads of a train step.")
@feature_options
@click.option("--memory-budget", multiple=True, help="NAME=AMOUNT, of a client that has a budget.")
@column_option
@click.option(
    "--dir",
    "folder",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where each client keeps its state, in a folder of its name.",
)
def command(
    names: tuple[str, ...],
    broker: str,
    data: Path,
    run: str,
    engine: tuple[str, ...],
    threads: int,
    feature_dtype: str,
    max_feature_mb: int | None,
    memory_budget: tuple[str, ...],
    columns: tuple[str, ...],
    folder: Path,
) -> None:
    """Be the clients NAMES, one --engine each, until the run is over."""
    from edge_client.device import Device, share_heap

    if len(engine) != len(names):
        raise UserError(f"{len(names)} clients and {len(engine)} engines", "give each client one")
    budgets = {name: memory_bytes(text) for name, text in pairs(memory_budget, "--memory-budget").items()}
    if strangers := sorted(budgets.keys() - set(names)):
        raise UserError(f"--memory-budget of {strangers[0]}, who is not here", "name one of the clients")
    share_heap()
    devices = [
        Device(
            name=name,
            data=data / name,
            folder=folder / name,
            engine=own,
            threads=threads,
            columns=pairs(columns, "--column"),
            feature_dtype=feature_dtype,
            max_feature_bytes=None if max_feature_mb is None else max_feature_mb * 10**6,
            max_memory_bytes=budgets.get(name),
        )
        for name, own in zip(names, engine, strict=True)
    ]
    at_once = max(1, (os.cpu_count() or 1) // threads)
    run_until_stopped(host(Broker.parse(broker), devices, run, at_once))


async def host(broker: Broker, devices: Sequence[Device], run: str, at_once: int) -> None:
    """All of them, until the run is over. at_once: how many may train at a time.

    One that ends with an error is told in a line on standard output, and the others go on.
    """
    from edge_client.session import take_part

    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(at_once, thread_name_prefix="client") as pool:
        loop.set_default_executor(pool)

        async def one(device: Device) -> None:
            try:
                await take_part(broker, device, run)
            except LaminaError as error:
                log.warning("%s: %s - %s", device.name, error, error.hint, extra={"client": device.name})
                click.echo(f"{device.name}: {error}")

        tasks = [asyncio.ensure_future(one(device)) for device in devices]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
