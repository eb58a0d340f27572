"""The books of a run: what was asked, accepted, refused and spent, in SQLite.

Rules: write-ahead log, one transaction a fact, and a fact only after the files that it names are on disk.
A row in `rounds` is a checkpoint: after a crash the run goes on from the last one, with the round in
`opened`, if there is one, and the updates that were accepted for it.

Next: `aggregator/run.py`, which keeps them; `aggregator/state.py`, which resumes from them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from aggregator.events import Figures
from wire.errors import UNDECODABLE, PeerError, UserError
from wire.manifest import BlobRef
from wire.messages import Change, Offer, Report, RoundKey, Usage, decode, encode

NAME = "books.sqlite"
VERSION = 1  # changes with the tables

T = TypeVar("T")

_UNREADABLE = (sqlite3.Error, PeerError, *UNDECODABLE)
"""What a damaged file may raise: SQLite quotes in its errors what is no text any more."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS run(
  name TEXT NOT NULL, manifest TEXT NOT NULL, plan TEXT NOT NULL, started_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS opened(
  stage INTEGER, round INTEGER, offer BLOB NOT NULL, goal INTEGER,
  PRIMARY KEY(stage, round));
CREATE TABLE IF NOT EXISTS rounds(
  stage INTEGER, round INTEGER, checkpoint TEXT NOT NULL, cohort TEXT NOT NULL,
  loss REAL, metrics TEXT NOT NULL, seconds REAL NOT NULL,
  PRIMARY KEY(stage, round));
CREATE TABLE IF NOT EXISTS updates(
  stage INTEGER, round INTEGER, client TEXT, counted_in INTEGER NOT NULL, groups TEXT NOT NULL,
  num_examples INTEGER NOT NULL, loss REAL NOT NULL, norm REAL NOT NULL,
  sha256 TEXT NOT NULL, size_bytes INTEGER NOT NULL, raw_bytes INTEGER NOT NULL,
  PRIMARY KEY(stage, round, client));
CREATE TABLE IF NOT EXISTS refusals(
  stage INTEGER, round INTEGER, client TEXT, refusal TEXT, times INTEGER NOT NULL, detail TEXT NOT NULL,
  PRIMARY KEY(stage, round, client, refusal));
CREATE TABLE IF NOT EXISTS usage(
  stage INTEGER, round INTEGER, client TEXT, bytes_sent INTEGER NOT NULL, bytes_received INTEGER NOT NULL,
  peak_rss_bytes INTEGER NOT NULL, seconds REAL NOT NULL, opened_s REAL NOT NULL, cpu_s REAL NOT NULL,
  PRIMARY KEY(stage, round, client, opened_s));
"""


class RunRecord(msgspec.Struct, frozen=True):
    """What a run is. `manifest`: SHA-256. `plan`: all that decides over its course, as JSON."""

    name: str
    manifest: str
    plan: str
    started_s: float


class Checkpoint(msgspec.Struct, frozen=True):
    """A round's result, as blobs in the run's store.

    parameters: of the stage's trainable groups. change: what clients may fetch in their place. moments: of
    the server optimizer.
    """

    parameters: BlobRef
    change: Change | None = None
    moments: BlobRef | None = None


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
            ((version,),) = self._database.execute("PRAGMA user_version")
            self._database.execute(f"PRAGMA user_version={version or VERSION}")
        except (OSError, *_UNREADABLE) as error:
            raise UserError(f"{self._path} cannot be used: {error}", "choose another --dir") from error
        if version not in (0, VERSION):
            raise UserError(f"{self._path} is of another version of Lamina", "choose another --dir")

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

    def open(self, offer: Offer, goal: int | None) -> None:
        """A round is open, or open for longer, by this offer. goal: as in `Collection`."""
        self._write(
            "INSERT OR REPLACE INTO opened VALUES (?, ?, ?, ?)", *_key(offer.key), encode(offer), goal
        )

    def opened(self) -> tuple[Offer, int | None] | None:
        """The offer of the round that is open, and its goal."""
        row = self._one("SELECT offer, goal FROM opened")
        if not row:
            return None
        with self._reading():
            return decode(row[0], Offer), row[1]

    def checkpoint(
        self,
        key: RoundKey,
        checkpoint: Checkpoint,
        cohort: tuple[str, ...],
        loss: float,
        metrics: dict[str, float],
        seconds: float,
    ) -> None:
        """A round is done, and no longer open; what `checkpoint` names is in the store."""
        values = *_key(key), _json(checkpoint), _json(cohort), loss, _json(metrics), seconds
        with self._transaction():
            self._write("INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?)", *values)
            self._write("DELETE FROM opened")

    def accept(self, client: str, report: Report, raw_bytes: int, norm: float, counted_in: int) -> None:
        """An update is in the store and takes part in a round of its stage.

        raw_bytes: of its values as float32. norm: L2, over all of them.
        """
        self._write(
            "INSERT OR REPLACE INTO updates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *_key(report.key),
            client,
            counted_in,
            _json(report.groups),
            report.num_examples,
            report.loss,
            norm,
            report.update.sha256,
            report.update.size_bytes,
            raw_bytes,
        )

    def drop(self, client: str, key: RoundKey) -> None:
        """An accepted update cannot take part after all."""
        self._write("DELETE FROM updates WHERE stage = ? AND round = ? AND client = ?", *_key(key), client)

    def accepted(self, key: RoundKey) -> list[tuple[str, Report]]:
        """Clients and their reports that take part in a round."""
        rows = self._read(
            "SELECT client, round, sha256, size_bytes, groups, num_examples, loss FROM updates "
            "WHERE stage = ? AND counted_in = ?",
            *_key(key),
        )
        found = []
        for client, number, sha256, size_bytes, groups, num_examples, loss in rows:
            update, names = BlobRef(sha256, size_bytes), self._from_json(groups, tuple[str, ...])
            found.append((client, Report(RoundKey(key.stage, number), update, names, num_examples, loss)))
        return found

    def cohort(self, key: RoundKey) -> tuple[str, ...]:
        """Who was asked in a round that is done; nobody, if it is not."""
        row = self._one("SELECT cohort FROM rounds WHERE stage = ? AND round = ?", *_key(key))
        return self._from_json(row[0], tuple[str, ...]) if row else ()

    def counted(self, client: str, key: RoundKey) -> BlobRef | None:
        """The client's update for a round, if it takes part in one."""
        row = self._one(
            "SELECT sha256, size_bytes FROM updates WHERE stage = ? AND round = ? AND client = ?",
            *_key(key),
            client,
        )
        return BlobRef(*row) if row else None

    def refuse(self, client: str, key: RoundKey, refusal: str, detail: str) -> None:
        """An update was refused while this round was open. detail: of the last such refusal."""
        self._write(
            "INSERT INTO refusals VALUES (?, ?, ?, ?, 1, ?) "
            "ON CONFLICT DO UPDATE SET times = times + 1, detail = excluded.detail",
            *_key(key),
            client,
            refusal,
            detail,
        )

    def spend(self, client: str, usage: Usage) -> None:
        """A client told what a round has cost it; told twice it counts once."""
        self._write(
            "INSERT OR REPLACE INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *_key(usage.key),
            client,
            usage.bytes_sent,
            usage.bytes_received,
            usage.peak_rss_bytes,
            usage.seconds,
            usage.opened_s,
            usage.cpu_s,
        )

    def rounds(self) -> dict[RoundKey, Checkpoint]:
        """The rounds that are done, in order."""
        rows = self._read("SELECT stage, round, checkpoint FROM rounds ORDER BY stage, round")
        return {RoundKey(stage, number): self._from_json(text, Checkpoint) for stage, number, text in rows}

    def metrics(self, stage: int) -> list[tuple[float, dict[str, float]]]:
        """Loss and metrics of a stage's rounds, in order."""
        rows = self._read("SELECT loss, metrics FROM rounds WHERE stage = ? ORDER BY round", stage)
        return [(loss, self._from_json(text, dict[str, float])) for loss, text in rows]

    def clients_told(self, key: RoundKey) -> set[str]:
        """Clients whose usage of a round is known."""
        rows = self._read("SELECT client FROM usage WHERE stage = ? AND round = ?", *_key(key))
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
        (refusals,) = self._one(f"SELECT CAST(TOTAL(times) AS INTEGER) FROM refusals WHERE {chosen}")
        return Figures(
            metrics=self._from_json(metrics, dict[str, float]),
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

    def _one(self, query: str, *values: object) -> tuple[Any, ...]:
        return next(iter(self._read(query, *values)), ())

    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._reading():
            return self._database.execute(query, values).fetchall()

    def _from_json(self, text: str, kind: type[T]) -> T:
        with self._reading():
            return msgspec.json.decode(text, type=kind)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except _UNREADABLE as error:
            raise UserError(
                f"{self._path} cannot be read: {error}", "the run cannot go on: start it anew"
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._write("BEGIN")
        try:
            yield
        except BaseException:
            self._database.rollback()
            raise
        self._write("COMMIT")

    def _write(self, statement: str, *values: object) -> None:
        try:
            self._database.execute(statement, values)
        except _UNREADABLE as error:
            raise UserError(f"{self._path} cannot be written: {error}", "free some space") from error


def _key(key: RoundKey) -> tuple[int, int]:
    return key.stage, key.round


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
