"""MQTT: the only file that knows paho.

Rules: everything is QoS 1 on a clean session, so a broker may forget all it has: subscriptions are renewed
at every (re)connect, and whoever needs an answer asks again. paho's thread does nothing but hand over to
the event loop. At most `WINDOW` publishes wait for their acknowledgement, and at most `MAX_WAITING`
messages for their reader; what comes on top of these is dropped and counted, like on any bad link.
A connection that cannot be made to begin with is an error; one that is lost is made again for as long as it
takes. So is one on which the publish that waits longest is not acknowledged: brokers that throttle drop
messages so, and only on a new connection may a message be sent again (MQTT 5.0, section 4.4), which paho
then does.

MQTT 3.1.1 (OASIS, 2014), which brokers of MQTT 5 speak too; `?version=5` asks for MQTT 5, in which a broker
says so when it does not let us publish somewhere.
Next: `wire/exchange.py`, which moves blobs over a connection; `wire/tls.py`, what `mqtts://` needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from wire.errors import TransportError, UserError
from wire.tasks import end, within
from wire.tls import Credentials, explain

WINDOW = 16
MAX_WAITING = 256
KEEPALIVE_S = 30
CONNECT_TIMEOUT_S = 10.0
MAX_RECONNECT_DELAY_S = 30
ACK_S = 20.0
MAX_ACK_S = 300.0
_NOT_AUTHORIZED = 0x87  # MQTT 5, 3.4.2.1

_CHECK = "check the address and that the broker runs (`lamina broker` starts one)"

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
    credentials: Credentials = field(default_factory=Credentials)

    @classmethod
    def parse(cls, url: str, credentials: Credentials | None = None) -> Broker:
        """`mqtt://[user:password@]host[:port][?version=5]`, or `mqtts://` for TLS.

        credentials: for `mqtts://` only. Raises `UserError`, also for files that cannot be used.
        """
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
        if credentials is not None and credentials.any:
            if parts.scheme != "mqtts":
                raise UserError(f"{shown} is without TLS, so it takes no certificates", "write mqtts://")
            credentials.context()
        return cls(
            host=parts.hostname,
            port=port or (8883 if parts.scheme == "mqtts" else 1883),
            tls=parts.scheme == "mqtts",
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            version=5 if version == "5" else 4,
            credentials=credentials or Credentials(),
        )

    def __str__(self) -> str:
        return f"mqtt{'s' if self.tls else ''}://{self.host}:{self.port}"


@dataclass(frozen=True)
class Packet:
    """A message as it came; empty payloads, which only clear what was retained, are left out."""

    topic: str
    payload: bytes


class _CountingClient(paho.Client):
    """paho's client, which counts every byte at its socket (within TLS, if there is TLS).

    It also keeps the TLS error that ended the last connection: paho tells only that it has ended.
    """

    bytes_sent = 0
    bytes_received = 0
    tls_error: ssl.SSLError | None = None

    def _ssl_wrap_socket(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        """As paho's, which leaves the socket open when the handshake fails."""
        assert self._ssl_context is not None
        secure = self._ssl_context.wrap_socket(
            tcp_sock, server_hostname=self._host, do_handshake_on_connect=False
        )
        secure.settimeout(CONNECT_TIMEOUT_S)
        self.tls_error = None
        try:
            secure.do_handshake()
        except OSError as error:
            self.tls_error = error if isinstance(error, ssl.SSLError) else None
            secure.close()
            raise
        return secure

    def _sock_send(self, buf: Any) -> int:
        try:
            sent = super()._sock_send(buf)
        except BlockingIOError:
            raise
        except OSError:
            with contextlib.suppress(OSError):
                self._sock_recv(1)  # an alert that says why may have come before
            raise
        self.bytes_sent += sent
        return sent

    def _sock_recv(self, bufsize: int) -> bytes:
        try:
            received = super()._sock_recv(bufsize)
        except ssl.SSLError as error:
            self.tls_error = error
            raise
        self.bytes_received += len(received)
        return received


class Connection:
    """A connection within `async with`; entering raises `TransportError` where no broker takes us.

    client_id: unique among the broker's clients. will: topic and payload that the broker publishes if
    this connection ends without a goodbye. patient: entering waits for a broker as long as it takes.
    """

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        will: tuple[str, bytes] | None = None,
        *,
        patient: bool = False,
    ) -> None:
        self.broker = broker
        self._patient = patient
        session: dict[str, Any] = (
            {"protocol": paho.MQTTv5}
            if broker.version == 5
            else {"protocol": paho.MQTTv311, "clean_session": True}
        )
        self._paho = _CountingClient(CallbackAPIVersion.VERSION2, client_id, **session)
        if will is not None:
            self._paho.will_set(*will, qos=1)
        if broker.tls:
            self._paho.tls_set_context(broker.credentials.context())
        if broker.username is not None:
            self._paho.username_pw_set(broker.username, broker.password)
        # A pause grows from one try to the next, and differs from client to client: they do not all come at
        # once when a broker is back.
        self._paho.reconnect_delay_set(random.uniform(1, 2), MAX_RECONNECT_DELAY_S)  # type: ignore[arg-type]
        self._paho.connect_timeout = CONNECT_TIMEOUT_S
        self._paho.on_connect = lambda _client, _data, _flags, reason, _properties: self._later(
            self._on_connect, reason
        )
        self._paho.on_connect_fail = lambda _client, _data: self._later(
            self._on_connect_fail, self._paho.tls_error
        )
        self._paho.on_disconnect = lambda _client, _data, _flags, reason, _properties: self._later(
            self._on_disconnect, reason, self._paho.tls_error
        )
        self._paho.on_subscribe = lambda _client, _data, mid, reasons, _properties: self._later(
            self._on_subscribe, mid, reasons
        )
        self._paho.on_publish = lambda _client, _data, mid, reason, _properties: self._later(
            self._on_publish, mid, reason
        )
        self._paho.on_message = lambda _client, _data, message: self._later(
            self._on_message, Packet(message.topic, bytes(message.payload))
        )
        self._filters: set[str] = set()
        self._published: dict[int, asyncio.Future[str]] = {}  # by message id; why it was refused, or empty
        self._subscribed: dict[int, asyncio.Future[str]] = {}  # likewise
        self._packets: asyncio.Queue[Packet] = asyncio.Queue(MAX_WAITING)
        self._num_come = self._num_read = 0
        self._read = asyncio.Event()
        self._window = asyncio.Semaphore(WINDOW)
        self._renewal: int | None = None  # the message id of the subscriptions that this connect renews
        self._connected = asyncio.Event()  # set, and replaced, once a connect has renewed them
        self._state: Literal["trying", "up", "refused"] = "trying"
        self._fields = {"broker": str(broker)}  # of what is logged
        self._closing = False
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
        self._entered: asyncio.Future[bool] = self._loop.create_future()  # or why not
        try:
            address = self.broker.host, self.broker.port, KEEPALIVE_S
            if self._patient:
                self._paho.connect_async(*address)
            else:
                await asyncio.to_thread(self._paho.connect, *address)
            self._paho.loop_start()
            if not await within(math.inf if self._patient else CONNECT_TIMEOUT_S, self._entered):
                raise TransportError(f"{self.broker} does not answer as an MQTT broker", _CHECK)
        except BaseException as error:
            await self._stop()
            if isinstance(error, ssl.SSLError | ConnectionResetError) and self.broker.tls:
                raise self._tls_failure(error, in_handshake=True) from error
            if isinstance(error, OSError | ValueError):
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise TransportError(f"no broker at {self.broker}: {reason}", _CHECK) from error
            raise
        finally:
            await end(self._entered)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._stop()

    async def subscribe(self, *filters: str) -> None:
        """Return once the broker has confirmed, or at once while it is away; renewed at every reconnect.

        Raises `TransportError` where the broker refuses.
        """
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
        """Return once the broker has it. While the broker is away this waits for it to come back.

        Raises `TransportError` where a broker says that we must not (in MQTT 5; in 3.1.1 it cannot).
        """
        async with self._window:
            mid = self._paho.publish(topic, payload, qos=1, retain=retain).mid
            acknowledged = self._published[mid] = self._loop.create_future()
            if len(self._published) == 1:
                self._watch_oldest()
            try:
                refusal = await acknowledged
            finally:
                self._settle(mid)
        if refusal:
            raise TransportError(
                f"{self.broker} does not let us write to {topic}: {refusal}",
                "a client writes under its own name only: that of its certificate or user",
            )

    async def packet(self) -> Packet:
        """The next message that comes in on the subscriptions."""
        packet = await self._packets.get()
        self._num_read += 1
        self._read.set()
        return packet

    async def caught_up(self) -> None:
        """Return once `packet` has given out all messages that have come so far."""
        await asyncio.sleep(0)  # some may be on their way from the network's thread
        last = self._num_come
        while self._num_read < last:
            self._read.clear()
            await self._read.wait()

    async def until_reconnected(self, timeout_s: float) -> bool:
        """Wait for the next reconnect, at most so long; whether there was one.

        By then the broker has answered to the subscriptions: no message to those that it grants is missed.
        """
        return bool(await within(timeout_s, self._connected.wait()))

    def _settle(self, mid: int) -> asyncio.Future[str] | None:
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
        if self._published and self._state == "up" and not self._closing:
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
        self._state = "refused" if reason.is_failure else "up"
        if reason.is_failure:
            self._failed(TransportError(f"{self.broker} refuses us: {reason}", "check user and password"))
            return
        for confirmed in self._subscribed.values():  # the connection they were asked on is gone
            if not confirmed.done():
                confirmed.set_result("")
        self._subscribed.clear()
        log.debug("connected to %s", self.broker, extra=self._fields)
        self._watch_oldest()
        if not self._entered.done():
            self._entered.set_result(True)
        self._renewal = None
        if self._filters:
            _, self._renewal = self._paho.subscribe([(one, 1) for one in sorted(self._filters)])
        else:
            self._reconnected()

    def _reconnected(self) -> None:
        self._connected.set()
        self._connected = asyncio.Event()

    def _on_disconnect(self, reason: ReasonCode, tls_error: ssl.SSLError | None) -> None:
        was, self._state = self._state, "trying"
        self._watch_oldest()
        if was == "up" and not self._closing:
            log.warning("lost %s (%s), connecting again", self.broker, reason, extra=self._fields)
        elif was == "trying" and self.broker.tls:
            self._failed(self._tls_failure(tls_error))
        elif was == "trying":
            self._failed(TransportError(f"{self.broker} does not answer as an MQTT broker", _CHECK))

    def _on_connect_fail(self, tls_error: ssl.SSLError | None) -> None:
        if tls_error is not None:
            self._failed(self._tls_failure(tls_error, in_handshake=True))
        elif not self._entered.done():
            self._failed(TransportError(f"no broker at {self.broker}", _CHECK))

    def _tls_failure(self, error: OSError | None, *, in_handshake: bool = False) -> TransportError:
        what, hint = explain(error, self.broker.credentials, in_handshake=in_handshake)
        return TransportError(f"{self.broker} {what}", hint)

    def _failed(self, error: TransportError) -> None:
        """The first time it ends the attempt to enter, unless we are patient; later on we try again."""
        if not self._entered.done() and not self._patient:
            self._entered.set_exception(error)
        elif not self._closing:
            log.warning("%s - %s; trying again", error, error.hint, extra=self._fields)

    def _on_subscribe(self, mid: int, reasons: list[ReasonCode]) -> None:
        refusal = next((str(reason) for reason in reasons if reason.is_failure), "")
        if mid == self._renewal:
            self._renewal = None
            if refusal:
                log.warning("%s refuses a subscription: %s", self.broker, refusal, extra=self._fields)
            self._reconnected()
        confirmed = self._subscribed.pop(mid, None)
        if confirmed is not None and not confirmed.done():
            confirmed.set_result(refusal)

    def _on_publish(self, mid: int, reason: ReasonCode) -> None:
        if next(iter(self._published), None) == mid:
            # On a slow link an acknowledgement takes its time: connecting too soon would only add to it.
            taken_s = self._loop.time() - self._oldest_since_s
            self._patience_s = min(max(ACK_S, 4 * taken_s), MAX_ACK_S)
        acknowledged = self._settle(mid)
        if acknowledged is not None and not acknowledged.done():
            acknowledged.set_result(str(reason) if reason.value == _NOT_AUTHORIZED else "")

    def _on_message(self, packet: Packet) -> None:
        if not packet.payload:
            return
        try:
            self._packets.put_nowait(packet)
            self._num_come += 1
        except asyncio.QueueFull:
            self.num_dropped += 1
            if self.num_dropped.bit_count() == 1:  # 1, 2, 4, 8, ...: a flood must not flood the log
                log.warning("%d messages dropped, they come faster than they are read", self.num_dropped)
