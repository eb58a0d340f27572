from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import sentencepiece
import torch
from small_models import CLASSES, TEXTS, arrays, bundle, small, three, values_of

import edge_client.engines as engines
from edge_client.engines import ENGINES, ONNX, open_graph
from export import parity
from export.bundle import export_bundle
from export.parity import ParityError, input_limits
from export.schedules import end_to_end, layerwise
from export.stage import cut_stages, example
from export.tokenizer import train_tokenizer
from models.registry import build
from wire.errors import UserError
from wire.manifest import LABEL, MANIFEST_NAME, BlobRef, decode_manifest
from wire.parts import modality_sets, with_modalities
from wire.tensors import unpack_file

TASKS = ("contrastive", "classification")


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def raw_batch(model, size=4):
    return example(model.inputs, size, input_limits(model), torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Task -> model, manifest, folder, of a layerwise schedule with uneven depths."""
    made = {}
    for task in TASKS:
        model, folder = small(task), tmp_path_factory.mktemp(task) / "bundle"
        made[task] = model, bundle(model, folder).manifest, folder
    return made


@pytest.mark.parametrize("task", TASKS)
def test_the_manifest_lists_the_folder(exported, task):
    model, manifest, folder = exported[task]
    assert decode_manifest((folder / MANIFEST_NAME).read_bytes()) == manifest
    on_disk = set(hashes(folder)) - {MANIFEST_NAME}
    assert on_disk == set(manifest.files)
    assert all(BlobRef.of_file(folder / name) == ref for name, ref in manifest.files.items())
    assert list(manifest.parameters) == [name for name, _ in model.named_parameters()]
    initial = unpack_file(folder / manifest.initial, {n: p.shape for n, p in manifest.parameters.items()})
    assert all(np.array_equal(initial[name], value) for name, value in values_of(model).items())


@pytest.mark.parametrize("task", TASKS)
def test_stages_name_their_parameters_and_inputs(exported, task):
    model, manifest, _ = exported[task]
    for stage in manifest.stages:
        assert set(stage.parameters.values()) == set(manifest.names_of(stage.trainable))
        assert set(stage.inputs) == set(model.inputs)
        assert (LABEL in stage.inputs) == (task == "classification")
        assert stage.rounds == 2
    shapes = [stage.inputs["image"].shape for stage in manifest.stages]
    assert shapes == [(3, 8, 8), (4, 16), (4, 16)]
    assert manifest.stages[1].inputs["text"].dtype == "float32"
    assert manifest.classes == (CLASSES if task == "classification" else ())


@pytest.mark.parametrize("task", TASKS)
def test_the_prefix_and_the_head_are_the_model(exported, task):
    """Segments one after another, then the last stage's loss: the torch model's own."""
    model, manifest, folder = exported[task]
    raw, values = arrays(raw_batch(model)), values_of(model)
    fed = dict(raw)
    for stage in manifest.stages:
        for name, graph in stage.segments.items():
            fed[name] = open_graph(ONNX, folder.joinpath, graph)(fed, values)["features"]
    assert [set(stage.segments) for stage in manifest.stages] == [
        {"image", "text"},
        {"image", "text"},
        set(),
    ]
    with engines.open_engine("auto", folder.joinpath, manifest, 2) as engine:
        engine.load(values)
        loss = engine.evaluate(fed)["loss"]
    assert loss == pytest.approx(model(raw_batch(model)).item(), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_encoders_are_the_model_cut_at_the_stage(exported, task):
    _, manifest, folder = exported[task]
    for stage, depths in zip(manifest.stages, [(1, 1), (2, 2), (3, 2)], strict=True):
        model = small(task)
        raw, values = raw_batch(model), values_of(model)
        model.cut(dict(zip(("image", "text"), depths, strict=True)))
        expected = model.embed(raw)
        got = {}
        for name, graph in stage.encoders.items():
            got[name] = open_graph(ONNX, folder.joinpath, graph, 2)(arrays(raw), values)["embedding"]
            np.testing.assert_allclose(got[name], expected[name].detach(), rtol=1e-4, atol=1e-6)
        if stage.classifier is not None:
            logits = open_graph(ONNX, folder.joinpath, stage.classifier)(got, values)["logits"]
            np.testing.assert_allclose(logits, model.head.logits(expected).detach(), rtol=1e-4, atol=1e-6)
    assert (stage.classifier is None) == (task == "contrastive")


def test_graphs_hold_no_weights(exported):
    _, manifest, folder = exported["contrastive"]
    for name in manifest.files:
        if name.endswith(".onnx"):
            model = onnx.load(folder / name)
            constants = [int(np.prod(tensor.dims)) for tensor in model.graph.initializer]
            assert max(constants, default=0) <= 8, name  # shapes and axes
            assert not any(node.doc_string for node in (model.graph, *model.graph.node))
    assert all(
        (folder / s.engines["ort-training"]["checkpoint"]).stat().st_size < 4096 for s in manifest.stages
    )


def test_stages_of_one_shape_share_their_files(tmp_path):
    manifest = bundle(small(image_blocks=4, text_blocks=4), tmp_path / "bundle").manifest
    first, *later = manifest.stages
    assert all(stage.engines == later[0].engines for stage in later)
    assert first.engines["onnx"]["train"] != later[0].engines["onnx"]["train"]
    assert first.engines["ort-training"]["optimizer"] == later[0].engines["ort-training"]["optimizer"]
    files = [stage.segments["image"].file for stage in manifest.stages[:-1]]
    assert files[0] != files[1] == files[2]
    assert (
        manifest.stages[1].segments["image"].parameters != manifest.stages[2].segments["image"].parameters
    )
    assert len({ref.sha256 for ref in manifest.files.values()}) == len(manifest.files)


def test_a_modality_that_ran_out_of_blocks_stays_as_it_is(tmp_path):
    manifest = bundle(small(image_blocks=3, text_blocks=1), tmp_path / "bundle", runtimes=engines).manifest
    assert [set(stage.segments) for stage in manifest.stages] == [{"image", "text"}, {"image"}, set()]
    assert not any(group.startswith("text.") for group in manifest.stages[2].trainable)
    assert "head.projections.text.norm.weight" in manifest.stages[2].parameters.values()


@pytest.mark.parametrize("schedule", ["progressive", "end_to_end"])
def test_what_never_freezes_has_no_prefix(tmp_path, schedule):
    manifest = bundle(small(), tmp_path / "bundle", schedule).manifest
    assert all(not stage.segments for stage in manifest.stages)
    assert all(stage.inputs["image"].shape == (3, 8, 8) for stage in manifest.stages)


def test_exporting_twice_gives_equal_bytes_whatever_the_weights(exported, tmp_path):
    _, _, first = exported["contrastive"]
    bundle(small(), tmp_path / "again")
    bundle(small(seed=5), tmp_path / "other")
    assert hashes(tmp_path / "again") == hashes(first)
    other, same = hashes(tmp_path / "other"), hashes(first)
    assert {name for name in same if same[name] != other[name]} == {"initial.safetensors", MANIFEST_NAME}


def test_another_process_gives_equal_bytes(exported, tmp_path):
    _, _, first = exported["contrastive"]
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from small_models import bundle, small
bundle(small(), Path({str(tmp_path / "bundle")!r}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # the gradient builder's log stays out of the terminal
    assert hashes(tmp_path / "bundle") == hashes(first)


def test_the_check_reports_and_is_tight(tmp_path):
    done = bundle(small("classification"), tmp_path / "bundle", runtimes=engines)
    report = done.parity
    assert report is not None
    assert report.engines == ("onnx", "ort-training")
    assert report.num_graphs == 3 * 2 + 2 * 4 + 3
    assert 0 < report.loss_error < 1e-4
    assert 0 < report.parameter_error < 1e-3
    assert report.output_error < 1e-5
    assert "follows torch on onnx, ort-training" in str(report)
    assert "\n" not in str(report)


def test_train_steps_for_clients_that_lack_a_modality(tmp_path):
    model = small("classification", image_blocks=2, text_blocks=1)
    done = bundle(model, tmp_path / "bundle", runtimes=engines, engines=ENGINES, missing_modalities=True)
    assert done.parity is not None  # every one follows torch on every engine
    whole = done.manifest
    assert with_modalities(whole, ("image", "text")) is whole
    image, text = with_modalities(whole, ("image",)), with_modalities(whole, ("text",))
    assert [stage.trainable for stage in image.stages] == [
        ("image.stem", "image.block.0", "head", "head.image"),
        ("image.block.1", "head", "head.image"),
    ]
    assert [set(stage.inputs) for stage in image.stages] == [{"image", "label"}] * 2
    assert [stage.trainable for stage in text.stages][1] == ("head", "head.text")
    assert [set(stage.inputs) for stage in text.stages] == [{"text", "text_mask", "label"}] * 2
    assert list(text.modalities) == ["text"]
    for stage in (*image.stages, *text.stages):
        trained = {whole.parameters[name].group for name in stage.parameters.values()}
        assert trained == set(stage.trainable)


def test_in_micro_batches_too(tmp_path):
    model = small("classification", image_blocks=1, text_blocks=1)
    bundle(model, tmp_path / "bundle", runtimes=engines, micro_batch_size=2, missing_modalities=True)


def test_a_contrastive_loss_of_three_does_with_two(tmp_path):
    torch.manual_seed(0)
    model = build("small_models:three", width=16, blocks=1)
    done = bundle(model, tmp_path / "bundle", runtimes=engines, missing_modalities=True)
    (stage,) = done.manifest.stages
    pairs = [("left", "right"), ("left", "text"), ("right", "text")]
    assert [partial.modalities for partial in stage.partials] == pairs
    assert modality_sets(done.manifest) == [("left", "right", "text"), *pairs]
    with pytest.raises(UserError, match="a contrastive loss of image and text needs all of them"):
        bundle(small(), tmp_path / "other", missing_modalities=True)


@pytest.mark.parametrize("task", TASKS)
def test_steps_that_keep_embeddings_close_to_anchors(tmp_path, task):
    model = small(task, image_blocks=2, text_blocks=1)
    partly = task == "classification"
    made = {"engines": ENGINES, "missing_modalities": partly, "alignment": 0.5}
    done = bundle(model, tmp_path / "bundle", runtimes=engines, **made)
    assert done.parity is not None  # every one follows torch on every engine
    for stage in done.manifest.stages:
        assert set(stage.anchors) == {"image", "text"}
        assert stage.inputs["image_anchor"].shape == stage.inputs["text_anchor"].shape == (8,)
    if partly:
        (seen,) = with_modalities(done.manifest, ("image",)).stages[:1]
        assert set(seen.anchors) == {"image"}
        assert "text_anchor" not in seen.inputs


def test_alignment_in_micro_batches_is_for_classification(tmp_path):
    model = small("classification", image_blocks=1, text_blocks=1)
    bundle(model, tmp_path / "bundle", runtimes=engines, micro_batch_size=2, alignment=0.5)
    with pytest.raises(UserError, match="not computed in micro-batches"):
        bundle(small(), tmp_path / "other", micro_batch_size=2, alignment=0.5)


def test_three_modalities_and_several_blocks_a_stage(tmp_path):
    torch.manual_seed(0)
    model = build("small_models:three", width=16, blocks=3)
    done = bundle(model, tmp_path / "bundle", runtimes=engines, blocks_per_stage=2)
    first, second = done.manifest.stages
    assert set(first.segments) == {"left", "right", "text"}
    assert second.inputs["right"].shape == (16, 16)
    assert second.warm_start == {"left.block.2": "left.block.1", "text.block.2": "text.block.1"}


def test_three_modalities_in_micro_batches_of_one_stage_only(tmp_path):
    torch.manual_seed(0)
    model = build("small_models:three", width=16, blocks=2)
    done = export_bundle(
        model,
        layerwise(model.depths, 1),
        tmp_path / "bundle",
        texts=TEXTS,
        engines=("onnx",),
        micro_batch_sizes=(4, 0),
        runtimes=engines,
    )
    assert done.parity.parameter_error < 1e-3
    roles = [set(stage.engines["onnx"]) for stage in done.manifest.stages]
    assert roles == [{"embed", "pairs", "gradients", "update"}, {"train", "eval"}]


class Off:
    """The engines, with one number of one thing wrong."""

    def __init__(self, what):
        self.what = what

    def available(self, names):
        return engines.available(names)

    def graph_file(self, engine, graph):
        return engines.graph_file(engine, graph)

    def open_graph(self, engine, file, graph, threads=1):
        run = engines.open_graph(engine, file, graph, threads)
        wrong = self.what in graph.file
        return lambda inputs, values: {
            k: v * (1.01 if wrong else 1) for k, v in run(inputs, values).items()
        }

    def open_engine(self, name, file, manifest, stage, threads=1):
        engine = engines.open_engine(name, file, manifest, stage, threads)
        if self.what == "loss":
            step = engine.train_step
            engine.train_step = lambda batch, rate: step(batch, rate) * 1.01
        if self.what == "nan":
            engine.evaluate = lambda batch: {"loss": float("nan")}
        get = engine.parameters
        engine.parameters = lambda: {k: v * (1.01 if self.what == k else 1) for k, v in get().items()}
        return engine


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("loss", "stage 1 on onnx, loss of step 1"),
        ("nan", "evaluation"),
        ("text.blocks.1.up.weight", "stage 2 on onnx, text.blocks.1.up.weight"),
        ("stage0.text.segment", "stage0.text.segment"),
        ("stage1.image.encoder", "stage1.image.encoder"),
    ],
)
def test_a_bundle_that_does_not_follow_torch_is_not_left_behind(tmp_path, what, names):
    with pytest.raises(ParityError, match=names):
        bundle(small(), tmp_path / "bundle", runtimes=Off(what))
    assert list(tmp_path.iterdir()) == []


def test_the_limit_of_the_check_is_one_in_a_thousand():
    assert parity.MAX_ERROR == 1e-3
    assert len(parity.BATCH_SIZES) == parity.STEPS
    assert parity.BATCH_SIZES[-1] < parity.BATCH_SIZES[0]


def test_an_existing_folder_is_only_replaced_by_force(tmp_path):
    out = tmp_path / "bundle"
    bundle(small(), out, "end_to_end")
    before = hashes(out)
    with pytest.raises(UserError, match="exists"):
        bundle(small(seed=1), out, "end_to_end")
    assert hashes(out) == before
    bundle(small(seed=1), out, "end_to_end", force=True)
    assert hashes(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_force_does_not_remove_what_is_no_bundle(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"dear")
    with pytest.raises(UserError, match="has no manifest"):
        bundle(small(), tmp_path / "photos", force=True)
    assert (tmp_path / "photos" / "mine.jpg").read_bytes() == b"dear"


def export(model, tmp_path, **arguments):
    given = {"texts": TEXTS} | arguments
    return export_bundle(model, end_to_end(model.depths), tmp_path / "bundle", **given)


def with_buffer():
    model = small()
    model.image.stem.register_buffer("seen", torch.zeros(1))
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "says"),
    [
        (lambda: three(width=16), {}, "names no builder"),
        (with_buffer, {}, "saved buffer"),
        (lambda: small().double(), {}, "not float32"),
        (lambda: small("classification"), {}, "0 class names for a model of 3"),
        (small, {"classes": CLASSES}, "3 class names for a model of 0"),
        (small, {"texts": []}, "no texts"),
        (small, {"texts": ["".join(map(chr, range(0x4E00, 0x4E80)))]}, "larger vocabulary"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(tmp_path, make, arguments, says):
    with pytest.raises(UserError) as caught:
        export(make(), tmp_path, **arguments)
    assert says in f"{caught.value} {caught.value.hint}"
    assert "\n" not in f"{caught.value}"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    model = small()
    with pytest.raises(UserError, match="cannot write"):
        export_bundle(model, layerwise(model.depths), tmp_path / "file" / "bundle", texts=TEXTS)


def test_the_tokenizer_pads_with_zero_and_shrinks():
    model = train_tokenizer([*TEXTS, "", "  "], 5000)
    assert model == train_tokenizer(iter(TEXTS), 5000)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert processor.vocab_size() < 200
    assert (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id()) == (
        0,
        1,
        -1,
        -1,
    )
    ids = processor.encode("A Red FOX")
    assert ids == processor.encode("a red fox")
    assert not {0, 1} & set(ids)
    assert processor.decode(ids) == "a red fox"


def test_cuts_share_the_models_parameters():
    model = small()
    for cut in cut_stages(model, layerwise(model.depths).stages):
        mine = {id(p) for p in model.parameters()}
        assert {id(p) for p in cut.train.parameters()} <= mine
        names = cut.train.torch_names(model)
        assert all(name.split(".")[0] == torch_name.split(".")[0] for name, torch_name in names.items())
