"""MQTT: the only file that knows paho.

Rules: everything is QoS 1 on a clean session, so a broker may forget all it has: subscriptions are renewed
at every (re)connect, and whoever needs an answer asks again. paho's thread does nothing but hand over to
the event loop. At most `WINDOW` publishes wait for their acknowledgement, and at most `MAX_WAITING`
messages for their reader; what comes on top of these is dropped and counted, like on any bad link.
A connection that is lost is made again for as long as it takes. So is one on which the publish that waits
longest is not acknowledged: brokers that throttle drop messages so, and only on a new connection may a
message be sent again (MQTT 5.0, section 4.4), which paho then does.

MQTT 3.1.1 (OASIS, 2014), which brokers of MQTT 5 speak too; `?version=5` asks for MQTT 5.
Next: `wire/exchange.py`, which moves blobs over a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from wire.errors import TransportError, UserError
from wire.tasks import within

WINDOW = 16
MAX_WAITING = 256
KEEPALIVE_S = 30
CONNECT_TIMEOUT_S = 10.0
MAX_RECONNECT_DELAY_S = 30
ACK_S = 20.0
MAX_ACK_S = 300.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Broker:
    """Where a broker is and how to enter; `str()` leaves the password out."""

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    version: Literal[4, 5] = 4

    @classmethod
    def parse(cls, url: str) -> Broker:
        """`mqtt://[user:password@]host[:port][?version=5]`, or `mqtts://` for TLS. Raises `UserError`."""
        shown = repr(re.sub(r"^(\w+:/+)?.*@", r"\1", url))  # no password in a message
        hint = "write it as mqtt://host:1883, or mqtts://host:8883 for TLS"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UserError(f"{shown} is not a broker's address", hint) from error
        version = parse_qs(parts.query).get("version", ["4"])[-1]
        if (
            parts.scheme not in ("mqtt", "mqtts")
            or not parts.hostname
            or parts.path not in ("", "/")
            or port == 0
        ):
            raise UserError(f"{shown} is not a broker's address", hint)
        if version not in ("4", "5"):
            raise UserError(f"{shown} asks for MQTT version {version}", "4 is MQTT 3.1.1, 5 is MQTT 5")
        return cls(
            host=parts.hostname,
            port=port or (8883 if parts.scheme == "mqtts" else 1883),
            tls=parts.scheme == "mqtts",
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            version=5 if version == "5" else 4,
        )

    def __str__(self) -> str:
        return f"mqtt{'s' if self.tls else ''}://{self.host}:{self.port}"


@dataclass(frozen=True)
class Packet:
    """A message as it came; empty payloads, which only clear what was retained, are left out."""

    topic: str
    payload: bytes


class _CountingClient(paho.Client):
    """paho's client, which counts every byte at its socket (within TLS, if there is TLS)."""

    bytes_sent = 0
    bytes_received = 0

    def _sock_send(self, buf: Any) -> int:
        sent = super()._sock_send(buf)
        self.bytes_sent += sent
        return sent

    def _sock_recv(self, bufsize: int) -> bytes:
        received = super()._sock_recv(bufsize)
        self.bytes_received += len(received)
        return received


class Connection:
    """A connection within `async with`; entering raises `TransportError` where no broker takes us.

    client_id: unique among the broker's clients. will: topic and payload that the broker publishes if
    this connection ends without a goodbye.
    """

    def __init__(self, broker: Broker, client_id: str, will: tuple[str, bytes] | None = None) -> None:
        self.broker = broker
        session: dict[str, Any] = (
            {"protocol": paho.MQTTv5}
            if broker.version == 5
            else {"protocol": paho.MQTTv311, "clean_session": True}
        )
        self._paho = _CountingClient(CallbackAPIVersion.VERSION2, client_id, **session)
        if will is not None:
            self._paho.will_set(*will, qos=1)
        if broker.tls:
            self._paho.tls_set()
        if broker.username is not None:
            self._paho.username_pw_set(broker.username, broker.password)
        self._paho.reconnect_delay_set(1, MAX_RECONNECT_DELAY_S)
        self._paho.connect_timeout = CONNECT_TIMEOUT_S
        self._paho.on_connect = lambda _client, _data, _flags, reason, _properties: self._later(
            self._on_connect, reason
        )
        self._paho.on_disconnect = lambda _client, _data, _flags, reason, _properties: self._later(
            self._on_disconnect, reason
        )
        self._paho.on_subscribe = lambda _client, _data, mid, reasons, _properties: self._later(
            self._on_subscribe, mid, reasons
        )
        self._paho.on_publish = lambda _client, _data, mid, _reason, _properties: self._later(
            self._on_publish, mid
        )
        self._paho.on_message = lambda _client, _data, message: self._later(
            self._on_message, Packet(message.topic, bytes(message.payload))
        )
        self._filters: set[str] = set()
        self._published: dict[int, asyncio.Future[None]] = {}  # by message id, oldest first
        self._subscribed: dict[int, asyncio.Future[str]] = {}  # likewise; why it was refused, or empty
        self._packets: asyncio.Queue[Packet] = asyncio.Queue(MAX_WAITING)
        self._window = asyncio.Semaphore(WINDOW)
        self._connected = asyncio.Event()  # set, and replaced, at every connect
        self._refused = asyncio.Event()
        self._refusal = ""
        self._fields = {"broker": str(broker)}  # of what is logged
        self._closing = False
        self._online = False
        self._patience_s = ACK_S  # for the acknowledgement of the oldest publish
        self._oldest_since_s = 0.0  # a time of the loop
        self._overdue: asyncio.TimerHandle | None = None
        self.num_dropped = 0

    @property
    def bytes_sent(self) -> int:
        """At the MQTT socket, since the beginning, over all reconnects."""
        return self._paho.bytes_sent

    @property
    def bytes_received(self) -> int:
        """As `bytes_sent`."""
        return self._paho.bytes_received

    async def __aenter__(self) -> Connection:
        self._loop = asyncio.get_running_loop()
        connected = asyncio.ensure_future(self._connected.wait())
        refused = asyncio.ensure_future(self._refused.wait())
        hint = "check the address and that the broker runs (`lamina broker` starts one)"
        try:
            await asyncio.to_thread(self._paho.connect, self.broker.host, self.broker.port, KEEPALIVE_S)
            self._paho.loop_start()
            await asyncio.wait(
                {connected, refused}, timeout=CONNECT_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if refused.done():
                raise TransportError(
                    f"{self.broker} refuses us: {self._refusal}", "check user and password"
                )
            if not connected.done():
                raise TransportError(f"{self.broker} does not answer as an MQTT broker", hint)
        except BaseException as error:
            await self._stop()
            if isinstance(error, OSError | ValueError):
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise TransportError(f"no broker at {self.broker}: {reason}", hint) from error
            raise
        finally:
            connected.cancel()
            refused.cancel()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._stop()

    async def subscribe(self, *filters: str) -> None:
        """Return once the broker has confirmed; renewed at every reconnect. Raises `TransportError`."""
        self._filters.update(filters)
        _, mid = self._paho.subscribe([(one, 1) for one in filters])
        if mid is None:  # the broker is away: the next connect brings it
            return
        confirmed = self._subscribed[mid] = self._loop.create_future()
        if refusal := await confirmed:
            raise TransportError(
                f"{self.broker} refuses the subscription to {', '.join(filters)}: {refusal}",
                "check the broker's access rules",
            )

    def unsubscribe(self, *filters: str) -> None:
        """No confirmation is waited for: a message too many does no harm."""
        self._filters.difference_update(filters)
        self._paho.unsubscribe(list(filters))

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Return once the broker has it. While the broker is away this waits for it to come back."""
        async with self._window:
            mid = self._paho.publish(topic, payload, qos=1, retain=retain).mid
            acknowledged = self._published[mid] = self._loop.create_future()
            if len(self._published) == 1:
                self._watch_oldest()
            try:
                await acknowledged
            finally:
                self._settle(mid)

    async def packet(self) -> Packet:
        """The next message that comes in on the subscriptions."""
        return await self._packets.get()

    async def until_reconnected(self, timeout_s: float) -> bool:
        """Wait for the next reconnect, at most so long; whether there was one."""
        return bool(await within(timeout_s, self._connected.wait()))

    def _settle(self, mid: int) -> asyncio.Future[None] | None:
        """A publish waits no longer. What it waited for, None if it did not wait any more."""
        was_oldest = next(iter(self._published), None) == mid
        settled = self._published.pop(mid, None)
        if was_oldest:
            self._watch_oldest()
        return settled

    def _watch_oldest(self) -> None:
        """From now on the oldest publish, if there is one, has all our patience."""
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
        if self._published and self._online and not self._closing:
            self._oldest_since_s = self._loop.time()
            self._overdue = self._loop.call_later(self._patience_s, self._renew)

    def _renew(self) -> None:
        """End the connection as a cut cable would; paho makes it anew and sends again what waits."""
        log.warning(
            "%s has left a message unacknowledged for %.0f s, connecting again",
            self.broker,
            self._patience_s,
            extra=self._fields,
        )
        self._patience_s = min(2 * self._patience_s, MAX_ACK_S)
        connection = self._paho.socket()
        if isinstance(connection, socket.socket):
            with contextlib.suppress(OSError):  # it has just ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    async def _stop(self) -> None:
        self._closing = True
        self._watch_oldest()
        self._paho.disconnect()
        await asyncio.to_thread(self._paho.loop_stop)

    # From here on: in the event loop, on behalf of paho's thread.

    def _later(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            return

    def _on_connect(self, reason: ReasonCode) -> None:
        if reason.is_failure:
            self._refusal = str(reason)
            self._refused.set()
            log.warning("%s refuses us: %s", self.broker, reason, extra=self._fields)
            return
        for confirmed in self._subscribed.values():  # the connection they were asked on is gone
            if not confirmed.done():
                confirmed.set_result("")
        self._subscribed.clear()
        if self._filters:
            self._paho.subscribe([(one, 1) for one in sorted(self._filters)])
        log.debug("connected to %s", self.broker, extra=self._fields)
        self._online = True
        self._watch_oldest()
        self._connected.set()
        self._connected = asyncio.Event()

    def _on_disconnect(self, reason: ReasonCode) -> None:
        self._online = False
        self._watch_oldest()
        if not self._closing:
            log.warning("lost %s (%s), connecting again", self.broker, reason, extra=self._fields)

    def _on_subscribe(self, mid: int, reasons: list[ReasonCode]) -> None:
        confirmed = self._subscribed.pop(mid, None)
        if confirmed is not None and not confirmed.done():
            confirmed.set_result(next((str(reason) for reason in reasons if reason.is_failure), ""))

    def _on_publish(self, mid: int) -> None:
        if next(iter(self._published), None) == mid:
            # On a slow link an acknowledgement takes its time: connecting too soon would only add to it.
            taken_s = self._loop.time() - self._oldest_since_s
            self._patience_s = min(max(ACK_S, 4 * taken_s), MAX_ACK_S)
        acknowledged = self._settle(mid)
        if acknowledged is not None and not acknowledged.done():
            acknowledged.set_result(None)

    def _on_message(self, packet: Packet) -> None:
        if not packet.payload:
            return
        try:
            self._packets.put_nowait(packet)
        except asyncio.QueueFull:
            self.num_dropped += 1
            if self.num_dropped.bit_count() == 1:  # 1, 2, 4, 8, ...: a flood must not flood the log
                log.warning("%d messages dropped, they come faster than they are read", self.num_dropped)
