"""`lamina broker`: a small MQTT broker, for the demo, for tests and for a home network.

It is amqtt, which is pure Python and speaks MQTT 3.1.1 over TCP, run in a process of its own.

Rules: it is not durable. Nothing survives its end, a session ends with its connection (clients ask for a
clean one), and a QoS 1 message under way when a connection breaks may be lost; Lamina's transfer asks for
what it misses. Whoever reaches it may read and write everything. Faults of amqtt that Lamina would meet are
mended by overriding; the docstrings name them. amqtt is imported only when a broker starts.

Next: `wire/mqtt.py`, the clients' side.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from lamina.logs import log_format_option
from lamina.options import when_told_to_stop
from wire.errors import UserError

_MAX_QUEUED = 2000
"""Messages that may wait for one subscriber."""

_CONNECT_S = 10
"""How long a new connection may take to say who it is."""

_CLOSE_S = 2
"""How long a peer may take to read the rest before its connection is cut."""


@click.command("broker", short_help="A small MQTT broker.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=1883, show_default=True, help="0 takes a free port."
)
@log_format_option
def command(host: str, port: int) -> None:
    """Run a small MQTT broker until it is interrupted.

    For trying Lamina out and for a home network: it stores nothing, and whoever can reach it may read and
    write everything. Prints its address once it is listening.
    """
    make_broker = _broker_class()
    listener = _listen(host, port)
    logging.basicConfig(level=logging.WARNING, format="broker: %(message)s")
    # Its warnings tell of acknowledgements that came late, which happens on any slow network.
    logging.getLogger("amqtt.mqtt.protocol").setLevel(logging.ERROR)
    asyncio.run(_serve(make_broker, listener))


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `UserError` if there cannot be one."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use", "choose another --port; 0 takes a free one"
            ) from error
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        reason = (reason or str(error)).partition(" (while")[0]
        raise UserError(
            f"cannot listen on port {port} of {host}: {reason}",
            "choose another --port or --host; 127.0.0.1 is always there",
        ) from error


async def _serve(make_broker: Any, listener: socket.socket) -> None:
    """Run until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    when_told_to_stop(stop.set)
    broker = make_broker(listener)
    await broker.start()
    host, port = listener.getsockname()[:2]
    click.echo(f"listening on mqtt://{f'[{host}]' if ':' in host else host}:{port}")
    await stop.wait()
    logging.disable()  # amqtt reports each message that its end cuts off, with a traceback
    await asyncio.wait([asyncio.ensure_future(broker.shutdown())], timeout=_CLOSE_S)


def _broker_class() -> Any:
    """The class of the broker, made from a listening socket. Raises `UserError` without amqtt."""
    try:
        from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter
        from amqtt.broker import Broker
        from amqtt.errors import ProtocolHandlerError
        from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
        from amqtt.session import OutgoingApplicationMessage
    except ImportError as error:
        raise UserError("the broker needs amqtt", 'pip install "lamina[broker]"') from error

    class Payload(bytes):
        """amqtt formats every message for a debug log that nobody reads: 1 to 2 ms for a chunk."""

        def __repr__(self) -> str:
            return f"<{len(self)} bytes>"

    class Reader(StreamReaderAdapter):  # type: ignore[misc]
        """Cuts the connection when nothing comes: amqtt waits for ever, and a last will with it."""

        def __init__(self, reader: asyncio.StreamReader, cut: Callable[[], None]) -> None:
            super().__init__(reader)
            self.patience_s: float | None = _CONNECT_S
            self._cut = cut

        async def read(self, n: int = -1) -> Any:
            if self.patience_s is None:
                return await super().read(n)
            timer = asyncio.get_running_loop().call_later(self.patience_s, self._cut)
            try:
                return await super().read(n)
            finally:
                timer.cancel()

    class Writer(StreamWriterAdapter):  # type: ignore[misc]
        """Closes even if the peer no longer reads, and drops what a lost connection cannot take."""

        def write(self, data: bytes) -> None:
            if not self._writer.transport.is_closing():
                super().write(data)

        async def close(self) -> None:
            if self.is_closed:
                return
            try:
                await asyncio.wait_for(super().close(), _CLOSE_S)
            finally:
                self._writer.transport.abort()

    class Handler(BrokerProtocolHandler):  # type: ignore[misc]
        """One connection."""

        is_idle = False  # everything that this client has published was passed on

        async def mqtt_deliver_next_message(self) -> Any:
            self.is_idle = True
            message = await super().mqtt_deliver_next_message()
            self.is_idle = False
            return message

        async def wait_disconnect(self) -> Any:
            """First all that it published is passed on: amqtt drops the rest, though acknowledged."""
            ended = await super().wait_disconnect()
            queue = self.session.delivered_message_queue
            while not (self.is_idle and queue.empty()):  # noqa: ASYNC110 - amqtt has no event for it
                await asyncio.sleep(0.001)
            return ended

        async def mqtt_publish(
            self, topic: str, data: bytes, qos: int, retain: bool, ack_timeout: int | None = None
        ) -> Any:
            """Bounds what waits for a slow subscriber, and does not take a late PUBACK for an error."""
            message = OutgoingApplicationMessage(None, topic, qos, data, retain)
            if len(self.session.inflight_out) >= _MAX_QUEUED:
                return message  # as other brokers do; whoever misses something asks for it
            try:
                return await super().mqtt_publish(topic, data, qos, retain, ack_timeout)
            except (TimeoutError, asyncio.TimeoutError):  # it was sent all the same
                return message

        async def _send_packet(self, packet: Any) -> None:
            """Stays a cancellation when the connection ends: amqtt makes it an error, with a traceback."""
            try:
                await super()._send_packet(packet)
            except ProtocolHandlerError as error:
                raise asyncio.CancelledError from error

    class EmbeddedBroker(Broker):  # type: ignore[misc]
        """amqtt's broker on a socket that listens already, open to everyone, without `$SYS` topics."""

        def __init__(self, listener: socket.socket) -> None:
            everyone = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
            super().__init__({"listeners": {"default": {"type": "tcp"}}, "plugins": everyone})
            self._listener = listener

        async def _create_server_instance(self, listener_name: str, *_: object) -> asyncio.Server:
            connected = partial(self.stream_connected, listener_name=listener_name)
            return await asyncio.start_server(connected, sock=self._listener)

        async def stream_connected(
            self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str
        ) -> None:
            """Closes the connection when its work is over: amqtt leaves it open after a bad packet."""
            cut = writer.transport.abort
            try:
                await self._client_connected(listener_name, Reader(reader, cut), Writer(writer))
            finally:
                cut()

        async def _initialize_client_session(self, reader: Reader, *peer: Any) -> tuple[Handler, Any]:
            _, session = await super()._initialize_client_session(reader, *peer)
            reader.patience_s = 1.5 * session.keep_alive or None  # [MQTT-3.1.2-24]
            session.keep_alive = 0
            return Handler(self.plugins_manager, loop=self._loop), session

        async def _delete_session(self, client_id: str) -> None:
            """Ends the client's former connection [MQTT-3.1.4-2]: amqtt's lives on, its will comes late."""
            _, former = self._sessions.get(client_id, (None, None))
            if former is not None:
                await former.handle_connection_closed()
            await super()._delete_session(client_id)

        async def _publish_retained_messages_for_subscription(
            self, subscription: tuple[str, int], session: Any
        ) -> None:
            """Only to its subscriber: amqtt offers a new connection what anyone has subscribed to."""
            subscribers = self._subscriptions.get(subscription[0], ())
            if any(subscriber is session for subscriber, _ in subscribers):
                await super()._publish_retained_messages_for_subscription(subscription, session)

        async def _broadcast_message(
            self, session: Any, topic: str, data: bytes | None, force_qos: int | None = None
        ) -> None:
            await super()._broadcast_message(session, topic, Payload(data or b""), force_qos)

    return EmbeddedBroker
