"""A small folder of examples: what is in it, and how a test writes another table."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from inputs.dataset import Dataset

SIZE, LENGTH = 8, 6
CLASSES = ("animal", "plant")
TEXTS = ("a red fox", "a green fern", "a blue whale in the deep blue sea", "an old oak")
ROWS = [
    {"image": f"images/{i}.png", "text": text, "label": CLASSES[i % 2], "group": "xy"[i % 2]}
    for i, text in enumerate(TEXTS)
]
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (102, 51, 0))

Open = Callable[..., Dataset]


def write_csv(folder: Path, rows: Sequence[dict[str, str]]) -> Path:
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "table.csv"
