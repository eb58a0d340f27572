"""The last update's report on disk: what is saved is loaded, and answers the same round again."""

from __future__ import annotations

import msgspec
import pytest

from edge_client import pending
from edge_client.pending import Pending
from wire.manifest import BlobRef
from wire.messages import Offer, Report, RoundKey, TrainPlan

KEY = RoundKey(1, 4)
PARAMETERS = BlobRef.of(b"parameters")
PLAN = TrainPlan(learning_rate=1e-3, batch_size=8, local_epochs=1, seed=0)
OFFER = Offer(KEY, 1000.5, ("ann", "bob"), PARAMETERS, (BlobRef.of(b"frozen"),), PLAN, 60.0)
REPORT = Report(KEY, BlobRef.of(b"update"), ("image.block.1", "head"), 20, 0.123456789)
PENDING = Pending("demo", PARAMETERS, REPORT)


def test_it_is_loaded_as_it_was_saved(tmp_path):
    pending.save(tmp_path / "pending", PENDING)
    assert pending.load(tmp_path / "pending") == PENDING
    assert [path.name for path in tmp_path.iterdir()] == ["pending"]


def test_the_newest_one_replaces_what_was_there(tmp_path):
    path = tmp_path / "pending"
    path.write_bytes(b"something else" * 1000)
    for number in range(3):
        saved = Pending("demo", PARAMETERS, msgspec.structs.replace(REPORT, num_examples=number))
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
        pending.save(path, Pending("other", PARAMETERS, REPORT))
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


def test_it_answers_the_same_round_from_the_same_parameters():
    assert PENDING.answers("demo", OFFER)
    again = {"opened_s": 2000.0, "cohort": ("ann",), "deadline_s": 1.0}
    assert PENDING.answers("demo", msgspec.structs.replace(OFFER, **again))


@pytest.mark.parametrize(
    "other",
    [
        {"key": RoundKey(1, 5)},
        {"key": RoundKey(2, 4)},
        {"parameters": BlobRef.of(b"other parameters")},
    ],
)
def test_it_answers_no_other_round(other):
    assert not PENDING.answers("demo", msgspec.structs.replace(OFFER, **other))


def test_it_answers_no_other_run():
    assert not PENDING.answers("demo2", OFFER)
