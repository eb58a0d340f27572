"""A proxy between programs and their broker that treats MQTT as bad links and busy brokers do.

Rules:
- It reads whole packets (MQTT 3.1.1, section 2.2: a fixed header with the remaining length) and decides the
  fate of each: it is late, lost, repeated, overtaken, cut in the middle, or everything stands still. What
  is lost, repeated or overtaken is always a PUBLISH; what holds a session together stays in order.
- Of a lost PUBLISH of QoS 1 the sender is told that it arrived, as a broker with a full queue or an access
  rule does, or it hears nothing more of it, as from a broker that throttles.
- The fate of a client's n-th packet in a direction depends on the seed, the client's id, the number of the
  connection and n, and on nothing else.
- Whatever is to be delayed is a time at which a packet is due: order is kept by giving none an earlier time
  than the one before.

Next: `tests/faults/test_bad_links.py`, runs behind it; `tests/faults/kills.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, TypeVar

CONNECT, PUBLISH, PUBACK = 1, 3, 4
PATIENCE_S = 30

T = TypeVar("T")

Direction = Literal["up", "down"]
Action = Literal["pass", "cut", "stall", "drop", "duplicate", "hold"]


@dataclass(frozen=True)
class Faults:
    """What happens, and how often: shares are of all packets of a direction, or of its PUBLISH packets.

    delay_s, jitter_s: every packet takes so long, and up to so much longer.
    cut: the connection ends in the middle of this packet; refuse_s: nobody is let in for so long then.
    stall: this packet and all after it wait for stall_s.
    drop: a PUBLISH is lost; acknowledged: the share of these whose sender is told that it arrived.
    duplicate: a PUBLISH comes twice. hold: a PUBLISH comes hold_s later, after those sent meanwhile.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    cut: float = 0.0
    refuse_s: float = 0.0
    stall: float = 0.0
    stall_s: float = 1.0
    drop: float = 0.0
    acknowledged: float = 0.5
    duplicate: float = 0.0
    hold: float = 0.0
    hold_s: float = 0.3


@dataclass(frozen=True)
class Fate:
    """What becomes of a packet. late_s: how much later it comes. acknowledged: of one that is dropped."""

    action: Action
    late_s: float
    acknowledged: bool


def fate(faults: Faults, dice: random.Random, *, is_publish: bool) -> Fate:
    """Draws three numbers, whatever happens, so that one packet's fate does not change the next one's."""
    which, late, told = dice.random(), dice.random(), dice.random()
    shares: list[tuple[Action, float]] = [("cut", faults.cut), ("stall", faults.stall)]
    if is_publish:
        shares += [("drop", faults.drop), ("duplicate", faults.duplicate), ("hold", faults.hold)]
    action: Action = "pass"
    for name, share in shares:
        if which < share:
            action = name
            break
        which -= share
    return Fate(action, faults.delay_s + late * faults.jitter_s, told < faults.acknowledged)


@dataclass(frozen=True)
class Packet:
    """A packet as bytes, and what its header says."""

    content: bytes
    header_bytes: int

    @property
    def kind(self) -> int:
        """The control packet's type."""
        return self.content[0] >> 4

    @property
    def packet_id(self) -> bytes | None:
        """Of a PUBLISH that wants to be acknowledged, two bytes."""
        if self.kind != PUBLISH or not self.content[0] & 0b110:
            return None
        start = self.header_bytes + 2 + int.from_bytes(self._body[:2], "big")
        return self.content[start : start + 2]

    @property
    def client_id(self) -> str:
        """Of a CONNECT."""
        place = 2 + int.from_bytes(self._body[:2], "big")  # the protocol's name
        version = self._body[place]
        place += 4  # version, flags, keepalive
        if version == 5:
            size, length_bytes = _variable_length(self._body[place:])
            place += length_bytes + size
        length = int.from_bytes(self._body[place : place + 2], "big")
        return self._body[place + 2 : place + 2 + length].decode(errors="replace")

    def again(self) -> bytes:
        """The same PUBLISH, marked as sent before."""
        return bytes([self.content[0] | 0b1000]) + self.content[1:]

    @property
    def _body(self) -> bytes:
        return self.content[self.header_bytes :]


async def read_packet(reader: asyncio.StreamReader) -> Packet | None:
    """The next one; None at the end of the connection, wherever that is."""
    try:
        header = bytearray(await reader.readexactly(2))
        while header[-1] & 0x80 and len(header) < 5:
            header += await reader.readexactly(1)
        size, _ = _variable_length(header[1:])
        return Packet(bytes(header) + await reader.readexactly(size), len(header))
    except (OSError, asyncio.IncompleteReadError):
        return None


def _variable_length(content: bytes | bytearray) -> tuple[int, int]:
    """A variable byte integer and how many bytes it takes."""
    value = 0
    for place, byte in enumerate(content[:4]):
        value |= (byte & 0x7F) << (7 * place)
        if not byte & 0x80:
            return value, place + 1
    return value, min(len(content), 4)


@dataclass
class _Pipe:
    """One direction of a connection: packets by when they are due."""

    writer: asyncio.StreamWriter
    due: list[tuple[float, int, bytes]] = field(default_factory=list)
    last_s: float = 0.0  # nothing that stays in order is due before
    news: asyncio.Event = field(default_factory=asyncio.Event)
    ends: bool = False  # once all that is due has been written
    numbers: Callable[[], int] = field(default_factory=lambda: count().__next__)

    def send(self, content: bytes, at_s: float) -> None:
        """In order."""
        self.last_s = max(self.last_s, at_s)
        self.send_later(content, self.last_s)

    def send_later(self, content: bytes, at_s: float) -> None:
        """Then, whatever else is sent meanwhile."""
        heapq.heappush(self.due, (at_s, self.numbers(), content))
        self.news.set()

    def end(self) -> None:
        """No more is sent."""
        self.ends = True
        self.news.set()

    async def run(self) -> None:
        """Write what is due, when it is due."""
        clock = asyncio.get_running_loop().time
        while self.due or not self.ends:
            self.news.clear()
            wait_s = self.due[0][0] - clock() if self.due else None
            if wait_s is not None and wait_s <= 0:
                self.writer.write(heapq.heappop(self.due)[2])
                await self.writer.drain()
                continue
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.news.wait(), wait_s)


class Proxy:
    """Within `with`, in a thread of its own: whoever connects to `url` is joined with the broker at `port`.

    counts: (direction, action) -> packets so far; "refused" -> connections.
    """

    def __init__(self, port: int, faults: Faults = Faults(), seed: int = 0) -> None:
        self.faults = faults
        self.counts: Counter[tuple[str, str] | str] = Counter()
        self.url = ""
        self._broker_port = port
        self._seed = seed
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._numbers: Counter[str] = Counter()  # connections of each client
        self._joined: set[asyncio.Task[None]] = set()
        self._open_from_s = 0.0

    def __enter__(self) -> Proxy:
        self._thread.start()
        port = self._call(self._listen())
        self.url = f"mqtt://127.0.0.1:{port}"
        return self

    def __exit__(self, *_exception: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def restart(self, down_s: float) -> None:
        """Cut every connection, and let nobody in for so long."""
        self._call(self._restart(down_s))

    def total(self, action: str) -> int:
        """Packets of both directions that this happened to."""
        return self.counts["up", action] + self.counts["down", action]

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _end(self) -> None:
        self._server.close()
        await self._cut_all()

    async def _restart(self, down_s: float) -> None:
        self._refuse(down_s)
        await self._cut_all()

    async def _cut_all(self) -> None:
        joined = set(self._joined)
        for task in joined:
            task.cancel()
        if joined:
            await asyncio.wait(joined)

    def _refuse(self, seconds: float) -> None:
        self._open_from_s = max(self._open_from_s, self._loop.time() + seconds)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._joined.add(task)
        try:
            if self._loop.time() < self._open_from_s:
                self.counts["refused"] += 1
                return
            await self._join(reader, writer)
        except (OSError, asyncio.CancelledError):  # a cancellation is `_cut_all`'s
            return
        finally:
            writer.transport.abort()
            self._joined.discard(task)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what comes from either side until one of them has ended."""
        first = await read_packet(reader)
        if first is None or first.kind != CONNECT:
            return
        name = first.client_id
        self._numbers[name] += 1
        there, to_broker = await asyncio.open_connection("127.0.0.1", self._broker_port)
        seeds = [f"{self._seed}/{name}/{self._numbers[name]}/{way}" for way in ("up", "down")]
        # Both close whatever happens. What is written still goes out: half a packet, in a cut.
        with contextlib.closing(writer), contextlib.closing(to_broker):
            up, down = _Pipe(to_broker), _Pipe(writer)
            tasks = [
                asyncio.ensure_future(work)
                for work in (
                    self._pass_on("up", reader, up, down, random.Random(seeds[0]), first),
                    self._pass_on("down", there, down, up, random.Random(seeds[1]), None),
                    up.run(),
                    down.run(),
                )
            ]
            try:
                # Once one side has ended, the other gets what is due to it, and then its end.
                await asyncio.wait(tasks[2:], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)  # `_cut_all` may cancel this, too

    async def _pass_on(
        self,
        way: Direction,
        reader: asyncio.StreamReader,
        onwards: _Pipe,
        back: _Pipe,
        dice: random.Random,
        packet: Packet | None,
    ) -> None:
        """Read packets, decide their fates. back: the other direction, for acknowledgements."""
        try:
            packet = packet or await read_packet(reader)
            while packet is not None:
                chosen = fate(self.faults, dice, is_publish=packet.kind == PUBLISH)
                self._note(way, chosen)
                at_s = self._loop.time() + chosen.late_s
                if chosen.action == "cut":
                    onwards.send(packet.content[: len(packet.content) // 2], at_s)
                    self._refuse(self.faults.refuse_s)
                    return
                if chosen.action == "drop":
                    if chosen.acknowledged and packet.packet_id is not None:
                        back.send(bytes([PUBACK << 4, 2]) + packet.packet_id, self._loop.time())
                elif chosen.action == "hold":
                    onwards.send_later(packet.content, at_s + self.faults.hold_s)
                elif chosen.action == "stall":
                    onwards.send(packet.content, at_s + self.faults.stall_s)
                else:
                    onwards.send(packet.content, at_s)
                    if chosen.action == "duplicate":
                        onwards.send(packet.again(), at_s)
                packet = await read_packet(reader)
        finally:
            onwards.end()

    def _note(self, way: Direction, chosen: Fate) -> None:
        self.counts[way, chosen.action] += 1
        if chosen.action == "drop" and not chosen.acknowledged:
            self.counts[way, "drop in silence"] += 1
