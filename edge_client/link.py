"""The run as a client sees it: offers come in, files are fetched, reports are answered.

Rules: this file turns messages into calls and decides nothing. What the aggregator sends is repeated until
it is superseded, so only the newest offer counts. What the client needs an answer to it repeats itself.

Next: `edge_client/session.py`, the caller; `wire/messages.py`, the messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from edge_client.gate import Gate
from wire import topics
from wire.errors import PeerError, TooLarge, TransportError
from wire.exchange import Exchange
from wire.manifest import MAX_MANIFEST_BYTES, BlobRef, Manifest, decode_manifest
from wire.messages import Announcement, Bye, Hello, Offer, Receipt, Report, Usage, Want, decode, encode
from wire.mqtt import Broker, Connection, Packet
from wire.store import Store
from wire.tasks import end, within

REPORT_EVERY_S = 5.0
GOODBYE_S = 2.0
LOOK_AROUND_S = 0.5  # for further runs, once one is found

T = TypeVar("T")

log = logging.getLogger(__name__)


async def find_run(
    broker: Broker,
    client: str,
    run: str | None = None,
    gate: Gate | None = None,
    *,
    patient: bool = False,
) -> Announcement:
    """The newest open run on the broker, or the one called `run`; waits until there is one.

    gate: which runs count; None: all. patient: as in `Connection`.
    """
    gate = gate or Gate()
    async with Connection(broker, f"lamina-find-{client}", patient=patient) as connection:
        await connection.subscribe(topics.announcement(run or "+"))
        runs: dict[str, Announcement] = {}
        clock = asyncio.get_running_loop().time
        look_until_s, told = clock() + LOOK_AROUND_S, False
        while clock() < look_until_s or not runs:
            packet = await within(LOOK_AROUND_S, connection.packet())
            if packet is not None:
                _note(runs, packet, gate)
            elif not runs and not told:
                log.info("no run is open on %s yet, waiting for one", broker)
                told = True
        return max(runs.values(), key=lambda announcement: announcement.started_s)


def _note(runs: dict[str, Announcement], packet: Packet, gate: Gate) -> None:
    """Keep `runs` the open ones."""
    try:
        announcement = decode(packet.payload, Announcement)
    except PeerError as error:
        _ignored(packet, error)
        return
    if not gate.admits(announcement):
        return
    if announcement.open:
        runs[announcement.run] = announcement
    else:
        runs.pop(announcement.run, None)


def _ignored(packet: Packet, error: PeerError) -> None:
    topic = packet.topic[:200]
    log.warning("ignored a message on %r: %s", topic, error, extra={"topic": topic})


class Link:
    """A client's place in a run, within `Link.open`."""

    def __init__(
        self, connection: Connection, announcement: Announcement, client: str, store: Store, gate: Gate
    ) -> None:
        self.announcement = announcement
        self.client = client
        self._run = announcement.run
        self._connection = connection
        self._gate = gate
        self._exchange = Exchange(
            connection, store, announcement.chunk_bytes, lambda _ref, _peer: self._up("chunk")
        )
        self._news = asyncio.Condition()
        self._offer: Offer | None = None
        self._over = False
        self.replaced = False
        """Whether another run has begun under this one's name."""
        self._receipts: asyncio.Queue[Receipt] = asyncio.Queue()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, broker: Broker, announcement: Announcement, client: str, store: Store, gate: Gate | None = None
    ) -> AsyncIterator[Link]:
        """Connect, for as long as it takes. The broker says goodbye for us if we vanish.

        gate: which further announcements of the run count; None: all.
        """
        run = announcement.run
        goodbye = topics.up(run, client, "bye"), encode(Bye())
        async with Connection(broker, f"lamina-{run}-{client}", goodbye, patient=True) as connection:
            await connection.subscribe(
                topics.announcement(run), topics.offer(run), topics.down(run, client, "+")
            )
            try:
                yield cls(connection, announcement, client, store, gate or Gate())
            finally:
                with contextlib.suppress(TransportError):  # what ended the block says more
                    await within(GOODBYE_S, connection.publish(*goodbye))

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received so far at the MQTT socket."""
        return self._connection.bytes_sent, self._connection.bytes_received

    async def pump(self) -> None:
        """Take in what comes and send what is asked for, for ever."""
        await asyncio.gather(self._listen(), self._exchange.serve())

    async def heartbeat(self, hello: Hello) -> None:
        """Say who is here, now, at every heartbeat and after every reconnect."""
        while True:
            await self._connection.publish(self._up("hello"), encode(hello))
            await self._connection.until_reconnected(self.announcement.heartbeat_s)

    async def manifest(self) -> Manifest:
        """The run's. Raises `PeerError` if it is not one."""
        return decode_manifest(
            (await self.fetch(self.announcement.manifest, MAX_MANIFEST_BYTES)).read_bytes()
        )

    async def fetch(self, ref: BlobRef, max_bytes: int, silence_s: float = math.inf) -> Path:
        """A blob's file. Raises `TooLarge` without asking for it, `HashMismatch`, `Silent` if nothing has
        come for more than `silence_s`.
        """
        if ref.size_bytes > max_bytes:
            raise TooLarge(f"{ref.sha256[:16]} has {ref.size_bytes} bytes, at most {max_bytes} expected")
        topic = topics.blob(self._run, ref.sha256)
        try:
            await self._connection.subscribe(topic)
            path = await self._exchange.fetch(ref, self._ask, silence_s=silence_s)
            fields = {"run": self._run, "sha256": ref.sha256, "bytes": ref.size_bytes}
            log.debug("have %s", ref.sha256[:16], extra=fields)
            return path
        finally:
            self._connection.unsubscribe(topic)

    async def next_offer(self, after: Offer | None) -> Offer | None:
        """The newest offer, as soon as it is another than `after`; None when the run is over."""
        async with self._news:
            await self._news.wait_for(lambda: self._over or self._is_newer(after))
            return None if self._over else self._offer

    async def unless_over(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`; None, and its cancellation, once the run is over."""
        return await self._unless(lambda: self._over, work)

    async def unless_superseded(
        self, offer: Offer, work: Coroutine[Any, Any, T], may_lag: Callable[[Offer], int]
    ) -> T | None:
        """The result of `work`; None, and its cancellation, once other work than this is on offer.

        The same round, offered for longer, is the same work. may_lag: by how many rounds of the stage the
        offer may be behind the newest one.
        """

        def superseded() -> bool:
            newest = self._offer
            if newest is None or _work(newest) == _work(offer):
                return newest is None
            lag = newest.key.round - offer.key.round
            return newest.key.stage != offer.key.stage or not 0 < lag <= may_lag(offer)

        return await self._unless(lambda: self._over or superseded(), work)

    async def _unless(self, ended: Callable[[], bool], work: Coroutine[Any, Any, T]) -> T | None:
        async def until_ended() -> None:
            async with self._news:
                await self._news.wait_for(ended)

        working, ending = asyncio.ensure_future(work), asyncio.ensure_future(until_ended())
        try:
            await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            await end(working, ending)

    async def report(self, report: Report, update: Path) -> Receipt:
        """Tell that an update is ready, again and again, until the aggregator has answered."""
        self._exchange.offer(report.update, update)
        self._receipts = asyncio.Queue()  # receipts of an earlier attempt at this round do not count
        self._record("report", report, f"reporting {report.update.sha256[:16]}")
        try:
            while True:
                await self._connection.publish(self._up("report"), encode(report))
                if receipt := await within(REPORT_EVERY_S, self._receipt(report)):
                    answer = receipt.refusal or "accepted"
                    self._record("receipt", report, answer, refusal=receipt.refusal)
                    return receipt
        finally:
            self._exchange.withdraw(report.update)

    async def usage(self, usage: Usage) -> None:
        """Tell what a round has cost."""
        await self._connection.publish(self._up("usage"), encode(usage))

    def _record(self, event: str, report: Report, text: str, **more: object) -> None:
        """For the ledger that a log is: what was sent, and what came of it."""
        fields = {
            "event": event,
            "run": self._run,
            "sha256": report.update.sha256,
            "bytes": report.update.size_bytes,
            "num_examples": report.num_examples,
        }
        log.debug("%s: %s", report.key, text, extra={**fields, **more})

    async def _receipt(self, report: Report) -> Receipt:
        while True:
            receipt = await self._receipts.get()
            if receipt.key == report.key:
                return receipt

    async def _ask(self, want: Want) -> None:
        await self._connection.publish(self._up("want"), encode(want))

    def _up(self, kind: topics.Up) -> str:
        return topics.up(self._run, self.client, kind)

    def _is_newer(self, offer: Offer | None) -> bool:
        newest = self._offer
        return newest is not None and (
            offer is None or (newest.key, newest.opened_s) != (offer.key, offer.opened_s)
        )

    async def _listen(self) -> None:
        while True:
            packet = await self._connection.packet()
            try:
                await self._take(packet)
            except PeerError as error:
                _ignored(packet, error)

    async def _take(self, packet: Packet) -> None:
        kind = topics.kind_of(packet.topic)
        if packet.topic == topics.announcement(self._run):
            announcement = decode(packet.payload, Announcement)
            if not self._gate.admits(announcement):
                return
            self.replaced = announcement.open and _identity(announcement) != _identity(self.announcement)
            if self.replaced or not announcement.open:
                async with self._news:
                    self._over = True
                    self._news.notify_all()
        elif packet.topic == topics.offer(self._run):
            offer = decode(packet.payload, Offer)
            async with self._news:
                self._offer = offer
                self._news.notify_all()
        elif kind == "receipt":
            self._receipts.put_nowait(decode(packet.payload, Receipt))
        elif kind == "want":
            self._exchange.want("", decode(packet.payload, Want))
        else:
            self._exchange.chunk(packet.payload)


def _identity(announcement: Announcement) -> tuple[object, ...]:
    """What stays the same as long as a run goes on."""
    return announcement.manifest, announcement.started_s, announcement.chunk_bytes


def _work(offer: Offer | None) -> tuple[object, ...] | None:
    """What an offer asks for, however often it is made."""
    return None if offer is None else (offer.key, offer.parameters, offer.frozen, offer.plan)
