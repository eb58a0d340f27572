"""How examples are dealt out to clients: pure functions of labels, counts and a random generator.

Rules: a partition is a list of index arrays, one a client, int64 and ascending; every example is in exactly
one. The same generator state gives the same partition. Where proportions are drawn, a client that comes out
with fewer than `MIN_EXAMPLES` takes examples at random from whichever client has most.

Next: `lamina/data/missing.py`, which modality a client lacks; `lamina/data/emoji.py`, a data set.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from wire.errors import UserError

MIN_EXAMPLES = 10
ALPHA = (1e-3, 1e6)
"""The least and the most that it may be."""

_PUBLIC = 2  # beside the seed: who deals the rest draws other numbers

Indices = npt.NDArray[np.int64]
Partition = Literal["natural", "iid", "dirichlet"]


def deal(
    labels: Sequence[str],
    groups: Sequence[str],
    clients: int,
    partition: Partition,
    alpha: float,
    rng: np.random.Generator,
) -> dict[str, Indices]:
    """Client -> its examples, by the partition's name.

    Clients of `natural`, one of the `groups` each, are called after it; of the others, `client-1` and on.
    """
    if partition == "natural":
        parts = by_group(groups, labels, clients, alpha, rng)
        sharing, so_far = Counter(group for group, _ in parts), Counter[str]()
        dealt = {}
        for group, indices in parts:
            so_far[group] += 1
            dealt[group if sharing[group] == 1 else f"{group}-{so_far[group]}"] = indices
        return dealt
    shares = (
        iid(len(labels), clients, rng) if partition == "iid" else dirichlet(labels, clients, alpha, rng)
    )
    digits = len(str(clients))
    return {f"client-{place:0{digits}}": share for place, share in enumerate(shares, 1)}


def set_aside(labels: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """That share of each label's examples, to be public, and the others, both ascending."""
    rng = np.random.default_rng([seed, _PUBLIC])
    public: set[int] = set()
    of_label = np.array(labels)
    for label in sorted(set(labels)):
        members = rng.permutation(np.flatnonzero(of_label == label)).tolist()
        public.update(members[: round(share * len(members))])
    return sorted(public), [index for index in range(len(labels)) if index not in public]


def lot(kind: str, name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name: who is held out does not follow a seed."""
    return int.from_bytes(hashlib.sha256(f"{kind}/{name}".encode()).digest()[:6], "big") / 2**48


def iid(num_examples: int, clients: int, rng: np.random.Generator) -> list[Indices]:
    """At random, in equal numbers: sizes differ by at most one."""
    _check_counts(num_examples, clients)
    return [np.sort(part) for part in np.array_split(rng.permutation(num_examples), clients)]


def dirichlet(labels: Sequence[str], clients: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    """Each label's examples in proportions drawn from Dir(alpha): the smaller alpha, the more skewed.

    Hsu, Qi, Brown: "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", arXiv 1909.06335; drawn for each label as in Yurochkin et al., arXiv 1905.12022.
    """
    _check_counts(len(labels), clients)
    if not ALPHA[0] <= alpha <= ALPHA[1]:
        raise UserError(f"alpha is {alpha}", f"choose it between {ALPHA[0]:g} and {ALPHA[1]:g}")
    shares: list[list[int]] = [[] for _ in range(clients)]
    of_label = np.array(labels)
    for label in sorted(set(labels)):
        members = rng.permutation(np.flatnonzero(of_label == label))
        proportions = rng.dirichlet(np.full(clients, alpha))
        cuts = np.rint(np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        for share, part in zip(shares, np.split(members, cuts), strict=True):
            share.extend(part.tolist())
    _top_up(shares, rng)
    return [np.array(sorted(share), np.int64) for share in shares]


def by_group(
    groups: Sequence[str],
    labels: Sequence[str],
    clients: int,
    alpha: float,
    rng: np.random.Generator,
) -> list[tuple[str, Indices]]:
    """Each client has examples of one group only: `(group, indices)`, groups in order of appearance.

    As many clients as groups: one each. More: they are spread evenly over the groups, the first groups
    taking one more, and those of a group share it by `dirichlet` over the labels. Raises `UserError` for
    fewer clients than groups.
    """
    names = list(dict.fromkeys(groups))
    if clients < len(names):
        raise UserError(f"{clients} clients cannot have {len(names)} groups, one each", "take more clients")
    parts: list[tuple[str, Indices]] = []
    of_group = np.array(groups)
    for place, name in enumerate(names):
        members = np.flatnonzero(of_group == name)
        sharing = clients // len(names) + (place < clients % len(names))
        if sharing == 1:
            _check_counts(len(members), 1)
            parts.append((name, members))
            continue
        shares = dirichlet([labels[int(member)] for member in members], sharing, alpha, rng)
        parts.extend((name, members[share]) for share in shares)
    return parts


def _check_counts(num_examples: int, clients: int) -> None:
    if clients < 1:
        raise UserError(f"{clients} clients", "take at least one")
    if num_examples < clients * MIN_EXAMPLES:
        raise UserError(
            f"{num_examples} examples are too few for {clients} clients, {MIN_EXAMPLES} each",
            "take fewer clients",
        )


def _top_up(shares: list[list[int]], rng: np.random.Generator) -> None:
    while len(smallest := min(shares, key=len)) < MIN_EXAMPLES:
        largest = max(shares, key=len)
        smallest.append(largest.pop(int(rng.integers(len(largest)))))
