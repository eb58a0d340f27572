"""The folder `ca`: the authority's key, every certificate that it has issued, and which are revoked.

    ca.key, ca.crt            the authority
    issued/000001-NAME.crt    in their order; the newest of a name is the one that counts
    crl.pem                   the revoked ones

Rules: what was issued is kept, and is here before anybody else has it, so it can be revoked. A new
certificate for a name leaves the ones before as good as they were.

Next: `lamina/identity/federation.py`, who is given them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

import msgspec
from cryptography import x509
from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from lamina.identity.certificates import (
    Authority,
    Role,
    issue,
    key_pem,
    name_of,
    new_authority,
    new_key,
    revoke,
    role_of,
)
from lamina.identity.files import make_folder, write, write_key
from wire.errors import UserError

EXPIRES_SOON = timedelta(days=60)

UNREADABLE = (  # TypeError: a key is encrypted; LookupError: a name lacks a part
    ValueError,
    TypeError,
    LookupError,
    InternalError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    msgspec.MsgspecError,
)
"""What reading a damaged file of this folder raises."""

T = TypeVar("T")


@dataclass(frozen=True)
class Issued:
    """A certificate, and whether it is revoked."""

    certificate: x509.Certificate
    is_revoked: bool

    @property
    def name(self) -> str:
        """Whose."""
        return name_of(self.certificate)

    @property
    def role(self) -> str:
        """What for: a `Role`."""
        return role_of(self.certificate)

    @property
    def expires(self) -> datetime:
        """In UTC."""
        return self.certificate.not_valid_after_utc

    @property
    def pem(self) -> bytes:
        """As in a file."""
        return self.certificate.public_bytes(Encoding.PEM)

    def is_for(self, key: ec.EllipticCurvePrivateKey) -> bool:
        """Whether this is the key that belongs to it."""
        return self.certificate.public_key() == key.public_key()

    def state(self, now: datetime) -> str:
        """`valid`, `expires soon`, `expired` or `revoked`."""
        if self.is_revoked:
            return "revoked"
        if self.expires <= now:
            return "expired"
        return "expires soon" if self.expires <= now + EXPIRES_SOON else "valid"


class Ca:
    """The folder, which is there. Raises `UserError` for what is damaged or gone, `OSError` of the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.crl = folder / "crl.pem"

    def authority(self, now: datetime) -> Authority:
        """Made the first time."""
        key_path, path = self.folder / "ca.key", self.folder / "ca.crt"
        if path.exists() and not key_path.exists():
            raise UserError(f"{key_path} is gone", "bring it back, or provision a new folder")
        key = tls_key(key_path)
        if not path.exists():
            write(path, new_authority(key, now).certificate.public_bytes(Encoding.PEM))
        return Authority(load(path, x509.load_pem_x509_certificate), key)

    def issued(self) -> list[Issued]:
        """Every certificate, the oldest first."""
        revoked = {one.serial_number for one in self._revoked() or ()}
        paths = sorted((self.folder / "issued").glob("*.crt"))
        certificates = [load(path, _certificate) for path in paths]
        return [Issued(one, one.serial_number in revoked) for one in certificates]

    def members(self) -> list[Issued]:
        """The newest certificate of everybody, by role and name."""
        newest = {(one.role, one.name): one for one in self.issued()}
        return [newest[key] for key in sorted(newest)]

    def member(self, role: Role, name: str) -> Issued | None:
        """The newest of one."""
        return next((one for one in self.members() if (one.role, one.name) == (role, name)), None)

    def issue(
        self, key: ec.EllipticCurvePrivateKey, role: Role, name: str, hosts: Sequence[str], now: datetime
    ) -> Issued:
        """A new certificate; hosts: of a broker."""
        made = Issued(issue(self.authority(now), key.public_key(), name, role, hosts, now), False)
        folder = self.folder / "issued"
        make_folder(folder)
        last = max((int(path.name.partition("-")[0]) for path in folder.glob("*.crt")), default=0)
        write(folder / f"{last + 1:06}-{name}.crt", made.pem)
        return made

    def revoke(self, certificates: Collection[Issued], now: datetime) -> None:
        """These are no longer good. Makes the list of revoked ones, too, if there is none."""
        before = self._revoked()
        fresh = {one.certificate.serial_number for one in certificates if not one.is_revoked}
        if fresh or before is None:
            after = revoke(self.authority(now), before, fresh, now)
            write(self.crl, after.public_bytes(Encoding.PEM))

    def _revoked(self) -> x509.CertificateRevocationList | None:
        return load(self.crl, x509.load_pem_x509_crl) if self.crl.exists() else None


def _certificate(content: bytes) -> x509.Certificate:
    """As in a file, with all that is read of it later on."""
    certificate = x509.load_pem_x509_certificate(content)
    for read in (name_of, role_of):
        read(certificate)
    return certificate


def tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key in this file, made if there is none."""
    if not path.exists():
        write_key(path, key_pem(new_key()))
    key = load(path, lambda content: load_pem_private_key(content, None))
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{path} is not a key of lamina provision", "bring back the one that it was")
    return key


def owner_key(path: Path) -> ed25519.Ed25519PrivateKey:
    """The owner's private key in this file. Raises `UserError`."""
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "check --key") from error
    except UNREADABLE:
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UserError(f"{path} is not an owner's private key", "give the owner.key of lamina provision")
    return key


def load(path: Path, decode: Callable[[bytes], T]) -> T:
    """The file's content. Raises `UserError` where it is not what it should be."""
    content = path.read_bytes()
    try:
        return decode(content)
    except UNREADABLE as error:
        raise UserError(f"{path} is damaged, or not what it should be", "bring back what it was") from error
