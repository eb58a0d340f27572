"""The contract of every engine in the table: it follows torch, at one thread and at two."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import arrays, bundle, small, values_of

import edge_client.engines as engines
from edge_client.engines import AUTO, ENGINES, ONNX, available, choose, open_engine
from export.parity import input_limits, parameter_error, reference
from export.schedules import SCHEDULES
from export.stage import cut_stages, example
from models.registry import build
from wire.errors import GraphError, LocalError, UserError
from wire.manifest import AdamW

LEARNING_RATE = 1e-3
STEPS = 10
MAX_ERROR = 1e-3
MICRO = 4
MICRO_SIZES = (10, 6, 4, 9, 3, 8, 1, 5, 10, 2)  # whole and partial micro-batches, one or several

HEADS = ("contrastive", "classification")
NUM_STAGES = {"layerwise": 3, "progressive": 3, "end_to_end": 1}  # of the uneven encoders, 3 and 2 blocks
CASES = [
    (engine, head, schedule, stage)
    for engine, head, schedule in itertools.product(ENGINES, HEADS, NUM_STAGES)
    for stage in range(NUM_STAGES[schedule])
]


def engine_class(name):
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def not_there():
    raise UserError("it is not there")


class Case:
    """A bundle with what torch makes of one of its stages."""

    def __init__(self, model, exported, folder, schedule):
        self.model, self.manifest, self.folder = model, exported.manifest, folder
        self.cuts = cut_stages(model, SCHEDULES[schedule](model.depths).stages)
        self.values = values_of(model)

    def open(self, engine, stage, threads=1):
        return open_engine(engine, self.folder.joinpath, self.manifest, stage, threads)

    def batches(self, stage, size=5, last=2, seed=0):
        generator, inputs = torch.Generator().manual_seed(seed), self.cuts[stage].train.inputs
        sizes = [size] * (STEPS - 1) + [last]
        return [example(inputs, one, input_limits(self.model), generator) for one in sizes]

    def torch_steps(self, stage, batches, learning_rate=LEARNING_RATE):
        return reference(
            self.cuts[stage].train, self.model, batches, self.manifest.optimizer, learning_rate
        )


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    made = {}

    def make(head="contrastive", schedule="layerwise", optimizer=None):
        key = (head, schedule, optimizer)
        if key not in made:
            model, folder = small(head), tmp_path_factory.mktemp("bundle") / "bundle"
            exported = bundle(model, folder, schedule, optimizer=optimizer, engines=tuple(ENGINES))
            made[key] = Case(model, exported, folder, schedule)
        return made[key]

    return make


def assert_follows(engine, batches, losses, after, learning_rate=LEARNING_RATE):
    got = [engine.train_step(arrays(batch), learning_rate) for batch in batches]
    np.testing.assert_allclose(got, losses, rtol=1e-3, atol=1e-4)
    trained = engine.parameters()
    assert set(trained) == set(after)
    errors = {name: parameter_error(trained[name], after[name], learning_rate) for name in after}
    assert max(errors.values()) < MAX_ERROR, max(errors, key=errors.__getitem__)
    assert all(np.isfinite(value).all() for value in trained.values())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("engine", "head", "schedule", "stage"), CASES)
def test_it_follows_torch(case, engine, head, schedule, stage, threads):
    one = case(head, schedule)
    batches = one.batches(stage)
    losses, after = one.torch_steps(stage, batches)
    with one.open(engine, stage, threads) as opened:
        opened.load(one.values)
        assert_follows(opened, batches, losses, after)


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """Of each head a bundle of one stage that trains in micro-batches of `MICRO` examples."""
    made = {}

    def make(head):
        if head not in made:
            model, folder = (
                small(head, image_blocks=1, text_blocks=1),
                tmp_path_factory.mktemp("micro") / "b",
            )
            exported = bundle(model, folder, "end_to_end", engines=tuple(ENGINES), micro_batch_size=MICRO)
            made[head] = Case(model, exported, folder, "end_to_end")
        return made[head]

    return make


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_follow_torch_on_whole_batches(micro, engine, head, threads):
    one = micro(head)
    generator, inputs = torch.Generator().manual_seed(0), one.cuts[0].train.inputs
    batches = [example(inputs, size, input_limits(one.model), generator) for size in MICRO_SIZES]
    losses, after = one.torch_steps(0, batches)
    with one.open(engine, 0, threads) as opened:
        opened.load(one.values)
        assert_follows(opened, batches, losses, after)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_in_micro_batches_is_the_loss_of_the_whole_batch(micro, engine, head):
    one = micro(head)
    with one.open(engine, 0) as opened:
        opened.load(one.values)
        for batch in one.batches(0, size=2 * MICRO + 1, last=1)[-2:]:
            with torch.no_grad():
                expected = one.cuts[0].train(*batch.values()).item()
            for _ in range(2):
                loss = opened.evaluate(arrays(batch))["loss"]
                assert loss == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert all(np.array_equal(value, one.values[name]) for name, value in opened.parameters().items())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("engine", ENGINES)
def test_loading_starts_micro_batches_anew_bit_by_bit(micro, engine, head):
    one = micro(head)
    batches = [arrays(batch) for batch in one.batches(0)]
    with one.open(engine, 0) as opened:
        runs = []
        for _ in range(2):
            opened.load(one.values)
            losses = [opened.train_step(batch, LEARNING_RATE) for batch in batches]
            runs.append((losses, opened.parameters()))
    assert runs[0][0] == runs[1][0]
    assert all(np.array_equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


def assert_goes_on(one, engine, stage, path):
    """What was saved after some steps goes on in an engine of its own as if there had been no break."""
    batches = [arrays(batch) for batch in one.batches(stage)]
    with one.open(engine, stage) as opened:
        opened.load(one.values)
        losses = [opened.train_step(batch, LEARNING_RATE) for batch in batches[:4]]
        opened.save(path)
        losses += [opened.train_step(batch, LEARNING_RATE) for batch in batches[4:]]
        expected = opened.parameters()
    with one.open(engine, stage) as opened:
        opened.resume(path)
        assert [opened.train_step(batch, LEARNING_RATE) for batch in batches[4:]] == losses[4:]
        got = opened.parameters()
        assert list(got) == list(expected)
        assert all(np.array_equal(got[name], expected[name]) for name in expected)
        opened.load(one.values)  # and after all it may begin anew
        assert opened.train_step(batches[0], LEARNING_RATE) == losses[0]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("engine", ENGINES)
def test_it_goes_on_from_what_was_saved(case, micro, engine, head, tmp_path):
    for stage in range(2):
        assert_goes_on(case(head), engine, stage, tmp_path / f"state{stage}")
    assert_goes_on(micro(head), engine, 0, tmp_path / "micro")


@pytest.mark.parametrize("engine", ENGINES)
def test_what_cannot_be_saved_is_told(case, engine, tmp_path):
    one = case()
    with one.open(engine, 0) as opened:
        opened.load(one.values)
        with pytest.raises(OSError):
            opened.save(tmp_path / "no folder" / "state")
        opened.train_step(arrays(one.batches(0)[0]), LEARNING_RATE)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_of_exactly_zero_is_not_nan_in_micro_batches(micro, engine):
    one = micro("contrastive")
    values = one.values | {"head.log_scale": np.array([9.0], np.float32)}  # over its bound: no gradient
    with one.open(engine, 0) as opened:
        opened.load(values)
        losses = [opened.train_step(arrays(one.batches(0)[0]), LEARNING_RATE) for _ in range(3)]
        trained = opened.parameters()
    decayed = (1 - LEARNING_RATE * one.manifest.optimizer.weight_decay) ** 3
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(trained["head.log_scale"], 9.0 * decayed, rtol=1e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_of_different_sizes_are_our_own_fault_in_micro_batches(micro, engine, head):
    one = micro(head)
    batch = arrays(one.batches(0)[0])
    with one.open(engine, 0) as opened:
        opened.load(one.values)
        for wrong in (batch | {"image": batch["image"][:-1]}, {key: of[:0] for key, of in batch.items()}):
            for call in (opened.evaluate, lambda wrong: opened.train_step(wrong, 0.1)):
                with pytest.raises(LocalError, match="different sizes, or empty"):
                    call(wrong)
        assert all(np.array_equal(value, one.values[name]) for name, value in opened.parameters().items())
        opened.train_step(batch, 0.1)
        after = opened.parameters()
        opened.load(one.values)  # and what failed did not count as a step
        opened.train_step(batch, 0.1)
        assert all(np.array_equal(value, after[name]) for name, value in opened.parameters().items())


@pytest.mark.parametrize("content", [None, b"", b"not a graph"])
def test_a_graph_that_cannot_be_loaded_is_said_in_one_line(case, tmp_path, content):
    if content is not None:
        (tmp_path / "graph.onnx").write_bytes(content)
    graph = case().manifest.stages[0].encoders["image"]
    with pytest.raises(GraphError, match=r"graph\.onnx cannot be loaded") as caught:
        engines.open_graph(ONNX, lambda _: tmp_path / "graph.onnx", graph)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_torchs_adamw(case, engine):
    settings = AdamW(beta1=0.8, beta2=0.95, eps=1e-4, weight_decay=0.5)
    one = case(optimizer=settings)
    batches = one.batches(0)
    losses, after = one.torch_steps(0, batches, 1e-2)
    with one.open(engine, 0) as opened:
        opened.load(one.values)
        assert_follows(opened, batches, losses, after, 1e-2)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_value_goes_to_its_own_parameter(case, engine):
    one = case("classification")
    generator = np.random.default_rng(0)
    values = {
        name: generator.normal(scale=0.1, size=value.shape).astype(np.float32)
        for name, value in one.values.items()
    }
    stage = one.manifest.stages[1]
    with one.open(engine, 1) as opened:
        opened.load(values)
        got = opened.parameters()
    assert list(got) == list(stage.parameters.values())
    assert set(got) == set(one.manifest.names_of(stage.trainable))
    assert all(np.array_equal(got[name], values[name]) for name in got)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("head", HEADS)
def test_evaluation_is_the_loss_and_trains_nothing(case, engine, head):
    one = case(head)
    batch = one.batches(0)[0]
    with torch.no_grad():
        expected = one.cuts[0].train(*batch.values()).item()
    with one.open(engine, 0) as opened:
        opened.load(one.values)
        for _ in range(2):
            assert opened.evaluate(arrays(batch))["loss"] == pytest.approx(expected, rel=1e-4)
        assert all(np.array_equal(value, one.values[name]) for name, value in opened.parameters().items())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_order_of_a_batchs_inputs_is_of_no_matter(case, engine):
    """A client's batches begin with what it has in its feature cache."""
    one = case("contrastive", "layerwise")
    batch = arrays(one.batches(0)[0])
    turned = dict(reversed(batch.items()))
    with one.open(engine, 0) as opened:
        opened.load(one.values)
        before = opened.evaluate(batch)["loss"]
        assert opened.evaluate(turned)["loss"] == before
        assert opened.train_step(turned, LEARNING_RATE) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_loading_starts_anew_bit_by_bit(case, engine):
    one = case()
    batches = [arrays(batch) for batch in one.batches(0)]
    with one.open(engine, 0) as opened:
        runs = []
        for _ in range(2):
            opened.load(one.values)
            losses = [opened.train_step(batch, LEARNING_RATE) for batch in batches]
            runs.append((losses, opened.parameters()))
    assert runs[0][0] == runs[1][0]
    assert all(np.array_equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_learning_rate_is_each_steps_own(case, engine):
    one = case()
    batches = one.batches(0)
    with one.open(engine, 0) as opened:
        opened.load(one.values)
        opened.train_step(arrays(batches[0]), 0.0)
        assert all(np.array_equal(value, one.values[name]) for name, value in opened.parameters().items())
        opened.train_step(arrays(batches[0]), 1e-2)
        moved = opened.parameters()["head.log_scale"] - one.values["head.log_scale"]
        assert 5e-3 < abs(moved[0]) < 2e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_of_exactly_zero_is_not_nan(case, engine):
    one = case()
    values = one.values | {"head.log_scale": np.array([9.0], np.float32)}  # over its bound: no gradient
    batch = arrays(one.batches(0)[0])
    unused = next(row for row in range(60) if row not in batch["text"])
    with one.open(engine, 0) as opened:
        opened.load(values)
        losses = [opened.train_step(batch, LEARNING_RATE) for _ in range(3)]
        trained = opened.parameters()
    decayed = (1 - LEARNING_RATE * one.manifest.optimizer.weight_decay) ** 3
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(trained["head.log_scale"], 9.0 * decayed, rtol=1e-6)
    name = "text.stem.embed.weight"
    np.testing.assert_allclose(trained[name][unused], values[name][unused] * decayed, rtol=1e-5)


@pytest.mark.parametrize("kind", ["whole", "micro"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_pull_draws_every_parameter_towards_its_anchor(case, micro, engine, kind):
    one = case() if kind == "whole" else micro("contrastive")
    generator = np.random.default_rng(0)
    offered = {
        name: value + generator.random(value.shape, np.float32) for name, value in one.values.items()
    }
    kept = {name: value.copy() for name, value in offered.items()}
    batches = [arrays(batch) for batch in one.batches(0)[:3]]
    with one.open(engine, 0) as opened:
        opened.load(one.values)
        for batch, rate in zip(batches, (0.25, 3.0, 1e-3), strict=True):
            opened.train_step(batch, LEARNING_RATE)
            before = opened.parameters()
            opened.pull(offered, rate)
            for name, value in opened.parameters().items():
                expected = (before[name].astype(np.float64) + rate * offered[name]) / (1 + rate)
                np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    assert all(np.array_equal(offered[name], kept[name]) for name in kept)


@pytest.mark.parametrize("kind", ["whole", "micro"])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_pulled_all_the_way_trains_from_there(case, micro, engine, kind):
    one = case() if kind == "whole" else micro("contrastive")
    batch = arrays(one.batches(0)[0])
    with one.open(engine, 0) as opened:
        opened.load(one.values)
        at_first = opened.evaluate(batch)["loss"]
        for _ in range(3):
            assert opened.train_step(batch, 1e-2) == pytest.approx(at_first, rel=1e-4)
            assert opened.evaluate(batch)["loss"] < at_first - 1e-3
            opened.pull(one.values, 1e9)
            assert opened.evaluate(batch)["loss"] == pytest.approx(at_first, rel=1e-4)


@pytest.mark.parametrize("kind", ["whole", "micro"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_pull_leaves_the_moments_alone(case, micro, engine, kind):
    one = case() if kind == "whole" else micro("contrastive")
    batches = [arrays(batch) for batch in one.batches(0)[:4]]
    with one.open(engine, 0) as opened:
        runs = []
        for pulled in (False, True):
            opened.load(one.values)
            for batch in batches:
                opened.train_step(batch, LEARNING_RATE)
                if pulled:
                    opened.pull(one.values, 0.0)
            runs.append(opened.parameters())
    assert all(np.array_equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_what_comes_out_is_a_copy(case, engine):
    one = case()
    with one.open(engine, 0) as opened:
        opened.load(one.values)
        before = opened.parameters()
        kept = {name: value.copy() for name, value in before.items()}
        opened.train_step(arrays(one.batches(0)[0]), 1e-2)
    assert all(np.array_equal(before[name], kept[name]) for name in before)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_call_before_load_is_our_own_fault(case, engine):
    one = case()
    batch = arrays(one.batches(0)[0])
    opened = one.open(engine, 0)
    for call in (
        lambda: opened.train_step(batch, 0.1),
        lambda: opened.pull(one.values, 0.1),
        opened.parameters,
        lambda: opened.evaluate(batch),
    ):
        with pytest.raises(LocalError):
            call()


def test_auto_takes_the_first_that_runs(case, monkeypatch):
    assert available() == list(ENGINES)
    for name in ENGINES:
        assert choose(AUTO, ENGINES) == name
        monkeypatch.setattr(engine_class(name), "check", staticmethod(not_there))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_missing_runtime_names_what_to_install(case, monkeypatch, engine):
    extra = f"lamina[{'client' if engine == ONNX else engine}]"
    monkeypatch.setattr(engine_class(engine), "check", staticmethod(not_there))
    assert engine not in available()
    with pytest.raises(UserError, match=f"{engine} cannot run here: it is not there") as caught:
        case().open(engine, 0)
    assert extra in caught.value.hint
    for name in ENGINES:
        monkeypatch.setattr(engine_class(name), "check", staticmethod(not_there))
    with pytest.raises(UserError, match="no engine runs here") as caught:
        case().open(AUTO, 0)
    assert extra in caught.value.hint


def test_two_packages_that_overwrite_each_other_are_told_apart(monkeypatch):
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: name)
    with pytest.raises(UserError, match="are both installed") as caught:
        choose(ONNX, ENGINES)
    assert "pip uninstall" in caught.value.hint


def test_a_runtime_that_only_infers_is_refused(case, monkeypatch):
    monkeypatch.setattr("edge_client.engines.ort_training._bindings", object)
    with pytest.raises(UserError, match="cannot train") as caught:
        case().open("ort-training", 0)
    assert "pip uninstall onnxruntime" in caught.value.hint


def test_an_unknown_engine_is_refused(case):
    with pytest.raises(UserError, match="no engine 'abacus'"):
        case().open("abacus", 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_device_loads_neither_torch_nor_onnx(case, engine):
    """Though both are installed here; and the training package can be imported afterwards."""
    one = case()
    program = f"""
import sys, warnings
from pathlib import Path
import numpy as np
from edge_client.engines import open_engine
from wire.manifest import decode_manifest
from wire.tensors import unpack_file
folder = Path({str(one.folder)!r})
manifest = decode_manifest((folder / "manifest.json").read_bytes())
values = unpack_file(folder / manifest.initial, manifest.shapes_of(manifest.stages[0].trainable) | {{
    name: parameter.shape for name, parameter in manifest.parameters.items()}})
with open_engine({engine!r}, folder.joinpath, manifest, 0) as engine:
    engine.load(values)
    inputs = manifest.stages[0].inputs
    batch = {{name: np.ones((2, *spec.shape), spec.dtype) for name, spec in inputs.items()}}
    assert np.isfinite(engine.train_step(batch, 1e-3))
loaded = {{"torch", "onnx", "onnxscript", "onnxruntime.training"}} & set(sys.modules)
assert not loaded, loaded
warnings.simplefilter("ignore")
from onnxruntime.training import artifacts
"""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    torch.manual_seed(0)
    model, folder = build("small_models:sounds_and_motions"), tmp_path_factory.mktemp("sounds") / "b"
    return Case(model, bundle(model, folder, engines=tuple(ENGINES)), folder, "layerwise")


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("engine", ENGINES)
def test_encoders_of_sounds_and_motions_train(sounds, engine, stage):
    batches = sounds.batches(stage)
    losses, after = sounds.torch_steps(stage, batches)
    with sounds.open(engine, stage) as opened:
        opened.load(sounds.values)
        assert_follows(opened, batches, losses, after)


@pytest.mark.parametrize("engine", ENGINES)
def test_encoders_of_sounds_and_motions_have_their_features(sounds, engine):
    batch = sounds.batches(0)[0]
    for name, graph in sounds.manifest.stages[0].segments.items():
        inputs = [batch[key] for key in graph.inputs]
        with torch.no_grad():
            expected = sounds.cuts[0].segments[name](*inputs).numpy()
        run = engines.open_graph(engine, sounds.folder.joinpath, graph)
        found = run(arrays(dict(zip(graph.inputs, inputs, strict=True))), sounds.values)
        np.testing.assert_allclose(found[graph.outputs[0]], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_preset_tiny_trains(engine, tmp_path):
    torch.manual_seed(0)
    model = build("tiny")
    one = Case(
        model, bundle(model, tmp_path / "bundle", engines=(engine,)), tmp_path / "bundle", "layerwise"
    )
    batches = one.batches(1, size=8, last=3)
    losses, after = one.torch_steps(1, batches)
    with one.open(engine, 1, threads=2) as opened:
        opened.load(one.values)
        assert_follows(opened, batches, losses, after)
