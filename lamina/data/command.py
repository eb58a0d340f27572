"""`lamina data`: prepare a data set from the command line.

Rules: nothing heavy is imported before a command runs. What a program may read goes to standard output,
progress to standard error.

Next: `lamina/data/emoji.py`; a further data set is a file beside it and a command here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lamina.options import end_with_parent
from wire.errors import UserError

if TYPE_CHECKING:
    from lamina.data.emoji import Partition
    from lamina.data.folder import Prepared
    from lamina.data.registry import Progress


@click.group("data", short_help="Prepare data sets.")
def command() -> None:
    """Prepare data sets: folders of examples, one a client, and a hold-out."""


@command.group()
def prepare() -> None:
    """Download a data set and divide it among clients."""
    end_with_parent()


@prepare.command()
@click.option(
    "--clients", type=click.IntRange(min=1), default=7, show_default=True, help="Number of clients."
)
@click.option(
    "--partition",
    type=click.Choice(["natural", "iid", "dirichlet"]),
    default="natural",
    show_default=True,
    help="A drawing style each; at random; or skewed by label.",
)
@click.option(
    "--alpha", default=0.5, show_default=True, help="Of Dir(alpha): the smaller, the more skewed."
)
@click.option("--seed", default=0, show_default=True, help="Of the partition; hold-outs never change.")
@click.option("--size", "size_px", default=64, show_default=True, help="Pixels of a picture's side.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("data/emoji"),
    show_default=True,
    help="The folder to write.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the inventory as JSON.")
def emoji(
    clients: int, partition: Partition, alpha: float, seed: int, size_px: int, out: Path, as_json: bool
) -> None:
    """Emoji in up to seven drawing styles, with their names: image-text pairs, 17 MB to download."""
    from lamina.data.emoji import prepare_emoji

    with progress_bar() as progress:
        prepared = prepare_emoji(out, clients, partition, alpha, seed, size_px, progress)
    if as_json:
        click.echo((prepared.folder / "dataset.json").read_text(encoding="utf-8"))
    else:
        show(prepared)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar for each thing that is being done. Raises `UserError` without the `data` extra."""
    try:
        from rich.console import Console
        from rich.progress import Progress as Bars
        from rich.progress import TaskID
    except ImportError as error:
        raise UserError("preparing data needs rich", 'pip install "lamina[data]"') from error
    tasks: dict[str, TaskID] = {}
    with Bars(console=Console(stderr=True)) as bars:

        def update(what: str, done: int, steps: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=steps)
            bars.update(tasks[what], completed=done, total=steps)

        yield update


def show(prepared: Prepared) -> None:
    """What was prepared and whom it comes from, as tables."""
    from rich.console import Console
    from rich.table import Column, Table

    inventory, console = prepared.inventory, Console()
    counts = Table("folder", "examples")
    for client, count in inventory.clients.items():
        counts.add_row(f"clients/{client}", str(count))
    for folder, groups in inventory.held_out.items():
        counts.add_row(folder, f"{sum(groups.values())} in {len(groups)} groups")
    sources = Table(*(Column(name, overflow="fold") for name in ("source", "license", "by")))
    for package in inventory.sources:
        sources.add_row(str(package), package.license, package.credit)
    console.print(counts, sources, f"ready in {prepared.folder}")
