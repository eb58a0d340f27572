"""The last update's report on disk: what is saved is loaded, and answers the same round again."""

from __future__ import annotations

import msgspec
import pytest

from edge_client import pending
from edge_client.pending import Pending, Work
from wire.errors import UserError
from wire.manifest import BlobRef
from wire.messages import Announcement, Offer, Report, RoundKey, TrainPlan

KEY = RoundKey(1, 4)
PARAMETERS = BlobRef.of(b"parameters")
PLAN = TrainPlan(learning_rate=1e-3, batch_size=8, local_epochs=1, seed=0)
OFFER = Offer(KEY, 1000.5, ("ann", "bob"), PARAMETERS, (BlobRef.of(b"frozen"),), PLAN, 60.0)
REPORT = Report(KEY, BlobRef.of(b"update"), ("image.block.1", "head"), 20, 0.123456789)
RUN = Announcement("demo", BlobRef.of(b"manifest"), 500.0, 10.0, 122880)
WORK = Work.of(RUN, "data", OFFER)
PENDING = Pending(WORK, REPORT)


def test_it_is_loaded_as_it_was_saved(tmp_path):
    pending.save(tmp_path / "pending", PENDING)
    assert pending.load(tmp_path / "pending") == PENDING
    assert [path.name for path in tmp_path.iterdir()] == ["pending"]


def test_the_newest_one_replaces_what_was_there(tmp_path):
    path = tmp_path / "pending"
    path.write_bytes(b"something else" * 1000)
    for number in range(3):
        saved = Pending(WORK, msgspec.structs.replace(REPORT, num_examples=number))
        pending.save(path, saved)
        assert pending.load(path) == saved
    assert [path.name for path in tmp_path.iterdir()] == ["pending"]


def test_one_killed_while_saving_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "pending"
    pending.save(path, PENDING)

    class Killed(BaseException):
        pass

    def kill(_handle):
        raise Killed

    monkeypatch.setattr("os.fsync", kill)
    with pytest.raises(Killed):
        pending.save(path, Pending(msgspec.structs.replace(WORK, data="other"), REPORT))
    assert pending.load(path) == PENDING


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"not msgpack",
        msgspec.msgpack.encode(PENDING)[:-1],
        msgspec.msgpack.encode(PENDING) + b"more",
        msgspec.msgpack.encode(REPORT),
        msgspec.msgpack.encode({"run": "demo"}),
        msgspec.json.encode(PENDING),
        msgspec.msgpack.encode(PENDING).replace(PARAMETERS.sha256.encode(), b"/" * 64),
    ],
)
def test_what_cannot_be_read_counts_as_nothing(tmp_path, content):
    (tmp_path / "pending").write_bytes(content)
    assert pending.load(tmp_path / "pending") is None


def test_nothing_is_there_at_first(tmp_path):
    assert pending.load(tmp_path / "pending") is None
    (tmp_path / "pending").mkdir()
    assert pending.load(tmp_path / "pending") is None


def test_an_offer_that_is_made_again_asks_for_the_same_work():
    again = {"opened_s": 2000.0, "cohort": ("ann",), "deadline_s": 1.0}
    assert Work.of(RUN, "data", msgspec.structs.replace(OFFER, **again)) == WORK
    assert Work.of(msgspec.structs.replace(RUN, heartbeat_s=1.0), "data", OFFER) == WORK


@pytest.mark.parametrize(
    "other",
    [
        {"key": RoundKey(1, 5)},
        {"key": RoundKey(2, 4)},
        {"parameters": BlobRef.of(b"other parameters")},
        {"plan": msgspec.structs.replace(PLAN, learning_rate=1e-4)},
        {"plan": msgspec.structs.replace(PLAN, local_epochs=2)},
    ],
)
def test_another_offer_asks_for_other_work(other):
    assert Work.of(RUN, "data", msgspec.structs.replace(OFFER, **other)) != WORK


def test_another_run_or_other_data_is_other_work():
    assert Work.of(msgspec.structs.replace(RUN, run="demo2"), "data", OFFER) != WORK
    assert Work.of(msgspec.structs.replace(RUN, started_s=501.0), "data", OFFER) != WORK
    assert Work.of(RUN, "other data", OFFER) != WORK


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        pending.save(tmp_path / "pending", PENDING)
