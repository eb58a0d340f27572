"""How far the training of an offer has come, on disk: a client that was killed goes on from there.

Rules: the engine's state comes first, synced, under its hash; then the file that names it takes the place
of the one before. It is written every `every_s` seconds, and seldom enough to cost a hundredth of the time.
What belongs to other work, or is damaged, counts as nothing.

Next: `edge_client/train.py`, which goes on; `edge_client/pending.py`, what comes after training.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import msgspec

from edge_client.engines import Engine
from edge_client.pending import Work
from wire.errors import UNDECODABLE
from wire.files import PARTIAL, rename, replacing, sync
from wire.manifest import BlobRef

SHARE = 0.01  # of the time, which writing may take

_PROGRESS = "progress"

log = logging.getLogger(__name__)


class Progress(msgspec.Struct, frozen=True):
    """epoch, first: the next batch begins with the `first`-th example of this epoch's order.

    total: losses of this epoch so far, each times the examples of its batch.
    """

    epoch: int = 0
    first: int = 0
    total: float = 0.0


class _Saved(msgspec.Struct, frozen=True):
    work: Work
    engine: str
    progress: Progress
    state: BlobRef


class Checkpoint:
    """Of one piece of work, in a folder that holds nothing else.

    engine: which, and of which train step: another cannot go on from there.
    """

    def __init__(self, folder: Path, work: Work, engine: str, every_s: float) -> None:
        self._folder = folder
        self._work = work
        self._engine = engine
        self._every_s = every_s
        self._due_s = time.monotonic() + every_s

    def resume(self, engine: Engine) -> Progress | None:
        """Bring the engine to where it was. None if nothing of this work is here: it is as it was then."""
        try:
            content = (self._folder / _PROGRESS).read_bytes()
            saved = msgspec.msgpack.decode(content, type=_Saved)
        except (OSError, *UNDECODABLE):
            return None
        state = self._folder / saved.state.sha256
        if (saved.work, saved.engine) != (self._work, self._engine):
            return None
        if not state.is_file() or BlobRef.of_file(state) != saved.state:
            return None
        engine.resume(state)
        log.info("%s: going on in epoch %d", self._work.key, saved.progress.epoch + 1)
        return saved.progress

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() >= self._due_s

    def save(self, engine: Engine, progress: Progress) -> None:
        """Replace what was saved before; where the disk does not take it, training goes on without."""
        begin_s = time.monotonic()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = self._folder / f"state{PARTIAL}"
            engine.save(partial)
            sync(partial)
            state = BlobRef.of_file(partial)
            rename(partial, self._folder / state.sha256)
            with replacing(self._folder / _PROGRESS) as file:
                file.write(msgspec.msgpack.encode(_Saved(self._work, self._engine, progress, state)))
            self._keep({_PROGRESS, state.sha256})
        except OSError as error:
            log.warning("%s cannot be written, training goes on: %s", self._folder, error.strerror or error)
        end_s = time.monotonic()
        self._due_s = end_s + max(self._every_s, (end_s - begin_s) / SHARE)

    def clear(self) -> None:
        """The work is done."""
        self._keep(set())

    def _keep(self, names: set[str]) -> None:
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if path.name not in names:
                path.unlink(missing_ok=True)
