"""Training that is killed goes on from its last checkpoint, to the same bits."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import numpy as np
import pytest
from msgspec.structs import replace
from small_world import NUM_EXAMPLES, World

from edge_client.cache import FeatureCache
from edge_client.checkpoint import Checkpoint, Progress
from edge_client.engines import ENGINES, open_engine
from edge_client.features import Stopped
from edge_client.pending import Work
from edge_client.train import train
from wire.manifest import BlobRef
from wire.messages import RoundKey, TrainPlan

PLAN = TrainPlan(learning_rate=1e-2, batch_size=8, local_epochs=3, seed=3, augmentations=0)
WORK = Work("demo", 500.0, "data", RoundKey(0, 1), BlobRef.of(b"parameters"), PLAN)


class Counter:
    """An engine whose only state is a number, and which `stop`s training after some steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.number, self.seen, self.stop, self.stop_after = 0, [], Event(), stop_after

    def load(self, _parameters: object) -> None:
        self.number = 0

    def save(self, path: Path) -> None:
        path.write_text(str(self.number))

    def resume(self, path: Path) -> None:
        self.number = int(path.read_text())

    def train_step(self, batch: object, _learning_rate: float) -> float:
        self.number += 1
        self.seen.append((self.number, batch))
        if len(self.seen) == self.stop_after:
            self.stop.set()
        return float(self.number)

    def parameters(self) -> dict[str, np.ndarray]:
        return {"number": np.array([self.number], np.float32)}


class Numbers:
    """Features whose only input is the example's number, and the view drawn of it."""

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def batch(self, indices: np.ndarray, views: np.ndarray | None) -> object:
        return indices.tolist(), None if views is None else views.tolist()


def trained(engine: Counter, checkpoint: Checkpoint | None, plan: TrainPlan = PLAN):
    offered = {"number": np.zeros(1, np.float32)}
    return train(engine, offered, Numbers(), plan, "ann", engine.stop, checkpoint)


def killed(folder: Path, steps: int, work: Work = WORK, every_s: float = 0.0) -> Counter:
    """Train, with a checkpoint before each step, until `steps` are done."""
    engine = Counter(steps)
    with pytest.raises(Stopped):
        trained(engine, Checkpoint(folder, work, "counter", every_s), work.plan)
    return engine


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it costs."""
    monkeypatch.setattr("edge_client.checkpoint.SHARE", 1e9)


@pytest.mark.parametrize("augmentations", [0, 4])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8])
def test_what_is_left_is_as_if_there_had_been_no_break(tmp_path: Path, steps: int, augmentations: int):
    work = replace(WORK, plan=replace(PLAN, augmentations=augmentations))
    whole = Counter()
    expected = trained(whole, None, work.plan)

    first, second = killed(tmp_path / "training", steps, work), Counter()
    got = trained(second, Checkpoint(tmp_path / "training", work, "counter", 1e9), work.plan)
    assert (got.loss, got.delta, got.num_examples) == (expected.loss, expected.delta, NUM_EXAMPLES)
    assert first.seen[: steps - 1] + second.seen == whole.seen, "the last step before the kill was lost"


def test_a_run_killed_again_and_again_ends(tmp_path: Path):
    whole = Counter()
    expected = trained(whole, None)
    for _ in range(len(whole.seen) - 2):
        assert len(killed(tmp_path / "training", 2).seen) == 2
    got = trained(Counter(), Checkpoint(tmp_path / "training", WORK, "counter", 0.0))
    assert (got.loss, got.delta) == (expected.loss, expected.delta)


@pytest.mark.parametrize(
    "other",
    [
        replace(WORK, key=RoundKey(0, 2)),
        replace(WORK, run="demo2"),
        replace(WORK, parameters=BlobRef.of(b"other")),
        replace(WORK, data="other"),
        replace(WORK, plan=replace(PLAN, seed=4)),
    ],
)
def test_other_work_begins_anew(tmp_path: Path, other: Work):
    killed(tmp_path, 5)
    engine = Counter()
    engine.number = 77
    assert Checkpoint(tmp_path, other, "counter", 1e9).resume(engine) is None
    assert Checkpoint(tmp_path, WORK, "another", 1e9).resume(engine) is None
    assert engine.number == 77


def test_it_is_written_when_it_is_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("edge_client.checkpoint.time.monotonic", lambda: now[0])
    monkeypatch.setattr("edge_client.checkpoint.SHARE", 0.01)

    class Slow(Counter):
        def save(self, path: Path) -> None:
            super().save(path)
            now[0] += 2

    checkpoint = Checkpoint(tmp_path, WORK, "counter", 60.0)
    for due_s in (160, 162 + 200, 364 + 200):  # then, for two seconds, a hundredth of the time
        now[0] = due_s - 0.01
        assert not checkpoint.due
        now[0] = due_s
        assert checkpoint.due
        checkpoint.save(Slow(), Progress())


def test_only_the_last_one_is_kept(tmp_path: Path):
    killed(tmp_path, 7)
    assert len(list(tmp_path.iterdir())) == 2
    Checkpoint(tmp_path, WORK, "counter", 0.0).clear()
    assert list(tmp_path.iterdir()) == []
    Checkpoint(tmp_path / "nothing", WORK, "counter", 0.0).clear()


@pytest.mark.parametrize("name", ["progress", "state"])
@pytest.mark.parametrize("content", [None, b"", b"\x00" * 40, b"1"])
def test_a_damaged_one_counts_as_nothing(tmp_path: Path, name: str, content: bytes | None):
    killed(tmp_path, 7)
    (path,) = [path for path in tmp_path.iterdir() if (path.name == "progress") == (name == "progress")]
    path.unlink() if content is None else path.write_bytes(content)
    assert Checkpoint(tmp_path, WORK, "counter", 1e9).resume(Counter()) is None


def test_where_the_disk_does_not_take_it_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    class Full(Counter):
        def save(self, _path: Path) -> None:
            raise OSError(28, "No space left on device")

    killed(tmp_path, 4)
    engine = Full()
    got = trained(engine, Checkpoint(tmp_path, WORK, "counter", 0.0))
    assert got.delta == trained(Counter(), None).delta
    assert "No space left" in caplog.text


@pytest.mark.parametrize("engine", ENGINES)
def test_real_training_goes_on_to_the_same_bits(tmp_path: Path, tmp_path_factory, engine: str):
    world = World.of(tmp_path_factory, engines=tuple(ENGINES))
    cache = FeatureCache(tmp_path / "features", world.manifest, world.dataset(tmp_path / "inputs"), "onnx")
    world.prepare(cache, 1)
    features = cache.features(world.offer(1))
    names = world.manifest.names_of(world.manifest.stages[1].trainable)
    offered = {name: world.values[name] for name in names}

    class Until(Event):
        """Set after it has been asked so many times."""

        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times

        def is_set(self) -> bool:
            self.times -= 1
            return self.times < 0

    def learn(stop: Event, checkpoint: Checkpoint | None):
        with open_engine(engine, world.folder.joinpath, world.manifest, 1) as opened:
            return train(opened, offered, features, PLAN, "ann", stop, checkpoint)

    expected = learn(Event(), None)
    with pytest.raises(Stopped):
        learn(Until(5), Checkpoint(tmp_path / "training", WORK, engine, 0.0))
    got = learn(Event(), Checkpoint(tmp_path / "training", WORK, engine, 1e9))
    assert got.loss == expected.loss
    assert all(np.array_equal(got.delta[name], expected.delta[name]) for name in expected.delta)
