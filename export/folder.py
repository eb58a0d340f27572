"""A folder that is there as a whole or not at all.

Next: `export/bundle.py` and `export/final.py`, which fill one.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wire.errors import UserError
from wire.files import sync


@contextmanager
def new_folder(out: Path, mark: str, *, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its name when the block ends; removed if the block raises.

    mark: a file that such a folder holds. Raises `UserError` if `out` exists, unless `force`, and even then
    if it is a file or a folder that is neither empty nor has the mark, for that is something else's.
    """
    out = out.absolute()
    if out.exists() and not force:
        raise UserError(f"{out} exists", "choose another name, or replace it with --force")
    if out.exists() and not (out.is_dir() and ((out / mark).exists() or not any(out.iterdir()))):
        raise UserError(f"{out} exists and has no {mark}", "choose another name, or remove it yourself")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(
            f"cannot write to {out.parent}: {error.strerror}", "choose another folder"
        ) from error
    try:
        yield folder
        folder.chmod(0o755)
        for path in (*folder.rglob("*"), folder):
            sync(path)
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
