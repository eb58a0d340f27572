"""`lamina plan` and `lamina export --memory-budget`, as a person types them."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from small_models import TEXTS
from small_world import World, write_examples

from export.budget import Budget, fit
from export.bundle import export_bundle
from export.observe import skeleton
from lamina.export_command import command as export
from lamina.plan_command import command as plan
from lamina.within_budget import export_within
from wire.errors import UserError
from wire.manifest import read_manifest

MB = 10**6
SMALL = {"size": 8, "patch": 4, "width": 16, "heads": 2, "vocabulary": 40, "length": 6, "embedding": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.of(tmp_path_factory)


def run(command, *words):
    done = CliRunner().invoke(command, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture(scope="module")
def planned(world):
    return json.loads(run(plan, world.folder, "--json", "--batch-size", 8, "--local-epochs", 2).output)


def test_the_own_schedule_comes_first_and_all_train_for_as_many_rounds(world, planned):
    assert next(iter(planned["schedules"])) == "layerwise"
    assert (planned["engine"], planned["batch_size"], planned["local_epochs"]) == ("onnx", 8, 2)
    found = planned["schedules"]
    assert {name: len(one["stages"]) for name, one in found.items()} == {
        "layerwise": 3,
        "progressive": 3,
        "end_to_end": 1,
    }
    assert {one["total"]["rounds"] for one in found.values()} == {6}
    for stage, entry in zip(found["layerwise"]["stages"], world.manifest.stages, strict=True):
        shapes = world.manifest.shapes_of(entry.trainable).values()
        assert stage["trainable_parameters"] == sum(map(math.prod, shapes))
        assert stage["rounds"] == entry.rounds


def test_ratios_are_to_end_to_end(planned):
    found = planned["schedules"]
    assert set(found["end_to_end"]["ratio"].values()) == {1.0}
    layerwise, progressive = found["layerwise"], found["progressive"]
    for name in ("flops_per_example", "bytes_up_none", "bytes_up_int8", "expected_peak_bytes"):
        assert layerwise["ratio"][name] < 1
        assert layerwise["total"][name] < found["end_to_end"]["total"][name]
    assert (
        progressive["total"]["flops_per_example"] == progressive["total"]["flops_per_example_without_cache"]
    )
    assert layerwise["total"]["flops_per_example"] < layerwise["total"]["flops_per_example_without_cache"]


def test_the_table_fits_80_columns_and_tells_units(world):
    lines = run(plan, world.folder, "--rounds", 5).output.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert lines[0] == "layerwise, the bundle's own"
    assert {"progressive", "end_to_end"} <= set(lines)
    assert sum("MFLOP" in line for line in lines) == 3
    (whole,) = (line.split() for line in lines if line.startswith("end_to_end "))
    assert whole[1] == "15"
    assert whole.count("1.00x") == 5


def test_a_picture(world, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    run(plan, world.folder, "--plot", tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 500


def test_a_picture_without_matplotlib(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib") as caught:
        run(plan, world.folder, "--plot", tmp_path / "plan.png")
    assert "lamina[plot]" in caught.value.hint
    assert not (tmp_path / "plan.png").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "nowhere holds no bundle"),
        (["BUNDLE", "--engine", "executorch"], "no files for the engine executorch"),
        (["BUNDLE", "--batch-size", "65"], "batches of at most 64"),
    ],
)
def test_mistakes(world, words, told):
    with pytest.raises(UserError, match=told):
        run(plan, *(world.folder if word == "BUNDLE" else word for word in words))


def words(tmp_path, budget, *more):
    options = [word for name, value in SMALL.items() for word in ("--option", f"{name}={value}")]
    blocks = "--option", "image_blocks=2", "--option", "text_blocks=1"
    where = "--data", tmp_path / "data", "--engine", "onnx", "--out", tmp_path / "bundle"
    model = "--model", "models.image_text:image_text", *options, *blocks
    return *model, *where, "--no-check", "--memory-budget", budget, *more


def test_an_export_within_a_budget_is_planned_and_rehearsed(tmp_path):
    write_examples(tmp_path / "data")
    done = run(export, *words(tmp_path, "400MB", "--blocks-per-stage", 1, "--json"))
    manifest, _ = read_manifest(tmp_path / "bundle")
    memory = json.loads(done.output)["memory"]
    assert [one["expected_peak_bytes"] for one in memory] == [
        stage.expected_peak_bytes for stage in manifest.stages
    ]
    assert len(memory) == 2
    for one in memory:
        (measured,) = one["measured_peak_bytes"].values()
        assert one["micro_batch_size"] == 0
        assert abs(one["expected_peak_bytes"] / measured - 1) < 0.25
        assert measured <= 400 * MB


def test_a_budget_that_nothing_fits_leaves_no_bundle(tmp_path):
    write_examples(tmp_path / "data")
    with pytest.raises(UserError, match="stage 1 needs"):
        run(export, *words(tmp_path, "60MB"))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_a_rehearsal_finds_over_the_budget_is_planned_anew(world, tmp_path):
    """The expectation is set too low by half, so only the measuring can tell."""
    model, tried = skeleton(world.model.builder, world.model.builder_options), []

    def attempt(limit):
        tried.append(limit.correction)
        return fit(model, limit, name="layerwise", rounds=2, blocks_per_stage=1)

    def write(schedule, folder, *, force, **planned):
        return export_bundle(
            world.model, schedule, folder, texts=TEXTS, engines=["onnx"], force=force, **planned
        )

    with pytest.raises(UserError, match="needs"):
        export_within(Budget(70 * MB, 8, ("onnx",), 0.5), attempt, write, tmp_path / "bundle", force=False)
    assert tried[0] == 0.5
    assert tried[-1] > 0.8
    assert list(tmp_path.iterdir()) == []


def test_after_the_last_try_what_was_there_before_is_still_there(world, tmp_path, monkeypatch):
    """Every measurement is over the budget, whatever was planned."""
    monkeypatch.setattr("lamina.within_budget.rehearse", lambda *_: 10**9)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("the old one")
    model, tried = skeleton(world.model.builder, world.model.builder_options), []

    def attempt(limit):
        tried.append(limit.correction)
        return fit(model, replace(limit, correction=1.0), name="layerwise", rounds=2)

    def write(schedule, folder, *, force, **planned):
        return export_bundle(
            world.model, schedule, folder, texts=TEXTS, engines=["onnx"], force=force, **planned
        )

    with pytest.raises(UserError, match="after 4 tries a stage still needs 1022 MB"):
        export_within(Budget(900 * MB, 8, ("onnx",)), attempt, write, tmp_path / "bundle", force=True)
    assert len(tried) == 4
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "the old one"


@pytest.mark.parametrize("amount", ["200", "MB", "-1MB", "0MB", "200kB", "1.5.0GB", ""])
def test_an_amount_of_memory(tmp_path, amount):
    with pytest.raises(UserError, match="is not an amount of memory"):
        run(export, "--memory-budget", amount)
