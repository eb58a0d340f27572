"""Who is there, and who trains in a round.

A client is available from its hello until its bye (its own or its last will), or until it has been
silent for `MISSED_HEARTBEATS` heartbeats. Time is passed in, so this file has no clock and no I/O.

Next: `aggregator/run.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

from wire.messages import Hello, RoundKey

MISSED_HEARTBEATS = 3.5


@dataclass(frozen=True)
class Presence:
    """A client's last hello and when it came, in seconds of a monotonic clock."""

    hello: Hello
    seen_s: float


class Clients:
    """The clients known in this run."""

    def __init__(self, heartbeat_s: float) -> None:
        self._silence_s = heartbeat_s * MISSED_HEARTBEATS
        self._present: dict[str, Presence] = {}

    def hello(self, client: str, hello: Hello, now_s: float) -> bool:
        """Note a hello. True if the client was not there, or what it has changed."""
        before = self._present.get(client)
        self._present[client] = Presence(hello, now_s)
        return before is None or before.hello != hello or now_s - before.seen_s > self._silence_s

    def bye(self, client: str) -> bool:
        """Note a bye. True if the client was there."""
        return self._present.pop(client, None) is not None

    def available(self, now_s: float) -> list[str]:
        """Names of the clients that are there, sorted; those silent for too long are forgotten."""
        for name in [n for n, p in self._present.items() if now_s - p.seen_s > self._silence_s]:
            del self._present[name]
        return sorted(self._present)


def select(
    available: Iterable[str], fraction_train: float, seed: int, key: RoundKey, over_selection: float = 0.0
) -> tuple[str, ...]:
    """A round's cohort, sorted: as many as are `wanted`, and of these the share `over_selection` more.

    The draw depends on nothing but the names, the seed and the round.
    """
    names = sorted(set(available))
    count = _share(wanted(len(names), fraction_train), 1 + over_selection)
    draw = random.Random(f"{seed}/{key.stage}/{key.round}")
    return tuple(sorted(draw.sample(names, min(count, len(names)))))


def wanted(available: int, fraction_train: float) -> int:
    """How many updates a round waits for, of so many clients: `ceil(fraction_train * available)`."""
    return max(min(available, 1), _share(available, fraction_train))


def _share(number: int, share: float) -> int:
    return math.ceil(share * number - 1e-9)
