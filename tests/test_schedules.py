from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.schedules import SCHEDULES, end_to_end, layerwise, progressive
from wire.errors import UserError

UNEVEN = {"image": 3, "text": 2}
HEAD = ("head", "head.image", "head.text")


def test_layerwise_trains_one_block_a_modality_and_freezes_it():
    stages = layerwise(UNEVEN, 4).stages
    assert [stage.trainable for stage in stages] == [
        ("image.stem", "image.block.0", "text.stem", "text.block.0", *HEAD),
        ("image.block.1", "text.block.1", *HEAD),
        ("image.block.2", *HEAD),
    ]
    assert [stage.frozen for stage in stages] == [
        (),
        ("image.stem", "image.block.0", "text.stem", "text.block.0"),
        ("image.stem", "image.block.0", "image.block.1", "text.stem", "text.block.0", "text.block.1"),
    ]
    assert [stage.starts for stage in stages] == [
        {"image": None, "text": None},
        {"image": 1, "text": 1},
        {"image": 2, "text": 2},
    ]
    assert [stage.depths for stage in stages] == [{"image": 1, "text": 1}, {"image": 2, "text": 2}, UNEVEN]
    assert [stage.warm_start for stage in stages] == [
        {},
        {"image.block.1": "image.block.0", "text.block.1": "text.block.0"},
        {"image.block.2": "image.block.1"},
    ]
    assert [stage.rounds for stage in stages] == [4, 4, 4]


def test_progressive_trains_everything_so_far():
    stages = progressive(UNEVEN, [1, 2, 3]).stages
    assert [len(stage.trainable) for stage in stages] == [7, 9, 10]
    assert all(stage.frozen == () and set(stage.starts.values()) == {None} for stage in stages)
    assert stages[2].warm_start == {"image.block.2": "image.block.1"}
    assert [stage.rounds for stage in stages] == [1, 2, 3]


def test_who_lacks_a_modality_trains_the_rest():
    stages = layerwise(UNEVEN).stages
    assert stages[0].trainable_with(("image",)) == ("image.stem", "image.block.0", "head", "head.image")
    assert stages[2].trainable_with(("text",)) == ("head", "head.text")
    assert stages[1].trainable_with(UNEVEN) == stages[1].trainable


def test_end_to_end_is_one_stage():
    (stage,) = end_to_end(UNEVEN, 7).stages
    assert len(stage.trainable) == 10
    assert (stage.frozen, stage.warm_start, stage.rounds, stage.depths) == ((), {}, 7, UNEVEN)


def test_several_blocks_a_stage_start_from_the_last_trained_one():
    stages = layerwise({"image": 5, "text": 3}, 1, blocks_per_stage=2).stages
    assert [stage.depths for stage in stages] == [
        {"image": 2, "text": 2},
        {"image": 4, "text": 3},
        {"image": 5, "text": 3},
    ]
    assert stages[0].warm_start == {}
    assert stages[1].warm_start == {
        "image.block.2": "image.block.1",
        "image.block.3": "image.block.1",
        "text.block.2": "text.block.1",
    }


def test_a_fresh_start_copies_nothing():
    assert all(not stage.warm_start for stage in layerwise(UNEVEN, warm_start="fresh").stages)


@given(
    depths=st.dictionaries(st.sampled_from(["image", "text", "audio"]), st.integers(1, 9), min_size=1),
    blocks_per_stage=st.integers(1, 4),
    name=st.sampled_from(["layerwise", "progressive"]),
)
def test_every_schedule_trains_every_group(depths, blocks_per_stage, name):
    schedule = SCHEDULES[name](depths, 1, blocks_per_stage=blocks_per_stage)
    groups = set(end_to_end(depths, 1).stages[0].trainable)
    head = {"head", *(f"head.{modality}" for modality in depths)}
    seen: set[str] = set()
    for stage in schedule.stages:
        assert head <= set(stage.trainable)
        assert not set(stage.trainable) & set(stage.frozen)
        assert set(stage.frozen) <= seen  # only what was trained is frozen
        assert set(stage.warm_start) <= set(stage.trainable) - seen
        assert set(stage.warm_start.values()) <= seen
        assert seen - head <= set(stage.trainable) | set(stage.frozen)  # nothing is lost
        seen |= set(stage.trainable)
    assert seen == groups
    assert dict(schedule.stages[-1].depths) == depths


@pytest.mark.parametrize(
    "make",
    [
        lambda: layerwise({"image": 0, "text": 2}),
        lambda: end_to_end({}),
        lambda: progressive(UNEVEN, blocks_per_stage=0),
        lambda: layerwise(UNEVEN, [1, 2]),
        lambda: layerwise(UNEVEN, 0),
        lambda: layerwise(UNEVEN, []),
        lambda: layerwise(UNEVEN, warm_start="lukewarm"),
        lambda: end_to_end(UNEVEN, [1, 2]),
    ],
)
def test_a_schedule_that_trains_nothing_is_refused(make):
    with pytest.raises(UserError) as caught:
        make()
    assert caught.value.hint
