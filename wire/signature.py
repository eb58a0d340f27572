"""Who may say what runs on a device: the owner's signature of a bundle's manifest.

Rules: Ed25519 (RFC 8032) over a text that names its purpose and the manifest's SHA-256 and size. So an
announcement is judged before a byte of the bundle is asked for; and as the manifest has the hash of every
file, the signature covers every graph. It is 64 bytes in `manifest.sig`, beside `manifest.json`. Nothing
here can sign: that takes the private key, which no device and no aggregator has.

`cryptography` is imported when there is a key to read, and not before.
Next: `edge_client/gate.py`, who asks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wire.errors import UserError
from wire.manifest import BlobRef

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SIGNATURE_NAME = "manifest.sig"
SIGNATURE_BYTES = 64


def signed_text(manifest: BlobRef) -> bytes:
    """What is signed; the first line keeps a signature from meaning anything else."""
    return f"lamina manifest 1\n{manifest.sha256}\n{manifest.size_bytes}\n".encode()


def read_signature(bundle: Path) -> bytes | None:
    """A bundle's signature, unchecked; None where it has none. Raises `UserError` if it is none at all."""
    path = bundle / SIGNATURE_NAME
    try:
        signature = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error
    if len(signature) != SIGNATURE_BYTES:
        raise UserError(
            f"{path} has {len(signature)} bytes, a signature has {SIGNATURE_BYTES}",
            f"sign the bundle once more: lamina sign {bundle} --key owner.key",
        )
    return signature


@dataclass(frozen=True)
class Owner:
    """An owner, by the public key. name: 16 hex digits of the key's SHA-256."""

    key: Ed25519PublicKey
    name: str

    @classmethod
    def of(cls, key: Ed25519PublicKey) -> Owner:
        """The owner with this key."""
        return cls(key, hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16])

    @classmethod
    def read(cls, path: Path) -> Owner:
        """From a PEM file. Raises `UserError`, also where `cryptography` is not installed."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}", "check --owner") from error
        try:
            from cryptography.exceptions import UnsupportedAlgorithm
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
            from cryptography.hazmat.primitives.serialization import load_pem_public_key
        except ImportError as error:
            raise UserError(
                "an owner's signature cannot be checked without cryptography",
                'pip install "lamina[identity]"',
            ) from error
        try:
            key = load_pem_public_key(content)
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise UserError(f"{path} is not an owner's public key", "give the owner.pub of the run's owner")
        return cls.of(key)

    def has_signed(self, manifest: BlobRef, signature: bytes | None) -> bool:
        """Whether this is the owner's signature of this manifest."""
        from cryptography.exceptions import InvalidSignature

        if signature is None:
            return False
        try:
            self.key.verify(signature, signed_text(manifest))
        except InvalidSignature:
            return False
        return True
