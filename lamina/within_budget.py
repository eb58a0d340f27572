"""A bundle whose training stays within a budget of memory: planned, written, and tried before it is kept.

Rules: what is expected decides (`export/budget.py`); then every stage trains on random examples, once per
structure and engine that runs here, in a process of its own. Where one needs more than the budget, the
expectation is raised to what was measured and all is planned anew, `TRIES` times at most. The folder takes
its name when everything fits; otherwise nothing is left behind.

Next: `lamina/rehearsal.py`, the trying.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edge_client.engines import available, graph_file, step_files
from export.budget import Budget, Fitted
from export.bundle import Exported
from export.folder import new_folder
from export.memory import CLIENT_BYTES
from lamina.rehearsal import rehearse
from wire.errors import UserError
from wire.manifest import MANIFEST_NAME, Manifest

TRIES = 4


@dataclass(frozen=True)
class WithinBudget:
    """measured: for each stage engine -> peak in bytes, of the engines that run here."""

    exported: Exported
    measured: tuple[dict[str, int], ...]


def export_within(
    budget: Budget,
    plan: Callable[[Budget], Fitted],
    write: Callable[..., Exported],
    out: Path,
    *,
    force: bool,
) -> WithinBudget:
    """plan: what fits a budget. write: the bundle of a schedule, to a folder, with what was planned for it.

    Raises `UserError` where nothing fits.
    """
    with new_folder(out, MANIFEST_NAME, force=force) as folder:
        for _ in range(TRIES):
            fitted = plan(budget)
            exported = write(
                fitted.schedule,
                folder,
                force=True,
                micro_batch_sizes=fitted.micro_batch_sizes,
                expected_peak_bytes=fitted.expected_peak_bytes,
            )
            measured = _measure(folder, exported.manifest, budget.batch_size)
            stages = list(zip(exported.manifest.stages, measured, strict=True))
            over = [
                peak / stage.expected_peak_bytes
                for stage, peaks in stages
                for peak in peaks.values()
                if peak > budget.max_bytes
            ]
            if not over:
                return WithinBudget(exported, measured)
            budget = replace(budget, correction=budget.correction * max(over))
        worst = max(peak for peaks in measured for peak in peaks.values())
        raise UserError(
            f"after {TRIES} tries a stage still needs {worst / 1e6:.0f} MB",
            "take a larger --memory-budget, or a smaller model",
        )


def _measure(bundle: Path, manifest: Manifest, batch_size: int) -> tuple[dict[str, int], ...]:
    """Each stage's peak on each engine; equal files are tried once."""
    known: dict[tuple[str, ...], int] = {}

    def peak(engine: str, number: int) -> int:
        before = manifest.stages[number - 1].segments.values() if number else ()
        files = (
            *step_files(engine, manifest.stages[number]),
            *(graph_file(engine, one) for one in before),
        )
        if files not in known:
            known[files] = rehearse(bundle, engine, number, batch_size) + CLIENT_BYTES
        return known[files]

    engines = available(manifest.stages[0].engines)
    return tuple(
        {engine: peak(engine, number) for engine in engines} for number in range(len(manifest.stages))
    )
