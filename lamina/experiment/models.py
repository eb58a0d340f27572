"""Models by their names: whether they take the options that rows give them, told before anything runs.

Next: `models/registry.py`, which builds them.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterable
from pathlib import Path

from lamina.experiment.settings import Values, did_you_mean
from models.registry import PRESETS
from wire.errors import UserError
from wire.manifest import BlobRef


def model_options(settings: Values) -> Values:
    """Of the model's builder."""
    return {
        name.removeprefix("option."): value
        for name, value in settings.items()
        if name.startswith("option.")
    }


def check_models(rows: Iterable[Values], where: str) -> None:
    """Raises `UserError` for a model that is not there, or an option that its builder does not take."""
    wanted: dict[str, set[str]] = {}
    for row in rows:
        wanted.setdefault(row["model"], set()).update(model_options(row))
    for name, options in wanted.items():
        known = _takes(name, where)
        for option in sorted(options):
            if known is not None and option.replace("-", "_") not in known:
                raise UserError(f"{where}: {name} has no option {option!r}", did_you_mean(option, known))


def program_of(name: str) -> str:
    """SHA-256 of the file that builds a model; empty where there is none to be seen."""
    module, _, _ = _builder(name).partition(":")
    try:
        found = importlib.util.find_spec(module)
        return BlobRef.of_file(Path(found.origin)).sha256 if found and found.origin else ""
    except (ImportError, ValueError, OSError):
        return ""


def _builder(name: str) -> str:
    return PRESETS[name][0] if name in PRESETS else name


def _takes(name: str, where: str) -> list[str] | None:
    """The names of its options; None: any."""
    if name not in PRESETS and ":" not in name:
        raise UserError(f"{where}: there is no model {name!r}", did_you_mean(name, PRESETS))
    builder = _builder(name)
    module, _, attribute = builder.partition(":")
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(
            f"{where}: cannot load {builder}: {error}", "check the name and PYTHONPATH"
        ) from error
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return None
    return list(parameters)
