"""Local training: every example once an epoch, in an order that is the same again, to a delta."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from small_world import NUM_EXAMPLES, World

from edge_client.cache import FeatureCache
from edge_client.engines import ENGINES, open_engine
from edge_client.engines.proximal import draw
from edge_client.features import Stopped
from edge_client.train import train
from wire.messages import TrainPlan

OFFERED = {"a": np.array([1.0, 2.0], np.float32), "head.b": np.array([[4.0]], np.float32)}
TRAINED = {"a": np.array([1.5, 2.0], np.float32), "head.b": np.array([[-4.0]], np.float32)}


class Numbers:
    """Features whose only input is the example's number."""

    def __init__(self, count=NUM_EXAMPLES):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, indices, views):
        return {"number": np.asarray(indices), "views": views}


class Recorder:
    """An engine that writes down what it is told; the loss of its n-th step is n. `stop` is set then."""

    def __init__(self, stop_after=None):
        self.calls, self.batches, self.rates, self.pulls, self.views = [], [], [], [], []
        self.stop, self.stop_after = Event(), stop_after

    def load(self, parameters):
        self.calls.append("load")
        assert all(np.array_equal(parameters[name], value) for name, value in OFFERED.items())

    def train_step(self, batch, learning_rate):
        self.calls.append("step")
        self.batches.append(batch["number"].tolist())
        self.rates.append(learning_rate)
        self.views.append(batch["views"])
        if len(self.batches) == self.stop_after:
            self.stop.set()
        return float(len(self.batches))

    def pull(self, offered, rate):
        self.calls.append("pull")
        self.pulls.append(rate)
        assert all(np.array_equal(offered[name], value) for name, value in OFFERED.items())

    def parameters(self):
        self.calls.append("parameters")
        return {name: value.copy() for name, value in TRAINED.items()}

    def train(self, client="ann", count=NUM_EXAMPLES, **plan):
        settings = {"learning_rate": 0.1, "batch_size": 8, "local_epochs": 1, "seed": 0, **plan}
        return train(self, OFFERED, Numbers(count), TrainPlan(**settings), client, self.stop)


def batches(client="ann", **plan):
    engine = Recorder()
    engine.train(client, **plan)
    return engine.batches


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [
        (20, 8, [8, 8, 4]),
        (20, 10, [10, 10]),
        (20, 19, [19, 1]),
        (20, 64, [20]),
        (3, 1, [1, 1, 1]),
        (1, 8, [1]),
    ],
)
def test_an_epoch_takes_every_example_once(count, batch_size, sizes):
    seen = batches(count=count, batch_size=batch_size, local_epochs=3)
    assert [len(batch) for batch in seen] == sizes * 3
    for epoch in range(3):
        numbers = chain.from_iterable(seen[epoch * len(sizes) :][: len(sizes)])
        assert sorted(numbers) == list(range(count))


def test_epochs_have_orders_of_their_own():
    seen = batches(local_epochs=4)
    orders = [seen[first : first + 3] for first in range(0, 12, 3)]
    assert all(one != other for one, other in pairwise(orders))


def test_the_order_depends_on_seed_and_client_only():
    order = batches()
    assert batches() == order
    assert batches(learning_rate=9.0) == order
    assert batches(local_epochs=2)[:3] == order
    assert batches("bob") != order
    assert batches(seed=1) != order
    assert batches("bob", seed=1) not in (order, batches("bob"), batches(seed=1))
    assert batches(seed=2**62) != order


def test_the_order_is_the_same_in_another_process():
    """Whatever its hashes of strings are."""
    program = """
from threading import Event
from edge_client.train import train
from wire.messages import TrainPlan
class Numbers(list):
    def batch(self, indices, views):
        return indices, views
class Engine:
    load = parameters = lambda self, *values: {}
    seen = []
    def train_step(self, batch, learning_rate):
        self.seen.append([one.tolist() for one in batch])
        return 0.0
train(Engine(), {}, Numbers(range(20)), TrainPlan(0.1, 8, 1, 7, augmentations=5), "bob", Event())
print(Engine.seen)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    engine = Recorder()
    engine.train("bob", seed=7, augmentations=5)
    assert json.loads(done.stdout) == [
        [batch, views.tolist()] for batch, views in zip(engine.batches, engine.views, strict=True)
    ]


def drawn(**plan):
    """Epoch by epoch, the view of each example."""
    engine = Recorder()
    engine.train(**plan)
    seen = [dict(zip(*pair, strict=True)) for pair in zip(engine.batches, engine.views, strict=True)]
    return [{**seen[first], **seen[first + 1], **seen[first + 2]} for first in range(0, len(seen), 3)]


def test_an_epoch_draws_a_view_of_each_example():
    epochs = drawn(augmentations=4, local_epochs=5)
    assert all(epoch.keys() == set(range(NUM_EXAMPLES)) for epoch in epochs)
    assert {view for epoch in epochs for view in epoch.values()} == {0, 1, 2, 3}
    assert all(one != other for one, other in pairwise(epochs))
    assert drawn(augmentations=4, local_epochs=5) == epochs
    assert drawn(augmentations=4, local_epochs=5, batch_size=7) == epochs  # a view belongs to its example
    assert drawn(augmentations=4, local_epochs=5, seed=1) != epochs


def test_without_augmentations_no_view_is_drawn():
    engine = Recorder()
    engine.train(local_epochs=2)
    assert engine.views == [None] * 6


def test_the_learning_rate_is_the_plans():
    engine = Recorder()
    engine.train(learning_rate=0.03, local_epochs=2)
    assert engine.rates == [0.03] * 6


def test_each_step_is_drawn_towards_what_was_offered():
    engine = Recorder()
    engine.train(learning_rate=0.5, proximal_mu=0.25)
    assert engine.calls == ["load", *["step", "pull"] * 3, "parameters"]
    assert engine.pulls == [0.125] * 3


class Quadratic:
    """Trains one number by plain gradient steps on (w - 10)^2."""

    def load(self, parameters):
        self.values = {"w": parameters["w"].copy()}

    def train_step(self, batch, learning_rate):
        self.values["w"] -= np.float32(learning_rate) * 2 * (self.values["w"] - 10)
        return 0.0

    def pull(self, offered, rate):
        draw(self.values.items(), offered, rate)

    def parameters(self):
        return {name: value.copy() for name, value in self.values.items()}


@pytest.mark.parametrize("mu", [0.0, 0.5, 2.0, 100.0])
def test_plain_gradient_steps_end_where_fedprox_wants_them(mu):
    """At the minimum of (w - 10)^2 + mu/2 (w - w0)^2, for w0 = 4."""
    plan = TrainPlan(learning_rate=0.1, batch_size=1, local_epochs=10, seed=0, proximal_mu=mu)
    trained = train(Quadratic(), {"w": np.array(4, np.float32)}, Numbers(), plan, "ann", Event())
    assert 4 + trained.delta["w"] == pytest.approx((2 * 10 + mu * 4) / (2 + mu), rel=1e-5)


def test_the_loss_is_the_mean_over_the_last_epochs_examples():
    assert Recorder().train().loss == pytest.approx((1 * 8 + 2 * 8 + 3 * 4) / 20)
    assert Recorder().train(local_epochs=2).loss == pytest.approx((4 * 8 + 5 * 8 + 6 * 4) / 20)
    assert Recorder().train(count=9).loss == pytest.approx((1 * 8 + 2 * 1) / 9)


def test_the_delta_is_trained_minus_offered():
    engine = Recorder()
    trained = engine.train()
    assert engine.calls == ["load", "step", "step", "step", "parameters"]
    assert trained.num_examples == NUM_EXAMPLES
    assert list(trained.delta) == ["a", "head.b"]
    assert trained.delta["a"].tolist() == [0.5, 0.0]
    assert trained.delta["head.b"].tolist() == [[-8.0]]
    assert {value.dtype for value in trained.delta.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("steps", [0, 1, 3, 4])
def test_a_stop_is_heard_before_the_next_step(steps):
    engine = Recorder(stop_after=steps)
    if not steps:
        engine.stop.set()
    with pytest.raises(Stopped):
        engine.train(local_epochs=2)
    assert engine.calls == ["load", *["step"] * steps]


@pytest.fixture(scope="module")
def learn(tmp_path_factory):
    """Train a stage of the small model on a real engine: `learn(engine, stage, epochs)`."""
    world = World.of(tmp_path_factory, engines=tuple(ENGINES))
    cache = FeatureCache(
        tmp_path_factory.mktemp("features") / "features",
        world.manifest,
        world.dataset(tmp_path_factory.mktemp("inputs")),
        "onnx",
    )

    def learn(engine, stage, epochs, mu=0.0):
        world.prepare(cache, stage)
        features = cache.features(world.offer(stage))
        names = world.manifest.names_of(world.manifest.stages[stage].trainable)
        offered = {name: world.values[name] for name in names}
        plan = TrainPlan(1e-2, 8, epochs, seed=3, proximal_mu=mu)
        with open_engine(engine, world.folder.joinpath, world.manifest, stage) as opened:
            trained = train(opened, offered, features, plan, "ann", Event())
            after = opened.parameters()
        assert set(trained.delta) == set(names)
        for name, delta in trained.delta.items():
            assert np.array_equal(after[name] - offered[name], delta)
        return trained

    return learn


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_training_twice_gives_the_same_bits(learn, engine, stage):
    one, two = learn(engine, stage, 2), learn(engine, stage, 2)
    assert one.loss == two.loss
    assert one.num_examples == NUM_EXAMPLES
    assert all(one.delta[name].tobytes() == two.delta[name].tobytes() for name in one.delta)
    assert any(one.delta[name].any() for name in one.delta)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_loss_falls(learn, engine, stage):
    assert learn(engine, stage, 20).loss < 0.5 * learn(engine, stage, 1).loss


@pytest.mark.parametrize("engine", ENGINES)
def test_a_proximal_client_stays_nearer_to_what_it_was_offered(learn, engine):
    def length(trained):
        return float(np.sqrt(sum(np.square(value).sum() for value in trained.delta.values())))

    free, held, tied = (learn(engine, 1, 4, mu) for mu in (0.0, 10.0, 1e6))
    assert length(tied) < 0.01 * length(free)
    assert length(held) < 0.7 * length(free)
    assert free.loss < held.loss < tied.loss
