"""How a run is conducted: what the person decides, as one validated struct.

Names are those of Flower and its peers where the thing is the same. Next: `aggregator/run.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from wire.errors import UserError
from wire.messages import (
    MAX_AUGMENTATIONS,
    MAX_LEARNING_RATE,
    MAX_PROXIMAL_MU,
    MAX_SECONDS,
    MAX_STALENESS,
    Compression,
    RoundKey,
    TrainPlan,
)

Aggregation = Literal["fedavg", "median", "trimmed_mean", "krum", "multi_krum"]
ServerOptimizerName = Literal["none", "momentum", "adagrad", "adam", "yogi"]

COMPRESSIONS: tuple[str, ...] = get_args(Compression)
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
SERVER_OPTIMIZERS: tuple[str, ...] = get_args(ServerOptimizerName)


class RunPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A run's settings; the descriptions are the command line's help.

    The learning rate is AdamW's at the start of a stage; it falls to `final_learning_rate_share` of it
    along a half cosine over the stage's rounds. How updates are combined: docs/robustness.md.

    buffer_size and max_staleness together are FedBuff (Nguyen et al., arXiv 2106.06639): a client that is
    still training when a round ends goes on, and its update counts in a later one.
    """

    fraction_train: Annotated[float, Meta(description="Share of the available clients in a round.")] = 1.0
    min_available_clients: Annotated[
        int, Meta(description="A round is opened once so many clients are there.")
    ] = 2
    min_updates: Annotated[
        int, Meta(description="With fewer at its deadline, a round is offered once more.")
    ] = 1
    over_selection: Annotated[
        float,
        Meta(description="Share of clients that are asked beyond those waited for."),
    ] = 0.0
    buffer_size: Annotated[
        int, Meta(description="A round ends with so many updates; 0: with one of each client it waits for.")
    ] = 0
    max_staleness: Annotated[
        int, Meta(description="Rounds by which an update may be late and still count, for less; 0: none.")
    ] = 0
    round_deadline_s: Annotated[
        float, Meta(description="Seconds until a round ends with the updates that are in.")
    ] = 600.0
    rounds: Annotated[
        int | Literal["auto"],
        Meta(
            description="Rounds of every stage; 0: as the bundle says; auto: at most as many, fewer once "
            "the metric no longer improves."
        ),
    ] = 0
    patience: Annotated[
        int, Meta(description="With --rounds auto: rounds without a better metric that end a stage.")
    ] = 3
    local_epochs: Annotated[int, Meta(description="Epochs over a client's data in a round.")] = 1
    batch_size: Annotated[int, Meta(description="Examples in a train step.")] = 32
    learning_rate: Annotated[float, Meta(description="AdamW's, at the start of a stage.")] = 1e-3
    final_learning_rate_share: Annotated[
        float, Meta(description="Share of the learning rate that is left in a stage's last round.")
    ] = 0.1
    augmentations: Annotated[
        int, Meta(description="Views of each image to draw from; 0: the image as it is.")
    ] = 0
    compression: Annotated[Compression, Meta(description="Of what travels each round.")] = "none"
    prefix_compression: Annotated[Compression, Meta(description="Of blocks, when they are frozen.")] = (
        "none"
    )
    calibration_epochs: Annotated[
        int, Meta(description="Epochs over the --calibration examples after each round.")
    ] = 1
    proximal_mu: Annotated[
        float, Meta(description="FedProx's pull towards the round's parameters; 0: none.")
    ] = 0.0
    aggregation: Annotated[Aggregation, Meta(description="How updates are combined.")] = "fedavg"
    malicious_fraction: Annotated[
        float, Meta(description="Share of updates that trimmed_mean, krum and multi_krum are to withstand.")
    ] = 0.2
    max_update_norm: Annotated[
        float, Meta(description="L2 norm that longer updates are clipped to; 0: as they are.")
    ] = 0.0
    max_examples: Annotated[
        int, Meta(description="The most that an update's examples count for in fedavg; 0: all of them.")
    ] = 0
    server_optimizer: Annotated[
        ServerOptimizerName, Meta(description="How the combined update becomes a step.")
    ] = "none"
    server_learning_rate: Annotated[
        float, Meta(description="Of that step; 0: 0.01 for adagrad, adam and yogi, otherwise 1.")
    ] = 0.0
    server_momentum: Annotated[
        float, Meta(description="Of every server optimizer but none; beta 1 of its paper.")
    ] = 0.9
    server_beta_2: Annotated[float, Meta(description="Decay of adam's and yogi's second moment.")] = 0.99
    server_tau: Annotated[
        float, Meta(description="How little adagrad, adam and yogi adapt: the smaller, the more they do.")
    ] = 1e-3
    seed: Annotated[int, Meta(description="Of cohorts and of the order of examples.")] = 0
    announce_s: Annotated[float, Meta(description="Seconds between two copies of an offer.")] = 5.0
    heartbeat_s: Annotated[float, Meta(description="Seconds between two signs of life of a client.")] = 10.0

    def __post_init__(self) -> None:
        """Raises `UserError` for the first setting out of range."""
        limits = {
            "fraction_train": (0 < self.fraction_train <= 1, "more than 0, at most 1"),
            "min_available_clients": (self.min_available_clients >= 1, "at least 1"),
            "min_updates": (self.min_updates >= 1, "at least 1"),
            "over_selection": (0 <= self.over_selection <= 10, "from 0 to 10"),
            "buffer_size": (self.buffer_size >= 0, "0 or more"),
            "max_staleness": (0 <= self.max_staleness <= MAX_STALENESS, f"from 0 to {MAX_STALENESS}"),
            "round_deadline_s": (0 < self.round_deadline_s <= MAX_SECONDS, "more than 0 seconds"),
            "rounds": (self.rounds == "auto" or self.rounds >= 0, "auto, or 0 or more"),
            "patience": (self.patience >= 1, "at least 1"),
            "local_epochs": (1 <= self.local_epochs < 2**31, "at least 1"),
            "batch_size": (1 <= self.batch_size < 2**31, "at least 1"),
            "learning_rate": (0 < self.learning_rate <= MAX_LEARNING_RATE, "more than 0"),
            "final_learning_rate_share": (0 <= self.final_learning_rate_share <= 1, "between 0 and 1"),
            "augmentations": (
                0 <= self.augmentations <= MAX_AUGMENTATIONS,
                f"from 0 to {MAX_AUGMENTATIONS}",
            ),
            "compression": (self.compression in COMPRESSIONS, f"one of {', '.join(COMPRESSIONS)}"),
            "prefix_compression": (
                self.prefix_compression in COMPRESSIONS,
                f"one of {', '.join(COMPRESSIONS)}",
            ),
            "calibration_epochs": (1 <= self.calibration_epochs < 2**31, "at least 1"),
            "proximal_mu": (
                0 <= self.proximal_mu <= MAX_PROXIMAL_MU,
                f"from 0 to {MAX_PROXIMAL_MU:g}",
            ),
            "aggregation": (self.aggregation in AGGREGATIONS, f"one of {', '.join(AGGREGATIONS)}"),
            "malicious_fraction": (0 <= self.malicious_fraction < 0.5, "at least 0, less than 0.5"),
            "max_update_norm": (0 <= self.max_update_norm < math.inf, "0 or more"),
            "max_examples": (0 <= self.max_examples < 2**63, "0 or more"),
            "server_optimizer": (
                self.server_optimizer in SERVER_OPTIMIZERS,
                f"one of {', '.join(SERVER_OPTIMIZERS)}",
            ),
            "server_learning_rate": (0 <= self.server_learning_rate <= MAX_LEARNING_RATE, "0 or more"),
            "server_momentum": (0 <= self.server_momentum < 1, "at least 0, less than 1"),
            "server_beta_2": (0 <= self.server_beta_2 < 1, "at least 0, less than 1"),
            "server_tau": (0 < self.server_tau <= MAX_LEARNING_RATE, "more than 0"),
            "seed": (0 <= self.seed < 2**31, "from 0 to 2147483647"),
            "announce_s": (0 < self.announce_s <= MAX_SECONDS, "more than 0 seconds"),
            "heartbeat_s": (0 < self.heartbeat_s <= MAX_SECONDS, "more than 0 seconds"),
        }
        for name, (fits, allowed) in limits.items():
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}", f"it must be {allowed}")
        if self.min_updates > (smallest := math.ceil(self.fraction_train * self.min_available_clients)):
            raise UserError(
                f"min_updates is {self.min_updates}, and a round may have only {smallest} clients",
                "lower it, or raise min_available_clients",
            )
        if 0 < self.buffer_size < self.min_updates:
            raise UserError(
                f"buffer_size is {self.buffer_size}, and min_updates {self.min_updates}",
                "lower min_updates, or raise buffer_size",
            )

    @property
    def effective_server_learning_rate(self) -> float:
        """`server_learning_rate`, or what it is by default for the server optimizer."""
        plain = self.server_optimizer in ("none", "momentum")
        return self.server_learning_rate or (1.0 if plain else 0.01)

    def is_settled(self, values: Sequence[float]) -> bool:
        """Whether a stage is over after rounds of these metrics, the larger the better, in order."""
        if self.rounds != "auto" or len(values) <= self.patience:
            return False
        return max(values[-self.patience :]) <= max(values[: -self.patience])

    def train_plan(self, key: RoundKey, rounds: int) -> TrainPlan:
        """What a client is told for round `key.round` of a stage of `rounds` rounds."""
        progress = min(1.0, key.round / max(1, rounds - 1))
        share = self.final_learning_rate_share
        decay = share + (1 - share) * (1 + math.cos(math.pi * progress)) / 2
        return TrainPlan(
            learning_rate=self.learning_rate * decay,
            batch_size=self.batch_size,
            local_epochs=self.local_epochs,
            seed=(self.seed * 1009 + key.stage) * 100_003 + key.round,
            compression=self.compression,
            prefix_compression=self.prefix_compression,
            augmentations=self.augmentations,
            max_staleness=self.max_staleness,
            proximal_mu=self.proximal_mu,
        )
