"""What is trained in the resource benchmark: a model, its data, and how long.

Rules: every row of a model trains the same number of rounds on the same examples, as in the paper: the
stages' rounds together are end-to-end's. The data are the emoji that `lamina run` downloads; a scale with
fewer examples takes evenly spaced rows of them.

Next: `benchmarks/lamina_rows.py`, which runs Lamina at a scale.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
TABLE = "table.csv"


@dataclass(frozen=True)
class Scale:
    """model: a preset. examples: of each client, held_out: of each client's group; None for all there are.

    rounds: of a layer-wise stage. options: NAME=JSON, of the model's builder.
    """

    model: str
    clients: int
    examples: int | None
    held_out: int | None
    rounds: int
    local_epochs: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    options: tuple[str, ...] = ()

    @cached_property
    def num_stages(self) -> int:
        """Of the layer-wise schedule."""
        from models.registry import build

        return max(build(self.model, **self.model_options()).depths.values())

    @property
    def threads(self) -> int:
        """Of each client: its share of the cores, as `lamina run` has it."""
        return max(1, (os.cpu_count() or 1) // self.clients)

    def rounds_of(self, schedule: str) -> int:
        """Of each stage: end-to-end's only one has as many as the others' stages together."""
        return self.rounds * (self.num_stages if schedule == "end_to_end" else 1)

    def model_options(self) -> dict[str, Any]:
        """As the model's builder takes them."""
        return {name: json.loads(value) for name, value in (one.split("=", 1) for one in self.options)}

    def settings(self) -> dict[str, Any]:
        """What a result depends on, as plain values."""
        return asdict(self) | {"options": list(self.options)}


SCALES = {
    "tiny": Scale("tiny", clients=4, examples=None, held_out=None, rounds=4, local_epochs=1),
    "vit-tiny": Scale("vit-tiny", clients=2, examples=32, held_out=64, rounds=2, local_epochs=2),
}


def run_python(*arguments: str, python: str = sys.executable, log: Path | None = None) -> str:
    """What a Python process with the project in its path prints. Raises RuntimeError with its last line."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, *arguments], capture_output=True, text=True, env=environment)
    if log is not None:
        log.write_text(done.stderr, encoding="utf-8")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return done.stdout


def prepared(scale: Scale, data: Path | None, out: Path) -> Path:
    """A folder with `clients/<name>/` and `holdout/` of this scale, made from `data` if need be."""
    if data is None:
        data = out / "data" / "emoji-4"
        run_python("-m", "lamina", "data", "prepare", "emoji", "--clients", "4", "--out", str(data))
    names = sorted(path.name for path in (data / "clients").iterdir() if path.is_dir())
    if len(names) < scale.clients:
        raise RuntimeError(
            f"{data} has {len(names)} clients, {scale.model} is measured with {scale.clients}"
        )
    if len(names) == scale.clients and scale.examples is None and scale.held_out is None:
        return data
    names = names[: scale.clients]
    folder = out / "data" / f"{scale.clients}x{scale.examples}-{scale.held_out}"
    if folder.exists():
        return folder
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in names:
        copy_rows(data / "clients" / name, partial / "clients" / name, scale.examples, {name})
    copy_rows(data / "holdout", partial / "holdout", scale.held_out, set(names))
    partial.rename(folder)
    return folder


def copy_rows(source: Path, target: Path, count: int | None, groups: set[str]) -> None:
    """The table's rows of these groups, evenly spaced `count` of each, and their images."""
    with (source / TABLE).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = []
    for group in sorted(groups):
        members = [row for row in rows if row["group"] == group]
        step = max(1.0, len(members) / (count or math.inf)) if count else 1.0
        chosen += [members[int(place * step)] for place in range(min(count or len(members), len(members)))]
    for row in chosen:
        (target / row["image"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / row["image"], target / row["image"])
    with (target / TABLE).open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(chosen)


def exported(scale: Scale, schedule: str, data: Path, out: Path) -> Path:
    """A bundle for the engine `onnx`, made once; its initial parameters are those of `lamina run`."""
    made_of = json.dumps([scale.settings(), str(data)])
    folder = out / "bundles" / f"{scale.model}-{schedule}-{zlib.crc32(made_of.encode()):08x}"
    if not folder.exists():
        arguments = ["--model", scale.model, "--schedule", schedule, "--seed", str(SEED), "--no-check"]
        arguments += ["--engine", "onnx", "--rounds", str(scale.rounds_of(schedule)), "--out", str(folder)]
        arguments += [word for option in scale.options for word in ("--option", option)]
        clients = sorted((data / "clients").iterdir())
        arguments += [word for client in clients for word in ("--data", str(client))]
        run_python("-m", "lamina", "export", *arguments)
    return folder
