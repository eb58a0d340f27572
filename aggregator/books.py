"""The books of a run: what was asked, accepted, refused and spent, in SQLite.

Rules: write-ahead log, one transaction a fact. A row in `rounds` is the checkpoint: the round's
parameters are in the store before it is written, so after a crash the run goes on from the last row.

Next: `aggregator/run.py`, which keeps them; `aggregator/state.py`, which resumes from them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from aggregator.events import Figures
from wire.errors import UserError
from wire.manifest import BlobRef
from wire.messages import Report, RoundKey, Usage

NAME = "books.sqlite"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS run(
  name TEXT NOT NULL, manifest TEXT NOT NULL, plan TEXT NOT NULL, started_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS rounds(
  stage INTEGER, round INTEGER, parameters TEXT NOT NULL, size_bytes INTEGER NOT NULL,
  change_bytes INTEGER, loss REAL, metrics TEXT NOT NULL, seconds REAL NOT NULL,
  PRIMARY KEY(stage, round));
CREATE TABLE IF NOT EXISTS updates(
  stage INTEGER, round INTEGER, client TEXT, num_examples INTEGER NOT NULL, loss REAL,
  sha256 TEXT NOT NULL, size_bytes INTEGER NOT NULL, raw_bytes INTEGER NOT NULL,
  PRIMARY KEY(stage, round, client));
CREATE TABLE IF NOT EXISTS refusals(
  stage INTEGER, round INTEGER, client TEXT, refusal TEXT NOT NULL, detail TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS usage(
  stage INTEGER, round INTEGER, client TEXT, bytes_sent INTEGER NOT NULL, bytes_received INTEGER NOT NULL,
  peak_rss_bytes INTEGER NOT NULL, seconds REAL NOT NULL, opened_s REAL NOT NULL, cpu_s REAL NOT NULL,
  PRIMARY KEY(stage, round, client, opened_s));
"""


class RunRecord(msgspec.Struct, frozen=True):
    """What a run is. `manifest`: SHA-256. `plan`: the run plan as JSON."""

    name: str
    manifest: str
    plan: str
    started_s: float


class Books:
    """An open database; `close` it. Raises `UserError` where the file cannot be used."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # One connection, used from the event loop's thread only.
            self._database = sqlite3.connect(self._path, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{self._path} cannot be used: {error}", "choose another --dir") from error

    def close(self) -> None:
        """Flush and release the file."""
        self._database.close()

    def run(self) -> RunRecord | None:
        """The run that these books are of, if one has begun."""
        row = self._one("SELECT name, manifest, plan, started_s FROM run")
        return RunRecord(*row) if row else None

    def begin(self, record: RunRecord) -> None:
        """Note what the run is."""
        self._write("INSERT INTO run VALUES (?, ?, ?, ?)", *msgspec.structs.astuple(record))

    def checkpoint(
        self,
        key: RoundKey,
        parameters: BlobRef,
        change: BlobRef | None,
        loss: float,
        metrics: dict[str, float],
        seconds: float,
    ) -> None:
        """A round is done; its parameters are in the store. change: what clients fetch in their place."""
        self._write(
            "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            key.stage,
            key.round,
            parameters.sha256,
            parameters.size_bytes,
            None if change is None else change.size_bytes,
            loss,
            msgspec.json.encode(metrics).decode(),
            seconds,
        )

    def accept(self, client: str, report: Report, raw_bytes: int) -> None:
        """An update is in the store and takes part. raw_bytes: of its values as float32."""
        self._write(
            "INSERT OR REPLACE INTO updates VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            report.key.stage,
            report.key.round,
            client,
            report.num_examples,
            report.loss,
            report.update.sha256,
            report.update.size_bytes,
            raw_bytes,
        )

    def refuse(self, client: str, key: RoundKey, refusal: str, detail: str) -> None:
        """An update was refused."""
        self._write(
            "INSERT INTO refusals VALUES (?, ?, ?, ?, ?)", key.stage, key.round, client, refusal, detail
        )

    def spend(self, client: str, usage: Usage) -> None:
        """A client told what a round has cost it; told twice it counts once."""
        self._write(
            "INSERT OR REPLACE INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            usage.key.stage,
            usage.key.round,
            client,
            usage.bytes_sent,
            usage.bytes_received,
            usage.peak_rss_bytes,
            usage.seconds,
            usage.opened_s,
            usage.cpu_s,
        )

    def rounds(self) -> dict[RoundKey, BlobRef]:
        """The rounds that are done, in order, and their parameters."""
        rows = self._read("SELECT stage, round, parameters, size_bytes FROM rounds ORDER BY stage, round")
        return {RoundKey(stage, number): BlobRef(sha256, size) for stage, number, sha256, size in rows}

    def clients_told(self, key: RoundKey) -> set[str]:
        """Clients whose usage of a round is known."""
        rows = self._read("SELECT client FROM usage WHERE stage = ? AND round = ?", key.stage, key.round)
        return {client for (client,) in rows}

    def figures(self, stages: Iterable[int]) -> Figures:
        """Of these stages together; the last one's metrics."""
        chosen = f"stage IN ({', '.join(str(int(stage)) for stage in stages)})"
        rounds, seconds = self._one(f"SELECT COUNT(*), TOTAL(seconds) FROM rounds WHERE {chosen}")
        loss, metrics = self._one(
            f"SELECT loss, metrics FROM rounds WHERE {chosen} ORDER BY stage DESC, round DESC LIMIT 1"
        ) or (0.0, "{}")
        sent, received, peak, cpu_s, clients = self._one(
            "SELECT TOTAL(bytes_sent), TOTAL(bytes_received), MAX(peak_rss_bytes), TOTAL(cpu_s), "
            f"COUNT(DISTINCT client) FROM usage WHERE {chosen}"
        )
        updates, size, raw, senders = self._one(
            "SELECT COUNT(*), TOTAL(size_bytes), TOTAL(raw_bytes), COUNT(DISTINCT client) "
            f"FROM updates WHERE {chosen}"
        )
        (refusals,) = self._one(f"SELECT COUNT(*) FROM refusals WHERE {chosen}")
        return Figures(
            metrics=msgspec.json.decode(metrics, type=dict[str, float]),
            loss=loss,
            bytes_sent_per_client=round(sent / max(clients, 1)),
            bytes_received_per_client=round(received / max(clients, 1)),
            update_bytes_per_client=round(size / max(senders, 1)),
            raw_update_bytes_per_client=round(raw / max(senders, 1)),
            peak_rss_mb_per_client=round((peak or 0) / 1e6, 1),
            cpu_s_per_client=round(cpu_s / max(clients, 1), 2),
            rounds=rounds,
            updates=updates,
            refusals=refusals,
            seconds=round(seconds, 2),
        )

    def _one(self, query: str) -> tuple[Any, ...]:
        return next(iter(self._read(query)), ())

    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise UserError(
                f"{self._path} cannot be read: {error}", "the run cannot go on: start it anew"
            ) from error

    def _write(self, statement: str, *values: object) -> None:
        try:
            self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise UserError(f"{self._path} cannot be written: {error}", "free some space") from error
