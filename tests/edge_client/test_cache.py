"""The feature cache: it gives what torch gives, runs what is missing, and keeps nothing that is broken."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Event

import msgspec
import numpy as np
import pytest
from small_world import NUM_EXAMPLES, World, write_examples

from edge_client.cache import RESERVE_BYTES, FeatureCache
from edge_client.engines import open_engine
from edge_client.features import Stopped
from edge_client.train import train
from export.parity import relative_l2
from wire.errors import UserError
from wire.messages import TrainPlan

EVERY = range(NUM_EXAMPLES)
MAX_ERROR = 1e-5
STAGES = range(3)  # of the uneven encoders, 3 and 2 blocks


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.of(tmp_path_factory)


@pytest.fixture(scope="module")
def dataset(world, tmp_path_factory):
    return world.dataset(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def cache(world, dataset, tmp_path):
    return opened(world, dataset, tmp_path)


def opened(world, dataset, tmp_path, dtype="float32", **options):
    """The cache of a client that has just started."""
    return FeatureCache(tmp_path / "features", world.manifest, dataset, "onnx", dtype=dtype, **options)


def names(steps):
    return [(step.modality, step.stage) for step in steps]


def files(tmp_path):
    return {path.name for path in (tmp_path / "features").iterdir()}


def assert_like_torch(world, features, stage):
    batch, raw = features.batch(EVERY), features.dataset.batch(EVERY)
    expected = world.activations(stage, raw)
    assert set(features.prefixes) == set(expected)
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
    for name, prefix in features.prefixes.items():
        array = np.load(prefix.rows.path)
        assert array.shape == (NUM_EXAMPLES, *inputs[name].shape)
        assert array.dtype == np.float32
        assert np.array_equal(array, features.batch(EVERY)[name])


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
    again = opened(world, dataset, tmp_path)
    assert again.steps(world.offer(2)) == []
    assert_like_torch(world, again.features(world.offer(2)), 2)


def test_other_parameters_below_give_other_files(world, cache):
    other = world.values
    other["text.blocks.1.norm1.weight"] = other["text.blocks.1.norm1.weight"] + 1
    world.prepare(cache, 1)
    later = world.offer(2, other)
    assert later.frozen[0] == world.offer(2).frozen[0]
    assert names(cache.steps(later)) == [("image", 1), ("text", 1)]
    world.prepare(cache, 2)
    image = cache.features(world.offer(2)).batch(EVERY)["image"]

    other["image.stem.embed.bias"] = other["image.stem.embed.bias"] + 1
    assert len(world.prepare(cache, 2, other)) == 4
    assert relative_l2(cache.features(world.offer(2, other)).batch(EVERY)["image"], image) > 0.1


def test_other_data_gives_other_files(world, dataset, cache, tmp_path):
    world.prepare(cache, 1)
    other = world.dataset(tmp_path / "inputs", write_examples(tmp_path / "data", first=7))
    theirs = opened(world, other, tmp_path)
    assert other.fingerprint != dataset.fingerprint
    assert names(world.prepare(theirs, 1)) == [("image", 0), ("text", 0)]
    assert_like_torch(world, theirs.features(world.offer(1)), 1)


def test_only_the_newest_file_of_a_modality_is_kept(world, cache, tmp_path):
    world.prepare(cache, 1)
    cache.features(world.offer(1))
    first = files(tmp_path)
    (tmp_path / "features" / "left.partial").write_bytes(b"by one that was killed")
    steps = world.prepare(cache, 2)
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
        cache.run(step, run, world.values, stop)
    assert done == [8, 8][:passes]
    assert files(tmp_path) == set()
    assert names(world.prepare(cache, 1)) == [("image", 0), ("text", 0)]
    assert_like_torch(world, cache.features(world.offer(1)), 1)


def test_a_pass_that_fails_leaves_nothing(world, cache, tmp_path):
    def run(batch, parameters):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        cache.run(cache.steps(world.offer(1))[0], run, world.values, Event())
    assert files(tmp_path) == set()


def test_a_client_killed_in_a_pass_begins_it_anew(world, dataset, tmp_path):
    """Killed while it writes, from outside."""
    offer = world.offer(1)
    program = f"""
import time
from pathlib import Path
from threading import Event
import msgspec
import numpy as np
from edge_client.cache import RESERVE_BYTES, FeatureCache
from inputs.dataset import Dataset
from wire.manifest import decode_manifest
from wire.messages import Offer
bundle, here = Path({str(world.folder)!r}), Path({str(tmp_path)!r})
manifest = decode_manifest((bundle / "manifest.json").read_bytes())
dataset = Dataset.open(
    Path({str(world.data)!r}), manifest.modalities, manifest.task, manifest.classes, bundle.joinpath,
    cache=here / "inputs")
cache = FeatureCache(here / "features", manifest, dataset, "onnx", dtype="float32")
offer = msgspec.msgpack.decode(bytes.fromhex("{msgspec.msgpack.encode(offer).hex()}"), type=Offer)
step = cache.steps(offer)[0]
calls = []
def run(batch, parameters):
    calls.append(0)
    if len(calls) == 3:
        print("now", flush=True)
        time.sleep(60)
    return {{"features": np.ones((8, *manifest.stages[1].inputs["image"].shape), np.float32)}}
cache.run(step, run, dict.fromkeys(step.graph.parameters.values()), Event())
"""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE) as client:
        assert client.stdout.readline() == b"now\n"
        client.kill()
    [left] = files(tmp_path)
    assert left.endswith(".partial")
    cache = opened(world, dataset, tmp_path)
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


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def be_fewer(path):
    np.save(path, np.load(path)[:-1])


def be_doubles(path):
    np.save(path, np.load(path).astype(np.float64))


def be_objects(path):
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)


def vanish(path):
    path.unlink()


@pytest.mark.parametrize(
    "damage", [truncate, halve, empty, scribble, flip_a_bit, be_fewer, be_doubles, be_objects, vanish]
)
def test_a_damaged_file_is_computed_again(world, dataset, cache, tmp_path, damage):
    [image, _] = world.prepare(cache, 1)
    damage(image.target)
    again = opened(world, dataset, tmp_path)
    assert names(world.prepare(again, 2)) == [("image", 0), ("image", 1), ("text", 1)]
    assert_like_torch(world, again.features(world.offer(2)), 2)


def test_a_file_that_becomes_shorter_while_in_use_is_told_in_one_line(world, cache):
    [image, _] = world.prepare(cache, 1)
    features = cache.features(world.offer(1))
    halve(image.target)
    features.batch([0])
    with pytest.raises(UserError, match="shorter"):
        features.batch([NUM_EXAMPLES - 1])


def test_float16_takes_half_the_room_and_stays_close(world, dataset, cache, tmp_path):
    world.prepare(cache, 2)
    exact = cache.features(world.offer(2)).batch(EVERY)
    before = sum(path.stat().st_size for path in (tmp_path / "features").iterdir())
    half = opened(world, dataset, tmp_path, "float16")
    assert len(world.prepare(half, 2)) == 4  # the other dtype's files do not count
    after = sum(path.stat().st_size for path in (tmp_path / "features").iterdir())
    batch = half.features(world.offer(2)).batch(EVERY)
    assert after < 0.6 * before
    for name in ("image", "text"):
        assert batch[name].dtype == np.float32
        assert 0 < relative_l2(batch[name], exact[name]) < 1e-3


def test_values_beyond_float16_become_its_largest_and_are_told(world, dataset, tmp_path, caplog):
    cache = opened(world, dataset, tmp_path, "float16")
    shape = world.manifest.stages[1].inputs["image"].shape

    def run(batch, parameters):
        values = np.zeros((len(batch["image"]), *shape), np.float32)
        values[:, 0, 0], values[:, 0, 1] = 1e6, -1e6
        return {"features": values}

    [image, text] = cache.steps(world.offer(1))
    cache.run(image, run, world.values, Event())
    world.run(cache, text)
    got = cache.features(world.offer(1)).batch([3])["image"]
    assert got[0, 0, :3].tolist() == [65504, -65504, 0]
    assert f"{2 * NUM_EXAMPLES} values of the image features are beyond float16" in caplog.text


def trained(world, cache, stage, plan):
    """The update and the loss of a round."""
    world.prepare(cache, stage, plan=plan)
    features = cache.features(world.offer(stage, plan=plan))
    names = world.manifest.names_of(world.manifest.stages[stage].trainable)
    offered = {name: world.values[name] for name in names}
    with open_engine("onnx", world.folder.joinpath, world.manifest, stage) as engine:
        return train(engine, offered, features, plan, "ann", Event())


def assert_same_update(one, two, limit):
    assert one.loss == pytest.approx(two.loss, rel=limit)
    flat = [np.concatenate([one.ravel() for one in update.delta.values()]) for update in (one, two)]
    assert relative_l2(*flat) < limit


PLANS = [TrainPlan(1e-3, 8, 3, 0), TrainPlan(1e-3, 8, 3, 0, augmentations=3)]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("room", [0, 1.5, None])
def test_a_limit_changes_how_features_are_had_and_not_the_update(
    world, dataset, tmp_path, caplog, plan, room
):
    """Room for nothing; for all of the first stage and not for one more; for everything."""
    expected = trained(world, opened(world, dataset, tmp_path / "all"), 2, plan)
    world.prepare(full := opened(world, dataset, tmp_path / "one"), 1, plan=plan)
    size = sum(path.stat().st_size for path in (tmp_path / "one" / "features").iterdir())
    cache = opened(world, dataset, tmp_path, max_bytes=None if room is None else int(room * size))
    assert full.features(world.offer(1, plan=plan)).prefixes.keys() == {"image", "text"}
    for stage in (1, 2):
        update = trained(world, cache, stage, plan)
    assert_same_update(update, expected, 1e-4)
    prefixes = cache.features(world.offer(2, plan=plan)).prefixes
    kinds = [(one.rows is not None, len(one.segments)) for one in prefixes.values()]
    assert (
        sorted(kinds)
        == {
            0: [(False, 2), (False, 2)],
            1.5: [(True, 0), (True, 1)],  # the smaller features of the two still find room
            None: [(True, 0), (True, 0)],
        }[room]
    )
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == {0: 4, 1.5: 1, None: 0}[room]
    assert all("raise --max-feature-mb" in line for line in warnings)
    assert cache.steps(world.offer(2, plan=plan)) == []
    if room is not None:
        assert sum(path.stat().st_size for path in (tmp_path / "features").glob("*")) <= room * size


def test_a_limit_below_what_is_there_removes_it(world, dataset, cache, tmp_path):
    world.prepare(cache, 1)
    assert len(files(tmp_path)) == 2
    opened(world, dataset, tmp_path, max_bytes=0)
    assert files(tmp_path) == set()


def test_what_the_disk_has_free_is_a_limit_too(world, dataset, tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)._replace(free=RESERVE_BYTES + 10)
    monkeypatch.setattr("edge_client.cache.shutil.disk_usage", lambda _: usage)
    cache = opened(world, dataset, tmp_path)
    world.prepare(cache, 1)
    assert_like_torch(world, cache.features(world.offer(1)), 1)
    assert files(tmp_path) == set()
    assert caplog.text.count("free some space and start the client again") == 2


class Full(io.FileIO):
    """A file on a disk that takes no more than the beginning."""

    code = errno.ENOSPC

    def write(self, content):
        if self.tell() > 1000:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(content)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_is_full_in_mid_write_does_not_end_training(
    world, dataset, tmp_path, monkeypatch, caplog, code
):
    expected = trained(world, opened(world, dataset, tmp_path / "all"), 1, PLANS[0])
    monkeypatch.setattr(Full, "code", code)
    monkeypatch.setattr("inputs.rows.os.fdopen", Full)
    cache = opened(world, dataset, tmp_path)
    assert_same_update(trained(world, cache, 1, PLANS[0]), expected, 1e-4)
    assert files(tmp_path) == set()
    assert caplog.text.count("free some space and start the client again") == 2


def test_a_disk_that_fails_otherwise_is_told(world, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(Full, "code", errno.EIO)
    monkeypatch.setattr("inputs.rows.os.fdopen", Full)
    with pytest.raises(UserError, match=os.strerror(errno.EIO)):
        world.prepare(cache, 1)
    assert files(tmp_path) == set()


def test_each_view_of_an_image_has_its_features(world, dataset, tmp_path):
    plan, cache = PLANS[1], opened(world, dataset, tmp_path)
    [image, text] = world.prepare(cache, 1, plan=plan)
    inputs = world.manifest.stages[1].inputs
    assert np.load(image.target).shape == (NUM_EXAMPLES * 3, *inputs["image"].shape)
    assert np.load(text.target).shape == (NUM_EXAMPLES, *inputs["text"].shape)
    features = cache.features(world.offer(1, plan=plan))
    seen = []
    for view in range(3):
        views = np.full(NUM_EXAMPLES, view)
        seen.append(features.batch(EVERY, views)["image"])
        expected = world.activations(1, dataset.batch(EVERY, views=views))["image"]
        assert relative_l2(seen[-1], expected) < MAX_ERROR
    assert all(relative_l2(seen[one], seen[other]) > 0.01 for one, other in [(0, 1), (0, 2), (1, 2)])
    mixed = features.batch([4, 9, 4], np.array([2, 0, 1]))["image"]
    assert np.array_equal(mixed, np.stack([seen[2][4], seen[0][9], seen[1][4]]))
    assert len(world.prepare(opened(world, dataset, tmp_path), 1)) == 1  # the text has no other views


@pytest.mark.parametrize(("schedule", "stage"), [("progressive", 0), ("progressive", 1), ("end_to_end", 0)])
def test_without_a_prefix_the_features_are_the_raw_inputs(tmp_path_factory, tmp_path, schedule, stage):
    world = World.of(tmp_path_factory, schedule=schedule, image_blocks=2, text_blocks=1)
    cache = opened(world, world.dataset(tmp_path / "inputs"), tmp_path)
    assert cache.steps(world.offer(stage)) == []
    features = cache.features(world.offer(stage))
    batch, raw = features.batch([3, 1]), features.dataset.batch([3, 1])
    assert features.prefixes == {}
    assert batch.keys() == raw.keys() == world.manifest.stages[stage].inputs.keys()
    assert all(np.array_equal(batch[name], raw[name]) for name in raw)
    assert not (tmp_path / "features").exists()


def test_labels_come_along_and_a_modality_without_blocks_left_keeps_its_features(
    tmp_path_factory, tmp_path
):
    world = World.of(tmp_path_factory, "classification", text_blocks=1)
    cache = opened(world, world.dataset(tmp_path / "inputs"), tmp_path)
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
