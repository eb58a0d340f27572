"""What a stage is said to cost, against figures by hand on a small model."""

from __future__ import annotations

import itertools

import pytest
from small_models import BUILDER, small

from export.costs import COMPRESSIONS, Setting, schedule_cost, spread, value_bytes
from export.observe import observe_forward, observe_step, skeleton
from export.schedules import SCHEDULES
from export.stage import Cut, SegmentCut, cut_stages
from wire.manifest import TensorSpec

WIDTH, EMBEDDING, BATCH = 16, 8, 4
TOKENS = {"image": 4, "text": 6}
SETTING = Setting("onnx", BATCH)


@pytest.fixture(scope="module", params=["contrastive", "classification"])
def model(request):
    return skeleton(BUILDER, small(request.param, image_blocks=3, text_blocks=3).builder_options)


@pytest.fixture(scope="module")
def contrastive():
    return skeleton(BUILDER, small(image_blocks=3, text_blocks=3).builder_options)


def costs(model, name, rounds=2, setting=SETTING, **extra):
    return schedule_cost(model, SCHEDULES[name](model.depths, rounds), setting, **extra)


def block(tokens):
    """Four projections and two of four times the width, then scores and their product with the values."""
    return 2 * tokens * 12 * WIDTH**2 + 2 * 2 * tokens**2 * WIDTH


def test_the_flops_of_a_block(model):
    for name, encoder in model.encoders.items():
        inputs = {name: encoder.source.features}
        if name == "text":
            inputs["text_mask"] = TensorSpec((6,), "float32")
        cut = SegmentCut(encoder.section(1, 2, stem=False), inputs)
        assert observe_forward(cut, 5).flops == 5 * block(TOKENS[name])


def test_the_flops_of_a_layerwise_step_are_three_forward_passes(contrastive):
    blocks = sum(map(block, TOKENS.values()))
    projections = 2 * 2 * WIDTH * EMBEDDING
    scores = 2 * BATCH * EMBEDDING  # of each example with the batch
    stages = costs(contrastive, "layerwise").stages
    assert [stage.train_flops for stage in stages[1:]] == [3 * (blocks + projections + scores)] * 2
    assert [stage.segment_flops for stage in stages[2:]] == [blocks]
    aligned = costs(contrastive, "layerwise", setting=Setting("onnx", BATCH, aligned=True)).stages
    added = [more.train_flops - stage.train_flops for more, stage in zip(aligned, stages, strict=True)]
    assert added[1:] == [blocks + projections] * 2  # the anchors'


def test_what_needs_no_gradient_is_not_counted(contrastive):
    """A patch embedding gives no gradient of the pixels, a token embedding multiplies nothing."""
    first, second = costs(contrastive, "layerwise").stages[:2]
    stem = 2 * TOKENS["image"] * (3 * 4 * 4) * WIDTH
    assert first.train_flops - second.train_flops == 2 * stem


def test_a_layerwise_step_does_not_grow_and_the_others_do(model):
    layerwise, progressive = (
        [stage.train_flops for stage in costs(model, name).stages] for name in ("layerwise", "progressive")
    )
    assert layerwise[1] == layerwise[2] < layerwise[0]
    assert progressive == sorted(set(progressive))
    (whole,) = costs(model, "end_to_end").stages
    assert progressive[-1] == whole.train_flops
    assert whole.prefix_flops == whole.segment_flops == whole.frozen_bytes == whole.frozen_parameters == 0


def test_the_prefix_is_its_segments(model):
    stages = costs(model, "layerwise").stages
    assert [stage.prefix_flops for stage in stages] == list(
        itertools.accumulate(stage.segment_flops for stage in stages)
    )
    peaks = {stage.frozen_bytes for stage in stages}
    assert 0 in peaks
    head = stages[0].trainable_parameters + stages[1].trainable_parameters - stages[1].frozen_parameters
    attached = [stage.trainable_parameters + stage.frozen_parameters for stage in stages]
    assert attached[-1] == sum(value.numel() for value in model.parameters())
    assert sum(stage.frozen_bytes for stage in stages) == 4 * stages[-1].frozen_parameters
    assert head > 0


def test_bytes_by_hand():
    shapes = [(3, 5), (7,), (2, 3, 4), ()]
    assert value_bytes(shapes, "none") == 4 * (15 + 7 + 24 + 1)
    assert value_bytes(shapes, "float16") == 2 * (15 + 7 + 24 + 1) + 4 * (3 + 1 + 2 + 1)
    assert value_bytes(shapes, "int8") == (15 + 7 + 24 + 1) + 4 * (3 + 1 + 2 + 1)


def test_totals_add_up(model):
    setting = Setting("onnx", BATCH, local_epochs=3)
    cost = costs(model, "layerwise", [1, 2, 5], setting)
    rounds, stages = (1, 2, 5), cost.stages
    steps = sum(3 * n * stage.train_flops for n, stage in zip(rounds, stages, strict=True))
    prefix = sum(3 * n * stage.prefix_flops for n, stage in zip(rounds, stages, strict=True))
    assert cost.flops == steps + stages[-1].prefix_flops  # every block of the prefix once
    assert cost.flops_without_cache == steps + prefix
    for name in COMPRESSIONS:
        up = sum(n * stage.round_bytes[name] for n, stage in zip(rounds, stages, strict=True))
        assert cost.bytes_up(name) == up
    assert cost.bytes_down("none") == cost.bytes_up("none") + 4 * stages[-1].frozen_parameters
    once = stages[0].round_bytes["none"] - stages[-1].round_bytes["int8"]  # all, but no last change
    assert cost.bytes_down("int8") == cost.bytes_up("int8") + once
    assert cost.peak_bytes == max(stage.peak_bytes for stage in stages)


def test_micro_batches_cost_a_forward_pass_of_a_contrastive_step_and_save_memory(model):
    setting = Setting("onnx", 32)
    whole = costs(model, "layerwise", setting=setting).stages
    parts = costs(model, "layerwise", setting=setting, micro_batch_sizes=[8, 0, 0]).stages
    assert parts[1].train_flops == whole[1].train_flops
    forward = observe_forward(
        cut_stages(model, SCHEDULES["layerwise"](model.depths, 1).stages)[0].train, 32
    )
    extra = forward.flops // 32 if model.task == "contrastive" else 0
    assert parts[0].train_flops - whole[0].train_flops == extra
    assert parts[0].peak_bytes < whole[0].peak_bytes


@pytest.mark.parametrize(
    ("rounds", "stages", "expected"),
    [([1, 2], 2, [1, 2]), ([5, 5], 1, [10]), ([7], 3, [3, 2, 2]), ([2], 3, [1, 1, 1])],
)
def test_rounds_are_spread(rounds, stages, expected):
    assert spread(rounds, stages) == expected


class Chain(Cut):
    """Doubles its input again and again, letting go of what came before."""

    inputs = {"x": TensorSpec((10,), "float32")}  # noqa: RUF012

    def forward(self, x):
        for _ in range(5):
            x = x + x
        return x


def test_memory_is_what_lives_at_once():
    size = 3 * 10 * 4
    assert observe_forward(Chain(), 3).peak_bytes == 3 * size  # the input, one value and the next


def test_activations_grow_with_the_batch_and_the_blocks(model):
    cuts = [cut.train for cut in cut_stages(model, SCHEDULES["progressive"](model.depths, 1).stages)]
    peaks = [[observe_step(cut, size).peak_bytes for size in (1, 2, 4, 8)] for cut in cuts]
    assert all(row == sorted(set(row)) for row in peaks)
    assert all(list(column) == sorted(set(column)) for column in zip(*peaks, strict=True))
    assert all(parameter.grad is None for cut in cuts for parameter in cut.parameters())
