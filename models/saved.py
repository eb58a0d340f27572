"""`model.json`: what a final model's folder says about itself. No torch here.

A folder holds `model.json`, `model.safetensors` (torch names), `<modality>.onnx` with the weights inside,
for classification `classifier.onnx`, and the tokenizer.

Next: `models/load.py`, which makes the torch module again; `export/final.py`, which writes the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from wire.errors import UserError
from wire.manifest import Modality, Task

MODEL_NAME = "model.json"
WEIGHTS_NAME = "model.safetensors"
CLASSIFIER_NAME = "classifier.onnx"


class SavedModel(msgspec.Struct, frozen=True):
    """builder, builder_options: as in the manifest. depths: modality -> blocks left by the cut."""

    builder: str
    builder_options: dict[str, Any]
    task: Task
    modalities: dict[str, Modality]
    classes: tuple[str, ...]
    depths: dict[str, int]


def read_saved(folder: Path) -> SavedModel:
    """A folder's `model.json`. Raises `UserError` where there is none."""
    try:
        return msgspec.json.decode((folder / MODEL_NAME).read_bytes(), type=SavedModel)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(
            f"{folder} holds no trained model: {error}", "name the folder of a final model"
        ) from error
