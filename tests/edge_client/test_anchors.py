"""Training that keeps its embeddings close to those of the offered model."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import numpy as np
import pytest
from msgspec.structs import replace
from small_models import values_of
from small_world import PLAN, World

from edge_client.anchors import Anchored, anchored
from edge_client.cache import FeatureCache
from edge_client.engines import ONNX, open_engine
from edge_client.features import Examples
from edge_client.train import train
from wire.tensors import Arrays

STRONG = 30.0


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[float, World]:
    """The same model and data, with and without alignment."""
    return {weight: World.of(tmp_path_factory, alignment=weight) for weight in (0.0, STRONG)}


@pytest.mark.parametrize("stage", [0, 1])
def test_embeddings_stay_close_to_what_they_were(
    worlds: dict[float, World], tmp_path: Path, stage: int
) -> None:
    distances = {}
    for weight, world in worlds.items():
        cache = FeatureCache(
            tmp_path / f"features{weight}", world.manifest, world.dataset(tmp_path / f"in{weight}"), ONNX
        )
        world.prepare(cache, stage)
        features, entry = cache.features(world.offer(stage)), world.manifest.stages[stage]
        offered = {name: world.values[name] for name in entry.parameters.values()}
        file = world.folder.joinpath
        examples = anchored(features, offered, ONNX, file, world.manifest, stage)
        assert isinstance(examples, Anchored) == (weight > 0)
        plan = replace(PLAN, local_epochs=5, learning_rate=3e-3)
        with open_engine(ONNX, file, world.manifest, stage) as engine:
            trained = train(engine, offered, examples, plan, "ann", Event())
        after = {name: offered[name] + change for name, change in trained.delta.items()}
        distances[weight] = distance(worlds[STRONG], stage, features, offered, after)
    assert 0 < distances[STRONG] < 0.3 * distances[0.0]


def distance(world: World, stage: int, features: Examples, offered: Arrays, after: Arrays) -> float:
    """1 minus the mean cosine of embeddings by two models."""
    embeddings = []
    for parameters in (offered, after):
        examples = anchored(features, parameters, ONNX, world.folder.joinpath, world.manifest, stage)
        batch = examples.batch(range(len(examples)))
        embeddings.append(np.concatenate([batch["image_anchor"], batch["text_anchor"]]))
    return float(1 - np.mean(np.sum(embeddings[0] * embeddings[1], axis=1)))


def test_anchors_are_made_piece_by_piece_and_are_the_same_as_at_once(
    worlds: dict[float, World], tmp_path: Path
) -> None:
    world = worlds[STRONG]
    cache = FeatureCache(tmp_path / "features", world.manifest, world.dataset(tmp_path / "inputs"), ONNX)
    features = cache.features(world.offer(0))
    examples = anchored(features, values_of(world.model), ONNX, world.folder.joinpath, world.manifest, 0)
    whole = examples.batch(range(20))
    one = examples.batch([7])
    np.testing.assert_allclose(whole["image_anchor"][7], one["image_anchor"][0], rtol=1e-5, atol=1e-6)
    assert len(examples) == len(features)
