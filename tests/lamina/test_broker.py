"""The embedded broker as its users meet it: a process, a line on stdout, paho clients."""

from __future__ import annotations

import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from lamina.broker import command
from wire.errors import UserError

LIMIT_S = 10
CHUNK = 120 * 1024

pytestmark = pytest.mark.timeout(60)


@contextmanager
def running() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A broker in a process of its own, and its port."""
    run = [sys.executable, "-c", "from lamina.broker import command; command()", "--port", "0"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], LIMIT_S)[0], "it did not say that it listens"
            line = process.stdout.readline()
            assert line.startswith("listening on mqtt://127.0.0.1:")
            yield process, int(line.rsplit(":", 1)[1])
        finally:
            process.kill()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running() as (_, port):
        yield port


class Client:
    """A paho client with a network thread: `messages` is the queue of what it received."""

    def __init__(self, port: int, *filters: str, name: str = "", will: str = ""):
        self.messages: queue.Queue[mqtt.MQTTMessage] = queue.Queue()
        self.ended = threading.Event()
        connected, subscribed = threading.Event(), threading.Event()
        self.paho = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name, reconnect_on_failure=False)
        self.paho.on_connect = lambda *_: connected.set()
        self.paho.on_message = lambda client, data, message: self.messages.put(message)
        self.paho.on_subscribe = lambda *_: subscribed.set()
        self.paho.on_disconnect = lambda *_: self.ended.set()
        if will:
            self.paho.will_set(will, b"gone", qos=1)
        self.paho.connect("127.0.0.1", port)
        self.paho.loop_start()
        assert connected.wait(LIMIT_S)
        if filters:
            self.paho.subscribe([(each, 1) for each in filters])
            assert subscribed.wait(LIMIT_S)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.paho.disconnect()
        self.paho.loop_stop()

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        """Until it is acknowledged."""
        sent = self.paho.publish(topic, payload, qos=1, retain=retain)
        sent.wait_for_publish(LIMIT_S)
        assert sent.is_published()

    def receive(self) -> tuple[str, bytes, bool]:
        """The next message's topic, payload and retain flag."""
        message = self.messages.get(timeout=LIMIT_S)
        return message.topic, message.payload, message.retain


def string(text: str) -> bytes:
    return len(text).to_bytes(2, "big") + text.encode()


def packet(kind: int, content: bytes) -> bytes:
    """A packet of less than 128 bytes, for what paho would never send."""
    return bytes([kind, len(content)]) + content


def connection(port: int, will: str, keepalive_s: int = 60) -> socket.socket:
    """A client without a thread that would answer or ping, connected."""
    made = socket.create_connection(("127.0.0.1", port), LIMIT_S)
    header = string("MQTT") + bytes([4, 0x0E, 0, keepalive_s])  # 3.1.1, clean session, a will of QoS 1
    made.sendall(packet(0x10, header + string(will) + string(will) + string("gone")))
    assert made.recv(4) == b"\x20\x02\0\0"
    return made


def test_a_chunk_goes_round(port: int) -> None:
    payload = os.urandom(CHUNK)
    with Client(port, "chunk/+") as receiver, Client(port) as sender:
        sender.publish("chunk/1", payload)
        message = receiver.messages.get(timeout=LIMIT_S)
    assert (message.topic, message.payload, message.qos) == ("chunk/1", payload, 1)


def test_200_chunks_reach_4_subscribers_in_order(port: int) -> None:
    payload = os.urandom(CHUNK - 1)
    receivers = [Client(port, "many") for _ in range(4)]
    with Client(port) as sender:
        sent = [sender.paho.publish("many", bytes([n]) + payload, qos=1) for n in range(200)]
        for each in sent:
            each.wait_for_publish(LIMIT_S)
        for receiver in receivers:
            with receiver:
                received = [receiver.receive()[1] for _ in range(200)]
            assert [each[0] for each in received] == list(range(200))
            assert all(each[1:] == payload for each in received)


def test_a_retained_message_reaches_a_late_subscriber_and_nobody_else(port: int) -> None:
    with Client(port, "kept/#") as reader, Client(port) as sender:
        sender.publish("kept/1", b"kept", retain=True)
        assert reader.receive() == ("kept/1", b"kept", False)
        with Client(port, "kept/+") as late:
            assert late.receive() == ("kept/1", b"kept", True)
        with Client(port, "else/#") as other:
            sender.publish("else/1", b"for you")
            assert other.receive() == ("else/1", b"for you", False)
            assert other.messages.empty()


def test_the_last_will_follows_an_abrupt_end(port: int) -> None:
    with Client(port, "will/#", "work/#") as watcher:
        dying = Client(port, will="will/dying")
        dying.publish("work/dying", b"last words")
        dying.paho.loop_stop()
        dying.paho.socket().close()
        assert watcher.receive() == ("work/dying", b"last words", False)
        assert watcher.receive() == ("will/dying", b"gone", False)


def test_the_last_will_follows_silence_even_within_a_packet(port: int) -> None:
    with (
        Client(port, "will/#") as watcher,
        connection(port, "will/silent", keepalive_s=1),
        connection(port, "will/half", keepalive_s=1) as half,
    ):
        half.sendall(packet(0x32, string("work") + bytes(100))[:50])
        wills = {watcher.receive() for _ in range(2)}
        assert wills == {("will/silent", b"gone", False), ("will/half", b"gone", False)}
        assert half.recv(1) == b""


def test_a_topic_that_is_not_allowed_ends_the_connection(port: int) -> None:
    with connection(port, "will/bad") as bad:
        bad.sendall(packet(0x32, string("$x") + b"\0\x01"))
        assert bad.recv(4) == b"\x40\x02\0\x01"
        assert bad.recv(1) == b""


def test_a_client_that_comes_again_ends_its_former_connection(port: int) -> None:
    with Client(port, "will/#", "work/#") as watcher, Client(port, name="same", will="will/same") as former:
        with Client(port, "here", name="same", will="will/same") as again:
            assert former.ended.wait(LIMIT_S)
            assert watcher.receive() == ("will/same", b"gone", False)
            again.publish("here", b"works")
            assert again.receive() == ("here", b"works", False)
        watcher.publish("work/1", b"no will after a goodbye")
        assert watcher.receive()[0] == "work/1"


@pytest.mark.parametrize("num_messages", [1, 50])
@pytest.mark.parametrize("goodbye", [True, False])
def test_last_words_are_passed_on_before_the_end(port: int, num_messages: int, goodbye: bool) -> None:
    with Client(port, "last/#") as watcher:
        watcher.publish("stay", b"never acknowledged, which keeps the broker waiting", retain=True)
        publish = [packet(0x32, string("last/1") + bytes([0, n + 1])) for n in range(num_messages)]
        disconnect = [packet(0xE0, b"")] if goodbye else []
        with connection(port, "last/will") as leaving:
            leaving.sendall(packet(0x82, b"\0\x01" + string("stay") + b"\x01"))  # SUBSCRIBE
            received = b""
            while b"stay" not in received:
                received += leaving.recv(1024)
            leaving.sendall(b"".join(publish + disconnect))
            leaving.shutdown(socket.SHUT_WR)
            while leaving.recv(1024):
                pass
        expected = ["last/1"] * num_messages + ([] if goodbye else ["last/will"])
        assert [watcher.receive()[0] for _ in expected] == expected
        watcher.publish("last/2", b"and nothing else")
        assert watcher.receive()[0] == "last/2"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_and_quietly_on_a_signal(number: signal.Signals) -> None:
    with running() as (process, port), Client(port, "a") as client:
        client.publish("a", b"", retain=True)
        client.receive()
        process.send_signal(number)
        rest, complaints = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, rest, complaints) == (0, "", "")
        assert client.ended.wait(LIMIT_S)


@pytest.mark.parametrize(
    ("host", "reason"),
    [("127.0.0.1", "is in use"), ("192.0.2.1", "[Cc]annot assign"), ("a" * 64, "not a host name")],
)
def test_what_it_cannot_listen_on_is_one_clear_line(host: str, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["--host", host, "--port", str(taken.getsockname()[1])]
        with pytest.raises(UserError, match=reason) as caught:
            command.main(arguments, standalone_mode=False)
    assert "\n" not in str(caught.value)
    assert "--port" in caught.value.hint


def test_without_amqtt_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    missing: Any = None
    monkeypatch.setitem(sys.modules, "amqtt.broker", missing)
    with pytest.raises(UserError) as caught:
        command.main(["--port", "0"], standalone_mode=False)
    assert caught.value.hint == 'pip install "lamina[broker]"'


def test_amqtt_is_imported_only_when_it_is_needed() -> None:
    code = "import lamina.broker, sys; sys.exit('amqtt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=LIMIT_S, check=False).returncode == 0
