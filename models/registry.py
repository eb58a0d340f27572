"""Models by name. A new one is one file, and one line here.

Rules: a name is a preset or a user's own `package.module:builder`, a function of keyword options (JSON
values) that returns a `Model`. A built model carries its builder and every option in full, defaults
included, so a bundle rebuilds the same module whatever later defaults are. Initialisation draws on
torch's global generator, which the caller seeds.

Next: `models/image_text.py`, and beside it the builders of the other kinds of model.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from wire.errors import UserError

if TYPE_CHECKING:
    from models.model import Model

_IMAGE_TEXT = "models.image_text:image_text"
_IMAGE_AUDIO = "models.image_audio:image_audio"
_IMAGE_SERIES = "models.image_series:image_series"
_AUDIO_TEXT = "models.audio_text:audio_text"
_MOTION = "models.motion:motion"
_VIT_TINY = {"size": 224, "patch": 16, "width": 192, "heads": 3, "length": 64, "embedding": 192}

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        _IMAGE_TEXT,
        {"size": 32, "patch": 8, "stem": "conv", "width": 128, "heads": 4, "length": 16},
    ),
    "small": (
        _IMAGE_TEXT,
        {"size": 64, "patch": 8, "width": 192, "heads": 3, "embedding": 192}
        | {"image_blocks": 6, "text_blocks": 6, "vocabulary": 4096},
    ),
    "vit-tiny": (_IMAGE_TEXT, _VIT_TINY | {"image_blocks": 12, "text_blocks": 12, "vocabulary": 8192}),
    "vit-tiny-uneven": (
        _IMAGE_TEXT,
        _VIT_TINY | {"image_blocks": 12, "text_blocks": 6, "vocabulary": 8192},
    ),
    "image-audio": (_IMAGE_AUDIO, {}),
    # Means and deviations are about those of what `lamina data prepare` writes to train on.
    "digits": (
        _IMAGE_SERIES,
        # Of 8 pixels, for all detail is noise.
        {"classes": 10, "size": 8, "patch": 4, "stem": "conv", "image_mean": 0.427, "image_std": 0.05}
        | {"series_patch": 1, "series_stem": "conv", "series_std": 1.8, "width": 64, "embedding": 64},
    ),
    "watch": (_MOTION, {"classes": 7, "sensors": ["accelerometer", "gyroscope"], "stds": [0.7, 1.6]}),
    "stamps": (_AUDIO_TEXT, {"hop_ms": 20.0, "length": 125, "text_length": 16}),
}


def build(name: str, **options: Any) -> Model:
    """The model of a preset or of `package.module:builder`, with `options` over its own.

    Raises `UserError` where there is no such model, or it does not take an option or its value.
    """
    builder, _ = _lookup(name)
    full = full_options(name, **options)
    model = _call(name, _load(builder), full)
    model.builder, model.builder_options = builder, full
    return model


def full_options(name: str, **options: Any) -> dict[str, Any]:
    """Every option that `build` gives the builder: `options`, over the preset's, over the defaults.

    Raises `UserError` as `build` does, but for values that the builder itself refuses.
    """
    builder, given = _lookup(name)
    given |= options
    known = inspect.signature(_load(builder)).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    if unknown := [] if takes_any else [option for option in given if option not in known]:
        raise UserError(f"{name} has no option {unknown[0]!r}", f"it takes {', '.join(known)}")
    defaults = {
        key: parameter.default
        for key, parameter in known.items()
        if parameter.default is not inspect.Parameter.empty
    }
    full = defaults | given
    try:
        json.dumps(full, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"an option of {name} is not a JSON value: {error}", "use plain values") from error
    return full


def _lookup(name: str) -> tuple[str, dict[str, Any]]:
    if name in PRESETS:
        builder, options = PRESETS[name]
        return builder, dict(options)
    if ":" in name:
        return name, {}
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(PRESETS)}"
    raise UserError(f"there is no model {name!r}", f"{hint}, or name your own as package.module:builder")


def _load(builder: str) -> Callable[..., Any]:
    module, _, attribute = builder.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot load {builder}: {error}", "check the name and PYTHONPATH") from error
    if not callable(function):
        raise UserError(f"{builder} is not a function", "name a function that returns a models.model.Model")
    return function  # type: ignore[no-any-return]


def _call(name: str, function: Callable[..., Any], options: dict[str, Any]) -> Model:
    from models.model import Model

    try:
        model = function(**options)
    except (TypeError, ValueError, RuntimeError) as error:  # a builder's own complaint about its options
        raise UserError(f"{name} cannot be built: {error}", "check its options") from error
    if not isinstance(model, Model):
        raise UserError(f"{name} returned {type(model).__name__}", "return a models.model.Model")
    return model
