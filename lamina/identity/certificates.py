"""Keys, certificates and what revokes them, without a file in sight.

Rules: X.509 as RFC 5280 wants it, so that the strictest checks pass (Python 3.13 makes them by default):
each certificate names its key and its authority's, and says what it may be used for. The broker's is for
servers, all others are for clients, so none can play the other's part. Keys are ECDSA on P-256, which
every TLS speaks; an owner's is Ed25519.

Next: `lamina/identity/federation.py`, which keeps them.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Role = Literal["broker", "aggregator", "client"]

AUTHORITY_DAYS = 3650
MEMBER_DAYS = 730
BACKDATED = timedelta(days=1)  # a machine without a clock of its own may be behind


@dataclass(frozen=True)
class Authority:
    """Who signs certificates."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def new_key() -> ec.EllipticCurvePrivateKey:
    """A key for TLS."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    """PKCS 8, not encrypted: programs start without anyone who could type a password."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: ed25519.Ed25519PublicKey) -> bytes:
    """Of an owner."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def new_authority(key: ec.EllipticCurvePrivateKey, now: datetime) -> Authority:
    """Its name is unique, as that of its key: one authority can be told from another."""
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    name = _name(f"Lamina authority {hashlib.sha256(spki).hexdigest()[:16]}", "authority")
    builder = _builder(name, name, key.public_key(), now, now + timedelta(days=AUTHORITY_DAYS))
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def issue(
    authority: Authority,
    key: ec.EllipticCurvePublicKey,
    name: str,
    role: Role,
    hosts: Sequence[str],
    now: datetime,
) -> x509.Certificate:
    """A certificate whose common name is `name`. hosts: of a broker, names and IP addresses."""
    end = min(now + timedelta(days=MEMBER_DAYS), authority.certificate.not_valid_after_utc)
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if role == "broker" else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(_name(name, role), authority.certificate.subject, key, now, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(_issuer_key(authority.certificate), critical=False)
    )
    if hosts:
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(authority.key, hashes.SHA256())


def revoke(
    authority: Authority,
    before: x509.CertificateRevocationList | None,
    serials: Collection[int],
    now: datetime,
) -> x509.CertificateRevocationList:
    """`before`, and these.

    It is valid as long as the authority: one that ends earlier would shut out everybody then. It is always
    newer than `before`, as OpenSSL takes the newest of several that it has seen.
    """
    begin, number = now - BACKDATED, 1
    if before is not None:
        begin = max(begin, before.last_update_utc + timedelta(seconds=1))
        number = before.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number + 1
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(begin)
        .next_update(authority.certificate.not_valid_after_utc)
        .add_extension(_issuer_key(authority.certificate), critical=False)
        .add_extension(x509.CRLNumber(number), critical=False)
    )
    for revoked in before or ():
        builder = builder.add_revoked_certificate(revoked)
    known = {revoked.serial_number for revoked in before or ()}
    for serial in sorted(set(serials) - known):
        one = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        builder = builder.add_revoked_certificate(one)
    return builder.sign(authority.key, hashes.SHA256())


def name_of(certificate: x509.Certificate) -> str:
    """The common name."""
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def role_of(certificate: x509.Certificate) -> str:
    """What it was issued for: a `Role`."""
    return str(certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)[0].value)


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses of a broker."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def _name(common: str, unit: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Lamina"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _issuer_key(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    own = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
