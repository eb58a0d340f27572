"""`lamina aggregator`: the program on the laptop.

Next: `aggregator/run.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.logs import always, is_json, log_format_option
from lamina.options import (
    broker_option,
    calibration_option,
    column_option,
    config_option,
    owner_option,
    pairs,
    plan_options,
    run_until_stopped,
    tls_options,
)
from wire.errors import UserError
from wire.lock import locked
from wire.manifest import BlobRef, Manifest, check_files, read_manifest
from wire.mqtt import Broker
from wire.signature import Owner, read_signature
from wire.tls import Credentials
from wire.topics import check_name
from wire.transfer import CHUNK_BYTES, check_chunk_bytes

if TYPE_CHECKING:
    from aggregator.events import Event, Tell
    from aggregator.plan import RunPlan
    from aggregator.run import Calibrate, Evaluate
    from inputs.dataset import Dataset

log = logging.getLogger(__name__)


@click.command("aggregator", short_help="Conduct a run.")
@broker_option(required=True)
@tls_options
@owner_option("The public key of the run's owner: check now what clients will check.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    default=Path("bundle"),
    show_default=True,
    help="The folder that `lamina export` has written.",
)
@click.option("--name", default="lamina", show_default=True, help="The run's, unique on the broker.")
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("run"),
    show_default=True,
    help="Where the run keeps its books, and the final model at the end.",
)
@click.option("--resume", is_flag=True, help="Go on with the run that is in --dir.")
@click.option(
    "--holdout", type=click.Path(path_type=Path), help="A folder of examples to evaluate every round on."
)
@calibration_option
@column_option
@click.option(
    "--chunk-bytes",
    default=CHUNK_BYTES,
    show_default=True,
    help="Size of a packet; the broker must take as many.",
)
@plan_options()
@click.option("--json", "as_json", is_flag=True, help="Print events as lines of JSON.")
@log_format_option
@config_option
def command(
    broker: str,
    credentials: Credentials,
    owner: Path | None,
    bundle: Path,
    name: str,
    folder: Path,
    resume: bool,
    holdout: Path | None,
    calibration: Path | None,
    columns: tuple[str, ...],
    chunk_bytes: int,
    as_json: bool,
    **plan: Any,
) -> None:
    """Conduct a run: offer, collect, combine, round by round and stage by stage, to the final model."""
    try:
        import onnx  # noqa: F401 - for the final model; told now rather than at the end

        from lamina.view import View
    except ImportError as error:
        raise UserError(f"an aggregator needs {error.name}", 'pip install "lamina[aggregator]"') from error
    from aggregator.books import Books
    from aggregator.events import to_json
    from aggregator.plan import RunPlan
    from aggregator.run import Settings

    address = Broker.parse(broker, credentials)
    always(run=name)
    run_plan = RunPlan(**plan)
    manifest, content = read_manifest(bundle)
    signature = read_signature(bundle)
    if owner is not None:
        check_files(bundle, manifest)
        _check_signature(bundle, BlobRef.of(content), signature, owner)
    if run_plan.batch_size > manifest.max_batch_size:
        raise UserError(
            f"batch_size is {run_plan.batch_size}, and {bundle} takes at most {manifest.max_batch_size}",
            "lower it, or export with a larger --max-batch-size",
        )
    settings = Settings(
        name=check_name(name, "the run's name"),
        bundle=bundle,
        folder=folder,
        plan=run_plan,
        chunk_bytes=check_chunk_bytes(chunk_bytes),
        resume=resume,
        signature=signature,
    )
    theirs = pairs(columns, "--column")
    with locked(folder, "stop it, or choose another --dir"), contextlib.closing(Books(folder)) as books:
        read = partial(_dataset, bundle, manifest, theirs)
        if holdout is not None:
            settings = replace(
                settings, evaluate=_evaluate(bundle, manifest, read(holdout, folder / "inputs"))
            )
        if calibration is not None:
            public = read(calibration, folder / "calibration" / "inputs")
            settings = replace(
                settings,
                calibrate=_calibrate(bundle, manifest, public, folder, run_plan),
                calibration=public.fingerprint,
            )
        if as_json:
            _conduct(address, settings, manifest, books, lambda event: click.echo(to_json(event)))
        elif is_json():
            _conduct(address, settings, manifest, books, lambda _event: None)  # they are logged
        else:
            with View() as view:
                _conduct(address, settings, manifest, books, view.show)


def _check_signature(bundle: Path, manifest: BlobRef, signature: bytes | None, path: Path) -> None:
    owner = Owner.read(path)
    if not owner.has_signed(manifest, signature):
        how = "not signed" if signature is None else f"changed, or signed by someone else than {path}"
        raise UserError(f"{bundle} is {how}", f"sign it: lamina sign {bundle} --key owner.key")
    log.info("%s is signed by owner %s", bundle, owner.name)


def _conduct(address: Broker, settings: Any, manifest: Manifest, books: Any, tell: Tell) -> None:
    """The run, then the final model, then the last event."""
    from aggregator.events import ClientCame, RunClosed
    from aggregator.run import conduct
    from export.final import write_final
    from lamina.event_log import note

    engines: set[str] = set()
    logged = is_json()

    def listen(event: Event) -> None:
        if isinstance(event, ClientCame):
            engines.add(event.hello.engine)
        if logged:
            note(event)
        tell(event)

    values = run_until_stopped(conduct(address, settings, books, listen))
    stages = range(len(manifest.stages))
    out = settings.folder / "model"
    write_final(settings.bundle, values, out, force=True)
    listen(
        RunClosed(
            schedule=manifest.schedule,
            engine=",".join(sorted(engines)),
            seed=settings.plan.seed,
            stages=tuple(books.figures([stage]) for stage in stages),
            total=books.figures(stages),
            model=str(out),
        )
    )


def _dataset(
    bundle: Path, manifest: Manifest, columns: dict[str, str], folder: Path, cache: Path
) -> Dataset:
    from inputs.dataset import Dataset

    return Dataset.open(
        folder,
        manifest.modalities,
        manifest.task,
        manifest.classes,
        bundle.joinpath,
        cache=cache,
        columns=columns,
    )


def _evaluate(bundle: Path, manifest: Manifest, dataset: Dataset) -> Evaluate:
    from lamina.evaluation import evaluate_stage

    return partial(evaluate_stage, bundle, manifest, dataset, os.cpu_count() or 1)


def _calibrate(
    bundle: Path, manifest: Manifest, dataset: Dataset, folder: Path, plan: RunPlan
) -> Calibrate:
    from lamina.calibration import Calibration

    features, threads = folder / "calibration" / "features", os.cpu_count() or 1
    return Calibration(bundle, manifest, dataset, features, plan.calibration_epochs, threads)
