"""An owner's signature: it is for one manifest, of one key, and for nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lamina.identity.certificates import key_pem, public_pem
from wire.errors import UserError
from wire.manifest import BlobRef
from wire.signature import SIGNATURE_BYTES, SIGNATURE_NAME, Owner, read_signature, signed_text

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
OWNER = Owner.of(KEY.public_key())
MANIFEST = b'{"format": 3}'
REF = BlobRef.of(MANIFEST)
SIGNATURE = KEY.sign(signed_text(REF))


def test_what_is_signed_is_the_same_for_ever():
    """Bundles that were signed once stay signed."""
    assert signed_text(BlobRef("0" * 64, 7)) == b"lamina manifest 1\n" + b"0" * 64 + b"\n7\n"
    assert OWNER.name == "56475aa75463474c"


def test_the_owners_signature_of_this_manifest():
    assert OWNER.has_signed(REF, SIGNATURE)


@pytest.mark.parametrize(
    "signature",
    [
        None,
        OTHER.sign(signed_text(REF)),
        KEY.sign(MANIFEST),
        KEY.sign(REF.sha256.encode()),
        KEY.sign(signed_text(BlobRef(REF.sha256, REF.size_bytes + 1))),
        bytes(64),
    ],
    ids=["none", "of another key", "of the bytes", "of the hash", "of another size", "zeros"],
)
def test_no_other_counts(signature: bytes | None):
    assert not OWNER.has_signed(REF, signature)


def test_not_with_one_bit_changed_on_either_side():
    for at in range(8 * len(SIGNATURE)):
        changed = bytearray(SIGNATURE)
        changed[at // 8] ^= 1 << at % 8
        assert not OWNER.has_signed(REF, bytes(changed))
    for at in range(8 * len(MANIFEST)):
        changed = bytearray(MANIFEST)
        changed[at // 8] ^= 1 << at % 8
        assert not OWNER.has_signed(BlobRef.of(bytes(changed)), SIGNATURE)


def test_another_program_agrees(tmp_path: Path):
    files = {"text": signed_text(REF), "signature": SIGNATURE, "owner.pub": public_pem(KEY.public_key())}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "owner.pub"]
    command += ["-rawin", "-in", "text", "-sigfile", "signature"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout.strip() == "Signature Verified Successfully", done.stderr


def test_the_signature_beside_a_manifest(tmp_path: Path):
    assert read_signature(tmp_path) is None
    (tmp_path / SIGNATURE_NAME).write_bytes(SIGNATURE)
    assert read_signature(tmp_path) == SIGNATURE


@pytest.mark.parametrize("size", [0, 1, SIGNATURE_BYTES - 1, SIGNATURE_BYTES + 1])
def test_a_signature_of_another_length_is_none(tmp_path: Path, size: int):
    (tmp_path / SIGNATURE_NAME).write_bytes(bytes(size))
    with pytest.raises(UserError, match=f"has {size} bytes") as caught:
        read_signature(tmp_path)
    assert "lamina sign" in caught.value.hint


def test_an_owner_from_a_file(tmp_path: Path):
    (tmp_path / "owner.pub").write_bytes(public_pem(KEY.public_key()))
    assert Owner.read(tmp_path / "owner.pub").has_signed(REF, SIGNATURE)
    with pytest.raises(UserError, match="nowhere cannot be read"):
        Owner.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"an owner",
        public_pem(KEY.public_key())[:-40],
        key_pem(KEY),
        public_pem(ec.derive_private_key(7, ec.SECP256R1()).public_key()),  # type: ignore[arg-type]
    ],
    ids=["nothing", "text", "cut off", "the private key", "another kind of key"],
)
def test_what_is_no_owner(tmp_path: Path, content: bytes):
    (tmp_path / "owner.pub").write_bytes(content)
    with pytest.raises(UserError, match="is not an owner's public key") as caught:
        Owner.read(tmp_path / "owner.pub")
    assert "owner.pub" in caught.value.hint


def test_without_cryptography_there_is_a_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "owner.pub").write_bytes(public_pem(KEY.public_key()))
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.serialization", None)
    with pytest.raises(UserError, match="without cryptography") as caught:
        Owner.read(tmp_path / "owner.pub")
    assert caught.value.hint == 'pip install "lamina[identity]"'
