"""A bundle of a small model and a folder of examples that fit together, and the offers of a run on them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import CLASSES, bundle, small, values_of

from edge_client.cache import FeatureCache, Step
from edge_client.engines import open_graph
from edge_client.features import by_own_names
from export.schedules import SCHEDULES
from inputs.dataset import Dataset
from models.model import Model
from wire.manifest import BlobRef, Manifest
from wire.messages import Offer, RoundKey, TrainPlan
from wire.tensors import Arrays, pack

NUM_EXAMPLES = 20
ENGINE = "onnx"
WORDS = ("red", "fox", "jumps", "over", "lazy", "dog", "blue", "whales", "sing", "cat", "mat", "hello")
PLAN = TrainPlan(learning_rate=1e-3, batch_size=8, local_epochs=1, seed=0)


def write_examples(folder: Path, first: int = 0) -> Path:
    """Examples `first`, `first` + 1, ...: noise and 1 to 8 words, three labels, groups of 5 and 15."""
    (folder / "images").mkdir(parents=True)
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "text", "label", "group"])
        for i in range(first, first + NUM_EXAMPLES):
            generator = np.random.default_rng(i)
            pixels = generator.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
            text = " ".join(generator.choice(WORDS, 1 + i % 8))
            group = "few" if i % 4 == 0 else "many"
            writer.writerow([f"images/{i}.png", text, CLASSES[i % 4 % 3], group])
    return folder


@dataclass(frozen=True)
class World:
    """model: in torch, with the bundle's initial values. folder: of the bundle. data: of the examples."""

    model: Model
    manifest: Manifest
    schedule: str
    folder: Path
    data: Path

    @classmethod
    def of(
        cls,
        folders: pytest.TempPathFactory,
        task: str = "contrastive",
        schedule: str = "layerwise",
        engines: tuple[str, ...] = (ENGINE,),
        alignment: float = 0.0,
        **blocks: int,
    ) -> World:
        """One of each kind is made for all the tests, which leave it as it is."""
        key = (task, schedule, engines, alignment, *blocks.items())
        if key not in _WORLDS:
            folder, model = folders.mktemp("world"), small(task, **blocks)
            made = bundle(model, folder / "bundle", schedule, engines=engines, alignment=alignment)
            data = write_examples(folder / "data")
            _WORLDS[key] = cls(model, made.manifest, schedule, folder / "bundle", data)
        return _WORLDS[key]

    def dataset(self, cache: Path, data: Path | None = None) -> Dataset:
        manifest = self.manifest
        return Dataset.open(
            data or self.data,
            manifest.modalities,
            manifest.task,
            manifest.classes,
            self.folder.joinpath,
            cache=cache,
        )

    @property
    def values(self) -> Arrays:
        """The model's: torch name -> float32."""
        return values_of(self.model)

    def frozen(self, stage: int, values: Arrays | None = None) -> Arrays:
        """What is frozen after a stage, and no other parameter."""
        chosen = values or self.values
        names = self.manifest.names_of(self.manifest.groups_frozen_after(stage))
        return {name: chosen[name] for name in names}

    def offer(self, stage: int, values: Arrays | None = None, plan: TrainPlan = PLAN) -> Offer:
        """The first round of a stage, with these frozen parameters below."""
        frozen = (BlobRef.of(pack(self.frozen(below, values))) for below in range(stage))
        names = self.manifest.names_of(self.manifest.stages[stage].trainable)
        parameters = BlobRef.of(pack({name: self.values[name] for name in names}))
        return Offer(RoundKey(stage, 0), 0.0, ("ann",), parameters, tuple(frozen), plan, 60.0)

    def run(self, cache: FeatureCache, step: Step, values: Arrays | None = None) -> list[int]:
        """Run a step on ONNX Runtime, as a client does; the sizes of its batches."""
        graph = open_graph(ENGINE, self.folder.joinpath, by_own_names(step.graph))
        sizes: list[int] = []

        def run(batch: Any, parameters: Any) -> dict[str, Any]:
            sizes.append(len(next(iter(batch.values()))))
            return graph(batch, parameters)

        cache.run(step, run, self.frozen(step.stage, values), Event())
        return sizes

    def prepare(
        self, cache: FeatureCache, stage: int, values: Arrays | None = None, plan: TrainPlan = PLAN
    ) -> list[Step]:
        """Run whatever steps are missing; which they were."""
        steps = cache.steps(self.offer(stage, values, plan))
        for step in steps:
            self.run(cache, step, values)
        return steps

    def activations(self, stage: int, batch: dict[str, Any]) -> dict[str, Any]:
        """What torch gives for the inputs of a stage that features stand in for: modality -> [B, T, D]."""
        plan = SCHEDULES[self.schedule](self.model.depths).stages[stage]
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in batch.items()}
        found = {}
        for name, encoder in self.model.encoders.items():
            if (start := plan.starts[name]) is not None:
                with torch.no_grad():
                    below = encoder.section(0, start, stem=True)
                    found[name] = below(tensors[name], tensors.get(f"{name}_mask")).numpy()
        return found


_WORLDS: dict[tuple[object, ...], World] = {}
