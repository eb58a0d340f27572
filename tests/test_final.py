from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import sentencepiece
import torch
from small_models import CLASSES, arrays, bundle, small, values_of

from export.final import write_final
from export.parity import input_limits
from export.stage import example
from models.load import load
from models.saved import CLASSIFIER_NAME, MODEL_NAME, WEIGHTS_NAME
from wire.errors import ManifestMismatch, UserError

DEPTHS = [{"image": 1, "text": 1}, {"image": 2, "text": 2}, {"image": 3, "text": 2}]


@pytest.fixture(scope="module", params=["contrastive", "classification"])
def trained(request, tmp_path_factory):
    """A bundle, and parameters that are not its initial ones."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    bundle(small(request.param), folder)
    return request.param, folder, small(request.param, seed=9)


def run(path, feeds):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[0]


@pytest.mark.parametrize("stage", [0, 1, 2, None])
def test_the_folder_holds_the_model_of_the_stage(trained, tmp_path, stage):
    task, folder, model = trained
    values, batch = values_of(model), example(model.inputs, 4, input_limits(model), torch.Generator())
    out = tmp_path / "model"
    saved = write_final(folder, values, out, stage=stage)
    depths = DEPTHS[-1 if stage is None else stage]
    reference = small(task, seed=9)
    reference.cut(depths)
    expected = reference.eval().embed(batch)
    got = {name: run(out / f"{name}.onnx", arrays(batch)) for name in ("image", "text")}
    for name, embedding in got.items():
        np.testing.assert_allclose(embedding, expected[name].detach(), rtol=1e-4, atol=1e-6)
    if task == "classification":
        logits = run(out / CLASSIFIER_NAME, got)
        np.testing.assert_allclose(logits, reference.head.logits(expected).detach(), rtol=1e-4, atol=1e-6)
        assert saved.classes == CLASSES
    assert saved.depths == depths
    assert saved.task == task

    state = torch.random.get_rng_state()
    loaded = load(out)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not loaded.training
    assert loaded.depths == depths
    assert all(np.array_equal(value, values[name]) for name, value in values_of(loaded).items())
    assert torch.equal(loaded(batch), reference(batch))


def test_it_names_its_files_and_carries_the_tokenizer(trained, tmp_path):
    task, folder, model = trained
    write_final(folder, values_of(model), tmp_path / "model")
    extra = {CLASSIFIER_NAME} if task == "classification" else set()
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"image.onnx", "text.onnx", "tokenizer.model", MODEL_NAME, WEIGHTS_NAME} | extra
    tokenizer = tmp_path / "model" / "tokenizer.model"
    assert sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).pad_id() == 0


def test_an_early_cut_needs_no_later_parameters(trained, tmp_path):
    _, folder, model = trained
    values = {name: value for name, value in values_of(model).items() if ".blocks.2" not in name}
    write_final(folder, values, tmp_path / "early", stage=1)
    with pytest.raises(ManifestMismatch, match=r"image\.blocks\.2\S+ is missing"):
        write_final(folder, values, tmp_path / "late")
    values["head.projections.text.norm.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ManifestMismatch, match=r"head.projections.text.norm.weight is \(3,\)"):
        write_final(folder, values, tmp_path / "wrong", stage=1)
    assert [path.name for path in tmp_path.iterdir()] == ["early"]


def test_mistakes_are_said_in_one_line(trained, tmp_path):
    _, folder, model = trained
    values = values_of(model)
    write_final(folder, values, tmp_path / "model")
    with pytest.raises(UserError, match="exists"):
        write_final(folder, values, tmp_path / "model")
    write_final(folder, values, tmp_path / "model", force=True)
    with pytest.raises(UserError, match="no stage 4"):
        write_final(folder, values, tmp_path / "other", stage=3)
    with pytest.raises(UserError, match="holds no bundle"):
        write_final(tmp_path, values, tmp_path / "other")
    with pytest.raises(UserError, match="holds no trained model"):
        load(tmp_path)
    (tmp_path / "model" / WEIGHTS_NAME).write_bytes(b"broken")
    with pytest.raises(UserError, match="holds no trained weights"):
        load(tmp_path / "model")


def test_weights_of_another_model_are_refused(trained, tmp_path):
    _, folder, model = trained
    write_final(folder, values_of(model), tmp_path / "one")
    write_final(folder, values_of(model), tmp_path / "two", stage=0)
    (tmp_path / "two" / WEIGHTS_NAME).rename(tmp_path / "one" / WEIGHTS_NAME)
    with pytest.raises(UserError, match="does not fit"):
        load(tmp_path / "one")


def test_writing_it_needs_no_torch(trained, tmp_path):
    _, folder, _ = trained
    program = f"""
import sys
from pathlib import Path
from export.final import write_final
from wire.manifest import decode_manifest
from wire.tensors import unpack_file
folder = Path({str(folder)!r})
manifest = decode_manifest((folder / "manifest.json").read_bytes())
values = unpack_file(folder / manifest.initial, {{n: p.shape for n, p in manifest.parameters.items()}})
write_final(folder, values, Path({str(tmp_path / "model")!r}))
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
