"""The proxy itself: what it does to packets, and that it does nothing else."""

from __future__ import annotations

import gc
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from proxy import Faults, Proxy, fate

PATIENCE_S = 10
PING, PONG = b"\xc0\x00", b"\xd0\x00"


def connect(client: str) -> bytes:
    body = b"\x00\x04MQTT\x04\x02\x00\x3c" + len(client).to_bytes(2, "big") + client.encode()
    return bytes([0x10, len(body)]) + body


def publish(number: int, payload: bytes = b"x", *, dup: bool = False) -> bytes:
    """QoS 1, with the number as its packet id."""
    body = b"\x00\x01t" + number.to_bytes(2, "big") + payload
    size, length = len(body), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([0x3A if dup else 0x32, *length, size]) + body


def puback(number: int) -> bytes:
    return b"\x40\x02" + number.to_bytes(2, "big")


class Joined:
    """A connection through the proxy: `near` is the program's end, `far` the broker's."""

    def __init__(self, server: socket.socket, url: str, client: str = "ann") -> None:
        port = int(url.rpartition(":")[2])
        self.near = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        self.near.sendall(connect(client))
        self.far, _ = server.accept()
        self.far.settimeout(PATIENCE_S)
        assert read(self.far, len(connect(client))) == connect(client)

    def close(self) -> None:
        self.near.close()
        self.far.close()


def read(end: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer where the connection ends."""
    content = b""
    while len(content) < size:
        try:
            piece = end.recv(size - len(content))
        except ConnectionError:
            break
        if not piece:
            break
        content += piece
    return content


Join = Callable[..., tuple[Proxy, Joined]]


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        yield server


@pytest.fixture
def join(server: socket.socket) -> Iterator[Join]:
    """Join a program and a broker by a proxy that does this once they are joined."""
    opened: list[tuple[Proxy, Joined]] = []

    def join(**faults: float) -> tuple[Proxy, Joined]:
        proxy = Proxy(server.getsockname()[1])
        proxy.__enter__()
        opened.append((proxy, Joined(server, proxy.url)))
        proxy.faults = Faults(**faults)
        return opened[-1]

    yield join
    for proxy, joined in opened:
        joined.close()
        proxy.__exit__()


@pytest.mark.parametrize("size", [0, 1, 120, 127, 128, 20_000, 3_000_000])
def test_without_faults_every_byte_passes_both_ways(join: Join, size: int) -> None:
    _, joined = join()
    packets = publish(1, random.Random(0).randbytes(size)) + PING
    for one, other in ((joined.near, joined.far), (joined.far, joined.near)):
        sending = one.dup()
        sending.settimeout(PATIENCE_S)
        sending.sendall(packets)
        sending.close()
        assert read(other, len(packets)) == packets


def test_its_end_in_the_middle_of_a_connections_end_leaves_nothing_open(server: socket.socket) -> None:
    dice = random.Random(0)
    for _ in range(500):
        with Proxy(server.getsockname()[1]) as proxy:
            Joined(server, proxy.url).close()
            time.sleep(dice.random() * 6e-4)  # about what the proxy takes to notice
    gc.collect()  # a connection that is left open is a warning, and warnings are errors


def test_a_lost_publish_that_is_acknowledged(join: Join) -> None:
    proxy, joined = join(drop=1, acknowledged=1)
    joined.near.sendall(publish(7) + PING)
    assert read(joined.near, 4) == puback(7)
    assert read(joined.far, 2) == PING, "only a publish is lost"
    joined.far.sendall(publish(300) + PONG)
    assert read(joined.far, 4) == puback(300)
    assert read(joined.near, 2) == PONG
    assert proxy.total("drop") == 2
    assert proxy.total("drop in silence") == 0


def test_a_lost_publish_of_which_nothing_is_heard(join: Join) -> None:
    proxy, joined = join(drop=1, acknowledged=0)
    joined.near.sendall(publish(7) + PING)
    assert read(joined.far, 2) == PING
    joined.far.sendall(PONG)
    assert read(joined.near, 2) == PONG, "and no acknowledgement before it"
    assert proxy.total("drop in silence") == proxy.total("drop") == 1


def test_a_repeated_publish_is_marked(join: Join) -> None:
    _, joined = join(duplicate=1)
    joined.near.sendall(publish(7, b"abc") + PING)
    expected = publish(7, b"abc") + publish(7, b"abc", dup=True) + PING
    assert read(joined.far, len(expected)) == expected


def test_a_publish_that_is_held_back_is_overtaken(join: Join) -> None:
    proxy, joined = join(hold=1, hold_s=0.3)
    joined.near.sendall(publish(1))
    while not proxy.total("hold"):
        time.sleep(0.01)
    proxy.faults = Faults()
    joined.near.sendall(publish(2) + PING + publish(3))
    expected = publish(2) + PING + publish(3) + publish(1)
    assert read(joined.far, len(expected)) == expected


def test_delays_that_vary_keep_the_order(join: Join) -> None:
    _, joined = join(delay_s=0.05, jitter_s=0.05)
    packets = b"".join(publish(number) for number in range(100))
    begin = time.monotonic()
    joined.near.sendall(packets)
    assert read(joined.far, len(packets)) == packets
    assert 0.05 <= time.monotonic() - begin < 2, "they are under way together"


def test_a_stall_holds_up_what_follows(join: Join) -> None:
    proxy, joined = join(stall=1, stall_s=0.4)
    begin = time.monotonic()
    joined.near.sendall(publish(1))
    while not proxy.total("stall"):
        time.sleep(0.01)
    proxy.faults = Faults()
    joined.near.sendall(publish(2))
    assert read(joined.far, len(publish(1)) * 2) == publish(1) + publish(2)
    assert time.monotonic() - begin >= 0.4


def test_a_cut_goes_through_the_middle_of_a_packet(join: Join) -> None:
    proxy, joined = join(cut=1)
    packet = publish(1, bytes(range(256)))
    joined.near.sendall(packet)
    assert read(joined.far, len(packet)) == packet[: len(packet) // 2]
    assert read(joined.near, 1) == b""
    assert proxy.total("cut") == 1


def test_after_a_cut_nobody_is_let_in_for_a_while(join: Join, server: socket.socket) -> None:
    proxy, joined = join(cut=1, refuse_s=0.5)
    begin = time.monotonic()
    joined.near.sendall(PING)
    assert read(joined.near, 1) == b""
    proxy.faults = Faults()
    while True:
        with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), PATIENCE_S) as near:
            near.sendall(connect("ann") + PING)
            near.settimeout(0.2)
            try:
                refused = near.recv(1) == b""
            except ConnectionError:
                refused = True
            except TimeoutError:  # nobody answers: we are in
                refused = False
            if not refused:
                break
        time.sleep(0.02)
    assert time.monotonic() - begin >= 0.5
    assert proxy.counts["refused"] >= 1


def test_a_restart_ends_every_connection(join: Join, server: socket.socket) -> None:
    proxy, joined = join()
    other = Joined(server, proxy.url, "bob")
    proxy.restart(0.1)
    for end in (joined.near, joined.far, other.near, other.far):
        assert read(end, 1) == b""
    other.close()
    time.sleep(0.1)
    Joined(server, proxy.url).close()


def test_a_broker_that_is_away_ends_the_connection(server: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with (
        Proxy(port) as proxy,
        socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), PATIENCE_S) as near,
    ):
        near.sendall(connect("ann"))
        assert read(near, 1) == b""


def fates(seed: str, number: int = 5000, **faults: float) -> list[str]:
    dice = random.Random(seed)
    return [fate(Faults(**faults), dice, is_publish=True).action for _ in range(number)]


def test_fates_follow_from_the_seed_and_have_their_shares() -> None:
    shares = {"cut": 0.1, "stall": 0.1, "drop": 0.2, "duplicate": 0.2, "hold": 0.1}
    assert fates("a", **shares) == fates("a", **shares) != fates("b", **shares)
    counted = Counter(fates("a", **shares))
    for action, share in shares.items():
        assert counted[action] / 5000 == pytest.approx(share, abs=0.03)


def test_what_happens_to_one_packet_does_not_change_what_happens_to_the_next() -> None:
    fewer, more = fates("a", cut=0.1), fates("a", cut=0.1, hold=0.3)
    assert [place for place, one in enumerate(fewer) if one == "cut"] == [
        place for place, one in enumerate(more) if one == "cut"
    ]


def test_only_a_publish_is_lost_repeated_or_overtaken() -> None:
    dice = random.Random(0)
    faults = Faults(drop=0.4, duplicate=0.3, hold=0.3)
    assert {fate(faults, dice, is_publish=False).action for _ in range(100)} == {"pass"}


def test_a_clients_fate_does_not_depend_on_who_came_first(server: socket.socket) -> None:
    def seen(clients: list[str]) -> dict[str, bytes]:
        found = {}
        with Proxy(server.getsockname()[1], Faults(drop=0.5, acknowledged=0), seed=3) as proxy:
            for client in clients:
                joined = Joined(server, proxy.url, client)
                packets = b"".join(publish(number) for number in range(40)) + PING
                joined.near.sendall(packets)
                content = b""
                while not content.endswith(PING):
                    content += joined.far.recv(1 << 16)
                found[client] = content
                joined.close()
        return found

    assert seen(["ann", "bob"]) == seen(["bob", "ann"])
    assert len(set(seen(["ann", "bob"]).values())) == 2
