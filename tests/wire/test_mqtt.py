"""A connection to a real broker: delivery, wills, refusals, and a broker that comes back empty."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from wire.errors import TransportError, UserError
from wire.mqtt import CONNECT_TIMEOUT_S, MAX_WAITING, Broker, Connection, Packet

PATIENCE_S = 30


class Embedded:
    """`lamina broker` on a fixed port."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = Broker("127.0.0.1", self.port)
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "lamina", "broker", "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith(b"listening on mqtt://127.0.0.1")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def embedded() -> Iterator[Embedded]:
    embedded = Embedded()
    yield embedded
    embedded.kill()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_what_is_published_arrives_and_every_byte_is_counted(embedded: Embedded) -> None:
    payload = bytes(range(256)) * 400

    async def main() -> None:
        async with Connection(embedded.address, "a") as a, Connection(embedded.address, "b") as b:
            await b.subscribe("x/+", "y")
            sent, received = a.bytes_sent, b.bytes_received
            await a.publish("x/1", payload)
            assert await b.packet() == Packet("x/1", payload)
            assert len(payload) < a.bytes_sent - sent < len(payload) + 20
            assert len(payload) < b.bytes_received - received < len(payload) + 20
            await a.publish("z", b"not subscribed")
            await a.publish("y", b"2")
            assert await b.packet() == Packet("y", b"2")
            b.unsubscribe("y")
            await a.publish("y", b"3")
            await a.publish("x/2", b"4")
            while (packet := await b.packet()).payload != b"4":
                assert packet == Packet("y", b"3"), "one that was under way"

    run(main)


def test_retained_state_and_its_removal(embedded: Embedded) -> None:
    async def main() -> None:
        async with Connection(embedded.address, "a") as a:
            await a.publish("offer", b"1", retain=True)
            await a.publish("gone", b"1", retain=True)
            await a.publish("gone", b"", retain=True)
        async with Connection(embedded.address, "b") as b:
            await b.subscribe("gone", "offer")
            assert await b.packet() == Packet("offer", b"1")

    run(main)


def test_the_broker_says_goodbye_for_who_vanishes_and_only_then(embedded: Embedded) -> None:
    script = (
        "import asyncio, os\nfrom wire.mqtt import Broker, Connection\n"
        "async def main():\n"
        f"    async with Connection(Broker('127.0.0.1', {embedded.port}), 'dying', ('bye', b'dying')):\n"
        "        os._exit(1)\n"
        "asyncio.run(main())"
    )

    async def main() -> None:
        async with Connection(embedded.address, "b") as b:
            await b.subscribe("bye")
            async with Connection(embedded.address, "orderly", ("bye", b"orderly")):
                pass
            child = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
            assert await child.wait() == 1
            assert await b.packet() == Packet("bye", b"dying")

    run(main)


def test_a_broker_that_comes_back_empty(embedded: Embedded) -> None:
    async def main() -> None:
        async with Connection(embedded.address, "a") as a, Connection(embedded.address, "b") as b:
            await b.subscribe("x")
            embedded.kill()
            waiting = [asyncio.ensure_future(a.publish("x", bytes([i]))) for i in range(20)]
            await asyncio.sleep(0.3)
            assert not any(one.done() for one in waiting)
            renewed = asyncio.ensure_future(b.until_reconnected(PATIENCE_S))
            subscribed = asyncio.ensure_future(b.subscribe("y"))
            embedded.start()
            assert await renewed
            await subscribed
            await asyncio.gather(*waiting)  # none is lost on the way to the broker
            await a.publish("y", b"last")
            while await b.packet() != Packet("y", b"last"):
                pass  # of the others it has those that came to the broker later than its subscriptions

    run(main)


def test_a_flood_is_dropped_and_counted(embedded: Embedded) -> None:
    async def main() -> None:
        async with Connection(embedded.address, "a") as a, Connection(embedded.address, "b") as b:
            await b.subscribe("x", "last")
            await asyncio.gather(*(a.publish("x", b"1") for _ in range(MAX_WAITING + 40)))
            await asyncio.sleep(0.5)
            assert b.num_dropped == 40
            for _ in range(MAX_WAITING):
                assert (await b.packet()).topic == "x"
            await a.publish("last", b"2")
            assert await b.packet() == Packet("last", b"2")

    run(main)


def test_caught_up_waits_for_what_has_come_and_no_longer(embedded: Embedded) -> None:
    async def main() -> None:
        async with Connection(embedded.address, "a") as a, Connection(embedded.address, "b") as b:
            await b.caught_up()
            await b.subscribe("x")
            for number in range(3):
                await a.publish("x", bytes([number]))
            await asyncio.sleep(0.5)
            waiting = asyncio.create_task(b.caught_up())
            for _ in range(3):
                await asyncio.sleep(0.01)
                assert not waiting.done()
                await b.packet()
            await a.publish("x", b"later")
            await asyncio.wait_for(waiting, 5)

    run(main)


def test_no_broker_is_one_clear_line() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def main() -> None:
        with pytest.raises(
            TransportError, match=rf"no broker at mqtt://127.0.0.1:{port}: .*refused"
        ) as caught:
            async with Connection(Broker("127.0.0.1", port), "a"):
                pass
        assert "lamina broker" in caught.value.hint

    run(main)


def test_something_else_listens_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wire.mqtt.CONNECT_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        async def main() -> None:
            with pytest.raises(TransportError, match="does not answer as an MQTT broker"):
                async with Connection(Broker("127.0.0.1", server.getsockname()[1]), "a"):
                    pass

        run(main)


@pytest.mark.parametrize(
    ("tls", "line"), [(False, "does not answer as an MQTT broker"), (True, "before TLS was agreed on")]
)
def test_something_that_hangs_up(tls: bool, line: str) -> None:
    """It is told at once, not after a time of trying again."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

        async def main() -> None:
            other = await asyncio.start_server(hang_up, sock=server)
            begin = time.monotonic()
            with pytest.raises(TransportError, match=line) as caught:
                async with Connection(Broker("127.0.0.1", server.getsockname()[1], tls=tls), "a"):
                    pass
            assert caught.value.hint
            assert time.monotonic() - begin < CONNECT_TIMEOUT_S / 2
            other.close()
            await other.wait_closed()

        run(main)


def test_a_broker_that_refuses_us() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.write(b"\x20\x02\x00\x05")  # CONNACK, not authorised
            await writer.drain()
            writer.close()
            await writer.wait_closed()

        async def main() -> None:
            refusing = await asyncio.start_server(refuse, sock=server)
            with pytest.raises(TransportError, match="refuses us: Not authorized"):
                async with Connection(Broker("127.0.0.1", server.getsockname()[1]), "a"):
                    pass
            refusing.close()
            await refusing.wait_closed()

        run(main)


Acknowledge = Callable[[int, int], Coroutine[Any, Any, bool]]


class Moody:
    """A broker that acknowledges a publish if, and when, it likes. acknowledge: (connection, number of the
    publish on it), both from 0 -> whether; connections: how many there were.
    """

    def __init__(self, acknowledge: Acknowledge) -> None:
        self.connections = 0
        self.published: list[tuple[int, bytes]] = []
        self._acknowledge = acknowledge

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection, number = self.connections, 0
        self.connections += 1
        try:
            while True:
                kind, size = await reader.readexactly(2)  # no packet here is longer than 127 bytes
                body = await reader.readexactly(size)
                if kind >> 4 == 1:
                    writer.write(b"\x20\x02\x00\x00")
                elif kind >> 4 == 3:
                    start = 2 + int.from_bytes(body[:2], "big")
                    self.published.append((connection, body[start + 2 :]))
                    if await self._acknowledge(connection, number):
                        writer.write(b"\x40\x02" + body[start : start + 2])
                    number += 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def run(self, story: Callable[[Connection], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
            async with Connection(Broker("127.0.0.1", server.sockets[0].getsockname()[1]), "a") as a:
                await story(a)
            server.close()

        run(main)


async def publish_all(connection: Connection, count: int) -> None:
    await asyncio.gather(*(connection.publish("t", bytes([n])) for n in range(count)))


def test_what_is_not_acknowledged_is_sent_again_on_a_new_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only that: what the broker has acknowledged it does not get twice."""
    monkeypatch.setattr("wire.mqtt.ACK_S", 0.4)

    async def acknowledge(connection: int, number: int) -> bool:
        return connection > 0 or number in (0, 2)

    broker = Moody(acknowledge)
    broker.run(lambda connection: publish_all(connection, 4))
    assert broker.connections == 2
    assert broker.published == [(0, b"\0"), (0, b"\1"), (0, b"\2"), (0, b"\3"), (1, b"\1"), (1, b"\3")]
    assert "left a message unacknowledged" in caplog.text


def test_a_broker_that_takes_its_time_with_each_is_left_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last waits for longer than our patience, which is for the oldest."""
    monkeypatch.setattr("wire.mqtt.ACK_S", 0.5)

    async def acknowledge(_connection: int, _number: int) -> bool:
        await asyncio.sleep(0.2)
        return True

    broker = Moody(acknowledge)
    broker.run(lambda connection: publish_all(connection, 6))
    assert broker.connections == 1


def test_patience_grows_with_a_slow_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wire.mqtt.ACK_S", 0.3)

    async def acknowledge(_connection: int, _number: int) -> bool:
        await asyncio.sleep(0.5)
        return True

    async def story(connection: Connection) -> None:
        for n in range(4):
            await connection.publish("t", bytes([n]))

    broker = Moody(acknowledge)
    broker.run(story)
    assert broker.connections == 2, "once too soon, never again"


def test_who_gives_up_on_a_publish_does_not_hurry_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wire.mqtt.ACK_S", 0.6)

    async def acknowledge(_connection: int, number: int) -> bool:
        await asyncio.sleep(0.4 if number else 0)
        return number > 0

    async def story(connection: Connection) -> None:
        first = asyncio.ensure_future(connection.publish("t", b"1"))
        await asyncio.sleep(0.4)
        second = asyncio.ensure_future(connection.publish("t", b"2"))
        await asyncio.sleep(0)
        first.cancel()
        await second

    broker = Moody(acknowledge)
    broker.run(story)
    assert broker.connections == 1


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mqtt://pi", Broker("pi", 1883)),
        ("mqtt://pi:5000/", Broker("pi", 5000)),
        ("mqtts://pi", Broker("pi", 8883, tls=True)),
        ("mqtt://me:p%40ss@pi", Broker("pi", 1883, username="me", password="p@ss")),
        ("mqtt://[::1]:5", Broker("::1", 5)),
        ("mqtt://pi?version=5", Broker("pi", 1883, version=5)),
    ],
)
def test_addresses(url: str, expected: Broker) -> None:
    assert Broker.parse(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "pi",
        "pi:1883",
        "http://pi",
        "mqtt://",
        "mqtt://pi:x",
        "mqtt://pi:99999",
        "mqtt://pi/topic",
        "mqtt://pi?version=3",
    ],
)
def test_what_is_not_an_address(url: str) -> None:
    with pytest.raises(UserError) as caught:
        Broker.parse(url)
    assert caught.value.hint


def test_no_password_in_a_log() -> None:
    assert str(Broker.parse("mqtts://me:secret@pi:1")) == "mqtts://pi:1"
    assert "secret" not in repr(Broker.parse("mqtts://me:secret@pi:1"))


@pytest.mark.parametrize(
    "url",
    [
        "me:secret@pi:1883",
        "mqtt:/me:secret@pi",
        "mqtt:me:secret@pi",
        "mqtt://me:secret@pi:x",
        "mqtt://me:/secret@pi:x",
        "http://me:sec@secret@pi",
    ],
)
def test_no_password_of_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UserError) as caught:
        Broker.parse(url)
    assert "secret" not in str(caught.value) + caught.value.hint
    assert "pi" in str(caught.value)
