"""The run as the aggregator sees it: clients come and go, reports come in, offers go out.

Rules: this file turns messages into calls and decides nothing. The announcement and the newest offer are
retained and repeated every few seconds, so a client that comes late, or a broker that has forgotten
everything, has them soon. Nobody is asked for an update before it is granted: at most `UPLOADS` at once.

Next: `aggregator/run.py`, the caller; `wire/messages.py`, the messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from aggregator.cohort import Clients
from aggregator.events import ClientCame, ClientLeft, Tell
from wire import topics
from wire.errors import Malformed, PeerError
from wire.exchange import Exchange
from wire.manifest import BlobRef
from wire.messages import Announcement, Hello, Offer, Receipt, Report, Usage, Want, decode, encode
from wire.mqtt import Connection, Packet
from wire.store import Store

UPLOADS = 4
SILENCE_S = 20.0  # then the place is another's; a client that is back reports again

log = logging.getLogger(__name__)


class Link:
    """A run's place on the broker.

    take_report, take_usage: called with the client's name; errors of the peer's are logged.
    """

    def __init__(
        self,
        connection: Connection,
        announcement: Announcement,
        store: Store,
        clients: Clients,
        tell: Tell,
        take_report: Callable[[str, Report], None],
        take_usage: Callable[[str, Usage], None],
    ) -> None:
        self._connection = connection
        self._announcement = announcement
        self.run = announcement.run
        self._clients = clients
        self._tell = tell
        self._take_report = take_report
        self._take_usage = take_usage
        self._exchange = Exchange(connection, store, announcement.chunk_bytes, self._chunk_topic)
        self._uploads = asyncio.Semaphore(UPLOADS)
        self._offer: tuple[Offer, float] | None = None
        self._changed = asyncio.Event()  # somebody came or went

    def serve_file(self, ref: BlobRef, path: Path) -> None:
        """From now on clients may fetch this."""
        self._exchange.offer(ref, path)

    def withdraw_file(self, ref: BlobRef) -> None:
        """From now on they may not."""
        self._exchange.withdraw(ref)

    async def pump(self, announce_s: float) -> None:
        """Take in what comes, send what is asked for, repeat what is on offer; for ever."""
        await self._connection.subscribe(topics.up(self.run, "+", "+"))
        await asyncio.gather(self._listen(), self._exchange.serve(), self._repeat(announce_s))

    async def offer(self, offer: Offer) -> None:
        """Open a round, `offer.deadline_s` from now."""
        self._offer = (offer, asyncio.get_running_loop().time() + offer.deadline_s)
        await self._publish_offer()

    async def close(self) -> None:
        """Tell that the run is over. The announcement stays, for those who are away right now."""
        self._offer = None
        self._announcement = replace(self._announcement, open=False)
        await self._announce()
        await self._connection.publish(topics.offer(self.run), b"", retain=True)

    async def until_available(self, count: int) -> list[str]:
        """The clients that are there, once there are so many."""
        while len(available := self.available()) < count:
            self._changed.clear()
            await self._changed.wait()
        return available

    def available(self) -> list[str]:
        """The clients that are there now."""
        return self._clients.available(asyncio.get_running_loop().time())

    async def fetch(self, client: str, ref: BlobRef) -> Path:
        """A client's update, once it is its turn. Raises `HashMismatch`, `Silent`."""

        async def grant(want: Want) -> None:
            await self._connection.publish(topics.down(self.run, client, "want"), encode(want))

        async with self._uploads:
            path = await self._exchange.fetch(ref, grant, client, SILENCE_S)
        fields = {"client": client, "sha256": ref.sha256, "bytes": ref.size_bytes}
        log.debug("fetched an update of %s", client, extra=fields)
        return path

    async def receipt(self, client: str, receipt: Receipt) -> None:
        """Answer a report."""
        fields = {"client": client, "refusal": receipt.refusal}
        log.debug("%s: telling %s: %s", receipt.key, client, receipt.refusal or "accepted", extra=fields)
        await self._connection.publish(topics.down(self.run, client, "receipt"), encode(receipt))

    def _chunk_topic(self, ref: BlobRef, peer: str | None) -> str:
        return topics.blob(self.run, ref.sha256) if peer is None else topics.down(self.run, peer, "chunk")

    async def _repeat(self, announce_s: float) -> None:
        while True:
            await self._announce()
            await self._publish_offer()
            await self._connection.until_reconnected(announce_s)

    async def _announce(self) -> None:
        topic = topics.announcement(self.run)
        await self._connection.publish(topic, encode(self._announcement), retain=True)

    async def _publish_offer(self) -> None:
        if self._offer is not None:
            offer, deadline = self._offer
            remaining_s = max(0.0, deadline - asyncio.get_running_loop().time())
            copy = encode(replace(offer, deadline_s=remaining_s))
            await self._connection.publish(topics.offer(self.run), copy, retain=True)

    async def _listen(self) -> None:
        while True:
            packet = await self._connection.packet()
            try:
                await self._take(packet)
            except PeerError as error:
                topic = packet.topic[:200]
                log.warning("ignored a message on %r: %s", topic, error, extra={"topic": topic})

    async def _take(self, packet: Packet) -> None:
        client, kind = topics.client_of(packet.topic), topics.kind_of(packet.topic)
        if not topics.is_name(client):
            raise Malformed("the topic names no client")
        if kind == "hello":
            hello = decode(packet.payload, Hello)
            if self._clients.hello(client, hello, asyncio.get_running_loop().time()):
                self._tell(ClientCame(client, hello))
                self._changed.set()
        elif kind == "bye":
            if self._clients.bye(client) and self._announcement.open:  # at the end they all go
                self._tell(ClientLeft(client))
                self._changed.set()
        elif kind == "want":
            self._exchange.want(client, decode(packet.payload, Want))
        elif kind == "chunk":
            self._exchange.chunk(packet.payload, client)
        elif kind == "report":
            self._take_report(client, decode(packet.payload, Report))
        elif kind == "usage":
            self._take_usage(client, decode(packet.payload, Usage))
