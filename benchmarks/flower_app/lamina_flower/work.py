"""What the benchmark asks of the Flower app: one JSON file that server and clients read.

Next: `lamina_flower/client.py`, which trains by it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from models.model import Model
from models.registry import build
from wire.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class Work:
    """bundle: of the end-to-end schedule, for the model's options, the tokenizer and initial parameters.

    data: a folder with `clients/<name>/`. out: where results go. learning_rates, seeds: one a round.
    """

    bundle: str
    data: str
    out: str
    num_clients: int
    learning_rates: list[float]
    seeds: list[int]
    local_epochs: int
    batch_size: int
    threads: int

    @classmethod
    def read(cls, path: str) -> Work:
        """The file that the run configuration names."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def model(self) -> tuple[Model, Manifest]:
        """The bundle's model with fresh parameters, and its manifest."""
        manifest, _ = read_manifest(Path(self.bundle))
        return build(manifest.builder, **manifest.builder_options), manifest
