"""How a run is conducted: what the person decides, as one validated struct.

Names are those of Flower and its peers where the thing is the same. Next: `aggregator/run.py`.
"""

from __future__ import annotations

import math

import msgspec

from wire.errors import UserError
from wire.messages import RoundKey, TrainPlan


class RunPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A run's settings.

    fraction_train: share of the available clients in a round's cohort, in (0, 1].
    min_available_clients: a round is opened once so many are there.
    min_updates: a round that has fewer at its deadline stays open for as long again.
    round_deadline_s: a round is closed then, with the updates that are in.
    rounds: per stage, instead of the bundle's own numbers (0: the bundle's).
    learning_rate: AdamW's at the start of a stage; it falls to `final_learning_rate_share` of it along a
        half cosine over the stage's rounds.
    announce_s, heartbeat_s: how often the aggregator repeats itself, and clients do.
    """

    fraction_train: float = 1.0
    min_available_clients: int = 2
    min_updates: int = 1
    round_deadline_s: float = 600.0
    rounds: int = 0
    local_epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 1e-3
    final_learning_rate_share: float = 0.1
    seed: int = 0
    announce_s: float = 5.0
    heartbeat_s: float = 10.0

    def __post_init__(self) -> None:
        """Raises `UserError` for the first setting out of range."""
        limits = {
            "fraction_train": (0 < self.fraction_train <= 1, "more than 0, at most 1"),
            "min_available_clients": (self.min_available_clients >= 1, "at least 1"),
            "min_updates": (self.min_updates >= 1, "at least 1"),
            "round_deadline_s": (self.round_deadline_s > 0, "more than 0 seconds"),
            "rounds": (self.rounds >= 0, "0 or more"),
            "local_epochs": (self.local_epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "more than 0"),
            "final_learning_rate_share": (0 <= self.final_learning_rate_share <= 1, "between 0 and 1"),
            "announce_s": (self.announce_s > 0, "more than 0 seconds"),
            "heartbeat_s": (self.heartbeat_s > 0, "more than 0 seconds"),
        }
        for name, (fits, allowed) in limits.items():
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}", f"it must be {allowed}")

    def train_plan(self, key: RoundKey, rounds: int) -> TrainPlan:
        """What a client is told for round `key.round` of a stage of `rounds` rounds."""
        progress = key.round / max(1, rounds - 1)
        share = self.final_learning_rate_share
        decay = share + (1 - share) * (1 + math.cos(math.pi * progress)) / 2
        return TrainPlan(
            learning_rate=self.learning_rate * decay,
            batch_size=self.batch_size,
            local_epochs=self.local_epochs,
            seed=(self.seed * 1009 + key.stage) * 100_003 + key.round,
        )
