"""Where a client's memory goes: resident memory after each thing that a client does before it has trained.

Rules: each step is a process of its own that does everything up to there, so nothing that an earlier
measurement left behind counts. What is done is what `edge_client/session.py` does, without a connection,
the cache's pass and the update. AdamW's moments are zeros that take memory when the first step writes them.

    python benchmarks/breakdown.py '{"bundle": ..., "stage": 1, ...}'    # one step, as JSON

Next: `edge_client/engines/onnx.py`, where most of it is.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from scale import SEED, Scale, exported, run_python

STEPS = (
    "Python",
    "numpy",
    "runtime",
    "client's imports",
    "data set opened",
    "session opened",
    "parameters loaded",
    "after a step",
    "after four steps",
)
LAMINA = (
    "import edge_client.session; from edge_client.engines import ENGINES, choose; choose({!r}, ENGINES)"
)
RUNTIMES = {
    "onnx": LAMINA.format("onnx"),
    "executorch": LAMINA.format("executorch"),
    "flower": """
import torch
import flwr.clientapp, flwr.serverapp, flwr.supernode.runtime.run_clientapp
import inputs.dataset, models.registry, wire.manifest
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports what PyTorch imports at first use
""",
}
PEAK = "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"


def bare(runtime: str, python: str = sys.executable) -> dict[str, Any]:
    """MB of a process that has imported what a client of this runtime needs, and done nothing."""
    run_python("-c", RUNTIMES[runtime], python=python)  # compiles and builds what is not there yet
    kilobytes = int(run_python("-c", f"{RUNTIMES[runtime]}\n{PEAK}", python=python))
    return {"peak_mb": kilobytes * 1024 / 1e6}


def measure_breakdown(scale: Scale, schedule: str, stage: int, data: Path, out: Path) -> dict[str, Any]:
    """Every step of a stage, from 0: `steps` name -> resident and peak MB."""
    bundle = exported(scale, schedule, data, out)
    offered = out / f"breakdown-{schedule}-{stage}.safetensors"
    offered.write_bytes(trained_groups(bundle, stage))
    work = {
        "bundle": str(bundle),
        "offered": str(offered),
        "data": str(next(iter(sorted((data / "clients").iterdir())))),
        "cache": str(out / "breakdown-inputs"),
        "stage": stage,
        "batch_size": scale.batch_size,
        "threads": scale.threads,
    }
    steps = {}
    for name in (
        "data set opened",
        *STEPS,
    ):  # once to fill the cache of inputs, as any later start finds it
        steps[name] = json.loads(run_python(__file__, json.dumps(work | {"until": name})))
    return {"steps": {name: steps[name] for name in STEPS}, "peak_mb": steps[STEPS[-1]]["peak_mb"]}


def trained_groups(bundle: Path, stage: int) -> bytes:
    """What a client fetches for a stage: the initial values of all that trains in it."""
    from wire.manifest import read_manifest
    from wire.tensors import pack, unpack_file

    manifest, _ = read_manifest(bundle)
    shapes = {name: parameter.shape for name, parameter in manifest.parameters.items()}
    values = unpack_file(bundle / manifest.initial, shapes)
    return pack({name: values[name] for name in manifest.names_of(manifest.stages[stage].trainable)})


def memory() -> dict[str, float]:
    """Of this process, MB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")

    def of(field: str) -> float:
        return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6

    return {"resident_mb": of("VmRSS"), "peak_mb": of("VmHWM")}


def take_steps(work: dict[str, Any]) -> dict[str, float]:
    """All up to `work["until"]`, in this process; its memory then."""
    kept: dict[str, Any] = {}
    for name in STEPS:
        _ACTIONS[name](kept, work)
        if name == work["until"]:
            break
    return memory()


def _import_numpy(_kept: dict[str, Any], _work: dict[str, Any]) -> None:
    import numpy  # noqa: F401


def _import_runtime(_kept: dict[str, Any], _work: dict[str, Any]) -> None:
    from edge_client.engines import choose

    choose("onnx", ("onnx",))


def _import_client(_kept: dict[str, Any], _work: dict[str, Any]) -> None:
    import edge_client.session  # noqa: F401


def _open_data(kept: dict[str, Any], work: dict[str, Any]) -> None:
    from inputs.dataset import Dataset
    from wire.manifest import read_manifest

    bundle = Path(work["bundle"])
    manifest, _ = read_manifest(bundle)
    kept["manifest"] = manifest
    kept["dataset"] = Dataset.open(
        Path(work["data"]),
        manifest.modalities,
        manifest.task,
        manifest.classes,
        bundle.joinpath,
        cache=Path(work["cache"]),
    )


def _open_session(kept: dict[str, Any], work: dict[str, Any]) -> None:
    """The session alone; loading an engine opens it anew, in place of this one."""
    from edge_client.engines import onnx_runtime

    stage = kept["manifest"].stages[work["stage"]]
    path = Path(work["bundle"]) / stage.engines["onnx"]["train"]
    if work["until"] == "session opened":
        kept["session"] = onnx_runtime.open_session(path, work["threads"])


def _load(kept: dict[str, Any], work: dict[str, Any]) -> None:
    from edge_client.engines import open_engine
    from wire.tensors import unpack_file

    bundle, manifest = Path(work["bundle"]), kept["manifest"]
    shapes = manifest.shapes_of(manifest.stages[work["stage"]].trainable)
    values = unpack_file(Path(work["offered"]), shapes)
    kept["offered"] = values  # a client keeps them: its update is the difference
    kept["engine"] = open_engine("onnx", bundle.joinpath, manifest, work["stage"], work["threads"])
    kept["engine"].load(values)


def _step(kept: dict[str, Any], work: dict[str, Any], *, count: int) -> None:
    """Steps on the client's first examples; a frozen prefix's features are random numbers."""
    import numpy as np

    generator, dataset = np.random.default_rng(SEED), kept["dataset"]
    specs, size = kept["manifest"].stages[work["stage"]].inputs, min(work["batch_size"], len(dataset))
    raw = {
        name: spec
        for modality in dict(kept["manifest"].modalities).values()
        for name, spec in modality.inputs.items()
    }
    read = {name for name, spec in specs.items() if raw.get(name) == spec}
    for _ in range(count):
        batch = dataset.batch(range(size), read)
        for name in specs.keys() - read:
            batch[name] = generator.standard_normal((size, *specs[name].shape), np.float32)
        kept["engine"].train_step(batch, 1e-3)


def _nothing(_kept: dict[str, Any], _work: dict[str, Any]) -> None:
    pass


_ACTIONS = dict(
    zip(
        STEPS,
        (
            _nothing,
            _import_numpy,
            _import_runtime,
            _import_client,
            _open_data,
            _open_session,
            _load,
            partial(_step, count=1),
            partial(_step, count=3),
        ),
        strict=True,
    )
)

if __name__ == "__main__":
    print(json.dumps(take_steps(json.loads(sys.argv[1]))))
