"""Models and bundles small enough to train in a test; `three` is also a user's own builder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from export.bundle import Exported, export_bundle
from export.schedules import SCHEDULES
from models.audio import audio_encoder
from models.block import initialise
from models.heads import ContrastiveHead, make_head
from models.image import image_encoder
from models.model import Model
from models.registry import build
from models.series import series_encoder
from models.text import text_encoder
from wire.manifest import AdamW

BUILDER = "models.image_text:image_text"
TEXTS = ["a red fox jumps over a lazy dog", "Blue whales sing", "the cat sat on the mat", "hello world"]
CLASSES = ("cat", "dog", "fox")
FAST = ("onnx", "ort-training")  # engines whose files are made in a second or two


def small(
    task: str = "contrastive", *, image_blocks: int = 3, text_blocks: int = 2, seed: int = 0
) -> Model:
    torch.manual_seed(seed)
    return build(
        BUILDER,
        task=task,
        classes=len(CLASSES) if task == "classification" else 0,
        size=8,
        patch=4,
        width=16,
        heads=2,
        image_blocks=image_blocks,
        text_blocks=text_blocks,
        vocabulary=60,
        length=6,
        embedding=8,
    )


def three(*, width: int, blocks: int = 2) -> Model:
    """Two cameras and a text."""
    encoders = {
        "left": image_encoder(size=8, patch=4, width=width, heads=2, blocks=blocks),
        "right": image_encoder(size=8, patch=2, width=width, heads=2, blocks=1),
        "text": text_encoder(vocabulary=60, length=6, width=width, heads=2, blocks=blocks),
    }
    model = Model(encoders, ContrastiveHead(dict.fromkeys(encoders, width), 8))
    initialise(model)
    return model


def sounds_and_motions() -> Model:
    """A series by convolutions and a sound by patches, both masked."""
    common = {"length": 12, "patch": 3, "width": 16, "heads": 2, "blocks": 2}
    encoders = {
        "watch": series_encoder(channels=3, stem="conv", **common),
        "audio": audio_encoder(rate_hz=8000, mels=5, window_ms=25, hop_ms=10, **common),
    }
    head = make_head("classification", dict.fromkeys(encoders, 16), 8, len(CLASSES))
    model = Model(encoders, head)
    initialise(model)
    return model


def not_a_model() -> str:
    return "nothing"


def bundle(
    model: Model,
    out: Path,
    schedule: str = "layerwise",
    *,
    optimizer: AdamW | None = None,
    engines: Sequence[str] = FAST,
    runtimes: Any = None,
    force: bool = False,
    micro_batch_size: int = 0,
    missing_modalities: bool = False,
    alignment: float = 0.0,
    **options: Any,
) -> Exported:
    plan = SCHEDULES[schedule](model.depths, 2, **options)
    return export_bundle(
        model,
        plan,
        out,
        texts=TEXTS,
        classes=CLASSES if model.task == "classification" else (),
        optimizer=optimizer,
        engines=engines,
        micro_batch_sizes=[micro_batch_size] * len(plan.stages),
        missing_modalities=missing_modalities,
        alignment=alignment,
        runtimes=runtimes,
        force=force,
    )


def values_of(model: Model) -> dict[str, Any]:
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def arrays(batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in batch.items()}
