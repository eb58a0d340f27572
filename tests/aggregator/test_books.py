"""The books: what was written is there after closing, opening and killing, and the figures add up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aggregator.books import NAME, Books, Checkpoint, RunRecord
from aggregator.events import Figures
from wire.errors import UserError
from wire.manifest import BlobRef
from wire.messages import Change, Offer, Report, RoundKey, TrainPlan, Usage

KEY = RoundKey(1, 2)
RECORD = RunRecord("r1", "a" * 64, '{"rounds":3}', 1.7e9 + 0.25)
NOTHING = Figures(
    metrics={},
    loss=0.0,
    bytes_sent_per_client=0,
    bytes_received_per_client=0,
    update_bytes_per_client=0,
    raw_update_bytes_per_client=0,
    peak_rss_mb_per_client=0.0,
    cpu_s_per_client=0.0,
    rounds=0,
    updates=0,
    refusals=0,
    seconds=0.0,
)

Row = tuple[Any, ...]


def ref(number: int, size_bytes: int | None = None) -> BlobRef:
    made = BlobRef.of(str(number).encode())
    return made if size_bytes is None else BlobRef(made.sha256, size_bytes)


def report(key: RoundKey = KEY, **changes: Any) -> Report:
    fields = {"key": key, "update": ref(0, 1000), "groups": ("head",), "num_examples": 10, "loss": 0.5}
    return Report(**{**fields, **changes})


def usage(key: RoundKey = KEY, **changes: Any) -> Usage:
    fields = {
        "key": key,
        "bytes_sent": 1000,
        "bytes_received": 3000,
        "peak_rss_bytes": 50_000_000,
        "seconds": 1.5,
        "cpu_s": 0.5,
    }
    return Usage(**{**fields, **changes})


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint(ref(number))


def offer(key: RoundKey = KEY, **changes: Any) -> Offer:
    fields = {
        "key": key,
        "opened_s": 1.7e9 + 0.125,
        "cohort": ("ada", "ben"),
        "parameters": ref(1),
        "frozen": (ref(2),),
        "plan": TrainPlan(learning_rate=1e-3, batch_size=8, local_epochs=1, seed=0),
        "deadline_s": 60.0,
    }
    return Offer(**{**fields, **changes})


def round_of(
    books: Books, key: RoundKey, *, loss: float = 0.5, seconds: float = 2.0, **metrics: float
) -> None:
    books.checkpoint(key, checkpoint(key.round), ("ada", "ben"), loss, metrics, seconds)


def accept(books: Books, client: str, report_: Report, raw_bytes: int = 4000) -> None:
    books.accept(client, report_, raw_bytes, 1.0, report_.key.round)


def rows(books: Books, table: str) -> list[Row]:
    return sorted(books._database.execute(f"SELECT * FROM {table}"))


def reopened(books: Books, folder: Path) -> Books:
    books.close()
    return Books(folder)


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    opened = Books(tmp_path / "new" / "run")
    yield opened
    opened.close()


def test_new_books_are_empty(books: Books):
    assert books.run() is None
    assert books.rounds() == {}
    assert books.clients_told(KEY) == set()
    assert books.figures(range(3)) == NOTHING


def test_everything_is_there_after_closing_and_opening(tmp_path: Path):
    books = Books(tmp_path)
    books.begin(RECORD)
    whole = Checkpoint(ref(1, 2**62), Change(ref(2), ref(3, 9), ref(1, 2**62)))
    metrics = {"recall@1": 0.1 + 0.2, "chance@1": 1e-300}
    books.checkpoint(KEY, whole, ("ada", "ben"), 0.1 + 0.2, metrics, 12.25)
    report_ = report(groups=("image block", "head"), num_examples=2**63 - 1, update=ref(2, 2**63 - 1))
    books.accept("ada", report_, 2**63 - 1, 0.5, 3)
    books.refuse("ben", RoundKey(0, 7), "late", "it's over; DROP TABLE rounds — ' \" \0")
    books.spend("ada", usage(bytes_sent=2**63 - 1, seconds=1e9))
    for _ in range(2):
        books = reopened(books, tmp_path)
        assert books.run() == RECORD
        assert books.rounds() == {KEY: whole}
        assert (books.cohort(KEY), books.cohort(RoundKey(1, 1))) == (("ada", "ben"), ())
        assert books.clients_told(KEY) == {"ada"}
        assert books.clients_told(RoundKey(1, 1)) == books.clients_told(RoundKey(0, 2)) == set()
        figures = books.figures([1])
        assert figures.metrics == {"recall@1": 0.1 + 0.2, "chance@1": 1e-300}
        assert figures.loss == 0.1 + 0.2
        assert books.accepted(RoundKey(1, 3)) == [("ada", report_)], "by the round that it counts in"
        assert books.accepted(KEY) == []
        assert books.counted("ada", KEY) == report_.update
        assert books.counted("ada", RoundKey(1, 3)) is books.counted("ben", KEY) is None
        assert rows(books, "refusals") == [
            (0, 7, "ben", "late", 1, "it's over; DROP TABLE rounds — ' \" \0"),
        ]
        assert rows(books, "usage") == [(1, 2, "ada", 2**63 - 1, 3000, 50_000_000, 1e9, 0.0, 0.5)]
    books.close()


def test_what_is_written_is_on_disk_before_closing(books: Books, tmp_path: Path):
    books.begin(RECORD)
    round_of(books, KEY)
    shutil.copytree(tmp_path / "new", tmp_path / "copy")
    other = Books(tmp_path / "copy" / "run")
    assert (other.run(), other.rounds()) == (RECORD, {KEY: checkpoint(2)})
    other.close()


def test_rounds_come_in_order(books: Books):
    keys = [RoundKey(1, 10), RoundKey(0, 3), RoundKey(1, 2), RoundKey(10, 0), RoundKey(2, 0)]
    for key in keys:
        round_of(books, key)
    assert list(books.rounds()) == sorted(keys)


def test_a_round_that_is_done_once_more_counts_once(books: Books):
    round_of(books, KEY, loss=0.5, seconds=3.0, a=1.0)
    books.checkpoint(KEY, checkpoint(7), ("ada",), 0.25, {"b": 2.0}, 4.0)
    assert books.rounds() == {KEY: checkpoint(7)}
    figures = books.figures([1])
    assert (figures.rounds, figures.loss, figures.metrics, figures.seconds) == (1, 0.25, {"b": 2.0}, 4.0)


def test_what_is_told_twice_counts_once(books: Books):
    for _ in range(2):
        accept(books, "ada", report())
        books.spend("ada", usage())
    figures = books.figures([1])
    assert (figures.updates, figures.update_bytes_per_client) == (1, 1000)
    assert (figures.bytes_sent_per_client, figures.bytes_received_per_client) == (1000, 3000)
    accept(books, "ada", report(update=ref(1, 500)))  # of a round that an aggregator opened once more
    books.spend("ada", usage(bytes_sent=7))
    figures = books.figures([1])
    assert (figures.updates, figures.update_bytes_per_client, figures.bytes_sent_per_client) == (1, 500, 7)


def test_the_same_client_counts_in_each_round_and_the_same_round_for_each_client(books: Books):
    for key in (RoundKey(1, 0), RoundKey(1, 1)):
        for client in ("ada", "ben"):
            accept(books, client, report(key))
            books.spend(client, usage(key))
    figures = books.figures([1])
    assert (figures.updates, figures.update_bytes_per_client) == (4, 2000)
    assert (figures.bytes_sent_per_client, figures.bytes_received_per_client) == (2000, 6000)
    assert books.clients_told(RoundKey(1, 1)) == {"ada", "ben"}


def test_a_round_is_open_until_its_checkpoint(books: Books, tmp_path: Path):
    assert books.opened() is None
    books.open(offer(), None)
    books.open(offer(opened_s=1.7e9 + 60, cohort=("ada",)), 3)  # for longer
    books = reopened(books, tmp_path / "new" / "run")
    assert books.opened() == (offer(opened_s=1.7e9 + 60, cohort=("ada",)), 3)
    round_of(books, KEY)
    assert books.opened() is None
    books.open(offer(RoundKey(1, 3)), None)
    assert books.opened() == (offer(RoundKey(1, 3)), None)


def test_an_update_that_is_lost_takes_no_part(books: Books):
    for client in ("ada", "ben"):
        accept(books, client, report())
    books.drop("ada", KEY)
    assert [client for client, _ in books.accepted(KEY)] == ["ben"]
    assert books.counted("ada", KEY) is None
    assert books.figures([1]).updates == 1


def test_books_of_another_version_are_left_alone(tmp_path: Path):
    books = Books(tmp_path)
    books._database.execute("PRAGMA user_version=77")
    books.close()
    with pytest.raises(UserError, match="another version") as caught:
        Books(tmp_path)
    assert caught.value.hint


def test_every_refusal_counts(books: Books):
    for _ in range(3):
        books.refuse("ada", KEY, "late", "")
    books.refuse("ada", RoundKey(0, 0), "late", "")
    assert rows(books, "refusals") == [(0, 0, "ada", "late", 1, ""), (1, 2, "ada", "late", 3, "")]
    assert (books.figures([1]).refusals, books.figures([0]).refusals) == (3, 1)
    assert books.figures([0, 1]).refusals == 4


def told(books: Books) -> None:
    """Two stages of a run of three clients."""
    round_of(books, RoundKey(0, 0), loss=3.0, seconds=1.25, accuracy=0.1)
    round_of(books, RoundKey(0, 1), loss=2.0, seconds=1.5, accuracy=0.2)
    round_of(books, RoundKey(1, 0), loss=1.0, seconds=0.126, accuracy=0.4, recall=0.3)
    for key, client, size in [
        (RoundKey(0, 0), "ada", 100),
        (RoundKey(0, 0), "ben", 200),
        (RoundKey(0, 1), "ada", 100),
        (RoundKey(1, 0), "cyd", 50),
    ]:
        accept(books, client, report(key, update=ref(size, size)), 4 * size)
    books.refuse("cyd", RoundKey(0, 1), "late", "")
    for key, client, sent, peak in [
        (RoundKey(0, 0), "ada", 10, 60_000_000),
        (RoundKey(0, 1), "ada", 20, 61_449_999),
        (RoundKey(0, 0), "ben", 31, 10_000_000),
        (RoundKey(1, 0), "cyd", 7, 70_000_000),
    ]:
        books.spend(client, usage(key, bytes_sent=sent, bytes_received=2 * sent, peak_rss_bytes=peak))


def test_figures_of_a_stage(books: Books):
    told(books)
    assert books.figures([0]) == Figures(
        metrics={"accuracy": 0.2},
        loss=2.0,
        bytes_sent_per_client=30,  # 61 over two clients
        bytes_received_per_client=61,
        update_bytes_per_client=200,
        raw_update_bytes_per_client=800,
        peak_rss_mb_per_client=61.4,
        cpu_s_per_client=0.75,
        rounds=2,
        updates=3,
        refusals=1,
        seconds=2.75,
    )


def test_figures_of_several_stages_have_the_last_ones_metrics(books: Books):
    told(books)
    expected = Figures(
        metrics={"accuracy": 0.4, "recall": 0.3},
        loss=1.0,
        bytes_sent_per_client=23,  # 68 over three clients
        bytes_received_per_client=45,
        update_bytes_per_client=150,
        raw_update_bytes_per_client=600,
        peak_rss_mb_per_client=70.0,
        cpu_s_per_client=0.67,  # 2 over three clients
        rounds=3,
        updates=4,
        refusals=1,
        seconds=2.88,
    )
    for stages in ([0, 1], [1, 0], range(9), iter((0, 1))):
        assert books.figures(stages) == expected


@pytest.mark.parametrize("stages", [[], [2], range(5, 9)])
def test_figures_of_stages_that_have_not_begun(books: Books, stages: Any):
    told(books)
    assert books.figures(stages) == NOTHING


def test_figures_while_the_first_round_is_open(books: Books):
    accept(books, "ada", report())
    books.refuse("ben", KEY, "malformed", "")
    expected = msgspec.structs.replace(
        NOTHING, updates=1, update_bytes_per_client=1000, raw_update_bytes_per_client=4000, refusals=1
    )
    assert books.figures([1]) == expected


# What cannot be used.


def test_a_round_that_is_offered_twice_costs_twice(books: Books):
    round_of(books, KEY)
    for opened_s in (1.0, 2.0, 2.0):
        books.spend("ada", usage(opened_s=opened_s, bytes_sent=100))
    assert books.figures([1]).bytes_sent_per_client == 200


def test_a_folder_that_is_a_file_is_the_users_to_mend(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match=r"books\.sqlite cannot be used: ") as caught:
            Books(folder)
        assert caught.value.hint


@pytest.mark.parametrize("content", [b"no database, " * 400, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_file_that_is_no_database_is_the_users_to_mend(tmp_path: Path, content: bytes):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(UserError, match=r"books\.sqlite cannot be used: "):
        Books(tmp_path)
    assert (tmp_path / NAME).read_bytes() == content


def test_books_that_are_a_folder_are_the_users_to_mend(tmp_path: Path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(UserError, match=r"books\.sqlite cannot be used: "):
        Books(tmp_path)


def damaged(folder: Path) -> Books:
    """Books whose first page is whole, so that they open, and none of the others."""
    books = Books(folder)
    for number in range(50):
        round_of(books, RoundKey(0, number))
    books.close()
    path = folder / NAME
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    return Books(folder)


@pytest.mark.parametrize("read", [Books.run, Books.rounds, lambda books: books.figures([0])])
def test_damaged_books_are_the_users_to_mend(tmp_path: Path, read: Any):
    books = damaged(tmp_path)
    try:
        with pytest.raises(UserError):
            read(books)
    finally:
        books.close()


def test_books_that_cannot_be_written_are_the_users_to_mend(books: Books):
    books._database.execute("PRAGMA query_only = 1")
    for write in (
        lambda: books.begin(RECORD),
        lambda: books.open(offer(), None),
        lambda: round_of(books, KEY),
        lambda: accept(books, "ada", report()),
        lambda: books.refuse("ada", KEY, "late", ""),
        lambda: books.spend("ada", usage()),
    ):
        with pytest.raises(UserError, match=r"books\.sqlite cannot be written: "):
            write()


# What a kill leaves.

WRITER = """
import sys
from pathlib import Path

from aggregator.books import Books, Checkpoint, RunRecord
from wire.manifest import BlobRef
from wire.messages import Report, RoundKey, Usage

books = Books(Path(sys.argv[1]))
books.begin(RunRecord("r1", "a" * 64, "{}", 1.5))
for number in range(100_000):
    key, ref = RoundKey(0, number), BlobRef.of(str(number).encode())
    books.accept("ada", Report(key, ref, ("head",), 10, 0.5), 1, 1.0, number)
    books.checkpoint(key, Checkpoint(ref), ("ada",), float(number), {"round": float(number)}, 1.0)
    books.spend("ada", Usage(key, 1, 1, 1, 1.0))
    print(number, flush=True)
"""


@pytest.mark.parametrize("kill_after", [1, 20, 77])
def test_after_a_hard_kill_a_prefix_is_there(tmp_path: Path, kill_after: int):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert writer.stdout is not None
    with writer:
        for number in range(kill_after):
            assert writer.stdout.readline() == f"{number}\n"
        os.kill(writer.pid, signal.SIGKILL)
        told_last = max(map(int, writer.stdout.read().split()), default=kill_after - 1)
    assert writer.returncode == -signal.SIGKILL
    assert (tmp_path / f"{NAME}-wal").exists()  # nothing was tidied up

    books = Books(tmp_path)
    rounds = books.rounds()
    assert len(rounds) - 1 in (told_last, told_last + 1)  # one may be written and not yet told
    assert rounds == {RoundKey(0, number): checkpoint(number) for number in range(len(rounds))}
    figures = books.figures([0])
    assert figures.rounds == len(rounds)
    assert figures.updates in (len(rounds), len(rounds) + 1)
    assert len(rows(books, "usage")) in (len(rounds), len(rounds) - 1)
    assert figures.loss == figures.metrics["round"] == len(rounds) - 1
    assert books.run() == RunRecord("r1", "a" * 64, "{}", 1.5)
    round_of(books, RoundKey(0, len(rounds)))  # and the run goes on
    assert len(books.rounds()) == len(rounds) + 1
    books.close()
