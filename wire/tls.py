"""TLS: the files that an `mqtts://` connection uses, and what a connection that failed has to say.

Rules: the broker's certificate and its name are always checked, with `--ca` against that authority alone.
What went wrong is told in a line with a next step. In TLS 1.3 (RFC 8446, section 4.4) a client has finished
before the broker has looked at its certificate, so a refusal comes as an alert to the first read, or as
nothing but the end of the connection.

Next: `wire/mqtt.py`, which connects.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from wire.errors import UserError

_EXPIRED, _NOT_YET, _OTHER_HOST, _OTHER_ADDRESS = 10, 9, 62, 64  # of OpenSSL's x509_vfy.h
_UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)  # likewise
_MADE_FOR_IT = "use the files that `lamina provision` has made for this broker"

_NO_TLS = "TLS has a port of its own, often 8883; at 1883 it is often mqtt://"

_ALERTS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": ("asks for a certificate", "give --cert and --key"),
    "SSLV3_ALERT_HANDSHAKE_FAILURE": (
        "agrees to nothing: it may ask for a certificate",
        "give --cert and --key",
    ),
    "SSLV3_ALERT_CERTIFICATE_REVOKED": (
        "refuses this certificate, which is revoked",
        "whoever provisioned it can make another",
    ),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": (
        "refuses this certificate, which has expired",
        "renew it with `lamina provision FOLDER --renew`",
    ),
    "TLSV1_ALERT_UNKNOWN_CA": ("refuses this certificate, which is of another authority", _MADE_FOR_IT),
    "SSLV3_ALERT_BAD_CERTIFICATE": ("refuses this certificate", _MADE_FOR_IT),
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": ("refuses this certificate", _MADE_FOR_IT),
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": ("refuses this certificate", _MADE_FOR_IT),
    "WRONG_VERSION_NUMBER": ("does not speak TLS", _NO_TLS),
}


@dataclass(frozen=True)
class Credentials:
    """PEM files of a connection.

    ca: the authorities that may have signed the broker's certificate; None: those that the system trusts.
    cert, key: our own certificate and its private key, for a broker that asks for them.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @property
    def any(self) -> bool:
        """Whether there is any."""
        return (self.ca, self.cert, self.key) != (None, None, None)

    def context(self) -> ssl.SSLContext:
        """What to connect with. Raises `UserError` where a file is missing or is not what it should be."""
        if (self.cert is None) != (self.key is None):
            raise UserError("a certificate and its key belong together", "give both --cert and --key")
        for path in (self.ca, self.cert, self.key):
            if path is not None:
                _check_readable(path)
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except ssl.SSLError as error:
            raise UserError(
                f"{self.ca} holds no certificate in PEM", "give the authority's, such as ca.crt"
            ) from error
        if self.cert is not None:
            try:
                context.load_cert_chain(self.cert, self.key, password=lambda: b"")  # no prompt
            except ssl.SSLError as error:
                raise UserError(*_why_no_pair(self.cert, self.key, error)) from error
        return context


def explain(
    error: OSError | None, credentials: Credentials, *, in_handshake: bool = False
) -> tuple[str, str]:
    """What the broker has done, to follow its address in a sentence, and the next step.

    error: of the handshake, or of what came after it; None where the connection just ended.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"has a certificate that is not to be trusted: {_verdict(error)}", _hint(error)
    if (alert := getattr(error, "reason", None)) in _ALERTS:
        return _ALERTS[alert]
    if in_handshake:
        return "ended the connection before TLS was agreed on: its port may be without", _NO_TLS
    if credentials.cert is None:
        return "ended the connection right after TLS: it may ask for a certificate", "give --cert and --key"
    return (
        "ended the connection right after TLS: it may not accept this certificate (revoked, expired or of "
        "another authority)"
    ), "the broker's log says why"


def _verdict(error: ssl.SSLCertVerificationError) -> str:
    return str(error.verify_message).rstrip(".")


def _hint(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in (_OTHER_HOST, _OTHER_ADDRESS):
        return "use a host that it was made for, or make it for this one: `lamina provision --broker-host`"
    if error.verify_code in (_EXPIRED, _NOT_YET):
        return "set this machine's clock, or renew it with `lamina provision FOLDER --renew`"
    if error.verify_code in _UNKNOWN_AUTHORITY:
        return "give the certificate of its authority with --ca"
    return "ask whoever runs the broker"


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}", "check --ca, --cert and --key"
        ) from error


def _why_no_pair(cert: Path, key: Path | None, error: ssl.SSLError) -> tuple[str, str]:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"{key} is not the key of {cert}", "give the two that were made together"
    return f"{cert} and {key} are not a certificate and its key in PEM", (
        "give the files in their order, and a key without a password"
    )
