"""Metrics: against plain loops, against torch, and the same from a bundle and from the final model."""

from __future__ import annotations

import copy
from itertools import permutations

import numpy as np
import pytest
import torch
from small_world import NUM_EXAMPLES, World

from export.final import write_final
from lamina.evaluation import AT, evaluate_model, evaluate_stage, retrieval
from models.saved import read_saved

TASKS = {"contrastive": {}, "classification": {"text_blocks": 1}}
GROUPS = ("pencil", "ink", "oil")


def whole_numbers(*names, count=40, width=3, seed=0):
    """Embeddings whose products are exact, and often equal."""
    generator = np.random.default_rng(seed)
    return {name: generator.integers(-2, 3, (count, width)).astype(np.float32) for name in names}


def mean(values):
    return sum(values) / len(values)


def plain(embeddings, groups):
    """What `retrieval` says it does, one question after the other."""
    found = {}
    for source, target in permutations(embeddings, 2):
        for k in AT:
            recalls = []
            for group in sorted(set(groups)):
                members = [place for place, name in enumerate(groups) if name == group]
                hits = []
                for query in members:
                    scores = {
                        other: float(np.dot(embeddings[source][query], embeddings[target][other]))
                        for other in members
                    }
                    better = [
                        other for other in members if other != query and scores[other] >= scores[query]
                    ]
                    hits.append(len(better) < k)
                recalls.append(mean(hits))
            found[f"{source}_to_{target}@{k}"] = mean(recalls)
    for k in AT:
        directions = [found[f"{source}_to_{target}@{k}"] for source, target in permutations(embeddings, 2)]
        found[f"recall@{k}"] = mean(directions)
        found[f"chance@{k}"] = mean([min(1, k / groups.count(group)) for group in set(groups)])
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("modalities", [("image", "text"), ("left", "right", "text")])
def test_retrieval_is_what_plain_loops_give(modalities, seed):
    embeddings = whole_numbers(*modalities, seed=seed)
    groups = tuple(GROUPS[place % 7 % 3] for place in range(40))
    got, expected = retrieval(embeddings, groups), plain(embeddings, groups)
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected)
    assert 0 < got["recall@1"] < got["recall@10"] < 1


def test_two_modalities_have_two_directions_and_three_have_six():
    two, three = (retrieval(whole_numbers(*names)) for names in ("ab", "abc"))
    assert list(two) == [
        f"{name}@{k}" for name in ("recall", "a_to_b", "b_to_a", "chance") for k in AT
    ]  # the overall ones first
    assert sum("_to_" in name for name in three) == 6 * len(AT)
    directions = [three[f"{one}_to_{other}@5"] for one, other in permutations("abc", 2)]
    assert three["recall@5"] == pytest.approx(mean(directions))


def test_directions_are_told_apart():
    image, text = np.array([[2, 1], [3, 4]], np.float32), np.eye(2, dtype=np.float32)
    got = retrieval({"image": image, "text": text})
    assert (got["image_to_text@1"], got["text_to_image@1"], got["recall@1"]) == (1.0, 0.5, 0.75)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 10, 11, 33, 200])
def test_a_model_that_gives_all_the_same_knows_nothing(count):
    same = np.ones((count, 8), np.float32)
    got = retrieval({"image": same, "text": same})
    for k in AT:
        assert got[f"recall@{k}"] == (1.0 if k >= count else 0.0)
        assert got[f"chance@{k}"] == pytest.approx(min(1.0, k / count))


def test_what_is_not_a_number_counts_against_the_model():
    image = np.eye(12, dtype=np.float32)
    assert retrieval({"image": image, "text": image * np.nan})["recall@10"] == 0.0
    text = image.copy()
    text[3] = np.nan
    got = retrieval({"image": image, "text": text})
    assert got["image_to_text@1"] == 0.0  # a candidate that scores NaN is never behind
    assert got["text_to_image@10"] == pytest.approx(11 / 12)


def test_a_tie_counts_against_the_model():
    image = np.eye(4, dtype=np.float32)
    text = image.copy()
    assert retrieval({"image": image, "text": text})["recall@1"] == 1.0
    text[3] = text[2]
    got = retrieval({"image": image, "text": text})
    assert got["image_to_text@1"] == 0.5  # image 2 scores both texts alike, image 3 none
    assert got["text_to_image@1"] == 0.75  # of those two texts, one is image 2's


def test_each_group_weighs_the_same():
    right, wrong = np.eye(22, dtype=np.float32), np.eye(22, dtype=np.float32)
    wrong[2:] = np.roll(wrong[2:], 1, axis=0)
    got = retrieval({"image": right, "text": wrong}, ("small",) * 2 + ("large",) * 20)
    assert got["recall@1"] == 0.5
    assert got["chance@1"] == pytest.approx((1 / 2 + 1 / 20) / 2)
    assert got["chance@5"] == pytest.approx((1 + 5 / 20) / 2)


def test_candidates_are_those_of_the_group():
    image, text = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    text[[0, 1]] = text[[1, 0]]
    assert retrieval({"image": image, "text": text})["recall@1"] == pytest.approx(1 / 3)
    assert retrieval({"image": image, "text": text}, ("x", "y", "x"))["recall@1"] == 0.75


def test_without_groups_all_are_one():
    embeddings = whole_numbers("image", "text")
    assert retrieval(embeddings) == retrieval(embeddings, ("all",) * 40)


def test_the_order_of_the_rows_does_not_matter():
    embeddings, order = whole_numbers("image", "text"), np.random.default_rng(5).permutation(40)
    groups = tuple(GROUPS[place % 3] for place in range(40))
    shuffled = {name: values[order] for name, values in embeddings.items()}
    got = retrieval(shuffled, tuple(groups[place] for place in order))
    assert got == pytest.approx(retrieval(embeddings, groups))


@pytest.fixture(scope="module", params=TASKS)
def case(request, tmp_path_factory):
    """A bundle, its examples, and parameters that are not the initial ones."""
    world = World.of(tmp_path_factory, request.param, **TASKS[request.param])
    generator = np.random.default_rng(1)
    values = {
        name: value + generator.normal(scale=0.2, size=value.shape).astype(np.float32)
        for name, value in world.values.items()
    }
    return world, world.dataset(tmp_path_factory.mktemp("inputs")), values


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """The examples take three passes, the last one smaller."""
    monkeypatch.setattr("lamina.evaluation.BATCH", 8)


def torchs(world, dataset, values, stage):
    """The metrics of the torch model cut at a stage."""
    model = copy.deepcopy(world.model)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
    model.cut({name: min(depth, stage + 1) for name, depth in model.depths.items()})
    batch = dataset.batch(range(NUM_EXAMPLES))
    with torch.no_grad():
        embeddings = model.embed({name: torch.from_numpy(value) for name, value in batch.items()})
        if model.task == "contrastive":
            return plain({name: value.numpy() for name, value in embeddings.items()}, dataset.groups)
        guesses = model.head.logits(embeddings).argmax(dim=1).tolist()
    labels = batch["label"].tolist()
    hits = [guess == label for guess, label in zip(guesses, labels, strict=True)]
    return {"accuracy": mean(hits), "chance": max(map(labels.count, labels)) / len(labels)}


@pytest.mark.parametrize("stage", range(3))
def test_a_stage_has_the_metrics_of_the_torch_model_cut_there(case, stage):
    world, dataset, values = case
    got = evaluate_stage(world.folder, world.manifest, dataset, 1, stage, values)
    assert got == pytest.approx(torchs(world, dataset, values, stage))


@pytest.mark.parametrize("stage", [0, None])
def test_the_final_model_has_the_metrics_of_its_stage(case, tmp_path, stage):
    world, dataset, values = case
    write_final(world.folder, values, tmp_path / "model", stage=stage)
    number = len(world.manifest.stages) - 1 if stage is None else stage
    from_bundle = evaluate_stage(world.folder, world.manifest, dataset, 1, number, values)
    final = evaluate_model(tmp_path / "model", read_saved(tmp_path / "model"), dataset, 1)
    assert final == from_bundle
    assert list(final) == list(from_bundle)


def test_parameters_make_the_difference(case):
    world, dataset, values = case
    last = len(world.manifest.stages) - 1
    results = [
        evaluate_stage(world.folder, world.manifest, dataset, 1, stage, parameters)
        for stage, parameters in ((last, values), (last, world.values), (0, values))
    ]
    assert results[0] != results[1] != results[2] != results[0]


def test_chance_is_always_naming_the_most_frequent_class(tmp_path_factory, tmp_path):
    world = World.of(tmp_path_factory, "classification", **TASKS["classification"])
    dataset = world.dataset(tmp_path / "inputs")
    values = {name: np.zeros_like(value) for name, value in world.values.items()}
    for place, count in enumerate(np.bincount(dataset.labels)):
        values["head.classify.bias"] = np.eye(3, dtype=np.float32)[place]
        got = evaluate_stage(world.folder, world.manifest, dataset, 1, 0, values)
        assert got == pytest.approx({"accuracy": count / NUM_EXAMPLES, "chance": 0.5})


def test_equal_embeddings_are_ties_however_they_are_rounded():
    generator = np.random.default_rng(0)
    for size in (21, 77, 130):
        same = np.tile(generator.normal(size=64).astype(np.float32) / 8, (size, 1))
        assert retrieval({"image": same, "text": same})["recall@10"] == 0
