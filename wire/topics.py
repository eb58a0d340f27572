"""Every topic Lamina uses, at most seven levels (AWS IoT Core allows seven slashes).

    lamina/v1/<run>/bcast/run              announcement, retained
    lamina/v1/<run>/bcast/offer            the current round's offer, retained
    lamina/v1/<run>/bcast/blob/<sha256>    chunks that several clients want
    lamina/v1/<run>/c/<client>/up/<kind>   hello, bye, want, chunk, report, usage: only it writes
    lamina/v1/<run>/c/<client>/down/<kind> want, chunk, receipt: only it reads

So one access rule per direction suffices: a client publishes to `c/<itself>/up/#` and subscribes to
`bcast/#` and `c/<itself>/down/#`.

Next: `wire/messages.py`, what is published there.
"""

from __future__ import annotations

import re
from typing import Literal

from wire.errors import UserError

ROOT = "lamina/v1"

Up = Literal["hello", "bye", "want", "chunk", "report", "usage"]
Down = Literal["want", "chunk", "receipt"]

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


def is_name(name: str) -> bool:
    """Whether this can be a run's or a client's name."""
    return re.fullmatch(NAME_PATTERN, name) is not None


def check_name(name: str, what: str) -> str:
    """A run's or client's name as a topic level: 1 to 64 of `A-Za-z0-9._-`. Raises `UserError`."""
    if not is_name(name):
        raise UserError(
            f"{what} {name!r} is not a usable name",
            "use 1 to 64 letters, digits, dots, dashes or underscores, a letter or digit first",
        )
    return name


def announcement(run: str) -> str:
    """The run's announcement; `+` matches every run."""
    return f"{ROOT}/{run}/bcast/run"


def offer(run: str) -> str:
    """The current round's offer."""
    return f"{ROOT}/{run}/bcast/offer"


def blob(run: str, sha256: str) -> str:
    """Chunks of one blob for all who want it."""
    return f"{ROOT}/{run}/bcast/blob/{sha256}"


def up(run: str, client: str, kind: Up | Literal["+"]) -> str:
    """From a client to the aggregator; `+` for `client` and `kind` matches all."""
    return f"{ROOT}/{run}/c/{client}/up/{kind}"


def down(run: str, client: str, kind: Down | Literal["+"]) -> str:
    """From the aggregator to one client."""
    return f"{ROOT}/{run}/c/{client}/down/{kind}"


def run_of(topic: str) -> str:
    """The run that a topic of ours belongs to."""
    return topic.split("/")[2]


def client_of(topic: str) -> str:
    """The client of an `up` or `down` topic."""
    return topic.split("/")[4]


def kind_of(topic: str) -> str:
    """The last level: `hello`, `want`, `chunk`, ..."""
    return topic.rsplit("/", 1)[1]
