"""Transfers between an aggregator and clients over a network in memory that loses, repeats and reorders."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from wire.errors import HashMismatch, Malformed, Silent, UserError
from wire.exchange import Exchange
from wire.manifest import BlobRef
from wire.messages import Want
from wire.store import Store
from wire.tasks import beside
from wire.transfer import encode_chunk

CHUNK = 1 << 10
STALL_S = 0.15
CONTENT = random.Random(0).randbytes(40 * CHUNK)
REF = BlobRef.of(CONTENT)

Damage = Callable[[bytes], list[bytes]]


def intact(packet: bytes) -> list[bytes]:
    return [packet]


class Network:
    """One sender and some receivers. damage: what becomes of a packet on its way to a receiver."""

    def __init__(self, folder: Path, names: tuple[str, ...], damage: Damage = intact) -> None:
        self.published: list[str] = []
        self.damage = damage
        self.sender = Exchange(
            self, Store(folder / "sender"), CHUNK, lambda _ref, peer: peer or ",".join(names)
        )
        self.receivers = {
            name: Exchange(self, Store(folder / name), CHUNK, lambda _ref, _peer: "", stall_s=STALL_S)
            for name in names
        }

    async def publish(self, topic: str, payload: bytes) -> None:
        self.published.append(topic)
        await asyncio.sleep(0)
        for name in topic.split(","):
            for packet in self.damage(payload):
                self.receivers[name].chunk(packet)

    async def caught_up(self) -> None:
        await asyncio.sleep(0)

    def offer(self, content: bytes = CONTENT) -> BlobRef:
        ref = self.sender.store.put(content)
        self.sender.offer(ref, self.sender.store.path(ref))
        return ref

    def ask(self, name: str) -> Callable[[Want], Awaitable[None]]:
        async def ask(want: Want) -> None:
            self.sender.want(name, want)

        return ask

    async def fetch(self, name: str, ref: BlobRef = REF, silence_s: float = 60) -> bytes:
        path = await self.receivers[name].fetch(ref, self.ask(name), silence_s=silence_s)
        return path.read_bytes()


def run(network: Network, *fetches: Coroutine[Any, Any, bytes]) -> list[bytes]:
    async def main() -> list[bytes]:
        return list(await asyncio.gather(*fetches))

    async def bounded() -> list[bytes]:
        return await asyncio.wait_for(beside(main(), network.sender.serve()), 60)

    return asyncio.run(bounded())


def test_a_blob_arrives(tmp_path: Path) -> None:
    network = Network(tmp_path, ("a",))
    network.offer()
    assert run(network, network.fetch("a")) == [CONTENT]
    assert len(network.published) == 41, "each chunk once"


def test_an_empty_blob_arrives(tmp_path: Path) -> None:
    network = Network(tmp_path, ("a",))
    assert run(network, network.fetch("a", network.offer(b""))) == [b""]
    assert network.published == []


def test_what_is_in_the_store_is_not_asked_for(tmp_path: Path) -> None:
    network = Network(tmp_path, ("a",))
    network.receivers["a"].store.put(CONTENT)
    assert run(network, network.fetch("a")) == [CONTENT]
    assert network.published == []


def test_one_broadcast_serves_many(tmp_path: Path) -> None:
    names = tuple("abcdefgh")
    network = Network(tmp_path, names)
    network.offer()
    assert run(network, *(network.fetch(name) for name in names)) == [CONTENT] * 8
    assert len(network.published) < 60, "41 chunks to 8 receivers are 328 without broadcasts"
    assert ",".join(names) in network.published


def test_what_waits_to_be_read_is_not_asked_for_again(tmp_path: Path) -> None:
    """Receivers that read slowly, of broadcasts that the quickest of them asks for."""
    names = tuple("abcdefgh")
    network = Slow(tmp_path, names)
    network.offer()
    assert run(network, *(network.fetch(name) for name in names)) == [CONTENT] * 8
    assert len(network.published) < 60


class Slow(Network):
    """A receiver reads a packet in a while, and the later ones read more slowly."""

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        super().__init__(folder, names)
        self.waiting: dict[str, asyncio.Queue[bytes]] = {name: asyncio.Queue() for name in names}
        self.reading: list[asyncio.Task[None]] = []
        for name, receiver in self.receivers.items():
            receiver._connection = _Line(self, name)

    async def publish(self, topic: str, payload: bytes) -> None:
        self.published.append(topic)
        await asyncio.sleep(0)
        if not self.reading:
            self.reading = [asyncio.create_task(self.read(name)) for name in self.waiting]
        for name in topic.split(","):  # those that are done read no more
            if self.receivers[name]._incoming:
                self.waiting[name].put_nowait(payload)

    async def read(self, name: str) -> None:
        while True:
            packet = await self.waiting[name].get()
            await asyncio.sleep(0.002 * (1 + ord(name) - ord("a")))
            self.receivers[name].chunk(packet)
            self.waiting[name].task_done()


@dataclass
class _Line:
    network: Slow
    name: str

    async def publish(self, topic: str, payload: bytes) -> None:
        raise AssertionError("a receiver has nothing to send")

    async def caught_up(self) -> None:
        await self.network.waiting[self.name].join()


def test_a_bad_link_only_takes_longer(tmp_path: Path) -> None:
    dice = random.Random(1)
    late: list[bytes] = []

    def damage(packet: bytes) -> list[bytes]:
        fate = dice.random()
        if fate < 0.2:
            return []
        if fate < 0.3:
            return [packet, packet]
        if fate < 0.5:
            late.append(packet)
            return [late.pop(0)] if len(late) > 3 else []
        return [packet]

    network = Network(tmp_path, ("a", "b", "c"), damage)
    network.offer()
    assert run(network, *(network.fetch(name) for name in "abc")) == [CONTENT] * 3


def test_a_late_receiver_gets_what_it_missed(tmp_path: Path) -> None:
    network = Network(tmp_path, ("a", "b"))
    network.offer()

    async def later() -> bytes:
        await asyncio.sleep(0.2)
        return await network.fetch("b")

    assert run(network, network.fetch("a"), later()) == [CONTENT] * 2


def test_a_sender_that_forgot_what_it_owed_is_asked_again(tmp_path: Path) -> None:
    network = Network(tmp_path, ("a",))
    network.offer()
    lost = iter([True, True])

    async def fetch() -> bytes:
        async def ask(want: Want) -> None:
            if not next(lost, False):
                network.sender.want("a", want)

        return (await network.receivers["a"].fetch(REF, ask)).read_bytes()

    assert run(network, fetch()) == [CONTENT]


def test_a_chunk_with_a_wrong_content_costs_one_more_attempt(tmp_path: Path) -> None:
    wrong = iter([True])

    def damage(packet: bytes) -> list[bytes]:
        if packet[8:12] == bytes(4) and next(wrong, False):
            return [encode_chunk(REF, 0, bytes(CHUNK - 20))]
        return [packet]

    network = Network(tmp_path, ("a",), damage)
    network.offer()
    assert run(network, network.fetch("a")) == [CONTENT]


def test_a_liar_is_found_out(tmp_path: Path) -> None:
    network = Network(
        tmp_path,
        ("a",),
        lambda packet: [encode_chunk(REF, int.from_bytes(packet[8:12]), packet[20:][::-1])],
    )
    network.offer()
    with pytest.raises(HashMismatch):
        run(network, network.fetch("a"))
    assert not network.receivers["a"].store.has(REF)


def test_silence_ends_a_fetch_that_does_not_want_to_wait(tmp_path: Path) -> None:
    network = Network(tmp_path, ("a",))
    with pytest.raises(Silent):
        run(network, network.fetch("a", silence_s=0.5))


def test_a_fetch_that_was_broken_off_goes_on_where_it_was(tmp_path: Path) -> None:
    """Of the sender's chunks only every third arrives; the receiver gives up, and a new one goes on."""
    network = Network(tmp_path, ("a",), lambda packet: [packet] if packet[11] % 3 == 0 else [])
    network.offer()

    async def given_up() -> bytes:
        with pytest.raises(Silent):
            await network.fetch("a", silence_s=0.3)
        return b""

    run(network, given_up())
    again = Network(tmp_path, ("a",))
    again.offer()
    assert run(again, again.fetch("a")) == [CONTENT]
    assert len(again.published) <= 35, "41 chunks, of which some had come"


def test_only_what_is_offered_can_be_had(tmp_path: Path) -> None:
    network = Network(tmp_path, ("a",))
    ref = network.offer()
    secret = network.sender.store.put(b"another client's update")
    network.sender.withdraw(ref)

    async def refused(wanted: BlobRef) -> bytes:
        with pytest.raises(Silent):
            await network.fetch("a", wanted, silence_s=0.3)
        return b""

    run(network, refused(secret), refused(ref))
    assert network.published == []


def test_asking_beyond_the_end_is_malformed(tmp_path: Path) -> None:
    network = Network(tmp_path, ())
    ref = network.offer()
    with pytest.raises(Malformed):
        network.sender.want("a", Want(ref, ((0, 10_000),)))


def test_chunks_of_one_peer_do_not_touch_anothers_upload(tmp_path: Path) -> None:
    exchange = Exchange(Network(tmp_path, ()), Store(tmp_path / "store"), CHUNK, lambda _ref, _peer: "")
    content = b"honest"
    ref = BlobRef.of(content)

    async def main() -> bytes:
        async def ask(_want: Want) -> None:
            exchange.chunk(encode_chunk(ref, 0, b"wicked"), "liar")
            exchange.chunk(encode_chunk(ref, 0, content), "honest")

        return (await exchange.fetch(ref, ask, "honest")).read_bytes()

    assert asyncio.run(main()) == content


def test_a_full_disk_is_told_where_it_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(tmp_path, ("a",))
    network.offer()

    class Full:
        def write(self, *_chunk: object) -> None:
            raise OSError(28, "No space left on device")

    incoming = network.receivers["a"]._incoming

    async def fetch() -> bytes:
        task = asyncio.ensure_future(network.fetch("a"))
        await asyncio.sleep(0.01)  # less than the sender waits before it sends
        monkeypatch.setattr(next(iter(incoming.values())), "partial", Full())
        return await task

    with pytest.raises(UserError, match="No space left"):
        run(network, fetch())
