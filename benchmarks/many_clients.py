"""What an aggregator needs for many clients: the same rounds with 50 and with 200 of them, on mosquitto.

Rules: the aggregator is the real program in a process of its own, whose high-water mark and processor time
the kernel tells. The clients share one process; each has a connection and a store of its own, fetches the
round's parameters and reports an update of its own, as a device would. They do not train: each update is
noise of the right names and shapes. Wall seconds include the clients' own work on the same cores, so
the aggregator's processor seconds stand beside them.

    python benchmarks/many_clients.py --clients 50 200

Needs mosquitto. Next: `aggregator/collect.py` and `aggregator/combine.py`, which are measured here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from relay import free_port, listens  # noqa: E402
from results import machine  # noqa: E402
from scale import run_python  # noqa: E402

from edge_client.link import Link, find_run  # noqa: E402
from edge_client.parameters import Parameters  # noqa: E402
from wire.compression import compress  # noqa: E402
from wire.messages import Announcement, Hello, Offer, Report  # noqa: E402
from wire.mqtt import Broker  # noqa: E402
from wire.store import Store  # noqa: E402
from wire.tasks import beside  # noqa: E402

RUN = "many"
STEP = 1e-3
CONFIGURATION = """
listener {port} 127.0.0.1
allow_anonymous true
max_queued_messages 2000
max_inflight_messages 16
"""


@contextmanager
def mosquitto(folder: Path) -> Iterator[str]:
    """A broker's address."""
    program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        raise SystemExit("mosquitto is not installed: apt install mosquitto")
    port = free_port()
    (folder / "mosquitto.conf").write_text(CONFIGURATION.format(port=port))
    with subprocess.Popen(
        [program, "-c", str(folder / "mosquitto.conf")], stderr=subprocess.DEVNULL
    ) as broker:
        try:
            until_listening(port)
            yield f"mqtt://127.0.0.1:{port}"
        finally:
            broker.terminate()


def until_listening(port: int) -> None:
    """Wait for whoever takes this port."""
    for _ in range(200):
        if listens(port):
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}")


async def take_part(broker: Broker, announcement: Announcement, name: str, folder: Path) -> None:
    """A client that reports noise, until the run is over."""
    store = Store(folder / name)
    async with Link.open(broker, announcement, name, store) as link:

        async def rounds() -> None:
            manifest = await link.manifest()
            parameters = Parameters(manifest, link, store)
            offer: Offer | None = None
            while (offer := await link.next_offer(offer)) is not None:
                generator = np.random.default_rng([zlib.crc32(name.encode()), offer.key.round])
                await parameters.prepare(offer)
                values = await parameters.trainable(offer)
                delta = {
                    key: np.asarray(STEP * generator.standard_normal(value.shape), np.float32)
                    for key, value in values.items()
                }
                update = store.put(compress(delta, offer.plan.compression, 0))
                groups = manifest.stages[offer.key.stage].trainable
                await link.report(Report(offer.key, update, groups, 32, 1.0), store.path(update))
                store.keep({offer.parameters, announcement.manifest})

        hello = Hello({"image": 32, "text": 32}, "none", 1000, "0")
        await beside(rounds(), link.pump(), link.heartbeat(hello))


async def simulate(url: str, clients: int, folder: Path) -> None:
    """All clients, until the run is over."""
    broker = Broker.parse(url)
    announcement = await find_run(broker, "first", RUN)
    names = [f"client-{number:04}" for number in range(clients)]
    await asyncio.gather(*(take_part(broker, announcement, name, folder) for name in names))


def measure(clients: int, bundle: Path, rounds: int, options: list[str]) -> dict[str, Any]:
    """A run of one stage's first rounds with so many clients."""
    with tempfile.TemporaryDirectory() as name, mosquitto(Path(name)) as url:
        folder = Path(name)
        command = [
            "-m",
            "lamina",
            "aggregator",
            "--broker",
            url,
            "--bundle",
            str(bundle),
            "--name",
            RUN,
            "--json",
        ]
        command += ["--dir", str(folder / "aggregator"), "--min-available-clients", str(clients)]
        command += ["--rounds", str(rounds), "--round-deadline-s", "3600", *options]
        with (folder / "log").open("w") as log:
            aggregator = subprocess.Popen(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
        simulated = subprocess.Popen(
            [sys.executable, __file__, "--simulate", url, "--clients", str(clients), "--folder", name],
        )
        try:
            return follow(aggregator, clients)
        except EndedEarly:
            raise SystemExit((folder / "log").read_text()[-1000:]) from None
        finally:
            for process in (aggregator, simulated):
                process.kill()
                process.wait()


class EndedEarly(Exception):
    """The aggregator is gone before the run is over."""


def follow(aggregator: subprocess.Popen[str], clients: int) -> dict[str, Any]:
    """What its rounds take, from its events and the kernel."""
    assert aggregator.stdout is not None
    seconds: list[float] = []
    cpu_s: list[float] = []
    peaks: list[float] = []
    before = 0.0
    for line in aggregator.stdout:
        event = json.loads(line)
        if event["type"] == "RoundOpened":
            before = processor_s(aggregator.pid)
        elif event["type"] == "RoundClosed":
            assert len(event["accepted"]) == clients
            seconds.append(event["seconds"])
            cpu_s.append(processor_s(aggregator.pid) - before)
            peaks.append(peak_mb(aggregator.pid))
        elif event["type"] == "RunClosed":
            return {
                "clients": clients,
                "peak_mb": max(peaks),
                "round_s": statistics.median(seconds),
                "cpu_s": statistics.median(cpu_s),
                "update_bytes": event["total"]["update_bytes_per_client"] / len(seconds),
            }
    raise EndedEarly


def processor_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mb(pid: int) -> float:
    """The most memory that a process has had, in 10^6 bytes."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith("VmHWM:"))


def exported(model: str, folder: Path) -> Path:
    """A bundle of one stage, whose tokenizer knows next to nothing: nobody reads here."""
    texts = ["image,text", *(f"{number}.png,number {number} of many" for number in range(100))]
    (folder / "table.csv").write_text("\n".join(texts), encoding="utf-8")
    arguments = ["--model", model, "--schedule", "end_to_end", "--engine", "onnx", "--no-check"]
    arguments += ["--data", str(folder), "--out", str(folder / "bundle")]
    run_python("-m", "lamina", "export", *arguments)
    return folder / "bundle"


def main() -> None:
    """Measure and print, or be the clients of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--option", action="append", default=[], help="another option of the aggregator")
    parser.add_argument("--simulate", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.simulate:
        asyncio.run(simulate(told.simulate, told.clients[0], told.folder / "clients"))
        return
    with tempfile.TemporaryDirectory() as name:
        bundle = exported(told.model, Path(name))
        results = [measure(clients, bundle, told.rounds, told.option) for clients in told.clients]
    print(
        f"{'clients':>8} {'update MB':>10} {'peak MB':>8} {'round s':>8} {'CPU s':>7} {'CPU ms/update':>14}"
    )
    for one in results:
        each = 1e3 * one["cpu_s"] / one["clients"]
        print(
            f"{one['clients']:8} {one['update_bytes'] / 1e6:10.2f} {one['peak_mb']:8.0f} "
            f"{one['round_s']:8.1f} {one['cpu_s']:7.1f} {each:14.1f}"
        )
    print(json.dumps({"machine": machine(), "results": results}))


if __name__ == "__main__":
    main()
