"""One process at a time in a folder of state.

Next: `edge_client/device.py` and `lamina/aggregator_command.py`, whose folders are kept so.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wire.errors import UserError


@contextmanager
def locked(folder: Path, hint: str) -> Iterator[None]:
    """The folder, made if need be, is ours within the block; the kernel lets go of it if we are killed.

    Raises `UserError`, with `hint`, where another process has it or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}", hint) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process uses {folder}", hint) from None
        yield
