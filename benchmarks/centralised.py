"""What a preset learns when all clients' examples lie on one machine: the mark for every federated run.

    lamina data prepare digits && python benchmarks/centralised.py data/digits --model digits
    lamina data prepare watch --fold 1 --out data/watch-1
    python benchmarks/centralised.py data/watch-1 --model watch

Plain torch, all blocks at once, AdamW with a cosine to zero, the last state (nothing is chosen by the
hold-out). The same is trained on both modalities, and on each alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from inputs.dataset import Dataset
from models.heads import make_head
from models.model import Model
from models.registry import build


def part(name: str, modalities: tuple[str, ...], seed: int) -> Model:
    """The preset's model with these modalities only (all of them: as it is)."""
    torch.manual_seed(seed)
    model = build(name)
    if modalities == tuple(model.encoders):
        return model
    encoders = {modality: model.encoders[modality] for modality in modalities}
    widths = {modality: encoder.source.features.shape[1] for modality, encoder in encoders.items()}
    return Model(encoders, make_head("classification", widths, model.head.embedding, model.head.classes))


def tensors(folder: Path, model: Model, classes: list[str]) -> dict[str, torch.Tensor]:
    """All examples of a folder."""
    with tempfile.TemporaryDirectory() as cache:
        data = Dataset.open(
            folder, model.modalities, "classification", classes, Path, cache=Path(cache) / "c"
        )
        return {name: torch.from_numpy(array) for name, array in data.batch(range(len(data))).items()}


def train(model: Model, batch: dict[str, torch.Tensor], epochs: int, seed: int, rate: float) -> None:
    """In place."""
    size, rng = len(batch["label"]), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * -(-size // 32)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(size))
        for chosen in order.split(32):
            optimizer.zero_grad()
            model({name: values[chosen] for name, values in batch.items()}).backward()
            optimizer.step()
            schedule.step()


def accuracy(model: Model, batch: dict[str, torch.Tensor]) -> float:
    """Of the hold-out."""
    model.eval()
    with torch.no_grad():
        return float((model.head.logits(model.embed(batch)).argmax(1) == batch["label"]).float().mean())


def main() -> None:
    """One line of JSON for each set of modalities and seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--both-only", action="store_true", help="Not each modality alone.")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    classes = json.loads((chosen.data / "dataset.json").read_text())["classes"]
    every = tuple(build(chosen.model).encoders)
    for modalities in [every] if chosen.both_only else [every, *((one,) for one in every)]:
        for seed in range(chosen.seeds):
            start, model = time.perf_counter(), part(chosen.model, modalities, seed)
            clients = [tensors(path, model, classes) for path in sorted(chosen.data.glob("clients/*"))]
            together = {name: torch.cat([one[name] for one in clients]) for name in clients[0]}
            train(model, together, chosen.epochs, seed, chosen.learning_rate)
            result = {"data": str(chosen.data), "modalities": modalities, "seed": seed}
            result["accuracy"] = round(accuracy(model, tensors(chosen.data / "holdout", model, classes)), 3)
            print(json.dumps(result | {"seconds": round(time.perf_counter() - start)}), flush=True)


if __name__ == "__main__":
    main()
