"""The feature cache: it gives what torch gives, runs what is missing, and keeps nothing that is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from threading import Event

import msgspec
import numpy as np
import pytest
from small_world import NUM_EXAMPLES, World, write_examples

from edge_client.cache import FeatureCache, Stopped
from export.parity import relative_l2
from wire.errors import UserError

EVERY = range(NUM_EXAMPLES)
MAX_ERROR = 1e-5
STAGES = range(3)  # of the uneven encoders, 3 and 2 blocks


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """The examples take three passes, the last one smaller."""
    monkeypatch.setattr("edge_client.cache.BATCH", 8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.of(tmp_path_factory)


@pytest.fixture(scope="module")
def dataset(world, tmp_path_factory):
    return world.dataset(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def cache(world, dataset, tmp_path):
    return FeatureCache(tmp_path / "features", world.manifest, dataset, "onnx")


def names(steps):
    return [(step.modality, step.stage) for step in steps]


def files(tmp_path):
    return {path.name for path in (tmp_path / "features").iterdir()}


def assert_like_torch(world, features, stage):
    batch, raw = features.batch(EVERY), features.dataset.batch(EVERY)
    expected = world.activations(stage, raw)
    assert set(features.cached) == set(expected)
    for name, values in expected.items():
        assert relative_l2(batch[name], values) < MAX_ERROR, name
    for name in batch.keys() - expected.keys():
        assert np.array_equal(batch[name], raw[name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_features_are_torchs_activations(world, cache, stage):
    world.prepare(cache, stage)
    features = cache.features(world.offer(stage))
    inputs = world.manifest.stages[stage].inputs
    assert_like_torch(world, features, stage)
    assert len(features) == NUM_EXAMPLES
    for name, array in features.cached.items():
        assert array.shape == (NUM_EXAMPLES, *inputs[name].shape)
        assert array.dtype == np.float32
        assert isinstance(array, np.memmap)


def test_a_client_that_was_there_runs_one_step_a_modality(world, cache):
    assert world.prepare(cache, 0) == []
    for stage in STAGES[1:]:
        assert names(world.prepare(cache, stage)) == [("image", stage - 1), ("text", stage - 1)]
        assert cache.steps(world.offer(stage)) == []
        cache.features(world.offer(stage))
        assert cache.steps(world.offer(stage)) == []


def test_a_late_client_walks_the_chain(world, cache):
    steps = world.prepare(cache, 2)
    assert names(steps) == [("image", 0), ("text", 0), ("image", 1), ("text", 1)]
    assert [step.source for step in steps] == [None, None, steps[0].target, steps[1].target]
    assert cache.steps(world.offer(2)) == []


def test_each_example_goes_through_a_segment_once(world, cache):
    assert [world.run(cache, step) for step in cache.steps(world.offer(2))] == [[8, 8, 4]] * 4


def test_a_restarted_client_finds_its_features(world, dataset, cache, tmp_path):
    world.prepare(cache, 2)
    again = FeatureCache(tmp_path / "features", world.manifest, dataset, "onnx")
    assert again.steps(world.offer(2)) == []
    assert_like_torch(world, again.features(world.offer(2)), 2)


def test_other_parameters_below_give_other_files(world, cache):
    other = world.values
    other["text.blocks.1.norm1.weight"] = other["text.blocks.1.norm1.weight"] + 1
    world.prepare(cache, 2)
    later = world.offer(2, other)
    assert later.frozen[0] == world.offer(2).frozen[0]
    assert names(cache.steps(later)) == [("image", 1), ("text", 1)]

    other["image.stem.embed.bias"] = other["image.stem.embed.bias"] + 1
    assert len(world.prepare(cache, 2, other)) == 4
    before = cache.features(world.offer(2)).batch(EVERY)["image"]
    world.prepare(cache, 2, other)
    after = cache.features(world.offer(2, other)).batch(EVERY)["image"]
    assert relative_l2(after, before) > 0.1


def test_other_data_gives_other_files(world, dataset, cache, tmp_path):
    world.prepare(cache, 1)
    other = world.dataset(tmp_path / "inputs", write_examples(tmp_path / "data", first=7))
    theirs = FeatureCache(tmp_path / "features", world.manifest, other, "onnx")
    assert other.fingerprint != dataset.fingerprint
    assert names(world.prepare(theirs, 1)) == [("image", 0), ("text", 0)]
    assert_like_torch(world, theirs.features(world.offer(1)), 1)


def test_only_the_newest_file_of_a_modality_is_kept(world, cache, tmp_path):
    world.prepare(cache, 1)
    cache.features(world.offer(1))
    first = files(tmp_path)
    (tmp_path / "features" / "left.partial").write_bytes(b"by one that was killed")
    steps = world.prepare(cache, 2)
    assert len(files(tmp_path)) == 5
    cache.features(world.offer(2))
    assert files(tmp_path) == {step.target.name for step in steps}
    assert files(tmp_path).isdisjoint(first)


def test_what_is_in_use_outlives_its_file(world, cache):
    world.prepare(cache, 1)
    features = cache.features(world.offer(1))
    expected = features.batch(EVERY)["image"]
    world.prepare(cache, 2)
    cache.features(world.offer(2))
    assert np.array_equal(features.batch(EVERY)["image"], expected)


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_a_stopped_pass_leaves_nothing(world, cache, tmp_path, passes):
    stop, done = Event(), []
    [step, _] = cache.steps(world.offer(1))
    shape = world.manifest.stages[1].inputs["image"].shape

    def run(batch, parameters):
        done.append(len(batch["image"]))
        if len(done) == passes:
            stop.set()
        return {"features": np.zeros((len(batch["image"]), *shape), np.float32)}

    if not passes:
        stop.set()
    with pytest.raises(Stopped):
        cache.run(step, run, {}, stop)
    assert done == [8, 8][:passes]
    assert files(tmp_path) == set()
    assert names(world.prepare(cache, 1)) == [("image", 0), ("text", 0)]
    assert_like_torch(world, cache.features(world.offer(1)), 1)


def test_a_pass_that_fails_leaves_nothing(world, cache, tmp_path):
    def run(batch, parameters):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        cache.run(cache.steps(world.offer(1))[0], run, {}, Event())
    assert files(tmp_path) == set()


def test_a_killed_pass_leaves_no_file_that_counts(world, cache, tmp_path):
    """Killed after the second of its passes, by itself."""
    offer = world.offer(1)
    program = f"""
import os, sys
from pathlib import Path
from threading import Event
import msgspec
import numpy as np
import edge_client.cache as cache
from inputs.dataset import Dataset
from wire.manifest import decode_manifest
from wire.messages import Offer
cache.BATCH = 8
bundle, here = Path({str(world.folder)!r}), Path({str(tmp_path)!r})
manifest = decode_manifest((bundle / "manifest.json").read_bytes())
dataset = Dataset.open(
    Path({str(world.data)!r}), manifest.modalities, manifest.task, manifest.classes, bundle.joinpath,
    cache=here / "inputs")
features = cache.FeatureCache(here / "features", manifest, dataset, "onnx")
calls = []
def run(batch, parameters):
    calls.append(0)
    if len(calls) == 3:
        os._exit(9)
    return {{"features": np.ones((8, *manifest.stages[1].inputs["image"].shape), np.float32)}}
offer = msgspec.msgpack.decode(bytes.fromhex("{msgspec.msgpack.encode(offer).hex()}"), type=Offer)
features.run(features.steps(offer)[0], run, {{}}, Event())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 9, done.stderr
    [left] = files(tmp_path)
    assert left.endswith(".partial")
    assert names(world.prepare(cache, 1)) == [("image", 0), ("text", 0)]
    assert_like_torch(world, cache.features(offer), 1)
    assert left not in files(tmp_path)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def scribble(path):
    path.write_bytes(b"\x00" * path.stat().st_size)


def be_fewer(path):
    np.save(path, np.load(path)[:-1])


def be_doubles(path):
    np.save(path, np.load(path).astype(np.float64))


def be_objects(path):
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)


def vanish(path):
    path.unlink()


@pytest.mark.parametrize(
    "damage", [truncate, halve, empty, scribble, be_fewer, be_doubles, be_objects, vanish]
)
def test_a_damaged_file_is_computed_again(world, cache, damage):
    steps = world.prepare(cache, 2)
    damage(steps[2].target)  # the image's newest
    assert names(cache.steps(world.offer(2))) == [("image", 1)]
    damage(steps[0].target)  # and the one it is made from
    assert names(world.prepare(cache, 2)) == [("image", 0), ("image", 1)]
    assert_like_torch(world, cache.features(world.offer(2)), 2)


@pytest.mark.parametrize(("schedule", "stage"), [("progressive", 0), ("progressive", 1), ("end_to_end", 0)])
def test_without_a_prefix_the_features_are_the_raw_inputs(tmp_path_factory, tmp_path, schedule, stage):
    world = World.of(tmp_path_factory, schedule=schedule, image_blocks=2, text_blocks=1)
    cache = FeatureCache(tmp_path / "features", world.manifest, world.dataset(tmp_path / "inputs"), "onnx")
    assert cache.steps(world.offer(stage)) == []
    features = cache.features(world.offer(stage))
    batch, raw = features.batch([3, 1]), features.dataset.batch([3, 1])
    assert features.cached == {}
    assert batch.keys() == raw.keys() == world.manifest.stages[stage].inputs.keys()
    assert all(np.array_equal(batch[name], raw[name]) for name in raw)
    assert not (tmp_path / "features").exists()


def test_labels_come_along_and_a_modality_without_blocks_left_keeps_its_features(
    tmp_path_factory, tmp_path
):
    world = World.of(tmp_path_factory, "classification", text_blocks=1)
    cache = FeatureCache(tmp_path / "features", world.manifest, world.dataset(tmp_path / "inputs"), "onnx")
    for stage, steps in enumerate([[], [("image", 0), ("text", 0)], [("image", 1)]]):
        assert names(world.prepare(cache, stage)) == steps
        features = cache.features(world.offer(stage))
        batch = features.batch([5, 2, 9])
        assert batch.keys() == world.manifest.stages[stage].inputs.keys()
        assert batch["label"].dtype == np.int64
        assert batch["label"].tolist() == [1, 2, 1]
        assert_like_torch(world, features, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_is_in_the_order_asked_for(world, cache, stage):
    world.prepare(cache, stage)
    features = cache.features(world.offer(stage))
    asked = [7, 19, 0, 7, 3]
    whole, batch = features.batch(EVERY), features.batch(asked)
    for indices in (np.array(asked), tuple(asked)):
        assert all(np.array_equal(features.batch(indices)[name], batch[name]) for name in batch)
    assert batch.keys() == world.manifest.stages[stage].inputs.keys()
    for name, spec in world.manifest.stages[stage].inputs.items():
        assert batch[name].dtype == spec.dtype
        assert batch[name].shape == (5, *spec.shape)
        assert batch[name].flags.c_contiguous
        assert np.array_equal(batch[name], whole[name][asked])


def test_a_batch_of_features_reads_no_picture(world, cache, monkeypatch):
    world.prepare(cache, 1)
    features = cache.features(world.offer(1))
    monkeypatch.setattr("inputs.image.ImageReader.decode", lambda *_: pytest.fail("it was read"))
    assert set(features.batch([0])) == {"image", "text", "text_mask"}


def test_a_disk_that_takes_nothing_is_told_in_one_line(world, cache, tmp_path):
    (tmp_path / "features").write_text("in the way")
    with pytest.raises(UserError, match="features cannot be written to") as caught:
        world.prepare(cache, 1)
    assert "--dir" in caught.value.hint
