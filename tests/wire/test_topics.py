"""Topics: few levels, names that cannot leave their own, and the way back from a topic to its parts."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from wire.errors import UserError
from wire.topics import (
    ROOT,
    Down,
    Up,
    announcement,
    blob,
    check_name,
    client_of,
    down,
    is_name,
    kind_of,
    offer,
    run_of,
    up,
)

LONGEST = "r" * 64
SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
ALLOWED = "ABCXYZabcxyz0189._-"
NAMES = st.text(ALLOWED, min_size=1, max_size=64).filter(lambda name: name[0] not in "._-")


def topics_of(run: str, client: str) -> list[str]:
    return [
        announcement(run),
        offer(run),
        blob(run, SHA256),
        *(up(run, client, kind) for kind in get_args(Up)),
        *(down(run, client, kind) for kind in get_args(Down)),
    ]


def test_topics_are_those_of_the_table():
    assert announcement("r1") == "lamina/v1/r1/bcast/run"
    assert offer("r1") == "lamina/v1/r1/bcast/offer"
    assert blob("r1", SHA256) == f"lamina/v1/r1/bcast/blob/{SHA256}"
    assert up("r1", "pi-4", "report") == "lamina/v1/r1/c/pi-4/up/report"
    assert down("r1", "pi-4", "receipt") == "lamina/v1/r1/c/pi-4/down/receipt"


def test_no_topic_has_more_than_seven_levels():
    for topic in topics_of(LONGEST, "c" * 64):
        assert topic.startswith(f"{ROOT}/")
        assert topic.count("/") <= 7  # what AWS IoT Core allows
        assert len(topic.split("/")) <= 7
        assert all(topic.split("/"))


def test_no_two_topics_are_the_same():
    topics = [
        topic for run in ("a", "b") for client in ("a", "b", "up") for topic in topics_of(run, client)
    ]
    broadcasts = 3 * 2
    assert len(set(topics)) == len(topics) - 2 * broadcasts  # every client of a run has the same ones


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "\t",
        "a b",
        " a",
        "a ",
        "a\n",
        "\na",
        "a\x00",
        "a/b",
        "/a",
        "a/",
        "+",
        "a+",
        "#",
        "a#",
        "$SYS",
        "a$",
        "a" * 65,
        ".",
        "..",
        ".a",
        "-a",
        "_a",
        "a:b",
        "a\\b",
        "a~",
        "é",
        "aé",
        "٣",  # digits, but not ASCII
        "a٣",
        "３",
        "a\u200b",
        "\U0001f600",
    ],
)
def test_a_name_that_is_no_topic_level_is_refused(name: str):
    with pytest.raises(UserError) as caught:
        check_name(name, "client")
    assert str(caught.value) == f"client {name!r} is not a usable name"
    assert len(str(caught.value).splitlines()) == 1
    assert not is_name(name)
    assert "64" in caught.value.hint


@pytest.mark.parametrize("name", ["a", "Z", "0", "pi-4", "a.b", "a_b", "2024-07-25.1", "a..", "a" * 64])
def test_a_usable_name_is_given_back(name: str):
    assert check_name(name, "run") == name
    assert is_name(name)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(name=st.text(max_size=70))
def test_whatever_passes_is_one_level_without_wildcards(name: str):
    try:
        check_name(name, "run")
    except UserError:
        return
    assert name.isascii()
    assert 1 <= len(name) <= 64
    assert not set(name) & set("/+#$ \t\r\n\0")


@settings(derandomize=True, max_examples=300, deadline=None)
@given(run=NAMES, client=NAMES)
def test_the_parts_of_a_topic_come_back(run: str, client: str):
    check_name(run, "run")
    check_name(client, "client")
    for kind, topic in [
        *((kind, up(run, client, kind)) for kind in get_args(Up)),
        *((kind, down(run, client, kind)) for kind in get_args(Down)),
    ]:
        assert (run_of(topic), client_of(topic), kind_of(topic)) == (run, client, kind)
    assert {run_of(topic) for topic in topics_of(run, client)} == {run}
    assert (kind_of(announcement(run)), kind_of(offer(run))) == ("run", "offer")
    assert kind_of(blob(run, SHA256)) == SHA256


def test_names_that_are_levels_of_ours_do_not_confuse():
    for run, client in itertools.product(
        ["lamina", "v1", "c", "bcast", "up"], ["down", "c", "run", "hello"]
    ):
        topic = up(run, client, "hello")
        assert (run_of(topic), client_of(topic), kind_of(topic)) == (run, client, "hello")


def test_a_plus_matches_every_client_and_kind_of_one_direction():
    for client in ("ada", "ben"):
        for topic in topics_of("r1", client):
            is_up = "/up/" in topic
            assert topic_matches_sub(up("r1", "+", "+"), topic) == is_up
            assert topic_matches_sub(up("r2", "+", "+"), topic) is False
            assert topic_matches_sub(down("r1", "ada", "+"), topic) == ("/c/ada/down/" in topic)
    assert topic_matches_sub(announcement("+"), announcement("r1"))
    assert not topic_matches_sub(announcement("+"), offer("r1"))


def test_one_rule_a_direction_lets_a_client_write_and_read():
    own, others = topics_of("r1", "ada"), topics_of("r1", "ben")
    for topic in {*own, *others}:
        may_write = topic_matches_sub(f"{ROOT}/r1/c/ada/up/#", topic)
        may_read = topic_matches_sub(f"{ROOT}/r1/bcast/#", topic) or topic_matches_sub(
            f"{ROOT}/r1/c/ada/down/#", topic
        )
        assert may_write == (topic in own and "/up/" in topic)
        assert may_read == (topic in own and "/up/" not in topic)
