"""Which blocks and micro-batches fit a budget: pure decisions, and their expectations of a real model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import BUILDER, small

from export.budget import COMFORTABLE, Budget, blocks_to_try, choose, fit
from export.memory import ENGINES, Footprint, peak_bytes
from export.observe import skeleton
from export.schedules import layerwise
from wire.errors import UserError

MB = 10**6


def stage(parameters_mb=2, example_mb=3, **segment):
    return Footprint(parameters_mb * MB, lambda size: size * example_mb * MB, **segment)


def budget(mb, batch_size=32, engines=("onnx",), **settings):
    return Budget(int(mb * MB), batch_size, engines, **settings)


def examples_at_once(limit, size):
    return {None: 0, 0: limit.batch_size}.get(size, size)


stages = st.builds(stage, st.integers(0, 50), st.integers(0, 50))


@given(stages, st.integers(1, 200), st.integers(50, 5000), st.integers(0, 3000))
def test_a_larger_budget_never_gives_a_smaller_micro_batch(one, batch_size, mb, more):
    limits = budget(mb, batch_size), budget(mb + more, batch_size)
    small, large = (examples_at_once(limit, limit.micro_batch_size(one)) for limit in limits)
    assert small <= large


@given(stages, st.integers(1, 200), st.integers(50, 5000), st.sampled_from(list(ENGINES)))
def test_the_micro_batch_is_the_largest_power_of_two_that_fits(one, batch_size, mb, engine):
    limit = budget(mb, batch_size, (engine,))
    size = limit.micro_batch_size(one)
    peaks = {
        power: peak_bytes(engine, one, batch_size, power)
        for power in (2**exponent for exponent in range(8))
        if power < batch_size
    }
    peaks[0] = peak_bytes(engine, one, batch_size)
    assert (size is None) == (min(peaks.values()) > mb * MB)
    if size is not None:
        assert peaks[size] <= mb * MB
        assert size == 0 or all(peaks[other] > mb * MB for other in peaks if other > size or other == 0)


def test_every_engine_has_to_fit():
    one = stage()
    alone = [budget(180, engines=(engine,)).micro_batch_size(one) for engine in ENGINES]
    assert None not in alone
    at_once = [examples_at_once(budget(180), size) for size in alone]
    assert len(set(at_once)) > 1
    assert examples_at_once(budget(180), budget(180, engines=tuple(ENGINES)).micro_batch_size(one)) == min(
        at_once
    )


def test_without_micro_batches_it_is_the_whole_batch_or_nothing():
    one = stage(1, 3)
    needed = peak_bytes("onnx", one, 32) / MB
    assert budget(needed, whole_batches=True).micro_batch_size(one) == 0
    less = budget(needed - 1, whole_batches=True)
    assert less.micro_batch_size(one) is None
    assert budget(needed - 1).micro_batch_size(one) == 16
    assert not less.is_comfortable(one)
    with pytest.raises(UserError, match=rf"needs {needed:.0f} MB, the budget is {needed - 1:.0f} MB"):
        choose(less, [1], made(1, 3))


def test_what_makes_anchors_counts_too():
    assert budget(190).micro_batch_size(stage(2, 0)) == 0
    assert budget(190).micro_batch_size(stage(2, 0, anchor_bytes=100 * MB)) is None


def test_a_segment_counts_too():
    assert budget(120).micro_batch_size(stage(1, 0)) == 0
    assert budget(120).micro_batch_size(stage(1, 0, segment_bytes=100 * MB)) is None


def made(depth, example_mb):
    """A layerwise schedule of one modality, whose stages hold so much an example and block."""

    def of(blocks):
        schedule = layerwise({"image": depth}, 1, blocks_per_stage=blocks)
        return schedule, [stage(blocks, blocks * example_mb) for _ in schedule.stages]

    return of


@given(st.integers(1, 12), st.integers(1, 9), st.integers(120, 4000), st.integers(0, 2000))
def test_a_larger_budget_never_gives_fewer_blocks_a_stage(depth, example_mb, mb, more):

    def chosen(limit):
        try:
            return choose(limit, blocks_to_try(depth, None), made(depth, example_mb))
        except UserError:
            return None

    small, large = chosen(budget(mb)), chosen(budget(mb + more))
    if small is not None:
        assert large is not None
        assert len(large.schedule.stages) <= len(small.schedule.stages)
        assert all(peak <= mb * MB for peak in small.expected_peak_bytes)
        if len(small.schedule.stages) < depth:
            assert all(size == 0 or size >= COMFORTABLE for size in small.micro_batch_sizes)


def test_blocks_are_tried_from_the_largest_number_that_makes_a_difference():
    assert blocks_to_try(12, None) == [12, 6, 4, 3, 2, 1]
    assert blocks_to_try(12, 5) == [5, 4, 3, 2, 1]
    assert blocks_to_try(1, None) == [1]


def test_what_was_measured_corrects_what_is_expected():
    one = stage()
    assert budget(300, correction=1.5).peak(one, 8) == round(1.5 * budget(300).peak(one, 8))


def test_an_impossible_budget_is_refused_with_the_least_that_would_do():
    model = skeleton(BUILDER, small().builder_options)
    with pytest.raises(UserError, match=r"stage 1 needs \d+ MB even one example at a time") as caught:
        fit(model, budget(40), name="layerwise", rounds=1)
    assert "larger --memory-budget" in caught.value.hint


@pytest.mark.parametrize(("most", "stages"), [(None, 1), (2, 2), (1, 3)])
def test_a_large_budget_attaches_as_many_blocks_as_it_may(most, stages):
    model = skeleton(BUILDER, small().builder_options)
    fitted = fit(model, budget(1000), name="layerwise", rounds=4, blocks_per_stage=most)
    assert [one.rounds for one in fitted.schedule.stages] == [4] * stages
    assert fitted.micro_batch_sizes == (0,) * stages
    assert all(0 < peak < 1000 * MB for peak in fitted.expected_peak_bytes)


def test_one_number_of_rounds_a_stage_decides_how_many_stages_there_are():
    model = skeleton(BUILDER, small().builder_options)
    fitted = fit(model, budget(1000), name="layerwise", rounds=[3, 2, 1])
    assert [one.rounds for one in fitted.schedule.stages] == [3, 2, 1]
    with pytest.raises(UserError, match="rounds for 4 stages, the schedule has 3"):
        fit(model, budget(1000), name="layerwise", rounds=[1, 1, 1, 1])


def test_in_micro_batches_the_rest_of_the_batch_waits():
    one = stage(example_bytes=10 * MB)
    assert budget(1).peak(one, 8) == budget(1).peak(stage(), 8) + 24 * 10 * MB
    assert budget(1).peak(one, 0) == budget(1).peak(stage(), 0)


def test_progressive_attaches_one_block_and_end_to_end_all():
    model = skeleton(BUILDER, small().builder_options)
    count = {
        name: len(fit(model, budget(1000), name=name, rounds=1).schedule.stages)
        for name in ("progressive", "end_to_end")
    }
    assert count == {"progressive": 3, "end_to_end": 1}
