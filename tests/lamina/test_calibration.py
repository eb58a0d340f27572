"""Calibration: the aggregator trains what it has combined as a client would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from small_world import World

from edge_client.anchors import anchored
from edge_client.engines import ONNX, open_engine
from lamina.calibration import Calibration
from wire.errors import UserError
from wire.tensors import Arrays


@pytest.fixture(params=[0.0, 0.1], ids=["plain", "aligned"])
def world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> World:
    return World.of(tmp_path_factory, alignment=request.param)


def calibration(world: World, folder: Path, epochs: int = 3) -> Calibration:
    dataset = world.dataset(folder / "inputs")
    return Calibration(world.folder, world.manifest, dataset, folder / "features", epochs, 1)


def trained_groups(world: World, stage: int) -> Arrays:
    values = world.values
    return {name: values[name] for name in world.manifest.names_of(world.manifest.stages[stage].trainable)}


@pytest.mark.parametrize("stage", [0, 1])
def test_it_lowers_the_loss_and_leaves_the_rest(world: World, tmp_path: Path, stage: int) -> None:
    combined = trained_groups(world, stage)
    before = {name: value.copy() for name, value in combined.items()}
    calibrate = calibration(world, tmp_path)
    after = calibrate(world.offer(stage), world.values, combined)
    assert list(after) == list(combined)
    assert all(np.array_equal(combined[name], before[name]) for name in before)
    again = calibration(world, tmp_path)(world.offer(stage), world.values, combined)
    assert all(np.array_equal(after[name], again[name]) for name in after)
    features = anchored(
        calibrate._cache.features(world.offer(stage)),
        before,
        ONNX,
        world.folder.joinpath,
        world.manifest,
        stage,
    )
    losses = []
    for values in (before, after):
        with open_engine(ONNX, world.folder.joinpath, world.manifest, stage) as engine:
            engine.load(values)
            losses.append(engine.evaluate(features.batch(range(len(features))))["loss"])
    assert losses[1] < losses[0]


def test_a_bundle_that_no_engine_here_can_train_is_told_before_anything_starts(
    world: World, tmp_path: Path
) -> None:
    stages = tuple(replace(stage, engines={"another": {}}) for stage in world.manifest.stages)
    manifest = replace(world.manifest, stages=stages)
    with pytest.raises(UserError, match="no engine runs here, of another"):
        Calibration(world.folder, manifest, world.dataset(tmp_path / "inputs"), tmp_path, 1, 1)
