"""`lamina run`, as a person types it: three schedules, one seed twice, another broker, a killed client."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import CLIENTS, Mosquitto, lamina
from safetensors.numpy import load_file

from edge_client.engines import ENGINES, graph_file
from export.parity import parameter_error
from lamina.evaluation import AT
from models.load import load
from wire.manifest import read_manifest

OPTIONS = {"size": 16, "patch": 4, "width": 64, "heads": 2, "image_blocks": 3, "text_blocks": 2}
OPTIONS |= {"vocabulary": 60, "length": 8, "embedding": 32}
MODEL = [word for name, value in OPTIONS.items() for word in ("--option", f"{name}={value}")]
LAYERWISE = ("--schedule", "layerwise")
RUN = ("--rounds", "2", "--batch-size", "8", "--threads", "1")

Run = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    """Run once for each set of options: the last line as JSON, and the run's folder.

    Each exports the small model anew, unless its options name a bundle.
    """
    known: dict[tuple[str, ...], tuple[dict[str, Any], Path]] = {}

    def run(name: str, *options: str) -> tuple[dict[str, Any], Path]:
        key = (name, *options)
        if key not in known:
            folder = tmp_path_factory.mktemp("work")
            words = ("--json", "--data", str(data), "--dir", str(folder), "--name", name, *RUN, *options)
            result = lamina("run", *words, *(() if "--bundle" in options else MODEL))
            assert result.returncode == 0, result.stderr
            known[key] = json.loads(result.stdout.splitlines()[-1]), folder / "runs" / name
        return known[key]

    return run


@pytest.fixture
def exported(run: Run) -> tuple[str, str]:
    """Options of one more run with the bundle that the layer-wise one has exported."""
    return "--bundle", str(run("layerwise", *LAYERWISE)[1] / "bundle")


@pytest.mark.parametrize(
    ("schedule", "num_stages"), [("layerwise", 3), ("progressive", 3), ("end_to_end", 1)]
)
def test_the_result_of_each_schedule(run: Run, schedule: str, num_stages: int) -> None:
    result, folder = run(schedule, "--schedule", schedule)
    assert result["schedule"] == schedule
    assert result["engine"] == "onnx"
    assert result["seed"] == 0
    assert len(result["stages"]) == num_stages
    wanted = {f"{name}@{k}" for name in ("recall", "chance", "image_to_text", "text_to_image") for k in AT}
    for figures in (*result["stages"], result["total"]):
        assert set(figures["metrics"]) == wanted
        assert figures["peak_rss_mb_per_client"] > 20
        assert figures["seconds"] > 0
        assert figures["bytes_sent_per_client"] > figures["update_bytes_per_client"] > 0
        assert figures["refusals"] == 0
    total = result["total"]
    assert total["metrics"] == result["stages"][-1]["metrics"]
    for name in ("bytes_sent_per_client", "bytes_received_per_client", "rounds", "updates"):
        assert total[name] == pytest.approx(sum(stage[name] for stage in result["stages"]), abs=num_stages)
    assert total["updates"] == 2 * num_stages * len(CLIENTS)
    assert Path(result["model"]) == folder / "aggregator" / "model"


def test_clients_with_different_engines_train_in_one_run(run: Run) -> None:
    """One client an engine: as good a model as of one engine, up to rounding."""
    mixed, folder = run("mixed", *LAYERWISE, *(w for name in ENGINES for w in ("--engine", name)))
    alike, other = run("layerwise", *LAYERWISE)
    assert mixed["engine"] == ",".join(sorted(ENGINES))
    assert mixed["total"]["updates"] == alike["total"]["updates"]
    assert mixed["total"]["refusals"] == 0
    for client, engine in zip(CLIENTS, ENGINES, strict=True):
        log = (folder / "logs" / f"{client}.log").read_text()
        assert f"engine {engine}" in log
        fetched = {path.name for path in (folder / "clients" / client / "blobs").iterdir()}
        assert fetched.isdisjoint(of_other_engines(folder / "bundle", engine)), engine
    theirs = load_file(other / "aggregator" / "model" / "model.safetensors")
    for name, value in load_file(folder / "aggregator" / "model" / "model.safetensors").items():
        assert parameter_error(value, theirs[name], 1e-3) < 1e-2, name
    for name in (f"recall@{k}" for k in AT):
        assert mixed["total"]["metrics"][name] == pytest.approx(alike["total"]["metrics"][name], abs=0.05)


def test_compressed_changes_in_both_directions(run: Run, exported: tuple[str, str]) -> None:
    """int8 for all that travels: a quarter of the bytes, about the same model, the same for everyone."""
    small, folder = run("small", *exported, "--compression", "int8", "--prefix-compression", "int8")
    whole, uncompressed = run("layerwise", *LAYERWISE)
    total, other = small["total"], whole["total"]
    assert (total["updates"], total["refusals"]) == (other["updates"], 0)
    assert total["raw_update_bytes_per_client"] == other["raw_update_bytes_per_client"]
    assert total["update_bytes_per_client"] < 0.3 * total["raw_update_bytes_per_client"]
    assert total["bytes_sent_per_client"] < 0.4 * other["bytes_sent_per_client"]
    trained, graphs = trained_bytes(uncompressed), 0
    for number, size in enumerate(trained):
        graphs = sum(_size(uncompressed, name) for name in _graphs_first_used(uncompressed, number))
        received = small["stages"][number]["bytes_received_per_client"] - graphs
        # Once, whole, in the first round of all; from then on changes only, also from stage to stage.
        assert received < (size if number == 0 else 0) + 0.35 * 2 * size + 40_000
    for client in CLIENTS:
        log = (folder / "logs" / f"{client}.log").read_text()
        assert "fetching it whole" not in log
        assert "cannot be used" not in log
    for name in (f"recall@{k}" for k in AT):
        assert total["metrics"][name] == pytest.approx(other["metrics"][name], abs=0.1)
    frozen = load_file(Path(small["model"]) / "model.safetensors")["image.blocks.0.attention.query.weight"]
    assert all(len(np.unique(np.abs(row))) <= 128 for row in frozen)
    assert all(len(np.unique(np.abs(row))) > 1 for row in frozen)


def _graphs_first_used(folder: Path, number: int) -> set[str]:
    """Files of the bundle that a client fetches in this stage, and did not have before."""
    manifest, _ = read_manifest(folder / "bundle")

    def used(stage: int) -> set[str]:
        segments = manifest.stages[stage - 1].segments.values() if stage else ()
        return {*manifest.stages[stage].engines["onnx"].values(), *(graph.file for graph in segments)}

    first = {"tokenizer.model"} if number == 0 else set()
    return (first | used(number)) - {name for stage in range(number) for name in used(stage)}


def _size(folder: Path, name: str) -> int:
    return (folder / "bundle" / name).stat().st_size


def of_other_engines(bundle: Path, engine: str) -> set[str]:
    """Hashes of the files that a client with this engine has no use for."""
    manifest, _ = read_manifest(bundle)
    wanted, all_files = set(), set()
    for stage in manifest.stages:
        for name, roles in stage.engines.items():
            all_files |= set(roles.values())
            wanted |= set(roles.values()) if name == engine else set()
        for graph in stage.segments.values():
            all_files |= {graph.file, graph.program or graph.file}
            wanted.add(graph_file(engine, graph))
    return {manifest.files[name].sha256 for name in all_files - wanted}


def trained_bytes(folder: Path) -> list[int]:
    manifest = json.loads((folder / "bundle" / "manifest.json").read_text())
    sizes = {name: 4 * int(np.prod(one["shape"])) for name, one in manifest["parameters"].items()}
    groups = {name: one["group"] for name, one in manifest["parameters"].items()}
    return [
        sum(sizes[name] for name in sizes if groups[name] in stage["trainable"])
        for stage in manifest["stages"]
    ]


@pytest.mark.parametrize("schedule", ["layerwise", "progressive", "end_to_end"])
def test_a_client_sends_the_trained_groups_and_next_to_nothing_else(run: Run, schedule: str) -> None:
    result, folder = run(schedule, "--schedule", schedule)
    for stage, size in zip(result["stages"], trained_bytes(folder), strict=True):
        assert size < stage["bytes_sent_per_client"] / stage["rounds"] < 1.03 * size


def test_layerwise_sends_less_than_the_others(run: Run) -> None:
    sent = {
        schedule: run(schedule, "--schedule", schedule)[0]["total"]["bytes_sent_per_client"]
        for schedule in ("layerwise", "progressive")
    }
    assert sent["layerwise"] < 0.75 * sent["progressive"]


def test_a_frozen_group_never_changes_again(run: Run) -> None:
    """Every stage's parameters after its last round are kept: what is frozen then is the final model's."""
    result, folder = run("layerwise", *LAYERWISE)
    final = load_file(Path(result["model"]) / "model.safetensors")
    manifest = json.loads((folder / "bundle" / "manifest.json").read_text())
    kept = [load_file(path) for path in (folder / "aggregator" / "blobs").iterdir()]
    for stage, after in zip(manifest["stages"], manifest["stages"][1:], strict=False):
        frozen = set(stage["trainable"]) & set(after["frozen"])
        names = [name for name, one in manifest["parameters"].items() if one["group"] in frozen]
        assert names
        trained = [blob for blob in kept if "head.log_scale" in blob and set(names) <= blob.keys()]
        assert any(all(np.array_equal(blob[name], final[name]) for name in names) for blob in trained)


def test_the_final_model_is_one_in_torch_too(run: Run, data: Path) -> None:
    result, _ = run("layerwise", *LAYERWISE)
    model = load(result["model"])
    assert model.depths == {"image": 3, "text": 2}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        image = torch.randn((4, 3, 16, 16), generator=generator)
        text = torch.randint(0, 40, (4, 8), generator=generator)
        loss = model({"image": image, "text": text, "text_mask": torch.ones(4, 8)})
    assert torch.isfinite(loss)
    found = lamina("evaluate", result["model"], "--data", str(data / "holdout"), "--json")
    assert json.loads(found.stdout) == pytest.approx(result["total"]["metrics"], abs=1e-6)


def test_one_seed_gives_the_same_bits_and_another_gives_others(run: Run) -> None:
    """The seed decides the export's initial parameters, too."""
    finals = [
        load_file(Path(run(name, *LAYERWISE, *options)[0]["model"]) / "model.safetensors")
        for name, options in (("layerwise", ()), ("once-more", ()), ("another", ("--seed", "1")))
    ]
    first, again, other = finals
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first if "norm" not in name)


def test_clients_with_less_room_than_they_need_train_the_same_model(
    run: Run, exported: tuple[str, str], tmp_path: Path
) -> None:
    """Each batch runs the prefix over its own views of the images; the memory is what it is, and said."""
    cramped = shutil.copytree(exported[1], tmp_path / "cramped")
    manifest = json.loads((cramped / "manifest.json").read_text())
    for stage in manifest["stages"]:
        stage["expected_peak_bytes"] = 10**6
    (cramped / "manifest.json").write_text(json.dumps(manifest))
    views = ("--augmentations", "2")
    kept, roomy = run("kept", *exported, *views, "--feature-dtype", "float32")
    computed, folder = run("computed", "--bundle", str(cramped), *views, "--max-feature-mb", "0")
    for client in CLIENTS:
        told = (folder / "logs" / f"{client}.log").read_text()
        assert told.count("each batch computes its own") == 4
        assert 1 <= told.count("MB of memory, 1 MB were expected") < 6, "not in every round"
        assert list((folder / "clients" / client / "features").iterdir()) == []
        assert "were expected" not in (roomy / "logs" / f"{client}.log").read_text()
    # What was frozen is fetched once, not again in each round, which would be a third more.
    received = [result["total"]["bytes_received_per_client"] for result in (computed, kept)]
    assert received[0] == pytest.approx(received[1], rel=0.15)
    one, other = (load_file(Path(result["model"]) / "model.safetensors") for result in (computed, kept))
    for name, value in other.items():
        assert parameter_error(one[name], value, 1e-3) < 1e-2, name


def test_a_local_run_starts_a_killed_client_again_and_leaves_nothing_behind(
    data: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "lamina",
        "run",
        "--data",
        str(data),
        "--dir",
        str(tmp_path),
        "--name",
        "r",
    ]
    command += [*RUN, *MODEL, "--local-epochs", "30"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    lines = []
    for line in running.stderr:
        lines.append(line)
        if line.startswith("stage 1 round 1 "):
            children = _children(running.pid)
            os.kill(next(pid for pid, words in children.items() if "bob" in words), signal.SIGKILL)
        if line.startswith("stage 1 round 2 "):
            break
    children = _children(running.pid)
    assert sorted(words[3] for words in children.values()) == ["aggregator", "broker", *["client"] * 3]
    assert "3 updates" in lines[-1]
    assert any("bob was killed (SIGKILL), starting it again" in line for line in lines)
    running.kill()  # the parent; its children find out
    running.wait()
    running.stderr.close()
    deadline = time.monotonic() + 20
    while (
        left := [pid for pid in children if Path(f"/proc/{pid}").exists()]
    ) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def test_motions_are_classified(tmp_path: Path) -> None:
    """From files of a watch to a final model that has learned what its hold-out shows."""
    generator = np.random.default_rng(0)
    for place in ("clients/ann", "clients/bob", "holdout"):
        folder = tmp_path / "data" / place
        folder.mkdir(parents=True)
        lines = ["accelerometer,gyroscope,label"]
        for number in range(24):
            label, moved = number % 3, generator.normal(scale=0.2, size=(8, 3))
            moved[:, label] += 2
            np.save(folder / f"{number}.npy", moved)
            np.savetxt(folder / f"{number}.csv", -moved[:6], delimiter=",", header="wx,wy,wz", comments="")
            lines.append(f"{number}.npy,{number}.csv,{'ABC'[label]}")
        (folder / "table.csv").write_text("\n".join(lines) + "\n")
    options = {"length": 8, "patch": 4, "width": 16, "heads": 2, "blocks": 1, "embedding": 8}
    words = ["--data", str(tmp_path / "data"), "--model", "watch", "--rounds", "6", "--json"]
    words += ["--dir", str(tmp_path / "work"), "--batch-size", "8", "--threads", "1", "--engine", "onnx"]
    words += ["--learning-rate", "0.01", "--option", "masked=true"]
    words += [word for name, value in options.items() for word in ("--option", f"{name}={value}")]
    done = lamina("run", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["total"]["metrics"]["chance"] == pytest.approx(1 / 3)
    assert result["total"]["metrics"]["accuracy"] > 0.9
    told = lamina("evaluate", result["model"], "--data", str(tmp_path / "data/holdout"), "--json")
    assert json.loads(told.stdout)["accuracy"] == pytest.approx(result["total"]["metrics"]["accuracy"])
    model = load(result["model"])
    assert (list(model.modalities), model.head.classes) == (["accelerometer", "gyroscope"], 3)


def test_a_client_with_unusable_data_ends_the_run_that_waits_for_it(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/clients/cy/images/3.png").write_bytes(b"not a picture")
    result = lamina("run", "--data", str(tmp_path / "data"), "--dir", str(tmp_path / "work"), *RUN, *MODEL)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("lamina: cy: ")
    assert "images/3.png cannot be read" in last


def _children(parent: int) -> dict[int, list[str]]:
    """Child processes that run, and their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"\nPPid:\t{parent}\n" in (path / "status").read_text():
                found[int(path.name)] = (path / "cmdline").read_text().split("\0")
    return found


@pytest.mark.parametrize("version", [4, 5])
def test_mosquitto_instead_of_the_embedded_broker(
    run: Run, exported: tuple[str, str], real_broker: Mosquitto, version: int
) -> None:
    """By address only, over MQTT 3.1.1 and 5, and with the same result."""
    url = f"{real_broker.url}?version={version}"
    result, _ = run(f"mosquitto-{version}", *exported, "--broker", url)
    embedded, _ = run("layerwise", *LAYERWISE)
    assert result["total"]["metrics"] == embedded["total"]["metrics"]
    ours, theirs = (load_file(Path(one["model"]) / "model.safetensors") for one in (result, embedded))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
