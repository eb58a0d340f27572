"""The files of an `mqtts://` connection: each mistake has a line, and each alert a meaning."""

from __future__ import annotations

import ssl
from datetime import datetime, timezone
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)

from lamina.identity.certificates import issue, key_pem, new_authority, new_key
from wire.errors import UserError
from wire.mqtt import Broker
from wire.tls import Credentials, explain

NOW = datetime.now(timezone.utc)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.crt, cert and key, another key, the key with a password, and a file that is none of them."""
    folder = tmp_path_factory.mktemp("tls")
    authority, key, other = new_authority(new_key(), NOW), new_key(), new_key()
    certificate = issue(authority, key.public_key(), "ann", "client", (), NOW)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    contents = {
        "ca.crt": authority.certificate.public_bytes(Encoding.PEM),
        "cert": certificate.public_bytes(Encoding.PEM),
        "key": key_pem(key),
        "other.key": key_pem(other),
        "locked.key": locked,
        "text": b"nothing\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def credentials(folder: Path, ca: str = "", cert: str = "", key: str = "") -> Credentials:
    return Credentials(*(folder / name if name else None for name in (ca, cert, key)))


def test_files_that_belong_together(files: Path):
    context = credentials(files, "ca.crt", "cert", "key").context()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert len(context.get_ca_certs()) == 1, "the authorities of the system do not count"
    assert credentials(files, "ca.crt").context().cert_store_stats()["x509_ca"] == 1


@pytest.mark.parametrize(
    ("ca", "cert", "key", "line"),
    [
        ("nowhere", "", "", "nowhere cannot be read: No such file"),
        ("ca.crt", "nowhere", "key", "nowhere cannot be read"),
        ("ca.crt", "cert", "nowhere", "nowhere cannot be read"),
        ("ca.crt", "cert", "", "a certificate and its key belong together"),
        ("ca.crt", "", "key", "a certificate and its key belong together"),
        ("text", "", "", "text holds no certificate in PEM"),
        ("key", "", "", "key holds no certificate in PEM"),
        ("ca.crt", "cert", "other.key", "other.key is not the key of .*cert"),
        ("ca.crt", "key", "cert", "are not a certificate and its key in PEM"),
        ("ca.crt", "cert", "text", "are not a certificate and its key in PEM"),
        ("ca.crt", "cert", "locked.key", "are not a certificate and its key in PEM"),
    ],
)
def test_files_that_cannot_be_used(files: Path, ca: str, cert: str, key: str, line: str):
    with pytest.raises(UserError, match=line) as caught:
        Broker.parse("mqtts://pi", credentials(files, ca, cert, key))
    assert caught.value.hint


def test_certificates_are_for_tls_only(files: Path):
    given = credentials(files, "ca.crt", "cert", "key")
    assert Broker.parse("mqtts://pi", given) == Broker("pi", 8883, tls=True, credentials=given)
    with pytest.raises(UserError, match="'mqtt://pi' is without TLS") as caught:
        Broker.parse("mqtt://pi", given)
    assert "mqtts://" in caught.value.hint
    assert Broker.parse("mqtt://pi", Credentials()) == Broker("pi", 1883)


@pytest.mark.parametrize(
    ("error", "has_certificate", "what", "hint"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", False, "asks for a certificate", "--cert"),
        ("SSLV3_ALERT_CERTIFICATE_REVOKED", True, "revoked", "provision"),
        ("SSLV3_ALERT_CERTIFICATE_EXPIRED", True, "expired", "--renew"),
        ("TLSV1_ALERT_UNKNOWN_CA", True, "another authority", "lamina provision"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", False, "may ask for a certificate", "--cert"),
        ("WRONG_VERSION_NUMBER", True, "does not speak TLS", "mqtt://"),
        ("A_NEW_REASON", True, "may not accept this certificate", "log"),
        ("A_NEW_REASON", False, "may ask for a certificate", "--cert"),
        (None, True, "may not accept this certificate", "log"),
        (None, False, "may ask for a certificate", "--cert"),
    ],
)
def test_what_an_alert_means(error: str | None, has_certificate: bool, what: str, hint: str):
    given = Credentials(None, Path("cert"), Path("key")) if has_certificate else Credentials()
    raised = None
    if error is not None:
        raised = ssl.SSLError(1, error)
        raised.reason = error
    told, step = explain(raised, given)
    assert what in told
    assert hint in step


@pytest.mark.parametrize("error", [ssl.SSLEOFError(8, "EOF"), ConnectionResetError()])
def test_what_ends_before_it_has_begun_may_have_no_tls(error: OSError):
    told, step = explain(error, Credentials(), in_handshake=True)
    assert "before TLS was agreed on" in told
    assert "mqtt://" in step
