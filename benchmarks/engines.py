"""Step time, peak memory and size of every engine, beside eager torch on the same step.

Each figure comes from a process of its own, which imports what a client imports. The engines take turns,
so that what else the machine does meets all alike; a figure is the median of the repeats, each the median
of its steps. Peak memory is the process's high-water mark after all steps (`VmHWM`), imports included.

    python benchmarks/engines.py
    python benchmarks/engines.py --size vit-tiny:32 --threads 1 --repeats 5
    python benchmarks/engines.py --size vit-tiny:32 --micro-batch-size 0 --micro-batch-size 8
    python benchmarks/engines.py --python onnx=/other/venv/bin/python    # with another ONNX Runtime

A step is one AdamW step of a layer-wise stage in the middle: one block of each encoder, and the head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

SIZES = ("tiny:32", "small:32", "vit-tiny:8", "vit-tiny:32")  # preset:batch
STAGE = 1
WARM_UP = 2
TORCH = "torch"
LINE = "{:<12} {:>7} {:>6}  {:<13}{:>7}{:>7}{:>7}{:>7}{:>7}  {}"


def main() -> None:
    """Measure, and print a table."""
    from edge_client.engines import ENGINES, available

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", action="append", help=f"PRESET:BATCH [default: {' '.join(SIZES)}]")
    parser.add_argument("--threads", action="append", type=int, help="[default: 1 and 2]")
    parser.add_argument("--engine", action="append", choices=[TORCH, *ENGINES], help="[default: all]")
    parser.add_argument("--micro-batch-size", action="append", type=int, help="[default: 0, none]")
    parser.add_argument("--steps", type=int, default=8, help="of a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(**json.loads(options.child))))
        return
    engines = options.engine or [TORCH, *available()]
    pythons = dict(pair.split("=", 1) for pair in options.python)
    print("a step of one block of each encoder and the head; ms and MB, and their ratio to eager torch's")
    print(
        LINE.format("size", "threads", "micro", "engine", "step", "ratio", "peak", "ratio", "kB", "runtime")
    )
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as folder:
        for size in options.size or SIZES:
            preset, batch = size.split(":")
            for micro in options.micro_batch_size or (0,):
                bundle = exported(preset, Path(folder) / f"{preset}-{micro}", int(batch), micro, engines)
                for threads in options.threads or (1, 2):
                    table(size, bundle, micro, threads, engines, pythons, options)


def table(
    size: str,
    bundle: Path,
    micro: int,
    threads: int,
    engines: list[str],
    pythons: dict[str, str],
    options: Any,
) -> None:
    """Measure every engine in turn, and print one line each."""
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for _ in range(options.repeats):
        for engine in engines:
            work = {
                "engine": engine,
                "bundle": str(bundle),
                "preset": size.split(":")[0],
                "batch": int(size.split(":")[1]),
                "threads": threads,
                "steps": options.steps,
            }
            command = [pythons.get(engine, sys.executable), __file__, "--child", json.dumps(work)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                sys.exit(f"{engine} at {size}:\n{done.stderr}")
            found[engine].append(json.loads(done.stdout.splitlines()[-1]))

    def median(engine: str, figure: str) -> float:
        return statistics.median(result[figure] for result in found[engine])

    for engine in engines:
        step, peak = median(engine, "step_ms"), median(engine, "peak_mb")
        ratios = (
            [step / median(TORCH, "step_ms"), peak / median(TORCH, "peak_mb")] if TORCH in found else [0, 0]
        )
        one = found[engine][0]
        kilobytes = f"{one['kilobytes']:.0f}" if one["kilobytes"] else "-"
        note = ", WITH TORCH IN THE PROCESS" if one["torch"] and engine != TORCH else ""
        figures = [f"{step:.1f}", f"{ratios[0]:.2f}", f"{peak:.0f}", f"{ratios[1]:.2f}", kilobytes]
        print(LINE.format(size, threads, micro or "-", engine, *figures, one["runtime"] + note), flush=True)


def exported(preset: str, folder: Path, batch: int, micro: int, engines: list[str]) -> Path:
    """A bundle of the preset for these engines, made once."""
    from export.bundle import export_bundle
    from export.schedules import layerwise
    from models.registry import build

    if not folder.exists():
        texts = [f"{'abcdefghij'[i % 10] * (i % 7 + 1)} {i}" for i in range(400)]
        model = build(preset, image_blocks=3, text_blocks=3)
        schedule = layerwise(model.depths, 1)
        export_bundle(
            model,
            schedule,
            folder,
            texts=texts,
            engines=[engine for engine in engines if engine != TORCH],
            max_batch_size=max(64, batch),
            micro_batch_sizes=[micro] * len(schedule.stages),
        )
    return folder


def measure(engine: str, bundle: str, preset: str, batch: int, threads: int, steps: int) -> dict[str, Any]:
    """In a process of its own: the median step, the high-water mark, and what has been loaded."""
    import numpy as np

    from wire.manifest import read_manifest

    manifest, _ = read_manifest(Path(bundle))
    generator = np.random.default_rng(0)
    inputs = {
        name: np.ones((batch, *spec.shape), np.float32)
        if name.endswith("_mask")
        else generator.normal(size=(batch, *spec.shape)).astype(spec.dtype)
        for name, spec in manifest.stages[STAGE].inputs.items()
    }
    opened = torch_step if engine == TORCH else engine_step
    step, names, runtime = opened(engine, Path(bundle), preset, threads)
    times = []
    for _ in range(WARM_UP + steps):
        begin = time.perf_counter()
        step(inputs)
        times.append(time.perf_counter() - begin)
    status = Path("/proc/self/status").read_text()
    return {
        "step_ms": 1000 * statistics.median(times[WARM_UP:]),
        "peak_mb": int(status.split("VmHWM:")[1].split()[0]) / 1000,
        "kilobytes": sum(manifest.files[name].size_bytes for name in names) / 1000,
        "torch": "libtorch" in Path("/proc/self/maps").read_text(),
        "runtime": runtime,
    }


def engine_step(
    engine: str, bundle: Path, _preset: str, threads: int
) -> tuple[Callable[[Any], Any], list[str], str]:
    """The step, the files of the bundle that it needs, and the runtime's version."""
    import importlib.metadata

    from edge_client.engines import open_engine
    from wire.manifest import read_manifest
    from wire.tensors import unpack_file

    manifest, _ = read_manifest(bundle)
    shapes = {name: parameter.shape for name, parameter in manifest.parameters.items()}
    values = unpack_file(bundle / manifest.initial, shapes)
    trained = set(manifest.stages[STAGE].parameters.values())
    opened = open_engine(engine, bundle.joinpath, manifest, STAGE, threads)
    opened.load({name: value for name, value in values.items() if name in trained})
    runtimes = ("executorch",) if engine == "executorch" else ("onnxruntime", "onnxruntime-training-cpu")
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    versions = [f"{name} {installed[name]}" for name in runtimes if name in installed]
    files = list(manifest.stages[STAGE].engines[engine].values())
    return lambda batch: opened.train_step(batch, 1e-3), files, ", ".join(versions)


def torch_step(
    _engine: str, _bundle: Path, preset: str, threads: int
) -> tuple[Callable[[Any], Any], list[str], str]:
    """As `engine_step`, in eager torch."""
    import torch

    from export.schedules import layerwise
    from export.stage import cut_stages
    from models.registry import build

    torch.set_num_threads(threads)
    model = build(preset, image_blocks=3, text_blocks=3)
    cut = cut_stages(model, layerwise(model.depths, 1).stages)[STAGE].train
    optimizer = torch.optim.AdamW(cut.parameters())

    def step(batch: Any) -> float:
        optimizer.zero_grad()
        loss = cut(*(torch.from_numpy(batch[name]) for name in cut.inputs))
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step, [], f"torch {torch.__version__}"


if __name__ == "__main__":
    main()
