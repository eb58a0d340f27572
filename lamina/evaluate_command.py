"""`lamina evaluate`: metrics of a final model on a folder of examples.

Next: `lamina/evaluation.py`.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import click

from lamina.options import column_option, pairs
from wire.errors import UserError


@click.command("evaluate", short_help="Metrics of a final model.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="The folder of examples.")
@column_option
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def command(model: Path, data: Path, columns: tuple[str, ...], as_json: bool) -> None:
    """Metrics of the model in the folder MODEL, as a run leaves it."""
    from inputs.dataset import Dataset
    from lamina.evaluation import evaluate_model
    from models.saved import read_saved

    saved = read_saved(model)
    names = [f"{name}.onnx" for name in saved.modalities]
    names += [str(m.options["tokenizer"]) for m in saved.modalities.values() if "tokenizer" in m.options]
    for name in names:
        if not (model / name).is_file():
            raise UserError(f"{model / name} is missing", "name the folder of a final model")
    with tempfile.TemporaryDirectory(prefix="lamina-") as cache:
        dataset = Dataset.open(
            data,
            saved.modalities,
            saved.task,
            saved.classes,
            model.joinpath,
            cache=Path(cache),
            columns=pairs(columns, "--column"),
        )
        found = evaluate_model(model, saved, dataset, os.cpu_count() or 1)
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name:<20} {100 * value:5.1f}%")
