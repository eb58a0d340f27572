"""The row of what a user would otherwise take: Flower and PyTorch, every parameter, in real processes.

Rules: an environment of its own (Flower's requirements exclude some of Lamina's), a SuperLink, for each
client a SuperNode that starts its ClientApp in a process of its own, as Flower does by default. Bytes are
counted by a relay between SuperNode and SuperLink, so both ways, with HTTP's headers. A client's memory is
its ClientApp process's high-water mark; the SuperNode and SuperExec beside it are told apart. Its
processor seconds are those of all three. A round costs what any other does, so the first few may stand for
all; then there is no recall.

Next: `benchmarks/flower_app/lamina_flower/client.py`, what runs in the ClientApp.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flops import client_flops
from relay import Relay, free_port, listens
from scale import ROOT, SEED, Scale, exported, run_python

APP = ROOT / "benchmarks" / "flower_app"
PACKAGES = ("torch==2.13.0", "flwr==1.42.0", "numpy", "msgspec", "pillow", "safetensors", "sentencepiece")
SILENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
START_S = 60.0
CONFIG = """[superlink]
default = "benchmark"

[superlink.benchmark]
address = "127.0.0.1:{port}"
insecure = true
"""


def environment(out: Path) -> Path:
    """The `bin` folder of an environment with Flower, torch and this tree; made once."""
    folder = out / "flower-venv"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *PACKAGES], check=True, cwd=out
        )
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "lamina-tree.pth").write_text(f"{ROOT}\n", encoding="utf-8")
        (folder / "ready").touch()
    return folder / "bin"


def measure_flower(scale: Scale, data: Path, out: Path, max_rounds: int) -> dict[str, Any]:
    """End-to-end training by Flower, as of the row `end-to-end`. max_rounds: to run; bytes and seconds are
    those of all rounds all the same. Raises RuntimeError where it fails.
    """
    from aggregator.plan import RunPlan
    from wire.messages import RoundKey

    programs = environment(out)
    bundle = exported(scale, "end_to_end", data, out)
    folder = out / "runs" / f"{scale.model}-flower"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "home").mkdir(parents=True)
    plan = RunPlan(
        local_epochs=scale.local_epochs,
        batch_size=scale.batch_size,
        learning_rate=scale.learning_rate,
        seed=SEED,
    )
    rounds = scale.rounds_of("end_to_end")
    run = min(rounds, max_rounds)
    plans = [plan.train_plan(RoundKey(0, number), rounds) for number in range(run)]
    work = {
        "bundle": str(bundle.resolve()),
        "data": str(data.resolve()),
        "out": str(folder.resolve()),
        "num_clients": scale.clients,
        "learning_rates": [one.learning_rate for one in plans],
        "seeds": [one.seed for one in plans],
        "local_epochs": scale.local_epochs,
        "batch_size": scale.batch_size,
        "threads": scale.threads,
    }
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
    clients = sorted(path.name for path in (data / "clients").iterdir())
    used = conduct(programs, folder, clients)
    server = json.loads((folder / "server.json").read_text(encoding="utf-8"))
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("usage/*.json"))]
    metrics = evaluated(bundle, folder, data) if run == rounds else {}
    share = rounds / run / len(clients)
    examples = sum(len(path.read_bytes().splitlines()) - 1 for path in data.glob("clients/*/table.csv"))
    return {
        "title": "Flower and PyTorch, end-to-end",
        "rounds": rounds,
        "rounds_run": run,
        "clients": len(clients),
        "round_s": [server["seconds"]],
        "mean_round_s": sum(server["seconds"]) / run,
        "wall_s": sum(server["seconds"]) * rounds / run,
        "losses": server["losses"],
        "peak_mb": max(note["peak_rss_bytes"] for note in notes) / 1e6,
        "beside_mb": max(used[client]["beside_mb"] for client in clients),
        "bytes_up": sum(used[client]["up"] for client in clients) * share,
        "bytes_down": sum(used[client]["down"] for client in clients) * share,
        "cpu_s": sum(used[client]["cpu_s"] for client in clients) * share,
        "train_cpu_s": sum(note["cpu_s"] for note in notes) * share,
        "train_s": sum(note["seconds"] for note in notes) * share,
        "flops": client_flops(scale, "end_to_end", examples / len(clients), cached=True),
        "recall": metrics.get("recall@10"),
        "chance": metrics.get("chance@10"),
        "metrics": metrics,
        "packages": versions(programs),
    }


def conduct(programs: Path, folder: Path, clients: list[str]) -> dict[str, dict[str, float]]:
    """Run all processes until the ServerApp has written its result. client -> what it has used."""
    port = free_port()
    (folder / "home" / "config.toml").write_text(CONFIG.format(port=port), encoding="utf-8")
    with contextlib.ExitStack() as stack:

        def start(program: str, *arguments: str, log: str) -> subprocess.Popen[bytes]:
            return stack.enter_context(started(programs, folder, log, program, *arguments))

        link = start(
            "flower-superlink",
            *("--insecure", "--port", str(port), "--disable-runtime-dependency-installation"),
            log="superlink",
        )
        until_open(port, link, folder / "superlink.log")
        relays, nodes = {}, {}
        for client in clients:
            relays[client] = stack.enter_context(Relay(port))
            arguments = ["--insecure", "--superlink", f"127.0.0.1:{relays[client].port}"]
            arguments += ["--port", str(free_port()), "--node-config", f'client="{client}"']
            nodes[client] = start("flower-supernode", *arguments, log=client)
        config = f'work="{(folder / "work.json").resolve()}"'
        run = start("flwr", "run", str(APP), "benchmark", "--stream", "-c", config, log="run")
        while not (folder / "server.json").exists():
            if run.poll() is not None or link.poll() is not None:
                time.sleep(1.0)
                if not (folder / "server.json").exists():
                    raise RuntimeError(f"Flower's run has ended without a result, see {folder}")
            time.sleep(0.2)
        used = {}
        for client, node in nodes.items():
            cpu_s, beside_mb = of_session(node.pid)
            relay = relays[client]
            used[client] = {"up": relay.up, "down": relay.down, "cpu_s": cpu_s, "beside_mb": beside_mb}
        return used


@contextlib.contextmanager
def started(programs: Path, folder: Path, name: str, program: str, *arguments: str) -> Iterator[Any]:
    """A program in a session of its own, all of which is ended on leaving."""
    home = str((folder / "home").resolve())
    path = f"{programs.resolve()}{os.pathsep}{os.environ['PATH']}"
    variables = os.environ | SILENT | {"FLWR_HOME": home, "PATH": path}
    variables.pop("PYTHONPATH", None)
    with (folder / f"{name}.log").open("wb") as log:
        child = subprocess.Popen(
            [programs.resolve() / program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=variables,
            cwd=folder,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def until_open(port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    """Return once something listens. Raises RuntimeError."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and child.poll() is None:
        if listens(port):
            return
        time.sleep(0.2)
    raise RuntimeError(f"Flower's SuperLink does not start, see {log}")


def of_session(session: int) -> tuple[float, float]:
    """Processor seconds of a session's processes and the ended ones among them; the sum of the living
    processes' peak memory in MB, ClientApps left out.
    """
    ticks, seconds, beside_mb = os.sysconf("SC_CLK_TCK"), 0.0, 0.0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            seconds += sum(map(int, fields[11:15])) / ticks  # own and waited-for: user, system
            if "flwr-clientapp" not in (process / "cmdline").read_text():
                status = (process / "status").read_text()
                beside_mb += int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
        except (OSError, IndexError):
            continue  # it has ended meanwhile
    return seconds, beside_mb


def evaluated(bundle: Path, folder: Path, data: Path) -> dict[str, float]:
    """`lamina evaluate` of what Flower has trained."""
    from safetensors.numpy import load_file

    from export.final import write_final

    write_final(bundle, load_file(folder / "final.safetensors"), folder / "model", force=True)
    command = ("-m", "lamina", "evaluate", str(folder / "model"), "--data", str(data / "holdout"), "--json")
    metrics: dict[str, float] = json.loads(run_python(*command))
    return metrics


def versions(programs: Path) -> dict[str, str]:
    """Of the packages that matter, in Flower's environment."""
    code = "import flwr, torch; print(flwr.__version__, torch.__version__)"
    found = run_python("-c", code, python=str(programs / "python")).split()
    return dict(zip(("flwr", "torch"), found, strict=True))
