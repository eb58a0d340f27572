"""Rules that withstand malicious clients: the median, the trimmed mean, Krum and Multi-Krum.

Rules: groups that the same clients sent are one vector of each client. No rule heeds `num_examples`, which
is only what a client says of itself. How many of n updates are malicious is a share of n, rounded up. More
than a rule can withstand among so few it does not refuse, for a run goes on over night: it withstands as
many as it can, and says so in the log, once. `RunPlan.min_updates` sees to it that there are enough.

Next: `aggregator/rows.py`, how they get at all updates at once. A new rule is a function here and a line in
`ROBUST`.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from aggregator.rows import Part, Rows, Wide
from wire.tensors import Array, Arrays

log = logging.getLogger(__name__)


def combined(rows: Rows, rule: str, malicious_fraction: float) -> Arrays:
    """By this rule of `ROBUST`: torch name -> float32, in the order of the shapes."""
    result: Arrays = {}
    for part in rows.parts():
        malicious = math.ceil(malicious_fraction * len(part) - 1e-9)  # 0.07 * 100 is above 7
        result |= ROBUST[rule](part, malicious)
    return {name: result[name] for name in rows.shapes if name in result}


def median(part: Part, _malicious: int) -> Arrays:
    """The median of each coordinate; of an even number, the mean of the two in the middle.

    Yin et al., arXiv 1803.01498, Definition 1.
    """
    return part.reduced(functools.partial(_inner_mean, trim=_most_trimmed(part)))


def trimmed_mean(part: Part, malicious: int) -> Arrays:
    """The mean of each coordinate without the `malicious` largest and as many smallest values.

    Yin et al., arXiv 1803.01498, Definition 2. Of few updates the median is left.
    """
    trim = min(malicious, _most_trimmed(part))
    if trim < malicious:
        _warn_of_few("trimmed_mean", len(part), malicious, trim)
    return part.reduced(functools.partial(_inner_mean, trim=trim))


def krum(part: Part, malicious: int) -> Arrays:
    """The one update whose nearest neighbours are nearest.

    Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017. With f malicious ones of n, 2 f + 3
    or more, an update's score is the sum of its squared distances to the n - f - 2 others nearest to
    it. Of equal scores the first in the stream wins. Of fewer than three updates the mean is taken.
    """
    return _mean_of_best(part, malicious, 1, "krum")


def multi_krum(part: Part, malicious: int) -> Arrays:
    """The mean of the n - f updates with the best scores. Of the same paper as `krum`."""
    return _mean_of_best(part, malicious, len(part) - malicious, "multi_krum")


ROBUST: dict[str, Callable[[Part, int], Arrays]] = {
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
}
"""Name -> (what the same clients sent, how many of them are malicious) -> torch name -> float32."""


def _most_trimmed(part: Part) -> int:
    """On each side, so that something is left: the median."""
    return (len(part) - 1) // 2


def _inner_mean(block: Array, trim: int) -> Wide:
    block.sort(axis=0)  # all of it, so that the sum does not depend on the order of the updates
    inner = block[trim : len(block) - trim]
    return np.asarray(inner.mean(axis=0, dtype=np.float64))


def _mean_of_best(part: Part, expected: int, count: int, rule: str) -> Arrays:
    malicious = max(0, min(expected, (len(part) - 3) // 2))
    if malicious < expected:
        _warn_of_few(rule, len(part), expected, malicious)
    best = part.senders
    if len(part) >= 3:
        order = np.argsort(_scores(part, malicious), kind="stable").tolist()
        best = tuple(sorted(part.senders[place] for place in order[:count]))
    return replace(part, senders=best).reduced(functools.partial(_inner_mean, trim=0))


def _scores(part: Part, malicious: int) -> Wide:
    """Of each sender, float64 [senders]; the less, the better. Holds a number for each pair of them."""
    products = np.zeros((len(part), len(part)))
    for block in part.blocks():
        wide = block.astype(np.float64)
        products += wide @ wide.T
    lengths = products.diagonal()
    distances = np.maximum(lengths[:, None] + lengths[None, :] - 2 * products, 0)  # but for rounding
    np.fill_diagonal(distances, np.inf)  # nobody is a neighbour of their own
    distances.sort(axis=1)
    scores: Wide = distances[:, : len(part) - malicious - 2].sum(axis=1)
    return scores


@functools.cache
def _warn_of_few(rule: str, clients: int, expected: int, withstood: int) -> None:
    """Once for each of these numbers, not in every round."""
    log.warning(
        "%s of %d updates: %d malicious ones are expected, %d can be withstood; min_updates sets how many "
        "a round waits for",
        *(rule, clients, expected, withstood),
    )
