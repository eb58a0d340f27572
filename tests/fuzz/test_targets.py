"""Each decoder on real encodings, on those encodings damaged, and on noise; no fuzzer is needed.

Next: `tests/fuzz/targets.py`, which decoders these are.
"""

from __future__ import annotations

import random
import tracemalloc
import zlib
from typing import get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run import Verdict, reason, statistic, table
from targets import Target, accepts, targets

from wire.messages import Message

TARGETS = targets()
fuzz = settings(
    derandomize=True,
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_every_message_has_a_target() -> None:
    assert {kind.__name__.lower() for kind in get_args(Message)} <= TARGETS.keys()


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_decode(name: str) -> None:
    target = TARGETS[name]
    for seed in target.seeds:
        assert accepts(target, seed)
        assert len(seed) <= target.max_bytes


@st.composite
def damaged(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A seed after one to six blows, as a flash card or a liar deals them."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["byte", "cut", "zeros", "insert", "repeat", "number"])):
            case "byte":
                content[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case "cut":
                del content[place:]
            case "zeros":
                size = draw(st.integers(1, 64))
                content[place : place + size] = bytes(len(content[place : place + size]))
            case "insert":
                content[place:place] = draw(st.binary(max_size=16))
            case "repeat":
                size = draw(st.integers(1, 64))
                content[place:place] = content[place : place + size] * draw(st.integers(1, 20))
            case "number":
                number = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
                content[place : place + 8] = number.to_bytes(8, draw(st.sampled_from(["big", "little"])))
    return bytes(content)


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_encoding_decodes_or_is_refused(name: str) -> None:
    target = TARGETS[name]

    @fuzz
    @given(content=damaged(target.seeds))
    def check(content: bytes) -> None:
        accepts(target, content)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_byte_anywhere_is_no_crash(name: str) -> None:
    """Of the first seed, at up to 400 places."""
    target = TARGETS[name]
    seed = target.seeds[0]
    for place in range(0, len(seed), 1 + len(seed) // 400):
        for byte in (0x00, 0xF3, seed[place] ^ 1):
            accepts(target, seed[:place] + bytes([byte]) + seed[place + 1 :])


def test_books_whose_index_has_a_strange_name_are_no_crash() -> None:
    """SQLite quotes it in its error, which is then no text."""
    (seed,) = TARGETS["books"].seeds
    damaged = seed.replace(b"sqlite_autoindex_rounds", b"sqlite_autoi\xf3dex_rounds")
    assert damaged != seed
    accepts(TARGETS["books"], damaged)


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_decode_or_are_refused(name: str) -> None:
    target = TARGETS[name]

    @fuzz
    @given(content=st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
    def check(content: bytes) -> None:
        accepts(target, content)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_noise_of_any_size_is_refused(name: str) -> None:
    """Up to what the decoder takes, and one byte more."""
    target = TARGETS[name]
    dice = random.Random(zlib.crc32(name.encode()))
    for size in (0, 1, 100, target.max_bytes // 2, target.max_bytes - 1, target.max_bytes):
        accepts(target, dice.randbytes(size))
        accepts(target, bytes(size))


def peak_bytes(target: Target, content: bytes) -> int:
    """What decoding it takes at once, beside the input."""
    tracemalloc.start()
    try:
        accepts(target, content)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("item", [b"[]", b"{}", b"[[]]", b'{"":0}', b'"a"', b"1.5"])
def test_a_manifest_takes_at_most_32_bytes_for_one(item: bytes) -> None:
    """130 MB for one of 4 MiB, the largest that is read."""
    (seed,) = TARGETS["manifest"].seeds
    filled = seed.replace(b'"width": 8', b'"width": [' + b",".join([item] * 50_000) + b"]")
    assert len(filled) > len(seed) + 100_000
    assert peak_bytes(TARGETS["manifest"], filled) < 32 * len(filled)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("want", "ranges", [[0, 1]] * 21_000),
        ("hello", "num_examples", {f"{number:x}": 0 for number in range(10_000)}),
        ("report", "groups", ["a"] * 32_000),
        ("offer", "cohort", ["a"] * 120_000),
        ("offer", "news", [[]] * 250_000),
    ],
)
def test_a_message_takes_at_most_26_bytes_for_one(name: str, field: str, value: object) -> None:
    """2 MB at most, an offer 7 MB."""
    target = TARGETS[name]
    filled = msgspec.msgpack.encode(msgspec.msgpack.decode(target.seeds[0]) | {field: value})
    assert 0.8 * target.max_bytes < len(filled) < target.max_bytes
    assert peak_bytes(target, filled) < 26 * len(filled)


def test_a_crash_is_noticed() -> None:
    def decode(content: bytes) -> None:
        raise KeyError(content)

    with pytest.raises(KeyError):
        accepts(Target(decode, (b"",), 10), b"")


def test_the_table_tells_what_ended_a_target() -> None:
    good = Verdict("offer", 120_000, 50.0, 81, 160, 240, "")
    bad = Verdict("pending", 12, 1.0, 70, 160, 3, "UnicodeDecodeError: invalid start byte")
    lines = table([good, bad]).splitlines()
    assert lines[1].split() == ["offer", "120,000", "2,400", "81", "MB", "160", "MB", "240", "no", "crash"]
    assert lines[2].endswith("UnicodeDecodeError: invalid start byte")
    assert lines[-1] == "120,012 executions in 51 s of 2 targets, 1 crashed"


def test_what_the_fuzzer_told_is_read() -> None:
    told = """#458663 DONE   cov: 14
stat::number_of_executed_units: 458663
stat::peak_rss_mb:              83
"""
    assert (statistic(told, "number_of_executed_units"), statistic(told, "peak_rss_mb")) == (458663, 83)
    assert reason(told, 0) == ""
    crashed = " === Uncaught Python exception: ===\nKeyError: 'x'\nTraceback\n==1== ERROR: libFuzzer: fuzz"
    assert reason(crashed, 77) == "KeyError: 'x'"
    assert (
        reason("==9== ERROR: libFuzzer: out-of-memory (used: 161Mb)", 71) == "out-of-memory (used: 161Mb)"
    )
    assert reason("", -11) == "exit code -11"
