"""How a data set is divided: what every preparation is asked, and does with its examples.

Rules: first the public examples are set aside, then the rest is dealt out, then some clients lose a
modality. Each draws on the seed in its own way: asking for one of them leaves the others as they were.

Next: `lamina/data/partition.py` and `lamina/data/missing.py`, the draws; `lamina/data/emoji.py`, a set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lamina.data.missing import lacking
from lamina.data.partition import Partition, deal, set_aside
from wire.errors import UserError

PUBLIC = "public"
"""The folder of the examples that are set aside."""

T = TypeVar("T")


@dataclass(frozen=True)
class Division:
    """Who gets what. Raises `UserError` for a share that is none.

    clients: their number. partition, alpha: of `deal`. missing_modality: the share of the clients that lack
    one. public: the share of the examples that no client has.
    """

    clients: int
    partition: Partition
    alpha: float = 0.5
    seed: int = 0
    missing_modality: float = 0.0
    public: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.missing_modality <= 1:
            raise UserError(
                f"a share of {self.missing_modality} of the clients",
                "take --missing-modality between 0 and 1",
            )
        if not 0 <= self.public < 1:
            raise UserError(f"a public share of {self.public}", "take --public from 0 to less than 1")

    @property
    def arguments(self) -> dict[str, int | float | str]:
        """For the inventory. Shares of 0 are left out: what was prepared before there were any is found."""
        shares = {"missing_modality": float(self.missing_modality), "public": float(self.public)}
        return {
            "clients": self.clients,
            "partition": self.partition,
            "alpha": float(self.alpha),
            "seed": self.seed,
            **{name: share for name, share in shares.items() if share},
        }

    def divide(
        self, examples: Sequence[T], label: Callable[[T], str], group: Callable[[T], str]
    ) -> tuple[dict[str, list[T]], dict[str, list[T]]]:
        """Client -> its examples, in their order; and `PUBLIC` -> those, if there are any."""
        aside, rest = set_aside([label(one) for one in examples], self.public, self.seed)
        kept = [examples[index] for index in rest]
        dealt = deal(
            [label(one) for one in kept],
            [group(one) for one in kept],
            self.clients,
            self.partition,
            self.alpha,
            np.random.default_rng(self.seed),
        )
        clients = {client: [kept[index] for index in indices] for client, indices in dealt.items()}
        return clients, ({PUBLIC: [examples[index] for index in aside]} if aside else {})

    def lacking(self, clients: Sequence[str], modalities: Sequence[str]) -> dict[str, str]:
        """Client -> the modality it lacks, of those that lack one."""
        return lacking(clients, modalities, self.missing_modality, self.seed)
