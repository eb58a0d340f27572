"""A model: one encoder per modality, a head, and the names of its parameter groups.

Rules: torch names begin with the modality (`image.stem.*`, `image.blocks.3.*`) or with `head`; their group
is `image.stem`, `image.block.3`, `head.image` for what the head has for images alone, or `head`. The order
of groups and of parameters is the module's own.

Next: `models/registry.py`, which builds models by name; `export/stage.py`, which cuts them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from models.block import initialise
from models.encoder import Encoder
from models.heads import Head, make_head
from wire.errors import UserError
from wire.manifest import LABEL, Modality, Task, TensorSpec


class Model(nn.Module):
    """encoders: by modality name. builder, builder_options: how to build it again, from the registry."""

    head: Head
    builder: str
    builder_options: dict[str, Any]

    def __init__(self, encoders: Mapping[str, Encoder], head: Head) -> None:
        super().__init__()
        for name in encoders:
            if not re.fullmatch(r"[a-z][a-z0-9]*", name) or name in ("head", LABEL) or hasattr(self, name):
                raise UserError(
                    f"{name!r} cannot name a modality", "use a short lowercase word, such as audio"
                )
        if set(encoders) != set(head.modalities):
            raise UserError("the head's modalities are not the encoders'", "build both from the same names")
        for name, encoder in encoders.items():
            self.add_module(name, encoder)
        self.head = head
        self.encoders = dict(encoders)
        self.builder, self.builder_options = "", {}

    @property
    def task(self) -> Task:
        """The head's."""
        return self.head.task

    @property
    def modalities(self) -> dict[str, Modality]:
        """Modality name -> what a device feeds it."""
        return {name: encoder.modality(name) for name, encoder in self.encoders.items()}

    @property
    def depths(self) -> dict[str, int]:
        """Modality name -> number of blocks."""
        return {name: len(encoder.blocks) for name, encoder in self.encoders.items()}

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        """Everything `forward` is fed, by name, without the batch dimension."""
        specs = {
            key: spec for modality in self.modalities.values() for key, spec in modality.inputs.items()
        }
        return specs | ({LABEL: TensorSpec((), "int64")} if self.task == "classification" else {})

    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raw inputs [B, ...] -> modality -> embedding float32 [B, E]."""
        embeddings = {}
        for name, encoder in self.encoders.items():
            mask = batch.get(f"{name}_mask")
            embeddings[name] = self.head.embed(name, encoder(batch[name], mask), mask)
        return embeddings

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The batch's mean loss, float32 []."""
        return self.head.loss(self.embed(batch), batch.get(LABEL))

    def cut(self, depths: Mapping[str, int]) -> None:
        """Drop every block from `depths[modality]` on, in place: the model as an earlier stage has it."""
        for name, depth in depths.items():
            del self.encoders[name].blocks[depth:]


def group_of(name: str, modalities: Collection[str]) -> str:
    """The parameter group of a torch name, in a model of these modalities."""
    parts = name.split(".")
    if parts[0] != "head":
        return f"{parts[0]}.stem" if parts[1] == "stem" else f"{parts[0]}.block.{parts[2]}"
    # What is one modality's lies in a ModuleDict: head.<what>.<modality>.<parameter>.
    return f"head.{parts[2]}" if len(parts) > 3 and parts[2] in modalities else "head"


def parameter_groups(model: Model) -> dict[str, list[str]]:
    """Group -> torch names of its parameters, both in module order."""
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        groups.setdefault(group_of(name, model.encoders), []).append(name)
    return groups


def joined(encoders: Mapping[str, Encoder], task: Task, width: int, embedding: int, classes: int) -> Model:
    """Encoders of one width under a new head, all with fresh initial values.

    embedding: the head's width. classes: of classification. Raises `UserError` as `make_head` and `Model`.
    """
    model = Model(encoders, make_head(task, dict.fromkeys(encoders, width), embedding, classes))
    initialise(model)
    return model
