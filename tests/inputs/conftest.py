"""The example folder on disk, a tokenizer trained on its texts, and a model's modalities."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from example_folder import CLASSES, COLOURS, LENGTH, ROWS, SIZE, TEXTS, Open, write_csv
from PIL import Image

from inputs.dataset import Dataset
from wire.manifest import Modality, TensorSpec


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("tokenizer") / "words"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_prefix=str(prefix),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture
def modalities() -> dict[str, Modality]:
    return {
        "image": Modality(
            "image",
            {"image": TensorSpec((3, SIZE, SIZE), "float32")},
            {"size": SIZE, "mean": 0.5, "std": [0.5, 0.25, 0.5]},
        ),
        "text": Modality(
            "text",
            {"text": TensorSpec((LENGTH,), "int64"), "text_mask": TensorSpec((LENGTH,), "float32")},
            {"length": LENGTH, "tokenizer": "words.model"},
        ),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (SIZE, SIZE), colour).save(folder / "images" / f"{i}.png")
    write_csv(folder, ROWS)
    return folder


@pytest.fixture
def open_dataset(folder: Path, tmp_path: Path, modalities: dict[str, Modality], tokenizer: Path) -> Open:
    def opener(task: str = "classification", **options: object) -> Dataset:
        settings: dict[str, object] = {"modalities": modalities, "cache": tmp_path / "cache", **options}
        return Dataset.open(folder, task=task, classes=CLASSES, file=lambda name: tokenizer, **settings)  # type: ignore[arg-type]

    return opener
