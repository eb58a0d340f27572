"""All rows of an experiment, some at a time, each until it is done or has failed.

Rules: a row that has a result is not run again. One that fails is told in a line, and the others go on;
the next time it is tried anew. One process at a time works in an experiment's folder.

Next: `lamina/experiment/row.py`, one of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

from lamina.experiment.compare import metric_of
from lamina.experiment.grid import Row
from lamina.experiment.row import run_row
from lamina.experiment.shared import Shared
from lamina.experiment.tables import brief
from wire.errors import LaminaError

Note = Callable[[str], None]


class RowsFailed(LaminaError):
    """Some rows have; each has told why."""


async def run_rows(
    rows: Iterable[Row],
    folder: Path,
    jobs: int,
    broker: str | None,
    note: Note,
    *,
    metric: str = "",
    keep: bool = False,
) -> None:
    """Run these. jobs: so many at a time. metric: to tell. Raises `RowsFailed` at the end."""
    todo = list(rows)
    shared = Shared(folder, note)
    shared.sweep()
    turns = asyncio.Semaphore(jobs)
    done: list[str] = []
    failed: list[str] = []

    async def run(row: Row) -> None:
        async with turns:
            note(f"{row.id} begins")
            try:
                result = await run_row(
                    row, folder, shared, broker, lambda text: note(f"{row.id}: {text}"), keep=keep
                )
            except (LaminaError, OSError) as error:
                failed.append(row.id)
                hint = getattr(error, "hint", "")
                note(f"{row.id} has failed: {error}" + (f" - {hint}" if hint else ""))
                return
            done.append(row.id)
            so_far = f"{len(done) + len(failed)} of {len(todo)}"
            note(f"{row.id} is done ({so_far}): {brief(result, metric_of([result], metric))}")

    tasks = [asyncio.ensure_future(run(row)) for row in todo]
    try:
        await asyncio.wait(tasks)
    finally:
        for task in tasks:  # once: a row that is cancelled again would not stop its programs in order
            task.cancel()
        await asyncio.wait(tasks)
    for task in tasks:
        task.result()
    if failed:
        raise RowsFailed(
            f"{len(failed)} of {len(todo)} rows have failed", "the same command tries them again"
        )
