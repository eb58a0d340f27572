"""Whether the aggregator's books agree with what the clients sent and were told.

    python tests/faults/ledger.py RUN/AGGREGATOR ann.log bob.log cy.log

Rules: the books are `books.sqlite` in the aggregator's folder. What a client sent and was told is in its
log (`--log-format json`), which is only ever appended to, so it survives whatever happens to the client. A
log may have lines that are no records: a killed program leaves half a line. One line for each disagreement,
and exit code 1 if there is any.

    an update that the books accepted and its client never reported
    an update that its client was told is accepted, and the books do not have, or have as another
    an update that counts in two rounds
    a round that was combined without an update, or without one of a client that had to be in it
    an update that was accepted, and whose round was passed over

Next: `tests/faults/kills.py`, which checks every run so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sqlite3
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Key = tuple[int, int]  # stage and round


@dataclass(frozen=True)
class Entry:
    """An update in the books, or in a client's log."""

    key: Key
    client: str
    sha256: str
    num_examples: int

    def __str__(self) -> str:
        return f"stage {self.key[0] + 1} round {self.key[1] + 1} of {self.client}, {self.sha256[:16]}"


@dataclass
class Told:
    """What the clients' logs say. broken: lines that are no records."""

    reported: set[Entry] = field(default_factory=set)
    accepted: set[Entry] = field(default_factory=set)
    broken: int = 0


def read_logs(logs: Iterable[Path]) -> Told:
    """The reports and receipts in these logs."""
    told = Told()
    for log in logs:
        for line in filter(None, log.read_bytes().splitlines()):
            try:
                record = json.loads(line)
            except ValueError:
                told.broken += 1
                continue
            if record.get("event") == "report":
                told.reported.add(_entry(record))
            elif record.get("event") == "receipt" and record["refusal"] is None:
                told.accepted.add(_entry(record))
    return told


def read_books(folder: Path) -> tuple[set[Key], list[tuple[Entry, Key]]]:
    """The rounds that are combined; the updates that were accepted, each with the round it counts in."""
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'books.sqlite'}?mode=ro", uri=True)) as books:
        rounds = set(books.execute("SELECT stage, round FROM rounds"))
        rows = books.execute("SELECT stage, round, client, sha256, num_examples, counted_in FROM updates")
        return rounds, [
            (Entry((stage, number), *rest), (stage, counted_in))
            for stage, number, *rest, counted_in in rows
        ]


def disagreements(folder: Path, logs: Iterable[Path], clients: Sequence[str] = ()) -> Iterator[str]:
    """Each as a line. clients: those that every round must have."""
    told = read_logs(logs)
    rounds, accepted = read_books(folder)
    in_books = {entry for entry, _ in accepted}
    for entry in sorted(in_books - told.reported, key=str):
        yield f"in the books and never sent: {entry}"
    for entry in sorted(told.accepted - in_books, key=str):
        yield f"told accepted and not in the books: {entry}"

    rounds_of: dict[tuple[str, str], set[Key]] = defaultdict(set)
    members: dict[Key, list[str]] = defaultdict(list)
    for entry, counted_in in accepted:
        rounds_of[entry.client, entry.sha256].add(entry.key)
        members[counted_in].append(entry.client)
    for (client, sha256), keys in sorted(rounds_of.items()):
        if len(keys) > 1:
            yield f"counted twice: {sha256[:16]} of {client} in {_named(keys)}"
    for entry, times in sorted(Counter(entry for entry, _ in accepted).items(), key=str):
        if times > 1:
            yield f"counted twice: {entry}"
    for key in sorted(rounds):
        if missing := sorted(set(clients) - set(members[key])):
            yield f"combined without {', '.join(missing)}: {_named([key])}"
        elif not members[key]:
            yield f"combined without any update: {_named([key])}"
    last = max(rounds, default=(-1, -1))
    for key in sorted(set(members) - rounds):
        if key < last:
            yield f"accepted and passed over: {_named([key])}"


def _entry(record: dict[str, Any]) -> Entry:
    return Entry(
        (record["stage"], record["round"]), record["client"], record["sha256"], record["num_examples"]
    )


def _named(keys: Iterable[Key]) -> str:
    return ", ".join(f"stage {stage + 1} round {number + 1}" for stage, number in sorted(keys))


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="Compare an aggregator's books with its clients' logs.")
    parser.add_argument("folder", type=Path, help="the aggregator's --dir")
    parser.add_argument("logs", type=Path, nargs="+", help="the clients' logs, as JSON")
    parser.add_argument("--client", action="append", default=[], help="one that every round must have")
    arguments = parser.parse_args()
    found = list(disagreements(arguments.folder, arguments.logs, arguments.client))
    for line in found:
        print(line)
    if not found:
        rounds, accepted = read_books(arguments.folder)
        print(f"the books agree: {len(rounds)} rounds, {len(accepted)} updates")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
