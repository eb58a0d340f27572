"""The programs of a run as child processes, and what a test does to them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from aggregator.events import Event, from_json
from wire.messages import RoundKey

CLIENTS = ("ann", "bob", "cy")
PATIENCE_S = 90.0


class Started:
    """A running `lamina` command."""

    def __init__(self, arguments: tuple[str, ...], log: Path, python: str = sys.executable) -> None:
        self.arguments, self.log, self.python = arguments, log, python
        self.url = ""
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.python, "-m", "lamina", *self.arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def stdout(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def kill(self) -> None:
        """As the kernel does, at any instant."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._close()

    def again(self) -> None:
        """Start the same command once more."""
        self.kill()
        self._start()

    def end(self) -> int:
        """Wait for its own end; the exit code."""
        code = self.process.wait(PATIENCE_S)
        self._close()
        return code

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def text(self) -> str:
        return self.log.read_text()

    def _close(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextlib.contextmanager
def start(log: Path, *arguments: str) -> Iterator[Started]:
    """A command that does not outlive the block."""
    started = Started(arguments, log)
    try:
        yield started
    finally:
        started.kill()


@contextlib.contextmanager
def paused(*programs: Started) -> Iterator[None]:
    """These programs stand still."""
    for program in programs:
        program.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for program in programs:
            program.process.send_signal(signal.SIGCONT)


def until(true: Callable[[], object], what: str) -> None:
    """Wait for something that nobody tells of."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"{what} has not come about"
        time.sleep(0.02)


class Mosquitto:
    """A real broker, with the `mosquitto.conf` of a folder."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        self.url = f"mqtt://127.0.0.1:{port}"
        self.log = folder.parent / f"{folder.name}.log"
        self.folder = folder
        if os.geteuid() == 0:  # else it would give up its rights, and could not read the keys
            with (folder / "mosquitto.conf").open("a") as file:
                file.write("user root\n")
        self.start()

    @classmethod
    def plain(cls, folder: Path) -> Mosquitto:
        """On a port of its own, for everyone; it keeps nothing on disk, so it comes back empty."""
        home, port = folder / "mosquitto", free_port()
        home.mkdir(exist_ok=True)
        (home / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
        return cls(home, port)

    def start(self) -> None:
        """Return once it listens."""
        program = mosquitto()
        assert program is not None
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [program, "-c", "mosquitto.conf"], cwd=self.folder, stdout=log, stderr=log
            )
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError(f"mosquitto does not listen: {self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def mosquitto() -> str | None:
    """Its program, where it is installed."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Aggregator(Started):
    """An aggregator and the events that it has told."""

    def __init__(self, arguments: tuple[str, ...], log: Path, folder: Path) -> None:
        self.folder = folder
        self.events: list[Event] = []
        super().__init__(arguments, log)

    def until(self, matches: Callable[[Event], bool]) -> Event:
        """The next event that matches."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            line = self.stdout()
            assert line, f"the aggregator has ended: {self.text()[-2000:]}"
            self.events.append(from_json(line))
            if matches(self.events[-1]):
                return self.events[-1]
        raise AssertionError("no such event came")

    def until_a(self, kind: type[Any], key: RoundKey | None = None) -> Any:
        """The next event of this kind, of this round if one is given."""
        return self.until(lambda e: isinstance(e, kind) and (key is None or getattr(e, "key", None) == key))

    def all(self, kind: type[Any]) -> list[Any]:
        """The events of this kind so far."""
        return [event for event in self.events if isinstance(event, kind)]

    def final(self) -> dict[str, Any]:
        """The final model's parameters."""
        return load_file(self.folder / "model" / "model.safetensors")

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """What the books say."""
        with contextlib.closing(sqlite3.connect(self.folder / "books.sqlite")) as database:
            return database.execute(query).fetchall()


class Programs:
    """Starts the programs of one test."""

    def __init__(self, folder: Path, data: Path, bundle: Path, stack: contextlib.ExitStack) -> None:
        self._folder, self._data, self._bundle, self._stack = folder, data, bundle, stack

    def aggregator(self, url: str, name: str = "run", *options: str) -> Aggregator:
        folder = self._folder / f"aggregator-{name}"
        arguments = ("aggregator", "--broker", url, "--bundle", str(self._bundle), "--name", name, "--json")
        arguments += (
            "--dir",
            str(folder),
            "--batch-size",
            "8",
            "--announce-s",
            "1",
            "--heartbeat-s",
            "2",
            *options,
        )
        started = Aggregator(arguments, self._folder / f"aggregator-{name}.log", folder)
        self._stack.callback(started.kill)
        return started

    def client(
        self,
        url: str,
        client: str,
        name: str = "run",
        *options: str,
        data: str = "",
        python: str = sys.executable,
    ) -> Started:
        arguments = (
            "client",
            "--broker",
            url,
            "--data",
            str(self._data / "clients" / (data or client)),
            "--name",
            client,
        )
        arguments += ("--run", name, "--dir", str(self._folder / f"{name}-{client}"), "--threads", "1")
        started = Started((*arguments, *options), self._folder / f"{name}-{client}.log", python)
        self._stack.callback(started.kill)
        return started

    def clients(
        self, url: str, name: str = "run", names: tuple[str, ...] = CLIENTS, *options: str
    ) -> dict[str, Started]:
        return {client: self.client(url, client, name, *options) for client in names}

    def is_training(self, client: str, name: str = "run") -> bool:
        """Whether a client with `--checkpoint-s 0` is past the first step of a round."""
        return (self._folder / f"{name}-{client}" / "training" / "progress").exists()


def lamina(*arguments: str, timeout_s: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """A `lamina` command run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "lamina", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **environment},
        check=False,
    )
