"""Floating point operations of a client, counted by torch over the cuts that are trained.

Rules: the counter sees every matrix product and convolution of a step, forward and backward, on shapes
alone (the meta device): nothing is computed. Optimizer and norms are not counted. What a client does is
examples x epochs x rounds of a stage's step, and the prefix: of every step, or once when a stage begins.

Next: `export/stage.py`, which makes the cuts.
"""

from __future__ import annotations

from typing import Any

from scale import Scale


def client_flops(
    scale: Scale, schedule: str, examples: float, *, cached: bool, seed: int = 0
) -> dict[str, float]:
    """train, prefix (with every step), cache (once a stage), total: of one client over a whole run.

    examples: of a client, perhaps a mean.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from export.schedules import SCHEDULES
    from export.stage import cut_stages, example

    rounds = scale.rounds * (scale.num_stages if schedule == "end_to_end" else 1)
    model = scale.build()
    plan = SCHEDULES[schedule](model.depths, rounds)
    cuts = cut_stages(model.to("meta"), plan.stages)
    limits = dict.fromkeys((name for cut in cuts for name in cut.train.inputs), 2)

    def count(cut: Any, *, backward: bool) -> float:
        inputs = example(cut.inputs, scale.batch_size, limits, torch.Generator().manual_seed(seed))
        counter = FlopCounterMode(display=False)
        with counter, torch.set_grad_enabled(backward):
            loss = cut(*(value.to("meta") for value in inputs.values()))
            if backward:
                loss.backward()
        return counter.get_total_flops() / scale.batch_size

    passes = rounds * scale.local_epochs * examples
    segments = [sum(count(one, backward=False) for one in cut.segments.values()) for cut in cuts]
    train = sum(count(cut.train, backward=True) for cut in cuts) * passes
    prefixes = [sum(segments[:stage]) for stage in range(len(cuts))]
    prefix = 0.0 if cached else sum(prefixes) * passes
    cache = sum(segments) * examples if cached else 0.0
    return {"train": train, "prefix": prefix, "cache": cache, "total": train + prefix + cache}
