"""Clients that send rubbish, in a real run: each is refused by name, and the run is as if they were not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from programs import Programs, Started, paused
from safetensors.numpy import save

from aggregator.events import RoundClosed, RunClosed, UpdateRefused
from edge_client.link import Link, find_run
from wire import topics
from wire.manifest import BlobRef, Manifest
from wire.messages import Hello, Offer, Report, RoundKey
from wire.mqtt import Broker, Connection
from wire.store import Store
from wire.tasks import beside
from wire.tensors import Arrays, pack

OPTIONS = ("--rounds", "1", "--local-epochs", "20", "--round-deadline-s", "60")
HELLO = Hello({"image": 9, "text": 9}, "none", 1000, "0")


class Liar:
    """A client made by hand: it joins like any other, and reports what a test wants it to."""

    def __init__(self, folder: Path, link: Link, manifest: Manifest, offer: Offer) -> None:
        self.folder, self.link, self.manifest, self.offer = folder, link, manifest, offer
        self.shapes = manifest.shapes_of(manifest.stages[offer.key.stage].trainable)

    def delta(self) -> Arrays:
        return {name: np.full(shape, 1e-3, np.float32) for name, shape in self.shapes.items()}

    def nan(self) -> Arrays:
        return {name: np.full(shape, np.nan, np.float32) for name, shape in self.shapes.items()}

    def report(self, content: bytes) -> Report:
        groups = self.manifest.stages[self.offer.key.stage].trainable
        return Report(self.offer.key, BlobRef.of(content), groups, 9, 1.0)

    async def send(
        self, content: bytes, change: Callable[[Report], Report] = lambda report: report
    ) -> str | None:
        """The refusal that comes back; None if it is accepted."""
        path = self.folder / BlobRef.of(content).sha256
        path.write_bytes(content)
        report = change(self.report(content))
        return (await asyncio.wait_for(self.link.report(report, path), 60)).refusal


async def lie(url: str, folder: Path, name: str, act: Callable[[Liar], object], run: str = "run") -> None:
    """Join as `name` and act on the first offer that selects us; then send NaN until the run is over."""
    store = Store(folder / name)
    announcement = await find_run(Broker.parse(url), name, run)
    async with Link.open(Broker.parse(url), announcement, name, store) as link:

        async def story() -> None:
            manifest = await link.manifest()
            offer: Offer | None = None
            acted = False
            while (offer := await link.next_offer(offer)) is not None:
                if name not in offer.cohort:
                    continue
                liar = Liar(folder, link, manifest, offer)
                if acted:  # a refusal is an answer too, so the round need not wait for its deadline
                    assert await liar.send(pack(liar.nan())) == "not_finite"
                else:
                    acted = True
                    await act(liar)  # type: ignore[misc]

        await beside(story(), link.pump(), link.heartbeat(HELLO))


def test_each_refusal_has_its_name_and_the_run_is_unharmed(
    programs: Programs, broker: Started, tmp_path: Path
) -> None:
    honest = programs.aggregator(broker.url, "honest", "--min-available-clients", "2", *OPTIONS)
    programs.clients(broker.url, "honest", ("ann", "bob"))
    honest.until_a(RunClosed)

    answers: dict[str, str | None] = {}

    async def act(liar: Liar) -> None:
        with paused(*clients.values()):  # the round is open until they have trained
            await tell_lies(liar)

    async def tell_lies(liar: Liar) -> None:
        good = liar.delta()
        name = next(iter(good))
        nan = {**good, name: np.full_like(good[name], np.nan)}
        bent = {**good, name: np.zeros((3, 3), np.float32)}
        half = {key: value.astype(np.float16) for key, value in good.items()}
        key = liar.offer.key
        answers["wrong shape"] = await liar.send(pack(bent))
        answers["a tensor is missing"] = await liar.send(pack({name: good[name]}))
        answers["float16"] = await liar.send(save(half))
        answers["NaN"] = await liar.send(pack(nan))
        answers["not tensors"] = await liar.send(b"hello")
        answers["too large"] = await liar.send(b"0" * 20_000_000)
        answers["no examples"] = await liar.send(pack(good), lambda r: replace(r, num_examples=0))
        answers["later round"] = await liar.send(
            pack(good), lambda r: replace(r, key=RoundKey(key.stage, 1))
        )
        answers["later stage"] = await liar.send(pack(good), lambda r: replace(r, key=RoundKey(1, 0)))
        answers["other groups"] = await liar.send(
            pack(good), lambda r: replace(r, groups=("image.block.1",))
        )

    aggregator = programs.aggregator(broker.url, "run", "--min-available-clients", "3", *OPTIONS)
    clients = programs.clients(broker.url, "run", ("ann", "bob"))
    asyncio.run(asyncio.wait_for(lie(broker.url, tmp_path, "liar", act), 120))
    aggregator.until_a(RunClosed)

    assert answers == {
        "wrong shape": "wrong_shape",
        "a tensor is missing": "wrong_shape",
        "float16": "wrong_shape",
        "NaN": "not_finite",
        "not tensors": "malformed",
        "too large": "too_large",
        "no examples": "zero_examples",
        "later round": "wrong_round",
        "later stage": "wrong_stage",
        "other groups": "wrong_shape",
    }
    refused = len(answers) + 1  # and the one of the second round
    assert len(aggregator.all(UpdateRefused)) == refused
    assert aggregator.rows("SELECT SUM(times) FROM refusals WHERE client = 'liar'") == [(refused,)]
    assert [event.accepted for event in aggregator.all(RoundClosed)] == [("ann", "bob")] * 2
    expected = honest.final()
    assert all(np.array_equal(value, expected[name]) for name, value in aggregator.final().items())


def test_a_duplicate_a_late_one_and_one_that_was_not_asked(
    programs: Programs, broker: Started, tmp_path: Path
) -> None:
    answers: dict[str, str | None] = {}

    async def act(liar: Liar) -> None:
        good = pack(liar.delta())
        with paused(*clients.values()):
            answers["first"] = await liar.send(good)
            answers["the same again"] = await liar.send(good)
            answers["another"] = await liar.send(pack({k: 2 * v for k, v in liar.delta().items()}))
            opened.set()
            await told.wait()
        while (await liar.link.next_offer(liar.offer)) is not None:  # the round is over by then
            answers["the same in the next round"] = await liar.send(good)
            answers["another in the next round"] = await liar.send(
                pack({k: 3 * v for k, v in liar.delta().items()})
            )
            await over.wait()
            break

    async def outsider() -> None:
        """Joins when the round is open already, so it is not in the cohort."""
        await opened.wait()
        announcement = await find_run(Broker.parse(broker.url), "outsider", "run")
        store = Store(tmp_path / "outsider")
        async with Link.open(Broker.parse(broker.url), announcement, "outsider", store) as link:

            async def story() -> None:
                manifest = await link.manifest()
                offer = await link.next_offer(None)
                assert offer is not None
                assert "outsider" not in offer.cohort
                liar = Liar(tmp_path, link, manifest, offer)
                answers["outsider"] = await liar.send(pack(liar.delta()))
                told.set()
                assert await link.next_offer(offer) is not None
                answers["late"] = await liar.send(pack(liar.delta()))
                over.set()

            await beside(story(), link.pump())

    opened, told, over = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def both() -> None:
        await asyncio.gather(lie(broker.url, tmp_path, "liar", act), outsider())

    aggregator = programs.aggregator(broker.url, "run", "--min-available-clients", "3", *OPTIONS)
    clients = programs.clients(broker.url, "run", ("ann", "bob"))
    asyncio.run(asyncio.wait_for(both(), 120))
    aggregator.until_a(RunClosed)
    assert answers == {
        "first": None,
        "the same again": None,
        "another": "duplicate",
        "the same in the next round": None,
        "another in the next round": "duplicate",
        "late": "late",
        "outsider": "not_selected",
    }
    assert aggregator.rows("SELECT COUNT(*) FROM updates WHERE client = 'liar'") == [(1,)]


def test_a_huge_update_moves_the_mean_and_no_robust_rule(
    programs: Programs, broker: Started, tmp_path: Path
) -> None:
    async def act(liar: Liar) -> None:
        huge = {name: np.ones(shape, np.float32) for name, shape in liar.shapes.items()}
        refusal = await liar.send(pack(huge), lambda report: replace(report, num_examples=1000))
        assert refusal is None, "it is finite, and of the right shape"

    def final(name: str, clients: str, *options: str) -> Arrays:
        options = ("--min-available-clients", clients, "--rounds", "1", *options)
        aggregator = programs.aggregator(broker.url, name, *options)
        programs.clients(broker.url, name, ("ann", "bob"))
        if clients == "3":
            asyncio.run(asyncio.wait_for(lie(broker.url, tmp_path / name, "liar", act, name), 120))
        aggregator.until_a(RunClosed)
        return aggregator.final()

    honest = final("honest", "2")

    def moved(name: str, *options: str) -> float:
        """How far the liar moves a parameter at most."""
        values = final(name, "3", *options)
        return max(float(np.abs(values[key] - value).max()) for key, value in honest.items())

    assert moved("mean") > 0.5
    assert moved("median", "--aggregation", "median") < 0.1
    assert moved("clipped", "--max-update-norm", "1") < 0.1


def test_rubbish_on_every_topic(programs: Programs, broker: Started) -> None:
    aggregator = programs.aggregator(broker.url, "run", "--min-available-clients", "2")
    clients = programs.clients(broker.url, "run", ("ann", "bob"))

    async def throw() -> None:
        async with Connection(Broker.parse(broker.url), "vandal") as connection:
            rubbish = [b"\xc1", b"\x91" * 5000, b"\x00" * 100_000, b"{}", b"x"]
            for payload in rubbish:
                for kind in ("hello", "bye", "want", "chunk", "report", "usage", "nothing"):
                    await connection.publish(f"{topics.ROOT}/run/c/vandal/up/{kind}", payload)
                    await connection.publish(f"{topics.ROOT}/run/c/{'v' * 200}/up/{kind}", payload)
                for kind in ("want", "chunk", "receipt", "nothing"):
                    await connection.publish(f"{topics.ROOT}/run/c/ann/down/{kind}", payload)
                await connection.publish(topics.offer("run"), payload)
                await connection.publish(topics.announcement("run"), payload)

    aggregator.until_a(RoundClosed)
    asyncio.run(asyncio.wait_for(throw(), 60))
    aggregator.until_a(RunClosed)
    assert [client.end() for client in clients.values()] == [0, 0]
    assert "Traceback" not in aggregator.text() + clients["ann"].text()
    assert "ignored a message" in aggregator.text()
    assert len(aggregator.all(RoundClosed)) == 4
