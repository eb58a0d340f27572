"""What a device installs: environments with the client only, made from the wheel by pip."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from programs import CLIENTS, Programs, Started

from aggregator.events import RunClosed, UpdateAccepted
from edge_client.engines import open_engine
from export.parity import parameter_error
from lamina.identity.certificates import public_pem
from wire.manifest import read_manifest
from wire.tensors import unpack_file

ROOT = Path(__file__).parents[2]
RATE = 1e-3

TRAIN = """
import json, sys
from pathlib import Path
import numpy as np
from edge_client.engines import open_engine
from wire.manifest import read_manifest
from wire.tensors import pack, unpack_file

bundle, batches, out = map(Path, sys.argv[1:])
manifest, _ = read_manifest(bundle)
values = unpack_file(bundle / manifest.initial, {n: p.shape for n, p in manifest.parameters.items()})
with np.load(batches) as file:
    arrays = dict(file)
with open_engine("onnx", bundle.joinpath, manifest, 0, threads=2) as engine:
    engine.load(values)
    for number in range(3):
        engine.train_step({name: arrays[f"{name}.{number}"] for name in manifest.stages[0].inputs}, 1e-3)
    out.write_bytes(pack(engine.parameters()))
import onnxruntime
print(json.dumps([onnxruntime.__version__, sorted({"torch", "onnx"} & set(sys.modules))]))
"""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(out), str(ROOT))
    (built,) = out.glob("*.whl")
    return built


def pip(python: str, *arguments: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def environment(folder: Path, *packages: str) -> str:
    """The Python of a new environment with these packages."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    pip(python, "install", *packages)
    return python


@pytest.fixture(scope="session")
def client_python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> str:
    return environment(tmp_path_factory.mktemp("client") / "venv", f"{wheel}[client]")


def test_an_environment_with_the_client_alone_takes_part(
    programs: Programs, broker: Started, client_python: str
) -> None:
    aggregator = programs.aggregator(broker.url, "run", "--min-available-clients", "2")
    programs.client(broker.url, CLIENTS[0], python=client_python)
    programs.client(broker.url, CLIENTS[1], "run", "--engine", "ort-training")
    closed = aggregator.until_a(RunClosed)
    assert closed.engine == "onnx,ort-training"
    updates = [event.client for event in aggregator.all(UpdateAccepted)]
    assert updates.count(CLIENTS[0]) == updates.count(CLIENTS[1]) == closed.total.rounds == 4
    listed = subprocess.run(
        [client_python, "-m", "pip", "list", "--format", "json"], capture_output=True, check=True
    )
    installed = {one["name"] for one in json.loads(listed.stdout)}
    assert "onnxruntime" in installed
    assert installed.isdisjoint({"torch", "onnx", "onnxruntime-training-cpu", "executorch"})


def test_a_missing_runtime_is_said_in_one_line(client_python: str, data: Path, tmp_path: Path) -> None:
    command = [client_python, "-m", "lamina", "client", "--broker", "mqtt://127.0.0.1:9"]
    command += ["--data", str(data / "clients" / CLIENTS[0]), "--dir", str(tmp_path / "client")]
    done = subprocess.run(
        [*command, "--engine", "executorch"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "the engine executorch cannot run here" in done.stderr
    assert "pip install 'lamina[executorch]'" in done.stderr


def test_a_missing_cryptography_is_said_in_one_line(client_python: str, data: Path, tmp_path: Path) -> None:
    """A client that is to check an owner's signature does not start without the means."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()
    (tmp_path / "owner.pub").write_bytes(public_pem(key))
    command = [client_python, "-m", "lamina", "client", "--broker", "mqtt://127.0.0.1:9"]
    command += ["--data", str(data / "clients" / CLIENTS[0]), "--dir", str(tmp_path / "client")]
    command += ["--owner", str(tmp_path / "owner.pub")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot be checked without cryptography" in done.stderr
    assert 'pip install "lamina[identity]"' in done.stderr


@pytest.mark.parametrize("version", ["oldest", "newest"])
def test_the_oldest_and_the_newest_runtime_compute_the_same(
    bundle: Path, wheel: Path, client_python: str, tmp_path: Path, version: str
) -> None:
    python = client_python
    if version == "oldest":
        python = environment(tmp_path / "venv", f"{wheel}[client]", "onnxruntime==1.17.0", "numpy<2")
    manifest, _ = read_manifest(bundle)
    stage = manifest.stages[0]
    generator = np.random.default_rng(0)
    batches = [
        {
            name: generator.integers(0, 20, (size, *spec.shape))
            if spec.dtype == "int64"
            else np.abs(generator.normal(size=(size, *spec.shape))).astype(np.float32)
            for name, spec in stage.inputs.items()
        }
        for size in (6, 6, 2)
    ]
    named = {f"{name}.{number}": value for number, one in enumerate(batches) for name, value in one.items()}
    np.savez(tmp_path / "batches.npz", **named)
    done = subprocess.run(
        [
            python,
            "-c",
            TRAIN,
            str(bundle),
            str(tmp_path / "batches.npz"),
            str(tmp_path / "after.safetensors"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found, loaded = json.loads(done.stdout)
    assert (found == "1.17.0") == (version == "oldest")
    assert loaded == []
    values = unpack_file(bundle / manifest.initial, {n: p.shape for n, p in manifest.parameters.items()})
    with open_engine("ort-training", bundle.joinpath, manifest, 0) as engine:
        engine.load(values)
        for batch in batches:
            engine.train_step(batch, RATE)
        expected = engine.parameters()
    got = unpack_file(tmp_path / "after.safetensors", {n: v.shape for n, v in expected.items()})
    assert max(parameter_error(got[name], expected[name], RATE) for name in expected) < 1e-3
