"""Messages: what goes in comes out, and whatever else comes in is refused by name."""

from __future__ import annotations

import math
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wire.errors import MAX_PEER_TEXT, LocalError, Malformed, PeerError, Refusal, TooLarge
from wire.manifest import BlobRef
from wire.messages import (
    MAX_LEARNING_RATE,
    MAX_MESSAGE_BYTES,
    MAX_OFFER_BYTES,
    MAX_PROXIMAL_MU,
    Announcement,
    Bye,
    Change,
    Hello,
    Message,
    Offer,
    Receipt,
    Report,
    RoundKey,
    TrainPlan,
    Usage,
    Want,
    decode,
    encode,
)
from wire.transfer import MAX_CHUNK_BYTES, MIN_CHUNK_BYTES

KINDS = get_args(Message)
KEY = RoundKey(2, 11)
NAN, INF = math.nan, math.inf
fuzz = settings(
    derandomize=True, max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def announcement(**changes: Any) -> Announcement:
    fields = {
        "run": "r1",
        "manifest": BlobRef.of(b"manifest"),
        "started_s": 1.7e9,
        "heartbeat_s": 10.0,
        "chunk_bytes": 120 << 10,
    }
    return Announcement(**{**fields, **changes})


def hello(**changes: Any) -> Hello:
    fields = {
        "num_examples": {"text": 7, "image": 5},
        "engine": "onnx",
        "memory_mb": 4096,
        "version": "0.1",
    }
    return Hello(**{**fields, **changes})


def bye() -> Bye:
    return Bye()


def offer(**changes: Any) -> Offer:
    fields = {
        "key": KEY,
        "opened_s": 1.7e9,
        "cohort": ("ada", "ben"),
        "parameters": BlobRef.of(b"parameters"),
        "frozen": (BlobRef.of(b"first"), BlobRef.of(b"second")),
        "plan": TrainPlan(1e-3, 32, 2, 2**63 - 1, "int8", "float16", 4, 3, 0.01),
        "deadline_s": 599.5,
        "change": Change(BlobRef.of(b"before"), BlobRef.of(b"change"), BlobRef.of(b"parameters")),
    }
    return Offer(**{**fields, **changes})


def want(**changes: Any) -> Want:
    return Want(**{"blob": BlobRef.of(b"blob"), "ranges": ((0, 3), (7, 8)), **changes})


def report(**changes: Any) -> Report:
    fields = {
        "key": KEY,
        "update": BlobRef.of(b"update"),
        "groups": ("image.block.1", "head"),
        "num_examples": 40,
        "loss": 0.1 + 0.2,
    }
    return Report(**{**fields, **changes})


def receipt(**changes: Any) -> Receipt:
    return Receipt(**{"key": KEY, **changes})


def usage(**changes: Any) -> Usage:
    fields = {
        "key": KEY,
        "bytes_sent": 2**40,
        "bytes_received": 1,
        "peak_rss_bytes": 2**33,
        "seconds": 12.25,
        "cpu_s": 1e9,
    }
    return Usage(**{**fields, **changes})


EXAMPLES: list[Message] = [
    announcement(),
    announcement(open=False),
    hello(),
    hello(num_examples={}),
    bye(),
    offer(),
    offer(cohort=(), frozen=()),
    want(),
    report(),
    receipt(),
    receipt(refusal="late", detail="stage 3 round 12 is over — nothing is lost"),
    usage(),
]


def example_of(kind: type[Any]) -> dict[str, Any]:
    return fields_of(next(message for message in EXAMPLES if type(message) is kind))


def at(fields: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        fields = fields[step]
    return fields


def put(fields: Any, path: tuple[Any, ...], value: object) -> None:
    """Replace the value at the end of `path`. Raises `KeyError` or `IndexError` where there is none."""
    at(fields, path)
    at(fields, path[:-1])[path[-1]] = value


def name_of(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def fields_of(message: Message) -> dict[str, Any]:
    """The message as another program sees it: plain maps and arrays."""
    fields: dict[str, Any] = msgspec.msgpack.decode(encode(message))
    return fields


def with_news(value: Any) -> Any:
    """`value` with a field that no version knows in every map of it, but not in maps of names to counts."""
    if not isinstance(value, dict):
        return [with_news(item) for item in value] if isinstance(value, list) else value
    news = {"news": [1, {"deep": None}]}
    return news | {key: item if key == "num_examples" else with_news(item) for key, item in value.items()}


def test_every_kind_has_an_example():
    assert {type(message) for message in EXAMPLES} == set(KINDS)


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_a_message_comes_out_as_it_went_in(message: Message):
    again = decode(encode(message), type(message))
    assert type(again) is type(message)
    assert again == message
    assert encode(again) == encode(message)


def test_the_order_of_names_and_every_bit_of_a_number_are_kept():
    assert list(decode(encode(hello()), Hello).num_examples) == ["text", "image"]
    assert decode(encode(report()), Report).loss.hex() == (0.1 + 0.2).hex()
    assert decode(encode(report(loss=float("inf"))), Report).loss == float("inf")


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_fields_of_a_newer_peer_are_ignored(message: Message):
    newer = with_news(fields_of(message))
    assert "news" in newer
    assert decode(msgspec.msgpack.encode(newer), type(message)) == message


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_another_kind_is_refused(message: Message, kind: type[Any]):
    if type(message) is kind:
        assert decode(encode(message), kind) == message
        return
    with pytest.raises(Malformed, match=f"^not a {kind.__name__}: "):
        decode(encode(message), kind)


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_a_field_of_another_type_or_none_at_all_is_refused(message: Message):
    whole, kind = fields_of(message), type(message)
    required = {field.name for field in msgspec.structs.fields(kind) if field.required}
    for name in whole.keys() - {"type"}:
        with pytest.raises(Malformed):
            decode(msgspec.msgpack.encode({**whole, name: {"another": ["type"]}}), kind)
        rest = msgspec.msgpack.encode({key: value for key, value in whole.items() if key != name})
        if name in required:
            with pytest.raises(Malformed, match=name):
                decode(rest, kind)
        else:
            decode(rest, kind)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        (Report, ("update", "sha256"), "0" * 63),
        (Report, ("update", "sha256"), "A" * 64),
        (Report, ("update", "size_bytes"), -1),
        (Report, ("num_examples",), 40.0),
        (Report, ("num_examples",), True),
        (Report, ("key", "round"), "11"),
        (Receipt, ("refusal",), "bored"),
        (Want, ("ranges",), [[0, 3, 7]]),
        (Offer, ("plan", "batch_size"), None),
        (Offer, ("plan", "batch_size"), 0),
        (Offer, ("plan", "local_epochs"), 0),
        (Offer, ("plan", "learning_rate"), -1e-3),
        (Offer, ("plan", "learning_rate"), NAN),
        (Offer, ("plan", "seed"), -1),
        *((Offer, ("plan", "proximal_mu"), mu) for mu in (-1e-3, 2 * MAX_PROXIMAL_MU, INF, -INF, NAN)),
        # What follows is of the right type.
        *((Announcement, ("chunk_bytes",), size) for size in (-1, 0, 20, MIN_CHUNK_BYTES - 1)),
        *((Announcement, ("chunk_bytes",), size) for size in (MAX_CHUNK_BYTES + 1, 2**64 - 1)),
        *(
            (Announcement, ("run",), name)
            for name in ("", "+", "#", "a/b", ".", "-a", "ä", "a\n", "a" * 65)
        ),
        *((Offer, ("cohort", 1), name) for name in ("", "+", "a/b", "..", "a b", "a\n", "a" * 65)),
        *((Announcement, ("heartbeat_s",), seconds) for seconds in (-1.0, 1.1e9, INF, -INF, NAN)),
        *((Usage, ("seconds",), seconds) for seconds in (-1e-9, 1.1e9, INF, -INF, NAN)),
        *((Offer, ("plan", "learning_rate"), rate) for rate in (2 * MAX_LEARNING_RATE, INF, -INF)),
        *((Offer, ("plan", name), 2**31 + 1) for name in ("batch_size", "local_epochs")),
        *(
            (kind, path, count)
            for kind, path in [
                (Announcement, ("manifest", "size_bytes")),
                (Hello, ("num_examples", "image")),
                (Hello, ("memory_mb",)),
                (Offer, ("key", "stage")),
                (Offer, ("frozen", 1, "size_bytes")),
                (Offer, ("plan", "seed")),
                (Want, ("blob", "size_bytes")),
                (Report, ("key", "stage")),
                (Report, ("key", "round")),
                (Report, ("update", "size_bytes")),
                (Report, ("num_examples",)),
                (Receipt, ("key", "round")),
                (Usage, ("bytes_sent",)),
                (Usage, ("bytes_received",)),
                (Usage, ("peak_rss_bytes",)),
            ]
            for count in (-1, 2**63)
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused(kind: type[Any], path: tuple[Any, ...], value: object):
    fields = example_of(kind)
    put(fields, path, value)
    with pytest.raises(Malformed, match=path[0]):
        decode(msgspec.msgpack.encode(fields), kind)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        *((Announcement, ("chunk_bytes",), size) for size in (MIN_CHUNK_BYTES, MAX_CHUNK_BYTES)),
        *((Announcement, ("run",), name) for name in ("a", "0", "a" * 64, "pi-4.b_c")),
        *((Offer, ("cohort", 1), name) for name in ("a", "0", "a" * 64, "pi-4.b_c")),
        *((Announcement, ("heartbeat_s",), seconds) for seconds in (0, 1e9)),
        *((Offer, ("plan", "learning_rate"), rate) for rate in (0, 0.0, 1e-30, MAX_LEARNING_RATE)),
        *((Offer, ("plan", "proximal_mu"), mu) for mu in (0, 0.0, 1e-30, MAX_PROXIMAL_MU)),
        *((Offer, ("plan", name), 2**31) for name in ("batch_size", "local_epochs")),
        *((Offer, ("plan", "seed"), seed) for seed in (0, 2**63 - 1)),
        *((Report, ("num_examples",), count) for count in (0, 2**63 - 1)),
        *((Report, ("key", "round"), count) for count in (0, 2**63 - 1)),
        *((Usage, ("seconds",), seconds) for seconds in (0.0, 1e9)),
    ],
)
def test_a_value_at_its_limit_is_taken(kind: type[Any], path: tuple[Any, ...], value: object):
    fields = example_of(kind)
    put(fields, path, value)
    message = decode(msgspec.msgpack.encode(fields), kind)
    assert at(fields_of(message), path) == value


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_too_large_is_refused_before_decoding(kind: type[Any]):
    limit = MAX_OFFER_BYTES if kind is Offer else MAX_MESSAGE_BYTES
    with pytest.raises(Malformed):  # not msgpack, so it was decoded
        decode(b"\xc1" * limit, kind)
    with pytest.raises(TooLarge, match=f"{limit + 1} bytes, the limit is {limit}"):
        decode(b"\xc1" * (limit + 1), kind)


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_the_limit_is_for_the_whole_message(message: Message):
    limit = MAX_OFFER_BYTES if isinstance(message, Offer) else MAX_MESSAGE_BYTES
    padding = 0
    while missing := limit - len(msgspec.msgpack.encode(fields_of(message) | {"news": b"." * padding})):
        padding += missing
    full = fields_of(message) | {"news": b"." * padding}
    assert decode(msgspec.msgpack.encode(full), type(message)) == message
    with pytest.raises(TooLarge):
        decode(msgspec.msgpack.encode({**full, "news": b"." * (padding + 1)}), type(message))


def test_what_no_peer_would_take_is_not_sent():
    def refused(length: int) -> Receipt:
        return Receipt(KEY, "malformed", "." * length)

    spare = MAX_MESSAGE_BYTES - len(encode(refused(60_000)))
    assert spare > 0
    longest = refused(60_000 + spare)
    assert len(encode(longest)) == MAX_MESSAGE_BYTES
    assert decode(encode(longest), Receipt) == longest
    with pytest.raises(LocalError, match=f"^Receipt of {MAX_MESSAGE_BYTES + 1} bytes is too large"):
        encode(refused(60_000 + spare + 1))


def test_an_offer_has_more_room_than_the_others():
    crowd = tuple(f"{number:064}" for number in range(1100))
    assert MAX_MESSAGE_BYTES < len(encode(offer(cohort=crowd))) < MAX_OFFER_BYTES
    with pytest.raises(LocalError, match=r"^Offer of "):
        encode(offer(cohort=4 * crowd))
    with pytest.raises(LocalError, match=r"^Report of "):
        encode(report(groups=crowd))


def test_a_cohort_of_a_thousand_long_names_fits():
    large = offer(cohort=tuple(f"{number:064}" for number in range(1000)))
    assert decode(encode(large), Offer) == large


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a"], ids=["lists", "maps"])
def test_a_bottomless_message_is_malformed(opening: bytes, kind: type[Any]):
    bottomless = opening * 15_000 + b"\xc0"
    whole = msgspec.msgpack.encode(example_of(kind) | {"news": "here"})
    with pytest.raises(Malformed, match=f"^not a {kind.__name__}: "):
        decode(whole.replace(b"\xa4here", bottomless), kind)
    with pytest.raises(Malformed, match=f"^not a {kind.__name__}: "):
        decode(bottomless, kind)


def decodes_or_is_malformed(payload: bytes, kind: type[Any]) -> bool:
    try:
        assert type(decode(payload, kind)) is kind
    except Malformed:
        return False
    return True


@fuzz
@given(payload=st.binary(max_size=200), kind=st.sampled_from(KINDS))
def test_any_bytes_decode_or_are_malformed(payload: bytes, kind: type[Any]):
    decodes_or_is_malformed(payload, kind)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=9) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)


@fuzz
@given(message=st.sampled_from(EXAMPLES), data=st.data())
def test_any_value_in_any_field_decodes_or_is_malformed(message: Message, data: st.DataObject):
    fields = fields_of(message)
    fields[data.draw(st.sampled_from([*fields, "news"]))] = data.draw(PLAIN)
    decodes_or_is_malformed(msgspec.msgpack.encode(fields), type(message))


@fuzz
@given(message=st.sampled_from(EXAMPLES), data=st.data())
def test_a_damaged_message_decodes_or_is_malformed(message: Message, data: st.DataObject):
    payload = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    decodes_or_is_malformed(bytes(payload), type(message))


@pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
def test_a_message_cut_short_or_with_a_tail_is_malformed(message: Message):
    payload = encode(message)
    for end in range(len(payload)):
        assert not decodes_or_is_malformed(payload[:end], type(message))
    assert not decodes_or_is_malformed(payload + b"\x00", type(message))


def test_rounds_are_ordered_and_told_from_one():
    assert str(RoundKey(0, 4)) == "stage 1 round 5"
    assert sorted([RoundKey(1, 0), RoundKey(0, 9), RoundKey(0, 2)]) == [
        RoundKey(0, 2),
        RoundKey(0, 9),
        RoundKey(1, 0),
    ]


def test_every_error_of_a_peer_has_a_refusal_to_tell_it():
    assert {error.reason for error in [PeerError, *PeerError.__subclasses__()]} <= set(get_args(Refusal))


@pytest.mark.parametrize(
    "quoted",
    [
        "a\nb",
        "\r\x1b[2J\x1b]0;title\x07",
        "\u2028\u2029\x85",
        "\u202egnp.exe",
        "\ud800",
        "\0" * 50,
        "x" * 10_000,
        "\n" * 10_000,
        "\U0001f600" * 10_000,
    ],
    ids=["line", "terminal", "separators", "bidi", "surrogate", "zeros", "long", "lines", "smileys"],
)
def test_what_a_peer_is_quoted_with_is_short_and_printable(quoted: str):
    for error in [PeerError, *PeerError.__subclasses__()]:
        if error.__module__ == "wire.errors":
            text = str(error(f"no group is called {quoted}"))
            assert text.startswith("no group is called ")
            assert text.isprintable()
            assert len(text) <= MAX_PEER_TEXT + len("...")
            assert decode(encode(receipt(refusal="late", detail=text)), Receipt).detail == text


def test_a_plain_text_about_a_peer_stays_as_it_is():
    text = "chunk 3 of „größer“ is damaged"
    assert str(Malformed(text)) == text
    assert str(Malformed("x" * MAX_PEER_TEXT)) == "x" * MAX_PEER_TEXT
    assert str(Malformed("a\nb\tc")) == r"a\nb\tc"
    assert Malformed("text", "hint").hint == "hint"


@pytest.mark.parametrize("refusal", get_args(Refusal))
def test_every_refusal_travels(refusal: Any):
    assert decode(encode(receipt(refusal=refusal)), Receipt).refusal == refusal
