"""The runs of the check: examples, a bundle, and a broker, an aggregator and clients for each run.

Rules: broker and aggregator run on this machine, from the environment of the check, the clients from
theirs. With one client the global parameters are its update, so two runs of it, with the same name, data
and seed, must end with the same parameters, but for rounding. No process outlives the run: each one stops
when its standard input closes.

Next: `check.py`, which compares them; `lamina/run.py`, the same for one machine.
"""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import userland
from machine import Machine
from PIL import Image
from safetensors.numpy import load_file

from aggregator.events import Event, RunClosed, UpdateAccepted, UpdateRefused, from_json
from export.parity import parameter_error
from lamina.options import STOP_WITH_STDIN
from lamina.processes import last_line
from wire.errors import UserError
from wire.manifest import read_manifest
from wire.tensors import Arrays

NUM_EXAMPLES = 40
NUM_ROUNDS = 2
BATCH_SIZE = 8
LEARNING_RATE = 1e-3
EPS = 1e-5
"""AdamW's. With the usual 1e-8, an element whose gradient is but rounding noise moves by whole steps."""

WORDS = ("red", "fox", "jumps", "over", "lazy", "dog", "blue", "whales", "sing", "cat", "mat", "hello")
OPTIONS = ("width=64", "heads=2", "image_blocks=3", "text_blocks=2", "vocabulary=60", "length=8")
PATIENCE_S = 900.0
_POLL_S = 0.2
_GRACE_S = 20.0


@dataclass(frozen=True)
class Result:
    """Of a run. parameters: torch name -> float32, of the final model. losses: of the updates, in order.

    peak_rss_bytes: of each client, as it told it itself.
    """

    parameters: Arrays
    losses: tuple[float, ...]
    peak_rss_bytes: Mapping[str, int]
    seconds: float


def write_examples(folder: Path, seed: int) -> Path:
    """Noise and one to eight words, as README's "Your own data" wants them."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(seed)
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "text"])
        for i in range(NUM_EXAMPLES):
            pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
            writer.writerow([f"images/{i}.png", " ".join(generator.choice(WORDS, 1 + i % 8))])
    return folder


def export(folder: Path, engine: str, examples: Path, log: Path) -> Path:
    """Three layer-wise stages of a small model, of which no block starts as another's copy."""
    command = [sys.executable, "-m", "lamina", "export", "--model", "tiny", "--rounds", str(NUM_ROUNDS)]
    command += [word for option in OPTIONS for word in ("--option", option)]
    command += ["--warm-start", "fresh", "--engine", engine, "--data", str(examples)]
    command += ["--eps", str(EPS), "--out", str(folder), "--force"]
    userland.logged(log, command, os.environ)
    return folder


def initial(bundle: Path) -> Arrays:
    """The parameters that a run begins with."""
    manifest, _ = read_manifest(bundle)
    return load_file(bundle / manifest.initial)


def conduct(folder: Path, bundle: Path, engine: str, clients: Mapping[str, tuple[Machine, Path]]) -> Result:
    """A run to its end. clients: name -> machine and examples. Raises `UserError`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(_program(folder, "broker", *_lamina("broker", "--port", "0")))
        url = _address(folder, broker)
        arguments = _aggregator(url, bundle, folder, len(clients))
        aggregator = stack.enter_context(_program(folder, "aggregator", *_lamina(*arguments)))
        children = {
            name: stack.enter_context(_client(folder, url, name, engine, machine, examples))
            for name, (machine, examples) in clients.items()
        }
        _wait(folder, aggregator, {"broker": broker, **children})
        for name, child in children.items():
            if child.wait(_GRACE_S):
                raise UserError(f"client {name}: {last_line(folder / f'{name}.log')}", f"see {folder}")
    events = [from_json(line) for line in (folder / "aggregator.out").read_text().splitlines()]
    _check(folder, events, len(clients))
    return Result(
        parameters=load_file(folder / "aggregator/model/model.safetensors"),
        losses=tuple(event.loss for event in events if isinstance(event, UpdateAccepted)),
        peak_rss_bytes=_peaks(folder / "aggregator/books.sqlite"),
        seconds=time.monotonic() - begin,
    )


def worst(got: Arrays, expected: Arrays) -> tuple[float, str]:
    """The largest error of a tensor, as export's parity check measures it, and the tensor's name."""
    return max((parameter_error(got[name], expected[name], LEARNING_RATE), name) for name in expected)


def share_within(got: Arrays, expected: Arrays, limit: float) -> float:
    """The share of tensors that differ by at most `limit`."""
    return sum(
        parameter_error(got[name], expected[name], LEARNING_RATE) <= limit for name in expected
    ) / len(expected)


def _lamina(*arguments: str) -> tuple[list[str], Mapping[str, str]]:
    return [sys.executable, "-m", "lamina", *arguments], os.environ


def _aggregator(url: str, bundle: Path, folder: Path, num_clients: int) -> list[str]:
    options: dict[str, object] = {
        "broker": url,
        "bundle": bundle,
        "name": "pi-check",
        "dir": folder / "aggregator",
        "min-available-clients": num_clients,
        "min-updates": num_clients,
        "batch-size": BATCH_SIZE,
        "learning-rate": LEARNING_RATE,
        "round-deadline-s": PATIENCE_S,
        "announce-s": 2,
    }
    return ["aggregator", "--json", *(f"--{name}={value}" for name, value in options.items())]


def _client(
    folder: Path, url: str, name: str, engine: str, machine: Machine, examples: Path
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """A client on its machine, with its examples and an empty folder there."""
    data, state = f"{machine.home}/examples-{name}", f"{machine.home}/state-{name}"
    shutil.rmtree(machine.here(state), ignore_errors=True)
    shutil.rmtree(machine.here(data), ignore_errors=True)
    shutil.copytree(examples, machine.here(data))
    arguments = ["client", "--broker", url, "--data", data, "--name", name, "--run", "pi-check"]
    arguments += ["--engine", engine, "--threads", "1", "--dir", state]
    return _program(folder, name, machine.command("lamina", *arguments), machine.variables)


@contextlib.contextmanager
def _program(
    folder: Path, name: str, command: list[str], variables: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the block, with `name`.out and `name`.log."""
    with (folder / f"{name}.out").open("wb") as out, (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=log,
            env={**variables, STOP_WITH_STDIN: "1"},
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the check, which ends them all
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(folder: Path, broker: subprocess.Popen[bytes]) -> str:
    """Where the broker listens, which it prints."""
    while broker.poll() is None:
        words = (folder / "broker.out").read_text().split()
        if words and words[-1].startswith("mqtt://"):
            return words[-1]
        time.sleep(_POLL_S)
    raise UserError(f"broker: {last_line(folder / 'broker.log')}", f"see {folder / 'broker.log'}")


def _wait(
    folder: Path, aggregator: subprocess.Popen[bytes], others: Mapping[str, subprocess.Popen[bytes]]
) -> None:
    """Until the aggregator has ended. Raises `UserError` if another one fails before."""
    end = time.monotonic() + PATIENCE_S
    while aggregator.poll() is None:
        for name, process in others.items():
            if process.poll() not in (None, 0):
                line = last_line(folder / f"{name}.log") or f"exit code {process.returncode}"
                raise UserError(f"{name}: {line}", f"see {folder / f'{name}.log'}")
        if time.monotonic() > end:
            raise UserError(f"the run takes longer than {PATIENCE_S:.0f} s", f"see the logs in {folder}")
        time.sleep(_POLL_S)
    if aggregator.returncode:
        raise UserError(f"aggregator: {last_line(folder / 'aggregator.log')}", f"see {folder}")


def _check(folder: Path, events: list[Event], num_clients: int) -> None:
    """Every client gave an update in every round, and none was refused."""
    if refused := [event for event in events if isinstance(event, UpdateRefused)]:
        raise UserError(f"an update was refused: {refused[0].refusal}", f"see the logs in {folder}")
    closed = next(event for event in events if isinstance(event, RunClosed))
    expected = closed.total.rounds * num_clients
    if not closed.total.updates == expected > 0:
        raise UserError(f"{closed.total.updates} updates of {expected}", f"see the logs in {folder}")


def _peaks(books: Path) -> dict[str, int]:
    with contextlib.closing(sqlite3.connect(books)) as database:
        return dict(database.execute("SELECT client, MAX(peak_rss_bytes) FROM usage GROUP BY client"))
