"""Blobs in chunks: the packets, what a receiver still misses, what a sender still owes. No I/O, no clock.

Rules:
- A blob is announced in a message as a `BlobRef`. The receiver asks for chunks by index (`Want`); the
  sender sends those, in one packet each, and forgets them. So a lost chunk is asked for again, a repeated
  one changes nothing, and order does not matter.
- A packet: the first 8 bytes of the SHA-256, index, length and CRC-32 of the data (big-endian), the data.
  The CRC keeps a damaged packet from spoiling a transfer; the SHA-256 of the whole decides.
- Every chunk but the last has the same size, fixed for a run.

Next: `wire/exchange.py`, which drives these over a connection.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

from wire.errors import Malformed, UserError
from wire.manifest import BlobRef

CHUNK_BYTES = 120 << 10  # of a packet; managed brokers end at 128 KB
MIN_CHUNK_BYTES = 1 << 10
MAX_CHUNK_BYTES = 1 << 20
MANY = 0.25  # of those who wait for a blob, from which on a chunk is sent to all of them at once

_HEADER = struct.Struct(">8sIII")

Ranges = tuple[tuple[int, int], ...]


def check_chunk_bytes(chunk_bytes: int) -> int:
    """Raises `UserError` outside 1 KiB to 1 MiB."""
    if not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES:
        raise UserError(f"chunks of {chunk_bytes} bytes", "choose 1024 to 1048576, brokers take 122880")
    return chunk_bytes


def prefix_of(ref: BlobRef) -> bytes:
    """What a packet names its blob by."""
    return bytes.fromhex(ref.sha256[:16])


def num_chunks(ref: BlobRef, chunk_bytes: int) -> int:
    """How many packets carry the blob; none for an empty one."""
    return -(-ref.size_bytes // _data_bytes(chunk_bytes))


def extent(ref: BlobRef, index: int, chunk_bytes: int) -> tuple[int, int]:
    """Offset and length of a chunk's data in the blob, in bytes."""
    step = _data_bytes(chunk_bytes)
    return index * step, min(step, ref.size_bytes - index * step)


def _data_bytes(chunk_bytes: int) -> int:
    return chunk_bytes - _HEADER.size


@dataclass(frozen=True)
class Chunk:
    """A packet's content."""

    prefix: bytes
    index: int
    data: bytes


def encode_chunk(ref: BlobRef, index: int, data: bytes) -> bytes:
    """The packet."""
    return _HEADER.pack(prefix_of(ref), index, len(data), zlib.crc32(data)) + data


def decode_chunk(packet: bytes) -> Chunk:
    """Raises `Malformed`: too short, another length than it says, or damaged."""
    if len(packet) < _HEADER.size:
        raise Malformed(f"a chunk of {len(packet)} bytes has no header")
    prefix, index, length, crc = _HEADER.unpack_from(packet)
    data = packet[_HEADER.size :]
    if len(data) != length or zlib.crc32(data) != crc:
        raise Malformed(f"chunk {index} of {prefix.hex()} is damaged")
    return Chunk(prefix, index, data)


class Missing:
    """What a receiver still misses of a blob, and which of it is on its way.

    ask: the next chunks to ask for, so that at most `window` are on their way. have: those that are here.
    """

    def __init__(self, ref: BlobRef, chunk_bytes: int, window: int, have: Set[int] = frozenset()) -> None:
        self.ref = ref
        self._chunk_bytes = chunk_bytes
        self._window = window
        self._missing = set(range(num_chunks(ref, chunk_bytes))) - have
        self._asked: set[int] = set()

    @property
    def complete(self) -> bool:
        """Whether all chunks are there."""
        return not self._missing

    def place(self, chunk: Chunk) -> int | None:
        """The offset to write the chunk's data at; None if it is there already.

        Raises `Malformed` for an index or a length that the blob does not have.
        """
        if not 0 <= chunk.index < num_chunks(self.ref, self._chunk_bytes):
            raise Malformed(f"chunk {chunk.index} is beyond the end of {self.ref.sha256[:16]}")
        offset, length = extent(self.ref, chunk.index, self._chunk_bytes)
        if len(chunk.data) != length:
            raise Malformed(f"chunk {chunk.index} has {len(chunk.data)} bytes, expected {length}")
        self._asked.discard(chunk.index)
        if chunk.index not in self._missing:
            return None
        self._missing.discard(chunk.index)
        return offset

    def ask(self) -> Ranges:
        """Ranges to ask for now, none while more than half of the window is on its way."""
        if len(self._asked) > self._window // 2:
            return ()
        free = self._window - len(self._asked)
        chosen = sorted(self._missing - self._asked)[:free]
        self._asked.update(chosen)
        return as_ranges(chosen)

    def stalled(self) -> None:
        """Nothing came for a while: what is on its way counts as lost."""
        self._asked.clear()


@dataclass
class _Sending:
    """A blob that peers ask for.

    owed: chunk -> who wants it, in order. sent: chunks that have gone out. peers: all that have asked.
    coming: peer -> chunks that went out to all before it asked for them -> whether it has asked by now.
    """

    owed: dict[int, dict[str, None]] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)
    peers: set[str] = field(default_factory=set)
    coming: dict[str, dict[int, bool]] = field(default_factory=dict)

    def ask(self, peer: str, index: int) -> None:
        coming = self.coming.get(peer, {})
        if coming.get(index):
            coming.clear()  # it asks again: what was on its way is lost
        if index in coming:
            coming[index] = True
        else:
            self.owed.setdefault(index, {})[peer] = None

    def send(self) -> tuple[int, str | None]:
        """The next chunk and its one receiver, or None for all."""
        index = next(iter(self.owed))
        wanted_by = self.owed.pop(index)
        if index in self.sent and self._are_few(wanted_by.keys()):
            peer = next(iter(wanted_by))
            del wanted_by[peer]
            if wanted_by:
                self.owed[index] = wanted_by
            return index, peer
        if index not in self.sent:
            for peer in self.peers - wanted_by.keys():
                self.coming.setdefault(peer, {})[index] = False
        self.sent.add(index)
        return index, None

    def _are_few(self, peers: Set[str]) -> bool:
        """One alone, or few of all that wait for something of the blob."""
        return len(peers) == 1 or len(peers) < MANY * len(peers | set().union(*self.owed.values()))


class Owed:
    """Which chunks a sender owes to whom. Blobs take turns, and so do those who wait for a chunk.

    The first time a chunk goes to all who fetch its blob, at the pace of the quickest. A slower one will
    ask for what is on its way to it; that is answered only if it asks again, for then it was lost.
    """

    def __init__(self) -> None:
        self._blobs: dict[BlobRef, _Sending] = {}

    def add(self, peer: str, ref: BlobRef, ranges: Ranges, chunk_bytes: int) -> None:
        """`peer` asks for these. Raises `Malformed` for ranges that the blob does not have."""
        last = num_chunks(ref, chunk_bytes)
        if not all(0 <= first < end <= last for first, end in ranges):
            raise Malformed(f"a range beyond the end of {ref.sha256[:16]}")
        if sum(end - first for first, end in ranges) > last:  # a message has room for thousands of ranges
            raise Malformed(f"more chunks than {ref.sha256[:16]} has")
        sending = self._blobs.setdefault(ref, _Sending())
        sending.peers.add(peer)
        for first, end in ranges:
            for index in range(first, end):
                sending.ask(peer, index)

    def next(self) -> tuple[BlobRef, int, str | None] | None:
        """The next chunk to send, and to whom: one peer, or None for all who fetch the blob.

        It is owed no longer to them. Again it goes to all when many of those who wait for something of the
        blob want it.
        """
        for ref, sending in self._blobs.items():
            if sending.owed:
                self._blobs[ref] = self._blobs.pop(ref)  # the next turn is another's
                return ref, *sending.send()
        return None

    def drop(self, ref: BlobRef) -> None:
        """Nobody gets the rest of it."""
        self._blobs.pop(ref, None)


def as_ranges(indices: Sequence[int] | Iterable[int]) -> Ranges:
    """Ascending indices as half-open ranges."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return tuple(ranges)
