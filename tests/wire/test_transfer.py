"""Chunks, what is missing, what is owed: the bookkeeping of a transfer, without a network."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.errors import Malformed, UserError
from wire.manifest import BlobRef
from wire.transfer import (
    CHUNK_BYTES,
    Chunk,
    Missing,
    Owed,
    as_ranges,
    check_chunk_bytes,
    decode_chunk,
    encode_chunk,
    extent,
    num_chunks,
    prefix_of,
)

SIZE = 1 << 10
DATA = SIZE - 20  # a chunk's data; the header is 20 bytes


def blob(num_bytes: int) -> tuple[BlobRef, bytes]:
    content = random.Random(num_bytes).randbytes(num_bytes)
    return BlobRef.of(content), content


def packets(ref: BlobRef, content: bytes) -> list[bytes]:
    spans = [extent(ref, index, SIZE) for index in range(num_chunks(ref, SIZE))]
    return [
        encode_chunk(ref, index, content[offset : offset + length])
        for index, (offset, length) in enumerate(spans)
    ]


@pytest.mark.parametrize(
    ("num_bytes", "count"), [(0, 0), (1, 1), (DATA, 1), (DATA + 1, 2), (5 * DATA, 5), (5 * DATA + 3, 6)]
)
def test_chunks_cover_the_blob(num_bytes: int, count: int) -> None:
    ref, content = blob(num_bytes)
    made = packets(ref, content)
    assert len(made) == count
    assert all(len(packet) <= SIZE for packet in made)
    assert b"".join(decode_chunk(packet).data for packet in made) == content


def test_no_packet_is_over_what_managed_brokers_take() -> None:
    ref, content = blob(CHUNK_BYTES)
    _, length = extent(ref, 0, CHUNK_BYTES)
    assert len(encode_chunk(ref, 0, content[:length])) == CHUNK_BYTES <= 128_000


def test_a_chunk_names_its_blob() -> None:
    ref, content = blob(100)
    assert decode_chunk(encode_chunk(ref, 7, content)) == Chunk(prefix_of(ref), 7, content)


@settings(derandomize=True, max_examples=200)
@given(st.binary(max_size=64))
def test_other_bytes_are_malformed(packet: bytes) -> None:
    with pytest.raises(Malformed):
        decode_chunk(packet)


@pytest.mark.parametrize("place", [0, 9, 13, 17, 25, -1])
def test_a_changed_byte_is_noticed_or_leads_elsewhere(place: int) -> None:
    ref, content = blob(100)
    packet = bytearray(encode_chunk(ref, 3, content))
    packet[place] ^= 1
    try:
        chunk = decode_chunk(bytes(packet))
    except Malformed:
        return
    assert (chunk.prefix, chunk.index) != (prefix_of(ref), 3)  # for the blob's SHA-256 to find


def receive(missing: Missing, made: list[bytes], content: bytes) -> bytes:
    whole = bytearray(len(content))
    for packet in made:
        chunk = decode_chunk(packet)
        offset = missing.place(chunk)
        if offset is not None:
            whole[offset : offset + len(chunk.data)] = chunk.data
    return bytes(whole)


def test_chunks_in_any_order_and_twice_make_the_blob() -> None:
    ref, content = blob(9 * DATA + 5)
    made = packets(ref, content) * 2
    random.Random(0).shuffle(made)
    missing = Missing(ref, SIZE, 4)
    assert not missing.complete
    assert receive(missing, made, content) == content
    assert missing.complete
    assert missing.ask() == ()


def test_an_empty_blob_is_complete() -> None:
    assert Missing(BlobRef.of(b""), SIZE, 4).complete


def test_a_window_is_on_its_way_at_most() -> None:
    ref, content = blob(10 * DATA)
    made = packets(ref, content)
    missing = Missing(ref, SIZE, 4)
    assert missing.ask() == ((0, 4),)
    assert missing.ask() == ()
    receive(missing, made[:1], content)
    assert missing.ask() == (), "more than half is still on its way"
    receive(missing, made[1:2], content)
    assert missing.ask() == ((4, 6),)
    receive(missing, made[8:9], content)  # asked for by another, but here it is
    missing.stalled()
    assert missing.ask() == ((2, 6),)
    receive(missing, made[2:6], content)
    assert missing.ask() == ((6, 8), (9, 10))


@pytest.mark.parametrize("index", [2, 2**32 - 1])
def test_a_chunk_beyond_the_end_is_refused(index: int) -> None:
    ref, content = blob(2 * DATA)
    with pytest.raises(Malformed, match="beyond the end"):
        Missing(ref, SIZE, 4).place(Chunk(prefix_of(ref), index, content[:DATA]))


@pytest.mark.parametrize("length", [0, 1, DATA - 1])
def test_a_chunk_of_another_length_is_refused(length: int) -> None:
    ref, content = blob(2 * DATA)
    missing = Missing(ref, SIZE, 4)
    with pytest.raises(Malformed, match="expected"):
        missing.place(Chunk(prefix_of(ref), 0, content[:length]))
    assert receive(missing, packets(ref, content)[:1], content) != content


def drain(owed: Owed) -> list[tuple[BlobRef, int, str | None]]:
    return list(iter(owed.next, None))


def test_what_several_want_is_owed_once() -> None:
    ref, _ = blob(4 * DATA)
    owed = Owed()
    owed.add("a", ref, ((0, 2),), SIZE)
    owed.add("b", ref, ((1, 3),), SIZE)
    owed.add("a", ref, ((0, 1),), SIZE)
    assert drain(owed) == [(ref, 0, None), (ref, 1, None), (ref, 2, None)]
    assert owed.next() is None


def test_what_was_sent_goes_again_to_all_only_if_many_want_it() -> None:
    ref, _ = blob(4 * DATA)
    owed = Owed()
    for peer in "abcdefghi":
        owed.add(peer, ref, ((0, 4),), SIZE)
    assert drain(owed) == [(ref, index, None) for index in range(4)]
    for peer in "ba":
        owed.add(peer, ref, ((1, 2),), SIZE)
    for peer in "abcdefghi":
        owed.add(peer, ref, ((3, 4),), SIZE)
    assert drain(owed) == [(ref, 1, "b"), (ref, 3, None), (ref, 1, "a")]
    owed.add("a", ref, ((2, 3),), SIZE)
    assert drain(owed) == [(ref, 2, "a")]
    owed.drop(ref)
    owed.add("a", ref, ((2, 3),), SIZE)
    assert drain(owed) == [(ref, 2, None)]


def test_what_is_on_its_way_to_a_slow_peer_is_not_sent_again_before_it_is_missed() -> None:
    ref, _ = blob(6 * DATA)
    owed = Owed()
    for peer in ("fast", "slow"):
        owed.add(peer, ref, ((0, 2),), SIZE)
    owed.add("fast", ref, ((2, 6),), SIZE)
    assert drain(owed) == [(ref, index, None) for index in range(6)]
    owed.add("slow", ref, ((2, 4),), SIZE)
    assert owed.next() is None
    owed.add("slow", ref, ((3, 4),), SIZE)
    assert drain(owed) == [(ref, 3, "slow")]
    owed.add("slow", ref, ((4, 6),), SIZE)  # what is lost is not lost alone
    assert drain(owed) == [(ref, 4, "slow"), (ref, 5, "slow")]
    owed.add("late", ref, ((0, 2),), SIZE)
    assert drain(owed) == [(ref, 0, "late"), (ref, 1, "late")]


def test_nobody_waits_for_ever_for_one_who_asks_again_and_again() -> None:
    one, two = blob(4 * DATA)[0], blob(5 * DATA)[0]
    owed = Owed()
    for peer in "abcdefghijkl":
        owed.add(peer, one, ((0, 2),), SIZE)
    drain(owed)
    for peer in ("a", "z"):
        owed.add(peer, one, ((0, 1),), SIZE)
    for peer in "bcdefghijkl":
        owed.add(peer, one, ((1, 2),), SIZE)
    owed.add("z", two, ((0, 1),), SIZE)
    sent = []
    for _ in range(4):
        item = owed.next()
        assert item is not None
        sent.append(item)
        owed.add("a", one, ((0, 1),), SIZE)
    assert sent == [(one, 0, "a"), (two, 0, None), (one, 1, None), (one, 0, None)]


def test_what_is_asked_for_first_goes_first_and_can_be_dropped() -> None:
    (one, _), (two, _) = blob(DATA), blob(2 * DATA)
    owed = Owed()
    owed.add("a", one, ((0, 1),), SIZE)
    owed.add("b", two, ((1, 2), (0, 1)), SIZE)
    assert [index for _, index, _ in drain(owed)] == [0, 1, 0]
    owed.add("a", one, ((0, 1),), SIZE)
    owed.add("a", two, (), SIZE)
    owed.drop(one)
    owed.drop(two)
    assert owed.next() is None


@pytest.mark.parametrize("ranges", [((0, 3),), ((-1, 1),), ((1, 1),), ((2, 1),), ((0, 1), (5, 6))])
def test_ranges_that_the_blob_has_not_are_malformed(ranges: tuple[tuple[int, int], ...]) -> None:
    owed = Owed()
    with pytest.raises(Malformed):
        owed.add("a", blob(2 * DATA)[0], ranges, SIZE)
    assert owed.next() is None


def test_ranges_that_name_a_chunk_again_and_again_are_malformed() -> None:
    """A message of 64 KiB has room for 16,000 of them, and each would cost as much as the whole blob."""
    ref, owed = blob(3 * DATA)[0], Owed()
    owed.add("a", ref, ((0, 2), (1, 2)), SIZE)
    assert [index for _, index, _ in drain(owed)] == [0, 1]
    with pytest.raises(Malformed, match="more chunks than"):
        owed.add("a", ref, ((0, 2), (0, 2)), SIZE)
    assert owed.next() is None


@settings(derandomize=True)
@given(st.sets(st.integers(0, 50)))
def test_ranges_hold_the_indices_and_no_others(indices: set[int]) -> None:
    ranges = as_ranges(sorted(indices))
    assert [index for first, end in ranges for index in range(first, end)] == sorted(indices)
    assert all(end < first for (_, end), (first, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize("chunk_bytes", [0, 1023, (1 << 20) + 1])
def test_chunk_sizes_that_no_broker_takes(chunk_bytes: int) -> None:
    with pytest.raises(UserError):
        check_chunk_bytes(chunk_bytes)
