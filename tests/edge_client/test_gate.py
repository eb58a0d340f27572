"""Which runs a client may join, and how often it says so."""

from __future__ import annotations

import logging

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from edge_client.gate import MAX_TOLD, Gate
from wire.manifest import BlobRef
from wire.messages import Announcement
from wire.signature import Owner, signed_text

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
OWNER = Owner.of(KEY.public_key())
REF = BlobRef.of(b"manifest")
UNSIGNED = Announcement("demo", REF, 500.0, 10.0, 122880)
SIGNED = replace(UNSIGNED, signature=KEY.sign(signed_text(REF)))


def test_without_an_owner_every_run_is_joined(caplog: pytest.LogCaptureFixture):
    assert Gate().admits(UNSIGNED)
    assert Gate().admits(replace(UNSIGNED, signature=bytes(64)))
    assert caplog.text == ""


def test_with_one_only_what_it_has_signed():
    gate = Gate(OWNER)
    assert gate.admits(SIGNED)
    assert gate.admits(replace(SIGNED, run="another", open=False))
    assert not gate.admits(UNSIGNED)
    assert not gate.admits(replace(SIGNED, manifest=BlobRef.of(b"Manifest")))
    assert not gate.admits(replace(UNSIGNED, signature=OTHER.sign(signed_text(REF))))


def test_each_is_told_once(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    gate = Gate(OWNER)
    stranger = replace(UNSIGNED, signature=OTHER.sign(signed_text(REF)))
    for _ in range(3):
        for announcement in (UNSIGNED, SIGNED, replace(stranger, open=False), stranger):
            gate.admits(announcement)
    assert [record.getMessage() for record in caplog.records] == [
        f"ignored run demo: its bundle is not signed by owner {OWNER.name}",
        f"ignored run demo: its bundle is signed, but not by owner {OWNER.name}",
    ]


def test_a_flood_of_them_does_not_flood_the_log(caplog: pytest.LogCaptureFixture):
    gate = Gate(OWNER)
    assert not any(gate.admits(replace(UNSIGNED, run=f"run{number}")) for number in range(MAX_TOLD + 50))
    assert len(caplog.records) == MAX_TOLD
    assert gate.admits(SIGNED)
