"""Blobs in both directions over a connection: `fetch` what others offer, `serve` what they ask for.

Rules:
- The receiver leads. It asks for a window of chunks, for more as they come in, and again for what has not
  come after a while, so whatever is lost on either side is asked for once more. What waits to be read may
  be what it would ask for, so it reads first.
- What has come of a blob stays on disk, so a fetch that was broken off goes on where it was.
- A sender sends only what was `offer`ed. A chunk goes out once to all who fetch its blob, at the pace of
  the quickest, and again only to who asks again.
- At most `SENDING` packets wait for the broker's acknowledgement.

Next: `wire/transfer.py`, the bookkeeping; `wire/mqtt.py`, the connection.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from wire.errors import HashMismatch, Silent, UserError
from wire.manifest import BlobRef
from wire.messages import Want
from wire.store import Partial, Store
from wire.tasks import within
from wire.transfer import Chunk, Missing, Owed, decode_chunk, encode_chunk, extent, num_chunks, prefix_of

SENDING = 8
WINDOW = 16
GATHER_S = 0.05
STALL_S = 3.0
MAX_STALL_S = 30.0
MAX_DAMAGED = 3

log = logging.getLogger(__name__)

Ask = Callable[[Want], Awaitable[None]]


class Line(Protocol):
    """What is needed of a connection."""

    async def publish(self, topic: str, payload: bytes) -> None:
        """Return once the broker has it."""
        ...

    async def caught_up(self) -> None:
        """Return once what has come so far is read."""
        ...


@dataclass
class _Incoming:
    missing: Missing
    partial: Partial
    came: asyncio.Event = field(default_factory=asyncio.Event)
    error: OSError | None = None  # of the disk; it is the receiver's to tell

    def write(self, chunk: Chunk) -> None:
        offset = self.missing.place(chunk)
        try:
            if offset is not None:
                self.partial.write(chunk.index, offset, chunk.data)
        except OSError as error:
            self.error = error
        self.came.set()


class Exchange:
    """One side's transfers.

    chunk_bytes: the run's. topic: (blob, a peer or None for all that fetch it) -> where a chunk goes.
    stall_s: after so long without a chunk, a receiver asks again; each time it waits twice as long.
    """

    def __init__(
        self,
        connection: Line,
        store: Store,
        chunk_bytes: int,
        topic: Callable[[BlobRef, str | None], str],
        *,
        stall_s: float = STALL_S,
    ) -> None:
        self.store = store
        self._connection = connection
        self._chunk_bytes = chunk_bytes
        self._topic = topic
        self._stall_s = stall_s
        self._offered: dict[BlobRef, Path] = {}
        self._owed = Owed()
        self._owing = asyncio.Event()
        self._incoming: dict[tuple[str, bytes], _Incoming] = {}

    def offer(self, ref: BlobRef, path: Path) -> None:
        """From now on peers may ask for this."""
        self._offered[ref] = path

    def withdraw(self, ref: BlobRef) -> None:
        """From now on they may not."""
        self._offered.pop(ref, None)
        self._owed.drop(ref)

    def want(self, peer: str, want: Want) -> None:
        """A peer asks; what is not offered is ignored. Raises `Malformed` for chunks the blob lacks."""
        if want.blob not in self._offered:
            log.debug(
                "%s asks for %s, which is not offered", peer or "the aggregator", want.blob.sha256[:16]
            )
            return
        self._owed.add(peer, want.blob, want.ranges, self._chunk_bytes)
        # A moment later, so that those who want the same can be served together.
        asyncio.get_running_loop().call_later(GATHER_S, self._owing.set)

    def chunk(self, packet: bytes, peer: str = "") -> None:
        """A chunk came from `peer`. Raises `Malformed`; what nobody waits for is ignored."""
        chunk = decode_chunk(packet)
        incoming = self._incoming.get((peer, chunk.prefix))
        if incoming is not None:
            incoming.write(chunk)

    async def fetch(self, ref: BlobRef, ask: Ask, peer: str = "", silence_s: float = math.inf) -> Path:
        """The blob's file, from the store or from `peer`, for as long as it takes.

        Raises `HashMismatch` where what came is again and again not the blob, `Silent` where nothing has
        come for more than `silence_s`.
        """
        for attempt in range(1, MAX_DAMAGED + 1):
            if self.store.has(ref):
                break
            try:
                await self._receive(ref, ask, peer, silence_s)
            except HashMismatch:
                if attempt == MAX_DAMAGED:
                    raise
                log.warning("%s came damaged, asking again", ref.sha256[:16])
        return self.store.path(ref)

    async def _receive(self, ref: BlobRef, ask: Ask, peer: str, silence_s: float) -> None:
        key = (peer, prefix_of(ref))
        with self.store.receive(ref, num_chunks(ref, self._chunk_bytes), peer) as partial:
            missing = Missing(ref, self._chunk_bytes, WINDOW, partial.have)
            incoming = self._incoming[key] = _Incoming(missing, partial)
            patience_s, silent_s = self._stall_s, 0.0
            clock = asyncio.get_running_loop().time
            try:
                while not missing.complete:
                    incoming.came.clear()
                    await self._connection.caught_up()
                    if ranges := missing.ask():
                        await ask(Want(ref, ranges))
                    begin_s = clock()
                    if await within(patience_s, incoming.came.wait()):
                        # On a slow link a chunk takes its time: asking again too soon would only add to it.
                        gap_s = silent_s + clock() - begin_s
                        patience_s = min(max(self._stall_s, 4 * gap_s), MAX_STALL_S)
                        silent_s = 0.0
                    else:
                        silent_s += patience_s
                        if silent_s > silence_s:
                            raise Silent(
                                f"{peer or 'the aggregator'} has sent nothing for {silent_s:.0f} s"
                            )
                        missing.stalled()
                        patience_s = min(2 * patience_s, MAX_STALL_S)
                    if incoming.error is not None:
                        raise incoming.error
            finally:
                del self._incoming[key]

    async def serve(self) -> None:
        """Send what peers ask for, for ever."""
        await asyncio.gather(*(self._send() for _ in range(SENDING)))

    async def _send(self) -> None:
        while True:
            await self._owing.wait()
            item = self._owed.next()
            if item is None:
                self._owing.clear()
                continue
            ref, index, peer = item
            path = self._offered.get(ref)
            if path is not None:
                packet = encode_chunk(ref, index, _read(path, *extent(ref, index, self._chunk_bytes)))
                await self._connection.publish(self._topic(ref, peer), packet)


def _read(path: Path, offset: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
    except OSError:
        data = b""
    if len(data) != length:
        raise UserError(f"{path} is not what it was", "leave the files of a run alone while it runs")
    return data
