"""A provisioned folder, the mosquitto that it configures, and the programs that are started with it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from programs import Aggregator, Mosquitto, Started, lamina

from wire.mqtt import Broker, Connection
from wire.tls import Credentials


class Secured:
    """Programs that are started with nothing but what they were provisioned with."""

    def __init__(self, folder: Path, port: int, data: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self.port = folder, port
        self.url = f"mqtts://127.0.0.1:{port}"
        self._data, self._stack = data, stack
        self.mosquitto = Mosquitto(folder / "broker", port)
        stack.callback(self.mosquitto.stop)

    def client(self, name: str, *options: str, home: Path | None = None) -> Started:
        words = self.client_words(name, *options, home=home)
        return self._started(Started(words, self.folder / f"{name}.log"))

    def client_words(self, name: str, *options: str, home: Path | None = None) -> tuple[str, ...]:
        config = (home or self.folder / "clients" / name) / "client.toml"
        words = ("client", "--config", str(config), "--data", str(self._data / "clients" / name))
        return (*words, "--dir", str(self.folder / "states" / name), "--threads", "1", *options)

    def aggregator(self, bundle: Path, *options: str) -> Aggregator:
        home = self.folder / "aggregator"
        words = ("aggregator", "--config", str(home / "aggregator.toml"), "--bundle", str(bundle), "--json")
        words += ("--name", "run", "--dir", str(home / "run"), "--batch-size", "8", "--announce-s", "1")
        words += ("--heartbeat-s", "2", *options)
        return self._started(Aggregator(words, self.folder / "aggregator.log", home / "run"))

    def credentials(self, name: str) -> Credentials:
        role = "aggregator" if name == "aggregator" else "client"
        home = self.folder / role if role == "aggregator" else self.folder / "clients" / name
        return Credentials(home / "ca.crt", home / f"{role}.crt", home / f"{role}.key")

    def connection(self, name: str, version: int = 5, client_id: str = "") -> Connection:
        """As a client made by hand would connect."""
        broker = Broker.parse(f"{self.url}?version={version}", self.credentials(name))
        return Connection(broker, client_id or name)

    def _started(self, program: Started) -> Started:
        self._stack.callback(program.kill)
        return program


def provision(folder: Path, port: int, *clients: str) -> None:
    words = [word for client in clients for word in ("--client", client)]
    done = lamina(
        "provision", str(folder), "--broker-host", "127.0.0.1", "--broker-port", str(port), *words
    )
    assert done.returncode == 0, done.stderr


def sign(bundle: Path, key: Path) -> None:
    done = lamina("sign", str(bundle), "--key", str(key))
    assert done.returncode == 0, done.stderr
