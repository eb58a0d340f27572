"""The library over ExecuTorch's runtime: how it is built, and that nothing fed to it can hurt."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import TEXTS, small, values_of

from edge_client.engines import executorch_runtime as runtime
from edge_client.engines.executorch import ExecuTorch
from export.bundle import export_bundle
from export.schedules import SCHEDULES
from wire.errors import GraphError, LocalError, UserError

pytest.importorskip("executorch.version")

BOUND = 6


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, folder = small(image_blocks=2), tmp_path_factory.mktemp("bundle") / "bundle"
    schedule = SCHEDULES["layerwise"](model.depths)
    made = export_bundle(
        model, schedule, folder, texts=TEXTS, engines=("executorch",), max_batch_size=BOUND
    )
    return made.manifest, folder, values_of(model)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of its own."""
    monkeypatch.setattr(runtime.platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "lamina"


@pytest.fixture
def builds(monkeypatch):
    """The commands that would build; each makes a file that says so."""
    commands = []

    def run(command, **_):
        commands.append(command)
        Path(command[-1]).write_text("built")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(runtime.subprocess, "run", run)
    return commands


def batch_of(manifest, stage, size):
    inputs = manifest.stages[stage].inputs
    return {name: np.ones((size, *spec.shape), spec.dtype) for name, spec in inputs.items()}


def open_stage(exported, stage=0, threads=1):
    manifest, folder, _ = exported
    return ExecuTorch(folder.joinpath, manifest, stage, threads)


def test_it_is_built_once(cache, builds):
    first = runtime.built()
    assert runtime.built() == first
    assert len(builds) == 1
    assert list(cache.iterdir()) == [first]


def test_other_sources_are_another_library(cache, builds, monkeypatch):
    first = runtime.built()
    monkeypatch.setattr(runtime, "_FLAGS", (*runtime._FLAGS, "-g"))
    second = runtime.built()
    monkeypatch.setattr(runtime, "_SOURCES", runtime._SOURCES[:2])
    assert len({first, second, runtime.built()}) == len(builds) == 3


def test_two_may_build_at_once(cache, builds, monkeypatch):
    barrier, run = threading.Barrier(2), runtime.subprocess.run

    def together(command, **options):
        barrier.wait(10)
        return run(command, **options)

    monkeypatch.setattr(runtime.subprocess, "run", together)
    threads = [threading.Thread(target=runtime.built) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 2
    assert [path.read_text() for path in cache.iterdir()] == ["built"]


def test_a_missing_compiler_is_said_in_one_line(cache, monkeypatch):
    monkeypatch.setattr(runtime.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="no C\\+\\+ compiler") as caught:
        runtime.built()
    assert "g++" in caught.value.hint


def test_a_compiler_that_fails_is_said_in_one_line(cache, tmp_path, monkeypatch):
    program = tmp_path / "broken"
    program.write_text("#!/bin/sh\necho noise\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    with pytest.raises(UserError, match="error: no such thing") as caught:
        runtime.built()
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(runtime.platformdirs, "user_cache_path", lambda name: tmp_path / "file" / name)
    with pytest.raises(UserError, match="cannot be built in"):
        runtime.built()


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "not installed"), ("1.0.0", "1.0.0 is installed"), (runtime.VERSION, "no C")],
)
def test_a_wheel_that_is_not_the_one(tmp_path, monkeypatch, version, message):
    class Found:
        def __init__(self, _name):
            if version is None:
                raise importlib.metadata.PackageNotFoundError
            self.version = version

        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(runtime.importlib.metadata, "distribution", Found)
    with pytest.raises(UserError, match=message):
        runtime.wheel()
    runtime.library.cache_clear()
    with pytest.raises(UserError, match=message):
        ExecuTorch.check()


@pytest.mark.parametrize("content", [None, b"", b"not a program", b"x" * 5000])
def test_a_file_that_is_no_program_is_said_in_one_line(exported, tmp_path, content, capfd):
    if content is not None:
        (tmp_path / "x.pte").write_bytes(content)
    with pytest.raises(GraphError, match=r"x\.pte cannot be loaded") as caught:
        runtime.Program(tmp_path / "x.pte", 1)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_half_a_program_is_refused(exported, tmp_path, share):
    manifest, folder, _ = exported
    content = (folder / manifest.stages[0].engines["executorch"]["program"]).read_bytes()
    (tmp_path / "x.pte").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(GraphError, match=r"x\.pte"):
        runtime.Program(tmp_path / "x.pte", 1).takes("train")


def test_another_stages_program_is_refused(exported):
    manifest, folder, values = exported
    other = folder / manifest.stages[1].engines["executorch"]["program"]
    with pytest.raises(GraphError, match="not the program of this stage"):
        ExecuTorch(lambda _: other, manifest, 0, 1).load(values)


def test_batches_up_to_the_bound(exported):
    manifest, _, values = exported
    with open_stage(exported) as engine:
        engine.load(values)
        for size in (BOUND, 1, 3):
            assert np.isfinite(engine.train_step(batch_of(manifest, 0, size), 1e-3))
            assert np.isfinite(engine.evaluate(batch_of(manifest, 0, size))["loss"])
        for call in (engine.evaluate, lambda batch: engine.train_step(batch, 0.1)):
            with pytest.raises(UserError, match=f"{BOUND + 1} examples.* {BOUND} at most") as caught:
                call(batch_of(manifest, 0, BOUND + 1))
            assert "--max-batch-size" in caught.value.hint


def test_what_does_not_fit_is_told(exported):
    manifest, _, values = exported
    batch = batch_of(manifest, 0, 2)
    wrong = [
        batch | {"image": batch["image"][:, :2]},
        batch | {"image": batch["image"][0]},
        batch | {"image": batch["image"][:1]},
        batch_of(manifest, 0, 0),
        batch | {"text": batch["text"] + 1000},  # no such token
        batch | {"text": batch["text"] - 1000},
    ]
    with open_stage(exported) as engine:
        engine.load(values)
        for one in wrong:
            with pytest.raises((LocalError, GraphError)):
                engine.train_step(one, 1e-3)
        with pytest.raises(LocalError, match="other shapes"):
            engine.load(values | {"head.log_scale": np.zeros((2,), np.float32)})


def test_a_segment_follows_torch(exported):
    manifest, folder, values = exported
    graph = manifest.stages[0].segments["image"]
    run = ExecuTorch.open_graph(folder / ExecuTorch.graph_file(graph), graph, 2)
    most = manifest.segment_batch_size
    image = np.random.default_rng(0).normal(size=(most, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        model = small(image_blocks=2)
        expected = model.encoders["image"].section(0, 1, stem=True)(torch.from_numpy(image)).numpy()
    for size in (most, 1):
        got = run({"image": image[:size]}, values)["features"]
        np.testing.assert_allclose(got, expected[:size], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=f"{most} at most"):
        run({"image": np.concatenate([image, image])}, values)


def test_one_process_may_use_several_numbers_of_threads(exported):
    manifest, _, values = exported
    batch = batch_of(manifest, 1, BOUND)
    results = []
    for threads in (1, 2, 1, 3):
        with open_stage(exported, 1, threads) as engine:
            engine.load(values)
            engine.train_step(batch, 1e-3)
            results.append(engine.parameters())
    for name, value in results[0].items():
        for other in results[1:]:
            np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=1e-6)


def test_a_device_never_loads_torch(exported):
    _, folder, _ = exported
    program = f"""
import sys
from pathlib import Path
import numpy as np
from edge_client.engines.executorch import ExecuTorch
from wire.manifest import decode_manifest
from wire.tensors import unpack_file
folder = Path({str(folder)!r})
manifest = decode_manifest((folder / "manifest.json").read_bytes())
shapes = {{name: parameter.shape for name, parameter in manifest.parameters.items()}}
values = unpack_file(folder / manifest.initial, shapes)
with ExecuTorch(folder.joinpath, manifest, 0, 1) as engine:
    engine.load(values)
    inputs = manifest.stages[0].inputs
    batch = {{name: np.ones((2, *spec.shape), spec.dtype) for name, spec in inputs.items()}}
    assert np.isfinite(engine.train_step(batch, 1e-3))
assert not {{"torch", "onnx", "executorch"}} & set(sys.modules)
assert "libtorch" not in Path("/proc/self/maps").read_text()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
