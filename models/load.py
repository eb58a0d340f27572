"""A trained model as a torch module, from the folder that a run leaves behind.

Next: `models/saved.py`, what is in that folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.model import Model
from models.registry import build
from models.saved import WEIGHTS_NAME, read_saved
from wire.errors import UserError


def load(folder: Path | str) -> Model:
    """The module in eval mode, with the trained weights. Raises `UserError` if the folder holds none."""
    path = Path(folder)
    saved = read_saved(path)
    try:
        weights = load_file(path / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} holds no trained weights: {error}", "name the folder of a final model"
        ) from error
    with torch.random.fork_rng(
        devices=[]
    ):  # building draws initial values, which the caller did not ask for
        model = build(saved.builder, **saved.builder_options)
    model.cut(saved.depths)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{path} does not fit {saved.builder}: {reason}", "use the code it was trained with"
        ) from error
    return model.eval()
