"""Which clients lack a modality: a camera that is broken, a phone without the sensor.

Rules: all examples of a client lack the same one, or none does. The clients are the first of an order drawn
by the seed, so a larger share lacks it for the same clients and more. In that order the modalities take
turns, from one that is drawn, so each is lacked by as many clients, give or take one.

Next: `lamina/data/folder.py`, which leaves their cells empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_DRAW = 1  # beside the seed: which clients lack something does not hang on how examples were dealt


def lacking(clients: Sequence[str], modalities: Sequence[str], share: float, seed: int) -> dict[str, str]:
    """Client -> the modality it lacks, for `share` of the clients, rounded to the nearest number."""
    rng = np.random.default_rng([seed, _DRAW])
    order, first = rng.permutation(len(clients)), int(rng.integers(len(modalities)))
    chosen = order[: int(share * len(clients) + 0.5)].tolist()
    return {
        clients[client]: modalities[(first + turn) % len(modalities)] for turn, client in enumerate(chosen)
    }
