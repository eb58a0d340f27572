"""`lamina data`: prepare a data set from the command line.

Rules: nothing heavy is imported before a command runs. What a program may read goes to standard output,
progress to standard error.

Next: `lamina/data/emoji.py`, `digits.py`, `watch.py` and `stamps.py`; a further data set is a file beside
them, a command here and a line in `lamina/data/sets.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from lamina.data.sets import prepared
from lamina.options import end_with_parent
from wire.errors import UserError

if TYPE_CHECKING:
    from lamina.data.folder import Prepared
    from lamina.data.partition import Partition
    from lamina.data.registry import Progress

F = TypeVar("F", bound=Callable[..., Any])


@click.group("data", short_help="Prepare data sets.")
def command() -> None:
    """Prepare data sets: folders of examples, one a client, and a hold-out."""


@command.group()
def prepare() -> None:
    """Download a data set and divide it among clients."""
    end_with_parent()


def divided(clients: int, partitions: Sequence[Partition], text: str, out: str) -> Callable[[F], F]:
    """What all data sets are asked: who gets what, as one argument `division`, and where it goes.

    partitions: the default first.
    """
    from lamina.data.division import Division
    from lamina.data.partition import ALPHA

    names = {field.name for field in fields(Division)}

    def add(function: F) -> F:
        @functools.wraps(function)
        def together(*arguments: Any, **options: Any) -> Any:
            division = Division(**{name: options.pop(name) for name in names})
            return function(*arguments, division=division, **options)

        decorated: Any = together
        for option in reversed(
            (
                click.option(
                    "--clients",
                    type=click.IntRange(min=1),
                    default=clients,
                    show_default=True,
                    help="Number of clients.",
                ),
                click.option(
                    "--partition",
                    type=click.Choice(partitions),
                    default=partitions[0],
                    show_default=True,
                    help=text,
                ),
                click.option(
                    "--alpha",
                    type=click.FloatRange(*ALPHA),
                    default=0.5,
                    show_default=True,
                    help="Of Dir(alpha): the smaller, the more skewed.",
                ),
                click.option(
                    "--missing-modality",
                    type=click.FloatRange(0, 1),
                    default=0.0,
                    show_default=True,
                    metavar="SHARE",
                    help="The share of the clients, 0 to 1, whose examples lack one modality.",
                ),
                click.option(
                    "--public",
                    type=click.FloatRange(0, 1, max_open=True),
                    default=0.0,
                    show_default=True,
                    metavar="SHARE",
                    help="The share of the examples that no client has, in the folder public.",
                ),
                click.option(
                    "--seed",
                    default=0,
                    show_default=True,
                    help="Of the partition and of who lacks what; hold-outs never change.",
                ),
                click.option(
                    "--out",
                    type=click.Path(path_type=Path, file_okay=False),
                    default=Path(out),
                    show_default=True,
                    help="The folder to write.",
                ),
                click.option("--json", "as_json", is_flag=True, help="Print the inventory as JSON."),
            )
        ):
            decorated = option(decorated)
        return cast(F, decorated)

    return add


@prepare.command()
@divided(
    7,
    ("natural", "iid", "dirichlet"),
    "A drawing style each; at random; or skewed by label.",
    "data/emoji",
)
@click.option("--size", "size_px", default=64, show_default=True, help="Pixels of a picture's side.")
def emoji(out: Path, *, as_json: bool, **arguments: Any) -> None:
    """Emoji in up to seven drawing styles, with their names: image-text pairs, 17 MB to download."""
    tell(prepared("emoji", out, **arguments), as_json=as_json)


@prepare.command()
@divided(
    10,
    ("dirichlet", "iid"),
    "Skewed by digit, or at random: no recording tells its speaker.",
    "data/digits",
)
@click.option("--examples", default=2000, show_default=True, help="To train on: at most 2000.")
def digits(out: Path, *, as_json: bool, **arguments: Any) -> None:
    """Digits, written and spoken, both with noise: image-audio classification, 9 MB to download."""
    tell(prepared("digits", out, **arguments), as_json=as_json)


@prepare.command()
@divided(
    8, ("natural", "iid", "dirichlet"), "A person each; at random; or skewed by exercise.", "data/watch"
)
@click.option(
    "--fold", type=click.IntRange(0, 4), default=0, show_default=True, help="Which two people are held out."
)
def watch(out: Path, *, as_json: bool, **arguments: Any) -> None:
    """Exercises on a smartwatch, two sensors: motion classification, 11 MB to download."""
    tell(prepared("watch", out, **arguments), as_json=as_json)


@prepare.command()
@divided(
    9,
    ("natural", "iid", "dirichlet"),
    "A language each; at random; or skewed by category.",
    "data/stamps",
)
def stamps(out: Path, *, as_json: bool, **arguments: Any) -> None:
    """Names of pictures in nine languages, written and spoken: audio-text pairs, 161 MB to download."""
    tell(prepared("stamps", out, **arguments), as_json=as_json)


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


def tell(ready: Prepared, *, as_json: bool) -> None:
    """What was prepared and whom it comes from: the inventory, or tables."""
    if as_json:
        click.echo((ready.folder / "dataset.json").read_text(encoding="utf-8"))
        return
    from rich.console import Console
    from rich.table import Column, Table

    inventory, console = ready.inventory, Console()
    lacking = inventory.lacking
    counts = Table("folder", "examples", *(["lacks"] if lacking else []))
    for client, count in inventory.clients.items():
        counts.add_row(f"clients/{client}", str(count), *([lacking.get(client, "")] if lacking else []))
    for folder, groups in inventory.held_out.items():
        of_groups = f" in {len(groups)} groups" if len(groups) > 1 else ""
        counts.add_row(folder, f"{sum(groups.values())}{of_groups}")
    sources = Table(*(Column(name, overflow="fold") for name in ("source", "license", "by")))
    for package in inventory.sources:
        sources.add_row(str(package), package.license, package.credit)
    console.print(counts, sources, f"ready in {ready.folder}")
