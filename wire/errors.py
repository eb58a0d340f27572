"""Every error Lamina raises on purpose, sorted by whose fault it is.

Rules: one base; below it, who has to act. An error's text is one line that a person at the command
line can act on: what is wrong, then what to do. The `lamina` command prints that line and exits
with the class's `exit_code`; a traceback therefore always means a defect in Lamina.

Next: `wire/rounds.py`, whose illegal moves are `LocalError`s of the side that made them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

Refusal = Literal[
    "malformed",
    "too_large",
    "hash_mismatch",
    "wrong_shape",
    "not_finite",
    "zero_examples",
    "wrong_stage",
    "wrong_round",
    "not_selected",
    "duplicate",
    "late",
]
"""The names of refusals, as they go over the wire."""

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding with msgspec may raise for bytes that are not what they should be."""

MAX_PEER_TEXT = 300


class LaminaError(Exception):
    """Base of all deliberate errors; `str(error)` is one line for a person.

    `hint` is the next step and is printed after the line that says what is wrong.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UserError(LaminaError):
    """The person at the command line has to act: a path, an option, their data."""

    exit_code = 2


class LocalError(LaminaError):
    """This side did what it must not: an illegal move, a call out of order. A defect of ours."""

    exit_code = 70


class TransportError(LaminaError):
    """The broker cannot be reached, refuses us, or went away for longer than we wait."""

    exit_code = 69


class PeerError(LaminaError):
    """The other side sent something that cannot be used. It is told so, and counted.

    Its text may quote what was sent, so it is kept to one short, printable line.
    """

    exit_code = 76
    reason: Refusal = "malformed"

    def __init__(self, message: str, hint: str = "") -> None:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message[:MAX_PEER_TEXT])
        super().__init__(line if len(line) <= MAX_PEER_TEXT else f"{line[:MAX_PEER_TEXT]}...", hint)


class Malformed(PeerError):
    """Bytes that are not the message, the manifest or the tensors they claim to be."""

    reason = "malformed"


class TooLarge(PeerError):
    """More bytes than the limit of this kind of message; refused before decoding."""

    reason = "too_large"


class HashMismatch(PeerError):
    """Content whose SHA-256 is not the announced one."""

    reason = "hash_mismatch"


class ManifestMismatch(PeerError):
    """Tensors whose names, shapes or dtypes are not those of the stage's trained groups."""

    reason = "wrong_shape"


class NotFinite(PeerError):
    """Tensors that hold NaN or infinity."""

    reason = "not_finite"


class GraphError(PeerError):
    """A graph of the bundle that the runtime here cannot load, or that fails while it runs."""


class Silent(PeerError):
    """The other side has stopped sending what it had offered. It is not told: it does not listen."""
