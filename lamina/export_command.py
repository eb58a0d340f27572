"""`lamina export`: from a model and a schedule to a bundle. The only command that needs torch.

Next: `export/bundle.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.options import (
    FOR_EXPORT,
    column_option,
    config_option,
    end_with_parent,
    memory_budget_option,
    model_options,
    pairs,
)
from wire.errors import UserError

if TYPE_CHECKING:
    from export.schedules import WarmStart
    from wire.manifest import Manifest, Stage


@click.command("export", short_help="Write the training artifacts of every stage.")
@model_options
@click.option(
    "--rounds", default="10", show_default=True, help="Of every stage, or one number a stage: 10,10,20."
)
@click.option(
    "--blocks-per-stage",
    type=int,
    help="Blocks that a stage attaches.  [default: 1, or what fits a --memory-budget]",
)
@memory_budget_option(FOR_EXPORT)
@click.option(
    "--batch-size",
    type=click.IntRange(1, 2**16),
    default=32,
    show_default=True,
    help="Examples in a train step of the run, for what is expected of its memory.",
)
@click.option(
    "--data",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A folder of examples for the tokenizer and the classes; its texts must be public.",
)
@column_option
@click.option("--beta1", type=click.FloatRange(0, 1), default=0.9, show_default=True, help="Of AdamW.")
@click.option("--beta2", type=click.FloatRange(0, 1), default=0.999, show_default=True, help="Of AdamW.")
@click.option("--eps", type=click.FloatRange(0), default=1e-8, show_default=True, help="Of AdamW.")
@click.option("--weight-decay", type=click.FloatRange(0), default=0.01, show_default=True, help="Of AdamW.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    help="Of the initial parameters.",
)
@click.option(
    "--check/--no-check", default=True, show_default=True, help="Compare every artifact with torch."
)
@click.option(
    "--engine",
    "names",
    multiple=True,
    help="An engine to export for; may be repeated.  [default: all that can be made here]",
)
@click.option(
    "--max-batch-size",
    type=click.IntRange(1, 2**16),
    default=64,
    show_default=True,
    help="The largest batch that a run may train with.",
)
@click.option(
    "--micro-batch-size",
    "micro_batch_sizes",
    default="0",
    show_default=True,
    help="The most examples that a device computes at a time, to save memory; the step stays that of the "
    "whole batch. Of every stage, or one number a stage: 8,16,16. 0: the whole batch.",
)
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bundle"),
    show_default=True,
    help="The folder to write.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@config_option
def command(
    model: str,
    options: tuple[str, ...],
    schedule: str,
    rounds: str,
    blocks_per_stage: int | None,
    memory_budget: int | None,
    batch_size: int,
    warm_start: WarmStart,
    alignment: float,
    missing_modalities: bool,
    data: tuple[Path, ...],
    columns: tuple[str, ...],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int,
    check: bool,
    names: tuple[str, ...],
    max_batch_size: int,
    micro_batch_sizes: str,
    force: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Write the training artifacts of every stage, checked against torch."""
    end_with_parent()
    if memory_budget is not None and batch_size > max_batch_size:
        raise UserError(
            f"--batch-size {batch_size} is over --max-batch-size {max_batch_size}", "raise the latter"
        )
    texts, classes = _examples(data, pairs(columns, "--column"))
    each = _numbers(rounds, "--rounds", "10,10,20")
    micro = _numbers(micro_batch_sizes, "--micro-batch-size", "8,16,16")
    if memory_budget is not None and micro:
        raise UserError("--memory-budget chooses --micro-batch-size", "give one of them")
    builder_options = _options(options)
    try:
        import torch

        import edge_client.engines as engines
        from export.budget import Budget, expected_peaks, fit
        from export.bundle import Exported, check_micro_batches, export_bundle
        from export.engines import check_engines, exportable
        from export.observe import skeleton
        from export.schedules import SCHEDULES, Schedule
        from lamina.within_budget import export_within
        from models.registry import build, full_options
    except ImportError as error:
        raise UserError(f"exporting needs {error.name}", 'pip install "lamina[export]"') from error
    from wire.manifest import AdamW, parameter_counts

    if full_options(model, **builder_options).get("task") == "classification":
        if not classes:
            raise UserError(
                f"{model} tells classes apart, and there are no labels",
                "name folders whose table has the column label: --data FOLDER",
            )
        builder_options.setdefault("classes", len(classes))
    torch.manual_seed(seed)
    built = build(model, **builder_options)

    def write(stages: Schedule, folder: Path, *, force: bool, **planned: Sequence[int]) -> Exported:
        return export_bundle(
            built,
            stages,
            folder,
            texts=texts,
            classes=classes if built.task == "classification" else (),
            optimizer=AdamW(beta1, beta2, eps, weight_decay),
            engines=names or None,
            max_batch_size=max_batch_size,
            missing_modalities=missing_modalities,
            alignment=alignment,
            runtimes=engines if check else None,
            seed=seed,
            force=force,
            **planned,
        )

    chosen = check_engines(names or exportable())
    budget = Budget(
        memory_budget or 0,
        min(batch_size, max_batch_size),
        chosen,
        aligned=bool(alignment),
        whole_batches=bool(alignment) and built.task == "contrastive",
    )
    shell = skeleton(built.builder, built.builder_options)
    measured: Sequence[Mapping[str, int]] = ()
    if memory_budget is None:
        extra = {"blocks_per_stage": blocks_per_stage or 1, "warm_start": warm_start}
        made = SCHEDULES[schedule](built.depths, each, **({} if schedule == "end_to_end" else extra))
        sizes = [micro] * len(made.stages) if isinstance(micro, int) else micro
        check_micro_batches(sizes, len(made.stages), max_batch_size)
        peaks = expected_peaks(shell, made, budget, sizes)
        exported = write(made, out, force=force, micro_batch_sizes=sizes, expected_peak_bytes=peaks)
    else:
        within = export_within(
            budget,
            partial(
                fit,
                shell,
                name=schedule,
                rounds=each,
                blocks_per_stage=blocks_per_stage,
                warm_start=warm_start,
            ),
            write,
            out,
            force=force,
        )
        exported, measured = within.exported, within.measured
    manifest, counts = exported.manifest, parameter_counts(exported.manifest)
    stages = [sum(counts[group] for group in stage.trainable) for stage in manifest.stages]
    graphs = {name: _size(manifest, name) for name in manifest.stages[0].engines}
    if as_json:
        parity = None
        if exported.parity:
            parity = {"loss": exported.parity.loss_error, "parameter": exported.parity.parameter_error}
        size = sum(ref.size_bytes for ref in manifest.files.values())
        result: dict[str, Any] = {"bundle": str(out), "schedule": schedule, "trained_parameters": stages}
        result |= {"size_bytes": size, "engine_bytes": graphs, "relative_error": parity}
        if memory_budget is not None:
            result["memory"] = [
                {
                    "micro_batch_size": stage.micro_batch_size,
                    "expected_peak_bytes": stage.expected_peak_bytes,
                    "measured_peak_bytes": peaks,
                }
                for stage, peaks in zip(manifest.stages, measured, strict=True)
            ]
        click.echo(json.dumps(result))
        return
    for number, (stage, count) in enumerate(zip(manifest.stages, stages, strict=True), 1):
        click.echo(
            f"stage {number}: {count:,} parameters in {', '.join(stage.trainable)}; {stage.rounds} rounds"
        )
        if memory_budget is not None:
            click.echo(f"stage {number}: {_memory(stage, measured[number - 1])}")
    for engine, size in graphs.items():
        click.echo(f"a client with {engine} fetches {size / 1e3:,.0f} kB of graphs, all stages together")
    if exported.parity:
        click.echo(str(exported.parity))
    click.echo(f"bundle in {out}")


def _memory(stage: Stage, measured: Mapping[str, int]) -> str:
    found = ", ".join(f"{engine} {peak / 1e6:.0f} MB" for engine, peak in measured.items())
    at_once = f"{stage.micro_batch_size} examples at once" if stage.micro_batch_size else "whole batches"
    return f"{at_once}, {stage.expected_peak_bytes / 1e6:.0f} MB expected, measured: {found or 'nothing'}"


def _size(manifest: Manifest, engine: str) -> int:
    """Bytes of the files that a client with this engine fetches in a whole run, parameters apart."""
    from edge_client.engines import graph_file, step_files

    names: set[str] = set()
    for stage in manifest.stages:
        names.update(step_files(engine, stage))
        names.update(graph_file(engine, graph) for graph in stage.segments.values())
    return sum(manifest.files[name].size_bytes for name in names)


def _examples(folders: Iterable[Path], columns: dict[str, str]) -> tuple[list[str], list[str]]:
    """Texts for the tokenizer and the sorted labels, from the tables of these folders."""
    from inputs.table import read_table

    names = {name: columns.get(name, name) for name in ("text", "label")}
    texts: list[str] = []
    labels: set[str] = set()
    for folder in folders:
        table = read_table(folder, set(names.values()))
        for name, column in columns.items():
            if name in names and column not in table.columns:
                raise UserError(
                    f"{table.path} has no column {column!r}", f"it has {', '.join(table.header)}"
                )
        texts += table.columns.get(names["text"], [])
        labels |= {cell for cell in table.columns.get(names["label"], []) if cell}
    return texts, sorted(labels)


def _options(values: tuple[str, ...]) -> dict[str, Any]:
    return {name.replace("-", "_"): _json(value) for name, value in pairs(values, "--option").items()}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text  # a word needs no quotes


def _numbers(text: str, option: str, example: str) -> int | list[int]:
    """One number, or one a stage. example: of the latter, whose first number is one of the former."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        first = example.partition(",")[0]
        raise UserError(
            f"{option} {text} is not a number", f"write {option} {first} or {option} {example}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers
