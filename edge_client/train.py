"""Local training: `local_epochs` over the stage's features, from the offered parameters to an update.

Rules: AdamW starts anew in every round. With `proximal_mu` each step is drawn back towards the offered
parameters (FedProx, Li et al., arXiv 1812.06127). The order of the examples depends on the plan's seed and
the client's name only, and so does the view that is drawn of each in an epoch; a round that is trained
again gives the same update.

`ClientUpdate` of McMahan et al., arXiv 1602.05629, with AdamW in place of SGD.
Next: `edge_client/engines/__init__.py`, what runs a step.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from threading import Event

import numpy as np

from edge_client.checkpoint import Checkpoint, Progress
from edge_client.engines import Engine
from edge_client.features import Examples, Stopped
from wire.messages import TrainPlan
from wire.tensors import Arrays


@dataclass(frozen=True)
class Trained:
    """What a client gives back.

    delta: torch name -> float32, the trained parameters minus the offered ones.
    loss: mean over the examples of the last epoch.
    """

    delta: Arrays
    num_examples: int
    loss: float


def train(
    engine: Engine,
    parameters: Arrays,
    examples: Examples,
    plan: TrainPlan,
    client: str,
    stop: Event,
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Train by `plan`, from where `checkpoint` has it, and leave there how far it comes.

    parameters: torch name -> float32, all that train. Raises `Stopped`.
    """
    begin = checkpoint.resume(engine) if checkpoint is not None else None
    if begin is None:
        engine.load(parameters)
        begin = Progress()
    generator = np.random.default_rng([plan.seed, zlib.crc32(client.encode())])
    loss = 0.0
    for epoch in range(plan.local_epochs):
        order = generator.permutation(len(examples))
        views = generator.integers(plan.augmentations, size=len(order)) if plan.augmentations else None
        if epoch < begin.epoch:
            continue
        start, total = (begin.first, begin.total) if epoch == begin.epoch else (0, 0.0)
        for first in range(start, len(order), plan.batch_size):
            if stop.is_set():
                raise Stopped
            if checkpoint is not None and checkpoint.due:
                checkpoint.save(engine, Progress(epoch, first, total))
            indices = np.sort(order[first : first + plan.batch_size])
            chosen = None if views is None else views[indices]
            # One batch in memory: it has no name that would keep it while the next is made.
            mean = engine.train_step(examples.batch(indices, chosen), plan.learning_rate)
            if plan.proximal_mu:
                engine.pull(parameters, plan.learning_rate * plan.proximal_mu)
            total += mean * len(indices)
        loss = total / len(order)
    delta = engine.parameters()
    for name, value in delta.items():  # in place: the engine still holds all its memory
        value -= parameters[name]
    return Trained(delta, len(examples), loss)
