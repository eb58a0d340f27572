"""`lamina plan`: what each stage costs a client, before it runs, by each of the three schedules.

Next: `export/costs.py`, the computing; `lamina/plan_view.py` and `lamina/plan_picture.py`, the drawing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.options import config_option, engine_option
from wire.errors import UserError
from wire.manifest import read_manifest

if TYPE_CHECKING:
    from export.costs import ScheduleCost


@click.command("plan", short_help="What each stage costs a client, before it runs.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--batch-size",
    type=click.IntRange(1, 2**16),
    default=32,
    show_default=True,
    help="Examples in a train step.",
)
@click.option(
    "--local-epochs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Epochs over a client's data in a round.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=0),
    default=0,
    help="Rounds of every stage of the bundle.  [default: as the bundle says]",
)
@engine_option(show_default=False, help="Whose memory is expected.  [default: the bundle's first]")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw a picture, such as plan.png."
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one line of JSON.")
@config_option
def command(
    bundle: Path,
    batch_size: int,
    local_epochs: int,
    rounds: int,
    engine: str,
    plot: Path | None,
    as_json: bool,
) -> None:
    """What each stage of the bundle in the folder BUNDLE costs a client, by each schedule.

    The bundle's own schedule comes first; the others train the same model for as many rounds in all.
    """
    manifest, _ = read_manifest(bundle)
    chosen = _engine(engine, tuple(manifest.stages[0].engines))
    if batch_size > manifest.max_batch_size:
        raise UserError(
            f"the bundle was exported for batches of at most {manifest.max_batch_size}",
            "plan a smaller --batch-size, or export with a larger --max-batch-size",
        )
    try:
        from rich.console import Console

        from export.costs import Setting, every_schedule
        from export.observe import skeleton
        from lamina.plan_view import WIDTH, table
    except ImportError as error:
        raise UserError(f"planning needs {error.name}", 'pip install "lamina[export]"') from error

    setting = Setting(chosen, batch_size, local_epochs, manifest.aligned)
    model = skeleton(manifest.builder, manifest.builder_options)
    costs = every_schedule(model, manifest, setting, rounds)
    if plot is not None:
        from lamina.plan_picture import draw

        draw(costs, setting, plot)
    if as_json:
        click.echo(json.dumps(as_plain(costs, chosen, batch_size)))
    else:
        console = Console(markup=False, emoji=False, highlight=False)
        console.width = max(WIDTH, console.width)
        console.print(table(costs, setting))


def as_plain(costs: list[ScheduleCost], engine: str, batch_size: int) -> dict[str, Any]:
    """Plain values. Units are in the names; FLOPs are per example, bytes per client, stages in order.

    `total`: the whole run's, `ratio`: the total over that of `end_to_end`.
    """
    totals = {cost.schedule: _total(cost) for cost in costs}
    base = totals["end_to_end"]
    return {
        "engine": engine,
        "batch_size": batch_size,
        "local_epochs": costs[0].local_epochs,
        "schedules": {
            cost.schedule: {
                "stages": [_stage(stage) for stage in cost.stages],
                "total": totals[cost.schedule],
                "ratio": {
                    name: value / base[name] for name, value in totals[cost.schedule].items() if base[name]
                },
            }
            for cost in costs
        },
    }


def _stage(stage: Any) -> dict[str, Any]:
    return {
        "rounds": stage.rounds,
        "micro_batch_size": stage.micro_batch_size,
        "trainable_parameters": stage.trainable_parameters,
        "frozen_parameters": stage.frozen_parameters,
        "train_step_flops_per_example": stage.train_flops,
        "prefix_flops_per_example": stage.prefix_flops,
        "segment_flops_per_example": stage.segment_flops,
        **{f"round_bytes_each_way_{name}": count for name, count in stage.round_bytes.items()},
        "frozen_bytes": stage.frozen_bytes,
        "expected_peak_bytes": stage.peak_bytes,
    }


def _total(cost: ScheduleCost) -> dict[str, int]:
    from export.costs import COMPRESSIONS

    return {
        "rounds": sum(stage.rounds for stage in cost.stages),
        "flops_per_example": cost.flops,
        "flops_per_example_without_cache": cost.flops_without_cache,
        **{f"bytes_down_{name}": cost.bytes_down(name) for name in COMPRESSIONS},
        **{f"bytes_up_{name}": cost.bytes_up(name) for name in COMPRESSIONS},
        "expected_peak_bytes": cost.peak_bytes,
    }


def _engine(name: str, exported: tuple[str, ...]) -> str:
    """The one that is meant, whether or not it runs here. Raises `UserError`."""
    from edge_client.engines import AUTO

    if name == AUTO:
        return exported[0]
    if name not in exported:
        raise UserError(f"the bundle has no files for the engine {name}", f"choose {' or '.join(exported)}")
    return name
